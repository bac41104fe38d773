"""The arrays of a trie from SIDs in lexical order, in one pass and bounded memory."""

import numpy as np
import torch

# Rows that are looked at together: what is made for them stays in the processor's cache.
CHUNK_ROWS = 2**18
INT32_MAX = 2**31 - 1


class SIDClash(ValueError):
    """Two rows of which one is the beginning of the other, or equal to it."""

    def __init__(self, row, other):
        super().__init__(f"SIDs {row} and {other} are not prefix-free.")
        self.row, self.other = row, other


def index_type(largest):
    """The narrower of int32 and int64 that holds `largest`."""
    return np.int32 if largest <= INT32_MAX else np.int64


def lexical_order(columns, sizes):
    """
    Order of rows by their columns, the first column first.

    Args:
        columns (`list[np.ndarray]` of shape `(n,)` each): Numbers of at least -1, column by column.
        sizes (`list[int]`): Upper bound of each column, exclusive; below 2^31.

    Returns:
        `np.ndarray` of shape `(n,)`: Positions (int64), equal rows in the order they came in.
    """
    num_rows, order, stop = len(columns[0]), None, len(columns)
    row_bits = max(num_rows - 1, 1).bit_length()
    while stop:
        # From the last columns on, as many as fit into 63 bits beside the position: sorting such numbers in place is many
        # times as fast as finding the order of keys.
        first, limit = stop - 1, sizes[stop - 1] + 1
        while first and limit * (sizes[first - 1] + 1) <= 2 ** (63 - row_bits):
            first -= 1
            limit *= sizes[first] + 1
        keys = np.zeros(num_rows, dtype=np.int64)
        for column, size in zip(columns[first:stop], sizes[first:stop], strict=True):
            keys *= size + 1
            keys += column
            keys += 1
        if order is not None:
            keys = keys[order]
        keys <<= row_bits
        for start in range(0, num_rows, CHUNK_ROWS):
            keys[start : start + CHUNK_ROWS] |= np.arange(start, min(start + CHUNK_ROWS, num_rows))
        keys.sort()
        keys &= 2**row_bits - 1
        order = keys if order is None else order[keys]
        stop = first
    return order


def catalog_chunks(codes, order, live, columns, symbol_starts, sizes):
    """
    Yields the SIDs of a catalog as symbols, some rows at a time.

    Args:
        codes (`np.ndarray` of shape `(S, L + 1)`): Codes and suffixes, -1 where absent.
        order (`np.ndarray` of shape `(n,)` or `None`): The rows in the order wanted; as they come if `None`.
        live (`np.ndarray` of bool of shape `(S,)` or `None`): The rows to keep; all of them if `None`.
        columns (`list[int]`): The columns in the order of a SID's tokens.
        symbol_starts (`list[int]`): The symbol of code 0 of each of them.
        sizes (`list[int]`): Number of codes of each of them.

    Yields:
        `tuple[np.ndarray, np.ndarray, np.ndarray]`: Rows of shape `(c,)`; their symbols of shape `(levels, c)`, -1 behind
        the end of a SID; their lengths of shape `(c,)`.

    Raises:
        `ValueError`: if a code lies outside its layer, or a SID has none.
    """
    symbol_type = np.int16 if sum(sizes) <= 2**15 else np.int32
    for start in range(0, len(codes if order is None else order), CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, len(codes))
        rows = np.arange(start, stop) if order is None else order[start:stop]
        if live is not None:
            rows = rows[live[rows]]
        if len(rows) == 0:
            continue
        block = codes[rows]
        symbols = np.full((len(columns), len(rows)), -1, dtype=symbol_type)
        lengths = np.zeros(len(rows), dtype=np.int64)
        common = 0  # the length of all, as long as they have the same
        for column, first, size in zip(columns, symbol_starts, sizes, strict=True):
            values = block[:, column]
            if values.max() >= size or values.min() < -1:
                wrong = values.max() if values.max() >= size else values.min()
                raise ValueError(f"Column {column} of the codes holds {wrong}, but its layer has {size} codes.")
            present = values >= 0
            if common is not None and present.all():
                np.add(values, first, out=symbols[common], dtype=symbol_type)
                common += 1
                lengths += 1
            elif present.any():
                where = np.flatnonzero(present)
                symbols[lengths[where], where] = values[where].astype(symbol_type) + symbol_type(first)
                lengths += present
                common = None
        if not lengths.all():
            raise ValueError(f"The SID of row {int(rows[lengths.argmin()])} has no code at all.")
        yield rows, symbols, lengths


def sequence_chunks(symbols, order, rows):
    """
    Yields the rows of a matrix of symbols, as [`catalog_chunks`] does.

    Args:
        symbols (`np.ndarray` of shape `(n, levels)`): -1 behind the end of a SID.
        order (`np.ndarray` of shape `(n,)`): The positions in the order wanted.
        rows (`np.ndarray` of shape `(n,)`): What the leaves hold, by position.
    """
    for start in range(0, len(order), CHUNK_ROWS):
        positions = order[start : start + CHUNK_ROWS]
        block = np.ascontiguousarray(symbols[positions].T)
        yield rows[positions], block, (block >= 0).sum(0)


def build_arrays(chunks, num_levels, num_rows, num_symbols):
    """
    The trie of SIDs in lexical order.

    Level by level, a SID opens a new edge where its beginning differs from that of the SID before. So edges come out in
    breadth-first order within their level, and the first edge of a node is the number of edges that the next level had
    when the node was opened.

    Args:
        chunks (iterable): What [`catalog_chunks`] or [`sequence_chunks`] yields.
        num_levels (`int`): Tokens that a SID may have.
        num_rows (`int`): Upper bound of the rows, exclusive.
        num_symbols (`int`): Upper bound of the symbols, exclusive.

    Returns:
        `dict` or `None`: The parts of a trie, see [`join_levels`]; `None` if the rows are not in lexical order.

    Raises:
        [`SIDClash`]: if a SID is the beginning of another, or equal to it.
    """
    row_type, position_type = index_type(num_rows), index_type(num_rows)
    edge_type, shift = edge_layout(num_symbols)
    edges, starts, leaf_rows, short = ([[] for _ in range(num_levels)] for _ in range(4))
    counts = [0] * num_levels
    last_symbols, last_length, last_row = np.full((num_levels, 1), -2), np.full(1, -1), None
    for rows, symbols, lengths in chunks:
        before = np.concatenate([last_length, lengths[:-1]])
        opens = np.zeros(len(rows), dtype=bool)
        opened = None
        for level in range(num_levels):
            column = symbols[level]
            differs, descends = np.empty_like(opens), np.empty_like(opens)
            np.not_equal(column[1:], column[:-1], out=differs[1:])
            np.less(column[1:], column[:-1], out=descends[1:])
            differs[0], descends[0] = column[0] != last_symbols[level, 0], column[0] < last_symbols[level, 0]
            if (descends & ~opens).any():
                return None
            opens = opens | differs
            clash = ~opens & (before == level + 1)
            if clash.any():
                at = int(clash.argmax())
                raise SIDClash(int(rows[at - 1] if at else last_row), int(rows[at]))
            is_edge = opens & (column >= 0)
            passed = np.cumsum(is_edge, dtype=position_type)
            if level:
                starts[level - 1].append((counts[level] + passed - is_edge)[opened].astype(position_type))
            edges[level].append((column[is_edge] - shift).astype(edge_type))
            ends = np.flatnonzero(lengths == level + 1)
            leaf_rows[level].append(rows[ends].astype(row_type))
            if level + 1 < num_levels:
                short[level].append((counts[level] + passed[ends] - 1).astype(position_type))
            counts[level] += int(passed[-1])
            opened = is_edge
        last_symbols, last_length, last_row = symbols[:, -1:], lengths[-1:], rows[-1]
    return join_levels(edges, starts, leaf_rows, short, counts)


def edge_layout(num_symbols):
    """
    Type of edges, and what is taken off symbols so that they fit: int16 counts from -32768 where symbols need all of it.
    """
    if num_symbols > 2**16:
        return np.int32, 0
    return np.int16, 0 if num_symbols <= 2**15 else 2**15


def join_levels(edges, starts, leaf_rows, short, counts):
    """
    Joins lists of pieces, one list per level, emptying them on the way so that no more than a piece is held twice.

    Returns:
        `dict`: `edges` (one symbol per edge), `indptr` (the first edge of each node above the last level, and the number
        of edges), `leaf_rows` (the catalog's row of each leaf), `short_leaves` (the leaves above the last level): arrays in
        breadth-first order; and `level_starts` (the first node of each level, and the number of nodes), `level_widths` and
        `level_sizes` (see [`measure_levels`]).
    """
    depth = max(level for level, count in enumerate(counts, 1) if count)
    level_starts = [0, *(1 + int(total) for total in np.cumsum([0, *counts[:depth]]))]
    num_edges = level_starts[-1] - 1
    indptr = np.empty(level_starts[depth] + 1, dtype=index_type(num_edges))
    indptr[0], indptr[-1], at = 0, num_edges, 1
    for level in range(1, depth):
        first_edge = level_starts[level + 1] - 1
        for piece in _emptied(starts[level - 1]):
            np.add(piece, first_edge, out=indptr[at : at + len(piece)], casting="unsafe")
            at += len(piece)
    short_leaves = [
        level_starts[level + 1] + piece.astype(np.int64) for level in range(depth - 1) for piece in short[level]
    ]
    short_leaves = np.concatenate([np.zeros(0, dtype=np.int64), *short_leaves])
    widths, sizes = measure_levels(indptr, level_starts)
    return {
        "edges": _joined(edges[:depth], num_edges),
        "indptr": indptr,
        "leaf_rows": _joined(leaf_rows[:depth], sum(len(piece) for level in leaf_rows for piece in level)),
        "short_leaves": short_leaves.astype(index_type(level_starts[-1])),
        "level_starts": level_starts,
        "level_widths": widths,
        "level_sizes": sizes,
    }


def measure_levels(indptr, level_starts):
    """
    Largest number of children of a node, and number of nodes with children, at each depth above the last.

    Returns:
        `tuple[list[int], list[int]]`
    """
    widths, sizes = [], []
    for first, stop in zip(level_starts[:-2], level_starts[1:-1], strict=True):
        width, size = 0, 0
        for start in range(first, stop, CHUNK_ROWS):
            bounds = indptr[start : min(start + CHUNK_ROWS, stop) + 1]
            counts = bounds[1:] - bounds[:-1]
            width, size = max(width, int(counts.max())), size + int((counts > 0).sum())
        widths.append(width)
        sizes.append(size)
    return widths, sizes


def as_tensors(parts):
    """The arrays among the parts of a trie as tensors."""
    return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in parts.items()}


def _joined(levels, length):
    joined, at = None, 0
    for level in levels:
        for piece in _emptied(level):
            if joined is None:
                joined = np.empty(length, dtype=piece.dtype)
            joined[at : at + len(piece)] = piece
            at += len(piece)
    return joined


def _emptied(pieces):
    pieces.reverse()
    while pieces:
        yield pieces.pop()
