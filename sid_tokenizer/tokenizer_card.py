"""The card of a repository that holds a tokenizer and no model."""

import os

from huggingface_hub import ModelCard, ModelCardData

from .card_push import generated_comment
from .card_sections import (
    FIGURE_FILE,
    TAGS,
    citation_section,
    diagnose_catalog,
    diagnosis_section,
    layout_section,
    save_figure,
    versions_section,
)

# Files that a tokenizer may have and this one may not; those of an earlier push would be read with it.
STALE = ["sid_codebook.safetensors", "chat_template.*", "additional_chat_templates/*"]
STALE += ["added_tokens.json", "special_tokens_map.json"]


def tokenizer_card(tokenizer, repo_id, license=None, tags=None, folder=None):
    """
    Args:
        tokenizer ([`SIDTokenizer`])
        repo_id (`str`):
            Where it will lie.
        license (`str`, *optional*):
            Its identifier.
        tags (`list[str]`, *optional*):
            More tags.
        folder (`str`, *optional*):
            Where a figure of the diagnosis is written, if matplotlib is there.

    Returns:
        `ModelCard`
    """
    data = ModelCardData(license=license, library_name="rqsid", tags=list(dict.fromkeys([*TAGS, *(tags or [])])))
    text = [
        generated_comment("tokenizer"),
        "",
        f"# {repo_id.split('/')[-1]}",
        "",
        "A tokenizer that knows a catalog: it spells products as semantic IDs (SIDs), and reads SIDs as products. It holds the catalog, "
        + ("" if tokenizer.quantizer is None else "the codebooks that give new products theirs, ")
        + "and the prompts that a model is trained and asked with.",
        "",
        "## Use",
        "",
        "```python",
        "from rqsid import SIDTokenizer",
        "",
        f'tokenizer = SIDTokenizer.from_pretrained("{repo_id}")',
        "token_ids = tokenizer.encode_products(product_ids)",
        "tokenizer.decode_products(token_ids)  # per SID the products that share it, best first",
        "```",
        "",
        f'Without rqsid: `AutoTokenizer.from_pretrained("{repo_id}", trust_remote_code=True)`.',
        "",
        layout_section(tokenizer),
    ]
    diagnosis = diagnose_catalog(tokenizer.catalog, tokenizer.cache)
    if diagnosis is not None:
        has_figure = folder is not None and save_figure(diagnosis, os.path.join(folder, FIGURE_FILE))
        text += ["", diagnosis_section(diagnosis, FIGURE_FILE if has_figure else None)]
    text += ["", versions_section(), "", citation_section(), ""]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(text))
