"""Moving products from crowded SIDs to the nearest free ones."""

import math

import numpy as np
import torch

from .sid_keys import find_keys, fits_key, group_rows, rank_in_groups

CHUNK_ROWS = 2**14


def reassign(codes, codebooks, pruning, capacity, taken_keys, taken_counts, embeddings=None):
    """
    Gives each product a SID that at most `capacity` products share, and moves as few as possible.

    The first `capacity` products of a SID keep it. The others take the leaf of least added squared error that differs in
    the last layer only; where all of those are full, the layer before it changes too, and so on: from the longest prefix
    with room left, each layer takes the nearest code whose subtree has room. Error is measured from the product's
    embedding, or, without one, from the sum of its code vectors, which for codebooks of k-means is the same on average.
    Of several products that want one leaf, those with the least added error get it, then those that come first.

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
    position = find_keys(taken_keys, own_keys)
    present = np.where(position >= 0, taken_counts[position], 0) if len(taken_keys) else np.zeros(len(codes), np.int64)
    groups, _ = group_rows(own_keys)
    ranks, _ = rank_in_groups(groups, np.zeros(len(codes)))
    stays = present + ranks < capacity
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
            active = active[np.argsort(own_keys[active], kind="stable")]
            proposed, errors = _propose(active, codes, codebooks, tree, level, full, embeddings)
            asks = proposed[:, 0] >= 0
            active, proposed, errors = active[asks], proposed[asks], errors[asks]
            leaves = tree.keys(proposed)
            order = np.lexsort((active, errors, leaves))
            ranks = np.empty(len(active), dtype=np.int64)
            ranks[order] = rank_in_groups(leaves[order], np.zeros(len(active)))[0]
            position = find_keys(local[0], leaves)
            present = np.where(position >= 0, local[1][position], 0) if len(local[0]) else 0
            accepted = present + ranks < capacity
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
        start, end = np.searchsorted(children, nodes * base), np.searchsorted(children, (nodes + 1) * base)
        lengths = end - start
        first = np.cumsum(lengths) - lengths
        index = np.arange(lengths.sum()) + np.repeat(start - first, lengths)
        digits = np.zeros((len(nodes), base), dtype=bool)
        digits[np.repeat(np.arange(len(nodes)), lengths), children[index] % base] = True
        return digits[:, self.digits[layer]]


def _propose(rows, codes, codebooks, tree, level, full, embeddings):
    """
    The leaf that each product would take: codes, of shape (n, L), -1 for those that wait for the next round; and added
    squared errors, of shape (n,).
    """
    proposed = codes[rows]
    errors = np.empty(len(rows))
    last = len(codebooks) - 1
    for begin in range(0, len(rows), CHUNK_ROWS):
        part = slice(begin, begin + CHUNK_ROWS)
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
                # Products that want one leaf ask for their first, second, third best, or equal ones would need a round each.
                place, _ = rank_in_groups(nodes * tree.bases[layer] + best, np.zeros(len(best)))
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


def _add_counts(keys, counts, more):
    """Sorted keys and counts with one more for each of `more`."""
    if not len(more):
        return keys, counts
    new_keys, new_counts = np.unique(more, return_counts=True)
    merged, inverse = np.unique(np.concatenate([keys, new_keys]), return_inverse=True)
    return merged, np.bincount(inverse, np.concatenate([counts, new_counts])).astype(np.int64)
