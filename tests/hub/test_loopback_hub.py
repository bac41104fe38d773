"""The loopback Hub serves the real client: what this process pushes, it finds again, and faults are those of a network."""

import pytest
from huggingface_hub import (
    hf_hub_download,
    snapshot_download,
)

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
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_goes_and_comes_back(hub, hub_client, folder, tmp_path):
    hub_client.create_repo("alice/m")
    made = hub_client.upload_folder(repo_id="alice/m", folder_path=folder, commit_message="first")
    assert hub.files("alice/m") == contents(folder)
    assert hub.uploaded_bytes == sum(map(len, contents(folder).values()))
    assert made.oid == hub.refs("alice/m")["branches"]["main"]
    (commit,) = hub.commits("alice/m")
    assert (commit["message"], commit["author"], commit["id"]) == ("first", "alice", made.oid)
    assert sorted(commit["files"]) == commit["changed"] == sorted(contents(folder))

    # Large and binary files went as LFS, the others in the commit.
    rows = {row.path: row for row in hub_client.list_repo_tree("alice/m", recursive=True)}
    lfs = {path for path, row in rows.items() if getattr(row, "lfs", None)}
    assert lfs == {"model.safetensors", "deep/er/vocab.txt"}
    assert rows["deep/er/vocab.txt"].size == 15000 and rows["config.json"].lfs is None
    assert [method for method, path, _ in hub.requests if "/lfs-storage/" in path] == ["PUT", "PUT"]

    snapshot = snapshot_download("alice/m", ignore_patterns=".gitattributes")
    assert contents(tmp_path.__class__(snapshot)) == contents(folder)
    assert snapshot.endswith(made.oid)
    path = hf_hub_download("alice/m", "vocab.txt", subfolder="deep/er", local_dir=tmp_path / "elsewhere")
    assert open(path).read() == "word\n" * 3000

    # The second time nothing has changed, so nothing is sent and no commit is made.
    before = hub.uploaded_bytes
    again = hub_client.upload_folder(repo_id="alice/m", folder_path=folder)
    assert again.oid == made.oid and hub.uploaded_bytes == before
    (folder / "config.json").write_text('{"a": 2}')
    hub_client.upload_folder(repo_id="alice/m", folder_path=folder)
    assert hub.uploaded_bytes == before + len('{"a": 2}')
    assert hub.commits("alice/m")[0]["changed"] == ["config.json"]
    assert hub.unknown_requests == []
