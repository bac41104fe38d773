"""k-means for one codebook: BLAS-bound passes over chunks, with relocation of codes that are of little use."""

import torch

from .assignment import best_codes, chunk_rows, score_offsets
from .relocation import relocate

ROWS_PER_PARTIAL_SUM = 16384


def kmeans(
    points, num_codes, num_iterations=25, relocation_threshold=0.1, generator=None, seed_points=None, progress=None
):
    """
    [`lloyd`] on points in memory.

    Args:
        points (`torch.Tensor`): Shape: (N, D). Float32.
        num_codes (`int`):
            K, at most N.
        num_iterations (`int`, *optional*, defaults to 25):
            Lloyd iterations.
        relocation_threshold (`float`, *optional*, defaults to 0.1):
            Share of the mean count below which a code is a candidate for relocation; `0` never moves one.
        generator (`torch.Generator`, *optional*):
            Source of all randomness.
        seed_points (`torch.Tensor`, *optional*): Shape: (K, D).
            Initial codebook; K distinct rows of `points` drawn at random if not given.
        progress (`tqdm`, *optional*):
            Updated by one after each iteration.

    Returns:
        `torch.Tensor`: the codebook. Shape: (K, D).
    """
    order = torch.randperm(len(points), generator=generator).to(points.device)
    if seed_points is None:
        seed_points = points[order[:num_codes]]
    return lloyd(
        lambda: points.split(chunk_rows(num_codes, points.device)),
        seed_points,
        num_iterations,
        relocation_threshold,
        sample=points[order[: 64 * num_codes]],
        seed=int(torch.randint(2**31, (1,), generator=generator)),
        after_iteration=None if progress is None else lambda *state: progress.update(),
    )[0]


def lloyd(
    passes,
    codebook,
    num_iterations,
    relocation_threshold=0.0,
    sample=None,
    seed=0,
    spherical=False,
    capacity=None,
    prices=None,
    reduce=None,
    first_iteration=0,
    after_iteration=None,
):
    """
    Lloyd's k-means in which codes of little use are moved to where the error is.

    After each iteration but the last two, [`relocate`] looks at the codes with fewer than `relocation_threshold` times the
    mean count. Without it, plain Lloyd from a random start leaves outliers in codes of their own, in high dimension about
    a third of a codebook, and the rest of the points crowd into the other codes.

    Args:
        passes (callable):
            Each call returns an iterator over all points, in chunks. Shape of each: (rows, D). Float32.
        codebook (`torch.Tensor`): Shape: (K, D).
            Where to start. Not changed.
        num_iterations (`int`):
            Passes.
        relocation_threshold (`float`, *optional*, defaults to 0.0):
            Share of the mean count below which a code is a candidate for relocation; `0` never moves one.
        sample (`torch.Tensor`, *optional*): Shape: (M, D).
            Random points, for relocation to look at.
        seed (`int`, *optional*, defaults to 0):
            Seed of the relocation.
        spherical (`bool`, *optional*, defaults to `False`):
            Whether codes are kept at length one, for points of length one.
        capacity (`float`, *optional*):
            Largest count of a code, as a multiple of the mean count. Crowded codes get a price, which is added to the
            squared distance to them, and which rises until they are not crowded: the dual of the assignment problem in
            which no code may take more than its capacity. A point's code still depends on nothing but that point.
        prices (`torch.Tensor`, *optional*): Shape: (K,).
            Prices to start from.
        reduce (callable, *optional*):
            Called with a function that returns a tuple of tensors, returns their sums over all processes.
        first_iteration (`int`, *optional*, defaults to 0):
            Iterations done before, of an interrupted run.
        after_iteration (callable, *optional*):
            Called after each iteration with the number of iterations done, the codebook, and the prices.

    Returns:
        `tuple[torch.Tensor, torch.Tensor or None]`: the codebook of shape (K, D), and the prices of shape (K,).
    """
    num_codes = len(codebook)
    if capacity is not None and prices is None:
        prices = torch.zeros(num_codes, dtype=codebook.dtype, device=codebook.device)

    for iteration in range(first_iteration, num_iterations):
        # 1. assign, and add up each cluster's points; `reduce` sums over processes
        def statistics(codebook=codebook, prices=prices):
            return cluster_sums(passes(), codebook, prices)

        sums, counts, squares = statistics() if reduce is None else reduce(statistics)
        mean_count = counts.mean()

        # 2. move every code to the mean of its points; an empty one stays
        codebook = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], codebook.double())
        errors = (squares - counts * codebook.square().sum(1)).clamp_min(0)
        if spherical:
            codebook = torch.nn.functional.normalize(codebook, dim=1)
        codebook = codebook.float()

        # 3. crowded codes get dearer, the others cheaper again, in steps that shrink with the mean error of a point
        if capacity is not None:
            step = 0.3 * float(errors.sum() / counts.sum()) / (1 + iteration) ** 0.5
            crowding = torch.log(counts.clamp_min(0.5) / (capacity * mean_count))
            prices = (prices + step * crowding.clamp(-1, 1).float()).clamp_min(0)

        # 4. relocate; the last two iterations only settle what was moved
        if relocation_threshold > 0 and iteration < num_iterations - 2:
            generator = torch.Generator().manual_seed(seed + iteration)
            changed = relocate(codebook, sample, counts, errors, relocation_threshold, generator)
            if spherical:
                codebook = torch.nn.functional.normalize(codebook, dim=1)
            if prices is not None:
                prices[changed] = 0
        if after_iteration is not None:
            after_iteration(iteration + 1, codebook, prices)
    return codebook, prices


def settle_prices(passes, codebook, prices, capacity, reduce=None, max_passes=80):
    """
    Further passes in which only the prices change, until no code has more than 1.02 times its capacity.

    Each price has a step of its own, which grows while the code stays on one side of its capacity and shrinks when it
    changes sides.

    Args:
        passes, codebook, prices, capacity, reduce: as in [`lloyd`].
        max_passes (`int`, *optional*, defaults to 80):
            When to stop at the latest. Points of one place cannot be parted, so there may be no prices that suffice.

    Returns:
        `torch.Tensor`: the prices. Shape: (K,).
    """
    steps, before = None, None
    best, least = prices, float("inf")
    for _ in range(max_passes):

        def statistics(prices=prices):
            return cluster_sums(passes(), codebook, prices)

        sums, counts, squares = statistics() if reduce is None else reduce(statistics)
        crowding = counts / (capacity * counts.mean())
        if float(crowding.max()) < least:
            best, least = prices, float(crowding.max())
        if least <= 1.02:
            break
        if steps is None:
            means = sums / counts.clamp_min(1)[:, None]
            error = float((squares - counts * means.square().sum(1)).clamp_min(0).sum() / counts.sum())
            steps = torch.full_like(prices, 0.05 * error)
        side = torch.where(crowding > 1, 1.0, -1.0).to(prices)
        if before is not None:
            steps = steps * torch.where(side == before, 1.3, 0.4)
        before = side
        prices = (prices + side * steps * (crowding - 1).abs().clamp(0.05, 1).to(prices)).clamp_min(0)
    return best


def cluster_sums(chunks, codebook, prices=None):
    """
    One pass: what each code's points add up to, in float64, so that neither the order of the chunks nor their distribution
    over processes matters much.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: sum of the points (K, D), their number (K,), and the sum of their
        squared lengths (K,).
    """
    num_codes, dim = codebook.shape
    sums = torch.zeros(num_codes, dim, dtype=torch.float64, device=codebook.device)
    counts, squares = (torch.zeros(num_codes, dtype=torch.float64, device=codebook.device) for _ in range(2))
    offsets, columns = score_offsets(codebook, prices), codebook.T
    partial, num_rows = torch.zeros_like(codebook), 0
    for chunk in chunks:
        codes = best_codes(torch.addmm(offsets, chunk, columns, beta=-1))
        # Added up in float32 for some thousand rows, which is several times faster, in float64 from there on.
        partial.index_add_(0, codes, chunk)
        num_rows += len(chunk)
        if num_rows >= ROWS_PER_PARTIAL_SUM:
            sums += partial
            partial.zero_()
            num_rows = 0
        counts += torch.bincount(codes, minlength=num_codes)
        squares.index_add_(0, codes, torch.linalg.vector_norm(chunk, dim=1).double().square())
    return sums + partial, counts, squares
