"""Fitting codebooks on a sample of a large catalog, and encoding all of it; how many of its embeddings are duplicates."""

import numpy as np
import torch

from .quantizer import ResidualQuantizer

ROWS_PER_CODE = 100


def refit(reader, config, seed=0):
    """
    Fits a quantizer on a random sample of 100 rows per code of the largest codebook, all rows if there are fewer, and
    encodes all.

    Args:
        reader ([`EmbeddingReader`]):
            The embeddings, N rows of D.
        config ([`ResidualQuantizerConfig`]):
            What to fit.
        seed (`int`, *optional*, defaults to 0):
            Seed of the sample.

    Returns:
        `tuple[ResidualQuantizer, np.ndarray]`: the quantizer and the codes, int32. Shape: (N, L).
    """
    num_rows = min(reader.num_rows, ROWS_PER_CODE * max(config.codebook_sizes))
    chosen = torch.from_numpy(np.sort(np.random.default_rng(seed).choice(reader.num_rows, num_rows, replace=False)))
    sample = []
    for start, chunk in reader.chunks():
        first, last = torch.searchsorted(chosen, torch.tensor([start, start + len(chunk)])).tolist()
        sample.append(chunk[(chosen[first:last] - start).to(chunk.device)])
    quantizer = ResidualQuantizer(config).fit(torch.cat(sample))
    codes = np.empty((reader.num_rows, len(config.codebook_sizes)), dtype=np.int32)
    for start, chunk in reader.chunks():
        codes[start : start + len(chunk)] = quantizer.encode(chunk).cpu().numpy()
    return quantizer, codes


def duplicate_share(reader):
    """
    Share of the items whose embedding another item has too, number for number as float32: no quantizer can tell them
    apart.

    Rows are compared through a 128-bit fingerprint, two random linear combinations of their bits modulo 2^64, so that
    nothing is held but 16 bytes a row. Two different rows have the same with a probability of at most 2^-66.

    Args:
        reader ([`EmbeddingReader`]):
            The embeddings, N rows of D.

    Returns:
        `float`
    """
    factors = np.random.default_rng(0).integers(-(2**63), 2**63, (reader.dim, 2))
    fingerprints = np.empty((reader.num_rows, 2), dtype=np.int64)
    for start, chunk in reader.chunks():
        # Adding 0 makes -0 and 0, which are equal numbers, equal bits.
        bits = (chunk + 0.0).contiguous().cpu().numpy().view(np.int32).astype(np.int64)
        fingerprints[start : start + len(chunk)] = bits @ factors
    order = np.lexsort((fingerprints[:, 1], fingerprints[:, 0]))
    same = (fingerprints[order[1:]] == fingerprints[order[:-1]]).all(1)
    in_group = np.zeros(len(order), dtype=bool)
    in_group[1:] |= same
    in_group[:-1] |= same
    return float(in_group.mean())
