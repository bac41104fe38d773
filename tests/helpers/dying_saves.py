"""Saves that die at a chosen call."""

import contextlib
import os
import shutil

from rqsid.sid_tokenizer import files
from rqsid.sid_tokenizer.files import file_entry

CATALOG, MANIFEST = "sid_catalog.safetensors", "sid_manifest.json"
# What a save does to the disk; `os.unlink` and `os.rmdir` are what rmtree does, too.
CALLS = ["replace", "rename", "link", "remove", "unlink", "rmdir", "mkdir", "fsync", "chmod", "open"]
LEFTOVERS = (".sid_save-", ".sid_previous", ".tmp")


@contextlib.contextmanager
def before_each_call(action):
    """
    Calls `action(number)` before each call of one of CALLS, and half-way through what safetensors writes. What the action calls
    itself does not count.
    """
    number, acting, real, real_save = 0, False, {name: getattr(os, name) for name in CALLS}, files.save_file

    def hooked(function):
        def call(*args, **kwargs):
            nonlocal number, acting
            if not acting:
                number, acting = number + 1, True
                try:
                    action(number)
                finally:
                    acting = False
            return function(*args, **kwargs)

        return call

    def save_half(tensors, path, metadata):
        real_save(tensors, path, metadata=metadata)
        with open(path, "rb") as file:
            content = file.read()
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
        os.stat(path)
        hooked(lambda: None)()
        with open(path, "wb") as file:
            file.write(content)

    try:
        for name, function in real.items():
            setattr(os, name, hooked(function))
        files.save_file = save_half
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)
        files.save_file = real_save


def copy(folder, other):
    """With its links, as a save that died leaves them."""
    copies = {}

    def copy_file(path, target, **kwargs):
        inode = os.stat(path).st_ino
        if inode in copies:
            os.link(copies[inode], target)
        else:
            shutil.copy2(path, target)
            copies[inode] = target

    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(folder, other, copy_function=copy_file)


def state(folder):
    """What a load or a save can see of a folder; what lies in a folder of new files is nobody's yet."""
    found = []
    for where, folders, names in os.walk(folder):
        if os.path.basename(where).startswith(LEFTOVERS[0]):
            folders.clear()
            continue
        found += [
            (os.path.relpath(os.path.join(where, name), folder), file_entry(os.path.join(where, name))["sha256"])
            for name in names
        ]
    return str(sorted(found))


def leftovers(folder):
    return [name for name in os.listdir(folder) if name.startswith(LEFTOVERS[0]) or name.endswith(LEFTOVERS[1:])]
