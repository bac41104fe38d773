"""A real GGUF file, of a tiny Llama and its byte-level tokenizer: loaded, fine-tuned on, and saved as an ordinary checkpoint."""

import importlib.util
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rqsid import ProductCatalog, SIDTokenizer

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune"


@pytest.fixture
def loading(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    spec = importlib.util.spec_from_file_location("finetune_loading", EXAMPLE / "loading.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bundle(base_tokenizer):
    codes = torch.cartesian_prod(*[torch.arange(2)] * 3).numpy()
    catalog = ProductCatalog.build([f"p{row}" for row in range(8)], codes, [2, 2, 2])
    return SIDTokenizer.from_base(base_tokenizer, catalog)


def write_gguf(path, model, base_tokenizer):
    """As llama.cpp's converter writes a Llama: rotary halves of queries and keys interleaved."""
    config, weights = model.config, {name: weight.numpy() for name, weight in model.state_dict().items()}
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(base_tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in vocabulary])
    state = json.loads(base_tokenizer.backend_tokenizer.to_str())
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    )
    writer.add_eos_token_id(base_tokenizer.eos_token_id)
    writer.add_bos_token_id(base_tokenizer.eos_token_id)

    def interleave(weight, heads):
        return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)

    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, weight in weights.items():
        parts = name.removesuffix(".weight").split(".")
        if parts[-1] in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if parts[-1] == "q_proj" else config.num_key_value_heads
            weight = interleave(weight, heads)
        target = whole.get(".".join(parts)) or f"blk.{parts[2]}.{names[parts[-1]]}"
        writer.add_tensor(f"{target}.weight", np.ascontiguousarray(weight, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("base_tokenizer, make_tiny_model", [("qwen", "llama")], indirect=True)
def test_a_gguf_file_becomes_an_ordinary_checkpoint(loading, bundle, base_tokenizer, make_tiny_model, tmp_path):
    model = make_tiny_model(len(base_tokenizer), num_key_value_heads=2)
    (tmp_path / "model").mkdir()
    write_gguf(tmp_path / "model" / "tiny.gguf", model, base_tokenizer)
    loaded = loading.load_model(str(tmp_path / "model"), bundle, gguf_file="tiny.gguf")
    loaded.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(again(tokens).logits, loaded(tokens).logits)
    assert not hasattr(again.config, "quantization_config") and again.dtype == torch.float32
    # Not the tokenizer of this model: other ids for the same tokens.
    bundle.base_size = 10_000
    with pytest.raises(ValueError, match="The tokenizer's base has 10000 tokens"):
        loading.load_model(str(tmp_path / "model"), bundle, gguf_file="tiny.gguf")
