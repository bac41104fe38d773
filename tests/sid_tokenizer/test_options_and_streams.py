"""Each option of the quantizer, and every way in which embeddings can come."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.numpy import save_file

from rqsid import ResidualQuantizer, ResidualQuantizerConfig
from rqsid.sid_tokenizer import residual_kmeans

SIZES = [16, 12, 8]


def clusters(num_points=3000, dim=12, seed=0):
    random = np.random.default_rng(seed)
    centres = 2 * random.standard_normal((60, dim))
    points = centres[random.integers(0, 60, num_points)] + random.standard_normal((num_points, dim)) * 0.4
    return points.astype(np.float32)


def fitted(points, fit=None, **config):
    config = {"codebook_sizes": SIZES, "num_iterations": 8} | config
    return ResidualQuantizer(ResidualQuantizerConfig(**config)).fit(points, **(fit or {}))


def same(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def largest_share(quantizer, points, layer):
    counts = np.bincount(quantizer.encode(points)[:, layer], minlength=SIZES[layer])
    return counts.max() / counts.mean()


VARIANTS = {
    "k-means++": {"init": "k-means++"},
    "staged": {"init": "staged"},
    "fast": {"preset": "fast", "num_iterations": 3},
    "cosine": {"metric": "cosine"},
    "normalized": {"normalize_residuals": True},
    "normalized cosine": {"metric": "cosine", "normalize_residuals": True},
    "capacity": {"capacity": 1.3},
    "capacity cosine": {"metric": "cosine", "capacity": 1.3},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_encode_row_by_row_and_survive_saving(name, tmp_path):
    points = clusters()
    quantizer = fitted(points, **VARIANTS[name])
    codes = quantizer.encode(points)
    assert (codes.max(0) < SIZES).all() and len(np.unique(codes, axis=0)) > 100
    # A code depends on nothing but the embedding.
    alone = np.concatenate([quantizer.encode(points[row : row + 1]) for row in range(0, 60)])
    np.testing.assert_array_equal(alone, codes[:60])
    assert quantizer.relative_error(points) < 0.25
    quantizer.save_pretrained(tmp_path)
    loaded = ResidualQuantizer.from_pretrained(tmp_path)
    assert same(quantizer, loaded) and not any(parameter.requires_grad for parameter in loaded.parameters())
    np.testing.assert_array_equal(loaded.encode(points), codes)
    np.testing.assert_array_equal(loaded.decode(codes), quantizer.decode(codes))


def test_cosine_goes_by_direction_and_has_the_best_lengths():
    points = clusters()
    quantizer = fitted(points, metric="cosine", codebook_sizes=[16])
    codes = quantizer.encode(points)[:, 0]
    scaled = points * np.random.default_rng(1).uniform(0.1, 10, (len(points), 1)).astype(np.float32)
    np.testing.assert_array_equal(quantizer.encode(scaled)[:, 0], codes)
    codebook = quantizer.codebooks[0].double().numpy()
    directions = codebook / np.linalg.norm(codebook, axis=1, keepdims=True)
    np.testing.assert_array_equal((points @ directions.T).argmax(1), codes)
    for code in range(16):
        members = points[codes == code].astype(np.float64)
        best = (members @ directions[code]).mean()  # least squares along the direction
        assert np.linalg.norm(codebook[code]) == pytest.approx(best, rel=1e-4)


def test_normalized_residuals_by_hand():
    points = clusters()
    quantizer = fitted(points, normalize_residuals=True)
    codes, residual, lengths = quantizer.encode(points), points.astype(np.float64), []
    for layer, codebook in enumerate(quantizer.codebooks):
        norms = np.linalg.norm(residual, axis=1, keepdims=True)
        lengths.append(norms.mean())
        residual = residual / norms - codebook.double().numpy()[codes[:, layer]]
    np.testing.assert_allclose([float(scale) for scale in quantizer.scales], lengths, rtol=1e-4)
    parts = [codebook.numpy()[codes[:, layer]] for layer, codebook in enumerate(quantizer.codebooks)]
    expected = sum(np.prod(lengths[: layer + 1]) * part for layer, part in enumerate(parts))
    np.testing.assert_allclose(quantizer.decode(codes), expected, atol=1e-3)


@pytest.mark.parametrize("capacity", [1.1, 1.5])
def test_capacity_bounds_the_counts(capacity):
    random = np.random.default_rng(0)
    points = np.concatenate([clusters(1500), 0.3 * random.standard_normal((1500, 12), dtype=np.float32)])
    free, held = fitted(points, codebook_sizes=SIZES), fitted(points, codebook_sizes=SIZES, capacity=capacity)
    assert max(largest_share(free, points, layer) for layer in range(3)) > 1.2 * capacity
    assert all(largest_share(held, points, layer) < 1.06 * capacity for layer in range(3))
    assert held.relative_error(points) < 1.8 * free.relative_error(points)


def test_beams_find_the_best_path():
    points = clusters(400)
    quantizer = fitted(points)
    paths = torch.cartesian_prod(*(torch.arange(size) for size in SIZES))
    best = torch.cdist(torch.tensor(points).double(), quantizer.decode(paths).double()).square().amin(1)

    def errors(num_beams):
        codes = quantizer.encode(points, num_beams=num_beams)
        return np.square(points - quantizer.decode(codes)).sum(1)

    np.testing.assert_allclose(errors(16 * 12), best, rtol=1e-3, atol=1e-4)
    assert errors(8).sum() < errors(1).sum()
    with pytest.raises(ValueError, match="num_beams=2.*squared errors"):
        fitted(points, metric="cosine").encode(points, num_beams=2)


def sources(points, folder):
    np.save(folder / "points.npy", points)
    shards = folder / "shards"
    shards.mkdir()
    for number, rows in enumerate((slice(0, 700), slice(700, 1900), slice(1900, None))):
        save_file({"embeddings": points[rows]}, shards / f"embeddings-{number:05d}.safetensors")
    dataset = Dataset.from_dict({"id": range(len(points)), "embedding": points.tolist()})
    dataset.to_parquet(folder / "points.parquet")
    return {
        "file": folder / "points.npy",
        "map": np.load(folder / "points.npy", mmap_mode="r"),
        "shards": str(shards),
        "dataset": dataset,
        "stream": dataset.to_iterable_dataset(),
        "parquet": Dataset.from_parquet(str(folder / "points.parquet"), cache_dir=str(folder / "cache")),
        "tensor": torch.tensor(points),
        "half": points.astype(np.float16).astype(np.float32).astype(np.float16),
        "fortran": np.asfortranarray(points),
    }


def test_all_sources_give_the_same(tmp_path):
    points = clusters(2500).astype(np.float16).astype(np.float32)
    reference = fitted(points)
    codes = reference.encode(points)
    for name, source in sources(points, tmp_path).items():
        assert same(fitted(source), reference), name
        np.testing.assert_array_equal(np.asarray(reference.encode(source)), codes, name)
        assert reference.relative_error(source) == pytest.approx(reference.relative_error(points), rel=1e-5), name
    out = np.zeros((2500, 3), dtype=np.int8)
    assert reference.encode(points, out=out) is out
    np.testing.assert_array_equal(out, codes)
    with pytest.raises(ValueError, match="cannot hold codes up to 299"):
        fitted(points, codebook_sizes=[300, 8]).encode(points, out=np.zeros((2500, 2), dtype=np.int8))


@pytest.mark.parametrize("config", [{}, {"preset": "fast"}, {"normalize_residuals": True, "metric": "cosine"}])
def test_what_does_not_fit_into_memory_is_read_again(tmp_path, config):
    points = clusters(6000)
    # The last rows are a place of their own, far from everything that a sample of 500 rows would hold in number.
    points[-40:] = 30 + points[-40:]
    whole = fitted(points, **config)
    np.save(tmp_path / "points.npy", points)
    few = fitted(str(tmp_path / "points.npy"), {"max_rows_in_memory": 500}, **config)
    assert few.relative_error(points) < 1.15 * whole.relative_error(points)
    if not config:
        assert np.abs(few.decode(few.encode(points[-40:])) - points[-40:]).max() < 10


def test_a_stream_that_ends_early_is_refused():
    points = clusters(1000)
    passes = []

    def rows():
        passes.append(1)
        yield from ({"embedding": row} for row in points[: 1000 if len(passes) < 4 else 900])

    from datasets import IterableDataset

    with pytest.raises(ValueError, match="ended after 900 rows in this pass, but had 1000"):
        fitted(IterableDataset.from_generator(rows), {"max_rows_in_memory": 400})


class Stop(Exception):
    pass


@pytest.mark.parametrize("max_rows", [None, 400])
@pytest.mark.parametrize("config", [{}, {"capacity": 1.3}, {"normalize_residuals": True, "preset": "fast"}])
def test_an_interrupted_fit_goes_on_to_the_same_bits(tmp_path, monkeypatch, max_rows, config):
    points = clusters(1500)
    config = {"num_iterations": 3, "num_sample_iterations": 2} | config
    fit = {"max_rows_in_memory": max_rows}
    expected = fitted(points, fit, **config)
    save = residual_kmeans.FitCheckpoint.save_unfinished

    def stop_after(checkpoint, *state):
        save(checkpoint, *state)
        raise Stop

    monkeypatch.setattr(residual_kmeans.FitCheckpoint, "save_unfinished", stop_after)
    interruptions = 0
    while True:
        quantizer = ResidualQuantizer(ResidualQuantizerConfig(**{"codebook_sizes": SIZES} | config))
        try:
            quantizer.fit(points, checkpoint_dir=tmp_path, **fit)
            break
        except Stop:
            interruptions += 1
            assert len(quantizer.codebooks) == 0
    assert interruptions == 3 * 3
    assert same(quantizer, expected)
    with pytest.raises(ValueError, match="other embeddings or with another configuration"):
        fitted(points + 1, fit | {"checkpoint_dir": tmp_path}, **config)
    with pytest.raises(ValueError, match="other embeddings or with another configuration"):
        fitted(points, fit | {"checkpoint_dir": tmp_path}, **config | {"seed": 1})
    (tmp_path / "fit.safetensors").write_bytes((tmp_path / "fit.safetensors").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cannot be read.*Delete it"):
        fitted(points, fit | {"checkpoint_dir": tmp_path}, **config)


def test_embeddings_that_are_all_equal_or_mostly_so(monkeypatch):
    with pytest.raises(ValueError, match="All 300 embeddings are equal"):
        fitted(np.ones((300, 4), dtype=np.float32))
    warnings = []
    monkeypatch.setattr(residual_kmeans.logger, "warning", warnings.append)
    points = clusters(5)[np.arange(300) % 5]
    quantizer = fitted(points)
    assert quantizer.relative_error(points) < 1e-9 and "distinct codes instead of 16" in warnings[0]


def test_codebooks_in_half_precision(tmp_path):
    points = clusters()
    quantizer = fitted(points)
    quantizer.half().save_pretrained(tmp_path)
    half = ResidualQuantizer.from_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < sum(SIZES) * 12 * 2 + 2000
    assert (half.encode(points) == fitted(points).encode(points)).all(1).mean() > 0.99


@pytest.mark.parametrize(
    "config, message",
    [
        ({"preset": "best"}, "preset='best' is not known.*'quality', 'fast'"),
        ({"init": "pca"}, "init='pca'"),
        ({"metric": "dot"}, "metric='dot'"),
        ({"capacity": 0.9}, "capacity=0.9 leaves no room"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"num_beams": 4, "capacity": 1.5}, "num_beams=4 compares squared errors"),
        ({"sample_per_code": -1}, "sample_per_code=-1"),
    ],
)
def test_bad_options_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ResidualQuantizerConfig(**config)


def test_presets_leave_what_is_given_and_survive_json(tmp_path):
    config = ResidualQuantizerConfig(preset="fast", num_iterations=2)
    assert (config.num_iterations, config.sample_per_code, config.num_sample_iterations) == (2, 64, 15)
    config.save_pretrained(tmp_path)
    loaded = ResidualQuantizerConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
