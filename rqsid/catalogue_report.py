"""The report of `rqsid diagnose`: is there an hourglass, does better training remove it, what would remedies cost?"""

import os
from pathlib import Path

from .catalogue_files import align_codes, read_codes, read_product_ids, read_purchases
from .pruning_report import find_layer_to_treat, try_remedies, write_remedies, write_sweep
from .sid_tokenizer import ResidualQuantizerConfig, diagnose
from .sid_tokenizer.checks import check_codes
from .sid_tokenizer.embeddings import EmbeddingReader
from .sid_tokenizer.figures import plot_flow, plot_layers, plot_sweep
from .sid_tokenizer.files import replace_atomically, write_json
from .sid_tokenizer.pruning_sweep import sweep
from .sid_tokenizer.refit import ROWS_PER_CODE, duplicate_share, refit

FIGURES = tuple(f"{kind}.{suffix}" for kind in ("layers", "flow", "sweep") for suffix in ("png", "svg"))


def report_catalogue(
    embeddings=None,
    codes=None,
    codebook_sizes=None,
    purchases=None,
    product_ids=None,
    id_column="product_id",
    count_column=None,
    output_dir="diagnosis",
    seed=0,
    say=lambda line: None,
):
    """
    Diagnoses a catalog and writes `report.md`, `report.json` and, if matplotlib is there, `layers`, `flow` and `sweep` as
    `.png` and `.svg`.

    Args:
        embeddings (`str`, *optional*):
            A `.npy` or `.safetensors` file, or a folder of safetensors shards.
        codes (`str`, *optional*):
            The codes in use, see [`read_codes`]. At least one of `embeddings` and `codes` is needed. Without codes,
            plain k-means is fitted to have something to compare.
        codebook_sizes (`list[int]`, *optional*):
            Codes of each layer; `[256, 256, 256]` if there are no `codes`.
        purchases (`str`, *optional*):
            See [`read_purchases`].
        product_ids (`str`, *optional*):
            See [`read_product_ids`].
        id_column (`str`, *optional*, defaults to `"product_id"`):
            The column of the product ids in all files but those of a folder, see [`read_product_ids`].
        count_column (`str`, *optional*):
            The column of the counts in `purchases`.
        output_dir (`str`, *optional*, defaults to `"diagnosis"`):
            Folder of the report; made if it does not exist.
        seed (`int`, *optional*, defaults to 0):
            Seed of samples and fits.
        say (`callable`, *optional*):
            Called with a line on what is going on.

    Returns:
        `str`: verdict, recommendation and where the report lies.

    Raises:
        `ValueError`, `TypeError`: if a file is missing, cannot be read or does not fit the others.
    """
    # 1. read, and refuse what does not fit before anything long is begun
    if embeddings is None and codes is None:
        raise ValueError("Nothing to diagnose: pass --embeddings, --codes or both.")
    if os.path.exists(output_dir) and not os.path.isdir(output_dir):
        raise ValueError(f"{output_dir} is a file. Pass the name of a folder as --output_dir.")
    if seed < 0:
        raise ValueError(f"--seed {seed} must be a whole number from 0.")
    reader = None if embeddings is None else EmbeddingReader(embeddings)
    given, code_ids = (None, None) if codes is None else read_codes(codes, id_column)
    if codebook_sizes is None and given is not None:
        raise ValueError(
            f"--codes needs --codebook_sizes, because the largest codes in use, {given.max(0).tolist()}, need not be the "
            f"last ones. Perhaps: --codebook_sizes {' '.join(str(1 << int(code).bit_length()) for code in given.max(0))}"
        )
    sizes = [256, 256, 256] if codebook_sizes is None else list(codebook_sizes)
    config = ResidualQuantizerConfig(codebook_sizes=sizes, preset="fast", seed=seed)  # also checks the sizes
    if given is not None:
        check_codes(given, sizes)
    ids = code_ids
    if product_ids is not None or (embeddings and any(Path(embeddings).glob("product_ids-*.parquet"))):
        ids = read_product_ids(product_ids or embeddings, id_column)
        if given is not None and code_ids is not None:
            given = align_codes(given, code_ids, ids, codes)
    num_items = len(given) if reader is None else reader.num_rows
    for name, things in (("codes", given), ("product ids", ids)):
        if things is not None and len(things) != num_items:
            raise ValueError(f"{len(things)} {name} for {num_items} products: pass one for each, in the same order.")
    if reader is not None and num_items < max(sizes):
        raise ValueError(
            f"{num_items} embeddings cannot fill a codebook of {max(sizes)} codes. Pass more embeddings, or smaller "
            "--codebook_sizes."
        )
    weights, unknown = None, None
    if purchases is not None:
        if ids is None:
            raise ValueError("--purchases needs the ids of the products: pass --product_ids, or --codes with ids.")
        weights, unknown = read_purchases(purchases, ids, id_column, count_column)
    os.makedirs(output_dir, exist_ok=True)
    if not os.access(output_dir, os.W_OK):
        raise ValueError(f"Nothing can be written into {output_dir}. Pass another --output_dir.")

    # 2. fit what is not given, and measure
    if given is None:
        say(f"fitting {sizes} codes plainly to {num_items} embeddings")
        plain = ResidualQuantizerConfig(
            codebook_sizes=sizes, relocation_threshold=0, init="random", preset="fast", seed=seed
        )
        shown, label = refit(reader, plain, seed)[1], "plain"
    else:
        shown, label = given, "your codes"
    better = None
    if reader is not None:
        say(f"fitting {sizes} codes with better training")
        better = refit(reader, config, seed)[1]
    say("measuring")
    by_items = _compare(shown, better, sizes, None)
    by_purchases = None if weights is None else _compare(shown, better, sizes, weights)
    duplicates = None if reader is None else duplicate_share(reader)
    by_items.duplicate_share = duplicates

    # 3. remedies, on the codes that one would go on with: one's own, or else the better ones
    kept, kept_name = (shown, label) if better is None or given is not None else (better, "better training")
    measured = by_items if kept is shown else by_items.better_optimum
    layer = find_layer_to_treat(measured)
    remedies, curve, curve_by_purchases = [], None, None
    if layer is not None:
        remedies = try_remedies(kept, sizes, weights, measured, layer, say)
        say("pruning one token after the other")
        curve = sweep(kept, sizes, layer)
        curve_by_purchases = None if weights is None else sweep(kept, sizes, layer, weights)
    verdict = _say_verdict(by_items, label)
    recommendation = _recommend(by_items, by_purchases, measured, kept_name, remedies)
    if by_purchases is not None:
        verdict += f" Weighted by purchases: {_name_verdict(by_purchases)}"
        verdict += (
            f" ({_name_verdict(by_purchases.better_optimum)} after better training)." if better is not None else "."
        )

    # 4. write, the report itself last; what an earlier one left must not be taken for a part of it
    say("writing")
    report_path = os.path.join(output_dir, "report.md")
    for name in ("report.md", "report.json", *FIGURES):
        Path(output_dir, name).unlink(missing_ok=True)
    drawn = {label: by_items} | ({} if better is None else {"better training": by_items.better_optimum})
    try:
        for suffix in ("png", "svg"):
            plot_layers(drawn, os.path.join(output_dir, f"layers.{suffix}"))
            if len(sizes) > 1:
                plot_flow(drawn, os.path.join(output_dir, f"flow.{suffix}"))
            if curve is not None:
                plot_sweep(curve, os.path.join(output_dir, f"sweep.{suffix}"))
        figures = "![Codes by frequency](layers.png)" + (
            "\n\n![Flow between layers](flow.png)" if len(sizes) > 1 else ""
        )
    except ImportError as error:
        figures = f"No figures: {error}"
    rows_fitted = None if reader is None else min(num_items, ROWS_PER_CODE * max(sizes))
    calls = {}  # Python that makes the codes from nothing, so that it runs as it stands
    if reader is not None:
        calls["better training"] = (
            "from rqsid import ResidualQuantizer, ResidualQuantizerConfig\n\n"
            f'config = ResidualQuantizerConfig(codebook_sizes={sizes}, preset="fast", seed={seed})\n'
            f"codes = ResidualQuantizer(config).fit({str(embeddings)!r}).encode({str(embeddings)!r})"
        )
    if given is not None:
        calls["your codes"] = (
            f"from rqsid.catalogue_files import read_codes\n\ncodes, _ = read_codes({str(codes)!r}, {id_column!r})"
        )
    content = {
        "verdict": verdict,
        "recommendation": recommendation,
        "label": label,
        "num_items": num_items,
        "codebook_sizes": sizes,
        "seed": seed,
        "rows_fitted": rows_fitted,
        "unknown_purchases": unknown,
        "by_items": by_items.to_dict(),
        "by_purchases": None if by_purchases is None else by_purchases.to_dict(),
        "layer_to_treat": layer,
        "calls": calls,
        "remedies_of": kept_name,
        "remedies": remedies,
        "sweep": curve and curve.to_dict(),
        "sweep_by_purchases": curve_by_purchases and curve_by_purchases.to_dict(),
    }
    write_json(os.path.join(output_dir, "report.json"), content)
    parts = ["# Diagnosis", "", verdict, "", *_write_measures(by_items, by_purchases, label, unknown)]
    if better is not None:
        parts += _write_comparison(by_items, by_purchases, label, rows_fitted, calls["better training"])
    parts += ["", figures]
    if remedies:
        parts += write_remedies(remedies, by_items.layers[layer].name, kept_name, calls[kept_name])
        parts += write_sweep(curve, curve_by_purchases, figures.startswith("!"))
    parts += ["", "## Recommendation", "", recommendation, ""]
    with replace_atomically(report_path) as temporary:
        Path(temporary).write_text("\n".join(parts), encoding="utf-8")
    without = "" if figures.startswith("!") else f"\n\n{figures}"
    return f"{verdict}\n\n{recommendation}{without}\n\nReport: {report_path}"


def _compare(shown, better, sizes, weights):
    diagnosis = diagnose(shown, sizes, weights)
    if better is not None:
        diagnosis.better_optimum = diagnose(better, sizes, weights)
    return diagnosis


def _name_verdict(diagnosis):
    if diagnosis.verdict == "none":
        return "none"
    return f"{diagnosis.verdict} in layer {diagnosis.layers[diagnosis.verdict_layer].name}"


def _say_verdict(found, label):
    whose = {"plain": "plainly trained codes", "your codes": "your codes"}[label]
    if len(found.layers) < 3:
        return "No verdict: with fewer than three layers there is no middle that could be a waist."
    if found.verdict == "hourglass":
        text = f"There is an hourglass in {whose}: layer {found.layers[found.verdict_layer].name} is the waist"
        if found.better_optimum is None:
            return text + "; whether better training removes it can only be told with --embeddings."
        if found.survives:
            return text + ", and it survives better training."
        left = found.better_optimum.verdict
        return text + (
            ", but better training removes it"
            + ("." if left == "none" else f" and leaves a {_name_verdict(found.better_optimum)}.")
        )
    text = f"There is no hourglass in {whose}" + (
        "."
        if found.verdict == "none"
        else f", but a {found.verdict}: layer {found.layers[found.verdict_layer].name} is the least balanced."
    )
    better = found.better_optimum
    if better is not None and better.verdict == "hourglass":
        text += (
            f" Better training brings one out, in layer {better.layers[better.verdict_layer].name}: it lies in the embeddings, "
            "and poorly trained layers beside it hid it."
        )
    elif better is not None and better.verdict != "none":
        text += f" Better training has a {_name_verdict(better)}."
    elif better is not None and found.verdict != "none":
        text += " Better training removes it."
    return text


def _recommend(found, by_purchases, measured, kept_name, remedies):
    """Honest advice in plain words, from the figures that the report shows."""
    better, parts = found.better_optimum, []
    if better is not None and kept_name == "your codes" and better.unique_sids > found.unique_sids:
        parts.append(
            f"Better training alone takes the collision rate from {found.collision_rate:.3f} to {better.collision_rate:.3f}, "
            "with nothing pruned."
        )
    if len(found.layers) < 3:
        parts.append("The remedies here are for the middle of three layers or more.")
    elif better is not None and better.verdict == "none" and found.verdict != "none":
        parts.append("Better training removes it: no remedy needed. Use the codes of the better training.")
    elif measured.verdict == "none":
        parts.append("Nothing is concentrated: no remedy needed.")
    elif measured.verdict == "hourglass" and (better is None or better.verdict == "hourglass"):
        if better is not None:
            parts.append("The hourglass is in the embeddings, not in the training.")
        harmless = [row["remedy"] for row in remedies[1:] if row["unique_sids"] == remedies[0]["unique_sids"]]
        parts.append(
            "Pruning exactly one token is lossless, since its absence names it. Every further one merges SIDs that differed "
            f"only in pruned tokens; without loss here: {', '.join(harmless) or 'none'}. Dropping the layer would take the "
            f"collision rate from {remedies[0]['collision_rate']:.3f} to {remedies[-1]['collision_rate']:.3f}. Whether "
            "shorter SIDs rank better is for a trained model to show, at item level and over several seeds: a more even "
            "layer alone does not show it."
        )
    elif measured.verdict == "hourglass":
        parts.append(
            f"Better training removes the hourglass and leaves a {_name_verdict(better)}; pruning a middle layer does not "
            "address that. Use the codes of the better training, and none of the remedies."
        )
    else:
        parts.append(
            "The imbalance is at an end of the SID, not in the middle; pruning a middle layer does not address it, so none "
            "of the remedies is recommended."
        )
    bought = by_purchases and (by_purchases if measured is found else by_purchases.better_optimum)
    if bought and bought.verdict != "none" and bought.verdict != measured.verdict:
        parts.append(
            f"This goes by products. By purchases there is a verdict of its own, {_name_verdict(bought)}: what is bought "
            "often makes it, not where the embeddings lie."
        )
    if found.duplicate_share:
        parts.append(
            f"{round(found.duplicate_share * found.num_items)} of the {found.num_items} products have the very embedding of "
            'another. No codebook parts those: embed richer texts, or build the catalog with collisions="suffix".'
        )
    return " ".join(parts)


def _write_measures(found, by_purchases, label, unknown):
    lines = [f"## {label[0].upper()}{label[1:]}", "", found.to_markdown()]
    if by_purchases is not None:
        lines += ["", "By purchases:", "", by_purchases.to_markdown()]
    if unknown:
        lines += ["", f"{unknown:.1%} of the purchases name products that are not in the catalog; they are left out."]
    return lines


def _write_comparison(found, by_purchases, label, rows_fitted, call):
    lines = ["", f"## {label[0].upper()}{label[1:]} and better training", "", *_compare_table(found, label)]
    if by_purchases is not None:
        lines += ["", "By purchases:", "", *_compare_table(by_purchases, label)]
    fits = "Both fits" if label == "plain" else "The better training"
    if rows_fitted == found.num_items:
        lines += ["", f'{fits} saw all products, with preset="fast". The better one is']
    else:
        lines += [
            "",
            f"{fits} saw a random sample of {rows_fitted} of the {found.num_items} products ({ROWS_PER_CODE} per code of the "
            'largest codebook), with preset="fast"; all products were encoded. A fit on all of them, as here, differs a '
            "little:",
        ]
    return lines + ["", "```python", call, "```"]


def _compare_table(found, label):
    pair = [found, found.better_optimum]
    lines = [f"| | {label} | better training |", "|---|---|---|"]
    for before, after in zip(found.layers, found.better_optimum.layers, strict=True):
        for name, form in (("normalized_entropy", ".3f"), ("gini", ".3f"), ("under_used", "d")):
            title = name.replace("_", " ").replace("normalized", "normalised").replace("gini", "Gini")
            lines.append(
                f"| layer {before.name}, {title} | {getattr(before, name):{form}} | {getattr(after, name):{form}} |"
            )
    rows = {"unique SIDs": [d.unique_sids for d in pair], "collision rate": [f"{d.collision_rate:.4f}" for d in pair]}
    rows["largest group"] = [d.largest_group for d in pair]
    for k in found.recall_ceiling:
        rows[f"recall ceiling @{k}"] = [f"{d.recall_ceiling[k]:.4f}" for d in pair]
    rows["verdict"] = [_name_verdict(d) for d in pair]
    return lines + [f"| {name} | {before} | {after} |" for name, (before, after) in rows.items()]
