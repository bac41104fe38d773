"""Codebooks from folders that anybody may have written: one clear error each, nothing unpickled, no memory spent on claims."""

import json
import pickle
import shutil
import time
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from rqsid import RQVAE, ResidualQuantizer, ResidualQuantizerConfig, RQVAEConfig

SIZES = [8, 6, 4]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of one quantizer of each class, and the embeddings."""
    embeddings = np.random.default_rng(0).standard_normal((120, 5)).astype(np.float32)
    config = ResidualQuantizerConfig(codebook_sizes=SIZES, num_iterations=2, capacity=2.0, normalize_residuals=True)
    kmeans = ResidualQuantizer(config).fit(embeddings)
    vae_config = RQVAEConfig(codebook_sizes=SIZES, hidden_sizes=[8], latent_dim=4, num_epochs=1, batch_size=60)
    vae = RQVAE(vae_config).fit(embeddings)
    folders = {}
    for quantizer in (kmeans, vae):
        folders[type(quantizer)] = tmp_path_factory.mktemp("saved")
        quantizer.save_pretrained(folders[type(quantizer)])
    return folders, {ResidualQuantizer: kmeans, RQVAE: vae}, embeddings


@pytest.fixture(params=[ResidualQuantizer, RQVAE], ids=["kmeans", "rqvae"])
def case(request, saved, tmp_path):
    """A class, a copy of what it saved, and what was saved."""
    folders, quantizers, embeddings = saved
    shutil.copytree(folders[request.param], tmp_path / "codebook")
    return request.param, tmp_path / "codebook", quantizers[request.param], embeddings


def edit_config(folder, **entries):
    config = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value != "LEFT OUT"})
    )


def edit_tensors(folder, **tensors):
    path = folder / "model.safetensors"
    content = {name: tensor.clone() for name, tensor in load_file(path).items()} | tensors
    save_file({name: tensor for name, tensor in content.items() if tensor is not None}, path)


def refused(cls, folder, match):
    """Refuses in time and memory that do not follow from what the files claim."""
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(ValueError, match=match) as caught:
        cls.from_pretrained(folder)
    assert time.process_time() - start < 5
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)
    return str(caught.value)


def test_what_was_saved_comes_back(case, tmp_path):
    cls, folder, quantizer, embeddings = case
    for variant in (None, "fp32"):
        for shard in ("50GB", 100):
            where = tmp_path / f"{variant}-{shard}"
            quantizer.save_pretrained(where, variant=variant, max_shard_size=shard)
            assert (shard == "50GB") == (len(list(where.glob("*.safetensors"))) == 1)
            loaded, info = cls.from_pretrained(where, variant=variant, output_loading_info=True)
            for name, tensor in quantizer.state_dict().items():
                assert torch.equal(loaded.state_dict()[name], tensor), name
            assert loaded.state_dict().keys() == quantizer.state_dict().keys()
            assert not any(parameter.requires_grad for parameter in loaded.parameters()) and not loaded.training
            assert not any(info.values()) and loaded.name_or_path == str(where)
            assert (loaded.encode(embeddings) == quantizer.encode(embeddings)).all()
    assert cls.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert cls.from_pretrained(folder, device_map="cpu").codebook_sizes == SIZES
    automatic = AutoModel.from_pretrained(folder)
    assert type(automatic) is cls and (automatic.encode(embeddings) == quantizer.encode(embeddings)).all()
    assert cls.from_pretrained(folder, seed=7).config.seed == 7
    with pytest.raises(TypeError, match="nonsense"):
        cls.from_pretrained(folder, nonsense=7)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


def test_pickles_are_not_opened(case):
    cls, folder, _, _ = case
    for name in ("pytorch_model.bin", "adapter_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "elsewhere", "peft_type": "LORA"})
    )
    assert cls.from_pretrained(folder).codebook_sizes == SIZES
    (folder / "model.safetensors").unlink()
    refused(cls, folder, "has no model.safetensors.*never from pickles such as pytorch_model.bin")
    with pytest.raises(ValueError, match="use_safetensors=False"):
        cls.from_pretrained(folder, use_safetensors=False)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    refused(cls, folder, "model.safetensors of .* is not readable safetensors")


HOSTILE_ENTRIES = [
    ({"codebook_sizes": [10**12] * 3}, "says codebook_sizes="),
    ({"codebook_sizes": [10**30] * 3}, "says codebook_sizes="),
    ({"codebook_sizes": [1] * 1000}, "calls for more layers"),
    ({"codebook_sizes": [1] * 100_000}, "more than 1024 layers"),
    ({"codebook_sizes": [8, 6, -4]}, "every layer needs at least one code"),
    ({"codebook_sizes": [8.0, 6, 4]}, "must be a list of integers"),
    ({"codebook_sizes": [True, 6, 4]}, "must be a list of integers"),
    ({"codebook_sizes": "8, 6, 4"}, "must be a list of integers"),
    ({"codebook_sizes": {"0": 8}}, "must be a list of integers"),
    ({"codebook_sizes": []}, "every layer needs at least one code"),
    ({"codebook_sizes": [8, 6]}, "has no use for the weights \\['codebooks.2'"),
    (
        {"codebook_sizes": [6, 8, 4]},
        r"codebooks.0 of .* has the shape \(8, \d\), .* calls for \(6, \d\)",
    ),
    ({"embedding_dim": 10**15}, "says embedding_dim=1000000000000000"),
    ({"embedding_dim": None}, "says embedding_dim=None"),
    ({"embedding_dim": "5"}, "embedding_dim='5'"),
    ({"embedding_dim": 5.0}, "embedding_dim=5.0"),
    ({"embedding_dim": True}, "embedding_dim=True"),
    ({"embedding_dim": -5}, "embedding_dim=-5"),
    ({"embedding_dim": 6}, "calls for"),
    ({"num_beams": "2"}, "num_beams='2'"),
    ({"num_beams": 2**70}, "num_beams="),
    ({"metric": ["cosine"]}, "metric="),
    ({"seed": "x"}, "seed='x'"),
    ({"seed": -1}, "seed=-1"),
    ({"dtype": "float8_e4m3fn"}, "config.json of .* has dtype torch.float8_e4m3fn, none of"),
    ({"num_labels": 10**9}, "has 'num_labels'"),
    ({"dtype": "float99"}, "config.json of .* cannot be used"),
    ({"dtype": "__loader__"}, "config.json of .* dtype"),
    ({"new_option": 1}, "has 'new_option', which this version does not know"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "has 'quantization_config'"),
    ({"transformers_weights": "../model.safetensors"}, "has 'transformers_weights'"),
    ({"model_type": "llama"}, "has model_type 'llama', not 'rqsid"),
    ({"model_type": "LEFT OUT"}, "has model_type None"),
]


@pytest.mark.parametrize(("entries", "match"), HOSTILE_ENTRIES, ids=lambda value: str(value)[:50])
def test_hostile_configurations(case, entries, match):
    cls, folder, _, _ = case
    edit_config(folder, **entries)
    refused(cls, folder, match)


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"new_option": 1}, "has 'new_option', which this version does not know"),
        ({"transformers_weights": "../model.safetensors"}, "has 'transformers_weights'"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "has 'quantization_config'"),
        ({"dtype": "float8_e4m3fn"}, "has dtype torch.float8_e4m3fn"),
        ({"num_labels": 10**9}, "num_labels is no option"),
        ({"embedding_dim": 10**15}, "says embedding_dim=1000000000000000"),
        ({"codebook_sizes": [8] * 1025}, "more than 1024 layers"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_auto_model_refuses_them_as_well(case, entries, match):
    _, folder, _, _ = case
    edit_config(folder, **entries)
    refused(AutoModel, folder, match)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"[" * 10**6, "config.json is not valid JSON"),
        (b"{" + b'"a":{' * 10**5 + b"}" * 10**5 + b"}", "config.json is not valid JSON"),
        (b"[1]", "must hold a JSON object"),
        (b'{"a": "\xff"}', "config.json is not valid JSON"),
        (b"", "config.json is not valid JSON"),
        (b" " * (2**24 + 1), "more than the 16777216 that are accepted"),
    ],
    ids=["deep list", "deep object", "list", "no UTF-8", "empty", "gigantic"],
)
def test_configurations_that_are_none(case, content, match):
    cls, folder, _, _ = case
    (folder / "config.json").write_bytes(content)
    refused(cls, folder, match)


def test_a_folder_without_configuration_or_with_links_elsewhere(case, tmp_path):
    cls, folder, _, _ = case
    (folder / "config.json").unlink()
    refused(cls, folder, "has no config.json: it holds no codebooks")
    (folder / "config.json").mkdir()
    refused(cls, folder, "has no config.json")
    refused(cls, tmp_path / "nothing" / "here" / "at all", "is neither a folder nor the name of a repository")


def test_tensors_that_do_not_fit(case):
    cls, folder, quantizer, _ = case
    whole = (folder / "model.safetensors").read_bytes()
    name, tensor = "codebooks.1", quantizer.codebooks[1].data
    missing = "encoder.0.bias" if cls is RQVAE else "prices.0"
    for tensors, match in (
        ({name: tensor[:-1]}, "codebooks.1 of .* has the shape"),
        ({name: tensor.flatten()}, "codebooks.1 of .* has the shape"),
        ({missing: None}, f"lacks the weights \\['{missing}'\\]"),
        ({"stranger": torch.zeros(2)}, "has no use for the weights \\['stranger'\\]"),
        ({name: tensor.int()}, "'codebooks.1' of .* is of type I32"),
        ({name: tensor.new_full(tensor.shape, float("nan"))}, "codebooks.1 of .* holds NaN or infinite values"),
        ({name: tensor.new_full(tensor.shape, -float("inf"))}, "codebooks.1 of .* holds NaN or infinite values"),
    ):
        edit_tensors(folder, **tensors)
        refused(cls, folder, match)
        (folder / "model.safetensors").write_bytes(whole)
    if cls is RQVAE:
        edit_tensors(folder, input_scale=torch.zeros(()))
        refused(cls, folder, "not fitted")


def test_damaged_safetensors(case):
    cls, folder, _, _ = case
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])

    def with_header(changed):
        text = json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + length :]

    def with_entry(**entry):
        return with_header(header | {"codebooks.0": header["codebooks.0"] | entry})

    for content in (
        b"",
        whole[:7],
        whole[: length // 2],
        whole[:-1],
        whole + b"\0",
        (2**62).to_bytes(8, "little") + whole[8:],
        with_entry(shape=[10**9, 10**9]),
        with_entry(shape=[-8, -5]),
        with_entry(data_offsets=[0, 2**63]),
        with_entry(data_offsets=[-8, 152]),
        with_entry(dtype="F8_E4M3"),
    ):
        path.write_bytes(content)
        refused(cls, folder, "model.safetensors of .* is not readable safetensors")


def test_sharded_indices(case, tmp_path):
    cls, _, quantizer, _ = case
    folder = tmp_path / "sharded"
    quantizer.save_pretrained(folder, max_shard_size=100)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shutil.copy(next(folder.glob("*.safetensors")), tmp_path / "x.safetensors")
    for shard in ("../x.safetensors", str(tmp_path / "x.safetensors"), "pytorch_model.bin", "..", "", 3, None, ["x"]):
        changed = content["weight_map"] | {"codebooks.0": shard}
        index.write_text(json.dumps(content | {"weight_map": changed}))
        refused(cls, folder, "names .* which is no part of a saved model")
    for weight_map in ({}, [], "x", None):
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused(cls, folder, "names no files")
    many = {f"k{at}": f"model-{at % 10**5:05}-of-{at // 10**5:05}.safetensors" for at in range(10**5)}
    index.write_text(json.dumps({"weight_map": many}))
    refused(cls, folder, "names 100000 files, more than the 2048 that are accepted")
    index.write_text(json.dumps(content))
    first = sorted(folder.glob("*.safetensors"))[0]
    moved = first.read_bytes()
    first.unlink()
    refused(cls, folder, f"{first.name} of .* is missing")
    first.write_bytes(moved)
    sorted(folder.glob("*.safetensors"))[1].write_bytes(moved)
    refused(cls, folder, "is in more than one file")
