"""Moving products from crowded SIDs to the nearest free ones."""

import math

import numpy as np
import torch

from .sid_keys import find_keys, fits_key, group_rows, rank_in_groups

CHUNK_SCORES = 2**22  # products x codes that are compared at a time


def reassign(codes, codebooks, pruning, capacity, taken_keys, taken_counts, embeddings=None):
    """
    Gives each product a SID that at most `capacity` products share, and moves as few as possible.

    The first `capacity` products of a SID keep it. The others take the leaf of least added squared error that differs in
    the last layer only; where all of those are full, the layer before it changes too, and so on: from the longest prefix
    with room left, each layer takes the nearest code whose subtree has room. Error is measured from the product's
    embedding, or, without one, from the sum of its code vectors, which for codebooks of k-means is the same on average.
    Of several products that want one leaf, those with the least added error get it, then those that come first; the others
    ask for their next choices in that order, which is quick, but not the least sum of added errors that is possible.

    Args:
        codes (`np.ndarray`): Shape: (n, L).
            Full codes; who comes first has precedence.
        codebooks (`list[torch.Tensor]`): Shape of each: (K, D).
        pruning ([`TokenPruning`]):
            Codes that it leaves out of SIDs are one leaf.
        capacity (`int`):
            Products that may share a SID.
        taken_keys (`np.ndarray`): Shape: (m,).
            [`path_keys`] of the SIDs that have products already, ascending.
        taken_counts (`np.ndarray`): Shape: (m,).
            How many.
        embeddings (`torch.Tensor` or `np.ndarray`, *optional*): Shape: (n, D).

    Returns:
        `np.ndarray`: full codes of the same shape, whose pruned SIDs are within the capacity.

    Raises:
        `ValueError`: if all SIDs together have no room for the products, or there are more than 2^63 possible SIDs.
    """
    sizes = [len(codebook) for codebook in codebooks]
    tree = _Tree(sizes, pruning)
    if not fits_key(tree.bases):
        raise ValueError(
            f'collisions="reassign" handles up to 2^63 possible SIDs; codebooks {sizes} have more. Such codebooks leave few '
            'collisions: use collisions="suffix" or "share".'
        )
    room = math.prod(tree.choices) * capacity - int(np.minimum(taken_counts, capacity).sum())
    if len(codes) > room:
        raise ValueError(
            f"{len(codes)} products need a SID, but codebooks {sizes} with {pruning!r} and capacity={capacity} have room "
            f"for {room}. Raise capacity, use larger codebooks, or prune fewer codes."
        )
    codebooks = [codebook.detach().float().cpu() for codebook in codebooks]
    codes = codes.astype(np.int64)
    result, own_keys = codes.copy(), tree.keys(codes)

    # 1. who stays
    groups, _ = group_rows(own_keys)
    ranks, _ = rank_in_groups(groups, np.zeros(len(codes)))
    stays = _counts_of(own_keys, taken_keys, taken_counts) + ranks < capacity
    waiting = np.flatnonzero(~stays)
    taken = _add_counts(taken_keys, taken_counts, own_keys[stays])

    # 2. the others, keeping as long a prefix as has room
    for level in range(len(sizes) - 1, -1, -1):
        if not len(waiting):
            break
        # Only subtrees that somebody waits for matter, which keeps every round small.
        prefixes = np.unique(own_keys[waiting] // tree.leaves_below[level])
        nearby = find_keys(prefixes, taken[0] // tree.leaves_below[level]) >= 0
        local, placed = (taken[0][nearby], taken[1][nearby]), []
        while len(waiting):
            full = tree.full_nodes(*local, capacity, level)
            nodes = own_keys[waiting] // tree.leaves_below[level]
            active = waiting[find_keys(full[level], nodes) < 0]
            if not len(active):
                break
            # Products of the same codes want the same leaves: more of them than a few subtrees hold would ask in vain.
            ranks, order = rank_in_groups(own_keys[active], np.zeros(len(active)))
            active = active[order[ranks[order] < 4 * sizes[-1] * capacity]]
            proposed, errors = _propose(active, codes, codebooks, tree, level, full, local, capacity, embeddings)
            asks = proposed[:, 0] >= 0
            active, proposed, errors = active[asks], proposed[asks], errors[asks]
            leaves = tree.keys(proposed)
            order = np.lexsort((active, errors, leaves))
            ranks = np.empty(len(active), dtype=np.int64)
            ranks[order] = rank_in_groups(leaves[order], np.zeros(len(active)))[0]
            accepted = _counts_of(leaves, *local) + ranks < capacity
            result[active[accepted]] = proposed[accepted]
            placed.append(leaves[accepted])
            local = _add_counts(*local, leaves[accepted])
            waiting = np.setdiff1d(waiting, active[accepted], assume_unique=True)
        taken = _add_counts(*taken, np.concatenate([np.zeros(0, np.int64), *placed]))
    return result


def path_keys(sids, codebook_sizes):
    """
    Keys of SIDs without their suffixes, as [`reassign`] takes them.

    Args:
        sids (`np.ndarray`): Shape: (n, L). -1 where absent.
        codebook_sizes (`list[int]`)

    Returns:
        `np.ndarray` (int64): Shape: (n,).
    """
    keys = np.zeros(len(sids), dtype=np.int64)
    for layer, size in enumerate(codebook_sizes):
        keys = keys * (int(size) + 1) + sids[:, layer] + 1
    return keys


class _Tree:
    """
    The tree of all possible SIDs. A node at depth d is the number made of its d digits; digit 0 stands for all codes that
    are pruned, digit k + 1 for code k.
    """

    def __init__(self, sizes, pruning):
        self.bases = [size + 1 for size in sizes]
        self.digits = [np.arange(1, size + 1) for size in sizes]
        if pruning.num_pruned:
            self.digits[pruning.layer] = np.where(pruning.pruned, 0, self.digits[pruning.layer])
        self.choices = [len(np.unique(digits)) for digits in self.digits]
        self.leaves_below = [math.prod(self.bases[depth:]) for depth in range(len(sizes) + 1)]

    def keys(self, codes):
        keys = np.zeros(len(codes), dtype=np.int64)
        for layer, (base, digits) in enumerate(zip(self.bases, self.digits, strict=True)):
            keys = keys * base + digits[codes[:, layer]]
        return keys

    def full_nodes(self, leaf_keys, counts, capacity, level):
        """Sorted nodes without room, by depth, from the leaves up to `level`."""
        full = {len(self.bases): leaf_keys[counts >= capacity]}
        for depth in range(len(self.bases) - 1, level - 1, -1):
            parents, num_children = np.unique(full[depth + 1] // self.bases[depth], return_counts=True)
            full[depth] = parents[num_children == self.choices[depth]]
        return full

    def blocked(self, nodes, layer, full):
        """Which codes of `layer` lead from each node to a full one. Shape: (n, K)."""
        base, children = self.bases[layer], full[layer + 1]
        # The last child rather than the next node, which for the last node of 2^63 leaves would be too large a number.
        start, end = (
            np.searchsorted(children, nodes * base),
            np.searchsorted(children, nodes * base + base - 1, "right"),
        )
        lengths = end - start
        first = np.cumsum(lengths) - lengths
        index = np.arange(lengths.sum()) + np.repeat(start - first, lengths)
        digits = np.zeros((len(nodes), base), dtype=bool)
        digits[np.repeat(np.arange(len(nodes)), lengths), children[index] % base] = True
        return digits[:, self.digits[layer]]


def _propose(rows, codes, codebooks, tree, level, full, taken, capacity, embeddings):
    """
    The leaf that each product would take: codes, of shape (n, L), -1 for those that wait for the next round; and added
    squared errors, of shape (n,).
    """
    proposed = codes[rows]
    errors = np.empty(len(rows))
    last = len(codebooks) - 1
    chunk_rows = max(64, CHUNK_SCORES // max(tree.bases))
    for begin in range(0, len(rows), chunk_rows):
        part = slice(begin, begin + chunk_rows)
        own = torch.from_numpy(codes[rows[part]])
        vectors = [codebook[own[:, layer]] for layer, codebook in enumerate(codebooks)]
        target = sum(vectors) if embeddings is None else torch.as_tensor(embeddings[rows[part]]).float().cpu()
        own_error = (target - sum(vectors)).double().square().sum(1)
        residual = target - sum(vectors[:level]) if level else target.clone()
        nodes = np.zeros(len(own), dtype=np.int64)
        for layer in range(level):
            nodes = nodes * tree.bases[layer] + tree.digits[layer][proposed[part, layer]]
        for layer in range(level, last + 1):
            codebook = codebooks[layer]
            scores = (codebook.square().sum(1) - 2 * residual @ codebook.T).numpy()
            scores[tree.blocked(nodes, layer, full)] = np.inf
            best = scores.argmin(1)
            if layer == last:
                # Where more products want one leaf than it has room for, the others ask for their second, third, … best,
                # or equal ones would need a round each.
                added = (residual - codebook[torch.from_numpy(best)]).double().square().sum(1) - own_error
                leaves = nodes * tree.bases[layer] + tree.digits[layer][best]
                order = np.lexsort((rows[part], added.numpy(), leaves))
                place = np.empty(len(best), dtype=np.int64)
                place[order] = rank_in_groups(leaves[order], np.zeros(len(best)))[0]
                place = (_counts_of(leaves, *taken) + place) // capacity
                later = np.flatnonzero(place)
                ordered = np.argsort(scores[later], axis=1, kind="stable")
                place = np.minimum(place, len(codebook) - 1)
                best[later] = ordered[np.arange(len(later)), place[later]]
                waits = np.isinf(scores[np.arange(len(best)), best])
            proposed[part, layer] = best
            nodes = nodes * tree.bases[layer] + tree.digits[layer][best]
            residual = residual - codebook[torch.from_numpy(best)]
        errors[part] = residual.double().square().sum(1) - own_error
        proposed[part][waits] = -1
    return proposed, errors


def _counts_of(wanted, keys, counts):
    """The count of each wanted key, 0 where it is not among the sorted keys."""
    position = find_keys(keys, wanted)
    return np.where(position >= 0, counts[position], 0) if len(keys) else np.zeros(len(wanted), dtype=np.int64)


def _add_counts(keys, counts, more):
    """Sorted keys and counts with one more for each of `more`."""
    if not len(more):
        return keys, counts
    new_keys, new_counts = np.unique(more, return_counts=True)
    merged, inverse = np.unique(np.concatenate([keys, new_keys]), return_inverse=True)
    return merged, np.bincount(inverse, np.concatenate([counts, new_counts])).astype(np.int64)
