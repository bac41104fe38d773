"""What a model card reports of evaluations: metrics, their intervals, the step they belong to, and the data set."""

import os
import re
from dataclasses import dataclass, field

from huggingface_hub import EvalResult

from ..modeling.beam_search import default_num_beams
from ..sid_tokenizer.card_sections import as_code

METRIC = re.compile(r"(item|sid)_(recall|ndcg|mrr)(?:@(\d+))?")
NAMES = {"recall": "Recall", "ndcg": "NDCG", "mrr": "MRR"}
LEVELS = {"item": "Item-level", "sid": "SID-level"}
CONFIDENCE = 0.95
# What evaluations also log: how long they took, and what memory.
SPEED = re.compile(r"runtime|per_second|timing|mem_|epoch")
# How `datasets` calls what it downloaded: owner___name/config/version/commit/file.
CACHED = re.compile(r"(?:^|/)([^/]+?)___([^/]+)/([^/]+)/[^/]+/([0-9a-f]{40})/[^/]+\.arrow$")


@dataclass
class Evaluation:
    """
    What an evaluation found.

    Args:
        step (`int`): the optimizer step at which the model was evaluated.
        metrics (`dict[str, float]`): without their prefix.
        bounds (`dict[str, tuple[float, float]]`): 95 % intervals of some of them.
        dataset (`dict`): `id`, `revision`, `config` and `split` of a data set on the Hub; empty for others.
    """

    step: int
    metrics: dict
    bounds: dict = field(default_factory=dict)
    dataset: dict = field(default_factory=dict)


def last_evaluations(trainer):
    """
    Returns:
        `dict[str, Evaluation]`: what the card reports, by prefix: the evaluation of the model as it is, or else the last one.
    """
    step = trainer.loaded_step if trainer.loaded_step is not None else trainer.state.global_step
    found = {
        prefix: by_step.get(step, by_step[max(by_step)]) for prefix, by_step in _logged_evaluations(trainer).items()
    }
    for prefix, by_step in trainer.evaluations.items():
        found[prefix] = by_step.get(step, by_step[max(by_step)])
    return found


def _logged_evaluations(trainer):
    """Those of before an interruption, without intervals."""
    found = {}
    for entry in trainer.state.log_history:
        metrics = {}
        for name, value in entry.items():
            match = re.fullmatch(rf"(eval(?:_.+?)?)_({METRIC.pattern}|invalid_rate|loss|num_rows)", name)
            if match:
                metrics.setdefault(match[1], {})[match[2]] = value
        for prefix, values in metrics.items():
            found.setdefault(prefix, {})[entry["step"]] = Evaluation(entry["step"], values)
    return found


def split_bounds(metrics):
    """
    Args:
        metrics (`dict[str, float]`): As `sid_retrieval` gives them with `bootstrap`.

    Returns:
        `tuple[dict, dict]`: the metrics, and the bounds of their intervals as pairs.
    """
    bounds = {name: (metrics[f"{name}_low"], metrics[f"{name}_high"]) for name in metrics if f"{name}_low" in metrics}
    taken = {f"{name}_{end}" for name in bounds for end in ("low", "high")}
    return {name: value for name, value in metrics.items() if name not in taken}, bounds


def eval_results(evaluations, dataset=None, dataset_args=None, bootstrap=0):
    """
    Args:
        evaluations (`dict[str, Evaluation]`): By prefix.
        dataset, dataset_args (`str` or `list[str]`, *optional*): What to call the data set, and what to say of it.
        bootstrap (`int`, *optional*): Resamples of the intervals.

    Returns:
        `list[EvalResult]`: item-level metrics first, for the `model-index` of a card.
    """
    results, ambiguous = [], _ambiguous(evaluations)
    for prefix, evaluation in evaluations.items():
        source = evaluation.dataset
        called = as_list(dataset)[0] if dataset else source.get("id", prefix)
        if prefix in ambiguous:  # the Hub puts results of the same split together
            source = source | {"split": f"{source.get('split', 'train')}, {prefix}"}
            called = f"{called}, {prefix}"
        for level in LEVELS:
            for metric, value in evaluation.metrics.items():
                match = METRIC.fullmatch(metric)
                if match is None or match[1] != level:
                    continue
                name, details = f"{LEVELS[level]} {_metric_name(match)}", {"step": evaluation.step}
                if metric in evaluation.bounds:
                    low, high = evaluation.bounds[metric]
                    name += f" (95 % interval {low:.4f} to {high:.4f})"
                    details |= {"low": low, "high": high, "confidence": CONFIDENCE, "bootstrap": bootstrap}
                results.append(
                    EvalResult(
                        task_type="text-generation",
                        task_name="Generative retrieval",
                        # A type is an id of the Hub; what lies elsewhere has none.
                        dataset_type=source.get("id", "unpublished"),
                        dataset_name=called,
                        dataset_config=source.get("config"),
                        dataset_split=source.get("split", prefix),
                        dataset_revision=source.get("revision"),
                        dataset_args={"description": as_list(dataset_args)[0]} if dataset_args else None,
                        metric_type=metric,
                        metric_name=name,
                        metric_value=value,
                        metric_args=details,
                    )
                )
    return results


def results_section(trainer, evaluations):
    """
    Args:
        trainer ([`SIDTrainer`])
        evaluations (`dict[str, Evaluation]`): By prefix.

    Returns:
        `str`: Markdown, from its heading on: how the catalog was ranked, and a table for each evaluation.
    """
    if not evaluations:
        return "## Results\n\nThe model was not evaluated."
    args, num_products = trainer.args, len(trainer.processing_class.catalog)
    beams = args.eval_num_beams or default_num_beams(args.eval_top_k)
    space = "the SID tokens and the end token" if args.eval_normalize == "sid" else "the whole vocabulary"
    lines = ["## Results"]
    if any(METRIC.fullmatch(name) for evaluation in evaluations.values() for name in evaluation.metrics):
        lines += [
            "",
            f"The first {min(args.eval_top_k, num_products):,} of {num_products:,} products, ranked by a search with {beams} beams and "
            f"scores normalised over {space}. Item-level metrics count the product that was bought, SID-level metrics its SID, which "
            "other products may share.",
        ]
        bounds = [
            pair
            for evaluation in evaluations.values()
            for name, pair in evaluation.bounds.items()
            if METRIC.fullmatch(name)
        ]
        if bounds:
            lines[-1] += f" In brackets, 95 % intervals: percentiles of {args.eval_bootstrap:,} resamples of the rows."
        if any(low == high for low, high in bounds):
            lines[-1] += (
                " Where all rows have the same value, an interval has no width; that does not make the value certain."
            )
    step = trainer.loaded_step if trainer.loaded_step is not None else trainer.state.global_step
    ambiguous = _ambiguous(evaluations)
    for prefix, evaluation in evaluations.items():
        metrics, source = evaluation.metrics, evaluation.dataset
        title = ", ".join(filter(None, [source["id"], source.get("split")])) if source else prefix
        title += f", {prefix}" if prefix in ambiguous else ""
        rows = metrics.get("num_rows")
        said = f"{rows:,.0f} rows, after" if rows is not None else "After"
        lines += ["", f"### {title}", "", f"{said} {evaluation.step:,} optimizer steps"]
        lines[-1] += "." if evaluation.step == step else f"; the model here is that of step {step:,}."
        ranked = {match: name for name in metrics if (match := METRIC.fullmatch(name))}
        kinds = dict.fromkeys(match.group(2, 3) for match in ranked)
        if kinds:
            lines += ["", "| metric | item-level | SID-level |", "|---|---|---|"]
        for kind, cutoff in kinds:
            suffix = kind + (f"@{cutoff}" if cutoff else "")
            cells = [_cell(evaluation, f"{level}_{suffix}") for level in LEVELS]
            lines.append(f"| {NAMES[kind]}{f'@{cutoff}' if cutoff else ''} | {' | '.join(cells)} |")
        others = [
            name for name in sorted(set(metrics) - set(ranked.values()) - {"num_rows"}) if not SPEED.search(name)
        ]
        others = {name: cell for name in others if (cell := _cell(evaluation, name))}
        if others:
            lines += ["", "| | |", "|---|---|"]
            lines += [f"| {as_code(name)} | {cell} |" for name, cell in others.items()]
    return "\n".join(lines)


def _cell(evaluation, name):
    value = evaluation.metrics.get(name)
    if not isinstance(value, int | float):
        return ""
    low_high = evaluation.bounds.get(name)
    return f"{value:.4f}" + (f" ({low_high[0]:.4f} to {low_high[1]:.4f})" if low_high else "")


def _ambiguous(evaluations):
    """Prefixes of evaluations on parts of one split, as a filter makes them."""
    places = [sorted(evaluation.dataset.items()) for evaluation in evaluations.values()]
    return {prefix for prefix, place in zip(evaluations, places, strict=True) if place and places.count(place) > 1}


def hub_dataset(dataset):
    """
    Where on the Hub a dataset was loaded from, as far as it says so: one that lies in the cache of `datasets`, also if it was mapped
    or filtered since. Streams and datasets without an owner in their name do not.

    Args:
        dataset (`Dataset`, or anything else)

    Returns:
        `dict`: `id`, `revision`, `config` and, if there is one, `split`; empty if it is not known, or on no Hub.
    """
    paths = [file["filename"].replace(os.sep, "/") for file in getattr(dataset, "cache_files", None) or ()]
    places = {match.groups() for match in map(CACHED.search, paths) if match}
    if len(places) != 1:
        return {}
    owner, name, config, revision = places.pop()
    place = {"id": f"{owner}/{name}", "revision": revision, "config": config}
    return place | ({"split": str(dataset.split)} if dataset.split is not None else {})


def _metric_name(match):
    return NAMES[match[2]] + (f"@{match[3]}" if match[3] else "")


def as_list(value):
    """One value or several, as a list."""
    return [value] if isinstance(value, str) else list(value or [])
