"""Columns of strings as one array of bytes with offsets, and a hash index over them: nothing per string in Python."""

import numpy as np

HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
CHUNK_STRINGS = 1_000_000
MAX_ID_BYTES = 1024
# A lookup takes as many steps as strings share a hash. By chance hardly two do; by design any number can.
MAX_EQUAL_HASHES = 1024


def pack_strings(strings):
    """
    Args:
        strings (`list[str]`, `np.ndarray` of strings or `pyarrow` array of strings):
            The column. The bytes of an Arrow array are taken as they lie.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: the UTF-8 bytes of all strings end to end (uint8, shape (total,)), and where each
        begins (int64, shape (n + 1,)).

    Raises:
        `TypeError`: if an entry is not a string.
        `ValueError`: if a string cannot be written as UTF-8 (a lone surrogate).
    """
    if _is_arrow(strings):
        return _pack_arrow(strings)
    if isinstance(strings, np.ndarray):
        strings = strings.tolist()
    try:
        joined = "".join(strings)
    except TypeError:
        row, string = next((row, string) for row, string in enumerate(strings) if not isinstance(string, str))
        raise TypeError(
            f"{string!r} (row {row}) is {type(string).__name__}, not a string. Convert it, for instance with "
            "column.astype(str)."
        ) from None
    lengths = np.fromiter(map(len, strings), dtype=np.int64, count=len(strings))
    try:
        packed = joined.encode()
        if len(packed) > len(joined):  # not ASCII alone, so that characters and bytes differ
            lengths = np.fromiter((len(string.encode()) for string in strings), dtype=np.int64, count=len(strings))
    except UnicodeEncodeError:
        bad = next(string for string in strings if any("\ud800" <= character <= "\udfff" for character in string))
        raise ValueError(f"{bad!r} cannot be written as UTF-8 (surrogates not allowed). Clean the text.") from None
    return np.frombuffer(packed, dtype=np.uint8).copy(), _offsets_of(lengths)


def pack_product_ids(product_ids):
    """
    As [`pack_strings`], for ids: none may be empty or longer than 1,024 bytes.

    Raises:
        `TypeError`: if the ids are a single string or one is not a string.
        `ValueError`: if there is none, or one is empty, too long or not UTF-8.
    """
    if isinstance(product_ids, str | bytes):
        raise TypeError("product_ids must be a list of strings, got a single string.")
    if isinstance(product_ids, set | frozenset | dict) or not hasattr(product_ids, "__len__"):
        raise TypeError(
            f"product_ids must be a list of strings, got {type(product_ids).__name__}, which has no order to go with the codes'."
        )
    if len(product_ids) == 0:
        raise ValueError("product_ids is empty: a catalog needs at least one product.")
    packed, offsets = pack_strings(product_ids)
    lengths = np.diff(offsets)
    if lengths.min() == 0:
        raise ValueError(f"Product id in row {int(lengths.argmin())} is empty. Give every product an id.")
    if lengths.max() > MAX_ID_BYTES:
        raise ValueError(
            f"Product id in row {int(lengths.argmax())} takes {int(lengths.max())} bytes of UTF-8, more than the "
            f"{MAX_ID_BYTES} that an id may have. Use a shorter key, and keep long text in texts."
        )
    return packed, offsets


def index_strings(packed, offsets):
    """
    Returns:
        `tuple[np.ndarray, np.ndarray]`: the hashes of all strings, ascending, and the row of each. Shape of both: (n,).

    Raises:
        `ValueError`: if a string appears twice.
    """
    hashes = hash_rows(packed, offsets)
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    num_duplicates, first = find_repeated(hashes, order, packed, offsets)
    if num_duplicates:
        raise ValueError(
            f"Product id {unpack_strings(packed, offsets, [first])[0]!r} appears more than once ({num_duplicates} repetitions "
            "in all). Keep one row per product."
        )
    if (hashes[MAX_EQUAL_HASHES:] == hashes[:-MAX_EQUAL_HASHES]).any():
        raise ValueError(
            f"More than {MAX_EQUAL_HASHES} product ids have the same hash, which does not happen by chance, and would make "
            "lookups slow. Leave out ids that somebody made up for that."
        )
    return hashes, order


def find_repeated(hashes, order, packed, offsets):
    """
    Args:
        hashes (`np.ndarray`): Shape: (n,). The hashes of strings, ascending.
        order (`np.ndarray`): Shape: (n,). The row of each hash.
        packed, offsets (`np.ndarray`): The strings, see [`pack_strings`].

    Returns:
        `tuple[int, int]`: how many strings repeat one that lies `gap` places before them, for the first gap at which one does,
        and the row of one that is repeated; `(0, None)` if all differ.
    """
    # Equal strings have equal hashes and so lie in one run; runs are short.
    gap, same = 1, np.flatnonzero(hashes[1:] == hashes[:-1])
    while len(same) and gap < MAX_EQUAL_HASHES:
        equal = _equal_rows(packed, offsets, order[same], packed, offsets, order[same + gap])
        if equal.any():
            return int(equal.sum()), int(order[same[equal][0]])
        gap += 1
        same = same[same + gap < len(hashes)]
        same = same[hashes[same + gap] == hashes[same]]
    return 0, None


def unpack_strings(packed, offsets, rows):
    """
    Returns:
        `list[str]`: the strings of the given rows.

    Raises:
        `ValueError`: for rows that do not exist, and for strings that are not UTF-8.
    """
    rows = np.asarray(rows, dtype=np.int64)
    if len(rows) and (rows.min() < 0 or rows.max() >= len(offsets) - 1):
        raise ValueError(f"Rows must lie in [0, {len(offsets) - 1}), got {rows.min()} to {rows.max()}.")
    bounds = zip(offsets[rows].tolist(), offsets[rows + 1].tolist(), strict=True)
    try:
        return [packed[start:end].tobytes().decode() for start, end in bounds]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"A text or an id of the catalog is not UTF-8 ({error.reason}): its file was edited. Save or download it again."
        ) from None


def hash_rows(packed, offsets):
    """
    64-bit hash of each string: a polynomial in its 8-byte words and its length modulo 2^64, then mixed. A lookup compares the
    strings themselves, so that equal hashes cost time and never a wrong answer.

    Returns:
        `np.ndarray` (int64): Shape: (n,).
    """
    num_strings = len(offsets) - 1
    hashes = np.zeros(num_strings, dtype=np.uint64)
    for start in range(0, num_strings, CHUNK_STRINGS):
        bounds = np.asarray(offsets[start : start + CHUNK_STRINGS + 1])
        # Zeros behind the last string, so that a word may be read wherever a string begins or goes on.
        words = _words(np.concatenate([packed[bounds[0] : bounds[-1]], np.zeros(8, dtype=np.uint8)]))
        starts, lengths = bounds[:-1] - bounds[0], np.diff(bounds)
        rows, totals, factor = np.arange(len(lengths)), lengths.astype(np.uint64), 1
        while len(rows):
            factor = factor * int(HASH_MULTIPLIER) % 2**64
            word, left = words[starts[rows]], lengths[rows]
            cut = left < 8
            word[cut] &= (np.uint64(1) << (8 * left[cut]).astype(np.uint64)) - np.uint64(1)
            totals[rows] += word * np.uint64(factor)
            starts, lengths = starts + 8, lengths - 8
            rows = rows[left > 8]
        hashes[start : start + len(totals)] = totals
    hashes ^= hashes >> np.uint64(32)
    hashes *= HASH_MULTIPLIER
    hashes ^= hashes >> np.uint64(29)
    return hashes.view(np.int64)


def search_strings(strings, packed, offsets, sorted_hashes, order):
    """
    Looks strings up in a column with a hash index.

    Args:
        strings (`list[str]`, `np.ndarray` of strings or `pyarrow` array of strings):
            What to look up.
        packed, offsets (`np.ndarray`):
            The column, as [`pack_strings`] made it.
        sorted_hashes (`np.ndarray`): Shape: (n,). Its hashes, ascending.
        order (`np.ndarray`): Shape: (n,). The row of each hash.

    Returns:
        `np.ndarray` (int64): the row of each string, -1 if the column does not hold it.
    """
    if isinstance(strings, str | bytes):
        raise TypeError(f"Product ids must be a list of strings, got the single string {strings!r}.")
    return search_packed(*pack_strings(strings), packed, offsets, sorted_hashes, order)


def search_packed(wanted, wanted_offsets, packed, offsets, sorted_hashes, order):
    """As [`search_strings`], for strings that are packed already."""
    hashes = hash_rows(wanted, wanted_offsets)
    rows = np.full(len(hashes), -1, dtype=np.int64)
    # In ascending order, neighbouring searches take the same path through memory: eight times faster at ten million.
    open_queries = np.argsort(hashes)
    positions = np.searchsorted(sorted_hashes, hashes[open_queries])
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


def take_strings(packed, offsets, rows):
    """
    Returns:
        `tuple[np.ndarray, np.ndarray]`: bytes and offsets of the given rows, as [`pack_strings`].
    """
    lengths = offsets[rows + 1] - offsets[rows]
    taken = _offsets_of(lengths)
    return packed[np.repeat(offsets[rows] - taken[:-1], lengths) + np.arange(taken[-1])], taken


def _equal_rows(left, left_offsets, left_rows, right, right_offsets, right_rows):
    left_starts, right_starts = left_offsets[left_rows], right_offsets[right_rows]
    lengths = left_offsets[left_rows + 1] - left_starts
    equal = lengths == right_offsets[right_rows + 1] - right_starts

    # 1. eight bytes at a time; the last word of a string overlaps the one before
    rows = np.flatnonzero(equal & (lengths >= 8))
    if len(rows):
        left_words, right_words, at = _words(left), _words(right), 0
        while len(rows):
            offset = np.minimum(at, lengths[rows] - 8)
            same = left_words[left_starts[rows] + offset] == right_words[right_starts[rows] + offset]
            equal[rows[~same]] = False
            at += 8
            rows = rows[same & (lengths[rows] > at)]

    # 2. shorter strings byte by byte
    rows, at = np.flatnonzero(equal & (lengths > 0) & (lengths < 8)), 0
    while len(rows):
        same = left[left_starts[rows] + at] == right[right_starts[rows] + at]
        equal[rows[~same]] = False
        at += 1
        rows = rows[same & (lengths[rows] > at)]
    return equal


def _words(packed):
    """The eight bytes that begin at each position, as one number. Shape: (total - 7,)."""
    return np.ndarray((len(packed) - 7,), dtype="<u8", buffer=packed, strides=(1,))


def _offsets_of(lengths):
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _is_arrow(strings):
    return type(strings).__module__.split(".")[0] == "pyarrow"


def _pack_arrow(strings):
    if str(strings.type) not in ("string", "large_string"):
        raise TypeError(f"The Arrow column holds {strings.type}, not strings. Cast it: column.cast(pyarrow.string()).")
    if strings.null_count:
        raise TypeError(f"{strings.null_count} rows of the Arrow column are null, not strings. Fill or drop them.")
    chunks = strings.chunks if hasattr(strings, "chunks") else [strings]
    parts, lengths = [np.zeros(0, dtype=np.uint8)], [np.zeros(0, dtype=np.int64)]
    for chunk in chunks:
        try:
            chunk.validate(full=True)
        except ValueError as error:  # ArrowInvalid is one
            raise ValueError(f"The Arrow column is not valid ({error}). Clean the text: it must be UTF-8.") from None
        width = np.int64 if str(chunk.type) == "large_string" else np.int32
        _, bounds, data = chunk.buffers()
        if len(chunk) == 0:
            continue
        bounds = np.frombuffer(bounds, dtype=width)[chunk.offset : chunk.offset + len(chunk) + 1].astype(np.int64)
        if data is not None:
            parts.append(np.frombuffer(data, dtype=np.uint8)[bounds[0] : bounds[-1]])
        lengths.append(np.diff(bounds))
    return np.concatenate(parts), _offsets_of(np.concatenate(lengths))
