"""Catalogs as tables that other tools read: parquet, CSV and data sets, a row per product."""

import importlib
import io
import json
import os
from itertools import count, takewhile
from pathlib import Path

import numpy as np

from .files import replace_atomically
from .sid_tokens import layer_letter, layer_tokens

BATCH_ROWS = 65_536
DATASET_BATCH_ROWS = (
    1000  # a data set gathers rows in another order one by one, and joins few of them faster than many
)
CSV_BLOCK_BYTES = 2**26  # a row of a CSV file cannot be longer
METADATA_KEY = b"rqsid"
OPTIONAL = ("popularity", "text", "withdrawn")
KINDS = (
    "the path of a .parquet or .csv file or of a folder of .parquet shards, a pyarrow.Table, or a datasets.Dataset or "
    "IterableDataset"
)


def read_catalog_table(
    source, id_column="product_id", codes_column=None, popularity_column=None, text_column=None, withdrawn_column=None
):
    """
    Reads what a catalog is built from, in batches.

    Args:
        source (`str`, `os.PathLike`, `pyarrow.Table`, `datasets.Dataset` or `datasets.IterableDataset`):
            A row per product. A path is a `.parquet` file, a `.csv` file in UTF-8, or a folder of `.parquet` shards, which
            are read in the order of their names.
        id_column (`str`, *optional*, defaults to `"product_id"`):
            The column of the ids, text or whole numbers. In CSV they are text as it stands, `007` and `NA` included.
        codes_column (`str` or `list[str]`, *optional*):
            The full codes, before pruning: a column of lists with one whole number per layer, or the names of columns with
            one whole number each, first layer first. If not given, the column `codes`, or else `code_a`, `code_b`, ….
        popularity_column (`str`, *optional*):
            A number per product; if not given, the column `popularity` where there is one.
        text_column (`str`, *optional*):
            Text for display; if not given, the column `text` where there is one. An empty entry is an empty text.
        withdrawn_column (`str`, *optional*):
            Booleans; if not given, the column `withdrawn` where there is one.

    Returns:
        `dict`:
            - `product_ids` (`pyarrow.LargeStringArray`): Shape: (N,).
            - `codes` (`np.ndarray`, int32): Shape: (N, L).
            - `popularity` (`np.ndarray`, float64, or `None`): Shape: (N,).
            - `texts` (`pyarrow.LargeStringArray` or `None`): `None` where no product has a text, too. Shape: (N,).
            - `withdrawn` (`np.ndarray`, bool, or `None`): Shape: (N,).
            - `codebook_sizes` (`list[int]` or `None`): what a parquet file of [`write_catalog_table`] says of itself.

    Raises:
        `TypeError`: if `source` is of another kind.
        `ValueError`: if a file is missing, not readable or of another kind, a column is missing or there twice, holds other
            values than it should or empty ones, lists of codes differ in length, a code is negative, shards differ in
            their columns, or there is no row.
    """
    pyarrow, compute = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.compute")
    given = dict(zip(OPTIONAL, (popularity_column, text_column, withdrawn_column), strict=True))
    ids, codes, optional = [], [], {name: [] for name in OPTIONAL}
    columns, codebook_sizes, row = None, None, 0
    for where, names, metadata, read in _open_source(source):
        # 1. which columns hold what: in all shards the same
        found, sizes = _find_columns(names, where, id_column, codes_column, given), _read_metadata(metadata, where)
        if columns is not None and (found, sizes) != (columns, codebook_sizes):
            raise ValueError(
                f"{where} has the columns {list(names)} and the codebook sizes {sizes}, but {columns} were read from the "
                f"shards before it, with the sizes {codebook_sizes}. Keep the shards of one catalog in a folder of their own."
            )
        columns, codebook_sizes = found, sizes

        # 2. their values
        for table in read(columns):
            if table.num_rows == 0:
                continue
            ids.append(_strings(table, columns["id"], where, row))
            codes.append(_codes(table, columns["codes"], where, row))
            if codes[-1].shape[1] != codes[0].shape[1]:
                raise ValueError(
                    f"Row {row} of {where} has {codes[-1].shape[1]} codes, the rows before it have {codes[0].shape[1]}; every "
                    "product needs one code per layer. Pass the full codes that the quantizer gave, unpruned."
                )
            if columns["popularity"] is not None:
                optional["popularity"].append(_numbers(table, columns["popularity"], where, row))
            if columns["text"] is not None:
                optional["text"].append(_strings(table, columns["text"], where, row, is_text=True))
            if columns["withdrawn"] is not None:
                optional["withdrawn"].append(_booleans(table, columns["withdrawn"], where, row))
            row += table.num_rows
    if row == 0:
        raise ValueError(f"{where} holds no row. Pass the table of at least one product.")

    # 3. one array each
    texts = pyarrow.concat_arrays(optional["text"]) if optional["text"] else None
    if texts is not None and compute.max(compute.binary_length(texts)).as_py() == 0:
        texts = None
    return {
        "product_ids": pyarrow.concat_arrays(ids),
        "codes": np.concatenate(codes),
        "popularity": np.concatenate(optional["popularity"]) if optional["popularity"] else None,
        "texts": texts,
        "withdrawn": np.concatenate(optional["withdrawn"]) if optional["withdrawn"] else None,
        "codebook_sizes": codebook_sizes,
    }


def write_catalog_table(catalog, path):
    """
    Writes a row per product, withdrawn ones included, in batches, whole or not at all.

    [`read_catalog_table`] reads it, and building with the same codebook sizes, pruning and collisions gives an equal
    catalog, but for its versions. After `append`, or with suffixes `update_popularity`, `build` may give other SIDs than
    those that the products had and the table names.

    | column | parquet | CSV |
    |---|---|---|
    | `product_id` | string | the same |
    | `codes`: the full codes, before pruning | list of int32 | one column per layer: `code_a`, `code_b`, … |
    | `sid`: its tokens, first layer first, as `<a_1><c_3>` | string | the same |
    | `sid_codes`: a row of [`ProductCatalog.sid_codes`] | list of int32 | left out |
    | `popularity` | float64 | the shortest number that reads back as the same float64 |
    | `text` | string | the same |
    | `withdrawn` | bool | `true` or `false` |

    In CSV all text is in quotes, so that it holds any text, line breaks too; a reader that turns `NA` into a missing value
    even there has to be told not to (in pandas, `dtype={"product_id": str}, keep_default_na=False`). A parquet file also
    holds the codebook sizes, in its metadata.

    Args:
        catalog ([`ProductCatalog`]):
            What to write.
        path (`str` or `os.PathLike`):
            File name, ending in `.parquet` or `.csv`.

    Raises:
        `ValueError`: if the name ends otherwise.
    """
    suffix = Path(path).suffix
    if suffix not in (".parquet", ".csv"):
        raise ValueError(f"Cannot write {os.fspath(path)}: its name must end in .parquet or .csv.")
    with replace_atomically(path) as temporary:
        schema = _schema(catalog, has_lists=suffix == ".parquet")
        if suffix == ".parquet":
            writer = importlib.import_module("pyarrow.parquet").ParquetWriter(temporary, schema)
        else:
            writer = importlib.import_module("pyarrow.csv").CSVWriter(temporary, schema)
        with writer:
            for table in _tables(catalog, schema):
                writer.write_table(table)


def catalog_to_dataset(catalog):
    """
    Args:
        catalog ([`ProductCatalog`]):
            What to convert.

    Returns:
        `datasets.Dataset`: a row per product, with the columns that [`write_catalog_table`] writes into parquet, in memory.
    """
    pyarrow, datasets = importlib.import_module("pyarrow"), importlib.import_module("datasets")
    return datasets.Dataset(pyarrow.concat_tables(_tables(catalog, _schema(catalog, has_lists=True))))


def _schema(catalog, has_lists):
    pyarrow = importlib.import_module("pyarrow")
    number, numbers, text = pyarrow.int32(), pyarrow.list_(pyarrow.int32()), pyarrow.string()
    layers = [(f"code_{layer_letter(layer)}", number) for layer in range(catalog.num_layers)]
    columns = [("product_id", text), *([("codes", numbers)] if has_lists else layers), ("sid", text)]
    columns += [("sid_codes", numbers)] if has_lists else []
    columns += [("popularity", pyarrow.float64()), ("text", text), ("withdrawn", pyarrow.bool_())]
    metadata = {METADATA_KEY: json.dumps({"codebook_sizes": catalog.codebook_sizes})}
    return pyarrow.schema(columns, metadata=metadata)


def _tables(catalog, schema):
    """The catalog in tables of bounded size."""
    pyarrow, compute = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.compute")
    tokens = [
        pyarrow.array(layer, pyarrow.string()) for layer in layer_tokens(catalog.codebook_sizes, catalog.suffix_size)
    ]
    for start in range(0, len(catalog), BATCH_ROWS):
        rows = np.arange(start, min(start + BATCH_ROWS, len(catalog)))
        codes = np.asarray(catalog.codes[rows], dtype=np.int32)
        sid_codes = np.asarray(catalog.sid_codes[catalog.sid_rows(rows)], dtype=np.int32)
        spelled = [
            layer.take(pyarrow.array(column, mask=column < 0))
            for layer, column in zip(tokens, sid_codes.T, strict=True)
        ]
        columns = {
            "product_id": catalog.product_ids(rows),
            "codes": _lists(codes),
            **{f"code_{layer_letter(layer)}": column for layer, column in enumerate(codes.T)},
            "sid": compute.binary_join_element_wise(*spelled, "", null_handling="skip"),
            "sid_codes": _lists(sid_codes),
            "popularity": catalog.popularity[rows],
            "text": catalog.texts(rows),
            "withdrawn": catalog.withdrawn[rows],
        }
        yield pyarrow.table([columns[name] for name in schema.names], schema=schema)


def _lists(matrix):
    pyarrow = importlib.import_module("pyarrow")
    offsets = np.arange(len(matrix) + 1, dtype=np.int32) * matrix.shape[1]
    return pyarrow.ListArray.from_arrays(offsets, np.ascontiguousarray(matrix).ravel())


def _open_source(source):
    """
    Yields for each shard what to call it, the names of its columns, its metadata, and a function from the columns of
    [`_find_columns`] to tables of bounded size.
    """
    pyarrow = importlib.import_module("pyarrow")
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"The folder {path} holds no .parquet file. Pass {KINDS}.")
        for file in files:
            if not file.is_file():
                raise ValueError(f"There is no file or folder {file}. Pass {KINDS}.")
            if file.suffix not in (".parquet", ".csv"):
                raise ValueError(f"Cannot read {file}: its name must end in .parquet or .csv.")
            yield _open_csv(file) if file.suffix == ".csv" else _open_parquet(file)
    elif isinstance(source, pyarrow.Table):

        def slices(columns):
            for start in range(0, source.num_rows, BATCH_ROWS):
                yield source.slice(start, BATCH_ROWS).select(_names(columns))

        yield "the table", source.column_names, source.schema.metadata, slices
    elif isinstance(source, dict):
        raise TypeError(f"source has the splits or keys {list(source)}. Pass one of them, or {KINDS}.")
    elif hasattr(source, "column_names") and hasattr(source, "select_columns"):
        names = source.column_names
        if names is None:  # a stream tells them with its first row
            first = next(iter(source.with_format("arrow").iter(batch_size=1)), None)
            if first is None:
                raise ValueError("the data set holds no row. Pass the data set of at least one product.")
            names = first.column_names

        def batches(columns):
            # Formatted batches respect the order and the choice of rows that a data set keeps beside its table.
            return source.select_columns(_names(columns)).with_format("arrow").iter(batch_size=DATASET_BATCH_ROWS)

        yield "the data set", names, None, batches
    else:
        raise TypeError(
            f"source is {type(source).__name__}; pass {KINDS}. A data frame converts with pyarrow.Table.from_pandas(frame)."
        )


def _open_parquet(path):
    pyarrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")

    def read(columns):
        try:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(BATCH_ROWS, columns=_names(columns)):
                    yield pyarrow.Table.from_batches([batch])
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} is not a readable .parquet file ({error}). Write it again.") from error

    try:
        schema = parquet.read_schema(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable .parquet file ({error}). Write it again.") from error
    return str(path), schema.names, schema.metadata, read


class _CSVFile(io.FileIO):
    """
    A file whose pieces never end between a carriage return and its line feed: Arrow drops a line feed at the beginning of
    the next piece, even one that is part of a text in quotes (github.com/apache/arrow/issues/51368).
    """

    def read(self, size=-1):
        piece = super().read(size)
        if len(piece) > 1 and piece.endswith(b"\r"):
            following = super().read(1)
            self.seek(-len(following), os.SEEK_CUR)
            if following == b"\n":
                self.seek(-1, os.SEEK_CUR)
                piece = piece[:-1]
        return piece


def _open_csv(path):
    pyarrow, csv = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.csv")
    options = {
        "read_options": csv.ReadOptions(block_size=CSV_BLOCK_BYTES),
        "parse_options": csv.ParseOptions(newlines_in_values=True),
    }

    def read(columns):
        # Types are said, not guessed: guessed ones lose the zeros of 007, and change where a block ends.
        types = {columns["id"]: pyarrow.large_string()}
        types |= {name: pyarrow.int64() for name in columns["codes"]}
        kinds = {"popularity": pyarrow.float64(), "text": pyarrow.large_string(), "withdrawn": pyarrow.bool_()}
        types |= {columns[name]: kind for name, kind in kinds.items() if columns[name] is not None}
        convert = csv.ConvertOptions(column_types=types, include_columns=list(types))
        try:
            with _CSVFile(path) as file, csv.open_csv(file, convert_options=convert, **options) as reader:
                for batch in reader:
                    yield pyarrow.Table.from_batches([batch])
        except pyarrow.ArrowInvalid as error:
            raise ValueError(
                f"{path} is not a readable .csv file of a catalog ({error}). It must be in UTF-8, with ids as text and one "
                "column of whole numbers per layer."
            ) from error

    try:
        with _CSVFile(path) as file, csv.open_csv(file, **options) as reader:
            names = reader.schema.names
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a readable .csv file ({error}). Write it again, in UTF-8.") from error
    return str(path), names, None, read


def _find_columns(names, where, id_column, codes_column, given):
    """Returns the column of the ids, those of the codes, and the optional ones, `None` where there is none."""
    names = list(names)
    if id_column not in names:
        raise ValueError(
            f"{where} has no column {id_column!r}, only {names}. Name the column of the product ids: id_column=…."
        )
    if codes_column is None:
        layers = list(takewhile(names.__contains__, (f"code_{layer_letter(layer)}" for layer in count())))
        later = [name for name in names for layer in range(100) if name == f"code_{layer_letter(layer)}"]
        if "codes" not in names and set(later) - set(layers):
            missing = f"code_{layer_letter(len(layers))}"
            raise ValueError(f"{where} has the columns {later}, but no {missing!r}. Add it, or pass codes_column=[…].")
        codes = ["codes"] if "codes" in names else layers
    else:
        codes = [codes_column] if isinstance(codes_column, str) else list(codes_column)
    if not codes:
        raise ValueError(
            f"{where} has neither a column 'codes' nor columns 'code_a', 'code_b', …, only {names}. Name what holds the "
            "codes: codes_column=…."
        )
    found = {"id": id_column, "codes": codes}
    found |= {name: given[name] or (name if name in names else None) for name in OPTIONAL}
    for name in _names(found):
        if names.count(name) != 1:
            what = (
                f"no column {name!r}, only {names}" if name not in names else f"{names.count(name)} columns {name!r}"
            )
            raise ValueError(f"{where} has {what}. Name one that is there once.")
    return found


def _names(columns):
    optional = [columns[name] for name in OPTIONAL if columns[name] is not None]
    return list(dict.fromkeys([columns["id"], *columns["codes"], *optional]))


def _read_metadata(metadata, where):
    content = (metadata or {}).get(METADATA_KEY)
    if content is None:
        return None
    try:
        return [int(size) for size in json.loads(content)["codebook_sizes"]]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{where} holds metadata that cannot be read: {content[:100]!r}. Write it again.") from None


def _column(table, name, where, row, required=True):
    """The values of a column as one array without empty entries, if they are `required`."""
    pyarrow, compute = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.compute")
    column = table.column(name).combine_chunks()
    if pyarrow.types.is_dictionary(column.type):  # what pandas makes of a categorical column
        column = column.cast(column.type.value_type)
    if required and column.null_count:
        first = row + compute.index(column.is_null(), True).as_py()
        raise ValueError(
            f"Column {name!r} of {where} is empty in {column.null_count} rows, the first of them row {first}. Fill them, or "
            "leave these products out."
        )
    return column


def _strings(table, name, where, row, is_text=False):
    pyarrow, compute = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.compute")
    column = _column(table, name, where, row, required=not is_text)
    allowed = str(column.type) in ("string", "large_string", "string_view")
    if (
        not allowed
        and not pyarrow.types.is_null(column.type)
        and (is_text or not pyarrow.types.is_integer(column.type))
    ):
        what = "texts must be text" if is_text else "product ids must be text or whole numbers"
        raise ValueError(
            f"Column {name!r} of {where} holds {column.type}; {what}. Convert the column, or name another."
        )
    return compute.fill_null(column.cast(pyarrow.large_string()), "")


def _numbers(table, name, where, row):
    pyarrow = importlib.import_module("pyarrow")
    column, types = _column(table, name, where, row), pyarrow.types
    if not (types.is_integer(column.type) or types.is_floating(column.type) or types.is_decimal(column.type)):
        raise ValueError(f"Column {name!r} of {where} holds {column.type}; popularity is a number per product.")
    return column.cast(pyarrow.float64(), safe=False).to_numpy(zero_copy_only=False)


def _booleans(table, name, where, row):
    column = _column(table, name, where, row)
    if str(column.type) != "bool":
        raise ValueError(
            f"Column {name!r} of {where} holds {column.type}; it must say true or false of each product. Convert the column, "
            "or name another: withdrawn_column=…."
        )
    return column.to_numpy(zero_copy_only=False)


def _codes(table, names, where, row):
    """The codes as a matrix. Shape: (n, L)."""
    pyarrow, compute = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.compute")
    layers = [_column(table, name, where, row) for name in names]
    types = pyarrow.types
    if len(layers) == 1 and (
        types.is_list(layers[0].type)
        or types.is_large_list(layers[0].type)
        or types.is_fixed_size_list(layers[0].type)
    ):
        lengths = compute.unique(compute.list_value_length(layers[0])).to_pylist()
        if len(lengths) > 1 or lengths == [0]:
            raise ValueError(
                f"The lists in column {names[0]!r} of {where} have the lengths {sorted(lengths)[:5]}; every product needs one "
                "code per layer. Pass the full codes that the quantizer gave, unpruned."
            )
        layers = [compute.list_flatten(layers[0])]
    for name, layer in zip(names, layers, strict=True):
        if not types.is_integer(layer.type) or layer.null_count:
            what = f"lists with {layer.null_count} empty entries" if layer.null_count else layer.type
            raise ValueError(f"Column {name!r} of {where} holds {what}; codes are whole numbers.")
    codes = np.stack([layer.to_numpy() for layer in layers], axis=1).reshape(table.num_rows, -1)
    outside = (codes < 0) | (codes >= 2**31)
    if outside.any():
        at, layer = (int(index[0]) for index in np.nonzero(outside))
        raise ValueError(
            f"Row {row + at} of {where} has the code {codes[at, layer]}; codes count from 0. Pass the full codes that the "
            "quantizer gave, unpruned."
        )
    return codes.astype(np.int32)
