"""One figure for each set of codebooks: what every arm changes, by products and by SIDs, which may point in opposite directions."""

from pathlib import Path

import matplotlib
import numpy as np
from cells import read_cells
from training_comparisons import baselines, compared
from training_statistics import METRICS, differences, interval
from training_tables import EXPERIMENTS, arms_of, blocks_of, file_name, headings_of

from rqsid.sid_tokenizer.figures import COLOURS
from rqsid.sid_tokenizer.files import replace_atomically

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

METRIC = "Recall@10"
LEVELS = {"item_ranks": "item-level: the product", "sid_ranks": "SID-level: any product of the arm's own SIDs"}


def write_training_figures(out):
    """
    Args:
        out (`str` or `os.PathLike`):
            Folder of results; figures go to its folder `tables`.

    Returns:
        `list[str]`: the files written, `<experiment>-<heading>-<baseline>.png`; none for experiments without arms to compare.
    """
    written = []
    for name in EXPERIMENTS:
        blocks = blocks_of(read_cells(out, name))
        for heading, block in zip(headings_of(blocks), blocks, strict=True):
            for baseline, arms in baselines(arms_of(block)).items():
                path = Path(out) / "tables" / f"{name}-{file_name(heading)}-{file_name(baseline)}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                if draw_differences(arms, baseline, path):
                    written.append(str(path))
    return written


def draw_differences(arms, baseline, path):
    """
    Args:
        arms (`dict[str, list[dict]]`): Cells by arm, the baseline's among them.
        baseline (`str`): Its name.
        path (`Path`): PNG file to write.

    Returns:
        `bool`: whether there was anything to draw.
    """
    drawn = {}
    for name, cells in compared(arms, baseline).items():
        for ranks in LEVELS:
            of_seeds = differences(arms[baseline], cells, ranks) if ranks in cells[0]["result"] else {}
            if of_seeds:
                values = np.mean(list(of_seeds.values()), axis=0)[:, [METRICS.index(METRIC)]]
                (low,), (high,) = interval(values, cells[0]["result"]["users"])
                each = [of_seed[:, METRICS.index(METRIC)].mean() for of_seed in of_seeds.values()]
                drawn.setdefault(name, {})[ranks] = (values.mean(), low, high, each)
    if not drawn:
        return False
    figure, axis = plt.subplots(figsize=(8, 0.5 * len(drawn) + 1.6), layout="constrained")
    for at, ranks in enumerate(LEVELS):
        places = [row + (at - 0.5) * 0.3 for row, levels in enumerate(drawn.values()) if ranks in levels]
        of_level = [levels[ranks] for levels in drawn.values() if ranks in levels]
        if not of_level:
            continue
        found = np.array([values[:3] for values in of_level])
        errors = [found[:, 0] - found[:, 1], found[:, 2] - found[:, 0]]
        axis.errorbar(
            found[:, 0], places, xerr=errors, fmt="os"[at], color=COLOURS[at], capsize=3, label=LEVELS[ranks]
        )
        for place, (*_, each) in zip(places, of_level, strict=True):
            axis.plot(each, [place] * len(each), "|", color=COLOURS[at], markersize=9)
    axis.axvline(0, color="#888888", linewidth=1)
    axis.set_yticks(range(len(drawn)), list(drawn))
    axis.invert_yaxis()
    axis.set_xlabel(f"{METRIC} minus that of {baseline}; bars: 95 % over users, strokes: seeds")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    with replace_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    plt.close(figure)
    return True
