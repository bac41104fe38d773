"""What saving and loading know of the Hub: one file of a folder or of a repository, and what only a push needs."""

import importlib
import os
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# What from_pretrained is told about where files come from.
DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# What save_pretrained(push_to_hub=True) tells push_to_hub.
PUSH_OPTIONS = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr")
PUSH_OPTIONS += ("tags", "tag", "license")


def find_file(name, filename, **options):
    """
    Args:
        name (`str` or `os.PathLike`):
            A folder, or a repository.
        filename (`str`):
            What to find there.
        **options:
            Of [`DOWNLOAD_OPTIONS`], as `from_pretrained` takes them.

    Returns:
        `tuple[str | None, str | None]`: its path, `None` if there is no such file; and the commit that it is of, `None` for a
        folder. The other files of that commit belong to it, whatever is pushed meanwhile.

    Raises:
        `ValueError`: if there is no such folder, repository or revision.
        `PermissionError`: if the token is rejected, or access to the repository has to be asked for.
        `ConnectionError`: if the Hub cannot be reached, and the file is not in the cache.
    """
    options = {key: value for key, value in options.items() if key in DOWNLOAD_OPTIONS and value is not None}
    subfolder = options.pop("subfolder", "") or ""
    name = os.fspath(name)
    if os.path.isdir(name):
        path = os.path.join(name, subfolder, filename)
        return (path if os.path.isfile(path) else None), None
    failure = None
    try:
        path = hf_hub_download(name, filename, subfolder=subfolder or None, library_name="rqsid", **options)
        # From its end, for the cache itself may lie in a folder `snapshots`: …/snapshots/<commit>/subfolder/filename.
        return path, Path(path).parents[len(Path(subfolder, filename).parts) - 1].name
    except LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        why = "local_files_only=True was passed" if options.get("local_files_only") else why
        failure = ConnectionError(
            f"{filename} of {name} is not in the cache, and {why}. Load it once with a connection."
        )
    except EntryNotFoundError:
        return None, None
    except HFValidationError:
        failure = ValueError(f"{name!r} is neither a folder nor the name of a repository, such as 'org/name'.")
    except GatedRepoError:
        failure = PermissionError(f"Access to {name} has to be asked for on its page, with the account of the token.")
    except RevisionNotFoundError:
        failure = ValueError(f"{name} has no revision {options.get('revision')!r}: no such branch, tag or commit.")
    except RepositoryNotFoundError:
        failure = ValueError(
            f"There is neither a folder {name} here nor such a repository on the Hub that the token may see. For a private one run "
            "`hf auth login`, set HF_TOKEN, or pass token."
        )
    except (HfHubHTTPError, HTTPError, OSError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status in (401, 403):
            failure = PermissionError(
                f"The Hub rejected the token for {name}: it is invalid or expired, or may not read there. Run `hf auth login`, set "
                "HF_TOKEN, or pass token."
            )
        else:
            said = type(error).__name__ if status is None else f"status {status}"
            if isinstance(error, OSError) and error.strerror:  # a disk that is full, a cache that may not be written
                said = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
            failure = ConnectionError(f"{filename} of {name} could not be loaded ({said}). Try again later.")
    # Outside of the handlers, so that the client's error, which holds the request with its headers, is not its context.
    raise failure


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
    options = {name: kwargs.pop(name, None) for name in (*PUSH_OPTIONS, *more)}
    given = {name: value for name, value in options.items() if value is not None}
    return {"repo_id": os.path.basename(os.path.abspath(save_directory))} | given


def pushing_module(name):
    """
    A module that only pushing needs. Written as a name, since transformers sends along with a tokenizer all that its files import by
    statements, which would be a quarter more files to download and to trust, for those who never push.

    Args:
        name (`str`):
            Of a module beside this one.

    Raises:
        `ImportError`: in a copy of this file that came with a tokenizer, which has no such module beside it.
    """
    try:
        return importlib.import_module(f".{name}", __package__)
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}.{name}":
            raise
        raise ImportError(
            "Pushing takes rqsid, which checks what is there and writes a card: install it, load with its classes and push again. Or "
            "save to a folder, and upload that with `hf upload`."
        ) from None
