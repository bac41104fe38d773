"""Figures: what their curves and columns show, that no two texts overlap, and that drawing leaves no trace."""

import importlib
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from rqsid import TokenPruning, diagnose
from rqsid.sid_tokenizer import figures
from rqsid.sid_tokenizer.figures import COLUMN_WIDTH, plot_flow, plot_layers, plot_sweep
from rqsid.sid_tokenizer.pruning_sweep import sweep

SIZES = [64, 64, 64]


@pytest.fixture(scope="module")
def codes():
    codes = np.random.default_rng(0).integers(0, 64, (6000, 3))
    codes[:5000, 1] = codes[:5000, 1] % 4
    return codes


@pytest.fixture(scope="module")
def hourglass(codes):
    return diagnose(codes, SIZES)


@pytest.fixture(scope="module")
def uniform():
    return diagnose(np.random.default_rng(0).integers(0, 64, (6000, 3)), SIZES)


@pytest.fixture(scope="module")
def pruned(codes):
    return diagnose(TokenPruning("top_k", layer=1, top_k=3).fit(codes, SIZES).apply(codes), SIZES)


@pytest.fixture(scope="module")
def curve(codes):
    return sweep(codes, SIZES)


@pytest.mark.parametrize("kind", ["layers", "flow", "sweep"])
@pytest.mark.parametrize("suffix", ["png", "svg", "SVG"])
def test_files_are_what_their_suffix_says(hourglass, curve, tmp_path, kind, suffix):
    path = tmp_path / f"figure.{suffix}"

    def draw():
        return curve.plot(path) if kind == "sweep" else hourglass.plot(path, kind)

    figure = draw()
    assert type(figure).__module__ == "matplotlib.figure" and len(figure.axes) == (1 if kind == "flow" else 4)
    content = path.read_bytes()
    if suffix == "png":
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
    else:
        assert ElementTree.fromstring(content).tag == "{http://www.w3.org/2000/svg}svg"
    draw()
    assert path.read_bytes() == content  # nothing random, no date
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_without_a_path_nothing_is_written(hourglass, curve, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    curve.plot()
    hourglass.plot()
    hourglass.plot(kind="flow")
    assert not list(tmp_path.iterdir())


def test_curves_are_the_sorted_counts(hourglass, uniform):
    figure = plot_layers({"mine": hourglass, "random": uniform})
    for layer, axis in enumerate(figure.axes[:3]):
        for line, diagnosis in zip(axis.lines, (hourglass, uniform), strict=False):
            assert line.get_ydata().tolist() == sorted(diagnosis.counts[layer].tolist(), reverse=True)
            assert line.get_ydata().max() <= axis.get_ylim()[1]
        assert list(axis.lines[2].get_ydata()) == [6000 / 64] * 2  # the level of equally used codes
        drawn = "".join(text.get_text() for text in axis.texts)
        for label, diagnosis in (("mine", hourglass), ("random", uniform)):
            statistics = diagnosis.layers[layer]
            assert f"{label}: entropy {statistics.normalized_entropy:.3f}, Gini {statistics.gini:.3f}" in drawn
    assert figure.axes[3].lines[0].get_xdata() == pytest.approx([one.normalized_entropy for one in hourglass.layers])
    assert figure.axes[0].get_yscale() == "symlog" and plot_layers(uniform, log=False).axes[0].get_yscale() == "linear"


def test_uniform_codes_lie_in_the_band_and_an_hourglass_does_not(hourglass, uniform):
    for layer in range(3):
        low, high = uniform.null_bands[layer]
        counts = np.sort(uniform.counts[layer])[::-1]
        assert (
            (low <= counts) & (counts <= high)
        ).mean() > 0.9  # ranks go together, so that it is 98 % on average only
    low, high = hourglass.null_bands[1]
    counts = np.sort(hourglass.counts[1])[::-1]
    assert ((low <= counts) & (counts <= high)).mean() < 0.1


def test_what_was_pruned_stays_in_its_place(hourglass, pruned):
    axis = plot_layers({"full": hourglass, "pruned": pruned}).axes[1]
    full, left = (line.get_ydata() for line in axis.lines[:2])
    assert left[:3].tolist() == [0, 0, 0] and left[3:].tolist() == full[3:].tolist()


def column_heights(axis):
    """Of the drawn boxes, without the frames, which come first and have height 1."""
    heights = {}
    for patch in axis.patches:
        if (
            hasattr(patch, "get_width")
            and patch.get_width() == pytest.approx(COLUMN_WIDTH)
            and patch.get_height() != 1
        ):
            heights[round(patch.get_x(), 3)] = heights.get(round(patch.get_x(), 3), 0) + patch.get_height()
    return [heights[x] for x in sorted(heights)]


def test_an_hourglass_has_a_waist_that_one_sees_and_uniform_codes_none(hourglass, uniform):
    first, waist, last = column_heights(plot_flow(hourglass).axes[0])
    assert waist < 0.5 * min(first, last)
    assert min(column_heights(plot_flow(uniform).axes[0])) > 0.97
    assert [first, waist, last] == pytest.approx([layer.perplexity / 64 for layer in hourglass.layers])


def test_bands_cover_the_columns(hourglass):
    """Each band is as thick at an end as its share of the column, so that together they are as high as the column."""
    axis = plot_flow(hourglass).axes[0]
    bands = [patch.get_path().vertices for patch in axis.patches if not hasattr(patch, "get_width")]
    for position, layer in enumerate(hourglass.layers[:2]):
        left = position + COLUMN_WIDTH / 2
        leaving = sum(band[0, 1] - band[7, 1] for band in bands if band[0, 0] == pytest.approx(left))
        assert leaving == pytest.approx(layer.perplexity / 64, rel=0.02)
        arriving = sum(band[3, 1] - band[4, 1] for band in bands if band[0, 0] == pytest.approx(left))
        assert arriving == pytest.approx(hourglass.layers[position + 1].perplexity / 64, rel=0.02)


def test_curves_of_a_sweep_are_what_was_measured(codes, curve):
    lost, unique, colliding, ceilings = plot_sweep(curve).axes
    for axis, values in (
        (lost, curve.share),
        (unique, curve.unique_sids),
        (colliding, curve.colliding_items / len(codes)),
    ):
        (line,) = axis.lines
        assert line.get_xdata().tolist() == list(range(65)) and line.get_ydata().tolist() == values.tolist()
        assert axis.get_ylim()[0] == 0 and axis.get_ylim()[1] > max(values)
    drawn = {line.get_label(): line.get_ydata().tolist() for line in ceilings.lines}
    assert drawn == {f"@{k}": curve.recall_ceiling[k].tolist() for k in (1, 10, 50)}
    assert len({(line.get_color(), line.get_linestyle()) for line in ceilings.lines}) == 3
    for axis in (lost, unique, colliding, ceilings):
        assert axis.get_xlim() == (0, 64) and axis.get_xscale() == "symlog"
        assert axis.get_xlabel() == "codes of layer b (1) pruned"
        (harmless,) = axis.patches
        assert (harmless.get_x(), harmless.get_width()) == (0, curve.lossless) == (0, 1)


@pytest.mark.parametrize(
    "size, ticks", [(1, [0, 1]), (2, [0, 2]), (9, [0, 1, 9]), (16, [0, 1, 16]), (256, [0, 1, 10, 100, 256])]
)
def test_ticks_of_a_sweep(size, ticks):
    found = sweep(np.random.default_rng(0).integers(0, [4, size, 4], (100, 3)), [4, size, 4], ks=(1, 2, 3, 4, 5, 6))
    axis = plot_sweep(found).axes[0]
    assert axis.get_xticks().tolist() == ticks and [label.get_text() for label in axis.get_xticklabels()] == list(
        map(str, ticks)
    )


def test_what_is_harmless_is_told():
    several = sweep(np.array([[code, code] for code in range(4)]), [4, 4], layer=0)
    single = sweep(np.array([[code, 0] for code in range(4)]), [4, 1], layer=0)
    for found, text in ((several, "nothing is lost: up to 4 codes"), (single, "1 code, whose absence names it")):
        (legend,) = plot_sweep(found).legends
        assert text in legend.get_texts()[0].get_text()


def test_texts_do_not_overlap(codes, hourglass, uniform, pruned, curve):
    three = {"plain": hourglass, "better training": uniform, "a label that is far too long": pruned}
    drawn = [plot_layers(hourglass), plot_layers(three), plot_flow(hourglass), plot_flow(three), plot_sweep(curve)]
    drawn += [
        plot_sweep(sweep(codes % 26, [26] * 3, ks=(1, 2, 5, 10, 20, 50))),
        plot_sweep(sweep(codes, [64, 999, 64])),
    ]
    text_class = importlib.import_module("matplotlib.text").Text
    for figure in drawn:
        importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
        figure.draw_without_rendering()
        outside = set()  # ticks beyond the axes, or of axes that are off, exist, but are not drawn
        for axes in figure.axes:
            for scale in (axes.xaxis, axes.yaxis):
                low, high = sorted(scale.get_view_interval()) if axes.axison else (1, 0)
                outside |= {tick.label1 for tick in scale.get_major_ticks() if not low <= tick.get_loc() <= high}
        texts = [text for text in figure.findobj(text_class) if text.get_text().strip() and text.get_visible()]
        texts = [text for text in texts if text not in outside]
        boxes = [text.get_window_extent() for text in texts]
        assert len(boxes) >= 8
        for one in range(len(boxes)):
            assert boxes[one].x0 >= 0 and boxes[one].x1 <= figure.bbox.x1, texts[one]
            for other in range(one):
                assert not boxes[one].shrunk(0.98, 0.9).overlaps(boxes[other].shrunk(0.98, 0.9)), (
                    texts[one],
                    texts[other],
                )


def test_dropped_layer_and_codebooks_of_one_code(codes):
    dropped = diagnose(TokenPruning("drop_layer", layer=1).fit(codes, SIZES).apply(codes), SIZES)
    assert len(dropped.plot().axes[3].lines[0].get_xdata()) == 2
    texts = [text.get_text() for text in dropped.plot(kind="flow").axes[0].texts]
    assert "absent" in texts
    nothing = diagnose(np.full((3, 3), -1), SIZES)
    assert not len(nothing.plot().axes[3].lines[0].get_xdata())
    single = diagnose(codes * [1, 0, 1], [64, 1, 64])
    single.plot()
    single.plot(kind="flow")


TWO = np.zeros((3, 2), dtype=int)
SMALL = sweep(TWO, [2, 2], 0)


@pytest.mark.parametrize(
    "draw, message",
    [
        (lambda found: found.plot("figure.pdf"), "figure.pdf.*must end in .png or .svg"),
        (lambda found: found.plot(kind="pie"), "kind='pie' is unknown"),
        (lambda found: plot_layers({}), "0 diagnoses"),
        (lambda found: plot_flow({str(i): found for i in range(7)}), "7 diagnoses.*one to 6"),
        (lambda found: diagnose(np.zeros((3, 1), dtype=int), [2]).plot(kind="flow"), "single layer has no flow"),
        (lambda found: SMALL.plot("figure.pdf"), "figure.pdf.*must end in .png or .svg"),
        (lambda found: sweep(TWO, [2, 2], 0, ks=tuple(range(1, 8))).plot("a.png"), "7 values of k.*at most 6"),
    ],
)
def test_bad_input_is_refused(hourglass, draw, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        draw(hourglass)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_way_to_it_is_named(hourglass, monkeypatch):
    class Importer:
        def import_module(name):
            raise ImportError("No module named 'matplotlib'")

    monkeypatch.setattr(figures, "importlib", Importer)
    with pytest.raises(ImportError, match=r"pip install 'rqsid\[plots\]'"):
        hourglass.plot()
    with pytest.raises(ImportError, match=r"pip install 'rqsid\[plots\]'"):
        SMALL.plot()


def test_diagnosing_needs_no_matplotlib_and_drawing_no_global_state(run_fresh):
    found = run_fresh("""
        import json, sys
        import numpy as np
        from rqsid import diagnose
        from rqsid.sid_tokenizer.pruning_sweep import sweep
        curve = sweep(np.random.default_rng(0).integers(0, 8, (100, 3)), [8] * 3)
        found = diagnose(np.random.default_rng(0).integers(0, 8, (100, 3)), [8] * 3)
        before = "matplotlib" in sys.modules
        found.plot(), found.plot(kind="flow"), curve.plot()
        print(json.dumps([before, "matplotlib" in sys.modules, "matplotlib.pyplot" in sys.modules]))
    """)
    assert found == [False, True, False]
