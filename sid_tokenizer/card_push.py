"""Pushes a saved object with its card, and leaves cards that somebody has written alone."""

import os
import tempfile

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError
from transformers.utils import logging

from .card_sections import FIGURE_FILE
from .hub import hub_errors, push_folder

logger = logging.get_logger(__name__)

CARD_FILE = "README.md"


def push_saved(
    save, make_card, repo_id, kind, *, check=None, tags=None, private=None, token=None, delete_patterns=(), **options
):
    """
    Args:
        save (`callable`):
            Called with a folder to save to.
        make_card (`callable`):
            Called with the repository's full name and that folder, for a figure; gives a `ModelCard` that holds
            [`generated_comment`] of `kind`.
        repo_id (`str`):
            The repository; made if there is none.
        kind (`str`):
            `"codebook"` or `"tokenizer"`. A card of another kind, or without that comment, is somebody else's: it keeps its
            text, and only tags that it lacks are added.
        check (`callable`, *optional*):
            Called with an `HfApi`, the repository's full name and its commit; raises a `ValueError` if that must not be pushed over.
        tags (`list[str]`, *optional*):
            Those.
        private, token, delete_patterns, **options:
            As [`push_folder`].

    Returns:
        `CommitInfo`

    Raises:
        `ValueError`, `PermissionError`, `ConnectionError`: as [`push_folder`].
    """
    with hub_errors(repo_id, token):
        # Who may not push learns it before a large catalog is saved.
        repo_id = HfApi(token=token, library_name="rqsid").create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        path, figure = (os.path.join(folder, name) for name in (CARD_FILE, FIGURE_FILE))

        # Of the commit that is pushed onto, lest a card is lost that somebody writes while this is saved or uploaded.
        def add_card(api, repo_id, head):
            if check is not None:
                check(api, repo_id, head)
            there = download_card(api, repo_id, head)
            for name in filter(os.path.exists, (path, figure)):
                os.remove(name)
            if there is None or generated_comment(kind) in there:
                make_card(repo_id, folder).save(path)
                return [FIGURE_FILE]
            if tags:
                _add_tags(there, tags, path, repo_id)
            return []

        return push_folder(
            folder,
            repo_id,
            private=private,
            token=token,
            delete_patterns=list(delete_patterns),
            prepare=add_card,
            **options,
        )


def generated_comment(kind):
    """
    Returns:
        `str`: the line by which a card is known to be ours to write anew.
    """
    return f"<!-- rqsid wrote this card of a {kind}, and every push writes it anew. Remove this line to keep your changes. -->"


def download(api, repo_id, filename, revision):
    """
    Returns:
        `str` or `None`: path to a file of a repository, `None` if there is no such file.

    Raises:
        What the client raises otherwise. A file that could not be asked for is not one that there is not.
    """
    try:
        return api.hf_hub_download(repo_id, filename, revision=revision)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None


def download_card(api, repo_id, revision):
    """Its text, or `None`. A branch that there is none of yet will begin where `main` is."""
    try:
        path = download(api, repo_id, CARD_FILE, revision)
    except RevisionNotFoundError:
        path = download(api, repo_id, CARD_FILE, None)
    if path is None:
        return None
    with open(path, encoding="utf-8", newline="") as file:
        return file.read()


def _add_tags(text, tags, path, repo_id):
    try:
        card = ModelCard(text, ignore_metadata_errors=False)
        known = card.data.tags or []
    except Exception as error:  # what YAML makes of anything that somebody may have written
        logger.warning(
            f"The card of {repo_id} gets no tags, because its metadata cannot be read ({type(error).__name__})."
        )
        return
    missing = [tag for tag in dict.fromkeys(tags) if tag not in known]
    if missing:
        card.data.tags = [*known, *missing]
        card.save(path)
