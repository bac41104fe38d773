"""Trainings that are killed, and go on from the last whole checkpoint as if nothing had happened."""

import importlib
import json
import os
import signal
import time

import pytest
import torch.distributed as dist
from datasets import Dataset
from dying_saves import copy
from dying_training import DieWithinStep, before_each_write, die, in_child
from transformers.trainer_utils import get_last_checkpoint

from rqsid import SIDTokenizer, SIDTrainer, SIDTrainingArguments
from rqsid.sid_tokenizer.files import file_entry, read_json
from rqsid.trainer import checkpoints
from rqsid.trainer.checkpoints import (
    begin_checkpoint,
    check_checkpoint,
    checkpoint_to_resume,
    finish_checkpoint,
    last_checkpoint,
    read_arguments,
    remove_unfinished,
    rotate_checkpoints,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the tests fork")
one_family = pytest.mark.parametrize("base_tokenizer, make_tiny_model", [("llama", "llama")], indirect=True)
KILLED = -signal.SIGKILL


@pytest.fixture
def make(tokenizer, make_tiny_model, make_purchases):
    """`make(output_dir, cls=SIDTrainer, rows=22, stream=False, callbacks=None, **args)`: a trainer, always of the same start."""
    purchases, vocabulary = make_purchases(30), tokenizer.base_size

    def make(output_dir, cls=SIDTrainer, rows=22, stream=False, callbacks=None, **args):
        train = Dataset.from_list(purchases[:rows])
        if stream:
            train = train.to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=8)
        args = {
            "max_steps": 8,
            "learning_rate": 5e-3,
            "logging_steps": 1,
            "save_steps": 2,
            "disable_tqdm": True,
        } | args
        args = {"per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none", "warmup_steps": 3} | args
        return cls(
            make_tiny_model(vocabulary, attention_dropout=0.2),
            SIDTrainingArguments(str(output_dir), **args),
            train_dataset=train,
            processing_class=tokenizer,
            callbacks=callbacks,
        )

    importlib.import_module("deepspeed")  # accelerate would import it in every child
    yield make
    tokenizer.prompt_template.max_length = None


def story(trainer):
    """What training was: each step's loss, gradient and learning rate, and the weights in the end."""
    steps = [
        [entry[key] for key in ("step", "loss", "grad_norm", "learning_rate")]
        for entry in trainer.state.log_history[:-1]
    ]
    return json.dumps([steps, [weight.double().sum().item() for weight in trainer.model.state_dict().values()]])


def train(make, folder, resume=None, **options):
    """Trains in another process, which may die; returns its story if it doesn't."""

    def act():
        trainer = make(folder, **options)
        trainer.train(resume)
        with open(f"{folder}.json", "w") as file:
            file.write(story(trainer))

    status = in_child(act)
    assert status in (0, KILLED)
    if status == KILLED:
        return None
    with open(f"{folder}.json") as file:
        return json.load(file)


@one_family
@pytest.mark.slow
@pytest.mark.parametrize(
    "deaths, options",
    [
        ({6: 4}, {"gradient_accumulation_steps": 2}),  # 6 batches an epoch, 3 steps; the last batch is short
        ({4: 2}, {"gradient_accumulation_steps": 4}),  # 6 batches, 2 steps, the second of half as many
        ({4: 2, 8: 6}, {"gradient_accumulation_steps": 2, "stream": True, "rows": 30}),  # 8 batches a pass, 4 steps
    ],
    ids=["two batches a step", "a short last step", "stream"],
)
def test_killed_within_a_step(make, tmp_path, deaths, options):
    whole = train(make, tmp_path / "whole", **options)
    assert len(whole[0]) == 8 and whole[0][-1][1] < whole[0][0][1]
    for died, resumed in deaths.items():
        folder = tmp_path / f"died{died}"
        assert train(make, folder, callbacks=[DieWithinStep(died)], **options) is None
        assert last_checkpoint(folder) == str(folder / f"checkpoint-{resumed}")
        assert train(make, folder, resume=True, **options) == whole, died


class DyingTrainer(SIDTrainer):
    """At step 4, many processes save at once, each to a folder of its own, and each but the first dies at another call."""

    def _save_checkpoint(self, model, trial):
        if self.state.global_step != 4:
            return super()._save_checkpoint(model, trial)
        run, calls, finishing = self.args.output_dir, 0, None

        def save(folder, action):
            def act():
                self.args.output_dir = folder
                with before_each_write(action):
                    SIDTrainer._save_checkpoint(self, model, trial)
                with open(f"{run}.calls", "w") as file:
                    json.dump([calls, finishing], file)

            copy(run, folder)
            return in_child(act)

        def count(number):
            nonlocal calls, finishing
            calls = number
            if finishing is None and os.path.exists(f"{run}-0/checkpoint-4/trainer_state.json"):
                finishing = number

        assert save(f"{run}-0", count) == 0
        with open(f"{run}.calls") as file:
            calls, finishing = json.load(file)
        # All calls by which a save begins and ends, up to the first ones that delete the old checkpoint; a sample of the others.
        sample = {
            *range(1, 8),
            *range(finishing, finishing + 26),
            *range(1, calls - 5, max(1, calls // 20)),
            calls - 5,
        }
        for call in sorted(sample):
            assert save(f"{run}-{call}", lambda number, call=call: number == call and die()) == KILLED
        die()


def contents(folder):
    """The state that training goes on from, byte by byte, as far as it is no file that names its own folder."""
    names = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
    loaded = SIDTokenizer.from_pretrained(folder)
    return [file_entry(os.path.join(folder, name)) for name in names], len(loaded.catalog), loaded.get_vocab()


@one_family
@pytest.mark.slow
def test_killed_within_a_save(make, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # for speed; it does nothing to a process that is killed
    whole = train(make, tmp_path / "whole", save_strategy="no")
    assert train(make, tmp_path / "run", cls=DyingTrainer, save_total_limit=1) is None
    folders = sorted(tmp_path.glob("run-*"), key=lambda path: int(path.name.split("-")[1]))
    survivor, *folders = folders
    states = {2: contents(tmp_path / "run" / "checkpoint-2"), 4: contents(survivor / "checkpoint-4")}
    assert os.listdir(survivor) == ["checkpoint-4"] and len(folders) > 40
    found = []
    for folder in folders:
        last = last_checkpoint(folder)
        assert last is not None, folder
        found.append(int(last.rsplit("-")[-1]))
        assert contents(last) == states[found[-1]], folder
    # Calls are numbered a little differently from process to process, so around the change both may be found.
    assert found[0] == 2 and found[-1] == 4
    late, new = len(found) - 1 - found[::-1].index(2), found.index(4)
    # What transformers takes for the last checkpoint is the new one long before.
    assert get_last_checkpoint(folders[late]).endswith("checkpoint-4")
    with pytest.raises(ValueError, match="did not finish"):
        check_checkpoint(folders[late] / "checkpoint-4")
    remains = [any(name.startswith(checkpoints.TEMPORARY) for name in os.listdir(folder)) for folder in folders]
    assert any(remains[:7]) and remains[-1]
    # Before anything was written, before the list was, with both, and half-way through deleting the old one.
    for number in (0, late, new, len(folders) - 1):
        assert train(make, folders[number], resume=True, save_total_limit=1) == whole, folders[number]
        assert os.listdir(folders[number]) == ["checkpoint-8"]


# Checkpoints, made by hand


def fake(
    folder, step, files=("model.safetensors", "rng_state.pth", "global_step2/zero_optim_states.pt"), finished=True
):
    begin_checkpoint(folder)
    for name in files:
        os.makedirs(os.path.dirname(folder / name), exist_ok=True)
        (folder / name).write_bytes(b"x" * 10)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if finished:
        finish_checkpoint(folder)
    return str(folder)


def test_what_is_refused(tmp_path):
    folder = tmp_path / "checkpoint-2"
    check_checkpoint(fake(folder, 2))
    assert json.loads((folder / "sid_checkpoint.json").read_text()) == {
        "format_version": 1,
        "is_finished": True,
        "global_step": 2,
        "num_processes": None,
        "files": {
            "model.safetensors": 10,
            "rng_state.pth": 10,
            "global_step2/zero_optim_states.pt": 10,
            "trainer_state.json": len('{"global_step": 2}'),
        },
    }
    (folder / "global_step2" / "zero_optim_states.pt").unlink()
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(
        ValueError, match="without global_step2/zero_optim_states.pt; with other sizes: model.safetensors .1 bytes"
    ):
        check_checkpoint(folder)
    fake(folder, 2)
    (folder / "sid_checkpoint.json").write_text('{"format_version": 1, "fil')
    with pytest.raises(ValueError, match="not valid JSON"):
        check_checkpoint(folder)
    (folder / "sid_checkpoint.json").write_text('{"format_version": 1}')
    with pytest.raises(ValueError, match="lists no files"):
        check_checkpoint(folder)
    (folder / "sid_checkpoint.json").write_text('{"format_version": 2}')
    with pytest.raises(ValueError, match="format_version=2, this version of rqsid reads 1"):
        check_checkpoint(folder)
    (folder / "sid_checkpoint.json").unlink()
    with pytest.raises(ValueError, match="the save did not finish, or another Trainer made the checkpoint"):
        check_checkpoint(folder)
    # Whoever knows better says so.
    finish_checkpoint(folder)
    check_checkpoint(folder)
    (folder / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="has no trainer_state.json"):
        finish_checkpoint(folder)
    with pytest.raises(ValueError, match="no checkpoint folder"):
        check_checkpoint(tmp_path / "checkpoint-3")


def test_a_model_alone_is_not_resumed(tmp_path):
    folder = fake(tmp_path / "checkpoint-2", 2, files=["model.safetensors"])
    check_checkpoint(folder, to_resume=False)
    with pytest.raises(ValueError, match="no state of the optimizer"):
        check_checkpoint(folder)
    # It counts, though, when old ones are deleted.
    fake(tmp_path / "checkpoint-4", 4, files=["model.safetensors"])
    rotate_checkpoints(str(tmp_path / "checkpoint-4"), 1)
    assert os.listdir(tmp_path) == ["checkpoint-4"]


def test_files_of_an_earlier_try_are_gone(tmp_path):
    folder = tmp_path / "checkpoint-2"
    fake(folder, 2, files=["rng_state_0.pth", "rng_state_1.pth", "model-00001-of-00002.safetensors"], finished=False)
    begin_checkpoint(folder)
    assert os.listdir(folder) == ["sid_checkpoint.json"] and os.listdir(tmp_path) == ["checkpoint-2"]


def test_the_last_whole_one(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(checkpoints.logger, "warning", warned.append)
    assert last_checkpoint(tmp_path / "nothing") is None and last_checkpoint(tmp_path) is None
    for step in (2, 10, 4):
        fake(tmp_path / f"checkpoint-{step}", step, finished=step != 10)
    fake(tmp_path / "checkpoint-12", 12)
    (tmp_path / "checkpoint-12" / "sid_checkpoint.json").unlink()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-14").write_text("a file")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert sorted(text.split(":")[0] for text in warned) == [
        f"Not resuming from checkpoint-{step}" for step in (10, 12)
    ]
    # Only what a save of this trainer began is removed.
    remove_unfinished(tmp_path, should_save=False)
    assert (tmp_path / "checkpoint-10").is_dir()
    (tmp_path / "_sid_checkpoint-x" / "checkpoint-6").mkdir(parents=True)
    remove_unfinished(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [f"checkpoint-{end}" for end in (12, 14, 2, 4, "best")]


def test_what_to_resume_from(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(checkpoints.logger, "warning", warned.append)
    args = SIDTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    assert checkpoint_to_resume(None, args) is checkpoint_to_resume(False, args) is None
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        checkpoint_to_resume(True, args)
    folder = tmp_path / "checkpoint-2"
    fake(folder, 2)
    assert checkpoint_to_resume(True, args) == checkpoint_to_resume(folder, args) == str(folder) and not warned
    finish_checkpoint(folder, num_processes=2)
    assert checkpoint_to_resume(str(folder), args) == str(folder)
    assert "was saved by 2 processes and is resumed by 1" in warned[0]
    (folder / "rng_state.pth").unlink()
    with pytest.raises(ValueError, match="without rng_state.pth"):
        checkpoint_to_resume(folder, args)


@pytest.mark.parametrize(
    "limit, best, left",
    [(None, None, "2 4 6 8"), (0, None, "2 4 6 8"), (2, None, "6 8"), (1, 2, "2 8"), (3, 2, "2 6 8")],
)
def test_rotation(tmp_path, limit, best, left):
    for step in (2, 4, 6, 8):
        fake(tmp_path / f"checkpoint-{step}", step)
    fake(tmp_path / "checkpoint-5", 5, finished=False)  # neither counted nor deleted
    best = best and str(tmp_path / f"checkpoint-{best}")
    rotate_checkpoints(str(tmp_path / "checkpoint-8"), limit, best)
    assert {*left.split(), "5"} == {name.split("-")[1] for name in os.listdir(tmp_path)}


def test_two_nodes_with_disks_of_their_own(tmp_path):
    def node(rank):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=2)
        disk = tmp_path / str(rank)
        assert last_checkpoint(disk) is None
        for step in (2, 4):
            fake(disk / f"checkpoint-{step}", step)
        fake(disk / "checkpoint-6", 6, finished=False)
        if rank == 0:  # the second node was killed before it wrote its list
            path = disk / "checkpoint-6" / "sid_checkpoint.json"
            path.write_text((disk / "checkpoint-4" / "sid_checkpoint.json").read_text())
            check_checkpoint(disk / "checkpoint-6")
        assert last_checkpoint(disk) == str(disk / "checkpoint-4")
        # On one disk: a part that is late is listed, and no process goes on before the list is there.
        folder = tmp_path / "checkpoint-2"
        begin_checkpoint(folder, should_save=rank == 0)
        assert (folder / "sid_checkpoint.json").is_file()
        if rank == 0:
            (folder / "trainer_state.json").write_text('{"global_step": 2}')
        else:
            time.sleep(0.3)
        (folder / f"rng_state_{rank}.pth").write_text("x")
        finish_checkpoint(folder, should_save=rank == 0)
        check_checkpoint(folder)
        assert {"rng_state_0.pth", "rng_state_1.pth"} < set(read_json(folder / "sid_checkpoint.json")["files"])

    second = os.fork()
    if second == 0:
        os._exit(in_child(lambda: node(1)) != 0)
    assert in_child(lambda: node(0)) == 0
    assert os.waitpid(second, 0)[1] == 0


# Arguments


@one_family
def test_arguments_are_json_without_tokens(make, tmp_path):
    def act():
        trainer = make(
            tmp_path / "run",
            save_total_limit=3,
            hub_token="hf_secret",
            lr_scheduler_type="cosine",
            eval_top_k=7,
            max_steps=2,
        )
        trainer.train()
        trainer.save_model(tmp_path / "last")
        for folder in (tmp_path / "run" / "checkpoint-2", tmp_path / "last"):
            assert not (folder / "training_args.bin").exists()
            for path in folder.rglob("*"):
                assert path.is_dir() or b"hf_secret" not in path.read_bytes(), path
            read = read_arguments(folder)
            assert read.to_dict() == trainer.args.to_dict() and read.hub_token is None
            assert read.save_total_limit == 3 and read.lr_scheduler_type == "cosine" and read.eval_top_k == 7

    assert in_child(act) == 0


def test_arguments_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="has no training_args.json"):
        read_arguments(tmp_path)
    (tmp_path / "training_args.json").write_text('{"output_dir": "x", "gone": 1}')
    with pytest.raises(ValueError, match="written by another version.*gone"):
        read_arguments(tmp_path)
