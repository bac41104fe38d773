import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel

from rqsid import ResidualQuantizer, ResidualQuantizerConfig
from rqsid.sid_tokenizer import residual_kmeans
from rqsid.sid_tokenizer.assignment import nearest_codes
from rqsid.sid_tokenizer.checks import check_codes
from rqsid.sid_tokenizer.embeddings import CHUNK_ROWS
from rqsid.sid_tokenizer.kmeans import kmeans, lloyd
from rqsid.sid_tokenizer.relocation import relocate


def gaussian(num_points=200, dim=8, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((num_points, dim)).astype(dtype)


def heavy_tailed(seed, num_points=4000, dim=32):
    """Clusters with log-normal radii: a few far points that plain k-means gives codes of their own."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((100, dim))
    radii = 0.3 * random.lognormal(sigma=0.5, size=(num_points, 1))
    points = centres[random.integers(0, 100, num_points)] + radii * random.standard_normal((num_points, dim))
    return points.astype(np.float32)


def fitted(points, sizes=(8, 8, 8), **config):
    config = {"num_iterations": 8} | config
    return ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=list(sizes), **config)).fit(points)


def squared_distances(points, codebook):
    points, codebook = np.asarray(points, dtype=np.float64), np.asarray(codebook, dtype=np.float64)
    return ((points[:, None] - codebook[None]) ** 2).sum(-1)


@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 20), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_nearest_codes_equals_brute_force(seed, num_points, num_codes, dim):
    random = np.random.default_rng(seed)
    points, codebook = random.standard_normal((num_points, dim)), random.standard_normal((num_codes, dim))
    codes, distances = nearest_codes(torch.tensor(points), torch.tensor(codebook))
    expected = squared_distances(points, codebook)
    assert codes.tolist() == expected.argmin(1).tolist()
    np.testing.assert_allclose(distances.numpy(), expected.min(1), atol=1e-9)


def test_kmeans_finds_separated_clusters():
    centres = np.array([[0, 0], [10, 0], [0, 10], [10, 10]])
    points = np.repeat(centres, 25, axis=0) + np.random.default_rng(0).uniform(-1, 1, (100, 2))
    start = torch.tensor([[3.0, 3], [8, 4], [4, 7], [7, 7]])
    codebook = kmeans(torch.tensor(points).float(), 4, num_iterations=5, seed_points=start)
    expected = [points[25 * cluster : 25 * cluster + 25].mean(0) for cluster in range(4)]
    np.testing.assert_allclose(codebook, expected, atol=1e-5)


def test_kmeans_step_is_lloyd_by_hand():
    points = torch.tensor([[0.0], [1.0], [10.0], [14.0]])
    codebook = kmeans(points, 2, num_iterations=1, relocation_threshold=0, seed_points=torch.tensor([[0.0], [9.0]]))
    assert codebook.tolist() == [[0.5], [12.0]]
    codebook = kmeans(points, 2, num_iterations=1, relocation_threshold=0, seed_points=torch.tensor([[5.0], [99.0]]))
    assert codebook.tolist() == [[6.25], [99.0]]  # a code without points stays where it is


def test_relocate_splits_the_cluster_with_the_largest_error():
    points = torch.cat([torch.randn(50, 3), torch.tensor([20.0, 0, 0]) + 5 * torch.randn(50, 3)])
    codebook = torch.tensor([[0.0, 0, 0], [20.0, 0, 0], [500.0, 0, 0]])
    codes, distances = nearest_codes(points, codebook)
    counts = torch.bincount(codes, minlength=3).double()
    errors = torch.zeros(3, dtype=torch.float64).index_add_(0, codes, distances.double())
    before = codebook.clone()
    relocate(codebook, points, counts, errors, 0.1, torch.Generator().manual_seed(0))
    assert torch.equal(codebook[0], before[0])
    torch.testing.assert_close((codebook[1] + codebook[2]) / 2, before[1])
    assert squared_distances(points, codebook).min(1).sum() < squared_distances(points, before).min(1).sum()


@pytest.mark.parametrize("seed", range(4))
def test_relocation_leaves_no_under_used_code_and_less_error(seed):
    points = heavy_tailed(seed)
    sizes = [64, 64]
    plain = fitted(points, sizes, relocation_threshold=0, num_iterations=15, seed=seed)
    relocated = fitted(points, sizes, num_iterations=15, seed=seed)

    def under_used(quantizer):
        codes = quantizer.encode(points)
        counts = [np.bincount(codes[:, layer], minlength=64) for layer in range(2)]
        return [int((count < 0.1 * count.mean()).sum()) for count in counts]

    assert sum(under_used(plain)) >= 5  # else the data would not tell the two apart
    assert under_used(relocated) == [0, 0]
    assert relocated.relative_error(points) < plain.relative_error(points)


def test_encode_is_greedy_and_decode_sums():
    points = gaussian(300)
    quantizer = fitted(points)
    codes = quantizer.encode(points)
    assert codes.dtype == np.int32 and codes.shape == (300, 3)

    residual, total = points.astype(np.float64), np.zeros_like(points, dtype=np.float64)
    for layer, codebook in enumerate(quantizer.codebooks):
        codebook = codebook.numpy().astype(np.float64)
        nearest = squared_distances(residual, codebook).argmin(1)
        assert (codes[:, layer] == nearest).all()
        residual, total = residual - codebook[nearest], total + codebook[nearest]
    np.testing.assert_allclose(quantizer.decode(codes), total, atol=1e-5)
    spread = ((points - points.mean(0)) ** 2).sum()
    assert quantizer.relative_error(points) == pytest.approx(((points - total) ** 2).sum() / spread, rel=1e-4)
    assert (quantizer(points) == codes).all()

    pruned = codes.copy()
    pruned[::2, 1] = -1
    total[::2] -= quantizer.codebooks[1].numpy()[codes[::2, 1]]
    np.testing.assert_allclose(quantizer.decode(pruned), total, atol=1e-5)


def test_each_layer_lowers_the_error():
    points = gaussian(500)
    errors = [fitted(points, [16] * layers).relative_error(points) for layers in (1, 2, 3)]
    assert 1 > errors[0] > errors[1] > errors[2] > 0


def test_encode_beyond_one_chunk_equals_row_by_row():
    points = gaussian(CHUNK_ROWS + 7, dim=2)
    quantizer = fitted(points[:500])
    codes = quantizer.encode(points)
    some = np.r_[0:3, CHUNK_ROWS - 3 : CHUNK_ROWS + 7]
    assert (codes[some] == np.concatenate([quantizer.encode(points[row][None]) for row in some])).all()
    assert quantizer.encode(points[:0]).shape == (0, 3)
    assert quantizer.decode(codes[:0]).shape == (0, 2)


def test_one_code_layers_and_as_many_codes_as_points():
    points = gaussian(10)
    quantizer = fitted(points, [1, 10])
    np.testing.assert_allclose(quantizer.codebooks[0][0], points.mean(0), atol=1e-6)
    assert np.isfinite(quantizer.decode(quantizer.encode(points))).all()


def test_fit_is_decided_by_the_seed_and_leaves_its_input_alone():
    points = gaussian()
    before = points.copy()
    torch.manual_seed(1)
    first = fitted(points, seed=3)
    torch.manual_seed(2)
    second, other = fitted(points, seed=3), fitted(points, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.codebooks, second.codebooks, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.codebooks, other.codebooks, strict=True))
    tensor = torch.tensor(points)
    fitted(tensor).encode(tensor)
    first.encode(points)
    assert (points == before).all() and (tensor.numpy() == before).all()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_array_and_tensor_of_any_float_type(dtype):
    points = gaussian(dtype=dtype)
    from_array, tensor = fitted(points), torch.tensor(points)
    from_tensor = fitted(tensor)
    assert all(torch.equal(a, b) for a, b in zip(from_array.codebooks, from_tensor.codebooks, strict=True))
    codes = from_tensor.encode(tensor)
    assert codes.dtype == torch.int64 and (codes.numpy() == from_array.encode(points)).all()
    assert isinstance(from_tensor.decode(codes), torch.Tensor)
    assert (from_array.encode(points.astype(np.float32)) == codes.numpy()).all()


def test_output_of_an_encoder_with_gradients():
    points = torch.tensor(gaussian(), requires_grad=True)
    quantizer = fitted(points)
    assert torch.equal(quantizer.codebooks[0], fitted(points.detach()).codebooks[0])
    assert not any(codebook.requires_grad for codebook in quantizer.codebooks)
    assert torch.equal(quantizer.encode(points), quantizer.encode(points.detach()))
    assert quantizer.relative_error(points) == quantizer.relative_error(points.detach())


def test_bfloat16():
    points = torch.tensor(gaussian()).bfloat16()
    quantizer = fitted(points)
    assert torch.equal(quantizer.encode(points), quantizer.encode(points.float()))


@pytest.mark.parametrize("distinct", [2, 3])
def test_fewer_distinct_points_than_codes(distinct):
    points = gaussian(distinct)[np.arange(50) % distinct]
    quantizer = fitted(points, num_iterations=12)
    codes = quantizer.encode(points)
    decoded = quantizer.decode(codes)
    assert all(torch.isfinite(codebook).all() for codebook in quantizer.codebooks)
    np.testing.assert_allclose(decoded, points, atol=1e-5)
    assert np.isfinite(quantizer.relative_error(points)) and quantizer.relative_error(points) < 1e-6


@pytest.mark.slow
def test_round_trip_in_a_fresh_process(saved, with_package):
    _, embeddings, quantizer, _, _ = saved
    codes = quantizer.encode(embeddings)
    assert with_package["codes"] == codes.tolist()
    assert with_package["auto"] == ["ResidualQuantizer", codes.tolist()]
    assert with_package["codebooks"] == [codebook.numpy().tobytes().hex() for codebook in quantizer.codebooks]
    assert with_package["decoded"] == quantizer.decode(codes).tobytes().hex()
    assert with_package["config"] == [0, 5, [4, 5, 6]]


def test_round_trip_of_other_dimensions_and_fit_after_load(tmp_path):
    fitted(gaussian(dim=3)).save_pretrained(tmp_path)
    quantizer = AutoModel.from_pretrained(tmp_path)
    assert not any(codebook.requires_grad for codebook in quantizer.codebooks)
    assert quantizer.config.embedding_dim == 3
    quantizer.fit(gaussian(dim=5))
    assert quantizer.config.embedding_dim == 5 and quantizer.encode(gaussian(dim=5)).shape == (200, 3)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, MemoryError])
def test_interrupted_fit_leaves_the_quantizer_as_it_was(monkeypatch, interrupt):
    points = gaussian()
    quantizer = fitted(points)
    before, codes = [codebook.clone() for codebook in quantizer.codebooks], quantizer.encode(points)
    calls = []

    def second_layer_fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise interrupt
        return lloyd(*args, **kwargs)

    monkeypatch.setattr(residual_kmeans, "lloyd", second_layer_fails)
    with pytest.raises(interrupt):
        quantizer.fit(gaussian(dim=5, seed=9))
    assert quantizer.config.embedding_dim == 8
    assert all(torch.equal(a, b) for a, b in zip(before, quantizer.codebooks, strict=True))
    assert (quantizer.encode(points) == codes).all()


def with_value(value):
    points = gaussian()
    points[17, 3] = value
    return points


BAD_EMBEDDINGS = {
    "nan": (with_value(np.nan), ValueError, r"NaN, infinite.*row 17.*Remove"),
    "inf": (with_value(np.inf), ValueError, r"NaN, infinite.*row 17.*Remove"),
    "tensor": (torch.tensor(with_value(-np.inf)), ValueError, r"NaN, infinite.*row 17"),
    "late": (np.r_[np.zeros((CHUNK_ROWS, 8)), [[np.nan] * 8]], ValueError, rf"row {CHUNK_ROWS}\b"),
    "1-D": (gaussian()[0], ValueError, r"shape \(8,\).*\(N, D\).*embedding\[None\]"),
    "3-D": (gaussian()[None], ValueError, r"shape \(1, 200, 8\)"),
    "list": (gaussian().tolist(), TypeError, r"got list.*numpy"),
    "integers": (np.zeros((50, 8), dtype=int), TypeError, r"int64.*astype"),
    "complex": (np.zeros((50, 8), dtype=complex), TypeError, r"complex128.*astype"),
    "none": (None, TypeError, r"NoneType"),
}


@pytest.mark.parametrize("name", BAD_EMBEDDINGS)
def test_bad_embeddings_are_refused(name):
    bad, error, message = BAD_EMBEDDINGS[name]
    quantizer = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=[8, 8]))
    with pytest.raises(error, match=message):
        quantizer.fit(bad)
    assert len(quantizer.codebooks) == 0 and quantizer.config.embedding_dim is None
    quantizer = fitted(gaussian())
    with pytest.raises(error, match=message):
        quantizer.encode(bad)
    with pytest.raises(error, match=message):
        quantizer.relative_error(bad)


def test_too_few_points_and_wrong_dimension():
    with pytest.raises(ValueError, match=r"7 embeddings.*8 codes.*smaller codebook_sizes"):
        fitted(gaussian(7), [4, 8])
    with pytest.raises(ValueError, match=r"0 embeddings"):
        fitted(gaussian(0), [4])
    with pytest.raises(ValueError, match=r"5 dimensions, the codebooks 8.*fit again"):
        fitted(gaussian()).encode(gaussian(dim=5))


def test_unfitted_is_refused(tmp_path):
    quantizer = ResidualQuantizer()
    for call in (quantizer.encode, quantizer.relative_error):
        with pytest.raises(ValueError, match=r"no codebooks yet.*fit"):
            call(gaussian())
    with pytest.raises(ValueError, match=r"no codebooks yet.*fit"):
        quantizer.decode(np.zeros((1, 3), dtype=int))
    with pytest.raises(ValueError, match=r"no codebooks yet.*fit"):
        quantizer.save_pretrained(tmp_path / "codebook")
    assert not (tmp_path / "codebook").exists()


@pytest.mark.parametrize(
    "codes, error, message",
    [
        (np.zeros((2, 2), dtype=int), ValueError, r"shape \(2, 2\).*one column per layer"),
        (np.zeros(3, dtype=int), ValueError, r"shape \(3,\)"),
        (np.array([[0, 8, 0]]), ValueError, r"Layer 1 holds the code 8.*8 codes"),
        (np.array([[0, 0, -2]]), ValueError, r"Layer 2 holds the code -2"),
        (np.array([[0.0, 0.7, 0.0]]), TypeError, r"integers.*float64"),
        (torch.tensor([[0.0, 0.7, 0.0]]), TypeError, r"integers.*float32"),
        (np.array([[True, False, True]]), TypeError, r"integers.*bool"),
    ],
)
def test_bad_codes_are_refused(codes, error, message):
    with pytest.raises(error, match=message):
        check_codes(codes, [8, 8, 8])
    with pytest.raises(error, match=message):
        fitted(gaussian()).decode(codes)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"codebook_sizes": []}, "at least one code"),
        ({"codebook_sizes": [8, 0]}, r"\[8, 0\].*at least one code"),
        ({"num_iterations": 0}, "num_iterations=0"),
        ({"relocation_threshold": 1.0}, r"relocation_threshold=1.0 must lie in \[0, 1\)"),
        ({"relocation_threshold": -0.1}, "must lie in"),
    ],
)
def test_bad_configurations_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ResidualQuantizerConfig(**config)


def test_fits_agree_with_several_threads():
    """Relocation writes per code; with threads, which of several writes wins must not be left to chance."""
    random = np.random.default_rng(0)
    shares = 1 / np.arange(1, 301)
    centres = random.standard_normal((300, 32))[random.choice(300, 12000, p=shares / shares.sum())]
    spread = np.exp(0.5 * random.standard_normal((12000, 1)))
    points = (centres + 0.3 * random.standard_normal((12000, 32)) * spread).astype(np.float32)
    config = ResidualQuantizerConfig(codebook_sizes=[256, 256], num_iterations=8)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = (ResidualQuantizer(config).fit(points).encode(points) for _ in range(4))
    finally:
        torch.set_num_threads(num_threads)
    for other in others:
        np.testing.assert_array_equal(other, first)


def test_skipped_codes_survive_json(tmp_path):
    config = ResidualQuantizerConfig(codebook_sizes=[4, 6, 5], skipped_codes={"1": (np.int64(5), 0), 0: np.array([2])})
    assert config.skipped_codes == {0: [2], 1: [0, 5]}
    config.save_pretrained(tmp_path)
    loaded = ResidualQuantizerConfig.from_pretrained(tmp_path)
    assert loaded.skipped_codes == config.skipped_codes and loaded.to_dict() == config.to_dict()
    for nothing in (None, {}, {1: []}):
        assert ResidualQuantizerConfig(skipped_codes=nothing).skipped_codes is None


def test_configurations_from_before_skipped_codes_load(tmp_path):
    points = gaussian()
    quantizer = fitted(points)
    quantizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content.pop("skipped_codes") is None
    (tmp_path / "config.json").write_text(json.dumps(content))
    loaded = ResidualQuantizer.from_pretrained(tmp_path)
    assert loaded.config.skipped_codes is None and (loaded.encode(points) == quantizer.encode(points)).all()


@pytest.mark.parametrize(
    "skipped, error, message",
    [
        ([3], TypeError, r"skipped_codes=\[3\] must map layers to lists"),
        ({1: 3}, TypeError, r"must map layers to lists of codes"),
        ({"b": [3]}, TypeError, r"must map layers to lists of codes"),
        ({True: [3]}, TypeError, r"must map layers to lists of codes"),
        ({1: [True]}, TypeError, r"must map layers to lists of codes"),
        ({1: [0.5]}, TypeError, r"must map layers to lists of codes"),
        ({2: [3]}, ValueError, r"names the layer 2; with 3 layers.*end in a code"),
        ({-1: [3]}, ValueError, r"names the layer -1"),
        ({1: [3, 6]}, ValueError, r"of layer 1 must be distinct codes from 0 to 5, got \[3, 6\]"),
        ({1: [-1]}, ValueError, r"distinct codes from 0 to 5"),
        ({1: [3, 3]}, ValueError, r"distinct codes from 0 to 5"),
        ({1: [3]}, ValueError, r"num_beams=2 would avoid skipped_codes"),
    ],
)
def test_bad_skipped_codes_are_refused(skipped, error, message):
    num_beams = 2 if "num_beams" in message else 1
    with pytest.raises(error, match=message):
        ResidualQuantizerConfig(codebook_sizes=[4, 6, 5], skipped_codes=skipped, num_beams=num_beams)


def test_seeds_whose_multiples_overflow():
    points = gaussian()
    ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=[4, 4], num_iterations=2, seed=2**42 - 1)).fit(points)
    with pytest.raises(ValueError, match="seed=4398046511104 must be below"):
        ResidualQuantizerConfig(seed=2**42)
