"""Baichuan and Baichuan 2 on the current transformers, 7B (rotary positions) and 13B (ALiBi)."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .alibi import alibi_mask, prepare_cache, remember_positions
from .configuration_baichuan import BaichuanConfig
from .norm_head import as_norm_head

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class UnpackProjections(Chunk):
    """
    The projections to queries, keys and values out of the one matrix, `W_pack`, that checkpoints have. Where the model is
    sharded, each rank has read its share of that matrix, which holds other rows than its shares of the three.
    """

    def convert(self, input_dict, source_patterns, target_patterns, full_layer_name=None, model=None, **kwargs):
        sharded = None if model is None else model.get_parameter(full_layer_name)
        if isinstance(sharded, DTensor):
            (fused,) = input_dict.values()
            fused = fused[0] if isinstance(fused, list) else fused
            mesh, placements = sharded.device_mesh, sharded.placements
            rows, columns = len(target_patterns) * sharded.shape[0], sharded.shape[1]
            whole = DTensor.from_local(
                fused, mesh, placements, shape=(rows, columns), stride=(columns, 1)
            ).full_tensor()
            input_dict = {source_patterns[0]: whole}
        parts = super().convert(input_dict, source_patterns=source_patterns, target_patterns=target_patterns, **kwargs)
        if isinstance(sharded, DTensor):
            distribute = lambda part: distribute_tensor(part, mesh, placements, src_data_rank=None)  # noqa: E731
            parts = {name: distribute(part).to_local() for name, part in parts.items()}
        return parts


register_checkpoint_conversion_mapping(
    "baichuan",
    [
        WeightConverter(
            "self_attn.W_pack.weight",
            [f"self_attn.{name}.weight" for name in PROJECTIONS],
            [UnpackProjections(dim=0)],
        )
    ],
    overwrite=True,
)


class BaichuanAttention(LlamaAttention):
    """Llama's attention, with rotated queries and keys or without."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        shape = hidden_states.shape[:-1]
        queries, keys, values = (
            getattr(self, name)(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2) for name in PROJECTIONS
        )
        if position_embeddings is not None:
            queries, keys = apply_rotary_pos_emb(queries, keys, *position_embeddings)
        elif queries.shape[1] < attention_mask.shape[1]:
            # Tensor parallelism: this rank has some of the heads.
            mesh = self.q_proj.weight.device_mesh
            rank = mesh.get_local_rank("tp" if mesh.ndim > 1 else None)
            attention_mask = attention_mask.narrow(1, rank * queries.shape[1], queries.shape[1])
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            queries,
            keys,
            values,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*shape, -1).contiguous()), weights

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # A Trainer resumes, and fetches its best model, by `load_state_dict`, past the conversion of from_pretrained.
        fused = state_dict.pop(f"{prefix}W_pack.weight", None)
        if fused is not None:
            for name, weight in zip(PROJECTIONS, fused.chunk(3), strict=True):
                state_dict[f"{prefix}{name}.weight"] = weight
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class BaichuanDecoderLayer(LlamaDecoderLayer):
    """Llama's layer with [`BaichuanAttention`]."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.self_attn = BaichuanAttention(config, layer_idx)


class BaichuanPreTrainedModel(PreTrainedModel):
    config_class = BaichuanConfig
    config: BaichuanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BaichuanDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": BaichuanDecoderLayer, "attentions": BaichuanAttention}
    # Buffers that older versions of transformers saved.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq", r"future_mask"]

    @classmethod
    def from_pretrained(cls, *args, weights_only=True, **kwargs):
        """As `PreTrainedModel.from_pretrained`; `.bin` files are read with `weights_only=True` or not at all."""
        if not weights_only:
            raise ValueError(
                "weights_only=False would run whatever code a .bin file holds. Leave it out: weights alone are read from it."
            )
        return super().from_pretrained(*args, **kwargs)


class BaichuanModel(BaichuanPreTrainedModel):
    """
    The decoder. With ALiBi, attention is `"eager"` or `"sdpa"`, and takes a mask of H times the usual size.

    Args:
        config ([`BaichuanConfig`]): The configuration.

    Raises:
        `ValueError`: if the configuration was given a rotation after it had been made, and has ALiBi.
    """

    def __init__(self, config):
        super().__init__(config)
        if config.position_embedding == "alibi" and config.rope_parameters is not None:
            raise ValueError(
                f"rope_parameters={config.rope_parameters} describe a rotation, and this model has none: its positions are "
                f"{config.position_embedding!r}. Leave them, and rope_scaling, out."
            )
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(BaichuanDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config) if config.position_embedding == "rope" else None
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ):
        r"""
        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`, *optional*):
                Token ids. Either they or `inputs_embeds` must be given.
            attention_mask (`torch.Tensor` of shape `(B, K)` or `(B, 1, T, K)`, *optional*):
                1 for tokens and 0 for padding, or what each token attends to, among the cached tokens and its own.
            position_ids (`torch.Tensor` of shape `(B or 1, T)`, *optional*):
                Positions, which both rotary embeddings and ALiBi go by; from the length of the cache on if not given.
            past_key_values ([`~transformers.Cache`], *optional*):
                The cache.
            inputs_embeds (`torch.Tensor` of shape `(B, T, H)`, *optional*):
                Embeddings in place of token ids.
            use_cache (`bool`, *optional*):
                Whether a cache is made where none is given; the configuration's if not given.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPast`]

        Raises:
            `ValueError`: if both or none of `input_ids` and `inputs_embeds` are given, or the attention takes no biases.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either input_ids or inputs_embeds, and not both.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        measured = 0  # the layer of the cache that says how much it holds
        if self.rotary_emb is None and past_key_values is not None:
            measured = self.config.num_hidden_layers
            prepare_cache(past_key_values, measured)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length(measured)
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + seen

        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            layer_idx=measured,
            allow_is_causal_skip=self.rotary_emb is not None,
        )
        if self.rotary_emb is not None:
            position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        else:
            position_embeddings = None
            mask = self._biased(mask, attention_mask, position_ids, past_key_values, inputs_embeds)

        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _biased(self, mask, attention_mask, position_ids, past_key_values, inputs_embeds):
        attention = self.config._attn_implementation
        if attention not in ("eager", "sdpa"):
            raise ValueError(
                f"`{attention}` attention takes no ALiBi biases, and would leave them out. Call "
                f'`model.set_attn_implementation("sdpa")`, or "eager".'
            )
        key_positions = position_ids
        if past_key_values is not None:
            position_ids = position_ids.expand(len(inputs_embeds), -1)
            key_positions = remember_positions(past_key_values, position_ids, self.config.num_hidden_layers)
        elif attention_mask is None and len(position_ids) == 1:
            mask = mask[:1]  # all rows see the same: one mask, H times as large as others, will do
        if mask.shape[-1] != key_positions.shape[-1]:
            raise ValueError(
                f"The attention mask is for {mask.shape[-1]} keys, and there are {key_positions.shape[-1]} of them, cached "
                "tokens included."
            )
        device = inputs_embeds.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs_embeds.dtype
        return alibi_mask(mask, position_ids, key_positions, self.config.num_attention_heads, dtype)


class BaichuanForCausalLM(BaichuanPreTrainedModel, GenerationMixin):
    r"""
    A Baichuan or Baichuan 2 model. Checkpoints load and save in their own layout, with queries, keys and values fused.

    Whatever is put in the place of `lm_head` stays normalised where the configuration says so: rows added by
    `resize_token_embeddings`, and rows trained by `peft` (`trainable_token_indices`).

    Args:
        config ([`BaichuanConfig`]): The configuration.

    Example:

    ```python
    >>> import rqsid
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer

    >>> model = AutoModelForCausalLM.from_pretrained("baichuan-inc/Baichuan2-7B-Base")
    >>> tokenizer = AutoTokenizer.from_pretrained("baichuan-inc/Baichuan2-7B-Base")
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = BaichuanModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def init_continuous_batching(self, *args, **kwargs):
        """As `generate_batch` calls it; refused with ALiBi, whose biases a paged cache cannot carry."""
        if self.config.position_embedding == "alibi":
            raise ValueError(
                "Continuous batching keeps keys in pages, without the positions that ALiBi needs. Call `generate()` on a batch "
                "padded on the left."
            )
        return super().init_continuous_batching(*args, **kwargs)

    def __setattr__(self, name, value):
        if name == "lm_head" and self.config.normalize_head:
            value = as_norm_head(value)
        super().__setattr__(name, value)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        r"""
        Args:
            labels (`torch.Tensor` of shape `(B, T)`, *optional*):
                Token ids that are to follow, shifted here; -100 where there is no loss.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Of how many of the last positions, or of which, logits are made; of all if 0.
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache:
                As [`BaichuanModel`].

        Returns:
            [`~transformers.modeling_outputs.CausalLMOutputWithPast`]
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


BaichuanConfig.register_for_auto_class()
BaichuanModel.register_for_auto_class("AutoModel")
BaichuanForCausalLM.register_for_auto_class("AutoModelForCausalLM")
