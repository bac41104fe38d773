"""Figures: how each layer's codes are distributed, how they flow, and what pruning costs. Needs matplotlib."""

import importlib
from pathlib import Path

import numpy as np

from .files import replace_atomically
from .layer_flow import FLOW_BINS
from .sid_tokens import layer_letter

# Okabe and Ito's palette, which colour-blind readers can tell apart; line styles repeat what the colours say.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
SUFFIXES = (".png", ".svg")
BANDS = 8  # groups of codes between which a flow is drawn; more are too thin to see
COLUMN_WIDTH = 0.16


def plot_layers(diagnoses, path=None, log=True):
    """
    The counts of each layer's codes from the most to the least frequent, one panel a layer, over the level of equally used
    codes and the band of counts (1 % to 99 %) that codes drawn at random show; and the normalised entropy of the
    layers, in which an hourglass has its waist.

    Args:
        diagnoses ([`Diagnosis`] or `dict[str, Diagnosis]`):
            One, or several by label, which are laid over each other; level and band are the first's. One whose counts are
            those of an earlier one, but for codes that are now absent, keeps the order of that one, so that one sees
            what was pruned.
        path (`str` or `os.PathLike`, *optional*):
            File to write, `.png` or `.svg`.
        log (`bool`, *optional*, defaults to `True`):
            Whether counts are drawn on a logarithmic scale, linear below 1.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        `ImportError`: without matplotlib.
        `ValueError`: for no diagnosis, more than six, or another suffix.
    """
    named = diagnoses if isinstance(diagnoses, dict) else {"": diagnoses}
    figure_class = _check(named, path)
    first = next(iter(named.values()))
    num_layers = max(len(diagnosis.layers) for diagnosis in named.values())
    height = 3.4 + 0.22 * len(named)
    figure = figure_class(figsize=(3.3 * num_layers + 2.6, height), layout="constrained")
    axes = figure.subplots(1, num_layers + 1, width_ratios=[3.3] * num_layers + [2.6])

    highest = max(counts.max() for diagnosis in named.values() for counts in diagnosis.counts) or 1
    top = highest * (1.6 if log else 1.06)

    # 1. one panel a layer
    for layer, axis in enumerate(axes[:-1]):
        title, drawn = [f"layer {layer_letter(layer)} ({layer})"], []
        for (label, diagnosis), colour, style in zip(named.items(), COLOURS, STYLES, strict=False):
            if layer >= len(diagnosis.layers):
                continue
            counts, statistics = diagnosis.counts[layer], diagnosis.layers[layer]
            order = np.argsort(-counts, kind="stable")
            for earlier, earlier_order in drawn:
                if len(earlier) == len(counts) and ((counts == earlier) | (counts == 0)).all():
                    order = earlier_order
            drawn.append((counts, order))
            axis.plot(np.arange(1, len(counts) + 1), counts[order], linestyle=style, color=colour, label=label)
            numbers = f"entropy {statistics.normalized_entropy:.3f}, Gini {statistics.gini:.3f}"
            short = label if len(label) <= 20 else label[:19] + "…"  # the legend has all of it, the panel no room
            title.append(f"{short}: {numbers}" if label else numbers)
        if layer < len(first.layers):
            size = first.layers[layer].codebook_size
            axis.axhline(
                first.counts[layer].sum() / size, color="#555555", linewidth=0.9, linestyle=(0, (2, 2)), zorder=1
            )
            axis.fill_between(np.arange(1, size + 1), *first.null_bands[layer], color="#bbbbbb", linewidth=0, zorder=0)
        axis.set_title(title[0], fontsize=10, fontweight="bold", loc="left", pad=6 + 12 * (len(title) - 1))
        for line, (text, colour) in enumerate(zip(title[1:], COLOURS, strict=False)):
            axis.annotate(
                text,
                (0, 1),
                xytext=(0, 4 + 12 * (len(title) - 2 - line)),
                xycoords="axes fraction",
                textcoords="offset points",
                fontsize=8,
                color=colour if len(named) > 1 else "#333333",
            )
        if log:
            axis.set_yscale("symlog", linthresh=1)
        axis.set_ylim(0, top)
        axis.set_xlabel("code, by frequency", fontsize=9)
        axis.tick_params(labelleft=layer == 0)
    axes[0].set_ylabel("items, or their weight", fontsize=9)

    # 2. all layers: where the waist is
    for (label, diagnosis), colour, style in zip(named.items(), COLOURS, STYLES, strict=False):
        present = [layer for layer in diagnosis.layers if layer.present > 0]
        positions, evenness = [layer.layer for layer in present], [layer.normalized_entropy for layer in present]
        axes[-1].plot(evenness, positions, marker="o", linestyle=style, color=colour, label=label)
    axes[-1].set_yticks(range(num_layers), [f"{layer_letter(layer)} ({layer})" for layer in range(num_layers)])
    axes[-1].invert_yaxis()
    axes[-1].margins(0.12, 0.15)
    axes[-1].set_xlim(right=1.02)
    axes[-1].set_title("all layers", fontsize=10, fontweight="bold", loc="left")
    axes[-1].set_xlabel("normalised entropy", fontsize=9)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    handles, labels = axes[-1].get_legend_handles_labels()
    handles, labels = (handles, labels) if len(named) > 1 else ([], [])
    whose = f" ({labels[0]})" if labels else ""
    patches = importlib.import_module("matplotlib.patches")
    lines = importlib.import_module("matplotlib.lines")
    handles += [
        lines.Line2D([], [], color="#555555", linewidth=0.9, linestyle=(0, (2, 2))),
        patches.Patch(color="#bbbbbb"),
    ]
    labels += [f"equally used codes{whose}", f"codes drawn at random, 1–99 %{whose}"]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    _save(figure, path)
    return figure


def plot_flow(diagnoses, path=None):
    """
    Each layer as a column, as tall as its perplexity (the number of equally used codes of the same entropy) is large beside
    its codebook, and what flows between the columns: an hourglass shows its waist, uniform codes fill the frame.

    A column's boxes are bins of codes of like frequency, the most frequent on top, as tall as their share. Bands join eight
    groups of bins with eight of the next layer; those below 0.1 % are left out.

    Args:
        diagnoses ([`Diagnosis`] or `dict[str, Diagnosis]`):
            One, or several by label, which are drawn side by side.
        path (`str` or `os.PathLike`, *optional*):
            File to write, `.png` or `.svg`.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        `ImportError`: without matplotlib.
        `ValueError`: for no diagnosis, more than six, one of a single layer, or another suffix.
    """
    named = diagnoses if isinstance(diagnoses, dict) else {"": diagnoses}
    figure_class = _check(named, path)
    if min(len(diagnosis.layers) for diagnosis in named.values()) < 2:
        raise ValueError(
            'A single layer has no flow. Draw it with kind="layers", or diagnose codes of several layers.'
        )
    widths = [1.7 * len(diagnosis.layers) + 0.6 for diagnosis in named.values()]
    figure = figure_class(figsize=(sum(widths), 4.2), layout="constrained")
    for axis, (label, diagnosis) in zip(
        figure.subplots(1, len(named), squeeze=False, width_ratios=widths)[0], named.items(), strict=True
    ):
        _draw_flow(axis, diagnosis)
        where = "" if diagnosis.verdict_layer is None else f", layer {diagnosis.layers[diagnosis.verdict_layer].name}"
        verdict = f"verdict: {diagnosis.verdict}{where}"
        axis.set_title(f"{label}\n{verdict}" if label else verdict, fontsize=10)
    note = "Height: perplexity, the number of equally used codes of the same entropy. Grey frame: the whole codebook."
    if len(named) == 1 and widths[0] < 6.5:
        note = note.replace(". Grey", ".\nGrey")
    figure.supxlabel(note, fontsize=8, color="#333333")
    _save(figure, path)
    return figure


def plot_sweep(sweep, path=None):
    """
    What pruning the K most frequent codes of a layer costs: the share of the items that lose their token, the distinct SIDs,
    the share of the items that share theirs, and the recall ceilings, over K, on a scale that is logarithmic from 1. Grey is
    where nothing is lost.

    Args:
        sweep ([`PruningSweep`]):
            What [`~sweep.sweep`] measured, with at most six k.
        path (`str` or `os.PathLike`, *optional*):
            File to write, `.png` or `.svg`.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        `ImportError`: without matplotlib.
        `ValueError`: for more than six k, or another suffix.
    """
    ceilings = sweep.recall_ceiling
    if len(ceilings) > len(COLOURS):
        raise ValueError(
            f"Ceilings at {len(ceilings)} values of k cannot be drawn: sweep with ks of at most {len(COLOURS)}, so that "
            "they can be told apart."
        )
    figure = _find_figure_class(path)(figsize=(3.3 * 4, 3.4), layout="constrained")
    axes = figure.subplots(1, 4)
    panels = (
        ("items that lose the token", {"": sweep.share}),
        ("unique SIDs", {"": sweep.unique_sids}),
        ("items that share their SID", {"": sweep.colliding_items / sweep.num_items}),
        ("recall ceiling", {f"@{k}": ceiling for k, ceiling in ceilings.items()}),
    )
    size, lossless = len(sweep.num_pruned) - 1, sweep.lossless
    ticks = [0, *(10**power for power in range(len(str(size))) if 2.5 * 10**power < size), size]
    letter = f"{layer_letter(sweep.layer)} ({sweep.layer})"
    for axis, (title, curves) in zip(axes, panels, strict=True):
        for (label, curve), colour, style in zip(curves.items(), COLOURS, STYLES, strict=False):
            axis.plot(sweep.num_pruned, curve, linestyle=style, color=colour, label=label)
        axis.axvspan(0, lossless, color="#dddddd", linewidth=0, zorder=0)
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_xlabel(f"codes of layer {letter} pruned", fontsize=9)
        axis.set_xlim(0, size)
        axis.set_ylim(0, sweep.unique_sids[0] * 1.06 if title == "unique SIDs" else 1.06)
        axis.set_title(title, fontsize=10, fontweight="bold", loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[-1].legend(fontsize=8, frameon=False, loc="lower left")
    patch = importlib.import_module("matplotlib.patches").Patch(color="#dddddd")
    codes = "1 code, whose absence names it" if lossless == 1 else f"up to {lossless} codes"
    figure.legend([patch], [f"nothing is lost: {codes}"], loc="outside lower center", fontsize=8, frameon=False)
    _save(figure, path)
    return figure


def _draw_flow(axis, diagnosis):
    patches = importlib.import_module("matplotlib.patches")
    mpl_path = importlib.import_module("matplotlib.path").Path
    colour_map = importlib.import_module("matplotlib").colormaps["viridis"]
    total = diagnosis.flows[0].sum()
    shares = [diagnosis.flows[0].sum(1) / total] + [flow.sum(0) / total for flow in diagnosis.flows]
    heights = [layer.perplexity / layer.codebook_size for layer in diagnosis.layers]
    tops = [height / 2 for height in heights]

    # 1. columns
    for position, (layer, height, top, share) in enumerate(zip(diagnosis.layers, heights, tops, shares, strict=True)):
        frame = (position - COLUMN_WIDTH / 2, -0.5)
        axis.add_patch(
            patches.Rectangle(frame, COLUMN_WIDTH, 1, facecolor="#f0f0f0", edgecolor="#cccccc", linewidth=0.6)
        )
        starts = top - height * np.concatenate(([0], np.cumsum(share)))
        num_bins = min(FLOW_BINS, layer.codebook_size)
        for index, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
            colour = _colour(colour_map, index, num_bins)
            box = patches.Rectangle((frame[0], end), COLUMN_WIDTH, start - end, facecolor=colour, linewidth=0)
            axis.add_patch(box)
        axis.text(position, 0.53, f"layer {layer.name}", ha="center", va="bottom", fontsize=9)
        text = f"{layer.perplexity:.0f} of {layer.codebook_size}" if layer.present else "absent"
        text += f"\n{layer.present:.0%} have one" if 0 < layer.present < 1 else ""
        axis.text(position, -0.53, text, ha="center", va="top", fontsize=9)

    # 2. bands, in the order of the boxes at both ends, so that they cover both columns
    for position, flow in enumerate(diagnosis.flows):
        ends = zip(diagnosis.layers[position : position + 2], flow.shape, strict=True)
        sources, targets = (_group(layer.codebook_size, num_bins) for layer, num_bins in ends)
        num_groups = min(BANDS, diagnosis.layers[position].codebook_size)
        grouped = np.zeros((sources[-1] + 1, targets[-1] + 1))
        np.add.at(grouped, (sources[:, None], targets[None, :]), flow / total)
        leave = tops[position] - heights[position] * (np.cumsum(grouped.ravel()) - grouped.ravel()).reshape(
            grouped.shape
        )
        arrive = (np.cumsum(grouped.T.ravel()) - grouped.T.ravel()).reshape(grouped.T.shape).T
        arrive = tops[position + 1] - heights[position + 1] * arrive
        left, right = position + COLUMN_WIDTH / 2, position + 1 - COLUMN_WIDTH / 2
        middle = (left + right) / 2
        for source, target in np.argwhere(grouped > 1e-3):
            share = grouped[source, target]
            y, z = leave[source, target], arrive[source, target]
            y_end, z_end = y - heights[position] * share, z - heights[position + 1] * share
            vertices = [(left, y), (middle, y), (middle, z), (right, z)]
            vertices += [(right, z_end), (middle, z_end), (middle, y_end), (left, y_end), (left, y)]
            moves = [mpl_path.MOVETO] + 3 * [mpl_path.CURVE4] + [mpl_path.LINETO] + 3 * [mpl_path.CURVE4]
            moves += [mpl_path.CLOSEPOLY]
            colour = _colour(colour_map, source, num_groups)
            axis.add_patch(
                patches.PathPatch(
                    mpl_path(vertices, moves), facecolor=colour, alpha=0.45, linewidth=0.2, edgecolor="white"
                )
            )
    axis.set_xlim(-0.45, len(heights) - 0.55)
    axis.set_ylim(-0.68, 0.6)
    axis.axis("off")


def _group(size, num_bins):
    """Bins to at most eight groups of neighbours; absence, the bin beyond the codes', to one of its own. Shape: (bins,)."""
    num_coded = min(FLOW_BINS, size)
    groups = np.arange(num_coded) * min(BANDS, num_coded) // num_coded
    return np.append(groups, groups[-1] + 1)[:num_bins]


def _colour(colour_map, index, number):
    """Dark for the most frequent, light for the least; grey for what is absent."""
    return "#999999" if index >= number else colour_map(0.9 * index / max(1, number - 1))


def _check(diagnoses, path):
    """Returns matplotlib's figure class, once everything that could be refused is known to be right."""
    if not 1 <= len(diagnoses) <= len(COLOURS):
        raise ValueError(
            f"{len(diagnoses)} diagnoses cannot be drawn: pass one to {len(COLOURS)}, so that they can be told apart."
        )
    return _find_figure_class(path)


def _find_figure_class(path):
    if path is not None and Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"Cannot draw into {str(path)!r}: its name must end in {' or '.join(SUFFIXES)}.")
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise ImportError(f"Figures need matplotlib ({error}). Install it with: pip install 'rqsid[plots]'") from error


def _save(figure, path):
    if path is None:
        return
    suffix = Path(path).suffix.lower()
    # Equal measurements make equal files: no date, and ids that are not random.
    options = {"svg.hashsalt": "rqsid"}
    metadata = {"Date": None} if suffix == ".svg" else None
    with importlib.import_module("matplotlib").rc_context(options), replace_atomically(path) as temporary:
        figure.savefig(temporary, format=suffix[1:], dpi=150, metadata=metadata)
