"""From single purchases, line by line, to histories and sessions."""

import pytest
from datasets import Dataset, IterableDataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from rqsid.trainer import read_purchase_log
from rqsid.trainer.purchase_logs import _rows

LINES = [
    {"household": 1, "upc": "p3", "type": "milk", "day": 2, "age": "35-44"},
    {"household": 1, "upc": "p1", "type": "chips", "day": 1, "age": "35-44"},
    {"household": 1, "upc": "p2", "type": None, "day": 3, "age": "35-44"},
    {"household": 2, "upc": "p9", "type": "pizza", "day": 1, "age": None},
]
NAMES = {"user": "household", "product": "upc", "query": "type", "time": "day", "profile": ["age"]}


def test_purchases_with_their_histories():
    rows = list(read_purchase_log(Dataset.from_list(LINES), **NAMES))
    who = {"age": "35-44"}
    assert rows == [
        {"profile": who, "history": [], "product": "p1", "query": "chips"},
        {"profile": who, "history": ["p1"], "product": "p3", "query": "milk"},
        {"profile": who, "history": ["p1", "p3"], "product": "p2", "query": ""},
        {"profile": {"age": None}, "history": [], "product": "p9", "query": "pizza"},
    ]
    # The oldest are left out; without a time the order is that of the log; without query and profile a first one is no row.
    rows = list(read_purchase_log(Dataset.from_list(LINES), user="household", product="upc", max_history=1))
    assert rows == [{"history": ["p3"], "product": "p1"}, {"history": ["p1"], "product": "p2"}]


def test_sessions():
    log = Dataset.from_list(LINES).to_iterable_dataset()
    rows = list(read_purchase_log(log, **NAMES, layout="session", max_history=2))
    assert rows == [
        {"profile": {"age": "35-44"}, "products": ["p1", "p3"], "queries": ["chips", "milk"]},
        {"profile": {"age": "35-44"}, "products": ["p2"], "queries": [""]},
        {"profile": {"age": None}, "products": ["p9"], "queries": ["pizza"]},
    ]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=30), st.integers(1, 7))
def test_each_purchase_is_learned_once_and_sees_what_came_before(purchases, max_history):
    purchases = sorted(purchases, key=lambda entry: entry[0])
    lines = [{"user": user, "product": f"p{product}"} for user, product in purchases]
    options = {
        "shards": [Dataset.from_list(lines)] if lines else [],
        "columns": {"user": "user", "product": "product"},
        "profile": [],
    }
    sessions = list(_rows(**options, layout="session", max_history=max_history))
    assert [product for row in sessions for product in row["products"]] == [line["product"] for line in lines]
    assert all(1 <= len(row["products"]) <= max_history for row in sessions)
    expected = []
    for user in range(5):
        bought = [f"p{product}" for buyer, product in purchases if buyer == user]
        expected += [{"history": bought[:at][-max_history:], "product": bought[at]} for at in range(1, len(bought))]
    assert list(_rows(**options, layout="purchase", max_history=max_history)) == expected


def test_shards_of_a_stream_stay_shards(tmp_path):
    for number in range(3):
        part = [line | {"household": 10 * number + line["household"]} for line in LINES]
        Dataset.from_list(part).to_parquet(tmp_path / f"{2 - number}.parquet")  # not in the order of the users
    files = [str(tmp_path / f"{number}.parquet") for number in range(3)]
    log = load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=tmp_path / "cache")
    rows = read_purchase_log(log, **NAMES)
    assert isinstance(rows, IterableDataset) and rows.num_shards == 3
    parts = [list(rows.shard(3, index)) for index in range(3)]
    assert [len(part) for part in parts] == [4, 4, 4] and sum(parts, []) == list(rows)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_share_a_stream(tmp_path, num_workers):
    for number in range(3):
        part = [line | {"household": 10 * number + line["household"]} for line in LINES]
        Dataset.from_list(part).to_parquet(tmp_path / f"{number}.parquet")
    files = [str(tmp_path / f"{number}.parquet") for number in range(3)]
    log = load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=tmp_path / "cache")
    loader = DataLoader(read_purchase_log(log, **NAMES), num_workers=num_workers, collate_fn=list, batch_size=2)
    rows = [row for batch in loader for row in batch]
    assert len(rows) == 12
    for product, count in (("p1", 3), ("p2", 3), ("p3", 3), ("p9", 3)):
        assert sum(row["product"] == product for row in rows) == count


def test_purchases_that_nothing_stands_before_are_no_rows():
    lines = [
        {"user": "a", "product": "p1", "query": "  ", "age": None},
        {"user": "a", "product": "p2", "query": None, "age": None},
        {"user": "b", "product": "p3", "query": "milk", "age": None},
        {"user": "c", "product": "p4", "query": "", "age": "35-44"},
    ]
    rows = list(read_purchase_log(Dataset.from_list(lines), query="query", profile=["age"]))
    assert [row["product"] for row in rows] == ["p2", "p3", "p4"]
    with pytest.raises(ValueError, match="The log gives no row"):
        read_purchase_log(Dataset.from_list(lines[:1]), query="query", profile=["age"])


@pytest.mark.parametrize(
    "lines, options, message",
    [
        (LINES, {"user": "buyer"}, r"no columns \['buyer'\], only \['age', 'day', 'household', 'type', 'upc'\]"),
        (LINES, NAMES | {"profile": ["income"]}, r"no columns \['income'\]"),
        (LINES[::-1], NAMES, r"not sorted by user: 1 comes behind 2.*log.sort\('household'\)"),
        (LINES, NAMES | {"layout": "basket"}, "layout='basket' is unknown"),
        (LINES, NAMES | {"max_history": 0}, "max_history=0"),
        ([LINES[0] | {"household": None}], NAMES, "line without household"),
        ([*LINES, LINES[3] | {"day": float("nan")}], NAMES, "line without day"),
    ],
)
def test_what_cannot_be_read_is_refused(lines, options, message):
    options = {"product": "upc"} | options
    for log in (Dataset.from_list(lines), Dataset.from_list(lines).to_iterable_dataset()):
        with pytest.raises(ValueError, match=message):
            list(read_purchase_log(log, **options))
    with pytest.raises(TypeError, match="profile='age' must be a list"):
        read_purchase_log(Dataset.from_list(LINES), **NAMES | {"profile": "age"})
    with pytest.raises(TypeError, match="log is a list"):
        read_purchase_log(lines, **options)
