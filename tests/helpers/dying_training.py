"""Trainings that are killed: in the middle of a step, or at a chosen call of a save."""

import builtins
import contextlib
import gc
import os
import random
import signal
import time

import torch
from dying_saves import before_each_call
from safetensors import torch as safetensors_torch
from transformers import TrainerCallback, modeling_utils


def in_child(action):
    """Runs `action` in a forked process; returns how it ended: its exit status, or minus the signal that killed it."""
    state = random.getstate()
    child = os.fork()
    if child == 0:
        random.setstate(state)  # which Python seeds anew in a fork
        gc.freeze()  # collecting garbage would copy every page of the parent
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def die():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


class DieWithinStep(TrainerCallback):
    """Dies when half the gradients of a step are there."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            die()


@contextlib.contextmanager
def before_each_write(action):
    """
    Calls `action(number)` before each call that changes the disk, and half-way through each file that torch and safetensors
    write.
    """
    number = 0

    def count(_=None):
        nonlocal number
        number += 1
        action(number)

    def opened(file, mode="r", *args, **kwargs):
        if set(mode) & set("wax+"):
            count()
        return real_open(file, mode, *args, **kwargs)

    def halved(function, path_at):
        def write(*args, **kwargs):
            count()
            function(*args, **kwargs)
            path = args[path_at]
            with real_open(path, "rb") as file:
                content = file.read()
            with real_open(path, "wb") as file:
                file.write(content[: len(content) // 2])
            count()
            with real_open(path, "wb") as file:
                file.write(content)

        return write

    real_open, real_torch, real_model = builtins.open, torch.save, modeling_utils.safe_save_file
    try:
        builtins.open, torch.save = opened, halved(real_torch, 1)
        modeling_utils.safe_save_file = halved(safetensors_torch.save_file, 1)
        with before_each_call(count):
            yield
    finally:
        builtins.open, torch.save, modeling_utils.safe_save_file = real_open, real_torch, real_model
