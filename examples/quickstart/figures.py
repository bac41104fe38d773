"""The quick start's figures (PNG)."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3")


def draw_layers(diagnoses, path):
    """
    Tokens of each layer from the most to the least frequent, one curve per diagnosis, and at the right the normalised entropy
    of the layers, where an hourglass has its waist.

    Args:
        diagnoses (`dict[str, Diagnosis]`):
            By label. A diagnosis labelled "pruned" keeps the order of the one before it, so that one sees what was pruned.
        path (`str`):
            PNG file to write.
    """
    num_layers = max(len(diagnosis.layers) for diagnosis in diagnoses.values())
    figure, axes = plt.subplots(1, num_layers + 1, figsize=(3.4 * (num_layers + 1), 3.2), layout="constrained")
    orders = {}
    for (label, diagnosis), colour in zip(diagnoses.items(), COLOURS, strict=False):
        style = "--" if label == "pruned" else "-"
        for layer, axis in zip(diagnosis.layers, axes, strict=False):
            counts = diagnosis.counts[layer.layer]
            if label != "pruned":
                orders[layer.layer] = np.argsort(-counts, kind="stable")
            axis.plot(np.arange(1, len(counts) + 1), counts[orders[layer.layer]], style, color=colour, label=label)
            axis.set_yscale("symlog", linthresh=1)
            axis.set_title(f"layer {layer.name}", fontsize=10)
            axis.set_xlabel("code, by frequency")
            axis.sharey(axes[0])
        evenness = [layer.normalized_entropy for layer in diagnosis.layers]
        axes[-1].plot(evenness, range(len(evenness)), f"o{style}", color=colour, label=label)
    axes[0].set_ylabel("products")
    axes[-1].set_yticks(range(num_layers), [layer.name for layer in diagnosis.layers])
    axes[-1].invert_yaxis()
    axes[-1].set_title("normalised entropy", fontsize=10)
    axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


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
