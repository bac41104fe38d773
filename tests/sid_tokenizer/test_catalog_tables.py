import csv
import os

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from rqsid import ProductCatalog, TokenPruning
from rqsid.sid_tokenizer import catalog_tables
from rqsid.sid_tokenizer.catalog_tables import catalog_to_dataset, read_catalog_table, write_catalog_table

AWKWARD = [
    "007",
    "7",
    "NA",
    "null",
    "None",
    "nan",
    "true",
    "1e5",
    "-",
    '"',
    '""',
    "'",
    ",",
    ";",
    "\t",
    " ",
    "\n",
    "\r",
]
AWKWARD += [
    "\r\n",
    "\0",
    "\\",
    "\\N",
    "a,b",
    'q"q',
    "a\nb",
    " a ",
    "😀",
    "e\u0301",
    "\ufeff",
    "\u2028",
    "\x85",
    "\x1a",
    "#a",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


@st.composite
def catalogs(draw):
    """A catalog, and what it was built with besides the table."""
    texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5) | st.sampled_from(AWKWARD)
    ids = draw(st.lists(texts.filter(bool), min_size=1, max_size=25, unique=True))
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    codes = np.stack([random.integers(0, size, len(ids)) for size in sizes], axis=1)
    pruning = None
    if len(sizes) > 1 and draw(st.booleans()):
        layer = draw(st.integers(0, len(sizes) - 2))
        pruning = TokenPruning("top_k", layer=layer, top_k=draw(st.integers(1, sizes[layer]))).fit(codes, sizes)
    floats = st.floats(allow_nan=False, allow_infinity=False)
    popularity = draw(st.none() | st.lists(floats, min_size=len(ids), max_size=len(ids)))
    shown = draw(st.none() | st.lists(texts, min_size=len(ids), max_size=len(ids)))
    shown = shown if shown and any(shown) else None
    given = {"codebook_sizes": sizes, "pruning": pruning, "collisions": draw(st.sampled_from(["share", "suffix"]))}
    catalog = ProductCatalog.build(ids, codes, popularity=popularity, texts=shown, **given)
    return catalog, given, draw(st.sets(st.sampled_from(ids)))


def rebuilt(table, codebook_sizes, pruning, collisions):
    catalog = ProductCatalog.build(
        table["product_ids"], table["codes"], codebook_sizes, pruning, table["popularity"], table["texts"], collisions
    )
    ids = catalog.product_ids(np.flatnonzero(table["withdrawn"]))
    if ids:
        catalog.withdraw(ids)
    return catalog


def assert_equal_catalogs(first, second):
    assert first.columns.keys() == second.columns.keys()
    for name in first.columns:
        assert first.columns[name].dtype == second.columns[name].dtype, name
        if name != "withdrawn_log":  # the order of withdrawals
            assert first.columns[name].tobytes() == second.columns[name].tobytes(), name
    assert (first.codebook_sizes, first.suffix_size) == (second.codebook_sizes, second.suffix_size)


@given(catalogs())
@settings(max_examples=40, deadline=None)
def test_what_was_written_builds_an_equal_catalog(folder, parts):
    catalog, given, withdrawn = parts
    if withdrawn:
        catalog.withdraw(sorted(withdrawn))
    for name in ("catalog.parquet", "catalog.csv"):
        write_catalog_table(catalog, folder / name)
        assert_equal_catalogs(rebuilt(read_catalog_table(folder / name), **given), catalog)
    for source in (parquet.read_table(folder / "catalog.parquet"), catalog_to_dataset(catalog)):
        assert_equal_catalogs(rebuilt(read_catalog_table(source), **given), catalog)
    assert read_catalog_table(folder / "catalog.parquet")["codebook_sizes"] == catalog.codebook_sizes
    assert read_catalog_table(folder / "catalog.csv")["codebook_sizes"] is None


@given(catalogs())
@settings(max_examples=60, deadline=None)
def test_other_readers_find_the_same(folder, parts):
    catalog, _, withdrawn = parts
    if withdrawn:
        catalog.withdraw(sorted(withdrawn))
    rows = np.arange(len(catalog))
    sids = catalog.sid_codes[catalog.sid_rows(rows)].tolist()
    letters = [*"abcd"[: catalog.num_layers], "x"]
    spelled = [
        "".join(f"<{letter}_{code}>" for letter, code in zip(letters, sid, strict=True) if code >= 0) for sid in sids
    ]
    write_catalog_table(catalog, folder / "catalog.parquet")
    frame = pandas.read_parquet(folder / "catalog.parquet")
    assert list(frame.columns) == ["product_id", "codes", "sid", "sid_codes", "popularity", "text", "withdrawn"]
    assert frame["product_id"].tolist() == catalog.product_ids(rows) and frame["text"].tolist() == catalog.texts(rows)
    assert [list(row) for row in frame["codes"]] == catalog.codes.tolist()
    assert frame["sid"].tolist() == spelled and [list(row) for row in frame["sid_codes"]] == sids
    assert frame["popularity"].tolist() == catalog.popularity.tolist()
    assert set(catalog.product_ids(np.flatnonzero(frame["withdrawn"]))) == withdrawn

    write_catalog_table(catalog, folder / "catalog.csv")
    with open(folder / "catalog.csv", encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    layers = [f"code_{letter}" for letter in letters[:-1]]
    assert header == ["product_id", *layers, "sid", "popularity", "text", "withdrawn"]
    assert [line[0] for line in lines] == catalog.product_ids(rows) and [line[-4] for line in lines] == spelled
    assert [list(map(int, line[1:-4])) for line in lines] == catalog.codes.tolist()
    assert [float(line[-3]) for line in lines] == catalog.popularity.tolist()
    assert [line[-2] for line in lines] == catalog.texts(rows)

    found = catalog_to_dataset(catalog)
    assert found.column_names == list(frame.columns) and found["sid"][:] == spelled and found["sid_codes"][:] == sids


def test_awkward_text_in_csv(tmp_path):
    """Every pair of awkward pieces, so that none is safe only because it stands alone or last."""
    ids = [first + second for first in AWKWARD for second in AWKWARD]
    ids = list(dict.fromkeys([*AWKWARD, *ids]))
    catalog = ProductCatalog.build(ids, np.zeros((len(ids), 1), int), [1], texts=["", *ids[1:]])
    write_catalog_table(catalog, tmp_path / "catalog.csv")
    table = read_catalog_table(tmp_path / "catalog.csv")
    assert table["product_ids"].to_pylist() == ids and table["texts"].to_pylist() == ["", *ids[1:]]


def test_batches_make_no_difference(tmp_path, monkeypatch, make_parts):
    catalog = make_parts(collisions="suffix", num_products=50)[2]
    for name in ("whole.parquet", "whole.csv"):
        write_catalog_table(catalog, tmp_path / name)
    whole = read_catalog_table(tmp_path / "whole.parquet")
    monkeypatch.setattr(catalog_tables, "BATCH_ROWS", 7)
    monkeypatch.setattr(catalog_tables, "DATASET_BATCH_ROWS", 3)
    # Larger than any row, smaller than the file, so that quoted line breaks lie across its ends.
    monkeypatch.setattr(catalog_tables, "CSV_BLOCK_BYTES", 200)
    for name in ("parts.parquet", "parts.csv"):
        write_catalog_table(catalog, tmp_path / name)
    assert parquet.ParquetFile(tmp_path / "parts.parquet").num_row_groups == 8
    assert (tmp_path / "whole.csv").read_bytes() == (tmp_path / "parts.csv").read_bytes()
    sources = [tmp_path / "parts.csv", tmp_path / "parts.parquet", parquet.read_table(tmp_path / "parts.parquet")]
    for source in (*sources, catalog_to_dataset(catalog), catalog_to_dataset(catalog).to_iterable_dataset()):
        found = read_catalog_table(source)
        assert found["product_ids"].equals(whole["product_ids"]) and found["texts"].equals(whole["texts"])
        for name in ("codes", "popularity", "withdrawn"):
            assert np.array_equal(found[name], whole[name]) and found[name].dtype == whole[name].dtype


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("last", [b"", b"\r", b"\r\n"])
def test_line_breaks_across_blocks(tmp_path, monkeypatch, line_end, last):
    """Arrow by itself loses line feeds of quoted text where a block ends before them."""
    ids = [f"a\n{row}\r\n\r\r\n,b" for row in range(300)]
    lines = [b'"%s",%d' % (product_id.encode(), row) for row, product_id in enumerate(ids)]
    (tmp_path / "catalog.csv").write_bytes(line_end.join([b"product_id,code_a", *lines]) + last)
    for size in (60, 61, 62, 63, 64, 97, 1000, 2**20):
        monkeypatch.setattr(catalog_tables, "CSV_BLOCK_BYTES", size)
        table = read_catalog_table(tmp_path / "catalog.csv")
        assert table["product_ids"].to_pylist() == ids and table["codes"][:, 0].tolist() == list(range(300))


def test_columns_of_no_concern_may_hold_anything(tmp_path, monkeypatch):
    """Numbers at first, text later: a type guessed from the first block would not hold."""
    lines = [f"p{row},{row},{row if row < 50 else 'cheap'}" for row in range(100)]
    (tmp_path / "catalog.csv").write_text("\n".join(["product_id,code_a,price", *lines]))
    monkeypatch.setattr(catalog_tables, "CSV_BLOCK_BYTES", 100)
    assert read_catalog_table(tmp_path / "catalog.csv")["codes"][:, 0].tolist() == list(range(100))


def test_tables_of_others(tmp_path):
    """Other names, integer ids, categories, small and unsigned types, fixed lists, columns in any order."""
    plain = pyarrow.table(
        {
            "z": ["ignored", "ignored", "ignored"],
            "second": pyarrow.array([1, 2, 3], pyarrow.uint8()),
            "sku": pyarrow.array([3, 1, 2]),
            "first": pyarrow.array([7, 8, 9], pyarrow.int64()),
            "bought": pyarrow.array([5, 0, 2**60], pyarrow.int64()),
            "title": pyarrow.array(["x", None, "y"]).dictionary_encode(),
        }
    )
    names = {"id_column": "sku", "popularity_column": "bought", "text_column": "title"}
    parquet.write_table(plain, tmp_path / "plain.parquet")
    for source in (plain, tmp_path / "plain.parquet", str(tmp_path / "plain.parquet"), datasets.Dataset(plain)):
        table = read_catalog_table(source, codes_column=["first", "second"], **names)
        assert table["product_ids"].to_pylist() == ["3", "1", "2"] and table["withdrawn"] is None
        assert table["codes"].tolist() == [[7, 1], [8, 2], [9, 3]] and table["codes"].dtype == np.int32
        assert table["popularity"].tolist() == [5, 0, 2.0**60] and table["texts"].to_pylist() == ["x", "", "y"]
        assert read_catalog_table(source, "sku", "first")["codes"].tolist() == [[7], [8], [9]]

    for kind in (
        pyarrow.list_(pyarrow.int64(), 2),
        pyarrow.large_list(pyarrow.int16()),
        pyarrow.list_(pyarrow.uint32()),
    ):
        lists = pyarrow.table(
            {
                "product_id": pyarrow.array(["a", "b", "c"]).dictionary_encode(),
                "codes": pyarrow.array([[1, 2], [3, 4], [5, 6]], kind),
                "text": pyarrow.array([None, None, None], pyarrow.null()),
            }
        )
        assert read_catalog_table(lists.slice(1))["codes"].tolist() == [[3, 4], [5, 6]]
        assert read_catalog_table(lists)["texts"] is None and read_catalog_table(lists)["popularity"] is None
        chunked = pyarrow.concat_tables([lists.slice(2), lists.slice(0, 1)])
        assert read_catalog_table(chunked)["codes"].tolist() == [[5, 6], [1, 2]]

    (tmp_path / "excel.csv").write_bytes('\ufeffsku,code_b,code_a,x\r\n007,1,2,"a\r\nb"\r\n07,3,4,\r\n'.encode())
    table = read_catalog_table(tmp_path / "excel.csv", id_column="sku")
    assert table["product_ids"].to_pylist() == ["007", "07"] and table["codes"].tolist() == [[2, 1], [4, 3]]
    frame = pandas.DataFrame({"product_id": ["NA", "b"], "code_a": [1, 0], "withdrawn": [True, False]})
    frame.to_csv(tmp_path / "pandas.csv", index=False)
    for source in (tmp_path / "pandas.csv", pyarrow.Table.from_pandas(frame)):
        table = read_catalog_table(source)
        assert table["product_ids"].to_pylist() == ["NA", "b"] and table["withdrawn"].tolist() == [True, False]


def test_data_sets_in_their_own_order(make_parts):
    catalog = make_parts()[2]
    dataset = catalog_to_dataset(catalog)
    expected = read_catalog_table(dataset)
    order = np.random.default_rng(0).permutation(60)[:41]
    for source in (
        dataset.select(order),
        dataset.select(order).with_format("torch"),
        dataset.select(order).with_format("numpy", columns=["popularity"]),
        datasets.concatenate_datasets([dataset.select(order[:10]), dataset.select(order[10:])]),
        dataset.select(order).to_iterable_dataset().map(lambda row: row | {"text": row["text"]}),
        datasets.IterableDataset.from_generator(lambda: iter(dataset.select(order))),
    ):
        table = read_catalog_table(source)
        assert table["product_ids"].equals(expected["product_ids"].take(pyarrow.array(order)))
        assert np.array_equal(table["codes"], expected["codes"][order])
        assert np.array_equal(table["popularity"], expected["popularity"][order])
    table = read_catalog_table(dataset.filter(lambda row: row["popularity"] > 2))
    assert np.array_equal(table["popularity"], expected["popularity"][expected["popularity"] > 2])


def test_shards(tmp_path, make_parts):
    catalog = make_parts()[2]
    write_catalog_table(catalog, tmp_path / "all.parquet")
    table = parquet.read_table(tmp_path / "all.parquet")
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "README.md").write_text("not a shard")
    parquet.write_table(table.slice(40), shards / "part-00001.parquet")
    parquet.write_table(table.slice(0, 40), shards / "part-00000.parquet")
    found, expected = read_catalog_table(shards), read_catalog_table(table)
    assert found["product_ids"].equals(expected["product_ids"]) and found["codebook_sizes"] == [4, 5, 6]
    parquet.write_table(table.slice(40).drop_columns("popularity"), shards / "part-00001.parquet")
    with pytest.raises(ValueError, match="part-00001.parquet has the columns .*Keep the shards of one catalog"):
        read_catalog_table(shards)
    other = table.slice(40).replace_schema_metadata({"rqsid": '{"codebook_sizes": [9, 9, 9]}'})
    parquet.write_table(other, shards / "part-00001.parquet")
    with pytest.raises(ValueError, match=r"sizes \[9, 9, 9\].*sizes \[4, 5, 6\]"):
        read_catalog_table(shards)
    short = pyarrow.array([row[:2] for row in table["codes"].to_pylist()])
    parquet.write_table(table.set_column(1, "codes", short).slice(40), shards / "part-00001.parquet")
    with pytest.raises(ValueError, match="Row 40 of .*part-00001.parquet has 2 codes, the rows before it have 3"):
        read_catalog_table(shards)


def test_equal_catalogs_make_equal_files(tmp_path, make_parts):
    catalog = make_parts()[2]
    for suffix in (".parquet", ".csv"):
        for number in range(3):
            write_catalog_table(catalog, tmp_path / f"{number}{suffix}")
        assert len({(tmp_path / f"{number}{suffix}").read_bytes() for number in range(3)}) == 1


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, make_parts, suffix):
    catalog, path = make_parts()[2], tmp_path / f"catalog{suffix}"
    path.write_text("old")
    monkeypatch.setattr(catalog_tables, "BATCH_ROWS", 20)
    read = catalog.product_ids

    def product_ids(rows):
        if rows[0] == 40:
            raise OSError("gone")
        return read(rows)

    monkeypatch.setattr(catalog, "product_ids", product_ids)
    with pytest.raises(OSError, match="gone"):
        write_catalog_table(catalog, path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == [path.name]
    with pytest.raises(ValueError, match="must end in .parquet or .csv"):
        write_catalog_table(catalog, tmp_path / "catalog.json")
    assert os.listdir(tmp_path) == [path.name]


TABLE = {"product_id": ["a", "b", "c"], "codes": [[0, 1], [1, 0], [1, 1]], "popularity": [1.0, 2.0, 3.0]}
LAYERS = {"product_id": ["a", "b", "c"], "code_a": [0, 1, 1], "code_b": [1, 0, 1]}


@pytest.mark.parametrize(
    "columns, arguments, message",
    [
        (TABLE, {"id_column": "sku"}, r"the table has no column 'sku', only \['product_id', 'codes', .*id_column="),
        ({"product_id": ["a"]}, {}, "neither a column 'codes' nor columns 'code_a'.*codes_column="),
        (TABLE, {"codes_column": []}, "neither a column 'codes'"),
        (TABLE, {"codes_column": "sids"}, "no column 'sids'"),
        (LAYERS, {"codes_column": ["code_a", "code_c"]}, "no column 'code_c'"),
        (LAYERS | {"code_d": [1, 1, 1]}, {}, "but no 'code_c'"),
        ({"product_id": ["a"], "code_b": [1]}, {}, "but no 'code_a'"),
        (TABLE, {"popularity_column": "count"}, "no column 'count'"),
        (TABLE, {"text_column": "title"}, "no column 'title'"),
        (TABLE, {"withdrawn_column": "gone"}, "no column 'gone'"),
        (TABLE | {"product_id": ["a", None, "c"]}, {}, "'product_id' of the table is empty in 1 rows.*row 1"),
        (
            TABLE | {"product_id": [1.0, 2.0, 3.0]},
            {},
            "'product_id' of the table holds double; product ids must be text",
        ),
        (TABLE | {"product_id": [b"a", b"b", b"c"]}, {}, "holds binary; product ids must be text"),
        (TABLE | {"codes": [[0, 1], None, [1, 1]]}, {}, "'codes' of the table is empty in 1 rows.*row 1"),
        (TABLE | {"codes": [[0, 1], [1], [1, 1]]}, {}, r"lengths \[1, 2\]; every product needs one"),
        (TABLE | {"codes": [[], [], []]}, {}, "have the lengths|holds null"),
        (TABLE | {"codes": [[0, 1], [1, None], [1, 1]]}, {}, "holds lists with 1 empty entries"),
        (
            TABLE | {"codes": [[0.0, 1], [1, 1], [1, 1]]},
            {},
            "'codes' of the table holds double; codes are whole numbers",
        ),
        (TABLE | {"codes": ["[0, 1]", "[1, 0]", "[1, 1]"]}, {}, "'codes' of the table holds string"),
        (TABLE | {"codes": [[0, 1], [1, 0], [-1, 1]]}, {}, "Row 2 of the table has the code -1.*unpruned"),
        (TABLE | {"codes": [[0, 1], [2**31, 0], [1, 1]]}, {}, "Row 1 of the table has the code 2147483648"),
        (LAYERS | {"code_b": [1, None, 2]}, {}, "'code_b' of the table is empty in 1 rows.*row 1"),
        (LAYERS | {"code_b": ["1", "2", "3"]}, {}, "'code_b' of the table holds string"),
        (LAYERS | {"code_b": [[1], [2], [3]]}, {}, "'code_b' of the table holds list"),
        (LAYERS | {"code_b": [True, False, True]}, {}, "'code_b' of the table holds bool"),
        (
            TABLE | {"popularity": ["1", "2", "3"]},
            {},
            "'popularity' of the table holds string; popularity is a number",
        ),
        (TABLE | {"popularity": [1.0, None, None]}, {}, "'popularity' of the table is empty in 2 rows.*row 1"),
        (TABLE | {"text": [1, 2, 3]}, {}, "'text' of the table holds int64; texts must be text"),
        (TABLE | {"withdrawn": [0, 1, 0]}, {}, "'withdrawn' of the table holds int64; it must say true or false"),
        (TABLE | {"withdrawn": [True, None, True]}, {}, "'withdrawn' of the table is empty in 1 rows"),
        ({name: values[:0] for name, values in TABLE.items()}, {}, "the table holds no row"),
    ],
)
def test_bad_tables_are_refused(columns, arguments, message):
    with pytest.raises(ValueError, match=message):
        read_catalog_table(pyarrow.table(columns), **arguments)


def test_columns_that_are_there_twice():
    names = ["product_id", "code_a", "code_a"]
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array([1]), pyarrow.array([2])], names=names)
    with pytest.raises(ValueError, match="2 columns 'code_a'"):
        read_catalog_table(table)


def test_rows_are_counted_over_batches(monkeypatch):
    monkeypatch.setattr(catalog_tables, "BATCH_ROWS", 2)
    with pytest.raises(ValueError, match="row 2"):
        read_catalog_table(pyarrow.table(TABLE | {"popularity": [1.0, 2.0, None]}))
    with pytest.raises(ValueError, match="Row 2 of the table has the code -7"):
        read_catalog_table(pyarrow.table(LAYERS | {"code_b": [0, 0, -7]}))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", b"", "a.csv is not a readable .csv file"),
        ("a.csv", b"product_id,code_a\n", "a.csv holds no row"),
        ("a.csv", b"product_id;code_a\n1;2\n", "has no column 'product_id', only .'product_id;code_a'"),
        ("a.csv", b"product_id,code_a\na,1\nb\n", "Expected 2 columns, got 1"),
        ("a.csv", b"product_id,code_a\na,1\nb,1.5\n", "CSV column .*'1.5'.*one column of whole numbers per layer"),
        ("a.csv", b"product_id,code_a\na,1\nb,\n", "'code_a' of .*a.csv is empty in 1 rows, the first of them row 1"),
        ("a.csv", b'product_id,codes\na,"[1, 2]"\n', "one column of whole numbers per layer"),
        ("a.csv", b"product_id,code_a\nb,99999999999999999999\n", "'99999999999999999999'"),
        ("a.csv", "product_id,code_a\né,1\n".encode("latin-1"), "UTF"),
        ("a.csv", b"product_id,code_a,popularity\na,1,many\n", "'many'"),
        ("a.csv", b"product_id,code_a,withdrawn\na,1,maybe\n", "'maybe'"),
        ("a.parquet", b"", "a.parquet is not a readable .parquet file"),
        ("a.parquet", b"PAR1 nonsense PAR1", "a.parquet is not a readable .parquet file"),
        ("a.json", b"{}", "its name must end in .parquet or .csv"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_catalog_table(tmp_path / name)


def test_other_sources_are_refused(tmp_path, make_parts):
    with pytest.raises(ValueError, match="There is no file or folder .*none.parquet"):
        read_catalog_table(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="holds no .parquet file"):
        read_catalog_table(tmp_path)
    dataset = catalog_to_dataset(make_parts()[2])
    with pytest.raises(TypeError, match=r"splits or keys \['train'\]"):
        read_catalog_table(datasets.DatasetDict({"train": dataset}))
    with pytest.raises(TypeError, match="source is DataFrame.*from_pandas"):
        read_catalog_table(pandas.DataFrame(TABLE))
    with pytest.raises(TypeError, match="source is NoneType"):
        read_catalog_table(None)
    with pytest.raises(ValueError, match="holds no row"):
        read_catalog_table(datasets.IterableDataset.from_generator(lambda: iter(())))
    with pytest.raises(ValueError, match="holds no row"):
        read_catalog_table(dataset.select([]))
    write_catalog_table(make_parts()[2], tmp_path / "catalog.parquet")
    content = (tmp_path / "catalog.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cut.parquet is not a readable"):
        read_catalog_table(tmp_path / "cut.parquet")
    (tmp_path / "holed.parquet").write_bytes(content[:4] + b"\xff" * 300 + content[304:])
    with pytest.raises(ValueError, match="holed.parquet is not a readable"):
        read_catalog_table(tmp_path / "holed.parquet")
    for metadata in ("nonsense", "{}", '{"codebook_sizes": 3}', '{"codebook_sizes": ["a"]}'):
        with pytest.raises(ValueError, match="holds metadata that cannot be read"):
            read_catalog_table(pyarrow.table(TABLE).replace_schema_metadata({"rqsid": metadata}))


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=200))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_popularity_keeps_every_bit_in_csv(tmp_path, values):
    values = [*values, -0.0, 5e-324, 1.7976931348623157e308, 0.1, 1 / 3, 2.0**53 + 2]
    ids = [str(row) for row in range(len(values))]
    catalog = ProductCatalog.build(ids, np.zeros((len(values), 1), int), [1], popularity=values)
    write_catalog_table(catalog, tmp_path / "catalog.csv")
    assert read_catalog_table(tmp_path / "catalog.csv")["popularity"].tobytes() == np.array(values).tobytes()
