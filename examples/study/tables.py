"""Markdown tables and figures from the finished cells; the same cells give the same bytes."""

from pathlib import Path

import numpy as np
from balance import as_diagnosis
from causes import LAWS, explained
from cells import read_cells, write_table

from rqsid.sid_tokenizer.figures import plot_layers

LETTERS = "abcdefgh"
LEGEND = """
Per layer, over all K codes: *H*, entropy as a share of log2 K; *Gini*; *std*, standard deviation of the number of items per code.
*Null*: the same for items that draw a code at random, mean of 200 multinomial samples of this size. *Paths*: distinct SIDs as a
share of those that random codes of this size would give, then as a share of all that are possible. *Error*: squared error of the
reconstruction as a share of the embeddings' variance. *Score*: normalised entropy of the middle layers minus that of the first
and the last. *Verdict*: that of `rqsid.diagnose`, which asks for more than random codes show, by items; behind the slash with
items weighted by training purchases, where there are any. ± is the standard deviation over seeds.
"""
ABOUT_INITS = """
*random, no relocation*: K points, then k-means. *k-means++, no relocation*: that of `ResidualQuantizerConfig(init="k-means++")`, which
draws the best of 2 + log K candidates from 64 K points. *relocated*: random, then under-used codes are moved to split clusters of
large error, the library's default.
"""


def write_tables(out):
    """
    Args:
        out (`str` or `os.PathLike`):
            Folder of results; tables and figures go to its folder `tables`.

    Returns:
        `list[str]`: the files written.
    """
    folder = Path(out) / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, make in (("picture", picture_tables), ("published", published_tables), ("causes", causes_tables)):
        cells = read_cells(out, name)
        if cells:
            text, figures = make(cells)
            for label, diagnoses in figures.items():
                plot_layers(diagnoses, folder / f"{label}.png")
                written.append(str(folder / f"{label}.png"))
            written.append(write_table(out, name, text))
    return written


def picture_tables(cells):
    lines, figures = ["# The picture: tokens per layer", LEGEND], {}
    for dataset in _distinct(cells, "data"):
        for embeddings in _distinct(cells, "embeddings"):
            of_both = _where(cells, data=dataset, embeddings=embeddings)
            if not of_both:
                continue
            lines += [
                f"## {dataset['name']}, {embeddings['kind']} ({embeddings['of']}, {embeddings['dim']} dimensions)",
                "",
            ]
            lines += _statement(of_both) + [_header("K | L | quantizer | initialisation", _most_layers(of_both))]
            for size in _distinct(of_both, "codebook_size"):
                for num_layers in _distinct(of_both, "layers"):
                    of_size = _where(of_both, codebook_size=size, layers=num_layers)
                    if not of_size:
                        continue
                    drawn = {}
                    for quantizer in _distinct(of_size, "quantizer"):
                        for init in _distinct(of_size, "init"):
                            same = _where(of_size, quantizer=quantizer, init=init)
                            if same:
                                label = f"{size} | {num_layers} | {quantizer} | {init}"
                                lines.append(_row(label, same, _most_layers(of_both)))
                                drawn[f"{quantizer}, {init}"] = as_diagnosis(same[0]["result"])
                    lines.append(_null_row(f"{size} | {num_layers} | null | ", of_size[0], _most_layers(of_both)))
                    if num_layers == 3:
                        kind = embeddings["kind"].replace(" ", "-")
                        figures[f"picture-{_file_name(dataset)}-{kind}-{size}"] = drawn
            keys = {"quantizer": "quantizer", "codebook_size": "K", "layers": "L"}
            lines += ["", *_contrast_table(of_both, keys)]
    return "\n".join(lines) + "\n", figures


def published_tables(cells):
    lines, figures = ["# Published SIDs", LEGEND], {}
    for dataset in _distinct(cells, "data"):
        of_data = _where(cells, data=dataset)
        lines += [f"## {dataset['name']}", "", *_statement(of_data), _header("index", _most_layers(of_data))]
        for cell in of_data:
            label = cell["settings"]["index"].removesuffix(".json").removesuffix(".index")
            lines.append(_row(label, [cell], _most_layers(of_data)))
        lines += [_null_row("null", of_data[0], _most_layers(of_data)), ""]
    return "\n".join(lines) + "\n", figures


def causes_tables(cells):
    lines, figures = ["# The cause: which inputs, and which initialisation", LEGEND, ABOUT_INITS], {}
    for size in _distinct(cells, "codebook_size"):
        of_size = _where(cells, codebook_size=size)
        lines += [f"## K = {size}", "", *_statement(of_size)]
        lines.append(_header("input | initialisation", _most_layers(of_size)))
        for law in _distinct(of_size, "law"):
            for init in _distinct(of_size, "init"):
                same = _where(of_size, law=law, init=init)
                if same:
                    lines.append(_row(f"{law} | {init}", same, _most_layers(of_size)))
            drawn = {cell["settings"]["init"]: as_diagnosis(cell["result"]) for cell in _where(of_size, law=law)[::-1]}
            figures[f"causes-{_file_name({'name': law})}-{size}"] = dict(sorted(drawn.items()))
        lines += [_null_row("null | ", of_size[0], _most_layers(of_size)), ""]
        lines += _contrast_table(of_size, {"law": "input"})
        lines += _residual_table(of_size) + _explained_table(of_size)
    return "\n".join(lines) + "\n", figures


def _residual_table(cells):
    lines = [
        "Lengths of the vectors that each layer gets (layer a: the points around their mean) and, last, of what all leave. "
        "*Spread*: standard deviation / mean. *Top*: share of the squared lengths that the longest 10 % hold; 10 % where all are "
        "alike.",
        "",
    ]
    depth = len(cells[0]["result"]["residuals"])
    names = [f"into {LETTERS[layer]}" for layer in range(depth - 1)] + ["left"]
    lines.append("| input | initialisation | " + " | ".join(f"{name}: mean, spread, top" for name in names) + " |")
    lines.append("|---" * (2 + depth) + "|")
    for law in _distinct(cells, "law"):
        for init in _distinct(cells, "init"):
            same = _where(cells, law=law, init=init)
            if not same:
                continue
            columns = []
            for at in range(depth):
                mean, spread, top = (
                    np.mean([cell["result"]["residuals"][at][name] for cell in same])
                    for name in ("mean", "spread", "energy_of_top")
                )
                columns.append(f"{mean:.3f}, {spread:.2f}, {top:.0%}")
            lines.append(f"| {law} | {init} | " + " | ".join(columns) + " |")
    return lines + [""]


def _explained_table(cells):
    lines = [
        "What explains the differences between these cells: shares of the sum of squares, two-way analysis of variance (input "
        "× initialisation, seeds as repetitions). *Both*: the initialisation matters for some inputs and not for others.",
        "",
        "| initialisations | | data | initialisation | both | seed |",
        "|---|---|---|---|---|---|",
    ]
    two = [cell for cell in cells if cell["settings"]["init"] in ("random, no relocation", "relocated")]
    for label, chosen in {"random, relocated": two, "all": cells}.items():
        for name, parts in (explained(chosen) or {}).items():
            lines.append(f"| {label} | {name} | " + " | ".join(f"{value:.1%}" for value in parts.values()) + " |")
    if len(lines) == 4:
        return ["What data and initialisation explain needs every input with every initialisation and seed.", ""]
    return [*lines, ""]


def _contrast_table(cells, keys):
    """What the initialisation changes, paired by seed, and whether an hourglass is still there after relocation."""
    lines = [
        "Score with plain random initialisation and with relocation, and their difference, paired by seed. An hourglass that "
        "relocation removes was made by the training, one that stays is the data's, one that comes with it was hidden.",
        "",
        "| " + " | ".join([*keys.values(), "random", "relocated", "random - relocated", "hourglass in"]) + " |",
        "|---" * (len(keys) + 4) + "|",
    ]
    groups = []
    for cell in cells:
        group = {key: cell["settings"][key] for key in keys}
        if group not in groups:
            groups.append(group)
    ranks = {key: _distinct(cells, key).index for key in keys}
    for group in sorted(groups, key=lambda group: [ranks[key](value) for key, value in group.items()]):
        of_init = {}
        for init in ("random, no relocation", "relocated"):
            of_init[init] = {cell["seed"]: cell["result"] for cell in _where(cells, init=init, **group)}
        random, relocated = of_init.values()
        seeds = sorted(random.keys() & relocated.keys())
        if not seeds:
            continue
        scores = [[results[seed]["hourglass_score"] for seed in seeds] for results in (random, relocated)]
        found = [sum(results[seed]["verdict"] == "hourglass" for seed in seeds) for results in (random, relocated)]
        columns = [*(_spread(values, 3, sign=True) for values in [*scores, np.subtract(*scores)])]
        columns.append(f"{found[0]} -> {found[1]} of {len(seeds)} seeds")
        lines.append("| " + " | ".join([*map(str, group.values()), *columns]) + " |")
    return [*lines, ""]


def _statement(cells):
    """What every table says of itself: data set, task, protocol, tie order, seeds, commit, cost."""
    about = cells[0]["result"].get("about") or _made_up(cells[0]["settings"])
    seeds = sorted({cell["seed"] for cell in cells if cell["seed"] is not None})
    commits = sorted({str(cell["commit"]) for cell in cells})
    versions = ", ".join(f"{name} {version}" for name, version in cells[0]["versions"].items())
    about = about | {
        "seeds": ", ".join(map(str, seeds)) if seeds else "none (nothing is drawn)",
        "commit": ", ".join(commits) + f"; {versions}",
        "cost": f"{sum(cell['cpu_seconds'] for cell in cells):.0f} s of CPU for {len(cells)} cells; no language model, "
        "so no training tokens",
    }
    return [f"- {name}: {value}" for name, value in about.items()] + [""]


def _made_up(settings):
    return {
        "data set": f"made up: {settings['items']} points of {settings['dim']} dimensions of each law (causes.py)",
        "task": "none: quantization alone",
        "protocol": "codebooks are fitted on the points that are measured; a seed draws points and initial codebooks",
        "tie order": "none: no purchases",
    }


def _header(first, num_layers):
    layers = [f"{LETTERS[layer]}: H / Gini / std" for layer in range(num_layers)]
    names = [*first.split(" | "), *layers, "paths", "collisions", "error", "score", "verdict"]
    return "| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|"


def _row(label, cells, num_layers):
    results = [cell["result"] for cell in cells]
    columns = []
    for layer in range(num_layers):
        if layer >= len(results[0]["layers"]):
            columns.append("")
            continue
        layers = [result["layers"][layer] for result in results]
        entropy, gini, std = ([values[name] for values in layers] for name in ("normalized_entropy", "gini", "std"))
        columns.append(f"{_spread(entropy, 3)} / {_spread(gini, 2)} / {np.mean(std):.1f}")
    last = [result["layers"][-1] for result in results]
    random_paths = results[0]["null"][-1]["paths_used"]
    used = np.mean([layer["paths_used"] for layer in last])
    columns.append(f"{used / random_paths:.3f}, {used / float(last[0]['paths_possible']):.1e}")
    columns.append(_spread([result["collision_rate"] for result in results], 3))
    errors = [result["relative_error"] for result in results if "relative_error" in result]
    columns.append(_spread(errors, 3) if errors else "")
    columns.append(_spread([result["hourglass_score"] for result in results], 3, sign=True))
    verdict = _verdicts(results)
    if "by_purchases" in results[0]:
        verdict += " / " + _verdicts([result["by_purchases"] for result in results])
    return f"| {label} | " + " | ".join([*columns, verdict]) + " |"


def _null_row(label, cell, num_layers):
    null, columns = cell["result"]["null"], []
    for layer in range(num_layers):
        if layer < len(null):
            entropy, gini, std = (null[layer][name][0] for name in ("normalized_entropy", "gini", "std"))
            columns.append(f"{entropy:.3f} / {gini:.2f} / {std:.1f}")
        else:
            columns.append("")
    possible = float(cell["result"]["layers"][-1]["paths_possible"])
    columns.append(f"1.000, {null[-1]['paths_used'] / possible:.1e}")
    collisions = 1 - null[-1]["paths_used"] / cell["result"]["num_items"]
    return f"| {label}| " + " | ".join([*columns, f"{max(collisions, 0):.3f}", "", "", ""]) + " |"


def _verdicts(results):
    """Every verdict with how many seeds gave it, where they differ; with the layer that it is about."""
    names = [
        result["verdict"] + ("" if result["verdict_layer"] is None else f" {LETTERS[result['verdict_layer']]}")
        for result in results
    ]
    if len(set(names)) == 1:
        return names[0]
    return ", ".join(f"{names.count(name)}× {name}" for name in sorted(set(names)))


def _spread(values, digits, sign=False):
    mean = f"{np.mean(values):{'+' if sign else ''}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def _most_layers(cells):
    return max(len(cell["result"]["layers"]) for cell in cells)


def _distinct(cells, name):
    """Values of a setting, each once: numbers by size, inputs as they were written down, others by their text, as cells are."""
    values = []
    for cell in cells:
        if cell["settings"][name] not in values:
            values.append(cell["settings"][name])
    if name == "law":
        return sorted(values, key=list(LAWS).index)
    return sorted(values) if values and isinstance(values[0], int) else values


def _where(cells, **settings):
    return [cell for cell in cells if all(cell["settings"][name] == value for name, value in settings.items())]


def _file_name(dataset):
    words = "".join(letter if letter.isalnum() else " " for letter in dataset["name"].lower()).split()
    return "-".join(words)[:60]
