"""Attention with linear biases, by position ids (Press et al. 2021, arXiv 2108.12409): Baichuan's 13B models."""

import torch
from transformers.cache_utils import DynamicLayer, StaticLayer


def alibi_slopes(num_heads, device=None):
    """
    The slopes of the heads, as the authors of ALiBi chose them: a geometric sequence that ends at 2^-8, and where the number of
    heads is no power of two, that of the next smaller power, followed by every other slope of the next larger one.

    Args:
        num_heads (`int`): Number of heads.
        device (`torch.device`, *optional*): Where the slopes are to be.

    Returns:
        `torch.Tensor` (float32): Shape: (num_heads,).
    """
    power = 2 ** (num_heads.bit_length() - 1)
    steps = torch.arange(1, power + 1, dtype=torch.float32, device=device)
    between = 1 + 2 * torch.arange(num_heads - power, dtype=torch.float32, device=device)
    return torch.exp2(-8 * torch.cat([steps / power, between / (2 * power)]))


def alibi_mask(mask, position_ids, key_positions, num_heads, dtype):
    """
    Adds the biases to a mask.

    Args:
        mask (`torch.Tensor` of shape `(B or 1, 1, Q, K)`):
            Which of the keys each query attends to (bool), or what is added to its scores.
        position_ids (`torch.Tensor` of shape `(B or 1, Q)`):
            Positions of the queries.
        key_positions (`torch.Tensor` of shape `(B or 1, K)`):
            Positions of the keys.
        num_heads (`int`):
            Number of heads.
        dtype (`torch.dtype`):
            In which attention is computed.

    Returns:
        `torch.Tensor` (`dtype`): what is added to the scores; a query that may see nothing sees all keys alike, which is finite.
        Shape: (B or 1, H, Q, K).
    """
    # Distances are small where attention is large; positions themselves would lose their last digits in half precision.
    distances = (position_ids[:, None, :, None] - key_positions[:, None, None, :]).float()
    bias = -alibi_slopes(num_heads, distances.device)[:, None, None] * distances
    smallest = torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        return bias.to(dtype).masked_fill(~mask, smallest)
    return (bias + mask).clamp_min_(smallest).to(dtype)


def prepare_cache(cache, num_layers):
    """
    Gives a cache one more layer, whose keys are the positions of the other layers' keys, so that positions are reordered,
    repeated, cropped and reset with it.

    Args:
        cache ([`~transformers.Cache`]):
            The model's cache, before its layers are updated.
        num_layers (`int`):
            How many layers the model has; the index of the additional one.

    Raises:
        `ValueError`: if the cache was filled without positions.
    """
    while len(cache.layers) <= num_layers:
        if getattr(cache, "layer_class_to_replicate", None) is not None:
            cache.layers.append(cache.layer_class_to_replicate())
        elif isinstance(cache.layers[0], StaticLayer):
            cache.layers.append(StaticLayer(cache.layers[0].max_cache_len))
        else:
            cache.layers.append(DynamicLayer())
    *layers, positions = cache.layers[: num_layers + 1]
    if isinstance(positions, DynamicLayer):
        found, length = (
            {layer.get_seq_length() for layer in layers if layer.is_initialized},
            positions.get_seq_length(),
        )
        if found - {length}:
            raise ValueError(
                f"The cache holds {max(found)} tokens, and the positions of {length}. A model with ALiBi keeps positions as one "
                "more layer of its cache: pass the cache on with all its layers, or start with an empty one. Prefix tuning fills "
                "caches without positions, and is not possible; prompt tuning is."
            )


def remember_positions(cache, position_ids, num_layers):
    """
    Args:
        cache ([`~transformers.Cache`]): A cache that [`prepare_cache`] has seen.
        position_ids (`torch.Tensor` of shape `(B, Q)`): Positions of the new keys.
        num_layers (`int`): How many layers the model has.

    Returns:
        `torch.Tensor`: positions of all keys. Shape: (B, K).
    """
    positions = position_ids[:, None, :, None]
    return cache.layers[num_layers].update(positions, positions)[0][:, 0, :, 0]
