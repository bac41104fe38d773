"""What the tables of trained cells compute from ranks: metrics, intervals over users, differences from a baseline."""

import math
from functools import lru_cache

import numpy as np
from scipy import stats

RECALL, NDCG = (1, 5, 10, 50), (5, 10)
METRICS = (*(f"Recall@{k}" for k in RECALL), *(f"NDCG@{k}" for k in NDCG), "MRR")
RESAMPLES, CHUNK = 1000, 50


def metrics(ranks):
    """
    Args:
        ranks (`list[int]`): From 1; 0 for a miss.

    Returns:
        `np.ndarray`: Recall, NDCG (one target: 1 / log2(1 + rank)) and MRR of each row. Shape: (R, 7).
    """
    ranks = np.asarray(ranks)
    hit, rank = ranks > 0, np.maximum(ranks, 1)
    columns = [hit & (rank <= k) for k in RECALL]
    columns += [(hit & (rank <= k)) / np.log2(1 + rank) for k in NDCG]
    return np.stack([*columns, hit / rank], 1).astype(float)


def interval(values, users, seed=0):
    """
    95 % percentile interval of the mean over rows, from resampled users with all of their rows.

    Args:
        values (`np.ndarray`): Shape: (R, M).
        users (`list[int]`): A number for the user of each row.
        seed (`int`, *optional*, defaults to 0): Of the resamples.

    Returns:
        `np.ndarray`: Shape: (2, M).
    """
    values = np.asarray(values)
    means = resampled_means(values, np.ones(len(values)), users, seed)
    return np.quantile(means, (0.025, 0.975), axis=0)


def interval_of_difference(values, is_head, users, seed=0):
    """As [`interval`], of the mean over the rows of one group minus that over the others: values, `is_head` of shape (R,)."""
    means = [resampled_means(values[:, None], group.astype(float), users, seed) for group in (is_head, ~is_head)]
    return np.nanquantile(means[0] - means[1], (0.025, 0.975), axis=0)


def resampled_means(values, weights, users, seed=0):
    """
    The weighted means of resamples of users, NaN where all weights are zero. A number of users is resampled in the same way
    each time.

    Returns:
        `np.ndarray`: Shape: (1000, M).
    """
    users = np.unique(users, return_inverse=True)[1]
    sizes = np.bincount(users, weights=weights)
    sums = np.stack([np.bincount(users, weights=column * weights) for column in values.T], 1)
    drawn, means = _drawn(len(sizes), seed), []
    for start in range(0, RESAMPLES, CHUNK):
        part = drawn[start : start + CHUNK].astype(float)
        total = (part @ sizes)[:, None]
        means.append(np.divide(part @ sums, total, out=np.full((CHUNK, sums.shape[1]), np.nan), where=total > 0))
    return np.concatenate(means)


@lru_cache(maxsize=2)
def _drawn(num_users, seed):
    """How often each resample has each user; kept, as the arms of a table have the same users. Shape: (1000, num_users)."""
    random, shares = np.random.default_rng(seed), np.full(num_users, 1 / num_users)
    chunks = [random.multinomial(num_users, shares, CHUNK) for _ in range(0, RESAMPLES, CHUNK)]
    return np.concatenate(chunks).astype(np.uint16)


def per_seed(cells, ranks="item_ranks"):
    """
    Returns:
        `dict[int, np.ndarray]`: by seed the metrics of each row. Shape: (R, 7).
    """
    return {cell["seed"]: metrics(cell["result"][ranks]) for cell in cells}


def differences(baseline, cells, ranks="item_ranks"):
    """
    Metrics minus the baseline's on the same rows.

    Args:
        baseline, cells (`list[dict]`): Of two arms.
        ranks (`str`, *optional*, defaults to `"item_ranks"`): Which of their results.

    Returns:
        `dict[int, np.ndarray]`: by seed, of those that both have. Shape: (R, 7). Empty if their test rows are not the same.
    """
    if any(cell["result"]["users"] != baseline[0]["result"]["users"] for cell in [*baseline, *cells]):
        return {}
    base, of_arm = per_seed(baseline, ranks), per_seed(cells, ranks)
    return {seed: of_arm[seed] - base[seed] for seed in sorted(base.keys() & of_arm.keys())}


def p_values(of_seeds, users, other_seeds=False):
    """
    Two-sided, of each metric's mean difference, by the standard error that the resampled users give. Tails of a thousand
    resamples are too coarse for many comparisons.

    Users alone say whether these very models differ, and two models of one arm do, often, that differ in their seeds only.
    With `other_seeds` the variance of the seeds' means is added, which counts what the two have in common twice and is so
    rather too large: Cameron, Gelbach, Miller, Robust inference with multiway clustering, 2011. Student's t then has the degrees
    of freedom of Satterthwaite, An approximate distribution of estimates of variance components, 1946.

    Args:
        of_seeds (`dict[int, np.ndarray]`): From [`differences`].
        users (`list[int]`): A number for the user of each row.
        other_seeds (`bool`, *optional*, defaults to `False`): Whether the seeds are a sample, too.

    Returns:
        `np.ndarray`: one a metric; NaN with `other_seeds` if there is one seed only. Shape: (M,).
    """
    values, num_seeds = np.stack(list(of_seeds.values())), len(of_seeds)
    if other_seeds and num_seeds < 2:
        return np.full(values.shape[2], np.nan)
    means = values.mean((0, 1))
    variance = resampled_means(values.mean(0), np.ones(values.shape[1]), users).var(0, ddof=1)
    freedom = np.full(len(means), np.inf)
    if other_seeds:
        between = values.mean(1).var(0, ddof=1) / num_seeds
        variance = variance + between
        np.divide(variance**2 * (num_seeds - 1), between**2, out=freedom, where=between > 0)
    sizes = np.divide(np.abs(means), np.sqrt(variance), out=np.where(means == 0, 0, np.inf), where=variance > 0)
    return 2 * stats.t.sf(sizes, freedom)


def holm(values):
    """
    P-values adjusted for their number: Holm, A simple sequentially rejective multiple test procedure, 1979.

    Args:
        values (`list[float]`): m p-values; NaN, which is not counted, where there was no test.

    Returns:
        `list[float]`: in the same order; the i-th smallest times m - i + 1, at least its predecessor, at most 1.
    """
    adjusted, largest = [math.nan] * len(values), 0.0
    tested = sorted((at for at, value in enumerate(values) if not math.isnan(value)), key=values.__getitem__)
    for place, at in enumerate(tested):
        largest = max(largest, min(1.0, values[at] * (len(tested) - place)))
        adjusted[at] = largest
    return adjusted
