"""Tables of the experiments that train, from the ranks that their cells hold; the same cells give the same bytes."""

from pathlib import Path

import numpy as np
from cells import read_cells
from schemes import shared_arms
from training import FLOPS_RULE
from training_comparisons import BASELINE, LAYER, baselines, paired_group_table, paired_table, summary
from training_statistics import METRICS, interval, interval_of_difference, metrics, per_seed

from rqsid.sid_tokenizer.files import replace_atomically

EXPERIMENTS = {
    "harm": "The harm",
    "probes": "The probes",
    "remedies": "The remedies",
    "schemes": "The identifier schemes",
}
RANKS = {
    "item_ranks": "Item-level",
    "sid_ranks": "SID-level",
    "given_first_token": "Item-level, the first token of the right SID given (swapped: that is the second layer's)",
    "popularity_ranks": "Item-level, the same coarse SIDs, products inside by training purchases instead of similarity",
    "dense_ranks": "Item-level, similarity alone, without the model, over all products",
}
LETTERS = "abcdefgh"
LEGEND = """
Item-level: a row is a hit where the product bought is ranked, not only its SID; products that share a SID come by training purchases.
One target a row, lists of 50. Brackets: 95 % percentile intervals of 1,000 bootstrap resamples of users, of each row's mean over
the seeds; they say nothing about other seeds. ± is the standard deviation over seeds. *Paired*: difference from the baseline
on the same rows, over the seeds that both have. *Head* and *tail* of a layer: rows whose product has, before pruning, one
of the most frequent codes that hold half of the products (by items) or of the training purchases (by interactions); the same rows
in all arms of a seed.
"""
NOTES = {
    "schemes": """Schemes, not replications: identifiers as in the named work, all with the model, the losses and the data below. *Unpruned*, *top … pruned*
and *collisions by suffix* are RQ-KMeans, cells of the remedies. Rows of new tokens start from the codebooks, but from noise where
there are none or they lie in another space (atomic, hierarchical, RQ-VAE): *unpruned, rows from noise* says what that changes.
*Coarse SID, dense inside*: two layers; products ranked by a weight times the SID's log-probability plus the cosine of their
embedding and a linear map (ridge regression on training rows) of the mean embedding of the history, its last product and the mean
of what was bought with the same query; weight and ridge by validation rows. SID-level is of the coarse SIDs there, and of single
products where each has an identifier of its own: not comparable between arms.
"""
}


def write_training_tables(out):
    """
    Args:
        out (`str` or `os.PathLike`):
            Folder of results; tables go to its folder `tables`.

    Returns:
        `list[str]`: the files written.
    """
    folder, written = Path(out) / "tables", []
    for name, title in EXPERIMENTS.items():
        cells = read_cells(out, name)
        if not cells:
            continue
        if name == "schemes":
            cells = add_shared_arms(cells, read_cells(out, "remedies"))
        folder.mkdir(parents=True, exist_ok=True)
        with replace_atomically(folder / f"{name}.md") as temporary:
            Path(temporary).write_text(training_tables(title, cells, NOTES.get(name, "")), encoding="utf-8")
        written.append(str(folder / f"{name}.md"))
    return written


def add_shared_arms(cells, remedies):
    """
    Args:
        cells (`list[dict]`): Of the schemes.
        remedies (`list[dict]`): Of the remedies.

    Returns:
        `list[dict]`: the first, and those of the second that are schemes, too, and differ from them in arm and seed only.
    """
    known = [_shared_settings(cell) for cell in cells]
    return cells + [
        cell
        for cell in remedies
        if _shared_settings(cell) in known
        and cell["settings"]["arm"] in shared_arms(cell["settings"]["codebook_size"])
    ]


def training_tables(title, cells, note=""):
    """
    Args:
        title (`str`): What stands at the top.
        cells (`list[dict]`): Of one experiment; those that differ in more than arm and seed get tables of their own.
        note (`str`, *optional*): What stands below the legend.

    Returns:
        `str`: Markdown.
    """
    lines = [f"# {title}", LEGEND, *([note] if note else [])]
    blocks = _blocks(cells)
    for heading, block in zip(_headings(blocks), blocks, strict=True):
        settings = block[0]["settings"]
        lines += [f"## {heading}", "", *statement(block)]
        lines.append(f"- model: {settings['model']}; training: {settings['training']}")
        lines.append(f"- embeddings: {settings['embeddings']['kind']} ({settings['embeddings']['of']})")
        arms = {}
        for cell in block:
            arms.setdefault(cell["settings"]["arm"]["name"], []).append(cell)
        arms = dict(sorted(arms.items(), key=lambda entry: (entry[0] != BASELINE, entry[0])))
        for baseline, same in baselines(arms).items():
            verdict = summary(same, baseline)
            if verdict:
                lines += ["", f"In short, against *{baseline}*:", "", *verdict]
        for ranks, label in RANKS.items():
            ranked = {name: same for name, same in arms.items() if ranks in same[0]["result"]}
            if ranked:
                lines += ["", f"{label}:", ""]
                lines += ["| arm | seeds | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 2) + "|"]
                lines += [_metrics_row(name, same, ranks) for name, same in ranked.items()]
        chosen = [(cell["seed"], cell["result"]["dense"]) for cell in block if "dense" in cell["result"]]
        if chosen:
            lines += ["", "Chosen for the ranking inside coarse SIDs:", ""]
            lines += [
                f"- seed {seed}: {', '.join(f'{name} {value}' for name, value in of.items())}" for seed, of in chosen
            ]
        for baseline, same in baselines(arms).items():
            lines += ["", f"Paired with *{baseline}*, item-level:", "", *paired_table(same, baseline)]
            layer = f"layer {LETTERS[LAYER]}"
            lines += [
                "",
                f"Paired with *{baseline}*, item-level Recall@10 by the token of {layer} before pruning:",
                "",
            ]
            lines += paired_group_table(same, baseline)
        lines += ["", "Item-level Recall@10 by the token before pruning:", "", *_group_table(arms)]
        lines += ["", "Costs:", "", *cost_table(arms), ""]
    return "\n".join(lines) + "\n"


def _blocks(cells):
    blocks = []
    for cell in cells:
        key = _shared_settings(cell)
        for known, block in blocks:
            if known == key:
                block.append(cell)
                break
        else:
            blocks.append((key, [cell]))
    return [block for _, block in blocks]


def _shared_settings(cell):
    """What cells of one block have in common."""
    return {name: value for name, value in cell["settings"].items() if name not in ("arm", "seed")}


def _headings(blocks):
    """Data set, task, model and codebooks of each block, and those other settings in which blocks of one heading differ."""
    flat = [dict(_leaves(_shared_settings(block[0]))) for block in blocks]
    headings = [
        f"{settings['data.name']}, {settings['data.task'].split(',')[0].split(' (')[0]}, {settings['model.family']}, "
        f"K = {settings['codebook_size']}, {settings['layers']} layers"
        for settings in flat
    ]
    found = []
    for heading, settings in zip(headings, flat, strict=True):
        same = [other for other, its in zip(flat, headings, strict=True) if its == heading]
        differ = [
            name for name in sorted(set().union(*same)) if len({repr(other.get(name, "none")) for other in same}) > 1
        ]
        found.append(
            ", ".join([heading, *(f"{name.split('.')[-1]} = {settings.get(name, 'none')}" for name in differ)])
        )
    return found


def _leaves(settings, above=""):
    """Pairs of a dotted name and a value."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield above + name, value


def _metrics_row(name, cells, ranks):
    of_seeds = list(per_seed(cells, ranks).values())
    values = np.mean(of_seeds, axis=0)
    low, high = interval(values, cells[0]["result"]["users"])
    deviations = np.std([of_seed.mean(0) for of_seed in of_seeds], axis=0, ddof=1) if len(of_seeds) > 1 else None
    columns = [
        f"{values[:, at].mean():.4f}"
        + ("" if deviations is None else f" ± {deviations[at]:.4f}")
        + _brackets(low, high, at)
        for at in range(len(METRICS))
    ]
    return f"| {name} | {len(of_seeds)} | " + " | ".join(columns) + " |"


def _group_table(arms):
    num_layers = len(next(iter(arms.values()))[0]["result"]["groups"]["items"])
    names = [f"{LETTERS[layer]} {group}" for layer in range(num_layers) for group in ("head", "tail", "head - tail")]
    lines = ["| arm | counted by | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for name, cells in arms.items():
        for kind in ("items", "interactions"):
            columns = [column for layer in range(num_layers) for column in _group_columns(cells, kind, layer)]
            lines.append(f"| {name} | {kind} | " + " | ".join(columns) + " |")
    return lines


def _group_columns(cells, kind, layer):
    """Groups differ from seed to seed, with the codebooks: rows of all seeds, of which those of a user are drawn together."""
    at = METRICS.index("Recall@10")
    values = np.concatenate([metrics(cell["result"]["item_ranks"])[:, at] for cell in cells])
    users = np.concatenate([cell["result"]["users"] for cell in cells])
    is_head = np.array(list("".join(cell["result"]["groups"][kind][layer] for cell in cells))) == "h"
    columns = []
    for group in (is_head, ~is_head):
        mean = f"{values[group].mean():.4f}" if group.any() else "none"
        columns.append(f"{mean} ({group.mean():.0%} of rows)")
    if is_head.all() or not is_head.any():
        return [*columns, ""]
    low, high = interval_of_difference(values, is_head, users)
    return [*columns, f"{values[is_head].mean() - values[~is_head].mean():+.4f}{_brackets(low, high, 0, '+')}"]


def cost_table(arms):
    names = ("parameters", "training tokens", "training FLOPs", "search seconds", "CPU seconds", "best epoch of")
    names += (
        "codes a layer, as fitted",
        "unique SIDs",
        "mean length",
        "collision rate",
        "codes pruned",
        "ceiling of Recall@10",
    )
    lines = ["| arm | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name, cells in arms.items():
        results = [cell["result"] for cell in cells]
        sids = [result["sids"] for result in results]
        best = [max(result["validation"], key=lambda entry: entry["ndcg@10"]) for result in results]
        columns = [
            f"{np.mean([result['parameters'] for result in results]):,.0f}",
            f"{np.mean([result['training_tokens'] for result in results]):,.0f}",
            f"{np.mean([result['training_flops'] for result in results]):.2e}",
            f"{np.mean([result['search_seconds'] for result in results]):.1f}",
            f"{np.mean([cell['cpu_seconds'] for cell in cells]):.0f}",
            ", ".join(f"{entry['epoch']:g}" for entry in best) + f" of {len(results[0]['validation'])}",
            _codes_a_layer(cells),
            *(f"{np.mean([entry[key] for entry in sids]):,.4g}" for key in ("unique", "mean_length")),
            f"{np.mean([entry['collision_rate'] for entry in sids]):.3f}",
            f"{np.mean([entry['pruned'] for entry in sids]):.4g}",
            f"{np.mean([entry['recall_ceiling']['10'] for entry in sids]):.3f}",
        ]
        lines.append(f"| {name} | " + " | ".join(columns) + " |")
    return lines


def _codes_a_layer(cells):
    """Of the first seed: where the largest leaf sets the size of a layer, others may have another number."""
    settings, result = cells[0]["settings"], cells[0]["result"]
    sizes = result.get("codebook_sizes", [settings["codebook_size"]] * settings["layers"])
    return " + ".join(f"{size:,}" for size in sizes)


def statement(cells):
    """What every table says of itself: data set, task, protocol, tie order, seeds, commit, cost."""
    results = [cell["result"] for cell in cells]
    sizes = sorted({(len(result["item_ranks"]), len(set(result["users"]))) for result in results})
    about = results[0]["about"] | {
        "test rows": " or ".join(f"{rows} of {users} users" for rows, users in sizes)
        + ", searched once; the epoch is the best "
        "by NDCG@10 on validation rows",
        "seeds": ", ".join(str(seed) for seed in sorted({cell["seed"] for cell in cells})),
        "commit": ", ".join(sorted({str(cell["commit"]) for cell in cells}))
        + "; "
        + ", ".join(f"{name} {version}" for name, version in cells[0]["versions"].items()),
        "cost": f"{sum(cell['cpu_seconds'] for cell in cells):.0f} s of CPU for {len(cells)} cells, "
        f"{sum(result['training_tokens'] for result in results):,} training tokens, "
        f"{sum(result['training_flops'] for result in results):.2e} FLOPs, estimated as {FLOPS_RULE}, "
        f"{sum(result['search_seconds'] for result in results):.0f} s of search",
    }
    return [f"- {name}: {value}" for name, value in about.items()]


def _brackets(low, high, at, sign=""):
    return f" [{low[at]:{sign}.4f}, {high[at]:{sign}.4f}]"
