"""The card of a repository of codebooks."""

import os

from huggingface_hub import ModelCard, ModelCardData

from .card_push import download, generated_comment
from .card_sections import (
    FIGURE_FILE,
    TAGS,
    as_code,
    citation_section,
    diagnosis_section,
    save_figure,
    versions_section,
)
from .codebook_files import CONFIG_FILE
from .codebook_version import codebook_version
from .files import read_json
from .untrusted import shown

# Of an earlier push, where this one writes one file rather than parts of one, or the other way round.
STALE = ["model*.safetensors", "model.safetensors.index*.json"]
NO_OPTIONS = ("model_type", "codebook_sizes", "embedding_dim")


def codebook_card(quantizer, repo_id, diagnosis=None, license=None, tags=None, folder=None):
    """
    Args:
        quantizer ([`ResidualQuantizer`] or [`RQVAE`]): Fitted.
        repo_id (`str`):
            Where it will lie.
        diagnosis ([`Diagnosis`], *optional*):
            Of codes that it gave.
        license (`str`, *optional*):
            Its identifier.
        tags (`list[str]`, *optional*):
            More tags.
        folder (`str`, *optional*):
            Where a figure of the diagnosis is written, if matplotlib is there.

    Returns:
        `ModelCard`

    Raises:
        `ValueError`: if the diagnosis is of other codebooks.
    """
    config, sizes = quantizer.config, quantizer.codebook_sizes
    if diagnosis is not None and [layer.codebook_size for layer in diagnosis.layers] != sizes:
        raise ValueError(
            f"The diagnosis is of codebooks {[layer.codebook_size for layer in diagnosis.layers]}, the quantizer has {sizes}. Pass "
            "diagnose(codes, quantizer.codebook_sizes) of codes that it gave."
        )
    name, is_kmeans = type(quantizer).__name__, hasattr(quantizer, "prices")
    method = "residual k-means" if is_kmeans else "an RQ-VAE"
    data = ModelCardData(license=license, library_name="rqsid", tags=list(dict.fromkeys([*TAGS, *(tags or [])])))
    rows = {
        "layers": len(sizes),
        "codes": " + ".join(map(str, sizes)),
        "dimensions of an embedding": config.embedding_dim,
    }
    rows["codebook version"] = as_code(codebook_version(quantizer))
    options = {key: getattr(config, key) for key in type(config).__annotations__ if key not in NO_OPTIONS}
    text = [
        generated_comment("codebook"),
        "",
        f"# {repo_id.split('/')[-1]}",
        "",
        f"Codebooks of {method}. They turn the embedding of a product into {len(sizes)} codes, its semantic ID, which a language "
        "model can be trained to generate. They fit the embeddings of the encoder that they were fitted to, and no others.",
        "",
        *_table(("codebooks", ""), rows),
        "",
        "## Use",
        "",
        "```python",
        f"from rqsid import {name}",
        "",
        f'quantizer = {name}.from_pretrained("{repo_id}")',
        f"codes = quantizer.encode(embeddings)  # [N, {config.embedding_dim}] -> [N, {len(sizes)}]",
        "quantizer.decode(codes)  # and roughly back",
        "```",
        "",
        "## How they were fitted",
        "",
        *_table(("option", "value"), {as_code(key): as_code(_short(value)) for key, value in options.items()}),
    ]
    if diagnosis is not None:
        has_figure = folder is not None and save_figure(diagnosis, os.path.join(folder, FIGURE_FILE))
        text += ["", diagnosis_section(diagnosis, FIGURE_FILE if has_figure else None)]
    text += ["", versions_section(), "", citation_section(), ""]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(text))


def check_repository(api, repo_id, commit):
    """
    Raises:
        `ValueError`: if the repository holds a model that is no quantizer, whose configuration and weights have the same names.
    """
    path = download(api, repo_id, CONFIG_FILE, commit)
    if path is None:
        return
    try:
        model_type = read_json(path).get("model_type")
    except ValueError:
        model_type = None
    if not str(model_type).startswith("rqsid_"):
        raise ValueError(
            f"{repo_id} holds a model ({CONFIG_FILE} says model_type={shown(model_type)}), which the codebooks would replace. Push them to "
            "a repository of their own; those that belong to a tokenizer go with it anyway."
        )


def _table(heads, rows):
    return [f"| {heads[0]} | {heads[1]} |", "|---|---|", *[f"| {name} | {value} |" for name, value in rows.items()]]


def _short(value):
    return repr(value) if len(repr(value)) <= 200 else repr(value)[:199] + "…"
