"""One file per catalog: written whole or not at all, never over somebody else's changes, and linked where nothing changed."""

import os
import re
import shutil
import tempfile
from contextlib import contextmanager

from .catalog_checks import check_catalog, check_columns
from .catalog_columns import COLUMNS
from .files import read_tensors, write_tensors
from .pruning import TokenPruning
from .untrusted import parse_json, read_header, shown

FORMAT_VERSION = 2
CONFIG = ("codebook_sizes", "suffix_size", "collisions", "capacity", "codebook_version", "history", "ancestors")


def save_catalog(catalog, path, overwrite=False):
    """See [`ProductCatalog.save`]."""
    folder, name = os.path.split(os.path.abspath(path))
    with lock_folder(folder) as locked:
        if not overwrite:
            check_successor(catalog, path)
        # Of saves that were killed, where nobody else can be saving now. The pattern is that of mkstemp.
        for other in os.listdir(folder) if locked else ():
            if re.fullmatch(re.escape(name) + r"\.[a-z0-9_]{8}\.tmp", other):
                remains = os.path.join(folder, other)
                if os.path.isfile(remains) or os.path.islink(remains):
                    os.remove(remains)
        write_catalog(catalog, path)


def write_catalog(catalog, path):
    """Writes the file, or links it to one that the catalog was read from or written to; nothing is checked."""
    path = os.path.abspath(path)
    source = unchanged_file(catalog)
    if source is None:
        config = {name: getattr(catalog, name) for name in CONFIG}
        config |= {"format_version": FORMAT_VERSION, "pruning": catalog.pruning.to_dict()}
        write_tensors(path, catalog.columns, config)
        catalog.file = describe(path)
        return
    if not (os.path.exists(path) and os.path.samefile(source, path)):
        _link(source, path)
    linked = describe(path)
    if linked["inode"] == catalog.file["inode"]:
        # Any of them may be deleted, a checkpoint for instance; those that remain are the same file.
        paths = catalog.file["paths"]
        if path not in paths:
            catalog.file = catalog.file | {"paths": [*paths[:1], *paths[1:][-6:], path]}


def unchanged_file(catalog, latest=True):
    """A path to the file that holds exactly this catalog, the `latest` of several or the first; `None` if there is none."""
    paths = catalog.file["paths"] if catalog.file else []
    for path in reversed(paths) if latest else paths:
        try:
            found = describe(path)
        except OSError:
            continue
        if all(catalog.file[key] == found[key] for key in ("bytes", "time", "inode", "device")):
            return path
    return None


def note_path(catalog, old, new):
    """Notes that the catalog's file was given another name."""
    if catalog.file is not None:
        old, new = os.path.abspath(old), os.path.abspath(new)
        paths = [new if path == old else path for path in catalog.file["paths"]]
        catalog.file = catalog.file | {"paths": list(dict.fromkeys(paths))}


def check_successor(catalog, path):
    """
    Raises:
        `ValueError`: if the file at `path` holds changes to this catalog that it does not know.
    """
    try:
        config = parse_json(read_header(path)[1]["config"].encode())
        there, last = [*config["ancestors"], *(entry["id"] for entry in config["history"])], config["history"][-1]
    except (OSError, KeyError, IndexError, TypeError, ValueError):
        return  # no catalog, or a damaged one: nothing that could be lost
    ours = [*catalog.ancestors, *(entry["id"] for entry in catalog.history)]
    if there[0] != ours[0] or there[-1] in ours:
        return
    what = (
        f"version {shown(last.get('version'))} of this catalog, and this is version {catalog.version}"
        if ours[-1] in there
        else "other changes to this catalog than this one has"
    )
    raise ValueError(
        f"{path} holds {what}: somebody saved it in the meantime, and saving would undo that. Load it, make your changes "
        "again and save, or save elsewhere. ProductCatalog.save(path, overwrite=True) replaces it all the same."
    )


def load_catalog(cls, path):
    """See [`ProductCatalog.load`]."""
    # Before it is read: should another take its place meanwhile, it is not taken for this one.
    file = describe(path) if os.path.exists(path) else None
    tensors, config = read_tensors(path, COLUMNS, exactly=True)
    name = os.path.basename(path)
    version = config.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(
            f"{name}: the catalog has format version {shown(version)}, this version of rqsid reads {FORMAT_VERSION}. Build it "
            "again, or install the version that wrote it."
        )
    missing = [key for key in (*CONFIG, "pruning") if key not in config]
    if missing:
        raise ValueError(f"{name}: the catalog lacks {', '.join(missing)}: it was edited. Save or download it again.")
    try:
        check_columns(tensors, config)
        columns = {column: tensor.numpy() for column, tensor in tensors.items()}
        catalog = cls(columns, config["codebook_sizes"], TokenPruning.from_dict(config["pruning"]))
        for key in CONFIG:
            setattr(catalog, key, config[key])
        check_catalog(catalog)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    catalog.file = file
    return catalog


def pickle_by_file(catalog):
    """
    What `__reduce__` returns for a catalog that lies in a file: another process on this machine maps the same file, rather
    than being sent all columns; `None` for one that does not.
    """
    # The first, so that a tokenizer's hash does not change when it is saved with a checkpoint.
    path = unchanged_file(catalog, latest=False)
    if path is None:
        return None
    return _load_unchanged, (type(catalog), path, catalog.file["bytes"], catalog.file["time"])


def _load_unchanged(cls, path, size, time):
    found = describe(path) if os.path.exists(path) else {}
    if (found.get("bytes"), found.get("time")) != (size, time):
        raise ValueError(
            f"{path}, which a pickled catalog refers to, is gone or has changed since. Load the catalog itself."
        )
    return load_catalog(cls, path)


@contextmanager
def lock_folder(folder):
    """
    Keeps other processes that save catalogs to this folder waiting; yields whether it does. The lock goes with the process,
    however it ends. Where there are no such locks (Windows, some network disks), two processes that save in the same instant
    are not told of each other.
    """
    try:
        import fcntl
    except ImportError:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(handle)


def describe(path):
    """What tells a file from another, and from what it was before."""
    path = os.path.abspath(path)
    stat = os.stat(path)
    return {
        "paths": [path],
        "bytes": stat.st_size,
        "time": stat.st_mtime_ns,
        "inode": stat.st_ino,
        "device": stat.st_dev,
    }


def _link(source, path):
    handle, temporary = tempfile.mkstemp(prefix=os.path.basename(path) + ".", suffix=".tmp", dir=os.path.dirname(path))
    os.close(handle)
    os.remove(temporary)
    try:
        try:
            # Not to a file behind a symbolic link, as the Hub's cache has them: who edits the copy must not change the cache.
            if os.path.islink(source):
                raise OSError
            os.link(source, temporary)
        except OSError:
            # Another disk, or one that knows no links.
            shutil.copyfile(source, temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
