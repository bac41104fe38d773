"""Codebooks from files that anybody may have written: what they claim is checked before memory is spent on it."""

import copy
import math
import os
import re
from numbers import Integral

import torch
from safetensors import safe_open

from .files import read_json
from .hub_files import find_file
from .untrusted import read_header, shown

CONFIG_FILE = "config.json"
CONFIG_BYTES = 2**24
MAX_LAYERS = 1024
MAX_SHARDS = 2048
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What transformers writes into any config.json besides the fields of a class.
COMMON_KEYS = {"auto_map", "model_type", "torch_dtype", "_name_or_path"}
SHARD_NAME = re.compile(r"model(\.[\w-]+)?-\d{5}-of-\d{5}(\.[\w-]+)?\.safetensors")
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")


def read_config(config_class, name, options, overrides):
    """
    Args:
        config_class (`type`):
            Of the codebooks that are expected.
        name (`str`):
            A folder or a repository.
        options (`dict`):
            As [`find_file`] takes them.
        overrides (`dict`):
            Arguments that replace entries; those that name none are returned.

    Returns:
        `tuple[PreTrainedConfig, dict, str | None]`: the configuration, the arguments left, and the commit.

    Raises:
        `ValueError`: if there is no config.json, or one that another class, another version or nobody's program wrote.
    """
    content, commit = read_entries(config_class, name, options)
    try:
        config, left = config_class.from_dict(content, return_unused_kwargs=True, **overrides)
    except Exception as error:  # whatever its values make of the code that expects others
        raise ValueError(f"{CONFIG_FILE} of {name} cannot be used: {_line(error)}") from None
    check_dtype(config, name)
    return config, left, commit


def read_entries(config_class, name, options):
    """
    The entries of config.json, as they stand there. Arguments and errors are those of [`read_config`].

    Returns:
        `tuple[dict, str | None]`: the entries, and the commit.
    """
    path, commit = find_file(name, CONFIG_FILE, **options)
    if path is None:
        raise ValueError(f"{name} has no {CONFIG_FILE}: it holds no codebooks, or its save did not finish.")
    content = read_json(path, CONFIG_BYTES)
    if content.get("model_type") != config_class.model_type:
        raise ValueError(
            f"{CONFIG_FILE} of {name} has model_type {shown(content.get('model_type'))}, not {config_class.model_type!r}: load it "
            "with the class that it belongs to, or with AutoModel."
        )
    strangers = sorted(set(content) - set(config_class.__dataclass_fields__) - COMMON_KEYS)
    if strangers:
        raise ValueError(
            f"{CONFIG_FILE} of {name} has {shown(strangers[0])}, which this version does not know and might encode otherwise by: "
            "update rqsid and transformers, or leave it out if it is no option."
        )
    for key, value in content.items():
        if isinstance(value, list) and len(value) > MAX_LAYERS:
            raise ValueError(f"{CONFIG_FILE} of {name} says {key}={shown(value)}: more than {MAX_LAYERS} layers.")
    return content, commit


def check_dtype(config, name):
    """
    Raises:
        `ValueError`: if a configuration names a type that codebooks cannot be of.
    """
    dtype = getattr(config, "dtype", None)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(
            f"{CONFIG_FILE} of {name} has dtype {shown(dtype)}, none of {', '.join(str(kind) for kind in DTYPES)}."
        )


def read_weights(model_class, config, name, options, variant=None):
    """
    Args:
        model_class (`type`):
            Whose parameters are expected.
        config (`PreTrainedConfig`):
            Of the codebooks.
        name (`str`):
            A folder or a repository.
        options (`dict`):
            As [`find_file`] takes them.
        variant (`str`, *optional*):
            As `save_pretrained` takes it.

    Returns:
        `dict[str, torch.Tensor]`: exactly the tensors that the configuration calls for.

    Raises:
        `ValueError`: if there is no safetensors file, it is damaged, or a tensor is missing, too many, of another shape or type
            than the configuration says, or not finite.
    """
    paths = _find_weights(name, options, variant)
    shapes = {}
    for path in paths:
        try:
            header, _ = read_header(path)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{os.path.basename(path)} of {name} is not readable safetensors ({error}): it is truncated or was edited. Save or "
                "download it again."
            ) from None
        for key, (dtype, shape) in header.items():
            if key in shapes:
                raise ValueError(f"{shown(key)} of {name} is in more than one file.")
            if dtype not in FLOAT_TYPES:
                raise ValueError(f"{shown(key)} of {name} is of type {dtype}; codebooks are floating point.")
            shapes[key] = tuple(shape)
    expected = _expected_shapes(model_class, config, name, shapes)
    again = "its files are incomplete, or do not belong to its config.json. Save it again, or download it again."
    missing, strangers = sorted(set(expected) - set(shapes)), sorted(set(shapes) - set(expected))
    if missing:
        raise ValueError(f"The {model_class.__name__} {name} lacks the weights {_some(missing)}: {again}")
    if strangers:
        raise ValueError(f"The {model_class.__name__} {name} has no use for the weights {_some(strangers)}: {again}")
    for key, shape in expected.items():
        if shapes[key] != shape:
            raise ValueError(
                f"{key} of {name} has the shape {shapes[key]}, its {CONFIG_FILE} calls for {shape}: {again}"
            )
    tensors = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} of {name} holds NaN or infinite values: it was edited, or the fit diverged.")
    return tensors


def _find_weights(name, options, variant):
    kind = f".{variant}" if variant else ""
    path, index, failure = None, None, None
    try:
        path, _ = find_file(name, f"model{kind}.safetensors", **options)
    except ConnectionError as error:  # without a connection it may be that only parts are in the cache
        failure = error
    if path is not None:
        return [path]
    try:
        index, _ = find_file(name, f"model.safetensors.index{kind}.json", **options)
    except ConnectionError as error:
        failure = failure or error
    if index is None:
        if failure is not None:
            raise failure
        raise ValueError(
            f"{name} has no model{kind}.safetensors. Codebooks are loaded from safetensors only, never from pickles such as "
            "pytorch_model.bin, which may run code when they are opened: ask for a copy in safetensors."
        )
    weight_map = read_json(index, CONFIG_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{os.path.basename(index)} of {name} names no files: it was edited. Save or download it again."
        )
    shards = sorted({shard if isinstance(shard, str) else repr(shard) for shard in weight_map.values()})
    if len(shards) > MAX_SHARDS:
        raise ValueError(
            f"{os.path.basename(index)} of {name} names {len(shards)} files, more than the {MAX_SHARDS} that are accepted."
        )
    for shard in shards:
        if not SHARD_NAME.fullmatch(shard):
            raise ValueError(
                f"{os.path.basename(index)} of {name} names {shown(shard)}, which is no part of a saved model: it was edited."
            )
    paths = []
    for shard in shards:
        path, _ = find_file(name, shard, **options)
        if path is None:
            raise ValueError(f"{shard} of {name} is missing. Save or download it again.")
        paths.append(path)
    return paths


def _expected_shapes(model_class, config, name, shapes):
    """Shapes of the parameters by name. Nothing is allocated, and no more layers are made than there are tensors."""
    sizes = {"embedding_dim": [config.embedding_dim]}
    for key in ("codebook_sizes", "hidden_sizes", "latent_dim"):
        if hasattr(config, key):
            value = getattr(config, key)
            sizes[key] = value if isinstance(value, list) else [value]
    held = sum(math.prod(shape) for shape in shapes.values())
    for key, values in sizes.items():
        for value in values:
            if not isinstance(value, Integral) or isinstance(value, bool) or not 1 <= value <= held:
                raise ValueError(
                    f"{CONFIG_FILE} of {name} says {key}={shown(getattr(config, key))}, which the {held} numbers in its tensors do "
                    "not bear out: the files are incomplete, were edited, or do not belong together."
                )
    if sum(map(len, sizes.values())) > 3 * len(shapes) + 3:
        raise ValueError(
            f"{CONFIG_FILE} of {name} calls for more layers than its {len(shapes)} tensors can be: the files do not belong together."
        )
    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def _some(names):
    return f"[{', '.join(shown(name) for name in names[:3])}{', …' if len(names) > 3 else ''}]"


def _line(error):
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:199] + "…"
