"""Columns of strings as one array of bytes with offsets, and a hash index over them: nothing per string in Python."""

import numpy as np

HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
CHUNK_STRINGS = 1_000_000


def check_product_ids(product_ids):
    """
    Raises:
        `TypeError`: if an id is not a string.
        `ValueError`: if there is none, one is empty, cannot be written as UTF-8, or appears twice.
    """
    if isinstance(product_ids, str):
        raise TypeError("product_ids must be a list of strings, got a single string.")
    if len(product_ids) == 0:
        raise ValueError("product_ids is empty: a catalog needs at least one product.")
    for row, product_id in enumerate(product_ids):
        if not isinstance(product_id, str):
            raise TypeError(
                f"Product id {product_id!r} (row {row}) is {type(product_id).__name__}; convert ids to str."
            )
        if not product_id:
            raise ValueError(f"Product id in row {row} is empty. Give every product an id.")
    if len(set(product_ids)) != len(product_ids):
        seen = set()
        duplicate = next(product_id for product_id in product_ids if product_id in seen or seen.add(product_id))
        raise ValueError(
            f"Product id {duplicate!r} appears more than once ({len(product_ids) - len(set(product_ids))} duplicates in "
            "all). Keep one row per product."
        )


def pack_strings(strings):
    """
    Returns:
        `tuple[np.ndarray, np.ndarray]`: the UTF-8 bytes of all strings end to end (uint8, shape (total,)), and where each
        begins (int64, shape (n + 1,)).

    Raises:
        `TypeError`: if an entry is not a string.
        `ValueError`: if a string cannot be written as UTF-8 (a lone surrogate).
    """
    for string in strings:
        if not isinstance(string, str):
            raise TypeError(
                f"{string!r} is {type(string).__name__}, not a string. Convert it, or pass an empty string."
            )
    try:
        encoded = [string.encode() for string in strings]
    except UnicodeEncodeError as error:
        raise ValueError(f"{error.object!r} cannot be written as UTF-8 ({error.reason}). Clean the text.") from None
    offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
    np.cumsum([len(string) for string in encoded], out=offsets[1:])
    return np.frombuffer(b"".join(encoded), dtype=np.uint8).copy(), offsets


def unpack_strings(packed, offsets, rows):
    """
    Returns:
        `list[str]`: the strings of the given rows.
    """
    rows = np.asarray(rows, dtype=np.int64)
    if len(rows) and (rows.min() < 0 or rows.max() >= len(offsets) - 1):
        raise ValueError(f"Rows must lie in [0, {len(offsets) - 1}), got {rows.min()} to {rows.max()}.")
    bounds = zip(offsets[rows].tolist(), offsets[rows + 1].tolist(), strict=True)
    return [packed[start:end].tobytes().decode() for start, end in bounds]


def hash_rows(packed, offsets):
    """
    64-bit polynomial hash of each string: sum of byte_i * m^(i+1) modulo 2^64, then mixed. A lookup compares the strings
    themselves, so that equal hashes cost time and never a wrong answer.

    Returns:
        `np.ndarray` (int64): Shape: (n,).
    """
    num_strings = len(offsets) - 1
    hashes = np.zeros(num_strings, dtype=np.uint64)
    longest = int(np.diff(offsets).max()) if num_strings else 0
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(longest, HASH_MULTIPLIER, dtype=np.uint64))
        for start in range(0, num_strings, CHUNK_STRINGS):
            bounds = np.asarray(offsets[start : start + CHUNK_STRINGS + 1])
            lengths = np.diff(bounds)
            position = np.arange(bounds[-1] - bounds[0]) - np.repeat(bounds[:-1] - bounds[0], lengths)
            terms = (packed[bounds[0] : bounds[-1]].astype(np.uint64) + np.uint64(1)) * powers[position]
            if len(terms):
                filled = np.flatnonzero(lengths)  # reduceat would give an empty string its neighbour's first term
                hashes[start + filled] = np.add.reduceat(terms, bounds[filled] - bounds[0])
        hashes ^= hashes >> np.uint64(32)
        hashes *= HASH_MULTIPLIER
        hashes ^= hashes >> np.uint64(29)
    return hashes.view(np.int64)


def search_strings(strings, packed, offsets, sorted_hashes, order):
    """
    Looks strings up in a column with a hash index.

    Args:
        strings (`list[str]`):
            What to look up.
        packed, offsets (`np.ndarray`):
            The column, as [`pack_strings`] made it.
        sorted_hashes (`np.ndarray`): Shape: (n,). Its hashes, ascending.
        order (`np.ndarray`): Shape: (n,). The row of each hash.

    Returns:
        `np.ndarray` (int64): the row of each string, -1 if the column does not hold it.
    """
    if isinstance(strings, str):
        raise TypeError(f"Product ids must be a list of strings, got the single string {strings!r}.")
    for string in strings:
        if not isinstance(string, str):
            raise TypeError(
                f"Product id {string!r} is {type(string).__name__}, not str. Convert ids first, for instance with "
                "column.astype(str)."
            )
    wanted, wanted_offsets = pack_strings(strings)
    hashes = hash_rows(wanted, wanted_offsets)
    rows = np.full(len(strings), -1, dtype=np.int64)
    open_queries = np.arange(len(strings))
    positions = np.searchsorted(sorted_hashes, hashes)
    while len(open_queries):
        # Only queries that still face an entry of their own hash go on; almost all are settled in the first round.
        in_range = positions < len(sorted_hashes)
        same_hash = in_range.copy()
        same_hash[in_range] = sorted_hashes[positions[in_range]] == hashes[open_queries[in_range]]
        open_queries, positions = open_queries[same_hash], positions[same_hash]
        candidates = np.asarray(order[positions], dtype=np.int64)
        equal = _equal_rows(wanted, wanted_offsets, open_queries, packed, offsets, candidates)
        rows[open_queries[equal]] = candidates[equal]
        open_queries, positions = open_queries[~equal], positions[~equal] + 1
    return rows


def _equal_rows(left, left_offsets, left_rows, right, right_offsets, right_rows):
    lengths = left_offsets[left_rows + 1] - left_offsets[left_rows]
    equal = lengths == right_offsets[right_rows + 1] - right_offsets[right_rows]
    same = np.flatnonzero(equal & (lengths > 0))
    if len(same):
        spans = lengths[same]
        starts = np.concatenate(([0], np.cumsum(spans)[:-1]))
        within = np.arange(spans.sum()) - np.repeat(starts, spans)
        left_bytes = left[np.repeat(left_offsets[left_rows[same]], spans) + within]
        right_bytes = right[np.repeat(right_offsets[right_rows[same]], spans) + within]
        equal[same] = np.logical_and.reduceat(left_bytes == right_bytes, starts)
    return equal
