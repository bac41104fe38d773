"""A push is one commit of one state, completed by pushing again; its errors are one line and hold no token."""

import os
import re

import huggingface_hub
import pytest
from huggingface_hub import HfApi

from rqsid.sid_tokenizer.hub import ATTEMPTS, hub_errors, push_folder

CARD = "---\nlicense: mit\ntags:\n- semantic-ids\n---\n# A codebook\n"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "code").mkdir(parents=True)
    write(folder, {"README.md": CARD, "config.json": "{}", "code/search.py": "1\n", "model.safetensors": "a" * 50_000})
    return folder


def write(folder, files):
    for name, text in files.items():
        (folder / name).write_text(text)


def texts(hub, **where):
    return {name: content.decode() for name, content in hub.files("alice/m", **where).items() if name[0] != "."}


def test_one_commit_and_none_where_nothing_has_changed(hub, hub_client, folder):
    write(folder, {".sid_lock": "x", "model.safetensors.4f.tmp": "half"})  # what saves leave is no part of it
    first = push_folder(str(folder), "alice/m", commit_message="A codebook", commit_description="Three layers")
    files = texts(hub)
    assert set(files) == {"README.md", "config.json", "code/search.py", "model.safetensors"}
    assert files["model.safetensors"] == "a" * 50_000
    newest, *_ = hub.commits("alice/m")
    assert newest["message"].startswith("A codebook") and newest["id"] == first.oid

    sent = hub.uploaded_bytes
    assert push_folder(str(folder), "alice/m").oid == first.oid
    assert hub.commits("alice/m")[0] == newest and hub.uploaded_bytes == sent

    write(folder, {"config.json": '{"a": 1}'})
    push_folder(str(folder), "alice/m")
    assert hub.uploaded_bytes == sent + len('{"a": 1}')


def test_stale_files_go_in_the_same_commit(hub, hub_client, folder):
    write(
        folder, {"model-00001-of-00002.safetensors": "1", "model-00002-of-00002.safetensors": "2", "notes.txt": "mine"}
    )
    push_folder(str(folder), "alice/m")
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "notes.txt"):
        (folder / name).unlink()
    commits = len(hub.commits("alice/m"))
    push_folder(str(folder), "alice/m", delete_patterns=["model*.safetensors"])
    assert set(texts(hub)) == {"README.md", "config.json", "code/search.py", "model.safetensors", "notes.txt"}
    assert len(hub.commits("alice/m")) == commits + 1


def test_branches_tags_pull_requests_and_private_repositories(hub, hub_client, folder, monkeypatch):
    first = push_folder(str(folder), "alice/m", private=True, tag="v1")
    write(folder, {"config.json": '{"version": 2}'})
    push_folder(str(folder), "alice/m", revision="next")
    assert texts(hub)["config.json"] == "{}" and texts(hub, revision="next")["config.json"] == '{"version": 2}'
    push_folder(str(folder), "alice/m", create_pr=True)
    assert texts(hub)["config.json"] == "{}"
    assert hub_client.repo_info("alice/m", revision="refs/pr/1").sha != first.oid

    requests = len(hub.requests)
    with pytest.raises(ValueError, match="has a tag 'v1' already.*published tags do not move"):
        push_folder(str(folder), "alice/m", revision="next", tag="v1")
    assert not any("/preupload/" in request.path for request in hub.requests[requests:])
    push_folder(str(folder), "alice/m", tag="v2")
    assert texts(hub, revision="v1")["config.json"] == "{}" and texts(hub, revision="v2")["config.json"] != "{}"
    push_folder(str(folder), "alice/m", tag="v2")  # once more: the same commit, so the same tag
    write(folder, {"config.json": '{"version": 3}'})
    with pytest.raises(ValueError, match="has a tag 'v2' already"):
        push_folder(str(folder), "alice/m", tag="v2")
    write(folder, {"config.json": '{"version": 2}', "model.safetensors": "b" * 50_000})
    with pytest.raises(ValueError, match="has a tag 'v2' already"):
        push_folder(str(folder), "alice/m", tag="v2")

    with pytest.raises(ValueError, match="create_pr=True opens a pull request against main"):
        push_folder(str(folder), "alice/m", create_pr=True, revision="next")
    monkeypatch.setenv("HF_TOKEN", hub.stranger_token)
    with pytest.raises((PermissionError, ValueError), match="alice/m"):
        push_folder(str(folder), "alice/m")


def test_a_branch_that_moves_is_compared_with_anew(hub, hub_client, folder, monkeypatch):
    """Otherwise a file that another push changed after it had been found unchanged would stay what that push made it."""
    push_folder(str(folder), "alice/m")
    stock, interruptions = HfApi.create_commit, []

    def interrupted(self, *args, **kwargs):
        if len(interruptions) < 2:
            interruptions.append(1)
            operation = huggingface_hub.CommitOperationAdd("model.safetensors", b"b" * len(interruptions))
            stock(hub_client, "alice/m", [operation], commit_message="somebody else")
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", interrupted)
    write(folder, {"config.json": '{"a": 1}'})
    push_folder(str(folder), "alice/m")
    assert texts(hub)["model.safetensors"] == "a" * 50_000 and texts(hub)["config.json"] == '{"a": 1}'

    monkeypatch.setattr(HfApi, "create_commit", stock)
    write(folder, {"config.json": '{"a": 2}'})
    hub.fail(status=412, path="/commit/", times=ATTEMPTS)
    with pytest.raises(ConnectionError, match="alice/m changed 5 times while it was being pushed to"):
        push_folder(str(folder), "alice/m")


@pytest.mark.parametrize(
    "fault", [{"status": 500, "path": "/commit/"}, {"cut_after": 100, "path": "/commit/"}], ids=["500", "cut"]
)
def test_a_push_that_broke_off_is_completed(hub, hub_client, folder, fault):
    push_folder(str(folder), "alice/m")
    before = texts(hub)
    write(folder, {"model.safetensors": "b" * 60_000, "config.json": '{"a": 1}'})
    hub.fail(**fault, times=100)
    with pytest.raises(ConnectionError, match="did not come to its end.*run it again") as caught:
        push_folder(str(folder), "alice/m")
    assert "\n" not in str(caught.value) and texts(hub) == before
    hub.faults.clear()
    sent = hub.uploaded_bytes
    push_folder(str(folder), "alice/m")
    assert texts(hub)["model.safetensors"] == "b" * 60_000
    assert hub.uploaded_bytes < sent + 10_000  # the large file was there already


def test_an_upload_that_broke_off_changes_nothing(hub, hub_client, folder):
    push_folder(str(folder), "alice/m")
    before = texts(hub)
    write(folder, {"model.safetensors": "b" * 60_000, "config.json": '{"a": 1}'})
    hub.fail(method="PUT", cut_after=20_000, times=100)
    with pytest.raises(ConnectionError, match="did not come to its end"):
        push_folder(str(folder), "alice/m")
    assert texts(hub) == before
    hub.faults.clear()
    push_folder(str(folder), "alice/m")
    assert texts(hub)["config.json"] == '{"a": 1}'


def test_busy_servers_are_waited_for(hub, hub_client, folder):
    hub.fail(status=429, method="PUT", retry_after=1, times=1)
    hub.fail(status=503, method="PUT", times=1)
    push_folder(str(folder), "alice/m")
    assert texts(hub)["model.safetensors"] == "a" * 50_000 and hub.slept

    # the client does not repeat commits; and one may have been made though its answer was lost
    hub.slept.clear()
    write(folder, {"config.json": '{"a": 1}'})
    hub.fail(status=429, path="/commit/", retry_after=7)
    hub.fail(status=503, path="/commit/")
    push_folder(str(folder), "alice/m")
    assert hub.slept == [7.0, 2.0] and texts(hub)["config.json"] == '{"a": 1}'
    commits = len(hub.commits("alice/m"))
    write(folder, {"config.json": '{"a": 2}'})
    hub.fail(path="/commit/", cut_after=10**6)
    assert push_folder(str(folder), "alice/m").oid == hub.commits("alice/m")[0]["id"]
    assert len(hub.commits("alice/m")) == commits + 1 and texts(hub)["config.json"] == '{"a": 2}'

    # but a pull request would be opened twice
    write(folder, {"config.json": '{"a": 3}'})
    hub.fail(path="/commit/", cut_after=10**6)
    with pytest.raises(ConnectionError, match="did not come to its end"):
        push_folder(str(folder), "alice/m", create_pr=True)
    assert len(hub.refs("alice/m")["pulls"]) == 1


@pytest.mark.parametrize(
    "token, kind, words",
    [
        ("hf_wrongwrongwrong", PermissionError, "The Hub rejected the token for alice/m"),
        ("read_token", PermissionError, "The token may not do this to alice/m .*role `write`"),
        ("stranger_token", PermissionError, "The token may not do this to alice/m .*right to write there"),
        (False, PermissionError, "The Hub rejected the token for alice/m: it is missing"),
    ],
)
def test_who_may_not_push_learns_it_in_one_line(hub, hub_client, folder, monkeypatch, caplog, token, kind, words):
    token = getattr(hub, token, token) if isinstance(token, str) else token
    monkeypatch.delenv("HF_TOKEN")
    with caplog.at_level(0), pytest.raises(kind, match=words) as caught:
        push_folder(str(folder), "alice/m", token=token)
    said = str(caught.value)
    assert "\n" not in said and not re.search(r"hf_[a-z]{5}", said)
    assert caught.value.__suppress_context__ and caught.value.__cause__ is None
    if token:
        behind = caught.value.__context__
        assert not any(token in shown for shown in (said, caplog.text, repr(behind), repr(vars(behind)), str(behind)))


def test_errors_never_repeat_a_token():
    with pytest.raises(ConnectionError) as caught, hub_errors("alice/m", token="secret-of-mine"):
        raise ConnectionError("no way to\nhttps://user:secret-of-mine@host with hf_abcdefghijk")
    assert "secret" not in str(caught.value) and "abcdefghijk" not in str(caught.value)
    with pytest.raises(RuntimeError, match="of the caller's own"), hub_errors("alice/m"):
        raise RuntimeError("of the caller's own")
    with pytest.raises(ValueError, match="of the caller's own"), hub_errors("alice/m"):
        raise ValueError("of the caller's own")


def test_a_hub_that_is_not_there(hub_client, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(ConnectionError, match="did not come to its end.*HF_HUB_OFFLINE"):
        push_folder(str(folder), "alice/m")


def test_what_is_not_pushed(hub, hub_client, folder, tmp_path):
    with pytest.raises(ValueError, match="There is no folder"):
        push_folder(str(tmp_path / "nowhere"), "alice/m")
    write(folder, {"training_args.bin": "pickle", "code/state.pt": "pickle"})
    with pytest.raises(ValueError, match=r"holds code/state.pt, training_args.bin: formats that run code"):
        push_folder(str(folder), "alice/m")
    assert not hub.requests
    push_folder(str(folder), "alice/m", ignore_patterns=["*.bin"], allow_pickles=True)
    assert {"code/state.pt"} == {name for name in texts(hub) if not name.endswith((".json", ".md", ".py", "tensors"))}

    write(folder, {"README.md": "---\nmodel-index: 3\n---\n", "config.json": "[]"})
    with pytest.raises(ValueError, match="The card for alice/m is not valid") as caught:
        push_folder(str(folder), "alice/m", ignore_patterns=["*.bin", "*.pt"])
    assert "\n" not in str(caught.value) and texts(hub)["config.json"] == "{}"


def test_links_are_followed(hub, hub_client, folder, tmp_path):
    """The client's own cache is made of links."""
    (tmp_path / "blob").write_text("linked")
    os.symlink(tmp_path / "blob", folder / "linked.txt")
    push_folder(str(folder), "alice/m")
    assert texts(hub)["linked.txt"] == "linked"
