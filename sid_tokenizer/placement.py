"""Which SIDs products get: those of a new catalog, and those of products that join one, where nothing may move."""

import numpy as np
import torch

from .collisions import check_suffixes, rank_for_suffixes
from .reassignment import path_keys, reassign
from .sid_keys import digit_sizes, group_rows, rank_in_groups, sid_keys

POLICIES = ("share", "suffix", "reassign")


def place_first(codes, pruning, popularity, collisions, suffix_size, capacity, codebooks, embeddings):
    """
    SIDs of a new catalog's products.

    Args:
        codes (`np.ndarray`): Shape: (N, L).
        pruning ([`TokenPruning`])
        popularity (`np.ndarray`): Shape: (N,).
        collisions, suffix_size, capacity, embeddings: As for [`ProductCatalog.build`].
        codebooks (`list[torch.Tensor]` or `None`): Shape of each: (K, D). For `"reassign"`.

    Returns:
        `tuple[np.ndarray, int]`: SIDs with suffixes, shape (N, L + 1), and the number of suffixes reserved.
    """
    if collisions == "reassign":
        if codebooks is None:
            raise ValueError(
                'collisions="reassign" looks for the nearest free leaf, which takes the codebooks: pass quantizer=...'
            )
        by_popularity = np.argsort(-popularity, kind="stable")
        nothing = np.zeros(0, dtype=np.int64)
        placed = np.empty_like(codes, dtype=np.int64)
        placed[by_popularity] = reassign(
            codes[by_popularity],
            codebooks,
            pruning,
            capacity,
            nothing,
            nothing,
            None if embeddings is None else _Rows(embeddings, by_popularity, codebooks[0].shape[1]),
        )
        return _without_suffix(pruning.apply(placed)), 0
    sids = _without_suffix(pruning.apply(codes))
    if collisions == "share":
        return sids, 0
    sizes = digit_sizes([int(size) for size in pruning.codebook_sizes], 0)
    ranks = rank_for_suffixes(sids, sizes, popularity, np.zeros(len(sids), dtype=bool))
    largest = int(ranks.max(initial=-1)) + 1
    suffix_size = max(16, largest) if suffix_size is None else suffix_size
    remedy = 'Raise suffix_size, quantize with more codes or layers, or pass collisions="reassign" or "share".'
    check_suffixes(ranks, sids, suffix_size, remedy)
    sids[:, -1] = ranks
    return sids, suffix_size


def place_more(catalog, codes, popularity, collisions, codebooks, embeddings, reuse_withdrawn):
    """
    SIDs of products that join a catalog.

    - Where the products of a SID have suffixes, a newcomer gets the next one.
    - Where a SID has no suffix, a newcomer shares it, or, with `collisions="reassign"`, takes the nearest free leaf. It does
      the latter, too, where all products of the SID were withdrawn, since their leaf is not to be reused.
    - Newcomers that meet each other only are treated as in a new catalog.

    Args:
        catalog ([`ProductCatalog`])
        codes, popularity, collisions, embeddings, reuse_withdrawn: As for [`ProductCatalog.append`].
        codebooks (`list[torch.Tensor]` or `None`): Shape of each: (K, D).

    Returns:
        `np.ndarray`: SIDs with suffixes. Shape: (m, L + 1).

    Raises:
        `ValueError`: if suffixes or free leaves do not suffice, or a leaf has to be found without codebooks.
    """
    sizes = digit_sizes(catalog.codebook_sizes, catalog.suffix_size)
    sids = _without_suffix(catalog.pruning.apply(codes))
    columns = catalog.columns
    there, suffix_there = columns["sid_codes"], columns["sid_codes"][:, -1]
    live = np.diff(columns["sid_offsets"])

    # 1. what each newcomer meets at its codes
    no_suffix = there.copy()
    no_suffix[:, -1] = -1
    paths, _ = group_rows(np.concatenate([sid_keys(no_suffix, sizes), sid_keys(sids, sizes)]))
    num_paths, there_path, path = int(paths.max()) + 1, paths[: len(there)], paths[len(there) :]
    next_suffix = np.zeros(num_paths, dtype=np.int64)
    np.maximum.at(next_suffix, there_path, suffix_there.astype(np.int64) + 1)
    is_plain = np.zeros(num_paths, dtype=bool)
    is_plain[there_path[suffix_there < 0]] = True
    is_dead = is_plain & (np.bincount(there_path, live, num_paths) == 0)
    meets_suffixes = next_suffix[path] > 0

    # 2. a leaf elsewhere for those that may not stay
    if collisions == "reassign":
        moves = ~meets_suffixes
    else:
        moves = is_dead[path] & (not reuse_withdrawn)
    if moves.any():
        if codebooks is None:
            what = (
                'collisions="reassign" looks for the nearest free leaf'
                if collisions == "reassign"
                else f"{int(moves.sum())} products meet SIDs whose products are all withdrawn, and need another leaf"
            )
            raise ValueError(
                f"{what}, which takes the codebooks: pass quantizer=..."
                + ("" if collisions == "reassign" else ", or reuse_withdrawn=True to give them those SIDs")
                + "."
            )
        products = live if reuse_withdrawn else np.bincount(columns["product_sids"], minlength=len(there))
        # Neither a path with suffixes nor one that only withdrawn products have can take a product without suffix.
        closed = (suffix_there >= 0) | ((live == 0) & (not reuse_withdrawn))
        capacity = catalog.capacity
        counts = np.where(closed, capacity, np.minimum(products, capacity))
        others = sids[~moves & ~meets_suffixes, :-1]
        keys = np.concatenate([path_keys(part, catalog.codebook_sizes) for part in (there[:, :-1], others)])
        counts = np.concatenate([counts, np.full(len(others), capacity)])
        taken_keys, inverse = np.unique(keys, return_inverse=True)
        taken_counts = np.bincount(inverse, counts).astype(np.int64)
        order = np.flatnonzero(moves)
        order = order[np.argsort(-popularity[order], kind="stable")]
        rows = None if embeddings is None else _Rows(embeddings, order, codebooks[0].shape[1])
        placed = reassign(codes[order], codebooks, catalog.pruning, capacity, taken_keys, taken_counts, rows)
        sids[order, :-1] = catalog.pruning.apply(placed)

    # 3. suffixes
    if catalog.suffix_size:
        candidates = meets_suffixes if collisions != "suffix" else ~moves & ~is_plain[path]
        rows = np.flatnonzero(candidates)
        ranks = rank_for_suffixes(sids[rows], sizes, popularity[rows], meets_suffixes[rows])
        rows, ranks = rows[ranks >= 0], ranks[ranks >= 0]
        suffixes = next_suffix[path[rows]] + ranks
        if reuse_withdrawn:
            suffixes = _reuse_suffixes(path[rows], ranks, suffixes, there_path, suffix_there, live, num_paths)
        remedy = "Pass reuse_withdrawn=True if products there were withdrawn, or build a new catalog with a larger suffix_size."
        check_suffixes(suffixes, sids[rows], catalog.suffix_size, remedy)
        sids[rows, -1] = suffixes
    return sids


def _reuse_suffixes(path, ranks, suffixes, there_path, suffix_there, live, num_paths):
    """The suffixes of withdrawn products first, ascending, and then those never used."""
    free = np.flatnonzero((suffix_there >= 0) & (live == 0))
    _, order = rank_in_groups(there_path[free], -suffix_there[free].astype(np.float64))
    free = free[order]
    num_free = np.bincount(there_path[free], minlength=num_paths)
    first_free = np.cumsum(num_free) - num_free
    reuses = ranks < num_free[path]
    index = np.where(reuses, first_free[path] + ranks, 0)
    return np.where(reuses, suffix_there[free][index] if len(free) else 0, suffixes - num_free[path])


def _without_suffix(codes):
    return np.concatenate([codes, np.full((len(codes), 1), -1, dtype=codes.dtype)], axis=1)


class _Rows:
    """Embeddings in another order, read as they are needed."""

    def __init__(self, embeddings, order, dim):
        if not isinstance(embeddings, torch.Tensor):
            embeddings = np.asarray(embeddings)
        if embeddings.ndim != 2 or embeddings.shape[1] != dim:
            raise ValueError(
                f"embeddings have shape {tuple(embeddings.shape)}, the code vectors of the quantizer have {dim} numbers. Pass "
                "the embeddings that the quantizer encoded."
            )
        self.embeddings, self.order = embeddings, order

    def __getitem__(self, rows):
        part = torch.as_tensor(self.embeddings[self.order[rows]]).detach().float().cpu()
        if not part.isfinite().all():
            raise ValueError("embeddings hold NaN or infinite values, from which no nearest SID follows. Clean them.")
        return part


def check_policy(collisions, suffix_size=None, capacity=1, quantizer=None, embeddings=None):
    """
    Raises:
        `ValueError`: for an unknown way to treat collisions, or options that do not go with it.
    """
    if collisions not in POLICIES:
        raise ValueError(f"collisions={collisions!r} is unknown; choose one of {', '.join(map(repr, POLICIES))}.")
    if suffix_size is not None and collisions != "suffix":
        raise ValueError(f'suffix_size={suffix_size} needs collisions="suffix".')
    if suffix_size is not None and (
        isinstance(suffix_size, bool) or not isinstance(suffix_size, int) or suffix_size < 1
    ):
        raise ValueError(f"suffix_size={suffix_size!r} must be a whole number from 1: the suffix tokens to reserve.")
    if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
        raise ValueError(f"capacity={capacity!r} must be a whole number from 1: the products that may share a SID.")
    if capacity != 1 and collisions != "reassign":
        raise ValueError(f'capacity={capacity} needs collisions="reassign".')
    if embeddings is not None and collisions != "reassign":
        raise ValueError('embeddings are used by collisions="reassign" only; the codes say the rest.')


def check_inputs(num_products, codes, popularity, texts, embeddings):
    """
    Returns:
        `np.ndarray` (float64): the popularity, zeros if `None` was given. Shape: (N,).

    Raises:
        `ValueError`: if a column has another length, or a popularity is not finite.
    """
    named = (("codes", codes), ("popularity", popularity), ("texts", texts), ("embeddings", embeddings))
    for name, column in named:
        if column is not None and len(column) != num_products:
            raise ValueError(f"{name} has {len(column)} rows for {num_products} product ids: one row per product.")
    popularity = np.zeros(num_products) if popularity is None else np.array(popularity, dtype=np.float64)
    if popularity.ndim != 1 or not np.isfinite(popularity).all():
        raise ValueError("popularity must be one finite number per product.")
    return popularity
