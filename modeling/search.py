"""Exact-score beam search over the valid SIDs, with all beams of a prompt decoded as one tree."""

from collections.abc import Mapping
from numbers import Integral

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

from .trie import SIDTrie, check_catalog_rows

logger = logging.get_logger(__name__)

# Upper bound of the logits (rows x beams x vocabulary) that one forward pass of `search` produces by default.
MAX_LOGITS = 2**26


def search(
    model,
    tokenizer,
    inputs,
    top_k: int = 10,
    num_beams: int | None = None,
    trie: SIDTrie | None = None,
    prefix_codes: list[list[int]] | None = None,
    normalize: str = "vocab",
    batch_size: int | None = None,
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
            Number of unfinished SIDs kept at each level. Scores are exact at any width, but a narrow search misses
            SIDs: on a model with known distribution 10, 20 and 50 beams found .59, .88 and 1.00 of the true top 10.
        trie ([`SIDTrie`], *optional*, defaults to all SIDs of the tokenizer):
            The SIDs that may be returned, for instance those in stock: `SIDTrie.from_tokenizer(tokenizer, sid_rows)`.
            Its rows must be the catalog's. Building the default takes a sort of the catalog: pass one to repeated calls, and
            build it again when the catalog changes.
        prefix_codes (`list[list[int]]`, *optional*):
            For each prompt the first codes of the SID, in the order of its tokens, -1 for an absent layer. They are
            taken as given: scores are conditional on them and do not include them.
        normalize (`str`, *optional*, defaults to `"vocab"`):
            `"vocab"` for the softmax over the model's whole vocabulary, `"sid"` for the softmax over the SID tokens and
            the end token, for a model that was trained so (which [`SIDTrainer`] does not).
        batch_size (`int`, *optional*):
            Prompts decoded at once. By default as many as keep the logits under 64M numbers.

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
    _check_positive(num_beams=num_beams)
    text_config = model.config.get_text_config(decoder=True)
    if batch_size is None:
        batch_size = max(1, MAX_LOGITS // (num_beams * text_config.vocab_size))
    _check_positive(batch_size=batch_size)
    trained, given = getattr(model.config, "sid_codebook", None), tokenizer.codebook_fingerprint()
    if trained is not None and trained != given:
        raise ValueError(
            f"The model was trained with the SID tokens of codebook {trained}, the tokenizer has codebook {given}: the "
            f"model's codes would name other products. Load the tokenizer that was saved with the model."
        )
    is_own_trie = trie is None
    trie = (SIDTrie.from_tokenizer(tokenizer) if is_own_trie else trie).to(model.device)
    if trie.catalog_version not in (None, tokenizer.catalog.version_id):
        logger.warning_once(
            "The trie was built before the catalog changed: it does not find products appended since, and where products were "
            "withdrawn since, fewer than top_k may come back. Build it again with SIDTrie.from_tokenizer."
        )

    # 2. prompts as lists of ids, the given codes behind them
    max_length = getattr(text_config, "max_position_embeddings", None)
    # Histories are cut where training cut them, if the tokenizer knows that, and at the model's context anyway.
    limits = [tokenizer.prompt_template.max_length, max_length and max_length - trie.depth - 1]
    prompts = _prompt_ids(tokenizer, inputs, min((limit for limit in limits if limit), default=None))
    if not prompts:
        return []
    prefixes = _prefix_ids(tokenizer, prefix_codes, len(prompts))
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"Prompt {index} is empty: there is no position to predict a SID from.")
        if max_length and len(prompt) + trie.depth > max_length:
            raise ValueError(
                f"Prompt {index} has {len(prompt)} tokens and a SID up to {trie.depth}, more than the "
                f"{max_length} positions of the model. Shorten the prompt, or pass examples, which are truncated."
            )
    depth = max(map(len, prefixes))
    padded = torch.tensor([prefix + [-1] * (depth - len(prefix)) for prefix in prefixes], dtype=torch.int64)
    start_nodes = trie.walk(padded.view(len(prompts), depth).to(trie.device))
    if prefix_codes is not None and (start_nodes < 0).any():
        index = int((start_nodes < 0).int().argmax())
        raise ValueError(
            f"No SID of the trie begins with the codes {prefix_codes[index]} of prompt {index}. Pass them in the order "
            f"of a SID's tokens, -1 for a layer that is absent."
        )

    # 3. decode prompts of similar length together, so that little is padded
    vocabulary = None
    if normalize == "sid":
        vocabulary = torch.cat([tokenizer.sid_vocabulary(), torch.tensor([tokenizer.eos_token_id])])
    prompts = [prompt + prefix for prompt, prefix in zip(prompts, prefixes, strict=True)]
    num_return = min(top_k, trie.num_sids)
    sid_rows = torch.full((len(prompts), num_return), -1, dtype=torch.int64)
    scores = torch.full((len(prompts), num_return), -torch.inf)
    by_length = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for first in range(0, len(prompts), batch_size):
        batch = by_length[first : first + batch_size]
        longest = len(prompts[batch[0]])
        paddings = [longest - len(prompts[index]) for index in batch]
        input_ids = torch.tensor(
            [[tokenizer.pad_token_id] * pad + prompts[index] for pad, index in zip(paddings, batch, strict=True)]
        )
        attention_mask = (torch.arange(longest) >= torch.tensor(paddings)[:, None]).long()
        found = beam_search(
            model,
            input_ids.to(model.device),
            attention_mask.to(model.device),
            trie,
            num_beams,
            num_return,
            normalize,
            vocabulary,
            start_nodes[torch.tensor(batch, device=trie.device)] if prefix_codes is not None else None,
        )
        sid_rows[batch], scores[batch] = found[0].cpu(), found[1].cpu()

    # 4. SIDs to products
    if not is_own_trie:
        check_catalog_rows(trie, tokenizer, sid_rows)
    product_rows, positions = tokenizer.catalog.expand_sids(sid_rows.numpy(), top_k)
    is_product = product_rows >= 0
    prompt_of, _ = is_product.nonzero()
    position_of = positions[is_product]
    product_ids = tokenizer.catalog.product_ids(product_rows[is_product])
    sids = tokenizer.sid_strings(sid_rows.numpy()[prompt_of, position_of])
    results = [[] for _ in prompts]
    for prompt, position, product_id, sid in zip(prompt_of, position_of, product_ids, sids, strict=True):
        results[prompt].append({"product_id": product_id, "sid": sid, "score": scores[prompt, position].item()})
    return results


@torch.no_grad()
def beam_search(
    model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    trie: SIDTrie,
    num_beams: int,
    num_return: int,
    normalize: str = "vocab",
    vocabulary: torch.Tensor | None = None,
    start_nodes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Finds the most probable SIDs for a batch of prompts.

    The prompts are prefilled once. The beams of a level are then query positions of one and the same sequence: they
    share a position id, and a 4-D mask lets each see the prompt, its own ancestors and itself (the tree attention of
    [SpecInfer](https://huggingface.co/papers/2305.09781)). So the cache is neither expanded nor reordered. Only
    children in the trie are candidates; a finished SID leaves the beam for a pool and takes no live beam's place, as it
    would in `generate()`, which loses short SIDs by it.

    The model runs in evaluation mode and gets its mode back. The number of forward passes depends on the trie's depth
    (and on `start_nodes`) alone, never on scores, so ranks of a sharded model (ZeRO-3, FSDP) stay in step.

    Args:
        model ([`~transformers.PreTrainedModel`]): See [`search`].
        input_ids (`torch.Tensor` of shape `(B, P)`): Prompts, padded on the left.
        attention_mask (`torch.Tensor` of shape `(B, P)`): 1 for tokens, 0 for padding.
        trie ([`SIDTrie`]): The valid SIDs.
        num_beams (`int`): Number of unfinished SIDs kept at each level.
        num_return (`int`): Number of SIDs returned for each prompt; may exceed `num_beams`.
        normalize (`str`, *optional*, defaults to `"vocab"`): `"vocab"` or `"sid"`, see [`search`].
        vocabulary (`torch.Tensor` of shape `(N,)`, *optional*): With `"sid"`, the token ids of the softmax.
        start_nodes (`torch.Tensor` of shape `(B,)`, *optional*, defaults to the root):
            The node each search begins at; the tokens that lead there must already end the prompt.

    Returns:
        `tuple(torch.Tensor)`: SID rows of shape `(B, num_return)` (int64, -1 where there are no more) and their
        log-probabilities of the same shape (float32, -inf where there are no more), best first.

    Raises:
        `ValueError`: if a number is out of range, the padding is not on the left, `normalize` is unknown or lacks its
            `vocabulary`, the model cannot decode a tree of beams or has no rows for the SID tokens, or its logits are
            NaN.
    """
    _check_positive(num_beams=num_beams, num_return=num_return)
    if normalize not in ("vocab", "sid"):
        raise ValueError(f'`normalize` must be "vocab" or "sid", got {normalize!r}.')
    if normalize == "sid" and vocabulary is None:
        raise ValueError(
            '`normalize="sid"` needs `vocabulary`, the token ids that the model was trained to tell apart.'
        )
    if attention_mask.shape != input_ids.shape or attention_mask.dim() != 2:
        raise ValueError(
            f"`input_ids` and `attention_mask` must have one shape (batch, length), got {tuple(input_ids.shape)} and "
            f"{tuple(attention_mask.shape)}."
        )
    _check_left_padding(attention_mask)
    cache = _tree_cache(model)
    config = model.config.get_text_config(decoder=True)
    if trie.max_token_id >= config.vocab_size:
        raise ValueError(
            f"The trie holds token {trie.max_token_id} but the model has only {config.vocab_size} tokens. Resize the "
            f"model's embeddings to the tokenizer first."
        )

    num_rows, device = input_ids.shape[0], input_ids.device
    trie = trie.to(device)
    vocabulary = vocabulary.to(device) if normalize == "sid" else None
    num_levels = trie.depth
    if start_nodes is None:
        start_nodes = torch.zeros(num_rows, dtype=torch.int64, device=device)
    else:
        num_levels -= int(trie.node_depths(start_nodes).min())

    # A prefix may be a whole SID: then it is the one answer, and certain.
    pool_rows = torch.full((num_rows, num_return), -1, dtype=torch.int64, device=device)
    pool_rows[:, 0] = trie.sid_rows(start_nodes)
    pool_scores = torch.full((num_rows, num_return), -torch.inf, device=device)
    pool_scores[:, 0].masked_fill_(trie.is_leaf(start_nodes), 0.0)
    nodes, scores = start_nodes[:, None], torch.zeros((num_rows, 1), device=device)

    prompt_lengths = attention_mask.sum(dim=1, keepdim=True)
    sees_prompt = attention_mask[:, None].bool()
    sees_tree = torch.zeros((num_rows, 1, 0), dtype=torch.bool, device=device)
    # Restoring `training` module by module keeps parts that were frozen in evaluation mode as they are.
    training_modules = [module for module in model.modules() if module.training]
    model.eval()
    try:
        logits = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(dim=1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        for level in range(num_levels):
            # 1. score the children of all live beams; parents without a chance (-inf) have none
            tokens, children, is_child = trie.children(nodes)
            support = logits if vocabulary is None else logits[..., vocabulary]
            log_normalizer = support.float().logsumexp(dim=-1, keepdim=True)
            candidates = logits.gather(-1, tokens).float() - log_normalizer + scores[..., None]
            candidates = torch.where(is_child, candidates, -torch.inf).flatten(1)
            num_children = tokens.shape[-1]
            tokens, children = tokens.flatten(1), children.flatten(1)

            # 2. finished SIDs join the pool
            is_leaf = trie.is_leaf(children)
            leaf_scores = torch.where(is_leaf, candidates, -torch.inf)
            leaf_scores, best = leaf_scores.topk(min(num_return, leaf_scores.shape[1]), dim=1)
            leaf_rows = trie.sid_rows(children.gather(1, best))
            pool_scores, best = torch.cat([pool_scores, leaf_scores], dim=1).topk(num_return, dim=1)
            pool_rows = torch.cat([pool_rows, leaf_rows], dim=1).gather(1, best)
            if level == num_levels - 1:
                break

            # 3. the best of the others live on, no wider than the widest row needs
            candidates = candidates.masked_fill(is_leaf, -torch.inf)
            scores, best = candidates.topk(min(num_beams, candidates.shape[1]), dim=1)
            is_live = ~scores.isneginf()
            width = max(int(is_live.sum(dim=1).max()), 1)
            scores, best, is_live = scores[:, :width], best[:, :width], is_live[:, :width]
            nodes = torch.where(is_live, children.gather(1, best), -1)
            parents = (best // num_children)[..., None].expand(-1, -1, sees_tree.shape[-1])
            oneself = torch.eye(width, dtype=torch.bool, device=device).expand(num_rows, -1, -1)
            # The root is no position of the tree, so at the first level there are no ancestors to inherit.
            sees_tree = torch.cat([sees_tree.gather(1, parents), oneself], dim=2)

            # 4. feed the level
            mask = torch.cat([sees_prompt.expand(-1, width, -1), sees_tree], dim=2)[:, None]
            if model.config._attn_implementation == "eager":
                # Eager attention adds its mask; sdpa takes it as it is, whatever dtype autocast gives the queries.
                blocked = torch.finfo(model.dtype).min
                mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill_(~mask, blocked)
            logits = model(
                input_ids=tokens.gather(1, best),
                attention_mask=mask,
                position_ids=(prompt_lengths + level).expand(-1, width),
                past_key_values=cache,
                use_cache=True,
            ).logits
    finally:
        for module in training_modules:
            module.training = True

    if pool_scores.isnan().any():
        raise ValueError(
            "The model's logits are NaN, so SIDs cannot be ranked. Check its weights and their precision."
        )
    return pool_rows.masked_fill(pool_scores.isneginf(), -1), pool_scores


def default_num_beams(top_k: int) -> int:
    """Beams narrower than three to five times the list returned lose SIDs, short ones first."""
    return max(50, 5 * top_k)


def _tree_cache(model) -> DynamicCache:
    """An empty cache, after checking that the model can attend by a 4-D mask over all of it."""
    if model.config._attn_implementation not in ("eager", "sdpa"):
        raise ValueError(
            f"The beams of a prompt are decoded as one tree, whose mask `{model.config._attn_implementation}` attention "
            f'cannot take. Call `model.set_attn_implementation("sdpa")` first.'
        )
    cache = DynamicCache(config=model.config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        kinds = sorted({type(layer).__name__ for layer in cache.layers})
        raise ValueError(
            f"The beams of a prompt are decoded as one tree, which needs full attention in every layer; this model's "
            f"cache has {kinds}. Disable its sliding window, or use `generate()` with a `SIDLogitsProcessor`."
        )
    return cache


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
        _check_left_padding(mask)
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
    if all(isinstance(prompt, list) and all(type(token) is int for token in prompt) for prompt in inputs):
        return inputs
    kinds = sorted({type(prompt).__name__ for prompt in inputs})
    raise TypeError(f"`inputs` must hold only examples (dicts) or only lists of token ids, got a list of {kinds}.")


def _warn_of_unread_keys(tokenizer, inputs) -> None:
    """A misspelt field would be left out of the prompt without a word."""
    fields = set(tokenizer.prompt_template.fields)
    keys = set().union(*inputs)
    if fields - keys and keys - fields - {"product"}:
        logger.warning_once(
            f"The examples have no {sorted(fields - keys)}, which the prompt has a place for, and their "
            f"{sorted(keys - fields - {'product'})} are not used."
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
    return [list(tokenizer.prefix_token_ids(codes)) for codes in prefix_codes]


def _check_left_padding(attention_mask: torch.Tensor) -> None:
    mask = attention_mask.bool()
    if mask.numel() == 0 or not mask[:, -1].all() or (mask[:, :-1] & ~mask[:, 1:]).any():
        raise ValueError(
            "Prompts must be padded on the left and hold at least one token: the last column of `attention_mask` must "
            "be 1, and no 0 may follow a 1."
        )


def _check_positive(**numbers) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, Integral) or number < 1:
            raise ValueError(f"`{name}` must be a positive integer, got {number!r}.")
