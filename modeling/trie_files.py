"""Tries in safetensors files: written whole or not at all, mapped into memory, and checked before they are trusted."""

import json
import os
import tempfile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .trie_building import edge_layout, measure_levels

FORMAT_VERSION = 1
CHUNK = 2**20
MAX_CONFIG = 2**20  # three numbers a level, and levels are few
# Besides damage: numbers of thousands of digits, depths, and types and sides of tensors that torch does not have.
UNREADABLE = (
    SafetensorError,
    KeyError,
    ValueError,
    RecursionError,
    AttributeError,
    TypeError,
    RuntimeError,
    OverflowError,
)
TYPES = {
    "edges": (torch.int16, torch.int32),
    "indptr": (torch.int32, torch.int64),
    "leaf_rows": (torch.int32, torch.int64),
    "short_leaves": (torch.int32, torch.int64),
    "symbol_tokens": (torch.int64,),
    "product_mask": (torch.bool,),
}
NUMBERS = ("level_starts", "level_widths", "level_sizes", "catalog_version")


def write_trie(path, arrays, numbers) -> None:
    """
    Args:
        path (`str`): The file.
        arrays (`dict[str, torch.Tensor]`): The tensors of `TYPES`, the mask if there is one.
        numbers (`dict`): What `NUMBERS` names.
    """
    folder = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(prefix=os.path.basename(path) + ".", suffix=".tmp", dir=folder)
    os.close(handle)
    try:
        config = json.dumps({"format_version": FORMAT_VERSION, **numbers}, sort_keys=True)
        tensors = {name: array.detach().cpu().contiguous() for name, array in arrays.items()}
        save_file(tensors, temporary, metadata={"sid_trie": config})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def read_trie(path, catalog=None):
    """
    Args:
        path (`str`): The file.
        catalog ([`ProductCatalog`], *optional*): The catalog that the trie must belong to.

    Returns:
        `tuple[dict, dict]`: the tensors, which live in the mapped file, and the numbers.

    Raises:
        `ValueError`: if the file is no trie, is damaged, or belongs to another catalog.
    """
    name = os.path.basename(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{name} is no ordinary file. Save or download the trie again.")
    try:
        with safe_open(path, framework="pt") as file:
            config, found = (file.metadata() or {})["sid_trie"], set(file.keys())
            arrays = {key: file.get_tensor(key) for key in TYPES if key in found}
        if len(config) > MAX_CONFIG:
            raise ValueError(f"its configuration has {len(config)} characters")
        numbers = json.loads(config)
        if not isinstance(numbers, dict):
            raise ValueError(f"its configuration is a {type(numbers).__name__}")
    except UNREADABLE as error:
        raise ValueError(
            f"{name} is not a readable file of a SIDTrie ({error}): it is truncated or something else. Save or download it "
            f"again."
        ) from None
    version = numbers.pop("format_version", None)
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(
            f"{name} has another format than version {FORMAT_VERSION}, which is the only one known here. Save the trie again, "
            f"or update rqsid."
        )
    missing = [key for key in NUMBERS if key not in numbers] + sorted(set(TYPES) - {"product_mask"} - found)
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}: it was edited. Save the trie again.")
    strangers = sorted({*found, *numbers} - {*TYPES, *NUMBERS})
    if strangers:
        raise ValueError(f"{name} holds {strangers[0][:100]!r}, which no trie has. Save the trie again.")
    problem = find_damage(arrays, numbers)
    if problem is None and catalog is not None:
        if numbers["catalog_version"] != catalog.version_id:
            raise ValueError(
                f"{name} holds the trie of version {numbers['catalog_version']} of a catalog, the tokenizer's catalog has "
                f"version {catalog.version_id}: it would miss products or return withdrawn ones. Build it again with "
                f"`SIDTrie.from_tokenizer(tokenizer)`."
            )
        columns = catalog.columns
        if highest(arrays["leaf_rows"]) >= len(columns["sid_codes"]):
            problem = "a leaf has a row beyond the catalog"
        elif len(arrays.get("product_mask", columns["product_sids"])) != len(columns["product_sids"]):
            problem = "its mask is not one of the catalog's products"
    if problem is not None:
        raise ValueError(f"{name} is damaged: {problem}. Save or download it again.")
    return arrays, numbers


def find_damage(arrays, numbers):
    """
    What is wrong with the parts of a trie, or `None`. Some rows at a time, so that a mapped file stays mapped.

    Args:
        arrays (`dict[str, torch.Tensor]`): As [`write_trie`] takes them.
        numbers (`dict`): As [`write_trie`] takes them, of any content.
    """
    # 1. types and sizes
    for name, array in arrays.items():
        if array.dtype not in TYPES[name] or array.dim() != 1:
            return f"{name} is {array.dtype} of shape {tuple(array.shape)}"
    # Whoever counts booleans by their values runs beyond its arrays if these are others than 0 and 1.
    mask = arrays.get("product_mask")
    if mask is not None and len(mask) and mask.view(torch.uint8).max() > 1:
        return "product_mask holds other values than booleans"
    starts = numbers["level_starts"]
    if not isinstance(starts, list) or len(starts) < 3 or any(type(start) is not int for start in starts):
        return "level_starts is no list of integers for one level or more"
    num_roots, num_nodes, depth = starts[1], starts[-1], len(starts) - 2
    if starts[0] != 0 or any(first >= stop for first, stop in zip(starts[:-1], starts[1:], strict=True)):
        return "level_starts does not ascend from 0"
    edges, indptr, leaf_rows, short = (arrays[name] for name in ("edges", "indptr", "leaf_rows", "short_leaves"))
    symbol_tokens = arrays["symbol_tokens"]
    num_symbols, num_edges = len(symbol_tokens), num_nodes - num_roots
    edge_type, shift = edge_layout(num_symbols)
    if len(edges) != num_edges or len(indptr) != starts[depth] + 1:
        return f"{len(edges)} edges and {len(indptr)} offsets do not make {num_nodes} nodes"
    if num_edges > torch.iinfo(indptr.dtype).max:
        return f"{num_edges} edges are too many for offsets of {indptr.dtype}"
    if len(leaf_rows) != len(short) + starts[-1] - starts[-2]:
        return f"{len(leaf_rows)} rows for {len(short) + starts[-1] - starts[-2]} leaves"
    version = numbers["catalog_version"]
    if version is not None and not isinstance(version, str):
        return "catalog_version is no text"

    # 2. tokens
    if num_symbols == 0 or symbol_tokens.min() < 0 or len(symbol_tokens.unique()) < num_symbols:
        return "its tokens are negative or not distinct"
    if edges.dtype != getattr(torch, edge_type.__name__):
        return f"its edges are {edges.dtype} for {num_symbols} tokens"

    # 3. offsets: they ascend, and the children of one level are the next
    edges, indptr, leaf_rows, short = (array.numpy() for array in (edges, indptr, leaf_rows, short))
    for first, stop in zip(starts[:-1], starts[1:], strict=True):
        if first < starts[depth] and indptr[first] != stop - num_roots:
            return "the offsets do not follow the levels"
    num_leaves, at = 0, 0
    for start in range(0, starts[depth], CHUNK):
        bounds = indptr[start : start + CHUNK + 1]
        if (bounds[1:] < bounds[:-1]).any():
            return "the offsets do not ascend"
        leaves = start + np.flatnonzero(bounds[1:] == bounds[:-1])
        num_leaves += len(leaves)
        if num_leaves > len(short) or (short[at:num_leaves] != leaves).any():
            return "short_leaves are not the nodes without children"
        at = num_leaves
    if indptr[-1] != num_edges or num_leaves != len(short) or (len(short) and short[0] < num_roots):
        return "the offsets do not reach all edges, or a root has no children"

    # 4. edges: symbols that exist, ascending among the children of a node
    for start in range(0, num_edges, CHUNK):
        piece = edges[max(start - 1, 0) : start + CHUNK]
        if piece.min() < -shift or piece.max() >= num_symbols - shift:
            return "an edge has a token that does not exist"
        # Only the first child of a node may have a smaller symbol than the edge before.
        first = max(start, 1)
        # Of the type of the offsets, which would otherwise be converted, all of them.
        ends = np.array([first, first + len(piece) - 1], dtype=indptr.dtype)
        bounds = indptr[slice(*np.searchsorted(indptr, ends))]
        falls = piece[1:] <= piece[:-1]
        falls[bounds - first] = False
        if falls.any():
            return "the children of a node do not ascend"

    # 5. rows
    for start in range(0, len(leaf_rows), CHUNK):
        if leaf_rows[start : start + CHUNK].min() < 0:
            return "a leaf has a negative row"
    widths, sizes = numbers["level_widths"], numbers["level_sizes"]
    if not _are_counts(widths, depth) or not _are_counts(sizes, depth):
        return "level_widths and level_sizes are no lists of counts"
    own_widths, own_sizes = measure_levels(indptr, starts)
    if widths != own_widths or (num_roots == 1 and sizes != own_sizes):
        return "level_widths or level_sizes are not those of its nodes"
    if any(not own / num_roots <= size <= own for size, own in zip(sizes, own_sizes, strict=True)):
        return "level_sizes do not fit its levels"
    return None


def highest(array):
    """The largest number of an array, some rows at a time."""
    array = array.numpy()
    return max(int(array[start : start + CHUNK].max()) for start in range(0, len(array), CHUNK))


def _are_counts(values, length):
    return isinstance(values, list) and len(values) == length and all(type(value) is int for value in values)
