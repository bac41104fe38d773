"""Adapters on the Hub: whoever loads one runs and unpickles nothing, whatever it names."""

import json
import os

import pytest
import torch
from huggingface_hub import HfApi
from peft import LoraConfig
from pushing_training import make_tokenizer
from transformers import AutoModelForCausalLM

from rqsid import initialize_sid_rows, load_lora
from rqsid.sid_tokenizer.hub import push_folder
from rqsid.trainer import add_lora, save_lora

pytestmark = pytest.mark.parametrize("base_tokenizer, make_tiny_model", [("llama", "llama")], indirect=True)


@pytest.fixture
def folder(base_tokenizer, make_tiny_model, hub_client, tmp_path):
    """An adapter of the model "org/base", which is on the Hub."""
    tokenizer = make_tokenizer(base_tokenizer)
    model = make_tiny_model(tokenizer.base_size)
    model.save_pretrained(tmp_path / "base")
    push_folder(tmp_path / "base", "org/base", private=True)
    model = AutoModelForCausalLM.from_pretrained("org/base")
    initialize_sid_rows(model, tokenizer)
    save_lora(add_lora(model, tokenizer, LoraConfig(r=4, target_modules=["q_proj"])), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder, file, **changes):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_private_repositories(folder, hub, monkeypatch):
    info = push_folder(folder, "org/adapter", private=True)
    edit(folder, "adapter_config.json", base_model_name_or_path="org/nothing")
    push_folder(folder, "org/adapter")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises((OSError, ValueError)):
        load_lora("org/adapter", revision=info.oid)
    model = load_lora("org/adapter", revision=info.oid, token=hub.token)
    assert model.get_base_model().config.sid_codebook and "default" in model.peft_config
    with pytest.raises(OSError, match="org/nothing"):
        load_lora("org/adapter", token=hub.token)


def test_what_adapters_name(folder, hub, tmp_path):
    for name in (str(tmp_path / "base"), "../base", "org/base/../../x", "~/base"):
        edit(folder, "adapter_config.json", base_model_name_or_path=name)
        push_folder(folder, "org/adapter")
        with pytest.raises(ValueError, match="as its base model, which is no repository there. Pass base_model="):
            load_lora("org/adapter")
    # Code beside the model that is named, which would leave a trace.
    trace, base = tmp_path / "trace", tmp_path / "base"
    (base / "evil.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    edit(base, "config.json", model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    push_folder(base, "stranger/evil", token=hub.stranger_token)
    edit(folder, "adapter_config.json", base_model_name_or_path="stranger/evil")
    push_folder(folder, "org/adapter")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load_lora("org/adapter")
    assert not trace.exists()
    # A pickle is opened neither of the model nor of the adapter.
    (base / "model.safetensors").unlink()
    torch.save({}, base / "pytorch_model.bin")
    edit(base, "config.json", model_type="llama", auto_map={})
    HfApi(token=hub.stranger_token).delete_file("model.safetensors", "stranger/evil")
    push_folder(base, "stranger/evil", token=hub.stranger_token, allow_pickles=True)
    with pytest.raises(OSError, match="safetensors"):
        load_lora("org/adapter")
    os.rename(folder / "adapter_model.safetensors", folder / "adapter_model.bin")
    for where in (folder, "org/adapter"):
        push_folder(folder, "org/adapter", allow_pickles=True, delete_patterns=["*.safetensors"])
        with pytest.raises(ValueError, match="has no adapter_model.safetensors. Weights in other formats are pickles"):
            load_lora(where)


def test_rows_that_an_adapter_does_not_hold(folder):
    for size in (10**15, 2000, -1, True, "700", None, 1e9):
        edit(folder, "sid_adapter.json", vocab_size=size)
        with pytest.raises(ValueError, match="vocab_size|does not hold all the rows"):
            load_lora(folder)
