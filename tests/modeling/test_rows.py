"""Embedding rows for SID tokens: how many, what they hold, and when they are left alone."""

import json
import os

import numpy as np
import pytest
import torch
from fresh_process import run_ranks
from peft import LoraConfig, get_peft_model
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


@one_base
@pytest.mark.parametrize("init", ["codebook", "noise"])
@pytest.mark.parametrize("make_tiny_model", ["qwen"], indirect=True)
def test_rows_have_the_mean_and_covariance_of_base_rows(sid_tokenizer, make_tiny_model, init):
    base_size, new_ids = sid_tokenizer.base_size, sid_tokenizer.new_token_ids()
    model = make_tiny_model(len(sid_tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        # Columns that go together, differently in the two matrices: their deviations alone say little of them.
        for matrix in matrices_of(model):
            matrix.copy_(matrix @ torch.randn(8, 8, generator=generator) + 3 * torch.randn(8, generator=generator))
    means, covariances = ([[], []] for _ in range(2))
    for seed in range(40):
        model.config.sid_codebook = None
        initialize_sid_rows(model, sid_tokenizer, init=init, seed=seed)
        for which, matrix in enumerate(matrices_of(model)):
            centred = matrix[new_ids] - matrix[:base_size].mean(0)
            means[which].append(centred.mean(0))
            covariances[which].append(centred.T @ centred / len(new_ids))
    for matrix, mean, covariance in zip(matrices_of(model), means, covariances, strict=True):
        expected = torch.cov(matrix[:base_size].T, correction=0)
        deviation = torch.stack(mean).mean(0) / expected.diagonal().sqrt()
        assert deviation.abs().max() < 0.1
        error = torch.stack(covariance).mean(0) - expected
        assert error.norm() < 0.15 * expected.norm()
        # Noise of the right deviations would not do.
        assert (expected - expected.diagonal().diag()).norm() > 0.5 * expected.norm()


@one_family
def test_a_text_token_that_the_model_lacks_gets_a_row_too(sid_tokenizer, make_tiny_model):
    # As where a pad token was added to the tokenizer, and not to the model.
    base_size = sid_tokenizer.base_size
    rows = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = make_tiny_model(base_size - 1)
        torch.manual_seed(seed)
        initialize_sid_rows(model, sid_tokenizer, seed=3)
        assert len(model.get_input_embeddings().weight) == len(sid_tokenizer)
        rows.append(torch.cat([matrix[base_size - 1 :] for matrix in matrices_of(model)]))
    assert torch.equal(*rows)


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


# What cannot get them


@one_family
def test_what_can_get_no_rows_is_refused(sid_tokenizer, make_tiny_model):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(make_tiny_model(sid_tokenizer.base_size), config)
    with pytest.raises(ValueError, match="has an adapter and no rows.*on the model itself"):
        initialize_sid_rows(adapted, sid_tokenizer)
    model = make_tiny_model(sid_tokenizer.base_size)
    initialize_sid_rows(model, sid_tokenizer)
    assert initialize_sid_rows(get_peft_model(model, config), sid_tokenizer) is False
    with torch.device("meta"):
        hollow = make_tiny_model(sid_tokenizer.base_size)
    with pytest.raises(ValueError, match="weight of Embedding is without values.*without offloading"):
        initialize_sid_rows(hollow, sid_tokenizer)
    quantized = make_tiny_model(sid_tokenizer.base_size)
    quantized.lm_head.weight = torch.nn.Parameter(quantized.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="weight of Linear is torch.int8.*out of quantization"):
        initialize_sid_rows(quantized, sid_tokenizer)
    assert quantized.get_input_embeddings().num_embeddings == sid_tokenizer.base_size


SHARDED = """
import json, sys
import deepspeed, torch, torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig
from rqsid import SIDTokenizer, initialize_sid_rows

torch.set_num_threads(1)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo instead, which need not be compiled
folder = sys.argv[1]
dist.init_process_group("gloo")
rank = dist.get_rank()
tokenizer = SIDTokenizer.from_pretrained(f"{folder}/tokenizer")
names = json.load(open(f"{folder}/names.json"))


def rows_of(model, gather=False):
    matrices = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    with deepspeed.zero.GatheredParameters(matrices) if gather else torch.no_grad():
        return [matrix.detach().clone() for matrix in matrices]


expected = {}
for name in names:
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}")
    initialize_sid_rows(model, tokenizer, seed=3)
    expected[name] = rows_of(model)
config = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {
    "stage": 3, "stage3_param_persistence_threshold": 0}})
result = {}
for name in names:
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}")
    torch.manual_seed(rank)
    partitioned = model.get_input_embeddings().weight.numel() == 0 and model.get_output_embeddings().weight.numel() == 0
    made = initialize_sid_rows(model, tokenizer, seed=3)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = rows_of(model, gather=True)
    result[name] = {
        "partitioned": partitioned,
        "made": made,
        "equal": [torch.equal(*pair) for pair in zip(expected[name], found, strict=True)],
        "tied": embeddings.weight is head.weight,
        "sizes": [embeddings.num_embeddings, head.out_features, model.config.vocab_size],
    }
    if "resized" not in name or name.startswith("normalised"):
        continue
    # The engine partitions what resizing left whole, and trains what all ranks have agreed on.
    engine = deepspeed.initialize(model=model, config=config.config, dist_init_required=False)[0]
    result[name]["in the engine"] = [torch.equal(*pair) for pair in zip(expected[name], rows_of(model, True), strict=True)]
json.dump(result, open(f"{folder}/result.{rank}", "w"))

del config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
model = AutoModelForCausalLM.from_pretrained(f"{folder}/{names[0]}")
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
try:
    initialize_sid_rows(model, tokenizer)
    refused = ""
except ValueError as error:
    refused = str(error)
json.dump(refused, open(f"{folder}/refused.{rank}", "w"))
dist.barrier()
"""


@pytest.mark.slow
@one_base
def test_rows_of_partitioned_models(request, sid_tokenizer, tmp_path):
    """DeepSpeed ZeRO-3 in two processes: the rows are those of one process. FSDP2: refused."""
    shared = next(part for part in request.config.pluginmanager.get_plugins() if hasattr(part, "BASE_TOKENIZERS"))
    tiny_models, base_size, size = shared.TINY_MODELS, sid_tokenizer.base_size, len(sid_tokenizer)
    models = {
        "untied, resized": tiny_models["llama"](base_size),
        "untied, spare rows": tiny_models["llama"](size + 7),
        "tied, resized": tiny_models["qwen"](base_size, tie_word_embeddings=True),
        "tied, spare rows": tiny_models["qwen"](size + 7, tie_word_embeddings=True),
        "normalised, resized": tiny_models["baichuan"](base_size),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    sid_tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "names.json").write_text(json.dumps(list(models)))
    run_ranks(2, SHARDED, tmp_path, env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"})
    for rank in range(2):
        for name, found in json.loads((tmp_path / f"result.{rank}").read_text()).items():
            assert found["partitioned"] and found["made"], (name, found)
            assert found["equal"] == found.get("in the engine", [True, True]) == [True, True], (name, found)
            assert found["tied"] == name.startswith("tied")
            assert found["sizes"] == [size + 7 if "spare" in name else size] * 3
        assert "FSDP2 or tensor parallelism" in json.loads((tmp_path / f"refused.{rank}").read_text())
