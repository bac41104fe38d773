"""One file of a folder or of a repository on the Hub, and errors that say what is wrong with the name."""

import os

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils.hub import extract_commit_hash

# What from_pretrained is told about where files come from.
DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def find_file(name, filename, optional=False, **options):
    """
    Args:
        name (`str` or `os.PathLike`):
            A folder, or a repository.
        filename (`str`):
            What to find there.
        optional (`bool`, *optional*, defaults to `False`):
            Whether a file that is not in the cache, where the Hub cannot be reached, counts as one that there is not.
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
        return path, extract_commit_hash(path, None)
    except LocalEntryNotFoundError:
        if optional:
            return None, None
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
            failure = ConnectionError(f"{filename} of {name} could not be loaded ({said}). Try again later.")
    # Outside of the handlers, so that the client's error, which holds the request with its headers, is not its context.
    raise failure
