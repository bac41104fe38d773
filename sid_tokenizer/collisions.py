"""Products that share a SID: how many there are, what that costs, and suffixes that tell them apart."""

from dataclasses import dataclass

import numpy as np

from .sid_keys import group_rows, rank_in_groups, sid_keys


@dataclass
class CollisionReport:
    """
    What [`ProductCatalog.collision_report`] counts, over the products that are not withdrawn.

    Args:
        products (`int`): products.
        sids (`int`): distinct SIDs that they have.
        colliding_products (`int`): products that share their SID with another.
        colliding_pairs (`int`): pairs of products with the same SID.
        largest_group (`int`): products of the most crowded SID.
        recall_ceiling (`dict[int, float]`): the best possible item-level Recall@k of a model that always ranks the right SID
            first, if every product is bought equally often: the share of products within the first k of their SID.
        weighted_recall_ceiling (`dict[int, float]` or `None`): the same if products are bought as often as their popularity
            says; `None` where all popularities are 0 or one is negative.
    """

    products: int
    sids: int
    colliding_products: int
    colliding_pairs: int
    largest_group: int
    recall_ceiling: dict[int, float]
    weighted_recall_ceiling: dict[int, float] | None

    def __str__(self):
        share = self.colliding_products / max(1, self.products)
        lines = [
            f"{self.products:,} products, {self.sids:,} SIDs",
            f"{self.colliding_products:,} products ({share:.2%}) share a SID, in {self.colliding_pairs:,} pairs; the largest "
            f"group has {self.largest_group:,}",
        ]
        for k, ceiling in self.recall_ceiling.items():
            weighted = (
                ""
                if self.weighted_recall_ceiling is None
                else f", by popularity {self.weighted_recall_ceiling[k]:.4f}"
            )
            lines.append(f"item-level Recall@{k} cannot exceed {ceiling:.4f}{weighted}")
        return "\n".join(lines)


def report_collisions(group_sizes, sid_products, popularity, ks=(1, 10, 50)):
    """
    Args:
        group_sizes (`np.ndarray`): Shape: (S,).
            Products of each SID.
        sid_products (`np.ndarray`): Shape: (n,).
            Product rows, grouped by SID, best first.
        popularity (`np.ndarray`): Shape: (N,).
        ks (`tuple[int]`, *optional*, defaults to `(1, 10, 50)`):
            Depths of the recall ceiling.

    Returns:
        [`CollisionReport`]
    """
    sizes = group_sizes[group_sizes > 0].astype(np.int64)
    num_products = int(sizes.sum())
    ranks = np.arange(num_products) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    weights = popularity[sid_products]
    has_weights = num_products > 0 and weights.min() >= 0 and weights.sum() > 0
    return CollisionReport(
        products=num_products,
        sids=len(sizes),
        colliding_products=int(sizes[sizes > 1].sum()),
        colliding_pairs=int((sizes * (sizes - 1) // 2).sum()),
        largest_group=int(sizes.max(initial=0)),
        recall_ceiling={k: float((ranks < k).mean()) if num_products else 1.0 for k in ks},
        weighted_recall_ceiling={k: float(weights[ranks < k].sum() / weights.sum()) for k in ks}
        if has_weights
        else None,
    )


def rank_for_suffixes(sids, sizes, popularity, must_have):
    """
    The place of each product among those with the same SID, in order of popularity, where they need suffixes.

    Args:
        sids (`np.ndarray`): Shape: (n, L + 1).
            SIDs without suffixes.
        sizes (`list[int]`):
            What [`digit_sizes`] gives.
        popularity (`np.ndarray`): Shape: (n,).
        must_have (`np.ndarray` of bool): Shape: (n,).
            Where a product needs a suffix even if it is the only one.

    Returns:
        `np.ndarray` (int64): ranks from 0, -1 for products that need no suffix. Shape: (n,).
    """
    groups, _ = group_rows(sid_keys(sids, sizes))
    ranks, _ = rank_in_groups(groups, popularity)
    return np.where(must_have | (np.bincount(groups)[groups] > 1), ranks, -1)


def check_suffixes(suffixes, sids, suffix_size, remedy):
    """
    Raises:
        `ValueError`: if a suffix, counted from 0, lies beyond the reserved ones.
    """
    largest = int(suffixes.max(initial=-1))
    if largest >= suffix_size:
        crowded = sids[int(suffixes.argmax()), :-1]
        raise ValueError(
            f"{largest + 1} products would share the codes {crowded.tolist()} (-1: pruned) but for their suffixes, of which "
            f"{suffix_size} are reserved. {remedy}"
        )
