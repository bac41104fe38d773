"""From prompts to products: the search that users call."""

from collections.abc import Mapping
from numbers import Integral

import numpy as np
import torch
from transformers.utils import logging

from .beam_search import MAX_MEMORY, beam_search, check_left_padding, default_num_beams
from .head import is_sharded
from .trie import SIDTrie, check_catalog_rows

logger = logging.get_logger(__name__)


def search(
    model,
    tokenizer,
    inputs,
    top_k: int = 10,
    num_beams: int | None = None,
    trie: SIDTrie | list[SIDTrie] | None = None,
    prefix_codes: list[list[int]] | None = None,
    normalize: str = "vocab",
    batch_size: int | None = None,
    max_memory: int = MAX_MEMORY,
) -> list[list[dict]]:
    """
    Retrieves the most probable products for each prompt.

    A SID's score is its natural log-probability under the model, the sum of the log-softmax of its tokens, without the
    end token. Nothing is renormalised over the allowed tokens, so scores of different tries compare. The products of
    one SID share its score and come in the catalog's order of popularity.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A decoder-only model with full attention in every layer, run with `eager` or `sdpa` attention.
        tokenizer ([`SIDTokenizer`]):
            The tokenizer the model was trained with.
        inputs (`list[dict]`, `list[list[int]]` or mapping of tensors):
            Examples for the tokenizer's prompt template (what does not fit the model's context is truncated by
            [`SIDTokenizer.encode_prompts`]), prompts as token ids, or a mapping with `input_ids` and `attention_mask`
            of shape `(num_prompts, length)`, padded on the left.
        top_k (`int`, *optional*, defaults to 10):
            Number of products returned for each prompt. Fewer come back where the trie holds fewer.
        num_beams (`int`, *optional*, defaults to `max(50, 5 * top_k)`):
            Number of unfinished SIDs kept at each level. Scores are exact at any width, but a narrow search misses SIDs:
            `benchmarks/beams.py` has the recall curve. Under a filter that keeps few SIDs, double the default.
        trie ([`SIDTrie`] or `list[SIDTrie]`, *optional*, defaults to all SIDs of the tokenizer):
            The SIDs that may be returned, for instance those in stock: `SIDTrie.from_tokenizer(tokenizer).restrict(ids)`,
            or one for each prompt. Their rows must be the catalog's. The default is built once for each version of the
            catalog and kept with the tokenizer.
        prefix_codes (`list[list[int]]`, *optional*):
            For each prompt the first codes of the SID, in the order of its tokens, -1 for an absent layer before a code. They
            are taken as given: scores are conditional on them and do not include them.
        normalize (`str`, *optional*, defaults to `"vocab"`):
            `"vocab"` for the softmax over the model's whole vocabulary, `"sid"` for the softmax over the SID tokens and
            the end token, for a model that was trained so (which [`SIDTrainer`] does not).
        batch_size (`int`, *optional*):
            Prompts decoded at once at most. By default as many as stay within `max_memory`.
        max_memory (`int`, *optional*, defaults to 1 GiB):
            Bytes that the search may take beside model and trie, as estimated from shapes. Keys and values of one prompt and
            its beams are held in any case.

    Returns:
        `list[list[dict]]`: For each prompt the products, best first, as `{"product_id", "sid", "score"}`.

    Raises:
        `TypeError`: if `inputs` is none of the above, such as a single example.
        `ValueError`: if a number is out of range, a prompt is empty or longer than the model's context, the model has
            no rows for the SID tokens or rows for other codebooks than the tokenizer's, a prefix is outside the trie, or
            the rows of `trie` are not the catalog's.

    Example:

    ```python
    >>> search(model, tokenizer, [{"query": "potato chips"}], top_k=2)
    [[{'product_id': 'p17', 'sid': '<a_3><b_9><c_4>', 'score': -1.73}, {'product_id': 'p2', ...}]]
    ```
    """
    # 1. arguments
    _check_positive(top_k=top_k)
    num_beams = default_num_beams(top_k) if num_beams is None else num_beams
    _check_positive(num_beams=num_beams, max_memory=max_memory)
    if normalize not in ("vocab", "sid"):
        raise ValueError(f'`normalize` must be "vocab" or "sid", got {normalize!r}.')
    check_tokenizer(tokenizer)
    text_config = model.config.get_text_config(decoder=True)
    if batch_size is not None:
        _check_positive(batch_size=batch_size)
    check_codebook(model, tokenizer)
    is_own_trie = trie is None
    if is_own_trie or trie == []:
        tries = [SIDTrie.from_tokenizer(tokenizer)]
    else:
        tries = trie if isinstance(trie, list) else [trie]
    forest, roots = make_forest(tries, model.device)
    for one in tries:
        warn_if_stale(one, tokenizer)

    # 2. prompts as lists of ids, the given codes behind them
    max_length = getattr(text_config, "max_position_embeddings", None)
    # Histories are cut where training cut them, if the tokenizer knows that, and at the model's context anyway.
    limits = [tokenizer.prompt_template.max_length, max_length and max_length - forest.depth - 1]
    prompts = _prompt_ids(tokenizer, inputs, min((limit for limit in limits if limit), default=None))
    if isinstance(trie, list) and len(trie) != len(prompts):
        raise ValueError(
            f"`trie` is a list of {len(trie)} for {len(prompts)} prompts: pass one trie, or one per prompt."
        )
    if not isinstance(trie, list):
        roots = roots.expand(len(prompts))
    if not prompts and not is_sharded(model):
        return []
    prefixes = _prefix_ids(tokenizer, prefix_codes, len(prompts))
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"Prompt {index} is empty: there is no position to predict a SID from.")
        if max_length and len(prompt) + forest.depth > max_length:
            raise ValueError(
                f"Prompt {index} has {len(prompt)} tokens and a SID up to {forest.depth}, more than the "
                f"{max_length} positions of the model. Shorten the prompt, or pass examples, which are truncated."
            )
    start_nodes = roots
    if prefix_codes is not None and prompts:
        depth = max(map(len, prefixes))
        padded = torch.tensor([prefix + [-1] * (depth - len(prefix)) for prefix in prefixes], dtype=torch.int64)
        start_nodes = forest.walk(padded.view(len(prompts), depth).to(forest.device), roots)
        if (start_nodes < 0).any():
            index = int((start_nodes < 0).int().argmax())
            raise ValueError(
                f"No SID of the trie begins with the codes {prefix_codes[index]} of prompt {index}. Pass them in the order "
                f"of a SID's tokens, -1 for a layer that is absent."
            )

    # 3. decode, prompts of similar length together, so that little is padded
    vocabulary = None
    if normalize == "sid":
        vocabulary = torch.cat([tokenizer.sid_vocabulary(), torch.tensor([tokenizer.eos_token_id])])
    prompts = [prompt + prefix for prompt, prefix in zip(prompts, prefixes, strict=True)]
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    longest = max(map(len, prompts), default=1)
    input_ids = torch.tensor(
        [[tokenizer.pad_token_id] * (longest - len(prompts[index])) + prompts[index] for index in order],
        dtype=torch.int64,
    ).view(len(prompts), longest)
    if prompts and not 0 <= input_ids.min() <= input_ids.max() < text_config.vocab_size:
        raise ValueError(
            f"A prompt holds token {int(input_ids.max() if input_ids.min() >= 0 else input_ids.min())}, but the model has the "
            f"tokens 0 to {text_config.vocab_size - 1}. Encode prompts with the tokenizer of the model."
        )
    lengths = torch.tensor([len(prompts[index]) for index in order], dtype=torch.int64)
    attention_mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    order = torch.tensor(order, dtype=torch.int64)
    found = beam_search(
        model,
        input_ids.to(model.device),
        attention_mask.to(model.device),
        forest,
        num_beams,
        min(top_k, max(one.num_sids for one in tries)),
        normalize,
        vocabulary,
        start_nodes[order.to(start_nodes.device)],
        batch_size,
        max_memory,
    )
    sid_rows, scores = (torch.empty_like(part).index_copy_(0, order, part) for part in map(torch.Tensor.cpu, found))

    # 4. SIDs to products
    if not is_own_trie:
        for root, one in enumerate(dict.fromkeys(tries)):
            check_catalog_rows(one, tokenizer, sid_rows[(roots == root).cpu()])
    sid_rows = sid_rows.numpy()
    product_rows, positions = _expand(tokenizer.catalog, sid_rows, top_k, tries)
    is_product = product_rows >= 0
    prompt_of, _ = is_product.nonzero()
    position_of = positions[is_product]
    product_ids = tokenizer.catalog.product_ids(product_rows[is_product])
    sids = tokenizer.sid_strings(sid_rows[prompt_of, position_of])
    values = scores.numpy()[prompt_of, position_of].tolist()
    results = [[] for _ in prompts]
    for prompt, product_id, sid, score in zip(prompt_of.tolist(), product_ids, sids, values, strict=True):
        results[prompt].append({"product_id": product_id, "sid": sid, "score": score})
    return results


def check_tokenizer(tokenizer) -> None:
    """
    Raises:
        `TypeError`: if the tokenizer knows no catalog.
    """
    # Not by its class: one that came with its code from the Hub is none of ours.
    if not hasattr(tokenizer, "sid_sequences"):
        raise TypeError(
            f"The tokenizer is a {type(tokenizer).__name__}, which knows no catalog of SIDs. Load the one that was saved with "
            f"the model by `SIDTokenizer.from_pretrained`, or by `AutoTokenizer` with `trust_remote_code=True`."
        )


def check_codebook(model, tokenizer) -> None:
    """
    Raises:
        `ValueError`: if the model's rows for SID tokens belong to other codebooks than the tokenizer's.
    """
    trained, given = getattr(model.config, "sid_codebook", None), tokenizer.codebook_fingerprint()
    if trained is not None and trained != given:
        raise ValueError(
            f"The model was trained with the SID tokens of codebook {trained}, the tokenizer has codebook {given}: the "
            f"model's codes would name other products. Load the tokenizer that was saved with the model."
        )


def warn_if_stale(trie, tokenizer) -> None:
    """Warns, once, of a trie that was built before the tokenizer's catalog changed."""
    if trie.catalog_version not in (None, tokenizer.catalog.version_id):
        logger.warning_once(
            "The trie was built before the catalog changed: it does not find products appended since, and where products were "
            "withdrawn since, fewer than top_k may come back. Build it again with SIDTrie.from_tokenizer."
        )


def make_forest(tries, device) -> tuple[SIDTrie, torch.Tensor]:
    """
    Args:
        tries (`list[SIDTrie]`): Tries, equal ones as often as they are wanted.
        device (`torch.device`): Where to.

    Returns:
        `tuple[SIDTrie, torch.Tensor]`: all of them as one, each different one once, and the root of each of `tries`.

    Raises:
        `TypeError`: if one is no [`SIDTrie`].
        `ValueError`: if one is stacked already.
    """
    for one in tries:
        # Not by its class, for the same reason as the tokenizer's.
        if not hasattr(one, "num_roots"):
            raise TypeError(f"`trie` must be a SIDTrie or a list of them, got {type(one).__name__}.")
        if one.num_roots > 1:
            raise ValueError(
                f"A stack of {one.num_roots} tries does not say which of them a prompt is to have: pass the list of tries, one "
                f"for each prompt."
            )
    unique = list(dict.fromkeys(tries))
    forest = unique[0].to(device) if len(unique) == 1 else type(unique[0]).stack([one.to(device) for one in unique])
    number = {one: index for index, one in enumerate(unique)}
    return forest, torch.tensor([number[one] for one in tries], dtype=torch.int64, device=device)


def _expand(catalog, sid_rows, top_k, tries) -> tuple[np.ndarray, np.ndarray]:
    """The products of ranked SIDs, of each prompt those that its trie was restricted to."""
    masks = [one.product_mask for one in tries]
    if len(masks) == 1:
        return catalog.expand_sids(sid_rows, top_k, *(() if masks[0] is None else masks))
    products, positions = np.full((2, len(sid_rows), top_k), -1, dtype=np.int64)
    keys = np.array([id(mask) for mask in masks])
    for key in np.unique(keys):
        rows = np.flatnonzero(keys == key)
        mask = masks[rows[0]]
        products[rows], positions[rows] = catalog.expand_sids(sid_rows[rows], top_k, *(() if mask is None else [mask]))
    return products, positions


def _prompt_ids(tokenizer, inputs, max_length: int | None) -> list[list[int]]:
    """The three forms of `inputs` as lists of token ids without padding."""
    if isinstance(inputs, Mapping):
        if not isinstance(inputs.get("input_ids"), torch.Tensor):
            raise TypeError(
                f"`inputs` is a mapping with {sorted(inputs)}, not a batch: wrap a single example in a list, `[inputs]`; "
                f'pass `prompts["input_ids"]` of `encode_prompts`; or `input_ids` and `attention_mask` as tensors.'
            )
        if inputs.get("attention_mask") is None or inputs["attention_mask"].shape != inputs["input_ids"].shape:
            raise ValueError(
                "`inputs` needs an `attention_mask` of the same shape as `input_ids`: padding cannot be told from tokens."
            )
        mask = inputs["attention_mask"].bool()
        check_left_padding(mask)
        return [row[kept].tolist() for row, kept in zip(inputs["input_ids"].cpu(), mask.cpu(), strict=True)]
    if not isinstance(inputs, list):
        raise TypeError(
            f"`inputs` must be a list of examples or of token ids, got {type(inputs).__name__}. Convert it: "
            f'`dataset.to_list()`, `frame.to_dict("records")`.'
        )
    if inputs and all(isinstance(prompt, Mapping) for prompt in inputs):
        _warn_of_unread_keys(tokenizer, inputs)
        encoded = tokenizer.encode_prompts(inputs, max_length=max_length)
        num_truncated = sum(count > 0 for count in encoded["num_truncated"])
        if num_truncated:
            logger.warning(
                f"{num_truncated} of {len(inputs)} prompts left out the oldest of their history to fit {max_length} tokens."
            )
        return encoded["input_ids"]
    if all(
        isinstance(prompt, list)
        and all(isinstance(token, Integral) and not isinstance(token, bool) for token in prompt)
        for prompt in inputs
    ):
        return [[int(token) for token in prompt] for prompt in inputs]
    kinds = sorted({type(prompt).__name__ for prompt in inputs})
    if kinds == ["list"]:
        kinds = sorted({f"list of {type(token).__name__}" for prompt in inputs for token in prompt})
    raise TypeError(f"`inputs` must hold only examples (dicts) or only lists of token ids, got a list of {kinds}.")


def _warn_of_unread_keys(tokenizer, inputs) -> None:
    """A misspelt field would be left out of the prompt without a word."""
    template = tokenizer.prompt_template
    # What another task than a purchase reads is its own.
    keys = set().union(*(example for example in inputs if template.task_of(example) == "purchase"))
    fields = set(template.example_keys())
    others = keys - fields - {"product", "task"}
    if fields - keys and others:
        logger.warning_once(
            f"The examples have no {sorted(fields - keys)}, which the prompt has a place for, and their {sorted(others)} are not "
            "used."
        )


def _prefix_ids(tokenizer, prefix_codes, num_prompts: int) -> list[list[int]]:
    """Token ids of the given codes of each prompt."""
    if prefix_codes is None:
        return [[] for _ in range(num_prompts)]
    if any(isinstance(codes, Integral) for codes in prefix_codes):
        raise TypeError(f"`prefix_codes` must be a list of codes for each prompt, got {prefix_codes}: `[[7], [7]]`.")
    if len(prefix_codes) != num_prompts:
        raise ValueError(
            f"`prefix_codes` has {len(prefix_codes)} entries for {num_prompts} prompts: pass one list per prompt, empty "
            f"where nothing is given."
        )
    for codes in prefix_codes:
        if isinstance(codes, str) or not all(
            isinstance(code, Integral) for code in (codes if codes is not None else "?")
        ):
            raise TypeError(
                f"`prefix_codes` must hold a list of integers for each prompt, empty for none; got {codes!r}."
            )
        if len(codes) and codes[-1] < 0:
            raise ValueError(
                f"The prefix {list(codes)} ends with -1, but first tokens cannot say that the next layer is absent. Drop it: -1 is "
                f"for layers before a code."
            )
    return [list(tokenizer.prefix_token_ids(codes)) for codes in prefix_codes]


def _check_positive(**numbers) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, Integral) or number < 1:
            raise ValueError(f"`{name}` must be a positive integer, got {number!r}.")
