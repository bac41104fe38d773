import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rqsid.sid_tokenizer import strings as strings_module
from rqsid.sid_tokenizer.strings import (
    hash_rows,
    index_strings,
    pack_product_ids,
    pack_strings,
    search_strings,
    unpack_strings,
)

# Everything that UTF-8 can hold: NUL, combining marks, other planes, right-to-left; no lone surrogates.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ASCII_LOOKALIKES = st.text("ab\0", max_size=5)  # many prefixes of each other, and zero bytes
IDS = st.lists(TEXT.filter(bool) | ASCII_LOOKALIKES.filter(bool), min_size=1, max_size=40, unique=True)


def index(strings):
    packed, offsets = pack_strings(strings)
    hashes = hash_rows(packed, offsets)
    order = np.argsort(hashes, kind="stable")
    return packed, offsets, hashes[order], order


@given(st.lists(TEXT | ASCII_LOOKALIKES, max_size=30))
@settings(max_examples=80, deadline=None)
def test_pack_and_unpack(strings):
    packed, offsets = pack_strings(strings)
    assert packed.tobytes() == "".join(strings).encode()
    assert unpack_strings(packed, offsets, range(len(strings))) == strings
    rows = np.arange(len(strings))[::-1].repeat(2)
    assert unpack_strings(packed, offsets, rows) == [strings[row] for row in rows]


@pytest.mark.parametrize("row", [-1, 2])
def test_rows_outside_are_refused(row):
    packed, offsets = pack_strings(["a", "b"])
    with pytest.raises(ValueError, match=rf"\[0, 2\), got .*{row}"):
        unpack_strings(packed, offsets, [row])


@given(IDS, st.lists(TEXT | ASCII_LOOKALIKES, max_size=20), st.randoms())
@settings(max_examples=120, deadline=None)
def test_search_equals_a_dict(ids, others, random):
    wanted = [random.choice(ids) for _ in range(15)] + others
    random.shuffle(wanted)
    oracle = {string: row for row, string in enumerate(ids)}
    assert search_strings(wanted, *index(ids)).tolist() == [oracle.get(string, -1) for string in wanted]


@pytest.mark.parametrize("modulus", [1, 3])
@given(ids=IDS, others=st.lists(TEXT | ASCII_LOOKALIKES, max_size=20))
@settings(max_examples=60, deadline=None)
def test_search_is_right_when_hashes_collide(modulus, ids, others):
    with pytest.MonkeyPatch.context() as patch:
        original = hash_rows
        patch.setattr(strings_module, "hash_rows", lambda packed, offsets: original(packed, offsets) % modulus)
        packed, offsets = pack_strings(ids)
        hashes = strings_module.hash_rows(packed, offsets)
        order = np.argsort(hashes, kind="stable")
        oracle = {string: row for row, string in enumerate(ids)}
        wanted = others + ids[::-1]
        found = search_strings(wanted, packed, offsets, hashes[order], order)
        assert found.tolist() == [oracle.get(string, -1) for string in wanted]


def test_hash_of_a_string_does_not_depend_on_its_neighbours(monkeypatch):
    strings = ["", "a", "", "", "ab", "a\0", "ü", "p" * 300, ""]
    whole = hash_rows(*pack_strings(strings))
    assert whole.tolist() == [hash_rows(*pack_strings([string]))[0] for string in strings]
    monkeypatch.setattr(strings_module, "CHUNK_STRINGS", 2)
    assert hash_rows(*pack_strings(strings)).tolist() == whole.tolist()


def test_hashes_spread():
    strings = [f"B{number:06d}" for number in range(50_000)] + [str(number) for number in range(50_000)]
    hashes = hash_rows(*pack_strings(strings))
    assert len(np.unique(hashes)) == len(strings)
    assert abs((hashes < 0).mean() - 0.5) < 0.01


def test_search_in_bulk():
    strings = [f"product/{number}" for number in range(20_000)]
    wanted = strings[::-1] + [f"product/{number}x" for number in range(100)]
    assert search_strings(wanted, *index(strings)).tolist() == [*range(19_999, -1, -1), *[-1] * 100]
    assert search_strings([], *index(strings)).tolist() == []


@pytest.mark.parametrize("wanted", ["a", ["a", 1], [None], [b"a"]])
def test_search_of_other_than_a_list_of_strings(wanted):
    with pytest.raises(TypeError, match="not a string|list of strings"):
        search_strings(wanted, *index(["a"]))


@pytest.mark.parametrize(
    "ids, error, message",
    [
        ([], ValueError, "at least one product"),
        ("B001", TypeError, "single string"),
        (["a", 5], TypeError, r"5 \(row 1\) is int.*Convert"),
        (["a", None], TypeError, "None"),
        (["a", ""], ValueError, "row 1 is empty"),
        (["a", "b", "c", "b", "b"], ValueError, r"'b' appears more than once \(2 repetitions"),
    ],
)
def test_bad_product_ids(ids, error, message):
    with pytest.raises(error, match=message):
        index_strings(*pack_product_ids(ids))


@pytest.mark.parametrize(
    "strings, error, message",
    [
        (["a", "x\ud800y"], ValueError, "cannot be written as UTF-8"),
        (["a", None], TypeError, "None.*NoneType"),
        (["a", b"b"], TypeError, "bytes"),
    ],
)
def test_strings_that_cannot_be_packed(strings, error, message):
    with pytest.raises(error, match=message):
        pack_strings(strings)
