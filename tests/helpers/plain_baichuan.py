"""
Baichuan2 written out from its paper (arXiv 2309.10305), from Llama's (arXiv 2302.13971) and from ALiBi's (arXiv 2108.12409): one
sequence, no batch, no cache, no mask. What models are compared with in tests.
"""

import math

import torch


def alibi_slopes(num_heads):
    """
    Slopes of Press et al. (2022), one per head: for n heads, n a power of 2, the powers 1 .. n of 2^(-8/n). For other n those of the
    closest power of 2 below, then of twice that many heads the first, third, fifth ..., until there are n.
    """
    below = 2 ** (num_heads.bit_length() - 1)
    slopes = [2 ** (-8 * power / below) for power in range(1, below + 1)]
    return slopes + [2 ** (-8 * power / (2 * below)) for power in range(1, 2 * (num_heads - below), 2)]


def rms_norm(states, weight, eps):
    return states / (states.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(states, positions, base=10000.0):
    """
    RoPE of one head, `[tokens, head_dim]`: component i and component i + head_dim / 2 are one complex number, which turns by
    `position / base^(2 i / head_dim)`.
    """
    half = states.shape[-1] // 2
    angles = torch.tensor(
        [[position / base ** (2 * i / states.shape[-1]) for i in range(half)] for position in positions],
        dtype=states.dtype,
    )
    turned = torch.complex(states[:, :half], states[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], -1)


def attend(query, key, value, slope, positions):
    """
    One head, `[tokens, head_dim]` each: every token sees itself and what stands before it in the list. `slope` of ALiBi takes
    `slope * distance` from the scaled scores; 0 for none.
    """
    rows = []
    for i in range(len(query)):
        distances = torch.tensor([positions[i] - positions[j] for j in range(i + 1)], dtype=query.dtype)
        scores = key[: i + 1] @ query[i] / math.sqrt(query.shape[-1]) - slope * distances
        rows.append(torch.softmax(scores, 0) @ value[: i + 1])
    return torch.stack(rows)


def plain_logits(
    weights, token_ids, num_heads, position, normalize_head, eps=1e-6, positions=None, dtype=torch.float64
):
    """
    Logits of one sequence, `[tokens, vocab_size]`.

    Args:
        weights (`dict`): tensors under the names of the published checkpoints, queries, keys and values fused in `W_pack`.
        token_ids (`list[int]`): without padding.
        num_heads (`int`): attention heads.
        position (`str` or `None`): `"rope"` (7B), `"alibi"` (13B), or `None` for no positions at all.
        normalize_head (`bool`): NormHead of Baichuan2: rows of the output layer divided by their lengths.
        eps (`float`, *optional*, defaults to 1e-6): of RMSNorm.
        positions (`list[int]`, *optional*): of each token; 0, 1, 2 ... by default.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float64`): to compute in.
    """
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    positions = list(range(len(token_ids))) if positions is None else positions
    slopes = alibi_slopes(num_heads) if position == "alibi" else [0.0] * num_heads
    states = weights["model.embed_tokens.weight"][token_ids]
    head_dim = states.shape[-1] // num_heads
    layer = 0
    while f"model.layers.{layer}.self_attn.W_pack.weight" in weights:
        own = {name.removeprefix(f"model.layers.{layer}."): tensor for name, tensor in weights.items()}

        normed = rms_norm(states, own["input_layernorm.weight"], eps)
        queries, keys, values = (normed @ own["self_attn.W_pack.weight"].T).chunk(3, -1)
        heads = []
        for head in range(num_heads):
            columns = slice(head * head_dim, (head + 1) * head_dim)
            query, key = queries[:, columns], keys[:, columns]
            if position == "rope":
                query, key = rotate(query, positions), rotate(key, positions)
            heads.append(attend(query, key, values[:, columns], slopes[head], positions))
        states = states + torch.cat(heads, -1) @ own["self_attn.o_proj.weight"].T

        normed = rms_norm(states, own["post_attention_layernorm.weight"], eps)
        gate, up = normed @ own["mlp.gate_proj.weight"].T, normed @ own["mlp.up_proj.weight"].T
        states = states + (gate * torch.sigmoid(gate) * up) @ own["mlp.down_proj.weight"].T
        layer += 1

    head = weights["lm_head.weight"]
    if normalize_head:
        head = head / head.pow(2).sum(-1, keepdim=True).sqrt()
    return rms_norm(states, weights["model.norm.weight"], eps) @ head.T


def random_weights(seed, vocab_size, hidden_size, intermediate_size, num_layers, dtype=torch.float32):
    """
    Weights under the published names, large enough for attention to be far from uniform; rows of the output layer are of very
    different lengths, so that NormHead shows.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std):
        return torch.randn(shape, generator=generator) * std

    def around_one(size):
        return torch.rand(size, generator=generator) + 0.5

    std = 1.2 / math.sqrt(hidden_size)
    weights = {"model.embed_tokens.weight": normal(vocab_size, hidden_size, std=1.0)}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        weights[prefix + "self_attn.W_pack.weight"] = normal(3 * hidden_size, hidden_size, std=std)
        weights[prefix + "self_attn.o_proj.weight"] = normal(hidden_size, hidden_size, std=std)
        weights[prefix + "mlp.gate_proj.weight"] = normal(intermediate_size, hidden_size, std=std)
        weights[prefix + "mlp.up_proj.weight"] = normal(intermediate_size, hidden_size, std=std)
        weights[prefix + "mlp.down_proj.weight"] = normal(hidden_size, intermediate_size, std=std)
        weights[prefix + "input_layernorm.weight"] = around_one(hidden_size)
        weights[prefix + "post_attention_layernorm.weight"] = around_one(hidden_size)
    weights["model.norm.weight"] = around_one(hidden_size)
    lengths = 4 ** (2 * torch.rand(vocab_size, 1, generator=generator) - 1)
    weights["lm_head.weight"] = normal(vocab_size, hidden_size, std=0.5 / math.sqrt(hidden_size)) * lengths
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def split_weights(weights):
    """The same under the names of the model: queries, keys and values are the thirds of `W_pack`."""
    split = {}
    for name, tensor in weights.items():
        if name.endswith("W_pack.weight"):
            size = tensor.shape[1]
            for at, part in enumerate("qkv"):
                split[name.replace("W_pack", f"{part}_proj")] = tensor[at * size : (at + 1) * size]
        else:
            split[name] = tensor
    return split


def random_rows(seed, *lengths, vocab_size=60):
    """Lists of token ids from 3 on."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def pad_rows(rows, side):
    """Token ids with 0 as padding, mask and position ids `[rows, tokens]`."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros((2, len(rows), longest), dtype=torch.int64)
    for at, row in enumerate(rows):
        columns = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[at, columns], mask[at, columns] = torch.tensor(row), 1
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)
