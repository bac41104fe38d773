"""Whether a model can decode beams as a tree, found out by trying where it is not known."""

import contextlib
import inspect
import threading
import weakref

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Of these families the tests compare tree decoding with plain forwards; others are tried before their first search.
TESTED = ("llama", "qwen2", "baichuan")
PACKAGES = ("transformers.", __name__.rpartition(".")[0] + ".")

_LINEAR = weakref.WeakKeyDictionary()
_TRIED = weakref.WeakKeyDictionary()

# Modules that are being searched, by how many threads, and their parts to put back into training mode.
_EVALUATING = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()

# Positions that nobody sees, between prompt and beams when a model is tried: attention that is local by place in the cache,
# and not by position, shows there.
UNSEEN = 512

COMPATIBLE = "use `generate()` with a `SIDLogitsProcessor` and `sid_generation_config`"


def tree_cache(model):
    """
    Checks that a model can decode the beams of a prompt as a tree, and makes the cache for it.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.

    Returns:
        [`~transformers.DynamicCache`]: empty.

    Raises:
        `ValueError`: if the attention takes no 4-D mask, a layer's attention is not a full one, or trying it shows that
            positions follow something else than the position ids.
    """
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation not in ("eager", "sdpa"):
        raise ValueError(
            f"The beams of a prompt are decoded as one tree, whose mask `{config._attn_implementation}` attention "
            f'cannot take. Call `model.set_attn_implementation("sdpa")` first, or {COMPATIBLE}.'
        )
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"The model's adapter puts virtual tokens before the prompt, which the search would leave out: {COMPATIBLE}."
        )
    cache = DynamicCache(config=config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        kinds = sorted({type(layer).__name__ for layer in cache.layers})
        raise ValueError(
            f"The beams of a prompt are decoded as one tree, which needs full attention in every layer; this model's "
            f"cache has {kinds}. Disable its sliding window if it has one, or {COMPATIBLE}."
        )
    if "local" in (getattr(config, "attention_layers", None) or ()):
        raise ValueError(
            f"The beams of a prompt are decoded as one tree, which needs full attention in every layer; this model has local "
            f"ones. Instead, {COMPATIBLE}."
        )
    inner = innermost(model)
    if config.model_type in TESTED and type(inner).__module__.startswith(PACKAGES):
        return cache
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        raise ValueError(
            f"The beams of a level share a position, which {type(inner).__name__} cannot be told: its forward takes no "
            f"`position_ids`. Instead, {COMPATIBLE}."
        )
    tried = _TRIED.setdefault(inner, set())
    if config._attn_implementation not in tried:
        _try_tree(model)
        tried.add(config._attn_implementation)
    return cache


def tree_mask(sees, dtype, attention):
    """
    Args:
        sees (`torch.Tensor` of shape `(B, k, T)`): What each of k positions attends to (bool).
        dtype (`torch.dtype`): The model's.
        attention (`str`): Its attention implementation.

    Returns:
        `torch.Tensor` of shape `(B, 1, k, T)`: The mask in the form that the model takes.
    """
    sees = sees[:, None]
    if attention == "eager":
        # Eager attention adds its mask; sdpa takes it as it is, whatever dtype autocast gives the queries.
        return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)
    return sees


@torch.no_grad()
def logits_are_linear(model):
    """
    Returns:
        `bool`: whether the model's logits are what its output layer makes of the decoder's last hidden states: no scale, no
        soft cap. Tried once on a few tokens where it is not known.
    """
    inner = innermost(model)
    if inner not in _LINEAR:
        config = model.config.get_text_config(decoder=True)
        head = model.get_output_embeddings()
        if config.model_type in TESTED and type(inner).__module__.startswith(PACKAGES):
            _LINEAR[inner] = True
        elif head is None or not hasattr(model, "get_decoder"):
            _LINEAR[inner] = False
        else:
            tokens = torch.arange(8, device=model.device)[None] % config.vocab_size
            with evaluating(model):
                logits = model(input_ids=tokens, use_cache=False).logits
                hidden = model.get_decoder()(input_ids=tokens, use_cache=False)[0]
                fits = hidden.shape[-1] == getattr(head, "in_features", hidden.shape[-1])
                _LINEAR[inner] = fits and torch.allclose(head(hidden).float(), logits.float(), rtol=1e-3, atol=1e-4)
    return _LINEAR[inner]


@torch.no_grad()
def _try_tree(model):
    """
    Decodes three branches below a padded prompt as a tree, and plainly. The error allowed is a multiple of what the model's
    own cached decoding makes, which is rounding.
    """
    config = model.config.get_text_config(decoder=True)
    inner, device = innermost(model), model.device
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randint(min(config.vocab_size, 2**31 - 1), shape, generator=generator).to(device)  # noqa: E731
    prompts, firsts, seconds = draw(2, 12), draw(2, 3), draw(2, 3)
    parents = torch.tensor([2, 0, 0], device=device)
    mask = torch.ones_like(prompts)
    mask[1, :5] = 0
    lengths = mask.sum(1, keepdim=True)

    with evaluating(model):
        # 1. each branch as a sequence of its own
        tokens = torch.stack([firsts[:, parents], seconds], -1)
        whole = torch.cat([prompts[:, None].expand(-1, 3, -1), tokens], -1).flatten(0, 1)
        seen = torch.cat([mask[:, None].expand(-1, 3, -1), torch.ones_like(tokens)], -1).flatten(0, 1)
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        run = lambda **inputs: model(**inputs).logits.float()  # noqa: E731
        plain = run(input_ids=whole, attention_mask=seen, position_ids=positions, use_cache=False)[:, -1]

        # 2. the same with a cache: the last token in a step of its own
        cache = DynamicCache(config=config)
        run(
            input_ids=whole[:, :-1],
            attention_mask=seen[:, :-1],
            position_ids=positions[:, :-1],
            past_key_values=cache,
            use_cache=True,
        )
        cached = run(
            input_ids=whole[:, -1:],
            attention_mask=seen,
            position_ids=positions[:, -1:],
            past_key_values=cache,
            use_cache=True,
        )[:, -1]

        # 3. as a tree
        cache = DynamicCache(config=config)
        run(
            input_ids=prompts,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        sees = mask[:, None].bool().expand(-1, 3, -1)
        oneself = torch.eye(3, dtype=torch.bool, device=device).expand(2, -1, -1)
        as_mask = lambda sees: tree_mask(sees, model.dtype, config._attn_implementation)  # noqa: E731
        try:
            unseen = torch.eye(UNSEEN, dtype=torch.bool, device=device).expand(2, -1, -1)
            unseen = torch.cat([mask[:, None].bool().expand(-1, UNSEEN, -1), unseen], 2)
            run(
                input_ids=draw(2, UNSEEN),
                attention_mask=as_mask(unseen),
                position_ids=lengths.expand(-1, UNSEEN),
                past_key_values=cache,
                use_cache=True,
            )
            sees = torch.cat([sees, sees.new_zeros(2, 3, UNSEEN)], 2)
            for level, tokens in enumerate((firsts, seconds)):
                above = [] if level == 0 else [oneself[:, parents]]
                tree = run(
                    input_ids=tokens,
                    attention_mask=as_mask(torch.cat([sees, *above, oneself], 2)),
                    position_ids=(lengths + level).expand(-1, 3),
                    past_key_values=cache,
                    use_cache=True,
                )
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"The beams of a prompt are decoded as one tree, whose 4-D mask {type(inner).__name__} does not take "
                f"({error}). Instead, {COMPATIBLE}."
            ) from error
    if not plain.isfinite().all():
        return  # whatever is wrong with such a model, the search says so itself
    noise, error = (plain - cached).abs().amax(), (plain - tree.flatten(0, 1)).abs().amax()
    # In half precision the two plain ways can agree to the last bit, and the tree still sums in another order.
    allowed = max(1e-5, 32 * torch.finfo(model.dtype).eps) * plain.std()
    if error > 20 * noise + allowed:
        raise ValueError(
            f"The beams of a prompt are decoded as one tree, and {type(inner).__name__} gets other logits that "
            f"way (off by {error:.1e}, rounding by {noise:.1e}): its attention ignores the mask or the position ids. "
            f"Instead, {COMPATIBLE}."
        )


@contextlib.contextmanager
def evaluating(module):
    """
    Evaluation mode, restored part by part, since parts may have been frozen in it; where several threads run a module, when
    the last of them is done.
    """
    with _LOCK:
        count, training = _EVALUATING.get(module) or (0, [part for part in module.modules() if part.training])
        _EVALUATING[module] = count + 1, training
        if training and count == 0:
            module.eval()
    try:
        yield
    finally:
        with _LOCK:
            count, training = _EVALUATING.pop(module)
            if count > 1:
                _EVALUATING[module] = count - 1, training
            else:
                for part in training:
                    part.training = True


def innermost(model):
    """The model itself, within what `torch.compile` and `peft` put around it."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model
