"""What a catalog's file must hold before it is trusted: nothing that it says may lead to a wrong product, or out of bounds."""

import codecs

import numpy as np

from .checks import check_codes
from .sid_keys import digit_sizes, fits_key, sid_keys
from .strings import MAX_EQUAL_HASHES, MAX_ID_BYTES, find_repeated, hash_rows, take_strings
from .untrusted import is_whole, shown

LARGEST_CODEBOOK, LARGEST_NUM_LAYERS, LARGEST_COUNT = 2**24, 256, 2**62
CHUNK = 2**20
# Of so many ids the hashes are computed again. Where a catalog is larger, a sample has to do: a wrong hash hides its product
# from lookups, which whoever writes a catalog can have by leaving the product out, and leads nowhere else.
CHECKED_HASHES = 2**15
EDITED = "the file was edited. Save or download it again."
INT, CODE = (np.int32, np.int64), (np.int16, np.int32)
TYPES = {
    "product_id_bytes": (np.uint8,),
    "product_id_offsets": (np.int64,),
    "product_id_hashes": (np.int64,),
    "product_id_order": INT,
    "text_bytes": (np.uint8,),
    "text_offsets": (np.int64,),
    "product_codes": CODE,
    "product_sids": INT,
    "product_withdrawn": (np.bool_,),
    "popularity": (np.float64,),
    "sid_codes": CODE,
    "sid_order": INT,
    "sid_offsets": (np.int64,),
    "sid_products": INT,
    "withdrawn_log": INT,
    "popularity_log_rows": INT,
    "popularity_log_values": (np.float64,),
}


def check_sizes(codebook_sizes):
    """
    Raises:
        `ValueError`: if there is no layer, or more than 256, or one has no code, or more than 2^24.
    """
    sizes = codebook_sizes
    if not 1 <= len(sizes) <= LARGEST_NUM_LAYERS or not all(1 <= size <= LARGEST_CODEBOOK for size in sizes):
        raise ValueError(
            f"codebook_sizes={shown(list(sizes))} must be numbers of codes, one per layer, from 1 to {LARGEST_CODEBOOK}, of at "
            f"most {LARGEST_NUM_LAYERS} layers."
        )


def check_columns(tensors, config):
    """
    What has to hold before a catalog is made of the parts of a file.

    Args:
        tensors (`dict[str, torch.Tensor]`): The columns.
        config (`dict`): The rest, of any content.

    Raises:
        `ValueError`: for a column of another type or number of dimensions, and for sizes that are none.
    """
    for name, types in TYPES.items():
        tensor, names = tensors[name], [np.dtype(kind).name for kind in types]
        if str(tensor.dtype).removeprefix("torch.") not in names:
            found = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"Column {name} of the catalog holds {found}, not {names[0]}: {EDITED}")
        if tensor.dim() != (2 if name in ("product_codes", "sid_codes") else 1):
            raise ValueError(f"Column {name} of the catalog has shape {tuple(tensor.shape)}: {EDITED}")
    sizes, pruning = config["codebook_sizes"], config["pruning"]
    if (
        not isinstance(sizes, list)
        or not 1 <= len(sizes) <= LARGEST_NUM_LAYERS
        or not all(is_whole(size, 1, LARGEST_CODEBOOK) for size in sizes)
        or not isinstance(pruning, dict)
        or pruning.get("codebook_sizes") != sizes
    ):
        raise ValueError(f"The catalog's configuration does not fit its columns: {EDITED}")


def check_catalog(catalog):
    """
    Args:
        catalog ([`ProductCatalog`]):
            As it was read, of parts that [`check_columns`] lets pass.

    Raises:
        `ValueError`: if anything in it does not fit the rest.
    """
    _check_config(catalog)
    _check_shapes(catalog)
    _check_products(catalog)
    _check_index(catalog.columns)
    _check_versions(catalog)
    _check_sids(catalog)


def _check_config(catalog):
    history, ancestors = catalog.history, catalog.ancestors
    counts = ("version", "count", "products", "sids", "withdrawn", "withdrawn_log", "popularity_log")
    good = (
        is_whole(catalog.suffix_size, 0, LARGEST_CODEBOOK)
        and is_whole(catalog.capacity, 1, LARGEST_COUNT)
        and catalog.collisions in ("share", "suffix", "reassign")
        and (catalog.codebook_version is None or isinstance(catalog.codebook_version, str))
        and isinstance(ancestors, list)
        and all(isinstance(version_id, str) for version_id in ancestors)
        and isinstance(history, list)
        and len(history) > 0
        and all(
            isinstance(entry, dict)
            and isinstance(entry.get("id"), str)
            and isinstance(entry.get("change"), str)
            and all(is_whole(entry.get(key), 0, LARGEST_COUNT) for key in counts)
            for entry in history
        )
    )
    if good:
        growing = ("products", "sids", "withdrawn_log", "popularity_log")
        steps = [
            (before[key], after[key]) for before, after in zip(history, history[1:], strict=False) for key in growing
        ]
        numbers = [entry["version"] for entry in history]
        good = (
            all(before <= after for before, after in steps)
            and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
            and numbers[0] >= 1
            and history[0]["products"] >= 1
            and history[0]["sids"] >= 1
            and history[-1]["products"] == len(catalog)
            and history[-1]["sids"] == catalog.num_sids
        )
    if not good:
        raise ValueError(f"The catalog's configuration does not fit its columns: {EDITED}")


def _check_shapes(catalog):
    columns, num_products, num_sids = catalog.columns, len(catalog), catalog.num_sids
    base, last = catalog.history[0], catalog.history[-1]
    num_changes = last["popularity_log"] - base["popularity_log"]
    shapes = {
        "product_id_bytes": (columns["product_id_bytes"].size,),
        "product_id_offsets": (num_products + 1,),
        "product_id_hashes": (num_products,),
        "product_id_order": (num_products,),
        "text_bytes": (columns["text_bytes"].size,),
        "text_offsets": (1,) if columns["text_offsets"].shape == (1,) else (num_products + 1,),
        "product_codes": (num_products, catalog.num_layers),
        "product_sids": (num_products,),
        "product_withdrawn": (num_products,),
        "popularity": (num_products,),
        "sid_codes": (num_sids, catalog.num_layers + 1),
        "sid_order": (num_sids,),
        "sid_offsets": (num_sids + 1,),
        "withdrawn_log": (last["withdrawn_log"] - base["withdrawn_log"],),
        "popularity_log_rows": (num_changes,),
        "popularity_log_values": (num_changes,),
    }
    for name in TYPES:
        column = columns[name]
        if name in shapes and column.shape != shapes[name]:
            raise ValueError(f"Column {name} of the catalog has shape {column.shape}, expected {shapes[name]}.")
    # numpy counts and copies by the values of booleans, and so beyond its arrays if they are others than 0 and 1.
    if columns["product_withdrawn"].view(np.uint8).max() > 1:
        raise ValueError(f"Column product_withdrawn of the catalog holds other values than booleans: {EDITED}")
    num_listed = num_products - np.count_nonzero(columns["product_withdrawn"])
    if columns["sid_products"].shape != (num_listed,):
        raise ValueError(
            f"Column sid_products of the catalog does not list the {num_listed} products that are not withdrawn: {EDITED}"
        )
    for name in ("popularity", "popularity_log_values"):
        if not np.isfinite(columns[name]).all():
            raise ValueError(f"Column {name} of the catalog holds NaN or infinite values: {EDITED}")


def _check_products(catalog):
    columns, num_products, num_sids = catalog.columns, len(catalog), catalog.num_sids
    ends = {"product_id_order": num_products, "product_sids": num_sids, "sid_order": num_sids}
    ends |= {"sid_products": num_products, "withdrawn_log": num_products, "popularity_log_rows": num_products}
    for name, end in ends.items():
        column = columns[name]
        if len(column) and (column.min() < 0 or column.max() >= end):
            raise ValueError(f"Column {name} of the catalog points outside [0, {end}): {EDITED}")
    for name, end in (
        ("product_id_offsets", len(columns["product_id_bytes"])),
        ("text_offsets", len(columns["text_bytes"])),
        ("sid_offsets", len(columns["sid_products"])),
    ):
        offsets = columns[name]
        if offsets[0] != 0 or offsets[-1] != end or (offsets[1:] < offsets[:-1]).any():
            raise ValueError(f"Column {name} of the catalog is not a list of ascending offsets up to {end}: {EDITED}")
    _check_ids(columns["product_id_bytes"], columns["product_id_offsets"])
    for name in ("product_id_order", "sid_products"):
        seen = np.zeros(num_products, dtype=bool)
        seen[columns[name]] = True
        if np.count_nonzero(seen) < len(columns[name]):
            raise ValueError(f"Column {name} of the catalog names a row twice: {EDITED}")
    hashes, listed = columns["product_id_hashes"], columns["sid_products"]
    if (hashes[1:] < hashes[:-1]).any():
        raise ValueError(f"Column product_id_hashes of the catalog does not ascend: {EDITED}")
    of_sid = np.repeat(
        np.arange(num_sids, dtype=np.int32 if num_sids < 2**31 else np.int64), np.diff(columns["sid_offsets"])
    )
    if columns["product_withdrawn"][listed].any() or (columns["product_sids"][listed] != of_sid).any():
        raise ValueError(
            f"Column sid_products of the catalog lists products that are withdrawn or elsewhere: {EDITED}"
        )


def _check_ids(packed, offsets):
    """That each is UTF-8, not empty, and no longer than one may be."""
    for start in range(0, len(offsets) - 1, CHUNK):
        lengths = np.diff(offsets[start : start + CHUNK + 1])
        if lengths.min() < 1 or lengths.max() > MAX_ID_BYTES:
            raise ValueError(
                f"Column product_id_offsets of the catalog has an id of {lengths.min()} or {lengths.max()} bytes, where 1 to "
                f"{MAX_ID_BYTES} are allowed: {EDITED}"
            )
    chunks = [packed[start : start + 16 * CHUNK] for start in range(0, len(packed), 16 * CHUNK)]
    if all(chunk.max() < 128 for chunk in chunks):
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for chunk in chunks:
            decoder.decode(chunk.tobytes())
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"Column product_id_bytes of the catalog is not UTF-8 ({error.reason}): {EDITED}") from None
    # All bytes together are characters; an id that begins within one is none.
    if any(
        (packed[offsets[start : min(start + CHUNK, len(offsets) - 1)]] & 0xC0 == 0x80).any()
        for start in range(0, len(offsets) - 1, CHUNK)
    ):
        raise ValueError(f"Column product_id_offsets of the catalog parts a character in two: {EDITED}")


def _check_index(columns):
    """That equal hashes are few, that no two ids are equal, and that the hashes are those of the ids."""
    packed, offsets = columns["product_id_bytes"], columns["product_id_offsets"]
    hashes, order = columns["product_id_hashes"], columns["product_id_order"]
    if (hashes[MAX_EQUAL_HASHES:] == hashes[:-MAX_EQUAL_HASHES]).any():
        raise ValueError(
            f"Column product_id_hashes of the catalog has more than {MAX_EQUAL_HASHES} equal entries, which would make lookups "
            f"slow: {EDITED}"
        )
    if find_repeated(hashes, order, packed, offsets)[0]:
        raise ValueError(f"Columns product_id_… of the catalog hold one id twice: {EDITED}")
    places = np.arange(len(hashes))
    if len(places) > CHECKED_HASHES:
        places = np.unique(np.linspace(0, len(hashes) - 1, CHECKED_HASHES).astype(np.int64))
    ids = take_strings(packed, offsets, order[places].astype(np.int64))
    if (hash_rows(*ids) != hashes[places]).any():
        raise ValueError(f"Column product_id_hashes of the catalog holds other hashes than those of its ids: {EDITED}")


def _check_versions(catalog):
    """That the products of each version have SIDs of that version, and that as many are withdrawn as it says."""
    num_listed = len(catalog.columns["sid_products"])
    if len(catalog) - num_listed != catalog.history[-1]["withdrawn"]:
        raise ValueError(
            f"The catalog's history says that {catalog.history[-1]['withdrawn']} products are withdrawn, of {len(catalog)} "
            f"{num_listed} are not: {EDITED}"
        )
    product_sids, highest, first = catalog.columns["product_sids"], -1, 0
    for entry in catalog.history:
        if entry["products"] > first:
            highest, first = max(highest, int(product_sids[first : entry["products"]].max())), entry["products"]
        if highest >= entry["sids"]:
            raise ValueError(
                f"The catalog's history says {entry['sids']} SIDs in version {entry['version']}, of whose products one has SID "
                f"{highest}: {EDITED}"
            )


def _check_sids(catalog):
    columns, pruning = catalog.columns, catalog.pruning
    check_codes(columns["product_codes"], catalog.codebook_sizes)
    if columns["product_codes"].min() < 0:
        raise ValueError(f"Column product_codes of the catalog holds absent codes, which only SIDs may have: {EDITED}")
    check_codes(columns["sid_codes"], [*catalog.codebook_sizes, max(1, catalog.suffix_size)])
    for layer in range(catalog.num_layers):
        may_lack = pruning.num_pruned and layer == pruning.layer
        if not may_lack and (columns["sid_codes"][:, layer] < 0).any():
            raise ValueError(
                "Column sid_codes of the catalog holds absent codes in a layer that is not pruned, so that one SID could be "
                f"the beginning of another: {EDITED}"
            )
    if not catalog.suffix_size and columns["sid_codes"][:, -1].max() >= 0:
        raise ValueError(f"Column sid_codes of the catalog holds suffixes, of which it has none: {EDITED}")
    order = columns["sid_order"]
    sizes = digit_sizes(catalog.codebook_sizes, catalog.suffix_size)
    keys = sid_keys(columns["sid_codes"], sizes)[order]
    if (keys[1:] <= keys[:-1]).any():
        raise ValueError(f"Column sid_order of the catalog does not sort the SIDs, or one is there twice: {EDITED}")
    # Neighbours with the same codes differ in the suffix, and none of them may have no suffix.
    if catalog.suffix_size and fits_key(sizes):
        has_none = keys % sizes[-1] == 0
        meets = has_none[:-1] & (keys[1:] // sizes[-1] == keys[:-1] // sizes[-1])
    else:
        ordered = columns["sid_codes"][order]
        same = (ordered[1:, :-1] == ordered[:-1, :-1]).all(1)
        meets = same & ((ordered[1:, -1] < 0) | (ordered[:-1, -1] < 0))
    if meets.any():
        raise ValueError(
            f"Column sid_codes of the catalog holds a SID with and without a suffix, the one the beginning of the other: {EDITED}"
        )
