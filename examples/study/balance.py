"""What experiments report of a set of SIDs: the balance of each layer, and that of codes drawn at random."""

import numpy as np

from rqsid import Diagnosis, diagnose
from rqsid.sid_tokenizer.diagnosis import LayerStatistics
from rqsid.sid_tokenizer.hourglass import simulate_uniform

NULL_SAMPLES = 200
PER_LAYER = ("normalized_entropy", "gini", "std")


def measure(codes, codebook_sizes, popularity=None):
    """
    Args:
        codes (`np.ndarray`): Shape: (N, L).
        codebook_sizes (`list[int]`):
            Codes of each layer.
        popularity (`np.ndarray`, *optional*): Shape: (N,).
            Training purchases of each item, to weigh items by.

    Returns:
        `dict`: JSON-able: what [`diagnose`] says without the arrays that follow from the counts; `null`, per layer the mean
        of 200 multinomial samples of this size and their 1 % and 99 % quantiles; and `by_purchases`, the same measures of
        items weighted by popularity.
    """
    result = diagnose(codes, codebook_sizes).to_dict()
    del result["null_bands"], result["flows"], result["better_optimum"], result["survives"]
    result["counts"] = [[int(count) for count in counts] for counts in result["counts"]]
    possible = np.cumprod([float(size) for size in codebook_sizes])
    result["null"] = [
        multinomial_null(len(codes), size) | {"paths_used": expected_paths(len(codes), paths)}
        for size, paths in zip(codebook_sizes, possible, strict=True)
    ]
    if popularity is not None:
        weighted = diagnose(codes, codebook_sizes, weights=popularity)
        layers = [{name: getattr(layer, name) for name in PER_LAYER} for layer in weighted.layers]
        result["by_purchases"] = {
            "layers": layers,
            "hourglass_score": weighted.hourglass_score,
            "verdict": weighted.verdict,
            "verdict_layer": weighted.verdict_layer,
            "recall_ceiling": {str(k): value for k, value in weighted.recall_ceiling.items()},
        }
    return result


def multinomial_null(num_items, size, seed=0):
    """
    `{measure: [mean, 1 % quantile, 99 % quantile]}` of the counts of `num_items` items that draw one of `size` codes each.
    """
    counts = np.random.default_rng(seed).multinomial(num_items, np.full(size, 1 / size), NULL_SAMPLES)
    shares = counts / num_items
    logs = np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
    ranks = 2 * np.arange(1, size + 1) - size - 1
    values = {
        "normalized_entropy": -(shares * logs).sum(1) / np.log2(size) if size > 1 else np.ones(NULL_SAMPLES),
        # Of sorted counts, sum_ij |n_i - n_j| = 2 sum_i (2 i - K - 1) n_i.
        "gini": (np.sort(counts, axis=1) * ranks).sum(1) / (size * num_items),
        "std": counts.std(1),
    }
    return {name: [float(drawn.mean()), *np.quantile(drawn, (0.01, 0.99)).tolist()] for name, drawn in values.items()}


def expected_paths(num_items, possible):
    """Distinct paths that `num_items` items are expected to use if each draws one of `possible`."""
    return float(-possible * np.expm1(num_items * np.log1p(-1 / possible))) if possible > 1 else 1.0


def as_diagnosis(result):
    """A [`Diagnosis`] that can be drawn, from what [`measure`] gave."""
    content = {key: value for key, value in result.items() if key in Diagnosis.__dataclass_fields__}
    fields = LayerStatistics.__dataclass_fields__
    content["layers"] = [
        LayerStatistics(**{key: value for key, value in layer.items() if key in fields}) for layer in result["layers"]
    ]
    content["counts"] = [np.array(counts) for counts in result["counts"]]
    weights, random = np.ones(result["num_items"]), np.random.default_rng(0)
    content["null_bands"] = [simulate_uniform(random, weights, len(counts))[1] for counts in result["counts"]]
    return Diagnosis(**content, flows=[])
