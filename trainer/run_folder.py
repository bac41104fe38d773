"""The folder that a training leaves: whether it is whole, and what of it is published."""

import json
import os
import re
import shutil
from dataclasses import dataclass
from itertools import chain

from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from ..modeling.code_export import save_custom_generate, save_pipeline_code
from ..sid_tokenizer.bundle import MANIFEST_FILE, read_manifest
from ..sid_tokenizer.files import read_json, replace_atomically
from ..sid_tokenizer.tokenization_sid import SIDTokenizer
from .checkpoints import ARGUMENTS
from .hub_pushes import hide_paths
from .lora import ADAPTER_FILE
from .model_card import public_id

logger = logging.get_logger(__name__)

CARD_FILE = "README.md"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Beside what configs, indices and manifests name. Nothing else of the folder is published: nobody can know what lies there.
OPTIONAL_FILES = r"(LICENSE|NOTICE)(\.\w+)?|generation_config\.json|special_tokens_map\.json|chat_template\.jinja"
# Where configs of other versions say where a model was loaded from.
ORIGINS = ("_name_or_path", "name_or_path")


@dataclass
class RunFolder:
    """
    Attributes:
        path (`str`): The folder.
        tokenizer ([`SIDTokenizer`]): Its bundle.
        config (`dict`): What `config.json` holds, or `adapter_config.json`.
        is_adapter (`bool`): Whether it holds an adapter, and no model.
        files (`list[str]`): What is published, relative to `path`.
    """

    path: str
    tokenizer: SIDTokenizer
    config: dict
    is_adapter: bool
    files: list


def read_run(folder):
    """
    Checks that a folder holds a whole model, or a whole adapter, and the bundle of the tokenizer that it was trained with. Of
    weights, only the headers are read.

    Args:
        folder (`str`):
            What `trainer.save_model()` wrote, or `save_pretrained` of model and tokenizer, or a checkpoint.

    Returns:
        [`RunFolder`]

    Raises:
        `ValueError`: saying what is missing or damaged, or that the model has no rows for the tokenizer's codebooks.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"There is no folder {folder}.")
    here = {name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name))}
    if MANIFEST_FILE not in here:
        checkpoints = [name for name in sorted(os.listdir(folder)) if re.fullmatch(r"checkpoint-\d+", name)]
        hint = f" To publish a checkpoint, pass its folder, such as {folder}/{checkpoints[-1]}." if checkpoints else ""
        raise ValueError(
            f"{folder} has no {MANIFEST_FILE}, so no tokenizer's bundle beside the model. Save both there: trainer.save_model(), or "
            f"model.save_pretrained and tokenizer.save_pretrained.{hint}"
        )
    is_adapter = ADAPTER_CONFIG in here
    if is_adapter and "config.json" in here:
        raise ValueError(
            f"{folder} holds an adapter ({ADAPTER_CONFIG}) and a model (config.json): whoever loads it would get one upon the other. "
            "Publish them from folders of their own."
        )
    if not is_adapter and "config.json" not in here:
        raise ValueError(f"{folder} has no config.json: there is no model. Save it there with model.save_pretrained.")
    tokenizer = SIDTokenizer.from_pretrained(folder)
    config = read_json(os.path.join(folder, ADAPTER_CONFIG if is_adapter else "config.json"))
    tokenizer_config = read_json(os.path.join(folder, "tokenizer_config.json"))
    if is_adapter:
        found, files = _check_adapter(folder, config), [ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_FILE]
    else:
        found, files = config, ["config.json", *_check_weights(folder, config)]
    _check_rows(folder, found, tokenizer)
    bundle = read_manifest(os.path.join(folder, MANIFEST_FILE))["files"]
    files += [*bundle, MANIFEST_FILE, "tokenizer_config.json"]
    files += [name for name in sorted(here) if re.fullmatch(OPTIONAL_FILES, name) or name == ARGUMENTS]
    files += _code_files(folder, config, tokenizer_config)
    if CARD_FILE in here:
        files += [CARD_FILE, *_figures(folder)]
    for name in files:
        if not os.path.isfile(os.path.join(folder, name)):
            raise ValueError(f"{folder} is not whole: it lacks {name}. Save model and tokenizer there again.")
    return RunFolder(os.fspath(folder), tokenizer, config, is_adapter, list(dict.fromkeys(files)))


def stage_run(run, staging, model_id):
    """
    Makes what is to be published of links to the run's files, with `custom_generate/` and the pipeline's code beside a model. The
    run's own folder stays as it is.

    Args:
        run ([`RunFolder`])
        staging (`str`): An empty folder.
        model_id (`str`): What the model is going to be called.
    """
    for name in run.files:
        _link(os.path.join(run.path, name), os.path.join(staging, name))
    for name in ("config.json", "tokenizer_config.json"):
        if name in run.files:
            _forget_origin(os.path.join(staging, name))
    hide_paths(staging)
    if not run.is_adapter:
        save_custom_generate(staging, model_id)
        save_pipeline_code(staging)


def _check_weights(folder, config):
    """Names of the files of the weights, each of which can be opened."""
    index = os.path.join(folder, INDEX)
    if not os.path.isfile(index):
        if not os.path.isfile(os.path.join(folder, WEIGHTS)):
            raise ValueError(
                f"{folder} has neither {WEIGHTS} nor {INDEX}: there are no weights. Save the model with save_pretrained."
            )
        names, weight_map = [WEIGHTS], None
    else:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder}/{INDEX} has no weight_map: it was edited. Save the model again.")
        names = sorted(set(weight_map.values()))
    there = set()
    for name in names:
        if os.path.basename(name) != name or not os.path.isfile(os.path.join(folder, name)):
            raise ValueError(f"{folder} is not whole: {INDEX} names {name}, which is not there. Save the model again.")
        there |= _check_shard(os.path.join(folder, name), _vocab_size(config))
    missing = sorted(set(weight_map or ()) - there)
    if missing:
        raise ValueError(
            f"{folder} is not whole: no file holds {missing[0]}, which {INDEX} names. Save the model again."
        )
    return names + ([INDEX] if weight_map is not None else [])


def _check_shard(path, vocab_size=None):
    """Names of a file's tensors; its header says how long it has to be."""
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name in names:
                if vocab_size is None or not name.endswith("embed_tokens.weight"):
                    continue
                rows = file.get_slice(name).get_shape()[0]
                if rows != vocab_size:
                    raise ValueError(
                        f"{path} has {rows} rows of embeddings, config.json says vocab_size={vocab_size}: they belong to "
                        "different saves. Save the model again."
                    )
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}): it is truncated or was edited. Save it again.") from None
    return names


def _check_adapter(folder, config):
    for name in (ADAPTER_WEIGHTS, ADAPTER_FILE):
        if not os.path.isfile(os.path.join(folder, name)):
            raise ValueError(f"{folder} is not whole: it lacks {name}, which save_lora and SIDTrainer write.")
    _check_shard(os.path.join(folder, ADAPTER_WEIGHTS))
    base = config.get("base_model_name_or_path")
    if public_id(base) is None:
        raise ValueError(
            f"The adapter in {folder} was trained on {base or 'a model without a name'}, which nobody else can load. Publish that model, "
            f"and write its name on the Hub into {ADAPTER_CONFIG} (base_model_name_or_path), or merge the adapter "
            "(load_lora(...).merge_and_unload()) and publish what it makes."
        )
    return read_json(os.path.join(folder, ADAPTER_FILE))


def _check_rows(folder, config, tokenizer):
    fingerprint, found = tokenizer.codebook_fingerprint(), config.get("sid_codebook")
    if found is None:
        raise ValueError(
            f"The model in {folder} has no rows for SID tokens (sid_codebook in its config): it was not trained with this tokenizer. "
            "SIDTrainer makes them, or initialize_sid_rows."
        )
    if found != fingerprint:
        raise ValueError(
            f"The model in {folder} has rows for the SID tokens of codebook {found}, the tokenizer beside it has codebook "
            f"{fingerprint}. Save the tokenizer that the model was trained with there."
        )
    if (_vocab_size(config) or 0) < len(tokenizer):
        raise ValueError(
            f"The model in {folder} has vocab_size={_vocab_size(config)}, fewer than the {len(tokenizer)} tokens of its tokenizer. Save "
            "both there again."
        )


def _vocab_size(config):
    return config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))


def _code_files(folder, *configs):
    """Modules that configs name for trust_remote_code, and what these import from beside them."""
    references = chain.from_iterable((config.get("auto_map") or {}).values() for config in configs)
    references = chain.from_iterable([entry] if not isinstance(entry, list) else entry for entry in references)
    names = []
    for reference in references:
        if reference is None or "--" in reference:  # of a repository of its own
            continue
        name = reference.rsplit(".", 1)[0] + ".py"
        if not os.path.isfile(os.path.join(folder, name)):
            raise ValueError(f"{folder} is not whole: a config names {name}, which is not there. Save it there again.")
        paths = [os.path.join(folder, name), *get_relative_import_files(os.path.join(folder, name))]
        names += [os.path.relpath(path, folder) for path in paths]
    return sorted(set(names))


def _figures(folder):
    """Pictures that the card shows and that lie beside it."""
    with open(os.path.join(folder, CARD_FILE), encoding="utf-8") as file:
        named = re.findall(r"!\[[^\]]*\]\(([\w./-]+\.(?:png|svg|jpe?g))\)", file.read())
    inside = [name for name in named if not os.path.isabs(name) and ".." not in name.split("/")]
    return [name for name in dict.fromkeys(inside) if os.path.isfile(os.path.join(folder, name))]


def _link(source, target):
    os.makedirs(os.path.dirname(target), exist_ok=True)
    source = os.path.realpath(source)
    try:
        os.link(source, target)
    except OSError:  # another disk
        try:
            os.symlink(source, target)
        except OSError:
            shutil.copyfile(source, target)


def _forget_origin(path):
    config = read_json(path)
    kept = {name: value for name, value in config.items() if name not in ORIGINS or public_id(value) is not None}
    if kept != config:
        with replace_atomically(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps(kept, indent=2, sort_keys=True) + "\n")
