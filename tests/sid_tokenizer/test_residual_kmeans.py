"""What only a real process shows: a fit that is killed; and a write that fails. The options are tested beside this file."""

import signal

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from fresh_process import run_fresh

from rqsid import ResidualQuantizer, ResidualQuantizerConfig
from rqsid.sid_tokenizer import fit_checkpoint

CONFIG = {"codebook_sizes": [12, 8], "num_iterations": 4, "capacity": 1.3}

KILLED = """
import os, signal, sys
import torch
from rqsid import ResidualQuantizer, ResidualQuantizerConfig
from rqsid.sid_tokenizer import fit_checkpoint

folder, config, calls = sys.argv[1], eval(sys.argv[2]), []
save_file = fit_checkpoint.save_file

def die_halfway(tensors, path, **arguments):
    calls.append(1)
    save_file(tensors, path, **arguments)
    if len(calls) == 7:
        with open(path, "r+b") as file:
            file.truncate(100)
        os.kill(os.getpid(), signal.SIGKILL)

fit_checkpoint.save_file = die_halfway
torch.set_num_threads(1)
ResidualQuantizer(ResidualQuantizerConfig(**config)).fit(
    folder + "/points.npy", checkpoint_dir=folder + "/state", max_rows_in_memory=500
)
"""


@pytest.fixture
def points():
    random = np.random.default_rng(0)
    centres = random.standard_normal((30, 10))
    return (centres[random.integers(0, 30, 2000)] + 0.3 * random.standard_normal((2000, 10))).astype(np.float32)


def quantizer():
    return ResidualQuantizer(ResidualQuantizerConfig(**CONFIG))


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.slow
def test_a_fit_killed_while_it_writes_goes_on_to_the_same_bits(tmp_path, points):
    """The seventh write, of the second layer, is cut off by SIGKILL: the sixth must still be whole."""
    np.save(tmp_path / "points.npy", points)
    killed = run_fresh(KILLED, tmp_path, repr(CONFIG))
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    before = (tmp_path / "state" / "fit.safetensors").stat().st_mtime_ns
    writes, save_file = [], fit_checkpoint.save_file
    fit = {"max_rows_in_memory": 500}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fit_checkpoint, "save_file", lambda *args, **named: (writes.append(1), save_file(*args, **named))
        )
        resumed = quantizer().fit(str(tmp_path / "points.npy"), checkpoint_dir=tmp_path / "state", **fit)
    assert len(writes) == 10 - 6  # four passes and the end, for each layer
    assert (tmp_path / "state" / "fit.safetensors").stat().st_mtime_ns > before
    assert same(resumed, quantizer().fit(str(tmp_path / "points.npy"), **fit))


def test_a_write_that_fails_leaves_the_last_state_and_no_other_file(tmp_path, monkeypatch, points):
    save_file, calls = fit_checkpoint.save_file, []

    def full_disk(tensors, path, **arguments):
        calls.append(1)
        if len(calls) == 3:
            with open(path, "wb") as file:
                file.write(b"half")
            raise OSError("No space left on device")
        save_file(tensors, path, **arguments)

    monkeypatch.setattr(fit_checkpoint, "save_file", full_disk)
    unfitted = quantizer()
    with pytest.raises(OSError, match="No space left"):
        unfitted.fit(points, checkpoint_dir=tmp_path)
    assert len(unfitted.codebooks) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["fit.safetensors"]
    assert same(quantizer().fit(points, checkpoint_dir=tmp_path), quantizer().fit(points))
    assert len(calls) == 3 + 8  # two passes of the ten writes were done


def test_a_finished_fit_is_only_read(tmp_path, monkeypatch, points):
    first = quantizer().fit(points, checkpoint_dir=tmp_path)

    def fail(*args, **named):
        raise AssertionError("fitted again")

    monkeypatch.setattr(fit_checkpoint, "save_file", fail)
    assert same(quantizer().fit(points, checkpoint_dir=tmp_path), first)
    # Beams are a matter of encoding; what was fitted stays.
    with pytest.raises(ValueError, match="another configuration"):
        ResidualQuantizer(ResidualQuantizerConfig(**CONFIG | {"num_iterations": 5})).fit(
            points, checkpoint_dir=tmp_path
        )


@pytest.mark.parametrize("content", [b"", b"x" * 500, b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_a_file_that_is_no_state_is_refused_and_kept(tmp_path, points, content):
    (tmp_path / "fit.safetensors").write_bytes(content)
    unfitted = quantizer()
    with pytest.raises(ValueError, match="fit.safetensors cannot be read.*Delete it"):
        unfitted.fit(points, checkpoint_dir=tmp_path)
    assert (tmp_path / "fit.safetensors").read_bytes() == content and len(unfitted.codebooks) == 0


@pytest.mark.parametrize(
    "max_rows, message", [(0, "=0 leaves no rows"), (-5, "=-5 leaves no rows"), (11, "leaves 11 rows to start 12")]
)
def test_too_few_rows_in_memory(points, max_rows, message):
    with pytest.raises(ValueError, match=message):
        quantizer().fit(points, max_rows_in_memory=max_rows)


@pytest.mark.parametrize("num_rows", [1990, 2010])
def test_out_that_does_not_fit_a_stream(points, num_rows):
    stream = IterableDataset.from_generator(lambda: ({"embedding": row} for row in points))
    fitted, out = quantizer().fit(points), np.zeros((2000, 2), dtype=np.int16)
    np.testing.assert_array_equal(fitted.encode(stream, out=out), fitted.encode(points))
    with pytest.raises(ValueError, match=rf"out has shape \({num_rows}, 2\)"):
        fitted.encode(stream, out=np.zeros((num_rows, 2), dtype=np.int16))


@pytest.mark.parametrize("max_rows", [None, 1000])
def test_rows_of_which_nearly_all_are_equal_are_fitted(max_rows):
    """All of a random sample of them are equal."""
    rows = np.zeros((50_000, 4), dtype=np.float32)
    rows[7::25_000] = 3
    config = ResidualQuantizerConfig(codebook_sizes=[2], num_iterations=2)
    assert ResidualQuantizer(config).fit(rows, max_rows_in_memory=max_rows).encode(rows).shape == (50_000, 1)
    with pytest.raises(ValueError, match="All 50000 embeddings are equal"):
        ResidualQuantizer(config).fit(np.ones_like(rows), max_rows_in_memory=max_rows)
