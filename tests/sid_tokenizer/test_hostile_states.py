"""States of fits, tries and indexes that others wrote: read with equal content, or refused with one ValueError."""

import json
import re
import struct
import time
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from rqsid import ResidualQuantizer, ResidualQuantizerConfig, SIDTrie
from rqsid.sid_tokenizer.index_files import read_index

HUGE = [True, 1.5, "1", None, -1, 2**70, [], {}]


def contents(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118


# States of fits

POINTS = np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32)


def fit(folder):
    config = ResidualQuantizerConfig(codebook_sizes=[3, 4], num_iterations=3, capacity=1.5, normalize_residuals=True)
    return ResidualQuantizer(config).fit(POINTS, checkpoint_dir=folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    return fit(folder), *contents(folder / "fit.safetensors")


def test_a_finished_state_gives_the_same_codebooks(finished, tmp_path):
    quantizer, tensors, metadata = finished
    assert set(tensors) == {f"{layer}.{part}" for layer in (0, 1) for part in ("codebook", "prices", "scale")}
    save_file(tensors, tmp_path / "fit.safetensors", metadata=metadata)
    for one, other in zip(fit(tmp_path).parameters(), quantizer.parameters(), strict=True):
        assert torch.equal(one, other)


STATES = [
    *[{"finished": value} for value in (*HUGE, 3)],
    {},
    [],
    {"finished": 1, "unfinished": 0, "iterations": 1},
    {"finished": 1, "unfinished": 2, "iterations": 1},
    {"finished": 2, "unfinished": 2, "iterations": 1},
    {"finished": 1, "unfinished": 1},
    *[{"finished": 1, "unfinished": 1, "iterations": value} for value in HUGE],
    *[{"finished": 1, "unfinished": value, "iterations": 1} for value in HUGE],
]


def test_states_that_are_none(finished, tmp_path):
    _, tensors, metadata = finished
    path = tmp_path / "fit.safetensors"
    states = [json.dumps(state) for state in STATES] + [
        "",
        "[" * 50_000,
        "1" * 5000,
        '{"finished": 2, "finished": 1}',
        "NaN",
    ]
    for state in states:
        save_file(tensors, path, metadata=metadata | {"state": state})
        with pytest.raises(
            ValueError, match="fit.safetensors cannot be read .*Delete it to fit from the start"
        ) as caught:
            fit(tmp_path)
        assert type(caught.value) is ValueError and len(str(caught.value)) < 1000, state


@pytest.mark.parametrize(
    "changes",
    [
        {"0.codebook": torch.zeros(3, 5)},
        {"0.codebook": torch.zeros(3, 4, dtype=torch.int64)},
        {"0.codebook": torch.full((3, 4), torch.nan)},
        {"0.codebook": torch.zeros(12)},
        {"0.codebook": None},
        {"1.prices": torch.zeros(4, 1)},
        {"1.scale": torch.zeros(())},
        {"2.codebook": torch.zeros(4, 4)},
        {"x.codebook": torch.zeros(4, 4)},
        {"-1.codebook": torch.zeros(4, 4)},
        {"0": torch.zeros(1)},
        {"²." + "codebook": torch.zeros(4, 4)},
        {"9" * 5000 + ".codebook": torch.zeros(4, 4)},
        {"0.payload": torch.zeros(9)},
    ],
)
def test_tensors_that_are_none_of_a_state(finished, tmp_path, changes):
    _, tensors, metadata = finished
    tensors = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    save_file(tensors, tmp_path / "fit.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="fit.safetensors cannot be read") as caught:
        fit(tmp_path)
    assert type(caught.value) is ValueError


def test_cut_and_flipped_states(finished, tmp_path):
    _, tensors, metadata = finished
    path = tmp_path / "fit.safetensors"
    save_file(tensors, path, metadata=metadata)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    random = np.random.default_rng(1)
    for size in (0, 7, 8, length, 8 + length, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="fit.safetensors cannot be read"):
            fit(tmp_path)
    for position in [*range(8), *random.integers(8, 8 + length, 40)]:
        changed = bytearray(content)
        changed[position] ^= 0x02
        path.write_bytes(changed)
        with pytest.raises(
            ValueError, match="fit.safetensors (cannot be read|is the state of a fit of other)"
        ) as caught:
            fit(tmp_path)
        assert type(caught.value) is ValueError
    path.unlink()
    (tmp_path / "fit.safetensors").write_bytes(b"\x80\x04\x95cos\nsystem\n(S'true'\ntR.")  # a pickle
    with pytest.raises(ValueError, match="fit.safetensors cannot be read"):
        fit(tmp_path)


# Tries


@pytest.fixture(scope="module")
def trie(tmp_path_factory):
    path = tmp_path_factory.mktemp("trie") / "trie"
    SIDTrie(torch.tensor([[10, 20, 30], [10, 21, -1], [11, 30, -1], [10, 20, 31]])).save(path)
    tensors, metadata = contents(path)
    return path, tensors, json.loads(metadata["sid_trie"])


def assert_trie_refused(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        SIDTrie.load(path)
    assert type(caught.value) is ValueError and path.name in str(caught.value) and len(str(caught.value)) < 1000


def test_tries_that_are_refused(trie, tmp_path):
    _, tensors, config = trie
    path = tmp_path / "bad.trie"
    texts = ["[" * 50_000, '{"format_version": ' + "1" * 5000 + "}", "null", "NaN", "x" * 2**21]
    texts += [json.dumps(config | {"format_version": value}) for value in (True, 1.0, "1", None, 2**70)]
    texts += [json.dumps(config | {"payload": 1}), json.dumps(config | {"level_starts": [0, 1, 3, 6, 2**63]})]
    for key in ("level_starts", "level_widths", "level_sizes"):
        texts += [json.dumps(config | {key: value}) for value in (*HUGE, [2**70] * 3, [[]] * 5, [True] * 5)]
    for text in texts:
        save_file(tensors, path, metadata={"sid_trie": text})
        assert_trie_refused(path, "bad.trie (is not a readable file|has another format|holds|is damaged)")
    mask = torch.tensor([1, 2, 1, 1], dtype=torch.uint8).view(torch.bool)
    for name, value in (
        ("payload", torch.zeros(3)),
        ("product_mask", mask),
        ("edges", torch.zeros(7, dtype=torch.float8_e4m3fn)),
        ("edges", torch.zeros(7, dtype=torch.bfloat16)),
        ("leaf_rows", torch.zeros(0, dtype=torch.int32)),
        ("symbol_tokens", torch.zeros(0, dtype=torch.int64)),
    ):
        save_file(tensors | {name: value}, path, metadata={"sid_trie": json.dumps(config)})
        assert_trie_refused(path, "bad.trie (holds 'payload'|is damaged: )")
    (tmp_path / "folder").mkdir()
    assert_trie_refused(tmp_path / "folder", "folder is no ordinary file")


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_flipped_tries(trie, tmp_path_factory, data):
    content = bytearray(trie[0].read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    content = content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))]
    path = tmp_path_factory.getbasetemp() / "flipped.trie"
    path.write_bytes(content)
    try:
        loaded = SIDTrie.load(path)
    except ValueError as error:
        assert type(error) is ValueError and "flipped.trie" in str(error)
        return
    nodes = torch.arange(-1, loaded.num_nodes)
    _, children, mask = loaded.children(nodes)
    assert (children[mask] < loaded.num_nodes).all() and (loaded.sid_rows(nodes)[loaded.is_leaf(nodes)] >= 0).all()


# Indexes


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"\\ud800": ["<a_1>"]}', "is no text: it holds half a surrogate pair"),
        (b'{"a": ["\\ud800"]}', "in place 0, where a token such as"),
        (b'{"a": NaN}', "JSON number for its SID"),
        (b'{"a": [1e999]}', "JSON number among its tokens"),
        (b'{"a": ["<a_1>"], "a": ["<a_1>"]}', "more than once"),
        (b'{"a": [{"b": {"b": 1, "b": 2}}]}', "JSON object among its tokens"),
        (b'{"a": ' + b'{"b":' * 50_000, "is not valid JSON"),
        (b'\xff\xfe{"a": ["<a_1>"]}', "is not valid JSON"),
        ('{"a": ["<a_1>"]}'.encode("utf-16"), "is not valid JSON"),
        (b'{"a": ["<a_' + b"9" * 10**5 + b'>"]}', "in place 0"),
    ],
)
def test_indexes_that_are_refused(tmp_path, content, message):
    (tmp_path / "x.index.json").write_bytes(content)
    begin = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        read_index(tmp_path / "x.index.json")
    assert type(caught.value) is ValueError and "x.index.json" in str(caught.value)
    assert len(str(caught.value)) < 1000 and time.process_time() - begin < 2


def test_an_index_of_any_spelling(tmp_path):
    path = tmp_path / "x.index.json"
    path.write_bytes(b'\xef\xbb\xbf{"a\\u0000\\n": ["<a_1>", "<b_2>"], "": ["<a_0>", "<b_0>"]}')
    ids, codes, _ = read_index(path)
    assert ids == ["a\x00\n", ""] and codes.tolist() == [[1, 2], [0, 0]]
    tracemalloc.start()
    for token_format in ("{letter.__class__}{code}", "{code:>999999999}{letter}", "{0}{1}"):
        with pytest.raises(ValueError, match=re.escape("token_format=")):
            read_index(path, token_format)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
