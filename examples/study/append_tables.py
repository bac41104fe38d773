"""Tables of experiment 8, products that join a finished model's catalog; the same cells give the same bytes."""

import json

import numpy as np
from append import ALL, WITHOUT
from cells import read_cells, write_table
from training_statistics import METRICS, interval, interval_of_difference, metrics
from training_tables import cost_table, statement

LEGEND = """
*Appended*: test rows whose product joined the catalog after codebooks were fitted and the model was trained without it; *seen*: all
others, and of them apart those with an appended product in the history. *Trained without*: that model; *trained with all*: codebooks
and model that know all products, same seed, same rows; *difference*: the former minus the latter. Trained without means fewer purchases
to train on, shorter histories in training, and validation rows that have none of these products, too. *Text only* is no model: the cosine
of a product's text embedding with the mean of the latest products of the history, which knows no purchases of anything and reads no
query (history), or puts the category that the query names before all others (history and category). How many products count, and
whether they are ranked themselves, is chosen on validation rows, which are of seen products only; models rank the history like all
else. Where queries are constructed of the category of the product bought, that category is given away.
Item-level: a row is a hit where the product bought is ranked, not only its SID; products that share a SID come by training purchases, of
which appended ones have none, so that they come last; *appended first* is the same search with them before the others of their SID.
At the level of SIDs: each model's own SIDs; codebooks that know all products make others, so that the difference is one of tasks,
too. One target a row, lists of 50. Brackets: 95 % percentile intervals of 1,000 bootstrap resamples of users, each with the rows of all seeds; they say
nothing about other seeds. ± is the standard deviation over seeds, each of which draws other products.
"""
GROUPS = {"appended": "a", "seen": "hs", "seen, appended in history": "h"}
PATHS = {"f": "SID known from training", "p": "first two tokens known", "n": "new path"}
WAYS = {WITHOUT: "trained without", ALL: "trained with all"}


def write_append_tables(out):
    """
    Args:
        out (`str` or `os.PathLike`):
            Folder of results; the table goes to its folder `tables`.

    Returns:
        `list[str]`: the file written, none without cells.
    """
    cells = read_cells(out, "append")
    if not cells:
        return []
    return [write_table(out, "append", append_tables(cells))]


def append_tables(cells):
    """
    Args:
        cells (`list[dict]`): Of the experiment; those that differ in more than arm, seed and what was known get tables of their own.

    Returns:
        `str`: Markdown.
    """
    blocks, lines = {}, ["# Change: products appended without training", LEGEND]
    for cell in cells:
        common = {
            name: cell["settings"][name] for name in cell["settings"] if name not in ("arm", "seed", "trained_on")
        }
        blocks.setdefault(json.dumps(common, sort_keys=True), []).append(cell)
    for block in blocks.values():
        settings = block[0]["settings"]
        model, embeddings = settings["model"], settings["embeddings"]
        task = settings["data"]["task"].split(",")[0]
        title = f"{settings['data']['name']}, {task}, {model['family']}, K = {settings['codebook_size']}"
        lines += [f"## {title}, {settings['layers']} layers", "", *statement(block)]
        lines += [f"- model: {model}; training: {settings['training']}"]
        lines += [f"- embeddings: {embeddings['kind']} ({embeddings['of']})", ""]
        names = sorted(
            {cell["settings"]["arm"]["name"] for cell in block}, key=lambda name: (name != "unpruned", name)
        )
        for name in names:
            ways = {
                way: {
                    cell["seed"]: cell
                    for cell in block
                    if cell["settings"]["arm"]["name"] == name and cell["settings"]["trained_on"] == way
                }
                for way in WAYS
            }
            lines += [f"### {name}", "", *_arm_tables(ways), ""]
        costs = {}
        for cell in block:
            way = f"{cell['settings']['arm']['name']}, {WAYS[cell['settings']['trained_on']]}"
            costs.setdefault(way, []).append(cell)
        lines += ["### Costs", "", *cost_table(costs), ""]
    return "\n".join(lines) + "\n"


def _arm_tables(ways):
    """Of the seeds of which there are both models."""
    seeds = sorted(ways[WITHOUT].keys() & ways[ALL].keys())
    if not seeds:
        return ["No seed has both models so far."]
    results = {way: [cells[seed]["result"] for seed in seeds] for way, cells in ways.items()}
    for one, other in zip(*results.values(), strict=True):
        if any(one[name] != other[name] for name in ("users", "kinds")):
            raise ValueError(
                "Two models of a seed have other test rows or appended products, so that they cannot be paired. Remove their "
                "cells, they are run anew."
            )
    users = np.concatenate([result["users"] for result in results[WITHOUT]])
    kinds = np.array(list("".join(result["kinds"] for result in results[WITHOUT])))
    of_seed = np.repeat(seeds, [len(result["users"]) for result in results[WITHOUT]])
    lines = [f"Seeds: {', '.join(map(str, seeds))}.", ""]
    for level in ("item", "sid"):
        ranked = {WAYS[way]: [result[f"{level}_ranks"] for result in results[way]] for way in WAYS}
        if level == "item":
            ranked["trained without, appended first"] = [result["new_first"] for result in results[WITHOUT]]
            for name in results[WITHOUT][0]["text_only"]:
                ranked[f"text only: {name}"] = [result["text_only"][name]["ranks"] for result in results[WITHOUT]]
        values = {name: metrics(np.concatenate(ranks)) for name, ranks in ranked.items()}
        values["difference"] = values[WAYS[WITHOUT]] - values[WAYS[ALL]]
        for name in [name for name in values if name.startswith("text only")]:
            values[f"trained without - {name}"] = values[WAYS[WITHOUT]] - values[name]
        lines += [f"{'Item' if level == 'item' else 'SID'}-level:", ""]
        lines += ["| rows | | number | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 3) + "|"]
        for group, letters in GROUPS.items():
            chosen = np.isin(kinds, list(letters))
            for name, of_rows in values.items():
                is_difference = name == "difference" or " - " in name
                row = _means(of_rows[chosen], users[chosen], of_seed[chosen], is_difference)
                lines.append(f"| {group} | {name} | {chosen.sum()} | {row} |")
        is_appended = kinds == "a"
        if is_appended.any() and not is_appended.all():
            lines += [
                f"| appended - seen | {name} | | {_gaps(of_rows, is_appended, users)} |"
                for name, of_rows in values.items()
            ]
        lines.append("")
    return [*lines, *_cause_table(results[WITHOUT], kinds, users), "", *_placement_table(results[WITHOUT], seeds)]


def _cause_table(results, kinds, users):
    """What a row is lost by: the path of its product, the SID, or the order inside it."""
    paths = np.array(list("".join(result["paths"] for result in results)))
    values = {
        level: metrics(np.concatenate([result[f"{level}_ranks"] for result in results])) for level in ("item", "sid")
    }
    ten = METRICS.index("Recall@10")
    groups = {"seen": kinds != "a", "appended": kinds == "a"}
    groups |= {f"appended, {name}": paths == letter for letter, name in PATHS.items()}
    names = [f"{kind} {metric}" for metric in ("Recall@1", "Recall@10") for kind in ("item", "SID")]
    lines = ["Where they are lost, trained without:", ""]
    lines += ["| rows | number | " + " | ".join(names) + " | items missed at 10, SID hit at 10 |", "|---" * 7 + "|"]
    for group, chosen in groups.items():
        columns = [
            _mean(values[level][chosen, at], users[chosen])
            for at in (METRICS.index("Recall@1"), ten)
            for level in ("item", "sid")
        ]
        missed = chosen & (values["item"][:, ten] == 0)
        inside = int(values["sid"][missed, ten].sum())
        lines.append(f"| {group} | {chosen.sum()} | " + " | ".join(columns) + f" | {inside} of {missed.sum()} |")
    return lines


def _placement_table(results, seeds):
    lines = ["Where the appended products' SIDs lie:", ""]
    lines += ["| seed | appended | on SIDs that others have | " + " | ".join(PATHS.values()) + " |", "|---" * 6 + "|"]
    for seed, result in zip(seeds, results, strict=True):
        placed = result["placed"]
        counts = [placed["on_taken_sids"], *(placed["paths"][letter] for letter in PATHS)]
        shares = [f"{count} ({count / placed['products']:.1%})" for count in counts]
        lines.append(f"| {seed} | {placed['products']} | " + " | ".join(shares) + " |")
    chosen = [
        f"seed {seed}, {name}: latest {choice['latest']}, themselves {'ranked' if choice['ranks_history'] else 'left out'}"
        for seed, result in zip(seeds, results, strict=True)
        for name, choice in result["text_only"].items()
    ]
    return [*lines, "", f"Chosen for text only: {'; '.join(chosen)}."]


def _means(values, users, of_seed, is_difference=False):
    """Mean, deviation over seeds and interval of each metric, as columns; values of shape (R, M)."""
    if not len(values):
        return " | ".join(["none"] * len(METRICS))
    sign, (low, high) = "+" if is_difference else "", interval(values, users)
    per_seed = [values[of_seed == seed].mean(0) for seed in np.unique(of_seed)]
    deviations = np.std(per_seed, axis=0, ddof=1) if len(per_seed) > 1 else None
    return " | ".join(
        f"{values[:, at].mean():{sign}.4f}"
        + ("" if deviations is None else f" ± {deviations[at]:.4f}")
        + f" [{low[at]:{sign}.4f}, {high[at]:{sign}.4f}]"
        for at in range(len(METRICS))
    )


def _gaps(values, is_appended, users):
    columns = []
    for column in values.T:
        low, high = interval_of_difference(column, is_appended, users)[:, 0]
        columns.append(f"{column[is_appended].mean() - column[~is_appended].mean():+.4f} [{low:+.4f}, {high:+.4f}]")
    return " | ".join(columns)


def _mean(values, users):
    if not len(values):
        return "none"
    low, high = interval(values[:, None], users)[:, 0]
    return f"{values.mean():.4f} [{low:.4f}, {high:.4f}]"
