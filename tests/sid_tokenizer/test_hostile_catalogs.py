"""Catalog files whose columns contradict each other: whoever writes one vouches for its hashes, and nothing may lead out of bounds."""

import copy
import json
import struct
import time
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rqsid import ProductCatalog
from rqsid.sid_tokenizer import catalog_checks, strings
from rqsid.sid_tokenizer.catalog_columns import COLUMNS
from rqsid.sid_tokenizer.catalog_file import CONFIG
from rqsid.sid_tokenizer.files import read_tensors, write_tensors
from rqsid.sid_tokenizer.sid_keys import fits_key
from rqsid.sid_tokenizer.strings import hash_rows

STRANGE_IDS = [
    "\x00",
    "a\nb",
    "\u202eevil",
    "\x7f\x1b[31m",
    " ",
    "é",
    "e\u0301",
    "漢字",
    "\U0001f600",
    "../../x",
    "<a_1>",
    "x" * 1024,
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file with several versions, withdrawn products, suffixes, absent codes and ids of all kinds; and its parts."""
    folder = tmp_path_factory.mktemp("catalog")
    ids = [f"p{row}" for row in range(20)] + STRANGE_IDS
    codes = np.random.default_rng(0).integers(0, [3, 4, 5], (len(ids), 3))
    texts = [f"text {row} é" for row in range(len(ids))]
    catalog = ProductCatalog.build(ids, codes, [3, 4, 5], texts=texts, collisions="suffix")
    catalog.withdraw(["p3", "p4"])
    catalog.append(["new"], codes=np.array([[0, 1, 2]]), texts=["fresh"])
    catalog.restore(["p4"])
    catalog.update_popularity(["p5"], [7.0])
    catalog.save(folder / "sid_catalog.safetensors")
    tensors, config = read_tensors(folder / "sid_catalog.safetensors", COLUMNS)
    return folder / "sid_catalog.safetensors", {name: tensor.clone() for name, tensor in tensors.items()}, config


def look(catalog):
    """Everything that can be asked of a catalog, at every version."""
    found = []
    for version in range(catalog.oldest_version, catalog.version + 1):
        old = catalog.at_version(version)
        rows = np.arange(len(old))
        ids = old.product_ids(rows)
        found.append([ids, old.texts(rows), old.find_products(ids).tolist(), old.sid_rows(rows).tolist()])
        found.append([old.products_of(row).tolist() for row in range(old.num_sids)])
        found.append(old.expand_sids(np.arange(old.num_sids)[None], 50)[0].tolist())
        found.append(
            [old.find_sids(old.sid_codes).tolist(), old.popularity.tolist(), old.withdrawn.tolist(), repr(old)]
        )
        found.append([old.live_sid_rows().tolist(), old.lengths().tolist(), str(old.collision_report())])
    return found


def assert_refused(path, tensors, config, message):
    write_tensors(path, tensors, config)
    with pytest.raises(ValueError, match=message) as caught:
        ProductCatalog.load(path)
    assert type(caught.value) is ValueError and path.name in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_ids_of_all_kinds_come_back_as_they_are(saved):
    catalog = ProductCatalog.load(saved[0])
    assert catalog.product_ids(np.arange(20, 20 + len(STRANGE_IDS))) == STRANGE_IDS
    assert catalog.find_products(STRANGE_IDS).tolist() == list(range(20, 20 + len(STRANGE_IDS)))
    look(catalog)


def changed(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def with_ids(ids, order=None):
    """Columns of ids given as bytes, with hashes that fit."""
    lengths = np.array([0] + [len(each) for each in ids])
    packed, offsets = np.frombuffer(b"".join(ids), np.uint8), np.cumsum(lengths)
    hashes = hash_rows(packed, offsets)
    order = np.argsort(hashes, kind="stable")
    columns = {"bytes": packed.copy(), "offsets": offsets, "hashes": hashes[order], "order": order.astype(np.int32)}
    return {f"product_id_{name}": torch.from_numpy(np.ascontiguousarray(column)) for name, column in columns.items()}


def ids_of(tensors):
    packed, offsets = tensors["product_id_bytes"].numpy(), tensors["product_id_offsets"].tolist()
    return [packed[start:end].tobytes() for start, end in zip(offsets, offsets[1:], strict=False)]


def replaced(tensors, row, value):
    ids = ids_of(tensors)
    ids[row] = value
    return with_ids(ids)


def parted(tensors):
    """An offset in the middle of é."""
    row = ids_of(tensors).index("é".encode())
    return {"product_id_offsets": changed(tensors["product_id_offsets"], row, tensors["product_id_offsets"][row] + 1)}


def with_wrong_hash(tensors):
    hashes = changed(tensors["product_id_hashes"], 5, tensors["product_id_hashes"][5] + 1)
    return {"product_id_hashes": hashes}


COLUMN_EDITS = {
    "id not utf-8": (lambda t: replaced(t, 2, b"\xff\xfe"), "product_id_bytes.* is not UTF-8"),
    "id cut in a character": (lambda t: replaced(t, 2, "漢".encode()[:2]), "product_id_bytes.* is not UTF-8"),
    "surrogate": (lambda t: replaced(t, 2, b"\xed\xa0\x80"), "product_id_bytes.* is not UTF-8"),
    "character over two ids": (parted, "product_id_offsets.* parts a character in two"),
    "empty id": (lambda t: replaced(t, 2, b""), "has an id of 0 or 1024 bytes"),
    "long id": (lambda t: replaced(t, 2, b"y" * 1025), "has an id of 1 or 1025 bytes"),
    "id twice": (lambda t: replaced(t, 2, b"p7"), "hold one id twice"),
    "wrong hash": (with_wrong_hash, "holds other hashes than those of its ids"),
    "order swapped": (
        lambda t: {"product_id_order": t["product_id_order"].flip(0)},
        "other hashes than those of its ids",
    ),
    "no boolean": (
        lambda t: {"product_withdrawn": changed(t["product_withdrawn"].view(torch.uint8), 3, 2).view(torch.bool)},
        "product_withdrawn.* holds other values than booleans",
    ),
    "absent code of a product": (
        lambda t: {"product_codes": changed(t["product_codes"], (2, 1), -1)},
        "product_codes.* absent codes",
    ),
    "bfloat16": (lambda t: {"popularity": t["popularity"].bfloat16()}, "popularity.* holds bfloat16, not float64"),
    "float16 codes": (lambda t: {"sid_codes": t["sid_codes"].half()}, "sid_codes.* holds float16, not int16"),
    "number for a column": (lambda t: {"product_sids": t["product_sids"][0]}, "product_sids.* has shape \\(\\)"),
    "flat codes": (lambda t: {"product_codes": t["product_codes"].flatten()}, "product_codes.* has shape"),
    "one tensor more": (lambda t: {"payload": torch.zeros(3)}, "holds 'payload', which this version"),
    "no products": (
        lambda t: {
            name: t[name][: 1 if name.endswith("offsets") else 0]
            for name in COLUMNS
            if name.startswith("product_") or name in ("popularity", "text_offsets", "sid_products")
        },
        "configuration does not fit",
    ),
}


@pytest.mark.parametrize("name", COLUMN_EDITS)
def test_columns_that_are_refused(saved, tmp_path, name):
    _, tensors, config = saved
    change, message = COLUMN_EDITS[name]
    assert_refused(tmp_path / "x.safetensors", tensors | change(tensors), config, message)


def history(config, at, **values):
    entries = copy.deepcopy(config["history"])
    entries[at] |= values
    return {"history": entries}


HUGE = [True, 1.0, "1", None, -1, 2**70, 1e300]
CONFIG_EDITS = {
    **{f"suffix_size {value!r}": (lambda c, v=value: {"suffix_size": v}, "configuration") for value in HUGE},
    **{f"capacity {value!r}": (lambda c, v=value: {"capacity": v}, "configuration") for value in HUGE},
    **{f"size {value!r}": (lambda c, v=value: {"codebook_sizes": [3, v, 5]}, "configuration") for value in HUGE},
    **{f"products {value!r}": (lambda c, v=value: history(c, 0, products=v), "configuration") for value in HUGE},
    **{f"log {value!r}": (lambda c, v=value: history(c, -1, withdrawn_log=v), "configuration") for value in HUGE},
    "sizes of text": (lambda c: {"codebook_sizes": "345"}, "configuration"),
    "no sizes": (lambda c: {"codebook_sizes": None}, "configuration"),
    "sizes of a number": (lambda c: {"codebook_sizes": 3}, "configuration"),
    "a trillion codes": (lambda c: {"codebook_sizes": [10**12] * 3}, "configuration"),
    "many layers": (lambda c: {"codebook_sizes": [2] * 10**5}, "configuration"),
    "pruning of other codebooks": (
        lambda c: {"pruning": c["pruning"] | {"codebook_sizes": [2**31 - 1] * 3}},
        "configuration",
    ),
    "no pruning": (lambda c: {"pruning": None}, "configuration"),
    "strategy": (lambda c: {"pruning": c["pruning"] | {"strategy": ["none"]}}, "strategy=\\['none'\\] is unknown"),
    "layer": (lambda c: {"pruning": c["pruning"] | {"layer": 2**70, "strategy": "drop_layer"}}, "layer"),
    "pruned codes": (
        lambda c: {"pruning": c["pruning"] | {"pruned_codes": [2**70], "strategy": "threshold", "threshold": 0.5}},
        "outside the codebook of 4",
    ),
    "parts": (lambda c: {"pruning": c["pruning"] | {"parts": {}}}, "parts"),
    "collisions": (lambda c: {"collisions": ["share"]}, "configuration"),
    "codebook_version": (lambda c: {"codebook_version": 5}, "configuration"),
    "ancestors": (lambda c: {"ancestors": [1]}, "configuration"),
    "history of numbers": (lambda c: {"history": [1]}, "configuration"),
    "no history": (lambda c: {"history": []}, "configuration"),
    "history object": (lambda c: {"history": {"0": 1}}, "configuration"),
    "falling versions": (lambda c: {"history": c["history"][::-1]}, "configuration"),
    "more withdrawn": (lambda c: history(c, -1, withdrawn=5), "says that 5 products are withdrawn, of 33 32 are not"),
    "fewer SIDs before": (lambda c: history(c, 0, sids=3), "says 3 SIDs in version 1, of whose products one has SID"),
    "no suffixes": (lambda c: {"suffix_size": 0}, "Layer 3 holds|holds suffixes"),
    "format": (lambda c: {"format_version": True}, "format version True"),
    "format of text": (lambda c: {"format_version": "9" * 10**5}, "format version '999"),
}


@pytest.mark.parametrize("name", CONFIG_EDITS)
def test_configurations_that_are_refused(saved, tmp_path, name):
    _, tensors, config = saved
    change, message = CONFIG_EDITS[name]
    assert_refused(tmp_path / "x.safetensors", tensors, config | change(config), message)


def test_a_suffix_in_a_catalog_without_any(tmp_path):
    """Its key would be that of the next code, and its token none."""
    ProductCatalog.build(["p", "q"], np.array([[0, 1], [1, 0]]), [2, 2]).save(tmp_path / "c")
    tensors, config = read_tensors(tmp_path / "c", COLUMNS)
    edited = dict(tensors, sid_codes=changed(tensors["sid_codes"], (1, 2), 0))
    assert_refused(tmp_path / "x.safetensors", edited, config, "sid_codes.* holds suffixes, of which it has none")


def test_texts_that_are_not_utf8_are_refused_when_asked_for(saved, tmp_path):
    """Not on opening, which would read all of them."""
    _, tensors, config = saved
    write_tensors(tmp_path / "x", tensors | {"text_bytes": changed(tensors["text_bytes"], 3, 0xFF)}, config)
    catalog = ProductCatalog.load(tmp_path / "x")
    assert catalog.texts([1, 2]) == ["text 1 é", "text 2 é"]
    with pytest.raises(ValueError, match="is not UTF-8.*its file was edited") as caught:
        catalog.texts([0])
    assert type(caught.value) is ValueError


def test_an_index_in_which_all_hashes_are_equal(tmp_path, monkeypatch):
    """Each lookup would compare all ids."""
    monkeypatch.setattr(strings, "hash_rows", lambda packed, offsets: np.zeros(len(offsets) - 1, np.int64))
    monkeypatch.setattr(catalog_checks, "hash_rows", strings.hash_rows)
    ids = [str(row) for row in range(3000)]
    with pytest.raises(ValueError, match="More than 1024 product ids have the same hash"):
        ProductCatalog.build(ids, np.zeros((3000, 2), int), [1, 1])
    monkeypatch.setattr(strings, "MAX_EQUAL_HASHES", 2 * 3000)
    ProductCatalog.build(ids, np.zeros((3000, 2), int), [1, 1]).save(tmp_path / "x.safetensors")
    begin = time.process_time()
    with pytest.raises(ValueError, match="more than 1024 equal entries, which would make lookups slow"):
        ProductCatalog.load(tmp_path / "x.safetensors")
    assert time.process_time() - begin < 2


def test_of_a_large_catalog_a_sample_of_hashes_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog_checks, "CHECKED_HASHES", 50)
    catalog = ProductCatalog.build([str(row) for row in range(1000)], np.zeros((1000, 2), int), [1, 1])
    catalog.save(tmp_path / "x")
    assert len(ProductCatalog.load(tmp_path / "x")) == 1000
    tensors, config = read_tensors(tmp_path / "x", COLUMNS)
    shifted = dict(tensors, product_id_hashes=tensors["product_id_hashes"] + 1)
    assert_refused(tmp_path / "x.safetensors", shifted, config, "other hashes than those of its ids")


def test_numbers_are_checked_before_anything_follows_them(saved, tmp_path):
    """Sizes that a tokenizer would spell out, and products of thousands of them."""
    _, tensors, config = saved
    tracemalloc.start()
    begin = time.process_time()
    for sizes in ([10**12] * 3, [2**62] * 256, [2**24] * 10**5):
        edited = config | {"codebook_sizes": sizes, "pruning": config["pruning"] | {"codebook_sizes": sizes}}
        write_tensors(tmp_path / "x.safetensors", tensors, edited)
        with pytest.raises(ValueError, match="x.safetensors: .*configuration"):
            ProductCatalog.load(tmp_path / "x.safetensors")
    assert not fits_key([2**24] * 10**6)
    assert time.process_time() - begin < 2 and tracemalloc.get_traced_memory()[1] < 2e7
    tracemalloc.stop()


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_what_loads_answers_everything(saved, tmp_path_factory, data):
    """Random edits of columns and of the configuration: refused by name, or a catalog that can be asked anything."""
    _, tensors, config = saved
    tensors, config = dict(tensors), copy.deepcopy(config)
    for _ in range(data.draw(st.integers(1, 2))):
        kind = data.draw(st.sampled_from(["value", "value", "bytes", "shape", "type", "config", "history", "swap"]))
        name = data.draw(st.sampled_from(COLUMNS))
        column = tensors[name]
        if kind == "value" and column.numel():
            at = data.draw(st.integers(0, column.numel() - 1))
            value = data.draw(st.integers(-2, 40) | st.sampled_from([127, -128]))
            if column.dtype == torch.bool:
                value = bool(value)
            elif column.dtype == torch.uint8:
                value %= 256
            tensors[name] = changed(column.flatten(), at, value).reshape(column.shape)
        elif kind == "bytes" and column.numel():
            raw = column.contiguous().view(torch.uint8).flatten()
            at = data.draw(st.integers(0, raw.numel() - 1))
            tensors[name] = changed(raw, at, data.draw(st.integers(0, 255))).view(column.dtype).reshape(column.shape)
        elif kind == "shape":
            tensors[name] = data.draw(st.sampled_from([column[:-1], column[:0], column[None], column.flatten()]))
        elif kind == "type":
            types = [torch.int16, torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.bool, torch.uint8]
            tensors[name] = column.to(data.draw(st.sampled_from(types)))
        elif kind == "swap" and len(column) > 1:
            tensors[name] = column.flip(0)
        elif kind == "config":
            key = data.draw(st.sampled_from([*CONFIG, "pruning", "format_version"]))
            config[key] = data.draw(st.sampled_from([*HUGE, [], {}, [3, 4], [3, 4, 5], 0, 16, 17, "share"]))
        elif kind == "history" and isinstance(config["history"], list) and config["history"]:
            entry = data.draw(st.sampled_from(config["history"]))
            entry[data.draw(st.sampled_from(list(entry)))] = data.draw(st.integers(-1, 40) | st.sampled_from(HUGE))
    path = tmp_path_factory.getbasetemp() / "edited.safetensors"
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"config": json.dumps(config)}
    )
    try:
        catalog = ProductCatalog.load(path)
    except ValueError as error:
        assert type(error) is ValueError and "edited.safetensors" in str(error)
        return
    try:
        look(catalog)
    except ValueError as error:  # of texts, which are read when they are asked for
        assert "is not UTF-8" in str(error)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_flipped_bytes(saved, tmp_path_factory, data):
    content = bytearray(saved[0].read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 8 + length))
        content[at] ^= data.draw(st.integers(1, 255))
    content = content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))]
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    path.write_bytes(content)
    try:
        look(ProductCatalog.load(path))
    except ValueError as error:
        assert type(error) is ValueError and ("flipped.safetensors" in str(error) or "is not UTF-8" in str(error))


def test_saving_over_files_of_any_content(saved, tmp_path):
    """A damaged file is nothing that could be lost; remains of saves that are none stay."""
    catalog = ProductCatalog.load(saved[0])
    path = tmp_path / "sid_catalog.safetensors"
    (tmp_path / "sid_catalog.safetensors.abcdefgh.tmp").mkdir()
    (tmp_path / "sid_catalog.safetensors.abcdefgi.tmp").symlink_to("/etc/hostname")
    for config in (
        "[" * 50_000,
        "[]",
        '{"ancestors": 1, "history": []}',
        '{"ancestors": [], "history": [{"id": {}}]}',
        "1" * 5000,
    ):
        save_file({"a": torch.zeros(1)}, path, metadata={"config": config})
        catalog.save(path)
        assert look(ProductCatalog.load(path)) == look(catalog)
        path.unlink()
    assert [each.name for each in tmp_path.iterdir()] == ["sid_catalog.safetensors.abcdefgh.tmp"]
