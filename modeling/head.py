"""The model as search sees it: positions in, log-probabilities of the SID tokens out, nothing as wide as the vocabulary."""

import importlib
import inspect

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .model_checks import evaluating, innermost, logits_are_linear

# Numbers of a block of logits of which only the log-sum-exp is kept. On the CPU a block should stay in the cache.
BLOCK_ON_CPU = 2**19
BLOCK_ELSEWHERE = 2**24


class OutputHead:
    """
    Scores the SID tokens at given positions by log-softmax, over the vocabulary or over the SID tokens.

    The rows of the output layer are read once, when the head is made, whatever holds them: an ordinary linear layer is
    used in place, shards are gathered (ZeRO-3, FSDP2), rows that the layer scales are scaled (Baichuan 2), and any other
    linear map (LoRA) is merged by applying it to the unit vectors. Make one head for an evaluation, not one for a batch, and
    a new one when weights have changed. All ranks of a sharded model must make it together.

    Where the model's logits are more than a linear map of its last hidden states (a soft cap, a scale, a hook on the
    layer), the model's own logits are taken, a vocabulary wide.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model, or a `peft` model around one.
        tokens (`torch.Tensor` of shape `(n,)`):
            The ids of the tokens that are scored, ascending.
        normalize (`str`, *optional*, defaults to `"vocab"`):
            `"vocab"` or `"sid"`, see [`search`].
        vocabulary (`torch.Tensor` of shape `(N,)`, *optional*):
            With `"sid"`, the token ids of the softmax.

    Raises:
        `ValueError`: if `normalize` is unknown, or `"sid"` lacks its `vocabulary`.
    """

    def __init__(self, model, tokens, normalize="vocab", vocabulary=None):
        if normalize not in ("vocab", "sid") or (normalize == "sid") != (vocabulary is not None):
            raise ValueError(
                f'`normalize` must be "vocab", or "sid" with the token ids of the softmax as `vocabulary`; got '
                f"{normalize!r} and {'no' if vocabulary is None else 'a'} `vocabulary`."
            )
        self.model = model
        self.normalize = normalize
        self.tokens = tokens.to(model.device)
        self.first_token, self.last_token = int(tokens[0]), int(tokens[-1])
        # One range of ids, as tokenizers have that got their SID tokens here: its rows are a view.
        self.is_range = self.last_token - self.first_token + 1 == len(tokens)
        self.inside = self.outside = None
        if vocabulary is not None:
            vocabulary = vocabulary.to(model.device)
            is_inside = torch.isin(vocabulary, self.tokens)
            self.outside = vocabulary[~is_inside]
            if int(is_inside.sum()) < len(tokens):
                self.inside = self.columns(vocabulary[is_inside])
        self.is_sharded = is_sharded(model)
        parameters = inspect.signature(innermost(model).forward).parameters
        self.keeps_logits = "logits_to_keep" in parameters
        self.weight = self.bias = None
        if logits_are_linear(model):
            self._read_rows()

    @property
    def block(self):
        """How many logits are made at once of those that only the normaliser needs."""
        return BLOCK_ON_CPU if self.model.device.type == "cpu" else BLOCK_ELSEWHERE

    @property
    def is_whole(self):
        """Whether the model's own logits are used, as wide as the vocabulary."""
        return self.weight is None

    def columns(self, tokens):
        """
        Args:
            tokens (`torch.Tensor` of any shape): Token ids.

        Returns:
            `torch.Tensor` of the same shape: where each stands in the result of `log_probs`; anywhere, if it is not scored.
        """
        if self.is_range:
            return (tokens - self.first_token).clamp(0, len(self.tokens) - 1)
        return torch.searchsorted(self.tokens, tokens.contiguous()).clamp(max=len(self.tokens) - 1)

    def __call__(self, last=None, **inputs):
        """
        Runs the model on some positions.

        Args:
            last (`int`, *optional*):
                How many of the positions are to be scored; all if not given.
            **inputs:
                As the model's `forward`.

        Returns:
            `torch.Tensor`: what `log_probs` takes: hidden states of shape (B, last, H), or logits of shape (B, last, V).
        """
        start = 0 if last is None else -last
        if self.is_whole:
            if self.keeps_logits:
                inputs["logits_to_keep"] = last or 0
            return self.model(**inputs).logits[:, start:]
        decoder = self.model.get_decoder()
        if not self.is_sharded:
            return decoder(**inputs).last_hidden_state[:, start:]
        # Parameters of a sharded model's outermost module are gathered by its own forward only.
        kept = []
        handle = decoder.register_forward_hook(lambda module, args, output: kept.append(output.last_hidden_state))
        try:
            self.model(**inputs, **({"logits_to_keep": 1} if self.keeps_logits else {}))
        finally:
            handle.remove()
        return kept[0][:, start:]

    def log_probs(self, states):
        """
        Args:
            states (`torch.Tensor`): Shape: (B, k, H or V), as the head's call returns.

        Returns:
            `torch.Tensor` (float32): log-probabilities of `tokens`. Shape: (B, k, n).
        """
        rows = states.reshape(-1, states.shape[-1])
        # As many rows at once as leave a block the width of a good matrix product.
        parts = [self._log_probs(part) for part in rows.split(max(1, self.block // 1024))]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(*states.shape[:-1], -1)

    def _log_probs(self, rows):
        if self.is_whole:
            span = rows[:, self.first_token : self.last_token + 1] if self.is_range else rows[:, self.tokens]
            span = span.float()
            if self.normalize == "vocab":
                return span - rows.float().logsumexp(-1, keepdim=True)
            others = [rows[:, self.outside].float().logsumexp(-1, keepdim=True)]
        else:
            # In float32 whatever the model's type is: in 8 bits of mantissa many sibling tokens would tie.
            with torch.autocast(rows.device.type, enabled=False):
                span = F.linear(rows.float(), *self.span_rows)
            others = self._normalizers(rows, max(1, self.block // len(rows)))
        if self.normalize == "vocab":
            # Of scattered tokens the rows are among the others.
            parts = [span.logsumexp(-1, keepdim=True)] if self.is_range else []
        else:
            parts = [(span if self.inside is None else span[:, self.inside]).logsumexp(-1, keepdim=True)]
        normalizer = None
        for part in (*parts, *others):
            normalizer = part if normalizer is None else torch.logaddexp(normalizer, part)
        return span - normalizer

    def _normalizers(self, rows, width):
        """Yields log-sum-exps over blocks of the other rows."""
        buffer = None
        width = min(width, max((len(weight) for weight, _ in self.other_rows), default=1))
        for weight, bias in self.other_rows:
            biases = [None] * len(weight) if bias is None else bias.split(width)
            for weight_block, bias_block in zip(weight.split(width), biases, strict=False):
                if rows.device.type == "cpu" and weight.dtype == rows.dtype == torch.float32:
                    # Memory that is asked for and given back costs as much as filling it.
                    buffer = rows.new_empty(len(rows) * width) if buffer is None else buffer
                    logits = buffer[: len(rows) * len(weight_block)].view(len(rows), -1)
                    with torch.autocast("cpu", enabled=False):
                        torch.mm(rows, weight_block.T, out=logits)
                    if bias_block is not None:
                        logits += bias_block
                else:
                    logits = F.linear(rows.to(weight.dtype), weight_block, bias_block).float()
                largest = logits.amax(-1, keepdim=True)
                yield logits.sub_(largest).exp_().sum(-1, keepdim=True).log_().add_(largest)

    def _read_rows(self):
        rows = None if self.normalize == "vocab" else torch.cat([self.tokens, self.outside])
        self.weight, self.bias = read_rows(self.model, rows)
        if self.weight is None:
            return
        if self.normalize == "sid":
            inner, others = slice(0, len(self.tokens)), [slice(len(self.tokens), None)]
        elif self.is_range:
            inner = slice(self.first_token, self.last_token + 1)
            others = [slice(0, self.first_token), slice(self.last_token + 1, None)]
        else:
            inner, others = self.tokens, [slice(None)]

        def cut(part):
            return self.weight[part], None if self.bias is None else self.bias[part]

        self.other_rows = [cut(part) for part in others if len(self.weight[part])]
        self.span_rows = [None if rows is None else rows.float() for rows in cut(inner)]


@torch.no_grad()
def read_rows(model, tokens):
    """
    Rows of a model's output layer, gathered or merged.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        tokens (`torch.Tensor` of shape `(n,)`, *optional*): Which rows; all if None.

    Returns:
        `tuple`: weight of shape (n, H) and bias of shape (n,) or None; (None, None) if the layer is no linear map.
    """
    head = model.get_output_embeddings()
    if head is None:
        return None, None
    tokens = None if tokens is None else tokens.to(head.weight.device) if hasattr(head, "weight") else tokens
    is_hooked = bool(head._forward_hooks or head._forward_pre_hooks) or "forward" in vars(head)
    # A head that scales its rows (Baichuan 2's) says how. Known by that, because its class travels with a model of its own.
    scaled = getattr(head, "normalized", None)
    is_plain = type(head) is nn.Linear or scaled is not None
    if is_plain and hasattr(head.weight, "ds_id"):
        # By name, because an import statement would be a requirement of this file where it travels with a model.
        deepspeed = importlib.import_module("deepspeed")
        with deepspeed.zero.GatheredParameters([rows for rows in (head.weight, head.bias) if rows is not None]):
            return _chosen(head.weight, head.bias, tokens, scaled, copy=True)
    if is_plain and isinstance(head.weight, DTensor):
        return _chosen(
            head.weight.full_tensor(), None if head.bias is None else head.bias.full_tensor(), tokens, scaled
        )
    if is_plain and not is_hooked and type(head.weight) is nn.Parameter:
        return _chosen(head.weight, head.bias, tokens, scaled)
    # What an FSDP2 module holds is whole only within its own forward, unless asked for.
    owners = [
        part
        for part in model.modules()
        if isinstance(part, FSDPModule) and any(inner is head for inner in part.modules())
    ]
    for owner in owners:
        owner.unshard()
    try:
        return _merged(model, head, tokens)
    finally:
        for owner in owners:
            owner.reshard()


def _chosen(weight, bias, tokens, scaled=None, copy=False):
    weight, bias = (None if rows is None else rows.detach() for rows in (weight, bias))
    if tokens is not None:
        weight, bias = weight[tokens], None if bias is None else bias[tokens]
    elif copy and scaled is None:
        weight, bias = weight.clone(), None if bias is None else bias.clone()
    return weight if scaled is None else scaled(weight), bias


def _merged(model, head, tokens):
    """What a linear map gives for the unit vectors are the columns of its matrix."""
    size, dtype, device = model.config.get_text_config(decoder=True).hidden_size, model.dtype, model.device
    tokens = slice(None) if tokens is None else tokens.to(device)
    with evaluating(head):
        bias = head(torch.zeros(1, size, dtype=dtype, device=device))[0]
        weight = torch.empty((len(bias[tokens]), size), dtype=dtype, device=device)
        for start in range(0, size, 256):
            units = torch.eye(min(256, size - start), size, dtype=dtype, device=device).roll(start, 1)
            weight[:, start : start + 256] = (head(units) - bias)[:, tokens].T
        # Only a linear map gives the same elsewhere.
        generator = torch.Generator().manual_seed(0)
        trial = torch.randn(4, size, generator=generator).to(device, dtype)
        expected = head(trial)[:, tokens].float()
    found = F.linear(trial.float(), weight.float(), bias[tokens].float())
    tolerance = 16 * torch.finfo(dtype).eps * expected.abs().amax()
    if not ((found - expected).abs() <= tolerance).all():
        return None, None
    return weight, bias[tokens] if bias.any() else None


def is_sharded(model):
    """Whether ranks hold parts of the model's parameters each, and so must run it together."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return False
    return any(hasattr(parameter, "ds_id") or isinstance(parameter, DTensor) for parameter in model.parameters())
