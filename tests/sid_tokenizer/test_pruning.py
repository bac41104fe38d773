import json

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rqsid import TokenPruning


@st.composite
def codes_and_sizes(draw, min_layers=2):
    sizes = draw(st.lists(st.integers(1, 6), min_size=min_layers, max_size=5))
    seed, num_items = draw(st.integers(0, 10**6)), draw(st.integers(1, 60))
    random = np.random.default_rng(seed)
    codes = np.stack([(size * random.random(num_items) ** 2).astype(int) for size in sizes], axis=1)
    return codes, sizes, draw(st.integers(0, len(sizes) - 2))


def by_frequency(column, size, weights):
    """Codes by falling weight, ties to the lower code."""
    counts = [sum(w for code, w in zip(column, weights, strict=True) if code == c) for c in range(size)]
    return sorted(range(size), key=lambda code: (-counts[code], code)), counts


def without(codes, layer, pruned):
    """The rows with the pruned codes of a layer replaced, one by one."""
    return [[-1 if at == layer and code in pruned else code for at, code in enumerate(row)] for row in codes.tolist()]


def num_unique(codes):
    return len({tuple(row) for row in np.asarray(codes).tolist()})


@given(codes_and_sizes(), st.data())
@settings(max_examples=80, deadline=None)
def test_top_k_equals_brute_force(parts, data):
    codes, sizes, layer = parts
    top_k = data.draw(st.integers(1, sizes[layer]))
    weights = data.draw(st.none() | st.just(np.random.default_rng(0).integers(0, 3, len(codes)) + 1))
    pruning = TokenPruning("top_k", layer=layer, top_k=top_k).fit(codes, sizes, weights)
    order, _ = by_frequency(codes[:, layer].tolist(), sizes[layer], [1] * len(codes) if weights is None else weights)
    assert np.flatnonzero(pruning.pruned).tolist() == sorted(order[:top_k])
    assert pruning.apply(codes).tolist() == without(codes, layer, order[:top_k])
    assert pruning.num_pruned == top_k


@given(codes_and_sizes(), st.integers(1, 100))
@settings(max_examples=80, deadline=None)
def test_threshold_is_the_smallest_set_that_reaches_the_share(parts, percent):
    codes, sizes, layer = parts
    pruning = TokenPruning("threshold", layer=layer, threshold=percent / 100).fit(codes, sizes)
    order, counts = by_frequency(codes[:, layer].tolist(), sizes[layer], [1] * len(codes))
    smallest = next(
        n for n in range(1, sizes[layer] + 1) if 100 * sum(counts[c] for c in order[:n]) >= percent * len(codes)
    )
    assert np.flatnonzero(pruning.pruned).tolist() == sorted(order[:smallest])
    assert pruning.apply(codes).tolist() == without(codes, layer, order[:smallest])


def test_threshold_by_hand():
    codes = np.array([[code, 0] for code in [2] * 5 + [0] * 3 + [1] * 2])
    chosen = [
        np.flatnonzero(TokenPruning("threshold", layer=0, threshold=p).fit(codes, [4, 1]).pruned).tolist()
        for p in (0.1, 0.5, 0.51, 0.8, 0.81, 1.0)
    ]
    assert chosen == [[2], [2], [0, 2], [0, 2], [0, 1, 2], [0, 1, 2]]  # code 3, never used, adds nothing


def test_weights_decide():
    codes = np.array([[0, 0], [0, 1], [0, 2], [1, 0]])
    assert TokenPruning("top_k", layer=0, top_k=1).fit(codes, [2, 3]).pruned.tolist() == [True, False]
    pruning = TokenPruning("top_k", layer=0, top_k=1).fit(codes, [2, 3], weights=[1, 1, 1, 9])
    assert pruning.pruned.tolist() == [False, True]


@given(codes_and_sizes())
@settings(max_examples=60, deadline=None)
def test_pruning_nothing_is_identity(parts):
    codes, sizes, layer = parts
    pruning = TokenPruning("none", layer=layer).fit(codes, sizes)
    pruned = pruning.apply(codes)
    assert pruned.tolist() == codes.tolist() and pruned is not codes and pruning.num_pruned == 0
    assert TokenPruning("none", layer=99).fit(codes, sizes).apply(codes).tolist() == codes.tolist()


@given(codes_and_sizes())
@settings(max_examples=100, deadline=None)
def test_pruning_one_token_keeps_all_sids_apart(parts):
    codes, sizes, layer = parts
    pruned = TokenPruning("top_k", layer=layer, top_k=1).fit(codes, sizes).apply(codes)
    assert num_unique(pruned) == num_unique(codes)
    assert (pruned == -1).any()


@given(codes_and_sizes(), st.data())
@settings(max_examples=60, deadline=None)
def test_more_pruning_never_makes_more_sids(parts, data):
    codes, sizes, layer = parts
    assume(sizes[layer] > 1)
    top_k = data.draw(st.integers(1, sizes[layer] - 1))
    fewer, more = (
        TokenPruning("top_k", layer=layer, top_k=k).fit(codes, sizes).apply(codes) for k in (top_k, top_k + 1)
    )
    assert num_unique(more) <= num_unique(fewer) <= num_unique(codes)


@given(codes_and_sizes())
@settings(max_examples=60, deadline=None)
def test_all_codes_is_drop_layer(parts):
    codes, sizes, layer = parts
    all_codes = TokenPruning("top_k", layer=layer, top_k=sizes[layer]).fit(codes, sizes)
    dropped = TokenPruning("drop_layer", layer=layer).fit(codes, sizes)
    assert all_codes.pruned.tolist() == dropped.pruned.tolist() == [True] * sizes[layer]
    assert (all_codes.apply(codes) == dropped.apply(codes)).all()
    assert (dropped.apply(codes)[:, layer] == -1).all()


@given(codes_and_sizes(), st.sampled_from(["top_k", "threshold", "drop_layer"]), st.data())
@settings(max_examples=100, deadline=None)
def test_token_sequences_are_prefix_free(parts, strategy, data):
    codes, sizes, layer = parts
    options = {"top_k": {"top_k": data.draw(st.integers(1, sizes[layer]))}, "threshold": {"threshold": 0.5}}
    pruning = TokenPruning(strategy, layer=layer, **options.get(strategy, {})).fit(codes, sizes)
    sequences = {
        tuple((at, code) for at, code in enumerate(row) if code >= 0) for row in pruning.apply(codes).tolist()
    }
    for one in sequences:
        assert not any(one[:length] in sequences for length in range(len(one)))


@given(codes_and_sizes(), st.sampled_from(["none", "top_k", "threshold", "drop_layer"]))
@settings(max_examples=60, deadline=None)
def test_dict_round_trip(parts, strategy):
    codes, sizes, layer = parts
    options = {"top_k": {"top_k": 1}, "threshold": {"threshold": 0.3}}.get(strategy, {})
    pruning = TokenPruning(strategy, layer=layer, **options)
    unfitted = TokenPruning.from_dict(json.loads(json.dumps(pruning.to_dict())))
    assert unfitted.pruned is None and unfitted.to_dict() == pruning.to_dict()
    pruning.fit(codes, np.array(sizes))
    again = TokenPruning.from_dict(json.loads(json.dumps(pruning.to_dict())))
    assert again.to_dict() == pruning.to_dict()
    assert (again.apply(codes) == pruning.apply(codes)).all() and repr(again) == repr(pruning)


def test_ties_go_to_the_lower_code_whatever_the_order():
    codes = np.array([[code, 0] for code in [3, 1, 2, 0, 2, 1, 3]])
    for rows in (codes, codes[::-1]):
        pruning = TokenPruning("top_k", layer=0, top_k=2).fit(rows, [5, 1])
        assert np.flatnonzero(pruning.pruned).tolist() == [1, 2]


def test_tensors_other_integer_types_and_unseen_codes():
    codes = np.array([[0, 0], [0, 1], [1, 0]])
    pruning = TokenPruning("top_k", layer=0, top_k=1).fit(torch.tensor(codes), [3, 2])
    expected = [[-1, 0], [-1, 1], [1, 0]]
    for kind in (np.int16, np.uint8, np.int64):
        assert pruning.apply(codes.astype(kind)).tolist() == expected
    assert pruning.apply(torch.tensor(codes)).tolist() == expected
    assert pruning.apply(np.array([[2, 1]])).tolist() == [[2, 1]]
    assert pruning.apply(codes).dtype == np.int32 and codes.min() == 0


FITTING = {"strategy": "top_k", "layer": 0, "top_k": 1}


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"strategy": "best"}, ValueError, r"'best' is unknown; choose one of none, top_k, threshold, drop_layer"),
        ({"strategy": "top_k"}, ValueError, "needs top_k=..., for instance top_k=25"),
        ({"strategy": "drop_layer", "top_k": 3}, ValueError, "top_k=3"),
        ({"strategy": "top_k", "top_k": 3, "threshold": 0.5}, ValueError, "threshold=0.5"),
        ({"strategy": "threshold"}, ValueError, "needs threshold="),
        ({"strategy": "top_k", "top_k": 0}, ValueError, 'top_k=0.*strategy="none"'),
        ({"strategy": "top_k", "top_k": 2.5}, ValueError, "top_k=2.5.*whole number"),
        ({"strategy": "top_k", "top_k": True}, ValueError, "top_k=True"),
        ({"strategy": "threshold", "threshold": 0.0}, ValueError, r"threshold=0.0 must be a number in \(0, 1\]"),
        ({"strategy": "threshold", "threshold": 1.01}, ValueError, "threshold=1.01"),
        ({"strategy": "threshold", "threshold": float("nan")}, ValueError, "threshold=nan"),
        ({"strategy": "threshold", "threshold": "0.3"}, ValueError, "threshold='0.3' must be a number"),
        ({"strategy": "none", "layer": -1}, ValueError, "layer=-1 must be a 0-based"),
        ({"strategy": "none", "layer": "b"}, ValueError, "layer='b'"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        TokenPruning(**arguments)


@pytest.mark.parametrize(
    "strategy, options", [("top_k", {"top_k": 1}), ("threshold", {"threshold": 0.5}), ("drop_layer", {})]
)
@pytest.mark.parametrize("layer", [2, 3])
def test_the_last_layer_is_refused(strategy, options, layer):
    with pytest.raises(ValueError, match=f"layer={layer} cannot be pruned.*earlier layer"):
        TokenPruning(strategy, layer=layer, **options).fit(np.zeros((2, 3), dtype=int), [2, 2, 2])


@pytest.mark.parametrize(
    "codes, weights, error, message",
    [
        ([[0, 0]], [1, 1], ValueError, r"weights have shape \(2,\)"),
        ([[0, 0]], [np.nan], ValueError, "finite"),
        ([[0, 0], [1, 1]], [2, -1], ValueError, "not negative"),
        ([[0, 0]], [0], ValueError, "not all zero"),
        ([[-1, 0]], None, ValueError, "absent"),
        ([[0, 2]], None, ValueError, "code 2"),
        ([[0.5, 1.0]], None, TypeError, "integers"),
        (np.zeros((0, 2), dtype=int), None, ValueError, "no item"),
    ],
)
@pytest.mark.parametrize("strategy, options", [("top_k", {"top_k": 1}), ("threshold", {"threshold": 0.5})])
def test_bad_codes_and_weights_are_refused(codes, weights, error, message, strategy, options):
    pruning = TokenPruning(strategy, layer=0, **options)
    with pytest.raises(error, match=message):
        pruning.fit(np.array(codes), [2, 2], weights)
    assert pruning.pruned is None


def test_top_k_beyond_the_codebook_and_unfitted():
    with pytest.raises(ValueError, match=r'top_k=4 exceeds the 3 codes of layer 0; top_k=3 is "drop_layer"'):
        TokenPruning("top_k", layer=0, top_k=4).fit(np.zeros((5, 2), dtype=int), [3, 2])
    with pytest.raises(ValueError, match="not fitted.*fit"):
        TokenPruning(**FITTING).apply(np.zeros((5, 2), dtype=int))
    fitted = TokenPruning(**FITTING).fit(np.zeros((5, 2), dtype=int), [3, 2])
    with pytest.raises(ValueError, match="one column per layer"):
        fitted.apply(np.zeros((5, 3), dtype=int))
    with pytest.raises(ValueError, match="absent"):
        fitted.apply(fitted.apply(np.zeros((5, 2), dtype=int)))  # pruning twice


def test_edited_dict_is_refused():
    content = TokenPruning(**FITTING).fit(np.zeros((5, 2), dtype=int), [3, 2]).to_dict()
    with pytest.raises(ValueError, match="lacks 'layer'"):
        TokenPruning.from_dict({key: value for key, value in content.items() if key != "layer"})
    for pruned_codes in ([3], [-1]):
        with pytest.raises(ValueError, match="outside the codebook of 3"):
            TokenPruning.from_dict(content | {"pruned_codes": pruned_codes})
