import math
import re
import sys
import time

import evaluate
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from rqsid.evaluate_metrics import path

LOG2_3 = math.log2(3)

# Ranks 1, 3, miss, miss (nothing returned).
FOUR_ROWS = {
    "predictions": [["a", "b", "c"], ["", "", "d"], ["a", "b"], []],
    "references": ["a", "d", "z", "a"],
}
# SIDs s1 and s2 name two products each, so that the ranks by SID (1, 2, 2, miss) differ from those above. Returned SIDs:
# 2 + 3 + 2 + 0 = 7, of which one is invalid.
FOUR_ROWS_WITH_SIDS = FOUR_ROWS | {
    "sid_predictions": [["s1", "s2"], ["", "s3", "s1"], ["s1", "s2"], []],
    "sid_references": ["s1", "s3", "s2", "s1"],
    "groups": ["head", "tail", "head", ""],
}

HAND_COMPUTED = {
    "four rows": (
        None,
        FOUR_ROWS | {"ks": (1, 2, 3, 50), "ndcg_ks": (2, 3)},
        {
            "item_recall@1": 1 / 4,
            "item_recall@2": 1 / 4,
            "item_recall@3": 2 / 4,
            "item_recall@50": 2 / 4,
            "item_ndcg@2": 1 / 4,
            "item_ndcg@3": (1 / math.log2(2) + 1 / math.log2(4)) / 4,
            "item_mrr": (1 + 1 / 3) / 4,
            "num_rows": 4,
        },
    ),
    "four rows with SIDs": (
        "sid",
        FOUR_ROWS_WITH_SIDS | {"ks": (1, 2), "ndcg_ks": (10,)},
        {
            "item_recall@1": 1 / 4,
            "item_recall@2": 1 / 4,
            "item_ndcg@10": (1 + 1 / 2) / 4,
            "item_mrr": (1 + 1 / 3) / 4,
            "sid_recall@1": 1 / 4,
            "sid_recall@2": 3 / 4,
            "sid_ndcg@10": (1 + 1 / LOG2_3 + 1 / LOG2_3) / 4,
            "sid_mrr": (1 + 1 / 2 + 1 / 2) / 4,
            "invalid_rate": 1 / 7,
            "num_rows": 4,
            "item_recall@1/head": 1 / 2,
            "item_recall@2/head": 1 / 2,
            "item_ndcg@10/head": 1 / 2,
            "item_mrr/head": 1 / 2,
            "sid_recall@1/head": 1 / 2,
            "sid_recall@2/head": 2 / 2,
            "sid_ndcg@10/head": (1 + 1 / LOG2_3) / 2,
            "sid_mrr/head": (1 + 1 / 2) / 2,
            "invalid_rate/head": 0 / 4,
            "num_rows/head": 2,
            "item_recall@1/tail": 0,
            "item_recall@2/tail": 0,
            "item_ndcg@10/tail": 1 / math.log2(4),
            "item_mrr/tail": 1 / 3,
            "sid_recall@1/tail": 0,
            "sid_recall@2/tail": 1,
            "sid_ndcg@10/tail": 1 / LOG2_3,
            "sid_mrr/tail": 1 / 2,
            "invalid_rate/tail": 1 / 3,
            "num_rows/tail": 1,
        },
    ),
    "nothing returned at all": (
        "sid",
        {
            "predictions": [[], []],
            "references": ["a", "b"],
            "sid_predictions": [[], []],
            "sid_references": ["s", "t"],
            "groups": ["", ""],
            "ks": (1,),
            "ndcg_ks": (),
        },
        {"item_recall@1": 0, "item_mrr": 0, "sid_recall@1": 0, "sid_mrr": 0, "invalid_rate": 0, "num_rows": 2},
    ),
}


@pytest.mark.parametrize("case", HAND_COMPUTED)
def test_hand_computed(load, case):
    config_name, arguments, expected = HAND_COMPUTED[case]
    results = load("sid_retrieval", config_name).compute(**arguments)
    assert results == pytest.approx(expected, abs=1e-12)
    assert list(map(type, results.values())) == [float] * len(expected)


def test_defaults_name_the_cutoffs(load):
    results = load("sid_retrieval").compute(**FOUR_ROWS)
    assert list(results) == [
        "item_recall@1",
        "item_recall@10",
        "item_recall@50",
        "item_ndcg@10",
        "item_mrr",
        "num_rows",
    ]


def test_one_call_takes_sids_without_a_configuration(load):
    arguments = FOUR_ROWS_WITH_SIDS | {"bootstrap": 10}
    assert load("sid_retrieval").compute(**arguments) == load("sid_retrieval", "sid").compute(**arguments)


ranked_lists = st.lists(
    st.tuples(
        st.permutations(list("abcdefgh")).flatmap(lambda ids: st.integers(0, 8).map(lambda length: ids[:length])),
        st.sets(st.integers(0, 7)),
        st.sampled_from("abcdefgh"),
    ),
    min_size=1,
    max_size=12,
)


@given(ranked_lists)
@settings(max_examples=60, deadline=None)
def test_equals_counting_one_by_one(rows):
    predictions = [["" if at in invalid else entry for at, entry in enumerate(row)] for row, invalid, _ in rows]
    references = [target for _, _, target in rows]
    metric = evaluate.load(path("sid_retrieval"), keep_in_memory=True)
    results = metric.compute(predictions=predictions, references=references, ks=(1, 3, 8), ndcg_ks=(1, 5))

    ranks = ranks_one_by_one(predictions, references)
    for k in (1, 3, 8):
        assert results[f"item_recall@{k}"] == pytest.approx(sum(rank <= k for rank in ranks) / len(ranks))
    assert results["item_mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks))
    relevance = np.array(
        [
            [entry == target for entry in row + ["-"] * 9][:9]
            for row, target in zip(predictions, references, strict=True)
        ]
    )
    # Where the target was not returned, scikit-learn would find no ideal list: place it behind the cutoffs.
    relevance[:, 8] = [math.isinf(rank) for rank in ranks]
    scores = np.tile(-np.arange(9.0), (len(ranks), 1))
    for k in (1, 5):
        assert results[f"item_ndcg@{k}"] == pytest.approx(ndcg_score(relevance, scores, k=k))


def test_groups_are_the_metric_of_their_rows(load):
    rng = np.random.default_rng(0)
    rows = random_rows(rng, 40)
    whole = load("sid_retrieval", "sid").compute(**rows, ks=(2,), ndcg_ks=(3,), bootstrap=50, seed=3)
    for group in ("head", "tail"):
        kept = [at for at, label in enumerate(rows["groups"]) if label == group]
        part = {name: [column[at] for at in kept] for name, column in rows.items()} | {"groups": [""] * len(kept)}
        expected = load("sid_retrieval", "sid").compute(**part, ks=(2,), ndcg_ks=(3,), bootstrap=50, seed=3)
        for name, value in expected.items():
            stem, bound = re.fullmatch(r"(.*?)(_low|_high)?", name).groups(default="")
            assert whole[f"{stem}/{group}{bound}"] == pytest.approx(value)
    assert {name.split("/")[1] for name in whole if "/" in name} == {
        group + bound for group in ("head", "tail") for bound in ("", "_low", "_high")
    }


def ranks_one_by_one(rows, targets):
    """Ranks from 1, infinite for a miss."""
    return np.array(
        [row.index(target) + 1 if target in row else np.inf for row, target in zip(rows, targets, strict=True)]
    )


def random_rows(rng, num_rows):
    predictions, sid_predictions = [], []
    for _ in range(num_rows):
        predictions.append([f"p{at}" for at in rng.permutation(8)[: rng.integers(0, 7)]])
        sids = [f"s{at}" for at in rng.permutation(6)[: rng.integers(0, 6)]]
        sid_predictions.append([sid if rng.random() < 0.7 else "" for sid in sids])
    return {
        "predictions": predictions,
        "references": [f"p{at}" for at in rng.integers(0, 8, num_rows)],
        "sid_predictions": sid_predictions,
        "sid_references": [f"s{at}" for at in rng.integers(0, 6, num_rows)],
        "groups": rng.choice(["head", "tail", ""], num_rows).tolist(),
    }


def test_bootstrap_equals_scipy(load):
    rows = random_rows(np.random.default_rng(1), 120)
    results = load("sid_retrieval", "sid").compute(**rows, ks=(3,), ndcg_ks=(5,), bootstrap=4000, confidence=0.9)

    item_ranks = ranks_one_by_one(rows["predictions"], rows["references"])
    sid_ranks = ranks_one_by_one(rows["sid_predictions"], rows["sid_references"])
    ones = np.ones(120)
    samples = {
        "item_recall@3": (item_ranks <= 3, ones),
        "item_ndcg@5": ((item_ranks <= 5) / np.log2(1 + item_ranks), ones),
        "item_mrr": (1 / item_ranks, ones),
        "sid_mrr": (1 / sid_ranks, ones),
        "invalid_rate": (
            np.array([row.count("") for row in rows["sid_predictions"]]),
            np.array([len(row) for row in rows["sid_predictions"]]),
        ),
    }
    for name, data in samples.items():
        oracle = scipy.stats.bootstrap(
            data,
            lambda above, below, axis=-1: above.sum(axis) / below.sum(axis),
            paired=True,
            vectorized=True,
            n_resamples=4000,
            confidence_level=0.9,
            method="percentile",
            rng=np.random.default_rng(2),
        )
        # Two draws of 4000 resamples: the bounds agree within a fraction of the standard error, where a wrong level
        # (.95 moves them by .31 standard errors) or resampling of list entries would not.
        tolerance = 0.15 * oracle.standard_error
        assert results[f"{name}_low"] == pytest.approx(oracle.confidence_interval.low, abs=tolerance)
        assert results[f"{name}_high"] == pytest.approx(oracle.confidence_interval.high, abs=tolerance)
        assert results[f"{name}_low"] < results[name] < results[f"{name}_high"]
    assert "num_rows_low" not in results


def test_bootstrap_of_recall_is_binomial(load):
    # A resample of N rows, 30 % of them hits, has Binomial(N, .3) hits: the percentiles are known without drawing.
    predictions = [["a"]] * 200
    references = ["a"] * 60 + ["b"] * 140
    results = load("sid_retrieval").compute(
        predictions=predictions, references=references, ks=(1,), ndcg_ks=(), bootstrap=5000
    )
    low, high = scipy.stats.binom.ppf([0.025, 0.975], 200, 0.3) / 200
    assert results["item_recall@1_low"] == pytest.approx(low, abs=1.01 / 200)
    assert results["item_recall@1_high"] == pytest.approx(high, abs=1.01 / 200)


def test_bootstrap_draws_every_row(load):
    # Of two rows, a hit and a miss, a quarter of the resamples are two hits and a quarter two misses.
    for references in (["a", "b"], ["b", "a"]):
        results = load("sid_retrieval").compute(predictions=[["a"]] * 2, references=references, ks=(1,), bootstrap=200)
        assert [results["item_recall@1" + bound] for bound in ("", "_low", "_high")] == [0.5, 0, 1]


def test_bootstrap_is_degenerate_where_all_rows_are_alike(load):
    metric = load("sid_retrieval")
    hits = metric.compute(predictions=[["a", "b"]] * 5, references=["a"] * 5, bootstrap=20)
    misses = metric.compute(predictions=[["a", "b"]] * 5, references=["z"] * 5, bootstrap=20)
    for name in ("item_recall@1", "item_ndcg@10", "item_mrr"):
        assert [hits[name + bound] for bound in ("", "_low", "_high")] == [1, 1, 1]
        assert [misses[name + bound] for bound in ("", "_low", "_high")] == [0, 0, 0]


def test_bootstrap_depends_on_the_seed_and_not_on_the_chunks(load, monkeypatch):
    rows = random_rows(np.random.default_rng(4), 30)
    metric = load("sid_retrieval", "sid")
    first = metric.compute(**rows, bootstrap=101, seed=1)
    assert metric.compute(**rows, bootstrap=101, seed=2) != first
    monkeypatch.setattr(sys.modules[type(metric).__module__], "_BOOTSTRAP_CHUNK", 70)
    assert metric.compute(**rows, bootstrap=101, seed=1) == pytest.approx(first, abs=1e-12)


def test_add_add_batch_and_compute_agree(load):
    rows = random_rows(np.random.default_rng(5), 11)
    expected = load("sid_retrieval", "sid").compute(**rows)
    batched, single = load("sid_retrieval", "sid"), load("sid_retrieval", "sid")
    for begin in range(0, 11, 4):
        batched.add_batch(**{name: column[begin : begin + 4] for name, column in rows.items()})
    assert batched.compute() == expected
    for at in range(11):
        example = {name: column[at] for name, column in rows.items()}
        single.add(prediction=example.pop("predictions"), reference=example.pop("references"), **example)
    assert single.compute() == expected


def test_arrays_of_strings(load):
    arrays = {"predictions": np.array([["a", "b"], ["c", "d"]]), "references": np.array(["b", "c"])}
    lists = {name: array.tolist() for name, array in arrays.items()}
    assert load("sid_retrieval").compute(**arrays) == load("sid_retrieval").compute(**lists)


def test_combine(load):
    rows = random_rows(np.random.default_rng(6), 9)
    expected = load("sid_retrieval", "sid").compute(**rows)
    combined = evaluate.combine({"a": load("sid_retrieval", "sid"), "b": load("sid_retrieval", "sid")})
    combined.add_batch(**{name: column[:4] for name, column in rows.items()})
    combined.add_batch(**{name: column[4:] for name, column in rows.items()})
    assert combined.compute() == {f"{prefix}_{name}": value for prefix in "ab" for name, value in expected.items()}


BAD_ROWS = {
    "no rows": ({"predictions": [], "references": []}, "no rows"),
    "repeat": ({"predictions": [["a"], ["b", "c", "b"]], "references": ["a", "b"]}, "Row 1 of `predictions` .*'b'"),
    "empty reference": ({"predictions": [["a"], [""]], "references": ["a", ""]}, "target of row 1"),
    "integers": ({"predictions": [["a"], [7]], "references": ["a", "7"]}, "`predictions` holds .* type int"),
    "none among ids": ({"predictions": [["a", None]], "references": ["a"]}, "type NoneType"),
    "integer reference": ({"predictions": [["a"], ["b"]], "references": ["a", 7]}, "`references` holds .* type int"),
    "string for a list": ({"predictions": [["a"], "bc"], "references": ["a", "b"]}, "Row 1 of `predictions` is 'bc'"),
    "none for a list": ({"predictions": [None], "references": ["a"]}, "Row 0 of `predictions` is None"),
    "no references": ({"predictions": [["a"]], "references": None}, "`references` is missing"),
    "lengths": ({"predictions": [["a"], ["b"]], "references": ["a"]}, "number of predictions .2. and references .1."),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_refused(load, case):
    rows, message = BAD_ROWS[case]
    metric = load("sid_retrieval")
    with pytest.raises(ValueError, match=message):
        metric.compute(**rows)


def test_bad_example_is_refused(load):
    with pytest.raises(ValueError, match="`predictions` is 'abc'"):
        load("sid_retrieval").add(prediction="abc", reference="a")


BAD_SIDS = {
    "repeat": ({"sid_predictions": [["s", "", "", "s"]]}, "Row 0 of `sid_predictions` holds 's'"),
    "empty reference": ({"sid_references": [""]}, "beside `sid_predictions` is an empty string"),
    "missing column": ({"groups": None}, "`groups` is missing"),
    "rows": ({"groups": ["a", "b"]}, "`groups` has 2 rows and `predictions` has 1.*'sid'"),
    "integers": ({"sid_references": [3]}, "`sid_references` holds .* type int"),
}


@pytest.mark.parametrize("case", BAD_SIDS)
def test_bad_sids_are_refused(load, case):
    change, message = BAD_SIDS[case]
    rows = {"predictions": [["a"]], "references": ["a"]}
    rows |= {"sid_predictions": [["s", "", ""]], "sid_references": ["s"], "groups": ["g"]}
    assert load("sid_retrieval").compute(**rows)["invalid_rate"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match=message):
        load("sid_retrieval").compute(**rows | change)


BAD_ARGUMENTS = [
    ({"ks": 10}, TypeError, "`ks` is 10"),
    ({"ks": (0,)}, ValueError, "`ks` holds 0"),
    ({"ks": (True,)}, ValueError, "`ks` holds True"),
    ({"ndcg_ks": (2.5,)}, ValueError, "`ndcg_ks` holds 2.5"),
    ({"bootstrap": -1}, ValueError, "`bootstrap` is -1"),
    ({"bootstrap": 1.5}, ValueError, "`bootstrap` is 1.5"),
    ({"seed": "a"}, ValueError, "`seed` is 'a'"),
    ({"confidence": 95}, ValueError, "`confidence` is 95"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused(load, arguments, error, message):
    with pytest.raises(error, match=message):
        load("sid_retrieval").compute(**FOUR_ROWS, **arguments)


def test_unknown_configuration_is_refused(load):
    with pytest.raises(ValueError, match="no configuration 'items'"):
        load("sid_retrieval", "items")


def test_the_sid_configuration_needs_its_columns(load):
    with pytest.raises(ValueError, match="sid_predictions"):
        load("sid_retrieval", "sid").compute(**FOUR_ROWS)


def test_groups_whose_names_would_clash_are_refused_with_intervals(load):
    rows = random_rows(np.random.default_rng(7), 4) | {"groups": ["price", "price", "price_low", ""]}
    metric = load("sid_retrieval", "sid")
    assert metric.compute(**rows)["num_rows/price_low"] == 1
    with pytest.raises(ValueError, match="'price' and 'price_low'"):
        metric.compute(**rows, bootstrap=5)


def test_cutoffs_beyond_the_lists_are_warned_of(load, monkeypatch):
    metric = load("sid_retrieval")
    warnings = []
    monkeypatch.setattr(sys.modules[type(metric).__module__].logger, "warning", warnings.append)
    metric.compute(**FOUR_ROWS, ks=(3,), ndcg_ks=(3,))
    assert warnings == []
    metric.compute(**FOUR_ROWS, ks=(4,), ndcg_ks=(3,))
    assert "longest list of `predictions` has 3" in warnings[0]


def test_ten_thousand_rows_of_fifty(load):
    predictions = [[f"p{row * 31 + at}" for at in range(50)] for row in range(10_000)]
    references = [row[at % 100] if at % 100 < 50 else "z" for at, row in enumerate(predictions)]
    metric = load("sid_retrieval")
    begin = time.process_time()
    results = metric.compute(predictions=predictions, references=references)
    assert time.process_time() - begin < 2
    # Rows cycle through ranks 1 to 50 and fifty misses.
    assert results["item_recall@10"] == pytest.approx(0.1)
    assert results["item_recall@50"] == pytest.approx(0.5)
    assert results["item_mrr"] == pytest.approx(sum(1 / rank for rank in range(1, 51)) / 100)
