"""How items flow from layer to layer: children of a prefix, parents of a code, and heavy transitions."""

import numpy as np

FLOW_BINS = 32


def extend_prefixes(prefix, column, size):
    """
    Walks one layer down the tree of prefixes. An absent code (-1) is a child like any other.

    Args:
        prefix (`np.ndarray`): Shape: (N,).
            Number of each item's prefix, counted from 0 without gaps.
        column (`np.ndarray`): Shape: (N,).
            The layer's codes.
        size (`int`):
            K.

    Returns:
        `tuple[np.ndarray, np.ndarray, np.ndarray]`: the number of each item's longer prefix, shape (N,); children of each
        prefix, at least 1, shape (prefixes,); and parents of each code, the distinct prefixes that lead to it, 0 for an
        unused code, shape (K,).
    """
    # int64 holds prefix * (K + 1) for any catalog that fits into memory: there are at most N prefixes.
    edges, longer = np.unique(prefix * (size + 1) + column + 1, return_inverse=True)
    children = np.bincount(edges // (size + 1))
    parents = np.bincount(edges % (size + 1), minlength=size + 1)[1:]
    return longer, children, parents


def bin_flows(codes, counts, weights):
    """
    Weight that flows between bins of codes of adjacent layers.

    A bin holds codes of neighbouring frequency, the most frequent in bin 0, and all bins of a layer as many codes as
    each other, to within one. An absent code goes into one more bin, the last, which only layers with absent codes have.

    Args:
        codes (`np.ndarray`): Shape: (N, L).
        counts (`list[np.ndarray]`): Shape of each: (K,).
            Count of each code of each layer.
        weights (`np.ndarray`): Shape: (N,).

    Returns:
        `list[np.ndarray]`: L - 1 matrices. Shape of each: (bins of this layer, bins of the next), at most (33, 33).
    """
    flows, before, num_before = [], None, 0
    for layer, layer_counts in enumerate(counts):
        size = len(layer_counts)
        num_bins = min(FLOW_BINS, size)
        bin_of_code = np.empty(size + 1, dtype=np.int64)
        bin_of_code[np.argsort(-layer_counts, kind="stable")] = np.arange(size) * num_bins // size
        bin_of_code[-1] = num_bins  # where index -1, absence, leads
        bins = bin_of_code[codes[:, layer]]
        num_bins += bool((codes[:, layer] < 0).any())
        if before is not None:
            flow = np.bincount(before * num_bins + bins, weights, num_before * num_bins)
            flows.append(flow.reshape(num_before, num_bins))
        before, num_before = bins, num_bins
    return flows
