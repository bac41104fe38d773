"""k-means for one codebook: BLAS-bound assignment in chunks, and relocation of under-used codes."""

import torch

CHUNK_ROWS = 16384  # assignment works on [CHUNK_ROWS, K] scores at a time, so that memory does not grow with N


def nearest_codes(points, codebook):
    """
    Assigns each point to its nearest code, argmin over codes of the squared Euclidean distance.

    Args:
        points (`torch.Tensor`): Shape: (N, D).
        codebook (`torch.Tensor`): Shape: (K, D).

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: codes of shape (N,) and squared distances of shape (N,).
    """
    # argmin |x - c|^2 = argmax x.c - |c|^2 / 2: one matrix product, no [N, K, D] difference.
    half_norms = codebook.square().sum(1) / 2
    best, codes = torch.addmm(half_norms, points, codebook.T, beta=-1).max(1)
    distances = (points.square().sum(1) - 2 * best).clamp_min(0)
    return codes, distances


def kmeans(
    points, num_codes, num_iterations=25, relocation_threshold=0.1, generator=None, seed_points=None, progress=None
):
    """
    Lloyd's k-means in which under-used codes are moved to where the error is.

    After each iteration but the last two, every code with fewer than `relocation_threshold` times the mean count is
    moved into one of the clusters with the largest squared error, which it splits. Without it (`0`), plain Lloyd from a
    random start leaves outliers in codes of their own, in high dimension about a third of a codebook; the rest of the
    points then crowd into the other codes. Where tails are so heavy that outliers do deserve codes of their own, plain Lloyd
    has the lower squared error, at the price of that crowding: compare `relative_error` with a threshold of 0.

    Args:
        points (`torch.Tensor`): Shape: (N, D). Float32.
        num_codes (`int`):
            K, at most N.
        num_iterations (`int`, *optional*, defaults to 25):
            Lloyd iterations.
        relocation_threshold (`float`, *optional*, defaults to 0.1):
            Share of the mean count below which a code is moved; `0` never moves one.
        generator (`torch.Generator`, *optional*):
            Source of all randomness.
        seed_points (`torch.Tensor`, *optional*): Shape: (K, D).
            Initial codebook; K distinct rows of `points` drawn at random if not given.
        progress (`tqdm`, *optional*):
            Updated by one after each iteration.

    Returns:
        `torch.Tensor`: the codebook. Shape: (K, D).
    """
    num_points, dim = points.shape
    if seed_points is None:
        rows = torch.randperm(num_points, generator=generator)[:num_codes]
        seed_points = points[rows.to(points.device)]
    codebook = seed_points.clone()

    for iteration in range(num_iterations):
        # 1. assign, and add up each cluster's points and squared error (sums in float64: order-independent enough)
        sums = torch.zeros(num_codes, dim, dtype=torch.float64, device=points.device)
        counts = torch.zeros(num_codes, dtype=torch.float64, device=points.device)
        errors = torch.zeros(num_codes, dtype=torch.float64, device=points.device)
        for chunk in points.split(CHUNK_ROWS):
            codes, distances = nearest_codes(chunk, codebook)
            sums += torch.zeros(num_codes, dim, device=points.device).index_add_(0, codes, chunk)
            counts += torch.bincount(codes, minlength=num_codes)
            errors.index_add_(0, codes, distances.double())

        # 2. move every code to the mean of its points; an empty one stays
        codebook = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], codebook.double())
        codebook = codebook.to(points.dtype)

        # 3. relocate; the last two iterations only settle what was moved
        if relocation_threshold > 0 and iteration < num_iterations - 2:
            relocate(codebook, points, counts, errors, relocation_threshold, generator)
        if progress is not None:
            progress.update()
    return codebook


def relocate(codebook, points, counts, errors, threshold, generator=None):
    """
    Moves under-used codes, in place, each into a cluster of its own among those with the largest squared error.

    Args:
        codebook (`torch.Tensor`): Shape: (K, D). Changed in place.
        points (`torch.Tensor`): Shape: (N, D).
        counts (`torch.Tensor`): Shape: (K,). Points per code.
        errors (`torch.Tensor`): Shape: (K,). Squared error per code.
        threshold (`float`):
            Codes with fewer than this share of the mean count are moved.
        generator (`torch.Generator`, *optional*):
            Source of all randomness.
    """
    under_used = torch.nonzero(counts < threshold * counts.mean()).flatten()
    # A donor must have error to give: with more codes than distinct points there are fewer donors than under-used codes.
    donor_errors = errors.clone()
    donor_errors[under_used] = 0
    donor_errors[donor_errors <= 1e-9 * points.square().mean() * points.shape[1]] = 0
    num_moved = min(len(under_used), int((donor_errors > 0).sum()))
    if num_moved == 0:
        return
    donors = torch.topk(donor_errors, num_moved).indices
    moved = under_used[torch.argsort(counts[under_used])][:num_moved]

    # The two halves start on both sides of the donor's centre, apart by a fraction of its spread in a direction in
    # which points really lie: towards one of a sample of the data that belongs to it, or a random one if none does.
    sample = points[torch.randint(len(points), (min(len(points), 16 * len(codebook)),), generator=generator)]
    codes, distances = nearest_codes(sample, codebook)
    directions = torch.randn(num_moved, points.shape[1], generator=generator).to(points)
    spread = (errors[donors] / counts[donors].clamp_min(1)).sqrt().to(points.dtype)
    # The first member of each code; plain indexing would keep whichever of several writes came last, a race of threads.
    off_centre = torch.nonzero(distances > 0).flatten()
    member = torch.full((len(codebook),), len(sample), device=points.device)
    member.scatter_reduce_(0, codes[off_centre], off_centre, "amin")
    has_member = member[donors] < len(sample)
    directions[has_member] = sample[member[donors[has_member]]] - codebook[donors[has_member]]
    offsets = directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-12) * spread[:, None] / 2
    codebook[moved] = codebook[donors] + offsets
    codebook[donors] -= offsets
