"""Folders from elsewhere, with remains of saves that never were and links to anywhere: nothing outside is deleted, moved or written."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rqsid import SIDTokenizer
from rqsid.sid_tokenizer.staged_save import recovered

pytestmark = pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs symbolic links")
SID_FILES = {
    "sid_manifest.json",
    "sid_catalog.safetensors",
    "sid_codebook.safetensors",
    "sid_prompt.json",
    "tokenizer.json",
}


@pytest.fixture(scope="module", autouse=True)
def quick_saves():
    """Without waiting for the disk, and without the files of code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setattr(SIDTokenizer, "_auto_class", None)
        yield


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, make_parts):
    pieces = {letter: at for at, letter in enumerate(["</s>", *"abcdefghijklmnopqrstuvwxyz:<>_/ "])}
    base = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=pieces, merges=[])), eos_token="</s>")
    _, quantizer, catalog = make_parts()
    folder = tmp_path_factory.mktemp("bundle")
    SIDTokenizer.from_base(base, catalog, quantizer).save_pretrained(folder)
    return folder


@pytest.fixture
def world(bundle, tmp_path):
    """A folder to load and save, beside what belongs to others."""
    make_world(bundle, tmp_path)
    return tmp_path


def make_world(bundle, root):
    shutil.copytree(bundle, root / "home" / "bundle")
    (root / "outside" / "sub").mkdir(parents=True)
    for name in ("outside/precious", "outside/sub/file", "home/neighbour"):
        (root / name).write_text(f"of others: {name}")


def state(root):
    """All files but those of the bundle's folder, and what they hold."""
    found = {}
    for where, folders, names in os.walk(root):
        if os.path.join(root, "home", "bundle") in where:
            continue
        for name in [*folders, *names]:
            path = os.path.join(where, name)
            found[path] = os.readlink(path) if os.path.islink(path) else os.path.isdir(path) or Path(path).read_bytes()
    return found


def remains(folder, added=(), files=(), content=None):
    """What a save that died would leave, had it been this one."""
    (folder / ".sid_previous" / "files").mkdir(parents=True)
    for name in files:
        path = folder / ".sid_previous" / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("hostile")
    text = json.dumps({"added": list(added)}) if content is None else content
    (folder / ".sid_previous" / "added.json").write_text(text)


def assert_nothing_happens(world, message):
    """Loading and saving are refused in one line, and everything stays where it is."""
    folder, before = world / "home" / "bundle", state(world)
    inside = {path: path.lstat().st_ino for path in folder.rglob("*")}
    for action in (
        lambda: SIDTokenizer.from_pretrained(folder),
        lambda: SIDTokenizer.from_pretrained(world / "good").save_pretrained(folder),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            action()
        assert type(caught.value) is ValueError and ".sid_previous" in str(caught.value)
        assert state(world) == before
        assert {path: path.lstat().st_ino for path in folder.rglob("*")} == inside


@pytest.fixture
def good(world, bundle):
    shutil.copytree(bundle, world / "good")


@pytest.mark.parametrize(
    "name",
    [
        "../neighbour",
        "../../outside/precious",
        "{root}/outside/precious",
        "/etc/hostname",
        "sub/../../neighbour",
        "./tokenizer.json",
        "sub//x",
        "..",
        ".",
        "",
        "a\x00b",
        ".sid_previous/added.json",
        "model.safetensors",
        "pytorch_model.bin",
        "link/precious",
        "link/sub/file",
        "real",
    ],
)
def test_names_that_lead_elsewhere(world, good, name):
    folder = world / "home" / "bundle"
    os.symlink(world / "outside", folder / "link")
    (folder / "real").mkdir()
    (folder / "model.safetensors").write_text("weights that somebody trained since")
    remains(folder, added=[name.format(root=world)])
    assert_nothing_happens(world, "holds no files of a save that died")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"added": 1}', '{"added": [1]}', '{"added": "../x"}', "[" * 9999, "\xff"]
)
def test_lists_of_names_that_are_none(world, good, content):
    remains(world / "home" / "bundle", content=content)
    assert_nothing_happens(world, "holds no files of a save that died.*Delete it")


def test_links_in_the_place_of_remains(world, good):
    folder = world / "home" / "bundle"
    # 1. the folder itself is somebody else's
    (world / "outside" / "files").mkdir()
    (world / "outside" / "files" / "tokenizer.json").write_text("of others")
    (world / "outside" / "added.json").write_text('{"added": []}')
    os.symlink(world / "outside", folder / ".sid_previous")
    assert_nothing_happens(world, "it is a link")
    # 2. what it kept is
    os.remove(folder / ".sid_previous")
    (folder / ".sid_previous").mkdir()
    (folder / ".sid_previous" / "added.json").write_text('{"added": []}')
    os.symlink(world / "outside" / "files", folder / ".sid_previous" / "files")
    assert_nothing_happens(world, "it is a link")
    # 3. a link to nowhere, and a file
    shutil.rmtree(folder / ".sid_previous")
    os.symlink(world / "nowhere", folder / ".sid_previous")
    assert_nothing_happens(world, "it is a link")
    os.remove(folder / ".sid_previous")
    (folder / ".sid_previous").write_text("x")
    assert_nothing_happens(world, "Delete it")


def test_kept_files_behind_a_link(world, good):
    """The folder that a kept file would go back to is a link to another one."""
    folder = world / "home" / "bundle"
    os.symlink(world / "outside", folder / "sub")
    remains(folder, files=["sub/precious"])
    assert_nothing_happens(world, "lies behind a link")


def test_remains_that_are_some_load_and_are_undone(world, good):
    folder = world / "home" / "bundle"
    before = (folder / "tokenizer.json").read_bytes()
    remains(folder, added=["chat_template.jinja"], files=["tokenizer.json"])
    (folder / ".sid_previous" / "files" / "tokenizer.json").write_bytes(before)
    (folder / "tokenizer.json").write_text("half")
    (folder / "chat_template.jinja").write_text("half")
    assert SIDTokenizer.from_pretrained(folder).chat_template is None
    SIDTokenizer.from_pretrained(world / "good").save_pretrained(folder)
    assert not (folder / ".sid_previous").exists() and (folder / "tokenizer.json").read_bytes() == before


def test_staging_folders_that_are_none_stay(world, good):
    folder = world / "home" / "bundle"
    os.symlink(world / "outside", folder / ".sid_save-link")
    (folder / ".sid_save-file").write_text("x")
    (folder / ".sid_save-real").mkdir()
    os.symlink(world / "outside", folder / ".sid_save-real" / "nested")
    before = state(world)
    SIDTokenizer.from_pretrained(folder)
    SIDTokenizer.from_pretrained(world / "good").save_pretrained(folder)
    assert state(world) == before
    left = {path.name for path in folder.iterdir() if path.name.startswith(".sid_save-")}
    assert left == {".sid_save-link", ".sid_save-file"}
    SIDTokenizer.from_pretrained(folder)


def test_templates_behind_a_link_are_not_written(world, good):
    """Named chat templates lie in a folder of their own, which may be a link."""
    folder = world / "home" / "bundle"
    os.symlink(world / "outside", folder / "additional_chat_templates")
    tokenizer = SIDTokenizer.from_pretrained(world / "good")
    tokenizer.chat_template = {"default": "{{ messages }}", "precious": "{{ tools }}"}
    before = state(world)
    with pytest.raises(
        ValueError, match="'additional_chat_templates/precious.jinja' lies behind a link to another folder"
    ):
        tokenizer.save_pretrained(folder)
    assert state(world) == before and not (folder / ".sid_previous").exists()
    SIDTokenizer.from_pretrained(folder)


def test_a_cache_of_links_loads_and_is_not_written_through(world, good):
    """As the Hub's cache has them: files are links to blobs, which several revisions share."""
    folder, blobs = world / "home" / "bundle", world / "home" / "blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        shutil.move(path, blobs / path.name)
        os.symlink(os.path.join("..", "blobs", path.name), path)
    snapshot = {path.name: path.read_bytes() for path in blobs.iterdir()}
    tokenizer = SIDTokenizer.from_pretrained(folder)
    assert tokenizer.encode_products("p1") == SIDTokenizer.from_pretrained(world / "good").encode_products("p1")
    tokenizer.catalog.append(["new"], codes=np.array([[0, 1, 2]]))
    tokenizer.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in blobs.iterdir()} == snapshot
    assert not any((folder / name).is_symlink() for name in SID_FILES)
    assert len(SIDTokenizer.from_pretrained(folder).catalog) == 61
    # A folder that is a link is the one that it leads to.
    os.symlink(folder, world / "home" / "link")
    SIDTokenizer.from_pretrained(world / "home" / "link").save_pretrained(world / "home" / "link")
    assert (world / "home" / "link").is_symlink() and len(SIDTokenizer.from_pretrained(folder).catalog) == 61


PARTS = st.sampled_from(
    ["..", ".", "", "link", "sub", "tokenizer.json", "x", "~", "*", "\\", "outside", "precious", "a:b"]
)


@given(st.lists(st.lists(PARTS, max_size=4).map("/".join), max_size=3), st.booleans())
@settings(max_examples=30, deadline=None)
def test_names_of_any_kind(bundle, tmp_path_factory, names, through_link):
    root = tmp_path_factory.mktemp("world")
    make_world(bundle, root)
    folder = root / "home" / "bundle"
    if through_link:
        os.symlink(root / "outside", folder / "link")
    remains(folder, added=names)
    before = state(root)
    try:
        with recovered(folder) as whole:
            assert all(
                os.path.realpath(entry.path).startswith(f"{folder}{os.sep}")
                for entry in os.scandir(whole)
                if entry.name != "link"
            )
    except ValueError as error:
        assert type(error) is ValueError
    try:
        SIDTokenizer.from_pretrained(bundle).save_pretrained(folder)
    except ValueError as error:
        assert type(error) is ValueError
    assert state(root) == before
    shutil.rmtree(root)
