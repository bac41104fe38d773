"""The tree search behind `model.generate(custom_generate=...)`: a callable, and what a folder on the Hub runs."""

import functools
from numbers import Integral

import torch
from transformers.generation import GenerateBeamDecoderOnlyOutput
from transformers.utils import logging

from .beam_search import beam_search, default_num_beams
from .search import check_codebook, check_tokenizer, make_forest, warn_if_stale
from .trie import SIDTrie, check_catalog_rows

logger = logging.get_logger(__name__)

OWN_ARGUMENTS = ("tokenizer", "sid_tokenizer", "top_k", "beams", "trie", "normalize")

# What `generate()` may be told besides: it concerns lengths, which follow from the SIDs, special tokens, which are the
# tokenizer's, the form of the output, or a cache that the search does not use. Beams have a message of their own.
FREE_OPTIONS = (
    "bos_token_id",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "decoder_start_token_id",
    "disable_compile",
    "eos_token_id",
    "max_cache_len",
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "pad_token_id",
    "prefill_chunk_size",
    "return_dict_in_generate",
    "transformers_version",
    "use_cache",
)

# For these 1 does nothing; for all others a false value.
UNIT_OPTIONS = (
    "encoder_repetition_penalty",
    "guidance_scale",
    "length_penalty",
    "num_beam_groups",
    "repetition_penalty",
    "temperature",
    "top_p",
    "typical_p",
)

# What `generate()` puts into the model's arguments on its own; the search makes the last four for itself.
MODEL_INPUTS = ("attention_mask", "logits_to_keep", "past_key_values", "position_ids", "use_cache")


@torch.no_grad()
def sid_generate(
    model,
    input_ids: torch.LongTensor,
    logits_processor=None,
    stopping_criteria=None,
    generation_config=None,
    tokenizer=None,
    sid_tokenizer=None,
    top_k: int = 10,
    beams: int | None = None,
    trie: SIDTrie | list[SIDTrie] | None = None,
    normalize: str = "vocab",
    **model_kwargs,
) -> GenerateBeamDecoderOnlyOutput | torch.LongTensor:
    """
    Ranks SIDs as [`search`] does, but as a decoding method of `generate()`, whose outputs it returns.

    `generate()` takes the arguments from `sid_tokenizer` on out of its own by their names, so that `top_k` is the number of
    SIDs here and never a sampling option. It keeps `tokenizer` to itself: hence `sid_tokenizer`.

    What the model's own `generation_config` holds (sampling, penalties, beams) has no effect. An option that would change
    the ranking is refused if the caller gives it. Lengths are not: a SID and its end token always come whole. Ignored
    are a streamer and an assistant, which `generate()` keeps to itself, and processors and criteria of transformers' own
    classes, which look like those made from the model's config. (With `max_new_tokens=tokenizer.max_sid_length + 1`
    `generate()` does not warn of its default length.)

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, see [`search`].
        input_ids (`torch.LongTensor` of shape `(B, P)`):
            Prompts, padded on the left.
        logits_processor, stopping_criteria, generation_config:
            What `generate()` prepared. What comes from the model's own config is ignored, a caller's refused.
        tokenizer ([`SIDTokenizer`], *optional*):
            As `sid_tokenizer`, for callers other than `generate()`.
        sid_tokenizer ([`SIDTokenizer`]):
            The tokenizer the model was trained with.
        top_k (`int`, *optional*, defaults to 10):
            Number of SIDs returned for each prompt. ([`search`] counts products, which may share a SID.)
        beams (`int`, *optional*, defaults to `max(50, 5 * top_k)`):
            Number of unfinished SIDs kept at each level. Not `num_beams`, for which `generate()` would repeat the prompts.
        trie ([`SIDTrie`] or `list[SIDTrie]`, *optional*, defaults to all SIDs of the tokenizer):
            The SIDs that may be returned, for all prompts or for each.
        normalize (`str`, *optional*, defaults to `"vocab"`):
            `"vocab"` or `"sid"`, see [`search`].
        model_kwargs (*optional*):
            `attention_mask` of shape `(B, P)`, and what `generate()` adds.

    Returns:
        `torch.LongTensor` of shape `(B * top_k, P + L + 1)`, L being the length of the longest SID allowed: each prompt, a
        SID, the end token and padding; the rows of a prompt are consecutive, best first. With
        `return_dict_in_generate=True` a [`~transformers.generation.GenerateBeamDecoderOnlyOutput`] of `sequences` and
        `sequences_scores`, the log-probabilities of shape `(B * top_k,)`. Where a prompt has fewer SIDs than `top_k`, the
        other rows hold the end token alone and score -inf; [`SIDLogitsProcessor.sid_rows`] reads them as -1.

    Raises:
        `TypeError`: if there is no tokenizer, or one that is no [`SIDTokenizer`].
        `ValueError`: if the prompts were repeated for `num_beams`, or an option or argument was given that the search
            cannot honour; and as [`search`].

    Example:

    ```python
    >>> sequences = model.generate(**inputs, custom_generate=sid_generate, sid_tokenizer=tokenizer, top_k=10, beams=50)
    >>> tokenizer.decode_products(sequences[:, inputs["input_ids"].shape[1] :])
    ```

    With a `trie` restricted to products, of which some share their SIDs with others, read the products with
    `SIDLogitsProcessor(tokenizer, inputs["input_ids"].shape[1], trie=trie).decode_products(sequences)`, which knows the
    restriction.
    """
    # 1. arguments
    tokenizer = _check_tokenizer(tokenizer if sid_tokenizer is None else sid_tokenizer)
    for name, number in (("top_k", top_k), ("beams", beams)):
        if (number is not None or name == "top_k") and (
            isinstance(number, bool) or not isinstance(number, Integral) or number < 1
        ):
            raise ValueError(f"`{name}` must be a positive integer, got {number!r}.")
    check_codebook(model, tokenizer)
    return_dict = False
    if generation_config is not None:
        input_ids, model_kwargs["attention_mask"] = _unexpanded(
            model, generation_config, input_ids, model_kwargs.get("attention_mask")
        )
        _check_options(model, generation_config)
        return_dict = generation_config.return_dict_in_generate
    _check_components(logits_processor, stopping_criteria)
    attention_mask = _attention_mask(input_ids, model_kwargs)

    # 2. the search
    trie = SIDTrie.from_tokenizer(tokenizer) if trie is None else trie
    tries = list(trie) if isinstance(trie, list | tuple) else [trie] * len(input_ids)
    if len(tries) != len(input_ids):
        raise ValueError(f"`trie` is a list of {len(tries)} for {len(input_ids)} prompts: pass one trie, or one each.")
    forest, roots = make_forest(tries, model.device)
    for one in dict.fromkeys(tries):
        warn_if_stale(one, tokenizer)
    vocabulary = None
    if normalize == "sid":
        vocabulary = torch.cat([tokenizer.sid_vocabulary(), torch.tensor([tokenizer.eos_token_id])])
    sid_rows, scores = beam_search(
        model,
        input_ids.to(model.device),
        attention_mask.to(model.device),
        forest,
        default_num_beams(int(top_k)) if beams is None else int(beams),
        int(top_k),
        normalize,
        vocabulary,
        roots,
    )
    for root, one in enumerate(dict.fromkeys(tries)):
        check_catalog_rows(one, tokenizer, sid_rows[roots == root])

    # 3. prompt, SID, end token, padding
    sid_rows = sid_rows.cpu().flatten()
    tokens = tokenizer.sid_sequences(sid_rows.clamp(min=0).numpy())[:, : forest.depth]
    tokens = torch.where(sid_rows[:, None] >= 0, tokens, -1)
    lengths = (tokens >= 0).sum(dim=1, keepdim=True)
    answers = torch.full((len(tokens), forest.depth + 1), tokenizer.pad_token_id)
    answers[:, : tokens.shape[1]] = torch.where(tokens >= 0, tokens, tokenizer.pad_token_id)
    answers.scatter_(1, lengths, tokenizer.eos_token_id)
    sequences = torch.cat([input_ids.repeat_interleave(top_k, dim=0), answers.to(input_ids.device)], dim=1)
    if not return_dict:
        return sequences
    return GenerateBeamDecoderOnlyOutput(sequences=sequences, sequences_scores=scores.flatten().to(input_ids.device))


def generate(*args, model, **kwargs):
    """
    What `custom_generate/generate.py` of a model's folder runs, see [`save_custom_generate`]: [`sid_generate`] after the
    usual preparation of inputs.

    `from_pretrained(..., trust_remote_code=True)` also puts this function in place of `model.generate`. There it ranks SIDs
    only if asked to, by `beams`, by `trie`, or by a [`SIDTokenizer`] together with `top_k`; any other call is an ordinary
    `generate()`.

    Args:
        args (*optional*):
            Positional arguments of `generate()`.
        model ([`~transformers.PreTrainedModel`]):
            The model.
        kwargs (*optional*):
            `tokenizer` ([`SIDTokenizer`]), `top_k`, `beams`, `trie` and `normalize` as in [`sid_generate`], and the arguments of
            `generate()`. `num_beams` and `num_return_sequences` are taken as `beams` and `top_k`.

    Returns:
        As [`sid_generate`]; as `generate()` where no SIDs were asked for.

    Raises:
        `TypeError`: if there is no tokenizer, or one that is no [`SIDTokenizer`].
        `ValueError`: if `beams` and `num_beams`, or `top_k` and `num_return_sequences`, contradict each other; and as
            [`sid_generate`].
    """
    # Not `model.generate`, which may be this function.
    ordinary = functools.partial(type(model).generate, model)
    tokenizer = kwargs.get("tokenizer") if kwargs.get("sid_tokenizer") is None else kwargs["sid_tokenizer"]
    asks_for_sids = kwargs.get("beams") is not None or kwargs.get("trie") is not None
    asks_for_sids |= hasattr(tokenizer, "sid_sequences") and kwargs.get("top_k") is not None
    # Where a caller names the folder, `generate()` hands on all of its parameters, given or not.
    is_named = "negative_prompt_ids" in kwargs
    if kwargs.get("custom_generate") is not None or not (asks_for_sids or is_named):
        return ordinary(*args, **kwargs)

    for name in ("assistant_model", "negative_prompt_ids", "streamer"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"The search has no use for `{name}`. Drop it, or use `generate()` without `custom_generate`."
            )
    own = {name: kwargs.pop(name) for name in OWN_ARGUMENTS if kwargs.get(name) is not None}
    for theirs, ours in (("num_beams", "beams"), ("num_return_sequences", "top_k")):
        number = kwargs.pop(theirs, None)
        if number is not None and own.setdefault(ours, number) != number:
            raise ValueError(f"`{theirs}={number}` and `{ours}={own[ours]}` mean the same: pass `{ours}` only.")
    _check_tokenizer(tokenizer)
    if kwargs.get("generation_config") is None:
        # The length only so that `generate()` does not warn of its default; the padding token tells it what is padding
        # where no mask is given.
        if kwargs.get("max_length") is None:
            kwargs.setdefault("max_new_tokens", tokenizer.max_sid_length + 1)
        kwargs.setdefault("pad_token_id", tokenizer.pad_token_id)
    for name in OWN_ARGUMENTS:
        kwargs.pop(name, None)
    return ordinary(*args, custom_generate=functools.partial(sid_generate, **own), **kwargs)


def _check_tokenizer(tokenizer):
    if tokenizer is None:
        raise TypeError(
            "Ranking SIDs needs the SIDTokenizer that the model was trained with. Pass `sid_tokenizer=tokenizer` to the "
            "callable (`generate()` does not hand `tokenizer` on to a callable), `tokenizer=tokenizer` to a folder."
        )
    check_tokenizer(tokenizer)
    return tokenizer


def _unexpanded(model, generation_config, input_ids, attention_mask):
    """The prompts without the repetitions that beams of the model's own `generation_config` made."""
    held = model.generation_config
    repeated = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    if repeated > 1 and repeated != max(held.num_beams or 1, held.num_return_sequences or 1):
        raise ValueError(
            f"`num_beams={generation_config.num_beams}` and `num_return_sequences="
            f"{generation_config.num_return_sequences}` made `generate()` repeat every prompt {repeated} times, but the "
            f"search reads a prompt once for all its beams. Pass `beams` and `top_k` instead."
        )
    return input_ids[::repeated], None if attention_mask is None else attention_mask[::repeated]


def _check_options(model, generation_config):
    """Refuses what a caller asked for and the search does not do."""
    # What `generate()` makes of the model's own config if the caller gives none.
    defaults, _ = model._prepare_generation_config(None)
    for name, value in vars(generation_config).items():
        if name.startswith("_") or name in FREE_OPTIONS or not value or value == getattr(defaults, name, None):
            continue
        if name in UNIT_OPTIONS and value == 1:
            continue
        hint = " It is the sampling option here: pass `top_k` to `generate()` itself." if name == "top_k" else ""
        raise ValueError(
            f"`{name}={value!r}` is refused: SIDs are ranked by their exact log-probability, and sequences and scores are "
            f"all that is returned.{hint} Drop it, or use `generate()` with a `SIDLogitsProcessor`."
        )


def _check_components(logits_processor, stopping_criteria):
    """Refuses processors and criteria of a caller; those made from an option are transformers' own classes."""
    for name, components in (("logits_processor", logits_processor), ("stopping_criteria", stopping_criteria)):
        for component in components or ():
            kind = type(component)
            if not kind.__module__.startswith("transformers.") or kind.__name__ == "PrefixConstrainedLogitsProcessor":
                raise ValueError(
                    f"`{name}` holds a {kind.__name__}, which the search would not call: only valid SIDs are ever "
                    f"candidates, and `trie` says which. Drop it, or use `generate()` without `custom_generate`."
                )


def _attention_mask(input_ids, model_kwargs):
    """The mask of the prompts; `generate()` gives None where it would be all ones."""
    others = [name for name, value in model_kwargs.items() if name not in MODEL_INPUTS and value is not None]
    if input_ids.shape[1] == 0 or "inputs_embeds" in others:
        raise ValueError("Prompts have to be `input_ids` of at least one token; the search reads no `inputs_embeds`.")
    if others:
        raise ValueError(f"The search hands no {sorted(others)} on to the model. Drop them.")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            "`past_key_values` holds keys and values already, and the search makes its own. Pass whole prompts without it."
        )
    attention_mask = model_kwargs.get("attention_mask")
    return torch.ones_like(input_ids) if attention_mask is None else attention_mask
