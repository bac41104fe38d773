import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy

from rqsid import ResidualQuantizer, ResidualQuantizerConfig, diagnose
from rqsid.sid_tokenizer import refit as refit_module
from rqsid.sid_tokenizer.embeddings import EmbeddingReader
from rqsid.sid_tokenizer.hourglass import HEAVIEST, NULL_SAMPLES, simulate_uniform

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


def encode(points, sizes, threshold=0.1, seed=0):
    config = ResidualQuantizerConfig(
        codebook_sizes=sizes, relocation_threshold=threshold, num_iterations=15, seed=seed
    )
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
    assert (first.utilisation, second.utilisation) == (0.75, 1.0)
    # the empty prefix has the children 0, 1 and 2, each of which has one child; code 0 follows two prefixes, code 1 one
    assert (first.children_mean, first.children_median, first.children_max, first.single_child_share) == (3, 3, 3, 0)
    assert (first.parents_mean, first.parents_max) == (1, 1)
    assert (second.children_mean, second.children_median, second.children_max) == (1, 1, 1)
    assert (second.single_child_share, second.parents_mean, second.parents_max) == (1, 1.5, 2)
    # codes by frequency: 2, 0, 1, 3 and 0, 1
    assert [flow.tolist() for flow in found.flows] == [[[0, 2], [1, 0], [1, 0], [0, 0]]]
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
        before = {tuple(row) for row in codes[:, :layer].tolist()}
        children = [len({path for path in prefixes if path[:-1] == node}) for node in before]
        parents = [len({path for path in prefixes if path[-1] == code}) for code in range(size)]
        assert statistics.children_mean == pytest.approx(np.mean(children))
        assert (statistics.children_median, statistics.children_max) == (np.median(children), max(children))
        assert statistics.single_child_share == pytest.approx(np.mean(np.array(children) == 1))
        assert statistics.parents_mean == pytest.approx(np.mean([n for n in parents if n] or [0]))
        assert statistics.parents_max == max(parents)
        if counts.sum():
            assert statistics.entropy == pytest.approx(scipy_entropy(counts, base=2), abs=1e-12)
            double_sum = np.abs(counts[:, None] - counts[None]).sum() / (2 * size * counts.sum())
            assert statistics.gini == pytest.approx(double_sum, abs=1e-12)
            assert statistics.top_share == pytest.approx(counts.max() / counts.sum())

    for layer, flow in enumerate(found.flows):
        ranks = [
            np.append(np.argsort(np.argsort(-found.counts[i], kind="stable")), sizes[i]) for i in (layer, layer + 1)
        ]
        expected = np.zeros((sizes[layer] + 1, sizes[layer + 1] + 1))
        for row, weight in zip(codes, weights, strict=True):
            expected[ranks[0][row[layer]], ranks[1][row[layer + 1]]] += weight
        assert flow == pytest.approx(expected[: len(flow), : flow.shape[1]])
        assert flow.sum() == pytest.approx(weights.sum())

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


def test_shared_offsets_make_an_hourglass_that_survives():
    points, sizes = shared_offsets(), [64, 64, 64]
    found = diagnose(encode(points, sizes), sizes, embeddings=points)
    assert (found.verdict, found.verdict_layer) == ("hourglass", 1)
    assert found.hourglass_score < -0.05 and found.hourglass_score < found.null_score
    assert found.layers[1].gini > found.layers[0].gini + 0.2
    assert found.survives is True
    assert "b (1)" in found.summary() and "survives" in found.summary()


def test_plain_training_shows_it_from_most_starts():
    """From some starts the last layer is as uneven as the middle one: plain k-means is a matter of luck."""
    points, sizes = shared_offsets(), [64, 64, 64]
    found = [diagnose(encode(points, sizes, threshold=0, seed=seed), sizes) for seed in range(5)]
    assert [(one.verdict, one.verdict_layer) for one in found].count(("hourglass", 1)) >= 3


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
    assert content["layers"][1]["parents_mean"] == found.layers[1].parents_mean
    assert content["layers"][1]["utilisation"] == found.layers[1].used / 8
    assert content["flows"][1] == found.flows[1].tolist() and content["duplicate_share"] == 0
    assert np.shape(content["null_bands"]) == (3, 2, 8)
    rows = found.to_markdown().splitlines()
    assert len({row.count("|") for row in rows[:5]}) == 1
    assert [row.split("|")[1].strip() for row in rows[2:5]] == ["a (0)", "b (1)", "c (2)"]
    assert f"{content['unique_sids']} unique SIDs" in str(found)
    flow = rows[6:10]
    assert [row.split("|")[1].strip() for row in flow[2:]] == ["b (1)", "c (2)"]
    assert len({row.count("|") for row in flow}) == 1
    assert "| layer | codes after" not in diagnose(codes[:, :1], [8]).to_markdown()


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


# Chance: what uniform codes show in a sample of these items


def heavy_tailed(random, kind, num_items):
    return {
        "lognormal": lambda: random.lognormal(sigma=2, size=num_items),
        "pareto": lambda: random.pareto(0.8, num_items) + 1,
        "one purchase each, a bestseller": lambda: np.append(np.ones(num_items - 1), 5 * num_items),
        "mostly none": lambda: np.maximum(random.poisson(0.5, num_items), np.arange(num_items) == 0),
    }[kind]()


@pytest.mark.parametrize("num_items", [10, 30, 100, 1000])
@pytest.mark.parametrize("kind", ["lognormal", "pareto", "one purchase each, a bestseller", "mostly none"])
def test_uniform_codes_of_few_heavy_items_are_no_hourglass(kind, num_items):
    verdicts = []
    for seed in range(40):
        random = np.random.default_rng(seed)
        codes = random.integers(0, 16, (num_items, 3))
        verdicts.append(diagnose(codes, [16] * 3, heavy_tailed(random, kind, num_items)).verdict)
    assert verdicts.count("hourglass") <= 2


@pytest.mark.parametrize("layer, position", [(0, "narrow top"), (1, "hourglass"), (2, "funnel")])
def test_a_large_codebook_in_a_small_sample_is_not_blamed_for_its_size(layer, position):
    """Ten thousand items use 4096 uniform codes less evenly than 256 ones; a trace of unevenness on top is no verdict."""
    sizes, verdicts = [256] * 3, {}
    sizes[layer] = 4096
    for spread in (0.3, 1.5):
        random = np.random.default_rng(0)
        columns = []
        for size in sizes:
            shares = np.exp((size == 4096) * spread * random.standard_normal(size))
            columns.append(random.choice(size, 10_000, p=shares / shares.sum()))
        verdicts[spread] = diagnose(np.stack(columns, axis=1), sizes).verdict
    assert verdicts == {0.3: "none", 1.5: position}


def test_a_waist_is_found_under_heavy_weights_and_in_few_items():
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (5000, 3))
    codes[random.random(5000) < 0.8, 1] = 0
    assert diagnose(codes, [16] * 3, random.lognormal(sigma=2, size=5000)).verdict == "hourglass"
    few = np.stack([np.arange(16), np.zeros(16, dtype=int), np.arange(16)], axis=1)
    assert diagnose(few, [16] * 3).verdict == "hourglass"


def test_the_weights_decide_the_verdict():
    """Even by items, but what is bought has one middle code."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (8000, 3))
    assert diagnose(codes, [16] * 3).verdict == "none"
    found = diagnose(codes, [16] * 3, np.where(codes[:, 1] == 3, 50, 1))
    assert (found.verdict, found.verdict_layer) == ("hourglass", 1)


@pytest.mark.parametrize("kind", ["equal", "lognormal", "pareto"])
def test_simulated_samples_look_like_sampled_codes(kind):
    """Against drawing a code for every item, for more items than are drawn one by one."""
    random = np.random.default_rng(0)
    num_items, size = 3 * HEAVIEST, 64
    weights = np.full(num_items, 2.5) if kind == "equal" else heavy_tailed(random, kind, num_items)
    evenness, band = simulate_uniform(random, weights, size)
    drawn, descending = [], []
    for _ in range(NULL_SAMPLES):
        counts = np.bincount(random.integers(0, size, num_items), weights, size)
        drawn.append(scipy_entropy(counts, base=size))
        descending.append(np.sort(counts)[::-1])
    # the means of 200 samples each, and the spreads, which differ from each other by chance by about a tenth
    assert evenness.mean() == pytest.approx(np.mean(drawn), abs=0.5 * np.std(drawn))
    assert evenness.std() == pytest.approx(np.std(drawn), rel=0.3)
    middle = np.median(descending, axis=0)
    assert band.shape == (2, size) and (band[0] <= middle).all() and (middle <= band[1]).all()
    assert band.mean(0).sum() == pytest.approx(weights.sum(), rel=0.05)


def test_a_pruned_layer_is_compared_with_samples_of_the_items_that_have_a_code():
    """Forty codes that are left of ten thousand are uneven by chance, which the ten thousand are not."""
    hits = 0
    for seed in range(20):
        random = np.random.default_rng(seed)
        codes = random.integers(0, 64, (10_000, 3))
        codes[40:, 1] = -1
        hits += diagnose(codes, [64] * 3).verdict == "hourglass"
    assert hits <= 1


# Embeddings


def test_a_large_catalog_is_fitted_on_a_sample_and_encoded_whole(tmp_path, monkeypatch):
    points = np.random.default_rng(0).standard_normal((5000, 4)).astype(np.float32)
    np.save(tmp_path / "points.npy", points)
    fitted, fit = [], ResidualQuantizer.fit
    monkeypatch.setattr(ResidualQuantizer, "fit", lambda self, rows: fitted.append(len(rows)) or fit(self, rows))
    codes = np.random.default_rng(1).integers(0, 16, (5000, 3))
    mapped = np.load(tmp_path / "points.npy", mmap_mode="r")
    found = [
        diagnose(codes, [16] * 3, embeddings=given).better_optimum
        for given in (points, mapped, str(tmp_path / "points.npy"), torch.from_numpy(points))
    ]
    assert fitted == [16 * refit_module.ROWS_PER_CODE] * 4
    assert found[0].num_items == 5000
    assert all(one.to_dict() == found[0].to_dict() for one in found[1:])
    other = diagnose(codes, [16] * 3, embeddings=points, seed=1).better_optimum
    assert other.counts[0].tolist() != found[0].counts[0].tolist()
    assert (np.load(tmp_path / "points.npy") == points).all()


def test_the_sample_is_of_all_rows(monkeypatch):
    monkeypatch.setattr(refit_module, "ROWS_PER_CODE", 10)
    seen, fit = [], ResidualQuantizer.fit
    monkeypatch.setattr(
        ResidualQuantizer, "fit", lambda self, rows: seen.extend(rows[:, 0].tolist()) or fit(self, rows)
    )
    points = np.stack([np.arange(40_000), np.zeros(40_000)], axis=1).astype(np.float32)  # more than one chunk
    quantizer, codes = refit_module.refit(EmbeddingReader(points), ResidualQuantizerConfig(codebook_sizes=[20, 20]))
    assert len(set(seen)) == len(seen) == 200 and seen == sorted(seen)
    assert min(seen) < 2000 and max(seen) > 38_000  # missed with a probability below 1e-4 each
    assert (codes == quantizer.encode(points)).all()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_duplicates_by_hand(dtype):
    points = np.random.default_rng(0).standard_normal((20_000, 3)).astype(dtype)
    points[:, 0] = np.arange(20_000) % 1000  # distinct even where float16 rounds the rest alike
    points[:, 1] = np.arange(20_000) // 1000
    assert refit_module.duplicate_share(EmbeddingReader(points)) == 0
    points[[7, 19_999]] = points[18_000]  # three alike, in two chunks
    points[30], points[31] = [1, 0, 0.5], [1, -0.0, 0.5]  # equal numbers
    points[40], points[41] = [1, 0.5, 0], [0.5, 1, 0]  # other order
    assert refit_module.duplicate_share(EmbeddingReader(points)) == 5 / 20_000
    assert (
        "5 items share their embedding" in diagnose(np.zeros((20_000, 1), dtype=int), [2], embeddings=points).summary()
    )


def test_all_items_alike():
    points = np.ones((64, 4), dtype=np.float32)
    assert refit_module.duplicate_share(EmbeddingReader(points)) == 1
