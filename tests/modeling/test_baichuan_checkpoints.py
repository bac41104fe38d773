"""Checkpoints in the published layout: read, written back, resized, resumed, and none of their code run."""

import json
import os

import pytest
import torch
from baichuan_checkpoints import KINDS, published_config, write_checkpoint, write_weights
from datasets import Dataset
from fresh_process import run_fresh
from plain_baichuan import plain_logits, split_weights
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from rqsid import BaichuanConfig, BaichuanForCausalLM

LAYOUTS = [("safetensors", 2), ("safetensors", 1), ("bin", 2), ("bin", 1)]
IDS = [5, 199, 17, 3, 80, 120, 239]


def assert_same(tensors, others):
    assert set(tensors) == set(others)
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]), name


def assert_complete(info):
    assert all(not problems for problems in info.values()), info


@torch.no_grad()
def assert_logits(model, weights, config):
    """As the kind of checkpoint wants them."""
    position = "rope" if "max_position_embeddings" in config else "alibi"
    normalize_head = config["vocab_size"] != 64000
    truth = plain_logits(weights, IDS, config["num_attention_heads"], position, normalize_head)
    logits = model.float()(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(logits.double(), truth, atol=1e-5, rtol=0)


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def files_of(folder):
    """All tensors of a saved model, and how many files hold them."""
    names = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    tensors = {}
    for name in names:
        own = load_file(os.path.join(folder, name))
        assert not set(own) & set(tensors)
        tensors |= own
    return tensors, len(names)


# Configurations.


@pytest.mark.parametrize("kind", list(KINDS))
def test_config(tmp_path, kind):
    _, published = write_checkpoint(tmp_path / "hub", kind)
    config = AutoConfig.from_pretrained(tmp_path / "hub")
    for _ in range(2):
        assert type(config) is BaichuanConfig
        assert config.position_embedding == ("rope" if kind.endswith("7B") else "alibi")
        assert config.normalize_head is (not kind.startswith("v1"))
        for key, value in published.items():
            if key not in ("_from_model_config", "auto_map", "torch_dtype", "transformers_version"):
                assert getattr(config, key) == value, key
        assert config.dtype == torch.float32
        # And again after they were saved.
        config.save_pretrained(tmp_path / "saved")
        config = AutoConfig.from_pretrained(tmp_path / "saved")


def test_what_is_inferred_can_be_given(tmp_path):
    assert BaichuanConfig(max_position_embeddings=512).position_embedding == "rope"
    given = {"position_embedding": "alibi", "normalize_head": True}
    for options in (
        {"max_position_embeddings": 512, "vocab_size": 64000},
        {"vocab_size": 64000, "architectures": ["BaiChuanForCausalLM"]},
    ):
        config = BaichuanConfig(**options, **given)
        config.save_pretrained(tmp_path)
        for one in (config, AutoConfig.from_pretrained(tmp_path)):
            assert one.position_embedding == "alibi" and one.normalize_head is True
    config = BaichuanConfig(position_embedding="rope", normalize_head=False)
    config.save_pretrained(tmp_path)
    for one in (config, AutoConfig.from_pretrained(tmp_path)):
        assert one.position_embedding == "rope" and one.normalize_head is False
    assert BaichuanConfig(vocab_size=125696).normalize_head is True
    # Alone, either of the two signs of version 1 is enough.
    assert BaichuanConfig(vocab_size=64000, architectures=["BaichuanForCausalLM"]).normalize_head is False
    assert BaichuanConfig(vocab_size=64010, architectures=["BaiChuanForCausalLM"]).normalize_head is False


@pytest.mark.parametrize(
    "options, message",
    [
        ({"position_embedding": "sinusoidal"}, "position_embedding.*sinusoidal"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2.*num_attention_heads=4"),
    ],
)
def test_bad_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BaichuanConfig(**(published_config("7B") | options))


# Reading.


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("file_format, num_shards", LAYOUTS)
def test_every_layout_is_read(tmp_path, kind, file_format, num_shards):
    weights, config = write_checkpoint(tmp_path, kind, 1, file_format, num_shards)
    model, info = load(tmp_path, output_loading_info=True)
    assert type(model) is BaichuanForCausalLM and not model.training
    assert_complete(info)
    assert_same(dict(model.named_parameters()), split_weights(weights))
    assert_logits(model, weights, config)


@pytest.mark.parametrize("file_format, num_shards", LAYOUTS)
def test_stale_rotary_frequencies_are_passed_over(tmp_path, file_format, num_shards):
    weights, config = write_checkpoint(
        tmp_path, file_format=file_format, num_shards=num_shards, stale_buffer=True, vocab_size=250
    )
    model, info = load(tmp_path, output_loading_info=True)
    assert_complete(info)
    assert_same(dict(model.named_parameters()), split_weights(weights))
    assert_logits(model, weights, config)


def test_a_fused_matrix_split_over_no_files_but_layers_over_many(tmp_path):
    # More files than layers, so that a layer's tensors lie in several.
    weights, config = write_checkpoint(tmp_path, num_shards=9, num_hidden_layers=3)
    model, info = load(tmp_path, output_loading_info=True)
    assert_complete(info)
    assert_same(dict(model.named_parameters()), split_weights(weights))
    assert_logits(model, weights, config)


def test_what_lacks_or_does_not_belong_is_named(tmp_path):
    weights, _ = write_checkpoint(tmp_path, num_shards=1)
    del weights["model.layers.1.self_attn.W_pack.weight"]
    write_weights(tmp_path, weights | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, num_shards=1)
    _, info = load(tmp_path, output_loading_info=True)
    lacking = {f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"}
    assert set(info["missing_keys"]) == lacking
    assert set(info["unexpected_keys"]) == {"model.layers.0.self_attn.q_norm.weight"}


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_dtype(tmp_path, file_format):
    weights, config = write_checkpoint(tmp_path, file_format=file_format, dtype=torch.bfloat16)
    assert config["torch_dtype"] == "bfloat16"
    model = load(tmp_path)
    assert model.dtype == torch.bfloat16
    assert_same(dict(model.named_parameters()), split_weights(weights))
    model = load(tmp_path, dtype=torch.float32)
    wide = {name: tensor.float() for name, tensor in weights.items()}
    assert_same(dict(model.named_parameters()), split_weights(wide))
    assert_logits(model, wide, config)


def test_generation_config(tmp_path):
    write_checkpoint(tmp_path / "hub")
    load(tmp_path / "hub").save_pretrained(tmp_path / "saved")
    for folder in ("hub", "saved"):
        generation = load(tmp_path / folder).generation_config
        found = [getattr(generation, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")]
        assert found == [2048, 0.3, 5, 0.85] and generation.do_sample and generation.repetition_penalty == 1.05
        assert (generation.user_token_id, generation.assistant_token_id) == (195, 196)
        assert (generation.pad_token_id, generation.bos_token_id, generation.eos_token_id) == (0, 1, 2)


# Nothing in a checkpoint is run.


@pytest.mark.parametrize("trust_remote_code", [None, False, True])
def test_remote_code_is_not_run(tmp_path, trust_remote_code):
    write_checkpoint(tmp_path)
    options = {} if trust_remote_code is None else {"trust_remote_code": trust_remote_code}
    assert type(AutoConfig.from_pretrained(tmp_path, **options)) is BaichuanConfig
    assert type(load(tmp_path, **options)) is BaichuanForCausalLM
    assert type(BaichuanForCausalLM.from_pretrained(tmp_path, **options)) is BaichuanForCausalLM


FRESH = """
import sys
import rqsid
from transformers import AutoConfig, AutoModelForCausalLM
for options in ({}, {"trust_remote_code": True}):
    config = AutoConfig.from_pretrained(sys.argv[1], **options)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)
    assert type(config) is rqsid.BaichuanConfig and type(model) is rqsid.BaichuanForCausalLM, (config, model)
    assert type(AutoModelForCausalLM.from_config(config, **options)) is rqsid.BaichuanForCausalLM
model.save_pretrained(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)
assert type(model) is rqsid.BaichuanForCausalLM
"""


@pytest.mark.slow
def test_in_a_fresh_process(tmp_path):
    weights, _ = write_checkpoint(tmp_path / "hub")
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    # Nobody is there to answer whether code may be run: stdin is empty.
    run_fresh(FRESH, tmp_path / "hub", tmp_path / "saved", env=environment, check=True)
    copied = [name for _, _, names in os.walk(tmp_path / "home") for name in names if "baichuan" in name]
    assert not copied, "remote code was copied to where it is imported from"
    assert_same(files_of(tmp_path / "saved")[0], weights)


class Intruder:
    """Makes a file wherever it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, num_shards, zipped):
    write_checkpoint(tmp_path / "hub", file_format="bin", num_shards=num_shards)
    name = "pytorch_model.bin" if num_shards == 1 else "pytorch_model-00002-of-00002.bin"
    path, trace = tmp_path / "hub" / name, tmp_path / "trace"
    content = torch.load(path, weights_only=True) | {"model.intruder": Intruder(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(Exception, match="(?i)weights.only|unsafe|not an allowed|Unsupported"):
        load(tmp_path / "hub")
    assert not trace.exists()
    with pytest.raises(ValueError, match="weights_only"):
        load(tmp_path / "hub", weights_only=False)
    assert not trace.exists()
    # It would have been made.
    torch.load(path, weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_weights_only_cannot_be_switched_off(tmp_path, file_format):
    write_checkpoint(tmp_path, file_format=file_format)
    for from_pretrained in (load, BaichuanForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="weights_only"):
            from_pretrained(tmp_path, weights_only=False)
        assert type(from_pretrained(tmp_path, weights_only=True)) is BaichuanForCausalLM


# Writing.


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("max_shard_size", ["50GB", "30KB"])
@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_saved_in_the_published_layout(tmp_path, kind, max_shard_size, file_format):
    weights, config = write_checkpoint(tmp_path / "hub", kind, file_format=file_format, stale_buffer=True)
    load(tmp_path / "hub").save_pretrained(tmp_path / "saved", max_shard_size=max_shard_size)
    tensors, num_files = files_of(tmp_path / "saved")
    assert (num_files > 1) == (max_shard_size == "30KB")
    assert_same(tensors, weights)
    if num_files > 1:
        index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(weights)
        for name, file_name in index["weight_map"].items():
            assert name in load_file(tmp_path / "saved" / file_name)
    model, info = load(tmp_path / "saved", output_loading_info=True)
    assert_complete(info)
    assert_same(dict(model.named_parameters()), split_weights(weights))
    assert_logits(model, weights, config)


@pytest.mark.parametrize("kind", ["7B", "13B"])
def test_saved_as_the_model_names_them(tmp_path, kind):
    weights, config = write_checkpoint(tmp_path / "hub", kind)
    load(tmp_path / "hub").save_pretrained(tmp_path / "saved", save_original_format=False)
    assert_same(files_of(tmp_path / "saved")[0], split_weights(weights))
    model, info = load(tmp_path / "saved", output_loading_info=True)
    assert_complete(info)
    assert_logits(model, weights, config)


def test_a_new_model_is_saved_in_the_published_layout(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BaichuanConfig(**published_config("7B")))
    model.save_pretrained(tmp_path)
    tensors, _ = files_of(tmp_path)
    assert tensors["model.layers.1.self_attn.W_pack.weight"].shape == (96, 32)
    own = dict(model.named_parameters())
    assert_same(split_weights(tensors), own)
    assert_same(dict(load(tmp_path).named_parameters()), own)


def test_saving_in_half_precision(tmp_path):
    weights, _ = write_checkpoint(tmp_path / "hub", dtype=torch.bfloat16)
    load(tmp_path / "hub").save_pretrained(tmp_path / "saved")
    assert_same(files_of(tmp_path / "saved")[0], weights)
    assert load(tmp_path / "saved").dtype == torch.bfloat16


# State dicts.


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_of_both_layouts(tmp_path, assign):
    weights, config = write_checkpoint(tmp_path)
    for tensors in (weights, split_weights(weights)):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
        names = list(tensors)
        result = model.load_state_dict(tensors, assign=assign)
        assert not result.missing_keys and not result.unexpected_keys
        assert list(tensors) == names, "the caller's dict was changed"
        assert_same(dict(model.named_parameters()), split_weights(weights))
        assert_logits(model, weights, config)
        # What it gives, it takes.
        assert not any(model.load_state_dict(model.state_dict()))


def test_bad_state_dicts_are_refused(tmp_path):
    weights, _ = write_checkpoint(tmp_path)
    model, name = load(tmp_path), "model.layers.1.self_attn.W_pack.weight"
    lacking = {key: tensor for key, tensor in weights.items() if key != name}
    with pytest.raises(RuntimeError, match="layers.1.self_attn.q_proj"):
        model.load_state_dict(lacking)
    for shape in ((95, 32), (64, 32), (96, 31)):
        with pytest.raises((RuntimeError, ValueError), match=r"layers\.1\.self_attn"):
            model.load_state_dict(weights | {name: torch.zeros(shape)})
    result = model.load_state_dict(lacking, strict=False)
    assert set(result.missing_keys) == {f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"}


def test_the_trainer_resumes(tmp_path):
    write_checkpoint(tmp_path / "hub")
    rows = torch.randint(3, 240, (8, 6), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})

    def train(folder, resume=None):
        options = {"per_device_train_batch_size": 2, "num_train_epochs": 1, "report_to": [], "disable_tqdm": True}
        options |= {"save_steps": 2, "learning_rate": 0.01, "use_cpu": True, "logging_strategy": "no"}
        trainer = Trainer(load(tmp_path / "hub"), TrainingArguments(str(folder), **options), train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        return dict(trainer.model.named_parameters())

    whole = train(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert any(name.endswith("W_pack.weight") for name in files_of(checkpoint)[0])
    resumed = train(tmp_path / "resumed", str(checkpoint))
    for name, parameter in whole.items():
        torch.testing.assert_close(resumed[name], parameter, atol=1e-6, rtol=1e-5)


# Resizing.


@torch.no_grad()
@pytest.mark.parametrize("kind", ["7B", "13B"])
@pytest.mark.parametrize("mean_resizing", [False, True])
@pytest.mark.parametrize("size", [251, 200])
def test_resizing_keeps_norm_head_and_logits(tmp_path, kind, mean_resizing, size):
    weights, config = write_checkpoint(tmp_path / "hub", kind)
    model = load(tmp_path / "hub")
    ids = [token for token in IDS if token < size]
    truth = plain_logits(weights, ids, 4, model.config.position_embedding, True)
    head_type = type(model.get_output_embeddings())
    model.resize_token_embeddings(size, mean_resizing=mean_resizing)
    assert type(model.get_output_embeddings()) is head_type
    assert model.config.vocab_size == size and model.get_input_embeddings().weight.shape == (size, 32)
    logits = model(torch.tensor([ids])).logits[0]
    assert logits.shape == (len(ids), size) and logits.isfinite().all()
    kept = min(size, 240)
    torch.testing.assert_close(logits[:, :kept].double(), truth[:, :kept], atol=1e-5, rtol=0)

    # New rows are normalised, too, whatever their lengths.
    model.get_output_embeddings().weight[-3:] *= 7
    torch.testing.assert_close(model(torch.tensor([ids])).logits[0], logits, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "saved")
    resized, info = load(tmp_path / "saved", output_loading_info=True)
    assert_complete(info)
    tensors, _ = files_of(tmp_path / "saved")
    truth = plain_logits(tensors, ids, 4, model.config.position_embedding, True)
    torch.testing.assert_close(resized(torch.tensor([ids])).logits[0].double(), truth, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["v1-7B", "v1-13B"])
def test_version_1_stays_version_1_when_resized(tmp_path, kind):
    weights, config = write_checkpoint(tmp_path / "hub", kind)
    model = load(tmp_path / "hub")
    # The size that tells version 1 is gone.
    model.resize_token_embeddings(64010, mean_resizing=False)
    model.save_pretrained(tmp_path / "saved")
    position = "rope" if kind == "v1-7B" else "alibi"
    truth = plain_logits(weights, IDS, 2, position, False)
    for one in (model, load(tmp_path / "saved")):
        assert one.config.normalize_head is False and one.config.position_embedding == position
        logits = one(torch.tensor([IDS])).logits[0, :, :64000].double()
        torch.testing.assert_close(logits, truth, atol=1e-5, rtol=0)


@torch.no_grad()
def test_version_2_stays_version_2_at_the_size_of_version_1(tmp_path):
    weights, _ = write_checkpoint(tmp_path / "hub")
    model = load(tmp_path / "hub")
    model.resize_token_embeddings(64000, mean_resizing=False)
    model.save_pretrained(tmp_path / "saved")
    truth = plain_logits(weights, IDS, 4, "rope", True)
    for one in (model, load(tmp_path / "saved")):
        logits = one(torch.tensor([IDS])).logits[0, :, :240].double()
        assert one.config.normalize_head is True
        torch.testing.assert_close(logits, truth, atol=1e-5, rtol=0)
