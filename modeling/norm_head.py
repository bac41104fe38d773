"""Baichuan 2's output layer: its rows have length one, whatever length their parameters have."""

import functools
import importlib

import torch
import torch.nn.functional as F
from torch import nn


class NormHead(nn.Linear):
    """
    A linear layer without bias whose rows are scaled to length one whenever it is used (Yang et al. 2023, "Baichuan 2: Open
    Large-scale Language Models", [arXiv 2309.10305](https://huggingface.co/papers/2309.10305), section 2.4). The parameter
    keeps its length: nothing is written back to it, in training or out of it.

    Args:
        in_features (`int`): Width of the hidden states.
        out_features (`int`): Number of tokens.
        **kwargs: `device` and `dtype`.
    """

    def __init__(self, in_features, out_features, **kwargs):
        super().__init__(in_features, out_features, bias=False, **kwargs)

    def forward(self, hidden_states):
        """
        Args:
            hidden_states (`torch.Tensor`): Shape: (..., H).

        Returns:
            `torch.Tensor`: logits. Shape: (..., V).
        """
        # Logits are divided, not rows, of which a scaled copy would be as large as the layer.
        logits = F.linear(hidden_states, self.weight)
        return logits / row_lengths(self.weight).to(logits.dtype)

    @staticmethod
    def normalized(rows):
        """
        Args:
            rows (`torch.Tensor`): Rows of the parameter. Shape: (n, H).

        Returns:
            `torch.Tensor`: a copy of them, of length one. Shape: (n, H).
        """
        return (rows / row_lengths(rows)[:, None]).to(rows.dtype)


def row_lengths(weight):
    """
    Args:
        weight (`torch.Tensor`): Shape: (n, H).

    Returns:
        `torch.Tensor` (float32 or wider): the rows' lengths, no less than 1e-12. Shape: (n,).
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=-1, dtype=dtype).clamp_min(1e-12)


def as_norm_head(module):
    """
    Keeps an output layer normalised, whoever puts it into its place: `resize_token_embeddings` makes a plain linear layer,
    `peft` wraps it.

    Args:
        module (`torch.nn.Module`): What is to be the output layer.

    Returns:
        `torch.nn.Module`: the same where it normalises already, a [`NormHead`] with the parameter of a linear layer, or
        `peft`'s trainable tokens, made to normalise.

    Raises:
        `ValueError`: if the layer has a bias, or is wrapped by an adapter that changes the logits, which would be merged into
            rows of any length.
        `TypeError`: if it is no layer that can be normalised.
    """
    if module is None or isinstance(module, nn.Identity):
        return module  # none on this rank, as of a pipeline's other stages
    if type(module) is nn.Linear:
        if module.bias is not None:
            raise ValueError("A normalised output layer has no bias: pass a torch.nn.Linear made with bias=False.")
        with torch.device("meta"):
            head = NormHead(module.in_features, module.out_features)
        head.weight = module.weight
        return head.train(module.training)
    if type(module).__module__.startswith("peft."):
        # Imported by name, because an import statement would be a requirement of this file where it travels with a model.
        tuners = importlib.import_module("peft.tuners.tuners_utils")
        if isinstance(module, tuners.BaseTunerLayer):
            raise ValueError(
                f"An adapter ({type(module).__name__}) on a normalised output layer cannot be merged: it changes the logits "
                "after the rows have been scaled. Leave lm_head out of `target_modules` (all-linear does). To train the rows "
                'of some tokens pass `trainable_token_indices={"embed_tokens": token_ids, "lm_head": token_ids}`, to train '
                'all rows `modules_to_save=["lm_head"]`.'
            )
        if type(getattr(module, "token_adapter", None)) is _trainable_tokens_layer():
            module.token_adapter.__class__ = _normalized_tokens_layer()
        return module
    if any(isinstance(part, NormHead) for part in module.modules()):
        return module
    raise TypeError(
        f"The output layer of this model is normalised, which a {type(module).__name__} cannot be. Pass a torch.nn.Linear "
        "without bias; with quantization leave lm_head out (`llm_int8_skip_modules` of bitsandbytes, `modules_to_not_convert` "
        "of others)."
    )


def _trainable_tokens_layer():
    return importlib.import_module("peft.tuners.trainable_tokens.layer").TrainableTokensLayer


@functools.cache
def _normalized_tokens_layer():
    class NormalizedTokensLayer(_trainable_tokens_layer()):
        """`peft`'s trainable rows of some tokens, in a [`NormHead`]: `peft` itself multiplies by the rows as they are."""

        def forward_adapters(self, x, active_adapters, *args, **kwargs):
            if self.disable_adapters or not active_adapters or self.merged:
                return super().forward_adapters(x, active_adapters, *args, **kwargs)
            self._check_overlapping_tokens(active_adapters)
            # The frozen rows' logits, and the trained ones' over them: no copy of the layer is made.
            logits = self.base_layer(x)
            for adapter_name in active_adapters:
                tokens = torch.as_tensor(self.token_indices[adapter_name], device=logits.device)
                rows = self.trainable_tokens_delta[adapter_name]
                trained = F.linear(x, rows.to(x.dtype)) / row_lengths(rows).to(x.dtype)
                logits = logits.index_copy(-1, tokens, trained.to(logits.dtype))
            return logits

    # The class is made only where peft is installed; processes that exchange a model look it up by this name.
    NormalizedTokensLayer.__qualname__ = "NormalizedTokensLayer"
    return NormalizedTokensLayer


def __getattr__(name):
    if name == "NormalizedTokensLayer":
        return _normalized_tokens_layer()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
