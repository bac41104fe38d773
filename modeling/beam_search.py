"""Exact-score beam search over the valid SIDs, with all beams of a prompt decoded as one tree."""

import math
from numbers import Integral

import torch
import torch.distributed as dist
from torch.profiler import record_function

from .head import OutputHead
from .model_checks import evaluating, tree_cache, tree_mask
from .trie import SIDTrie

# Bytes that a search may take beside model and trie, by default.
MAX_MEMORY = 2**30


@torch.no_grad()
def beam_search(
    model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    trie: SIDTrie,
    num_beams: int,
    num_return: int,
    normalize: str | None = None,
    vocabulary: torch.Tensor | None = None,
    start_nodes: torch.Tensor | None = None,
    batch_size: int | None = None,
    max_memory: int = MAX_MEMORY,
    head: OutputHead | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Finds the most probable SIDs for a batch of prompts.

    The prompts are prefilled once. The beams of a level are then query positions of one and the same sequence: they
    share a position id, and a 4-D mask lets each see the prompt, its own ancestors and itself (the tree attention of
    [SpecInfer](https://huggingface.co/papers/2305.09781)). So the cache is neither expanded nor reordered. Only
    children in the trie are candidates; a finished SID leaves the beam for a pool and takes no live beam's place, as it
    would in `generate()`, which loses short SIDs by it.

    Prompts are decoded in chunks whose keys and values, masks, activations and candidates are estimated to stay within
    `max_memory`, and the positions of a single prompt in pieces if need be; its keys and values, and the candidates of its
    beams, are held in any case. All
    shapes follow from the arguments, never from scores, and between prefill and result nothing waits for the device. The
    model runs in evaluation mode and gets its mode back. Ranks of a sharded model (ZeRO-3, FSDP2) must call together; they
    all run as many forward passes as the one that needs most.

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
            The node each search begins at, a root or one below it; the tokens that lead there must already end the prompt.
        batch_size (`int`, *optional*): Prompts decoded at once at most; no bound but `max_memory` by default.
        max_memory (`int`, *optional*, defaults to 1 GiB): Bytes beside model and trie.
        head ([`OutputHead`], *optional*):
            Made for this model, and the tokens of the trie or more; saves reading the output layer in every call. It brings
            `normalize` and `vocabulary` along.

    Returns:
        `tuple(torch.Tensor)`: SID rows of shape `(B, num_return)` (int64, -1 where there are no more) and their
        log-probabilities of the same shape (float32, -inf where there are no more), best first.

    Raises:
        `ValueError`: if a number is out of range, the padding is not on the left, `normalize` is unknown or lacks its
            `vocabulary`, the model cannot decode a tree of beams or has no rows for the SID tokens, or its logits are
            NaN.
    """
    # 1. arguments
    numbers = {"num_beams": num_beams, "num_return": num_return, "max_memory": max_memory, "batch_size": batch_size}
    for name, number in numbers.items():
        is_number = isinstance(number, Integral) and not isinstance(number, bool) and number > 0
        if not is_number and not (name == "batch_size" and number is None):
            raise ValueError(f"`{name}` must be a positive integer, got {number!r}.")
    num_beams, num_return, max_memory = int(num_beams), int(num_return), int(max_memory)
    if attention_mask.shape != input_ids.shape or attention_mask.dim() != 2:
        raise ValueError(
            f"`input_ids` and `attention_mask` must have one shape (batch, length), got {tuple(input_ids.shape)} and "
            f"{tuple(attention_mask.shape)}."
        )
    check_left_padding(attention_mask)
    config = model.config.get_text_config(decoder=True)
    if trie.max_token_id >= config.vocab_size:
        raise ValueError(
            f"The trie holds token {trie.max_token_id} but the model has only {config.vocab_size} tokens. Resize the "
            f"model's embeddings to the tokenizer first."
        )
    num_rows, device = input_ids.shape[0], input_ids.device
    trie = trie.to(device)
    depths = [0]
    if start_nodes is None:
        if trie.num_roots > 1:
            raise ValueError(
                f"The trie is a stack with {trie.num_roots} roots: pass the root of each prompt as `start_nodes`."
            )
        start_nodes = torch.zeros(num_rows, dtype=torch.int64, device=device)
    elif num_rows:
        if start_nodes.shape != (num_rows,) or start_nodes.min() < 0 or start_nodes.max() >= trie.num_nodes:
            raise ValueError(
                f"`start_nodes` must be {num_rows} nodes between 0 and {trie.num_nodes - 1}, one for each prompt, got "
                f"{start_nodes.tolist()}."
            )
        depths = trie.node_depths(start_nodes).tolist()
    lengths = attention_mask.sum(dim=1).tolist()
    _check_context(config, lengths, [trie.depth - depth for depth in depths] * (num_rows // len(depths)))
    depths = sorted(set(depths))
    sid_rows = torch.full((num_rows, num_return), -1, dtype=torch.int64, device=device)
    scores = torch.full((num_rows, num_return), -torch.inf, device=device)

    with evaluating(model):
        tree_cache(model)
        if head is None:
            head = OutputHead(model, trie.tokens, "vocab" if normalize is None else normalize, vocabulary)
        elif normalize is not None or vocabulary is not None:
            raise ValueError("`head` has its own `normalize` and `vocabulary`: leave them out.")
        elif not torch.isin(trie.tokens, head.tokens).all():
            raise ValueError("The trie has tokens that `head` does not score: make the head with `trie.tokens`.")

        # 2. chunks of prompts and pieces of positions that fit, known before anything runs
        levels = plan_levels(trie, depths, num_beams)
        chunks, first = [], 0
        while first < num_rows:
            longest = max(lengths[first : first + (batch_size or num_rows)])
            size, piece = plan_memory(config, head, longest, levels, model.dtype.itemsize, max_memory)
            size = min(size, batch_size or num_rows, num_rows - first)
            longest = max(lengths[first : first + size])
            chunks.append((slice(first, first + size), longest, piece))
            first += size
        passes = sum(
            math.ceil(longest / piece) + sum(math.ceil(beams / piece) for _, beams in levels if beams)
            for _, longest, piece in chunks
        )
        spare_passes = _most_passes(passes, head) - passes

        # 3. decode
        for rows, longest, piece in chunks:
            mask = attention_mask[rows, -longest:]
            found = _decode(
                model, head, input_ids[rows, -longest:], mask, trie, start_nodes[rows], levels, piece, num_return
            )
            sid_rows[rows], scores[rows] = found
        for _ in range(spare_passes):
            head(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=device))

    if scores.isnan().any():
        raise ValueError(
            "The model's logits are NaN, so SIDs cannot be ranked. Check its weights and their precision."
        )
    return sid_rows.masked_fill_(scores.isneginf(), -1), scores


def _decode(model, head, input_ids, attention_mask, trie, start_nodes, levels, piece, num_return):
    """One chunk; every shape is known beforehand."""
    num_rows, prompt_length = input_ids.shape
    device = input_ids.device
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    cache = tree_cache(model)

    # A prefix may be a whole SID: then it is the one answer, and certain.
    pool_rows = torch.full((num_rows, num_return), -1, dtype=torch.int64, device=device)
    pool_rows[:, 0] = trie.sid_rows(start_nodes)
    pool_scores = torch.full((num_rows, num_return), -torch.inf, device=device)
    pool_scores[:, 0].masked_fill_(trie.is_leaf(start_nodes), 0.0)

    with record_function("rqsid::prefill"):
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        for start in range(0, prompt_length, piece):
            end = min(start + piece, prompt_length)
            states = head(
                last=1,
                input_ids=input_ids[:, start:end],
                attention_mask=attention_mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
                use_cache=True,
            )

    nodes, scores = start_nodes[:, None], torch.zeros((num_rows, 1), device=device)
    prompt_lengths = attention_mask.sum(dim=1, keepdim=True)
    sees_prompt = attention_mask[:, None].bool()
    # Where other rows began nearer to the root, the beams of a finished row are dead, and stay within the context.
    last_positions = prompt_lengths + (trie.depth - 1 - trie.node_depths(start_nodes)[:, None]).clamp(min=0)
    sees_tree = torch.zeros((num_rows, 1, 0), dtype=torch.bool, device=device)
    for level, (width, num_live) in enumerate(levels):
        # 1. score the children of all live beams; parents without a chance (-inf) have none
        with record_function("rqsid::head"):
            log_probs = head.log_probs(states)
        with record_function("rqsid::children"):
            tokens, children, is_child = trie.children(nodes, width)
        with record_function("rqsid::select"):
            candidates = log_probs.gather(-1, head.columns(tokens)) + scores[..., None]
            candidates = candidates.masked_fill_(~is_child, -torch.inf).flatten(1)
            tokens, children = tokens.flatten(1), children.flatten(1)

            # 2. finished SIDs join the pool
            is_leaf = trie.is_leaf(children)
            leaf_scores = candidates.masked_fill(~is_leaf, -torch.inf)
            leaf_scores, best = leaf_scores.topk(min(num_return, leaf_scores.shape[1]), dim=1)
            leaf_rows = trie.sid_rows(children.gather(1, best))
            pool_scores, best = torch.cat([pool_scores, leaf_scores], dim=1).topk(num_return, dim=1)
            pool_rows = torch.cat([pool_rows, leaf_rows], dim=1).gather(1, best)
            if num_live == 0:
                break

            # 3. the best of the others live on
            scores, best = candidates.masked_fill_(is_leaf, -torch.inf).topk(num_live, dim=1)
            nodes = torch.where(scores.isneginf(), -1, children.gather(1, best))
            tokens = tokens.gather(1, best)
            parents = (best // width)[..., None].expand(-1, -1, sees_tree.shape[-1])
            # The root is no position of the tree, so at the first level there are no ancestors to inherit.
            ancestors = sees_tree.gather(1, parents)
            oneself = torch.eye(num_live, dtype=torch.bool, device=device).expand(num_rows, -1, -1)
            sees_tree = torch.cat([ancestors, oneself], dim=2)

        # 4. feed the level
        with record_function("rqsid::level"):
            parts = []
            for start in range(0, num_live, piece):
                end = min(start + piece, num_live)
                seen = sees_tree[:, start:end, : sees_tree.shape[-1] - num_live + end]
                sees = torch.cat([sees_prompt.expand(-1, end - start, -1), seen], dim=2)
                parts.append(
                    head(
                        input_ids=tokens[:, start:end],
                        attention_mask=tree_mask(sees, model.dtype, attention),
                        position_ids=torch.minimum(prompt_lengths + level, last_positions).expand(-1, end - start),
                        past_key_values=cache,
                        use_cache=True,
                    )
                )
            states = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return pool_rows, pool_scores


def default_num_beams(top_k: int) -> int:
    """Beams narrower than three to five times the list returned lose SIDs, short ones first."""
    return max(50, 5 * top_k)


def plan_levels(trie: SIDTrie, depths: list[int], num_beams: int) -> list[tuple[int, int]]:
    """
    Args:
        trie ([`SIDTrie`]): The valid SIDs.
        depths (`list[int]`): Depths of the nodes that searches begin at.
        num_beams (`int`): Number of unfinished SIDs kept at each level.

    Returns:
        `list[tuple[int, int]]`: per level the children that a beam may have, and the beams that may live on: no more than
        there are candidates, or nodes with children.
    """
    levels, num_live = [], 1
    for step in range(trie.depth - min(depths)):
        at = [depth + step for depth in depths if depth + step < trie.depth]
        width = max(1, *(trie.level_widths[depth] for depth in at))
        inner = max((trie.level_sizes[depth + 1] for depth in at if depth + 1 < trie.depth), default=0)
        num_live = min(num_beams, num_live * width, inner)
        levels.append((width, num_live))
        if num_live == 0:
            break
    return levels


def plan_memory(
    config, head: OutputHead, prompt_length: int, levels, itemsize: int, max_memory: int
) -> tuple[int, int]:
    """
    Args:
        config ([`~transformers.PreTrainedConfig`]): The model's.
        head ([`OutputHead`]): Its head.
        prompt_length (`int`): Tokens of the longest prompt.
        levels (`list[tuple[int, int]]`): See [`plan_levels`].
        itemsize (`int`): Bytes of a number of the model.
        max_memory (`int`): Bytes that may be used.

    Returns:
        `tuple[int, int]`: how many prompts fit at once, and how many positions of one prompt in one forward pass.
    """
    hidden, num_heads = config.hidden_size, config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or hidden // num_heads
    if getattr(config, "kv_lora_rank", None):  # keys and values of unequal size, for each head
        num_kv_heads, head_dim = num_heads, max(config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim)
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    num_experts = getattr(config, "num_experts_per_tok", None) or 1
    intermediate = max(intermediate, num_experts * (getattr(config, "moe_intermediate_size", None) or intermediate))
    widest = max([1, *(beams for _, beams in levels)])
    length = prompt_length + sum(beams for _, beams in levels)
    # Keys and values of all layers, and one layer's once more while it grows.
    cache = 2 * (config.num_hidden_layers + 1) * num_kv_heads * head_dim * itemsize * length
    # Of a position: residuals and projections, the gated layer, the mask as bool and as number, eager attention's scores.
    position = itemsize * (8 * hidden + 3 * intermediate) + 5 * length
    if config._attn_implementation == "eager":
        position += 2 * 4 * num_heads * length
    if getattr(config, "position_embedding", None) == "alibi":
        # A mask with each head's biases, as it is computed and in the model's type.
        position += (8 + itemsize) * num_heads * length
    # Of a beam: the head's columns, and for every child token, node, score and what choosing among them takes.
    columns = config.vocab_size if head.is_whole else len(head.tokens)
    beam = 12 * columns + 64 * max((width for width, _ in levels), default=1)
    fixed = cache + widest * beam
    max_memory -= 12 * min(head.block, max(widest, 16) * config.vocab_size)
    positions = max(prompt_length, widest)
    size = max_memory // (fixed + positions * position)
    if size > 0:
        return size, positions
    return 1, max(16, (max_memory - fixed) // position)


def _check_context(config, lengths: list[int], left: list[int]) -> None:
    """The positions that the model has, and those at which its rotations change; `left` are the tokens that may follow."""
    context = getattr(config, "max_position_embeddings", None) or 0
    for length, more in zip(lengths, left, strict=True):
        # The last token of a SID is never fed.
        if 0 < context < length + more - 1:
            raise ValueError(
                f"A prompt has {length} tokens and up to {more} of a SID follow, more than the {context} positions of the "
                f"model. Shorten the prompt."
            )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        original = rope.get("original_max_position_embeddings") or context
        sides = {
            "both" if length <= original < length + more - 1 else length > original
            for length, more in zip(lengths, left, strict=True)
        }
        if "both" in sides or len(sides) > 1:
            raise ValueError(
                f"The model rotates positions otherwise beyond {original} tokens ({rope['rope_type']}), so that prompts on both "
                f"sides of it, and one that crosses it, would not get the scores that they get alone. Search longer prompts "
                f"apart from shorter ones, and cut those that end within a SID's length of {original}."
            )


def check_left_padding(attention_mask: torch.Tensor) -> None:
    mask = attention_mask.bool()
    if mask.numel() and (not mask[:, -1].all() or (mask[:, :-1] & ~mask[:, 1:]).any()) or mask.shape[1] == 0:
        raise ValueError(
            "Prompts must be padded on the left and hold at least one token: the last column of `attention_mask` must "
            "be 1, and no 0 may follow a 1."
        )


def _most_passes(passes: int, head: OutputHead) -> int:
    """The largest number of forward passes of all ranks, where they run each pass together."""
    if not head.is_sharded:
        return passes
    most = torch.tensor(passes, device=head.model.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)
