"""Ranked retrieval metrics for generative retrieval with semantic IDs: by product first, by SID beside it."""

from itertools import chain

import datasets
import evaluate
import numpy as np

logger = evaluate.logging.get_logger(__name__)

_CITATION = """\
@article{jarvelin2002cumulated,
    title = {Cumulated gain-based evaluation of {IR} techniques},
    author = {J{\\"a}rvelin, Kalervo and Kek{\\"a}l{\\"a}inen, Jaana},
    journal = {ACM Transactions on Information Systems},
    volume = {20}, number = {4}, pages = {422--446}, year = {2002}
}
@inproceedings{voorhees1999trec8,
    title = {The {TREC-8} Question Answering Track Report},
    author = {Voorhees, Ellen M.},
    booktitle = {Proceedings of TREC-8}, year = {1999}
}
@inproceedings{he2017neural,
    title = {Neural Collaborative Filtering},
    author = {He, Xiangnan and Liao, Lizi and Zhang, Hanwang and Nie, Liqiang and Hu, Xia and Chua, Tat-Seng},
    booktitle = {Proceedings of WWW}, year = {2017}
}
@book{efron1993introduction,
    title = {An Introduction to the Bootstrap},
    author = {Efron, Bradley and Tibshirani, Robert J.},
    publisher = {Chapman \\& Hall}, year = {1993}
}
"""

_DESCRIPTION = """\
Recall@k, NDCG@k and MRR of ranked lists with one target per row, counted by product (`item_*`) and, in the
configuration "sid", also by semantic ID (`sid_*`), with the share of invalid SIDs, figures per group of rows and
percentile bootstrap intervals. SIDs that several products share make `sid_*` look better than what a customer sees:
compare systems by `item_*`.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[list[str]]`):
        Ranked product ids of each row, best first. An empty string holds a rank and hits nothing (an invalid SID,
        which names no product); an empty list is a miss. No product may appear twice in one list.
    references (`list[str]`):
        The product bought, one per row.
    sid_predictions (`list[list[str]]`, configuration "sid"):
        Ranked SIDs of each row, best first; an empty string marks an invalid SID. No SID may appear twice in one
        list. Lists may differ in length from those of `predictions`, as one SID may name several products.
    sid_references (`list[str]`, configuration "sid"):
        The SID of the product bought.
    groups (`list[str]`, configuration "sid"):
        Group of each row, such as "head" or "tail"; an empty string for none.
    ks (`tuple[int]`, *optional*, defaults to `(1, 10, 50)`):
        Cutoffs of Recall@k.
    ndcg_ks (`tuple[int]`, *optional*, defaults to `(10,)`):
        Cutoffs of NDCG@k.
    bootstrap (`int`, *optional*, defaults to 0):
        Number of resamples over rows for the percentile intervals; 0 for no intervals.
    confidence (`float`, *optional*, defaults to 0.95):
        Level of the intervals, between 0 and 1.
    seed (`int`, *optional*, defaults to 0):
        Seed of the resamples.

Returns:
    `dict[str, float]`: `item_recall@k`, `item_ndcg@k`, `item_mrr` and `num_rows`; in the configuration "sid" also
    `sid_recall@k`, `sid_ndcg@k`, `sid_mrr` and `invalid_rate`, and each figure of each group under `<name>/<group>`.
    With `bootstrap`, the bounds of every figure but `num_rows` under `<name>_low` and `<name>_high`.

    With one target per row:
    - Recall@k is the share of rows whose target is among the first k, which is HitRate@k (He et al., 2017).
    - NDCG@k is the mean of 1 / log2(1 + rank) over rows, 0 beyond rank k: the ideal list has its only gain at rank 1,
      so that the ideal DCG is 1 (discount of Järvelin and Kekäläinen, 2002, in its usual log2(1 + rank) form).
    - MRR is the mean of 1 / rank within the returned list, 0 where the target is not in it (Voorhees, 1999).
    - Intervals are percentiles over resampled rows (Efron and Tibshirani, 1993, chapter 13). Those of a group resample
      its own rows.

Raises:
    ValueError: If there are no rows, a list holds an entry twice, a reference is an empty string, an id is not a
    string, columns differ in length, or an argument is out of range.
    TypeError: If `ks` or `ndcg_ks` is not a list or tuple.

Examples:

    >>> metric = evaluate.load("sid_retrieval")
    >>> metric.compute(predictions=[["p1", "p2"], ["p3", "p1"]], references=["p2", "p3"], ks=(1, 2), ndcg_ks=(2,))
    {'item_recall@1': 0.5, 'item_recall@2': 1.0, 'item_ndcg@2': 0.8154648767857288, 'item_mrr': 0.75, 'num_rows': 2.0}
"""

_LISTS = ("predictions", "sid_predictions")
_SID_COLUMNS = ("sid_predictions", "sid_references", "groups")

# Counts drawn at once while bootstrapping, so that memory does not grow with the number of resamples.
_BOOTSTRAP_CHUNK = 1 << 22


def _check_types(columns, singular=False):
    """Refuses what `evaluate` would cast in silence: it looks at the first row only, turns the string "p1" in a column
    of lists into ["p", "1"], and quotes every id of a batch that mixes strings and integers."""
    for name, rows in columns.items():
        if rows is None:
            raise ValueError(f"`{name}` is missing: pass one entry per row.")
        rows = [rows] if singular else rows
        if name in _LISTS:
            for index, row in enumerate(rows):
                if not isinstance(row, (list, tuple, np.ndarray)):
                    raise ValueError(
                        f"Row {index} of `{name}` is {row!r} of type {type(row).__name__}, not a list. Pass a ranked "
                        "list of strings for each row, an empty list if nothing was returned."
                    )
        values = chain.from_iterable(rows) if name in _LISTS else rows
        for kind in set(map(type, values)):
            if not issubclass(kind, str):
                raise ValueError(
                    f"`{name}` holds a value of type {kind.__name__}, where ids are compared as strings. Convert all "
                    "of them with `str`; an empty string marks an invalid SID."
                )


def _check_arguments(ks, ndcg_ks, bootstrap, confidence, seed):
    for name, cutoffs in (("ks", ks), ("ndcg_ks", ndcg_ks)):
        if not isinstance(cutoffs, (list, tuple)):
            raise TypeError(f"`{name}` is {cutoffs!r}, not a list or tuple of cutoffs. Pass for example `(1, 10)`.")
        for k in cutoffs:
            if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
                raise ValueError(f"`{name}` holds {k!r}. A cutoff is an integer of at least 1.")
    for name, value in (("bootstrap", bootstrap), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
            raise ValueError(f"`{name}` is {value!r}. Pass an integer of at least 0.")
    if not isinstance(confidence, (int, float)) or not 0 < confidence < 1:
        raise ValueError(f"`confidence` is {confidence!r}. Pass a level strictly between 0 and 1, such as 0.95.")


def _target_ranks(name, rows, targets):
    """Rank of each row's target, counted from 1, and 0 where it was not returned.

    Args:
        name (`str`): Column of `rows`, for error messages.
        rows (`list[list[str]]`): N ranked lists.
        targets (`list[str]`): N targets.

    Returns:
        `np.ndarray`: Ranks of shape (N,).
    """
    for index, (row, target) in enumerate(zip(rows, targets, strict=True)):
        if target == "":
            raise ValueError(
                f"The target of row {index} beside `{name}` is an empty string, which marks an invalid SID and can "
                "never be hit. Give the id of what was bought, or leave the row out."
            )
        if len(set(row)) < len(row):
            filled = [entry for entry in row if entry != ""]
            if len(set(filled)) < len(filled):
                twice = next(entry for entry in filled if filled.count(entry) > 1)
                raise ValueError(
                    f"Row {index} of `{name}` holds {twice!r} more than once. A repeated entry shifts the ranks of "
                    "all that follow: remove repeats before ranking. Only empty strings (invalid SIDs) may repeat."
                )

    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    owner = np.repeat(np.arange(len(rows)), lengths)
    flat = np.fromiter(chain.from_iterable(rows), dtype=object, count=len(owner))
    # Objects rather than fixed-width strings: one long id would widen every entry of the array.
    wanted = np.fromiter(targets, dtype=object, count=len(targets))
    hits = np.flatnonzero(flat == wanted[owner])
    starts = np.cumsum(lengths) - lengths
    ranks = np.zeros(len(rows), dtype=np.int64)
    ranks[owner[hits]] = hits - starts[owner[hits]] + 1
    return ranks


def _row_metrics(prefix, ranks, ks, ndcg_ks):
    """Value of each metric in each row: `dict[str, np.ndarray]` of shape (N,) each. `ranks`: shape (N,), 0 a miss."""
    found = ranks > 0
    reachable = np.maximum(ranks, 1)
    metrics = {f"{prefix}_recall@{k}": found & (ranks <= k) for k in ks}
    metrics |= {f"{prefix}_ndcg@{k}": (found & (ranks <= k)) / np.log2(1 + reachable) for k in ndcg_ks}
    metrics[f"{prefix}_mrr"] = found / reachable
    return metrics


def _summarize(names, numerators, denominators, suffix, bootstrap, confidence, seed):
    """Ratio of column sums, with the percentile interval over rows that `bootstrap` asks for.

    Args:
        names (`list[str]`): M metrics.
        numerators (`np.ndarray`): Shape (N, M).
        denominators (`np.ndarray`): Shape (N, M). All ones for a mean over rows.

    Returns:
        `dict[str, float]`: One entry a metric under `name + suffix`, three with an interval.
    """

    def ratios(above, below):
        # Nothing returned, nothing invalid: a ratio without denominator is 0, never a NaN.
        return np.divide(above, below, out=np.zeros_like(above), where=below > 0)

    num_rows = len(numerators)
    totals = ratios(numerators.sum(0), denominators.sum(0))
    results = {name + suffix: value for name, value in zip(names, totals, strict=True)}
    if bootstrap:
        # A resample is how often each row was drawn, so that all metrics of all resamples are one matrix product.
        generator = np.random.default_rng(seed)
        step = max(1, min(bootstrap, _BOOTSTRAP_CHUNK // num_rows))
        samples = []
        for begin in range(0, bootstrap, step):
            size = min(step, bootstrap - begin)
            drawn = generator.integers(0, num_rows, size=(size, num_rows)) + num_rows * np.arange(size)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=size * num_rows).reshape(size, num_rows).astype(np.float64)
            samples.append(ratios(counts @ numerators, counts @ denominators))
        tail = (1 - confidence) / 2
        low, high = np.quantile(np.concatenate(samples), [tail, 1 - tail], axis=0)
        results |= {f"{name}{suffix}_low": value for name, value in zip(names, low, strict=True)}
        results |= {f"{name}{suffix}_high": value for name, value in zip(names, high, strict=True)}
    results[f"num_rows{suffix}"] = num_rows
    return {name: float(value) for name, value in results.items()}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class SIDRetrieval(evaluate.Metric):
    """Configuration "default": products; "sid": products, SIDs and groups."""

    def _info(self):
        features = {
            "predictions": datasets.Sequence(datasets.Value("string")),
            "references": datasets.Value("string"),
        }
        if self.config_name == "sid":
            features |= {
                "sid_predictions": datasets.Sequence(datasets.Value("string")),
                "sid_references": datasets.Value("string"),
                "groups": datasets.Value("string"),
            }
        elif self.config_name != "default":
            raise ValueError(
                f"sid_retrieval has no configuration {self.config_name!r}. Load it without one (ranked products only) "
                "or with 'sid' (SIDs and groups as well)."
            )
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            # A list of two feature sets would be the other way to say this, but evaluate requires of those that they
            # have the same columns.
            features=datasets.Features(features),
            reference_urls=[
                "https://doi.org/10.1145/582415.582418",
                "https://arxiv.org/abs/1708.05031",
            ],
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Add a batch of ranked lists and what was bought."""
        _check_types({"predictions": predictions, "references": references, **kwargs})
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Add one ranked list and what was bought."""
        _check_types({"predictions": prediction, "references": reference, **kwargs}, singular=True)
        super().add(prediction=prediction, reference=reference, **kwargs)

    def _compute(
        self,
        predictions,
        references,
        sid_predictions=None,
        sid_references=None,
        groups=None,
        ks=(1, 10, 50),
        ndcg_ks=(10,),
        bootstrap=0,
        confidence=0.95,
        seed=0,
    ):
        _check_arguments(ks, ndcg_ks, bootstrap, confidence, seed)
        num_rows = len(predictions)
        if num_rows == 0:
            raise ValueError("There are no rows to evaluate: `predictions` and `references` are empty.")

        # In the default configuration evaluate hands these over as they were passed to `compute`: one process, one call.
        sids = dict(zip(_SID_COLUMNS, (sid_predictions, sid_references, groups), strict=True))
        with_sids = any(rows is not None for rows in sids.values())
        if with_sids:
            _check_types(sids)
            for name, rows in sids.items():
                if len(rows) != num_rows:
                    raise ValueError(
                        f"`{name}` has {len(rows)} rows and `predictions` has {num_rows}. To collect SIDs over "
                        "batches or processes, load the metric as `evaluate.load(path, 'sid')`."
                    )

        metrics = _row_metrics("item", _target_ranks("predictions", predictions, references), ks, ndcg_ks)
        divisors = {}
        longest = max(map(len, predictions))
        if with_sids:
            ranks = _target_ranks("sid_predictions", sid_predictions, sid_references)
            metrics |= _row_metrics("sid", ranks, ks, ndcg_ks)
            metrics["invalid_rate"] = np.array([sum(sid == "" for sid in row) for row in sid_predictions])
            divisors["invalid_rate"] = np.array([len(row) for row in sid_predictions])
        if max((*ks, *ndcg_ks), default=0) > longest:
            logger.warning(
                f"The longest list of `predictions` has {longest} entries: figures at larger cutoffs are those of the "
                "lists as they are, and understate what longer lists would reach."
            )

        names = list(metrics)
        numerators = np.stack([metrics[name].astype(np.float64) for name in names], axis=1)
        denominators = np.ones_like(numerators)
        for name, divisor in divisors.items():
            denominators[:, names.index(name)] = divisor
        results = _summarize(names, numerators, denominators, "", bootstrap, confidence, seed)

        labels = np.array(groups if with_sids else [""] * num_rows, dtype=object)
        present = sorted(set(labels.tolist()) - {""})
        for group in present:
            stem = group.removesuffix("_low").removesuffix("_high")
            if bootstrap and stem != group and stem in present:
                raise ValueError(
                    f"With bootstrap intervals the groups {stem!r} and {group!r} would share names such as "
                    f"'item_mrr/{group}'. Rename one of them."
                )
            rows = labels == group
            results |= _summarize(
                names, numerators[rows], denominators[rows], f"/{group}", bootstrap, confidence, seed
            )
        return results
