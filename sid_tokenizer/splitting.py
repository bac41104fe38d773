"""Splitting crowded codes: what pruning leaves out of SIDs is told apart instead."""

import math
from numbers import Integral, Real

import numpy as np
import torch
from torch.nn.functional import normalize

from .assignment import chunk_rows
from .embeddings import EmbeddingReader
from .initialization import initial_codebook
from .quantizer import ResidualQuantizer
from .residual_kmeans import MAX_FLOATS_IN_MEMORY, assign_, assignment_terms

ROWS_PER_CHILD = 1024  # at which the share of a child is known to about 3 per cent
FIRST_STEP = 0.1  # of prices, as a share of the mean squared distance from the mean


@torch.no_grad()
def split_codes(
    quantizer, embeddings, layer, chosen, parts=2, seed=0, column="embedding", num_iterations=100, capacity=1.25
):
    r"""
    Splits codes of one layer, each into `parts` codes of about equally many embeddings.

    This follows the idea of CRAB (arXiv 2604.05113), to split the most popular tokens by regularised k-means where pruning
    drops them; how it is done is this project's own. The embeddings of a chosen code are what the quantizer encodes to
    it, a code's points what the layers before left over of them, and each code is split by itself:

    1. k-means on the code's points, from a k-means++ start and from a random one.
    2. Where a child has more than `capacity` times its share, children get prices, which are added to squared distances
       when clusters are formed. A price rises while too many of the points are nearest to the child, and falls again while
       they are not, until they are spread evenly without any price: prices push the children to where they need none, and
       are not kept.
    3. Of all iterations, that one is taken whose largest child is smallest, to a tenth of the capacity; of those that keep
       the capacity, the one of least squared error.

    Even parts have a price: where most of a code's points lie in one dense place and the others far from it, cutting the
    dense place in two explains less of the squared error than parting it from the others would. `capacity=parts` asks for
    nothing and gives plain k-means.

    Child 0, the one nearest to the parent, takes the parent's place, the others are appended to the codebook in the order
    of `chosen`, nearer ones first. All other codes of all layers keep their places and values, so that what a model learned
    of them stays meaningful; nothing is fitted again, though later layers meet other residuals than they were fitted on.
    As every code is the nearest one of the whole codebook, children may win embeddings from codes beside them, and lose
    some to them: afterwards counts are about, not exactly, equal. Equal embeddings cannot be parted.

    Args:
        quantizer ([`ResidualQuantizer`]):
            The fitted quantizer. Not changed.
        embeddings (`np.ndarray`, `torch.Tensor`, `datasets.Dataset`, `datasets.IterableDataset`, `str` or `os.PathLike`):
            Shape: (N, D). Read twice, in chunks. Of each chosen code at most 1024 random rows per child are held, fewer
            where all together would be more than 1 GiB.
        layer (`int`):
            The 0-based layer.
        chosen (`list[int]` or `np.ndarray`): Shape: (M,).
            The codes to split, for instance `np.argsort(-np.bincount(codes[:, layer]))[:25]`.
        parts (`int`, *optional*, defaults to 2):
            Codes to make of each.
        seed (`int`, *optional*, defaults to 0):
            Seed of the sample and of the starts.
        column (`str`, *optional*, defaults to `"embedding"`):
            The column of a data set that holds the embeddings.
        num_iterations (`int`, *optional*, defaults to 100):
            Iterations of the k-means of each code from each start, at most.
        capacity (`float`, *optional*, defaults to 1.25):
            Largest share of a child in its parent's points, as a multiple of `1 / parts`, at least 1. It is aimed at, and may
            be missed where points have heavy tails.

    Returns:
        [`ResidualQuantizer`]: a new one, of the same configuration but for `codebook_sizes[layer]`, which is larger by
        `len(chosen) * (parts - 1)`. Children have their parent's price where the quantizer has prices (`capacity`).

    Raises:
        `TypeError`: if `quantizer` is no [`ResidualQuantizer`], numbers are no integers, or the embeddings are of a kind that
            cannot be read.
        `ValueError`: if the quantizer is not fitted or encodes with beams; `layer`, `chosen` or `parts` are out of range; a
            chosen code is skipped, or has fewer distinct points than `parts`, so that it cannot be split; or whatever
            `encode` says of the embeddings.

    Example:

    ```python
    codes = quantizer.encode(embeddings)
    crowded = np.argsort(-np.bincount(codes[:, 1]), kind="stable")[:25]
    split = split_codes(quantizer, embeddings, layer=1, chosen=crowded)
    ```
    """
    layer, chosen, parts, seed, num_iterations = _check(
        quantizer, layer, chosen, parts, seed, num_iterations, capacity
    )
    layers, config = quantizer._layers(), quantizer.config
    cosine, dim = config.metric == "cosine", config.embedding_dim
    reader = EmbeddingReader(embeddings, column, dim, layers[0].codebook.device)
    terms = [assignment_terms(one, cosine) for one in layers[: layer + 1]]
    num_rows = chunk_rows(max(quantizer.codebook_sizes), layers[0].codebook.device)
    buffer = torch.empty(num_rows, dim, device=layers[0].codebook.device)

    # 1. which rows have the chosen codes
    slot_of_code = np.full(len(layers[layer].codebook), -1, dtype=np.int64)
    slot_of_code[chosen] = np.arange(len(chosen))
    rows, slots = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for start, rest in reader.chunks(num_rows, buffer):
        for index in range(layer + 1):
            codes = assign_(rest, layers[index], config, terms[index], leaves=index < layer)
        found = slot_of_code[codes.cpu().numpy()]
        members = np.flatnonzero(found >= 0)
        rows.append(start + members)
        slots.append(found[members])
    rows, slots = np.concatenate(rows), np.concatenate(slots)

    # 2. a random sample of each code's rows, in the order of the rows, in which they are read again
    most = max(16 * parts, min(ROWS_PER_CHILD * parts, MAX_FLOATS_IN_MEMORY // (len(chosen) * dim)))
    counts = np.bincount(slots, minlength=len(chosen))
    order = np.lexsort((np.random.default_rng(seed).random(len(rows)), slots))
    rank = np.arange(len(rows)) - (np.cumsum(counts) - counts)[slots[order]]
    taken = np.sort(order[rank < most])
    rows, slots = rows[taken], slots[taken]

    # 3. what the layers before left over of them, as this layer sees it
    points = torch.empty(len(rows), dim, device=buffer.device)
    for start, rest in reader.chunks(num_rows, buffer):
        first, last = np.searchsorted(rows, [start, start + len(rest)])
        few = rest[torch.from_numpy(rows[first:last] - start).to(rest.device)]
        for index in range(layer):
            assign_(few, layers[index], config, terms[index])
        points[first:last] = normalize(few, dim=1) if config.normalize_residuals else few

    # 4. each code by itself
    parents = layers[layer].codebook
    codebook = parents.new_empty(len(parents) + len(chosen) * (parts - 1), dim)
    codebook[: len(parents)] = parents
    own_rows = np.split(np.argsort(slots, kind="stable"), np.cumsum(np.bincount(slots, minlength=len(chosen)))[:-1])
    for slot, code in enumerate(chosen):
        own = points[torch.from_numpy(own_rows[slot]).to(points.device)]
        seen = normalize(own, dim=1) if cosine else own
        distinct = torch.unique(seen, dim=0)
        if len(distinct) < parts:
            raise ValueError(
                f"Code {code} of layer {layer} cannot be split into {parts}: its {counts[slot]} embeddings leave "
                f"{len(distinct)} distinct {'directions' if cosine else 'residuals'}. Choose other codes or fewer parts, and "
                "look for duplicate embeddings."
            )
        generator = torch.Generator().manual_seed(seed * 1_000_003 + int(code))
        starts = distinct[torch.randperm(len(distinct), generator=generator).to(distinct.device)]
        children = _even_kmeans(seen, starts, parts, capacity, seed, num_iterations, cosine)
        if cosine:
            children = children * _best_lengths(own, children)[:, None]
        distances = (children - parents[code]).square().sum(1)
        children = children[torch.argsort(distances, stable=True)]
        codebook[code] = children[0]
        start = len(parents) + slot * (parts - 1)
        codebook[start : start + parts - 1] = children[1:]
    layers[layer].codebook = codebook
    if layers[layer].prices is not None:
        prices = layers[layer].prices
        of_parents = torch.from_numpy(np.repeat(chosen, parts - 1)).to(prices.device)
        layers[layer].prices = torch.cat([prices, prices[of_parents]])
    sizes = quantizer.codebook_sizes
    sizes[layer] = len(codebook)
    return quantizer._changed(layers, codebook_sizes=sizes)


def _even_kmeans(points, starts, parts, capacity, seed, num_iterations, cosine):
    """
    Centres of which each is the nearest one of about equally many points.

    Args:
        points (`torch.Tensor`): Shape: (M, D). With `cosine`, of length one.
        starts (`torch.Tensor`): Shape: (S, D). Distinct points in random order, at least `parts`, to start from.
        parts (`int`)
        capacity (`float`): Largest count of a centre, as a multiple of the mean.
        seed (`int`)
        num_iterations (`int`): From each of the two starts, at most.
        cosine (`bool`): Whether centres are of length one.

    Returns:
        `torch.Tensor`: Shape: (parts, D).
    """
    # Around their mean the points of a small cluster far from 0 lose no digits.
    shift = torch.zeros_like(points[0]) if cosine else points.mean(0)
    points, starts = points - shift, starts - shift
    most, squares = capacity * len(points) / parts, float(points.square().sum())

    def assign(centres, prices):
        scores = torch.addmm((centres.square().sum(1) + prices) / 2, points, centres.T, beta=-1)
        best, codes = scores.max(1)
        return codes, torch.bincount(codes, minlength=parts), squares - 2 * float(best.sum())

    chosen, least = None, (parts + 1,)
    for init in ("k-means++", "random"):
        # Of few points, since the farthest of many are nobody's centre.
        centres = initial_codebook(starts[: 16 * parts], parts, init, seed)
        prices, before = torch.zeros(parts, device=points.device), None
        steps = torch.full_like(prices, FIRST_STEP * squares / len(points))
        own, own_iteration = (parts + 1,), 0
        for iteration in range(num_iterations):
            # 1. clusters with prices, and their means
            codes, counts, _ = assign(centres, prices)
            sums = torch.zeros_like(centres).index_add_(0, codes, points)
            centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
            if cosine:
                centres = normalize(centres, dim=1)

            # 2. what these means are worth without prices; in tenths, so that no error is given away for a few points
            _, counts, error = assign(centres, torch.zeros_like(prices))
            crowding = counts / most
            worth = (int((counts == 0).sum()), max(10, math.ceil(10 * float(crowding.max()))), error)
            if worth < own:
                own, own_iteration = worth, iteration
            if worth < least:
                chosen, least = centres, worth
            if own[:2] == (0, 10) and iteration >= own_iteration + 10:
                break

            # 3. prices, in steps of their own as those of `settle_prices`
            side = torch.where(crowding > 1, 1.0, -1.0)
            if before is not None:
                steps = steps * torch.where(side == before, 1.3, 0.5)
            before = side
            prices = (prices + side * steps * (crowding - 1).abs().clamp(0.05, 1)).clamp_min(0)
    return chosen + shift


def _best_lengths(points, directions):
    """The length of each direction that leaves the least squared error of its points. Shapes: (M, D), (K, D) -> (K,)."""
    projections, codes = (points @ directions.T).max(1)
    counts = torch.bincount(codes, minlength=len(directions))
    sums = torch.zeros(len(directions), device=points.device).index_add_(0, codes, projections)
    return torch.where(counts > 0, sums / counts.clamp_min(1), 1.0)


def _check(quantizer, layer, chosen, parts, seed, num_iterations, capacity):
    """The arguments as whole numbers and an array of int64; see [`split_codes`] for what is refused."""
    if not isinstance(quantizer, ResidualQuantizer):
        raise TypeError(
            f"quantizer must be a ResidualQuantizer, got {type(quantizer).__name__}: codes that are trained together with a "
            "decoder cannot be split alone. Use residual k-means, or prune."
        )
    quantizer._require_fitted()
    for name, value in (("layer", layer), ("parts", parts), ("seed", seed), ("num_iterations", num_iterations)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}={value!r} must be a whole number.")
    sizes = quantizer.codebook_sizes
    if not 0 <= layer < len(sizes):
        raise ValueError(f"layer={layer} does not exist: there are {len(sizes)}, counted from 0.")
    if parts < 2:
        raise ValueError(f"parts={parts} would split nothing. Pass 2 or more.")
    if seed < 0 or num_iterations < 1:
        raise ValueError(f"seed={seed} must be 0 or more, num_iterations={num_iterations} 1 or more.")
    values = np.asarray(chosen)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(
            f"chosen has the shape {values.shape}; it must be a list of at least one code, as [7, 30]. To split nothing, keep "
            "the quantizer as it is."
        )
    if values.dtype.kind not in "iu":
        raise TypeError(
            f"chosen must be a list of codes, which are integers, got {values.dtype}. A mask becomes one by np.flatnonzero(mask)."
        )
    if values.min() < 0 or values.max() >= sizes[layer]:
        bad = values.min() if values.min() < 0 else values.max()
        raise ValueError(
            f"chosen names the code {bad}, but layer {layer} has {sizes[layer]} codes, 0 to {sizes[layer] - 1}."
        )
    if len(np.unique(values)) < len(values):
        raise ValueError("chosen names a code twice. To split it into more parts, raise parts.")
    skipped = sorted(set(values.tolist()) & set((quantizer.config.skipped_codes or {}).get(layer, ())))
    if skipped:
        raise ValueError(f"chosen names the codes {skipped}, which skipped_codes leave out of SIDs. Choose others.")
    if quantizer.config.num_beams > 1:
        raise ValueError(
            f"num_beams={quantizer.config.num_beams}: beams do not give a code the embeddings nearest to it, by which it is "
            "split. Set quantizer.config.num_beams = 1."
        )
    if isinstance(capacity, bool) or not isinstance(capacity, Real) or not 1 <= capacity < float("inf"):
        raise ValueError(f"capacity={capacity!r} must be a number from 1: a multiple of the mean count of a child.")
    return int(layer), values.astype(np.int64), int(parts), int(seed), int(num_iterations)
