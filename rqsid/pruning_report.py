"""What pruning would cost, as `rqsid diagnose` reports it: a few remedies, and the curve of all numbers of tokens."""

from .sid_tokenizer import TokenPruning, diagnose

REMEDIES = (
    ("prune 1 token", {"strategy": "top_k", "top_k": 1}),
    ("prune p = .1", {"strategy": "threshold", "threshold": 0.1}),
    ("prune p = .25", {"strategy": "threshold", "threshold": 0.25}),
    ("prune p = .5", {"strategy": "threshold", "threshold": 0.5}),
    ("drop the layer", {"strategy": "drop_layer"}),
)


def find_layer_to_treat(measured):
    """The layer with the hourglass, or else the least balanced middle one; `None` if there is none that can be pruned."""
    if measured.verdict == "hourglass":
        return measured.verdict_layer
    middle = measured.layers[1:-1]
    return min(middle, key=lambda layer: layer.normalized_entropy).layer if middle else None


def try_remedies(codes, sizes, weights, unpruned, layer, say):
    rows = [_remedy_row("nothing", None, 0, unpruned, None if weights is None else diagnose(codes, sizes, weights))]
    for name, arguments in REMEDIES:
        if sizes[layer] == 1 and arguments["strategy"] == "top_k":
            continue  # the only code of a layer: that is dropping it
        say(f"trying: {name}")
        pruning = TokenPruning(layer=layer, **arguments).fit(codes, sizes)
        pruned = pruning.apply(codes)
        diagnosis = diagnose(pruned, sizes)
        weighted = None if weights is None else diagnose(pruned, sizes, weights)
        written = ", ".join(f"{key}={value!r}" for key, value in {"layer": layer, **arguments}.items())
        call = f"TokenPruning({written}).fit(codes, {sizes}).apply(codes)"
        rows.append(_remedy_row(name, call, pruning.num_pruned, diagnosis, weighted))
    return rows


def _remedy_row(name, call, num_pruned, diagnosis, weighted):
    return {
        "remedy": name,
        "call": call,
        "tokens_pruned": num_pruned,
        "unique_sids": diagnosis.unique_sids,
        "collision_rate": diagnosis.collision_rate,
        "largest_group": diagnosis.largest_group,
        "mean_length": diagnosis.mean_length,
        "recall_ceiling": {str(k): value for k, value in diagnosis.recall_ceiling.items()},
        "recall_ceiling_by_purchases": weighted and {str(k): value for k, value in weighted.recall_ceiling.items()},
    }


def write_remedies(remedies, layer_name, kept_name, call):
    weighted = remedies[0]["recall_ceiling_by_purchases"] is not None
    heads = ["remedy", "tokens pruned", "unique SIDs", "collision rate", "largest group", "mean length"]
    heads += ["ceiling @1", "@10", "@50"] + (["by purchases @1", "@10", "@50"] if weighted else [])
    lines = ["", f"## What remedies would cost, layer {layer_name} of {kept_name}", ""]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in remedies:
        cells = [row["remedy"], row["tokens_pruned"], row["unique_sids"], f"{row['collision_rate']:.4f}"]
        cells += [row["largest_group"], f"{row['mean_length']:.2f}"]
        cells += [f"{value:.4f}" for value in row["recall_ceiling"].values()]
        cells += [f"{value:.4f}" for value in (row["recall_ceiling_by_purchases"] or {}).values()]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "The ceiling is the best item-level recall of a model that always ranks the right SID first."]
    lines += ["", "```python", "from rqsid import TokenPruning", call, ""]
    return lines + [f"pruned = {row['call']}  # {row['remedy']}" for row in remedies if row["call"]] + ["```"]


def write_sweep(curve, by_purchases, has_figure):
    """The lines of the report about every number of pruned tokens; `by_purchases` is the curve by purchases, or `None`."""
    lines = ["", "## What pruning more and more tokens would cost", ""]
    lines += ["![Cost of pruning](sweep.png)", ""] if has_figure else []
    lines.append(str(curve))
    if by_purchases is not None:
        lines += ["", "By purchases, which then also say which tokens are the most frequent:", "", str(by_purchases)]
    return lines
