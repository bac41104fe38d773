"""The bundle: what a SIDTokenizer saves beside the tokenizer's own files, and checks when it loads."""

import os
import re

import torch

from .catalog import ProductCatalog
from .catalog_file import unchanged_file, write_catalog
from .codebook_version import check_quantizer
from .files import check_file, checksum, file_entry, read_json, read_tensors, write_json, write_tensors
from .prompts import PromptTemplate
from .quantizer import ResidualQuantizer, ResidualQuantizerConfig
from .sid_tokens import check_token_format
from .tokenizer_files import MAX_TOKENIZER_BYTES
from .untrusted import is_whole, shown

FORMAT_VERSION = 1
MANIFEST_FILE = "sid_manifest.json"
CATALOG_FILE = "sid_catalog.safetensors"
CODEBOOK_FILE = "sid_codebook.safetensors"
PROMPT_FILE = "sid_prompt.json"
CODEBOOK_CONFIG = ("codebook_sizes", "embedding_dim", "num_iterations", "relocation_threshold", "seed")
# What bundles of earlier versions lack; the defaults are what those versions did.
OPTIONAL_CODEBOOK_CONFIG = (
    "preset",
    "sample_per_code",
    "num_sample_iterations",
    "init",
    "metric",
    "normalize_residuals",
    "capacity",
    "num_beams",
    "skipped_codes",
)
WHOLE_CONFIG = (
    "embedding_dim",
    "num_iterations",
    "seed",
    "sample_per_code",
    "num_sample_iterations",
    "num_beams",
)
MAX_BEAMS = 4096  # encoding takes memory for each


def write_bundle(tokenizer, save_directory):
    """
    Writes catalog, codebooks, prompt template and, last, the manifest; `tokenizer.json` must be there already.

    Args:
        tokenizer ([`SIDTokenizer`]):
            What to save.
        save_directory (`str`):
            An existing folder.

    Returns:
        `list[str]`: the files written.
    """
    catalog, quantizer = tokenizer.catalog, tokenizer.quantizer
    names = ["tokenizer.json", CATALOG_FILE, PROMPT_FILE] + ([] if quantizer is None else [CODEBOOK_FILE])
    paths = {name: os.path.join(save_directory, name) for name in [*names, MANIFEST_FILE]}
    write_catalog(catalog, paths[CATALOG_FILE])
    prompt = {"template": tokenizer.prompt_template.to_dict()}
    write_json(paths[PROMPT_FILE], prompt | {"prefix": tokenizer.prompt_prefix, "suffix": tokenizer.prompt_suffix})
    if quantizer is not None:
        config = {name: getattr(quantizer.config, name) for name in CODEBOOK_CONFIG + OPTIONAL_CODEBOOK_CONFIG}
        tensors = {name: parameter.data for name, parameter in _quantizer_tensors(quantizer).items()}
        write_tensors(paths[CODEBOOK_FILE], tensors, config)
    # The manifest comes last: a folder without it, or with one that names other hashes, is no whole bundle.
    manifest = {
        "format_version": FORMAT_VERSION,
        "codebook_sizes": catalog.codebook_sizes,
        "suffix_size": catalog.suffix_size,
        "pruning": catalog.pruning.to_dict(),
        "token_format": tokenizer.token_format,
        "layer_order": tokenizer.layer_order,
        "base_size": tokenizer.base_size,
        "special_tokens": {"eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token},
        "products": len(catalog),
        "sids": catalog.num_sids,
        "history": catalog.history,
        "files": {name: file_entry(paths[name]) for name in names if name != CATALOG_FILE},
    }
    manifest["files"][CATALOG_FILE] = _catalog_entry(catalog, paths[CATALOG_FILE])
    write_json(paths[MANIFEST_FILE], manifest | {"checksum": checksum(manifest)})
    return [path for name, path in paths.items() if name != "tokenizer.json"]


def read_manifest(manifest_file):
    """
    Raises:
        `ValueError`: if the manifest is missing, of another format version, truncated or edited.
    """
    if manifest_file is None:
        raise ValueError(
            f"There is no {MANIFEST_FILE}: this is not a SIDTokenizer, or its save did not finish, since the manifest is "
            "written last. Make a tokenizer with SIDTokenizer.from_base, or save or download the bundle again."
        )
    manifest = read_json(manifest_file)
    version = manifest.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(
            f"{MANIFEST_FILE} has format version {shown(version)}, this version of rqsid reads "
            f"{FORMAT_VERSION}. Install the version that wrote it."
        )
    required = ["codebook_sizes", "suffix_size", "pruning", "token_format", "layer_order", "base_size"]
    required += ["special_tokens", "products", "sids", "history", "files", "checksum"]
    missing = [key for key in required if key not in manifest]
    files = manifest.get("files") if isinstance(manifest.get("files"), dict) else {}
    missing += [name for name in ("tokenizer.json", CATALOG_FILE, PROMPT_FILE) if name not in files]
    if missing:
        raise ValueError(
            f"{MANIFEST_FILE} lacks {', '.join(missing)}: it was edited. Save or download the bundle again."
        )
    if manifest.pop("checksum") != checksum(manifest):
        raise ValueError(
            f"{MANIFEST_FILE} does not match its own checksum: it was edited. Save or download the bundle again."
        )
    _check_manifest(manifest)
    return manifest


def _check_manifest(manifest):
    """That a manifest with a fitting checksum, which anybody can compute, says nothing but what one says."""
    again = "it was edited. Save or download the bundle again."
    for name, entry in manifest["files"].items():
        # No path: files are looked for under these names, in one folder.
        if name not in ("tokenizer.json", CATALOG_FILE, PROMPT_FILE, CODEBOOK_FILE):
            raise ValueError(f"{MANIFEST_FILE} names the file {shown(name)}, which no bundle has: {again}")
        if (
            not isinstance(entry, dict)
            or set(entry) != {"bytes", "sha256"}
            or not is_whole(entry["bytes"], 0, 2**62)
            or not isinstance(entry["sha256"], str)
            or not re.fullmatch("[0-9a-f]{64}", entry["sha256"])
        ):
            raise ValueError(f"{MANIFEST_FILE} describes {name} as {shown(entry)}, not by size and SHA-256: {again}")
    num_bytes = manifest["files"]["tokenizer.json"]["bytes"]
    if num_bytes > MAX_TOKENIZER_BYTES:
        raise ValueError(
            f"{MANIFEST_FILE} says that tokenizer.json holds {num_bytes} bytes, more than the {MAX_TOKENIZER_BYTES} that are "
            "accepted. Use fewer tokens."
        )
    order, special = manifest["layer_order"], manifest["special_tokens"]
    good = {
        "layer_order": isinstance(order, list) and all(is_whole(layer, 0, 2**31) for layer in order),
        # A token takes four bytes at least.
        "base_size": is_whole(manifest["base_size"], 0, num_bytes),
        "special_tokens": isinstance(special, dict)
        and set(special) == {"eos_token", "pad_token"}
        and all(token is None or isinstance(token, str) for token in special.values()),
    }
    for key, is_good in good.items():
        if not is_good:
            raise ValueError(f"{MANIFEST_FILE} says {key}={shown(manifest[key])}: {again}")
    try:
        check_token_format(manifest["token_format"])
    except ValueError as error:
        raise ValueError(f"{MANIFEST_FILE}: {error}") from None


def read_bundle(manifest_file, files):
    """
    Reads and checks the files of a bundle.

    Raises:
        `ValueError`: naming the file that is missing, truncated, edited, or does not fit the others.
    """
    manifest = read_manifest(manifest_file)
    for name, entry in manifest["files"].items():
        if files.get(name) is None:
            raise ValueError(f"{name} is missing though {MANIFEST_FILE} names it. Save or download the bundle again.")
        check_file(files[name], entry)

    # The files are what was saved together; what follows guards against a manifest that was edited as well.
    catalog = ProductCatalog.load(files[CATALOG_FILE])
    catalog.file["entry"] = manifest["files"][CATALOG_FILE]
    found = {"codebook_sizes": catalog.codebook_sizes, "suffix_size": catalog.suffix_size}
    found |= {"products": len(catalog), "sids": catalog.num_sids, "pruning": catalog.pruning.to_dict()}
    found["history"] = catalog.history
    for key, value in found.items():
        if manifest[key] != value:
            raise ValueError(
                f"{MANIFEST_FILE} says {key}={shown(manifest[key])}, {CATALOG_FILE} {shown(value)}. Save the bundle again."
            )
    # Before the tokens are spelled: each of them takes four bytes at least.
    num_tokens = sum(catalog.codebook_sizes) + catalog.suffix_size
    if num_tokens > manifest["files"]["tokenizer.json"]["bytes"] // 4:
        raise ValueError(
            f"{CATALOG_FILE} has SIDs of {num_tokens} tokens, more than tokenizer.json has room for: the files belong to "
            "different saves. Save or download the bundle again."
        )
    quantizer = None
    if CODEBOOK_FILE in manifest["files"]:
        quantizer = _read_codebook(files[CODEBOOK_FILE], catalog.codebook_sizes)
        check_quantizer(quantizer, catalog.codebook_sizes, catalog.codebook_version)
    prompt_template, prompt_prefix, prompt_suffix = _read_prompt(files[PROMPT_FILE])
    return {
        "catalog": catalog,
        "quantizer": quantizer,
        "prompt_template": prompt_template,
        "prompt_prefix": prompt_prefix,
        "prompt_suffix": prompt_suffix,
        "token_format": manifest["token_format"],
        "layer_order": check_layer_order(manifest["layer_order"], catalog),
        "base_size": manifest["base_size"],
        "special_tokens": manifest["special_tokens"],
    }


def _catalog_entry(catalog, path):
    """The file's size and hash, known already where nothing has changed since it was read or written."""
    if unchanged_file(catalog) is None or "entry" not in catalog.file:
        entry = file_entry(path)
        if catalog.file is not None:
            catalog.file["entry"] = entry
        return entry
    return catalog.file["entry"]


def _read_prompt(path):
    """The template, and the tokens before and behind a prompt."""
    prompt = read_json(path)
    strangers = sorted(set(prompt) - {"template", "prefix", "suffix"})
    if strangers:
        raise ValueError(
            f"{PROMPT_FILE} holds {', '.join(strangers)[:200]}, which this version of rqsid does not know."
        )
    try:
        # Bundles of earlier versions have no suffix, since nothing stood behind a prompt.
        template, markup = PromptTemplate(**prompt["template"]), [prompt["prefix"], prompt.get("suffix", [])]
    except (KeyError, TypeError, ValueError) as error:
        # Of a length that is no matter of the file's.
        raise ValueError(f"{PROMPT_FILE} holds no prompt template ({repr(error)[:500]}): it was edited.") from None
    for tokens in markup:
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise ValueError(
                f"{PROMPT_FILE} puts {shown(tokens)} around prompts, which is no list of tokens: it was edited."
            )
    return template, *markup


def _quantizer_tensors(quantizer):
    """The parameters of a quantizer under the names that they have in a bundle."""
    groups = {"codebook": quantizer.codebooks, "prices": quantizer.prices, "scale": quantizer.scales}
    return {f"{name}_{layer}": parameter for name, group in groups.items() for layer, parameter in enumerate(group)}


def _read_codebook(path, codebook_sizes):
    again = "it was edited. Save or download the bundle again."
    names = [f"codebook_{layer}" for layer in range(len(codebook_sizes))]
    tensors, config = read_tensors(path, names)
    if config.get("codebook_sizes") != codebook_sizes:
        raise ValueError(
            f"{CODEBOOK_FILE} has codebooks {shown(config.get('codebook_sizes'))}, the catalog {codebook_sizes}."
        )
    missing = [name for name in CODEBOOK_CONFIG if name not in config]
    if missing:
        raise ValueError(f"{CODEBOOK_FILE} lacks {', '.join(missing)}: it was edited.")
    known = {name: config[name] for name in CODEBOOK_CONFIG + OPTIONAL_CODEBOOK_CONFIG if name in config}
    # What the quantizer allocates follows these numbers, so that they have to be those of the tensors.
    dim = known["embedding_dim"]
    for name, size in zip(names, codebook_sizes, strict=True):
        if not is_whole(dim, 1, 2**31) or tensors[name].shape != (size, dim):
            raise ValueError(
                f"{name} in {CODEBOOK_FILE} is {tuple(tensors[name].shape)} {tensors[name].dtype}, expected ({size}, "
                f"{shown(dim)}) of floating point. Save or download the bundle again."
            )
    wrong = [name for name in WHOLE_CONFIG if name in known and not is_whole(known[name], 0, 2**63 - 1)]
    wrong += [name for name in ("relocation_threshold", "capacity") if not _is_number(known.get(name, 0))]
    wrong += ["num_beams"] if not wrong and known.get("num_beams", 1) > MAX_BEAMS else []
    wrong += ["normalize_residuals"] if not isinstance(known.get("normalize_residuals", False), bool) else []
    if wrong:
        raise ValueError(f"{CODEBOOK_FILE} says {wrong[0]}={shown(known[wrong[0]])}: {again}")
    try:
        quantizer = ResidualQuantizer(ResidualQuantizerConfig(**known))
    except Exception as error:  # transformers checks types by errors of its own
        raise ValueError(
            f"{CODEBOOK_FILE} holds no configuration of a quantizer ({repr(error)[:500]}): {again}"
        ) from None
    parameters = _quantizer_tensors(quantizer)
    tensors, _ = read_tensors(path, list(parameters), exactly=True)
    for name, parameter in parameters.items():
        tensor = tensors[name]
        if tensor.shape != parameter.shape or not tensor.is_floating_point():
            raise ValueError(
                f"{name} in {CODEBOOK_FILE} is {tuple(tensor.shape)} {tensor.dtype}, expected {tuple(parameter.shape)} of "
                "floating point. Save or download the bundle again."
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} in {CODEBOOK_FILE} holds NaN or infinite values: it was edited.")
        parameter.data = tensor.clone()
    return quantizer


def _is_number(value):
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9)


def check_layer_order(layer_order, catalog):
    """
    Returns:
        `list[int]`: the layers in the order of a SID's tokens; the quantizer's order if `None` was given.

    Raises:
        `ValueError`: if a layer is missing, or one SID would be the beginning of another.
    """
    if layer_order is None:
        return list(range(catalog.num_layers))
    layer_order = [int(layer) for layer in layer_order]
    if sorted(layer_order) != list(range(catalog.num_layers)):
        raise ValueError(f"layer_order={shown(layer_order)} must name each of the {catalog.num_layers} layers once.")
    if catalog.pruning.num_pruned and layer_order[-1] == catalog.pruning.layer:
        raise ValueError(
            f"layer_order={layer_order} ends with layer {catalog.pruning.layer}, some of whose codes are pruned: one SID "
            "could be the beginning of another. Put another layer last."
        )
    return layer_order
