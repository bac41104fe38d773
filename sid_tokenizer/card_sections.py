"""Sections that the cards of codebooks, tokenizers and models have in common."""

import re
from importlib.metadata import PackageNotFoundError, version

from transformers.utils import logging

from .diagnosis import diagnose
from .figures import plot_layers
from .sid_tokens import layer_letter, layer_tokens

logger = logging.get_logger(__name__)

FIGURE_FILE = "sid_layers.png"
TAGS = ["semantic-ids", "generative-retrieval", "residual-quantization"]
CITATION = """\
@inproceedings{kuai-etal-2024-breaking,
  title     = {Breaking the Hourglass Phenomenon of Residual Quantization: Enhancing the Upper Bound of Generative Retrieval},
  author    = {Kuai, Zhirui and Chen, Zuxu and Wang, Huimu and Li, Mingming and Miao, Dadong and Wang, Binbin and Chen, Xusong
               and Kuang, Li and Han, Yuxing and Wang, Jiaxing and Tang, Guoyu and Liu, Lin and Wang, Songlin and Zhuo, Jingwei},
  booktitle = {Proceedings of the 2024 Conference on Empirical Methods in Natural Language Processing: Industry Track},
  pages     = {677--685},
  year      = {2024},
  doi       = {10.18653/v1/2024.emnlp-industry.50},
  url       = {https://aclanthology.org/2024.emnlp-industry.50}
}

@software{rqsid,
  title   = {rqsid: generative search and recommendation with residual-quantized semantic IDs},
  author  = {{The rqsid developers}},
  license = {Apache-2.0}
}"""


def layout_section(tokenizer):
    """
    What SIDs look like: layers, tokens and their order, the pruning rule in words, the catalog and what shared SIDs cost.

    Args:
        tokenizer ([`SIDTokenizer`])

    Returns:
        `str`: Markdown, from its heading on.
    """
    catalog, report = tokenizer.catalog, tokenizer.catalog.collision_report()
    spelled = layer_tokens(catalog.codebook_sizes, catalog.suffix_size, tokenizer.token_format)
    lines = ["## Semantic IDs", "", "| layer | codes | tokens |", "|---|---|---|"]
    names = [layer_name(layer) for layer in range(catalog.num_layers)] + ["suffix"]
    for name, tokens in zip(names, spelled, strict=True):
        if tokens:
            shown = [tokens[0]] if len(tokens) == 1 else [tokens[0], tokens[-1]]
            lines.append(f"| {name} | {len(tokens)} | {' … '.join(as_code(token) for token in shown)} |")
    order = ", ".join(layer_letter(layer) for layer in tokenizer.layer_order)
    text = f"The tokens of a SID stand in the order {order}" + (", suffix. " if catalog.suffix_size else ". ")
    text += describe_pruning(catalog.pruning)
    if catalog.suffix_size:
        text += " Products that would share a SID are told apart by suffixes."
    elif catalog.collisions == "reassign":
        text += (
            f" Where more than {catalog.capacity} {'product' if catalog.capacity == 1 else 'products'} would share a SID, the "
            "others took the nearest one with room."
        )
    withdrawn = int(catalog.withdrawn.sum())
    share = report.colliding_products / max(1, report.products)
    rows = {
        "products": f"{len(catalog):,}" + (f", {withdrawn:,} of them withdrawn" if withdrawn else ""),
        "distinct SIDs": f"{catalog.num_sids:,}",
        "products that share their SID": f"{report.colliding_products:,} ({share:.2%})",
        "largest group": f"{report.largest_group:,}",
    }
    if catalog.num_sids:
        lengths = catalog.lengths()
        rows["tokens of a SID"] = f"{lengths.min()} to {lengths.max()}, {lengths.mean():.2f} on average"
    for k, ceiling in report.recall_ceiling.items():
        weighted = report.weighted_recall_ceiling
        rows[f"item-level Recall@{k} cannot exceed"] = f"{ceiling:.4f}" + (
            f" ({weighted[k]:.4f} by popularity)" if weighted else ""
        )
    rows["catalog version"] = f"{catalog.version} ({as_code(catalog.version_id)})"
    if catalog.codebook_version is not None:
        rows["codebook version"] = as_code(catalog.codebook_version)
    lines += ["", text, "", "| catalog | |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in rows.items()])


def diagnosis_section(diagnosis, figure=None):
    """
    Args:
        diagnosis ([`Diagnosis`])
        figure (`str`, *optional*):
            Name of the file that [`save_figure`] wrote beside the card.

    Returns:
        `str`: Markdown, from its heading on: how evenly each layer is used, and the verdict.
    """
    lines = ["## Diagnosis", ""]
    lines += [f"How evenly the codes of each layer are used, before pruning, over {diagnosis.num_items:,} products."]
    if figure is not None:
        lines += ["", f"![Codes of each layer by frequency]({figure})"]
    return "\n".join([*lines, "", diagnosis.to_markdown()])


def diagnose_catalog(catalog, cache=None):
    """
    Args:
        catalog ([`ProductCatalog`])
        cache (`dict`, *optional*):
            Where the diagnosis of a version of the catalog is kept, such as `tokenizer.cache`.

    Returns:
        [`Diagnosis`] or `None`: of the quantizer's codes of all products, before pruning; `None` for an empty catalog.
    """
    if len(catalog) == 0:
        return None
    cache = {} if cache is None else cache
    kept_version, diagnosis = cache.get("diagnosis", (None, None))
    if kept_version != catalog.version_id:
        diagnosis = diagnose(catalog.codes, catalog.codebook_sizes)
        cache["diagnosis"] = catalog.version_id, diagnosis
    return diagnosis


def save_figure(diagnosis, path):
    """
    Draws the layers of a diagnosis as [`~figures.plot_layers`] does.

    Args:
        diagnosis ([`Diagnosis`])
        path (`str`):
            File to write, `.png` or `.svg`.

    Returns:
        `bool`: whether it was written, which takes matplotlib.
    """
    try:
        plot_layers(diagnosis, path)
    except ImportError as error:
        logger.info_once(f"The card has no figure. {error}")
        return False
    return True


def library_versions(names=("rqsid", "transformers", "tokenizers", "torch")):
    """
    Args:
        names (`tuple[str]`, *optional*):
            Distributions.

    Returns:
        `dict[str, str]`: the versions of those that are installed.
    """
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def versions_section(versions=None):
    """
    Args:
        versions (`dict[str, str]`, *optional*):
            What [`library_versions`] gives if not given.

    Returns:
        `str`: Markdown, from its heading on.
    """
    versions = library_versions() if versions is None else versions
    return "\n".join(["## Versions", "", *[f"- {name} {number}" for name, number in versions.items()]])


def citation():
    """
    Returns:
        `str`: BibTeX of the method's paper and of rqsid.
    """
    return CITATION


def citation_section():
    """
    Returns:
        `str`: Markdown, from its heading on.
    """
    return f"## Citation\n\n```bibtex\n{CITATION}\n```"


def describe_pruning(pruning):
    """
    Args:
        pruning ([`TokenPruning`]): Fitted.

    Returns:
        `str`: the rule in a sentence.
    """
    if pruning.strategy != "none" and pruning.layer is None:
        return "Nothing is pruned: no middle layer was found whose codes are concentrated."
    if pruning.strategy == "none":
        return "Nothing is pruned: a SID has a token of each layer."
    layer = layer_name(pruning.layer)
    found = ", the least balanced of the middle layers," if pruning.auto else ""
    if pruning.strategy == "split":
        return (
            f"Nothing is pruned; instead {_codes(len(pruning.split))} of layer {layer}{found} were split into "
            f"{pruning.parts} each."
        )
    if pruning.strategy == "drop_layer":
        return f"Layer {layer}{found} is left out of all SIDs."
    text = f"The {_codes(pruning.num_pruned)} of layer {layer}{found} {'is' if pruning.num_pruned == 1 else 'are'} left out"
    if pruning.strategy == "threshold":
        text += f": as many as it takes for {pruning.threshold:.1%} of what they were counted by"
    return text + ". SIDs have varying lengths."


def layer_name(layer):
    """
    Returns:
        `str`: letter and index of a layer, as reports print them.
    """
    return f"{layer_letter(layer)} ({layer})"


def as_code(text):
    """
    Returns:
        `str`: text of any kind as code in a Markdown table, where a bar would end the cell and a backtick the code.
    """
    text = " ".join(str(text).split()).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def _codes(number):
    return "most frequent code" if number == 1 else f"{number} most frequent codes"
