"""Fitting in several processes over gloo. Starting processes takes seconds, so one group of three runs all scenarios."""

import json
import signal

import numpy as np
import pytest
import torch
from fresh_process import run_ranks

from rqsid import ResidualQuantizer, ResidualQuantizerConfig
from rqsid.sid_tokenizer import residual_kmeans

WORKER = """
import datetime, hashlib, json, os, signal, sys, time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from rqsid import ResidualQuantizer, ResidualQuantizerConfig
from rqsid.sid_tokenizer import fit_checkpoint, residual_kmeans

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=40))
points = np.load(folder / "points.npy")
CONFIGS = json.loads((folder / "configs.json").read_text())


def fit(shard, config="plain", **arguments):
    quantizer = ResidualQuantizer(ResidualQuantizerConfig(**CONFIGS[config]))
    return quantizer.fit(shard, distributed=True, **arguments)


def outcome(shard, config="plain", **arguments):
    quantizer = ResidualQuantizer(ResidualQuantizerConfig(**CONFIGS[config]))
    try:
        quantizer.fit(shard, distributed=True, **arguments)
    except Exception as error:
        dist.barrier()
        return {"error": type(error).__name__, "message": str(error), "codebooks": len(quantizer.codebooks)}
    dist.barrier()
    return {"digest": digest(quantizer)}


def digest(quantizer):
    everything = b"".join(parameter.data.numpy().tobytes() for parameter in quantizer.parameters())
    return hashlib.sha256(everything).hexdigest()
"""

SCENARIOS = (
    WORKER
    + """
found = {}
first, second = len(points) // 2, len(points) // 2 + 5000
shard = [points[:first], points[first:second], points[second:]][rank]
for config in [name for name in CONFIGS if name != "one start"]:
    # Rounding differs between numbers of threads; what the processes decide must not.
    torch.set_num_threads(2 if rank == 1 else 1)
    quantizer = fit(shard, config)
    torch.set_num_threads(1)
    found[config] = {"digest": digest(quantizer), "embedding_dim": quantizer.config.embedding_dim}
    if rank == 0:
        quantizer.save_pretrained(folder / config)
    dist.barrier()

initial_codebook = residual_kmeans.initial_codebook
residual_kmeans.initial_codebook = lambda sample, num_codes, *args: torch.tensor(points[:num_codes])
quantizer = fit(shard, "one start")
residual_kmeans.initial_codebook = initial_codebook
found["one start"] = {"digest": digest(quantizer)}
if rank == 0:
    quantizer.save_pretrained(folder / "one start")

found["uneven"] = outcome([points[:-3], points[-3:], points[:0]][rank])
quantizer = fit([points[:-3], points[-3:], points[:0]][rank], "plain")
if rank == 0:
    quantizer.save_pretrained(folder / "uneven")
quantizer = fit(shard, "plain", max_rows_in_memory=3000)
found["streamed"] = {"digest": digest(quantizer)}
if rank == 0:
    quantizer.save_pretrained(folder / "streamed")

bad = shard.copy()
bad[7, 3] = np.nan
found["nan"] = outcome(bad if rank == 1 else shard)
found["dimensions"] = outcome(shard[:, :-1].copy() if rank == 2 else shard)
found["too few"] = outcome(shard[:10])
found["all equal"] = outcome(np.ones((500, 8), dtype=np.float32))
found["equal here"] = outcome(np.full((500, 8), float(rank == 2), dtype=np.float32))
found["one-dimensional"] = outcome(shard[0] if rank == 1 else shard)
found["no such file"] = outcome("/nowhere.npy" if rank == 2 else shard)
found["max_rows_in_memory"] = outcome(shard, max_rows_in_memory=-1 if rank == 1 else 3000)

from datasets import IterableDataset

# a stream that ends early in a later pass, whichever pass that is: of sums, or of codes after a layer
def breaks_in_pass(number):
    passes = []

    def rows():
        passes.append(1)
        table = shard[:2000] if len(passes) != number else shard[:1000]
        for row in table:
            yield {"embedding": row}

    return IterableDataset.from_generator(rows)

num_passes = 2 + CONFIGS["short"]["num_iterations"] + 1
for number in (3, 4, num_passes):
    stream = breaks_in_pass(number) if rank == 1 else shard[:2000]
    found[f"stream {number}"] = outcome(stream, "short", max_rows_in_memory=1000)

# a disk that is full, where the first process writes
def full(*args, **kwargs):
    raise OSError("No space left on device")

save_file, fit_checkpoint.save_file = fit_checkpoint.save_file, full
found["full disk"] = outcome(shard, checkpoint_dir=folder / "full")
fit_checkpoint.save_file = save_file
found["after full disk"] = {"names": sorted(path.name for path in (folder / "full").rglob("*"))}
dist.barrier()

# a folder that the processes do not share: one has the state of a fit in it, the others nothing
found["first state"] = outcome(shard, checkpoint_dir=folder / f"own{rank}")
found["unshared"] = outcome(shard, checkpoint_dir=folder / f"own{rank}")
found["finished"] = outcome(shard, checkpoint_dir=folder / "own0")
found["other data"] = outcome(shard + 1, checkpoint_dir=folder / "own0")
(folder / f"rank{rank}.json").write_text(json.dumps(found))
dist.destroy_process_group()
"""
)

CONFIGS = {
    "plain": {"codebook_sizes": [32, 16], "num_iterations": 12},
    "short": {"codebook_sizes": [8, 8], "num_iterations": 3},
    "one start": {"codebook_sizes": [32, 16], "num_iterations": 8, "relocation_threshold": 0.0},
    "fast": {"codebook_sizes": [32, 16], "preset": "fast", "init": "k-means++"},
    "capacity": {"codebook_sizes": [32, 16], "num_iterations": 12, "capacity": 1.3, "init": "staged"},
    "cosine": {"codebook_sizes": [32, 16], "num_iterations": 12, "metric": "cosine", "normalize_residuals": True},
}


def anisotropic(num_points=60_000, dim=16):
    """Without clusters, so that fits from different random starts end within 0.2 % of each other."""
    spread = np.linspace(2, 0.3, dim)
    return (np.random.default_rng(0).standard_normal((num_points, dim)) * spread).astype(np.float32)


@pytest.fixture(scope="module")
def points():
    return anisotropic()


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory, points):
    folder = tmp_path_factory.mktemp("distributed")
    np.save(folder / "points.npy", points)
    (folder / "configs.json").write_text(json.dumps(CONFIGS))
    run_ranks(3, SCENARIOS, folder)
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(3)]


KILLED = (
    WORKER
    + """
kill_at = int(sys.argv[2])
calls = []
save_unfinished = fit_checkpoint.FitCheckpoint.save_unfinished

def save_and_die(self, *state):
    save_unfinished(self, *state)
    calls.append(1)
    if rank == 1 and len(calls) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

fit_checkpoint.FitCheckpoint.save_unfinished = save_and_die
shard = points[: len(points) // 3] if rank == 0 else points[len(points) // 3 :]
quantizer = ResidualQuantizer(ResidualQuantizerConfig(**CONFIGS["short"]))
try:
    quantizer.fit(shard, distributed=True, checkpoint_dir=folder / "state")
except RuntimeError as error:
    (folder / "survivor.json").write_text(json.dumps([str(error), len(quantizer.codebooks)]))
    raise
resumed = [digest(quantizer), len(calls)]
whole = ResidualQuantizer(quantizer.config).fit(shard, distributed=True, checkpoint_dir=folder / "other")
if rank == 0:
    (folder / "digests.json").write_text(json.dumps([*resumed, digest(whole), len(calls) - resumed[1]]))
"""
)


def each(scenarios, name, key):
    return [found[name].get(key) for found in scenarios[1]]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["plain", "fast", "capacity", "cosine"])
def test_processes_agree_to_the_bit_and_fit_as_well_as_one(scenarios, points, config):
    assert len(set(each(scenarios, config, "digest"))) == 1
    quantizer = ResidualQuantizer.from_pretrained(scenarios[0] / config)
    alone = ResidualQuantizer(ResidualQuantizerConfig(**CONFIGS[config])).fit(points)
    # Random starts differ, which is worth less than one percent.
    assert quantizer.relative_error(points) == pytest.approx(alone.relative_error(points), rel=1e-2)


@pytest.mark.slow
def test_same_start_gives_the_single_process_up_to_rounding(scenarios, points, monkeypatch):
    """Two fits from the rows of two samples end in two optima; from one start there is only rounding between them."""
    start = torch.tensor(points[:32])
    monkeypatch.setattr(residual_kmeans, "initial_codebook", lambda sample, num_codes, *args: start[:num_codes])
    together = ResidualQuantizer.from_pretrained(scenarios[0] / "one start")
    alone = ResidualQuantizer(ResidualQuantizerConfig(**CONFIGS["one start"])).fit(points)
    assert len(set(each(scenarios, "one start", "digest"))) == 1
    assert together.relative_error(points) == pytest.approx(alone.relative_error(points), rel=1e-3)
    np.testing.assert_allclose(together.codebooks[0], alone.codebooks[0], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uneven", "streamed"])
def test_a_process_with_hardly_any_rows_and_streams(scenarios, points, name):
    """In `uneven` one process has three rows and one none; in `streamed` none holds all of its rows."""
    assert len(set(each(scenarios, name, "digest"))) == 1 and each(scenarios, name, "digest")[0] is not None
    alone = ResidualQuantizer(ResidualQuantizerConfig(**CONFIGS["plain"])).fit(points)
    quantizer = ResidualQuantizer.from_pretrained(scenarios[0] / name)
    assert quantizer.relative_error(points) == pytest.approx(alone.relative_error(points), rel=5e-3)


# Scenario, the rank that fails, its error and message: the others must say which one it was, and none may wait for ever.
FAILURES = {
    "nan": (1, "ValueError", "first in row 7"),
    "one-dimensional": (1, "ValueError", "shape (16,)"),
    "no such file": (2, "ValueError", "no file or folder"),
    "max_rows_in_memory": (1, "ValueError", "max_rows_in_memory=-1"),
    "stream 3": (1, "ValueError", "ended after 1000 rows"),
    "stream 4": (1, "ValueError", "ended after 1000 rows"),
    "stream 6": (1, "ValueError", "ended after 1000 rows"),
    "full disk": (0, "OSError", "No space left"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_in_one_process_is_raised_in_all(scenarios, name):
    failing, error, message = FAILURES[name]
    for rank in range(3):
        found = scenarios[1][rank][name]
        assert found["codebooks"] == 0
        if rank == failing:
            assert found["error"] == error and message in found["message"]
        else:
            assert found["error"] == "RuntimeError" and f"process {failing} failed" in found["message"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, message",
    [
        ("dimensions", "[16, 16, 15] dimensions"),
        ("too few", "30 embeddings cannot fill a codebook of 32"),
        ("all equal", "All 1500 embeddings are equal"),
        ("unshared", "must be a folder that all of them see"),
        ("other data", "state of a fit of other embeddings"),
    ],
)
def test_what_all_processes_refuse(scenarios, name, message):
    assert each(scenarios, name, "error") == ["ValueError"] * 3
    assert all(message in found for found in each(scenarios, name, "message"))


@pytest.mark.slow
def test_shards_of_equal_rows_that_differ_between_processes_are_fitted(scenarios):
    assert (
        len(set(each(scenarios, "equal here", "digest"))) == 1 and each(scenarios, "equal here", "error") == [None] * 3
    )


@pytest.mark.slow
def test_checkpoints_of_several_processes(scenarios):
    assert each(scenarios, "after full disk", "names") == [[], [], []]
    plain = each(scenarios, "plain", "digest")
    assert each(scenarios, "first state", "digest") == plain == each(scenarios, "finished", "digest")


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_fit_goes_on_later(tmp_path, points):
    np.save(tmp_path / "points.npy", points[:6000])
    (tmp_path / "configs.json").write_text(json.dumps(CONFIGS))
    # In the second layer, of three passes each.
    survivor, killed = run_ranks(2, KILLED, tmp_path, 4, check=False)
    assert killed.returncode == -signal.SIGKILL and survivor.returncode != 0, survivor.stderr
    assert not (tmp_path / "digests.json").exists()
    assert json.loads((tmp_path / "survivor.json").read_text())[1] == 0  # no half-fitted quantizer
    run_ranks(2, KILLED, tmp_path, 0)
    resumed, passes, whole, passes_of_whole = json.loads((tmp_path / "digests.json").read_text())
    assert passes == 2 and passes_of_whole == 6 and resumed == whole


def test_without_a_process_group(points):
    quantizer = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=[4]))
    with pytest.raises(ValueError, match="no process group is initialised.*accelerate launch"):
        quantizer.fit(points[:100], distributed=True)
    assert len(quantizer.codebooks) == 0
