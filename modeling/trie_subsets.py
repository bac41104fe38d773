"""Parts of a trie, and several tries in one: made from the arrays, without going back to SIDs."""

import numpy as np
import torch

from .trie_building import INT32_MAX, edge_layout


def pruned(edges, indptr, leaf_rows, short_leaves, level_starts, keep):
    """
    The trie of some of the leaves.

    From the last level up, a node stays if one of its children does, or if it is a leaf that is kept.

    Args:
        edges, indptr, leaf_rows, short_leaves, level_starts: The parts of a trie with one root, tensors on one device.
        keep (`torch.Tensor` of bool of shape `(num_leaves,)`): The leaves to keep, at least one.

    Returns:
        `dict`: The parts of the new trie, and its `level_widths` and `level_sizes`.
    """
    device = edges.device
    depth = len(level_starts) - 2
    node_type = torch.int32 if level_starts[-1] <= INT32_MAX else torch.int64
    levels = torch.tensor(level_starts[:-1], dtype=short_leaves.dtype, device=device)
    short_bounds = torch.searchsorted(short_leaves, levels).tolist()
    new_edges, new_counts, new_short = [], [], []
    stays = keep[short_bounds[-1] :]
    for level in range(depth - 1, -1, -1):
        start, stop = level_starts[level : level + 2]
        first_edge = stop - 1
        new_edges.append(edges[first_edge : first_edge + len(stays)].index_select(0, _where(stays)))
        passed = torch.zeros(len(stays) + 1, dtype=node_type, device=device)
        torch.cumsum(stays, 0, dtype=node_type, out=passed[1:])
        passed = passed.index_select(0, indptr[start : stop + 1] - first_edge)
        counts = passed[1:] - passed[:-1]
        stays = counts > 0
        of_level = slice(short_bounds[level], short_bounds[level + 1])
        ends = short_leaves[of_level].index_select(0, _where(keep[of_level])).long() - start
        stays[ends] = True
        new_counts.append(counts.index_select(0, _where(stays)))
        new_short.append(torch.cumsum(stays, 0)[ends] - 1 if len(ends) else ends)
    for pieces in (new_edges, new_counts, new_short):
        pieces.reverse()

    # Levels that are empty now are given up, and with them the last level's leaves are no longer short.
    depth = sum(len(piece) > 0 for piece in new_edges)
    level_starts = [0, 1]
    for piece in new_edges[:depth]:
        level_starts.append(level_starts[-1] + len(piece))
    short = [piece.long() + start for piece, start in zip(new_short[:depth], level_starts[:depth], strict=True)]
    return {
        "edges": torch.cat(new_edges[:depth]),
        "indptr": offsets(torch.cat(new_counts[:depth])),
        "leaf_rows": leaf_rows.index_select(0, _where(keep)),
        "short_leaves": torch.cat(short).to(node_type),
        "level_starts": level_starts,
        "level_widths": [int(counts.max()) for counts in new_counts[:depth]],
        "level_sizes": [int((counts > 0).sum()) for counts in new_counts[:depth]],
    }


def _where(mask):
    # On the CPU numpy is several times as fast.
    return torch.from_numpy(np.flatnonzero(mask.numpy())) if mask.device.type == "cpu" else mask.nonzero()[:, 0]


def offsets(counts):
    """Where the edges of each node begin, and their number, in the narrowest type."""
    total = int(counts.sum(dtype=torch.int64))
    bounds = torch.zeros(
        len(counts) + 1, dtype=torch.int32 if total <= INT32_MAX else torch.int64, device=counts.device
    )
    torch.cumsum(counts, 0, dtype=bounds.dtype, out=bounds[1:])
    return bounds


def reordered(edges, indptr, leaf_rows, short_leaves, level_starts, symbols, num_symbols):
    """
    The same trie with other symbols, by which the children of each node are ordered anew.

    Args:
        edges, indptr, leaf_rows, short_leaves, level_starts: The parts of a trie, with any number of roots.
        symbols (`torch.Tensor` of shape `(num_edges,)`): The new symbol of each edge.
        num_symbols (`int`): Upper bound of the new symbols, exclusive.

    Returns:
        `dict`: the parts that changed.
    """
    num_roots, depth = level_starts[1], len(level_starts) - 2
    counts = indptr[1:].long() - indptr[:-1].long()
    is_leaf = torch.cat([counts == 0, counts.new_ones(level_starts[-1] - len(counts), dtype=torch.bool)])
    rows = torch.full_like(is_leaf, -1, dtype=torch.int64)
    rows[is_leaf] = leaf_rows.long()
    order = [torch.arange(num_roots, device=edges.device)]
    for level in range(depth):
        start, stop, end = level_starts[level : level + 3]
        new_place = torch.empty_like(order[-1])
        new_place[order[-1] - start] = torch.arange(stop - start, device=edges.device)
        parents = torch.repeat_interleave(new_place, counts[start:stop])
        key = parents * num_symbols + symbols[stop - num_roots : end - num_roots].long()
        order.append(stop + torch.argsort(key))
    order = torch.cat(order)
    rows = rows[order]
    inner = order[: len(counts)]
    new_counts = counts[inner]
    edge_type, shift = edge_layout(num_symbols)
    return {
        "edges": (symbols[order[num_roots:] - num_roots] - shift).to(getattr(torch, edge_type.__name__)),
        "indptr": offsets(new_counts),
        "leaf_rows": rows[is_leaf[order]].to(leaf_rows.dtype),
        "short_leaves": (new_counts == 0).nonzero()[:, 0].to(short_leaves.dtype),
    }


def stacked(tries):
    """
    The tries in one, level by level, in the order given.

    Args:
        tries (`list[dict]`): Parts of tries with the same symbols on the same device.

    Returns:
        `dict`: The parts of the forest.
    """
    depth = max(len(trie["level_starts"]) for trie in tries) - 2
    device = tries[0]["edges"].device
    # The first node of each level in each trie; levels that a trie does not have are empty.
    firsts = [
        trie["level_starts"] + [trie["level_starts"][-1]] * (depth + 2 - len(trie["level_starts"])) for trie in tries
    ]
    level_starts = [sum(first[level] for first in firsts) for level in range(depth + 2)]
    num_roots, num_edges = level_starts[1], level_starts[-1] - level_starts[1]
    index_type = torch.int32 if level_starts[-1] <= INT32_MAX else torch.int64

    edges, indptr, leaf_rows, short_leaves = [], [], [], []
    own_bounds = []
    for trie, first in zip(tries, firsts, strict=True):
        bounds = torch.tensor(first, dtype=trie["short_leaves"].dtype, device=device)
        bounds = torch.searchsorted(trie["short_leaves"], bounds).tolist()
        own_depth = len(trie["level_starts"]) - 2
        num_leaves = len(trie["leaf_rows"])
        own_bounds.append([bound if level <= own_depth else num_leaves for level, bound in enumerate(bounds)])
    for level in range(depth + 1):
        node, edge = level_starts[level], 0 if level == depth else level_starts[level + 1] - num_roots
        for trie, first, bounds in zip(tries, firsts, own_bounds, strict=True):
            start, stop = first[level : level + 2]
            own_depth, own_roots = len(trie["level_starts"]) - 2, trie["level_starts"][1]
            of_level = slice(bounds[level], bounds[level + 1])
            leaf_rows.append(trie["leaf_rows"][of_level])
            if level:
                edges.append(trie["edges"][start - own_roots : stop - own_roots])
            if level == depth:
                continue
            if level < own_depth:
                own = trie["indptr"][start:stop].to(index_type)
                indptr.append(own + (edge - (stop - own_roots)))
                short_leaves.append(trie["short_leaves"][of_level].to(index_type) + (node - start))
                edge += first[level + 2] - stop
            elif level == own_depth:
                indptr.append(torch.full((stop - start,), edge, dtype=index_type, device=device))
                short_leaves.append(torch.arange(node, node + stop - start, dtype=index_type, device=device))
            node += stop - start
    indptr.append(torch.full((1,), num_edges, dtype=index_type, device=device))
    row_type = max((piece.dtype for piece in leaf_rows), key=lambda dtype: dtype.itemsize)
    return {
        "edges": torch.cat(edges),
        "indptr": torch.cat(indptr),
        "leaf_rows": torch.cat([piece.to(row_type) for piece in leaf_rows]),
        "short_leaves": torch.cat(short_leaves),
        "level_starts": level_starts,
        **{
            name: [max(trie[name][level] for trie in tries if level < len(trie[name])) for level in range(depth)]
            for name in ("level_widths", "level_sizes")
        },
    }
