"""Models, tokenizers and purchases for finetune.py, each refused before anything large is loaded if it cannot serve."""

import copy
import glob
import re
from pathlib import Path

import torch
from datasets import load_dataset
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import cached_file

from rqsid import SIDTokenizer

FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}


def load_tokenizer(name):
    _check_folder(name, "tokenizer")
    return SIDTokenizer.from_pretrained(name)


def load_purchases(paths, name, tokenizer, streaming=False):
    """
    Args:
        paths (`list[str]`):
            Files, patterns and folders of one format (parquet, CSV or JSON lines), or one repository on the Hub, of which the
            split called `name` is taken.
        name (`str`): `"train"` or `"validation"`.
        tokenizer ([`SIDTokenizer`]): Its template says which columns prompts are made of.
        streaming (`bool`, *optional*, defaults to `False`): Whether rows are read as they are needed.

    Returns:
        `Dataset` or `IterableDataset`

    Raises:
        `ValueError`: for missing files, mixed formats and missing columns.
    """
    if len(paths) == 1 and re.fullmatch(r"[\w.-]+/[\w.-]+", paths[0]) and not _is_local(paths[0]):
        dataset = load_dataset(paths[0], split=name, streaming=streaming)
    else:
        files = [file for path in paths for file in _find_files(path, name)]
        suffixes = sorted({Path(file).suffix for file in files})
        if len({FORMATS[suffix] for suffix in suffixes}) > 1:
            raise ValueError(f"{name}: files of several formats ({', '.join(suffixes)}); pass files of one.")
        dataset = load_dataset(FORMATS[suffixes[0]], data_files=files, split="train", streaming=streaming)
        if suffixes == [".csv"] and "history" in (dataset.column_names or ()):
            raise ValueError(
                f"{name}: CSV files cannot hold lists, as column history is. Write parquet or JSON lines."
            )
    columns = set(dataset.column_names or next(iter(dataset), {}))
    if not {"product", "products", "label_ids"} & columns:
        raise ValueError(
            f'{name}: {paths} lacks the column "product", the product bought (or "products", those of a session); '
            f"found {sorted(columns)}."
        )
    fields = set(tokenizer.prompt_template.fields)
    if not {*fields, "products", "input_ids"} & columns:
        raise ValueError(
            f"{name}: {paths} has none of the prompt's columns {sorted(fields)}; found {sorted(columns)}."
        )
    return dataset


def load_model(name, tokenizer, dtype="float32", gguf_file=None):
    """
    Args:
        name (`str`): A folder, or a repository on the Hub.
        tokenizer ([`SIDTokenizer`]): Whose base must be the model's own vocabulary.
        dtype (`str`, *optional*, defaults to `"float32"`): What the parameters are loaded in.
        gguf_file (`str`, *optional*): File of the folder to take the weights from.

    Returns:
        `PreTrainedModel`

    Raises:
        `ValueError`: for a missing folder or file, and for a tokenizer that was made from another model's.
    """
    _check_folder(name, "model")
    if gguf_file is None:
        check_vocabulary(name, AutoConfig.from_pretrained(name), tokenizer)
        # Under ZeRO-3 this loads shares: the engine of the training arguments, which exist, is what it asks for.
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            f"gguf_file={gguf_file} cannot be loaded in parts, as ZeRO-3 does. Load and save it once on one process (--max_steps 1 "
            "will do), and train from the folder written, or use ZeRO-2 or FSDP2."
        )
    if Path(name).is_dir() and not (Path(name) / gguf_file).is_file():
        found = sorted(file.name for file in Path(name).glob("*.gguf"))
        raise ValueError(f"There is no {gguf_file} in {name}; GGUF files there: {', '.join(found) or 'none'}.")
    model = AutoModelForCausalLM.from_pretrained(name, gguf_file=gguf_file, dtype=dtype)
    check_vocabulary(name, model.config, tokenizer, gguf_file=gguf_file)
    return without_quantization(model)


def without_quantization(model):
    """The same model, its weights shared, as if it had never been quantized; transformers would refuse to save it."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    # Buffers that are not saved, as rotary frequencies, came into being without values.
    for (path, made), (_, found) in zip(plain.named_buffers(), model.named_buffers(), strict=True):
        if made.is_meta:
            owner, _, attribute = path.rpartition(".")
            setattr(plain.get_submodule(owner), attribute, found)
    return plain.train(model.training)


def check_vocabulary(name, config, tokenizer, gguf_file=None):
    """Raises a `ValueError` if `tokenizer` was not made from the tokenizer of the model `name`, by sizes and by tokens."""
    remedy = "Make it with SIDTokenizer.from_base of the tokenizer that belongs to the model."
    if config.vocab_size < tokenizer.base_size:
        raise ValueError(
            f"The tokenizer's base has {tokenizer.base_size} tokens, {name} has rows for {config.vocab_size}. {remedy}"
        )
    if gguf_file is not None:
        own = AutoTokenizer.from_pretrained(name, gguf_file=gguf_file).get_vocab()
    else:
        # AutoTokenizer would make up an empty one for some models.
        path = cached_file(name, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
        if path is None:
            return  # a model without a tokenizer beside it, or with sentencepiece's
        own = Tokenizer.from_file(path).get_vocab()
    ids = tokenizer.get_vocab()
    others = [token for token, index in own.items() if ids.get(token) != index]
    if others:
        raise ValueError(
            f"{len(others)} of {len(own)} tokens of {name} have other ids in the tokenizer, {others[0]!r} for one "
            f"({own[others[0]]} and {ids.get(others[0])}). {remedy}"
        )


def _is_local(name):
    return Path(name).exists() or glob.has_magic(name) or Path(name).suffix in FORMATS


def _check_folder(name, kind):
    # What can be nothing but a folder; other names may be on the Hub, and transformers says what is wrong with those.
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise ValueError(f"{kind}: there is no folder {name}.")


def _find_files(path, name):
    if Path(path).is_dir():
        files = [str(file) for file in sorted(Path(path).rglob("*")) if file.suffix in FORMATS]
    else:
        files = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else [path] * Path(path).is_file()
    if not files:
        parent = Path(path).parent
        beside = sorted(file.name for file in parent.iterdir() if file.suffix in FORMATS) if parent.is_dir() else []
        raise ValueError(
            f"{name}: {path} is no file, folder or pattern that finds any ({', '.join(FORMATS)}); in {parent}: "
            f"{', '.join(beside[:8]) or 'none'}."
        )
    unknown = [file for file in files if Path(file).suffix not in FORMATS]
    if unknown:
        raise ValueError(f"{name}: {unknown[0]} is none of {', '.join(FORMATS)}.")
    return files
