"""Products of ranked SIDs where only some products may be listed."""

import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rqsid import ProductCatalog


@given(
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.integers(1, 8),
    st.floats(0, 1),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_a_mask_equals_a_loop(num_products, size, seed, top_k, num_sids, share, withdraw):
    random = np.random.default_rng(seed)
    ids = [f"p{row}" for row in range(num_products)]
    codes = random.integers(0, size, (num_products, 2))
    catalog = ProductCatalog.build(ids, codes, [size, size], popularity=random.integers(0, 3, num_products))
    if withdraw:
        catalog.withdraw([ids[row] for row in random.permutation(len(ids))[: len(ids) // 3]])
    sid_rows = random.integers(-1, catalog.num_sids, (3, num_sids))
    mask = random.random(len(catalog)) < share
    if seed % 3 == 0:
        mask = mask[: random.integers(0, len(mask) + 1)]  # of an earlier version
    before = mask.copy()
    products, positions = catalog.expand_sids(sid_rows, top_k, mask)
    assert products.shape == positions.shape == (3, top_k) and (mask == before).all()
    for row in range(3):
        pairs = [
            (product, at)
            for at, sid in enumerate(sid_rows[row])
            if sid >= 0
            for product in catalog.products_of(sid).tolist()
            if product < len(mask) and mask[product]
        ]
        pairs = (pairs + [(-1, -1)] * top_k)[:top_k]
        assert list(zip(products[row].tolist(), positions[row].tolist(), strict=True)) == pairs


def test_a_mask_of_nothing():
    catalog = ProductCatalog.build(["p", "q"], np.array([[0], [1]]), [2])
    for sid_rows in (np.full((2, 3), -1), np.zeros((2, 0), dtype=int), np.array([[0, 1], [1, 0]])):
        products, positions = catalog.expand_sids(sid_rows, 4, np.zeros(2, dtype=bool))
        assert (products == -1).all() and (positions == -1).all() and products.shape == (2, 4)
    assert catalog.expand_sids(np.zeros((0, 3), dtype=int), 4, np.ones(2, dtype=bool))[0].shape == (0, 4)


def test_a_mask_of_another_shape():
    catalog = ProductCatalog.build(["p", "q"], np.array([[0], [1]]), [2])
    for mask, message in (
        (np.ones(3, dtype=bool), "one for each of the 2 products, got bool of shape (3,)"),
        (np.ones((2, 1), dtype=bool), "got bool of shape (2, 1)"),
        (np.array([0, 1]), "got int64 of shape (2,)"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            catalog.expand_sids(np.array([[0]]), 1, mask)


def test_a_crowded_sid_named_by_many_rows_is_looked_at_once():
    """Products of all rows one by one would take 3 GB."""
    catalog = ProductCatalog.build([f"p{row}" for row in range(100_000)], np.zeros((100_000, 1), dtype=int), [1])
    mask = np.arange(100_000) % 7 == 3
    tracemalloc.start()
    products, _ = catalog.expand_sids(np.zeros((400, 10), dtype=int)[:, :1], 5, mask)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6 and (products == [3, 10, 17, 24, 31]).all()
