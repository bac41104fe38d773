"""Saving several files as one: whoever loads finds all of the old ones or all of the new ones, whenever a save dies."""

import os
import shutil
import tempfile
from contextlib import contextmanager

from .catalog_file import check_successor, lock_folder
from .files import check_file

STAGING = ".sid_save-"
PREVIOUS = ".sid_previous"  # what a file is called while the one that takes its place waits for the manifest


@contextmanager
def staged_save(folder, catalog, catalog_name, manifest_name, read_manifest):
    """
    Yields a new folder inside `folder`. The files written there take the places of those in `folder` when the block ends
    without an error, the manifest last; otherwise nothing changes.

    Until the manifest is replaced, every other file that was replaced stays under another name, so that after a power cut in
    between [`recovered`] still finds what the old manifest describes.

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
        `ValueError`: if `folder` holds changes to this catalog that it does not know: somebody saved in the meantime.
    """
    os.makedirs(folder, exist_ok=True)
    with lock_folder(folder):
        check_successor(catalog, os.path.join(folder, catalog_name))
        for name in os.listdir(folder):
            if name.startswith(STAGING):  # of a save that was killed; nobody else is saving now
                shutil.rmtree(os.path.join(folder, name))
        staging = tempfile.mkdtemp(prefix=STAGING, dir=folder)
        try:
            yield staging
            _commit(staging, folder, manifest_name, read_manifest)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def recovered(folder, manifest_name, read_manifest):
    """
    Yields the folder to load from: `folder`, or, if a save to it died half-way, a temporary one of links to the files that
    the manifest describes.

    Args:
        folder (`str`):
            A local folder; anything else is yielded as it is.
        manifest_name (`str`)
        read_manifest (callable):
            Gives the manifest of a path.
    """
    if not _is_torn(folder, manifest_name, read_manifest):
        yield folder
        return
    with tempfile.TemporaryDirectory() as whole:
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if not name.startswith(STAGING) and not name.endswith(PREVIOUS):
                kept = path + PREVIOUS if os.path.exists(path + PREVIOUS) else path
                os.symlink(os.path.realpath(kept), os.path.join(whole, name))
        yield whole


def _commit(staging, folder, manifest_name, read_manifest):
    # 1. what an earlier save that died has left: its new files go, the old ones come back
    is_torn = _is_torn(folder, manifest_name, read_manifest)
    for name in _replaced_files(folder):
        path = os.path.join(folder, name)
        if is_torn:
            os.replace(path + PREVIOUS, path)
        else:
            os.remove(path + PREVIOUS)

    # 2. the new files: first those that the manifest vouches for, by which a torn save is known; last the manifest
    names = [
        os.path.relpath(os.path.join(where, name), staging) for where, _, files in os.walk(staging) for name in files
    ]
    names.sort(key=lambda name: (name == manifest_name, not name.startswith(("sid_", "tokenizer.json")), name))
    replaced = []
    for name in names:
        new, old = os.path.join(staging, name), os.path.join(folder, name)
        with open(new, "rb") as file:
            os.fsync(file.fileno())
        os.makedirs(os.path.dirname(old), exist_ok=True)
        if os.path.exists(old):
            if os.path.samefile(new, old):
                continue
            if name != manifest_name and os.path.dirname(name) == "":
                _keep(old, old + PREVIOUS)
                replaced.append(old + PREVIOUS)
        os.replace(new, old)
    _sync_folder(folder)
    for path in replaced:
        os.remove(path)


def _keep(path, other):
    try:
        os.link(path, other)
    except OSError:  # a disk that knows no links
        shutil.copyfile(path, other + ".tmp")
        os.replace(other + ".tmp", other)


def _is_torn(folder, manifest_name, read_manifest):
    """Whether files were replaced and the manifest was not."""
    if not isinstance(folder, str | os.PathLike) or not os.path.isdir(folder):
        return False
    replaced = _replaced_files(folder)
    if not replaced:
        return False
    try:
        entries = read_manifest(os.path.join(folder, manifest_name))["files"]
        for name in replaced:
            if name in entries:
                check_file(os.path.join(folder, name), entries[name])
    except (OSError, ValueError):
        return True
    return False


def _replaced_files(folder):
    return [name.removesuffix(PREVIOUS) for name in os.listdir(folder) if name.endswith(PREVIOUS)]


def _sync_folder(folder):
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
