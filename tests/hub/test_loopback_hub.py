"""The loopback Hub serves the real client: what is pushed is found again, permissions and faults are those of the Hub."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import evaluate
import huggingface_hub
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfFileSystem,
    ModelCard,
    ModelCardData,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, httpx
from transformers import AutoConfig

CARD = "---\nlicense: mit\ntags:\n- semantic-ids\n---\n# A model\n"
WEIGHTS = bytes(range(256)) * 100


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "deep" / "er" / "vocab.txt").write_text("word\n" * 3000)
    (folder / "empty.bin").touch()
    return folder


def contents(folder):
    folder = Path(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(api, id, path, content, **arguments):
    return api.upload_file(repo_id=id, path_in_repo=path, path_or_fileobj=content, **arguments)


def read(id, path, **arguments):
    return Path(hf_hub_download(id, path, **arguments)).read_bytes()


def statuses(hub, method, path):
    return [status for verb, where, status in hub.requests if verb == method and path in where]


def test_a_folder_goes_and_comes_back(hub, hub_client, folder, tmp_path):
    assert hub_client.create_repo("alice/m") == f"{hub.endpoint}/alice/m"
    made = hub_client.upload_folder(repo_id="alice/m", folder_path=folder, commit_message="first")
    assert hub.files("alice/m") == contents(folder)
    assert hub.uploaded_bytes == sum(map(len, contents(folder).values()))
    assert made.oid == hub.refs("alice/m")["branches"]["main"]
    (commit,) = hub.commits("alice/m")
    assert (commit["message"], commit["author"], commit["id"]) == ("first", "alice", made.oid)
    assert sorted(commit["files"]) == commit["changed"] == sorted(contents(folder))

    # Large and binary files went as LFS, the others in the commit.
    rows = {row.path: row for row in hub_client.list_repo_tree("alice/m", recursive=True, expand=True)}
    lfs = {path for path, row in rows.items() if getattr(row, "lfs", None)}
    assert lfs == {"model.safetensors", "deep/er/vocab.txt"}
    assert rows["deep/er/vocab.txt"].size == 15000 and rows["config.json"].last_commit.oid == made.oid
    assert statuses(hub, "PUT", "/lfs-storage/alice/m/") == [200, 200]
    info = hub_client.model_info("alice/m", files_metadata=True)
    assert info.sha == made.oid and info.card_data.license == "mit" and info.tags == ["semantic-ids", "license:mit"]
    assert {row.rfilename: row.size for row in info.siblings}["model.safetensors"] == len(WEIGHTS)

    snapshot = snapshot_download("alice/m", ignore_patterns=".gitattributes")
    assert contents(snapshot) == contents(folder) and Path(snapshot).name == made.oid
    assert read("alice/m", "vocab.txt", subfolder="deep/er", local_dir=tmp_path / "other") == b"word\n" * 3000

    # The second time nothing has changed, so nothing is sent and no commit is made.
    before = hub.uploaded_bytes
    again = hub_client.upload_folder(repo_id="alice/m", folder_path=folder)
    assert again.oid == made.oid and hub.uploaded_bytes == before
    (folder / "config.json").write_text('{"a": 2}')
    hub_client.upload_folder(repo_id="alice/m", folder_path=folder)
    assert hub.uploaded_bytes == before + len('{"a": 2}')
    assert hub.commits("alice/m")[0]["changed"] == ["config.json"]
    assert hub.unknown_requests == [] and hub.slept == []


def test_every_revision_stays_what_it_was(hub, hub_client):
    api = hub_client
    api.create_repo("org/d", repo_type="dataset")
    shas = [write(api, "org/d", "n.txt", b"%d" % n, repo_type="dataset").oid for n in range(3)]
    api.create_tag("org/d", tag="v1", revision=shas[1], repo_type="dataset")
    api.create_branch("org/d", branch="old/one", revision=shas[0][:7], repo_type="dataset")
    write(api, "org/d", "more.bin", WEIGHTS, revision="old/one", repo_type="dataset")
    api.delete_file("n.txt", "org/d", repo_type="dataset")

    for revision, content in [("v1", b"1"), ("old/one", b"0"), (shas[2], b"2"), (shas[0][:8], b"0")]:
        assert read("org/d", "n.txt", revision=revision, repo_type="dataset") == content
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("org/d", "n.txt", repo_type="dataset")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("org/d", "n.txt", revision="v2", repo_type="dataset")
    assert hub.files("org/d", "old/one", repo_type="dataset") == {"n.txt": b"0", "more.bin": WEIGHTS}

    listed = api.list_repo_refs("org/d", repo_type="dataset")
    assert {ref.name: ref.target_commit for ref in listed.tags} == {"v1": shas[1]}
    assert sorted(ref.name for ref in listed.branches) == ["main", "old/one"]
    history = api.list_repo_commits("org/d", repo_type="dataset")
    assert [commit.commit_id for commit in history[1:4]] == shas[::-1] and history[-1].title == "initial commit"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag("org/d", tag="v1", repo_type="dataset")
    api.create_branch("org/d", branch="main", repo_type="dataset", exist_ok=True)
    api.delete_tag("org/d", tag="v1", repo_type="dataset")
    api.delete_branch("org/d", branch="old/one", repo_type="dataset")
    assert list(hub.refs("org/d", "dataset")["branches"]) == ["main"] and not hub.refs("org/d", "dataset")["tags"]
    with pytest.raises(BadRequestError, match="no branch"):
        write(api, "org/d", "n.txt", b"", revision=shas[0], repo_type="dataset")

    api.move_repo("org/d", "alice/e", repo_type="dataset")
    assert api.dataset_info("org/d").id == "alice/e"
    api.delete_repo("alice/e", repo_type="dataset")
    assert not api.repo_exists("alice/e", repo_type="dataset")


def test_a_pull_request_changes_main_once_it_is_merged(hub, hub_client):
    api = hub_client
    api.create_repo("alice/m")
    write(api, "alice/m", "a.txt", b"a")
    stranger = huggingface_hub.HfApi(token=hub.stranger_token)
    changes = [CommitOperationAdd("b.bin", WEIGHTS), CommitOperationDelete("a.txt")]
    made = stranger.create_commit("alice/m", changes, commit_message="A proposal", create_pr=True)
    assert (made.pr_num, made.pr_revision) == (1, "refs/pr/1")
    assert hub.files("alice/m") == {"a.txt": b"a"} and hub.files("alice/m", "refs/pr/1") == {"b.bin": WEIGHTS}
    assert read("alice/m", "b.bin", revision="refs/pr/1") == WEIGHTS
    write(api, "alice/m", "c.txt", b"c")
    assert api.get_discussion_details("alice/m", 1).status == "open"
    api.merge_pull_request("alice/m", 1)
    assert hub.files("alice/m") == {"b.bin": WEIGHTS, "c.txt": b"c"}
    assert api.get_discussion_details("alice/m", 1).status == "merged"
    assert [ref.ref for ref in api.list_repo_refs("alice/m", include_pull_requests=True).pull_requests] == [
        "refs/pr/1"
    ]


def test_a_commit_is_all_or_nothing_and_minds_its_parent(hub, hub_client):
    api = hub_client
    api.create_repo("alice/m")
    first = write(api, "alice/m", "a/w.bin", WEIGHTS).oid
    received = hub.uploaded_bytes
    api.create_commit(
        "alice/m", [CommitOperationCopy("a/w.bin", "w2.bin")], commit_message="copy", parent_commit=first
    )
    assert hub.files("alice/m") == {"a/w.bin": WEIGHTS, "w2.bin": WEIGHTS} and hub.uploaded_bytes == received
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        write(api, "alice/m", "b.txt", b"b", parent_commit=first)
    assert error.value.response.status_code == 412
    with pytest.raises(EntryNotFoundError):
        changes = [CommitOperationAdd("b.txt", b"b"), CommitOperationDelete("absent.txt")]
        api.create_commit("alice/m", changes, commit_message="half of it")
    assert len(hub.commits("alice/m")) == 2
    api.create_commit("alice/m", [CommitOperationDelete("a/")], commit_message="a folder")
    assert hub.files("alice/m") == {"w2.bin": WEIGHTS}
    write(api, "alice/m", ".gitignore", b"*.log\nruns/\n")
    changes = [CommitOperationAdd(path, b"1") for path in ("x.log", "runs/y", "z.txt")]
    api.create_commit("alice/m", changes, commit_message="some are ignored")
    assert sorted(hub.files("alice/m")) == [".gitignore", "w2.bin", "z.txt"]


def test_who_may_read_and_who_may_write(hub, hub_client, monkeypatch):
    hub_client.create_repo("org/secret", private=True)
    write(hub_client, "org/secret", "a.txt", b"a")
    with pytest.raises(HfHubHTTPError, match="409"):
        hub_client.create_repo("org/secret")
    hub_client.create_repo("org/secret", exist_ok=True)
    for token in (hub.stranger_token, False):
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("org/secret", "a.txt", token=token)
        with pytest.raises(RepositoryNotFoundError):
            hub_client.repo_info("org/secret", token=token)
        with pytest.raises(RepositoryNotFoundError):
            write(hub_client, "org/secret", "b.txt", b"b", token=token)
    assert read("org/secret", "a.txt", token=hub.read_token) == b"a"

    for token, message in [
        (hub.read_token, "must use a write token"),
        (hub.stranger_token, "You don't have the rights"),
    ]:
        with pytest.raises(HfHubHTTPError, match=f"403 Forbidden: .*{message}"):
            hub_client.create_repo("org/other", token=token)
    with pytest.raises(HfHubHTTPError, match="403 Forbidden: .*must use a write token"):
        write(hub_client, "org/secret", "b.txt", b"b", token=hub.read_token)
    hub_client.update_repo_settings("org/secret", private=False)
    with pytest.raises(HfHubHTTPError, match="403 Forbidden: .*pass `create_pr=1`"):
        write(hub_client, "org/secret", "b.txt", b"b", token=hub.stranger_token)
    assert read("org/secret", "a.txt", token=False, force_download=True) == b"a"

    with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header") as error:
        write(hub_client, "org/secret", "b.txt", b"b", token="hf_wrong")
    assert error.value.response.status_code == 401
    assert hub_client.whoami()["name"] == "alice"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HfHubHTTPError, match="HF_TOKEN environment variable is invalid"):
        hub_client.whoami()
    assert len(hub.commits("org/secret")) == 1


def test_downloads_in_parts_and_after_a_cut(hub, hub_client, monkeypatch):
    hub_client.create_repo("alice/m")
    write(hub_client, "alice/m", "w.bin", WEIGHTS)
    url = huggingface_hub.hf_hub_url("alice/m", "w.bin")
    for wanted, part in [("0-9", WEIGHTS[:10]), ("25000-", WEIGHTS[25000:]), ("-7", WEIGHTS[-7:])]:
        answer = get_session().get(url, headers={"Range": f"bytes={wanted}"})
        assert answer.status_code == 206 and answer.content == part
    assert get_session().get(url, headers={"Range": "bytes=99999-"}).status_code == 416
    assert get_session().get(hub.endpoint + "/api/models/alice/m/nothing").status_code == 404
    assert hub.unknown_requests == [("GET", "/api/models/alice/m/nothing")]
    with HfFileSystem().open("alice/m/w.bin", block_size=512) as file:
        file.seek(1000)
        assert file.read(50) == WEIGHTS[1000:1050]

    # Only what filled a whole piece of the client's, 10 MB, need not come again.
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    hub.fail(path="/resolve/main/w.bin", cut_after=9000)
    before = len(hub.requests)
    assert read("alice/m", "w.bin", force_download=True) == WEIGHTS
    shown = [(request.method, request.status) for request in hub.requests[before:]]
    assert shown == [("HEAD", 200), ("GET", None), ("GET", 206)] and hub.slept == [1]

    # A client that has had enough leaves no file behind that looks whole.
    hub.fail(method="GET", path="w.bin", status=503, times=None)
    with pytest.raises(HfHubHTTPError, match="503"):
        hf_hub_download("alice/m", "w.bin", force_download=True)
    hub.stop_failing()
    assert read("alice/m", "w.bin") == WEIGHTS


def test_what_the_client_tries_again(hub, hub_client):
    hub_client.create_repo("alice/m")
    hub.fail(status=429, path="/preupload/", retry_after=3)
    hub.fail(status=500, method="PUT", times=2)
    hub.fail(status=503, path="objects/batch")
    hub.fail(method="PUT", cut_after=5000)
    write(hub_client, "alice/m", "w.bin", WEIGHTS)
    assert hub.files("alice/m") == {"w.bin": WEIGHTS} and hub.uploaded_bytes == len(WEIGHTS)
    # Retry-After and a second more; 1, 2, 4 … seconds where the server names none.
    assert hub.slept == [4.0, 1.0, 1.0, 2.0, 4.0]
    assert statuses(hub, "PUT", "/lfs-storage/") == [500, 500, None, 200]

    # A commit is never tried again, so that it is not made twice.
    for fault in ({"status": 500}, {"status": 412}, {"status": 403, "message": "Not today"}):
        hub.fail(path="/commit/", **fault)
        with pytest.raises(HfHubHTTPError, match=fault.get("message", str(fault["status"]))):
            write(hub_client, "alice/m", "w.bin", b"another")
    hub.fail(path="/commit/", cut_after=10)
    with pytest.raises(httpx.TransportError):
        write(hub_client, "alice/m", "w.bin", b"another")
    assert hub.files("alice/m") == {"w.bin": WEIGHTS}

    # Its answer may be lost after it was made.
    hub.fail(path="/commit/", cut_after=10**6)
    with pytest.raises(httpx.RemoteProtocolError):
        write(hub_client, "alice/m", "w.bin", b"another")
    assert hub.files("alice/m") == {"w.bin": b"another"}

    hub.fail(status=None, path="/whoami", delay=0.2)
    start = time.monotonic()
    assert hub_client.whoami()["name"] == "alice" and time.monotonic() - start >= 0.2
    hub.fail(status=500, method="HEAD", times=None)
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("alice/m", "w.bin")


def test_large_files_in_parts_and_listings_in_pages(hub, hub_client):
    hub.chunk_size, hub.page_size = 10_000, 2
    hub_client.create_repo("alice/m")
    write(hub_client, "alice/m", "w.bin", WEIGHTS)
    assert statuses(hub, "PUT", "/lfs-storage/") == [200, 200, 200] and hub.files("alice/m") == {"w.bin": WEIGHTS}
    hub_client.create_commit("alice/m", [CommitOperationAdd(f"d/{n}", b"") for n in range(4)], commit_message="d")
    listed = [row.path for row in hub_client.list_repo_tree("alice/m", recursive=True)]
    assert listed == [".gitattributes", "d", "d/0", "d/1", "d/2", "d/3", "w.bin"]
    assert [row.path for row in hub_client.list_repo_tree("alice/m", "d")] == ["d/0", "d/1", "d/2", "d/3"]


def test_collections(hub, hub_client):
    hub_client.create_repo("alice/m")
    hub_client.create_repo("alice/s", repo_type="space", space_sdk="gradio")
    made = hub_client.create_collection("A run", namespace="alice", description="All of it")
    assert hub_client.create_collection("A run", namespace="alice", exists_ok=True).slug == made.slug
    hub_client.add_collection_item(made.slug, "alice/m", "model", note="the model")
    hub_client.add_collection_item(made.slug, "alice/s", "space")
    with pytest.raises(HfHubHTTPError, match="409"):
        hub_client.add_collection_item(made.slug, "alice/m", "model")
    hub_client.add_collection_item(made.slug, "alice/m", "model", exists_ok=True)
    with pytest.raises(RepositoryNotFoundError):
        hub_client.add_collection_item(made.slug, "alice/absent", "model")
    shown = hub_client.get_collection(made.slug)
    assert [(item.item_id, item.item_type, item.note) for item in shown.items] == [
        ("alice/m", "model", "the model"),
        ("alice/s", "space", None),
    ]
    hub_client.update_collection_item(made.slug, shown.items[1].item_object_id, note="try it", position=0)
    hub_client.delete_collection_item(made.slug, shown.items[0].item_object_id)
    hub_client.update_collection_metadata(made.slug, title="The run", private=True)
    (item,) = hub_client.get_collection(made.slug).items
    assert (item.item_id, item.note) == ("alice/s", "try it")
    with pytest.raises(HfHubHTTPError, match="404"):
        hub_client.get_collection(made.slug, token=False)
    hub_client.delete_collection(made.slug)
    assert list(hub_client.list_collections(owner="alice")) == []


def test_metadata_of_cards_is_checked(hub, hub_client):
    card = ModelCard.from_template(
        ModelCardData(
            license="apache-2.0",
            model_name="m",
            tags=["a"],
            eval_results=[huggingface_hub.EvalResult("text-generation", "csv", "prompts", "recall@10", 0.5)],
        ),
        template_str="---\n{{ card_data }}\n---\n# m\n",
    )
    card.validate()
    hub_client.create_repo("alice/m")
    card.push_to_hub("alice/m")
    assert hub_client.model_info("alice/m").card_data.eval_results[0].metric_value == 0.5
    for metadata, message in [
        ("license: public", '"license" must be one of'),
        ("tags: a", '"tags" must be an array of strings'),
        ("- a\n- b", "must be a mapping"),
        ("a: [", "YAML metadata is invalid"),
        ("tags: [a]\ntags: [b]", "duplicated mapping key"),
        ("model-index:\n- name: m\n  results:\n  - task: {type: t}\n    metrics: []", "dataset. is required"),
    ]:
        content = f"---\n{metadata}\n---\n# m\n"
        with pytest.raises(ValueError, match=message):
            hub_client._validate_yaml(content)
        with pytest.raises(ValueError, match=message):
            write(hub_client, "alice/m", "README.md", content.encode())
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        write(hub_client, "alice/m", "README.md", b"# m\n")


@pytest.mark.parametrize("answer", [1, 2])
def test_libraries_of_this_process_load_from_it(hub, hub_client, tmp_path, answer):
    """Twice: what one test loaded, code above all, is not what the next one finds under the same name."""
    hub_client.create_repo("alice/m")
    code = "from transformers import PretrainedConfig\nfrom .part import ANSWER\n\n\n"
    code += "class Configuration(PretrainedConfig):\n    model_type = 'of-the-hub'\n    answer = ANSWER\n"
    write(hub_client, "alice/m", "configuration.py", code.encode())
    write(hub_client, "alice/m", "part.py", b"ANSWER = %d\n" % answer)
    config = {"model_type": "of-the-hub", "auto_map": {"AutoConfig": "configuration.Configuration"}}
    write(hub_client, "alice/m", "config.json", json.dumps(config).encode())
    assert AutoConfig.from_pretrained("alice/m", trust_remote_code=True).answer == answer

    rows = datasets.Dataset.from_dict({"number": [answer, 5]})
    rows.push_to_hub("alice/d")
    assert datasets.load_dataset("alice/d", split="train")["number"][:] == [answer, 5]

    hub_client.create_repo("alice/metric", repo_type="space", space_sdk="gradio")
    code = "import datasets\nimport evaluate\n\n\nclass Metric(evaluate.Metric):\n    def _info(self):\n"
    code += "        features = datasets.Features({'predictions': datasets.Value('int64')})\n"
    code += "        return evaluate.MetricInfo(description='', citation='', features=features)\n\n"
    code += f"    def _compute(self, predictions):\n        return {{'total': {answer} * sum(predictions)}}\n"
    write(hub_client, "alice/metric", "metric.py", code.encode(), repo_type="space")
    assert hub_client.space_info("alice/metric").sdk == "gradio"
    assert evaluate.load("alice/metric").compute(predictions=[1, 2]) == {"total": 3 * answer}
    assert hub.unknown_requests == []


def test_a_fresh_process_works_with_its_environment_alone(hub, tmp_path):
    script = (
        "import huggingface_hub as h\n"
        "url = h.create_repo('alice/fresh', private=True)\n"
        "h.upload_file(repo_id='alice/fresh', path_in_repo='w.bin', path_or_fileobj=bytes(20000))\n"
        "print(h.whoami()['name'], h.hf_hub_download('alice/fresh', 'w.bin'))\n"
    )
    environment = os.environ | hub.environment(tmp_path / "home")
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, path = done.stdout.split()
    assert name == "alice" and path.startswith(str(tmp_path / "home")) and Path(path).read_bytes() == bytes(20000)
    assert hub.environment(tmp_path, token=False)["HF_TOKEN"] == "" and hub.unknown_requests == []


def test_nothing_of_it_stays(hub):
    """`hub_client` of the tests above has put everything back: this process is offline and knows huggingface.co alone."""
    assert huggingface_hub.constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
    assert huggingface_hub.constants.ENDPOINT == huggingface_hub.hf_api.api.endpoint == "https://huggingface.co"
    assert "127.0.0.1" not in huggingface_hub.hf_hub_url("alice/m", "a")
    with pytest.raises(huggingface_hub.errors.OfflineModeIsEnabled):
        huggingface_hub.HfApi(endpoint=hub.endpoint).whoami(token=hub.token)
    assert hub.requests == []
