"""Folders as Baichuan and Baichuan2 lie on the Hub: their keys, names and files, but tiny."""

import json
from pathlib import Path

import torch
from plain_baichuan import random_weights
from safetensors.torch import save_file

# Keys that only some of the published config.json have. Baichuan2-13B says nothing of ALiBi: that is to be told from its having no
# max_position_embeddings; and nothing but the vocabulary's size or the class tells version 1, which has no NormHead.
KINDS = {
    "7B": {"max_position_embeddings": 4096, "model_max_length": 4096, "z_loss_weight": 0},
    "13B": {"gradient_checkpointing": False, "model_max_length": 4096},
    "v1-7B": {"max_position_embeddings": 4096},
    "v1-13B": {"gradient_checkpointing": False, "model_max_length": 4096},
}
REMOTE_CODE = 'raise RuntimeError("code of a checkpoint must not be run")\n'


def published_config(kind="7B", dtype=torch.float32, **changes):
    """`config.json` of one of KINDS as a dict, with tiny sizes; `changes` replace or, if `None`, remove keys."""
    spelling = "BaiChuan" if kind == "v1-7B" else "Baichuan"
    config = {
        "_from_model_config": True,
        "architectures": [f"{spelling}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_baichuan.{spelling}Config",
            "AutoModelForCausalLM": f"modeling_baichuan.{spelling}ForCausalLM",
        },
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 8 if kind.startswith("v1") else 32,
        "initializer_range": 0.02,
        "intermediate_size": 16 if kind.startswith("v1") else 56,
        "model_type": "baichuan",
        "num_attention_heads": 2 if kind.startswith("v1") else 4,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "tokenizer_class": "BaichuanTokenizer",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.29.2",
        "use_cache": True,
        "vocab_size": 64000 if kind.startswith("v1") else 240,
    }
    config = config | KINDS[kind] | changes
    return {key: config[key] for key in sorted(config) if config[key] is not None}


def write_checkpoint(
    folder,
    kind="7B",
    seed=0,
    file_format="safetensors",
    num_shards=2,
    dtype=torch.float32,
    stale_buffer=False,
    **changes,
):
    """
    Writes a checkpoint and returns `(weights, config)`.

    Args:
        folder (`str` or `Path`): made if it does not exist.
        kind (`str`, *optional*, defaults to `"7B"`): one of KINDS.
        seed (`int`, *optional*, defaults to 0): of the weights.
        file_format (`str`, *optional*, defaults to `"safetensors"`): or `"bin"`, written by `torch.save`.
        num_shards (`int`, *optional*, defaults to 2): files of weights; one goes without an index.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): of the weights, and named in config.json.
        stale_buffer (`bool`, *optional*, defaults to `False`): also the rotary frequencies of the first layer, which old versions of
            the published code saved; not among the weights that are returned.
        changes: keys of config.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = published_config(kind, dtype, **changes)
    weights = random_weights(
        seed,
        config["vocab_size"],
        config["hidden_size"],
        config["intermediate_size"],
        config["num_hidden_layers"],
        dtype,
    )
    generation_config = {
        "assistant_token_id": 196,
        "bos_token_id": config["bos_token_id"],
        "do_sample": True,
        "eos_token_id": config["eos_token_id"],
        "max_new_tokens": 2048,
        "pad_token_id": config["pad_token_id"],
        "repetition_penalty": 1.05,
        "temperature": 0.3,
        "top_k": 5,
        "top_p": 0.85,
        "transformers_version": config["transformers_version"],
        "user_token_id": 195,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(generation_config, indent=2))
    for name in ("configuration_baichuan.py", "modeling_baichuan.py", "tokenization_baichuan.py", "quantizer.py"):
        (folder / name).write_text(REMOTE_CODE)

    written = dict(weights)
    if stale_buffer:
        # Of no use to anybody: were they read, the model would be another.
        half = config["hidden_size"] // config["num_attention_heads"] // 2
        written["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.full((half,), 7.0)
    write_weights(folder, written, file_format, num_shards)
    return weights, config


def write_weights(folder, tensors, file_format="safetensors", num_shards=2):
    """Tensors in one file, or in several with an index, in the order given."""
    stem, suffix = ("model", "safetensors") if file_format == "safetensors" else ("pytorch_model", "bin")
    names, weight_map = list(tensors), {}
    for shard in range(num_shards):
        own = names[len(names) * shard // num_shards : len(names) * (shard + 1) // num_shards]
        file_name = f"{stem}.{suffix}" if num_shards == 1 else f"{stem}-{shard + 1:05}-of-{num_shards:05}.{suffix}"
        weight_map |= dict.fromkeys(own, file_name)
        if file_format == "safetensors":
            save_file({name: tensors[name] for name in own}, Path(folder) / file_name, metadata={"format": "pt"})
        else:
            torch.save({name: tensors[name] for name in own}, Path(folder) / file_name)
    if num_shards > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (Path(folder) / f"{stem}.{suffix}.index.json").write_text(json.dumps(index, indent=2))
