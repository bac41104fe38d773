import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rqsid import ProductCatalog, TokenPruning, diagnose
from rqsid.sid_tokenizer import index_files
from rqsid.sid_tokenizer.index_files import read_index, write_index
from rqsid.sid_tokenizer.sid_tokens import layer_letter

FORMATS = [None, "[{letter}{code}]", "<|sid_{letter}_{code}|>", "{code}{letter}", "{{{letter}}}{code:03d}|{code}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("index")


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@st.composite
def plain_indexes(draw):
    """Ids, codes, sizes, and the index by its definition."""
    sizes = draw(st.lists(st.integers(1, 300), min_size=1, max_size=6))
    ids = draw(
        st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5), min_size=1, unique=True)
    )
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    codes = np.stack([random.integers(0, size, len(ids)) for size in sizes], axis=1)
    token_format = draw(st.sampled_from(FORMATS))
    spelled = "<{letter}_{code}>" if token_format is None else token_format
    rows = [[spelled.format(letter="abcdef"[at], code=code) for at, code in enumerate(row)] for row in codes.tolist()]
    return ids, codes, sizes, token_format, dict(zip(ids, rows, strict=True))


@given(plain_indexes())
@settings(max_examples=150, deadline=None)
def test_read_and_write_equal_json(folder, parts):
    ids, codes, sizes, token_format, index = parts
    path = folder / "given.index.json"
    with open(path, "w", encoding="utf-8") as file:
        json.dump(index, file)
    found_ids, found_codes, found_sizes = read_index(path, token_format, sizes)
    assert found_ids == ids and found_sizes == sizes
    assert found_codes.dtype == np.int32 and np.array_equal(found_codes, codes)
    assert read_index(path, token_format)[2] == [codes.max() + 1] * len(sizes)

    catalog = ProductCatalog.build(ids, codes, sizes)
    write_index(catalog, folder / "written.index.json", token_format)
    assert (folder / "written.index.json").read_bytes() == path.read_bytes()


def test_by_hand(tmp_path):
    path = written(tmp_path / "index.json", '\ufeff{"7":["<a_183>", "<b_0>"],\n "007": ["<a_2>", "<b_41>"] }\n')
    ids, codes, sizes = read_index(path)
    assert ids == ["7", "007"] and codes.tolist() == [[183, 0], [2, 41]] and sizes == [184, 184]
    assert read_index(str(path), codebook_sizes=np.array([256, 64]))[2] == [256, 64]
    catalog = ProductCatalog.build(ids, codes, sizes)
    write_index(catalog, path)
    assert path.read_text() == '{"7": ["<a_183>", "<b_0>"], "007": ["<a_2>", "<b_41>"]}'


def test_layers_beyond_x(tmp_path):
    """`x` names suffixes, so the 24th layer is `y` here, not `x`."""
    letters = [*"abcdefghijklmnopqrstuvwyz", "a1", "b1"]
    tokens = [f"<{letter}_{place}>" for place, letter in enumerate(letters)]
    path = written(tmp_path / "index.json", json.dumps({"p": tokens}))
    assert read_index(path)[1].tolist() == [list(range(27))]
    write_index(ProductCatalog.build(["p"], np.arange(27)[None], [27] * 27), tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == {"p": tokens}
    tokens[23] = "<x_23>"
    written(path, json.dumps({"p": tokens}))
    with pytest.raises(ValueError, match=r"'<x_23>' in place 23, where a token such as '<y_0>' belongs"):
        read_index(path)


def test_batches_make_no_difference(tmp_path, monkeypatch, make_parts):
    catalog = make_parts(strategy="none", num_products=50)[2]
    write_index(catalog, tmp_path / "whole.json")
    monkeypatch.setattr(index_files, "BATCH_PRODUCTS", 7)
    write_index(catalog, tmp_path / "parts.json")
    assert (tmp_path / "whole.json").read_bytes() == (tmp_path / "parts.json").read_bytes()
    assert len(json.loads((tmp_path / "parts.json").read_text())) == 50


def test_each_distinct_token_is_parsed_once(tmp_path, monkeypatch):
    path = written(tmp_path / "index.json", json.dumps({str(row): [f"<a_{row % 5}>", "<b_1>"] for row in range(1000)}))
    calls = []
    parse = index_files._parse
    monkeypatch.setattr(index_files, "_parse", lambda *arguments: calls.append(1) or parse(*arguments))
    assert read_index(path)[1][:, 0].tolist() == [row % 5 for row in range(1000)]
    assert len(calls) <= 5 + 1 + 4


@pytest.mark.parametrize("layer", [0, 1])
def test_a_dropped_layer(tmp_path, layer):
    codes = np.array([[3, 1, 4], [1, 5, 2], [6, 5, 3]])
    pruning = TokenPruning("drop_layer", layer=layer).fit(codes, [7, 7, 7])
    catalog = ProductCatalog.build(["p", "q", "r"], codes, [7, 7, 7], pruning)
    write_index(catalog, tmp_path / "index.json")
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["p"] == [["<b_1>", "<c_4>"], ["<a_3>", "<c_4>"]][layer]
    ids, found, sizes = read_index(tmp_path / "index.json")
    codes[:, layer] = -1
    assert ids == ["p", "q", "r"] and found.tolist() == codes.tolist() and len(sizes) == 3
    assert diagnose(found, sizes).layers[layer].present == 0
    assert read_index(tmp_path / "index.json", codebook_sizes=[7, 7, 7])[2] == [7, 7, 7]
    with pytest.raises(ValueError, match=r"absent \(-1\)"):
        ProductCatalog.build(ids, found, sizes)


def test_withdrawn_products_are_left_out(tmp_path):
    codes = np.array([[0, 1], [1, 0], [1, 1], [1, 1]])
    catalog = ProductCatalog.build(["a", "b", "c", "d"], codes, [2, 2], collisions="suffix")
    with pytest.raises(ValueError, match="2 SIDs of 2 tokens, 2 SIDs of 3 tokens, 2 of them with a suffix"):
        write_index(catalog, tmp_path / "index.json")
    catalog.withdraw(["c", "d"])
    write_index(catalog, tmp_path / "index.json")
    assert json.loads((tmp_path / "index.json").read_text()) == {"a": ["<a_0>", "<b_1>"], "b": ["<a_1>", "<b_0>"]}
    catalog.withdraw(["a", "b"])
    with pytest.raises(ValueError, match="Every product of the catalog is withdrawn"):
        write_index(catalog, tmp_path / "index.json")


def test_reassigned_sids_are_written(tmp_path, make_parts):
    _, quantizer, catalog = make_parts(strategy="none", num_products=60, sizes=(3, 4, 8))
    rows = np.arange(60)
    assert catalog.num_sids < 60  # some collide
    apart = ProductCatalog.build(
        catalog.product_ids(rows), catalog.codes, [3, 4, 8], collisions="reassign", quantizer=quantizer
    )
    write_index(apart, tmp_path / "index.json")
    ids, codes, sizes = read_index(tmp_path / "index.json", codebook_sizes=[3, 4, 8])
    assert ids == apart.product_ids(rows) and len(np.unique(codes, axis=0)) == 60
    assert np.array_equal(codes, apart.sid_codes[apart.sid_rows(rows), :-1]) and not np.array_equal(codes, apart.codes)


CODES = np.array([[0, 1, 0], [1, 0, 1], [1, 1, 1], [1, 1, 1]])
FULL = TokenPruning("top_k", layer=0, top_k=1).fit(CODES, [2, 2, 2])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"pruning": FULL}, "2 SIDs of 2 tokens, 1 SIDs of 3 tokens, 0 of them with a suffix.*parquet"),
        ({"collisions": "suffix"}, '2 SIDs of 3 tokens, 2 SIDs of 4 tokens, 2 of them.*collisions="reassign"'),
        # With both, lengths can be equal though the layers are not, and every SID can have a suffix.
        ({"pruning": FULL, "codes": CODES[[0, 2, 3, 3]], "collisions": "suffix"}, "3 of them with a suffix"),
        ({"codes": CODES[[2, 2, 2, 2]], "collisions": "suffix"}, "4 SIDs of 4 tokens, 4 of them with a suffix"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, arguments, message):
    catalog = ProductCatalog.build(["a", "b", "c", "d"], **{"codes": CODES, "codebook_sizes": [2, 2, 2]} | arguments)
    with pytest.raises(ValueError, match=message):
        write_index(catalog, tmp_path / "index.json")
    assert os.listdir(tmp_path) == []


def test_suffixes_that_nobody_has_are_no_obstacle(tmp_path):
    catalog = ProductCatalog.build(["a", "b", "c"], CODES[:3], [2, 2, 2], collisions="suffix")
    assert catalog.suffix_size
    write_index(catalog, tmp_path / "index.json")
    assert read_index(tmp_path / "index.json")[1].tolist() == CODES[:3].tolist()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, make_parts):
    catalog = make_parts(strategy="none")[2]
    path = written(tmp_path / "index.json", "old")
    monkeypatch.setattr(index_files, "BATCH_PRODUCTS", 20)
    read = catalog.product_ids

    def product_ids(rows):
        if rows[0] == 40:
            raise OSError("gone")
        return read(rows)

    monkeypatch.setattr(catalog, "product_ids", product_ids)
    with pytest.raises(OSError, match="gone"):
        write_index(catalog, path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["index.json"]


def test_fingers_of_the_parser():
    """Neither another width nor another digit passes for a code."""
    for token in [
        "<a_07>",
        "<a_٣>",
        "<a_-1>",
        "<a_>",
        "<a_1.0>",
        "<a_1> ",
        "<A_1>",
        "<a_1048576>",
        f"<a_{'9' * 5000}>",
    ]:
        assert index_files._parse(token, 0, "<{letter}_{code}>") is None, token
    assert index_files._parse("<a_1048575>", 0, "<{letter}_{code}>") == 2**20 - 1
    assert (
        index_files._parse("a.7", 0, "{letter}.{code}") == 7
        and index_files._parse("a-7", 0, "{letter}.{code}") is None
    )
    assert index_files._parse("a.007", 0, "{letter}.{code:03d}") == 7
    for layer in range(60):
        assert index_files._parse(f"<{layer_letter(layer)}_12>", layer, "<{letter}_{code}>") == 12
        assert index_files._parse(f"<{layer_letter(layer)}_12>", layer + 1, "<{letter}_{code}>") is None


BAD = {
    "empty file": ("", "index.json is empty"),
    "truncated": ('{"0": ["<a_1>", "<b', "not valid JSON.*truncated"),
    "cut between items": ('{"0": ["<a_1>"], ', "not valid JSON.*truncated"),
    "two objects": ('{"0": ["<a_1>"]}{"1": ["<a_1>"]}', "not valid JSON"),
    "deep": ("[" * 100_000, "not valid JSON"),
    "list": ('[["0", ["<a_1>"]]]', "holds a JSON list; it must be an object"),
    "string": ('"a"', "holds a JSON string"),
    "no item": ("{}", "holds no item"),
    "twice": ('{"0": ["<a_1>"], "1": ["<a_2>"], "0": ["<a_1>"]}', "1 items more than once, for instance '0'"),
    "string value": ('{"0": ["<a_1>"], "7": "<a_1>"}', "Item '7' of index.json has a JSON string for its SID"),
    "object value": ('{"0": {"a": 1}}', "Item '0' of index.json has a JSON object for its SID"),
    "null value": ('{"0": null}', "has a JSON null for its SID"),
    "codes": ('{"0": ["<a_1>"], "3": [1]}', "Item '3' of index.json has a JSON number among its tokens"),
    "boolean": ('{"0": [true]}', "JSON boolean among"),
    "nested": ('{"0": [["<a_1>"]]}', "JSON list among"),
    "huge number": ('{"0": [' + "1" * 5000 + "]}", "number where lists of tokens belong"),
    "lengths": ('{"0": ["<a_1>", "<b_1>"], "5": ["<a_1>"]}', "Item '5' of index.json has 1 tokens, item '0' has 2"),
    "no tokens": ('{"0": []}', "Item '0' of index.json has 0 tokens"),
    "order": ('{"0": ["<a_1>", "<b_1>"], "4": ["<b_1>", "<a_1>"]}', "Item '4' .*'<b_1>' in place 0, where .*'<a_0>'"),
    "order of all": ('{"0": ["<b_1>", "<a_1>"]}', "Item '0' .*'<a_1>' in place 1"),
    "two layers left out": ('{"0": ["<a_1>", "<d_1>"]}', "'<d_1>' in place 1, where a token such as '<b_0>'"),
    "two gaps": ('{"0": ["<b_1>", "<d_1>"]}', "'<d_1>' in place 1, where a token such as '<c_0>'"),
    "spelling": ('{"0": ["a1"]}', "'a1' in place 0, where a token such as '<a_0>' belongs.*token_format"),
    "leading zero": ('{"0": ["<a_1>"], "1": ["<a_01>"]}', "Item '1' .*'<a_01>'"),
    "code of millions": ('{"0": ["<a_99999999>"]}', "'<a_99999999>' in place 0.*code 0 to 1048575"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(tmp_path, name):
    content, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        read_index(written(tmp_path / "index.json", content))


def test_bad_arguments_are_refused(tmp_path, monkeypatch, make_parts):
    path = written(tmp_path / "index.json", '{"0": ["<a_1>", "<b_1>"], "1": ["<a_0>", "<b_5>"]}')
    with pytest.raises(ValueError, match="There is no file"):
        read_index(tmp_path / "none.json")
    with pytest.raises(ValueError, match="There is no file"):
        read_index(tmp_path)
    with pytest.raises(ValueError, match=r"codebook_sizes=\[2, 6, 6\] has 3 layers, index.json has 2"):
        read_index(path, codebook_sizes=[2, 6, 6])
    with pytest.raises(
        ValueError, match="Item '1' of index.json has the code 5 in layer 1, outside its codebook of 5"
    ):
        read_index(path, codebook_sizes=[2, 5])
    for function, target in ((read_index, path), (lambda *a: write_index(make_parts()[2], *a), tmp_path / "new.json")):
        with pytest.raises(ValueError, match="same token to different layers or codes"):
            function(target, "<{code}>")
    (tmp_path / "latin.json").write_bytes('{"é": ["<a_1>"]}'.encode("latin-1"))
    with pytest.raises(ValueError, match="latin.json is not valid JSON.*utf-8"):
        read_index(tmp_path / "latin.json")
    monkeypatch.setattr(index_files, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match="holds 50 bytes, more than the 10 that are accepted.*parquet"):
        read_index(path)
    assert sorted(os.listdir(tmp_path)) == ["index.json", "latin.json"]
