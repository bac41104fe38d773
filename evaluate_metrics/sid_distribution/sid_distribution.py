"""Distribution of the codes of semantic IDs, layer by layer."""

from itertools import chain

import datasets
import evaluate
import numpy as np

_CITATION = """\
@article{shannon1948mathematical,
    title = {A Mathematical Theory of Communication},
    author = {Shannon, Claude E.},
    journal = {Bell System Technical Journal},
    volume = {27}, number = {3}, pages = {379--423}, year = {1948}
}
@inproceedings{kuai2024breaking,
    title = {Breaking the Hourglass Phenomenon of Residual Quantization: Enhancing the Upper Bound of Generative
             Retrieval},
    author = {Kuai, Zhirui and others},
    booktitle = {Proceedings of EMNLP: Industry Track},
    note = {arXiv:2407.21488}, year = {2024}
}
"""

_DESCRIPTION = """\
How evenly semantic IDs use their codes: entropy, Gini coefficient, standard deviation, share of the most frequent
codes and under-used codes of each layer, how many SIDs collide, and whether the middle layers are narrower than the
ends (the hourglass).
"""

_KWARGS_DESCRIPTION = """
Args:
    codes (`list[list[int]]`, or an array or tensor of shape (N, L)):
        One SID a row, one code a layer; -1 where the layer is absent (pruned).
    codebook_sizes (`list[int]`):
        Number of codes K of each layer.

Returns:
    `dict[str, float]`: for each layer l, counted from 0, over the codes present in it
    - `entropy_l`: Shannon entropy in bits, -sum p log2 p (Shannon, 1948); `normalized_entropy_l`: divided by log2 K,
      0 for a codebook of one code.
    - `gini_l`: Gini coefficient of the K counts, unused codes included: sum_ij |x_i - x_j| / (2 K sum_i x_i)
      (Kuai et al., 2024).
    - `std_l`: population standard deviation of the K counts.
    - `top1pct_share_l`: share held by the ceil(K / 100) most frequent codes.
    - `under_used_l`: number of codes counted less than a tenth of the mean count; `used_l`: number of codes that occur.
    A layer without any code has 0 everywhere. And over all layers
    - `num_rows`, `unique_sids`, `collision_rate` = 1 - unique_sids / num_rows, `mean_length`: mean number of codes
      present.
    - `hourglass_score`: mean normalized entropy of the layers between the first and the last, minus the mean of these
      two; below 0 for an hourglass. Left out for fewer than three layers.

Raises:
    ValueError: If there are no rows, a row has another number of codes than `codebook_sizes`, a code is outside
    [-1, K) or not an integer, or `codebook_sizes` is missing.

Examples:

    >>> measure = evaluate.load("sid_distribution")
    >>> measure.compute(codes=[[0, 1], [0, 0], [1, 1], [1, 1]], codebook_sizes=[2, 2])["normalized_entropy_0"]
    1.0
"""


def _to_rows(codes):
    """Lists of integers from lists, arrays or tensors. Refuses what `evaluate` would cast in silence: it truncates 1.5
    to 1 and reads the string "12" as the codes 1 and 2."""
    if codes is None:
        raise ValueError("`codes` is missing: pass one row a SID, holding one code a layer.")
    rows = codes.tolist() if hasattr(codes, "tolist") else codes
    rows = [row.tolist() if hasattr(row, "tolist") else row for row in rows]
    for index, row in enumerate(rows):
        if not isinstance(row, (list, tuple)):
            raise ValueError(
                f"Row {index} of `codes` is {row!r} of type {type(row).__name__}, not a list. Pass one code a layer, -1 "
                "where the layer is absent."
            )
    for kind in set(map(type, chain.from_iterable(rows))):
        if issubclass(kind, bool) or not issubclass(kind, (int, np.integer)):
            raise ValueError(
                f"`codes` holds a value of type {kind.__name__}. Codes are integers, -1 for an absent layer."
            )
    return rows


def _check_codes(rows, codebook_sizes):
    """Codes as an array of shape (N, L), refused where a row has another length than L or a code is outside [-1, K)."""
    if not isinstance(codebook_sizes, (list, tuple)) or not codebook_sizes:
        raise ValueError(
            f"`codebook_sizes` is {codebook_sizes!r}. Pass a list with the number of codes of each layer, such as "
            "`[256, 256, 256]`."
        )
    for layer, size in enumerate(codebook_sizes):
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"`codebook_sizes` holds {size!r} for layer {layer}. A size is an integer of at least 1.")
    if not rows:
        raise ValueError("There are no rows to measure: `codes` is empty.")
    num_layers = len(codebook_sizes)
    for index, row in enumerate(rows):
        if len(row) != num_layers:
            raise ValueError(
                f"Row {index} of `codes` has {len(row)} codes and `codebook_sizes` has {num_layers} layers. Give one "
                "code a layer, -1 where the layer is absent."
            )
    codes = np.array(rows, dtype=np.int64)
    wrong = np.argwhere((codes < -1) | (codes >= np.array(codebook_sizes)))
    if len(wrong):
        index, layer = wrong[0].tolist()
        raise ValueError(
            f"Row {index} of `codes` holds {codes[index, layer]} in layer {layer}, whose codes run from 0 to "
            f"{codebook_sizes[layer] - 1} (-1 where the layer is absent). Check the order of `codebook_sizes`."
        )
    return codes


def _layer_statistics(counts):
    """Statistics of one layer from its counts of shape (K,), unused codes included."""
    size, total = len(counts), int(counts.sum())
    if total == 0:
        names = ("entropy", "normalized_entropy", "gini", "std", "top1pct_share", "under_used", "used")
        return dict.fromkeys(names, 0.0)
    shares = counts[counts > 0] / total
    # Adding 0.0 turns the -0.0 of a layer with a single code into 0.0.
    entropy = float(-(shares * np.log2(shares)).sum()) + 0.0
    ascending = np.sort(counts)
    # The double sum over pairs, written over the sorted counts: sum_ij |x_i - x_j| = 2 sum_i (2 i - K - 1) x_(i). In
    # integers, so that an even layer is exactly 0.
    spread = int(((2 * np.arange(1, size + 1) - size - 1) * ascending).sum())
    top = -(-size // 100)
    return {
        "entropy": entropy,
        "normalized_entropy": entropy / np.log2(size) if size > 1 else 0.0,
        "gini": spread / (size * total),
        "std": counts.std(),
        "top1pct_share": ascending[-top:].sum() / total,
        # In integers as well: count < mean / 10.
        "under_used": (10 * size * counts < total).sum(),
        "used": (counts > 0).sum(),
    }


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class SIDDistribution(evaluate.Metric):
    """Takes `codes` alone: there are no predictions and references."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"codes": datasets.Sequence(datasets.Value("int32"))}),
            reference_urls=["https://arxiv.org/abs/2407.21488"],
        )

    def add_batch(self, *, codes=None, **kwargs):
        """Add a batch of SIDs."""
        super().add_batch(codes=_to_rows(codes), **kwargs)

    def add(self, *, codes=None, **kwargs):
        """Add one SID."""
        super().add(codes=_to_rows(None if codes is None else [codes])[0], **kwargs)

    def _compute(self, codes, codebook_sizes=None):
        codes = _check_codes(codes, codebook_sizes)
        num_rows, num_layers = codes.shape
        results = {}
        for layer, size in enumerate(codebook_sizes):
            present = codes[:, layer][codes[:, layer] >= 0]
            statistics = _layer_statistics(np.bincount(present, minlength=size))
            results |= {f"{name}_{layer}": value for name, value in statistics.items()}

        ordered = codes[np.lexsort(codes.T)]
        unique = 1 + np.any(ordered[1:] != ordered[:-1], axis=1).sum()
        results["num_rows"] = num_rows
        results["unique_sids"] = unique
        results["collision_rate"] = 1 - unique / num_rows
        results["mean_length"] = (codes >= 0).sum() / num_rows
        if num_layers >= 3:
            evenness = [results[f"normalized_entropy_{layer}"] for layer in range(num_layers)]
            results["hourglass_score"] = np.mean(evenness[1:-1]) - (evenness[0] + evenness[-1]) / 2
        return {name: float(value) for name, value in results.items()}
