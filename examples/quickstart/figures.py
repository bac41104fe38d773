"""The quick start's figures (PNG)."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from rqsid.sid_tokenizer.figures import plot_layers  # noqa: E402

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3")


def draw_layers(diagnoses, path):
    """
    Tokens of each layer from the most to the least frequent, one curve per diagnosis, and at the right the normalised entropy
    of the layers, where an hourglass has its waist.

    Args:
        diagnoses (`dict[str, Diagnosis]`):
            By label. A pruned one keeps the order of the one that it was pruned from, so that one sees what was pruned.
        path (`str`):
            PNG file to write.
    """
    plot_layers(diagnoses, path)


def draw_results(results, metric, path):
    """
    One metric of each system with its interval.

    Args:
        results (`dict[str, dict[str, float]]`):
            Metrics by system, with `_low` and `_high`.
        metric (`str`):
            Which.
        path (`str`):
            PNG file to write.
    """
    systems = list(results)
    values = np.array([results[system][metric] for system in systems])
    low = values - [results[system][f"{metric}_low"] for system in systems]
    high = np.array([results[system][f"{metric}_high"] for system in systems]) - values
    figure, axis = plt.subplots(figsize=(7, 0.45 * len(systems) + 1), layout="constrained")
    axis.barh(systems, values, xerr=[low, high], color=COLOURS[0], ecolor="#333333", capsize=3)
    axis.invert_yaxis()
    axis.set_xlabel(f"{metric} (95 % interval)")
    figure.savefig(path, dpi=130)
    plt.close(figure)
