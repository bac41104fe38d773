"""Tries of catalogs: any order of layers and tokens, changes, filters; against dictionaries."""

import copy
import re
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tries import CatalogTokens, check_levels, check_trie, paths_of

from rqsid import ProductCatalog, TokenPruning
from rqsid.modeling.trie import SIDTrie


@st.composite
def tokenizers(draw):
    """SIDs of varying length, with shared ones or suffixes, layers in any order, tokens anywhere, some products gone."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    seed, num_products = draw(st.integers(0, 10**6)), draw(st.integers(1, 40))
    random = np.random.default_rng(seed)
    codes = np.stack([random.integers(0, size, num_products) for size in sizes], axis=1)
    pruning, pruned = None, None
    if len(sizes) > 1 and draw(st.booleans()):
        pruned = draw(st.integers(0, len(sizes) - 2))
        if draw(st.booleans()):
            pruning = TokenPruning("drop_layer", layer=pruned)
        else:
            pruning = TokenPruning("top_k", layer=pruned, top_k=draw(st.integers(1, sizes[pruned])))
        pruning.fit(codes, sizes)
    mode = draw(st.sampled_from(["share", "suffix"]))
    catalog = ProductCatalog.build(
        [f"p{row}" for row in range(num_products)], codes, sizes, pruning, random.random(num_products), collisions=mode
    )
    # The last layer must not be one that SIDs lack, see `check_layer_order`.
    layers = draw(st.permutations(range(len(sizes))))
    if layers[-1] == pruned:
        layers = layers[-1:] + layers[:-1]
    gone = random.permutation(num_products)[: draw(st.integers(0, num_products - 1))]
    if len(gone):
        catalog.withdraw([f"p{row}" for row in gone])
    return CatalogTokens(catalog, layers, draw(st.none() | st.just(seed)))


@given(tokenizers())
@settings(max_examples=150, deadline=None)
def test_tries_of_catalogs_equal_dictionaries(tokenizer):
    catalog = tokenizer.catalog
    expected = tokenizer.sids(catalog.live_sid_rows())
    trie = SIDTrie.from_tokenizer(tokenizer)
    check_trie(trie, expected)
    check_levels(trie, expected)
    assert trie.catalog_version == catalog.version_id and trie.product_mask is None
    assert trie.max_token_id == np.concatenate(tokenizer.layer_token_ids()).max()


@given(tokenizers(), st.integers(0, 10**6), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_a_filter_equals_the_trie_of_the_subset(tokenizer, seed, share):
    catalog = tokenizer.catalog
    trie = SIDTrie.from_tokenizer(tokenizer)
    random = np.random.default_rng(seed)
    mask, second = random.random((2, len(catalog))) < share
    for keep, of in ((mask, trie), (mask & second, None)):
        rows = np.unique(catalog.sid_rows(np.flatnonzero(keep & ~catalog.withdrawn)))
        if of is None:
            of, given = trie.restrict(mask), second
        else:
            given = torch.from_numpy(mask)
        if len(rows) == 0:
            with pytest.raises(ValueError, match=re.escape(f"None of the {keep.sum()} products")):
                of.restrict(given)
            return
        restricted = of.restrict(given)
        assert (restricted.product_mask == keep).all() and restricted.catalog_version == catalog.version_id
        expected = tokenizer.sids(rows)
        check_trie(restricted, expected)
        check_levels(restricted, expected)
        # What another way to the same SIDs gives, array by array.
        again = SIDTrie.from_tokenizer(tokenizer, torch.from_numpy(random.permutation(rows)))
        for name in ("_edges", "_indptr", "_leaf_rows", "_short_leaves"):
            assert torch.equal(getattr(restricted, name), getattr(again, name))
        by_id = trie.restrict([f"p{row}" for row in random.permutation(np.flatnonzero(keep))])
        assert paths_of(by_id) == expected and (by_id.product_mask == keep).all()
    assert paths_of(trie) == tokenizer.sids(catalog.live_sid_rows())


@pytest.fixture
def tokenizer():
    """20 products with 10 SIDs, two of each, of which the second is the more popular."""
    codes = np.stack([np.arange(20) % 10, np.arange(20) % 2, np.arange(20) % 5], axis=1)
    return CatalogTokens(
        ProductCatalog.build([f"p{row}" for row in range(20)], codes, [10, 2, 5], popularity=np.arange(20))
    )


def test_only_kept_products_of_a_shared_sid_are_listed(tokenizer):
    catalog = tokenizer.catalog
    trie = SIDTrie.from_tokenizer(tokenizer).restrict(["p3", "p4", "p14"])
    rows = trie.sid_rows(trie.walk(tokenizer.sid_sequences(catalog.sid_rows(np.array([3, 4])))))[None].numpy()
    assert catalog.expand_sids(rows, 5)[0].tolist() == [[13, 3, 14, 4, -1]]
    assert catalog.expand_sids(rows, 5, trie.product_mask)[0].tolist() == [[3, 14, 4, -1, -1]]


@pytest.mark.parametrize("mode, lengths", [("share", (3, 3, 2, 2)), ("suffix", (4, 4, 2, 2))])
def test_a_filter_that_keeps_only_short_sids(mode, lengths):
    """The levels of the longer ones go, and what was a short leaf is one of the last level."""
    codes = np.array([[0, 1, 0], [0, 1, 0 if mode == "suffix" else 1], [0, 0, 0], [1, 0, 1]])
    pruning = TokenPruning("top_k", layer=1, top_k=1).fit(np.array([[0, 0, 0]]), [2, 2, 2])
    catalog = ProductCatalog.build(["p0", "p1", "p2", "p3"], codes, [2, 2, 2], pruning, collisions=mode)
    tokenizer = CatalogTokens(catalog)
    assert tuple(catalog.lengths()[catalog.sid_rows(np.arange(4))]) == lengths
    trie = SIDTrie.from_tokenizer(tokenizer).restrict(["p2", "p3"])
    expected = tokenizer.sids(catalog.sid_rows([2, 3]))
    check_trie(trie, expected)
    check_levels(trie, expected)
    assert trie.depth == 2 and len(trie._short_leaves) == 0 and len(trie._indptr) == 4


def test_products_to_keep_must_be_ids_or_a_mask(tokenizer):
    trie = SIDTrie.from_tokenizer(tokenizer)
    for products, error, message in (
        (["p1", "nowhere"], ValueError, "1 of 2 product ids are not in the catalog, for instance 'nowhere'"),
        ("p1", TypeError, "a list of product ids or a mask of booleans over all products, got str"),
        (None, TypeError, "got NoneType"),
        ([3, 4], TypeError, "got a list with 3"),
        (["p1", None], TypeError, "got a list with None"),
        ([True] * 20, TypeError, "a list with True. Make a list of booleans an array"),
        (np.arange(20), TypeError, "got int64. Of product rows make a mask"),
        (torch.arange(20), TypeError, "got int64"),
        (np.ones(19, dtype=bool), ValueError, "has the shape (19,), but the catalog had 20 products"),
        (torch.ones((20, 1), dtype=torch.bool), ValueError, "has the shape (20, 1)"),
        ([], ValueError, "None of the 0 products that `products` keeps"),
        (np.zeros(20, dtype=bool), ValueError, "None of the 0 products"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            trie.restrict(products)
    mask = np.arange(20) < 3
    kept = trie.restrict(mask)
    mask[:] = True
    assert kept.product_mask.sum() == 3
    with pytest.raises(ValueError, match="read-only"):
        kept.product_mask[0] = False
    assert kept.restrict(np.array(["p1", "p2"])).product_mask.sum() == 2


def test_tries_without_products_refuse_filters(tokenizer):
    trie = SIDTrie.from_tokenizer(tokenizer)
    for other in (SIDTrie(torch.tensor([[1, 2]])), SIDTrie.stack([trie, trie])):
        with pytest.raises(ValueError, match="This trie knows no products"):
            other.restrict(["p1"])


def test_the_trie_is_kept_until_the_catalog_changes(tokenizer):
    catalog = tokenizer.catalog
    trie = SIDTrie.from_tokenizer(tokenizer)
    assert SIDTrie.from_tokenizer(tokenizer) is trie
    assert trie.to("meta") is SIDTrie.from_tokenizer(tokenizer).to("meta")
    catalog.withdraw(["p0", "p10"])
    after = SIDTrie.from_tokenizer(tokenizer)
    assert after is SIDTrie.from_tokenizer(tokenizer) is not trie
    assert len(paths_of(after)) == 9 and len(paths_of(trie)) == 10
    catalog.append(["new"], np.array([[0, 1, 4]]))
    new_row = catalog.sid_rows(catalog.product_rows(["new"]))
    assert new_row[0] in paths_of(SIDTrie.from_tokenizer(tokenizer)).values()
    catalog.restore(["p0"])
    assert len(paths_of(SIDTrie.from_tokenizer(tokenizer))) == 11
    tokenizer.catalog = ProductCatalog.build(["other"], np.array([[1, 1, 1]]), [10, 2, 5])
    assert len(paths_of(SIDTrie.from_tokenizer(tokenizer))) == 1


def test_an_older_trie_filters_the_products_it_knows(tokenizer):
    catalog = tokenizer.catalog
    trie = SIDTrie.from_tokenizer(tokenizer)
    catalog.append(["new"], np.array([[3, 1, 3]]))
    catalog.withdraw(["p3"])
    kept = trie.restrict(["p3", "p4"])
    assert len(kept.product_mask) == 20 and sorted(paths_of(kept).values()) == catalog.sid_rows([3, 4]).tolist()
    with pytest.raises(ValueError, match="not in the catalog, for instance 'new'"):
        trie.restrict(["new"])
    with pytest.raises(ValueError, match=re.escape("the shape (21,), but the catalog had 20 products when the trie")):
        trie.restrict(np.ones(21, dtype=bool))
    # Neither what came since nor what was withdrawn since is listed.
    rows = catalog.sid_rows(np.array([[3, 4]]))
    assert catalog.expand_sids(rows, 3, kept.product_mask)[0].tolist() == [[4, -1, -1]]


def test_all_products_withdrawn(tokenizer):
    trie = SIDTrie.from_tokenizer(tokenizer)
    tokenizer.catalog.withdraw([f"p{row}" for row in range(20)])
    with pytest.raises(ValueError, match="All products of the catalog are withdrawn"):
        SIDTrie.from_tokenizer(tokenizer)
    tokenizer.catalog.restore(["p7"])
    assert list(paths_of(SIDTrie.from_tokenizer(tokenizer)).values()) == [int(tokenizer.catalog.sid_rows([7])[0])]
    with pytest.raises(ValueError, match="The products of all `sid_rows` are withdrawn"):
        SIDTrie.from_tokenizer(tokenizer, torch.tensor([int(tokenizer.catalog.sid_rows([8])[0])]))
    assert len(paths_of(trie)) == 10


def test_one_product_of_one_layer():
    tokenizer = CatalogTokens(ProductCatalog.build(["p"], np.array([[3]]), [5]))
    trie = SIDTrie.from_tokenizer(tokenizer)
    assert paths_of(trie) == {(43,): 0} and trie.level_widths == trie.level_sizes == [1]
    assert paths_of(trie.restrict(["p"])) == {(43,): 0}
    assert paths_of(SIDTrie.stack([trie, trie]), root=1) == {(43,): 0}


@pytest.mark.parametrize("sizes", [[256] * 8, [2**13] * 5])
@pytest.mark.parametrize("mode", ["share", "suffix"])
def test_catalogs_beyond_63_bits(sizes, mode):
    """Such a catalog sorts its SIDs in an order of its own."""
    random = np.random.default_rng(0)
    codes = np.stack([random.integers(0, size, 400) for size in sizes], axis=1)
    codes[:, 0] %= 3
    codes[200:300] = codes[:100]
    pruning = TokenPruning("top_k", layer=2, top_k=sizes[2] // 2).fit(codes, sizes)
    catalog = ProductCatalog.build([f"p{row}" for row in range(400)], codes, sizes, pruning, collisions=mode)
    tokenizer = CatalogTokens(catalog, seed=1)
    check_trie(SIDTrie.from_tokenizer(tokenizer), tokenizer.sids(np.arange(catalog.num_sids)))


def test_a_layer_order_that_gives_prefixes_is_refused():
    pruning = TokenPruning("top_k", layer=0, top_k=1).fit(np.array([[0, 0], [1, 0], [0, 1]]), [2, 2])
    catalog = ProductCatalog.build(["p", "q", "r"], np.array([[0, 0], [1, 0], [0, 1]]), [2, 2], pruning)
    with pytest.raises(ValueError, match="is a prefix of or equal to that of row"):
        SIDTrie.from_tokenizer(CatalogTokens(catalog, [1, 0]))


def test_two_threads_of_a_server(tokenizer):
    """One changes the catalog, two ask: each trie is whole, and the last one is of the last version."""
    catalog, errors = tokenizer.catalog, []

    def ask():
        try:
            for _ in range(150):
                trie = SIDTrie.from_tokenizer(tokenizer)
                assert len(trie._catalog.columns["sid_codes"]) >= trie.num_sids == len(trie._leaf_rows) >= 9
                trie.restrict(np.ones(len(trie._catalog.columns["product_sids"]), dtype=bool))
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for at in range(60):
        catalog.append([f"n{at}"], np.array([[at % 10, at // 30, at % 5]]))
        catalog.withdraw(["p0", "p10"]) if at % 2 else catalog.restore(["p0", "p10"]) if at else None
    for thread in threads:
        thread.join()
    assert not errors
    assert paths_of(SIDTrie.from_tokenizer(tokenizer)) == tokenizer.sids(catalog.live_sid_rows())


def test_a_change_while_the_trie_is_built_is_seen_at_the_next_call(tokenizer, monkeypatch):
    """The catalog changes between the look at its version and the look at its columns."""
    real = copy.copy

    def change_first(thing):
        if isinstance(thing, ProductCatalog):
            monkeypatch.setattr(copy, "copy", real)
            thing.withdraw(["p0", "p10"])
            between = thing.columns
            thing.restore(["p0", "p10"])
            thing = real(thing)
            thing.columns = between
        return real(thing)

    monkeypatch.setattr(copy, "copy", change_first)
    assert SIDTrie.from_tokenizer(tokenizer).num_sids == 9
    assert SIDTrie.from_tokenizer(tokenizer).num_sids == 10


@given(st.lists(tokenizers(), min_size=1, max_size=4), st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_a_forest_holds_its_tries(parts, seed):
    random = np.random.default_rng(seed)
    tries = []
    for tokenizer in parts:
        trie = SIDTrie.from_tokenizer(tokenizer)
        mask = ~tokenizer.catalog.withdrawn & (random.random(len(tokenizer.catalog)) < 0.6)
        tries += [trie, trie.restrict(mask)] if mask.any() else [trie]
    tries.append(SIDTrie(torch.tensor([[2, 90_000], [3, -1]])))
    order = random.permutation(len(tries))[: random.integers(1, len(tries) + 1)]
    tries = [tries[at] for at in order]
    check_forest(SIDTrie.stack(tries), tries)


def check_forest(forest, tries):
    assert forest.num_roots == len(tries) and forest.depth == max(trie.depth for trie in tries)
    for name in ("num_sids", "num_nodes"):
        assert getattr(forest, name) == sum(getattr(trie, name) for trie in tries)
    for name in ("level_widths", "level_sizes"):
        expected = [max(getattr(trie, name)[d] for trie in tries if d < trie.depth) for d in range(forest.depth)]
        assert getattr(forest, name) == expected
    for root, trie in enumerate(tries):
        check_trie(forest, paths_of(trie), root)
    assert forest.product_mask is None
    assert forest.max_token_id == max(trie.max_token_id for trie in tries)


def test_forests_of_filters_keep_order_and_repetitions(tokenizer):
    trie = SIDTrie.from_tokenizer(tokenizer)
    tries = [trie.restrict(["p1"]), trie, trie.restrict(["p1"]), trie.restrict(["p2", "p5"]), trie]
    forest = SIDTrie.stack(tries)
    check_forest(forest, tries)
    assert forest.catalog_version == trie.catalog_version
    assert forest._symbol_tokens is trie._symbol_tokens
    # Each row of a batch by a filter of its own.
    paths = tokenizer.sid_sequences(tokenizer.catalog.sid_rows(np.array([1, 1, 2, 2, 2])))
    found = forest.sid_rows(forest.walk(paths, torch.arange(5))) >= 0
    assert found.tolist() == [True, True, False, True, True]
    nested = SIDTrie.stack([SIDTrie.stack(tries[:2]), SIDTrie.stack(tries[2:])])
    check_forest(SIDTrie.stack(tries), tries)
    assert nested.num_roots == 5 and [paths_of(nested, root) for root in range(5)] == [paths_of(t) for t in tries]


def test_forests_of_different_widths():
    """Leaves with rows beyond 32 bits, edges of int32 beside such of int16, different depths."""
    wide = SIDTrie(torch.stack([torch.arange(2**16 + 5), torch.full((2**16 + 5,), 2**17)], dim=1))
    deep = SIDTrie(torch.tensor([[7, 8, 9, 10], [7, 6, -1, -1]]), torch.tensor([2**40, 3]))
    flat = SIDTrie(torch.tensor([[5], [4]]))
    forest = SIDTrie.stack([deep, wide, flat])
    assert paths_of(forest, 0) == {(7, 8, 9, 10): 2**40, (7, 6): 3} and paths_of(forest, 2) == {(5,): 0, (4,): 1}
    assert forest.walk(torch.tensor([[2**16 + 4, 2**17], [7, 8]]), torch.tensor([1, 1])).tolist()[1] == -1
    assert forest.sid_rows(forest.walk(torch.tensor([[2**16 + 4, 2**17]]), torch.tensor([1]))).tolist() == [2**16 + 4]


def test_forests_of_bad_lists():
    trie = SIDTrie(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="There is no trie to stack"):
        SIDTrie.stack([])
    with pytest.raises(TypeError, match="got a list with NoneType"):
        SIDTrie.stack([trie, None])
    with pytest.raises(ValueError, match="different devices, cpu, meta"):
        SIDTrie.stack([trie, trie.to("meta")])
