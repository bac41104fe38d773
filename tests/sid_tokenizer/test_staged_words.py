"""Staged saves of files whose content is a word, in this process: thousands of saves that die."""

import errno
import os
import types

import pytest
from dying_saves import CATALOG, LEFTOVERS, MANIFEST, before_each_call, copy, leftovers, state

from rqsid.sid_tokenizer import staged_save

linux = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


class Dead(BaseException):
    pass


def stop_at(call, error=Dead, forever=True):
    """Fails at a call, and at all that follow: what would be cleaned up is not."""

    def stop(number):
        if number == call or (forever and number > call):
            raise error()

    return before_each_call(stop)


def save_words(folder, words):
    catalog = types.SimpleNamespace(history=[], ancestors=[])
    with staged_save.staged_save(folder, catalog, CATALOG, MANIFEST, read_words) as staging:
        for name, word in words.items():
            os.makedirs(os.path.dirname(os.path.join(staging, name)), exist_ok=True)
            with open(os.path.join(staging, name), "w") as file:
                file.write(word)


def read_words(path):
    if not os.path.exists(path):
        raise ValueError("no manifest")
    return {"files": {}}


def words_of(folder):
    with staged_save.recovered(folder) as whole:
        found = {}
        for where, _, names in os.walk(whole, followlinks=True):
            for name in names:
                path = os.path.relpath(os.path.join(where, name), whole)
                if not path.startswith(LEFTOVERS[0]):
                    with open(os.path.join(where, name)) as file:
                        found[path] = file.read()
        return found


FIRST = {"a": "a1", "b": "b1", "both": "same", "in/side": "i1", "only old": "o", MANIFEST: "m1"}
SECOND = {"a": "a2", "c": "c2", "both": "same", "in/side": "i2", "in/new": "n2", "deep/er/new": "d", MANIFEST: "m2"}
THIRD = {"a": "a3", "b": "b3", "e": "e3", "in/new": "n3", MANIFEST: "m2"}


@pytest.mark.slow
def test_two_saves_that_die_in_a_row(tmp_path):
    folder, remains = tmp_path / "folder", {}
    save_words(tmp_path / "first", FIRST)
    assert words_of(tmp_path / "first") == FIRST
    for call in range(1, 200):
        copy(tmp_path / "first", folder)
        try:
            with stop_at(call):
                save_words(folder, SECOND)
            break
        except Dead:
            pass
        assert words_of(folder) in (FIRST, FIRST | SECOND), call
        if state(folder) not in remains:
            copy(folder, tmp_path / str(call))
            remains[state(folder)] = tmp_path / str(call)
    assert call > 30 and words_of(folder) == FIRST | SECOND and not leftovers(folder)
    assert len(remains) > 8
    num_deaths = 0
    for remaining in remains.values():
        before, seen = words_of(remaining), set()
        for call in range(1, 300):
            copy(remaining, folder)
            try:
                with stop_at(call):
                    save_words(folder, THIRD)
                break
            except Dead:
                num_deaths += 1
            if state(folder) not in seen:
                seen.add(state(folder))
                assert words_of(folder) in (before, before | THIRD), (remaining, call)
                save_words(folder, SECOND)
                assert words_of(folder) in (before | SECOND, before | THIRD | SECOND) and not leftovers(folder)
        assert words_of(folder) == before | THIRD and not leftovers(folder)
    assert num_deaths > 300


@pytest.mark.slow
@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("forever", [True, False])
def test_an_error_at_any_call(tmp_path, monkeypatch, forever, links):
    """A disk that is full, for a moment or for good: the caller is told, and the folder is as it was."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    folder, num_errors, numbers = tmp_path / "folder", 0, []
    save_words(tmp_path / "first", FIRST)
    copy(tmp_path / "first", folder)
    with before_each_call(numbers.append):
        save_words(folder, SECOND)
    for call in range(1, numbers[-1] + 2):
        copy(tmp_path / "first", folder)
        try:
            with stop_at(call, lambda: OSError(errno.ENOSPC, "No space left on device"), forever):
                save_words(folder, SECOND)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            num_errors += 1
            seen = words_of(folder)
            assert seen in (FIRST, FIRST | SECOND), call
            if not forever and seen == FIRST:
                assert not (folder / ".sid_previous").exists()
        else:
            assert words_of(folder) == FIRST | SECOND
        save_words(folder, SECOND)
        assert words_of(folder) == FIRST | SECOND and not leftovers(folder)
    assert num_errors > 20


def test_the_manifest_comes_last(tmp_path, monkeypatch):
    """For those who read or copy the folder meanwhile, knowing nothing of all this: a new manifest vouches for new files."""
    save_words(tmp_path, FIRST)
    real, replaced = os.replace, []
    monkeypatch.setattr(
        os, "replace", lambda new, old: (replaced.append(os.path.relpath(old, tmp_path)), real(new, old))
    )
    save_words(tmp_path, SECOND)
    assert replaced[-1] == MANIFEST and set(SECOND) <= set(replaced)


def test_a_save_without_a_readable_manifest_changes_nothing(tmp_path):
    save_words(tmp_path, FIRST)
    with pytest.raises(ValueError, match="no manifest"):
        save_words(tmp_path, {"a": "a2"})
    assert words_of(tmp_path) == FIRST and not leftovers(tmp_path)


@pytest.mark.slow
def test_symbolic_links_are_replaced_and_come_back(tmp_path):
    (tmp_path / "blob").write_text("a1")
    folder = tmp_path / "folder"
    save_words(folder, FIRST)
    for call in range(1, 200):
        (folder / "a").unlink(missing_ok=True)
        (folder / "a").symlink_to("../blob")
        try:
            with stop_at(call):
                save_words(folder, FIRST | {"a": "a2"})
            break
        except Dead:
            assert words_of(folder)["a"] in ("a1", "a2")
        save_words(folder, FIRST)
    assert not (folder / "a").is_symlink() and (folder / "a").read_text() == "a2"
    assert (tmp_path / "blob").read_text() == "a1"
