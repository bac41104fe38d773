import itertools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rqsid.modeling import model_checks
from rqsid.modeling.beam_search import beam_search
from rqsid.modeling.trie import SIDTrie

SEQUENCES = torch.tensor(list(itertools.product(range(20, 23), range(30, 33), range(40, 43))))[::2]
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3, 4, 12]]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_model(model_type, attention, **config):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=60, **({} if "n_embd" in config else SMALL) | config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def assert_exact(model):
    longest = max(map(len, PROMPTS))
    input_ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    sid_rows, scores = beam_search(model, input_ids, (input_ids > 0).long(), SIDTrie(SEQUENCES), 50, len(SEQUENCES))
    for row, prompt in enumerate(PROMPTS):
        whole = torch.cat([torch.tensor(prompt).expand(len(SEQUENCES), -1), SEQUENCES], 1)
        logits = model(input_ids=whole, use_cache=False).logits[:, len(prompt) - 1 : -1]
        exact = logits.log_softmax(-1).gather(-1, SEQUENCES[..., None]).sum((1, 2))
        assert sid_rows[row].tolist() == exact.argsort(descending=True).tolist()
        torch.testing.assert_close(scores[row], exact[sid_rows[row]], atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "model_type, config",
    [
        ("mistral", {"sliding_window": None, "num_key_value_heads": 2}),
        ("qwen3", {"num_key_value_heads": 2, "head_dim": 8}),
        ("gemma", {"num_key_value_heads": 2, "head_dim": 8}),  # embeddings scaled by the model
        ("granite", {"logits_scaling": 4.0}),
        ("phi", {}),  # rotates half of each head, has biases
        ("gpt_neox", {}),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": 1, "bos_token_id": 1}),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 16}),  # learnt positions, a projection before the head
        ("mixtral", {"num_local_experts": 4, "sliding_window": None, "num_key_value_heads": 2}),
    ],
)
def test_families_beside_the_tested_ones(model_type, config, attention):
    assert_exact(make_model(model_type, attention, **config))


@pytest.mark.parametrize(
    "model_type, config, message",
    [
        ("bloom", {"n_embd": 32, "n_layer": 2, "n_head": 4, "hidden_size": 32}, "forward takes no `position_ids`"),
        ("falcon", {"alibi": True}, "4-D mask FalconForCausalLM does not take"),
        ("gemma2", {"num_key_value_heads": 2, "head_dim": 8}, "DynamicSlidingWindowLayer"),
        ("mamba", {}, "LinearAttentionLayer"),
        (
            "gpt_neo",
            {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4},
            "has local ones",
        ),
    ],
)
def test_models_that_cannot_are_refused(model_type, config, message):
    model = make_model(model_type, "eager", **config)
    with pytest.raises(ValueError, match=f"{message}.*`generate\\(\\)` with a `SIDLogitsProcessor`"):
        assert_exact(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fault", ["mask", "position_ids"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_model_that_ignores_mask_or_positions_is_found_out(monkeypatch, attention, fault, dtype):
    model = make_model("llama", attention).to(dtype)
    monkeypatch.setattr(model_checks, "TESTED", ())
    if dtype == torch.float32:
        assert_exact(model)
    model_checks.tree_cache(model)
    model = make_model("llama", attention).to(dtype)
    forward = model.model.forward

    def ignore(input_ids, attention_mask, past_key_values=None, position_ids=None, **kwargs):
        if attention_mask.dim() == 4:
            if fault == "mask":
                attention_mask = torch.zeros_like(attention_mask) if attention == "eager" else None
            else:  # as a model does that counts its positions from the cache
                past = past_key_values.get_seq_length()
                position_ids = torch.arange(past, past + input_ids.shape[1]).expand_as(input_ids)
        return forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            **kwargs,
        )

    monkeypatch.setattr(model.model, "forward", ignore)
    for _ in range(2):
        with pytest.raises(ValueError, match="ignores the mask or the position ids"):
            model_checks.tree_cache(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "model_type, config",
    [
        ("mistral", {"sliding_window": None, "num_key_value_heads": 2}),
        ("qwen3", {"num_key_value_heads": 2, "head_dim": 8}),
        ("gemma", {"num_key_value_heads": 2, "head_dim": 8}),
        ("llama", {"hidden_size": 128, "num_hidden_layers": 8}),
        ("baichuan", {"position_embedding": "alibi", "max_position_embeddings": 64}),
    ],
)
def test_rounding_in_half_precision_is_no_fault(monkeypatch, model_type, config, dtype):
    """Plain and cached logits can be equal to the last bit there, and the tree's not."""
    monkeypatch.setattr(model_checks, "TESTED", ())
    model_checks.tree_cache(make_model(model_type, "sdpa", **config).to(dtype))


def test_attention_that_is_local_by_place_in_the_cache_is_found_out():
    model = make_model("gpt_neo", "eager", attention_types=[[["global", "local"], 1]], num_layers=2, num_heads=4)
    del model.config.attention_layers
    with pytest.raises(ValueError, match="ignores the mask or the position ids"):
        model_checks._try_tree(model)


def test_a_compiled_model_is_seen_through():
    model = make_model("gpt_neox", "sdpa")
    assert model_checks.innermost(torch.compile(model, backend="eager")) is model
    assert_exact(torch.compile(model, backend="eager"))


def test_a_model_is_tried_once(monkeypatch):
    tried = []
    original = model_checks._try_tree
    monkeypatch.setattr(model_checks, "_try_tree", lambda model: tried.append(model) or original(model))
    model = make_model("gpt_neox", "sdpa")
    for _ in range(2):
        assert_exact(model)
    assert tried == [model]
    model.set_attn_implementation("eager")
    assert_exact(model)
    assert tried == [model, model]


def test_virtual_tokens_are_refused():
    import peft

    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(make_model("llama", "sdpa"), config)
    with pytest.raises(ValueError, match="virtual tokens"):
        assert_exact(model)
