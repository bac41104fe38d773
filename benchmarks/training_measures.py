"""The trainers of the training benchmark, its clocks and its memory."""

import ctypes
import gc
import sys
import tempfile
import time

import numpy as np
import torch
from datasets import Dataset
from measures import memory_mib, reset_peak_memory
from search_measures import trimmed_memory
from training_rows import (
    ROWS_PACKED,
    SESSIONS,
    SESSIONS_PACKED,
    STOCK,
    load_tokenizer,
    make_model,
    make_rows,
    make_session_rows,
    work_of,
)
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from rqsid import SIDTrainer, SIDTrainingArguments


def make_trainer(method, setting, tokenizer, model, rows, max_steps, folder):
    """
    Args:
        rows (`list[dict]`): As of [`tokenize_examples`], as many as `max_steps` batches have, in order.
    """
    arguments = {
        "output_dir": folder,
        "max_steps": max_steps,
        "per_device_train_batch_size": len(rows) // max_steps,
        "train_sampling_strategy": "sequential",
        "bf16": torch.cuda.is_available(),
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    if setting["checkpointing"]:
        arguments["gradient_checkpointing"] = True
    if method == STOCK:
        # As the tutorials do it: prompt and answer in one row, labels of -100 on the prompt, the model's own loss.
        rows = [
            {
                "input_ids": row["input_ids"] + row["label_ids"],
                "attention_mask": [1] * len(row["input_ids"] + row["label_ids"]),
                "labels": [-100] * len(row["input_ids"]) + row["label_ids"],
            }
            for row in rows
        ]
        collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
        arguments = TrainingArguments(**arguments)
        trainer = Trainer(model, arguments, train_dataset=Dataset.from_list(rows), data_collator=collator)
    else:
        arguments = SIDTrainingArguments(**arguments, packing=method in (ROWS_PACKED, SESSIONS_PACKED))
        trainer = SIDTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def now():
    """Seconds (`np.ndarray`, (2,)): of the clock, and of the processor; work of a GPU is waited for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])


class Watch(TrainerCallback):
    """
    Takes the time of a trainer's steps, and, if asked, the peak of the first step's memory.

    Before the first step the optimizer's states are there already, all zero, and with them a step of the optimizer that changes
    nothing.

    Args:
        trainer (`Trainer`): Whose steps.
        memory (`str`, *optional*):
            What to measure the peak of: a `"plain"` step, whose gradients come into being while activations go, or one
            `"accumulating"` onto gradients that are there before.
    """

    def __init__(self, trainer, memory=None):
        self.ends, self.forward_backward, self.optimizer, self.losses = [], [], [], []
        self.memory, self.level_mib, self.peak_mib = memory, None, None
        self.trainer, self.training_step = trainer, trainer.training_step
        trainer.training_step = self.timed_training_step
        trainer.add_callback(self)

    def timed_training_step(self, *args, **kwargs):
        started = now()
        loss = self.training_step(*args, **kwargs)
        self.forward_backward.append(now() - started)
        self.losses.append(float(loss))
        return loss

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        size = sum(weight.nbytes for weight in model.parameters()) / 2**20
        if self.memory != "accumulating":
            optimizer.zero_grad()
        if self.memory is not None:
            self.level_mib = start_peak()
        if self.level_mib is not None and self.memory == "plain":
            self.level_mib += size

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.optimizer_started = now()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.optimizer.append(now() - self.optimizer_started)

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(now())
        if self.level_mib is not None and self.peak_mib is None:
            self.peak_mib = peak_mib() - self.level_mib


def start_peak():
    """Memory (MiB) from which a peak is measured now; `None` where there is no /proc."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    level = trimmed_memory()
    reset_peak_memory()
    return level


def peak_mib():
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else memory_mib("VmHWM")


def train(method, setting, tokenizer, rows, max_steps, memory=None):
    """Trains a new model. Returns its [`Watch`]."""
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(setting, tokenizer)
        watch = Watch(make_trainer(method, setting, tokenizer, model, rows, max_steps, folder), memory)
        watch.trainer.train()
    watch.trainer.accelerator.free_memory()
    return watch


def times_of(watch):
    """Means of the steps but the first (`dict[str, dict]`): of whole `seconds`, and of two parts of them."""
    steps = len(watch.ends) - 1
    times = {
        "seconds": (watch.ends[-1] - watch.ends[0]) / steps,
        "forward_backward": np.mean(watch.forward_backward[1:], axis=0),
        "optimizer": np.mean(watch.optimizer[1:], axis=0),
    }
    return {name: dict(zip(("wall", "cpu"), value.tolist(), strict=True)) for name, value in times.items()}


def compare(setting, methods, steps, repeats):
    """
    Methods take turns in `repeats` rounds. A turn trains a new model for `steps` steps, and one before that counts for the losses
    only; the least of the turns counts.

    Returns:
        `dict[str, dict]`: per method `seconds` of a step, of which `forward_backward` and `optimizer`, as
        `{"wall": ..., "cpu": ...}`; the `losses` of all steps; and what [`work_of`] says of a step.
    """
    tokenizer = load_tokenizer(setting)
    if STOCK in methods:
        rows = dict.fromkeys(methods, make_rows(tokenizer, setting["rows"] * (steps + 1), setting["prompt"]))
    else:
        purchases, sessions = make_session_rows(tokenizer, setting["rows"] * (steps + 1), setting["prompt"])
        rows = {method: sessions if method in (SESSIONS, SESSIONS_PACKED) else purchases for method in methods}
    results = {}
    for _ in range(repeats):
        for method in methods:
            watch = train(method, setting, tokenizer, rows[method], steps + 1)
            times = times_of(watch)
            best = results.setdefault(method, times | {"losses": watch.losses})
            for name in times:
                best[name] = {clock: min(seconds, times[name][clock]) for clock, seconds in best[name].items()}
            del watch  # and the model, of which there is no room for two
            gc.collect()
    for method in methods:
        results[method] |= work_of(method, setting, rows[method][-(len(rows[method]) // (steps + 1)) :])
    return results


def map_large_blocks():
    """
    Maps blocks of more than 64 KiB on their own (mallopt(3), M_MMAP_THRESHOLD), which go back to the system when they are freed:
    otherwise the peak of the process would hold what its allocator keeps.
    """
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").mallopt(-3, 65536)


def measure_memory(method, setting, kind):
    """
    The peak (MiB) of a step's memory above weights, gradients and optimizer states, in a process of its own; `None` where there is
    no /proc.

    Args:
        kind (`str`): `"plain"` or `"accumulating"`, see [`Watch`].
    """
    map_large_blocks()
    tokenizer = load_tokenizer(setting)
    rows = make_rows(tokenizer, setting["rows"], setting["prompt"])
    return train(method, setting, tokenizer, rows, 1, kind).peak_mib
