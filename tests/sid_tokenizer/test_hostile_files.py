"""JSON and safetensors files of any content: read with equal content, or refused with one ValueError, quickly and in little memory."""

import json
import os
import struct
import time
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rqsid.sid_tokenizer.files import read_json, read_tensors, write_json, write_tensors
from rqsid.sid_tokenizer.untrusted import MAX_DEPTH, is_whole, parse_json, read_header, shown

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), VALUES, max_size=4), st.booleans())
@settings(max_examples=100, deadline=None)
def test_what_json_writes_is_read(content, ascii_only):
    try:
        data = json.dumps(content, ensure_ascii=ascii_only).encode()
    except UnicodeEncodeError:
        return
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        with pytest.raises(ValueError, match="half a surrogate pair"):
            parse_json(data)
        return
    assert parse_json(data) == json.loads(data) == content


@given(st.binary(max_size=60) | st.text('[]{}",:\\ud8e1-NaN0 \ufeff', max_size=40).map(str.encode))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_json_or_a_value_error(data):
    try:
        content = parse_json(data)
    except ValueError:
        return
    assert content == json.loads(data)


@pytest.mark.parametrize(
    "data, message",
    [
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "the key 'c' stands twice"),
        (b'{"a": NaN}', "NaN is no JSON"),
        (b'{"a": -Infinity}', "-Infinity is no JSON"),
        (b'{"a": 1e999}', "'1e999' is beyond the range of floats"),
        (b'{"a": "\\ud800"}', "half a surrogate pair"),
        (b'{"\\udfff": 1}', "half a surrogate pair"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'{"a": "\xff"}', "utf-8"),
        ('{"a": 1}'.encode("utf-16"), "utf-8"),
        (b'{"a": ' + b"1" * 5000 + b"}", "digits"),
        (b"[" * 100_000, "nested deeper than the 32"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "nested deeper than the 32"),
        (b"[" * 33 + b"]" * 33, "nested deeper than the 32"),
        (b"[" + b"[]," * 1_500_000 + b"1]", "3000001 values are more than the 2000000"),
        (b'{"a": 1} x', "Extra data"),
        (b"", "Expecting value"),
    ],
)
def test_json_that_is_refused(tmp_path, data, message):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(ValueError, match=f"x.json is not valid JSON .*{message}") as caught:
        read_json(tmp_path / "x.json")
    assert type(caught.value) is ValueError and len(str(caught.value)) < 500


def test_json_up_to_the_limits(tmp_path):
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    assert parse_json(b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}
    (tmp_path / "x.json").write_bytes(b"[1]")
    with pytest.raises(ValueError, match="x.json must hold a JSON object, found list"):
        read_json(tmp_path / "x.json")


def test_gigantic_json_is_refused_before_it_is_read(tmp_path):
    for name, content in (("sparse.json", None), ("lists.json", b"[" + b"[]," * 5_000_000 + b"1]")):
        with open(tmp_path / name, "wb") as file:
            file.write(content) if content else file.truncate(2**40)
    tracemalloc.start()
    begin = time.process_time()
    with pytest.raises(ValueError, match="sparse.json holds 1099511627776 bytes, more than the 67108864"):
        read_json(tmp_path / "sparse.json")
    assert tracemalloc.get_traced_memory()[1] < 1e6
    with pytest.raises(ValueError, match="lists.json is not valid JSON .*values are more than"):
        read_json(tmp_path / "lists.json")
    assert (
        tracemalloc.get_traced_memory()[1] < 3e7 and time.process_time() - begin < 5
    )  # 15 MB of file; parsed it takes 320
    tracemalloc.stop()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_what_is_no_ordinary_file_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(ValueError, match=f"{name} is no ordinary file"):
            read_json(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} is not a readable safetensors file .*no ordinary file"):
            read_tensors(tmp_path / name, [])
    for read in (read_json, lambda path: read_tensors(path, [])):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none")


def test_values_in_messages_are_short():
    deep = []
    for _ in range(20):
        deep = [deep]
    for value in ("x" * 10**6, list(range(10**6)), {str(key): "y" * 99 for key in range(10**4)}, 10**4000, deep):
        assert len(shown(value)) < 1200
    assert shown({"a": [1, None]}) == "{'a': [1, None]}"
    assert is_whole(3, 0, 3) and not any(is_whole(value, 0, 9) for value in (True, 1.0, "1", None, -1, 10, 2**70))


# Headers


ARRAYS = {"a": np.arange(6, dtype=np.int32).reshape(2, 3), "b": np.zeros(0, np.uint8), "c": np.ones(4)}


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("tensors") / "x.safetensors"
    write_tensors(path, ARRAYS, {"k": [1, 2]})
    return path.read_bytes()


def parts(content):
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def built(header, data, length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def assert_equal_or_refused(path):
    try:
        tensors, config = read_tensors(path, ["a", "b", "c"])
    except ValueError as error:
        assert type(error) is ValueError and os.path.basename(path) in str(error) and len(str(error)) < 1500
        return False
    for name, array in ARRAYS.items():
        assert tensors[name].numpy().dtype == array.dtype and tensors[name].shape == array.shape
    return True


def test_every_truncation_and_flips_of_a_header(content, tmp_path):
    path = tmp_path / "x.safetensors"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert not assert_equal_or_refused(path), length
    (length,) = struct.unpack("<Q", content[:8])
    random = np.random.default_rng(0)
    for position in [*range(8), *random.integers(8, 8 + length, 150)]:
        for mask in (0x01, 0x80):
            changed = bytearray(content)
            changed[position] ^= mask
            path.write_bytes(changed)
            try:
                read_tensors(path, ["a", "b", "c"])
            except ValueError as error:
                assert type(error) is ValueError and "x.safetensors" in str(error)


ENTRIES = {"dtype": "I32", "shape": [2, 3], "data_offsets": [32, 56]}
BAD_HEADERS = {
    "negative offset": ({"data_offsets": [-1, 24]}, "lies at"),
    "offset beyond": ({"data_offsets": [32, 2**40]}, "lies at"),
    "overflowing offset": ({"data_offsets": [2**64, 2**64 + 24]}, "lies at"),
    "falling offsets": ({"data_offsets": [56, 32]}, "does not take the bytes"),
    "three offsets": ({"data_offsets": [32, 40, 56]}, "lies at"),
    "offsets of floats": ({"data_offsets": [32.0, 56.0]}, "lies at"),
    "offsets of booleans": ({"data_offsets": [False, True]}, "does not take the bytes|lies at"),
    "overlap": ({"data_offsets": [8, 32]}, "overlap"),
    "shape of another size": ({"shape": [2, 4]}, "does not take the bytes"),
    "shape that overflows": ({"shape": [2**32, 2**32 + 1]}, "has the shape"),
    "shape of nothing": ({"shape": [2**62, 0], "data_offsets": [32, 32]}, "has the shape"),
    "wide and empty": ({"shape": [50, 50, 50, 50, 0], "data_offsets": [32, 32]}, "has the shape"),
    "negative shape": ({"shape": [-2, -3]}, "has the shape"),
    "shape of text": ({"shape": "23"}, "has the shape"),
    "many sides": ({"shape": [1] * 9 + [2, 3]}, "has the shape"),
    "unknown type": ({"dtype": "F8_E4M3"}, "holds 'F8_E4M3'"),
    "type of no text": ({"dtype": ["I32"]}, "holds \\['I32'\\]"),
    "half a byte": ({"dtype": "F4"}, "holds 'F4'"),
    "one key more": ({"strides": [3, 1]}, "describes 'a' as"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_headers_that_are_refused(content, tmp_path, name):
    change, message = BAD_HEADERS[name]
    header, data = parts(content)
    assert header["a"] == ENTRIES  # what the cases start from
    (tmp_path / "x.safetensors").write_bytes(built(header | {"a": header["a"] | change}, data))
    with pytest.raises(ValueError, match=f"x.safetensors is not a readable safetensors file .*{message}"):
        read_tensors(tmp_path / "x.safetensors", ["a", "b", "c"])


def test_other_headers_that_are_refused(content, tmp_path):
    path = tmp_path / "x.safetensors"
    header, data = parts(content)
    text = json.dumps(header)
    cases = {
        b"": "no JSON object|Expecting value",
        b"[]": "no JSON object",
        b"[" * 10_000: "nested deeper",
        (text[:-1] + f', "b": {json.dumps(header["b"])}}}').encode(): "'b' stands twice",
        json.dumps(header | {"a": 1}).encode(): "describes 'a' as 1",
        json.dumps(header | {"__metadata__": {"config": 1}}).encode(): "metadata are no texts",
        json.dumps(header | {"__metadata__": []}).encode(): "metadata are no texts",
        json.dumps(header | {"__metadata__": {}}).encode(): "no config",
        json.dumps(header | {"__metadata__": {"config": "[]"}}).encode(): "config is no JSON object but list",
        json.dumps(header | {"__metadata__": {"config": '{"a": NaN}'}}).encode(): "NaN",
        json.dumps(header | {"__metadata__": {"config": "[" * 9000}}).encode(): "nested deeper",
        json.dumps(header | {"__metadata__": {"config": '{"a": 1, "a": 2}'}}).encode(): "stands twice",
        json.dumps(header | {"__metadata__": {"config": '{"a": ' + "1" * 5000 + "}"}}).encode(): "digits",
    }
    for changed, message in cases.items():
        path.write_bytes(built(changed, data))
        with pytest.raises(ValueError, match=f"x.safetensors is not a readable safetensors file .*({message})"):
            read_tensors(path, ["a", "b", "c"])
    for whole, message in (
        (built(header, data + b"x"), "end at 56 of 57"),
        (built(header, data, length=2**63), "header ends behind"),
        (built(header, data, length=10**9), "header ends behind"),
        (content[:5], "header ends behind"),
    ):
        path.write_bytes(whole)
        with pytest.raises(ValueError, match=message):
            read_tensors(path, ["a", "b", "c"])
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x.safetensors holds 'c', which this version of rqsid does not know"):
        read_tensors(path, ["a", "b"], exactly=True)


def test_a_gigantic_header_costs_nothing(tmp_path):
    path = tmp_path / "x.safetensors"
    entry = b'"%d": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}'
    header = b"{" + b", ".join(entry % at for at in range(400_000)) + b"}"
    tracemalloc.start()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 2**38))
        file.truncate(2**40)
    with pytest.raises(ValueError, match="header of 274877906944 bytes is longer"):
        read_tensors(path, ["a"])
    os.remove(path)
    path.write_bytes(built(header, b""))
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    with pytest.raises(ValueError, match="values are more than"):
        read_tensors(path, ["a"])
    assert tracemalloc.get_traced_memory()[1] - before < 2 * len(header)
    tracemalloc.stop()


HEADER_VALUES = st.sampled_from([-1, 0, 1, 2, 3, 4, 24, 32, 56, 2**31, 2**63, 2**70, True, 1.5, None, "I64", [], {}])


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_edited_headers_are_read_alike_or_refused(content, tmp_path_factory, data):
    """Against safetensors itself: what is let through here is a file there, with the same tensors."""
    header, rest = parts(content)
    for _ in range(data.draw(st.integers(1, 3))):
        entry = header[data.draw(st.sampled_from(["a", "b", "c"]))]
        key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        if key == "dtype":
            entry[key] = data.draw(st.sampled_from(["I32", "U8", "F64", "BOOL", "BF16", "F8_E5M2", "C64", 3, None]))
        elif data.draw(st.booleans()) and isinstance(entry[key], list) and entry[key]:
            entry[key][data.draw(st.integers(0, len(entry[key]) - 1))] = data.draw(HEADER_VALUES)
        else:
            entry[key] = data.draw(st.lists(HEADER_VALUES, max_size=3) | HEADER_VALUES)
    path = tmp_path_factory.getbasetemp() / "edited.safetensors"
    path.write_bytes(built(header, rest))
    try:
        found, _ = read_header(path)
        tensors, _ = read_tensors(path, list(found))
    except ValueError:
        return
    for name, (_, shape) in found.items():
        assert list(tensors[name].shape) == shape
        tensors[name].clone()  # all of it can be read


def test_types_of_torch_that_no_bundle_has(tmp_path):
    for dtype in (torch.float8_e4m3fn, torch.complex64, torch.uint16, torch.int8):
        save_file({"a": torch.zeros(4).to(dtype)}, tmp_path / "x.safetensors", metadata={"config": "{}"})
        with pytest.raises(ValueError, match="x.safetensors is not a readable .*'a' holds '"):
            read_tensors(tmp_path / "x.safetensors", ["a"])


def test_writing_does_not_follow_links(tmp_path):
    (tmp_path / "blob").write_text('{"old": 1}')
    os.symlink("blob", tmp_path / "link.json")
    assert read_json(tmp_path / "link.json") == {"old": 1}
    write_json(tmp_path / "link.json", {"new": 1})
    assert (tmp_path / "blob").read_text() == '{"old": 1}' and not (tmp_path / "link.json").is_symlink()
