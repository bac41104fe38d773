"""What the benchmarks measure, and the embeddings they make themselves."""

import time
from pathlib import Path

import numpy as np
import torch

CHUNK_ROWS = 2048  # as in ResidualQuantizer.encode: larger chunks leave the cache


def synthetic_embeddings(num_rows, dim=384, seed=0):
    """
    Embeddings of unit norm that are as awkward as those of text: 3,000 clusters in 200 groups, both of Zipf-Mandelbrot
    sizes (shares proportional to (rank + 10)^-1); a spectrum that falls off (the variance of direction j is proportional
    to (j + 20)^-1); and heavy tails, since rows are spread around their cluster by a multivariate Student's t with 4
    degrees of freedom.

    Args:
        num_rows (`int`):
            N.
        dim (`int`, *optional*, defaults to 384):
            D.
        seed (`int`, *optional*, defaults to 0):
            The same seed gives the same embeddings wherever NumPy's generator does.

    Returns:
        `np.ndarray` (float32). Shape: (N, D).
    """
    random = np.random.default_rng(seed)
    spectrum = 1 / np.sqrt(np.arange(dim, dtype=np.float32) + 20)
    rotation = np.linalg.qr(random.standard_normal((dim, dim)))[0].astype(np.float32)
    num_groups, num_clusters = 200, 3000

    def directions(rows):
        return random.standard_normal((rows, dim), dtype=np.float32) * spectrum

    def zipf(size, rows):
        shares = 1 / (np.arange(1, size + 1) + 10)
        return random.choice(size, rows, p=shares / shares.sum())

    # Not group by group: the largest cluster need not lie in the largest group.
    centres = 0.6 * directions(num_groups)[zipf(num_groups, num_clusters)] + 0.6 * directions(num_clusters)
    rows_of_clusters = zipf(num_clusters, num_rows)
    embeddings = np.empty((num_rows, dim), dtype=np.float32)
    for start in range(0, num_rows, 16 * CHUNK_ROWS):
        clusters = rows_of_clusters[start : start + 16 * CHUNK_ROWS]
        tails = np.sqrt(4 / random.chisquare(4, (len(clusters), 1))).astype(np.float32)
        points = (centres[clusters] + 0.6 * tails * directions(len(clusters))) @ rotation
        embeddings[start : start + len(clusters)] = points / np.linalg.norm(points, axis=1, keepdims=True)
    return embeddings


def distribution(codes, codebook_sizes, num_nulls=50):
    """
    Written out here rather than taken from `rqsid.diagnose`, so that no party to the comparison keeps the score.

    Args:
        codes (`np.ndarray`): Shape: (N, L).
        codebook_sizes (`list[int]`):
            Codes of each layer.
        num_nulls (`int`, *optional*, defaults to 50):
            Simulations of items that draw their codes at random.

    Returns:
        `dict`: per layer `gini`, `gini_null` (the mean Gini of random codes) and `under_used` (codes with less than a
        tenth of the mean count); and `collision_rate`, 1 - unique SIDs / N.
    """
    random = np.random.default_rng(0)
    result = {"gini": [], "gini_null": [], "under_used": []}
    for layer, size in enumerate(codebook_sizes):
        counts = np.bincount(codes[:, layer], minlength=size)
        nulls = random.multinomial(len(codes), np.full(size, 1 / size), size=num_nulls)
        result["gini"].append(gini(counts))
        result["gini_null"].append(float(np.mean([gini(null) for null in nulls])))
        result["under_used"].append(int((counts < 0.1 * counts.mean()).sum()))
    result["collision_rate"] = 1 - len(np.unique(codes, axis=0)) / len(codes)
    return result


def gini(counts):
    """sum_ij |n_i - n_j| / (2 K sum n), over the counts n of all K codes."""
    ascending = np.sort(counts)
    return float(((2 * np.arange(len(counts)) - len(counts) + 1) * ascending).sum() / (len(counts) * counts.sum()))


def relative_error(embeddings, reconstruct):
    """
    Args:
        embeddings (`np.ndarray`): Shape: (N, D).
        reconstruct (callable): Called with a slice of rows, returns their reconstruction. Shape: (rows, D).

    Returns:
        `float`: sum |x - reconstruction|^2 / sum |x - mean|^2.
    """
    mean, error, variance = embeddings.mean(0, dtype=np.float64), 0.0, 0.0
    for start in range(0, len(embeddings), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        points = embeddings[rows].astype(np.float64)
        error += np.square(points - np.asarray(reconstruct(rows))).sum()
        variance += np.square(points - mean).sum()
    return float(error / variance)


def make_gemm(points, codebook_sizes):
    """
    The least that any exact assignment by matrix products must do: the products alone, without a look at the scores.

    Args:
        points (`torch.Tensor`): Shape: (N, D).
        codebook_sizes (`list[int]`):
            Columns of each layer's product.

    Returns:
        callable: does all products once, in the chunks in which `ResidualQuantizer.encode` works.
    """
    columns = [points[:size].T.clone(memory_format=torch.preserve_format) for size in codebook_sizes]
    scores = [torch.empty(CHUNK_ROWS, size) for size in codebook_sizes]

    def gemm():
        for chunk in points.split(CHUNK_ROWS):
            for column, score in zip(columns, scores, strict=True):
                torch.mm(chunk, column, out=score[: len(chunk)])

    return gemm


def interleaved_times(functions, repeats, clock=time.process_time):
    """
    Args:
        functions (`dict[str, callable]`):
            What to time.
        repeats (`int`):
            Rounds, in each of which every function runs once, so that a machine that slows down slows all of them. A round
            that is not counted goes before.
        clock (callable, *optional*, defaults to `time.process_time`):
            CPU seconds of all threads of this process, which other processes disturb less than they do the time of day.

    Returns:
        `dict[str, list[float]]`: seconds per function, one entry per round.
    """
    seconds = {name: [] for name in functions}
    for number in range(repeats + 1):
        for name, function in functions.items():
            started = clock()
            function()
            if number > 0:
                seconds[name].append(clock() - started)
    return seconds


def memory_mib(name):
    """A field of /proc/self/status such as VmRSS, VmHWM or RssAnon in MiB; `None` where there is no /proc."""
    if not Path("/proc/self/status").exists():
        return None
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    return None


def reset_peak_memory():
    """Makes VmHWM, the peak of VmRSS, start again from here (proc(5), clear_refs)."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def markdown_table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
