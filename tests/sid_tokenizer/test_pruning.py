import json

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rqsid import ProductCatalog, ResidualQuantizer, ResidualQuantizerConfig, TokenPruning, diagnose
from rqsid.sid_tokenizer.hourglass import simulate_uniform
from rqsid.sid_tokenizer.pruning import find_concentrated_layer


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


@given(codes_and_sizes(), st.integers(1, 100), st.data())
@settings(max_examples=80, deadline=None)
def test_threshold_is_the_smallest_set_that_reaches_the_share(parts, percent, data):
    codes, sizes, layer = parts
    weights = data.draw(st.none() | st.lists(st.integers(0, 9), min_size=len(codes), max_size=len(codes)))
    assume(weights is None or sum(weights))
    pruning = TokenPruning("threshold", layer=layer, threshold=percent / 100).fit(codes, sizes, weights)
    weights = [1] * len(codes) if weights is None else weights
    order, counts = by_frequency(codes[:, layer].tolist(), sizes[layer], weights)
    smallest = next(
        n for n in range(1, sizes[layer] + 1) if 100 * sum(counts[c] for c in order[:n]) >= percent * sum(weights)
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
    assert pruned.tobytes() == codes.astype(np.int32).tobytes() and pruned.dtype == np.int32
    assert not np.shares_memory(pruned, codes) and pruning.num_pruned == 0
    assert TokenPruning("none", layer=99).fit(codes, sizes).apply(codes).tolist() == codes.tolist()


@given(codes_and_sizes())
@settings(max_examples=100, deadline=None)
def test_pruning_one_token_keeps_all_sids_apart(parts):
    codes, sizes, layer = parts
    for weights in (None, np.random.default_rng(0).integers(0, 3, len(codes)) + (np.arange(len(codes)) == 0)):
        pruned = TokenPruning("top_k", layer=layer, top_k=1).fit(codes, sizes, weights).apply(codes)
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
    for kind in (np.int16, np.uint8, np.int64, np.uint64):
        assert TokenPruning("top_k", layer=0, top_k=1).fit(codes.astype(kind), [3, 2]).to_dict() == pruning.to_dict()
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
        ({"strategy": "threshold", "threshold": True}, ValueError, "threshold=True must be a number"),
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


WRITTEN = {
    "strategy": "top_k",
    "layer": 0,
    "top_k": 1,
    "threshold": None,
    "codebook_sizes": [3, 2],
    "pruned_codes": [0],
}


def test_what_earlier_versions_wrote_is_read_and_written_alike():
    """A saved bundle is compared with what its pruning writes, so that nothing may be added."""
    assert TokenPruning(**FITTING).fit(np.zeros((5, 2), dtype=int), [3, 2]).to_dict() == WRITTEN
    assert TokenPruning.from_dict(WRITTEN).to_dict() == WRITTEN and not TokenPruning.from_dict(WRITTEN).auto
    assert TokenPruning.from_dict(WRITTEN).apply(np.array([[0, 1], [2, 1]])).tolist() == [[-1, 1], [2, 1]]


@pytest.mark.parametrize("name", list(WRITTEN))
def test_a_dict_that_lacks_an_entry_is_refused(name):
    with pytest.raises(ValueError, match=f"lacks '{name}'"):
        TokenPruning.from_dict({key: value for key, value in WRITTEN.items() if key != name})


@pytest.mark.parametrize(
    "edit, message",
    [
        ({"pruned_codes": [3]}, "outside the codebook of 3"),
        ({"pruned_codes": [-1]}, "outside the codebook of 3"),
        ({"pruned_codes": [1.0]}, "no integers"),
        ({"pruned_codes": ["0"]}, "no integers"),
        ({"pruned_codes": [True]}, "no integers"),
        ({"pruned_codes": [[0]]}, "no integers"),
        ({"pruned_codes": 0}, "no integers"),
        ({"pruned_codes": {"0": 1}}, "no integers"),
        ({"pruned_codes": None}, "no integers"),
        ({"pruned_codes": [0, 0]}, "repeated"),
        ({"pruned_codes": [0, 1]}, 'names 2 codes, not what "top_k" prunes'),
        ({"pruned_codes": []}, "names 0 codes"),
        ({"strategy": "drop_layer", "top_k": None}, "names 1 codes"),
        ({"strategy": "threshold", "top_k": None, "threshold": 0.5, "pruned_codes": []}, "names 0 codes"),
        ({"strategy": "none", "top_k": None}, "outside the codebook of 0"),
        ({"strategy": ["top_k"]}, "unknown"),
        ({"strategy": None}, "unknown"),
        ({"layer": 1}, "layer 1, but of 2 layers the last cannot be pruned"),
        ({"layer": 7}, "layer 7, but of 2"),
        ({"layer": "auto"}, "auto=False and layer='auto'"),
        ({"layer": None}, "layer=None"),
        ({"layer": 0.0}, "layer=0.0"),
        ({"layer": True}, "layer=True"),
        ({"top_k": "1"}, "top_k='1'"),
        ({"threshold": 0.5}, "threshold=0.5 goes with"),
        ({"codebook_sizes": None}, "codebook_sizes=None"),
        ({"codebook_sizes": 3}, "codebook_sizes=3"),
        ({"codebook_sizes": "32"}, "codebook_sizes='32'"),
        ({"codebook_sizes": []}, "codebook_sizes"),
        ({"codebook_sizes": [3.0, 2]}, "codebook_sizes"),
        ({"codebook_sizes": [3, 0]}, "codebook_sizes"),
        ({"codebook_sizes": [10**30, 2]}, "codebook_sizes"),
        ({"auto": 1}, "auto=1"),
        ({"auto": None}, "auto=None"),
        ({"auto": True}, "auto=True and layer=0"),
        ({"auto": True, "layer": "b"}, "auto=True and layer='b'"),
        ({"auto": True, "layer": 1}, "layer 1, but of 2 layers"),
        ({"auto": True, "layer": None}, "outside the codebook of 0"),
        ({"auto": True, "layer": 1, "codebook_sizes": None, "pruned_codes": None}, "codebook_sizes=None"),
    ],
)
def test_edited_dict_is_refused(edit, message):
    with pytest.raises(ValueError, match=message):
        TokenPruning.from_dict(WRITTEN | edit)


@pytest.mark.parametrize("content", [None, [], "top_k", 3, [["strategy", "none"]]])
def test_a_dict_that_is_none_is_refused(content):
    with pytest.raises(ValueError, match="must be a JSON object"):
        TokenPruning.from_dict(content)


def with_shares(random, num_items, size, share):
    """Codes in which a share of the items is spread over the first two codes, the rest over all of them."""
    return np.where(
        random.random(num_items) < share, random.integers(0, 2, num_items), random.integers(0, size, num_items)
    )


def concentrated(shares, num_items=20_000, sizes=None, seed=0):
    random, sizes = np.random.default_rng(seed), sizes or [32] * len(shares)
    columns = [with_shares(random, num_items, size, share) for size, share in zip(sizes, shares, strict=True)]
    return np.stack(columns, axis=1), sizes


@pytest.mark.parametrize(
    "shares, layer",
    [
        ([0, 0.5, 0], 1),
        ([0, 0.3, 0.5, 0], 2),
        ([0, 0.5, 0.3, 0], 1),
        ([0.9, 0.3, 0], 1),  # the first, though less even, is not to choose
        ([0, 0.3, 0.9], 1),
        ([0, 0, 0], None),
        ([0.9, 0, 0], None),
        ([0, 0, 0.9], None),
        ([0.5, 0.5, 0.5], None),  # all alike: nothing stands out
        ([0, 0.08, 0], None),  # normalised entropy 0.99
        ([0, 0.17, 0], 1),  # 0.96
    ],
)
def test_auto_chooses_the_concentrated_layer(shares, layer):
    codes, sizes = concentrated(shares)
    for strategy, options in (("top_k", {"top_k": 2}), ("threshold", {"threshold": 0.4}), ("drop_layer", {})):
        pruning = TokenPruning(strategy, layer="auto", **options)
        assert pruning.layer is None and pruning.auto
        assert pruning.fit(codes, sizes) is pruning and pruning.layer == layer
        if layer is None:
            assert pruning.num_pruned == 0 and pruning.apply(codes).tobytes() == codes.astype(np.int32).tobytes()
        else:
            expected = TokenPruning(strategy, layer=layer, **options).fit(codes, sizes)
            assert (pruning.pruned == expected.pruned).all()
            assert (pruning.apply(codes) == expected.apply(codes)).all() and (pruning.apply(codes) == -1).any()
    assert TokenPruning("none", layer="auto").fit(codes, sizes).layer is None


def test_what_auto_chooses_is_what_the_entropies_say():
    """From each layer's normalised entropy, in samples so large that chance plays no part."""
    for seed in range(30):
        shares = np.random.default_rng(seed).choice([0, 0.05, 0.1, 0.15, 0.2, 0.4], 4)
        codes, sizes = concentrated(shares, 50_000, seed=seed)
        evenness = [layer.normalized_entropy for layer in diagnose(codes, sizes).layers]
        chosen = min((1, 2), key=lambda layer: evenness[layer])
        expected = chosen if evenness[chosen] < max(evenness) - 0.02 else None
        assert find_concentrated_layer(codes, sizes) == expected, evenness


def test_auto_agrees_with_the_verdict_of_an_hourglass():
    for seed in range(5):
        codes, sizes = concentrated([0, 0.2 + 0.1 * seed, 0.3, 0], 3000, seed=seed)
        found = diagnose(codes, sizes)
        assert found.verdict == "hourglass" and find_concentrated_layer(codes, sizes) == found.verdict_layer


@pytest.mark.parametrize("sizes", [[64] * 3, [16, 512, 16], [512, 16, 16], [16, 16, 512], [256, 8, 256, 8]])
@pytest.mark.parametrize("weighted", [False, True])
def test_uniform_codes_of_small_samples_are_left_alone(sizes, weighted):
    chosen = []
    for seed in range(20):
        random = np.random.default_rng(seed)
        codes = np.stack([random.integers(0, size, 400) for size in sizes], axis=1)
        weights = random.pareto(1.5, 400) if weighted else None
        chosen.append(find_concentrated_layer(codes, sizes, weights))
    assert sum(layer is not None for layer in chosen) <= 1


def test_a_large_codebook_does_not_hide_a_concentrated_small_one():
    """In a sample this small uniform codes use 2048 codes less evenly than concentrated ones use 32."""
    codes, sizes = concentrated([0, 0, 0.3, 0], 1000, sizes=[32, 2048, 32, 32])
    evenness = [layer.normalized_entropy for layer in diagnose(codes, sizes).layers]
    assert min(evenness) == evenness[1] < evenness[2] < evenness[0] - 0.02
    assert find_concentrated_layer(codes, sizes) == 2


@pytest.mark.parametrize(
    "shares, sizes, num_items, plain, beyond",
    [
        # Uniform codes of 256 lie 0.014 below those of 16 already, so that there is little left to blame on the layer.
        ([0, 0.05, 0], [16, 256, 16], 1500, (-0.035, -0.02), (-0.02, -0.01)),
        # Below both ends by what is chance for 512 codes, though the last layer is more even than 2048 codes by chance.
        ([0.17, 0.07, 0], [32, 512, 2048], 1000, (-0.045, -0.02), (-0.05, -0.02)),
        # The first layer is as narrow; only beside the last, whose 2048 codes cannot be even, do both seem so.
        ([0.3, 0.32, 0], [32, 32, 2048], 1000, (-0.02, -0.01), (-0.2, -0.02)),
    ],
)
def test_each_way_to_compare_codebooks_of_unequal_size_has_a_say(shares, sizes, num_items, plain, beyond):
    """What the middle layer lacks to the most even one lies in `plain`; less what uniform codes lack, in `beyond`."""
    codes, _ = concentrated(shares, num_items, sizes)
    evenness = np.array([layer.normalized_entropy for layer in diagnose(codes, sizes).layers])
    random = np.random.default_rng(1)
    expected = [simulate_uniform(random, np.ones(num_items), size)[0].mean() for size in sizes]
    assert plain[0] < evenness[1] - evenness.max() < plain[1]
    assert beyond[0] < (evenness - expected)[1] - (evenness - expected).max() < beyond[1]
    assert find_concentrated_layer(codes, sizes) is None


def test_many_layers_are_not_many_chances():
    random = np.random.default_rng(0)
    found = [find_concentrated_layer(random.integers(0, 16, (80, 10)), [16] * 10) for _ in range(100)]
    assert sum(layer is not None for layer in found) <= 4


def test_auto_goes_by_weights():
    codes, sizes = concentrated([0, 0.4, 0, 0])
    weights = np.where(codes[:, 2] < 2, 30, 1)  # few products, but most of what is bought
    assert TokenPruning("top_k", layer="auto", top_k=1).fit(codes, sizes).layer == 1
    by_purchases = TokenPruning("top_k", layer="auto", top_k=2).fit(codes, sizes, weights)
    assert by_purchases.layer == 2 and np.flatnonzero(by_purchases.pruned).tolist() == [0, 1]
    even = np.where(codes[:, 1] < 2, 1 / (0.4 * 16 + 0.6), 1 / 0.6)  # takes away what is concentrated
    assert TokenPruning("top_k", layer="auto", top_k=1).fit(codes, sizes, even).layer is None


@pytest.mark.parametrize("num_layers", [1, 2])
def test_auto_with_fewer_than_three_layers_prunes_nothing(num_layers):
    codes, sizes = concentrated([0.9, 0, 0])
    pruning = TokenPruning("drop_layer", layer="auto").fit(codes[:, :num_layers], sizes[:num_layers])
    assert pruning.layer is None and (pruning.apply(codes[:, :num_layers]) == codes[:, :num_layers]).all()


def test_auto_chooses_again_when_fitted_again():
    pruning = TokenPruning("top_k", layer="auto", top_k=1)
    assert [pruning.fit(*concentrated(shares)).layer for shares in ([0, 0, 0.5, 0], [0, 0.5, 0], [0] * 3)] == [
        2,
        1,
        None,
    ]
    codes, sizes = concentrated([0.5, 0])
    assert pruning.fit(codes, sizes).layer is None


def test_auto_is_stored_and_shown():
    codes, sizes = concentrated([0, 0.5, 0])
    pruning = TokenPruning("top_k", layer="auto", top_k=3)
    shown = [repr(pruning)]
    for rows in (None, codes, codes[:, [0, 2, 0]]):
        pruning = pruning if rows is None else pruning.fit(rows, sizes)
        shown.append(repr(pruning))
        again = TokenPruning.from_dict(json.loads(json.dumps(pruning.to_dict())))
        assert (again.to_dict(), repr(again), again.layer) == (pruning.to_dict(), repr(pruning), pruning.layer)
        assert again.auto and (rows is None or (again.apply(rows) == pruning.apply(rows)).all())
        assert again.fit(codes, sizes).layer == 1  # it still chooses
    assert shown[1:] == [
        'TokenPruning(strategy="top_k", layer="auto", top_k=3)',
        'TokenPruning(strategy="top_k", layer="auto", top_k=3, layer 1 chosen, 3 codes pruned)',
        'TokenPruning(strategy="top_k", layer="auto", top_k=3, no layer is concentrated, 0 codes pruned)',
    ]


@pytest.mark.parametrize("shares", [[0, 0.5, 0], [0, 0, 0]])
def test_a_catalog_of_auto_is_saved_whole(tmp_path, shares):
    codes, sizes = concentrated(shares, 500)
    pruning = TokenPruning("threshold", layer="auto", threshold=0.4).fit(codes, sizes)
    ids = [f"p{row}" for row in range(500)]
    catalog = ProductCatalog.build(ids, codes, sizes, pruning)
    catalog.save(tmp_path / "sid_catalog.safetensors")
    again = ProductCatalog.load(tmp_path / "sid_catalog.safetensors")
    assert again.pruning.to_dict() == pruning.to_dict() and repr(again) == repr(catalog)
    assert (np.asarray(again.sid_codes)[:, :3] == -1).any() == (pruning.num_pruned > 0) == any(shares)


def test_what_auto_refuses_leaves_it_as_it_was():
    codes, sizes = concentrated([0, 0.5, 0])
    with pytest.raises(ValueError, match="top_k=33 exceeds the 32 codes of layer 1"):
        TokenPruning("top_k", layer="auto", top_k=33).fit(codes, sizes)
    pruning = TokenPruning("drop_layer", layer="auto")
    for bad, message in (([1], "weights have shape"), (-np.ones(len(codes)), "not negative")):
        with pytest.raises(ValueError, match=message):
            pruning.fit(codes, sizes, bad)
    with pytest.raises(ValueError, match="no item"):
        pruning.fit(codes[:0], sizes)
    assert pruning.pruned is None and pruning.layer is None


@pytest.fixture(scope="module")
def crowded():
    """Embeddings, half of which share a code of the middle layer; their quantizer and codes."""
    random = np.random.default_rng(0)
    embeddings = random.standard_normal((600, 6)).astype(np.float32)
    embeddings[:300] *= 0.3
    quantizer = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=[6, 7, 8], relocation_threshold=0))
    quantizer.fit(embeddings)
    return embeddings, quantizer, quantizer.encode(embeddings)


@pytest.mark.parametrize("amount", [{"top_k": 2}, {"threshold": 0.5}])
def test_split(crowded, amount):
    embeddings, quantizer, codes = crowded
    pruning = TokenPruning("split", layer=1, parts=3, **amount)
    pruning.fit(codes, quantizer.codebook_sizes, quantizer=quantizer, embeddings=embeddings)
    counts = np.bincount(codes[:, 1], minlength=7)
    expected = np.argsort(-counts, kind="stable")
    number = 2 if "top_k" in amount else int(np.argmax(np.cumsum(counts[expected]) >= 300)) + 1
    assert pruning.split == expected[:number].tolist()
    assert pruning.codebook_sizes == pruning.quantizer.codebook_sizes == [6, 7 + 2 * number, 8]
    assert quantizer.codebook_sizes == [6, 7, 8] and pruning.num_pruned == 0
    new_codes = pruning.quantizer.encode(embeddings)
    assert pruning.apply(new_codes).tolist() == new_codes.tolist()
    before, after = diagnose(codes, [6, 7, 8]), diagnose(new_codes, pruning.codebook_sizes)
    assert after.layers[1].entropy > before.layers[1].entropy
    assert after.layers[1].top_share < before.layers[1].top_share

    again = TokenPruning.from_dict(json.loads(json.dumps(pruning.to_dict())))
    assert again.to_dict() == pruning.to_dict() and again.quantizer is None
    assert again.apply(new_codes).tolist() == new_codes.tolist()
    assert f"{number} codes split into 3" in repr(pruning)
    ids = [f"p{row}" for row in range(600)]
    catalog = ProductCatalog.build(ids, new_codes, pruning.codebook_sizes, pruning, quantizer=pruning.quantizer)
    with pytest.raises(ValueError, match="codebooks"):
        ProductCatalog.build(ids, new_codes, pruning.codebook_sizes, pruning, quantizer=quantizer)
    assert catalog.num_sids == len(np.unique(new_codes, axis=0))


def test_split_of_a_balanced_layer_chosen_automatically(crowded):
    embeddings, quantizer, _ = crowded
    even = np.stack([np.arange(600) % size for size in (6, 7, 8)], axis=1)
    pruning = TokenPruning("split", layer="auto", top_k=1).fit(
        even, [6, 7, 8], quantizer=quantizer, embeddings=embeddings
    )
    assert pruning.layer is None and pruning.split == [] and pruning.codebook_sizes == [6, 7, 8]
    assert pruning.quantizer is quantizer
    assert TokenPruning.from_dict(pruning.to_dict()).to_dict() == pruning.to_dict()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "either top_k or threshold"),
        ({"top_k": 1, "threshold": 0.5}, "either top_k or threshold"),
        ({"top_k": 1, "parts": 1}, "parts=1 must be"),
        ({"top_k": 1, "parts": True}, "parts=True must be"),
    ],
)
def test_bad_splits(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenPruning("split", **arguments)


def test_splitting_needs_quantizer_and_embeddings(crowded):
    embeddings, quantizer, codes = crowded
    for options in ({}, {"quantizer": quantizer}, {"embeddings": embeddings}):
        with pytest.raises(ValueError, match="needs both"):
            TokenPruning("split", top_k=1).fit(codes, [6, 7, 8], **options)
    with pytest.raises(ValueError, match="needs both"):
        TokenPruning("top_k", top_k=1).fit(codes, [6, 7, 8], quantizer=quantizer, embeddings=embeddings)
    with pytest.raises(ValueError, match=r"codebooks \[6, 7, 8\], the codes \[6, 7, 9\]"):
        TokenPruning("split", top_k=1).fit(codes, [6, 7, 9], quantizer=quantizer, embeddings=embeddings)
    with pytest.raises(ValueError, match="parts=3 must be"):
        TokenPruning("top_k", top_k=1, parts=3)


@pytest.mark.parametrize("split", [[9], [0, 0], "0", [True], None])
def test_edited_splits_are_refused(crowded, split):
    embeddings, quantizer, codes = crowded
    pruning = TokenPruning("split", top_k=2).fit(codes, [6, 7, 8], quantizer=quantizer, embeddings=embeddings)
    with pytest.raises(ValueError, match="split_codes"):
        TokenPruning.from_dict(pruning.to_dict() | {"split_codes": split})
