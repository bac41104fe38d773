"""The quick start's report: stations with their time budget, and tables that say what beats what."""

import time
from contextlib import contextmanager

import numpy as np
import psutil

LEGEND = """
- *entropy*, *normalised*: of the layer's codes, and as a share of log2 of the codebook; *Gini*, *std*: of the number of products
  per code, all codes counted; *top 1 %*: share of the products in the most frequent hundredth of the codes.
- *under-used*: codes with less than a tenth of the mean number of products; *used*: codes with at least one.
- *paths used / possible*: prefixes that occur, of all that could.
- *relative error*: squared error of the reconstruction, as a share of the embeddings' variance.
- *collision rate*: 1 - SIDs / products. *Ceiling*: Recall@k if the right SID always came first.
- *hourglass score*: mean normalised entropy of the middle layers minus that of the ends; the verdict asks besides that the
  middle be less even than either end.
"""


class Report:
    """Prints Markdown as it comes and keeps it for `report.md`."""

    def __init__(self):
        self.lines = []
        self.seconds = {"start (imports)": (time.time() - psutil.Process().create_time(), 10)}

    def add(self, text=""):
        print(text, flush=True)
        self.lines.append(text)

    @contextmanager
    def station(self, number, name, budget):
        self.add(f"\n## {number}. {name}\n")
        started = time.perf_counter()
        yield
        self.seconds[name] = (time.perf_counter() - started, budget)
        self.add(f"\n*{self.seconds[name][0]:.1f} s (budget {budget} s)*")

    def add_times(self):
        self.add("\n## Time\n\n| station | seconds | budget |\n|---|---|---|")
        for name, (seconds, budget) in self.seconds.items():
            self.add(f"| {name} | {seconds:.1f} | {budget} |")
        total = sum(seconds for seconds, _ in self.seconds.values())
        self.add(f"| **all** | **{total:.1f}** | **{sum(budget for _, budget in self.seconds.values())}** |")

    def write(self, path):
        with open(path, "w", encoding="utf-8") as file:
            file.write("\n".join(self.lines) + "\n")


def results_table(results, metrics):
    """
    Args:
        results (`dict[str, dict[str, float]]`):
            Metrics with `_low` and `_high` beside them, by system.
        metrics (`list[str]`):
            Columns.

    Returns:
        `str`: a Markdown table, empty where a system lacks a metric.
    """
    lines = ["| system | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for system, values in results.items():
        cells = []
        for metric in metrics:
            if metric not in values:
                cells.append("")
            elif values[metric] in (0, 1):
                cells.append(f"{values[metric]:.3f}")  # the bootstrap of equal rows has no width, which says nothing
            elif f"{metric}_low" in values:
                cells.append(f"{values[metric]:.3f} [{values[metric + '_low']:.3f}, {values[metric + '_high']:.3f}]")
            else:
                cells.append(f"{values[metric]:.3f}")
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def hits_at(predictions, references, k):
    """Whether each reference is within the first k of its list. Shape: (N,)."""
    return np.array([reference in ranked[:k] for ranked, reference in zip(predictions, references, strict=True)])


def compare(name, other_name, hits, other_hits, one_run_each=False, resamples=2000, seed=0):
    """
    One sentence on the paired difference of two systems on the same rows: bootstrap over rows, 95 % percentile interval.

    The interval knows nothing of what another training run or codebook would give, so of two models that were trained once
    each (`one_run_each`) no one is said to beat the other.
    """
    difference = hits.astype(float) - other_hits
    rows = np.random.default_rng(seed).integers(0, len(difference), (resamples, len(difference)))
    low, high = np.quantile(difference[rows].mean(1), [0.025, 0.975])
    if one_run_each:
        return f"- {name} minus {other_name}, in this run: {difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
    relation = "beats" if low > 0 else "is beaten by" if high < 0 else "is not distinguishable from"
    return f"- {name} {relation} {other_name}: {difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
