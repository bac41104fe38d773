import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy

from rqsid import ResidualQuantizer, ResidualQuantizerConfig, diagnose

# Four items in two layers of 4 and 2 codes; the last two share a SID.
TINY = np.array([[0, 0], [1, 0], [2, 1], [2, 1]])


def shared_offsets(seed=0, num_items=12_000, num_clusters=64, dim=32, share=0.2):
    """Tight clusters, of whose items a minority carries one of a few shared offsets: a real hourglass."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((num_clusters, dim))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    offsets = random.standard_normal((num_clusters - 1, dim))
    offsets *= 0.5 / np.linalg.norm(offsets, axis=1, keepdims=True)
    points = centres[random.integers(0, num_clusters, num_items)]
    chosen = random.random(num_items) < share
    points[chosen] += offsets[random.integers(0, num_clusters - 1, chosen.sum())]
    points += 0.05 / np.sqrt(dim) * random.standard_normal((num_items, dim))
    return points.astype(np.float32)


def encode(points, sizes, threshold=0.1):
    config = ResidualQuantizerConfig(codebook_sizes=sizes, relocation_threshold=threshold, num_iterations=15)
    return ResidualQuantizer(config).fit(points).encode(points)


def test_by_hand():
    found = diagnose(TINY, [4, 2])
    first, second = found.layers
    assert [counts.tolist() for counts in found.counts] == [[1, 1, 2, 0], [2, 2]]
    # p = 1/4, 1/4, 1/2: 1/4 * 2 + 1/4 * 2 + 1/2 * 1 bits
    assert (first.entropy, first.normalized_entropy) == (1.5, 0.75)
    assert first.perplexity == pytest.approx(2**1.5)
    # |differences| of (0, 1, 1, 2): 1 + 1 + 2 + 0 + 1 + 1 = 6, both ways 12, over 2 * 4 * 4
    assert first.gini == pytest.approx(12 / 32)
    # deviations from the mean 1: (0, 0, 1, -1)
    assert first.std == pytest.approx(np.sqrt(0.5)) and first.cv == pytest.approx(np.sqrt(0.5))
    assert (first.top_share, first.used, first.under_used, first.present) == (0.5, 3, 1, 1.0)
    assert (first.paths_used, first.paths_possible) == (3, 4)
    assert (second.entropy, second.gini, second.std, second.top_share) == (1.0, 0.0, 0.0, 0.5)
    assert (second.paths_used, second.paths_possible) == (3, 8)
    assert (found.num_items, found.unique_sids, found.colliding_items, found.largest_group) == (4, 3, 2, 2)
    assert found.collision_rate == 0.25 and found.mean_length == 2
    assert found.recall_ceiling == {1: 0.75, 10: 1.0, 50: 1.0}
    assert (found.verdict, found.verdict_layer, found.hourglass_score) == ("none", None, None)
    assert found.survives is None


def test_by_hand_with_weights():
    found = diagnose(TINY, [4, 2], weights=[1, 2, 1, 4])
    assert [counts.tolist() for counts in found.counts] == [[1, 2, 5, 0], [3, 5]]
    # of the last two the heavier is listed first, so that the lighter is out of reach: 7 of 8
    assert found.recall_ceiling == {1: 7 / 8, 10: 1.0, 50: 1.0}
    assert found.layers[0].top_share == 5 / 8
    assert found.layers[1].entropy == pytest.approx(scipy_entropy([3, 5], base=2))
    assert found.colliding_items == 2  # items stay items


def test_pruned_codes_by_hand():
    found = diagnose(np.array([[0, -1, 0], [0, 1, 0], [1, -1, 1], [1, -1, 1]]), [2, 2, 2])
    middle = found.layers[1]
    assert (middle.present, middle.used, middle.entropy, middle.top_share) == (0.25, 1, 0.0, 1.0)
    assert [layer.paths_used for layer in found.layers] == [2, 3, 3]
    assert [layer.paths_possible for layer in found.layers] == [2, 6, 12]  # absence is one code more
    assert found.mean_length == 2.25 and found.unique_sids == 3


def test_dropped_layer():
    codes = np.array([[0, -1, 0], [1, -1, 0], [1, -1, 1]])
    found = diagnose(codes, [2, 4, 2])
    middle = found.layers[1]
    assert (middle.present, middle.used, middle.entropy, middle.gini, middle.std) == (0, 0, 0, 0, 0)
    assert [layer.paths_possible for layer in found.layers] == [2, 2, 4]
    assert (found.unique_sids, found.mean_length) == (3, 2)
    assert found.verdict == "none" and found.hourglass_score is None  # two layers are left, which have no middle
    json.dumps(found.to_dict(), allow_nan=False)


@given(st.integers(0, 10**6), st.integers(1, 80), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_equals_brute_force(seed, num_items, sizes, weighted):
    random = np.random.default_rng(seed)
    codes = np.stack([random.integers(0, size, num_items) for size in sizes], axis=1)
    if len(sizes) > 2:
        codes[random.random(num_items) < 0.4, 1] = -1
    weights = random.integers(0, 5, num_items) + (np.arange(num_items) == 0) if weighted else np.ones(num_items)
    found = diagnose(codes, sizes, weights if weighted else None)

    for layer, size in enumerate(sizes):
        here = codes[:, layer] >= 0
        counts = np.array([weights[codes[:, layer] == code].sum() for code in range(size)])
        statistics = found.layers[layer]
        assert statistics.present == pytest.approx(weights[here].sum() / weights.sum())
        assert statistics.std == pytest.approx(counts.std())
        prefixes = {tuple(row) for row in codes[:, : layer + 1].tolist()}
        assert statistics.paths_used == len(prefixes)
        assert statistics.paths_used <= statistics.paths_possible
        if counts.sum():
            assert statistics.entropy == pytest.approx(scipy_entropy(counts, base=2), abs=1e-12)
            double_sum = np.abs(counts[:, None] - counts[None]).sum() / (2 * size * counts.sum())
            assert statistics.gini == pytest.approx(double_sum, abs=1e-12)
            assert statistics.top_share == pytest.approx(counts.max() / counts.sum())

    groups = {}
    for row, sid in enumerate(map(tuple, codes.tolist())):
        groups.setdefault(sid, []).append(weights[row])
    for k, ceiling in found.recall_ceiling.items():
        reachable = sum(sum(sorted(group, reverse=True)[:k]) for group in groups.values())
        assert ceiling == pytest.approx(reachable / weights.sum())
    assert found.unique_sids == len(groups)
    assert found.largest_group == max(map(len, groups.values()))
    assert found.colliding_items == sum(len(group) for group in groups.values() if len(group) > 1)
    assert found.mean_length == pytest.approx((codes >= 0).sum() / num_items)


def test_top_share_is_of_one_percent_of_the_codes():
    codes = np.repeat(np.arange(200), [50, 30] + [1] * 198)[:, None]
    assert diagnose(codes, [200]).layers[0].top_share == 80 / 278
    assert diagnose(codes, [201]).layers[0].top_share == 81 / 278  # 2.01 codes are rounded up


@pytest.mark.parametrize("threshold", [0.1, 0])
def test_shared_offsets_make_an_hourglass_that_survives(threshold):
    points, sizes = shared_offsets(), [64, 64, 64]
    found = diagnose(encode(points, sizes, threshold), sizes, embeddings=points)
    assert (found.verdict, found.verdict_layer) == ("hourglass", 1)
    assert found.hourglass_score < -0.05 and found.hourglass_score < found.null_score
    assert found.layers[1].gini > found.layers[0].gini + 0.2
    assert found.survives is True
    assert "b (1)" in found.summary() and "survives" in found.summary()


def test_an_hourglass_of_a_poor_optimum_does_not_survive():
    points = np.random.default_rng(0).standard_normal((4000, 8)).astype(np.float32)
    codes = encode(points, [32, 32, 32])
    codes[:, 1] = np.where(np.arange(4000) % 10 < 8, 0, codes[:, 1])
    found = diagnose(codes, [32, 32, 32], embeddings=points)
    assert (found.verdict, found.verdict_layer, found.survives) == ("hourglass", 1, False)
    assert found.better_optimum.verdict == "none" and "removes it" in found.summary()


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_featureless_data_has_no_hourglass(kind):
    random = np.random.default_rng(1)
    points = random.random((8000, 8)) if kind == "uniform" else random.standard_normal((8000, 8))
    found = diagnose(encode(points.astype(np.float32), [32, 32, 32]), [32, 32, 32])
    assert (found.verdict, found.verdict_layer) == ("none", None)


@pytest.mark.parametrize("num_items", [3, 30, 300, 3000])
@pytest.mark.parametrize("sizes", [[64, 64, 64], [16, 256, 16], [256, 16, 256], [8, 8, 8, 8, 8]])
def test_uniform_codes_of_any_sample_size_are_no_hourglass(num_items, sizes):
    verdicts = []
    for seed in range(20):
        random = np.random.default_rng(seed)
        codes = np.stack([random.integers(0, size, num_items) for size in sizes], axis=1)
        weights = random.lognormal(sigma=2, size=num_items) if seed % 2 and num_items >= 300 else None
        verdicts.append(diagnose(codes, sizes, weights).verdict)
    assert verdicts.count("hourglass") <= 1  # the null score is a quantile of 1 in 200


def skewed(random, size, num_items, power):
    shares = (np.arange(size) + 1.0) ** -power
    return random.choice(size, num_items, p=shares / shares.sum())


@pytest.mark.parametrize(
    "powers, verdict, layer",
    [
        ([0, 1, 0.2, 0, 0], "hourglass", 1),
        ([0, 0.2, 0.5, 1.2, 0], "hourglass", 3),
        ([0, 0.3, 0.6, 0.9, 1.2], "funnel", 4),
        ([1.2, 0.9, 0.6, 0.3, 0], "narrow top", 0),
        ([0, 0, 0, 0, 0], "none", None),
    ],
)
def test_verdicts_of_five_layers(powers, verdict, layer):
    random = np.random.default_rng(0)
    codes = np.stack([skewed(random, 32, 5000, power) for power in powers], axis=1)
    found = diagnose(codes, [32] * 5)
    assert (found.verdict, found.verdict_layer) == (verdict, layer)
    evenness = [statistics.normalized_entropy for statistics in found.layers]
    assert found.hourglass_score == pytest.approx(np.mean(evenness[1:4]) - (evenness[0] + evenness[4]) / 2)


def test_two_layers_have_no_verdict():
    random = np.random.default_rng(0)
    codes = np.stack([skewed(random, 32, 500, 0), skewed(random, 32, 500, 2)], axis=1)
    found = diagnose(codes, [32, 32])
    assert (found.verdict, found.hourglass_score, found.null_score) == ("none", None, None)
    assert "fewer than three layers" in found.summary()


def test_report_and_dict():
    points = np.random.default_rng(0).standard_normal((200, 4)).astype(np.float32)
    codes = encode(points, [8, 8, 8])
    found = diagnose(torch.tensor(codes), [8, 8, 8], torch.ones(200), embeddings=points)
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["unique_sids"] == len({tuple(row) for row in codes.tolist()})
    assert content["counts"][2] == np.bincount(codes[:, 2], minlength=8).tolist()
    assert content["better_optimum"]["num_items"] == 200
    assert content["layers"][1]["entropy"] == found.layers[1].entropy
    rows = found.to_markdown().splitlines()
    assert len({row.count("|") for row in rows[:5]}) == 1
    assert [row.split("|")[1].strip() for row in rows[2:5]] == ["a (0)", "b (1)", "c (2)"]
    assert f"{content['unique_sids']} unique SIDs" in str(found)


def test_does_not_change_its_input_and_takes_one_item():
    codes = TINY.astype(np.int16)
    before = codes.copy()
    diagnose(codes, [4, 2])
    assert (codes == before).all()
    found = diagnose(np.array([[0, 1, 2]]), [3, 3, 3], weights=[0.1])
    assert (found.unique_sids, found.recall_ceiling[1], found.verdict) == (1, 1.0, "none")


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"codes": np.zeros((0, 2), dtype=int)}, ValueError, "no item"),
        ({"codes": np.zeros(4, dtype=int)}, ValueError, r"shape \(4,\)"),
        ({"codes": TINY + 3}, ValueError, r"Layer 0 holds the code 5.*4 codes"),
        ({"codes": TINY.astype(float)}, TypeError, "integers, got float64"),
        ({"weights": [1, 2]}, ValueError, r"shape \(2,\).*4 items"),
        ({"weights": np.ones((4, 1))}, ValueError, r"shape \(4, 1\)"),
        ({"weights": [1, -1, 1, 1]}, ValueError, "not negative"),
        ({"weights": [1, np.nan, 1, 1]}, ValueError, "finite"),
        ({"weights": [0, 0, 0, 0]}, ValueError, "not all zero"),
        ({"embeddings": np.zeros((3, 2), dtype=np.float32)}, ValueError, "3 embeddings for 4 rows"),
    ],
)
def test_bad_input_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        diagnose(**{"codes": TINY, "codebook_sizes": [4, 2]} | arguments)


@pytest.mark.parametrize(
    "powers, verdict",
    [
        ([0, 1, 0.3], "hourglass"),
        ([0, 1, 1], "funnel"),
        ([0, 1, 0.98], "funnel"),
        ([0.9, 0.9, 0], "narrow top"),
        ([1, 0.9, 0], "narrow top"),
    ],
)
def test_an_hourglass_has_a_waist(powers, verdict):
    """One even end makes the average of the ends even, but no waist: the middle must be less even than both."""
    random = np.random.default_rng(0)
    codes = np.stack([skewed(random, 64, 20000, power) for power in powers], axis=1)
    found = diagnose(codes, [64] * 3)
    assert found.hourglass_score < -0.02
    assert found.verdict == verdict
