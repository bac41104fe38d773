"""Where k-means starts: `random`, `k-means++` or `staged`."""

import math

import torch

from .assignment import chunk_rows, nearest_codes
from .kmeans import lloyd

INITIALIZATIONS = ("random", "k-means++", "staged")
STAGED_ITERATIONS = 6
# Of fewer, high-dimensional ones, too many are outliers whose codes stay empty.
PLUS_PLUS_POINTS = 64  # for a code


def initial_codebook(sample, num_codes, init="random", seed=0, relocation_threshold=0.0):
    """
    Args:
        sample (`torch.Tensor`): Shape: (M, D).
            Random points in random order, at least `num_codes`.
        num_codes (`int`):
            K.
        init (`str`, *optional*, defaults to `"random"`):
            - `"random"`: K of the points, no two alike.
            - `"k-means++"`: points drawn one after the other with probability proportional to their squared distance from
              the nearest one drawn so far (Arthur and Vassilvitskii 2007), the best of several candidates each time, from
              at most 64 K points.
            - `"staged"`: k-means on the first few principal components, then on more, in which the codes of the stage
              before give the start (the idea of the progressive-dimension training of residual quantizers in faiss).
        seed (`int`, *optional*, defaults to 0):
            Seed of all randomness.
        relocation_threshold (`float`, *optional*, defaults to 0.0):
            For the stages; see [`lloyd`].

    Returns:
        `torch.Tensor`: the codebook. Shape: (K, D).
    """
    if init == "k-means++":
        return _plus_plus(sample[: PLUS_PLUS_POINTS * num_codes], num_codes, seed)
    if init == "staged":
        return _staged(sample, num_codes, seed, relocation_threshold)
    return _distinct_rows(sample[: 4 * num_codes], num_codes)


def _distinct_rows(points, num_codes):
    """The first points that differ from all before them; others too where there are not enough."""
    _, kinds = torch.unique(points, dim=0, return_inverse=True)
    order = torch.arange(len(points), device=points.device)
    first = torch.full_like(order, len(points)).scatter_reduce_(0, kinds, order, "amin")
    repeats = first[kinds] != order
    return points[torch.argsort(repeats.int(), stable=True)[:num_codes]]


def _plus_plus(points, num_codes, seed):
    generator = torch.Generator().manual_seed(seed)
    num_candidates = 2 + int(
        math.log(num_codes)
    )  # as scikit-learn; more of them pick outliers, as the farthest points are
    squares = points.square().sum(1)
    chosen = torch.empty(num_codes, dtype=torch.int64, device=points.device)
    chosen[0] = torch.randint(len(points), (1,), generator=generator)
    closest = _distances(points, squares, chosen[:1])[:, 0]
    for index in range(1, num_codes):
        # Inverse transform sampling; all points coincide with a chosen one where nothing is left to sample from.
        cumulative = closest.double().cumsum(0)
        draws = torch.rand(num_candidates, generator=generator, dtype=torch.float64).to(points.device) * cumulative[-1]
        candidates = torch.searchsorted(cumulative, draws).clamp_max(len(points) - 1)
        distances = torch.minimum(closest[:, None], _distances(points, squares, candidates))
        best = distances.sum(0).argmin()
        chosen[index], closest = candidates[best], distances[:, best].contiguous()
    return points[chosen]


def _distances(points, squares, rows):
    return (squares[:, None] + squares[rows] - 2 * points @ points[rows].T).clamp_min_(0)


def _staged(points, num_codes, seed, relocation_threshold):
    num_points, dim = points.shape
    mean = points.mean(0)
    covariance = (points - mean).T @ (points - mean)
    basis = torch.linalg.eigh(covariance.double()).eigenvectors.flip(1).to(points.dtype)
    rotated = (points - mean) @ basis
    codebook = _distinct_rows(rotated[: 4 * num_codes], num_codes)
    for stage_dim in sorted({max(1, dim // 12), max(1, dim // 3)}):
        stage = rotated[:, :stage_dim].contiguous()
        narrow, _ = lloyd(
            lambda stage=stage: stage.split(chunk_rows(num_codes, stage.device)),
            codebook[:, :stage_dim].contiguous(),
            STAGED_ITERATIONS,
            relocation_threshold,
            sample=stage,
            seed=seed,
        )
        # In the dimensions that the stage did not see, a code is the mean of its points too.
        codes = torch.cat(
            [nearest_codes(rows, narrow)[0] for rows in stage.split(chunk_rows(num_codes, stage.device))]
        )
        counts = torch.bincount(codes, minlength=num_codes)[:, None]
        means = torch.zeros_like(codebook).index_add_(0, codes, rotated) / counts.clamp_min(1)
        codebook = torch.where(counts > 0, means, codebook)
    return codebook @ basis.T + mean
