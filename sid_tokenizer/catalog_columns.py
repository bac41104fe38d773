"""The columns of a catalog: how they are made, and made anew after a change. Nothing in them is ever changed in place."""

import hashlib

import numpy as np

from .sid_keys import digit_sizes, group_rows, rank_in_groups, sid_keys
from .strings import index_strings, pack_strings

COLUMNS = (
    "product_id_bytes",  # uint8 [total]: the UTF-8 of all product ids, end to end
    "product_id_offsets",  # int64 [N + 1]: where each id begins
    "product_id_hashes",  # int64 [N]: hashes of the ids, ascending
    "product_id_order",  # int32/int64 [N]: the product row of each hash
    "text_bytes",  # uint8 [total]: texts for display, as the ids
    "text_offsets",  # int64 [N + 1], or [1] if no product has a text
    "product_codes",  # int16/int32 [N, L]: the quantizer's codes, before pruning
    "product_sids",  # int32/int64 [N]: the SID row of each product
    "product_withdrawn",  # bool [N]
    "popularity",  # float64 [N]
    "sid_codes",  # int16/int32 [S, L + 1]: codes of each SID, -1 where absent; the last column is the suffix, -1 for none
    "sid_order",  # int32/int64 [S]: SID rows in the order of their keys
    "sid_offsets",  # int64 [S + 1]: where the products of each SID begin in sid_products
    "sid_products",  # int32/int64 [n]: the product rows that are not withdrawn, grouped by SID, most popular first
    "withdrawn_log",  # int32/int64 [W]: rows that were withdrawn or restored, in the order of the changes
    "popularity_log_rows",  # int32/int64 [C]: rows whose popularity changed, in the order of the changes
    "popularity_log_values",  # float64 [C]: what it was before
)


def row_type(num_rows):
    return np.int32 if num_rows < 2**31 else np.int64


def code_type(sizes):
    return np.int16 if max(sizes) < 2**15 else np.int32


def first_columns(packed_ids, codes, sids, codebook_sizes, suffix_size, popularity, texts):
    """
    Columns of a new catalog.

    Args:
        packed_ids (`tuple[np.ndarray, np.ndarray]`):
            What [`pack_product_ids`] gives.
        texts: What [`pack_strings`] takes, or `None`.
        codes (`np.ndarray`): Shape: (N, L).
        sids (`np.ndarray`): Shape: (N, L + 1).
        codebook_sizes (`list[int]`)
        suffix_size (`int`)
        popularity (`np.ndarray`): Shape: (N,).

    Returns:
        `dict[str, np.ndarray]`
    """
    num_products = len(codes)
    id_bytes, id_offsets = packed_ids
    hashes, order = index_strings(id_bytes, id_offsets)
    text_bytes, text_offsets = (np.zeros(0, np.uint8), np.zeros(1, np.int64)) if texts is None else pack_strings(texts)
    sizes = digit_sizes(codebook_sizes, suffix_size)
    keys = sid_keys(sids, sizes)
    product_sids, first = group_rows(keys)
    rows = row_type(num_products)
    withdrawn = np.zeros(num_products, dtype=bool)
    sid_offsets, sid_products = group_products(product_sids, popularity, withdrawn, len(first))
    return {
        "product_id_bytes": id_bytes,
        "product_id_offsets": id_offsets,
        "product_id_hashes": hashes,
        "product_id_order": order.astype(rows),
        "text_bytes": text_bytes,
        "text_offsets": text_offsets,
        "product_codes": np.array(codes, dtype=code_type(sizes), order="C"),
        "product_sids": product_sids.astype(rows),
        "product_withdrawn": withdrawn,
        "popularity": popularity,
        "sid_codes": np.ascontiguousarray(sids[first], dtype=code_type(sizes)),
        "sid_order": np.arange(len(first), dtype=rows),
        "sid_offsets": sid_offsets,
        "sid_products": sid_products.astype(rows),
        "withdrawn_log": np.zeros(0, dtype=rows),
        "popularity_log_rows": np.zeros(0, dtype=rows),
        "popularity_log_values": np.zeros(0, dtype=np.float64),
    }


def added_columns(columns, id_bytes, id_offsets, index, codes, sids, codebook_sizes, suffix_size, popularity, texts):
    """
    Columns with more products behind those that there are; rows of products and SIDs keep their numbers.

    Args:
        columns (`dict[str, np.ndarray]`):
            The columns so far.
        id_bytes, id_offsets (`np.ndarray`):
            The packed new ids, m of them.
        index (`tuple[np.ndarray, np.ndarray]`):
            Their hashes and rows, what [`index_strings`] gives.
        codes, sids, popularity, texts: As for [`first_columns`]. Shape: (m, …).

    Returns:
        `dict[str, np.ndarray]`
    """
    num_before, num_added = len(columns["product_sids"]), len(codes)
    rows = row_type(num_before + num_added)
    new = dict(columns)

    # 1. strings and their index; the two runs of hashes are each ascending, which the stable sort merges
    new["product_id_bytes"], new["product_id_offsets"] = _join_strings(columns, "product_id", id_bytes, id_offsets)
    hashes = np.concatenate([columns["product_id_hashes"], index[0]])
    merged = np.argsort(hashes, kind="stable")
    new["product_id_hashes"] = hashes[merged]
    new["product_id_order"] = np.concatenate([columns["product_id_order"], index[1] + num_before])[merged].astype(rows)
    if texts is not None or len(columns["text_offsets"]) > 1:
        if len(columns["text_offsets"]) == 1:
            columns = columns | {"text_offsets": np.zeros(num_before + 1, np.int64)}
        packed = pack_strings([""] * num_added if texts is None else texts)
        new["text_bytes"], new["text_offsets"] = _join_strings(columns, "text", *packed)

    # 2. SIDs: those that exist keep their row, new ones follow
    sizes = digit_sizes(codebook_sizes, suffix_size)
    sorted_keys = sid_keys(columns["sid_codes"], sizes)[columns["sid_order"]]
    groups, first = group_rows(sid_keys(sids, sizes))
    wanted = sid_keys(sids[first], sizes)
    position = np.minimum(np.searchsorted(sorted_keys, wanted), len(sorted_keys) - 1)
    is_known = sorted_keys[position] == wanted
    sid_rows = np.where(is_known, columns["sid_order"][position], 0).astype(np.int64)
    num_sids = len(columns["sid_codes"])
    sid_rows[~is_known] = num_sids + np.arange((~is_known).sum())
    new["sid_codes"] = np.concatenate([columns["sid_codes"], sids[first[~is_known]].astype(code_type(sizes))])
    keys = np.concatenate([sorted_keys, wanted[~is_known]])
    order = np.concatenate([columns["sid_order"], sid_rows[~is_known]])
    new["sid_order"] = order[np.argsort(keys, kind="stable")].astype(rows)

    # 3. products
    joined = {
        "product_codes": codes.astype(code_type(sizes)),
        "product_sids": sid_rows[groups],
        "product_withdrawn": np.zeros(num_added, dtype=bool),
        "popularity": popularity,
    }
    for name, values in joined.items():
        new[name] = np.concatenate([columns[name], values])
    new["product_sids"] = new["product_sids"].astype(rows)
    return regrouped(new)


def regrouped(columns):
    """Columns whose lists of products by SID follow the others."""
    offsets, products = group_products(
        columns["product_sids"], columns["popularity"], columns["product_withdrawn"], len(columns["sid_codes"])
    )
    return columns | {"sid_offsets": offsets, "sid_products": products.astype(row_type(len(columns["product_sids"])))}


def group_products(product_sids, popularity, withdrawn, num_sids):
    """
    Returns:
        `tuple[np.ndarray, np.ndarray]`: where the products of each SID begin, int64 of shape (S + 1,); and the product rows
        that are not withdrawn, grouped by SID, most popular first, ties in the order of the rows.
    """
    offsets = np.zeros(num_sids + 1, dtype=np.int64)
    if withdrawn.any():
        live = np.flatnonzero(~withdrawn)
        _, order = rank_in_groups(product_sids[live], popularity[live])
        np.cumsum(np.bincount(product_sids[live], minlength=num_sids), out=offsets[1:])
        return offsets, live[order]
    _, order = rank_in_groups(product_sids, popularity)
    np.cumsum(np.bincount(product_sids, minlength=num_sids), out=offsets[1:])
    return offsets, order


def columns_at(columns, entry, base):
    """
    Columns as they were at an earlier version: rows are only ever appended, and the logs tell what else changed.

    Args:
        columns (`dict[str, np.ndarray]`):
            The columns now.
        entry, base (`dict`):
            The history's entries of the version wanted, and of the oldest version that the logs reach back to.

    Returns:
        `dict[str, np.ndarray]`
    """
    num_products, num_sids = entry["products"], entry["sids"]
    num_withdrawn = entry["withdrawn_log"] - base["withdrawn_log"]
    num_popularity = entry["popularity_log"] - base["popularity_log"]
    old = dict(columns)

    withdrawn = columns["product_withdrawn"][:num_products].copy()
    toggled = columns["withdrawn_log"][num_withdrawn:]
    withdrawn ^= np.bincount(toggled, minlength=num_products)[:num_products] % 2 == 1
    popularity = columns["popularity"][:num_products].copy()
    rows, values = columns["popularity_log_rows"][num_popularity:], columns["popularity_log_values"][num_popularity:]
    known = rows < num_products
    # The oldest entry holds the value wanted: rows repeat, and it is the last value written that stays.
    popularity[rows[known][::-1]] = values[known][::-1]
    old |= {"product_withdrawn": withdrawn, "popularity": popularity}
    old["withdrawn_log"] = columns["withdrawn_log"][:num_withdrawn]
    for name in ("popularity_log_rows", "popularity_log_values"):
        old[name] = columns[name][:num_popularity]

    for name in ("product_codes", "product_sids"):
        old[name] = columns[name][:num_products]
    kept = columns["product_id_order"] < num_products
    for name in ("product_id_hashes", "product_id_order"):
        old[name] = columns[name][kept]
    for name in ("product_id", "text"):
        if len(columns[f"{name}_offsets"]) > 1:
            old[f"{name}_offsets"] = columns[f"{name}_offsets"][: num_products + 1]
            old[f"{name}_bytes"] = columns[f"{name}_bytes"][: old[f"{name}_offsets"][-1]]
    old["sid_codes"] = columns["sid_codes"][:num_sids]
    old["sid_order"] = columns["sid_order"][columns["sid_order"] < num_sids]
    return regrouped(old)


def content_hash(*arrays):
    """16 hexadecimal digits of the contents of arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:16]


def _join_strings(columns, name, packed, offsets):
    before = columns[f"{name}_offsets"]
    return (
        np.concatenate([columns[f"{name}_bytes"], packed]),
        np.concatenate([before, offsets[1:] + before[-1]]),
    )
