"""The configuration of Baichuan and Baichuan 2, read from their own `config.json`."""

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

POSITION_EMBEDDINGS = ("rope", "alibi")


@strict
class BaichuanConfig(LlamaConfig):
    r"""
    The configuration of a [`BaichuanForCausalLM`]: Llama's fields and those in which the architecture differs from it.

    The published checkpoints say neither how positions are embedded nor whether the output layer is normalised. Both are
    inferred where they are not given, and saved from then on.

    Args:
        vocab_size (`int`, *optional*, defaults to 125696):
            Number of tokens.
        hidden_size (`int`, *optional*, defaults to 4096):
            Width of the hidden states; 5120 for the 13B models.
        intermediate_size (`int`, *optional*, defaults to 11008):
            Width of the gated layers; 13696 for the 13B models.
        num_hidden_layers (`int`, *optional*, defaults to 32):
            Number of layers; 40 for the 13B models.
        num_attention_heads (`int`, *optional*, defaults to 32):
            Number of heads; 40 for the 13B models.
        max_position_embeddings (`int`, *optional*):
            Tokens of the longest sequence; `model_max_length`, or 4096, if not given.
        model_max_length (`int`, *optional*):
            The same, under the name that all published checkpoints have.
        position_embedding (`str`, *optional*):
            `"rope"` (rotary, the 7B models) or `"alibi"` (a bias by distance, the 13B models). If not given: `"alibi"` where
            there is a `model_max_length` and no `max_position_embeddings`, as in the published 13B checkpoints, `"rope"`
            otherwise.
        normalize_head (`bool`, *optional*):
            Whether the output layer's rows are normalised to length one (Baichuan 2) or not (Baichuan 1). If not given:
            not for the 64,000 tokens and the class name of Baichuan 1.
        z_loss_weight (`float`, *optional*, defaults to 0):
            Weight of a penalty on the largest logit, 0 in the published checkpoints. It is kept, but not applied.
        **kwargs:
            As [`~transformers.LlamaConfig`].

    Raises:
        `ValueError`: for an unknown `position_embedding`, one that cannot be inferred, a scaled rotation beside ALiBi, or keys and values of fewer heads than
            queries, which the fused projection of the checkpoints cannot hold.
    """

    model_type = "baichuan"

    vocab_size: int = 125696
    max_position_embeddings: int | None = None
    model_max_length: int | None = None
    pad_token_id: int | None = 0
    position_embedding: str | None = None
    normalize_head: bool | None = None
    z_loss_weight: float | int = 0

    def __post_init__(self, **kwargs):
        if self.position_embedding is None:
            self.position_embedding = self._inferred_position_embedding()
        if self.normalize_head is None:
            is_first_version = "BaiChuanForCausalLM" in (self.architectures or ()) or self.vocab_size == 64000
            self.normalize_head = not is_first_version
        if self.max_position_embeddings is None:
            self.max_position_embeddings = self.model_max_length or 4096
        if self.model_max_length is None:
            self.model_max_length = self.max_position_embeddings
        if self.z_loss_weight:
            logger.warning_once(
                f"z_loss_weight={self.z_loss_weight} is kept in the configuration, but its loss is not applied."
            )
        super().__post_init__(**kwargs)
        if self.position_embedding == "alibi":
            if (self.rope_parameters or {}).get("rope_type", "default") != "default":
                raise ValueError(
                    f"rope_parameters={self.rope_parameters} describe a rotation, and this model has none: its positions are "
                    f"{self.position_embedding!r}. Leave them, and rope_scaling, out."
                )
            # Where a rotation is described, one would be looked for.
            self.rope_parameters = None
        if self.position_embedding not in POSITION_EMBEDDINGS:
            raise ValueError(
                f'position_embedding={self.position_embedding!r} is unknown: it must be "rope" or "alibi".'
            )
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} and num_attention_heads={self.num_attention_heads}: Baichuan's "
                f"queries, keys and values have as many heads each. Leave num_key_value_heads out."
            )
        if self.attention_bias or self.mlp_bias:
            raise ValueError("Baichuan's layers have no biases: attention_bias and mlp_bias must be False.")

    def _inferred_position_embedding(self):
        if self.max_position_embeddings is None and self.model_max_length is not None:
            found, other = "alibi", (4096, 32)
        else:
            found, other = "rope", (5120, 40)
        if (self.hidden_size, self.num_hidden_layers) == other:
            raise ValueError(
                f"max_position_embeddings={self.max_position_embeddings} and model_max_length={self.model_max_length} are those "
                f"of a checkpoint with {found!r} positions, {other[1]} layers of width {other[0]} those of one without. Pass "
                f'position_embedding="rope" or "alibi" (the published 7B models have "rope", the 13B models "alibi").'
            )
        return found
