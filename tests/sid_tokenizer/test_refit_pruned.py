"""Layers that are fitted again after pruning: what stays, what they are fitted on, and what that gains."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from rqsid import RQVAE, ResidualQuantizer, ResidualQuantizerConfig, TokenPruning
from rqsid.sid_tokenizer import residual_kmeans
from rqsid.sid_tokenizer.refit_pruned import refit_pruned

SIZES = [8, 6, 10, 7]
VARIANTS = {
    "plain": {},
    "fast": {"preset": "fast", "num_iterations": 3},
    "cosine": {"metric": "cosine"},
    "normalized": {"normalize_residuals": True},
    "capacity": {"capacity": 1.3},
}


def clusters(num_points=2000, dim=8, seed=0):
    random = np.random.default_rng(seed)
    centres = 2 * random.standard_normal((40, dim))
    points = centres[random.integers(0, 40, num_points)] + 0.5 * random.standard_normal((num_points, dim))
    return points.astype(np.float32)


def fitted(points, sizes=SIZES, **config):
    config = {"num_iterations": 6} | config
    return ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=list(sizes), **config)).fit(points)


def pruning_of(quantizer, points, strategy="top_k", layer=1, **arguments):
    arguments = {"top_k": 2} | arguments if strategy == "top_k" else arguments
    return TokenPruning(strategy, layer=layer, **arguments).fit(quantizer.encode(points), quantizer.codebook_sizes)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def visible_error(quantizer, points, pruning):
    """Squared error of what can be told from the SIDs."""
    return float(np.square(points - quantizer.decode(pruning.apply(quantizer.encode(points)))).sum())


def test_nothing_pruned_is_a_copy():
    points = clusters()
    quantizer = fitted(points, num_beams=2)
    copy = refit_pruned(quantizer, points, pruning_of(quantizer, points, "none"))
    assert copy is not quantizer and same(copy, quantizer) and copy.config.to_dict() == quantizer.config.to_dict()
    copy.codebooks[0].data += 1
    assert not torch.equal(copy.codebooks[0], quantizer.codebooks[0])


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_layers_up_to_the_pruned_one_stay(name, layer):
    points = clusters()
    quantizer = fitted(points, **VARIANTS[name])
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    pruning = pruning_of(quantizer, points, layer=layer)
    refitted = refit_pruned(quantizer, points, pruning)
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())
    assert quantizer.config.skipped_codes is None
    assert refitted.config.skipped_codes == {layer: np.flatnonzero(pruning.pruned).tolist()}
    for index in range(4):
        assert torch.equal(refitted.codebooks[index], quantizer.codebooks[index]) == (index <= layer)
    codes, old = refitted.encode(points), quantizer.encode(points)
    assert (codes[:, : layer + 1] == old[:, : layer + 1]).all() and (codes.max(0) < SIZES).all()
    # What is pruned adds nothing, whether the code is there or not.
    assert (refitted.decode(codes) == refitted.decode(pruning.apply(codes))).all()
    error = np.square(points - refitted.decode(codes)).sum() / np.square(points - points.mean(0)).sum()
    assert refitted.relative_error(points) == pytest.approx(float(error), rel=1e-4)


def test_encode_by_hand():
    points = clusters()
    quantizer = fitted(points)
    pruning = pruning_of(quantizer, points, top_k=3)
    refitted = refit_pruned(quantizer, points, pruning)
    codes, residual = refitted.encode(points), points.astype(np.float64)
    for layer, codebook in enumerate(refitted.codebooks):
        codebook = codebook.double().numpy()
        nearest = np.square(residual[:, None] - codebook[None]).sum(2).argmin(1)
        assert (codes[:, layer] == nearest).mean() > 0.999
        left = codebook[codes[:, layer]]
        if layer == 1:
            left[pruning.pruned[codes[:, 1]]] = 0
        residual -= left
    np.testing.assert_allclose(refitted.decode(codes), points - residual, atol=1e-4)


def test_after_a_dropped_layer_the_next_is_fitted_on_what_the_one_before_left_over():
    points = clusters()
    quantizer = fitted(points, [8, 6, 10], relocation_threshold=0)
    refitted = refit_pruned(quantizer, points, pruning_of(quantizer, points, "drop_layer"))
    residual = points - quantizer.codebooks[0].numpy()[quantizer.encode(points)[:, 0]]
    assert torch.equal(refitted.codebooks[2], fitted(residual, [10], relocation_threshold=0).codebooks[0])
    # Of the first layer dropped, nothing is left over but the embeddings themselves.
    quantizer = fitted(points, [8, 10], relocation_threshold=0)
    refitted = refit_pruned(quantizer, points, pruning_of(quantizer, points, "drop_layer", layer=0))
    assert torch.equal(refitted.codebooks[1], fitted(points, [10], relocation_threshold=0).codebooks[0])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "strategy, arguments", [("top_k", {"top_k": 2}), ("threshold", {"threshold": 0.6}), ("drop_layer", {})]
)
def test_what_sids_tell_has_less_error_than_before(strategy, arguments, seed):
    points = clusters(seed=seed)
    quantizer = fitted(points, seed=seed)
    pruning = pruning_of(quantizer, points, strategy, **arguments)
    before, after = (
        visible_error(one, points, pruning) for one in (quantizer, refit_pruned(quantizer, points, pruning))
    )
    assert after < 0.9 * before


def test_sources_and_memory_agree(tmp_path):
    points = clusters(3000)
    quantizer = fitted(points)
    pruning = pruning_of(quantizer, points)
    reference = refit_pruned(quantizer, points, pruning)
    assert same(refit_pruned(quantizer, points, pruning), reference)
    stream = Dataset.from_dict({"vector": points.tolist()}).to_iterable_dataset()
    assert same(refit_pruned(quantizer, stream, pruning, column="vector"), reference)
    np.save(tmp_path / "points.npy", points)
    few = refit_pruned(quantizer, tmp_path / "points.npy", pruning, max_rows_in_memory=600)
    assert visible_error(few, points, pruning) < 1.1 * visible_error(reference, points, pruning)


class Stop(Exception):
    pass


def test_an_interrupted_refit_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    points = clusters()
    quantizer = fitted(points, num_iterations=3)
    pruning = pruning_of(quantizer, points)
    expected = refit_pruned(quantizer, points, pruning, max_rows_in_memory=500)
    save = residual_kmeans.FitCheckpoint.save_unfinished
    layers = []

    def stop_after(checkpoint, index, *state):
        save(checkpoint, index, *state)
        layers.append(index)
        raise Stop

    monkeypatch.setattr(residual_kmeans.FitCheckpoint, "save_unfinished", stop_after)
    for _ in range(6):
        with pytest.raises(Stop):
            refit_pruned(quantizer, points, pruning, max_rows_in_memory=500, checkpoint_dir=tmp_path)
    assert layers == [2, 2, 2, 3, 3, 3]  # nothing before the layers that are fitted again
    assert same(refit_pruned(quantizer, points, pruning, max_rows_in_memory=500, checkpoint_dir=tmp_path), expected)
    monkeypatch.undo()
    other = fitted(points, num_iterations=3)
    other.codebooks[0].data += 0.001
    with pytest.raises(ValueError, match="went on from other codebooks.*another checkpoint_dir"):
        refit_pruned(other, points, pruning, max_rows_in_memory=500, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="another configuration"):
        fitted(points, num_iterations=3).fit(points, checkpoint_dir=tmp_path)


@pytest.mark.slow
def test_saved_and_loaded_in_a_fresh_process(tmp_path, run_fresh):
    points = clusters()
    quantizer = fitted(points, normalize_residuals=True)
    refitted = refit_pruned(quantizer, points, pruning_of(quantizer, points))
    refitted.save_pretrained(tmp_path / "refitted")
    np.save(tmp_path / "points.npy", points)
    found = run_fresh(
        """
        import json, sys
        from rqsid import ResidualQuantizer
        quantizer = ResidualQuantizer.from_pretrained(sys.argv[1] + "/refitted")
        codes = quantizer.encode(sys.argv[1] + "/points.npy")
        skipped = list(quantizer.config.skipped_codes.items())
        print(json.dumps([skipped, codes.tolist(), quantizer.decode(codes).tobytes().hex()]))
        """,
        tmp_path,
    )
    codes = refitted.encode(points)
    skipped = [[layer, codes_of] for layer, codes_of in refitted.config.skipped_codes.items()]
    assert found == [skipped, codes.tolist(), refitted.decode(codes).tobytes().hex()]


def test_bad_input_is_refused():
    points = clusters()
    quantizer = fitted(points)
    pruning = pruning_of(quantizer, points)
    with pytest.raises(TypeError, match="must be a ResidualQuantizer, got RQVAE"):
        refit_pruned(RQVAE(), points, pruning)
    with pytest.raises(ValueError, match="no codebooks yet"):
        refit_pruned(ResidualQuantizer(), points, pruning)
    with pytest.raises(TypeError, match="must be a TokenPruning, got ndarray"):
        refit_pruned(quantizer, points, pruning.pruned)
    with pytest.raises(ValueError, match="pruning is not fitted"):
        refit_pruned(quantizer, points, TokenPruning("top_k", top_k=2))
    with pytest.raises(ValueError, match=r"fitted on codebooks \[8, 6, 10, 7\], the quantizer has \[8, 6, 5\]"):
        refit_pruned(fitted(points, [8, 6, 5]), points, pruning)
    with pytest.raises(ValueError, match="num_beams=4 would avoid codes"):
        refit_pruned(fitted(points, num_beams=4), points, pruning)
    with pytest.raises(ValueError, match="5 dimensions, the codebooks 8"):
        refit_pruned(quantizer, clusters(dim=5), pruning)
    with pytest.raises(ValueError, match="9 embeddings cannot fill a codebook of 10"):
        refit_pruned(quantizer, points[:9], pruning)
    refitted = refit_pruned(quantizer, points, pruning)
    with pytest.raises(ValueError, match=r"skips codes of the layers \[1\] already"):
        refit_pruned(refitted, points, pruning)
    with pytest.raises(ValueError, match="skipped_codes name codes of codebooks that fit would replace"):
        refitted.fit(points)
    with pytest.raises(ValueError, match="num_beams=2: .*nor skipped_codes"):
        refitted.encode(points, num_beams=2)
