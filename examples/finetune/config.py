"""Arguments of finetune.py: a YAML file, what the command line adds to it or overrides, and what the machine asks for."""

import argparse
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from rqsid import SIDTrainingArguments
from rqsid.trainer.launching import check_launch, configure_cpu_launch


@dataclass
class ScriptArguments:
    """What finetune.py takes beside SIDTrainingArguments."""

    model: str = field(metadata={"help": "Checkpoint: a folder, or a repository on the Hub."})
    tokenizer: str = field(metadata={"help": "A saved SIDTokenizer: a folder, or a repository on the Hub."})
    train: list[str] = field(
        metadata={"help": "Purchases to train on: files, patterns, folders, or one dataset on the Hub."}
    )
    validation: list[str] | None = field(default=None, metadata={"help": "Purchases to evaluate on, likewise."})
    streaming: bool = field(default=False, metadata={"help": "Read the training purchases as they are needed."})
    tasks: dict | str | None = field(
        default=None, metadata={"help": "Weights of tasks to mix, as mix_tasks takes them: '{\"task\": 1.0}'."}
    )
    gguf_file: str | None = field(default=None, metadata={"help": "Name of the GGUF file in the model's folder."})
    # Updates would be lost in half precision. --bf16 computes in it all the same.
    dtype: str = field(default="float32", metadata={"help": "Number format that the parameters are loaded in."})
    resume: bool = field(
        default=False, metadata={"help": "Go on from the last checkpoint in output_dir, if there is one."}
    )
    lora_r: int | None = field(
        default=None, metadata={"help": "Rank of LoRA adapters; all weights are trained without."}
    )
    lora_alpha: int | None = field(
        default=None, metadata={"help": "Adapters are scaled by lora_alpha / lora_r; 16 if not given."}
    )
    lora_dropout: float | None = field(default=None, metadata={"help": "Dropout before the adapters; none without."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers that get adapters, or all-linear; peft's choice without."}
    )


def parse_arguments(argv):
    """
    Reads `[config.yaml] [--name value …]`; the command line wins.

    Args:
        argv (`list[str]`): What follows the script's name.

    Returns:
        `tuple[ScriptArguments, SIDTrainingArguments]`: the latter made, so that models are loaded as its engine wants them.

    Raises:
        `ValueError`: for unknown names, values of a wrong type, what is missing, and launches that are not what they look like.
    """
    parser = HfArgumentParser((ScriptArguments, SIDTrainingArguments), allow_abbrev=False)
    for action in parser._actions:
        # What is not on the command line must not hide what is in the file.
        action.default, action.required = argparse.SUPPRESS, False
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest != "help"}

    values = {}
    if argv and not argv[0].startswith("-"):
        values = _read_yaml(argv[0], actions)
        argv = argv[1:]
    given, unknown = parser.parse_known_args(argv)
    files = [name for name in unknown if name.endswith((".yaml", ".yml"))]
    if files:
        raise ValueError(
            f"{files[0]} does not come first: write finetune.py {files[0]} --name value … (DeepSpeed's own launcher puts "
            "arguments before it unless it is given --no_local_rank)."
        )
    if unknown:
        raise ValueError(f"Unknown arguments: {', '.join(map(_with_matches(actions), unknown))}.")
    values |= {name: _parse_mapping(name, value) for name, value in vars(given).items()}

    missing = [name for name in ("model", "tokenizer", "train") if not values.get(name)]
    if missing:
        raise ValueError(
            f"Missing: {', '.join(missing)}. Put it into the YAML file, or pass --{missing[0]} on the command line."
        )
    cpu = configure_cpu_launch(values.get("use_cpu", False))
    if "accelerator_config" in cpu and isinstance(values.get("accelerator_config"), dict):
        cpu["accelerator_config"] = values["accelerator_config"] | cpu["accelerator_config"]
    script, args = parser.parse_dict(values | cpu)
    check_launch(args)
    if script.lora_r is None and any((script.lora_alpha, script.lora_dropout, script.lora_target_modules)):
        raise ValueError(
            "LoRA is asked for without lora_r, the rank of its adapters; all weights would be trained. Give lora_r, or leave the "
            "other lora_ fields out."
        )
    if script.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={script.dtype!r} is unknown; choose one of float32, bfloat16, float16.")
    return script, args


def _read_yaml(path, actions):
    if not Path(path).is_file():
        raise ValueError(
            f"There is no configuration {path}; the first argument is a YAML file, or everything is given as --name value."
        )
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; it must consist of lines `name: value`.")
    unknown = [name for name in values if name not in actions]
    if unknown:
        raise ValueError(f"{path}: unknown names {', '.join(map(_with_matches(actions), map(str, unknown)))}.")
    return {name: _convert(f"{path}: {name}", value, actions[name]) for name, value in values.items()}


def _convert(name, value, action):
    """A YAML value in the type of the argument, which YAML misses for `1e-5` (text to it) and for `no` (False to it)."""
    if value is None or isinstance(value, dict):
        return value
    if action.nargs == "+":
        return [
            _convert(name, element, argparse.Namespace(type=action.type, nargs=None)) for element in _listed(value)
        ]
    if isinstance(value, list):
        return value
    if isinstance(value, bool) and action.dest == "resume_from_checkpoint":
        raise ValueError(f"{name} takes a checkpoint's folder. Write resume: true for the last one in output_dir.")
    if isinstance(value, bool) and action.type is not string_to_bool:
        raise ValueError(f'{name} is {value}, to YAML, which reads yes, no, on and off so. Quote the word: "no".')
    try:
        # action.type(True) would take a word for it.
        return value if isinstance(value, bool) or action.type is None else action.type(str(value))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{name} is {value!r}: {error}.") from error


def _listed(value):
    return value if isinstance(value, list) else [value]


def _parse_mapping(name, value):
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"--{name} {value} is no JSON: {error}.") from error


def _with_matches(actions):
    def describe(name):
        close = difflib.get_close_matches(name.lstrip("-").split("=")[0], actions, n=3)
        return f"{name} (did you mean {' or '.join(close)}?)" if close else name

    return describe
