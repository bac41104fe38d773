"""The Trainer's pushes to the Hub: model, tokenizer and card of one state in one commit, from a folder that nothing changes."""

import fnmatch
import os
import re
import shutil
import threading
import uuid
import weakref
from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist
from huggingface_hub import HfApi, ModelCard
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress, logging

from ..sid_tokenizer.card_push import CARD_FILE, download_card
from ..sid_tokenizer.card_sections import FIGURE_FILE, diagnose_catalog
from ..sid_tokenizer.files import read_json, write_json
from ..sid_tokenizer.hub import PICKLES, hub_errors, push_folder
from .checkpoints import ARGUMENTS, MANIFEST, PUSH_FOLDER, TRAINER_STATE, list_files
from .model_card import is_generated, keep_text, model_card, name_codebook, public_id

logger = logging.get_logger(__name__)

# Those that may have pushes to finish when the process ends.
EXECUTORS = weakref.WeakSet()
# What only a training that goes on needs, by the first part of its path: files of Trainer, DeepSpeed and FSDP. Most are pickles,
# also where their names do not say so.
RESUMED_FROM = (
    *("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*.pth"),
    *("global_step*", "latest", "zero_to_fp32.py", "pytorch_model_fsdp*"),
)
# What an earlier push may have left beside the model: other shards, an adapter or what it was merged into, another tokenizer,
# and what stock trainers push.
REPLACED = [
    *("config.json", "generation_config.json", "adapter_config.json", "sid_adapter.json", FIGURE_FILE),
    *("model*.safetensors", "model.safetensors.index.json", "adapter_model*.safetensors"),
    *(
        "adapter_model.safetensors.index.json",
        "pytorch_model*.bin",
        "pytorch_model.bin.index.json",
        "adapter_model.bin",
    ),
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
    ),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "training_args.bin", ARGUMENTS),
    *("sid_manifest.json", "sid_codebook.safetensors", "sid_catalog.safetensors", "sid_prompt.json"),
]


def make_codebook_repo(trainer, token, private):
    """
    Makes the repository of `hub_codebook_id`, so that it is known before training whether the token may do that.

    Args:
        trainer ([`SIDTrainer`]):
            The trainer, whose model has its repository. Its `hub_codebook_id` becomes the full name.
        token, private:
            As in [`SIDTrainer.init_hf_repo`].

    Raises:
        `ValueError`: if it is the model's repository.
        `PermissionError`, `ConnectionError`: as [`~rqsid.sid_tokenizer.hub.push_folder`].
    """
    repo_id = trainer.args.hub_codebook_id
    private = private if private is not None else trainer.args.hub_private_repo
    with hub_errors(repo_id, token):
        repo_id = HfApi(token=token, library_name="rqsid").create_repo(repo_id, private=private, exist_ok=True).repo_id
    if repo_id == trainer.hub_model_id:
        raise ValueError(
            f"hub_codebook_id={trainer.args.hub_codebook_id!r} is {repo_id}, the model's repository. The codebook's is one of its own; "
            "the model's holds it too, as part of the tokenizer."
        )
    trainer.hub_codebook_id = repo_id


def push_checkpoint(trainer, checkpoint):
    """
    Begins to push a checkpoint's model, and the checkpoint itself if `hub_strategy` says so, while training goes on. Every process
    calls it. What fails is a warning, for the training needs no Hub.

    Args:
        trainer ([`SIDTrainer`]):
            The trainer.
        checkpoint (`str`):
            The folder, whole already. It may be deleted before the push has ended, which works on links to its files.
    """
    args, state = trainer.args, trainer.state
    if args.hub_strategy == HubStrategy.END:
        return
    by_steps = args.save_strategy == SaveStrategy.STEPS
    message = f"Training in progress, {f'step {state.global_step}' if by_steps else f'epoch {int(state.epoch)}'}"
    is_pushing = trainer.is_world_process_zero()
    if is_pushing and _is_busy(trainer) and not args.hub_always_push:
        is_pushing = False
        logger.warning(
            f"Not pushed ({message}): the push before is still under way. hub_always_push=True makes them queue."
        )
    # FSDP's shards are no model that anybody could load.
    snapshot = _save_for_push(trainer) if trainer.saves_shards() else None
    if not is_pushing:
        if snapshot is not None:
            shutil.rmtree(snapshot, ignore_errors=True)
        return
    trainer.callback_handler.on_push_begin(args, state, trainer.control)
    replaced = list(REPLACED)
    try:
        if snapshot is None:
            snapshot = os.path.join(args.output_dir, _folder_name())
            os.makedirs(snapshot)
            _link([name for name in list_files(checkpoint) if _is_published(name)], checkpoint, snapshot)
        _check_weights(snapshot)
        hide_paths(snapshot)
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_last = args.hub_strategy == HubStrategy.CHECKPOINT
            name = "last-checkpoint" if is_last else os.path.basename(checkpoint)
            _link_checkpoint(checkpoint, snapshot, name, args.hub_push_optimizer)
            replaced.append(f"{name}/*")
        card = model_card(trainer, snapshot)
    except Exception as error:
        shutil.rmtree(snapshot, ignore_errors=True)
        logger.warning(f"Not pushed ({message}): {_one_line(error)}")
        return
    _push(
        trainer,
        snapshot,
        card,
        card_options={},
        in_background=True,
        commit_message=message,
        revision=args.hub_revision,
        token=args.hub_token,
        private=args.hub_private_repo,
        delete_patterns=replaced,
        allow_pickles=args.hub_push_optimizer,
    )


def push_model(trainer, commit_message, blocking, token, revision, private, tag, card_options):
    """
    Pushes what the trainer's model is now, after the pushes that are under way. Every process calls it; see
    [`SIDTrainer.push_to_hub`].

    Returns:
        `CommitInfo`, or a `Future` of one if not `blocking`; `None` in all processes but the first.
    """
    args = trainer.args
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    token = token if token is not None else args.hub_token
    private = private if private is not None else args.hub_private_repo
    if trainer.hub_model_id is None:
        trainer.init_hf_repo(token=token, private=private)
    snapshot = _save_for_push(trainer)
    if snapshot is None:
        return None
    try:
        trainer._finish_current_push()
        _check_weights(snapshot)
        hide_paths(snapshot)
        trainer.create_model_card(**card_options)
        card = ModelCard.load(os.path.join(args.output_dir, CARD_FILE))
        if os.path.exists(os.path.join(args.output_dir, FIGURE_FILE)):
            shutil.copyfile(os.path.join(args.output_dir, FIGURE_FILE), os.path.join(snapshot, FIGURE_FILE))
    except BaseException:
        shutil.rmtree(snapshot, ignore_errors=True)
        raise
    return _push(
        trainer,
        snapshot,
        card,
        card_options,
        in_background=not blocking,
        commit_message=commit_message,
        revision=revision if revision is not None else args.hub_revision,
        token=token,
        private=private,
        tag=tag,
        delete_patterns=REPLACED,
    )


def _push(trainer, snapshot, card, card_options, in_background, token, private, **options):
    repo_id, codebook_id = trainer.hub_model_id, trainer.hub_codebook_id
    tokenizer, pushed = trainer.processing_class, trainer.pushed_codebooks
    diagnosis = diagnose_catalog(tokenizer.catalog, tokenizer.cache) if codebook_id is not None else None

    def push():
        try:
            # Once: what a tokenizer's SIDs are made of does not change while a model is trained on them; its licence may be said late.
            license = card_options.get("license") or card.data.license
            if codebook_id is not None and (
                codebook_id not in pushed or license not in (None, pushed[codebook_id][1])
            ):
                commit = tokenizer.quantizer.push_to_hub(
                    codebook_id,
                    diagnosis=diagnosis,
                    license=license,
                    commit_message=f"Codebooks of {repo_id}",
                    private=private,
                    token=token,
                )
                pushed[codebook_id] = commit.oid, license

            # Of the commit that is pushed onto, lest a card is lost that somebody writes while this is uploaded.
            def add_card(api, repo_id, head):
                published = card_to_publish(card, card_options, api, repo_id, head)
                if codebook_id is not None:
                    name_codebook(published, codebook_id, pushed[codebook_id][0])
                published.save(os.path.join(snapshot, CARD_FILE))
                return []

            return push_folder(snapshot, repo_id, token=token, private=private, prepare=add_card, **options)
        except Exception as error:
            if in_background:  # at once, since nobody may ask for the result
                logger.warning(f"A push to {repo_id} failed ({options['commit_message']}): {_one_line(error)}")
            raise
        finally:
            shutil.rmtree(snapshot, ignore_errors=True)

    if not in_background:
        return push()
    if trainer.push_executor is None:
        # One thread, so that commits follow each other as the states did.
        trainer.push_executor = ThreadPoolExecutor(1, thread_name_prefix="push")
        EXECUTORS.add(trainer.push_executor)
    future = trainer.push_executor.submit(push)
    if _is_busy(trainer):
        trainer.push_in_progress.jobs.append(future)
    else:
        trainer.push_in_progress = PushInProgress([future])
    return future


def _finish_pushes():
    for executor in list(EXECUTORS):
        executor.shutdown()


# When a process ends, Python closes all pools of threads before it waits for the threads in them, and the client could upload no
# more. There is no public hook that runs before; atexit's run after.
threading._register_atexit(_finish_pushes)


def card_to_publish(card, options, api, repo_id, revision=None):
    """
    The card that goes to a repository: the one that is there, with new metadata, if somebody has made it their own there.

    Args:
        card (`ModelCard`):
            What was made of the run. If it is written anew by every push, it gets what it does not say of license and language
            from the one that is there.
        options (`dict`):
            Arguments of [`model_card`] that were given, which count more.
        api (`HfApi`):
            With a token, if it takes one.
        repo_id, revision (`str`):
            The repository, and its branch or commit.

    Returns:
        `ModelCard`

    Raises:
        `ValueError`: if the metadata there cannot be read.
    """
    if not is_generated(card):
        return card
    there = download_card(api, repo_id, revision)
    try:
        theirs = None if there is None else ModelCard(there)
    except Exception as error:  # what YAML makes of anything that somebody may have written
        raise ValueError(
            f"The card in {repo_id} has metadata that cannot be read ({_one_line(error)}). Mend it there, or delete it."
        ) from None
    if theirs is None:
        return card
    if not is_generated(theirs):
        return keep_text(theirs, card.data, options)
    kept = [] if card.data.license else ["license", "license_name", "license_link"]
    for name in kept + ([] if card.data.language else ["language"]):
        if theirs.data.get(name) is not None:
            card.data[name] = theirs.data[name]
    return card


def _save_for_push(trainer):
    """Saves the model as it is now; every process takes part. The folder, which is the caller's, or `None` elsewhere."""
    names = [_folder_name()]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(names)
    folder = os.path.join(trainer.args.output_dir, names[0])
    is_first = trainer.is_world_process_zero()
    try:
        trainer.save_whole_model(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if trainer.args.should_save and not is_first:
        shutil.rmtree(folder, ignore_errors=True)
    return folder if is_first else None


def _link_checkpoint(checkpoint, snapshot, folder_name, with_optimizer):
    """A checkpoint as it is to be published: with a list of the files that it is published with."""
    model = [name for name in list_files(snapshot) if name != CARD_FILE]
    folder = os.path.join(snapshot, folder_name)
    others = [TRAINER_STATE, *(name for name in list_files(checkpoint) if with_optimizer and _is_resumed_from(name))]
    _link(model, snapshot, folder)
    _link(others, checkpoint, folder)
    hide_paths(folder)
    manifest = read_json(os.path.join(checkpoint, MANIFEST))
    manifest["files"] = {name: os.path.getsize(os.path.join(folder, name)) for name in [*model, *others]}
    write_json(os.path.join(folder, MANIFEST), manifest)


def _link(names, source, folder):
    for name in names:
        path, link = os.path.join(source, name), os.path.join(folder, name)
        os.makedirs(os.path.dirname(link), exist_ok=True)
        try:
            os.link(path, link)
        except OSError:  # a disk that knows no links
            shutil.copyfile(path, link)


def _is_published(name):
    if name in (CARD_FILE, TRAINER_STATE, "training_args.bin") or _is_resumed_from(name):
        return False
    return not any(fnmatch.fnmatch(name, pattern) for pattern in PICKLES)


def _is_resumed_from(name):
    return any(fnmatch.fnmatch(name.split("/")[0], pattern) for pattern in RESUMED_FROM)


def _check_weights(folder):
    if not any(re.fullmatch(r"(adapter_)?model.*\.safetensors", name) for name in os.listdir(folder)):
        raise ValueError(
            "There are no weights that could be loaded: DeepSpeed ZeRO-3 gathers them only with "
            "stage3_gather_16bit_weights_on_model_save=true in its configuration."
        )


def hide_paths(folder):
    """
    Rewrites the files that name folders of this machine, which nobody else can use, and which are nobody's business.

    Args:
        folder (`str`): What is to be published.
    """
    path = os.path.join(folder, ARGUMENTS)
    if os.path.isfile(path):
        write_json(path, _without_paths(read_json(path)))
    path = os.path.join(folder, "adapter_config.json")
    if os.path.isfile(path):
        adapter = read_json(path)
        adapter["base_model_name_or_path"] = public_id(adapter.get("base_model_name_or_path"))
        write_json(path, adapter)
    path = os.path.join(folder, TRAINER_STATE)
    if os.path.isfile(path):
        state = read_json(path, max_bytes=2**30)
        if state.get("best_model_checkpoint"):
            state["best_model_checkpoint"] = os.path.basename(state["best_model_checkpoint"])
        write_json(path, state)


def _without_paths(value):
    if isinstance(value, dict):
        return {name: _without_paths(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    if isinstance(value, str) and (os.path.isabs(value) or os.path.exists(value)):
        return os.path.basename(os.path.normpath(value))
    return value


def _is_busy(trainer):
    return trainer.push_in_progress is not None and not trainer.push_in_progress.is_done()


def _folder_name():
    return f"{PUSH_FOLDER}{uuid.uuid4().hex}"


def _one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())
