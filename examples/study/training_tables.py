"""Tables of the experiments that train, from the ranks that their cells hold; the same cells give the same bytes."""

import numpy as np
from cells import read_cells, write_table
from schemes import shared_arms
from training import FLOPS_RULE
from training_comparisons import BASELINE, LAYER, baselines, gain_table, paired_group_table, paired_table, summary
from training_statistics import METRICS, interval, interval_of_difference, metrics, per_seed

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
PAIRED = {"item_ranks": "item-level", "given_first_token": "item-level, the first token given"}
LETTERS = "abcdefgh"
LEGEND = """
- *Item-level*: a row is a hit where the product bought is ranked, not only its SID; products that share a SID come by training
  purchases. One target a row, lists of 50 products.
- *SID-level*: a row is a hit where the SID of the product bought is ranked, whoever shares it; lists of 50 SIDs. **Fewer SIDs are easier
  to hit**, whatever a model knows: k of them stand for more products. Arms with unequal numbers of SIDs cannot be compared there; that one
  is better at SID-level and worse at item-level may be the coarser SIDs alone. Where each product has a SID of its own both levels are
  one.
- Searches keep as many beams as *num_beams* below says. Where products share SIDs, fewer of them fill a list of 50 products, and SIDs of
  one token are searched exactly, which is to their advantage in Recall@50.
- *Brackets*: 95 % percentile intervals of 1,000 bootstrap resamples of users, of each row's mean over the seeds. They are about
  these models, and say nothing about other seeds. ± is the standard deviation over seeds, of codebooks, weights and order of rows at once.
- *Paired*: difference from the baseline on the same rows, over the seeds that both have. *These models*: whether they differ for
  other users, too, by the standard error that resampled users give. Two models of one arm that differ in nothing but their seeds often
  do. *Other seeds, too*: whether the arms differ, by the variances of users and of seeds added; few seeds show large differences only.
- *Head* and *tail* of a layer: rows whose product has, before pruning, one of the most frequent codes that hold half of the products (by
  items) or of the training purchases (by interactions), or another; the same rows in all arms of a seed. Their products differ in
  more than tokens, so that a gap between the groups is not the tokens' doing by itself; what an arm changes in it is.
- *Costs*: means over seeds. CPU seconds include codebooks where a cell was the first to need them, and leave out what was done before a
  cell was stopped and went on. *Best epoch*: where it is the last one, more epochs might change figures, and perhaps their order.
  *Ceiling*: item-level Recall@10 if the right SID always came first and all products were bought equally often.
"""
NOTES = {
    "probes": """*The first token given*: prompts end with it. It need not say as much in one layer as in the other: the more unevenly a layer's
tokens are used, the less one of them tells.
""",
    "schemes": """Schemes, not replications: identifiers as in the named work, all with the model, the losses and the data below. *Unpruned*, *relocated
codebooks*, *top … pruned* and *collisions by suffix* are RQ-KMeans, cells of the remedies.

Rows of new tokens start from the codebooks, but from noise where there are none or they have other dimensions (atomic, hierarchical,
RQ-VAE, suffixes). *Unpruned, rows from noise* says what that changes, and *collisions by suffix, rows from noise* is the baseline
for those schemes: there, as with them, each product has an identifier of its own. The RQ-VAE has its defaults, k-means at the start and
dead codes revived, as *relocated codebooks* have, and *unpruned* has not. A token of its own for each product makes most of the
parameters of *atomic ids*.

*Coarse SID, dense inside*: two layers; products ranked by a weight times the SID's log-probability plus the cosine of their
embedding and a linear map (ridge regression on training rows) of the mean embedding of the history, its last product and the mean
of what was bought with the same query; weight and ridge by validation rows. So it reads at search time what other arms don't, the
embeddings, and chooses among all products of its SIDs, more than 50; the map and the embeddings are not among its parameters, the
ceiling, for products by purchases, is not its own, and its search seconds leave out the forward pass of the loss, which others' hold.
""",
}


def write_training_tables(out):
    """
    Args:
        out (`str` or `os.PathLike`):
            Folder of results; tables go to its folder `tables`.

    Returns:
        `list[str]`: the files written.
    """
    written = []
    for name, title in EXPERIMENTS.items():
        cells = read_cells(out, name)
        if not cells:
            continue
        if name == "schemes":
            cells = add_shared_arms(cells, read_cells(out, "remedies"))
        written.append(write_table(out, name, training_tables(title, cells, NOTES.get(name, ""))))
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
    blocks = blocks_of(cells)
    for heading, block in zip(headings_of(blocks), blocks, strict=True):
        settings, arms = block[0]["settings"], arms_of(block)
        lines += [f"## {heading}", "", *statement(block)]
        lines += [f"- {name}: {_listed(settings[name])}" for name in ("model", "training")]
        lines.append(f"- embeddings: {settings['embeddings']['kind']} ({settings['embeddings']['of']})")
        for baseline, same in baselines(arms).items():
            verdict = summary(same, baseline)
            if verdict:
                lines += ["", f"### In short, against *{baseline}*", "", *verdict]
        for ranks, label in RANKS.items():
            ranked = {name: same for name, same in arms.items() if ranks in same[0]["result"]}
            if ranked:
                lines += ["", f"### {label}", "", *_metrics_table(ranked, ranks)]
        chosen = [cell for cell in block if "dense" in cell["result"]]
        if chosen:
            rows = chosen[0]["settings"]["arm"]["weight_rows"]
            lines += ["", f"Chosen for the ranking inside coarse SIDs, by at most {rows:,} validation rows:", ""]
            lines += [f"- seed {cell['seed']}: {_listed(cell['result']['dense'])}" for cell in chosen]
        given = {name: same for name, same in arms.items() if "given_first_token" in same[0]["result"]}
        if given:
            lines += ["", "### What the first token given changes, item-level", "", *gain_table(given)]
        for baseline, same in baselines(arms).items():
            for ranks, label in PAIRED.items():
                ranked = {name: arm for name, arm in same.items() if ranks in arm[0]["result"]}
                if baseline in ranked and len(ranked) > 1:
                    lines += ["", f"### Paired with *{baseline}*, {label}", "", *paired_table(ranked, baseline, ranks)]
            layer = f"layer {LETTERS[LAYER]}"
            lines += [
                "",
                f"### Paired with *{baseline}*, item-level Recall@10 by the token of {layer} before pruning",
                "",
            ]
            lines += paired_group_table(same, baseline)
        lines += ["", *_group_tables(arms), "### Costs", "", *cost_table(arms), ""]
    return "\n".join(lines) + "\n"


def blocks_of(cells):
    """
    Returns:
        `list[list[dict]]`: the cells that differ in arm and seed only, together.
    """
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


def arms_of(block):
    """
    Args:
        block (`list[dict]`): Of [`blocks_of`].

    Returns:
        `dict[str, list[dict]]`: cells by the name of their arm, the baseline first.

    Raises:
        `ValueError`: if two arms have one name.
    """
    arms = {}
    for cell in block:
        arms.setdefault(cell["settings"]["arm"]["name"], []).append(cell)
    for name, cells in arms.items():
        if any(cell["settings"]["arm"] != cells[0]["settings"]["arm"] for cell in cells):
            raise ValueError(
                f"Cells of different settings are all called {name!r}: "
                f"{[cell['settings']['arm'] for cell in cells]}. Remove the lines of those that are out of date."
            )
    return dict(sorted(arms.items(), key=lambda entry: (entry[0] != BASELINE, entry[0])))


def _shared_settings(cell):
    """What cells of one block have in common."""
    return {name: value for name, value in cell["settings"].items() if name not in ("arm", "seed")}


def headings_of(blocks):
    """
    Data set, task, model and codebooks of each block, and those other settings in which blocks of one heading differ.

    Returns:
        `list[str]`: one a block.
    """
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


def file_name(heading):
    """What may stand in the name of a file, of a heading."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in heading.lower()).split())


def _listed(settings):
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _leaves(settings, above=""):
    """Pairs of a dotted name and a value."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield above + name, value


def _metrics_table(arms, ranks):
    """A row for each arm; at SID-level the number of SIDs, too, without which the others cannot be read."""
    names = ["arm", "seeds", *(["SIDs"] if ranks == "sid_ranks" else []), *METRICS]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for name, cells in arms.items():
        of_seeds = np.stack(list(per_seed(cells, ranks).values()))
        low, high = interval(of_seeds.mean(0), cells[0]["result"]["users"])
        deviations = of_seeds.mean(1).std(0, ddof=1) if len(of_seeds) > 1 else None
        columns = [name, str(len(of_seeds))]
        if ranks == "sid_ranks":
            columns.append(f"{np.mean([cell['result']['sids']['unique'] for cell in cells]):,.0f}")
        for at, mean in enumerate(of_seeds.mean((0, 1))):
            deviation = "" if deviations is None else f" ± {deviations[at]:.4f}"
            columns.append(f"{mean:.4f}{deviation}<br>[{low[at]:.4f}, {high[at]:.4f}]")
        lines.append("| " + " | ".join(columns) + " |")
    return lines


def _group_tables(arms):
    """A table for each layer, so that none is too wide to read."""
    cells, lines = [cell for cells in arms.values() for cell in cells], []
    of_seeds = list({cell["seed"]: cell["result"]["groups"] for cell in cells}.values())
    for layer in range(len(of_seeds[0]["items"])):
        columns = ["arm"]
        for kind in of_seeds[0]:
            letters = "".join(groups[kind][layer] for groups in of_seeds)
            columns += [f"{kind}: head, {letters.count('h') / len(letters):.0%} of rows", "tail", "head - tail"]
        lines += [f"### Item-level Recall@10 by the token of layer {LETTERS[layer]} before pruning", ""]
        lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for name, of_arm in arms.items():
            columns = [name, *(column for kind in of_seeds[0] for column in _group_columns(of_arm, kind, layer))]
            lines.append("| " + " | ".join(columns) + " |")
        lines.append("")
    return lines


def _group_columns(cells, kind, layer):
    """Groups differ from seed to seed, with the codebooks: rows of all seeds, of which those of a user are drawn together."""
    at = METRICS.index("Recall@10")
    values = np.concatenate([metrics(cell["result"]["item_ranks"])[:, at] for cell in cells])
    users = np.concatenate([cell["result"]["users"] for cell in cells])
    is_head = np.array(list("".join(cell["result"]["groups"][kind][layer] for cell in cells))) == "h"
    columns = []
    for group in (is_head, ~is_head):
        columns.append(f"{values[group].mean():.4f}" if group.any() else "no rows")
    if is_head.all() or not is_head.any():
        return [*columns, ""]
    low, high = interval_of_difference(values, is_head, users)[:, 0]
    return [*columns, f"{values[is_head].mean() - values[~is_head].mean():+.4f}<br>[{low:+.4f}, {high:+.4f}]"]


def cost_table(arms):
    names = ("parameters", "training tokens", "training FLOPs", "search seconds", "CPU seconds", "best epoch of")
    names += (
        "codes a layer, as fitted",
        "unique SIDs",
        "mean length",
        "collision rate",
        "codes pruned",
        "ceiling",
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
        + ", ".join(sorted({f"{name} {version}" for cell in cells for name, version in cell["versions"].items()})),
        "cost": f"{sum(cell['cpu_seconds'] for cell in cells):.0f} s of CPU for {len(cells)} cells, "
        f"{sum(result['training_tokens'] for result in results):,} training tokens, "
        f"{sum(result['training_flops'] for result in results):.2e} FLOPs, estimated as {FLOPS_RULE}, "
        f"{sum(result['search_seconds'] for result in results):.0f} s of search",
    }
    return [f"- {name}: {value}" for name, value in about.items()]
