"""Tables of the recipes for accuracy, beside their floors and, apart from them, what others have published."""

import json

import numpy as np
from cells import read_cells, write_table
from floors import KNN_RULE
from training_statistics import METRICS, interval, metrics
from training_tables import statement

LEGEND = f"""
Next item: one decoder-only model, trained from scratch by SIDTrainer on SIDs of rqsid's own quantizer, against what needs no model.
Item-level: a row is a hit where the product bought is ranked. What the history holds is left out of all lists, since no one buys a
product twice in the data below; *with history* are lists that keep it. One target a row, lists of 50 of all products.
Everything was chosen on validation rows. Brackets: 95 % percentile intervals of 1,000 bootstrap resamples of users, of each row's mean
over the seeds; they say nothing about other seeds. ± is the standard deviation over seeds. Popularity: by training purchases.
{KNN_RULE[0].upper()}{KNN_RULE[1:]}.
"""
TRIALS_LEGEND = """
Each the recipe that its name begins with, changed in what the name says; validation rows, of which the history is left out, too.
"""
PUBLISHED_LEGEND = """
Not on these terms: figures that others have published, or that were found in their logs, as they stand there. Orders of purchases of
one day, splits, sizes of models and what is left out of lists differ from the above and from each other; nothing here was run for
this study.
"""
# Data set, model, R@5, N@5, R@10, N@10, where it stands.
PUBLISHED = (
    ("amazon-beauty-2014", "SASRec", ".0387", ".0249", ".0605", ".0318", "TIGER, arXiv 2305.05065"),
    ("amazon-beauty-2014", "TIGER", ".0454", ".0321", ".0648", ".0384", "TIGER, arXiv 2305.05065"),
    ("amazon-beauty-2014", "TIGER as run by GRID, 5 seeds", "", "", ".0639", ".0347", "GRID, arXiv 2507.22224"),
    ("amazon-beauty-2014", "LETTER-TIGER", ".0431", ".0286", ".0672", ".0364", "UniSID's table"),
    ("amazon-beauty-2014", "LC-Rec", ".0503", ".0352", "", "", "as run by GRAM"),
    ("amazon-beauty-2014", "OneRec", "", "", ".0924", "", "README of OpenOneRec"),
    (
        "amazon-beauty-2014",
        "SASRec, full cross-entropy, the tie order of the file used here",
        ".0635",
        ".0454",
        ".0897",
        ".0539",
        "a repository's log",
    ),
    (
        "amazon-scientific-2018",
        "RK-Means, item-level (SID-level .1330)",
        "",
        "",
        ".0654",
        "",
        "arXiv 2605.25330",
    ),
    ("amazon-scientific-2018", "RK-Means, reassigned without collisions", "", "", ".0812", "", "arXiv 2605.25330"),
    ("amazon-scientific-2018", "RQ-VAE, item-level", "", "", ".0665", "", "arXiv 2605.25330"),
    ("amazon-scientific-2018", "RQ-VAE, reassigned without collisions", "", "", ".0800", "", "arXiv 2605.25330"),
)
KNN = "item-transition kNN"


def write_accuracy_tables(out):
    """
    Args:
        out (`str` or `os.PathLike`):
            Folder of results; the table goes to its folder `tables`.

    Returns:
        `list[str]`: the file written, none without cells.
    """
    cells, trials = read_cells(out, "accuracy"), read_cells(out, "accuracy_trials")
    if not cells and not trials:
        return []
    return [write_table(out, "accuracy", accuracy_tables(cells, trials))]


def accuracy_tables(cells, trials=()):
    """
    Args:
        cells (`list[dict]`): Of the experiment; one table for each data set.
        trials (`list[dict]`, *optional*): Of what was tried on validation rows alone.

    Returns:
        `str`: Markdown.
    """
    lines, blocks = ["# Accuracy", LEGEND], {}
    for cell in cells:
        settings = cell["settings"]
        rows = settings if "floor" in settings else settings["recipe"]["training"]
        key = json.dumps([settings["data"], rows["validation_rows"], rows["test_rows"]], sort_keys=True)
        blocks.setdefault(key, []).append(cell)
    for key, block in blocks.items():
        count = json.loads(key)[1]
        lines += [f"## {block[0]['settings']['data']['name']}, next item", "", *statement(block)]
        lines += [f"- validation rows: {'all' if count is None else f'the first {count}'}", ""]
        lines += [*metric_table(block), "", *difference_table(block)]
        lines += ["", "Costs:", "", *cost_table(block), "", *recipes(block), ""]
    if trials:
        lines += ["## Tried on validation rows", TRIALS_LEGEND, *trial_table(trials), ""]
    return "\n".join([*lines, "## Published elsewhere", PUBLISHED_LEGEND, *published_table()]) + "\n"


def arms_of(block):
    """Cells by what they are: floors first, then recipes, told apart by number where two have one name."""
    floors, recipes = {}, {}
    for cell in block:
        settings = cell["settings"]
        if "floor" in settings:
            floors.setdefault(settings["floor"], []).append(cell)
        else:
            recipes.setdefault(json.dumps([settings["recipe"], settings["text"]], sort_keys=True), []).append(cell)
    named = {}
    for cells in recipes.values():
        name = cells[0]["settings"]["recipe"]["name"]
        named[name if name not in named else f"{name} ({len(named) + 1})"] = cells
    return dict(sorted(floors.items(), reverse=True)) | named


def metric_table(block):
    lines = ["| model | seeds | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 2) + "|"]
    for name, cells in arms_of(block).items():
        for ranks, label in (("item_ranks", name), ("with_history", f"{name}, with history")):
            if ranks in cells[0]["result"]:
                lines.append(f"| {label} | {len(cells)} | " + " | ".join(_columns(cells, ranks)) + " |")
    return lines


def difference_table(block):
    """Each recipe minus the kNN, row by row."""
    arms = arms_of(block)
    if KNN not in arms:
        return []
    floor = metrics(arms[KNN][0]["result"]["item_ranks"])
    lines = ["Minus the item-transition kNN, on the same rows:", ""]
    lines += ["| model | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 1) + "|"]
    for name, cells in arms.items():
        if "floor" in cells[0]["settings"]:
            continue
        values = np.mean([metrics(cell["result"]["item_ranks"]) for cell in cells], axis=0) - floor
        low, high = interval(values, cells[0]["result"]["users"])
        columns = [f"{values[:, at].mean():+.4f} [{low[at]:+.4f}, {high[at]:+.4f}]" for at in range(len(METRICS))]
        lines.append(f"| {name} | " + " | ".join(columns) + " |")
    return lines


def cost_table(block):
    names = ("parameters", "training tokens", "training FLOPs", "search seconds", "CPU seconds", "best epoch of")
    names += ("unique SIDs", "validation Recall@10, with history")
    lines = ["| model | seed | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for name, cells in arms_of(block).items():
        for cell in cells:
            result = cell["result"]
            columns = ["0", "0", "0", f"{result['search_seconds']:.1f}", f"{cell['cpu_seconds']:.0f}", "", "", ""]
            if "floor" not in cell["settings"]:
                curve = result["validation"]
                best = max(curve, key=lambda entry: entry["ndcg@10"])
                columns[:3] = [f"{result[key]:,}" for key in ("parameters", "training_tokens")] + [
                    f"{result['training_flops']:.2e}"
                ]
                columns[5:] = [
                    f"{best['epoch']:g} of {len(curve)}",
                    f"{result['sids']['unique']:,}",
                    f"{best['recall@10']:.4f}",
                ]
            lines.append(f"| {name} | {cell['seed']} | " + " | ".join(columns) + " |")
    return lines


def recipes(block):
    """Each recipe as its file holds it, and the decay of the kNN."""
    lines = []
    for name, cells in arms_of(block).items():
        if "floor" not in cells[0]["settings"]:
            recipe = cells[0]["settings"]["recipe"]
            lines += [f"{name}:", "", "```json", json.dumps(recipe, indent=2), "```", ""]
        elif "decay" in cells[0]["result"]:
            lines += [f"Decay of the {name}: {cells[0]['result']['decay']:g}.", ""]
    return lines


def trial_table(trials):
    names = ("data set", "recipe", "seeds", "commit", "CPU seconds", "loss", "best epoch of")
    lines = ["| " + " | ".join([*names, *METRICS]) + " |", "|---" * (len(names) + len(METRICS)) + "|"]
    for name, cells in arms_of(trials).items():
        bests = [max(cell["result"]["validation"], key=lambda entry: entry["ndcg@10"]) for cell in cells]
        columns = [
            cells[0]["settings"]["data"]["name"],
            name,
            ", ".join(str(cell["seed"]) for cell in cells),
            ", ".join(sorted({str(cell["commit"]) for cell in cells})),
            f"{np.mean([cell['cpu_seconds'] for cell in cells]):.0f}",
            f"{np.mean([best['loss'] for best in bests]):.3f}",
            ", ".join(f"{best['epoch']:g}" for best in bests) + f" of {len(cells[0]['result']['validation'])}",
        ]
        lines.append("| " + " | ".join([*columns, *_columns(cells, "item_ranks")]) + " |")
    return lines


def published_table():
    lines = ["| data set | model | R@5 | N@5 | R@10 | N@10 | where |", "|---" * 7 + "|"]
    return lines + ["| " + " | ".join(entry) + " |" for entry in PUBLISHED]


def _columns(cells, ranks):
    of_seeds = [metrics(cell["result"][ranks]) for cell in cells]
    values = np.mean(of_seeds, axis=0)
    low, high = interval(values, cells[0]["result"]["users"])
    spread = np.std([of_seed.mean(0) for of_seed in of_seeds], axis=0, ddof=1) if len(of_seeds) > 1 else None
    return [
        f"{values[:, at].mean():.4f}"
        + ("" if spread is None else f" ± {spread[at]:.4f}")
        + f" [{low[at]:.4f}, {high[at]:.4f}]"
        for at in range(len(METRICS))
    ]
