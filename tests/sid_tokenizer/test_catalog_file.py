"""The catalog's file: written whole or not at all, never over what others have saved, linked where nothing changed, and pickled."""

import copy
import json
import os
import pickle
import shutil
import signal

import numpy as np
import pytest
from datasets.fingerprint import Hasher
from fresh_process import run_fresh
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rqsid import ProductCatalog, SIDTokenizer
from rqsid.sid_tokenizer import catalog_file, files

NAME = "sid_catalog.safetensors"
linux = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture
def catalog(make_parts):
    return make_parts()[2]


@pytest.fixture
def tokenizer(make_parts):
    pieces = {letter: at for at, letter in enumerate(["</s>", *"abcdefghijklmnopqrstuvwxyz:<>_/ "])}
    base = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=pieces, merges=[])), eos_token="</s>")
    _, quantizer, catalog = make_parts()
    return SIDTokenizer.from_base(base, catalog, quantizer)


def append(catalog, *product_ids):
    catalog.append(list(product_ids), codes=np.arange(3 * len(product_ids)).reshape(-1, 3) % 4)


def content(catalog):
    """All that a catalog is, as bytes that pickle cannot shorten."""
    columns = {name: (str(column.dtype), column.shape, column.tobytes()) for name, column in catalog.columns.items()}
    return columns, {name: getattr(catalog, name) for name in catalog_file.CONFIG}, catalog.pruning.to_dict()


def content_of(path):
    return content(ProductCatalog.load(path))


def inode(path):
    return os.stat(path).st_ino


# Killed and full


@linux
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("step", ["mkstemp", "half", "fsync", "chmod", "link", "remove", "replace", "describe"])
def test_a_killed_save_leaves_the_old_file(catalog, tmp_path, monkeypatch, step, linked):
    path = tmp_path / NAME
    catalog.save(path)
    before = content(catalog)
    append(catalog, "x")
    if linked:
        catalog.save(tmp_path / "source")

    def kill(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def write_half(tensors, name, metadata):
        with open(name, "wb") as file:
            file.write(b"x" * 1000)
        kill()

    child = os.fork()
    if child == 0:
        if step == "half":
            files.save_file = write_half
        elif step == "mkstemp":
            files.tempfile.mkstemp = kill
        elif step == "describe":
            real = os.replace
            os.replace = lambda *args: (real(*args), kill())
        else:
            setattr(os, step, kill)
        catalog.save(path)
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert killed == (step not in (("half", "fsync", "chmod") if linked else ("link", "remove")))
    assert content_of(path) == (before if killed and step != "describe" else content(catalog))
    catalog.save(path)
    assert content_of(path) == content(catalog)
    assert sorted(os.listdir(tmp_path)) == sorted([NAME] + ["source"] * linked)


def test_files_of_others_that_look_alike_stay(catalog, tmp_path):
    for name in ("x.abcdefgh.tmp", NAME + ".tmp", NAME + ".a.b.tmp", NAME + ".ABCDEFGH.tmp", "sub"):
        (tmp_path / name).write_text("theirs")
    (tmp_path / (NAME + ".abc_efg8.tmp")).write_text("of a save that was killed")
    catalog.save(tmp_path / NAME)
    assert len(os.listdir(tmp_path)) == 6 and not (tmp_path / (NAME + ".abc_efg8.tmp")).exists()


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("step", ["write", "replace", "fsync"])
def test_a_full_disk_leaves_the_old_file(catalog, tmp_path, monkeypatch, step, linked):
    path = tmp_path / NAME
    catalog.save(path)
    before = content(catalog)
    append(catalog, "x")
    if linked:
        catalog.save(tmp_path / "source")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)  # so that it is copied
    if step == "write":
        monkeypatch.setattr(files, "save_file", full)
        monkeypatch.setattr(shutil, "copyfile", full)
    else:
        monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        catalog.save(path)
    monkeypatch.undo()
    assert content_of(path) == before and sorted(os.listdir(tmp_path)) == sorted([NAME] + ["source"] * linked)
    catalog.save(path)
    assert content_of(path) == content(catalog)


# Several writers


def test_versions_that_may_replace_each_other(make_parts, tmp_path):
    path = tmp_path / NAME
    make_parts()[2].save(path)
    first, second = ProductCatalog.load(path), ProductCatalog.load(path)
    append(first, "x")
    append(first, "x2")
    append(second, "y")
    first.save(path)
    with pytest.raises(
        ValueError, match="other changes to this catalog than this one has: somebody saved it in the meantime"
    ):
        second.save(path)
    with pytest.raises(ValueError, match="holds version 3 of this catalog, and this is version 2"):
        first.at_version(2).save(path)
    assert content_of(path) == content(first) and os.listdir(tmp_path) == [NAME]
    first.save(path)
    append(first, "x3")
    first.save(path)
    assert content_of(path) == content(first)
    second.save(path, overwrite=True)
    assert content_of(path) == content(second)
    unrelated = make_parts(seed=1)[2]
    unrelated.save(path)
    assert content_of(path) == content(unrelated)
    for damage in (b"", b"no catalog", (tmp_path / NAME).read_bytes()[:-1]):
        path.unlink()
        path.write_bytes(damage)
        second.save(path)
        assert content_of(path) == content(second)


@linux
def test_four_processes_that_save_at_once(catalog, tmp_path):
    path, children, contents = tmp_path / NAME, [], []
    catalog.save(path)
    start, go = os.pipe()
    for number in range(4):
        mine = ProductCatalog.load(path)
        append(mine, f"of {number}")
        contents.append(content(mine))
        child = os.fork()
        if child == 0:
            status = 9
            try:
                os.close(go)
                os.read(start, 1)
                mine.save(path)
                status = 0
            except ValueError as error:
                status = 3 if "somebody saved it in the meantime" in str(error) else 9
            finally:
                os._exit(status)
        children.append(child)
    os.close(start)
    os.close(go)
    ended = [os.WEXITSTATUS(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(ended) == [0, 3, 3, 3]
    assert content_of(path) == contents[ended.index(0)] and os.listdir(tmp_path) == [NAME]


# Links


def test_an_unchanged_catalog_is_linked(catalog, tmp_path):
    paths = [tmp_path / str(number) for number in range(12)]
    for path in paths:
        catalog.save(path)
    assert len({inode(path) for path in paths}) == 1 and os.stat(paths[0]).st_nlink == 12
    before = content(catalog)
    append(catalog, "x")
    catalog.save(paths[3])
    catalog.save(tmp_path / "later")
    assert inode(paths[3]) == inode(tmp_path / "later") != inode(paths[0])
    assert content_of(paths[3]) == content(catalog) and content_of(paths[0]) == before
    loaded = ProductCatalog.load(paths[1])
    loaded.save(tmp_path / "loaded")
    assert inode(tmp_path / "loaded") == inode(paths[1])
    umask = os.umask(0)
    os.umask(umask)
    assert {os.stat(path).st_mode & 0o777 for path in paths} == {0o666 & ~umask}


def test_links_go_on_when_earlier_ones_are_deleted(catalog, tmp_path):
    numbers = []
    for number in range(20):
        catalog.save(tmp_path / str(number))
        numbers.append(inode(tmp_path / str(number)))
        if number:
            os.remove(tmp_path / str(number - 1))
    assert len(set(numbers)) == 1
    os.remove(tmp_path / "19")
    catalog.save(tmp_path / "all were deleted")
    assert content_of(tmp_path / "all were deleted") == content(catalog)
    assert len(catalog.file["paths"]) <= 8


def test_the_first_file_is_remembered_longest(catalog, tmp_path):
    for number in range(20):
        catalog.save(tmp_path / str(number))
    kept = inode(tmp_path / "0")
    for number in range(1, 20):
        os.remove(tmp_path / str(number))
    catalog.save(tmp_path / "last")
    assert inode(tmp_path / "last") == kept


@pytest.mark.parametrize("change", ["edited", "replaced", "longer", "another inode", "deleted", "folder"])
def test_a_file_that_changed_is_not_linked(catalog, make_parts, tmp_path, change):
    path = tmp_path / NAME
    catalog.save(path)
    before, stat = content(catalog), os.stat(path)
    if change == "edited":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "replaced":
        make_parts(seed=1)[2].save(path)
    elif change == "longer":
        with open(path, "ab") as file:
            file.write(b"x")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "another inode":
        # Of the same size and time.
        shutil.copy2(path, tmp_path / "copy")
        data = bytearray((tmp_path / "copy").read_bytes())
        data[-1] ^= 1
        (tmp_path / "copy").write_bytes(data)
        os.utime(tmp_path / "copy", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        os.replace(tmp_path / "copy", path)
    else:
        path.unlink()
        if change == "folder":
            path.mkdir()
    catalog.save(tmp_path / "new")
    assert content_of(tmp_path / "new") == before == content(catalog)
    assert not path.is_file() or inode(path) != inode(tmp_path / "new")


def test_a_file_replaced_while_it_is_read_is_not_linked(catalog, make_parts, tmp_path, monkeypatch):
    path, other, real = tmp_path / NAME, make_parts(seed=1)[2], catalog_file.read_tensors
    catalog.save(path)

    def read(*args, **options):
        found = real(*args, **options)
        other.save(path)
        return found

    monkeypatch.setattr(catalog_file, "read_tensors", read)
    loaded = ProductCatalog.load(path)
    monkeypatch.undo()
    loaded.save(tmp_path / "new")
    assert content_of(tmp_path / "new") == content(catalog) != content_of(path)
    assert content(pickle.loads(pickle.dumps(loaded))) == content(catalog)


def test_where_links_are_not_permitted_it_is_copied(catalog, tmp_path, monkeypatch):
    catalog.save(tmp_path / "first")

    def refuse(*args, **kwargs):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(files, "save_file", None)  # copied, not written again
    for name in ("second", "third"):
        catalog.save(tmp_path / name)
        assert content_of(tmp_path / name) == content(catalog)
        assert (tmp_path / name).stat().st_mode == (tmp_path / "first").stat().st_mode
    assert len({inode(tmp_path / name) for name in ("first", "second", "third")}) == 3
    assert sorted(os.listdir(tmp_path)) == ["first", "second", "third"]


def test_a_symbolic_link_is_copied(catalog, tmp_path):
    """As the Hub's cache has them: whoever edits the copy does not change the cache."""
    catalog.save(tmp_path / "blob")
    (tmp_path / NAME).symlink_to("blob")
    loaded = ProductCatalog.load(tmp_path / NAME)
    loaded.save(tmp_path / "new")
    assert inode(tmp_path / "new") != inode(tmp_path / "blob") and not (tmp_path / "new").is_symlink()
    assert content_of(tmp_path / "new") == content(catalog)
    # Saving over the link puts a file there, and leaves what it points to.
    blob = (tmp_path / "blob").read_bytes()
    append(loaded, "x")
    loaded.save(tmp_path / NAME)
    assert not (tmp_path / NAME).is_symlink() and (tmp_path / "blob").read_bytes() == blob
    assert content_of(tmp_path / NAME) == content(loaded)


def test_saving_where_it_lies(catalog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    catalog.save(NAME)  # a name without a folder
    number = inode(NAME)
    loaded = ProductCatalog.load(NAME)
    os.makedirs("sub")
    monkeypatch.chdir(tmp_path / "sub")
    loaded.save(tmp_path / NAME)
    loaded.save("../" + NAME)
    loaded.save("other")
    assert inode(tmp_path / NAME) == inode("other") == number and content_of("other") == content(catalog)


# Pickles


def test_a_catalog_in_a_file_pickles_small(make_parts, tmp_path):
    catalog = make_parts(num_products=3000)[2]
    whole = len(pickle.dumps(catalog))
    catalog.save(tmp_path / NAME)
    for source in (catalog, ProductCatalog.load(tmp_path / NAME)):
        data = pickle.dumps(source)
        assert len(data) < 1000 < 50_000 < whole
        assert content(pickle.loads(data)) == content(source)
        assert content(copy.deepcopy(source)) == content(source)
    append(catalog, "x")
    assert len(pickle.dumps(catalog)) > 50_000
    assert content(pickle.loads(pickle.dumps(catalog))) == content(catalog)


@pytest.mark.slow
def test_a_pickle_opens_in_another_process(catalog, tmp_path):
    catalog.save(tmp_path / NAME)
    append(catalog, "not in a file")
    (tmp_path / "pickles").write_bytes(pickle.dumps([ProductCatalog.load(tmp_path / NAME), catalog]))
    code = """
import json, pickle, sys
catalogs = pickle.load(open(sys.argv[1], "rb"))
print(json.dumps([[len(c), c.history[-1]["id"], c.product_ids([len(c) - 1]), c.sid_codes.tolist()] for c in catalogs]))
"""
    found = run_fresh(code, tmp_path / "pickles", cwd="/", check=True)
    expected = [
        [len(c), c.history[-1]["id"], c.product_ids([len(c) - 1]), c.sid_codes.tolist()]
        for c in (ProductCatalog.load(tmp_path / NAME), catalog)
    ]
    assert json.loads(found.stdout) == expected


@pytest.mark.parametrize("change", ["touched", "longer", "deleted", "replaced"])
def test_a_pickle_whose_file_changed(catalog, make_parts, tmp_path, change):
    path = tmp_path / NAME
    catalog.save(path)
    data = pickle.dumps(catalog)
    if change == "touched":
        os.utime(path, ns=(0, os.stat(path).st_mtime_ns + 1))
    elif change == "longer":
        time = os.stat(path).st_mtime_ns
        with open(path, "ab") as file:
            file.write(b"x")
        os.utime(path, ns=(0, time))
    elif change == "deleted":
        path.unlink()
    else:
        make_parts(seed=1)[2].save(path)
    with pytest.raises(
        ValueError, match="sid_catalog.safetensors, which a pickled catalog refers to, is gone or has changed"
    ):
        pickle.loads(data)
    # What is pickled from now on holds all.
    again = pickle.dumps(catalog)
    path.unlink(missing_ok=True)
    assert content(pickle.loads(again)) == content(catalog)


@pytest.mark.parametrize("saved", [False, True])
def test_hashes_do_not_change_with_use(tokenizer, tmp_path, saved):
    if saved:
        tokenizer.save_pretrained(tmp_path / "folder")
        tokenizer = SIDTokenizer.from_pretrained(tmp_path / "folder")
    before = Hasher.hash(tokenizer)
    tokenizer.encode_prompts([{"history": ["p1", "p2"], "query": "chips"}])
    tokenizer.decode_products(tokenizer.encode_products(["p3", "p4"]))
    tokenizer.codebook_fingerprint(), tokenizer.max_sid_length, tokenizer("abc")
    assert Hasher.hash(tokenizer) == before
    append(tokenizer.catalog, "x")
    assert Hasher.hash(tokenizer) != before


def test_hashes_of_two_loads_are_equal(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "folder")
    first, second = (SIDTokenizer.from_pretrained(tmp_path / "folder") for _ in range(2))
    second.encode_products(["p3", "p4"])
    assert Hasher.hash(first) == Hasher.hash(second)


def test_hashes_do_not_change_with_saving(tokenizer, tmp_path):
    """As a trainer saves it with every checkpoint: datasets that were mapped with it are found again."""
    tokenizer.save_pretrained(tmp_path / "folder")
    loaded = SIDTokenizer.from_pretrained(tmp_path / "folder")
    before = Hasher.hash(loaded)
    for number in range(10):
        loaded.save_pretrained(tmp_path / (str(number) if number % 3 else "folder"))
        loaded.catalog.save(tmp_path / "folder" / NAME)
        assert Hasher.hash(loaded) == before
    assert loaded.catalog.file["paths"][0] == str(tmp_path / "folder" / NAME)
