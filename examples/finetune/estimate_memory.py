"""
Estimates what a configuration of finetune.py needs of each GPU, from shapes alone: nothing is loaded, nothing is measured.

    python examples/finetune/estimate_memory.py examples/finetune/configs/llama2_7b_full.yaml --gpus 8 --nodes 1 2

Weights, gradients and optimizer states are DeepSpeed's own estimates for ZeRO-2 and ZeRO-3 (bf16 compute, Adam, no offloading),
and for DDP 20 bytes a trained parameter (float32 weight, gradient, its copy to be sent, two moments) and 2 for autocast's copy. Activations are
counted in the way of Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198),
section 4, for a gated MLP and attention that keeps no scores. What the allocator wastes and the context of CUDA (1 to 2 GiB)
come on top.
"""

import argparse

import torch
import yaml
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config

from rqsid import BaichuanConfig

GIB = 2**30
NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "tie_word_embeddings",
)
# As in the checkpoints' config.json; all of them have as many heads for keys as for queries.
SHAPES = {
    "meta-llama/Llama-2-7b-hf": (LlamaConfig, 4096, 11008, 32, 32, 32000, False),
    "baichuan-inc/Baichuan2-7B-Base": (BaichuanConfig, 4096, 11008, 32, 32, 125696, False),
    "baichuan-inc/Baichuan2-13B-Base": (BaichuanConfig, 5120, 13696, 40, 40, 125696, False),
    "Qwen/Qwen1.5-0.5B": (Qwen2Config, 1024, 2816, 24, 16, 151936, True),
    "Qwen/Qwen1.5-1.8B": (Qwen2Config, 2048, 5504, 24, 16, 151936, False),
    "Qwen/Qwen1.5-7B": (Qwen2Config, 4096, 11008, 32, 32, 151936, False),
}


def model_config(name):
    if name not in SHAPES:
        return AutoConfig.from_pretrained(name)
    kind, *values = SHAPES[name]
    options = dict(zip(NAMES, values, strict=True))
    options["num_key_value_heads"] = options["num_attention_heads"]
    if kind is BaichuanConfig:
        del options["num_key_value_heads"]
        options["position_embedding"] = "alibi" if options["hidden_size"] == 5120 else "rope"
    return kind(**options)


def count_parameters(config, settings, sid_tokens):
    """`(all, trained, largest layer)`, the rows of SID tokens included; the largest layer is what ZeRO-3 gathers at once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    matrices = 1 if config.tie_word_embeddings else 2
    rows = sid_tokens * config.hidden_size * matrices
    total = sum(weight.numel() for weight in model.parameters()) + rows
    largest = max(sum(weight.numel() for weight in part.parameters(recurse=False)) for part in model.modules())
    largest += sid_tokens * config.hidden_size
    rank = settings.get("lora_r")
    if rank is None:
        return total, total, largest
    targets = settings["lora_target_modules"]
    adapted = [
        part
        for name, part in model.named_modules()
        if isinstance(part, torch.nn.Linear)
        and part is not model.get_output_embeddings()
        and (targets == "all-linear" or name.rsplit(".", 1)[-1] in targets)
    ]
    adapters = sum(rank * (part.in_features + part.out_features) for part in adapted)
    return total + adapters, adapters + rows, largest


def activation_bytes(config, batch_size, tokens, answer_tokens, is_checkpointed):
    """What the backward pass needs of the forward pass, in bytes, numbers of 16 bits."""
    heads = config.num_attention_heads
    keys = config.hidden_size * (getattr(config, "num_key_value_heads", None) or heads) // heads
    # Two norms' inputs 4h; input, queries, output of attention 6h, keys and values 4k; input of the MLP 2h, and 8f of its
    # gate, the gate's activation, the other branch and their product.
    layer = batch_size * tokens * (12 * config.hidden_size + 4 * keys + 8 * config.intermediate_size)
    if is_checkpointed:  # the inputs of all layers, and one layer at a time
        layers = 2 * batch_size * tokens * config.hidden_size * config.num_hidden_layers + layer
    else:
        layers = layer * config.num_hidden_layers
    # The logits of answers only: bfloat16, float32 and its gradient.
    logits = 10 * batch_size * answer_tokens * config.vocab_size
    # ALiBi's biases are one mask for all layers.
    is_alibi = getattr(config, "position_embedding", None) == "alibi"
    return layers + logits + is_alibi * 2 * batch_size * heads * tokens**2


def state_bytes(total, trained, largest, gpus, nodes):
    """Weights, gradients and optimizer states of each GPU, in bytes, by engine."""
    frozen, places = total - trained, {"num_gpus_per_node": gpus, "num_nodes": nodes}
    return {
        "DDP": 2 * frozen + 22 * trained,
        "ZeRO-2": 2 * frozen + estimate_zero2_model_states_mem_needs(trained, cpu_offload=False, **places)[1],
        "ZeRO-3": 2 * frozen // (gpus * nodes)
        + estimate_zero3_model_states_mem_needs(
            trained, largest, cpu_offload=False, cpu_offload_params=False, **places
        )[1],
    }


def describe(settings, gpus=8, nodes=1, sid_tokens=1024, answer_tokens=6):
    """
    Args:
        settings (`dict`): A configuration of finetune.py.
        gpus (`int`, *optional*, defaults to 8): GPUs of a node.
        nodes (`int`, *optional*, defaults to 1): Nodes.
        sid_tokens (`int`, *optional*, defaults to 1024): Tokens that the tokenizer adds.
        answer_tokens (`int`, *optional*, defaults to 6): Tokens of the longest answer, and one before it.

    Returns:
        `str`: one line.
    """
    config = model_config(settings["model"])
    total, trained, largest = count_parameters(config, settings, sid_tokens)
    tokens = settings["max_prompt_length"] + answer_tokens
    batch_size, is_checkpointed = (
        settings["per_device_train_batch_size"],
        settings.get("gradient_checkpointing") or settings.get("activation_checkpointing") or False,
    )
    activations = activation_bytes(config, batch_size, tokens, answer_tokens, is_checkpointed)
    if settings.get("lora_r") is not None and not isinstance(config, BaichuanConfig):
        # peft puts trained rows into a copy of the output layer, which the backward pass keeps, as it does its gradient.
        activations += 4 * config.vocab_size * config.hidden_size
    engines = state_bytes(total, trained, largest, gpus, nodes)
    columns = ", ".join(f"{name} {(states + activations) / GIB:.1f}" for name, states in engines.items())
    place = f"{nodes} x {gpus} GPUs"
    return f"{place}: {columns} GiB, {activations / GIB:.1f} of it activations; {trained / 1e6:,.0f}M of {total / 1e6:,.0f}M parameters"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of finetune.py")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2], help="nodes, one line for each")
    parser.add_argument("--sid_tokens", type=int, default=1024, help="tokens that the tokenizer adds")
    options = parser.parse_args()
    with open(options.config, encoding="utf-8") as file:
        settings = yaml.safe_load(file)
    for nodes in options.nodes:
        print(describe(settings, options.gpus, nodes, options.sid_tokens))


if __name__ == "__main__":
    main()
