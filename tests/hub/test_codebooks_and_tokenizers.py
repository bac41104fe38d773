"""Codebooks and tokenizers go to the Hub and come back bit for bit, with cards that say what they are."""

import json
import logging
import os
import traceback
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from published_parts import PRODUCTS, SIZES, card_of
from transformers import AutoModel, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_import_files

from rqsid import (
    RQVAE,
    ResidualQuantizer,
    SIDTokenizer,
    diagnose,
)
from rqsid.sid_tokenizer import codebook_files, pretrained_tokenizer, tokenization_sid
from rqsid.sid_tokenizer.card_sections import (
    diagnose_catalog,
    layout_section,
)
from rqsid.sid_tokenizer.codebook_version import codebook_version

pytestmark = pytest.mark.usefixtures("quick_figures")
MODEL_CARD = "---\nlicense: mit\ntags:\n- finetuned\n---\n# A model, and what I think of it\r\n"

one_base = pytest.mark.parametrize("base_tokenizer", ["llama"], indirect=True)
each_base = pytest.mark.parametrize("base_tokenizer", ["llama", "qwen"], indirect=True)


def same_parameters(one, other):
    return one.state_dict().keys() == other.state_dict().keys() and all(
        torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items()
    )


def same_tokenizers(one, other):
    texts = ["potato chips salted", " two  spaces", "ünï <a_1> </s>"]
    return (
        one.encode_products(PRODUCTS) == other.encode_products(PRODUCTS)
        and one.encode_text(texts) == other.encode_text(texts)
        and one.encode_prompts([{"history": ["p1", "p7"], "query": "milk"}])
        == other.encode_prompts([{"history": ["p1", "p7"], "query": "milk"}])
        and one.catalog.version_id == other.catalog.version_id
        and one.codebook_fingerprint() == other.codebook_fingerprint()
    )


@pytest.mark.parametrize("kind", ["kmeans", "priced", "rqvae"])
def test_codebooks_go_and_come_back(hub, hub_client, quantizers, embeddings, kind):
    quantizer = quantizers[kind]
    diagnosis = diagnose(quantizer.encode(embeddings), SIZES)
    commit = quantizer.push_to_hub(
        "alice/codebook", diagnosis=diagnosis, license="apache-2.0", tags=["grocery"], tag="v1", private=True
    )
    assert len(hub.commits("alice/codebook")) == 1
    files = hub.files("alice/codebook")
    assert set(files) - {".gitattributes"} == {"README.md", "config.json", "model.safetensors", "sid_layers.png"}
    assert hub.refs("alice/codebook")["tags"] == {"v1": commit.oid}

    with pytest.raises(ValueError, match="neither a folder alice/codebook here nor such a repository") as caught:
        type(quantizer).from_pretrained("alice/codebook", token=hub.stranger_token)
    assert hub.stranger_token not in repr(caught.value) and caught.value.__context__ is None
    loaded = type(quantizer).from_pretrained("alice/codebook", revision="v1")
    assert same_parameters(loaded, quantizer) and loaded.name_or_path == "alice/codebook"
    assert (loaded.encode(embeddings) == quantizer.encode(embeddings)).all()
    assert codebook_version(loaded) == codebook_version(quantizer)
    assert same_parameters(AutoModel.from_pretrained("alice/codebook"), quantizer)

    card = card_of(hub, "alice/codebook")
    card.validate()
    assert (card.data.library_name, card.data.license) == ("rqsid", "apache-2.0")
    assert {"semantic-ids", "residual-quantization", "generative-retrieval", "grocery"} == set(card.data.tags)
    text = card.content
    assert diagnosis.to_markdown() in text and "![Codes of each layer by frequency](sid_layers.png)" in text
    for part in (
        codebook_version(quantizer),
        "8 + 6 + 4",
        "kuai-etal-2024-breaking",
        "10.18653/v1/2024",
        "| `metric` |",
    ):
        assert part in text
    # The card's own lines work.
    namespace = {"embeddings": embeddings, "print": None}
    exec(text.split("```python\n")[1].split("```")[0], namespace)  # noqa: S102
    assert (namespace["codes"] == quantizer.encode(embeddings)).all()

    # The same again is no commit, and sends nothing.
    sent, commits = hub.uploaded_bytes, hub.commits("alice/codebook")
    assert (
        quantizer.push_to_hub("alice/codebook", diagnosis=diagnosis, license="apache-2.0", tags=["grocery"]).oid
        == commit.oid
    )
    assert hub.uploaded_bytes == sent and hub.commits("alice/codebook") == commits

    # Without a diagnosis, the figure goes as well; in shards, so does the one file.
    quantizer.push_to_hub("alice/codebook", max_shard_size=200)
    names = set(hub.files("alice/codebook"))
    assert not names & {"sid_layers.png", "model.safetensors"} and "model.safetensors.index.json" in names
    assert same_parameters(type(quantizer).from_pretrained("alice/codebook"), quantizer)
    quantizer.push_to_hub("alice/codebook")
    assert {name for name in hub.files("alice/codebook") if "model" in name} == {"model.safetensors"}
    with pytest.raises(ValueError, match=r"The diagnosis is of codebooks \[9, 9\]"):
        quantizer.push_to_hub("alice/codebook", diagnosis=diagnose(np.zeros((3, 2), dtype=int), [9, 9]))
    assert hub.unknown_requests == []


def test_branches_pull_requests_and_saves_that_push(hub, hub_client, quantizers, embeddings, tmp_path):
    one, other = quantizers["kmeans"], quantizers["priced"]
    one.save_pretrained(tmp_path / "grocery", push_to_hub=True, repo_id="org/codebook", tags=["grocery"])
    pinned = hub.commits("org/codebook")[0]["id"]
    other.save_pretrained(
        tmp_path / "priced", push_to_hub=True, repo_id="org/codebook", revision="priced", commit_message="Prices"
    )
    assert hub.commits("org/codebook", revision="priced")[0]["message"] == "Prices"
    assert same_parameters(ResidualQuantizer.from_pretrained("org/codebook"), one)
    assert same_parameters(ResidualQuantizer.from_pretrained("org/codebook", revision="priced"), other)
    assert "README.md" not in os.listdir(tmp_path / "grocery")

    request = other.push_to_hub("org/codebook", create_pr=True, commit_description="With prices")
    assert request.pr_url.endswith("/discussions/1")
    assert hub.commits("org/codebook")[0]["id"] == pinned
    assert same_parameters(ResidualQuantizer.from_pretrained("org/codebook", revision="refs/pr/1"), other)

    # main moves; what was pinned stays
    other.push_to_hub("org/codebook")
    assert same_parameters(ResidualQuantizer.from_pretrained("org/codebook"), other)
    assert same_parameters(ResidualQuantizer.from_pretrained("org/codebook", revision=pinned), one)

    # The folder's name, and the user's namespace.
    one.save_pretrained(tmp_path / "grocery", push_to_hub=True)
    assert 'from_pretrained("alice/grocery")' in card_of(hub, "alice/grocery").content
    with pytest.raises(ValueError, match="has no codebooks yet"):
        ResidualQuantizer().push_to_hub("alice/nothing")
    with pytest.raises(ValueError, match="model_type 'rqsid_residual_quantizer', not 'rqsid_rqvae'"):
        RQVAE.from_pretrained("alice/grocery")


def test_codebooks_do_not_replace_a_model(hub, hub_client, quantizers):
    hub_client.create_repo("alice/model")
    for name, content in (("model-00001-of-00002.safetensors", "weights"), ("config.json", '{"model_type": "llama"}')):
        hub_client.upload_file(repo_id="alice/model", path_in_repo=name, path_or_fileobj=content.encode())
    before = hub.files("alice/model")
    with pytest.raises(ValueError, match="alice/model holds a model .*model_type='llama'.* repository of their own"):
        quantizers["kmeans"].push_to_hub("alice/model")
    for content in (b'{"a": 1}', b"not JSON"):
        hub_client.upload_file(repo_id="alice/model", path_in_repo="config.json", path_or_fileobj=content)
        with pytest.raises(ValueError, match="alice/model holds a model .*model_type=None"):
            quantizers["kmeans"].push_to_hub("alice/model")
    assert hub.files("alice/model") == before | {"config.json": b"not JSON"}
    quantizers["kmeans"].push_to_hub("alice/codebook")
    quantizers["rqvae"].push_to_hub("alice/codebook")
    assert same_parameters(RQVAE.from_pretrained("alice/codebook"), quantizers["rqvae"])


def test_codebooks_that_are_not_there_or_cannot_be_asked_for(hub, hub_client, quantizers, tmp_path):
    quantizers["kmeans"].push_to_hub("alice/codebook", tag="v1")
    hub.fail(status=503, path="/resolve/.*model", times=None)
    with pytest.raises(ConnectionError, match="model.safetensors of alice/codebook is not in the cache, and the Hub"):
        ResidualQuantizer.from_pretrained("alice/codebook")
    hub.stop_failing()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConnectionError, match="could not be loaded .Not a directory: .*file"):
        ResidualQuantizer.from_pretrained("alice/codebook", cache_dir=tmp_path / "file")

    # A configuration of a newer version is refused by AutoModel as well.
    config = json.loads(hub.files("alice/codebook")["config.json"]) | {"temperature": 2}
    hub_client.upload_file(
        repo_id="alice/codebook", path_in_repo="config.json", path_or_fileobj=json.dumps(config).encode()
    )
    for load in (ResidualQuantizer.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match="config.json of alice/codebook has 'temperature', which this version"):
            load("alice/codebook")
    assert same_parameters(AutoModel.from_pretrained("alice/codebook", revision="v1"), quantizers["kmeans"])


@one_base
def test_revisions_and_subfolders_in_any_cache(hub, hub_client, make_tokenizer, base_tokenizer, quantizers, tmp_path):
    tokenizer, changed = make_tokenizer(), make_tokenizer()
    tokenizer.push_to_hub("alice/catalog", tag="v1")
    changed.catalog.withdraw(["p1"])
    changed.push_to_hub("alice/catalog")
    # As a cache's own folders are called.
    cache = tmp_path / "snapshots" / "today"
    for load in (SIDTokenizer.from_pretrained, AutoTokenizer.from_pretrained):
        assert load("alice/catalog", revision="v1", cache_dir=cache).catalog.version == 1
        assert load("alice/catalog", cache_dir=cache).catalog.version == 2

    tokenizer.save_pretrained(tmp_path / "both" / "catalog")
    quantizers["priced"].save_pretrained(tmp_path / "both" / "codebook")
    hub_client.create_repo("alice/both")
    hub_client.upload_folder(repo_id="alice/both", folder_path=tmp_path / "both")
    for name in ("alice/both", tmp_path / "both"):
        for load in (SIDTokenizer.from_pretrained, AutoTokenizer.from_pretrained):
            assert same_tokenizers(load(name, subfolder="catalog", cache_dir=cache), tokenizer)
        for load in (ResidualQuantizer.from_pretrained, AutoModel.from_pretrained):
            assert same_parameters(load(name, subfolder="codebook", cache_dir=cache), quantizers["priced"])


@one_base
def test_what_only_pushes_need_does_not_travel(hub, hub_client, make_tokenizer, base_tokenizer, tmp_path):
    files = {Path(path).stem for path in get_relative_import_files(tokenization_sid.__file__)}
    assert {"bundle", "hub_files", "pretrained_codebook"} < files
    assert not files & {"hub", "card_push", "card_sections", "tokenizer_card", "codebook_card", "diagnosis", "figures"}
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "saved")
    travelled = get_class_from_dynamic_module("tokenization_sid.SIDTokenizer", tmp_path / "saved")
    assert travelled is not SIDTokenizer
    remote = travelled.from_pretrained(tmp_path / "saved")
    assert same_tokenizers(remote, tokenizer)
    for push in (remote.push_to_hub, remote.quantizer.push_to_hub):
        with pytest.raises(ImportError, match="Pushing takes rqsid, .* Or save to a folder"):
            push("alice/catalog")
    remote.save_pretrained(tmp_path / "again")
    assert same_tokenizers(SIDTokenizer.from_pretrained(tmp_path / "again"), tokenizer)


@each_base
def test_tokenizers_go_and_come_back(hub, hub_client, make_tokenizer, base_tokenizer, quantizers):
    tokenizer = make_tokenizer()
    commit = tokenizer.push_to_hub("alice/catalog", license="mit", tags=["grocery"], tag="v1", private=True)
    assert len(hub.commits("alice/catalog")) == 1 and hub.refs("alice/catalog")["tags"] == {"v1": commit.oid}
    files = hub.files("alice/catalog")
    assert {"tokenizer.json", "sid_manifest.json", "sid_codebook.safetensors", "sid_layers.png", "README.md"} < set(
        files
    )
    loaded = SIDTokenizer.from_pretrained("alice/catalog")
    assert same_tokenizers(loaded, tokenizer) and same_parameters(loaded.quantizer, quantizers["kmeans"])
    assert same_tokenizers(tokenizer, make_tokenizer())  # a push leaves it as it was

    card = card_of(hub, "alice/catalog")
    card.validate()
    assert (card.data.library_name, card.data.license) == ("rqsid", "mit") and "grocery" in card.data.tags
    assert layout_section(tokenizer) in card.content
    assert diagnose_catalog(tokenizer.catalog).to_markdown() in card.content
    namespace = {"product_ids": PRODUCTS}
    exec(card.content.split("```python\n")[1].split("```")[0], namespace)  # noqa: S102
    assert namespace["token_ids"] == tokenizer.encode_products(PRODUCTS)

    sent = hub.uploaded_bytes
    assert tokenizer.push_to_hub("alice/catalog", license="mit", tags=["grocery"]).oid == commit.oid
    assert loaded.push_to_hub("alice/catalog", license="mit", tags=["grocery"]).oid == commit.oid
    assert hub.uploaded_bytes == sent

    # A pinned revision stays while main moves, and a new version sends only what changed.
    loaded.catalog.withdraw(["p3"])
    loaded.push_to_hub("alice/catalog")
    assert hub.uploaded_bytes - sent < len(files["tokenizer.json"])
    assert SIDTokenizer.from_pretrained("alice/catalog").catalog.version == 2
    for revision in ("v1", commit.oid):
        assert same_tokenizers(SIDTokenizer.from_pretrained("alice/catalog", revision=revision), tokenizer)

    # A later bundle without codebooks leaves none behind.
    bare = make_tokenizer(quantizer=False)
    bare.push_to_hub("alice/catalog")
    assert "sid_codebook.safetensors" not in hub.files("alice/catalog")
    assert SIDTokenizer.from_pretrained("alice/catalog").quantizer is None
    assert hub.unknown_requests == []


@one_base
def test_a_models_repository_keeps_its_files_and_card(hub, hub_client, make_tokenizer, base_tokenizer):
    tokenizer = make_tokenizer()
    hub_client.create_repo("alice/model")
    for name, content in (("README.md", MODEL_CARD), ("model.safetensors", "weights"), ("config.json", '{"a": 1}')):
        hub_client.upload_file(repo_id="alice/model", path_in_repo=name, path_or_fileobj=content.encode())
    hub_client.upload_file(repo_id="alice/model", path_in_repo="chat_template.jinja", path_or_fileobj=b"{{ old }}")
    others = ("sid_layers.png", "sid_adapter.json", "sid_trie.safetensors")
    for name in others:
        hub_client.upload_file(repo_id="alice/model", path_in_repo=name, path_or_fileobj=b"the model's")
    before = hub.files("alice/model")
    tokenizer.push_to_hub("alice/model")
    after = hub.files("alice/model")
    for name in ("README.md", "model.safetensors", "config.json", *others):
        assert after[name] == before[name], name
    assert "chat_template.jinja" not in after  # which transformers would use
    assert same_tokenizers(SIDTokenizer.from_pretrained("alice/model"), tokenizer)
    tokenizer.push_to_hub("alice/model", tags=["finetuned", "grocery"], revision="tagged")
    card = card_of(hub, "alice/model", revision="tagged")
    assert card.data.tags == ["finetuned", "grocery"] and "# A model, and what I think of it\r\n" in card.content
    assert hub.files("alice/model")["README.md"] == MODEL_CARD.encode()
    hub_client.upload_file(repo_id="alice/model", path_in_repo="README.md", path_or_fileobj=b"no metadata")
    tokenizer.push_to_hub("alice/model")
    assert hub.files("alice/model")["README.md"] == b"no metadata"


@pytest.mark.parametrize("where", ["upload", "commit", "cut"])
@one_base
def test_a_push_that_dies_changes_nothing_and_is_completed(
    hub, hub_client, quantizers, make_tokenizer, base_tokenizer, where
):
    tokenizer = make_tokenizer()
    tokenizer.push_to_hub("alice/catalog")
    head = hub.commits("alice/catalog")[0]["id"]
    changed = SIDTokenizer.from_pretrained("alice/catalog")
    changed.catalog.withdraw(["p3"])
    if where == "upload":
        hub.fail(status=500, method="PUT", times=None)
    elif where == "commit":
        hub.fail(status=500, path="/commit/", times=None)
    else:
        hub.fail(method="POST", path="/commit/", cut_after=100, times=None)
    with pytest.raises(ConnectionError, match="did not come to its end .* run it again") as caught:
        changed.push_to_hub("alice/catalog")
    assert "\n" not in str(caught.value)
    hub.stop_failing()
    assert hub.commits("alice/catalog")[0]["id"] == head
    assert same_tokenizers(SIDTokenizer.from_pretrained("alice/catalog", force_download=True), tokenizer)

    before = len(hub.requests)
    changed.push_to_hub("alice/catalog")
    puts = [request for request in hub.requests[before:] if request.method == "PUT"]
    if where != "upload":
        assert puts == []  # what had been uploaded is not uploaded again
    assert SIDTokenizer.from_pretrained("alice/catalog").catalog.version_id == changed.catalog.version_id
    assert len(hub.commits("alice/catalog")) == 2


def test_two_pushers_at_once_leave_files_of_one(hub, hub_client, quantizers, embeddings, monkeypatch):
    one, other = quantizers["kmeans"], quantizers["priced"]
    one.push_to_hub("alice/codebook")
    create_commit, pushed = huggingface_hub.HfApi.create_commit, []

    def after_another(self, *args, **kwargs):
        if not pushed:
            pushed.append(True)
            one.push_to_hub("alice/codebook", tags=["one"], commit_message="In between")
        return create_commit(self, *args, **kwargs)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", after_another)
    other.push_to_hub("alice/codebook", commit_message="Late")
    assert 412 in [request.status for request in hub.requests]
    messages = [commit["message"] for commit in hub.commits("alice/codebook")]
    assert messages[:2] == ["Late", "In between"]
    assert same_parameters(ResidualQuantizer.from_pretrained("alice/codebook"), other)
    assert codebook_version(other) in card_of(hub, "alice/codebook").content
    assert same_parameters(
        ResidualQuantizer.from_pretrained("alice/codebook", revision=hub.commits("alice/codebook")[1]["id"]), one
    )


@one_base
def test_a_push_during_a_load_does_not_mix(hub, hub_client, quantizers, make_tokenizer, base_tokenizer, monkeypatch):
    one, other, tokenizer = quantizers["kmeans"], quantizers["priced"], make_tokenizer()
    one.push_to_hub("alice/codebook")
    tokenizer.push_to_hub("alice/catalog")
    changed = make_tokenizer()
    changed.catalog.withdraw(["p1"])

    find_file = codebook_files.find_file

    def and_then(push):
        def find(*args, **kwargs):
            found = find_file(*args, **kwargs)
            push()
            return found

        return find

    monkeypatch.setattr(codebook_files, "find_file", and_then(lambda: other.push_to_hub("alice/codebook")))
    assert same_parameters(ResidualQuantizer.from_pretrained("alice/codebook"), one)
    monkeypatch.setattr(pretrained_tokenizer, "find_file", and_then(lambda: changed.push_to_hub("alice/catalog")))
    assert same_tokenizers(SIDTokenizer.from_pretrained("alice/catalog"), tokenizer)
    monkeypatch.undo()


@one_base
def test_names_that_cannot_be_loaded(
    hub, hub_client, quantizers, make_tokenizer, base_tokenizer, tmp_path, monkeypatch
):
    make_tokenizer().push_to_hub("alice/catalog", private=True)
    hub_client.create_repo("alice/empty")
    hub_client.upload_file(repo_id="alice/empty", path_in_repo="pytorch_model.bin", path_or_fileobj=b"pickle")
    config = json.dumps({"model_type": "rqsid_residual_quantizer", "embedding_dim": 5, "codebook_sizes": [4]})

    def refuses(load, error, match):
        with pytest.raises(error, match=match) as caught:
            load()
        message = str(caught.value)
        assert "\n" not in message and len(message) < 400
        for token in (hub.token, hub.read_token, hub.stranger_token):
            assert token not in message and token not in repr(caught.value.__context__)

    load = SIDTokenizer.from_pretrained
    refuses(lambda: load("alice/nothing"), ValueError, "neither a folder alice/nothing here nor such a repository")
    refuses(lambda: load("alice/catalog", token=hub.stranger_token), ValueError, "neither a folder alice/catalog")
    refuses(lambda: load("alice/catalog", token="hf_" + "x" * 30), PermissionError, "rejected the token")
    refuses(lambda: load("alice/catalog", token=False), ValueError, "neither a folder alice/catalog")
    refuses(lambda: load("alice/catalog", revision="v9"), ValueError, "has no revision 'v9'")
    refuses(lambda: load("alice/empty"), ValueError, "alice/empty has no sid_manifest.json: it holds no SIDTokenizer")
    refuses(lambda: load(str(tmp_path)), ValueError, "There is no sid_manifest.json")
    refuses(lambda: load(tmp_path / "a" / "b" / "c"), ValueError, "neither a folder nor the name of a repository")
    refuses(lambda: ResidualQuantizer.from_pretrained("alice/empty"), ValueError, "alice/empty has no config.json")
    refuses(lambda: load("alice/catalog", local_files_only=True), ConnectionError, "local_files_only=True was passed")
    hub.fail(status=503, path="sid_manifest", times=None)
    refuses(
        lambda: load("alice/catalog"), ConnectionError, "is not in the cache, and the Hub cannot be reached|status 503"
    )
    hub.stop_failing()

    hub_client.upload_file(repo_id="alice/empty", path_in_repo="config.json", path_or_fileobj=config.encode())
    refuses(
        lambda: ResidualQuantizer.from_pretrained("alice/empty"),
        ValueError,
        "never from pickles such as pytorch_model",
    )
    assert not [
        request
        for request in hub.requests
        if request.method == "GET" and "resolve" in request.path and "pytorch" in request.path
    ]

    # From the cache, once it is there, with the read token and nothing else.
    quantizers["kmeans"].push_to_hub("alice/codebook", private=True)
    tokenizer = load("alice/catalog", token=hub.read_token)
    ResidualQuantizer.from_pretrained("alice/codebook", token=hub.read_token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert same_tokenizers(load("alice/catalog"), tokenizer)
    assert same_parameters(ResidualQuantizer.from_pretrained("alice/codebook"), quantizers["kmeans"])
    refuses(
        lambda: load("alice/never"),
        ConnectionError,
        "sid_manifest.json of alice/never is not in the cache, and HF_HUB_OFFLINE is set",
    )
    refuses(
        lambda: ResidualQuantizer.from_pretrained("alice/never"),
        ConnectionError,
        "config.json of alice/never is not in the cache",
    )
    assert len(hub.requests) == asked


@one_base
def test_tokens_stay_secret(
    hub, hub_client, quantizers, make_tokenizer, base_tokenizer, caplog, capsys, tmp_path, monkeypatch
):
    tokenizer = make_tokenizer()
    monkeypatch.delenv("HF_TOKEN")
    caplog.set_level(logging.DEBUG)
    logging.getLogger("transformers").propagate = logging.getLogger("huggingface_hub").propagate = True
    told = []
    for push in (quantizers["kmeans"].push_to_hub, tokenizer.push_to_hub):
        push("alice/secret", token=hub.token, private=True)
        push("alice/secret", token=hub.token, revision="branch", tags=["x"])
        for token, error in (
            (hub.stranger_token, (PermissionError, ValueError)),
            (hub.read_token, PermissionError),
            ("hf_" + "x" * 30, PermissionError),
            (None, PermissionError),
        ):
            with pytest.raises(error) as caught:
                push("alice/secret", token=token)
            told += traceback.format_exception(caught.value)
            assert "\n" not in str(caught.value)
    hub.fail(status=500, path="/commit/", times=None)
    changed = make_tokenizer()
    changed.catalog.withdraw(["p1"])
    with pytest.raises(ConnectionError) as caught:
        changed.push_to_hub("alice/secret", token=hub.token)
    told += traceback.format_exception(caught.value)
    hub.stop_failing()
    tokenizer.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="alice/secret", token=hub.token)
    SIDTokenizer.from_pretrained("alice/secret", token=hub.token).save_pretrained(tmp_path / "again")
    written = capsys.readouterr()
    told += [caplog.text, written.out, written.err]
    contents = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    contents += [*hub.files("alice/secret").values(), *hub.files("alice/secret", revision="branch").values()]
    for token in (hub.token, hub.read_token, hub.stranger_token, "hf_" + "x" * 30):
        assert not [text[max(0, text.find(token) - 200) : text.find(token) + 60] for text in told if token in text]
        assert not any(token.encode() in content for content in contents)
