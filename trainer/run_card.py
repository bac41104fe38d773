"""The card of a model that is published from its folder, written of what the folder tells."""

import os

from huggingface_hub import ModelCard, ModelCardData
from transformers.utils import logging

from ..sid_tokenizer.card_push import generated_comment
from ..sid_tokenizer.card_sections import (
    FIGURE_FILE,
    TAGS,
    citation_section,
    diagnose_catalog,
    diagnosis_section,
    layout_section,
    save_figure,
    versions_section,
)
from .run_folder import CARD_FILE, is_local

logger = logging.get_logger(__name__)

# Of a card that a library made up, and nobody has filled in.
UNWRITTEN = "[More Information Needed]"


def finish_card(run, folder, model_id, codebook_id=None, license=None):
    """
    Leaves a card in a folder that is to be published: the one that is there, such as the trainer's, or a new one if there is none,
    or one that nobody has filled in. The folder's own gets the licence, and no base model that is a path of this machine.

    Args:
        run ([`RunFolder`]): What is published.
        folder (`str`): The folder.
        model_id (`str`): What the model is going to be called.
        codebook_id (`str`, *optional*): Where its codebooks are.
        license (`str`, *optional*): Its licence.

    Returns:
        `ModelCard`

    Raises:
        `ValueError`: if the metadata of the folder's card cannot be read.
    """
    path = os.path.join(folder, CARD_FILE)
    text = ""
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            text = file.read()
    if not text.strip() or UNWRITTEN in text:
        card = _write_card(run, folder, model_id, codebook_id, license)
    else:
        card = _complete(text, run, license)
    if os.path.exists(path):
        os.remove(path)  # a link to the run's own
    card.save(path)
    return card


def _complete(text, run, license):
    try:
        card = ModelCard(text)
    except Exception as error:  # what YAML makes of anything that somebody may have written
        raise ValueError(
            f"{run.path}/{CARD_FILE} has metadata that cannot be read ({' '.join(str(error).split())}). Mend or delete the card."
        ) from None
    if license is not None:
        card.data.license = license
    base = card.data.base_model
    if base is not None and any(map(is_local, [base] if isinstance(base, str) else base)):
        logger.warning(f"The card names the base model {base}, a path of this machine, which is left out.")
        card.data.base_model = None
    if os.path.abspath(run.path) in text or os.path.expanduser("~") + os.sep in text:
        logger.warning(f"{run.path}/{CARD_FILE} names a path of this machine, which is published as it stands.")
    return card


def _write_card(run, folder, model_id, codebook_id, license):
    tokenizer, config = run.tokenizer, run.config
    base = config.get("base_model_name_or_path") if run.is_adapter else config.get("_name_or_path")
    data = ModelCardData(
        license=license,
        library_name="peft" if run.is_adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=None if not base or is_local(base) else base,
        tags=["rqsid", *TAGS],
    )
    codebook = (
        f" The codebooks lie in [{codebook_id}](https://huggingface.co/{codebook_id}), too." if codebook_id else ""
    )
    text = [
        generated_comment("model"),
        "",
        f"# {model_id.split('/')[-1]}",
        "",
        f"{'An adapter for a' if run.is_adapter else 'A'} language model that answers with semantic IDs (SIDs) of products: for what is "
        "known of a customer, what was bought before and what is asked for, it ranks a catalog. The tokenizer beside it holds the "
        f"catalog.{codebook}",
        "",
        "## Use",
        "",
        *_usage(run, model_id),
        "",
        layout_section(tokenizer),
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
