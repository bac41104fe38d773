"""Pushes a saved object with its card, and leaves cards that somebody has written alone."""

import os
import tempfile

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from transformers.utils import logging

from .card_sections import FIGURE_FILE
from .hub import hub_errors, push_folder

logger = logging.get_logger(__name__)

CARD_FILE = "README.md"
OPTIONS = (
    "commit_message",
    "commit_description",
    "private",
    "token",
    "revision",
    "create_pr",
    "tags",
    "tag",
    "license",
    "repo_id",
)


def push_saved(save, make_card, repo_id, kind, *, tags=None, private=None, token=None, delete_patterns=(), **options):
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
        tags (`list[str]`, *optional*):
            Those.
        private, token, delete_patterns, **options:
            As [`push_folder`].

    Returns:
        `CommitInfo`

    Raises:
        `ValueError`, `PermissionError`, `ConnectionError`: as [`push_folder`].
    """
    api = HfApi(token=token, library_name="rqsid")
    with hub_errors(repo_id, token):
        # With its full name, without which another's repository of that name would be asked for a card.
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        there = _download_card(api, repo_id, options.get("revision"))
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        path, stale = os.path.join(folder, CARD_FILE), list(delete_patterns)
        if there is None or generated_comment(kind) in there:
            make_card(repo_id, folder).save(path)
            stale.append(FIGURE_FILE)
        elif tags:
            _add_tags(there, tags, path, repo_id)
        return push_folder(folder, repo_id, private=private, token=token, delete_patterns=stale, **options)


def pop_push_options(kwargs, save_directory, more=()):
    """
    Takes those arguments of a `save_pretrained` that are its `push_to_hub`'s.

    Args:
        kwargs (`dict`):
            All arguments; those are removed.
        save_directory (`str` or `os.PathLike`):
            Its name is the repository's if no other is given.
        more (`tuple[str]`, *optional*, defaults to `()`):
            Arguments that only some `push_to_hub` take.

    Returns:
        `dict`: of arguments that are given, and `repo_id`.
    """
    options = {name: kwargs.pop(name) for name in (*OPTIONS, *more) if kwargs.get(name) is not None}
    for name in (*OPTIONS, *more):
        kwargs.pop(name, None)
    return {"repo_id": os.path.basename(os.path.abspath(save_directory))} | options


def generated_comment(kind):
    """
    Returns:
        `str`: the line by which a card is known to be ours to write anew.
    """
    return f"<!-- rqsid wrote this card of a {kind}, and every push writes it anew. Remove this line to keep your changes. -->"


def _download_card(api, repo_id, revision):
    """Its text, or `None`. A branch that there is none of yet will begin where `main` is."""
    for branch in dict.fromkeys([revision, None]):
        try:
            with open(api.hf_hub_download(repo_id, CARD_FILE, revision=branch), encoding="utf-8", newline="") as file:
                return file.read()
        except RevisionNotFoundError:
            continue
        except EntryNotFoundError:
            return None
    return None


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
