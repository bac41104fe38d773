"""The generation config under which `generate()` ranks SIDs by their log-probability."""

from transformers import GenerationConfig

# What `generate()` may be told besides, because it changes neither scores nor their order.
FREE_OPTIONS = (
    "cache_implementation",
    "compile_config",
    "disable_compile",
    "max_cache_len",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "prefill_chunk_size",
    "return_dict_in_generate",
    "use_cache",
)

# Without a value that does nothing: `generate()` takes a model's over the None that would switch them off.
IRREMOVABLE_OPTIONS = (
    "assistant_early_exit",
    "constraints",
    "dola_layers",
    "force_words_ids",
    "forced_bos_token_id",
    "prompt_lookup_num_tokens",
    "stop_strings",
    "watermarking_config",
)


def sid_generation_config(
    model, tokenizer, num_beams: int = 50, num_return_sequences: int = 10, **overrides
) -> GenerationConfig:
    """
    Makes the generation config under which `generate()` ranks SIDs by their log-probability.

    `generate()` fills every option that is None from the model's own `generation_config`, so a checkpoint that was
    published for chat would sample, penalise SIDs of the history, or favour long ones. Here all that could touch scores
    or ranking is set to a value that does nothing.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model; its `generation_config` is read, not changed.
        tokenizer ([`SIDTokenizer`]):
            The tokenizer the model was trained with.
        num_beams (`int`, *optional*, defaults to 50):
            Number of beams. Use 3 to 5 times `num_return_sequences`; a narrower search loses short SIDs. 1 is greedy.
        num_return_sequences (`int`, *optional*, defaults to 10):
            Number of SIDs returned for each prompt.
        overrides (*optional*):
            Further options of [`~transformers.GenerationConfig`] which concern outputs and cache, and a larger
            `max_new_tokens`.

    Returns:
        [`~transformers.GenerationConfig`]: The config, to be passed along with a [`SIDLogitsProcessor`].

    Raises:
        `ValueError`: for an override that would change scores or ranking, for more `num_return_sequences` than beams,
            and if the model's own `generation_config` holds an option that cannot be overruled.
    """
    eos_token_id = tokenizer.eos_token_id
    # A SID and its end token: with less room no SID of full length could finish.
    min_room = tokenizer.max_sid_length + 1
    options = {
        "num_beams": num_beams,
        "num_return_sequences": num_return_sequences,
        "max_new_tokens": min_room,
        "min_new_tokens": 0,
        "eos_token_id": eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": False,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "typical_p": 1.0,
        "epsilon_cutoff": 0.0,
        "eta_cutoff": 0.0,
        # 1.0, the default of `generate()`, divides by the length and so favours long SIDs.
        "length_penalty": 0.0,
        # With it the first SIDs to end would win, though longer ones may be more probable.
        "early_stopping": False,
        # Its docstring recommends it; for ranking it gives only children probability 1.
        "renormalize_logits": False,
        "remove_invalid_values": False,
        "repetition_penalty": 1.0,
        "encoder_repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "encoder_no_repeat_ngram_size": 0,
        "guidance_scale": 1.0,
        "penalty_alpha": 0.0,
        "num_beam_groups": 1,
        "diversity_penalty": 0.0,
        "use_mtp": False,
        "low_memory": False,
        "is_assistant": False,
        "cache_implementation": "dynamic",
    }
    if num_beams == 1:
        # Greedy decoding knows no length penalty, and transformers warns about one.
        del options["length_penalty"]

    held = model.generation_config
    for name in IRREMOVABLE_OPTIONS:
        if getattr(held, name, None) is not None:
            raise ValueError(
                f"The model's `generation_config` sets `{name}`, which `generate()` applies whatever it is passed and "
                f"which would break the ranking of SIDs. Set `model.generation_config.{name} = None`."
            )
    # For these None means "off" but would bring the model's value back; each stand-in acts only where it changes
    # nothing. They are set only against such a value, for each costs a step of its own. What acts on the end token
    # alone (a decay, a forced end) needs none: the processor comes later and decides about that token.
    stand_ins = {
        "bad_words_ids": [[eos_token_id, eos_token_id]],
        "begin_suppress_tokens": [],
        "max_time": float("inf"),
        "sequence_bias": [[[eos_token_id], 0.0]],
        "suppress_tokens": [],
    }
    options |= {name: value for name, value in stand_ins.items() if getattr(held, name, None) is not None}

    for name, value in overrides.items():
        if name == "max_new_tokens":
            if not isinstance(value, int) or value < min_room:
                raise ValueError(
                    f"`max_new_tokens={value}` leaves no room for the longest SID and its end token: pass at least "
                    f"{min_room}, or nothing."
                )
        elif name not in FREE_OPTIONS and not (name in options and options[name] == value):
            needed = f" `{name}` has to be {options[name]!r}." if name in options else ""
            raise ValueError(
                f"`{name}={value!r}` is refused: it may change the scores or the ranking of SIDs, or hide them.{needed} "
                f"Drop it, or build a `GenerationConfig` of your own and pass it with the `SIDLogitsProcessor`."
            )
    return GenerationConfig(**(options | overrides))
