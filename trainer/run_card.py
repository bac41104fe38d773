"""The card of a model that is published from its folder, written of what the folder tells."""

import os
import re

from huggingface_hub import ModelCard, ModelCardData
from transformers.utils import logging

from ..sid_tokenizer.card_push import CARD_FILE
from ..sid_tokenizer.card_sections import (
    FIGURE_FILE,
    citation_section,
    diagnose_catalog,
    diagnosis_section,
    layout_section,
    save_figure,
    versions_section,
)
from .evaluations import as_list
from .model_card import CODEBOOK_MARK, MARK, PIPELINE, TAGS, is_generated, public_id

logger = logging.get_logger(__name__)

# Where the trainer's card says what it is called, and how it is loaded.
OWN_NAME = re.compile(r'SIDTokenizer\.from_pretrained\("([^"]+)"\)')
PIPELINE_BESIDE = PIPELINE.replace("pipeline:", "pipeline, whose code lies beside the model, also without rqsid:")
PIPELINE_BESIDE = PIPELINE_BESIDE.replace("import rqsid\n", "")


def finish_card(run, folder, model_id, license=None):
    """
    Makes the card of a folder that is to be published. Somebody's own keeps its text; the trainer's is told what the model is called
    now, and how it is used with the code beside it; where there is none, or one that nobody has filled in, it is written of what the
    folder tells.

    Args:
        run ([`RunFolder`]): What is published.
        folder (`str`): Where a figure is written, if matplotlib is there.
        model_id (`str`): What the model is going to be called.
        license (`str`, *optional*): Its licence.

    Returns:
        `ModelCard`

    Raises:
        `ValueError`: if the metadata of the folder's card cannot be read.
    """
    path = os.path.join(folder, CARD_FILE)
    if not os.path.exists(path):
        return _write_card(run, folder, model_id, license)
    with open(path, encoding="utf-8") as file:
        text = file.read()
    try:
        card = ModelCard(text)
    except Exception as error:  # what YAML makes of anything that somebody may have written
        raise ValueError(
            f"{run.path}/{CARD_FILE} has metadata that cannot be read ({' '.join(str(error).split())}). Mend or delete the card."
        ) from None
    if MARK in card.text:
        _rename(card, model_id)
    elif is_generated(card):
        return _write_card(run, folder, model_id, license)
    if license is not None:
        card.data.license = license
    if any(public_id(name) is None for name in as_list(card.data.base_model)):
        logger.warning("The card's base model is a path of this machine, and left out.")
        card.data.base_model = None
    if os.path.abspath(run.path) in text or os.path.expanduser("~") + os.sep in text:
        logger.warning(f"{run.path}/{CARD_FILE} names a path of this machine, which is published as it stands.")
    return card


def _rename(card, model_id):
    found = OWN_NAME.search(card.text)
    if found is not None and found[1] != model_id:
        name = model_id.split("/")[-1]
        card.text = card.text.replace(f'"{found[1]}"', f'"{model_id}"')
        card.text = card.text.replace(f"# {found[1].split('/')[-1]}\n", f"# {name}\n", 1)
        card.data.model_name = name
        # The trainer pushes checkpoints to its own repository.
        sections = card.text.split("\n## ")
        card.text = "\n## ".join(section for section in sections if not section.startswith("Checkpoints\n"))
    card.text = card.text.replace(PIPELINE, PIPELINE_BESIDE, 1)
    # transformers asks for trust where a model brings a pipeline, also if the same is installed.
    line = f'pipeline("sid-retrieval", model="{model_id}"'
    card.text = card.text.replace(f"{line})", f"{line}, trust_remote_code=True)")
    if CODEBOOK_MARK not in card.text:
        card.text = card.text.replace("\n## Diagnosis\n", f"\n{CODEBOOK_MARK}\n\n## Diagnosis\n", 1)


def _write_card(run, folder, model_id, license):
    tokenizer, config = run.tokenizer, run.config
    base = config.get("base_model_name_or_path") if run.is_adapter else config.get("_name_or_path")
    data = ModelCardData(
        license=license,
        library_name="peft" if run.is_adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=public_id(base),
        tags=TAGS,
    )
    text = [
        MARK,
        "",
        f"# {model_id.split('/')[-1]}",
        "",
        f"{'An adapter for a' if run.is_adapter else 'A'} language model that answers with semantic IDs (SIDs) of products: for what is "
        "known of a customer, what was bought before and what is asked for, it ranks a catalog. The tokenizer beside it holds the "
        "catalog.",
        "",
        "## Use",
        "",
        *_usage(run, model_id),
        "",
        layout_section(tokenizer),
        "",
        CODEBOOK_MARK,
    ]
    diagnosis = diagnose_catalog(tokenizer.catalog, tokenizer.cache)
    if diagnosis is not None:
        has_figure = save_figure(diagnosis, os.path.join(folder, FIGURE_FILE))
        text += ["", diagnosis_section(diagnosis, FIGURE_FILE if has_figure else None)]
    if "transformers_version" in config:
        text += ["", versions_section({"transformers": config["transformers_version"]})]
    text += ["", citation_section(), ""]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(text))


def _usage(run, model_id):
    fields = run.tokenizer.prompt_template.fields
    example = '{"query": "potato chips"}' if "query" in fields else f'{{"{fields[0]}": …}}'
    if run.is_adapter:
        return [
            "```python",
            "from rqsid import SIDTokenizer, load_lora, search",
            "",
            f'model, tokenizer = load_lora("{model_id}"), SIDTokenizer.from_pretrained("{model_id}")',
            f"search(model, tokenizer, [{example}], top_k=10)",
            "```",
        ]
    return [
        "```python",
        "from transformers import pipeline",
        "",
        f'retrieve = pipeline("sid-retrieval", model="{model_id}", trust_remote_code=True)',
        f"retrieve({example}, top_k=10)",
        "```",
        "",
        "The code that this runs lies beside the model. With rqsid installed, its own is run by "
        "`pipeline_class=SIDRetrievalPipeline`.",
    ]
