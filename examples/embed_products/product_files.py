"""Reading products and (query, product) pairs from files, streamed, as checked Arrow tables of strings."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Features, Value, load_dataset

FORMATS = {"parquet": "parquet", "csv": "csv", "json": "json", "jsonl": "json", "txt": "text"}


def stream_products(path, id_column, text_columns, batch_rows):
    """
    Args:
        path (`str`):
            A parquet, CSV, JSON lines or text file, or a pattern of such files: all that `data_files` of
            `datasets.load_dataset` takes. In a text file, every line is a product's text, and the number of the line,
            counted from 1, its id.
        id_column (`str`):
            Column of the product ids.
        text_columns (`list[str]`):
            Columns of the texts, which are joined with a space. Empty cells are left out.
        batch_rows (`int`):
            Rows of every table but the last.

    Yields:
        `pyarrow.Table`: columns `product_id` and `text`, both strings.

    Raises:
        `ValueError`: if the file is of another format or empty, lacks a column, or has a row without id or text.
    """
    if _format(path) == "text":
        for start, table in _stream(path, ["text"], batch_rows):
            ids = pa.array(np.arange(start + 1, start + 1 + len(table))).cast(pa.string())
            text = _filled(_strings(table, "text", path), start, path, "the line is empty. Remove it")
            yield pa.table({"product_id": ids, "text": text})
        return
    if not text_columns:
        raise ValueError(
            f"{path} has columns: say which of them hold the text of a product, --text_columns title brand."
        )
    if len(set(text_columns)) < len(text_columns):
        raise ValueError(f"--text_columns {' '.join(text_columns)} names a column twice. Name each once.")
    columns = [id_column, *(column for column in text_columns if column != id_column)]
    for start, table in _stream(path, columns, batch_rows):
        ids = _filled(_ids(table, id_column, path), start, path, f"{id_column} is empty. Give every product an id")
        parts = [_strings(table, column, path) for column in text_columns]
        # The empty string in front: pyarrow 26 drops a row where all parts are null.
        text = pc.utf8_trim_whitespace(pc.binary_join_element_wise("", *parts, " ", null_handling="skip"))
        text = pc.if_else(pc.equal(text, ""), None, text)
        problem = (
            f"there is no text in {' or '.join(text_columns)}. Remove the product, or name another column as well"
        )
        yield pa.table({"product_id": ids, "text": _filled(text, start, path, problem)})


def stream_pairs(path, id_column, batch_rows=100_000):
    """
    As [`stream_products`], with the columns `query` and `product_id`.
    """
    if _format(path) == "text":
        raise ValueError(
            f"{path}: pairs have two columns, query and {id_column}; pass a parquet, CSV or JSON lines file."
        )
    for start, table in _stream(path, ["query", id_column], batch_rows):
        ids = _filled(_ids(table, id_column, path), start, path, f"{id_column} is empty. Remove the pair")
        query = _filled(_strings(table, "query", path), start, path, "query is empty. Remove the pair")
        yield pa.table({"query": query, "product_id": ids})


def check_unique(make_stream, path):
    """
    One pass over the products, before hours are spent on their embeddings. Needs 8 bytes a product.

    Args:
        make_stream (`Callable`):
            Gives a new iterator of [`stream_products`].
        path (`str`):
            For messages.

    Returns:
        `int`: the number of products.

    Raises:
        `ValueError`: as [`stream_products`], or if an id appears twice.
    """
    hashes = np.concatenate([hash_strings(table["product_id"]) for table in make_stream()])
    ordered = np.sort(hashes)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if len(repeated):
        # Equal hashes may still be of different ids.
        first_row, start = {}, 0
        for table in make_stream():
            for row in np.flatnonzero(np.isin(hash_strings(table["product_id"]), repeated)):
                product_id = table["product_id"][int(row)].as_py()
                if product_id in first_row:
                    raise ValueError(
                        f"{path}: product_id {product_id!r} of row {first_row[product_id]} appears again in row "
                        f"{start + row} (rows count from 0). Keep one row per product."
                    )
                first_row[product_id] = start + int(row)
            start += len(table)
    return len(hashes)


def hash_strings(column):
    """
    Returns:
        `np.ndarray` (uint64): the hash of each string, the same in every run. Shape: (n,).
    """
    return pd.util.hash_array(column.to_numpy(), categorize=False)


def _format(path):
    suffix = path.removesuffix(".gz").rsplit(".", 1)[-1].lower()
    if suffix not in FORMATS:
        raise ValueError(
            f"{path} has no suffix that says how to read it; files end with .{', .'.join(FORMATS)}. For a folder pass a "
            "pattern, such as 'folder/*.parquet'."
        )
    return FORMATS[suffix]


def _stream(path, columns, batch_rows):
    """Yields tables of `batch_rows` rows, each with the number of its first row."""
    kind = _format(path)
    source = {"data_files": path, "split": "train", "streaming": True}
    try:
        head = load_dataset(kind, **source)
        # Of a CSV or text file nothing is known until its first row is read.
        found = head.column_names or list(next(iter(head), {}))
    except pd.errors.EmptyDataError:
        found = []
    except (pa.ArrowInvalid, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as {kind} ({error}). Mend the file; text must be UTF-8.") from error
    if not found:
        raise ValueError(f"{path} holds no rows.")
    missing = [column for column in columns if column not in found]
    if missing:
        raise ValueError(
            f"{path} has no column {' or '.join(map(repr, missing))}, only {', '.join(map(repr, found))}. Rename the column, "
            "or name others with --id_column and --text_columns."
        )
    if kind == "csv":
        # As they stand in the file: left to itself, the reader makes 7 of the id 007 and nothing of the brand "None".
        features = Features({column: Value("string") for column in columns})
        rows = load_dataset(kind, features=features, usecols=columns, keep_default_na=False, **source)
    elif kind == "parquet":
        rows = load_dataset(kind, columns=columns, **source)
    else:
        rows = head.select_columns(columns)
    start = 0
    try:
        for table in rows.with_format("arrow").iter(batch_size=batch_rows):
            yield start, table
            start += len(table)
    except (pa.ArrowInvalid, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as {kind} ({error}). Mend the file; text must be UTF-8.") from error
    if start == 0:
        raise ValueError(f"{path} holds no rows.")


def _ids(table, name, path):
    kind = table[name].type
    if not any(is_kind(kind) for is_kind in (pa.types.is_integer, pa.types.is_null)) and not _is_string(kind):
        raise ValueError(
            f"{path}: column {name!r} holds {kind}, and ids must be strings or integers, so that the same product has the "
            "same id everywhere. Convert the column; floating-point ids often come of a missing one, json of mixed kinds."
        )
    ids = table[name].cast(pa.string())
    return pc.if_else(pc.equal(pc.utf8_trim_whitespace(ids), ""), None, ids)


def _strings(table, name, path):
    """A column as strings, and null where it holds nothing but white space."""
    column, kind = table[name], table[name].type
    if pa.types.is_floating(kind):
        column = pc.if_else(pc.is_nan(column), None, column)
    elif not (_is_string(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)):
        raise ValueError(
            f"{path}: column {name!r} holds {kind}, not text. Make it a string first, or name another column."
        )
    strings = pc.utf8_trim_whitespace(column.cast(pa.string()))
    return pc.if_else(pc.equal(strings, ""), None, strings)


def _is_string(kind):
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _filled(column, start, path, problem):
    if column.null_count:
        row = start + pc.index(pc.is_null(column), True).as_py()
        raise ValueError(f"{path}, row {row} (rows count from 0): {problem}.")
    return column
