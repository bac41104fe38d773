"""Embedding rows for SID tokens: how many, what they hold, and when they are left alone."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rqsid import ProductCatalog, ResidualQuantizer, ResidualQuantizerConfig, SIDTokenizer, initialize_sid_rows

CODEBOOK_SIZES = [16, 16]

# A wide model, so that statistics over one row are sharp.
WIDE = {"hidden_size": 256, "intermediate_size": 32, "num_hidden_layers": 1}

one_base = pytest.mark.parametrize("base_tokenizer", ["qwen"], indirect=True)
one_family = pytest.mark.parametrize("base_tokenizer, make_tiny_model", [("qwen", "qwen")], indirect=True)


@pytest.fixture(scope="module")
def quantizer():
    embeddings = np.random.default_rng(0).standard_normal((400, 8), dtype=np.float32)
    return ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=CODEBOOK_SIZES, num_iterations=3)).fit(embeddings)


@pytest.fixture(scope="module")
def catalog():
    codes = np.random.default_rng(1).integers(0, 16, (20, 2))
    codes[1] = codes[0]
    return ProductCatalog.build([f"p{row}" for row in range(20)], codes, CODEBOOK_SIZES, collisions="suffix")


@pytest.fixture(scope="module")
def sid_tokenizer(base_tokenizer, catalog, quantizer):
    return SIDTokenizer.from_base(base_tokenizer, catalog, quantizer)


def matrices_of(model):
    return model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()


# How many rows


def test_a_model_of_the_base_vocabulary_grows_to_the_tokenizer(sid_tokenizer, make_tiny_model):
    model = make_tiny_model(sid_tokenizer.base_size)
    old_input, old_output = (matrix.clone() for matrix in matrices_of(model))
    assert initialize_sid_rows(model, sid_tokenizer) is True
    base_size, size = sid_tokenizer.base_size, len(sid_tokenizer)
    assert size == base_size + 16 + 16 + 16  # two codebooks and the suffixes
    new_input, new_output = matrices_of(model)
    assert len(new_input) == len(new_output) == model.config.vocab_size == size
    assert torch.equal(new_input[:base_size], old_input) and torch.equal(new_output[:base_size], old_output)
    assert new_input.data_ptr() != new_output.data_ptr()
    # Whatever row a SID token reads has been made: none is left as the resizing found it.
    assert torch.isfinite(new_input).all() and torch.isfinite(new_output).all()
    logits = model(sid_tokenizer.sid_vocabulary()[None]).logits
    assert logits.shape[-1] == size and torch.isfinite(logits).all()


@one_base
@pytest.mark.parametrize("num_spare", [10, 48, 100])
def test_spare_rows_are_used_before_the_matrix_grows_and_it_never_shrinks(sid_tokenizer, make_tiny_model, num_spare):
    base_size, size = sid_tokenizer.base_size, len(sid_tokenizer)
    model = make_tiny_model(base_size + num_spare)
    before = [matrix.clone() for matrix in matrices_of(model)]
    initialize_sid_rows(model, sid_tokenizer)
    for old, new in zip(before, matrices_of(model), strict=True):
        assert len(new) == model.config.vocab_size == max(base_size + num_spare, size)
        assert torch.equal(new[:base_size], old[:base_size])
        # Spare rows get values like the rest, and those beyond the tokenizer stay as they were.
        assert (new[base_size:size][: len(old) - base_size] != old[base_size:size]).any(1).all()
        assert torch.equal(new[size:], old[size:])


def test_tied_heads_stay_tied(sid_tokenizer, make_tiny_model):
    for num_spare in (0, 100):
        model = make_tiny_model(sid_tokenizer.base_size + num_spare, tie_word_embeddings=True)
        initialize_sid_rows(model, sid_tokenizer)
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert model.config.tie_word_embeddings


@one_family
def test_rows_keep_the_dtype_of_the_model(sid_tokenizer, make_tiny_model):
    model = make_tiny_model(sid_tokenizer.base_size).to(torch.bfloat16)
    initialize_sid_rows(model, sid_tokenizer)
    for matrix in matrices_of(model):
        assert matrix.dtype == torch.bfloat16 and torch.isfinite(matrix).all()


# What they hold


@one_family
@pytest.mark.parametrize("init", ["codebook", "noise"])
def test_rows_depend_on_the_seed_alone(sid_tokenizer, make_tiny_model, init):
    def rows_of(seed, global_seed):
        model = make_tiny_model(sid_tokenizer.base_size)
        torch.manual_seed(global_seed)
        initialize_sid_rows(model, sid_tokenizer, init=init, seed=seed)
        return torch.cat(matrices_of(model))

    first = rows_of(seed=3, global_seed=0)
    assert torch.equal(first, rows_of(seed=3, global_seed=1))
    assert not torch.equal(first, rows_of(seed=4, global_seed=0))


@one_family
@pytest.mark.parametrize("init", ["codebook", "noise"])
def test_rows_are_distinct_and_look_like_base_rows(sid_tokenizer, make_tiny_model, init):
    model = make_tiny_model(sid_tokenizer.base_size, **WIDE)
    with torch.no_grad():
        # Mean and deviation that differ by column and between the two matrices, which a wrong axis or matrix would miss.
        for matrix, shift in zip(matrices_of(model), (2.0, -1.0), strict=True):
            matrix *= torch.linspace(0.1, 3, matrix.shape[1])
            matrix += shift * torch.linspace(-1, 1, matrix.shape[1])
    initialize_sid_rows(model, sid_tokenizer, init=init)
    base_size, new_ids = sid_tokenizer.base_size, sid_tokenizer.new_token_ids()
    for matrix in matrices_of(model):
        base, rows = matrix[:base_size], matrix[new_ids]
        standardized = (rows - base.mean(0)) / base.std(0)
        assert standardized.mean().abs() < 0.1
        assert standardized.std() == pytest.approx(1, abs=0.15)
        # By column and not only overall: narrow columns stay narrow.
        narrow, wide = standardized[:, :64].std(), standardized[:, -64:].std()
        assert 0.7 < narrow / wide < 1.4
        distances = torch.cdist(standardized, standardized) + 1e9 * torch.eye(len(rows))
        assert distances.min() > 1, "two rows are nearly the same"


@one_family
def test_codebook_rows_keep_the_neighbourhoods_of_the_codes(sid_tokenizer, quantizer, make_tiny_model):
    model = make_tiny_model(sid_tokenizer.base_size, **WIDE)
    initialize_sid_rows(model, sid_tokenizer)  # "codebook" is the default of a tokenizer with a quantizer
    base = matrices_of(model)[0][: sid_tokenizer.base_size]
    noise = make_tiny_model(sid_tokenizer.base_size, **WIDE)
    initialize_sid_rows(noise, sid_tokenizer, init="noise")

    def nearest_and_others(matrix, ids, codebook):
        # Mean distance of each code's row to its three nearest codes' rows, relative to that to all others.
        rows = (matrix[torch.from_numpy(ids)] - base.mean(0)) / base.std(0)
        codes_apart, rows_apart = torch.cdist(codebook, codebook), torch.cdist(rows, rows)
        order = codes_apart.argsort(1)
        near, far = rows_apart.gather(1, order[:, 1:4]).mean(), rows_apart.gather(1, order[:, 4:]).mean()
        upper = torch.triu(torch.ones_like(codes_apart), 1).bool()
        correlation = torch.corrcoef(torch.stack([codes_apart[upper], rows_apart[upper]]))[0, 1]
        return near / far, correlation

    for layer, codebook in enumerate(quantizer.codebooks):
        ids = sid_tokenizer.layer_token_ids()[layer]
        for matrix in matrices_of(model):
            ratio, correlation = nearest_and_others(matrix, ids, codebook)
            assert ratio < 0.85 and correlation > 0.8
        ratio, correlation = nearest_and_others(matrices_of(noise)[0], ids, codebook)
        assert ratio > 0.95 and correlation.abs() < 0.5


@one_base
def test_without_a_quantizer_rows_are_noise(base_tokenizer, catalog, make_tiny_model):
    tokenizer = SIDTokenizer.from_base(base_tokenizer, catalog)
    default, noise = (make_tiny_model(tokenizer.base_size) for _ in range(2))
    initialize_sid_rows(default, tokenizer)
    initialize_sid_rows(noise, tokenizer, init="noise")
    assert torch.equal(torch.cat(matrices_of(default)), torch.cat(matrices_of(noise)))


# When they are left alone


def test_a_second_call_keeps_trained_rows_also_after_a_reload(sid_tokenizer, make_tiny_model, tmp_path):
    model = make_tiny_model(sid_tokenizer.base_size)
    initialize_sid_rows(model, sid_tokenizer)
    with torch.no_grad():
        for matrix in matrices_of(model):
            matrix += 1
    trained = torch.cat(matrices_of(model)).clone()
    assert initialize_sid_rows(model, sid_tokenizer, init="noise", seed=7) is False
    assert torch.equal(torch.cat(matrices_of(model)), trained)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert initialize_sid_rows(loaded, sid_tokenizer, seed=7) is False
    assert torch.equal(torch.cat(matrices_of(loaded)), trained)


@one_base
def test_adopted_tokens_keep_their_rows(base_tokenizer, catalog, quantizer, sid_tokenizer, make_tiny_model):
    # A tokenizer that has the SID tokens already, as published checkpoints do.
    adopted = SIDTokenizer.from_base(sid_tokenizer, catalog, quantizer, reuse_tokens=True)
    assert len(adopted) == len(sid_tokenizer) and len(adopted.new_token_ids()) == 0
    model = make_tiny_model(len(adopted))
    before = torch.cat(matrices_of(model)).clone()
    initialize_sid_rows(model, adopted)
    assert torch.equal(torch.cat(matrices_of(model)), before)


@one_base
def test_only_the_tokens_that_are_new_get_rows(base_tokenizer, catalog, quantizer, make_tiny_model):
    codes = np.random.default_rng(1).integers(0, 16, (20, 1))
    one_layer = ProductCatalog.build([f"p{row}" for row in range(20)], codes, [16])
    half = SIDTokenizer.from_base(base_tokenizer, one_layer)
    whole = SIDTokenizer.from_base(half, catalog, quantizer, reuse_tokens=True)
    assert len(whole) == len(half) + 16 + 16
    model = make_tiny_model(len(half))
    before = [matrix.clone() for matrix in matrices_of(model)]
    initialize_sid_rows(model, whole)
    for old, new in zip(before, matrices_of(model), strict=True):
        assert len(new) == len(whole) and torch.equal(new[: len(half)], old)


@one_family
def test_bad_arguments_change_nothing(base_tokenizer, catalog, sid_tokenizer, make_tiny_model):
    model = make_tiny_model(sid_tokenizer.base_size)
    with pytest.raises(ValueError, match="init='mean' is unknown"):
        initialize_sid_rows(model, sid_tokenizer, init="mean")
    with pytest.raises(ValueError, match='needs a tokenizer with a quantizer.*init="noise"'):
        initialize_sid_rows(model, SIDTokenizer.from_base(base_tokenizer, catalog), init="codebook")
    assert model.get_input_embeddings().num_embeddings == sid_tokenizer.base_size
    assert not hasattr(model.config, "sid_codebook")


@one_family
def test_rows_of_other_codebooks_are_neither_kept_nor_overwritten(
    base_tokenizer, catalog, quantizer, sid_tokenizer, make_tiny_model
):
    model = make_tiny_model(sid_tokenizer.base_size)
    initialize_sid_rows(model, sid_tokenizer)
    before = matrices_of(model)[0].clone()
    other = ResidualQuantizer(quantizer.config)
    for codebook, original in zip(other.codebooks, quantizer.codebooks, strict=True):
        codebook.data = original + 1
    with pytest.raises(ValueError, match="the catalog was built with"):
        SIDTokenizer.from_base(base_tokenizer, catalog, other)
    product_ids = [f"p{row}" for row in range(20)]
    other_catalog = ProductCatalog.build(product_ids, catalog.codes, CODEBOOK_SIZES, collisions="suffix")
    other_tokenizer = SIDTokenizer.from_base(base_tokenizer, other_catalog, other)
    with pytest.raises(ValueError, match="rows for the SID tokens of codebook .* the tokenizer has codebook"):
        initialize_sid_rows(model, other_tokenizer)
    assert torch.equal(matrices_of(model)[0], before)
    model.config.sid_codebook = None
    assert initialize_sid_rows(model, other_tokenizer) is True
