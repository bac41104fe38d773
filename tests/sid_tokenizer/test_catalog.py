import itertools
import pickle
import sys
import threading
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rqsid import ProductCatalog, TokenPruning
from rqsid.sid_tokenizer import bundle
from rqsid.sid_tokenizer.catalog_columns import COLUMNS


@st.composite
def catalogs(draw, collisions=("share", "suffix")):
    """A catalog with its ingredients."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    seed, num_products = draw(st.integers(0, 10**6)), draw(st.integers(1, 40))
    random = np.random.default_rng(seed)
    codes = np.stack([random.integers(0, size, num_products) for size in sizes], axis=1)
    pruning = None
    if len(sizes) > 1 and draw(st.booleans()):
        layer = draw(st.integers(0, len(sizes) - 2))
        pruning = TokenPruning("top_k", layer=layer, top_k=draw(st.integers(1, sizes[layer]))).fit(codes, sizes)
    popularity = draw(st.none() | st.just(random.integers(0, 3, num_products)))
    ids = draw(
        st.lists(
            st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6),
            min_size=num_products,
            max_size=num_products,
            unique=True,
        )
    )
    mode = draw(st.sampled_from(collisions))
    catalog = ProductCatalog.build(ids, codes, sizes, pruning, popularity, collisions=mode)
    return catalog, ids, codes, sizes, pruning, popularity, mode


def expected_sids(codes, pruning, popularity, mode):
    """SID of each product with its suffix, and the products of each SID, by the definition."""
    rows = codes if pruning is None else pruning.apply(codes)
    popularity = np.zeros(len(codes)) if popularity is None else popularity
    groups = {}
    for row in sorted(range(len(codes)), key=lambda row: (-popularity[row], row)):
        groups.setdefault(tuple(rows[row].tolist()), []).append(row)
    sids, members = [None] * len(codes), {}
    for sid, products in groups.items():
        for rank, row in enumerate(products):
            suffix = rank if mode == "suffix" and len(products) > 1 else -1
            sids[row] = (*sid, suffix)
            members.setdefault(sids[row], []).append(row)
    return sids, members


def sequences(catalog):
    return [tuple((at, code) for at, code in enumerate(row) if code >= 0) for row in catalog.sid_codes.tolist()]


@given(catalogs())
@settings(max_examples=150, deadline=None)
def test_build_equals_the_definition(parts):
    catalog, ids, codes, sizes, pruning, popularity, mode = parts
    sids, members = expected_sids(codes, pruning, popularity, mode)
    rows = catalog.product_rows(ids)
    assert rows.tolist() == list(range(len(ids))) and catalog.product_ids(rows) == ids
    sid_rows = catalog.sid_rows(rows)
    assert [tuple(row) for row in catalog.sid_codes[sid_rows].tolist()] == sids
    assert catalog.num_sids == len(members) and len(catalog) == len(ids)
    assert sorted(map(tuple, catalog.sid_codes.tolist())) == [tuple(row) for row in catalog.sid_codes.tolist()]
    for row, sid in enumerate(map(tuple, catalog.sid_codes.tolist())):
        assert catalog.products_of(row).tolist() == members[sid]
    assert (catalog.find_sids(catalog.sid_codes) == np.arange(catalog.num_sids)).all()
    assert catalog.codes.tolist() == codes.tolist()
    assert catalog.lengths().tolist() == [sum(code >= 0 for code in row) for row in catalog.sid_codes.tolist()]


@given(catalogs(collisions=["suffix"]))
@settings(max_examples=100, deadline=None)
def test_suffixes_make_sids_distinct_and_prefix_free(parts):
    catalog, ids = parts[:2]
    assert catalog.num_sids == len(ids)
    all_sequences = set(sequences(catalog))
    assert len(all_sequences) == len(ids)
    for one in all_sequences:
        assert not any(one[:length] in all_sequences for length in range(len(one)))


@given(catalogs(), st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 8))
@settings(max_examples=150, deadline=None)
def test_expand_sids_equals_a_loop(parts, seed, top_k, num_sids):
    catalog = parts[0]
    sid_rows = np.random.default_rng(seed).integers(-1, catalog.num_sids, (3, num_sids))
    products, positions = catalog.expand_sids(sid_rows, top_k)
    assert products.shape == positions.shape == (3, top_k)
    for row in range(3):
        pairs = [
            (product, at)
            for at, sid in enumerate(sid_rows[row])
            if sid >= 0
            for product in catalog.products_of(sid).tolist()
        ]
        pairs = (pairs + [(-1, -1)] * top_k)[:top_k]
        assert list(zip(products[row].tolist(), positions[row].tolist(), strict=True)) == pairs


def test_expand_sids_of_nothing(make_parts):
    catalog = make_parts()[2]
    for sid_rows in (np.full((2, 3), -1), np.zeros((2, 0), dtype=int)):
        products, positions = catalog.expand_sids(sid_rows, 4)
        assert (products == -1).all() and (positions == -1).all() and products.shape == (2, 4)
    assert catalog.expand_sids(np.zeros((0, 3), dtype=int), 4)[0].shape == (0, 4)


def test_expand_many_sids_in_bounded_memory(make_parts):
    """A cube of rows, SIDs and ranks would take 900 MB."""
    catalog = make_parts()[2]
    sid_rows = np.random.default_rng(0).integers(-1, catalog.num_sids, (30, 3000))
    tracemalloc.start()
    products, positions = catalog.expand_sids(sid_rows, 10_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    some = products >= 0
    assert some.any(1).all()
    origin = np.take_along_axis(sid_rows, positions, axis=1)
    assert (catalog.sid_rows(products)[some] == origin[some]).all() and (positions[~some] == -1).all()
    assert (np.diff(positions, axis=1)[some[:, 1:]] >= 0).all()


def test_popularity_order_and_ties_by_hand():
    catalog = ProductCatalog.build(
        ["a", "b", "c", "d"], np.zeros((4, 1), dtype=int), [1], popularity=[1, 3, 3, 0.5], texts=["A", "", "C", "ü"]
    )
    assert catalog.product_ids(catalog.products_of(0)) == ["b", "c", "a", "d"]
    assert catalog.texts([3, 1, 0]) == ["ü", "", "A"]
    suffixed = ProductCatalog.build(
        ["a", "b", "c", "d", "e"], np.array([[0]] * 4 + [[1]]), [2], popularity=[1, 3, 3, 0.5, 9], collisions="suffix"
    )
    assert suffixed.sid_codes[suffixed.sid_rows(np.arange(5))].tolist() == [[0, 2], [0, 0], [0, 1], [0, 3], [1, -1]]
    assert suffixed.suffix_size == 16  # room for products to come
    assert ProductCatalog.build(["a"], np.zeros((1, 1), int), [1]).suffix_size == 0


def test_suffix_size():
    codes = np.zeros((20, 1), dtype=int)
    ids = [f"p{row}" for row in range(20)]
    assert ProductCatalog.build(ids, codes, [1], collisions="suffix").suffix_size == 20
    assert ProductCatalog.build(ids, codes, [1], collisions="suffix", suffix_size=40).suffix_size == 40
    with pytest.raises(ValueError, match="20 products would share the codes .* 19 are reserved. Raise suffix_size"):
        ProductCatalog.build(ids, codes, [1], collisions="suffix", suffix_size=19)


def test_keys_beyond_63_bits():
    random = np.random.default_rng(0)
    sizes = [8192] * 8
    codes = random.integers(0, 8192, (3000, 8))
    codes[1::2] = codes[::2]
    codes[1::2, random.integers(0, 8, 1500)] ^= 1  # neighbours that differ in single bits
    codes[::50] = 8191
    codes[25::50] = 0
    ids = [str(row) for row in range(3000)]
    catalog = ProductCatalog.build(ids, codes, sizes)
    sids, members = expected_sids(codes, None, None, "share")
    assert catalog.num_sids == len(members)
    assert (catalog.find_sids(catalog.sid_codes) == np.arange(catalog.num_sids)).all()
    wanted = np.array(sids)
    assert (catalog.find_sids(wanted) == catalog.sid_rows(np.arange(3000))).all()
    wanted[:, 7] ^= 1
    assert catalog.find_sids(wanted).tolist() == [
        next((int(r) for r in catalog.sid_rows(members[s][:1])), -1) if (s := tuple(row)) in members else -1
        for row in wanted.tolist()
    ]


@given(catalogs())
@settings(max_examples=60, deadline=None)
def test_find_sids_equals_a_dict(parts):
    catalog, sizes = parts[0], parts[3]
    oracle = {tuple(row): at for at, row in enumerate(catalog.sid_codes.tolist())}
    everything = list(itertools.product(*[range(-1, size) for size in sizes], range(-1, 3)))
    assert catalog.find_sids(np.array(everything)).tolist() == [oracle.get(sid, -1) for sid in everything]


def test_find_sids_of_another_width_is_refused(make_parts):
    catalog = make_parts()[2]
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(n, 4\)"):
        catalog.find_sids(np.zeros((2, 3), dtype=int))


def test_sid_rows_keep_absent_products(make_parts):
    catalog = make_parts()[2]
    rows = catalog.sid_rows([[0, -1], [-1, 3]])
    assert rows.tolist() == [[int(catalog.sid_rows([0])[0]), -1], [-1, int(catalog.sid_rows([3])[0])]]


def test_unknown_products_are_refused(make_parts):
    catalog = make_parts()[2]
    with pytest.raises(ValueError, match=r"2 of 4 product ids are not in the catalog, for instance 'P0', 'p00'"):
        catalog.product_rows(["p0", "P0", "p1", "p00"])
    with pytest.raises(TypeError, match="not a string|list of strings"):
        catalog.product_rows([1])
    assert catalog.product_rows([]).tolist() == []
    assert catalog.product_rows(["p3", "p1", "p3"]).tolist() == [3, 1, 3]


def test_lookups_with_equal_hashes(make_parts, monkeypatch):
    monkeypatch.setattr(
        "rqsid.sid_tokenizer.strings.hash_rows", lambda packed, offsets: np.zeros(len(offsets) - 1, np.int64)
    )
    catalog = make_parts()[2]
    assert catalog.product_rows(["p59", "p0", "p7"]).tolist() == [59, 0, 7]
    with pytest.raises(ValueError, match="'p60'"):
        catalog.product_rows(["p7", "p60"])


def test_tensor_codes_and_other_types():
    codes = np.array([[0, 1], [1, 0]])
    expected = ProductCatalog.build(["a", "b"], codes, [2, 2]).sid_codes.tolist()
    for given_codes in (torch.tensor(codes), codes.astype(np.uint8), codes.astype(np.int16), codes.tolist()):
        assert ProductCatalog.build(["a", "b"], given_codes, np.array([2, 2])).sid_codes.tolist() == expected
    assert ProductCatalog.build(np.array(["a", "b"]), codes, [2, 2]).product_ids([1]) == ["b"]


def test_large_codebooks_need_wider_columns():
    codes = np.array([[40_000, 1], [39_999, 0]])
    catalog = ProductCatalog.build(["a", "b"], codes, [50_000, 2])
    assert catalog.sid_codes[catalog.sid_rows([0, 1]), :2].tolist() == codes.tolist()


def assert_equal_catalogs(first, second):
    assert first.columns.keys() == second.columns.keys()
    for name in first.columns:
        assert first.columns[name].dtype == second.columns[name].dtype, name
        assert np.array_equal(first.columns[name], second.columns[name]), name
    assert (first.codebook_sizes, first.suffix_size) == (second.codebook_sizes, second.suffix_size)
    assert first.pruning.to_dict() == second.pruning.to_dict()


@given(parts=catalogs())
@settings(max_examples=25, deadline=None)
def test_save_and_load(tmp_path_factory, parts):
    path = tmp_path_factory.mktemp("catalog") / "sid_catalog.safetensors"
    parts[0].save(path)
    loaded = ProductCatalog.load(path)
    assert_equal_catalogs(parts[0], loaded)
    assert loaded.product_rows(parts[1]).tolist() == list(range(len(parts[1])))
    loaded.save(path)  # over the file that is mapped
    assert_equal_catalogs(parts[0], ProductCatalog.load(path))
    assert_equal_catalogs(parts[0], loaded)


@pytest.mark.slow
def test_load_in_a_fresh_process(saved, with_package):
    catalog, rows = saved[3], np.arange(59, -1, -1)
    assert with_package["rows"] == rows.tolist()
    assert with_package["sids"] == catalog.sid_codes[catalog.sid_rows(rows)].tolist()
    assert with_package["expanded"] == [part.tolist() for part in catalog.expand_sids(np.arange(10)[None], 15)]
    assert with_package["pruning"] == catalog.pruning.to_dict()


def test_pickles_do_not_change_with_use(make_parts, tmp_path):
    built = make_parts()[2]
    built.save(tmp_path / "catalog.safetensors")
    for catalog in (built, ProductCatalog.load(tmp_path / "catalog.safetensors")):
        before = pickle.dumps(catalog)
        rows = catalog.find_sids(catalog.sid_codes)
        assert pickle.dumps(catalog) == before
        loaded = pickle.loads(before)
        assert_equal_catalogs(loaded, catalog)
        assert loaded.find_sids(catalog.sid_codes).tolist() == rows.tolist()
        assert catalog.find_sids(catalog.sid_codes).tolist() == rows.tolist()


def test_equal_catalogs_make_equal_files(tmp_path, make_parts):
    catalog = make_parts()[2]
    for number in range(8):
        catalog.save(tmp_path / str(number))
    assert len({(tmp_path / str(number)).read_bytes() for number in range(8)}) == 1


IDS, CODES = ["a", "b", "c"], np.array([[0, 1], [1, 0], [1, 1]])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"product_ids": ["a", "b", "a"]}, ValueError, "'a' appears more than once"),
        ({"product_ids": ["a", "", "c"]}, ValueError, "row 1 is empty"),
        ({"product_ids": ["a", 2, "c"]}, TypeError, "2 .row 1. is int"),
        ({"product_ids": ["a", "b\udc80", "c"]}, ValueError, "UTF-8"),
        ({"product_ids": []}, ValueError, "at least one product"),
        ({"product_ids": "abc"}, TypeError, "single string"),
        ({"product_ids": ["a", "b"]}, ValueError, "codes has 3 rows for 2 product ids"),
        ({"codes": CODES[:, 0]}, ValueError, r"shape \(3,\)"),
        ({"codes": CODES + 1}, ValueError, "holds the code 2"),
        ({"codes": CODES - 1}, ValueError, "absent"),
        ({"codes": CODES + 0.5}, TypeError, "integers, got float64"),
        ({"codebook_sizes": [2, 2, 2]}, ValueError, "one column per layer"),
        ({"popularity": [1, 2]}, ValueError, "popularity has 2 rows"),
        ({"popularity": [1, 2, np.nan]}, ValueError, "popularity must be one finite number"),
        ({"popularity": np.ones((3, 1))}, ValueError, "popularity must be one finite number"),
        ({"texts": ["x"]}, ValueError, "texts has 1 rows"),
        ({"texts": ["x", None, "y"]}, TypeError, "None"),
        ({"collisions": "merge"}, ValueError, "'merge' is unknown"),
        ({"suffix_size": 4}, ValueError, 'needs collisions="suffix"'),
        ({"collisions": "reassign"}, ValueError, "pass quantizer="),
        ({"collisions": "reassign", "embeddings": np.zeros((3, 2))}, ValueError, "pass quantizer="),
        ({"pruning": TokenPruning("top_k", layer=0, top_k=1)}, ValueError, "not fitted"),
        (
            {"pruning": TokenPruning("top_k", layer=0, top_k=1).fit(CODES, [3, 2])},
            ValueError,
            r"fitted on codebooks \[3, 2\], these codes have \[2, 2\]",
        ),
    ],
)
def test_bad_input_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        ProductCatalog.build(**{"product_ids": IDS, "codes": CODES, "codebook_sizes": [2, 2]} | arguments)


def edit(column, index, value):
    def change(columns, config):
        columns[column] = columns[column].copy()
        columns[column][index] = value

    return change


def cut(column):
    def change(columns, config):
        columns[column] = columns[column][:-1]

    return change


def retype(column):
    def change(columns, config):
        columns[column] = columns[column].astype(np.float32)

    return change


def leave_out(key):
    def change(columns, config):
        del (columns if key in columns else config)[key]

    return change


EDITS = {
    "product_sids beyond": (edit("product_sids", 0, 10**6), "product_sids.*points outside"),
    "product_sids negative": (edit("product_sids", 0, -1), "product_sids.*points outside"),
    "sid_products beyond": (edit("sid_products", 2, 60), "sid_products.*points outside"),
    "product_id_order beyond": (edit("product_id_order", 2, 60), "product_id_order.*points outside"),
    "sid_offsets falling": (edit("sid_offsets", 1, 50), "sid_offsets.*ascending"),
    "sid_offsets beyond": (edit("sid_offsets", -1, 61), "sid_offsets.*up to 60"),
    "product_id_offsets negative": (edit("product_id_offsets", 1, -1), "product_id_offsets.*ascending"),
    "text_offsets first": (edit("text_offsets", 0, 1), "text_offsets.*ascending"),
    "product_codes beyond": (edit("product_codes", (0, 1), 5), "Layer 1 holds the code 5"),
    "sid_codes beyond": (edit("sid_codes", (0, 2), 6), "Layer 2 holds the code 6"),
    "sid_codes suffix": (edit("sid_codes", (0, 3), 7), "Layer 3 holds the code 7"),
    "sid without an end": (edit("sid_codes", (0, 2), -1), "sid_codes.*absent"),
    "cut popularity": (cut("popularity"), r"popularity .* shape \(59,\), expected \(60,\)"),
    "cut sid_codes": (cut("sid_codes"), "does not fit its columns"),
    "cut product_id_bytes": (cut("product_id_bytes"), "product_id_offsets"),
    "float codes": (retype("sid_codes"), "sid_codes.*float32, not int16: the file was edited"),
    "no popularity": (leave_out("popularity"), "lacks popularity"),
    "no sizes": (leave_out("codebook_sizes"), "lacks.*codebook_sizes"),
    "no pruning": (leave_out("pruning"), "lacks.*pruning"),
    "bytes of no width": (
        lambda columns, config: columns.update(product_id_bytes=np.zeros((10**12, 0), np.uint8)),
        "product_id_bytes.* shape",
    ),
    "words for bytes": (
        lambda columns, config: columns.update(product_id_bytes=columns["product_id_bytes"].astype(np.int64)),
        "product_id_bytes .* holds int64, not uint8",
    ),
    "text_offsets in a square": (
        lambda columns, config: columns.update(text_offsets=columns["text_offsets"][None]),
        "text_offsets .* shape",
    ),
    "popularity nan": (edit("popularity", 3, np.nan), "popularity .* NaN"),
    "hashes fall": (edit("product_id_hashes", 0, 2**62), "product_id_hashes .* does not ascend"),
    "order repeats": (edit("product_id_order", slice(0, 2), 7), "product_id_order .* twice"),
    "sids repeat": (
        lambda columns, config: columns.update(
            sid_codes=columns["sid_codes"][[0, 0, *range(2, len(columns["sid_codes"]))]]
        ),
        "sid_order .* one is there twice",
    ),
    "sids unsorted": (
        lambda columns, config: columns.update(sid_order=columns["sid_order"][::-1].copy()),
        "sid_order .* does not sort",
    ),
    "products elsewhere": (
        lambda columns, config: columns.update(sid_products=columns["sid_products"][::-1].copy()),
        "sid_products .* elsewhere",
    ),
    "withdrawn but listed": (edit("product_withdrawn", 3, True), "sid_products .* not withdrawn"),
    "capacity": (lambda columns, config: config.update(capacity=-5), "does not fit"),
    "collisions": (lambda columns, config: config.update(collisions="merge"), "does not fit"),
    "huge codebooks": (lambda columns, config: config.update(codebook_sizes=[2**31 - 1] * 3), "does not fit"),
    "suffix_size": (lambda columns, config: config.update(suffix_size=10**30), "does not fit"),
    "history shrinks": (
        lambda columns, config: config.update(
            history=[config["history"][0] | {"products": 10**9}] + config["history"]
        ),
        "does not fit",
    ),
    "history of nothing": (lambda columns, config: config.update(history=[]), "does not fit"),
    "version": (lambda columns, config: config.update(format_version=1), "format version 1"),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_files_are_refused(name, tmp_path, make_parts):
    catalog = make_parts()[2]
    path = tmp_path / "sid_catalog.safetensors"
    catalog.save(path)
    tensors, config = bundle.read_tensors(path, COLUMNS)
    columns = {column: tensor.numpy() for column, tensor in tensors.items()}
    change, message = EDITS[name]
    change(columns, config)
    bundle.write_tensors(tmp_path / "edited.safetensors", columns, config)
    with pytest.raises(ValueError, match=message):
        ProductCatalog.load(tmp_path / "edited.safetensors")
    ProductCatalog.load(path)


def test_a_sid_with_and_without_suffix_is_refused(tmp_path):
    catalog = ProductCatalog.build(["a", "b", "c"], np.array([[0, 0], [0, 0], [1, 1]]), [2, 2], collisions="suffix")
    columns = catalog.columns | {"sid_codes": np.array([[0, 0, -1], [0, 0, 1], [1, 1, -1]], dtype=np.int16)}
    catalog.columns = columns
    catalog.save(tmp_path / "catalog")
    with pytest.raises(ValueError, match="with and without a suffix, the one the beginning of the other"):
        ProductCatalog.load(tmp_path / "catalog")


def test_what_the_caller_changes_later_is_not_the_catalogs():
    codes, popularity = np.array([[0, 1], [1, 0], [1, 1]], dtype=np.int16), np.arange(3.0)
    pruning = TokenPruning("top_k", layer=0, top_k=1).fit(codes, [2, 2])
    catalog = ProductCatalog.build(["a", "b", "c"], codes, [2, 2], pruning, popularity)
    sids = catalog.sid_codes[catalog.sid_rows([0, 1, 2])].tolist()
    codes[:], popularity[:] = 0, 9
    pruning.fit(np.zeros((3, 2), dtype=int), [2, 2])
    catalog.append(["d"], np.array([[1, 1]]))
    assert catalog.codes.tolist() == [[0, 1], [1, 0], [1, 1], [1, 1]] and catalog.popularity.tolist() == [0, 1, 2, 0]
    assert catalog.sid_codes[catalog.sid_rows([0, 1, 2, 3])].tolist() == [*sids, sids[2]]
    catalog.at_version(2).history.append("x")
    assert catalog.version == 2


def test_different_catalogs_have_different_versions():
    codes = np.array([[0, 1], [1, 0]])
    built = [
        ProductCatalog.build(ids, codes, [2, 2], texts=texts, collisions=collisions)
        for ids, texts, collisions in [
            (["a", "b"], None, "share"),
            (["b", "a"], None, "share"),
            (["a", "b"], ["x", "y"], "share"),
            (["a", "b"], ["x", "z"], "share"),
            (["a", "b"], None, "suffix"),
        ]
    ]
    assert len({catalog.version_id for catalog in built}) == 5
    again = [ProductCatalog.build(["a", "b"], codes.astype(kind), [2, 2]) for kind in (np.int16, np.int32, np.int64)]
    assert {catalog.version_id for catalog in again} == {built[0].version_id}
    for catalog, kind, text in zip(again, (np.int16, np.int32, np.int32), "xxy", strict=True):
        catalog.append(["c"], codes[:1].astype(kind), texts=[text])
    assert again[0].version_id == again[1].version_id != again[2].version_id


def test_forgetting_shortens_the_history_and_keeps_the_descent(tmp_path):
    catalog = ProductCatalog.build(["a", "b"], np.array([[0, 1], [1, 0]]), [2, 2])
    catalog.save(tmp_path / "catalog")
    origin = catalog.origin
    for value in range(1, 6):
        catalog.update_popularity(["a"], [value])
    catalog.forget_versions(before=5)
    assert (catalog.version, catalog.oldest_version, len(catalog.history), catalog.origin) == (6, 5, 2, origin)
    assert catalog.at_version(5).popularity.tolist() == [4, 0]
    catalog.save(tmp_path / "catalog")  # over version 1, which it descends from
    loaded = ProductCatalog.load(tmp_path / "catalog")
    assert (loaded.version, loaded.oldest_version, loaded.origin) == (6, 5, origin)
    loaded.withdraw(["b"])
    assert loaded.version == 7 and loaded.at_version(5).popularity.tolist() == [4, 0]
    with pytest.raises(ValueError, match="5 is the oldest that is left"):
        loaded.at_version(4)
    other = ProductCatalog.load(tmp_path / "catalog", version=5)
    other.update_popularity(["b"], [3])
    with pytest.raises(ValueError, match="other changes to this catalog than this one has"):
        other.save(tmp_path / "catalog")


def test_reading_while_another_thread_changes(make_parts):
    """A reader sees the catalog before or after a change, not a mixture."""
    catalog = make_parts()[2]
    catalog = ProductCatalog.build([f"p{row}" for row in range(60)], catalog.codes, catalog.codebook_sizes)
    sids, errors, done = catalog.sid_codes.copy(), [], threading.Event()
    codes = np.array(catalog.codes)

    def read():
        while not done.is_set():
            rows = catalog.find_sids(sids)
            products, positions = catalog.expand_sids(rows[None], 200)
            wrong = catalog.sid_rows(products)[products >= 0] != rows[positions[positions >= 0]]
            if (rows != np.arange(len(sids))).any() or wrong.any():
                errors.append(products)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    reader = threading.Thread(target=read)
    reader.start()
    try:
        for step in range(60):
            catalog.append([f"n{step}"], codes[step : step + 1] if step % 2 else (codes[step : step + 1] + step) % 4)
            catalog.withdraw([f"p{step % 60}"])
            catalog.restore([f"p{step % 60}"])
    finally:
        done.set()
        reader.join()
        sys.setswitchinterval(interval)
    assert not errors
