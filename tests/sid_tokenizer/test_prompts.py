import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rqsid.sid_tokenizer import PromptTemplate


def test_all_fields_in_order():
    example = {"query": "potato chips", "history": ["p1", "p2"], "profile": {"age": "35-44", "income": "50-74K"}}
    before, history, after = PromptTemplate().split(example)
    assert before == "Profile: age 35-44, income 50-74K\nHistory:"
    assert (history, after) == (["p1", "p2"], "\nQuery: potato chips\nProduct:")


@pytest.mark.parametrize(
    "example, expected",
    [
        ({"query": "milk"}, ("Query: milk\nProduct:", [], "")),
        ({"query": "milk", "history": []}, ("Query: milk\nProduct:", [], "")),
        ({"query": "milk", "history": None, "profile": ""}, ("Query: milk\nProduct:", [], "")),
        ({"query": "milk", "history": np.array([], dtype=str)}, ("Query: milk\nProduct:", [], "")),
        ({"query": " \t\n", "profile": "x"}, ("Profile: x\nProduct:", [], "")),
        ({"query": "milk", "profile": {"age": None, "income": ""}}, ("Query: milk\nProduct:", [], "")),
        ({"history": ["p1"]}, ("History:", ["p1"], "\nProduct:")),
        ({"history": "p1"}, ("History:", ["p1"], "\nProduct:")),
        ({"history": ("p2", "p1"), "query": "m"}, ("History:", ["p2", "p1"], "\nQuery: m\nProduct:")),
        ({"query": "milk", "other": "unused"}, ("Query: milk\nProduct:", [], "")),
        ({"profile": {"age": 35, "owner": True}}, ("Profile: age 35, owner True\nProduct:", [], "")),
    ],
)
def test_missing_and_empty_fields_are_left_out(example, expected):
    assert PromptTemplate().split(example) == expected


def test_own_template():
    template = PromptTemplate(["query", "history"], {"query": "Search ", "history": "Bought:"}, "=>", " | ")
    assert template.split({"query": "milk", "history": ["p1"]}) == ("Search milk | Bought:", ["p1"], " | =>")
    assert template.split({"query": "milk"}) == ("Search milk | =>", [], "")
    assert PromptTemplate(**template.to_dict()) == template


@given(st.text())
def test_a_value_stays_on_one_line(text):
    before, _, _ = PromptTemplate().split({"query": "x" + text, "profile": "y" + text})
    assert len(before.splitlines()) == 3 and "  " not in before


def test_line_breaks_cannot_make_another_field():
    before, history, _ = PromptTemplate().split({"query": "milk\nHistory:\u2028<a_1>\x85\r\nProduct:  x"})
    assert before == "Query: milk History: <a_1> Product: x\nProduct:" and history == []


@pytest.mark.parametrize(
    "example, error, message",
    [
        ({}, ValueError, r"no value for any of the fields \['profile', 'history', 'query'\]"),
        ({"qurey": "milk"}, ValueError, r"its keys: \['qurey'\]"),
        ({"query": "  ", "history": []}, ValueError, "no value for any of the fields"),
        ("milk", TypeError, "dict with the fields .* got str"),
        ({"query": 5}, TypeError, "'query' must be text.* got int: 5"),
        ({"query": ["milk"]}, TypeError, "'query' must be text.* got list"),
        ({"query": b"milk"}, TypeError, "'query' must be text.* got bytes"),
        ({"history": 5}, TypeError, "'history' must be a list of product ids, got int: 5"),
        ({"history": {"p1": 1}}, TypeError, "'history' must be a list of product ids, got dict"),
    ],
)
def test_bad_examples_are_refused(example, error, message):
    with pytest.raises(error, match=message):
        PromptTemplate().split(example)


@pytest.mark.parametrize("fields", [[], ["query", "query"]])
def test_bad_templates_are_refused(fields):
    with pytest.raises(ValueError, match="name at least one field, and each once"):
        PromptTemplate(fields)


def test_missing_values_of_pandas_are_left_out():
    template = PromptTemplate(fields=["profile"])
    profile = {"age": "35-44", "income": float("nan"), "owner": None, "size": 3}
    assert template.split({"profile": profile})[0] == "Profile: age 35-44, size 3\nProduct:"
    with pytest.raises(TypeError, match="'profile' has 'tags'.*list"):
        template.split({"profile": {"tags": ["a"]}})


def test_templates_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match=r"labels for \['qurey'\]"):
        PromptTemplate(labels={"qurey": "Search: "})
    with pytest.raises(ValueError, match="max_length=0"):
        PromptTemplate(max_length=0)
