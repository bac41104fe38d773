"""Saving several files as one: whoever loads finds all of the old ones or all of the new ones, whenever a save dies."""

import os
import shutil
import tempfile
from contextlib import contextmanager

from .catalog_file import check_successor, lock_folder
from .files import read_json, write_json
from .untrusted import shown

STAGING = ".sid_save-"
# A folder that is there while files are being replaced, and holds what they were; while it is there, they count.
PREVIOUS = ".sid_previous"
KEPT, ADDED = "files", "added.json"


@contextmanager
def staged_save(folder, catalog, catalog_name, manifest_name, read_manifest):
    """
    Yields a new folder inside `folder`. The files written there take the places of those in `folder` when the block ends
    without an error, the manifest last; otherwise nothing changes.

    While files are replaced, those that they replace, and the names of those that are new, stay in a folder beside them, so
    that [`recovered`] and the next save find the old state after a power cut in between.

    Args:
        folder (`str`):
            Where to save; made if it does not exist.
        catalog ([`ProductCatalog`]):
            What is saved.
        catalog_name, manifest_name (`str`):
            The names of these two files.
        read_manifest (callable):
            Gives the manifest of a path, or raises a `ValueError`.

    Raises:
        `ValueError`: if `folder` holds changes to this catalog that it does not know: somebody saved in the meantime. Also if
            what a save has left there would lead out of the folder, which no save leaves, but a folder from elsewhere can hold.
    """
    os.makedirs(folder, exist_ok=True)
    with lock_folder(folder) as locked:
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            # Of a save that was killed; nobody else is saving now. What is no folder is none of a save.
            if locked and name.startswith(STAGING) and os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
        staging = tempfile.mkdtemp(prefix=STAGING, dir=folder)
        try:
            # First, since the catalog of a save that died was never anybody's.
            _restore(folder, staging)
            check_successor(catalog, os.path.join(folder, catalog_name))
            yield staging
            read_manifest(os.path.join(staging, manifest_name))
            _commit(staging, folder, manifest_name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def recovered(folder):
    """
    Yields the folder to load from: `folder`, or, if a save to it died half-way, a temporary one of links to the files that
    were there before.

    Args:
        folder (`str`):
            A local folder; anything else is yielded as it is.

    Raises:
        `ValueError`: if what a save has left there cannot be its own.
    """
    if not _is_torn(folder):
        yield folder
        return
    with lock_folder(folder), tempfile.TemporaryDirectory() as whole:
        # With the lock, since whoever saves may be about to finish.
        if not _is_torn(folder):
            yield folder
            return
        kept, added = _previous(folder)
        names = {name for name in os.listdir(folder) if name != PREVIOUS and not name.startswith(STAGING)}
        nested = {name.split(os.sep)[0] for name in [*kept, *added] if os.sep in name}
        names = (names - nested) | set(kept)
        for name in nested:
            names |= {os.path.join(name, inner) for inner in _files(os.path.join(folder, name))}
        for name in names - set(added):
            link = os.path.join(whole, name)
            os.makedirs(os.path.dirname(link), exist_ok=True)
            os.symlink(os.path.realpath(kept.get(name, os.path.join(folder, name))), link)
        yield whole


def _commit(staging, folder, manifest_name):
    names = [
        name
        for name in sorted(_files(staging), key=lambda name: (name == manifest_name, name))
        if not _is_same_file(os.path.join(staging, name), os.path.join(folder, name))
    ]

    for name in names:
        _check_name(folder, name)

    # 1. what is to be replaced, under another name: all of it or nothing
    added, previous = [], os.path.join(staging, PREVIOUS)
    os.mkdir(previous)
    for name in names:
        with open(os.path.join(staging, name), "rb") as file:
            os.fsync(file.fileno())
        if os.path.lexists(os.path.join(folder, name)):
            _keep(os.path.join(folder, name), os.path.join(previous, KEPT, name))
        else:
            added.append(name)
    write_json(os.path.join(previous, ADDED), {"added": added})
    _sync_folder(previous)
    os.rename(previous, os.path.join(folder, PREVIOUS))

    # 2. the new files, last the manifest
    try:
        _sync_folder(folder)
        for name in names:
            os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
            os.replace(os.path.join(staging, name), os.path.join(folder, name))
        for where in {os.path.dirname(os.path.join(folder, name)) for name in names}:
            _sync_folder(where)
        # 3. from here on they count
        os.rename(os.path.join(folder, PREVIOUS), previous)
    except BaseException:
        _restore(folder, staging)
        raise
    _sync_folder(folder)


def _restore(folder, staging):
    """Undoes a save that died; one that dies here as well leaves the rest to the next."""
    if not _is_torn(folder):
        return
    kept, added = _previous(folder)
    for name in added:
        if os.path.lexists(os.path.join(folder, name)):
            os.remove(os.path.join(folder, name))
    for name, path in kept.items():
        os.replace(path, os.path.join(folder, name))
    _sync_folder(folder)
    os.rename(os.path.join(folder, PREVIOUS), os.path.join(staging, PREVIOUS))
    # Not with the new files, should a save follow.
    shutil.rmtree(os.path.join(staging, PREVIOUS))


def _previous(folder):
    """Paths to the files that were replaced, by name, and the names of those that were not there."""
    previous = os.path.join(folder, PREVIOUS)
    try:
        # What a save leaves are folders; a link to one would let the next save move files of others.
        if any(os.path.islink(path) for path in (previous, os.path.join(previous, KEPT))):
            raise ValueError("it is a link")
        kept = {name: os.path.join(previous, KEPT, name) for name in _files(os.path.join(previous, KEPT))}
        content = read_json(os.path.join(previous, ADDED))
        added = content.get("added")
        if not isinstance(added, list) or not all(isinstance(name, str) for name in added):
            raise ValueError(f"{ADDED} has no list of names")
        for name in [*kept, *added]:
            _check_name(folder, name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{previous} holds no files of a save that died ({error}), although it is named so. Delete it, or save or download "
            "the bundle again."
        ) from None
    return kept, added


def _check_name(folder, name):
    """
    Raises:
        `ValueError`: if a save would not write a file of this name, or it lies outside the folder.
    """
    parts = name.split(os.sep)
    leads_out = os.path.isabs(name) or os.path.splitdrive(name)[0] or ".." in parts
    if leads_out or os.path.normpath(name) != name or name == "." or "\0" in name or parts[0] == PREVIOUS:
        raise ValueError(f"{shown(name)} is no name of a file of the folder")
    # Saves of a tokenizer write no weights: whoever has put some there since must not lose them.
    if name.endswith((".safetensors", ".bin", ".pt", ".gguf")) and not name.startswith("sid_"):
        raise ValueError(f"{shown(name)} is no file that a tokenizer saves")
    inner = [os.path.join(folder, *parts[:count]) for count in range(1, len(parts))]
    if any(os.path.islink(path) for path in inner):
        raise ValueError(f"{shown(name)} lies behind a link to another folder. Replace the link by a folder")
    if os.path.isdir(os.path.join(folder, name)) and not os.path.islink(os.path.join(folder, name)):
        raise ValueError(f"{shown(name)} is a folder there")


def _is_torn(folder):
    return isinstance(folder, str | os.PathLike) and os.path.lexists(os.path.join(folder, PREVIOUS))


def _files(folder):
    return [
        os.path.relpath(os.path.join(where, name), folder) for where, _, names in os.walk(folder) for name in names
    ]


def _is_same_file(path, other):
    return os.path.exists(other) and not os.path.islink(other) and os.path.samefile(path, other)


def _keep(path, other):
    os.makedirs(os.path.dirname(other), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.path.realpath(path), other)
        return
    try:
        os.link(path, other)
    except OSError:  # a disk that knows no links
        shutil.copyfile(path, other)
        with open(other, "rb") as file:
            os.fsync(file.fileno())


def _sync_folder(folder):
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
