import numpy as np
import pandas as pd
import pytest
from datasets import Dataset


@pytest.fixture
def purchases(purchases_module):
    """Five chips, two nuts and one pretzel; popularity 2 5 5 1 3 | 9 4 | 6."""
    products = Dataset.from_dict(
        {
            "product_id": ["c0", "c1", "c2", "c3", "c4", "n0", "n1", "p0"],
            "type": ["chips"] * 5 + ["nuts"] * 2 + ["pretzels"],
        }
    )
    household_counts = pd.DataFrame(
        {"household": ["10", "10", "10", "2", "2"], "product_row": [0, 3, 5, 4, 6], "count": [2, 3, 1, 1, 2]}
    )
    test = Dataset.from_dict(
        {
            "household": ["10", "2", "3", "10", "2"],
            "profile": ["unknown"] * 5,
            "history": [["c4", "n0"], ["c3", "c4"], [], ["n1"], []],
            "query": ["chips", "chips", "chips", "nuts", "gasoline"],
            "product": ["c3", "c1", "c1", "n1", "c0"],
        }
    )
    popularity = np.array([2, 5, 5, 1, 3, 9, 4, 6])
    return purchases_module.Purchases(test, test, test, products, popularity, household_counts, ("", ""))


def test_most_popular(baselines_module, purchases):
    ranked = baselines_module.most_popular(purchases.test, purchases, top_k=4)
    assert ranked == [["n0", "p0", "c1", "c2"]] * 5
    assert len(baselines_module.most_popular(purchases.test, purchases)[0]) == 8


def test_most_popular_for_query(baselines_module, purchases):
    chips, nuts = ["c1", "c2", "c4", "c0", "c3"], ["n0", "n1"]
    ranked = baselines_module.most_popular_for_query(purchases.test, purchases)
    assert ranked == [chips, chips, chips, nuts, []]
    ranked = baselines_module.most_popular_for_query(purchases.test, purchases, top_k=1)
    assert ranked == [["c1"], ["c1"], ["c1"], ["n0"], []]


def test_household_frequent_for_query(baselines_module, purchases):
    ranked = baselines_module.household_frequent_for_query(purchases.test, purchases)
    assert ranked == [
        # Household 10: c3 three times, c0 twice, c4 in the history once; the rest by popularity.
        ["c3", "c0", "c4", "c1", "c2"],
        # Household 2: c4 once and in the history, c3 in the history.
        ["c4", "c3", "c1", "c2", "c0"],
        # Nobody knows household 3.
        ["c1", "c2", "c4", "c0", "c3"],
        # n0 once, n1 in the history: a tie, by popularity.
        ["n0", "n1"],
        [],
    ]
    short = baselines_module.household_frequent_for_query(purchases.test, purchases, top_k=2)
    assert short == [products[:2] for products in ranked]


def test_household_frequent_refuses_an_unknown_history(baselines_module, purchases):
    rows = purchases.test.map(lambda row: {"history": ["gone"]})
    with pytest.raises(ValueError, match="'gone'"):
        baselines_module.household_frequent_for_query(rows, purchases)


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_dual_tower_top_k_against_a_full_sort(baselines_module, batch_size):
    # Small integers make many ties, which fall in the order of the catalogue.
    rng = np.random.default_rng(0)
    queries = rng.integers(-2, 3, size=(10, 4)).astype(np.float32)
    products = rng.integers(-2, 3, size=(60, 4)).astype(np.float32)
    product_ids = [f"p{number}" for number in range(60)]
    for top_k in (1, 7, 60, 100):
        ranked = baselines_module.dual_tower_top_k(queries, products, product_ids, top_k, batch_size)
        for query, found in zip(queries, ranked, strict=True):
            scores = [sum(a * b for a, b in zip(query.tolist(), row, strict=True)) for row in products.tolist()]
            expected = sorted(range(60), key=lambda number: (-scores[number], number))[:top_k]
            assert found == [product_ids[number] for number in expected]


def test_dual_tower_top_k_refusals(baselines_module):
    with pytest.raises(ValueError, match="same model"):
        baselines_module.dual_tower_top_k(np.ones((2, 3)), np.ones((4, 5)), list("abcd"))
    with pytest.raises(ValueError, match="3 product ids for 4"):
        baselines_module.dual_tower_top_k(np.ones((2, 3)), np.ones((4, 3)), list("abc"))
