"""Tables of the experiments that train, from the ranks that their cells hold; the same cells give the same bytes."""

from pathlib import Path

import numpy as np
from cells import read_cells
from training import FLOPS_RULE

from rqsid.sid_tokenizer.files import replace_atomically

EXPERIMENTS = {"harm": "The harm", "probes": "The probes", "remedies": "The remedies"}
RECALL, NDCG = (1, 5, 10, 50), (5, 10)
METRICS = (*(f"Recall@{k}" for k in RECALL), *(f"NDCG@{k}" for k in NDCG), "MRR")
RESAMPLES, CHUNK = 1000, 50
LETTERS = "abcdefgh"
LEGEND = """
Item-level: a row is a hit where the product bought is ranked, not only its SID; products that share a SID come by training purchases.
One target a row, lists of 50. Brackets: 95 % percentile intervals of 1,000 bootstrap resamples of users, of each row's mean over
the seeds; they say nothing about other seeds. ± is the standard deviation over seeds. *Paired*: difference from the unpruned
baseline on the same rows, over the seeds that both have. *Head* and *tail* of a layer: rows whose product has, before pruning, one
of the most frequent codes that hold half of the products (by items) or of the training purchases (by interactions); the same rows
in all arms of a seed.
"""


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
        folder.mkdir(parents=True, exist_ok=True)
        with replace_atomically(folder / f"{name}.md") as temporary:
            Path(temporary).write_text(training_tables(title, cells), encoding="utf-8")
        written.append(str(folder / f"{name}.md"))
    return written


def training_tables(title, cells):
    """
    Args:
        title (`str`): What stands at the top.
        cells (`list[dict]`): Of one experiment; those that differ in more than arm and seed get tables of their own.

    Returns:
        `str`: Markdown.
    """
    lines = [f"# {title}", LEGEND]
    for block in _blocks(cells):
        settings = block[0]["settings"]
        model, embeddings = settings["model"], settings["embeddings"]
        lines.append(
            f"## {settings['data']['name']}, {model['family']}, K = {settings['codebook_size']}, {settings['layers']} layers"
        )
        lines += ["", *_statement(block)]
        lines.append(f"- model: {model}; training: {settings['training']}")
        lines.append(f"- embeddings: {embeddings['kind']} ({embeddings['of']})")
        arms = {}
        for cell in block:
            arms.setdefault(cell["settings"]["arm"]["name"], []).append(cell)
        arms = dict(sorted(arms.items(), key=lambda entry: (entry[0] != "unpruned", entry[0])))
        for level in ("item", "sid"):
            lines += ["", f"{'Item' if level == 'item' else 'SID'}-level:", ""]
            lines += ["| arm | seeds | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 2) + "|"]
            for name, same in arms.items():
                lines.append(_metrics_row(name, same, f"{level}_ranks"))
        given = {name: same for name, same in arms.items() if "given_first_token" in same[0]["result"]}
        if given:
            lines += [
                "",
                "Item-level, the first token of the right SID given (swapped: that is the second layer's):",
                "",
            ]
            lines += ["| arm | seeds | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 2) + "|"]
            lines += [_metrics_row(name, same, "given_first_token") for name, same in given.items()]
        if "unpruned" in arms and len(arms) > 1:
            lines += ["", "Paired, item-level:", ""]
            lines += ["| arm - unpruned | seeds | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 2) + "|"]
            lines += [_paired_row(name, arms["unpruned"], same) for name, same in arms.items() if name != "unpruned"]
        lines += ["", "Item-level Recall@10 by the token before pruning:", "", *_group_table(arms)]
        lines += ["", "Costs:", "", *_cost_table(arms), ""]
    return "\n".join(lines) + "\n"


def metrics(ranks):
    """
    Args:
        ranks (`list[int]`): From 1; 0 for a miss.

    Returns:
        `np.ndarray`: Recall, NDCG (one target: 1 / log2(1 + rank)) and MRR of each row. Shape: (R, 7).
    """
    ranks = np.asarray(ranks)
    hit, rank = ranks > 0, np.maximum(ranks, 1)
    columns = [hit & (rank <= k) for k in RECALL]
    columns += [(hit & (rank <= k)) / np.log2(1 + rank) for k in NDCG]
    return np.stack([*columns, hit / rank], 1).astype(float)


def interval(values, users, seed=0):
    """
    95 % percentile interval of the mean over rows, from resampled users with all of their rows.

    Args:
        values (`np.ndarray`): Shape: (R, M).
        users (`list[int]`): A number for the user of each row.
        seed (`int`, *optional*, defaults to 0): Of the resamples.

    Returns:
        `np.ndarray`: Shape: (2, M).
    """
    values = np.asarray(values)
    means = _resampled_means(values, np.ones(len(values)), users, seed)
    return np.quantile(means, (0.025, 0.975), axis=0)


def interval_of_difference(values, is_head, users, seed=0):
    """As [`interval`], of the mean over the rows of one group minus that over the others: values, `is_head` of shape (R,)."""
    means = [_resampled_means(values[:, None], group.astype(float), users, seed) for group in (is_head, ~is_head)]
    return np.nanquantile(means[0] - means[1], (0.025, 0.975), axis=0)


def _resampled_means(values, weights, users, seed):
    """The weighted means of [`interval`]'s resamples, NaN where all weights are zero. Shape: (1000, M)."""
    users = np.unique(users, return_inverse=True)[1]
    sizes = np.bincount(users, weights=weights)
    sums = np.stack([np.bincount(users, weights=column * weights) for column in values.T], 1)
    random, means = np.random.default_rng(seed), []
    for _ in range(0, RESAMPLES, CHUNK):
        drawn = random.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), CHUNK)
        total = (drawn @ sizes)[:, None]
        means.append(np.divide(drawn @ sums, total, out=np.full((CHUNK, sums.shape[1]), np.nan), where=total > 0))
    return np.concatenate(means)


def _blocks(cells):
    blocks = []
    for cell in cells:
        key = {name: value for name, value in cell["settings"].items() if name not in ("arm", "seed")}
        for known, block in blocks:
            if known == key:
                block.append(cell)
                break
        else:
            blocks.append((key, [cell]))
    return [block for _, block in blocks]


def _per_seed(cells, ranks="item_ranks"):
    return {cell["seed"]: metrics(cell["result"][ranks]) for cell in cells}


def _metrics_row(name, cells, ranks):
    per_seed = list(_per_seed(cells, ranks).values())
    values = np.mean(per_seed, axis=0)
    low, high = interval(values, cells[0]["result"]["users"])
    deviations = np.std([of_seed.mean(0) for of_seed in per_seed], axis=0, ddof=1) if len(per_seed) > 1 else None
    columns = [
        f"{values[:, at].mean():.4f}"
        + ("" if deviations is None else f" ± {deviations[at]:.4f}")
        + _brackets(low, high, at)
        for at in range(len(METRICS))
    ]
    return f"| {name} | {len(per_seed)} | " + " | ".join(columns) + " |"


def _paired_row(name, baseline, cells):
    base, of_arm = _per_seed(baseline), _per_seed(cells)
    seeds = sorted(base.keys() & of_arm.keys())
    if not seeds:
        return f"| {name} | 0 |" + " |" * len(METRICS)
    values = np.mean([of_arm[seed] - base[seed] for seed in seeds], axis=0)
    low, high = interval(values, cells[0]["result"]["users"])
    columns = [f"{values[:, at].mean():+.4f}{_brackets(low, high, at, '+')}" for at in range(len(METRICS))]
    return f"| {name} | {len(seeds)} | " + " | ".join(columns) + " |"


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


def _cost_table(arms):
    names = ("parameters", "training tokens", "training FLOPs", "search seconds", "CPU seconds", "best epoch of")
    names += ("unique SIDs", "mean length", "collision rate", "codes pruned", "ceiling of Recall@10")
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
            *(f"{np.mean([entry[key] for entry in sids]):,.4g}" for key in ("unique", "mean_length")),
            f"{np.mean([entry['collision_rate'] for entry in sids]):.3f}",
            f"{np.mean([entry['pruned'] for entry in sids]):.4g}",
            f"{np.mean([entry['recall_ceiling']['10'] for entry in sids]):.3f}",
        ]
        lines.append(f"| {name} | " + " | ".join(columns) + " |")
    return lines


def _statement(cells):
    """What every table says of itself: data set, task, protocol, tie order, seeds, commit, cost."""
    results = [cell["result"] for cell in cells]
    about = results[0]["about"] | {
        "test rows": f"{len(results[0]['item_ranks'])} of {len(set(results[0]['users']))} users, searched once; the epoch is the best "
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
