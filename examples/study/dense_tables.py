"""Tables of experiment 6, from the ranks that its cells hold; the same cells give the same bytes."""

import numpy as np
from cells import read_cells, write_table
from training_statistics import METRICS, interval, metrics
from training_tables import statement

BASELINES = ("SID model", "dual tower", "SID model, re-scored", "dual tower, re-scored", "popularity in the category")
# What each method keeps in memory, by the names of the cells; ids of products are everybody's.
TOWER, SIDS = ("tower", "item matrix"), ("SID model", "trie and catalog")
PARTS = {
    "popularity": ("popularity",),
    "popularity in the category": ("popularity",),
    "item-transition kNN": ("transitions", "popularity"),
    "dual tower": TOWER,
    "SID model": SIDS,
    "dual tower, re-scored": (*TOWER, "popularity"),
    "SID model, re-scored": (*SIDS, "popularity"),
    "hybrid": (*SIDS, *TOWER, "popularity"),
    "hybrid, union": (*SIDS, *TOWER, "popularity"),
}
LEGEND = """
All methods answer the same test rows with lists of 50 products; a row is a hit where the product bought is ranked. One target a row.

- *popularity*: by training purchases. *In the category*: of the products of the category asked for. A query that is constructed of
  the category of the product bought tells where it is, which this floor takes at its word and all others must learn; where
  categories are small it finds most products, and says how much of the task is in the query.
- *item-transition kNN*: shares of the next three purchases in training rows (counting 1, 1/2, 1/3; where histories are a choice of
  purchases, the next of that choice), summed over the history, each step back worth half; the query is not read, nothing is tuned.
- *dual tower*: the products of largest inner product with the embedded query, of all products; equal ones in no certain order.
- *SID model*: beam search, unpruned SIDs; products that share a SID come by training purchases.
- *SID model, re-scored*: the search's products (as many as *candidates* says), by a linear combination of log-probability of the
  SID; log(1 + training purchases); 1 if the product is in the user's history; and recency, 1 / n for the n-th latest product of that
  history, 0 for others. How long ago others last bought a product is not read: not all of the data have times.
- *dual tower, re-scored*: as many products of the tower, by the same, with the inner product instead of the log-probability.
- *hybrid*: the search's products, by both and the same. *hybrid, union*: those and the tower's first 50; a product that the search did
  not find has the lowest log-probability that it found in that row, and lacks the feature *found by beams*.

What a hybrid gains over *SID model* is not the tower's alone: what the tower adds is the difference from *SID model, re-scored*. No
other method leaves out what the user has bought already, and what is re-scored learns whether that is bought again; in reviews, where
nobody reviews a product twice, that alone is a gain.

Weights minimise the listwise cross-entropy on validation rows whose product is a candidate; no test row enters. Tower
and SID model are those of the examples, neither tuned against the other: the comparison is of these two as described
below, not of all that their kinds can do. The tower's epochs are fixed, the SID model's chosen; the tower reads words
of titles, the SID model the SIDs of the history.

Brackets: 95 % percentile intervals of 1,000 bootstrap resamples of users, of each row's mean over the seeds; they say nothing about
other seeds, and are not adjusted for the number of comparisons. ± is the standard deviation over seeds, of what a seed draws.
*Paired*: difference on the same rows, over the same seeds.
"""
LATENCY_NOTE = """
Milliseconds a row, from the row to ranked products, the median over calls, and the mean over seeds. Measured once, in the run that made
the cell, on a machine that may have been busy with other work: ratios are indications, and no more. Reading the row and
turning it into the model's input is included, of which popularity needs nothing. The tower's products are compared with the query one by
one, without an index of neighbours, the kNN sorts all products, and the SIDs' model runs as eager PyTorch.
"""
MEMORY_NOTE = """
In MB (10^6 bytes), what is kept between queries, beside ids of the products. Not counted, and everybody's in part: tokenizers, titles,
categories, the histories of users; and what a query needs while it is answered, which is most for the SID model, whose beams have keys
and values of their own.
"""


def write_dense_tables(out):
    """
    Args:
        out (`str` or `os.PathLike`):
            Folder of results; the table goes to its folder `tables`.

    Returns:
        `list[str]`: the files written; none if there are no cells.
    """
    cells = read_cells(out, "dense")
    if not cells:
        return []
    return [write_table(out, "dense", dense_tables(cells))]


def dense_tables(cells):
    """
    Args:
        cells (`list[dict]`): Of experiment 6; those that differ in more than the seed get tables of their own.

    Returns:
        `str`: Markdown.

    Raises:
        `ValueError`: if cells of other seeds have other test rows.
    """
    lines = ["# Generative against dense", LEGEND]
    blocks = {}
    for cell in cells:
        key = str(sorted((name, value) for name, value in cell["settings"].items() if name != "seed"))
        blocks.setdefault(key, []).append(cell)
    for block in blocks.values():
        if any(cell["result"]["users"] != block[0]["result"]["users"] for cell in block):
            raise ValueError(
                "The seeds have other test rows, so that they cannot be paired. Remove the cells, they are run anew."
            )
        settings, results = block[0]["settings"], [cell["result"] for cell in block]
        title = f"{settings['data']['name']}, {settings['data']['task']}, K = {settings['codebook_size']}"
        lines += [f"## {title}, {settings['layers']} layers", "", *_statement(block)]
        methods = [name for name in PARTS if all(name in result["methods"] for result in results)]
        lines += ["", *_header("method", METRICS)]
        lines += [_metrics_row(name, results) for name in methods]
        for baseline in [name for name in BASELINES if name in methods]:
            lines += ["", "Paired:", "", *_header(f"method - {baseline}", METRICS)]
            lines += [_paired_row(name, baseline, results) for name in methods if name != baseline]
        lines += ["", "Weights, in the units of the features; 0 for what is the same for all candidates:", ""]
        lines += _weights_table([name for name in methods if name in results[0]["weights"]], results)
        lines += ["", "On the validation rows, to which weights were fitted, which flatters what is re-scored:", ""]
        lines += _validation_table(methods, results)
        lines += ["", "Latency:", LATENCY_NOTE, *_latency_table(methods, results)]
        lines += ["", "Memory:", MEMORY_NOTE, *_memory_table(methods, results)]
        lines += ["", "Training; where the best epoch is the last one, more of them might help:", ""]
        lines += [*_training_table(results), ""]
    return "\n".join(lines) + "\n"


def _values(name, results):
    """Shape: (seeds, R, M)."""
    return np.stack([metrics(result["methods"][name]) for result in results])


def _metrics_row(name, results):
    values = _values(name, results)
    low, high = interval(values.mean(0), results[0]["users"])
    columns = [f"{mean} [{low[at]:.4f}, {high[at]:.4f}]" for at, mean in enumerate(_means(values.mean(1), ".4f"))]
    return _row(name, columns)


def _paired_row(name, baseline, results):
    values = (_values(name, results) - _values(baseline, results)).mean(0)
    low, high = interval(values, results[0]["users"])
    means = values.mean(0)
    return _row(name, [f"{means[at]:+.4f} [{low[at]:+.4f}, {high[at]:+.4f}]" for at in range(len(METRICS))])


def _weights_table(methods, results):
    features = list(results[0]["weights"]["hybrid"])
    lines = _header("method", [*features, "rows fitted on", "test rows with the product among candidates"])
    for name in methods:
        weights = np.array([[result["weights"][name][feature] for feature in features] for result in results])
        rows = ", ".join("{} of {}".format(*result["fitted_rows"][name]) for result in results)
        ceiling = _means(np.array([[result["ceilings"][name]] for result in results]), ".4f")
        lines.append(_row(name, [*_means(weights, ".3f"), rows, *ceiling]))
    return lines


def _validation_table(methods, results):
    names = ("recall@10", "ndcg@10")
    lines = _header("method", ("Recall@10", "NDCG@10"))
    for method in methods:
        values = np.array([[result["validation_methods"][method][name] for name in names] for result in results])
        lines.append(_row(method, _means(values, ".4f")))
    return lines


def _latency_table(methods, results):
    first = results[0]["latency"]
    kinds = {"single": "one row at a time", "batch": f"batches of {first['sizes']['batch'][0]}"}
    columns = [name for kind in kinds.values() for name in (kind, "/ SID model")]
    lines = [f"On {first['device']}, {first['threads']} thread{'s' if first['threads'] > 1 else ''}:", ""]
    lines += _header("method", columns)
    for method in methods:
        cells = []
        for kind in kinds:
            times = [np.mean([result["latency"][kind][name] for result in results]) for name in (method, "SID model")]
            cells += [f"{times[0]:.3g}", f"{times[0] / times[1]:.3g}"]
        lines.append(_row(method, cells))
    return lines


def _memory_table(methods, results):
    parts = [part for part in results[0]["memory"] if part != "product ids"]
    megabytes = {part: np.mean([result["memory"][part] for result in results]) / 1e6 for part in parts}
    lines = _header("method", [*parts, "sum"])
    for method in methods:
        used = PARTS[method]
        cells = [f"{megabytes[part]:.3f}" if part in used else "" for part in parts]
        lines.append(_row(method, [*cells, f"{sum(megabytes[part] for part in used):.3f}"]))
    return lines


def _training_table(results):
    def mean(values, form):
        return f"{np.mean(values):{form}}" if None not in values else "not kept"

    lines = _header(
        "model", ("parameters", "training tokens", "training FLOPs", "CPU seconds of training", "best epoch")
    )
    best = [max(result["validation"], key=lambda entry: entry["ndcg@10"])["epoch"] for result in results]
    names = (("parameters", ",.0f"), ("training_tokens", ",.0f"), ("training_flops", ".2e"))
    sids = [mean([result[name] for result in results], form) for name, form in names]
    epochs = ", ".join(f"{epoch:g}" for epoch in best) + f" of {len(results[0]['validation'])}"
    lines.append(_row("SID model", [*sids, "in the cost of the cells", epochs]))
    towers = [result["tower"] for result in results]
    tower = [
        mean([one[name] for one in towers], form) for name, form in (("parameters", ",.0f"), ("cpu_seconds", ".0f"))
    ]
    lines.append(_row(f"dual tower of {towers[0]['dim']} dimensions", [tower[0], "", "", tower[1], ""]))
    return lines


def _statement(cells):
    """What every table says of itself, and what this one is of besides."""
    settings = cells[0]["settings"]
    embeddings = settings["embeddings"]
    about = {
        "cost, more precisely": "the search is that of all methods together; towers and codebooks that were there already are not "
        "counted",
        "SIDs": f"{settings['quantizer']}, {settings['arm']['init']}, of embeddings: {embeddings['kind']} ({embeddings['of']})",
        "model": f"{settings['model']}; training: {settings['training']}",
        "dual tower": f"{settings['tower']}, trained on the training rows with the cell's seed",
        "candidates": f"{settings['candidates']} products of {settings['training']['num_beams']} beams, or of the tower",
    }
    return [*statement(cells), *(f"- {name}: {value}" for name, value in about.items())]


def _means(values, form):
    """Mean and, of several seeds, standard deviation of each column: values of shape (seeds, M)."""
    deviations = values.std(0, ddof=1) if len(values) > 1 else None
    return [
        f"{mean:{form}}" + ("" if deviations is None else f" ± {deviations[at]:{form}}")
        for at, mean in enumerate(values.mean(0))
    ]


def _header(first, names):
    return [f"| {first} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]


def _row(first, columns):
    return f"| {first} | " + " | ".join(columns) + " |"
