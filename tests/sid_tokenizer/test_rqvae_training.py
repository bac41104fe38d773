import json
import types

import numpy as np
import pytest
import torch
from fresh_process import run_ranks
from torch import nn

from rqsid.sid_tokenizer.rqvae import RQVAE, RQVAEConfig
from rqsid.sid_tokenizer.rqvae_training import TrainingObjective, balanced_codes, initialize, revive, rotate

ALONE = types.SimpleNamespace(gather=lambda tensor: tensor, process_index=0)


def clusters(num_points=600, dim=12, num_clusters=40, seed=0, noise=0.2):
    random = np.random.default_rng(seed)
    centres = random.standard_normal((num_clusters, dim))
    points = centres[random.integers(0, num_clusters, num_points)] + noise * random.standard_normal((num_points, dim))
    return points.astype(np.float32)


def untrained(points, **config):
    """A model with initial weights, whose codes have not moved."""
    points = torch.as_tensor(points)
    config = {"codebook_sizes": [8, 6, 8], "hidden_sizes": [24], "latent_dim": 6} | config
    model = RQVAE(RQVAEConfig(embedding_dim=points.shape[1], **config))
    model.input_mean.copy_(points.mean(0))
    model.input_scale.copy_(points.var(0, correction=0).mean().sqrt())
    initialize(model, points)
    return model


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


def rotation_matrix(source, target):
    """The rotation by the angle between two unit vectors in their plane, which leaves what is orthogonal to it alone."""
    cosine = source @ target
    other = target - cosine * source
    sine = np.linalg.norm(other)
    other /= sine
    plane = np.stack([source, other])
    return np.eye(len(source)) + plane.T @ (np.array([[cosine, -sine], [sine, cosine]]) - np.eye(2)) @ plane


def test_rotate_has_the_value_of_the_codes_and_the_gradient_of_the_rotation():
    random = np.random.default_rng(0)
    latent, quantized, gradient = random.standard_normal((3, 50, 7))
    variable = torch.tensor(latent, requires_grad=True)
    constant = torch.tensor(quantized, requires_grad=True)
    output = rotate(variable, constant)
    np.testing.assert_allclose(output.detach(), quantized, atol=1e-12)
    output.backward(torch.tensor(gradient))
    assert constant.grad is None
    for row in range(50):
        e, q = latent[row], quantized[row]
        rotation = rotation_matrix(e / np.linalg.norm(e), q / np.linalg.norm(q))
        np.testing.assert_allclose(rotation @ e / np.linalg.norm(e), q / np.linalg.norm(q), atol=1e-12)
        scale = np.linalg.norm(q) / np.linalg.norm(e)
        np.testing.assert_allclose(variable.grad[row], scale * rotation.T @ gradient[row], atol=1e-10)


def test_rotate_is_finite_where_there_is_no_rotation():
    latent = torch.tensor([[1.0, 0], [0, 0], [1, 2]], requires_grad=True)
    quantized = torch.tensor([[-2.0, 0], [1, 1], [0, 0]])
    output = rotate(latent, quantized)
    assert torch.equal(output.detach(), quantized)
    output.sum().backward()
    assert torch.isfinite(latent.grad).all()


def test_balanced_codes_equal_sinkhorn_by_hand():
    random = np.random.default_rng(1)
    points, codebook = random.standard_normal((30, 4)), random.standard_normal((5, 4))
    codes, log_plan = balanced_codes(torch.tensor(points), torch.tensor(codebook), epsilon=0.1, num_iterations=7)

    costs = ((points[:, None] - codebook[None]) ** 2).sum(-1)
    plan = np.exp(-costs / ((costs.max() - costs.min()) / 2) / 0.1)
    for _ in range(7):
        for code in range(5):
            plan[:, code] *= 30 / 5 / sum(plan[point, code] for point in range(30))
        for point in range(30):
            plan[point] /= sum(plan[point, code] for code in range(5))
    np.testing.assert_allclose(log_plan.exp(), plan, rtol=1e-8)
    assert codes.tolist() == plan.argmax(1).tolist()

    _, log_plan = balanced_codes(torch.tensor(points), torch.tensor(codebook), epsilon=0.1, num_iterations=500)
    np.testing.assert_allclose(log_plan.exp().sum(0), np.full(5, 6.0), atol=1e-6)
    np.testing.assert_allclose(log_plan.exp().sum(1), np.ones(30), atol=1e-12)


def test_balanced_codes_are_balanced_where_nearest_ones_are_not():
    points = torch.tensor(clusters(512, dim=4))
    codebook = torch.cat([points[:4], points[4:8] + 3])
    nearest = torch.bincount(torch.cdist(points, codebook).argmin(1), minlength=8)
    codes, _ = balanced_codes(points, codebook, epsilon=0.003, num_iterations=100)
    counts = torch.bincount(codes, minlength=8)
    assert nearest.min() < 16  # else balance would be no news
    assert counts.min() > 48 and counts.max() < 80
    equal = torch.ones(6, 4)
    assert torch.isfinite(balanced_codes(equal, equal[:2], 0.003, 50)[1]).all()


@pytest.mark.parametrize("rotation_trick", [False, True])
def test_losses_and_the_ways_of_their_gradients(rotation_trick):
    points = clusters(64)
    model = untrained(points, hidden_sizes=[], rotation_trick=rotation_trick, commitment_weight=0.5)
    model.requires_grad_(True)
    losses = TrainingObjective(model, ALONE)(torch.tensor(points))

    scaled = (points.astype(np.float64) - points.mean(0)) / points.var(0).mean() ** 0.5
    with torch.no_grad():
        latent = mlp(model.encoder, scaled)
        residual, residuals, codewords = latent, [], []
        for codebook in model.codebooks:
            codes = ((residual[:, None] - codebook.numpy()[None]) ** 2).sum(-1).argmin(1)
            residuals.append(residual)
            codewords.append(codebook.numpy()[codes])
            residual = residual - codewords[-1]
        decoded = mlp(model.decoder, sum(codewords))
    distance = np.mean([((r - c) ** 2).mean() for r, c in zip(residuals, codewords, strict=True)])
    expected = [((decoded - scaled) ** 2).mean(), distance, distance]
    np.testing.assert_allclose(losses[1:].detach(), expected, rtol=1e-5)
    assert float(losses[0].detach()) == pytest.approx(expected[0] + 1.5 * distance, rel=1e-5)

    # A layer's codes are moved by its own loss only, ...
    size = 64 * 6 * 3
    first, last = torch.autograd.grad(losses[2], [model.codebooks[0], model.codebooks[2]], retain_graph=True)
    for gradient, layer in ((first, 0), (last, 2)):
        pulls = np.zeros(gradient.shape)
        nearest = [
            np.flatnonzero((model.codebooks[layer].detach().numpy() == row).all(1))[0] for row in codewords[layer]
        ]
        np.add.at(pulls, nearest, 2 * (codewords[layer] - residuals[layer]) / size)
        np.testing.assert_allclose(gradient, pulls, atol=1e-7)
    # ... and the encoder by the commitment of every layer.
    bias = model.encoder[-1].bias
    (gradient,) = torch.autograd.grad(losses[3], [bias], retain_graph=True)
    every = sum(2 * (r - c).sum(0) / size for r, c in zip(residuals, codewords, strict=True))
    np.testing.assert_allclose(gradient, every, atol=1e-6)
    # The reconstruction reaches the encoder past the codes, which it does not move.
    weight = model.encoder[-1].weight
    to_encoder, *to_codes = torch.autograd.grad(losses[1], [weight, *model.codebooks])
    assert to_encoder.abs().max() > 1e-3 and all(gradient.abs().max() == 0 for gradient in to_codes)


def test_sinkhorn_layers_assign_evenly_in_those_layers():
    points = torch.tensor(clusters(512))
    model = untrained(points, sinkhorn_layers=[1], sinkhorn_iterations=100)
    model.codebooks[1][3:] += 5  # codes that nobody is near
    objective, residual = TrainingObjective(model, ALONE), model.latents(points)
    assert torch.bincount(objective._assign(residual, model.codebooks[1], 0), minlength=6)[3:].sum() == 0
    assert torch.bincount(objective._assign(residual, model.codebooks[1], 1), minlength=6).min() > 50


def test_initial_codebooks_are_k_means_of_the_encoder_output():
    points = torch.tensor(clusters())
    model = untrained(points)
    residual = model.latents(points)
    for codebook in model.codebooks:
        codes = torch.cdist(residual, codebook).argmin(1)
        means = torch.stack([residual[codes == code].mean(0) for code in range(len(codebook))])
        error = (residual - codebook[codes]).square().sum()
        assert error < 0.8 * (residual - residual.mean(0)).square().sum()
        # nearly converged: moving codes to the means of their points gains next to nothing
        assert (residual - means[codes]).square().sum() > 0.98 * error
        residual = residual - codebook[codes]
    random = untrained(points, init="random")
    for codebook in random.codebooks:
        assert 0.5 / len(codebook) < codebook.abs().max() <= 1 / len(codebook)


def test_revive_moves_unused_codes_into_use_and_lowers_the_error():
    points = torch.tensor(clusters(2000))
    model = untrained(points, codebook_sizes=[16, 16])
    for codebook in model.codebooks:
        codebook[10:] = 100.0  # far from everything
    before = model.codebooks[0].clone()
    states = [[torch.arange(16.0)[:, None].expand(16, 6).clone()] for _ in model.codebooks]
    latent_error = quantization_error(model, points)
    assert under_used(model, points.numpy()) == [6, 6]
    assert revive(model, points, states, torch.Generator().manual_seed(0)) == [6, 6]
    assert max(under_used(model, points.numpy())) <= 1  # the halves of a cluster may differ in size
    assert quantization_error(model, points) < 0.9 * latent_error
    # Each moved code remembers what the code remembers whose cluster it splits: the two lie on both sides of that.
    memory = states[0][0][:, 0].long()
    assert memory[:10].tolist() == list(range(10)) and memory[10:].max() < 10
    middles = (model.codebooks[0][10:] + model.codebooks[0][memory[10:]]) / 2
    torch.testing.assert_close(middles, before[memory[10:]])


def quantization_error(model, points):
    residual = model.latents(points)
    for codebook in model.codebooks:
        residual = residual - codebook[torch.cdist(residual, codebook).argmin(1)]
    return float(residual.square().sum())


FIT = """
import json, os, sys
import numpy as np, torch
torch.set_num_threads(1)
from rqsid.sid_tokenizer.rqvae import RQVAE, RQVAEConfig
points, rank = np.load(sys.argv[1]), int(os.environ["RANK"])
model = RQVAE(RQVAEConfig(**json.loads(sys.argv[3]))).fit(points)
result = {"log": model.training_log_, "error": model.relative_error(points)}
result["weights"] = b"".join(value.numpy().tobytes() for value in model.state_dict().values()).hex()
try:
    model.fit(points[rank:])
except ValueError as error:
    result["refused"] = str(error)
with open(f"{sys.argv[2]}{rank}.json", "w") as file:
    json.dump(result, file)
"""


@pytest.mark.slow
def test_two_processes_train_the_model_of_one(tmp_path):
    config = {"codebook_sizes": [32, 32], "hidden_sizes": [24], "latent_dim": 6, "num_epochs": 6, "batch_size": 128}
    config |= {"sinkhorn_layers": [1], "init": "random", "learning_rate": 1e-3}
    points = clusters(1024)
    np.save(tmp_path / "points.npy", points)
    run_ranks(2, FIT, tmp_path / "points.npy", tmp_path / "rank", json.dumps(config))
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))

    assert first["weights"] == second["weights"] and first["log"] == second["log"]
    assert sum(sum(entry["revived"]) for entry in first["log"]) > 10  # else revival would not have been tried
    alone = RQVAE(RQVAEConfig(**config)).fit(points)
    for one, two in zip(alone.training_log_, first["log"], strict=True):
        # Sums in another order round otherwise; where a code is revived that decides more than the last digit.
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4 if one["epoch"] == 0 else 0.02)
    assert first["error"] == pytest.approx(alone.relative_error(points), rel=0.02)
    for result in (first, second):
        assert "2 processes hold different embeddings" in result["refused"]
