"""Reading what others have written: limits first, then types, and nothing is allocated for a number before it is checked."""

import json
import math
import os
import re
import reprlib
import stat

MAX_BYTES = 64 * 2**20
# JSON takes up to a hundred times its size in memory, which the number of its values bounds.
MAX_VALUES = 2_000_000
MAX_DEPTH = 32
# What the files of a bundle hold, in bytes per entry. Others are refused before torch sees them.
ITEM_BYTES = {"BOOL": 1, "U8": 1, "I16": 2, "I32": 4, "I64": 8, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120
_short.maxlong = 40


def shown(value):
    """A value from a file as an error message quotes it: short, whatever it is."""
    return _short.repr(value)


def is_whole(value, low, high):
    """Whether it is an integer in [low, high]; `True` and `1.0`, which equal one, are none."""
    return type(value) is int and low <= value <= high


def file_bytes(path):
    """
    Size of a file.

    Raises:
        `FileNotFoundError`: if there is none.
        `ValueError`: if it is no ordinary file, as a folder or a pipe, which would block.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{os.path.basename(path)} is no ordinary file. Save or download it again.")
    return status.st_size


def parse_json(data, max_values=MAX_VALUES):
    """
    As `json.loads`, for data of any origin.

    Args:
        data (`bytes`):
            UTF-8, without a byte order mark.
        max_values (`int`, *optional*, defaults to 2,000,000):
            Commas and opening brackets that are accepted, which bounds the memory that the result takes.

    Raises:
        `ValueError`: saying what is wrong: besides what is no JSON, a key that stands twice in one object, NaN, infinity and
            numbers beyond the range of floats, half a surrogate pair, more than `max_values`, or more than 32 levels.
    """
    num_values = sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if num_values > max_values:
        raise ValueError(f"{num_values} values are more than the {max_values} that are accepted")
    try:
        content = json.loads(
            data.decode(), object_pairs_hook=_object, parse_float=_finite, parse_constant=_no_constant
        )
    except RecursionError:
        raise ValueError(f"it is nested deeper than the {MAX_DEPTH} levels that are accepted") from None
    level, depth = [content], 0
    while level := [each for each in level if type(each) in (dict, list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than the {MAX_DEPTH} levels that are accepted")
        level = [inner for each in level for inner in (each.values() if type(each) is dict else each)]
    # Only an escape can write half a pair, which could be neither encoded nor printed.
    if re.search(rb"\\u[dD][89a-fA-F]", data):
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half a surrogate pair, which is no text") from None
    return content


def read_header(path):
    """
    The header of a safetensors file, checked before anything is mapped.

    Args:
        path (`str`): The file.

    Returns:
        `tuple[dict[str, tuple[str, list[int]]], dict[str, str]]`: type and shape of each tensor, and the metadata.

    Raises:
        `FileNotFoundError`: if there is no file.
        `ValueError`: saying what is wrong, without the name of the file.
    """
    size = file_bytes(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"its header ends behind its {size} bytes")
        if length > MAX_BYTES:
            raise ValueError(f"its header of {length} bytes is longer than the {MAX_BYTES} that are accepted")
        data = file.read(length)
    # Another process may have cut it since.
    header = parse_json(data) if len(data) == length else None
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are no texts")

    tensors, places, end = {}, [], size - 8 - length
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"its header describes {shown(name)} as {shown(entry)}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            raise ValueError(f"{shown(name)} holds {shown(dtype)}, none of {', '.join(ITEM_BYTES)}")
        # Sides of a tensor without entries count as well: nothing needs one that is longer than the file.
        if (
            not isinstance(shape, list)
            or len(shape) > 8
            or not all(is_whole(side, 0, size) for side in shape)
            or math.prod(max(1, side) for side in shape) > size
        ):
            raise ValueError(f"{shown(name)} has the shape {shown(shape)}, in a file of {size} bytes")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_whole(at, 0, end) for at in offsets):
            raise ValueError(f"{shown(name)} lies at {shown(offsets)}, outside the {end} bytes of the file")
        if offsets[1] - offsets[0] != math.prod(shape) * ITEM_BYTES[dtype]:
            raise ValueError(f"{shown(name)} of shape {shape} and type {dtype} does not take the bytes {offsets}")
        tensors[name] = dtype, shape
        places.append(offsets)
    at = 0
    for start, stop in sorted(places):
        if start != at:
            raise ValueError("its tensors overlap, or leave bytes between them")
        at = stop
    if at != end:
        raise ValueError(f"its tensors end at {at} of {end} bytes")
    return tensors, metadata


def _object(pairs):
    content = dict(pairs)
    if len(content) < len(pairs):
        seen = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {shown(twice)} stands twice in one object")
    return content


def _finite(text):
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {shown(text)} is beyond the range of floats")
    return number


def _no_constant(text):
    raise ValueError(f"{text} is no JSON")
