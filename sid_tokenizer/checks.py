"""Checks of arrays that several stations take."""

import numpy as np
import torch


def as_numpy(array):
    """A tensor or anything array-like as a numpy array."""
    return array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)


def check_codes(codes, codebook_sizes):
    """
    Args:
        codes (`np.ndarray` or `torch.Tensor`): Shape: (N, L). -1 stands for a layer that is absent.
        codebook_sizes (`list[int]`):
            Codes of each layer.

    Raises:
        `TypeError`: if the codes are not integers.
        `ValueError`: if the shape is not (N, L), or a code lies outside its codebook.
    """
    if "int" not in str(codes.dtype):
        raise TypeError(f"codes must be integers, got {codes.dtype}. Pass the codes as the quantizer gave them.")
    if codes.ndim != 2 or codes.shape[1] != len(codebook_sizes):
        raise ValueError(
            f"codes have shape {tuple(codes.shape)}, but codebook_sizes={list(codebook_sizes)} says (N, "
            f"{len(codebook_sizes)}): one column per layer."
        )
    for layer, size in enumerate(codebook_sizes):
        column = codes[:, layer]
        if len(column) and (int(column.min()) < -1 or int(column.max()) >= size):
            bad = int(column.min()) if int(column.min()) < -1 else int(column.max())
            raise ValueError(
                f"Layer {layer} holds the code {bad}, outside its codebook of {size} codes (0 to {size - 1}; -1 for an "
                "absent layer). Pass the codes and the codebook_sizes of the same quantizer."
            )


def check_weights(weights, num_items):
    """
    Returns:
        `np.ndarray` (float64): the weights, or ones if `None` was given. Shape: (N,).

    Raises:
        `ValueError`: if they have another length, a negative or non-finite entry, or no positive one.
    """
    if weights is None:
        return np.ones(num_items)
    weights = np.asarray(weights, dtype=np.float64)
    if weights.shape != (num_items,):
        raise ValueError(
            f"weights have shape {weights.shape}, but there are {num_items} items: pass one weight per item."
        )
    if not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() == 0:
        raise ValueError("weights must be finite, not negative, and not all zero; pass counts such as purchases.")
    return weights
