"""SIDs as single numbers, so that sorting, grouping and looking them up are operations on one array."""

import numpy as np

LARGEST_KEY = 2**63 - 1


def digit_sizes(codebook_sizes, suffix_size):
    """Values that each column of a SID can take, absent included. A SID's key is its digits in this mixed base."""
    return [int(size) + 1 for size in [*codebook_sizes, suffix_size]]


def fits_key(sizes):
    """Whether every key is a 63-bit number."""
    largest = 1
    for size in sizes:
        largest *= size
        if largest - 1 > LARGEST_KEY:
            return False
    return True


def sid_keys(sids, sizes):
    """
    Keys that are equal exactly where SIDs are.

    Args:
        sids (`np.ndarray`): Shape: (n, L + 1). Codes and suffix, -1 where absent.
        sizes (`list[int]`):
            What [`digit_sizes`] gives.

    Returns:
        `np.ndarray`: Shape: (n,). int64 that ascend as SIDs do, column by column, if they fit; otherwise byte strings, which
        have an order of their own.
    """
    if not fits_key(sizes):
        # Rows as byte strings of one width: exact to compare, whatever the number of layers and codes.
        return np.ascontiguousarray(sids, dtype=np.int32).view(f"S{4 * sids.shape[1]}").ravel()
    keys = np.zeros(len(sids), dtype=np.int64)
    for column, size in enumerate(sizes):
        keys *= size
        keys += sids[:, column]
        keys += 1
    return keys


def find_keys(sorted_keys, wanted):
    """
    Returns:
        `np.ndarray` (int64): the position of each wanted key among the sorted ones, -1 where there is none. Shape: (n,).
    """
    if len(sorted_keys) == 0:
        return np.full(len(wanted), -1, dtype=np.int64)
    positions = np.minimum(np.searchsorted(sorted_keys, wanted), len(sorted_keys) - 1)
    return np.where(sorted_keys[positions] == wanted, positions, -1)


def group_rows(keys):
    """
    Returns:
        `tuple[np.ndarray, np.ndarray]`: the group of each row, numbered in the order of the keys, shape (n,); and a row of each
        group, the first, shape (G,).
    """
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    is_first = np.ones(len(keys), dtype=bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    groups = np.empty(len(keys), dtype=np.int64)
    groups[order] = np.cumsum(is_first) - 1
    return groups, order[is_first]


def rank_in_groups(groups, popularity):
    """
    The place of each row within its group, most popular first, ties in the order of the rows.

    Args:
        groups (`np.ndarray`): Shape: (n,).
        popularity (`np.ndarray`): Shape: (n,).

    Returns:
        `tuple[np.ndarray, np.ndarray]`: the ranks, from 0, and the rows sorted by group and rank. Shape of both: (n,).
    """
    if len(popularity) and popularity.min() == popularity.max():
        order = np.argsort(groups, kind="stable")
    else:
        order = np.lexsort((-popularity, groups))
    ordered = groups[order]
    starts = np.zeros(len(groups), dtype=np.int64)
    starts[1:] = np.where(ordered[1:] != ordered[:-1], np.arange(1, len(groups)), 0)
    ranks = np.empty(len(groups), dtype=np.int64)
    ranks[order] = np.arange(len(groups)) - np.maximum.accumulate(starts)
    return ranks, order
