"""Splitting codes: by hand, against what the encoder makes of it, and from whatever holds embeddings."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from rqsid import RQVAE, ResidualQuantizer, ResidualQuantizerConfig
from rqsid.sid_tokenizer import splitting
from rqsid.sid_tokenizer.splitting import split_codes

SIZES = [8, 6, 5]
VARIANTS = {
    "plain": {},
    "cosine": {"metric": "cosine"},
    "normalized": {"normalize_residuals": True},
    "normalized cosine": {"metric": "cosine", "normalize_residuals": True},
    "capacity": {"capacity": 1.3},
    "capacity cosine": {"metric": "cosine", "capacity": 1.3},
}


def clusters(num_points=3000, dim=8, seed=0):
    random = np.random.default_rng(seed)
    centres = 2 * random.standard_normal((40, dim))
    points = centres[random.integers(0, 40, num_points)] + 0.5 * random.standard_normal((num_points, dim))
    return points.astype(np.float32)


def fitted(points, sizes=SIZES, **config):
    config = {"num_iterations": 6} | config
    return ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=list(sizes), **config)).fit(points)


def from_codebooks(*codebooks):
    """A quantizer of codebooks that are written down."""
    dim = len(codebooks[0][0])
    config = ResidualQuantizerConfig(codebook_sizes=[len(codebook) for codebook in codebooks], embedding_dim=dim)
    quantizer = ResidualQuantizer(config)
    for parameter, codebook in zip(quantizer.codebooks, codebooks, strict=True):
        parameter.data = torch.tensor(codebook, dtype=torch.float32)
    return quantizer


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_by_hand():
    """Code 1 of the second layer holds points around (-3, 0), (3, 0) and (0, 9) of what the first one left over."""
    quantizer = from_codebooks([[0, 0], [100, 0]], [[50, 0], [0, 0], [0, -50]])
    corners = np.array([[-3, 0], [3, 0], [0, 9]])
    noise = np.array([[-0.5, 0], [0.5, 0], [0, -0.5], [0, 0.5]])
    residuals = (corners[:, None] + noise).reshape(-1, 2)
    points = np.concatenate([residuals, residuals + [100, 0], [[50, 0], [100, -50]]]).astype(np.float32)
    split = split_codes(quantizer, points, layer=1, chosen=[1], parts=3)
    assert split.codebook_sizes == [2, 5]
    assert torch.equal(split.codebooks[0], quantizer.codebooks[0])
    assert split.codebooks[1][[0, 2]].tolist() == [[50, 0], [0, -50]]
    # Child 0 is one of the two that are nearest to the parent, the farthest comes last.
    children = split.codebooks[1][[1, 3, 4]].numpy()
    np.testing.assert_allclose(sorted(children[:2].tolist()), [[-3, 0], [3, 0]], atol=1e-5)
    np.testing.assert_allclose(children[2], [0, 9], atol=1e-5)
    codes = split.encode(points)
    names = np.array([1, 3, 4])[[np.abs(children - corner).sum(1).argmin() for corner in corners]]
    assert codes[:24, 1].tolist() == np.tile(np.repeat(names, 4), 2).tolist()
    assert codes[24:].tolist() == [[0, 0], [1, 2]]
    assert quantizer.codebook_sizes == [2, 3] and quantizer.codebooks[1].tolist() == [[50, 0], [0, 0], [0, -50]]


def test_children_of_several_codes_are_appended_in_the_order_of_chosen():
    centres = np.array([[0, 0], [100, 0], [0, 100]])
    halves = np.repeat(np.array([[-2, 0], [3, 0]]), 10, axis=0)
    points = (centres[:, None] + halves).reshape(-1, 2).astype(np.float32)
    split = split_codes(from_codebooks(centres.tolist()), points, 0, chosen=np.array([2, 0]))
    np.testing.assert_allclose(split.codebooks[0], [[-2, 0], [100, 0], [-2, 100], [3, 100], [3, 0]], atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_quantizer(name, layer):
    points = clusters()
    quantizer = fitted(points, **VARIANTS[name])
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    codes = quantizer.encode(points)
    counts = np.bincount(codes[:, layer], minlength=SIZES[layer])
    chosen = np.argsort(-counts)[:2]
    split = split_codes(quantizer, points, layer, chosen, parts=3)
    sizes = list(SIZES)
    sizes[layer] += 4
    assert type(split) is ResidualQuantizer and split.codebook_sizes == sizes
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())
    assert quantizer.codebook_sizes == SIZES and not any(p.requires_grad for p in split.parameters())

    kept = np.setdiff1d(np.arange(SIZES[layer]), chosen)
    for index in range(3):
        rows = kept if index == layer else slice(None)
        assert torch.equal(split.codebooks[index][rows], quantizer.codebooks[index][rows])
        if "capacity" in name:
            assert torch.equal(split.prices[index][: SIZES[index]], quantizer.prices[index])
    if "capacity" in name:
        expected = quantizer.prices[layer][torch.tensor(np.repeat(chosen, 2))]
        assert torch.equal(split.prices[layer][SIZES[layer] :], expected)

    after = split.encode(points)
    assert (after >= 0).all() and (after.max(0) < sizes).all()
    assert (after[:, :layer] == codes[:, :layer]).all()
    children = np.concatenate([chosen, np.arange(SIZES[layer], sizes[layer])])
    # What leaves its code goes to a child; only children win from others.
    moved = after[:, layer] != codes[:, layer]
    from_chosen = np.isin(codes[:, layer], chosen)
    assert np.isin(after[moved & ~from_chosen, layer], children).all()
    assert np.bincount(after[:, layer], minlength=sizes[layer]).max() < counts.max()
    assert np.bincount(after[from_chosen, layer], minlength=sizes[layer])[children].min() > 0


def test_lengths_of_cosine_children_leave_the_least_error():
    points = clusters()
    quantizer = fitted(points, [6], metric="cosine")
    codes = quantizer.encode(points)[:, 0]
    split = split_codes(quantizer, points, 0, [2])
    own = points[codes == 2].astype(np.float64)
    children = split.codebooks[0][[2, 6]].double().numpy()
    lengths = np.linalg.norm(children, axis=1)
    nearest = (own @ (children / lengths[:, None]).T).argmax(1)
    for child in range(2):
        best = (own[nearest == child] @ (children[child] / lengths[child])).mean()
        assert lengths[child] == pytest.approx(best, rel=1e-4)


def skewed(kind, num_points=1200, dim=6):
    random = np.random.default_rng(0)
    points = random.standard_normal((num_points, dim))
    if kind == "a far tenth":
        points *= 0.3
        points[: num_points // 10] += 10 / np.sqrt(dim)
    else:
        points *= random.lognormal(sigma=1, size=(num_points, 1))
    return points.astype(np.float32)


@pytest.mark.parametrize(
    "kind, parts", [("a far tenth", 3), ("a far tenth", 4), ("heavy tails", 2), ("heavy tails", 3)]
)
def test_children_of_skewed_points_are_even(kind, parts):
    points = skewed(kind)
    quantizer = from_codebooks([[0] * 6])

    def largest(capacity):
        counts = np.bincount(split_codes(quantizer, points, 0, [0], parts, capacity=capacity).encode(points)[:, 0])
        return counts.max() * parts / len(points)

    assert largest(1.25) <= 1.4
    if kind == "heavy tails":
        assert largest(parts) > 1.6  # plain k-means gives the tails codes of their own


@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(1, 6), st.booleans())
@settings(max_examples=30, deadline=None)
def test_children_tell_distinct_points_apart(seed, parts, dim, cosine):
    random = np.random.default_rng(seed)
    points = random.standard_normal((random.integers(parts, 60), dim)).astype(np.float32)
    if cosine:
        points = np.concatenate(
            [points, 1 + np.abs(points[:, :1])], axis=1
        )  # no two directions alike, all in one half
    points = points[random.integers(0, len(points), 2 * len(points))]
    quantizer = from_codebooks([[0.1] * points.shape[1]])
    quantizer.config.metric = "cosine" if cosine else "euclidean"
    shape = points / np.linalg.norm(points, axis=1, keepdims=True) if cosine else points
    if len(np.unique(shape.round(3), axis=0)) < 2 * parts:
        return
    split = split_codes(quantizer, points, 0, [0], parts)
    assert len(np.unique(split.codebooks[0], axis=0)) == parts
    assert np.bincount(split.encode(points)[:, 0], minlength=parts).min() > 0
    if not cosine:
        alone = np.square(points - points.mean(0)).sum()
        assert np.square(points - split.decode(split.encode(points))).sum() < alone


def test_mostly_equal_points_are_split_from_the_others():
    """A start drawn from all points would see equal ones only."""
    points = np.zeros((4000, 3), dtype=np.float32)
    points[-2:] = [[1, 0, 0], [0, 1, 0]]
    split = split_codes(from_codebooks([[0, 0, 0], [9, 9, 9]]), points, 0, [0], parts=3)
    assert np.bincount(split.encode(points)[:, 0]).tolist() == [3998, 0, 1, 1]


def test_sources_and_chunks_agree(tmp_path, monkeypatch):
    points = clusters(2500)
    quantizer = fitted(points)
    reference = split_codes(quantizer, points, 1, [0, 3], seed=5)
    assert same(split_codes(quantizer, points.copy(), 1, [0, 3], seed=5), reference)
    assert not same(split_codes(quantizer, points, 1, [3, 0], seed=5), reference)
    np.save(tmp_path / "points.npy", points)
    dataset = Dataset.from_dict({"vector": points.tolist()})
    assert same(split_codes(quantizer, tmp_path / "points.npy", 1, [0, 3], seed=5), reference)
    assert same(split_codes(quantizer, torch.tensor(points), 1, [0, 3], seed=5), reference)
    stream = dataset.to_iterable_dataset()
    assert same(split_codes(quantizer, stream, 1, [0, 3], seed=5, column="vector"), reference)
    monkeypatch.setattr(splitting, "chunk_rows", lambda *_: 333)
    assert same(split_codes(quantizer, points, 1, [0, 3], seed=5), reference)


def test_a_sample_is_drawn_by_the_seed_and_is_as_good(monkeypatch):
    points = skewed("heavy tails", 6000)
    quantizer = from_codebooks([[0] * 6])
    monkeypatch.setattr(splitting, "ROWS_PER_CHILD", 300)
    first, again, other = (split_codes(quantizer, points, 0, [0], seed=seed) for seed in (1, 1, 2))
    assert same(first, again) and not same(first, other)
    counts = np.bincount(first.encode(points)[:, 0])
    assert counts.max() < 0.72 * 6000
    held = []
    kmeans = splitting._even_kmeans
    monkeypatch.setattr(
        splitting, "_even_kmeans", lambda seen, *rest: (held.append(len(seen)), kmeans(seen, *rest))[1]
    )
    split_codes(quantizer, points, 0, [0])
    monkeypatch.setattr(splitting, "MAX_FLOATS_IN_MEMORY", 6 * 100)
    split_codes(quantizer, points, 0, [0])
    assert held == [600, 100]


def test_a_split_quantizer_can_be_split_again_and_keeps_its_type():
    points = clusters()
    quantizer = fitted(points).half()
    split = split_codes(split_codes(quantizer, points, 1, [0]), points, 0, [1, 2])
    assert split.codebook_sizes == [10, 7, 5] and split.dtype == torch.float16
    assert torch.equal(split.codebooks[2], quantizer.codebooks[2])


@pytest.mark.slow
def test_saved_and_loaded_in_a_fresh_process(tmp_path, run_fresh):
    points = clusters()
    split = split_codes(fitted(points, capacity=1.5), points, 1, [0, 2], parts=3)
    split.save_pretrained(tmp_path / "split")
    np.save(tmp_path / "points.npy", points)
    found = run_fresh(
        """
        import json, sys
        from rqsid import ResidualQuantizer
        quantizer = ResidualQuantizer.from_pretrained(sys.argv[1] + "/split")
        print(json.dumps([quantizer.codebook_sizes, quantizer.encode(sys.argv[1] + "/points.npy").tolist()]))
        """,
        tmp_path,
    )
    assert found == [[8, 10, 5], split.encode(points).tolist()]


def test_codes_that_cannot_be_split():
    points = np.repeat(np.array([[0.0, 1], [0, 0], [5, 5]], dtype=np.float32), 20, axis=0)
    quantizer = from_codebooks([[0, 0], [5, 5], [80, 80]])
    assert split_codes(quantizer, points, 0, [0]).codebook_sizes == [4]
    with pytest.raises(ValueError, match=r"Code 1 of layer 0.*into 2: its 20 embeddings leave 1 distinct residuals"):
        split_codes(quantizer, points, 0, [0, 1])
    with pytest.raises(ValueError, match=r"Code 0 of layer 0.*into 3: its 40 embeddings leave 2 distinct"):
        split_codes(quantizer, points, 0, [0], parts=3)
    with pytest.raises(ValueError, match=r"Code 2 of layer 0.*its 0 embeddings leave 0 distinct"):
        split_codes(quantizer, points, 0, [2])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"layer": 3}, ValueError, r"layer=3 does not exist: there are 3"),
        ({"layer": -1}, ValueError, r"layer=-1 does not exist"),
        ({"layer": True}, TypeError, r"layer=True must be a whole number"),
        ({"layer": "auto"}, TypeError, r"layer='auto' must be a whole number"),
        ({"parts": 1}, ValueError, r"parts=1 would split nothing"),
        ({"parts": 2.0}, TypeError, r"parts=2.0 must be a whole number"),
        ({"seed": -1}, ValueError, r"seed=-1 must be 0 or more"),
        ({"num_iterations": 0}, ValueError, r"num_iterations=0 1 or more"),
        ({"capacity": 0.9}, ValueError, r"capacity=0.9 must be a number from 1"),
        ({"capacity": True}, ValueError, r"capacity=True must be a number from 1"),
        ({"chosen": []}, ValueError, r"shape \(0,\).*at least one code"),
        ({"chosen": 4}, ValueError, r"shape \(\).*list of at least one"),
        ({"chosen": [[1]]}, ValueError, r"shape \(1, 1\)"),
        ({"chosen": [1, 6]}, ValueError, r"the code 6, but layer 1 has 6 codes, 0 to 5"),
        ({"chosen": [-1, 2]}, ValueError, r"the code -1"),
        ({"chosen": [2, 2]}, ValueError, r"names a code twice.*raise parts"),
        ({"chosen": [True, False]}, TypeError, r"integers, got bool.*flatnonzero"),
        ({"chosen": [1.0]}, TypeError, r"integers, got float64"),
        ({"embeddings": clusters(50, 5)}, ValueError, r"5 dimensions, the codebooks 8"),
        ({"embeddings": clusters().tolist()}, TypeError, r"got list"),
        ({"quantizer": ResidualQuantizer()}, ValueError, r"no codebooks yet"),
        ({"quantizer": RQVAE()}, TypeError, r"must be a ResidualQuantizer, got RQVAE"),
    ],
)
def test_bad_input_is_refused(arguments, error, message):
    arguments = {"embeddings": clusters(), "layer": 1, "chosen": [1]} | arguments
    if "quantizer" not in arguments:
        arguments["quantizer"] = fitted(clusters())
    with pytest.raises(error, match=message):
        split_codes(**arguments)


def test_beams_and_skipped_codes():
    points = clusters()
    with pytest.raises(ValueError, match=r"num_beams=3: beams do not give"):
        split_codes(fitted(points, num_beams=3), points, 1, [1])
    quantizer = fitted(points)
    quantizer.config.skipped_codes = {1: [2, 4]}
    with pytest.raises(ValueError, match=r"names the codes \[4\], which skipped_codes"):
        split_codes(quantizer, points, 1, [1, 4])
    assert split_codes(quantizer, points, 1, [1]).config.skipped_codes == {1: [2, 4]}
    # Skipped codes subtract nothing from what the last layer is given to split.
    split = split_codes(quantizer, points, 2, [0], capacity=2)
    codes = quantizer.encode(points)
    own = codes[:, 2] == 0
    left = points[own] - quantizer.decode(np.where(np.arange(3) == 2, -1, codes[own]))
    centre = split.codebooks[2][[0, 5]].numpy()
    nearest = np.square(left[:, None] - centre).sum(2).argmin(1)
    means = np.stack([left[nearest == child].mean(0) for child in range(2)])
    assert np.abs(means - centre).max() < 0.1 * np.abs(centre).max()
