"""Sweeps: every measure at every K against pruning and diagnosing one by one, and what is known by hand."""

import importlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rqsid import TokenPruning, diagnose
from rqsid.sid_tokenizer.pruning_sweep import sweep


@st.composite
def problems(draw):
    """Codes with many collisions, the layer, and weights: none, with ties and zeros, or of any size."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    seed, num_items = draw(st.integers(0, 10**6)), draw(st.integers(1, 50))
    random = np.random.default_rng(seed)
    skew = draw(st.sampled_from([1, 3]))
    codes = np.stack([(size * random.random(num_items) ** skew).astype(int) for size in sizes], axis=1)
    kind = draw(st.sampled_from(["none", "ties", "any"]))
    weights = {"none": None, "ties": random.integers(0, 3, num_items), "any": random.exponential(size=num_items) ** 4}[
        kind
    ]
    if kind == "ties" and not weights.any():
        weights[draw(st.integers(0, num_items - 1))] = 1
    return codes, sizes, draw(st.integers(0, len(sizes) - 2)), weights


def entropy(masses):
    masses = np.array([mass for mass in masses if mass > 0], dtype=float)
    shares = masses / masses.sum()
    return -(shares * np.log2(shares)).sum() if len(shares) else 0.0


def brute_ceiling(codes, weights, k):
    """Item by item: who stands before it in its SID?"""
    rows = [tuple(row) for row in codes.tolist()]
    found = 0.0
    for item, row in enumerate(rows):
        before = sum(
            other == row and (weights[at] > weights[item] or (weights[at] == weights[item] and at < item))
            for at, other in enumerate(rows)
        )
        found += weights[item] * (before < k)
    return found / sum(weights)


@given(problems())
@settings(max_examples=120, deadline=None)
def test_every_k_equals_pruning_and_diagnosing(problem):
    codes, sizes, layer, weights = problem
    found = sweep(codes, sizes, layer, weights, ks=(1, 2, 3, 10))
    mass = np.ones(len(codes)) if weights is None else weights
    assert found.num_pruned.tolist() == list(range(sizes[layer] + 1)) and found.layer == layer
    for k in range(sizes[layer] + 1):
        rule = TokenPruning("top_k", layer=layer, top_k=k) if k else TokenPruning("none")
        pruned = rule.fit(codes, sizes, weights).apply(codes)
        rows = [tuple(row) for row in pruned.tolist()]
        groups = {row: [at for at, other in enumerate(rows) if other == row] for row in rows}
        assert found.unique_sids[k] == len(groups)
        assert found.colliding_items[k] == sum(len(group) for group in groups.values() if len(group) > 1)
        assert found.colliding_pairs[k] == sum(len(group) * (len(group) - 1) // 2 for group in groups.values())
        assert found.largest_group[k] == max(map(len, groups.values()))
        lost = pruned[:, layer] < 0
        assert found.share[k] == pytest.approx(mass[lost].sum() / mass.sum(), abs=1e-12)
        assert found.mean_length[k] == pytest.approx(((pruned >= 0).sum(1) * mass).sum() / mass.sum())
        left = np.bincount(codes[~lost, layer], mass[~lost], sizes[layer])
        assert found.layer_entropy[k] == pytest.approx(entropy(left), abs=1e-9)
        evenness = entropy(left) / np.log2(sizes[layer] - k) if sizes[layer] - k > 1 else 1.0
        assert found.layer_evenness[k] == pytest.approx(evenness, abs=1e-9)
        assert found.sid_entropy[k] == pytest.approx(entropy(mass[group].sum() for group in groups.values()), abs=1e-9)
        for top in (1, 2, 3, 10):
            assert found.recall_ceiling[top][k] == pytest.approx(brute_ceiling(pruned, mass, top), abs=1e-12)


@given(problems())
@settings(max_examples=15, deadline=None)
def test_it_says_what_diagnose_says(problem):
    codes, sizes, layer, weights = problem
    found = sweep(codes, sizes, layer, weights)
    for k in range(sizes[layer] + 1):
        rule = TokenPruning("top_k", layer=layer, top_k=k) if k else TokenPruning("none")
        expected = diagnose(rule.fit(codes, sizes, weights).apply(codes), sizes, weights)
        assert found.unique_sids[k] == expected.unique_sids
        assert found.colliding_items[k] == expected.colliding_items
        assert found.largest_group[k] == expected.largest_group
        assert found.layer_entropy[k] == pytest.approx(expected.layers[layer].entropy, abs=1e-9)
        assert 1 - found.share[k] == pytest.approx(expected.layers[layer].present, abs=1e-12)
        for top, ceiling in expected.recall_ceiling.items():
            assert found.recall_ceiling[top][k] == pytest.approx(ceiling, abs=1e-12)


@given(problems())
@settings(max_examples=100, deadline=None)
def test_lossless_is_where_the_sids_begin_to_merge(problem):
    codes, sizes, layer, weights = problem
    found = sweep(codes, sizes, layer, weights)
    assert 1 <= found.lossless <= sizes[layer]
    assert (found.unique_sids[: found.lossless + 1] == found.unique_sids[0]).all()
    assert (found.unique_sids[found.lossless + 1 :] < found.unique_sids[0]).all()
    for name in ("colliding_items", "colliding_pairs", "largest_group", "sid_entropy"):
        values = getattr(found, name)
        assert values[1] == pytest.approx(values[0], abs=1e-9), name
    assert all(ceiling[1] == ceiling[0] for ceiling in found.recall_ceiling.values())


@given(problems(), st.integers(1, 100))
@settings(max_examples=100, deadline=None)
def test_at_share_is_what_a_threshold_prunes(problem, percent):
    codes, sizes, layer, weights = problem
    found = sweep(codes, sizes, layer, weights)
    pruning = TokenPruning("threshold", layer=layer, threshold=percent / 100).fit(codes, sizes, weights)
    assert found.at_share(percent / 100) == pruning.num_pruned and found.at_share(0) == 0


def test_by_hand():
    """Layer 0: code 1 three times, code 0 twice, code 2 once, code 3 never. The other layer decides who merges."""
    codes = np.array([[1, 0], [1, 0], [1, 1], [0, 0], [0, 1], [2, 2]])
    found = sweep(codes, [4, 3], layer=0, ks=(1, 2))
    assert found.share.tolist() == pytest.approx([0, 3 / 6, 5 / 6, 1, 1])
    assert found.unique_sids.tolist() == [5, 5, 3, 3, 3]
    assert found.colliding_items.tolist() == [2, 2, 5, 5, 5]
    assert found.colliding_pairs.tolist() == [1, 1, 3 + 1, 3 + 1, 3 + 1]
    assert found.largest_group.tolist() == [2, 2, 3, 3, 3]
    assert found.mean_length.tolist() == pytest.approx([2, 1.5, 7 / 6, 1, 1])
    assert found.layer_entropy.tolist() == pytest.approx([entropy([3, 2, 1]), entropy([2, 1]), 0, 0, 0])
    assert found.layer_evenness.tolist() == pytest.approx(
        [entropy([3, 2, 1]) / 2, entropy([2, 1]) / np.log2(3), 0, 1, 1]
    )
    assert found.sid_entropy.tolist() == pytest.approx([entropy([2, 1, 1, 1, 1])] * 2 + [entropy([3, 2, 1])] * 3)
    assert found.recall_ceiling[1].tolist() == pytest.approx([5 / 6, 5 / 6, 1 / 2, 1 / 2, 1 / 2])
    assert found.recall_ceiling[2].tolist() == pytest.approx([1, 1, 5 / 6, 5 / 6, 5 / 6])
    assert found.lossless == 1 and found.num_items == 6
    assert [found.at_share(p) for p in (0, 0.5, 0.51, 1)] == [0, 1, 2, 3]


def test_weights_order_the_codes_and_the_items_of_a_sid():
    codes = np.array([[0, 0], [0, 0], [1, 0], [1, 1]])
    found = sweep(codes, [2, 2], layer=0, weights=[1, 2, 5, 0], ks=(1, 2))
    assert found.share.tolist() == pytest.approx([0, 5 / 8, 1])  # code 1 comes first
    assert found.unique_sids.tolist() == [3, 3, 2]
    assert found.recall_ceiling[1].tolist() == pytest.approx([7 / 8, 7 / 8, 5 / 8])
    assert found.recall_ceiling[2].tolist() == pytest.approx([1, 1, 7 / 8])
    assert found.mean_length.tolist() == pytest.approx([2, 11 / 8, 1])


def test_more_codes_than_one_number_holds():
    """Three other layers of 2^31 codes: their product has to be counted in steps."""
    random = np.random.default_rng(0)
    small = random.integers(0, 3, (200, 4))
    sizes = [2**31, 4, 2**31, 2**31]
    spread = small * np.array([4, 1, 2**30 - 1, 2**30 - 1])  # 4 * 2^31 * 2^31 is 0 in 64 bits
    found, expected = sweep(spread, sizes, layer=1), sweep(small, [3, 4, 3, 3], layer=1)
    assert found.to_dict() == expected.to_dict() and expected.unique_sids[0] > expected.unique_sids[-1]


def test_any_integers_and_tensors_and_nothing_is_changed():
    codes = np.random.default_rng(0).integers(0, 4, (60, 3))
    weights = np.random.default_rng(1).random(60)
    codes.flags.writeable = weights.flags.writeable = False
    expected = sweep(codes, [4, 4, 4], weights=weights).to_dict()
    for given_codes in (
        codes.astype(np.uint8),
        codes.astype(np.uint64),
        torch.tensor(codes),
        np.asfortranarray(codes),
    ):
        assert sweep(given_codes, np.array([4, 4, 4]), weights=weights).to_dict() == expected


def test_a_ceiling_beyond_the_largest_group_is_one():
    codes = np.zeros((7, 2), dtype=int)
    found = sweep(codes, [1, 1], layer=0, ks=(6, 7, 10**9))
    assert found.recall_ceiling[6].tolist() == pytest.approx([6 / 7] * 2)
    assert found.recall_ceiling[7].tolist() == found.recall_ceiling[10**9].tolist() == [1, 1]


def test_dict_is_json():
    found = sweep(np.random.default_rng(0).integers(0, 8, (100, 3)), [8] * 3)
    content = json.loads(json.dumps(found.to_dict()))
    assert content["unique_sids"] == found.unique_sids.tolist() and content["lossless"] == found.lossless
    assert content["recall_ceiling"]["10"] == found.recall_ceiling[10].tolist() and content["layer"] == 1
    arrays = {name for name, value in vars(found).items() if isinstance(value, np.ndarray)}
    assert len(arrays) == 10 and all(len(content[name]) == 9 for name in arrays)


@pytest.mark.parametrize(
    "size, rows",
    [(1, ["0", "all 1"]), (2, ["0", "1", "all 2"]), (30, ["0", "1", "2", "5", "10", "25", "all 30"])],
)
def test_table(size, rows):
    codes = np.random.default_rng(0).integers(0, [4, size, 4], (300, 3))
    found = sweep(codes, [4, size, 4])
    table = [line.split("|")[1:-1] for line in str(found).splitlines() if line.startswith("|")]
    assert [line[0].strip() for line in table[2:]] == rows and len({len(line) for line in table}) == 1
    assert table[-1][2].strip() == str(found.unique_sids[-1]) and table[0][-1].strip() == "ceiling @50"
    text = str(found)
    assert "Pruning exactly one token loses nothing, because its absence names it" in text and "Layer b (1)" in text
    assert ("no two SIDs differ only" in text) == (found.lossless > 1)


def test_more_than_one_code_without_loss_is_told():
    codes = np.array([[code, code] for code in range(4) for _ in range(4 - code)])
    text = str(sweep(codes, [4, 4], layer=0))
    assert "no two SIDs differ only in the first 4, so that pruning those loses nothing" in text


def test_plot_is_that_of_figures(monkeypatch):
    found = sweep(np.zeros((3, 2), dtype=int), [2, 2], layer=0)
    module = importlib.import_module(
        "rqsid.sid_tokenizer.pruning_sweep"
    )  # the package may have a function of this name
    monkeypatch.setattr(module, "plot_sweep", lambda *arguments: arguments)
    assert found.plot("a.png") == (found, "a.png") and found.plot() == (found, None)


CODES = np.zeros((4, 3), dtype=int)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"layer": 2}, ValueError, "layer=2 cannot be pruned with 3 layers"),
        ({"layer": 5}, ValueError, "layer=5 cannot be pruned"),
        ({"layer": -1}, ValueError, "layer=-1 must be a 0-based"),
        ({"layer": 1.0}, ValueError, "layer=1.0 must be a 0-based"),
        ({"layer": "auto"}, ValueError, "layer='auto' must be a 0-based.*TokenPruning"),
        ({"ks": ()}, ValueError, r"ks=\(\) must be whole numbers"),
        ({"ks": 10}, ValueError, "ks=10 must be"),
        ({"ks": (0, 1)}, ValueError, r"ks=\(0, 1\)"),
        ({"ks": (1, 2.5)}, ValueError, r"ks=\(1, 2.5\)"),
        ({"ks": (True,)}, ValueError, r"ks=\(True,\)"),
        ({"weights": [1, 1]}, ValueError, r"weights have shape \(2,\)"),
        ({"weights": [0] * 4}, ValueError, "not all zero"),
        ({"weights": [1, 1, 1, np.nan]}, ValueError, "finite"),
        ({"codes": CODES - 1}, ValueError, "absent"),
        ({"codes": CODES + 2}, ValueError, "code 2"),
        ({"codes": CODES + 0.5}, TypeError, "integers"),
        ({"codes": CODES[:0]}, ValueError, "hold no item"),
        ({"codes": CODES[:, :2]}, ValueError, "one column per layer"),
    ],
)
def test_bad_input_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        sweep(**{"codes": CODES, "codebook_sizes": [2, 2, 2]} | arguments)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), "0.5", True, None])
def test_shares_that_are_none_are_refused(p):
    with pytest.raises(ValueError, match="must be a number in"):
        sweep(CODES, [2, 2, 2]).at_share(p)


@pytest.mark.slow
def test_a_large_catalog_against_single_diagnoses():
    random = np.random.default_rng(0)
    codes = (256 * random.random((200_000, 3)) ** [1, 3, 1]).astype(np.int32)
    weights = np.floor(random.pareto(1, len(codes)))
    found = sweep(codes, [256] * 3, weights=weights)
    for k in (0, 1, 7, 100, 255, 256):
        rule = TokenPruning("top_k", top_k=k) if k else TokenPruning("none")
        expected = diagnose(rule.fit(codes, [256] * 3, weights).apply(codes), [256] * 3, weights)
        assert found.unique_sids[k] == expected.unique_sids
        assert found.colliding_items[k] == expected.colliding_items
        assert found.largest_group[k] == expected.largest_group
        for top, ceiling in expected.recall_ceiling.items():
            assert found.recall_ceiling[top][k] == pytest.approx(ceiling, abs=1e-12)
