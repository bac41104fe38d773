"""`publish_run`: from a run's folder to repositories, Spaces and a collection, checked before, completed after a failure."""

import json
import os
import shutil
import traceback

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rqsid import (
    ProductCatalog,
    ResidualQuantizer,
    ResidualQuantizerConfig,
    SIDTokenizer,
    TokenPruning,
    initialize_sid_rows,
    load_lora,
    search,
)
from rqsid.modeling.pipeline import SIDRetrievalPipeline
from rqsid.trainer import add_lora, save_lora
from rqsid.trainer.publishing import publish_run

EXAMPLES = [{"query": "potato chips", "history": ["p3", "p4"]}, {"query": "milk"}]
BAICHUAN_CODE = {"alibi.py", "configuration_baichuan.py", "modeling_baichuan.py", "norm_head.py"}
BOTH = {"metrics": True, "collection": "Semantic IDs", "codebook_id": "org/codes"}


def make_tokenizer(base, seed=0):
    random = np.random.default_rng(seed)
    quantizer = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=[8, 8, 8], num_iterations=2))
    quantizer.fit(random.standard_normal((100, 6), dtype=np.float32))
    codes = random.integers(0, 8, (40, 3))
    pruning = TokenPruning("top_k", layer=1, top_k=3).fit(codes, [8, 8, 8])
    catalog = ProductCatalog.build([f"p{row}" for row in range(40)], codes, [8, 8, 8], pruning)
    return SIDTokenizer.from_base(base, catalog, quantizer)


@pytest.fixture(scope="module")
def tokenizer(base_tokenizer):
    return make_tokenizer(base_tokenizer)


@pytest.fixture(scope="module")
def run(tokenizer, make_tiny_model, tmp_path_factory):
    """The folder of a training, with what else a training leaves there."""
    model = make_tiny_model(tokenizer.base_size)
    initialize_sid_rows(model, tokenizer, seed=1)
    folder = tmp_path_factory.mktemp("runs") / "my-model.v2"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("checkpoint-10/optimizer.pt", "runs/events.out", "_tmp/x", "training_args.bin", "purchases.parquet"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"secret")
    (folder / "notes.py").write_text("not of the model")
    return folder


@pytest.fixture(autouse=True)
def no_figures(request, monkeypatch):
    """As without matplotlib, which takes longer than all else, where a test does not ask for figures."""
    if "figures" not in request.node.name:

        def plot_layers(*args, **kwargs):
            raise ImportError("no matplotlib")

        monkeypatch.setattr("rqsid.sid_tokenizer.card_sections.plot_layers", plot_layers)


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def snapshot(folder):
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def edit(path, **values):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **values}))


families = pytest.mark.parametrize(
    "base_tokenizer, make_tiny_model",
    [("llama", "llama"), ("qwen", "qwen"), ("llama", "baichuan")],
    indirect=True,
    scope="module",
)
on_one = pytest.mark.parametrize(
    "base_tokenizer, make_tiny_model", [("llama", "llama")], indirect=True, scope="module"
)


@families
def test_a_whole_run(hub, hub_client, run, tokenizer, request):
    family = request.node.callspec.params["make_tiny_model"]
    before = snapshot(run)
    published = publish_run(run, "org/shop", **BOTH, tag="v1", license="apache-2.0", private=True)
    assert snapshot(run) == before
    assert list(published) == ["codebook", "sid_retrieval", "sid_distribution", "model", "collection"]
    kinds = {"org/shop": "model", "org/codes": "model", "org/sid_retrieval": "space", "org/sid_distribution": "space"}
    for name, entry in list(published.items())[:-1]:
        kind = kinds[entry["id"]]
        commits = hub.commits(entry["id"], repo_type=kind)
        assert commits[0]["id"] == entry["commit"] and len(commits) == 1, name
        assert entry["url"].startswith(hub.endpoint) and hub_client.repo_info(entry["id"], repo_type=kind).private
    for name in ("org/shop", "org/codes"):
        assert hub.refs(name)["tags"]["v1"] == hub.commits(name)[0]["id"]

    # 1. what is there: what the folder and the pipeline hold, and nothing else
    files = hub.files("org/shop")
    model = AutoModelForCausalLM.from_pretrained(run)
    saved = run.parent / "as-the-pipeline"
    SIDRetrievalPipeline(model, tokenizer).save_pretrained(saved)
    expected = {path.name for path in saved.iterdir()} | {"README.md"}
    assert {name for name in files if "/" not in name} - {".gitattributes"} == expected
    assert files["config.json"] == (saved / "config.json").read_bytes()
    assert {name for name in files if "/" in name} <= {
        f"custom_generate/{name}" for name in [*expected, "generate.py"]
    }
    assert (family == "baichuan") == (BAICHUAN_CODE <= set(files))
    assert b"org/shop" in files["custom_generate/README.md"] and str(run).encode() not in b"".join(files.values())
    shutil.rmtree(saved)

    # 2. the collection, the model first
    collection = hub_client.get_collection(published["collection"]["id"])
    ids = ["org/shop", "org/codes", "org/sid_retrieval", "org/sid_distribution"]
    assert [item.item_id for item in collection.items] == ids and collection.private
    assert all(item.note for item in collection.items)
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "apache-2.0" and "generative-retrieval" in card.data.tags
    assert card.data["sid_codebook"] == {"repo": "org/codes", "revision": published["codebook"]["commit"]}
    assert "[org/codes](https://huggingface.co/org/codes)" in card.text

    # 3. the same call again changes nothing
    uploaded = hub.uploaded_bytes
    assert publish_run(run, "org/shop", **BOTH, tag="v1", license="apache-2.0", private=True) == published
    assert hub.uploaded_bytes == uploaded

    # 4. and it loads
    shop = SIDTokenizer.from_pretrained("org/shop", revision="v1")
    loaded = AutoModelForCausalLM.from_pretrained("org/shop", revision=published["model"]["commit"])
    expected = search(model, tokenizer, EXAMPLES, top_k=5)
    assert search(loaded, shop, EXAMPLES, top_k=5) == expected
    codes = ResidualQuantizer.from_pretrained("org/codes")
    embeddings = np.random.default_rng(5).standard_normal((20, 6), dtype=np.float32)
    assert (codes.encode(embeddings) == tokenizer.quantizer.encode(embeddings)).all()


@pytest.mark.slow
@on_one
def test_figures_lie_beside_the_cards(hub, hub_client, run, copy):
    publish_run(copy, "org/shop", metrics=False)
    assert "![Codes of each layer by frequency](sid_layers.png)" in hub.files("org/shop")["README.md"].decode()
    assert hub.files("org/shop")["sid_layers.png"].startswith(b"\x89PNG")


@on_one
def test_what_is_asked_for_and_nothing_else(hub, hub_client, run, monkeypatch):
    published = publish_run(run, "shop", metrics=False, revision="trial", commit_message="First")
    assert list(published) == ["model"] and published["model"]["id"] == "alice/shop"
    assert set(hub.files("alice/shop")) <= {".gitattributes", "README.md"}
    assert "config.json" in hub.files("alice/shop", revision="trial")
    assert hub.commits("alice/shop", revision="trial")[0]["message"] == "First"
    before = snapshot(run)
    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(ValueError, match="alice/shop cannot be the repository of the model and of the codebooks"):
        publish_run(run, "alice/shop", codebook_id="shop")
    published = publish_run(run, "alice/shop", space_namespace="org")
    assert snapshot(run) == before
    assert hub.files("alice/shop") == hub.files("alice/shop", revision="trial")
    assert [entry["id"] for entry in published.values()] == ["org/sid_retrieval", "org/sid_distribution", "alice/shop"]


def no_links(*args, **kwargs):
    raise OSError("another disk")


@on_one
def test_a_failure_is_completed_by_the_same_call(hub, hub_client, run):
    """Wherever the Hub fails: what is there loads, or is not there; and nothing is uploaded twice."""
    hub.fail(status=500, path=r".*/models/org/shop/commit/.*", times=20)
    with pytest.raises(ConnectionError, match="org/shop"):
        publish_run(run, "org/shop", **BOTH)
    assert set(hub.files("org/shop")) <= {".gitattributes", "README.md"}
    assert "model.safetensors" in hub.files("org/codes")
    assert hub_client.list_collections(owner="org") == [] or not list(hub_client.list_collections(owner="org"))
    uploaded, codes = hub.uploaded_bytes, hub.commits("org/codes")
    hub.stop_failing()
    hub.fail(status=403, path=r".*/api/collections.*", times=1, message="no collections for you")
    with pytest.raises(PermissionError, match="collection 'Semantic IDs'.*no collections for you"):
        publish_run(run, "org/shop", **BOTH)
    weights = os.path.getsize(run / "model.safetensors")
    assert hub.commits("org/codes") == codes
    after = hub.uploaded_bytes
    published = publish_run(run, "org/shop", **BOTH)
    assert hub.uploaded_bytes == after and len(hub_client.get_collection(published["collection"]["id"]).items) == 4
    assert after - uploaded < weights + sum(
        len(content) for name, content in hub.files("org/shop").items() if not name.endswith(".safetensors")
    )


@on_one
def test_what_an_earlier_push_left_is_gone(hub, hub_client, run, copy):
    """One file of weights after several, another card after the folder's own, no adapter beside a model."""
    model = AutoModelForCausalLM.from_pretrained(copy)
    os.remove(copy / "model.safetensors")
    model.save_pretrained(copy, max_shard_size="40KB")
    assert len(list(copy.glob("model-*.safetensors"))) > 1
    (copy / "pictures").mkdir()
    (copy / "pictures" / "loss.png").write_bytes(b"picture")
    base = copy / "base"
    text = f"---\nlicense: mit\nbase_model: {base}\n---\n\n# Ours\n\n![loss](pictures/loss.png) ![no](../../x.png)\n"
    (copy / "README.md").write_text(text)
    publish_run(copy, "org/shop", metrics=False)
    files = hub.files("org/shop")
    assert {"model.safetensors.index.json", "pictures/loss.png"} <= set(files) and "model.safetensors" not in files
    card = ModelCard(files["README.md"].decode())
    assert card.text.strip().startswith("# Ours") and card.data.license == "mit" and card.data.base_model is None
    assert (copy / "README.md").read_text() == text
    HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="adapter_config.json", repo_id="org/shop")
    publish_run(run, "org/shop", metrics=False)
    files = hub.files("org/shop")
    assert not {"adapter_config.json", "model.safetensors.index.json"} & set(files) and "model.safetensors" in files
    assert not [name for name in files if name.startswith("model-")]


@on_one
def test_folders_that_are_not_whole(hub, hub_client, copy, base_tokenizer):
    """Named before anything is sent."""

    def refused(match, error=ValueError, **options):
        with pytest.raises(error, match=match) as raised:
            publish_run(copy, "org/shop", **({"codebook_id": "org/codes"} | options))
        assert "\n" not in str(raised.value)

    config, weights = (copy / "config.json").read_text(), (copy / "model.safetensors").read_bytes()
    # 1. another codebook, by name
    other, own = make_tokenizer(base_tokenizer, seed=3), SIDTokenizer.from_pretrained(copy)
    other.save_pretrained(copy)
    refused(
        f"rows for the SID tokens of codebook {own.codebook_fingerprint()}.*codebook {other.codebook_fingerprint()}"
    )
    own.save_pretrained(copy)
    edit(copy / "config.json", sid_codebook=None)
    refused("has no rows for SID tokens")
    # 2. weights and config
    (copy / "config.json").write_text(config)
    edit(copy / "config.json", vocab_size=len(own) - 1)
    refused("rows of embeddings.*vocab_size")
    (copy / "config.json").write_text("{")
    refused("config.json is not valid JSON")
    (copy / "config.json").write_text(config)
    (copy / "model.safetensors").write_bytes(weights[:-7])
    refused("model.safetensors cannot be read")
    os.remove(copy / "model.safetensors")
    refused("neither model.safetensors nor")
    tensors = {"model.embed_tokens.weight": np.zeros((len(own), 4), dtype=np.float32)}
    index = {"weight_map": dict.fromkeys([*tensors, "lm_head.weight"], "model-00001-of-00001.safetensors")}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("names model-00001-of-00001.safetensors, which is not there")
    save_file(
        {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, copy / "model-00001-of-00001.safetensors"
    )
    refused("no file holds lm_head.weight")
    os.remove(copy / "model.safetensors.index.json")
    (copy / "model.safetensors").write_bytes(weights)
    # 3. the tokenizer
    catalog = (copy / "sid_catalog.safetensors").read_bytes()
    (copy / "sid_catalog.safetensors").write_bytes(catalog[:-1])
    refused("sid_catalog.safetensors")
    (copy / "sid_catalog.safetensors").write_bytes(catalog)
    os.rename(copy / "catalog.py", copy / "hidden")
    edit(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": ["gone.SIDTokenizer", None]})
    refused("names gone.py, which is not there")
    own.save_pretrained(copy)
    # 4. names
    refused("org/shop cannot be the repository", codebook_id="org/shop")
    refused("Repo id", codebook_id="org/a/b")
    refused("empty title", collection=" ")
    # 5. no model, or two
    (copy / "adapter_config.json").write_text("{}")
    refused("holds an adapter .* and a model")
    os.remove(copy / "adapter_config.json")
    os.remove(copy / "config.json")
    refused("has no config.json")
    os.remove(copy / "sid_manifest.json")
    refused("has no sid_manifest.json.*checkpoint-10")
    shutil.rmtree(copy)
    refused("There is no folder")
    assert not hub.requests


@on_one
def test_an_imported_index_has_no_codebooks(hub, hub_client, base_tokenizer, make_tiny_model, tmp_path):
    codes = np.random.default_rng(0).integers(0, 8, (40, 3))
    catalog = ProductCatalog.build([f"p{row}" for row in range(40)], codes, [8, 8, 8])
    tokenizer = SIDTokenizer.from_base(base_tokenizer, catalog)
    model = make_tiny_model(tokenizer.base_size)
    initialize_sid_rows(model, tokenizer)
    model.save_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match="has no quantizer"):
        publish_run(tmp_path / "run", "org/shop", codebook_id="org/codes")
    assert not hub.requests
    publish_run(tmp_path / "run", "org/shop", metrics=False)
    assert len(SIDTokenizer.from_pretrained("org/shop").catalog) == 40


@on_one
def test_an_adapter(hub, hub_client, tokenizer, make_tiny_model, tmp_path):
    """As an adapter, on a base that others can load, without code for a model that is not there."""
    base = make_tiny_model(tokenizer.base_size)
    base.save_pretrained(tmp_path / "base")
    HfApi().create_repo("org/base")
    HfApi().upload_folder(folder_path=tmp_path / "base", repo_id="org/base")
    model = AutoModelForCausalLM.from_pretrained("org/base")
    initialize_sid_rows(model, tokenizer, seed=1)
    adapted = add_lora(model, tokenizer, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)).eval()
    run = tmp_path / "run"
    save_lora(adapted, run)
    tokenizer.save_pretrained(run)
    expected = search(adapted, tokenizer, EXAMPLES, top_k=5)

    edit(run / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    with pytest.raises(ValueError, match="was trained on .*base, which nobody else can load"):
        publish_run(run, "org/adapter")
    edit(run / "adapter_config.json", base_model_name_or_path="org/base")
    published = publish_run(run, "org/adapter", codebook_id="org/codes", metrics=False, collection="Adapters")
    assert list(published) == ["codebook", "adapter", "collection"]
    files = hub.files("org/adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "sid_adapter.json", "sid_catalog.safetensors"} <= set(
        files
    )
    assert not [name for name in files if name.startswith(("custom_generate", "pipeline", "config.json"))]
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "org/base" and card.data.library_name == "peft" and "load_lora" in card.text
    loaded = load_lora("org/adapter").eval()
    found = search(loaded, SIDTokenizer.from_pretrained("org/adapter"), EXAMPLES, top_k=5)
    assert [[hit["sid"] for hit in hits] for hits in found] == [[hit["sid"] for hit in hits] for hits in expected]

    tensors = load_file(run / "adapter_model.safetensors")
    (run / "adapter_model.safetensors").write_bytes((run / "adapter_model.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match="adapter_model.safetensors cannot be read"):
        publish_run(run, "org/adapter")
    save_file(tensors, run / "adapter_model.safetensors")
    edit(run / "sid_adapter.json", sid_codebook="0123456789abcdef")
    with pytest.raises(ValueError, match="codebook 0123456789abcdef, the tokenizer beside it has codebook"):
        publish_run(run, "org/adapter")


@on_one
def test_no_token_shows(hub, hub_client, run, caplog):
    with pytest.raises(PermissionError, match="rejected the token") as raised:
        publish_run(run, "org/shop", token="hf_" + "x" * 30, metrics=False)
    assert "hf_xxx" not in "".join(traceback.format_exception(raised.value))
    with pytest.raises(PermissionError) as raised:
        publish_run(run, "org/shop", token=hub.read_token, codebook_id="org/codes")
    assert "\n" not in str(raised.value) and hub.read_token not in "".join(traceback.format_exception(raised.value))
    published = publish_run(run, "org/shop", token=hub.token, **BOTH)
    texts = [str(published), caplog.text, *map(str, hub.files("org/shop").values())]
    assert not any(hub.token in text for text in texts)
