"""The files of a tokenizer that transformers and tokenizers read themselves: limits before they do, and one kind of error after."""

import os
from contextlib import contextmanager
from json import JSONDecodeError

from .files import read_json
from .untrusted import file_bytes, shown

TOKENIZER_CONFIG = "tokenizer_config.json"
MAX_CONFIG_BYTES = 256 * 2**20
MAX_CONFIG_VALUES = 16_000_000  # a token takes up to eight where the configuration lists them
MAX_TOKENIZER_BYTES = 2**30
MAX_EXTRA_TOKENS = 2**15
MAX_OTHER_BYTES = 64 * 2**20
# Arguments of the tokenizer's class that are no settings: with them a configuration would pass itself off for checked files.
NO_SETTINGS = ("sid_parts", "tokenizer_object", "init_inputs", "gguf_file", "vocab", "merges")


def check_other_files(paths):
    """
    Args:
        paths (`list[str | None]`):
            Files that no manifest vouches for and that transformers reads whole, such as chat templates.

    Raises:
        `ValueError`: for one that is too large.
    """
    for path in paths:
        if path is not None and file_bytes(path) > MAX_OTHER_BYTES:
            raise ValueError(
                f"{os.path.basename(path)} holds {file_bytes(path)} bytes, more than the {MAX_OTHER_BYTES} that are accepted."
            )


def check_tokenizer_config(path):
    """
    Args:
        path (`str` or `None`):
            `tokenizer_config.json`, if there is one.

    Raises:
        `ValueError`: if it is no JSON object, too large or too deep, lists too many tokens, or sets what is no setting.
    """
    if path is None:
        return
    name, config = os.path.basename(path), read_json(path, MAX_CONFIG_BYTES, MAX_CONFIG_VALUES)
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    if isinstance(extra, list | dict) and len(extra) > MAX_EXTRA_TOKENS:
        raise ValueError(
            f"{name} lists {len(extra)} special tokens, more than the {MAX_EXTRA_TOKENS} that are accepted: transformers compares "
            "each with each."
        )
    wrong = [key for key in config if key in NO_SETTINGS or key.endswith(("_file", "_files"))]
    if wrong:
        raise ValueError(
            f"{name} sets {shown(wrong[0])}, which no save writes: it was edited. Save or download the bundle again."
        )


@contextmanager
def tokenizer_errors(everything=False):
    """
    Turns what a damaged `tokenizer.json` or `tokenizer_config.json` raises in transformers and tokenizers into a `ValueError`.

    Args:
        everything (`bool`, *optional*, defaults to `False`):
            Whether errors that programs of any kind raise are meant, too, rather than those of reading JSON only. tokenizers
            raises bare `Exception`s, and panics.
    """
    try:
        yield
    except BaseException as error:
        unreadable = isinstance(error, JSONDecodeError | RecursionError | UnicodeDecodeError)
        # A number of more digits than Python reads, which is an error of no class of its own.
        unreadable |= type(error) is ValueError and str(error).startswith("Exceeds the limit")
        strange = type(error) is Exception or type(error).__name__ == "PanicException"
        strange |= isinstance(error, TypeError | LookupError | AttributeError | OverflowError | UnicodeEncodeError)
        if unreadable:
            raise ValueError(
                f"tokenizer_config.json is not valid JSON ({error}): it is truncated or was edited. Save or download the bundle "
                "again."
            ) from None
        if everything and strange:
            raise ValueError(
                f"tokenizer.json or tokenizer_config.json cannot be read ({type(error).__name__}: {error}): one of them was "
                "edited, or another version of transformers wrote it. Save or download the bundle again."
            ) from error
        raise
