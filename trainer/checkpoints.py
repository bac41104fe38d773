"""Checkpoints that are whole or not taken: a list of their files is written last, and resuming goes by it."""

import json
import math
import os
import re
import shutil
import tempfile
from contextlib import contextmanager

import torch.distributed as dist
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import logging

from ..sid_tokenizer.files import read_json, write_json
from .training_args import SIDTrainingArguments

logger = logging.get_logger(__name__)

MANIFEST, ARGUMENTS, TRAINER_STATE = "sid_checkpoint.json", "training_args.json", "trainer_state.json"
FORMAT_VERSION = 1
# What is being made or deleted lies in folders of this name, which nobody takes for checkpoints.
TEMPORARY = "_sid_checkpoint-"
# What is being pushed, likewise.
PUSH_FOLDER = "_push-"


# Saving


@contextmanager
def whole_checkpoint(folder, args):
    """
    Makes what the block saves to `folder` a checkpoint that is whole or not taken. Every process enters it, around
    `Trainer._save_checkpoint`.

    `Trainer` deletes older checkpoints, and uploads the new one, before that one could have its list of files: a process
    killed in between would leave no checkpoint at all. Both are off while the block runs, and come after it.

    Args:
        folder (`str`):
            The checkpoint's folder. What an earlier try left there is removed first.
        args ([`SIDTrainingArguments`]):
            The trainer's arguments.
    """
    begin_checkpoint(folder, args.should_save)
    put_off = {"save_total_limit": args.save_total_limit, "push_to_hub": args.push_to_hub}
    args.save_total_limit, args.push_to_hub = None, False
    try:
        yield
    finally:
        for name, value in put_off.items():
            setattr(args, name, value)
    if args.should_save:
        write_arguments(args, folder)  # once more: the block's lack what was put off
    finish_checkpoint(folder, args.should_save, args.world_size)


def begin_checkpoint(folder, should_save=True):
    """
    Makes an empty folder, marked as unfinished, of `folder`. Every process calls it.

    Files of an earlier try would otherwise mix with those of this one: the random state of a process that there is no more,
    or shards of a model that was cut in other places.

    Args:
        folder (`str`):
            The checkpoint's folder.
        should_save (`bool`, *optional*, defaults to `True`):
            Whether this process writes; `args.should_save`.
    """
    _wait_for_everyone()
    if should_save:
        if os.path.isdir(folder):
            _remove(folder)
        # Marked before it has its name.
        os.makedirs(os.path.dirname(os.path.abspath(folder)), exist_ok=True)
        with _temporary_folder(folder) as temporary:
            os.mkdir(temporary)
            write_json(os.path.join(temporary, MANIFEST), {"format_version": FORMAT_VERSION, "is_finished": False})
            try:
                os.rename(temporary, folder)
            except OSError:
                if not _is_unfinished(folder):  # another node's main process was faster, on a disk that they share
                    raise
    _wait_for_everyone()


def finish_checkpoint(folder, should_save=True, num_processes=None):
    """
    Writes the list of a checkpoint's files and their sizes, `sid_checkpoint.json`, which says that it is whole. Every process
    calls it, when it has written its part. Sizes, and no hashes: an optimizer may hold a hundred gigabytes.

    A checkpoint that another Trainer saved has no such list. Whoever knows that its save came to an end may write one with
    this function, and resume from it then.

    Args:
        folder (`str`):
            The checkpoint's folder.
        should_save (`bool`, *optional*, defaults to `True`):
            Whether this process writes, which is one of all, or one of each node with `save_on_each_node`;
            `args.should_save`.
        num_processes (`int`, *optional*):
            How many processes train. Resuming with another number of them is warned of.

    Raises:
        `ValueError`: if `folder` holds no `trainer_state.json`, so that it is no checkpoint.
    """
    _wait_for_everyone()
    if should_save:
        state = os.path.join(folder, TRAINER_STATE)
        if not os.path.isfile(state):
            raise ValueError(
                f"{folder} has no {TRAINER_STATE}, so it is no checkpoint of a Trainer that ended its save."
            )
        content = {
            "format_version": FORMAT_VERSION,
            "is_finished": True,
            "global_step": read_json(state, max_bytes=2**30)["global_step"],
            "num_processes": num_processes,
            "files": {name: os.path.getsize(os.path.join(folder, name)) for name in list_files(folder)},
        }
        write_json(os.path.join(folder, MANIFEST), content)
    # Nobody deletes an older checkpoint from one node's disk before all nodes have this one.
    _wait_for_everyone()


def rotate_checkpoints(folder, save_total_limit, best_model_checkpoint=None):
    """
    Deletes the oldest of the checkpoints beside `folder`, but neither `folder`, nor the best, nor what is no whole checkpoint
    of this trainer. As in `transformers.trainer_utils.rotate_checkpoints`, except that a checkpoint gets another name before
    its files go, so that what a killed process leaves of it is not taken for one, nor counted as one.

    Args:
        folder (`str`):
            The newest checkpoint.
        save_total_limit (`int` or `None`):
            How many to keep; all if `None` or less than one.
        best_model_checkpoint (`str`, *optional*):
            The best checkpoint.
    """
    if save_total_limit is None or save_total_limit < 1:
        return
    whole = [path for path in sort_checkpoints(os.path.dirname(folder), use_mtime=True) if _is_whole(path)]
    protected = {os.path.abspath(path) for path in (folder, best_model_checkpoint) if path is not None}
    protected &= set(map(os.path.abspath, whole))
    others = [path for path in whole if os.path.abspath(path) not in protected]
    for path in others[: max(0, len(whole) - max(save_total_limit, len(protected)))]:
        logger.info(f"Deleting older checkpoint [{path}] due to save_total_limit={save_total_limit}")
        _remove(path)


# Resuming


def checkpoint_to_resume(resume_from_checkpoint, args):
    """
    The folder to resume from. Every process calls it.

    Args:
        resume_from_checkpoint (`str`, `bool` or `None`):
            As in `Trainer.train`: a checkpoint's folder, or `True` for the newest whole one of `args.output_dir`.
        args ([`SIDTrainingArguments`]):
            The trainer's arguments.

    Returns:
        `str` or `None`: `None` for `None` and `False`.

    Raises:
        `ValueError`: if the checkpoint is not whole, or there is none that is.
    """
    if resume_from_checkpoint is None or resume_from_checkpoint is False:
        return None
    if resume_from_checkpoint is True:
        folder = last_checkpoint(args.output_dir)
        if folder is None:
            raise ValueError(
                f"resume_from_checkpoint=True, but {args.output_dir} holds no whole checkpoint. Leave it out to start from the "
                "beginning; last_checkpoint(output_dir) gives None in this case, and the newest checkpoint otherwise."
            )
    else:
        folder = os.fspath(resume_from_checkpoint)
        check_checkpoint(folder)
    num_processes = _read_manifest(folder).get("num_processes")
    if num_processes not in (None, args.world_size):
        if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage > 0:
            raise ValueError(
                f"{folder} was saved by {num_processes} processes and is resumed by {args.world_size}, which DeepSpeed ZeRO cannot: "
                f"each process has its share of the optimizer. Start {num_processes} processes, or start a new training from the "
                "model in that folder."
            )
        logger.warning(
            f"{folder} was saved by {num_processes} processes and is resumed by {args.world_size}: the order of the data, the "
            "place in the epoch and dropout will differ from those of a run without interruption."
        )
    return folder


def stream_position(folder, gradient_accumulation_steps):
    """
    Where in its stream a training without a dataset's length was: `Trainer` of transformers 5.23 takes all steps for steps of
    the first pass, skips them beyond the stream's end, and resumes at the beginning of the second pass.

    Args:
        folder (`str`):
            The checkpoint to resume from.
        gradient_accumulation_steps (`int`):
            Batches in a step.

    Returns:
        `tuple[int, int]`: passes that are over, and batches that were taken in the current one.
    """
    state = TrainerState.load_from_json(os.path.join(folder, TRAINER_STATE))
    # Without a length, an "epoch" is as long as the whole training, but the integral part counts passes. A pass is over when the
    # next one takes a batch: 1.0 is a training that ended within its first pass.
    passes = max(0, math.ceil(state.epoch) - 1)
    return passes, round((state.epoch - passes) * state.max_steps * gradient_accumulation_steps)


def last_checkpoint(output_dir):
    """
    The newest whole checkpoint. Every process calls it; with disks of their own, the newest that is whole on all of them.

    Checkpoints that are not whole are left out with a warning that names them, those of another Trainer as well: they have no
    list of files to tell by. See [`check_checkpoint`].

    Args:
        output_dir (`str`):
            The folder of the checkpoints.

    Returns:
        `str` or `None`: the checkpoint's folder, or `None` if there is none.
    """
    steps = {}
    for name in os.listdir(output_dir) if os.path.isdir(output_dir) else ():
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", name)
        if match is None or not os.path.isdir(os.path.join(output_dir, name)):
            continue
        try:
            check_checkpoint(os.path.join(output_dir, name))
            steps[int(match[1])] = os.path.join(output_dir, name)
        except ValueError as error:
            logger.warning(f"Not resuming from {name}: {error}")
    everywhere = set(steps)
    if dist.is_available() and dist.is_initialized():
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, everywhere)
        everywhere = set.intersection(*found)
        if any(found) and not everywhere:
            logger.warning(
                f"No checkpoint in {output_dir} is whole for all processes. Nodes whose disks are their own need "
                "save_on_each_node=True."
            )
    return steps[max(everywhere)] if everywhere else None


def check_checkpoint(folder, to_resume=True):
    """
    Checks that a checkpoint is whole and, unless told otherwise, holds what training goes on from.

    A checkpoint without a list of files is refused, also if it is named explicitly: one whose save was killed looks exactly
    like this, and a Trainer would resume from some of them without a word, with an optimizer that begins anew. If a stock
    `Trainer` made it, and its save is known to have ended, `finish_checkpoint(folder)` writes the list.

    Args:
        folder (`str`):
            The checkpoint's folder.
        to_resume (`bool`, *optional*, defaults to `True`):
            Whether to refuse a checkpoint that holds the model only (`save_only_model=True`).

    Raises:
        `ValueError`: if files are missing, have another size than they had, or were never all written.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"There is no checkpoint folder {folder}.")
    manifest = _read_manifest(folder)
    if not manifest["is_finished"]:
        raise ValueError(
            f"The save to {folder} did not finish: {MANIFEST}, written last, says so. Take an earlier checkpoint."
        )
    missing, changed = [], []
    for name, size in manifest["files"].items():
        try:
            found = os.path.getsize(os.path.join(folder, name))
        except OSError:
            missing.append(name)
            continue
        if found != size:
            changed.append(f"{name} ({found} bytes instead of {size})")
    if missing or changed:
        faults = [f"without {', '.join(sorted(missing))}"] * bool(missing)
        faults += [f"with other sizes: {', '.join(sorted(changed))}"] * bool(changed)
        raise ValueError(
            f"{folder} is not as it was saved: {'; '.join(faults)}. It was edited, copied in part, or is being deleted. Take "
            "an earlier checkpoint, or copy this one again."
        )
    if to_resume and not any(re.fullmatch(r"rng_state(_\d+)?\.pth", name) for name in manifest["files"]):
        raise ValueError(
            f"{folder} holds a model, but no state of the optimizer (it was saved with save_only_model=True, or pushed without "
            "hub_push_optimizer=True), so the training that it comes from cannot go on as if uninterrupted. Load the model from "
            "there and start a new training."
        )


def remove_unfinished(output_dir, should_save=True):
    """
    Removes what saves, deletions and pushes that were killed left in `output_dir`: checkpoints marked as unfinished, the remains
    of those that were being deleted, and links to those that were being pushed. Folders without a mark are somebody else's, and
    stay. To be called when training begins, after [`checkpoint_to_resume`], while nobody else saves there.

    Args:
        output_dir (`str`):
            The folder of the checkpoints.
        should_save (`bool`, *optional*, defaults to `True`):
            Whether this process writes; `args.should_save`.
    """
    if not should_save or not os.path.isdir(output_dir):
        return
    for name in sorted(os.listdir(output_dir)):
        folder = os.path.join(output_dir, name)
        if name.startswith((TEMPORARY, PUSH_FOLDER)):
            shutil.rmtree(folder, ignore_errors=True)
        elif re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", name) and _is_unfinished(folder):
            logger.warning(f"Removing {folder}: its save was interrupted.")
            _remove(folder)


# Arguments


def write_arguments(args, folder):
    """
    Writes a trainer's arguments to `training_args.json`, tokens left out. What JSON has no word for is written as text.

    Args:
        args (`TrainingArguments`):
            The arguments.
        folder (`str`):
            Where to.
    """
    content = {name: value for name, value in args.to_dict().items() if not name.endswith("_token")}
    write_json(os.path.join(folder, ARGUMENTS), json.loads(json.dumps(content, default=str)))


def read_arguments(folder):
    """
    Reads what [`write_arguments`] wrote.

    Args:
        folder (`str`):
            A checkpoint, or a folder of `save_model`.

    Returns:
        [`SIDTrainingArguments`]: the arguments, with tokens unset. As always when they are made, this process is set up for
        the DeepSpeed or FSDP that they ask for, and what this machine cannot do, such as bf16, is a `ValueError`.

    Raises:
        `ValueError`: if there are none, or they are another version's.
    """
    path = os.path.join(folder, ARGUMENTS)
    if not os.path.isfile(path):
        raise ValueError(f"{folder} has no {ARGUMENTS}; SIDTrainer writes it to checkpoints and in save_model.")
    try:
        return SIDTrainingArguments(**read_json(path))
    except TypeError as error:
        raise ValueError(f"{path} was written by another version of rqsid or transformers: {error}.") from None


def _read_manifest(folder):
    path = os.path.join(folder, MANIFEST)
    if not os.path.isfile(path):
        raise ValueError(
            f"{folder} has no {MANIFEST}, which SIDTrainer writes last: the save did not finish, or another Trainer made the "
            "checkpoint. Take another checkpoint; if you know that this save came to its end, write the list with "
            f"finish_checkpoint({str(folder)!r}) of rqsid.trainer.checkpoints."
        )
    manifest = read_json(path)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version={manifest.get('format_version')!r}, this version of rqsid reads {FORMAT_VERSION}. "
            "Resume with the version that saved the checkpoint."
        )
    if not isinstance(manifest.get("files"), dict) and manifest.get("is_finished") is not False:
        raise ValueError(f"{path} lists no files: it was edited. Take another checkpoint, or copy this one again.")
    return manifest


def _is_whole(folder):
    try:
        check_checkpoint(folder, to_resume=False)
    except ValueError:
        return False
    return True


def _is_unfinished(folder):
    try:
        return not _read_manifest(folder)["is_finished"]
    except ValueError:
        return False


def list_files(folder):
    """
    Returns:
        `list[str]`: the names of all files below a checkpoint's folder, but for that of the list of them.
    """
    paths = [os.path.join(where, name) for where, _, names in os.walk(folder) for name in names]
    names = [os.path.relpath(path, folder).replace(os.sep, "/") for path in paths]
    return [name for name in names if name != MANIFEST and not re.fullmatch(rf"{re.escape(MANIFEST)}\..*\.tmp", name)]


def _remove(folder):
    # Under its own name, a folder that is half deleted would look like any checkpoint without a list.
    with _temporary_folder(folder) as temporary:
        try:
            os.rename(folder, temporary)
        except FileNotFoundError:  # another node's main process was faster, on a disk that they share
            pass


@contextmanager
def _temporary_folder(folder):
    """Yields a name for `folder` that is not taken for a checkpoint; what lies there in the end is deleted."""
    parent = tempfile.mkdtemp(prefix=TEMPORARY, dir=os.path.dirname(os.path.abspath(folder)))
    try:
        yield os.path.join(parent, os.path.basename(os.path.abspath(folder)))
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def _wait_for_everyone():
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
