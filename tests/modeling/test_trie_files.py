"""Tries in files: equal when they come back, mapped, and refused when damaged."""

import json
import os
import re
import stat
import sys

import numpy as np
import pytest
import torch
from fresh_process import run_fresh
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tries import CatalogTokens, paths_of

from rqsid import ProductCatalog, TokenPruning
from rqsid.modeling import trie_files
from rqsid.modeling.trie import PARTS, SIDTrie


@pytest.fixture
def tokenizer():
    """40 products, SIDs of two and three tokens, some shared."""
    codes = np.random.default_rng(0).integers(0, 5, (40, 3))
    pruning = TokenPruning("top_k", layer=1, top_k=2).fit(codes, [5, 5, 5])
    return CatalogTokens(ProductCatalog.build([f"p{row}" for row in range(40)], codes, [5, 5, 5], pruning))


def assert_equal(trie, other):
    for name in (*PARTS, "symbol_tokens"):
        one, two = getattr(trie, "_" + name), getattr(other, "_" + name)
        assert torch.equal(one, two) and one.dtype == two.dtype if isinstance(one, torch.Tensor) else one == two
    for name in ("depth", "num_sids", "num_nodes", "num_roots", "level_widths", "level_sizes", "catalog_version"):
        assert getattr(trie, name) == getattr(other, name)


def test_all_kinds_of_tries_come_back(tokenizer, tmp_path):
    whole = SIDTrie.from_tokenizer(tokenizer)
    some = whole.restrict([f"p{row}" for row in range(7)])
    plain = SIDTrie(torch.tensor([[2**40, 5], [7, -1]]), torch.tensor([2**35, 1]))
    wide = SIDTrie(torch.arange(2**16 + 2)[:, None])
    half = SIDTrie(torch.arange(2**15 + 2)[:, None])
    for at, trie in enumerate([whole, some, plain, wide, half, SIDTrie.stack([some, plain, whole])]):
        trie.save(tmp_path / str(at))
        back = SIDTrie.load(tmp_path / str(at))
        assert_equal(trie, back)
        if trie.num_nodes < 1000:
            for root in range(trie.num_roots):
                assert paths_of(trie, root) == paths_of(back, root)
    assert whole.product_mask is SIDTrie.load(tmp_path / "0").product_mask is None
    assert (SIDTrie.load(tmp_path / "1").product_mask == some.product_mask).all()


def test_with_its_tokenizer_a_loaded_trie_can_be_restricted(tokenizer, tmp_path):
    whole = SIDTrie.from_tokenizer(tokenizer)
    whole.restrict([f"p{row}" for row in range(20)]).save(tmp_path / "trie")
    with pytest.raises(ValueError, match="This trie knows no products"):
        SIDTrie.load(tmp_path / "trie").restrict(["p3"])
    again = SIDTrie.load(tmp_path / "trie", tokenizer).restrict(["p3", "p30"])
    assert_equal(again, whole.restrict(["p3"]))
    assert again.product_mask.nonzero()[0].tolist() == [3]
    tokenizer.catalog.withdraw(["p39"])
    with pytest.raises(
        ValueError, match=f"of a catalog, the tokenizer's catalog has version {tokenizer.catalog.version_id}"
    ):
        SIDTrie.load(tmp_path / "trie", tokenizer)
    SIDTrie(torch.tensor([[1, 2]])).save(tmp_path / "plain")
    with pytest.raises(ValueError, match="holds the trie of version None of a catalog"):
        SIDTrie.load(tmp_path / "plain", tokenizer)


def test_equal_tries_make_equal_files_that_others_may_read(tokenizer, tmp_path):
    for name in "ab":
        tokenizer.cache.clear()
        SIDTrie.from_tokenizer(tokenizer).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert stat.S_IMODE(os.stat(tmp_path / "a").st_mode) == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_failed_save_leaves_the_file_as_it_was(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "trie"
    SIDTrie.from_tokenizer(tokenizer).save(path)
    before = path.read_bytes()

    def fail(tensors, name, metadata):
        open(name, "wb").write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(trie_files, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        SIDTrie(torch.tensor([[1, 2]])).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["trie"]


def test_a_loaded_trie_may_be_saved_over_its_file(tokenizer, tmp_path):
    """Its arrays are the file; the new one takes its name, not its place."""
    SIDTrie.from_tokenizer(tokenizer).save(tmp_path / "trie")
    trie = SIDTrie.load(tmp_path / "trie")
    trie.save(tmp_path / "trie")
    assert_equal(trie, SIDTrie.load(tmp_path / "trie"))


FRESH = """
import ctypes, json, sys, torch
from rqsid.modeling.trie import SIDTrie
ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed is given back
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
SIDTrie(torch.tensor([[1, 2]])).save(sys.argv[1] + ".small")
SIDTrie.load(sys.argv[1] + ".small").walk(torch.tensor([[1, 2]]))
before = anonymous()
trie = SIDTrie.load(sys.argv[1])
paths = torch.tensor(json.loads(sys.argv[2]))
rows = trie.sid_rows(trie.walk(paths)).tolist()
print(json.dumps({"rows": rows, "private": anonymous() - before, "num_sids": trie.num_sids}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="private memory is read from /proc")
def test_a_fresh_process_maps_the_file(tmp_path):
    keys = np.unique(np.random.default_rng(0).integers(0, 2**30, 3_000_000))
    codes = np.stack([keys >> 20, keys >> 10 & 1023, keys & 1023], axis=1).astype(np.int16)
    trie = SIDTrie.from_codes(codes, [1024 * layer + np.arange(1024) for layer in range(3)])
    trie.save(tmp_path / "trie")
    size = os.path.getsize(tmp_path / "trie")
    assert size > 23e6
    rows = np.arange(0, len(codes), 100_000)
    paths = (codes[rows].astype(int) + 1024 * np.arange(3)).tolist()
    run = run_fresh(FRESH, tmp_path / "trie", json.dumps(paths), check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["rows"] == rows.tolist() and found["num_sids"] == len(codes)
    assert found["private"] < 12e6, found


def test_truncated_and_foreign_files(tokenizer, tmp_path):
    SIDTrie.from_tokenizer(tokenizer).save(tmp_path / "trie")
    content = (tmp_path / "trie").read_bytes()
    for length in (0, 7, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(ValueError, match="cut is not a readable file of a SIDTrie"):
            SIDTrie.load(tmp_path / "cut")
    save_file({"edges": torch.zeros(3)}, tmp_path / "other")
    with pytest.raises(ValueError, match="other is not a readable file of a SIDTrie"):
        SIDTrie.load(tmp_path / "other")
    for config, message in (
        ("[1]", "is not a readable file"),
        ("{", "is not a readable file"),
        ('{"format_version": 2}', "another format than version 1"),
        ("{}", "another format than version 1"),
        ('{"format_version": 1}', "lacks level_starts, level_widths, level_sizes, catalog_version, indptr, leaf_rows"),
    ):
        save_file({"edges": torch.zeros(3)}, tmp_path / "other", metadata={"sid_trie": config})
        with pytest.raises(ValueError, match=message):
            SIDTrie.load(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        SIDTrie.load(tmp_path / "nowhere")


def contents(path):
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["sid_trie"])
        return {name: file.get_tensor(name).clone() for name in file.keys()}, config


# (10, 20, 30) -> row 0, (10, 21) -> row 1, (11, 30) -> row 2, (10, 20, 31) -> row 3; tokens 10 11 20 21 30 31 are 0 to 5.
# edges 0 1 | 2 3 4 | 4 5; indptr 0 2 | 4 5 | 7 7 7; level_starts 0 1 3 6 8; leaf_rows 1 2 0 3; short_leaves 4 5.
@pytest.mark.parametrize(
    "name, change, message",
    [
        ("edges", lambda t: t.long(), "edges is torch.int64 of shape (7,)"),
        ("edges", lambda t: t[None], "edges is torch.int16 of shape (1, 7)"),
        ("edges", lambda t: t.int(), "its edges are torch.int32 for 6 tokens"),
        ("edges", lambda t: t[:-1], "6 edges and 7 offsets do not make 8 nodes"),
        ("edges", lambda t: t.index_fill(0, torch.tensor(6), 6), "an edge has a token that does not exist"),
        ("edges", lambda t: t.index_fill(0, torch.tensor(0), -1), "an edge has a token that does not exist"),
        ("edges", lambda t: t.index_fill(0, torch.tensor(6), 4), "the children of a node do not ascend"),
        ("edges", lambda t: t.index_fill(0, torch.tensor(1), 0), "the children of a node do not ascend"),
        ("indptr", lambda t: t[:-1], "7 edges and 6 offsets do not make 8 nodes"),
        ("indptr", lambda t: t.index_fill(0, torch.tensor(0), 1), "the offsets do not follow the levels"),
        ("indptr", lambda t: t.index_fill(0, torch.tensor(1), 3), "the offsets do not follow the levels"),
        ("indptr", lambda t: t.index_fill(0, torch.tensor(2), 900), "the offsets do not ascend"),
        ("indptr", lambda t: t.index_fill(0, torch.tensor(2), -4), "the offsets do not ascend"),
        ("indptr", lambda t: t.index_fill(0, torch.tensor(6), 9), "the offsets do not reach all edges"),
        ("indptr", lambda t: t.index_fill(0, torch.tensor(2), 5), "short_leaves are not the nodes without children"),
        ("leaf_rows", lambda t: t[:-1], "3 rows for 4 leaves"),
        ("leaf_rows", lambda t: t.index_fill(0, torch.tensor(2), -1), "a leaf has a negative row"),
        ("short_leaves", lambda t: t.flip(0), "short_leaves are not the nodes without children"),
        ("short_leaves", lambda t: t - 1, "short_leaves are not the nodes without children"),
        ("symbol_tokens", lambda t: t[:-1], "an edge has a token that does not exist"),
        ("symbol_tokens", lambda t: t[:0], "its tokens are negative or not distinct"),
        ("symbol_tokens", lambda t: t - 11, "its tokens are negative or not distinct"),
        ("symbol_tokens", lambda t: t.index_fill(0, torch.tensor(1), 10), "its tokens are negative or not distinct"),
        ("product_mask", lambda t: torch.ones(3), "product_mask is torch.float32"),
        ("level_starts", lambda v: v[:2], "level_starts is no list of integers"),
        ("level_starts", lambda v: "0136", "level_starts is no list of integers"),
        ("level_starts", lambda v: [float(x) for x in v], "level_starts is no list of integers"),
        ("level_starts", lambda v: [1, *v[1:]], "level_starts does not ascend from 0"),
        ("level_starts", lambda v: [0, 3, 3, 6, 8], "level_starts does not ascend from 0"),
        ("level_starts", lambda v: [*v, 9], "do not make 9 nodes"),
        ("level_starts", lambda v: [0, 1, 4, 6, 8], "the offsets do not follow the levels"),
        ("level_starts", lambda v: [0, 2, 3, 6, 8], "7 edges and 7 offsets do not make 8 nodes"),
        ("level_starts", lambda v: [*v[:-1], 2**70], "do not make"),
        ("level_widths", lambda v: [2, 2, 3], "level_widths or level_sizes are not those of its nodes"),
        ("level_widths", lambda v: v[:-1], "no lists of counts"),
        ("level_sizes", lambda v: [1, 2, 2], "level_widths or level_sizes are not those of its nodes"),
        ("level_sizes", lambda v: [1, 2, True], "no lists of counts"),
        ("catalog_version", lambda v: 3, "catalog_version is no text"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, change, message):
    trie = SIDTrie(torch.tensor([[10, 20, 30], [10, 21, -1], [11, 30, -1], [10, 20, 31]]))
    trie.save(tmp_path / "trie")
    tensors, config = contents(tmp_path / "trie")
    values = config if name in config else tensors
    values[name] = change(values.get(name))
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "bad", metadata={"sid_trie": json.dumps(config)})
    with pytest.raises(ValueError, match=re.escape(message)):
        SIDTrie.load(tmp_path / "bad")


def test_a_root_without_children_is_refused(tmp_path):
    SIDTrie.stack([SIDTrie(torch.tensor([[1, 2]])), SIDTrie(torch.tensor([[1, 3]]))]).save(tmp_path / "trie")
    tensors, config = contents(tmp_path / "trie")
    tensors["indptr"] = torch.tensor([0, 0, 2, 3, 4], dtype=torch.int32)
    tensors["short_leaves"], tensors["leaf_rows"] = (
        torch.tensor([0], dtype=torch.int32),
        torch.zeros(3, dtype=torch.int32),
    )
    save_file(tensors, tmp_path / "bad", metadata={"sid_trie": json.dumps(config)})
    with pytest.raises(ValueError, match="a root has no children"):
        SIDTrie.load(tmp_path / "bad")
    config["level_sizes"] = [3, 1]
    SIDTrie.stack([SIDTrie(torch.tensor([[1, 2]])), SIDTrie(torch.tensor([[1, 3]]))]).save(tmp_path / "trie")
    save_file(contents(tmp_path / "trie")[0], tmp_path / "bad", metadata={"sid_trie": json.dumps(config)})
    with pytest.raises(ValueError, match="level_sizes do not fit its levels"):
        SIDTrie.load(tmp_path / "bad")


def test_rows_and_masks_beyond_the_catalog(tokenizer, tmp_path):
    trie = SIDTrie.from_tokenizer(tokenizer).restrict([f"p{row}" for row in range(30)])
    trie.save(tmp_path / "trie")
    for name, value, message in (
        ("leaf_rows", None, "a leaf has a row beyond the catalog"),
        ("product_mask", torch.ones(39, dtype=torch.bool), "its mask is not one of the catalog's products"),
    ):
        tensors, config = contents(tmp_path / "trie")
        if value is None:
            value = tensors[name]
            value[2] = tokenizer.catalog.num_sids
        save_file(tensors | {name: value}, tmp_path / "bad", metadata={"sid_trie": json.dumps(config)})
        with pytest.raises(ValueError, match=message):
            SIDTrie.load(tmp_path / "bad", tokenizer)


def test_tokens_of_another_tokenizer(tokenizer, tmp_path):
    SIDTrie.from_tokenizer(tokenizer).save(tmp_path / "trie")
    other = CatalogTokens(tokenizer.catalog, seed=0)
    theirs, ours = (np.concatenate(one.layer_token_ids()) for one in (other, tokenizer))
    assert not np.isin(ours, theirs).all()
    with pytest.raises(ValueError, match="trie spells SIDs with the token [0-9]+, which is no SID token") as caught:
        SIDTrie.load(tmp_path / "trie", other)
    token = int(re.search("token ([0-9]+)", str(caught.value))[1])
    assert token in ours and token not in theirs
    # One beyond all of them, in a file that has no other flaw.
    tensors, config = contents(tmp_path / "trie")
    tensors["symbol_tokens"][-1] = 2**40
    save_file(tensors, tmp_path / "edited", metadata={"sid_trie": json.dumps(config)})
    SIDTrie.load(tmp_path / "edited")
    with pytest.raises(ValueError, match=f"edited spells SIDs with the token {2**40}"):
        SIDTrie.load(tmp_path / "edited", tokenizer)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_whatever_is_loaded_can_be_walked(tmp_path_factory, data):
    """Numbers changed at random: refused, or a trie whose every node can be looked at."""
    folder = tmp_path_factory.getbasetemp()
    SIDTrie(torch.tensor([[10, 20, 30], [10, 21, -1], [11, 30, -1], [10, 20, 31]])).save(folder / "trie")
    tensors, config = contents(folder / "trie")
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(["edges", "indptr", "leaf_rows", "short_leaves", "level_starts"]))
        values = config[name] if name == "level_starts" else tensors[name]
        values[data.draw(st.integers(0, len(values) - 1))] = data.draw(st.integers(-3, 12))
    save_file(tensors, folder / "bad", metadata={"sid_trie": json.dumps(config)})
    try:
        trie = SIDTrie.load(folder / "bad")
    except ValueError:
        return
    nodes = torch.arange(-1, trie.num_nodes)
    tokens, children, mask = trie.children(nodes)
    assert (children[mask] < trie.num_nodes).all() and (children[mask] > nodes[:, None].expand_as(mask)[mask]).all()
    assert (trie.sid_rows(nodes)[trie.is_leaf(nodes)] >= 0).all()
    everything = torch.cartesian_prod(*[torch.tensor([10, 11, 20, 21, 30, 31])] * 3)
    assert (trie.walk(everything) < trie.num_nodes).all()
    assert len(paths_of(trie)) == trie.num_sids
