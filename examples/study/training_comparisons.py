"""Tables of arms against the unpruned baseline, on the same rows: metrics, head and tail, and what that amounts to."""

import numpy as np
from training_statistics import METRICS, differences, holm, interval, p_values, per_seed, resampled_means

BASELINE, SUFFIX_BASELINE, LEVEL = "unpruned", "collisions by suffix", 0.05
NOISE_BASELINE = "collisions by suffix, rows from noise"
UNIQUE_FROM_NOISE = (
    "atomic",
    "hierarchical",
    "RQ-VAE",
)  # schemes whose SIDs are unique and whose rows start from noise
LAYER = 1  # the second, which hourglasses are about, and which the remedies prune
SUMMARY = (("item_ranks", "Recall@10"), ("item_ranks", "NDCG@10"), ("sid_ranks", "Recall@10"))
LEVELS = {"item_ranks": "item-level", "sid_ranks": "SID-level"}
NO_ROWS = "none with the same rows"


def baselines(arms):
    """
    The baseline that all arms are compared with, and beside it those with suffixes for the arms in which nobody shares a SID,
    either: for pruned ones and other codebooks, which are then the only difference, and from noise for schemes whose rows start
    there.

    Returns:
        `dict[str, dict[str, list[dict]]]`: by baseline the arms, itself included; empty where there is nothing to compare.
    """
    settings = {name: cells[0]["settings"]["arm"] for name, cells in arms.items()}
    with_suffix = [name for name, arm in settings.items() if arm.get("collisions") == "suffix" and "scheme" not in arm]
    schemes = [name for name, arm in settings.items() if arm.get("scheme") in UNIQUE_FROM_NOISE]
    found = {BASELINE: list(arms), SUFFIX_BASELINE: with_suffix, NOISE_BASELINE: schemes}
    return {
        baseline: {name: arms[name] for name in dict.fromkeys([baseline, *names])}
        for baseline, names in found.items()
        if baseline in arms and set(names) - {baseline}
    }


def compared(arms, baseline):
    """`{arm: cells}` without the baseline."""
    return {name: cells for name, cells in arms.items() if name != baseline}


def paired_table(arms, baseline=BASELINE, ranks="item_ranks"):
    """A row for each arm: its metrics minus the baseline's, with intervals."""
    lines = [f"| arm - {baseline} | seeds | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 2) + "|"]
    for name, cells in compared(arms, baseline).items():
        of_seeds = differences(arms[baseline], cells, ranks)
        if of_seeds:
            lines.append(_differences_row(name, of_seeds, cells[0]["result"]["users"]))
        else:
            lines.append(f"| {name} | {NO_ROWS} |" + " |" * len(METRICS))
    return lines


def gain_table(arms):
    """A row for each arm: its metrics with the first token given minus those without, on the same rows, with intervals."""
    lines = ["| arm | seeds | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 2) + "|"]
    for name, cells in arms.items():
        given, plain = per_seed(cells, "given_first_token"), per_seed(cells)
        gains = {seed: given[seed] - plain[seed] for seed in given}
        lines.append(_differences_row(name, gains, cells[0]["result"]["users"]))
    return lines


def _differences_row(name, of_seeds, users):
    values = np.mean(list(of_seeds.values()), axis=0)
    bounds = interval(values, users).T
    columns = [_difference(mean, *pair) for mean, pair in zip(values.mean(0), bounds, strict=True)]
    return f"| {name} | {len(of_seeds)} | " + " | ".join(columns) + " |"


def _difference(mean, low, high, between="<br>"):
    return f"{mean:+.4f}{between}[{low:+.4f}, {high:+.4f}]"


def paired_group_table(arms, baseline=BASELINE):
    """
    A row for each arm: Recall@10 minus the baseline's on rows with a head token of layer b, and on those with a tail token.
    Groups differ from seed to seed, with the codebooks; rows of one user are drawn together, whatever their seeds and groups.
    """
    names = [f"{kind}: {group}" for kind in ("items", "interactions") for group in ("head", "tail", "tail - head")]
    lines = [f"| arm - {baseline} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name, cells in compared(arms, baseline).items():
        of_seeds = differences(arms[baseline], cells)
        if not of_seeds:
            lines.append(f"| {name} | {NO_ROWS} |" + " |" * (len(names) - 1))
            continue
        paired = [cell for cell in cells if cell["seed"] in of_seeds]
        values = np.concatenate([of_seeds[cell["seed"]][:, METRICS.index("Recall@10")] for cell in paired])
        users = np.concatenate([cell["result"]["users"] for cell in paired])
        columns = []
        for kind in ("items", "interactions"):
            letters = "".join(cell["result"]["groups"][kind][LAYER] for cell in paired)
            columns += _group_differences(values, users, letters)
        lines.append(f"| {name} | " + " | ".join(columns) + " |")
    return lines


def _group_differences(values, users, letters):
    is_head, resampled, columns = np.array(list(letters)) == "h", [], []
    for group in (is_head, ~is_head):
        if not group.any():
            return ["all rows are of one group", "", ""]
        resampled.append(resampled_means(values[:, None], group.astype(float), users)[:, 0])
        columns.append((values[group].mean(), resampled[-1]))
    columns.append((columns[1][0] - columns[0][0], resampled[1] - resampled[0]))
    return [_difference(mean, *np.nanquantile(means, (0.025, 0.975))) for mean, means in columns]


def summary(arms, baseline=BASELINE):
    """
    What the paired differences amount to: a table for each metric, in which every arm is better, worse or not shown to differ,
    for these models and for those of other seeds, after Holm's adjustment for the number of comparisons in all of them.

    Returns:
        `list[str]`: lines of Markdown; empty if no arm has the baseline's rows.
    """
    users, comparisons = arms[baseline][0]["result"]["users"], []
    for ranks, metric in SUMMARY:
        for name, cells in compared(arms, baseline).items():
            of_seeds = differences(arms[baseline], cells, ranks) if ranks in cells[0]["result"] else {}
            if of_seeds:
                at = METRICS.index(metric)
                comparisons.append((ranks, metric, name, {seed: of[:, [at]] for seed, of in of_seeds.items()}))
    if not comparisons:
        return []
    these = holm([p_values(of_seeds, users)[0] for *_, of_seeds in comparisons])
    others = holm([p_values(of_seeds, users, other_seeds=True)[0] for *_, of_seeds in comparisons])
    lines = [
        f"{len(comparisons)} comparisons, for which p-values are adjusted (Holm); those of other sections are not counted."
    ]
    last = None
    for (ranks, metric, name, of_seeds), of_these, of_others in zip(comparisons, these, others, strict=True):
        if last != (last := (ranks, metric)):
            titles = [f"{LEVELS[ranks]} {metric}: arm - {baseline}", "difference", "each seed"]
            titles += [
                "these models",
                "other seeds, too",
                *(["SIDs, arm and baseline"] if ranks == "sid_ranks" else []),
            ]
            lines += ["", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        values = np.mean(list(of_seeds.values()), axis=0)
        (low,), (high,) = interval(values, users)
        columns = [
            _difference(values.mean(), low, high, " "),
            ", ".join(f"{of_seed.mean():+.4f}" for of_seed in of_seeds.values()),
            _verdict(values.mean(), of_these),
            _verdict(values.mean(), of_others),
        ]
        if ranks == "sid_ranks":
            columns.append(" and ".join(_number_of_sids(arms[which]) for which in (name, baseline)))
        lines.append(f"| {name} | {' | '.join(columns)} |")
    return lines


def _number_of_sids(cells):
    return f"{np.mean([cell['result']['sids']['unique'] for cell in cells]):,.0f}"


def _verdict(mean, p_value):
    if np.isnan(p_value):
        return "one seed: not known"
    verdict = ("better" if mean > 0 else "worse") if p_value < LEVEL else "no difference shown"
    return f"{verdict} (p {'< .001' if p_value < 0.001 else f'{p_value:.3f}'})"
