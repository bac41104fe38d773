"""Uploads to the Hub: one commit a push, made on the state that it was compared with, and errors of one line."""

import fnmatch
import hashlib
import os
import re
import time
from contextlib import contextmanager
from json import JSONDecodeError

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects
from huggingface_hub.utils.sha import git_hash
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Formats that run code when they are opened, or may.
PICKLES = ("*.bin", "*.ckpt", "*.joblib", "*.pickle", "*.pkl", "*.pt", "*.pth")
# What a save or an upload in progress leaves beside the files that count.
NEVER_PUSHED = [".cache/*", ".git/*", "*/.git/*", ".sid_*", "*/.sid_*", "*.tmp", "__pycache__/*", "*/__pycache__/*"]
ATTEMPTS = 5
LONGEST_WAIT = 120.0  # seconds


def push_folder(
    folder,
    repo_id,
    *,
    repo_type="model",
    space_sdk=None,
    revision=None,
    commit_message="Upload",
    commit_description=None,
    private=None,
    token=None,
    create_pr=False,
    tag=None,
    allow_patterns=None,
    ignore_patterns=None,
    delete_patterns=None,
    allow_pickles=False,
    prepare=None,
):
    """
    Pushes a folder as one commit, so that whoever loads finds all of the old files or all of the new ones.

    `HfApi.upload_folder` commits in several batches where `hf_xet` is installed, and takes a file for unchanged although
    somebody else may change it before the commit: a repository could end up with files of two states. Here the commit names
    the one that the folder was compared with, and is made anew if the branch has moved or the Hub was busy. Files that have not
    changed are not uploaded, nor are those that an earlier push, cut off half-way, had uploaded already.

    Args:
        folder (`str`):
            The folder.
        repo_id (`str`):
            The repository, such as `"org/name"`; made if there is none.
        repo_type (`str`, *optional*, defaults to `"model"`):
            `"model"`, `"dataset"` or `"space"`.
        space_sdk (`str`, *optional*):
            The SDK of a Space that is made.
        revision (`str`, *optional*, defaults to `"main"`):
            The branch to push to, made from the head of `main` if there is none.
        commit_message, commit_description (`str`, *optional*):
            What the commit says.
        private (`bool`, *optional*):
            Whether a repository that is made is private; the organization's default if not given. One that exists stays as it is.
        token (`str` or `bool`, *optional*):
            As in `HfApi`; the token of `hf auth login` or `HF_TOKEN` if not given.
        create_pr (`bool`, *optional*, defaults to `False`):
            Whether to open a pull request instead.
        tag (`str`, *optional*):
            A tag for the commit.
        allow_patterns, ignore_patterns (`list[str]`, *optional*):
            Files of the folder to push, and not to.
        delete_patterns (`list[str]`, *optional*):
            Files of the repository to delete in the same commit, if the folder does not hold them.
        allow_pickles (`bool`, *optional*, defaults to `False`):
            Whether to push files in formats that run code when they are opened; refused otherwise.
        prepare (`callable`, *optional*):
            Called with the `HfApi`, the repository's full name and the commit that the folder is about to be compared with, again
            whenever the branch has moved. What it puts into the folder depends on what is there, as a card does; it returns
            further `delete_patterns`.

    Returns:
        `CommitInfo`: the commit; that of the head, if nothing has changed.

    Raises:
        `ValueError`: if the folder is none, or holds pickles; if the repository or branch is none, or the tag another commit's; if
            the Hub finds the model card invalid.
        `PermissionError`: if the token is missing, rejected, or may not write there.
        `ConnectionError`: if the Hub cannot be reached, fails, or the branch keeps moving. The same call completes the push.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"There is no folder {folder} to push.")
    if create_pr and (tag is not None or revision is not None):
        raise ValueError(
            f"create_pr=True opens a pull request against main, which has no commit to tag and no branch of its own to name: leave "
            f"out tag={tag!r} and revision={revision!r}."
        )
    patterns = {"allow_patterns": allow_patterns, "ignore_patterns": [*NEVER_PUSHED, *(ignore_patterns or [])]}
    names = sorted(filter_repo_objects(_files(folder), **patterns))
    pickles = [name for name in names if any(fnmatch.fnmatch(name.lower(), pattern) for pattern in PICKLES)]
    if pickles and not allow_pickles:
        raise ValueError(
            f"{folder} holds {', '.join(pickles[:3])}{' …' if len(pickles) > 3 else ''}: formats that run code when they are opened, "
            "which are not published. Leave them out with ignore_patterns, or push with allow_pickles=True."
        )
    api = HfApi(token=token, library_name="rqsid")
    with hub_errors(repo_id, token):
        repo_id = api.create_repo(
            repo_id, repo_type=repo_type, space_sdk=space_sdk, private=private, exist_ok=True
        ).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
        where = {"repo_id": repo_id, "repo_type": repo_type}
        for attempt in range(ATTEMPTS):
            head, stale = api.repo_info(**where, revision=revision).sha, list(delete_patterns or [])
            if prepare is not None:
                stale += prepare(api, repo_id, head)
                names = sorted(filter_repo_objects(_files(folder), **patterns))
            if tag is not None:
                _check_tag(api, where, tag, head, folder, names)
            try:
                commit = api.create_commit(
                    **where,
                    operations=_operations(api, folder, names, where, head, stale),
                    commit_message=commit_message,
                    commit_description=commit_description,
                    revision=revision,
                    create_pr=create_pr,
                    parent_commit=head,
                )
                break
            except HTTPError as error:
                seconds = _seconds_to_wait(error, attempt)
                # A pull request whose answer was lost would be opened twice.
                if create_pr or seconds is None or attempt == ATTEMPTS - 1:
                    raise
                # With a new comparison: the commit may have been made although the answer was lost.
                logger.info(f"{repo_id} changed, or was busy, while it was being pushed to; comparing anew.")
                time.sleep(seconds)
        if tag is not None:
            api.create_tag(**where, tag=tag, revision=commit.oid, exist_ok=True)
    return commit


@contextmanager
def hub_errors(repo_id, token=None):
    """
    Turns what the client raises in the block into errors of one line that say what to do, and hold no token.

    Args:
        repo_id (`str`):
            What the block is about, for the message.
        token (`str`, *optional*):
            A token that was passed, which the message must not repeat.

    Raises:
        `PermissionError`, `ValueError` or `ConnectionError`: in place of the client's.
    """
    try:
        yield
    except (HTTPError, LocalTokenNotFoundError, ConnectionError, JSONDecodeError) as error:
        raise _readable(error, repo_id, token) from None
    except LocalEntryNotFoundError as error:
        # What the client makes of any failure to ask for a file that is not in the cache.
        raise _readable(error.__cause__ or error, repo_id, token) from None
    except RuntimeError as error:
        if not isinstance(error.__cause__, HTTPError):  # what the client makes of a failed upload of one file
            raise
        raise _readable(error.__cause__, repo_id, token) from None
    except ValueError as error:
        if not str(error).startswith("Invalid metadata"):
            raise
        raise ValueError(f"The card for {repo_id} is not valid: {_one_line(error, token)}") from None


def _seconds_to_wait(error, attempt):
    """Before a commit is tried again, which the client does not do by itself; `None` for what will not pass."""
    if not isinstance(error, HfHubHTTPError):
        return 2.0**attempt  # a connection that broke
    if error.response.status_code == 412:  # the branch has moved
        return 0.0
    if error.response.status_code not in (408, 429, 500, 502, 503, 504):
        return None
    told = error.response.headers.get("Retry-After", "")
    return min(float(told), LONGEST_WAIT) if told.isdecimal() else 2.0**attempt


def _operations(api, folder, names, where, head, delete_patterns):
    operations = [CommitOperationAdd(name, os.path.join(folder, name)) for name in names]
    if delete_patterns:
        there = api.list_repo_files(**where, revision=head)
        stale = set(filter_repo_objects(there, allow_patterns=delete_patterns)) - {*names, ".gitattributes"}
        operations += [CommitOperationDelete(name, is_folder=False) for name in sorted(stale)]
    return operations


def _check_tag(api, where, tag, head, folder, names):
    """Before anything is uploaded: a tag that is there already is only good for what it names."""
    if tag not in {ref.name for ref in api.list_repo_refs(**where).tags}:
        return
    # By name, since a tag is listed with the commit or with an object of its own.
    tagged = api.repo_info(**where, revision=tag).sha
    if tagged != head or not _is_there(api, where, head, folder, names):
        raise ValueError(
            f"{where['repo_id']} has a tag {tag!r} already, at commit {tagged[:7]}. Choose another; published tags do not move."
        )


def _is_there(api, where, head, folder, names):
    """Whether a commit holds the folder's files as they are."""
    found = {entry.path: entry for entry in api.list_repo_tree(**where, revision=head, recursive=True)}
    for name in names:
        path, entry = os.path.join(folder, name), found.get(name)
        if entry is None or entry.size != os.path.getsize(path):
            return False
        with open(path, "rb") as file:
            if entry.lfs is not None:
                same = hashlib.file_digest(file, "sha256").hexdigest() == entry.lfs.sha256
            else:
                same = git_hash(file.read()) == entry.blob_id
        if not same:
            return False
    return True


def _files(folder):
    return [
        os.path.relpath(os.path.join(where, name), folder).replace(os.sep, "/")
        for where, _, names in os.walk(folder)
        for name in names
    ]


def _readable(error, repo_id, token):
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    said = _one_line(getattr(error, "server_message", None) or error, token)
    if isinstance(error, LocalTokenNotFoundError):
        return PermissionError(f"There is no token for {repo_id}. Run `hf auth login`, set HF_TOKEN, or pass token.")
    if status == 401:
        return PermissionError(
            f"The Hub rejected the token for {repo_id}: it is missing, invalid or expired. Run `hf auth login`, set HF_TOKEN, or pass "
            "token."
        )
    if status == 403:
        return PermissionError(
            f"The token may not do this to {repo_id} ({said}). It needs the role `write`, and its owner the right to write there."
        )
    if isinstance(error, RevisionNotFoundError):
        return ValueError(f"{repo_id} has no such revision ({said}).")
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return ValueError(f"There is no {repo_id} on the Hub, or the token may not see it.")
    if status in (400, 409, 422):
        return ValueError(f"The Hub refused this for {repo_id}: {said}")
    if status == 412:
        return ConnectionError(
            f"{repo_id} changed {ATTEMPTS} times while it was being pushed to. Push again when others are done."
        )
    reason = f"status {status}: {said}" if status is not None else f"{type(error).__name__}: {said}"
    return ConnectionError(
        f"What was to be done with {repo_id} did not come to its end ({reason}). To go on, run it again; what was uploaded is not "
        "uploaded twice."
    )


def _one_line(text, token=None):
    text = re.sub(r"\s+", " ", str(text)).strip()
    if isinstance(token, str) and token:
        text = text.replace(token, "<token>")
    return re.sub(r"hf_\w{8,}", "<token>", text)[:300]
