"""k-means against brute force in float64, its starts, and what relocation moves and leaves."""

import numpy as np
import pytest
import torch

from rqsid import ResidualQuantizer, ResidualQuantizerConfig
from rqsid.sid_tokenizer.initialization import initial_codebook
from rqsid.sid_tokenizer.kmeans import cluster_sums, lloyd
from rqsid.sid_tokenizer.relocation import relocate


def normal(num_points, dim, seed=0):
    return torch.tensor(np.random.default_rng(seed).standard_normal((num_points, dim)).astype(np.float32))


def distances(points, codebook):
    points, codebook = np.asarray(points, dtype=np.float64), np.asarray(codebook, dtype=np.float64)
    return ((points[:, None] - codebook[None]) ** 2).sum(-1)


def error(points, codebook):
    return distances(points, codebook).min(1).sum()


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_lloyd_equals_brute_force(seed, spherical):
    points = normal(700, 5, seed)
    points = torch.nn.functional.normalize(points, dim=1) if spherical else points
    start = points[:9].clone()
    start[8] = -start[7] if spherical else 50  # far from all points, if not spherical: a code without points stays
    before = start.clone()
    codebook, prices = lloyd(lambda: points.split(64), start, 6, spherical=spherical)
    expected, table = start.double().numpy(), points.double().numpy()
    for _ in range(6):
        nearest = distances(table, expected).argmin(1)
        for code in range(9):
            if (nearest == code).any():
                expected[code] = table[nearest == code].mean(0)
        if spherical:
            expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(codebook, expected, atol=1e-5)
    assert prices is None and torch.equal(start, before)


def test_lloyd_by_hand_with_a_price():
    """Points 0, 1, 2 and 10; codes at 0 and 10. A price of 70 on the first leaves it 0 and 1: 2 is 64 + 6 from 10."""
    points = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    codebook = torch.tensor([[0.0], [10.0]])
    for price, counts in ((0.0, [3, 1]), (61.0, [2, 2]), (81.0, [1, 3]), (101.0, [0, 4])):
        sums, number, squares = cluster_sums([points[:3], points[3:]], codebook, torch.tensor([price, 0.0]))
        assert number.tolist() == counts
        assert sums.sum() == 13 and squares.sum() == 105


def test_sums_over_processes_are_those_of_all_points():
    points, calls = normal(300, 4), []

    def reduce(function):
        calls.append(1)
        return tuple(2 * part for part in function())  # two processes with the same points

    alone, _ = lloyd(lambda: points.split(64), points[:7], 5)
    together, _ = lloyd(lambda: points.split(64), points[:7], 5, reduce=reduce)
    assert len(calls) == 5
    torch.testing.assert_close(alone, together)


def clusters_of(counts, centres, spread=0.01, seed=0):
    random = np.random.default_rng(seed)
    points = [
        np.asarray(centre) + spread * random.standard_normal((count, len(centre)))
        for count, centre in zip(counts, centres, strict=True)
    ]
    return torch.tensor(np.concatenate(points).astype(np.float32))


def relocated(points, codebook, threshold=0.25):
    codebook = codebook.clone()
    nearest = torch.tensor(distances(points, codebook).argmin(1))
    counts = torch.bincount(nearest, minlength=len(codebook)).double()
    means = torch.zeros_like(codebook).index_add_(0, nearest, points) / counts[:, None].clamp_min(1)
    codebook = torch.where(counts[:, None] > 0, means.float(), codebook)
    errors = torch.zeros(len(codebook), dtype=torch.float64)
    errors.index_add_(0, nearest, (points - codebook[nearest]).double().square().sum(1))
    before = codebook.clone()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(points), generator=generator)
    changed = relocate(codebook, points[order], counts, errors, threshold, generator)
    return before, codebook, changed.tolist()


def test_an_outlier_far_away_keeps_its_code():
    """Giving it up would cost 500^2, splitting the cluster of unit variance gains about 100 * 2 / pi."""
    points = clusters_of([100, 1], [[0, 0], [500, 0]], spread=1.0)
    before, after, changed = relocated(points, torch.tensor([[0.0, 0], [500.0, 0]]))
    assert changed == [] and torch.equal(before, after)


@pytest.mark.parametrize("near", [0.02, None])
def test_a_near_duplicate_and_an_empty_code_are_moved(near):
    """Two clusters share code 0; code 2 holds a handful of code 1's points, or none at all. It is what must move."""
    points = clusters_of([60, 60, 90, 4], [[-4, 0], [4, 0], [0, 50], [0.0, 50.0 + (near or 0)]], spread=0.001)
    codebook = torch.tensor([[0.0, 0], [0, 50], [0, 50.02 if near else 900]])
    before, after, changed = relocated(points, codebook)
    assert changed == [2, 0]  # what moved, and what it split
    assert sorted(after[[0, 2], 0].tolist()) == pytest.approx([-4, 4], abs=0.2)
    assert torch.equal(after[1], before[1])
    assert error(points, after) < 0.01 * error(points, before)


def test_without_error_or_under_used_codes_nothing_moves():
    points = torch.tensor([[0.0, 1]] * 50 + [[5.0, 5]])
    before, after, changed = relocated(points, torch.tensor([[0.0, 1], [5, 5], [7, 7], [8, 8]]))
    assert changed == [] and torch.equal(before, after)
    points = clusters_of([50, 50], [[0, 0], [9, 9]], spread=1.0)
    assert relocated(points, torch.tensor([[0.0, 0], [9, 9]]))[2] == []


@pytest.mark.parametrize("seed", range(5))
def test_plus_plus_finds_every_separated_cluster(seed):
    centres = 100 * torch.eye(20)
    points = centres[torch.arange(1000) % 20] + 0.1 * normal(1000, 20, seed)
    points = points[torch.randperm(1000, generator=torch.Generator().manual_seed(seed))]
    hit = {init: set(initial_codebook(points, 20, init, seed).argmax(1).tolist()) for init in ("k-means++", "random")}
    assert len(hit["k-means++"]) == 20
    assert len(hit["random"]) < 20  # else the data would not tell the two apart


@pytest.mark.parametrize("init", ["random", "k-means++", "staged"])
@pytest.mark.parametrize("num_points, num_codes, dim", [(50, 1, 4), (8, 8, 3), (40, 5, 1), (40, 5, 2), (300, 9, 40)])
def test_starts_of_any_shape(init, num_points, num_codes, dim):
    points = normal(num_points, dim)
    before = points.clone()
    codebook = initial_codebook(points, num_codes, init, seed=1)
    assert codebook.shape == (num_codes, dim) and torch.isfinite(codebook).all()
    assert torch.equal(codebook, initial_codebook(points, num_codes, init, seed=1))
    assert torch.equal(points, before)
    if init != "staged":  # rows, no two alike
        rows = distances(codebook, points)
        assert (rows.min(1) == 0).all() and len(set(rows.argmin(1))) == num_codes
    if num_points == num_codes and init != "staged":
        assert error(points, codebook) == 0


@pytest.mark.parametrize("init", ["random", "k-means++", "staged"])
def test_starts_among_equal_points(init):
    codebook = initial_codebook(torch.full((30, 4), 2.5), 6, init)
    torch.testing.assert_close(codebook, torch.full((6, 4), 2.5))


def test_staged_is_at_least_as_good_as_random_on_few_strong_directions():
    spread = torch.linspace(3, 0.05, 24).square()
    random, staged = [], []
    for seed in range(4):
        points = normal(3000, 24, seed) * spread
        for init, errors in (("random", random), ("staged", staged)):
            start = initial_codebook(points, 32, init, seed)
            errors.append(error(points, lloyd(lambda points=points: points.split(1024), start, 4)[0]))
    assert sum(staged) < sum(random)


def test_the_cluster_with_the_most_to_gain_is_split():
    """
    A ball of 40 dimensions has four times the squared error of a line, but halving it along any direction gains a
    fraction of what halving the line does.
    """
    random = np.random.default_rng(0)
    ball, line = random.standard_normal((300, 40)), np.zeros((300, 40))
    line[:, 1] = random.choice([-3, 3], 300)
    line[:, 0] = 100
    points = torch.tensor(np.concatenate([ball, line, np.full((2, 40), 0.01)]).astype(np.float32))
    codebook = torch.zeros(3, 40)
    codebook[1, 0], codebook[2] = 100, 300
    before, after, changed = relocated(points, codebook)
    assert distances(ball, before[:1]).sum() > 4 * distances(line, before[1:2]).sum()
    assert changed == [2, 1] and torch.equal(after[0], before[0])


def test_plus_plus_leaves_no_codes_to_outliers():
    """Points without clusters: of a smaller sample, or with more candidates, half of the codes of later layers held nothing."""
    points = torch.randn(8000, 64, generator=torch.Generator().manual_seed(0))
    config = ResidualQuantizerConfig(codebook_sizes=[64, 64, 64], init="k-means++", relocation_threshold=0.0)
    codes = ResidualQuantizer(config).fit(points).encode(points)
    counts = torch.bincount(codes[:, 2], minlength=64)
    assert (counts < 20).sum() <= 2 and counts.max() < 250
