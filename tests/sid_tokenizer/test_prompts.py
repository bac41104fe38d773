import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rqsid.sid_tokenizer import PromptTemplate
from rqsid.sid_tokenizer.prompts import SID, TASKS, Title


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


@pytest.mark.parametrize(
    "options, error, message",
    [
        (
            {"history_format": "titles"},
            ValueError,
            "history_format='titles' is unknown; choose one of sid, title, both",
        ),
        ({"layout": "list"}, ValueError, "layout='list' is unknown; choose one of purchase, session"),
        ({"system": "Be brief."}, ValueError, "system='Be brief.' is a message of a chat. Set chat=True"),
        ({"layout": "session", "chat": True}, ValueError, "no single message of a user"),
        (
            {"layout": "session", "history_format": "title"},
            ValueError,
            "history_format='title': products of a session",
        ),
        (
            {"layout": "session", "fields": ["query", "shop"]},
            ValueError,
            "behind the query would stand in every purchase",
        ),
        ({"layout": "session", "fields": ["products", "query"]}, ValueError, r"\['products'\] of its own"),
        ({"chat": "yes"}, TypeError, "chat='yes' must be True or False, got str"),
        ({"chat": 1}, TypeError, "chat=1 must be True or False, got int"),
        ({"system": 5, "chat": True}, TypeError, "system=5 must be text or None"),
        ({"history_separator": None}, TypeError, "history_separator=None must be text"),
        ({"answer": 3}, TypeError, "answer=3 must be text, got int"),
        ({"fields": "query"}, TypeError, "fields='query' must be a list of names, got str"),
        ({"fields": ["query", 3]}, TypeError, "fields must hold text, got int: 3"),
        ({"labels": {"query": None}}, TypeError, "labels must hold text, got NoneType"),
        ({"max_length": "9"}, TypeError, "max_length='9' must be a whole number or None"),
    ],
)
def test_values_of_a_template_are_checked_by_name(options, error, message):
    with pytest.raises(error, match=message):
        PromptTemplate(**options)


def test_pieces_of_a_history():
    example = {"profile": "x", "history": ["p1", "p2"], "query": "milk"}
    expected = {
        "sid": [SID("p1"), SID("p2")],
        "title": [Title("\n- ", "p1", True), Title("\n- ", "p2", True)],
        "both": [[Title("\n- ", "p1", False), SID("p1")], [Title("\n- ", "p2", False), SID("p2")]],
    }
    for history_format, units in expected.items():
        pieces = PromptTemplate(history_format=history_format).pieces(example)
        assert pieces == (["Profile: x\nHistory:"], units, ["\nQuery: milk\nProduct:"])


def test_pieces_of_a_session():
    template = PromptTemplate(["profile", "shop", "history", "query"], layout="session")
    example = {"profile": "x", "shop": "y", "queries": ["milk", "", None, " a \n b "], "products": ["p1", "p2", "p3"]}
    head = "Profile: x\nShop: y"
    texts = ["\nQuery: milk\nProduct:", "\nProduct:", "\nProduct:", "\nQuery: a b\nProduct:"]
    units = [[text, SID(product)] for text, product in zip(texts, ["p1", "p2", "p3"], strict=False)]
    assert template.pieces(example) == ([head], units, texts[-1:])
    whole = example | {"products": ["p1", "p2", "p3", "p4"]}
    assert template.split_session(whole, is_prompt=False) == (head, texts, whole["products"])
    # The next purchase alone has a query, or none has; and `history` is another word for `products`.
    units = [["\nProduct:", SID("p1")]]
    assert template.pieces({"history": ["p1"], "query": "b"}) == ([""], units, ["\nQuery: b\nProduct:"])
    assert template.pieces({"products": ["p1"]}) == ([""], units, ["\nProduct:"])
    assert template.pieces({"products": []}) == ([""], [], ["\nProduct:"])
    assert template.example_keys() == ["profile", "shop", "queries", "query", "products", "history"]
    assert PromptTemplate(["profile"], layout="session").example_keys() == ["profile", "products", "history"]


@pytest.mark.parametrize(
    "example, error, message",
    [
        ({"item": "p1"}, ValueError, r"none of \['profile', 'queries', .* \(its keys: \['item'\]\)"),
        ({"queries": ["a"], "products": ["p1"]}, ValueError, "1 queries and 1 products: a prompt has one query more"),
        ({"queries": ["a"], "query": "b"}, ValueError, "has queries and query, which say the same"),
        ({"history": ["p1"], "products": ["p1"]}, ValueError, "has products and history, which say the same"),
        ({"queries": "milk"}, TypeError, "queries must be a list of texts, got str: 'milk'"),
        ({"queries": [5]}, TypeError, "'query' must be text.* got int: 5"),
        ({"products": 5}, TypeError, "'products' must be a list of product ids, got int: 5"),
        ("milk", TypeError, "dict with the fields .* got str"),
    ],
)
def test_bad_sessions_are_refused(example, error, message):
    with pytest.raises(error, match=message):
        PromptTemplate(layout="session").pieces(example)


def test_bad_sessions_to_train_on_are_refused():
    template = PromptTemplate(layout="session")
    with pytest.raises(ValueError, match="2 queries and 1 products: a session has a query for each product"):
        template.split_session({"queries": ["a", "b"], "products": ["p1"]}, is_prompt=False)
    with pytest.raises(ValueError, match="a list of queries, one for each of its products, and no single query"):
        template.split_session({"query": "a", "products": ["p1"]}, is_prompt=False)
    with pytest.raises(TypeError, match="A session is a dict with some of .* got list"):
        template.split_session(["p1"], is_prompt=False)


def test_pieces_of_tasks():
    template = PromptTemplate(labels={"title": "Name: "})
    example = {"profile": "x", "history": ["p1"], "query": "milk", "title": "Milk\n1l", "product": "p9"}
    whole = template.pieces(example)
    assert template.pieces(example | {"task": "purchase"}) == template.pieces(example | {"task": None}) == whole
    pieces = {task: template.pieces(example | {"task": task}) for task in TASKS[1:]}
    assert pieces["history"] == (["Profile: x\nHistory:"], [SID("p1")], ["\nProduct:"])
    assert pieces["query"] == (["Query: milk\nProduct:"], [], [""])
    assert pieces["title"] == (["Name: Milk 1l"], [], ["\nProduct:"])
    assert type(pieces["describe"].head[1]) is SID and pieces["describe"] == (
        ["Product:", SID("p9"), "\nName:"],
        [],
        [],
    )


@pytest.mark.parametrize(
    "options, example, message",
    [
        ({}, {"task": "titel", "query": "x"}, "task='titel' is unknown; choose one of purchase, history, query"),
        (
            {"fields": ["query"]},
            {"task": "history", "query": "x"},
            r"task='history', but .* no such field, only \['query'\]",
        ),
        ({"layout": "session"}, {"task": "query", "query": "x"}, "has queries and products in one"),
        ({}, {"task": "title", "title": " "}, r"\"title\" has no title, found \['task', 'title'\]"),
        ({}, {"task": "describe", "title": "x"}, r"\"describe\" has no product id"),
        ({}, {"task": "query", "profile": "x"}, r"no value for any of the fields \['query'\]"),
        ({}, {"task": "history", "query": "x"}, r"no value for any of the fields \['profile', 'history'\]"),
    ],
)
def test_bad_tasks_are_refused(options, example, message):
    with pytest.raises(ValueError, match=message):
        PromptTemplate(**options).pieces(example)


def test_a_field_called_task_is_a_field():
    template = PromptTemplate(["task", "title"])
    assert template.pieces({"task": "gift", "title": "for her"}) == (
        ["Task: gift\nTitle: for her\nProduct:"],
        [],
        [""],
    )
