"""Cells of an experiment, each computed once: one JSON line each in `<out>/<experiment>.jsonl`, whatever happens meanwhile."""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from rqsid.sid_tokenizer.files import replace_atomically

LIBRARIES = ("torch", "transformers", "numpy", "rqsid")
# What quantizers' results depend on; other files of the checkout may change without making them others.
CODE = ("sid_tokenizer", "rqsid", "examples/study", "examples/quickstart", "examples/embed_products")
# Code of the project on which no result depends: tables are made from the cells.
NO_CODE = (
    ":!examples/study/*tables.py",
    ":!examples/study/*figures.py",
    ":!examples/study/training_comparisons.py",
    ":!*.md",
)


def run_cells(out, experiment, cells, compute, code=CODE, reuse=()):
    """
    Computes the cells that `<out>/<experiment>.jsonl` lacks, one after the other, and appends a line for each.

    A run that was killed goes on where it stopped: what it left of a last line is cut off. Cells that can be continued find
    what they saved in the folder that they get; it is removed when the cell is finished.

    Args:
        out (`str` or `os.PathLike`):
            Folder of results.
        experiment (`str`):
            Its name.
        cells (iterable of `dict`):
            Settings, JSON-able, `seed` among them. What a result depends on must be there, the data's digest included.
        compute (`Callable`):
            `compute(settings, checkpoint_dir)` gives the result, JSON-able.
        code (`tuple[str]`, *optional*):
            Folders of the checkout that results depend on; those of the quantizers if not given.
        reuse (`tuple[str]`, *optional*):
            Experiments whose cells are taken over, as they are, where their settings are the same.

    Returns:
        `int`: how many cells were computed; the others were there.

    Raises:
        `ValueError`: if another process computes the same experiment, a line of the file is damaged, or two cells have the
            same settings.
    """
    cells = list(cells)
    hashes = [cell_hash(settings) for settings in cells]
    if len(set(hashes)) < len(hashes):
        raise ValueError(f"Two cells of {experiment} have the same settings. Tell them apart by a setting.")
    path = Path(out) / f"{experiment}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _only_process(path):
        _repair(path)
        finished = {line["hash"] for line in read_cells(out, experiment)}
        missing = [(name, settings) for name, settings in zip(hashes, cells, strict=True) if name not in finished]
        known = {line["hash"]: line for other in reuse for line in read_cells(out, other)}
        for name, _ in missing:
            if name in known:
                _append(path, known[name] | {"experiment": experiment})
        missing = [(name, settings) for name, settings in missing if name not in known]
        for at, (name, settings) in enumerate(missing):
            checkpoint_dir = Path(out) / "checkpoints" / experiment / name
            started, cpu_started = time.perf_counter(), time.process_time()
            result = compute(settings, checkpoint_dir)
            line = {
                "experiment": experiment,
                "hash": name,
                "settings": settings,
                "seed": settings.get("seed"),
                "commit": commit(code),
                "versions": {library: importlib.metadata.version(library) for library in LIBRARIES},
                "cpu_seconds": round(time.process_time() - cpu_started, 2),
                "seconds": round(time.perf_counter() - started, 2),
                "result": result,
            }
            _append(path, line)
            shutil.rmtree(checkpoint_dir, ignore_errors=True)
            print(
                f"{experiment} {at + 1}/{len(missing)} {line['cpu_seconds']:.1f} s of CPU {_brief(settings)}",
                flush=True,
            )
    return len(missing)


def read_cells(out, experiment):
    """
    Returns:
        `list[dict]`: the finished cells, in the order of their settings rather than of the run; empty if there is no file.

    Raises:
        `ValueError`: if a line is damaged, but for a last one without an end, which is that of a run in progress.
    """
    path = Path(out) / f"{experiment}.jsonl"
    if not path.is_file():
        return []
    lines = {}
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            line = json.loads(text)
            intact = line["hash"] == cell_hash(line["settings"])
        except (ValueError, TypeError, KeyError):
            intact = False
        if not intact:
            raise ValueError(
                f"{path}, line {number}, is damaged or was edited. Remove the line; its cell is run again."
            )
        lines[line["hash"]] = line
    return sorted(lines.values(), key=lambda line: json.dumps(line["settings"], sort_keys=True))


def write_table(out, name, text):
    """
    Args:
        out (`str` or `os.PathLike`):
            Folder of results.
        name, text (`str`):
            Of the table: Markdown, written to `<out>/tables/<name>.md`.

    Returns:
        `str`: the file written.
    """
    path = Path(out) / "tables" / f"{name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")
    return str(path)


def cell_hash(settings):
    """The same for equal settings, in whatever order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]


@cache
def commit(code=CODE):
    """
    The commit of this checkout, with `+changes` if that code differs from it; `None` without git. Asked for once, at the
    start, since what runs is the code that was imported then.
    """
    root = Path(__file__).parents[2]

    def git(*arguments):
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        head = git("rev-parse", "--short=10", "HEAD").strip()
        return head + ("+changes" if git("status", "--porcelain", "--", *code, *NO_CODE).strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@contextmanager
def _only_process(path):
    with open(path.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"Another process computes {path.stem} in {path.parent}. Wait, or choose another --out."
            ) from None
        yield


def _append(path, line):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _repair(path):
    """Cuts off what a killed process left of its last line."""
    if not path.is_file():
        return
    with open(path, "rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _brief(settings):
    values = {key: value for key, value in settings.items() if not isinstance(value, dict)}
    return " ".join(f"{key}={value}" for key, value in values.items())
