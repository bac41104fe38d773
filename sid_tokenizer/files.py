"""Reading and writing the files of a bundle: whole or not at all, and checked before they are trusted."""

import hashlib
import json
import os
import tempfile
from contextlib import contextmanager

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .untrusted import MAX_BYTES, MAX_VALUES, file_bytes, parse_json, read_header, shown


@contextmanager
def replace_atomically(path):
    """
    Yields a temporary name beside `path`; what was written there takes the place of `path` when the block ends without
    an error, and is removed otherwise.
    """
    folder = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(prefix=os.path.basename(path) + ".", suffix=".tmp", dir=folder)
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read; a model folder is usually shared.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def write_json(path, content):
    with replace_atomically(path) as temporary:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, sort_keys=True, ensure_ascii=False)
            file.write("\n")


def read_json(path, max_bytes=MAX_BYTES, max_values=MAX_VALUES):
    """
    Raises:
        `ValueError`: naming the file, if it is no JSON object that [`parse_json`] takes, or longer than `max_bytes`, or of more than
            `max_values`.
    """
    name, size = os.path.basename(path), file_bytes(path)
    if size > max_bytes:
        raise ValueError(f"{name} holds {size} bytes, more than the {max_bytes} that are accepted.")
    try:
        with open(path, "rb") as file:
            content = parse_json(file.read(size), max_values)
    except ValueError as error:
        raise ValueError(
            f"{name} is not valid JSON ({error}): it is truncated or was edited. Save or download it again."
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{name} must hold a JSON object, found {type(content).__name__}. Save or download it again.")
    return content


def write_tensors(path, arrays, config):
    """
    Writes numpy arrays or tensors and a JSON-able `config` into one safetensors file.
    """
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(array)) if isinstance(array, np.ndarray) else array.contiguous()
        for name, array in arrays.items()
    }
    with replace_atomically(path) as temporary:
        # One entry of metadata: safetensors writes several in random order, and equal content should make equal files.
        save_file(tensors, temporary, metadata={"config": json.dumps(config, sort_keys=True)})


def read_tensors(path, names, exactly=False):
    """
    Opens a file of [`write_tensors`] memory-mapped.

    Args:
        path (`str`):
            The file.
        names (`list[str]`):
            The tensors that the file must hold.
        exactly (`bool`, *optional*, defaults to `False`):
            Whether it must hold no others.

    Returns:
        `tuple[dict[str, torch.Tensor], dict]`: the tensors, which live in the mapped file, and the config.

    Raises:
        `ValueError`: if the file is truncated, is not safetensors, or lacks a tensor or its config.
    """
    file_name = os.path.basename(path)
    try:
        found, metadata = read_header(path)
        missing, strangers = sorted(set(names) - set(found)), sorted(set(found) - set(names)) if exactly else []
        if not (missing or strangers):
            if "config" not in metadata:
                raise ValueError("it has no config")
            config = parse_json(metadata["config"].encode())
            if not isinstance(config, dict):
                raise ValueError(f"its config is no JSON object but {type(config).__name__}")
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{file_name} is not a readable safetensors file of a bundle ({error}): it is truncated or was edited. "
            "Save or download it again."
        ) from None
    if missing:
        raise ValueError(f"{file_name} lacks {', '.join(missing)}: it was written by another version or edited.")
    if strangers:
        raise ValueError(
            f"{file_name} holds {shown(strangers[0])}, which this version of rqsid does not know. Install the version that "
            "wrote it, or save or download it again."
        )
    return tensors, config


def checksum(content):
    """SHA-256 of a JSON-able value, whatever its layout in a file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_entry(path):
    """Size in bytes and SHA-256 of a file, as a manifest holds them."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": os.path.getsize(path), "sha256": digest}


def check_file(path, entry):
    """
    Raises:
        `ValueError`: if the file differs from the manifest's `entry` in size or content.
    """
    name = os.path.basename(path)
    size = file_bytes(path)
    if size != entry["bytes"]:
        raise ValueError(
            f"{name} holds {size} bytes, the manifest says {entry['bytes']}: the file is truncated or belongs to another "
            "save. Save or download the bundle again."
        )
    if file_entry(path)["sha256"] != entry["sha256"]:
        raise ValueError(
            f"{name} differs from the file that the manifest describes (SHA-256): it was edited or belongs to another "
            "save. Save or download the bundle again."
        )
