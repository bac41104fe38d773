"""Reading what a user has about a catalog: product ids, codes and purchases, from parquet, CSV, text and .npy files."""

from pathlib import Path

import numpy as np


def read_product_ids(path, column="product_id"):
    """
    Args:
        path (`str` or `os.PathLike`):
            A `.parquet` or `.csv` file with the column, a `.txt` file with one id a line, or a folder of
            `product_ids-*.parquet` files, read in the order of their names.
        column (`str`, *optional*, defaults to `"product_id"`):
            The column of a single file. In the files of a folder it is always `product_id`, whatever the catalog calls it.

    Returns:
        `pyarrow.Array` of large strings: the ids. Shape: (N,).

    Raises:
        `ValueError`: if the file or the column is missing, or an id is missing or occurs twice.
    """
    import pyarrow

    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("product_ids-*.parquet"))
        if not files:
            raise ValueError(f"The folder {path} holds no product_ids-*.parquet file. Name a file with the ids.")
        ids = pyarrow.chunked_array(
            [_id_column(_read_table(file, "product_id"), "product_id", file) for file in files]
        )
        ids = ids.combine_chunks()
    elif path.suffix == ".txt":
        ids = pyarrow.array(_read_lines(path), pyarrow.large_string())
    else:
        ids = _id_column(_read_table(path, column, (".parquet", ".csv", ".txt")), column, path)
    check_unique(ids, path)
    return ids


def read_codes(path, column="product_id"):
    """
    Args:
        path (`str` or `os.PathLike`):
            A `.npy` file of integers of shape (N, L), or a `.parquet` file with a list column `codes`, or else one
            integer column per layer, first layer first; the ids, if there are any, in `column`.
        column (`str`, *optional*, defaults to `"product_id"`):
            The column of the ids.

    Returns:
        `tuple[np.ndarray, pyarrow.Array or None]`: the codes, shape (N, L), and the ids, shape (N,), if there are any.

    Raises:
        `ValueError`: if the file is missing, is of another kind, holds no full integer codes, or names an id twice.
    """
    path = Path(path)
    _require_file(path)
    if path.suffix == ".npy":
        try:
            codes = np.load(path, mmap_mode="r")
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{path} is not a readable .npy file of numbers ({error}). Write it again.") from error
        if codes.ndim != 2 or codes.dtype.kind not in "iu":
            raise ValueError(
                f"{path} holds {codes.dtype} of shape {codes.shape}; codes are integers of shape (N, L): one row per "
                "product, one column per layer."
            )
        return _check_full(codes, path), None

    table = _read_table(path, column, (".parquet", ".npy"), kinds=(".parquet",))
    ids = None
    if column in table.column_names:
        ids = _id_column(table, column, path)
        check_unique(ids, path)
        table = table.drop_columns(column)
    if "codes" in table.column_names:
        return _check_full(_list_column(table.column("codes"), path), path), ids
    layers = []
    for name in table.column_names:
        values = table.column(name)
        if not _is_integer(values.type) or values.null_count:
            what = f"{values.null_count} empty entries" if values.null_count else str(values.type)
            raise ValueError(
                f"Column {name!r} of {path} holds {what}. Beside {column!r} the file needs either a list column "
                "'codes', or only integer columns, one per layer."
            )
        layers.append(values.to_numpy())
    if not layers:
        raise ValueError(f"{path} holds no codes: add a list column 'codes', or one integer column per layer.")
    return _check_full(np.stack(layers, axis=1), path), ids


def read_purchases(path, ids, column="product_id", count_column=None):
    """
    Adds up the purchases of each product.

    Args:
        path (`str` or `os.PathLike`):
            A `.parquet` or `.csv` file, one row a purchase, or with a count in `count_column`.
        ids (`pyarrow.Array`): Shape: (N,).
            The products.
        column (`str`, *optional*, defaults to `"product_id"`):
            The column of the ids.
        count_column (`str`, *optional*):
            The column of the counts. If not given, the column `count` where there is one; otherwise each row counts 1.

    Returns:
        `tuple[np.ndarray, float]`: purchases of each product, shape (N,), and the share of the purchases that name a
        product that is not in `ids`, which are left out.

    Raises:
        `ValueError`: if the file or the column is missing, a count is negative or no number, or no purchase names a
            product in `ids`.
    """
    import pyarrow.compute as compute

    table = _read_table(Path(path), column)
    bought = _id_column(table, column, path)
    if len(bought) == 0:
        raise ValueError(f"{path} holds no purchase. Pass a file with one row a purchase, or none.")
    counts = np.ones(len(bought))
    if count_column is not None and count_column not in table.column_names:
        raise ValueError(f"{path} has no column {count_column!r}, only {table.column_names}.")
    count_column = count_column or "count"
    if count_column in table.column_names:
        column_type = table.column(count_column).type
        if not _is_integer(column_type) and str(column_type) not in ("float", "double"):
            raise ValueError(f"Column {count_column!r} of {path} holds {column_type}; counts must be numbers.")
        counts = table.column(count_column).to_numpy().astype(np.float64)
        if not np.isfinite(counts).all() or (counts < 0).any():
            row = int(np.flatnonzero(~(np.isfinite(counts) & (counts >= 0)))[0])
            raise ValueError(f"{path} holds the count {counts[row]} in row {row}; counts must be numbers from 0.")
    rows = compute.index_in(bought, value_set=ids).fill_null(-1).to_numpy(zero_copy_only=False)
    known = rows >= 0
    weights = np.bincount(rows[known], counts[known], len(ids)).astype(np.float64)
    if known.any() and weights.sum() == 0:
        raise ValueError(
            f"Column {count_column!r} of {path} is 0 for every product of the catalog, so that nothing can be weighted by "
            "it. Pass another --count_column."
        )
    if not known.any():
        raise ValueError(
            f"None of the {len(bought)} rows of {path} is a purchase of one of the {len(ids)} products: it has ids such as "
            f"{bought[:3].to_pylist()}, the catalog {ids[:3].to_pylist()}. Pass purchases with the catalog's ids."
        )
    return weights, float(1 - counts[known].sum() / counts.sum())


def align_codes(codes, code_ids, ids, path):
    """
    Puts codes into the order of `ids`.

    Raises:
        `ValueError`: if the two do not name the same products.
    """
    import pyarrow.compute as compute

    if code_ids.equals(ids):
        return codes
    rows = compute.index_in(ids, value_set=code_ids)
    if rows.null_count or len(ids) != len(code_ids):
        raise ValueError(
            f"{path} holds {len(code_ids)} products and the embeddings have the ids of {len(ids)}, of which "
            f"{rows.null_count} have no codes. Pass codes and embeddings of the same products."
        )
    return codes[rows.to_numpy(zero_copy_only=False)]


def check_unique(ids, path):
    import pyarrow.compute as compute

    if len(ids) == 0:
        raise ValueError(f"{path} holds no product id. Pass the ids of the catalog, one per product.")
    if compute.count_distinct(ids).as_py() < len(ids):
        counted = ids.value_counts()
        repeated = counted.filter(compute.greater(counted.field("counts"), 1)).field("values")
        raise ValueError(
            f"{path} names {len(repeated)} products more than once, for instance {repeated[0].as_py()!r}: pass each "
            "product once."
        )


def _read_lines(path):
    _require_file(path)
    try:
        # Not splitlines, which would also cut an id at a rare separator that is part of it.
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}). Convert it.") from error
    if lines == [""]:
        return []
    if "" in lines:
        raise ValueError(f"Line {lines.index('') + 1} of {path} is empty: every line needs an id. Remove the line.")
    return lines


def _require_file(path):
    if not path.is_file():
        raise ValueError(f"There is no file {path}. Check the path.")


def _read_table(path, column, named=(".parquet", ".csv"), kinds=(".parquet", ".csv")):
    import pyarrow
    from pyarrow import csv, parquet

    _require_file(path)
    if path.suffix not in kinds:
        raise ValueError(f"Cannot read {path}: its name must end in {' or '.join(named)}.")
    try:
        if path.suffix == ".csv":
            # Ids stay text: as numbers they would lose leading zeros.
            return csv.read_csv(path, convert_options=csv.ConvertOptions(column_types={column: pyarrow.string()}))
        return parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable {path.suffix} file ({error}). Write it again.") from error


def _id_column(table, column, path):
    import pyarrow

    if column not in table.column_names:
        raise ValueError(
            f"{path} has no column {column!r}, only {table.column_names}. Name the column of the product ids: "
            "--id_column NAME."
        )
    ids = table.column(column)
    if pyarrow.types.is_dictionary(ids.type):  # what pandas makes of a categorical column
        ids = ids.cast(ids.type.value_type)
    if not _is_integer(ids.type) and str(ids.type) not in ("string", "large_string", "string_view"):
        raise ValueError(f"Column {column!r} of {path} holds {ids.type}; product ids must be text or whole numbers.")
    if ids.null_count:
        raise ValueError(f"Column {column!r} of {path} is empty in {ids.null_count} rows: every row needs an id.")
    ids = ids.cast(pyarrow.large_string()).combine_chunks()
    return ids if isinstance(ids, pyarrow.Array) else ids.chunk(0)


def _list_column(values, path):
    import pyarrow.compute as compute

    if not str(values.type).startswith(("list<", "large_list<", "fixed_size_list<")):
        raise ValueError(f"Column 'codes' of {path} holds {values.type}; it must hold lists of one integer per layer.")
    lengths = compute.value_counts(compute.list_value_length(values)).field("values").to_pylist()
    if len(lengths) != 1 or not lengths[0]:
        raise ValueError(
            f"The lists in column 'codes' of {path} have the lengths {lengths[:5]}; every product needs one code per "
            "layer. Pass the full codes that the quantizer gave, unpruned."
        )
    flat = compute.list_flatten(values)
    if not _is_integer(flat.type) or flat.null_count:
        raise ValueError(f"Column 'codes' of {path} holds {values.type} or empty entries; codes are whole numbers.")
    return flat.to_numpy().reshape(-1, lengths[0])


def _is_integer(arrow_type):
    return str(arrow_type).removeprefix("u") in ("int8", "int16", "int32", "int64")


def _check_full(codes, path):
    if len(codes) == 0 or codes.shape[1] == 0:
        raise ValueError(f"{path} holds no codes (shape {codes.shape}). Pass the codes of at least one product.")
    if codes.min() < 0:
        row = int(np.flatnonzero((codes < 0).any(1))[0])
        raise ValueError(
            f"{path} holds the code {int(codes[row].min())} in row {row}. Pass the full codes that the quantizer gave: what "
            "pruning costs can only be told from unpruned ones."
        )
    return codes.astype(np.int64)
