"""A whole run on the Hub: codebooks, metrics, model with tokenizer and code, and a collection that holds them."""

import os
import tempfile

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from ..evaluate_metrics import MODULES
from ..evaluate_metrics import path as metric_path
from ..sid_tokenizer.card_push import CARD_FILE
from ..sid_tokenizer.card_sections import diagnose_catalog
from ..sid_tokenizer.files import replace_atomically
from ..sid_tokenizer.hub import hub_errors, push_folder
from ..sid_tokenizer.staged_save import recovered
from .hub_pushes import REPLACED, card_to_publish
from .model_card import name_codebook
from .run_card import finish_card
from .run_folder import read_run, stage_run

logger = logging.get_logger(__name__)

# What an earlier push may have left, of trainers or of this, and would be loaded.
STALE = [*REPLACED, "pipeline.py", "custom_generate/*"]
SAME = "{} cannot be the repository of the model and of the codebooks. Name another."
NOTES = {
    "model": "The model, with its tokenizer, its catalog and the code of its search.",
    "adapter": "The adapter, with its tokenizer and its catalog.",
    "codebook": "The codebooks that make semantic IDs of embeddings.",
    "sid_retrieval": "Metric: Recall, NDCG and MRR by product and by semantic ID.",
    "sid_distribution": "Metric: how evenly semantic IDs use their codes.",
}


def publish_run(
    folder,
    model_id,
    *,
    codebook_id=None,
    metrics=True,
    collection=None,
    private=None,
    token=None,
    revision=None,
    commit_message="Publish a run",
    tag=None,
    license=None,
    space_namespace=None,
):
    """
    Publishes what a training left in its folder: the model with the tokenizer's bundle, the search as `custom_generate/`, the
    pipeline's code and a card; the codebooks in a repository of their own; the metrics as Spaces; and a collection of all these.

    Everything is checked before anything is uploaded. Each repository changes by one commit, the model's last, so that whoever
    loads it meanwhile gets what was there before. The same call completes what was cut off, and uploads nothing twice. Of the folder
    only what a model and its tokenizer consist of is published, with the training's arguments: no checkpoints, logs or data.
    An adapter is published without code: `custom_generate` and pipelines load models, which it becomes by merging it.

    Args:
        folder (`str`):
            What `trainer.save_model()` wrote, `save_pretrained` of model and tokenizer, or a checkpoint.
        model_id (`str`):
            The model's repository, such as `"org/my-model"`.
        codebook_id (`str`, *optional*):
            A repository for the codebooks, from which other catalogs can be built. The model's has them in any case.
        metrics (`bool`, *optional*, defaults to `True`):
            Whether to publish the metrics as Spaces.
        collection (`str`, *optional*):
            Title of a collection in the model's namespace, which is made if there is none; no collection if not given.
        private (`bool`, *optional*):
            Whether what is made is private; the organization's default if not given.
        token (`str` or `bool`, *optional*):
            As in `HfApi`; the token of `hf auth login` or `HF_TOKEN` if not given.
        revision (`str`, *optional*, defaults to `"main"`):
            Branch of model and codebooks. Spaces run what is in `main`.
        commit_message (`str`, *optional*, defaults to `"Publish a run"`):
            What the commits say.
        tag (`str`, *optional*):
            A tag for the commits of model and codebooks.
        license (`str`, *optional*):
            The licence of model and codebooks, such as `"apache-2.0"`, for their cards.
        space_namespace (`str`, *optional*):
            Where the Spaces are; the model's namespace if not given.

    Returns:
        `dict[str, dict]`: for each of `"codebook"`, the metrics, `"model"` or `"adapter"`, and `"collection"`, as far as published,
        its `id`, its `url` and, but for the collection, the `commit`.

    Raises:
        `ValueError`: if the folder is not whole, model and tokenizer have other codebooks, the adapter's model is nowhere on the Hub,
            a name is none, or codebooks are asked for that the tokenizer does not have; and as
            [`~rqsid.sid_tokenizer.hub.push_folder`].
        `PermissionError`, `ConnectionError`: as [`~rqsid.sid_tokenizer.hub.push_folder`].

    Example:

    ```python
    >>> trainer.save_model("my-model")
    >>> publish_run("my-model", "org/my-model", codebook_id="org/my-codebook", collection="Semantic IDs of my shop", tag="v1")
    ```
    """
    for name in filter(None, (model_id, codebook_id)):
        validate_repo_id(name)
    if codebook_id == model_id:
        raise ValueError(SAME.format(model_id))
    if collection is not None and not collection.strip():
        raise ValueError("collection is an empty title. Give it one, or leave it out.")
    options = {"private": private, "token": token}
    branch = {"revision": revision, "tag": tag, "commit_message": commit_message}
    published = {}
    with recovered(folder) as whole, tempfile.TemporaryDirectory() as staging:
        run = read_run(whole)
        if codebook_id is not None and run.tokenizer.quantizer is None:
            raise ValueError(
                f"codebook_id={codebook_id!r}, but the tokenizer in {folder} has no quantizer, as its SIDs were imported. Leave it out."
            )
        # Before anything is uploaded: this says what the token may do, and full names.
        model_id = _make(model_id, **options)
        if codebook_id is not None:
            codebook_id = _make(codebook_id, **options)
            if codebook_id == model_id:
                raise ValueError(SAME.format(model_id))
        namespace = model_id.split("/")[0]
        stage_run(run, staging, model_id)
        card = finish_card(run, staging, model_id, license)
        api = HfApi(token=token, library_name="rqsid")
        with hub_errors(model_id, token):
            card_to_publish(card, {"license": license}, api, model_id, revision).validate()

        if codebook_id is not None:
            diagnosis = diagnose_catalog(run.tokenizer.catalog, run.tokenizer.cache)
            commit = run.tokenizer.quantizer.push_to_hub(
                codebook_id, **options, **branch, license=license, diagnosis=diagnosis
            )
            published["codebook"] = _entry(commit)
        if metrics:
            published |= push_metrics(space_namespace or namespace, **options)

        # Of the commit that is pushed onto, lest a card is lost that somebody writes while this is uploaded.
        def add_card(api, model_id, head):
            final = card_to_publish(card, {"license": license}, api, model_id, head)
            if codebook_id is not None:
                name_codebook(final, codebook_id, published["codebook"]["commit"])
            with replace_atomically(os.path.join(staging, CARD_FILE)) as temporary:
                final.save(temporary)
            return []

        commit = push_folder(staging, model_id, **options, **branch, delete_patterns=STALE, prepare=add_card)
        published["adapter" if run.is_adapter else "model"] = _entry(commit)
    if collection is not None:
        published["collection"] = _collect(published, collection, namespace, **options)
    return published


def push_metrics(namespace, names=MODULES, *, private=None, token=None, commit_message="Publish a metric"):
    """
    Publishes modules of `rqsid.evaluate_metrics` as Spaces, from which `evaluate.load("org/sid_retrieval")` loads them, and which
    show them in a page.

    Args:
        namespace (`str`):
            The user or organization.
        names (`list[str]`, *optional*, defaults to all):
            `"sid_retrieval"` and `"sid_distribution"`.
        private (`bool`, *optional*):
            Whether a Space that is made is private; the organization's default if not given.
        token (`str` or `bool`, *optional*):
            As in `HfApi`; the token of `hf auth login` or `HF_TOKEN` if not given.
        commit_message (`str`, *optional*, defaults to `"Publish a metric"`):
            What the commits say.

    Returns:
        `dict[str, dict]`: for each module the Space's `id`, `url` and `commit`.

    Raises:
        `ValueError`: if there is no such module, or the namespace is none; and as [`~rqsid.sid_tokenizer.hub.push_folder`].
        `PermissionError`, `ConnectionError`: as [`~rqsid.sid_tokenizer.hub.push_folder`].
    """
    folders = {name: metric_path(name) for name in names}
    for name in folders:
        validate_repo_id(f"{namespace}/{name}")
    return {
        name: _entry(
            push_folder(
                folder,
                f"{namespace}/{name}",
                repo_type="space",
                space_sdk="gradio",
                private=private,
                token=token,
                commit_message=commit_message,
                ignore_patterns=["__init__.py"],  # of the package, which a Space is not
            )
        )
        for name, folder in folders.items()
    }


def _make(repo_id, private, token):
    with hub_errors(repo_id, token):
        return HfApi(token=token, library_name="rqsid").create_repo(repo_id, private=private, exist_ok=True).repo_id


def _entry(commit):
    return {"id": commit.repo_url.repo_id, "url": str(commit.repo_url), "commit": commit.oid}


def _collect(published, title, namespace, private, token):
    api = HfApi(token=token, library_name="rqsid")
    with hub_errors(f"the collection {title!r}", token):
        collection = api.create_collection(title, namespace=namespace, private=bool(private), exists_ok=True)
        for name in sorted(published, key=lambda name: name not in ("model", "adapter")):
            item_type = "space" if name in MODULES else "model"
            api.add_collection_item(
                collection.slug, published[name]["id"], item_type, note=NOTES[name], exists_ok=True
            )
    return {"id": collection.slug, "url": collection.url}
