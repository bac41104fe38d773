import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn

from rqsid.sid_tokenizer import rqvae_training
from rqsid.sid_tokenizer.rqvae import CHUNK_ROWS, RQVAE, RQVAEConfig


def clusters(num_points=600, dim=12, num_clusters=40, seed=0, noise=0.2):
    random = np.random.default_rng(seed)
    centres = random.standard_normal((num_clusters, dim))
    points = centres[random.integers(0, num_clusters, num_points)] + noise * random.standard_normal((num_points, dim))
    return points.astype(np.float32)


def small_config(**config):
    config = {"hidden_sizes": [24], "latent_dim": 6, "num_epochs": 6, "batch_size": 50, "learning_rate": 0.01} | config
    return RQVAEConfig(**{"codebook_sizes": [8, 6, 8]} | config)


def fitted(points, **config):
    return RQVAE(small_config(**config)).fit(points)


def mlp(network, points):
    """The network in float64 and numpy."""
    for module in network:
        if isinstance(module, nn.Linear):
            points = points @ module.weight.double().numpy().T + module.bias.double().numpy()
        else:
            points = np.maximum(points, 0)
    return points


def under_used(quantizer, points):
    codes = quantizer.encode(points)
    counts = [np.bincount(codes[:, layer], minlength=size) for layer, size in enumerate(quantizer.codebook_sizes)]
    return [int((count < 0.1 * count.mean()).sum()) for count in counts]


@pytest.fixture(scope="module")
def points():
    return clusters()


@pytest.fixture(scope="module")
def model(points):
    return fitted(points, num_epochs=20)


def test_encode_decode_and_error_by_hand(model, points):
    codes = model.encode(points)
    assert codes.dtype == np.int32 and codes.shape == (600, 3)
    mean, scale = points.astype(np.float64).mean(0), points.astype(np.float64).var(0).mean() ** 0.5
    np.testing.assert_allclose(model.input_mean, mean, atol=1e-6)
    assert float(model.input_scale) == pytest.approx(scale, rel=1e-6)

    residual, quantized = mlp(model.encoder, (points - mean) / scale), 0
    for layer, codebook in enumerate(model.codebooks):
        nearest = ((residual[:, None] - codebook.numpy()[None]) ** 2).sum(-1).argmin(1)
        assert (codes[:, layer] == nearest).all()
        residual, quantized = residual - codebook.numpy()[nearest], quantized + codebook.numpy()[nearest]
    decoded = mlp(model.decoder, quantized) * scale + mean
    np.testing.assert_allclose(model.decode(codes), decoded, atol=1e-4)
    error = ((points - decoded) ** 2).sum() / ((points - mean) ** 2).sum()
    assert model.relative_error(points) == pytest.approx(error, rel=1e-4)
    assert error < 0.5  # the mean vector has 1

    pruned = codes.copy()
    pruned[:, 1] = -1
    quantized -= model.codebooks[1].numpy()[codes[:, 1]]
    np.testing.assert_allclose(model.decode(pruned), mlp(model.decoder, quantized) * scale + mean, atol=1e-4)
    assert (model(points) == codes).all()


def test_what_goes_in_decides_what_comes_out(model, points, tmp_path):
    codes = model.encode(points)
    tensor = torch.tensor(points, requires_grad=True)
    from_tensor = model.encode(tensor)
    assert from_tensor.dtype == torch.int64 and (from_tensor.numpy() == codes).all()
    decoded = model.decode(from_tensor)
    assert isinstance(decoded, torch.Tensor) and decoded.dtype == torch.float32 and not decoded.requires_grad
    np.save(tmp_path / "points.npy", points)
    stream = Dataset.from_dict({"embedding": points.tolist()}).to_iterable_dataset()
    for source in (points.astype(np.float64), tmp_path / "points.npy", stream):
        assert (model.encode(source) == codes).all()
        assert model.relative_error(source) == pytest.approx(model.relative_error(points), rel=1e-6)
    assert model.encode(points[:1]).tolist() == codes[:1].tolist()
    assert model.encode(points[:0]).shape == (0, 3) and model.decode(codes[:0]).shape == (0, 12)
    with pytest.raises(ValueError, match="600 dimensions, the codebooks 12"):
        model.encode(points.T)


def test_several_chunks(model, points):
    many = np.tile(points, (CHUNK_ROWS // 600 + 2, 1))
    codes = model.encode(many)
    assert (codes[-600:] == model.encode(points)).all()
    assert model.relative_error(many) == pytest.approx(model.relative_error(points), rel=1e-4)
    np.testing.assert_allclose(model.decode(codes)[-600:], model.decode(codes[-600:]), atol=1e-5)


def test_fit_is_decided_by_the_seed_and_leaves_the_rest_alone(points):
    before = points.copy()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = fitted(points, num_epochs=3, dropout=0.1)
    assert torch.equal(torch.rand(3), expected)
    second = fitted(torch.tensor(points), num_epochs=3, dropout=0.1)
    other = fitted(points, num_epochs=3, dropout=0.1, seed=1)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert not torch.equal(first.codebooks[0], other.codebooks[0])
    assert (points == before).all()
    assert not first.training and not any(parameter.requires_grad for parameter in first.parameters())
    assert (first.train().encode(points) == second.encode(points)).all()  # no dropout outside of training


def test_scale_and_place_of_the_embeddings_do_not_matter(points):
    near = fitted(points)
    far = fitted(100 * points.astype(np.float64) + 30)
    codes = near.encode(points)
    # Rounding differs, and with it a code that lies between two.
    assert (far.encode(100 * points.astype(np.float64) + 30) == codes).mean() > 0.99
    assert far.relative_error(100 * points.astype(np.float64) + 30) == pytest.approx(
        near.relative_error(points), rel=0.02
    )
    unscaled = fitted(points, input_scaling="none")
    assert float(unscaled.input_scale) == 1 and unscaled.input_mean.abs().max() == 0
    unit = points / np.linalg.norm(points, axis=1, keepdims=True) / 10
    assert fitted(unit).relative_error(unit) < fitted(unit, input_scaling="none").relative_error(unit) - 0.1


def test_k_means_and_revival_keep_codes_in_use():
    points = clusters(3000, dim=16, num_clusters=64)
    settings = {"codebook_sizes": [64, 64], "num_epochs": 8, "batch_size": 256}
    bare = fitted(points, init="random", revive_threshold=0.0, **settings)
    seeded = fitted(points, revive_threshold=0.0, **settings)
    revived = fitted(points, init="random", **settings)
    assert sum(under_used(bare, points)) >= 60  # else there would be nothing to cure
    for cured in (seeded, revived):
        assert sum(under_used(cured, points)) < 0.3 * sum(under_used(bare, points))
        assert cured.relative_error(points) < bare.relative_error(points)
    assert sum(sum(entry["revived"]) for entry in revived.training_log_) > 60
    assert [entry["revived"] for entry in revived.training_log_[-2:]] == [[0, 0], [0, 0]]
    assert all(entry["revived"] == [0, 0] for entry in seeded.training_log_)


def test_training_log(model):
    log = model.training_log_
    assert [entry["epoch"] for entry in log] == list(range(20))
    assert log[-1]["reconstruction_loss"] < 0.8 * log[0]["reconstruction_loss"]
    for entry in log:
        expected = entry["reconstruction_loss"] + entry["codebook_loss"] + 0.25 * entry["commitment_loss"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("num_points", [8, 9, 101, 250])
def test_any_number_of_points_and_odd_batches(num_points):
    points = clusters(num_points)
    model = fitted(points, num_epochs=2)
    assert all(math.isfinite(entry["loss"]) for entry in model.training_log_)
    assert model.encode(points).shape == (num_points, 3)


@pytest.mark.parametrize(
    "config", [{"rotation_trick": True}, {"sinkhorn_layers": [2]}, {"lr_scheduler_type": "constant"}]
)
def test_options_train(points, model, config):
    other = fitted(points, num_epochs=20, **config)
    assert other.relative_error(points) < 0.5
    assert not torch.equal(other.codebooks[0], model.codebooks[0])


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("normalize_residuals", [False, True])
def test_metric_and_normalized_residuals_by_hand(points, tmp_path, metric, normalize_residuals):
    model = fitted(points, metric=metric, normalize_residuals=normalize_residuals, num_epochs=10)
    model.save_pretrained(tmp_path)
    model = RQVAE.from_pretrained(tmp_path)
    codes = model.encode(points)
    residual, quantized = mlp(model.encoder, (points - model.input_mean.numpy()) / float(model.input_scale)), 0
    for layer, codebook in enumerate(model.codebooks):
        codebook = codebook.double().numpy()
        if normalize_residuals:
            residual = residual / np.linalg.norm(residual, axis=1, keepdims=True)
        if metric == "cosine":
            nearest = (residual @ (codebook / np.linalg.norm(codebook, axis=1, keepdims=True)).T).argmax(1)
        else:
            nearest = ((residual[:, None] - codebook[None]) ** 2).sum(-1).argmin(1)
        assert (codes[:, layer] == nearest).mean() > 0.99  # float32 against float64
        nearest = codes[:, layer]
        residual, quantized = residual - codebook[nearest], quantized + codebook[nearest]
    decoded = mlp(model.decoder, quantized) * float(model.input_scale) + model.input_mean.numpy()
    np.testing.assert_allclose(model.decode(codes), decoded, atol=1e-4)
    assert model.relative_error(points) < 0.9 and len(np.unique(codes, axis=0)) > 20


def test_beams_find_codes_of_less_error_in_the_latent_space(points, tmp_path):
    greedy = fitted(points, num_epochs=10)
    greedy.save_pretrained(tmp_path)
    beams = RQVAE.from_pretrained(tmp_path, num_beams=400)  # more than the 8 * 6 * 8 paths
    latents = greedy.latents(torch.tensor(points)).double()
    paths = torch.cartesian_prod(*(torch.arange(len(codebook)) for codebook in greedy.codebooks))
    sums = sum(codebook.double()[paths[:, layer]] for layer, codebook in enumerate(greedy.codebooks))
    best = torch.cdist(latents, sums).square().amin(1)

    def errors(codes):
        chosen = sum(codebook.double()[codes[:, layer]] for layer, codebook in enumerate(greedy.codebooks))
        return (latents - chosen).square().sum(1)

    torch.testing.assert_close(errors(beams.encode(points)), best, atol=1e-4, rtol=1e-4)
    assert errors(greedy.encode(points)).sum() > best.sum() * 1.001


def test_fewer_distinct_points_than_codes():
    points = clusters(3)[np.arange(60) % 3]
    model = fitted(points)
    assert np.isfinite(model.decode(model.encode(points))).all()
    assert len(np.unique(model.encode(points), axis=0)) <= 3


def test_an_accelerator_of_another_precision_after_the_fit(points):
    fitted(points, num_epochs=1)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    assert accelerator.mixed_precision == "bf16"
    # ... and a fit within it, whose codes are looked up in full precision all the same
    model = fitted(points, num_epochs=20)
    assert accelerator.mixed_precision == "bf16" and model.dtype == torch.float32
    assert model.relative_error(points) < 0.5
    accelerator.state._reset_state(reset_partial_state=True)


def test_launchers_that_split_models_are_refused(points, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"under FSDP, which splits models.*--multi_gpu"):
        fitted(points, num_epochs=1)


def test_round_trip(model, points, tmp_path):
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = RQVAE.from_pretrained(tmp_path)
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.codebook_sizes == [8, 6, 8] and loaded.num_layers == 3 and loaded.training_log_ == []
    assert loaded.relative_error(points) == model.relative_error(points)
    half = RQVAE.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert (half.encode(points) == model.encode(points)).mean() > 0.8
    assert half.decode(half.encode(points)).dtype == np.float32
    loaded.fit(clusters(dim=5))
    assert loaded.config.embedding_dim == 5 and loaded.encode(clusters(dim=5)).shape == (600, 3)


def test_files_that_lack_weights_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["codebooks.1"], weights["input_mean"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights \['codebooks.1', 'input_mean'\].*Save it again"):
        RQVAE.from_pretrained(tmp_path)


@pytest.mark.slow
def test_round_trip_in_a_fresh_process(model, points, tmp_path, run_fresh):
    model.save_pretrained(tmp_path / "model")
    np.save(tmp_path / "points.npy", points)
    code = """
    import json, sys
    import numpy as np
    from rqsid.sid_tokenizer.rqvae import RQVAE
    model = RQVAE.from_pretrained(sys.argv[1])
    codes = model.encode(np.load(sys.argv[2]))
    print(json.dumps([codes.tolist(), model.decode(codes).tobytes().hex()]))
    """
    codes, decoded = run_fresh(code, tmp_path / "model", tmp_path / "points.npy")
    assert codes == model.encode(points).tolist()
    assert decoded == model.decode(model.encode(points)).tobytes().hex()


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, MemoryError])
def test_interrupted_fit_leaves_the_model_as_it_was(monkeypatch, points, interrupt):
    model = fitted(points)
    before, codes = {name: value.clone() for name, value in model.state_dict().items()}, model.encode(points)

    def interrupted(*args):
        raise interrupt

    monkeypatch.setattr(rqvae_training, "revive", interrupted)
    with pytest.raises(interrupt):
        model.fit(clusters(dim=5))
    assert model.config.embedding_dim == 12
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.encode(points) == codes).all()
    fresh = RQVAE(small_config())
    with pytest.raises(interrupt):
        fresh.fit(points)
    with pytest.raises(ValueError, match="not fitted"):
        fresh.encode(points)


def test_unfitted_is_refused(tmp_path):
    # Also where the dimension is known but nobody trained the weights.
    for model in (RQVAE(), RQVAE(small_config(embedding_dim=12))):
        for call in (model.encode, model.relative_error):
            with pytest.raises(ValueError, match=r"not fitted yet.*fit"):
                call(clusters())
        with pytest.raises(ValueError, match=r"not fitted yet.*fit"):
            model.decode(np.zeros((1, 3), dtype=int))
        with pytest.raises(ValueError, match=r"not fitted yet.*fit"):
            model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def with_value(value):
    points = clusters()
    points[17, 3] = value
    return points


@pytest.mark.parametrize(
    "bad, error, message",
    [
        (with_value(np.nan), ValueError, r"NaN, infinite.*row 17"),
        (torch.tensor(with_value(-np.inf)), ValueError, r"NaN, infinite.*row 17"),
        (clusters()[0], ValueError, r"shape \(12,\).*\(N, D\)"),
        (np.zeros((50, 8), dtype=int), TypeError, r"int64.*astype"),
        (clusters().tolist(), TypeError, r"list"),
    ],
)
def test_bad_embeddings_are_refused(model, bad, error, message):
    for call in (RQVAE(small_config()).fit, model.encode, model.relative_error):
        with pytest.raises(error, match=message):
            call(bad)


def test_embeddings_that_cannot_be_told_apart_or_are_too_few(model):
    for value in (0.0, 0.1, 1e4):
        equal = np.full((100, 12), value, dtype=np.float32)
        for scaling in ("standardize", "none"):
            with pytest.raises(ValueError, match=r"All 100 embeddings are equal"):
                fitted(equal, input_scaling=scaling)
    with pytest.raises(ValueError, match=r"7 embeddings.*8 codes.*smaller codebook_sizes"):
        fitted(clusters(7))
    with pytest.raises(ValueError, match=r"0 embeddings"):
        fitted(clusters()[:0])
    for few in (clusters(1), clusters()[:0]):
        with pytest.raises(ValueError, match=r"no variance"):
            model.relative_error(few)


def test_a_loss_that_is_no_number_is_refused(points):
    model = fitted(points, num_epochs=1)
    codes = model.encode(points)
    model.config.learning_rate = 1e30
    with pytest.raises(ValueError, match=r"loss is (nan|inf).*Lower learning_rate=1e\+30"):
        model.fit(points)
    assert (model.encode(points) == codes).all()


@pytest.mark.parametrize(
    "codes, error, message",
    [
        (np.zeros((2, 2), dtype=int), ValueError, r"shape \(2, 2\).*one column per layer"),
        (np.array([[0, 6, 0]]), ValueError, r"Layer 1 holds the code 6.*6 codes"),
        (np.array([[0, 0, -2]]), ValueError, r"Layer 2 holds the code -2"),
        (np.array([[0.0, 0.7, 0.0]]), TypeError, r"integers.*float64"),
    ],
)
def test_bad_codes_are_refused(model, codes, error, message):
    with pytest.raises(error, match=message):
        model.decode(codes)


@pytest.mark.parametrize(
    "config, error, message",
    [
        ({"codebook_sizes": []}, ValueError, "at least one code"),
        ({"codebook_sizes": [8, 0]}, ValueError, r"\[8, 0\].*at least one code"),
        ({"codebook_sizes": "888"}, TypeError, "list of integers"),
        ({"hidden_sizes": [16, 0]}, ValueError, r"\[16, 0\] must be positive"),
        ({"hidden_sizes": [1.5]}, TypeError, "list of integers"),
        ({"sinkhorn_layers": [3]}, ValueError, r"\[3\].*there are 3, counted from 0"),
        ({"sinkhorn_layers": [-1]}, ValueError, "does not exist"),
        ({"init": "kmeans"}, ValueError, "init='kmeans' is unknown: choose 'k-means' or 'random'"),
        ({"input_scaling": "unit"}, ValueError, "choose 'standardize' or 'none'"),
        ({"lr_scheduler_type": "linear"}, ValueError, "choose 'cosine' or 'constant'"),
        ({"latent_dim": 0}, ValueError, "latent_dim=0 must be an integer"),
        ({"num_epochs": 2.5}, ValueError, "num_epochs=2.5 must be an integer"),
        ({"batch_size": "256"}, ValueError, "batch_size='256' must be an integer"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"learning_rate": 0}, ValueError, "learning_rate=0 must be a finite number, above 0"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate=nan"),
        ({"commitment_weight": -1}, ValueError, "commitment_weight=-1.*0 or more"),
        ({"revive_threshold": 1.0}, ValueError, r"revive_threshold=1.0.*\[0, 1\)"),
        ({"dropout": "0.1"}, ValueError, "dropout='0.1'"),
        ({"rotation_trick": "yes"}, ValueError, "True or False"),
    ],
)
def test_bad_configurations_are_refused(config, error, message):
    with pytest.raises(error, match=message):
        RQVAEConfig(**{"codebook_sizes": [8, 8, 8]} | config)
