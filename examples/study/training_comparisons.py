"""Tables of arms against the unpruned baseline, on the same rows: metrics, head and tail, and what that amounts to."""

import numpy as np
from training_statistics import METRICS, differences, holm, interval, p_values, resampled_means

BASELINE, SUFFIX_BASELINE, LEVEL = "unpruned", "collisions by suffix", 0.05
LAYER = 1  # the second, which hourglasses are about, and which the remedies prune
SUMMARY = (("item_ranks", "Recall@10"), ("item_ranks", "NDCG@10"), ("sid_ranks", "Recall@10"))
LEVELS = {"item_ranks": "item-level", "sid_ranks": "SID-level"}


def baselines(arms):
    """
    The baseline that all arms are compared with, and beside it the one with suffixes for the arms that have those, too: between
    these two pruning is the only difference, and nobody shares a SID.

    Returns:
        `dict[str, dict[str, list[dict]]]`: by baseline the arms, itself included; empty where there is nothing to compare.
    """
    found = {BASELINE: arms} if BASELINE in arms and len(arms) > 1 else {}
    with_suffix = {
        name: cells for name, cells in arms.items() if cells[0]["settings"]["arm"].get("collisions") == "suffix"
    }
    if SUFFIX_BASELINE in with_suffix:
        with_suffix = {
            name: cells
            for name, cells in with_suffix.items()
            if name == SUFFIX_BASELINE or cells[0]["settings"]["arm"]["pruning"]["strategy"] != "none"
        }
        found |= {SUFFIX_BASELINE: with_suffix} if len(with_suffix) > 1 else {}
    return found


def compared(arms, baseline):
    """`{arm: cells}` without the baseline."""
    return {name: cells for name, cells in arms.items() if name != baseline}


def paired_table(arms, baseline=BASELINE):
    """A row for each arm: its metrics minus the baseline's, with intervals."""
    lines = [f"| arm - {baseline} | seeds | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 2) + "|"]
    for name, cells in compared(arms, baseline).items():
        of_seeds = differences(arms[baseline], cells)
        if not of_seeds:
            lines.append(f"| {name} | none with the same rows |" + " |" * len(METRICS))
            continue
        values = np.mean(list(of_seeds.values()), axis=0)
        low, high = interval(values, cells[0]["result"]["users"])
        columns = [f"{values[:, at].mean():+.4f} [{low[at]:+.4f}, {high[at]:+.4f}]" for at in range(len(METRICS))]
        lines.append(f"| {name} | {len(of_seeds)} | " + " | ".join(columns) + " |")
    return lines


def paired_group_table(arms, baseline=BASELINE):
    """
    A row for each arm: Recall@10 minus the baseline's on rows with a head token of layer b, and on those with a tail token.
    Groups differ from seed to seed, with the codebooks; rows of one user are drawn together, whatever their seeds and groups.
    """
    names = ("counted by", "head", "tail", "tail - head")
    lines = [f"| arm - {baseline} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name, cells in compared(arms, baseline).items():
        of_seeds = differences(arms[baseline], cells)
        if not of_seeds:
            lines.append(f"| {name} | none with the same rows | | | |")
            continue
        paired = [cell for cell in cells if cell["seed"] in of_seeds]
        values = np.concatenate([of_seeds[cell["seed"]][:, METRICS.index("Recall@10")] for cell in paired])
        users = np.concatenate([cell["result"]["users"] for cell in paired])
        for kind in ("items", "interactions"):
            letters = "".join(cell["result"]["groups"][kind][LAYER] for cell in paired)
            lines.append(f"| {name} | {kind} | " + " | ".join(_group_differences(values, users, letters)) + " |")
    return lines


def _group_differences(values, users, letters):
    is_head, resampled, columns = np.array(list(letters)) == "h", [], []
    for group in (is_head, ~is_head):
        if not group.any():
            return ["all rows are of one group", "", ""]
        resampled.append(resampled_means(values[:, None], group.astype(float), users)[:, 0])
        columns.append((values[group].mean(), resampled[-1]))
    columns.append((columns[1][0] - columns[0][0], resampled[1] - resampled[0]))
    return [
        f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"
        for mean, (low, high) in ((mean, np.nanquantile(means, (0.025, 0.975))) for mean, means in columns)
    ]


def summary(arms, baseline=BASELINE):
    """
    What the paired differences amount to: for each arm and metric better, worse or no difference shown, by the 95 % interval
    alone and after Holm's adjustment for the number of comparisons in the table.

    Returns:
        `list[str]`: lines of Markdown; empty if no arm has the baseline's rows.
    """
    found = {
        name: [differences(arms[baseline], cells, ranks) for ranks, _ in SUMMARY if ranks in cells[0]["result"]]
        for name, cells in compared(arms, baseline).items()
    }
    found = {name: of_levels for name, of_levels in found.items() if of_levels[0]}
    if not found:
        return []
    users, chosen = arms[baseline][0]["result"]["users"], [METRICS.index(metric) for _, metric in SUMMARY]
    comparisons = [(of_seeds, at) for levels in found.values() for of_seeds, at in zip(levels, chosen, strict=False)]
    adjusted = iter(holm([p_values(of_seeds, users)[at] for of_seeds, at in comparisons]))
    labels = [f"{LEVELS[ranks]} {metric}" for ranks, metric in SUMMARY]
    names = [name for label in labels for name in (f"{label}, 95 %", "all comparisons", "each seed")]
    lines = [
        f"{len(comparisons)} comparisons: if no arm differed, about {LEVEL * len(comparisons):.1f} of them would exclude zero "
        "at 95 % by chance. *All comparisons* is after Holm's adjustment for these, of p-values by the standard error that "
        "resampled users give; comparisons of other sections are not counted.",
        "",
        f"| arm - {baseline} | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for name, of_levels in found.items():
        columns = []
        for of_seeds, at in zip(of_levels, chosen, strict=False):
            values = np.mean(list(of_seeds.values()), axis=0)[:, at]
            ((low,), (high,)), p_value = interval(values[:, None], users), next(adjusted)
            columns += [
                _verdict(values.mean(), low > 0 or high < 0),
                f"{_verdict(values.mean(), p_value < LEVEL)} (p {_p(p_value)})",
                ", ".join(f"{of_seed[:, at].mean():+.4f}" for of_seed in of_seeds.values()),
            ]
        columns += [""] * (len(names) - len(columns))
        lines.append(f"| {name} | " + " | ".join(columns) + " |")
    return lines


def _verdict(mean, is_shown):
    return ("better" if mean > 0 else "worse") if is_shown else "no difference shown"


def _p(value):
    return "< .001" if value < 0.001 else f"{value:.3f}"
