"""Saves that are killed at any moment, run out of disk, or meet other writers: a bundle is the old one or the new one."""

import json
import os
import resource
import signal
import time

import numpy as np
import pytest
from dying_saves import CATALOG, MANIFEST, before_each_call, copy, leftovers, state
from safetensors import safe_open
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rqsid import PromptTemplate, SIDTokenizer
from rqsid.sid_tokenizer import pretrained_tokenizer

linux = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def in_child(action):
    """Runs `action` in a forked process; returns how it ended: its exit status, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        except ValueError:
            status = 3
        except OSError:
            status = 4
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def killed_at(call, save):
    """Whether `save`, run in another process, reached its `call`-th hook, where it was killed."""

    def kill(number):
        if number == call:
            os.kill(os.getpid(), signal.SIGKILL)

    def hooked():
        with before_each_call(kill):
            save()

    status = in_child(hooked)
    assert status in (0, -signal.SIGKILL)
    return status != 0


def remains_of_kills(save, folder, snapshots):
    """What `save` would leave in `folder` if it was killed at any call: copies of each different state, and the calls."""
    found, calls = {}, []

    def look_at(number):
        calls.append(number)
        if (now := state(folder)) not in found:
            found[now] = os.path.join(snapshots, str(number))
            copy(folder, found[now])

    def hooked():
        with before_each_call(look_at):
            save()
        with open(os.path.join(snapshots, "found.json"), "w") as file:
            json.dump([found, len(calls)], file)

    os.makedirs(snapshots)
    assert in_child(hooked) == 0
    with open(os.path.join(snapshots, "found.json")) as file:
        return json.load(file)


def small_base(end="</s>", **options):
    pieces = {letter: at for at, letter in enumerate([end, *"abcdefghijklmnopqrstuvwxyz:<>_/ "])}
    backend = Tokenizer(models.BPE(vocab=pieces, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, **options)


def look(tokenizer):
    """Everything that tells one of these tokenizers from another."""
    catalog = tokenizer.catalog
    return {
        "ids": catalog.product_ids(np.arange(len(catalog))),
        "sids": tokenizer.encode_products(catalog.product_ids(np.arange(len(catalog)))),
        "columns": {name: [str(column.dtype), column.tolist()] for name, column in catalog.columns.items()},
        "history": catalog.history,
        "text": tokenizer("abc :</s>")["input_ids"],
        "tokens": [tokenizer.eos_token, tokenizer.pad_token, len(tokenizer), tokenizer.model_max_length],
        "chat": tokenizer.chat_template,
        "template": tokenizer.prompt_template.to_dict(),
        "codebooks": None
        if tokenizer.quantizer is None
        else [codebook.tolist() for codebook in tokenizer.quantizer.codebooks],
        "order": tokenizer.layer_order,
    }


def load(folder):
    return look(SIDTokenizer.from_pretrained(folder))


def append(catalog, *product_ids):
    catalog.append(list(product_ids), codes=np.arange(3 * len(product_ids)).reshape(-1, 3) % 4)


@pytest.fixture(scope="module", autouse=True)
def quick_saves():
    """Without waiting for the disk, which a killed process does not depend on, and without the files of code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setattr(SIDTokenizer, "_auto_class", None)
        yield


@pytest.fixture(scope="module")
def parts(make_parts):
    return make_parts(seed=0), make_parts(seed=1, num_products=50)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, parts):
    """Bundles by name, each in a folder that no test changes."""
    (_, quantizer, catalog), (_, other_quantizer, other_catalog) = parts
    root = tmp_path_factory.mktemp("bundles")
    made = {
        "plain": SIDTokenizer.from_base(small_base(), catalog, quantizer),
        "other": SIDTokenizer.from_base(
            small_base("<end>", model_max_length=77, chat_template="{{ messages }}"),
            other_catalog,
            other_quantizer,
            prompt_template=PromptTemplate(answer="Answer:"),
        ),
        # Another template for chats, and none of the files that the manifest vouches for differs.
        "config": SIDTokenizer.from_base(
            small_base(model_max_length=99, chat_template="{{ bos_token }}"), catalog, quantizer
        ),
        "imported": SIDTokenizer.from_base(small_base(), other_catalog),
    }
    for name, tokenizer in made.items():
        tokenizer.save_pretrained(root / name)
    appended = SIDTokenizer.from_pretrained(root / "plain")
    append(appended.catalog, "new0", "new1")
    appended.save_pretrained(root / "appended")
    # Only tokenizer_config.json and the manifest tell it from the plain one: an end token that was there already.
    ended = SIDTokenizer.from_pretrained(root / "plain")
    ended.add_special_tokens({"additional_special_tokens": ["<stop>"]})
    ended.save_pretrained(root / "two ends")
    ended.eos_token = ended.pad_token = "<stop>"
    ended.save_pretrained(root / "other end")
    # Named templates lie in a folder of their own.
    templates = SIDTokenizer.from_pretrained(root / "plain")
    templates.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    templates.save_pretrained(root / "templates")
    templates.chat_template = {"default": "{{ messages }}!", "tools": "{{ tools }}!"}
    templates.save_pretrained(root / "other templates")
    return root


PAIRS = [
    ("plain", "appended"),
    ("plain", "other"),
    ("other", "plain"),
    ("plain", "config"),
    ("config", "plain"),
    ("two ends", "other end"),
    ("imported", "other"),
    ("other", "imported"),
    ("templates", "other templates"),
]


def with_stale_template(new, old):
    """What is found after a save over another bundle: as with any tokenizer, one without template for chats keeps the old one's."""
    return new | {"chat": new["chat"] or old["chat"]}


@linux
@pytest.mark.slow
@pytest.mark.parametrize("old, new", PAIRS)
def test_a_save_killed_at_any_call(bundles, tmp_path, old, new):
    """Looked at before each call, which is what a kill leaves: test_the_remains_of_killed_saves_… sees that it is."""
    tokenizer, before, folder = SIDTokenizer.from_pretrained(bundles / new), load(bundles / old), tmp_path / "folder"
    after, found = with_stale_template(load(bundles / new), before), []
    copy(bundles / old, folder)
    remains, calls = remains_of_kills(lambda: tokenizer.save_pretrained(folder), folder, tmp_path / "remains")
    assert load(folder) == after and not leftovers(folder)
    for remaining in remains.values():
        copy(remaining, folder)
        seen = load(folder)
        assert seen in (before, after), f"mixed in {remaining}: {sorted(os.listdir(folder))}"
        found.append(seen == after)
        tokenizer.save_pretrained(folder)
        assert load(folder) == after and not leftovers(folder), remaining
    # Old, and from some call on new.
    assert found == sorted(found) and calls > 30 and len(found) > 3 and not found[0] and found[-1]


@linux
@pytest.mark.slow
def test_the_remains_of_killed_saves_load_in_a_fresh_process(bundles, tmp_path, run_fresh):
    tokenizer, folders, states, call = SIDTokenizer.from_pretrained(bundles / "other"), [], set(), 0
    while True:
        call += 1
        folder = tmp_path / str(call)
        copy(bundles / "plain", folder)
        if not killed_at(call, lambda folder=folder: tokenizer.save_pretrained(folder)):
            break
        if state(folder) not in states:
            states.add(state(folder))
            folders.append(folder)
    watched = tmp_path / "watched"
    copy(bundles / "plain", watched)
    remains, calls = remains_of_kills(lambda: tokenizer.save_pretrained(watched), watched, tmp_path / "remains")
    assert remains.keys() == states and calls == call - 1
    found = run_fresh(
        """
        import json, sys
        from rqsid import SIDTokenizer
        found = []
        for folder in sys.argv[1:]:
            t = SIDTokenizer.from_pretrained(folder)
            found.append([t.eos_token, len(t.catalog), t.catalog.history[-1]["id"], t.chat_template, t.model_max_length])
        print(json.dumps(found))
        """,
        *folders,
    )
    expected = [SIDTokenizer.from_pretrained(bundles / name) for name in ("plain", "other")]
    expected = [
        [t.eos_token, len(t.catalog), t.catalog.history[-1]["id"], t.chat_template, t.model_max_length]
        for t in expected
    ]
    assert found.count(expected[0]) > 3 and found.count(expected[1]) >= 1
    assert all(entry in expected for entry in found)


# Limits of the system


@linux
def test_a_limit_on_the_size_of_files(bundles, tmp_path):
    tokenizer, ended = SIDTokenizer.from_pretrained(bundles / "other"), set()
    before, after = (load(bundles / name) for name in ("plain", "other"))
    sizes = sorted({path.stat().st_size for path in (bundles / "other").iterdir()})
    for limit in [0, 1, *[size - 1 for size in sizes], sizes[-1]]:
        copy(bundles / "plain", tmp_path / "folder")

        def save(limit=limit):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                tokenizer.save_pretrained(tmp_path / "folder")
            except Exception as error:  # tokenizers and safetensors have errors of their own
                os._exit(5 if "arge" in str(error) else 6)

        status = in_child(save)
        ended.add(status)
        assert load(tmp_path / "folder") == (after if status == 0 else before), (limit, status)
        assert not leftovers(tmp_path / "folder")
    assert ended == {0, 5}


def as_nobody(action):
    """In a process that obeys permissions, which root does not."""

    def act():
        if os.geteuid() == 0:
            os.setgroups([])
            os.setegid(65534)
            os.seteuid(65534)
        action()

    return in_child(act)


@pytest.fixture
def open_folder(tmp_path_factory):
    """A folder that other users reach as well."""
    root = tmp_path_factory.mktemp("open")
    path = root
    changed = []
    while path.stat().st_uid == os.geteuid() and path.stat().st_mode & 0o055 != 0o055 and path != path.parent:
        changed.append((path, path.stat().st_mode))
        path.chmod(path.stat().st_mode | 0o055)
        path = path.parent
    yield root
    for path, mode in changed:
        path.chmod(mode)


@linux
@pytest.mark.parametrize("torn", [False, True])
def test_a_folder_that_cannot_be_written(bundles, open_folder, torn):
    tokenizer, folder = SIDTokenizer.from_pretrained(bundles / "other"), open_folder / "folder"
    before = load(bundles / "plain")
    copy(bundles / "plain", folder)
    if torn:
        tear(folder, tokenizer)
        assert (folder / ".sid_previous").is_dir()
    for where, folders, _ in os.walk(folder):
        for inner in folders:
            os.chmod(os.path.join(where, inner), 0o555)
    folder.chmod(0o555)
    content = state(folder)

    def check():
        if load(folder) != before:
            os._exit(7)
        tokenizer.save_pretrained(folder)

    assert as_nobody(check) == 4  # it loads, and the save is an OSError
    assert state(folder) == content and load(folder) == before
    for where, _, _ in os.walk(folder):
        os.chmod(where, 0o755)


def tear(folder, tokenizer):
    """A save that dies when one file is in place."""
    real, calls = os.replace, []

    def replace(new, old):
        if str(old) == str(folder / "sid_prompt.json"):
            calls.append(old)
            os.kill(os.getpid(), signal.SIGKILL)
        real(new, old)

    def save():
        os.replace = replace
        tokenizer.save_pretrained(folder)

    assert in_child(save) == -signal.SIGKILL


# Several writers


def test_the_second_of_two_writers_is_refused(bundles, tmp_path):
    copy(bundles / "plain", tmp_path / "folder")
    first, second = (SIDTokenizer.from_pretrained(tmp_path / "folder") for _ in range(2))
    append(first.catalog, "x")
    append(second.catalog, "y")
    first.save_pretrained(tmp_path / "folder")
    expected, content = look(first), state(tmp_path / "folder")
    assert expected["ids"][-1] == "x"
    with pytest.raises(
        ValueError, match="other changes to this catalog than this one has: somebody saved it in the meantime"
    ):
        second.save_pretrained(tmp_path / "folder")
    assert state(tmp_path / "folder") == content and not leftovers(tmp_path / "folder")
    assert load(tmp_path / "folder") == expected
    second.save_pretrained(tmp_path / "elsewhere")
    assert load(tmp_path / "elsewhere") == look(second)
    # The winner goes on, twice without changes as well.
    first.save_pretrained(tmp_path / "folder")
    append(first.catalog, "z")
    first.save_pretrained(tmp_path / "folder")
    assert load(tmp_path / "folder") == look(first)


def test_an_older_version_is_not_saved_over_a_newer_one(bundles, tmp_path):
    copy(bundles / "appended", tmp_path / "folder")
    with pytest.raises(ValueError, match="version 2 of this catalog, and this is version 1: somebody saved it"):
        SIDTokenizer.from_pretrained(bundles / "plain").save_pretrained(tmp_path / "folder")
    assert load(tmp_path / "folder") == load(bundles / "appended")
    # An unrelated one may be replaced.
    SIDTokenizer.from_pretrained(bundles / "other").save_pretrained(tmp_path / "folder")
    assert load(tmp_path / "folder") == load(bundles / "other")


@linux
def test_a_save_that_died_is_nobodys(bundles, tmp_path):
    """Its catalog lies in the folder, but was never committed: another may be saved, though it knows nothing of it."""
    folder = tmp_path / "folder"
    copy(bundles / "plain", folder)
    tear(folder, SIDTokenizer.from_pretrained(bundles / "appended"))
    with safe_open(folder / CATALOG, framework="np") as file:
        assert len(json.loads(file.metadata()["config"])["history"]) == 2
    tokenizer = SIDTokenizer.from_pretrained(folder)
    assert look(tokenizer) == load(bundles / "plain")
    append(tokenizer.catalog, "another")
    tokenizer.save_pretrained(folder)
    assert load(folder)["ids"][-1] == "another" and not leftovers(folder)


@linux
@pytest.mark.parametrize("round", range(3))
def test_four_processes_that_save_at_once(bundles, tmp_path, round):
    folder, children = tmp_path / "folder", []
    copy(bundles / "plain", folder)
    tokenizers = [SIDTokenizer.from_pretrained(folder) for _ in range(4)]
    looks = []
    for number, tokenizer in enumerate(tokenizers):
        append(tokenizer.catalog, f"of {number}")
        looks.append(look(tokenizer))
    start, go = os.pipe()
    for tokenizer in tokenizers:
        child = os.fork()
        if child == 0:
            status = 9
            try:
                os.close(go)
                os.read(start, 1)  # until all are there
                tokenizer.save_pretrained(folder)
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
    assert load(folder) == looks[ended.index(0)] and not leftovers(folder)


@linux
def test_loads_while_others_save(bundles, tmp_path):
    """Whoever loads in the middle of a commit waits for its end."""
    folder = tmp_path / "folder"
    copy(bundles / "plain", folder)
    looks = [load(bundles / name) for name in ("plain", "other")]
    tokenizer, real = SIDTokenizer.from_pretrained(bundles / "other"), os.replace
    ready, told = os.pipe()

    def replace(new, old):
        if str(old) == str(folder / "sid_prompt.json"):
            os.write(told, b"x")
            time.sleep(0.5)
        real(new, old)

    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.replace = replace
            tokenizer.save_pretrained(folder)
            status = 0
        finally:
            os._exit(status)
    os.read(ready, 1)
    assert load(folder) == looks[1]
    assert os.waitpid(child, 0)[1] == 0
    os.close(ready)
    os.close(told)


# What save_pretrained and from_pretrained are asked


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_paths_that_are_returned(bundles, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(SIDTokenizer, "_auto_class", "AutoTokenizer")
    monkeypatch.chdir(tmp_path)
    tokenizer = SIDTokenizer.from_pretrained(bundles / "templates")
    for folder in (kind(tmp_path / "new" / "and" / "nested"), kind(type(tmp_path)("relative/one"))):
        saved = tokenizer.save_pretrained(folder)
        assert isinstance(saved, tuple) and all(os.path.isfile(path) for path in saved)
        names = {os.path.relpath(path, folder) for path in saved}
        assert {"tokenizer_config.json", "chat_template.jinja", CATALOG, MANIFEST, "tokenizer.json"} <= names
        assert "additional_chat_templates/tools.jinja" in names
        assert {"tokenization_sid.py", "catalog.py", "staged_save.py"} <= set(os.listdir(folder))
        assert not leftovers(folder)
        assert look(SIDTokenizer.from_pretrained(folder)) == look(tokenizer)
        umask = os.umask(0)
        os.umask(umask)
        ours = [name for name in os.listdir(folder) if name.startswith("sid_")]
        assert {os.stat(os.path.join(folder, name)).st_mode & 0o777 for name in ours} == {0o666 & ~umask}


def test_a_file_is_no_folder(bundles, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file is a file. Pass a folder"):
        SIDTokenizer.from_pretrained(bundles / "plain").save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def test_other_files_of_the_folder_stay(bundles, tmp_path):
    copy(bundles / "plain", tmp_path / "folder")
    (tmp_path / "folder" / "model.safetensors").write_text("weights")
    (tmp_path / "folder" / "checkpoint-1").mkdir()
    (tmp_path / "folder" / "checkpoint-1" / "x.tmp").write_text("x")
    SIDTokenizer.from_pretrained(bundles / "other").save_pretrained(tmp_path / "folder")
    assert (tmp_path / "folder" / "model.safetensors").read_text() == "weights"
    assert (tmp_path / "folder" / "checkpoint-1" / "x.tmp").read_text() == "x"


def test_loading_from_a_folder_and_saving_to_it(bundles, tmp_path):
    folder = tmp_path / "folder"
    copy(bundles / "plain", folder)
    inode = (folder / CATALOG).stat().st_ino
    tokenizer = SIDTokenizer.from_pretrained(folder)
    for _ in range(3):
        tokenizer.save_pretrained(folder)
        assert (folder / CATALOG).stat().st_ino == inode and load(folder) == load(bundles / "plain")
    append(tokenizer.catalog, "x")
    tokenizer.save_pretrained(folder)
    assert (folder / CATALOG).stat().st_ino != inode and load(folder) == look(tokenizer)


@pytest.mark.parametrize("name", ["gpt2", "organisation/model"])
def test_names_that_are_no_folder_are_passed_on(monkeypatch, name):
    """With the commit of the manifest in place of the revision, and all other arguments as they are."""
    passed, asked = [], []
    monkeypatch.setattr(
        PreTrainedTokenizerFast,
        "from_pretrained",
        classmethod(lambda cls, *args, **kwargs: passed.append((cls, args, kwargs)) or small_base()),
    )
    monkeypatch.setattr(
        pretrained_tokenizer,
        "find_file",
        lambda name, file, **kwargs: (
            asked.append((name, file, kwargs)) or (file if "manifest" in file else None, "c" * 40)
        ),
    )
    SIDTokenizer.from_pretrained(name, "more", revision="main", token="hf_t")
    assert asked == [
        (name, "sid_manifest.json", {"revision": "main", "token": "hf_t"}),
        (name, "tokenizer_config.json", {"revision": "c" * 40, "token": "hf_t"}),
    ]
    assert passed == [(SIDTokenizer, (name, "more"), {"revision": "c" * 40, "token": "hf_t"})]


@linux
def test_a_subfolder_whose_save_died(bundles, tmp_path):
    copy(bundles / "plain", tmp_path / "folder")
    tear(tmp_path / "folder", SIDTokenizer.from_pretrained(bundles / "other"))
    found = look(SIDTokenizer.from_pretrained(tmp_path, subfolder="folder"))
    assert found == load(bundles / "plain")


@linux
def test_the_name_of_a_tokenizer_whose_save_died(bundles, tmp_path):
    copy(bundles / "plain", tmp_path / "folder")
    tear(tmp_path / "folder", SIDTokenizer.from_pretrained(bundles / "other"))
    assert SIDTokenizer.from_pretrained(tmp_path / "folder").name_or_path == str(tmp_path / "folder")
