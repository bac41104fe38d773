"""What pruning the K most frequent codes of a layer costs, for every K at once."""

from dataclasses import dataclass

import numpy as np
import torch

from .checks import check_weights
from .figures import plot_sweep
from .pruning import TokenPruning, order_by_frequency
from .sid_tokens import layer_letter


@dataclass(eq=False)
class PruningSweep:
    """
    What [`sweep`] measured. Position K of every array is about pruning the K most frequent codes of the layer, K from 0,
    nothing, to all codes, which is dropping the layer. Shape of each: (size of the layer + 1,).

    Args:
        layer (`int`): 0-based.
        num_items (`int`): N.
        num_pruned (`np.ndarray` of int64): K.
        share (`np.ndarray` of float64): (weighted) share of the items that lose the token.
        unique_sids (`np.ndarray` of int64): distinct SIDs.
        mean_length (`np.ndarray` of float64): codes per SID, averaged over (weighted) items.
        colliding_items (`np.ndarray` of int64): items that share their SID with another.
        colliding_pairs (`np.ndarray` of int64): pairs of items with the same SID.
        largest_group (`np.ndarray` of int64): items of the most crowded SID.
        layer_entropy (`np.ndarray` of float64): Shannon entropy in bits of the layer's codes over the (weighted) items that
            keep theirs; 0 if none does.
        layer_evenness (`np.ndarray` of float64): that entropy / log2 of the number of codes that are left, used or not; 1
            if at most one is left. A diagnosis divides by log2 of the whole codebook instead.
        sid_entropy (`np.ndarray` of float64): Shannon entropy in bits of the (weighted) items over the SIDs.
        recall_ceiling (`dict[int, np.ndarray]` of float64): per k the best possible item-level Recall@k, as in
            [`~diagnosis.Diagnosis`].
    """

    layer: int
    num_items: int
    num_pruned: np.ndarray
    share: np.ndarray
    unique_sids: np.ndarray
    mean_length: np.ndarray
    colliding_items: np.ndarray
    colliding_pairs: np.ndarray
    largest_group: np.ndarray
    layer_entropy: np.ndarray
    layer_evenness: np.ndarray
    sid_entropy: np.ndarray
    recall_ceiling: dict[int, np.ndarray]

    @property
    def lossless(self):
        """The largest K at which no two SIDs have merged; at least 1, since the absence of a single code names it."""
        return int(np.flatnonzero(self.unique_sids == self.unique_sids[0])[-1])

    def at_share(self, p):
        """
        Args:
            p (`float`):
                Share of the (weighted) items, in [0, 1].

        Returns:
            `int`: the smallest K at which that share loses the token. For p above 0 that is how many codes
            [`TokenPruning`] prunes with `threshold=p`.

        Raises:
            `ValueError`: for another p.
        """
        if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
            raise ValueError(f"p={p!r} must be a number in [0, 1]: it is a share of the items.")
        return int(np.searchsorted(self.share, p - 1e-12))

    def to_dict(self):
        """Everything as JSON-able values, arrays as lists."""
        content = {name: value.tolist() for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        content |= {"layer": self.layer, "num_items": self.num_items, "lossless": self.lossless}
        content["recall_ceiling"] = {str(k): ceiling.tolist() for k, ceiling in self.recall_ceiling.items()}
        return content

    def __str__(self):
        """A table of some K, and what they mean."""
        size = len(self.num_pruned) - 1
        steps = [0, 1, *(step * 10**power for power in range(len(str(size))) for step in (2.5, 5, 10))]
        shown = sorted({int(step) for step in steps if step < size} | {size})
        heads = ["tokens pruned", "items that lose one", "unique SIDs", "items that share one", "largest group"]
        heads += ["mean length", "evenness of the rest", "SID entropy"] + [
            f"ceiling @{k}" for k in self.recall_ceiling
        ]
        lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for k in shown:
            cells = [f"all {k}" if k == size else k, f"{self.share[k]:.1%}", self.unique_sids[k]]
            cells += [self.colliding_items[k], self.largest_group[k], f"{self.mean_length[k]:.2f}"]
            cells += [f"{self.layer_evenness[k]:.3f}", f"{self.sid_entropy[k]:.2f} bits"]
            cells += [f"{ceiling[k]:.4f}" for ceiling in self.recall_ceiling.values()]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        text = (
            f"Layer {layer_letter(self.layer)} ({self.layer}), its most frequent tokens first, {self.num_items} items. "
            "Pruning exactly one token loses nothing, because its absence names it; every further one merges the SIDs that "
            "differed only in pruned tokens."
        )
        if self.lossless > 1:
            text += f" Here no two SIDs differ only in the first {self.lossless}, so that pruning those loses nothing."
        return "\n".join([*lines, "", text])

    def plot(self, path=None):
        """
        Draws the curves; needs matplotlib (`pip install 'rqsid[plots]'`). See [`~figures.plot_sweep`].

        Args:
            path (`str` or `os.PathLike`, *optional*):
                File to write, `.png` or `.svg`.

        Returns:
            `matplotlib.figure.Figure`
        """
        return plot_sweep(self, path)


def sweep(codes, codebook_sizes, layer=1, weights=None, ks=(1, 10, 50)):
    """
    Measures for every K what pruning the K most frequent codes of a layer costs.

    Equal to applying `TokenPruning("top_k", layer=layer, top_k=K).fit(codes, codebook_sizes, weights)` and diagnosing,
    for each K, but in one pass. Let r be the rank of an item's code in the layer, 0 for the most frequent, and g its group,
    the items that have equal codes in all other layers. When K codes are pruned, the items of g with r < K share one SID,
    while r still parts the others. A measure is therefore a sum over pairs (g, r) of values that hold for ranges of K.

    Args:
        codes (`np.ndarray` or `torch.Tensor`): Shape: (N, L). Without absent codes.
        codebook_sizes (`list[int]`):
            Codes of each layer.
        layer (`int`, *optional*, defaults to 1):
            The 0-based layer, any but the last.
        weights (`np.ndarray`, *optional*): Shape: (N,).
            Weight of each item, for instance its interactions; 1 each if not given. The order of the codes goes by them
            as well.
        ks (`tuple[int, ...]`, *optional*, defaults to `(1, 10, 50)`):
            For which k the recall ceiling is measured. Time grows with the largest.

    Returns:
        [`PruningSweep`]

    Raises:
        `TypeError`: if the codes are not integers.
        `ValueError`: if the layer is the last or does not exist, there is no item, a code is absent or outside its codebook,
            `ks` are not whole numbers from 1, or `weights` has another length, a negative or non-finite entry, or no
            positive one.
    """
    # 1. refuse what does not fit
    if isinstance(layer, str):
        raise ValueError(
            f"layer={layer!r} must be a 0-based layer index. The layer that would be chosen is that of "
            'TokenPruning("drop_layer", layer="auto").fit(codes, codebook_sizes).layer.'
        )
    are_whole = isinstance(ks, list | tuple) and all(isinstance(k, int) and not isinstance(k, bool) for k in ks)
    if not are_whole or not ks or min(ks) < 1:
        raise ValueError(f"ks={ks!r} must be whole numbers from 1, as (1, 10, 50): recall is measured at each.")
    codes = codes.cpu().numpy() if isinstance(codes, torch.Tensor) else np.asarray(codes)
    TokenPruning("drop_layer", layer=layer).fit(codes, codebook_sizes)
    num_items, num_layers = codes.shape
    if num_items == 0:
        raise ValueError("codes hold no item. Pass the codes of at least one product.")
    weighted, weights = weights is not None, check_weights(weights, num_items)

    # 2. the layer alone: cumulative sums over the codes, from the most and from the least frequent
    size = int(codebook_sizes[layer])
    descending, counts = order_by_frequency(codes[:, layer], size, weights)
    rank_of_code = np.empty(size, dtype=np.int64)
    rank_of_code[descending] = np.arange(size)
    pruned = np.concatenate(([0.0], np.cumsum(counts[descending])))
    share = pruned / pruned[-1]
    ascending = counts[descending[::-1]]
    left = np.concatenate(([0.0], np.cumsum(ascending)))[::-1]
    # With W = sum w, the entropy of w / W is log2 W - (sum w log2 w) / W.
    weighted_logs = np.concatenate(([0.0], np.cumsum(ascending * _log2(ascending))))[::-1]
    layer_entropy = np.zeros(size + 1)
    np.divide(weighted_logs, left, out=layer_entropy, where=left > 0)
    layer_entropy = np.maximum(_log2(left) - layer_entropy, 0.0)
    num_left = size - np.arange(size + 1)
    layer_evenness = np.ones(size + 1)
    np.divide(layer_entropy, _log2(num_left), out=layer_evenness, where=num_left > 1)

    # 3. items by group, the heaviest of each first, and in the order of rows where equal
    rank, group = rank_of_code[codes[:, layer]], _pack_others(codes, codebook_sizes, layer)
    order = np.argsort(-weights, kind="stable") if weighted else np.arange(num_items)
    order = order[np.argsort(group[order], kind="stable")]
    rank, group, weights = rank[order], group[order], weights[order]
    is_first = np.concatenate(([True], group[1:] != group[:-1]))
    group = np.cumsum(is_first) - 1
    measures, place_in_pair = _measure_sids(rank, group, weights, size)
    return PruningSweep(
        layer=layer,
        num_items=num_items,
        num_pruned=np.arange(size + 1),
        share=share,
        mean_length=num_layers - share,
        layer_entropy=layer_entropy,
        layer_evenness=layer_evenness,
        recall_ceiling=_find_ceilings(rank, group, np.flatnonzero(is_first), weights, place_in_pair, size, ks),
        **measures,
    )


def _measure_sids(rank, group, weights, size):
    """
    A pair (g, r) has a SID of its own while K <= r. From K = r + 1 to the rank of the next pair of g, its items share the
    merged SID of g with those of the pairs before it.

    Returns the measures that depend on the SIDs' items and weights alone, by name; and the place of each item within its
    pair, in the order of `rank`. Shape of the places: (N,).
    """
    # 1. pairs and, within each group, their cumulative sums
    num_items = len(rank)
    pair = group * size + rank
    by_pair = np.argsort(pair, kind="stable")
    pair = pair[by_pair]
    starts = np.flatnonzero(np.concatenate(([True], pair[1:] != pair[:-1])))
    num_alone = np.diff(starts, append=num_items)
    place_in_pair = np.empty(num_items, dtype=np.int64)
    place_in_pair[by_pair] = np.arange(num_items) - np.repeat(starts, num_alone)
    weight_alone = np.add.reduceat(weights[by_pair], starts)
    pair_group, pair_rank = np.divmod(pair[starts], size)
    del by_pair, pair, starts
    is_last = np.concatenate((pair_group[1:] != pair_group[:-1], [True]))
    until = np.where(is_last, size, np.append(pair_rank[1:], size))
    num_merged, weight_merged = _cumulate_within(num_alone, is_last), _cumulate_within(weight_alone, is_last)

    # 2. differences over K, which add up to the sum over all SIDs
    def add_up(measure):
        alone, merged = measure(num_alone, weight_alone), measure(num_merged, weight_merged)
        change = np.zeros(size + 2, dtype=alone.dtype)
        change[0] = alone.sum()
        np.add.at(change, pair_rank + 1, merged - alone)
        np.subtract.at(change, until + 1, merged)
        return np.cumsum(change)[:-1]

    total = weights.sum()
    largest_alone, largest_merged = np.zeros((2, size + 1), dtype=np.int64)
    np.maximum.at(largest_alone, pair_rank, num_alone)
    np.maximum.at(largest_merged, pair_rank + 1, num_merged)
    measures = {
        "unique_sids": add_up(lambda number, weight: np.ones(len(number), dtype=np.int64)),
        "colliding_items": add_up(lambda number, weight: np.where(number > 1, number, 0)),
        "colliding_pairs": add_up(lambda number, weight: number * (number - 1) // 2),
        "largest_group": np.maximum(
            np.maximum.accumulate(largest_alone[::-1])[::-1], np.maximum.accumulate(largest_merged)
        ),
        "sid_entropy": np.maximum(add_up(lambda number, weight: -(weight / total) * _log2(weight / total)), 0.0),
    }
    return measures, place_in_pair


def _find_ceilings(rank, group, firsts, weights, place_in_pair, size, ks):
    """
    An item is among the first k of its SID up to some K: as long as its code is left, it goes by its place among the items
    of that code, and then by how many of the heavier items of its group have lost theirs, too. These are fewer than k while
    K is at most the k-th smallest rank among them.

    The k-th smallest rank so far is a running minimum of what the (k-1)-th let go. One `np.minimum.accumulate` serves all
    groups, since each group's ranks are moved below those of the group before.
    """
    num_items, ceilings = len(rank), {}
    offset = group * -(size + 1)
    largest = int(np.diff(firsts, append=num_items).max())
    moved = rank + offset
    for k in range(1, max(ks) + 1):
        if k >= largest:
            break
        running = np.minimum.accumulate(moved)
        if k in ks:
            before = np.empty(num_items, dtype=np.int64)
            np.subtract(running[:-1], offset[:-1], out=before[1:])
            before[firsts] = size
            last = np.where(before > rank, before, np.where(place_in_pair < k, rank, -1))
            # From the least to the most, so that nothing is subtracted: exactly 1 where no item is left out.
            ceiling = np.cumsum(np.bincount(last + 1, weights, minlength=size + 2)[::-1])[::-1]
            ceilings[k] = ceiling[1:] / ceiling[0]
        np.maximum(moved[1:], running[:-1], out=moved[1:])
        moved[firsts] = size + offset[firsts]
    return {k: ceilings[k] if k in ceilings else np.ones(size + 1) for k in ks}


def _pack_others(codes, codebook_sizes, layer):
    """One number for an item's codes in all layers but one. Shape: (N,)."""
    packed, possible = np.zeros(len(codes), dtype=np.int64), 1
    for other, size in enumerate(codebook_sizes):
        if other == layer:
            continue
        if possible * int(size) >= 2**63:
            distinct, packed = np.unique(packed, return_inverse=True)
            possible = len(distinct)
        packed *= size
        packed += codes[:, other].astype(np.int64, copy=False)
        possible *= int(size)
    return packed


def _cumulate_within(values, is_last):
    """Cumulative sums that start again after each entry of `is_last`. Shape: (pairs,)."""
    cumulative = np.cumsum(values)
    ends = np.flatnonzero(is_last)
    cumulative -= np.repeat(np.append(0, cumulative[ends[:-1]]).astype(values.dtype), np.diff(ends, prepend=-1))
    # A sum of weights that rounding made less than its last term would have no logarithm, or a wrong one.
    return np.maximum(cumulative, values)


def _log2(values):
    return np.log2(values, out=np.zeros(len(values)), where=values > 0)
