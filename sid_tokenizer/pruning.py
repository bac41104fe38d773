"""The remedies of Kuai et al. (EMNLP 2024, arXiv 2407.21488): drop a layer, or its most frequent tokens."""

import numpy as np
import torch

from .checks import check_codes, check_weights
from .hourglass import HOURGLASS_THRESHOLD, simulate_uniform
from .splitting import split_codes

EXAMPLES = {"top_k": 25, "threshold": 0.25}
STRATEGIES = ("none", "top_k", "threshold", "drop_layer", "split")


class TokenPruning:
    r"""
    Decides which codes of one layer are left out of SIDs, which makes SIDs of varying length.

    Pruning a single code loses nothing, because its absence names it; every further one merges the SIDs that differed
    only in pruned codes. Codebooks are not refitted.

    Args:
        strategy (`str`):
            - `"top_k"`: the `top_k` most frequent codes.
            - `"threshold"`: the smallest set of most frequent codes whose cumulative share reaches `threshold`.
            - `"drop_layer"`: all codes.
            - `"split"`: nothing is left out; instead the codes that `top_k` or `threshold` names are split, each into `parts`
              codes of about equally many items, after CRAB (arXiv 2604.05113). That takes another quantizer, which `fit`
              makes, see [`split_codes`], and new codes of all products.
            - `"none"`: nothing; SIDs are what they are without pruning.
        layer (`int` or `str`, *optional*, defaults to 1):
            The 0-based layer to prune, any but the last: SIDs must end in a code, or one could be the beginning of
            another. `"auto"` lets `fit` take the least balanced layer that is neither first nor last, see
            [`find_concentrated_layer`]; if there is none in which codes are concentrated, nothing is pruned.
        top_k (`int`, *optional*):
            Number of codes for `"top_k"` and `"split"`. All codes of the layer is `"drop_layer"`.
        threshold (`float`, *optional*):
            Share p in (0, 1] for `"threshold"` and `"split"`.
        parts (`int`, *optional*, defaults to 2):
            Codes to make of each code with `"split"`.

    Attributes:
        layer (`int` or `None`): the layer to prune. With `layer="auto"` the one that `fit` chose, and `None` before it, or
            if it found none.
        auto (`bool`): whether `layer="auto"` was given.
        pruned (`np.ndarray` of bool or `None`): the codes of `layer` that are pruned, once fitted. Shape: (K,), or (0,)
            if there is nothing to prune.
        codebook_sizes (`list[int]` or `None`): codes of each layer, once fitted; with `"split"` those of the new quantizer.
        split (`list[int]`): the codes that were split, most frequent first.
        quantizer ([`ResidualQuantizer`] or `None`): the new quantizer of `"split"`. It is not saved with the rule, but with
            the tokenizer, as any other.

    Raises:
        `ValueError`: for an unknown strategy, or an argument that the strategy needs, or does not take.

    Example:

    ```python
    pruning = TokenPruning(strategy="top_k", layer=1, top_k=25).fit(codes, quantizer.codebook_sizes)
    pruning.apply(codes)  # [N, L], -1 where a code was pruned
    TokenPruning("threshold", layer="auto", threshold=0.25).fit(codes, quantizer.codebook_sizes).layer  # 1, or None

    pruning = TokenPruning("split", layer=1, top_k=25)
    pruning.fit(codes, quantizer.codebook_sizes, quantizer=quantizer, embeddings=embeddings)
    codes, codebook_sizes = pruning.quantizer.encode(embeddings), pruning.codebook_sizes
    ```
    """

    def __init__(self, strategy, layer=1, top_k=None, threshold=None, parts=2):
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy={strategy!r} is unknown; choose one of {', '.join(STRATEGIES)}.")
        for name, value in (("top_k", top_k), ("threshold", threshold)):
            if strategy == name and value is None:
                raise ValueError(f'strategy="{name}" needs {name}=..., for instance {name}={EXAMPLES[name]}.')
            if strategy not in (name, "split") and value is not None:
                raise ValueError(f'{name}={value} goes with strategy="{name}", not with strategy="{strategy}".')
        if strategy == "split" and (top_k is None) == (threshold is None):
            raise ValueError(
                f'strategy="split" needs either top_k or threshold, got top_k={top_k}, threshold={threshold}.'
            )
        if isinstance(parts, bool) or not isinstance(parts, int) or parts < 2 or (parts > 2 and strategy != "split"):
            raise ValueError(f'parts={parts!r} must be a whole number from 2, and goes with strategy="split" only.')
        auto = isinstance(layer, str) and layer == "auto"
        if not auto and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 0):
            raise ValueError(
                f'layer={layer!r} must be a 0-based layer index, for instance 1 for the second layer, or "auto".'
            )
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f'top_k={top_k!r} must be a whole number from 1. To prune nothing use strategy="none".')
        is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if threshold is not None and not (is_number and 0 < threshold <= 1):
            raise ValueError(f"threshold={threshold!r} must be a number in (0, 1]: it is a share of the items.")
        self.strategy, self.top_k, self.threshold, self.parts = strategy, top_k, threshold, parts
        self.layer, self.auto = None if auto else layer, auto
        self.codebook_sizes = None
        self.pruned = None
        self.split = []
        self.quantizer = None

    def fit(self, codes, codebook_sizes, weights=None, quantizer=None, embeddings=None):
        """
        Chooses the codes to prune or split by their frequency, ties to the lower code; with `layer="auto"` the layer first.

        Args:
            codes (`np.ndarray` or `torch.Tensor`): Shape: (N, L). Without absent codes.
            codebook_sizes (`list[int]`):
                Codes of each layer.
            weights (`np.ndarray`, *optional*): Shape: (N,).
                Counts frequency by these, for instance by interactions; by items if not given. With `layer="auto"` the
                layer is chosen by them, too.
            quantizer ([`ResidualQuantizer`], *optional*):
                What gave the codes. For `"split"`.
            embeddings (*optional*): Shape: (N, D).
                What it encoded, in any form that `quantizer.encode` takes. For `"split"`.

        Returns:
            [`TokenPruning`]: itself.

        Raises:
            `TypeError`: if the codes are not integers.
            `ValueError`: if the layer is the last or does not exist, `top_k` exceeds its codebook, there is no item, or
                `weights` has another length, a negative or non-finite entry, or no positive one; if `"split"` lacks the
                quantizer or the embeddings, or a code cannot be split.
        """
        codes = self._check(codes, codebook_sizes)
        if weights is not None:
            check_weights(weights, len(codes))
        if (self.strategy == "split") != (quantizer is not None) or (quantizer is None) != (embeddings is None):
            raise ValueError('quantizer and embeddings go with strategy="split", which needs both.')
        if quantizer is not None and list(quantizer.codebook_sizes) != [int(size) for size in codebook_sizes]:
            raise ValueError(
                f"The quantizer has codebooks {list(quantizer.codebook_sizes)}, the codes {list(codebook_sizes)}. Pass the "
                "quantizer that gave the codes."
            )
        if len(codes) == 0 and (
            self.strategy in ("top_k", "threshold", "split") or (self.auto and self.strategy != "none")
        ):
            raise ValueError("codes hold no item to count frequencies by. Pass the codes of at least one product.")
        layer = self.layer
        if self.auto:
            layer = find_concentrated_layer(codes, codebook_sizes, weights) if self.strategy != "none" else None
        size = 0 if self.strategy == "none" or layer is None else codebook_sizes[layer]
        if self.top_k is not None and layer is not None and self.top_k > size:
            raise ValueError(
                f'top_k={self.top_k} exceeds the {size} codes of layer {layer}; top_k={size} is "drop_layer".'
            )
        pruned = np.zeros(size, dtype=bool)
        if size and self.strategy == "drop_layer":
            pruned[:] = True
        elif size:
            descending, counts = order_by_frequency(codes[:, layer], size, check_weights(weights, len(codes)))
            num_pruned = self.top_k
            if self.threshold is not None:
                # The tolerance keeps a share that is p up to rounding from taking one code more.
                cumulative = np.cumsum(counts[descending])
                num_pruned = int(np.searchsorted(cumulative / cumulative[-1], self.threshold - 1e-12)) + 1
            chosen = descending[:num_pruned]
            pruned[chosen] = True
        split = []
        if self.strategy == "split":
            if size:
                quantizer = split_codes(quantizer, embeddings, layer, chosen, self.parts)
                split, codebook_sizes = chosen.tolist(), quantizer.codebook_sizes
            pruned = np.zeros(codebook_sizes[layer] if size else 0, dtype=bool)
        self.layer, self.pruned, self.split, self.quantizer = layer, pruned, split, quantizer
        self.codebook_sizes = [int(size) for size in codebook_sizes]
        return self

    def apply(self, codes):
        """
        Args:
            codes (`np.ndarray` or `torch.Tensor`): Shape: (N, L).

        Returns:
            `np.ndarray` (int32): a copy in which pruned codes are -1. Shape: (N, L). Codes of a split layer have to come from
            the new quantizer; nothing in them tells.

        Raises:
            `ValueError`: if not fitted, or the codes do not fit the codebooks.
        """
        if self.pruned is None:
            raise ValueError("This TokenPruning is not fitted. Call fit(codes, codebook_sizes) first.")
        codes = self._check(codes, self.codebook_sizes).astype(np.int32)
        if self.num_pruned:
            column = codes[:, self.layer]
            column[self.pruned[column]] = -1
        return codes

    def _check(self, codes, codebook_sizes):
        codes = codes.cpu().numpy() if isinstance(codes, torch.Tensor) else np.asarray(codes)
        check_codes(codes, codebook_sizes)
        if codes.size and codes.min() < 0:
            raise ValueError("codes hold absent (-1) entries. Pass the full codes that the quantizer gave, unpruned.")
        if self.strategy != "none" and not self.auto and self.layer >= len(codebook_sizes) - 1:
            raise ValueError(
                f"layer={self.layer} cannot be pruned with {len(codebook_sizes)} layers: SIDs must end in a code of the "
                "last layer, or one SID could be the beginning of another. Choose an earlier layer, or quantize with "
                "one layer fewer."
            )
        return codes

    @property
    def num_pruned(self):
        """Number of codes that are left out."""
        return 0 if self.pruned is None else int(self.pruned.sum())

    def to_dict(self):
        """JSON-able; [`TokenPruning.from_dict`] reads it."""
        content = {
            "strategy": self.strategy,
            "layer": self.layer,
            "top_k": self.top_k,
            "threshold": self.threshold,
            "codebook_sizes": self.codebook_sizes,
            "pruned_codes": None if self.pruned is None else np.flatnonzero(self.pruned).tolist(),
        }
        # Only where it was given: saved bundles are compared with this, entry by entry, and the old ones lack it.
        content |= {"auto": True} if self.auto else {}
        return content | ({"parts": self.parts, "split_codes": self.split} if self.strategy == "split" else {})

    @classmethod
    def from_dict(cls, content):
        """
        Args:
            content (`dict`):
                What [`TokenPruning.to_dict`] gave. `"auto"` may be missing.

        Returns:
            [`TokenPruning`]

        Raises:
            `ValueError`: if an entry is missing or of another type, the layer does not exist, is the last, or is one that
                `"auto"` does not choose, or the pruned codes lie outside their codebook or are not as many as the strategy
                prunes.
        """
        again = "it was edited. Save the bundle again."
        if not isinstance(content, dict):
            raise ValueError(f"The stored pruning must be a JSON object, found {type(content).__name__}: {again}")
        names = ("strategy", "layer", "top_k", "threshold", "codebook_sizes", "pruned_codes")
        missing = [repr(name) for name in names if name not in content]
        if missing:
            raise ValueError(f"The stored pruning lacks {', '.join(missing)}: {again}")
        strategy, layer, top_k, threshold, sizes, codes = (content[name] for name in names)
        auto = content.get("auto", False)
        chosen = layer is None or _are_whole([layer], 1, 2**31)
        if not isinstance(auto, bool) or (not chosen if auto else isinstance(layer, str)):
            raise ValueError(f"The stored pruning has auto={auto!r} and layer={layer!r}: {again}")
        parts, split = content.get("parts", 2), content.get("split_codes", [])
        pruning = cls(strategy, "auto" if auto else layer, top_k, threshold, parts)
        pruning.layer = layer
        if sizes is None and codes is None and (layer is None or not auto):
            return pruning
        if not isinstance(sizes, list) or not sizes or not _are_whole(sizes, 1, 2**31):
            raise ValueError(f"The stored pruning has codebook_sizes={sizes!r}, no list of sizes: {again}")
        if strategy != "none" and layer is not None and layer >= len(sizes) - 1:
            raise ValueError(
                f"The stored pruning is of layer {layer}, but of {len(sizes)} layers the last cannot be pruned: {again}"
            )
        size = 0 if strategy == "none" or layer is None else sizes[layer]
        if not isinstance(codes, list) or not _are_whole(codes, 0, size) or len(set(codes)) != len(codes):
            raise ValueError(
                f"The stored pruning names codes that are no integers, repeated, or outside the codebook of {size}: {again}"
            )
        expected = {"top_k": [top_k], "threshold": range(1, size + 1), "drop_layer": [size]}.get(strategy, [0])
        if len(codes) not in ([0] if layer is None else expected):
            raise ValueError(f'The stored pruning names {len(codes)} codes, not what "{strategy}" prunes: {again}')
        parents = size - len(split) * (parts - 1) if isinstance(split, list) else 0
        if not isinstance(split, list) or not _are_whole(split, 0, parents) or len(set(split)) != len(split):
            raise ValueError(f"The stored pruning names split_codes={split!r}, which do not fit {size} codes: {again}")
        pruning.split = list(split)
        pruning.codebook_sizes, pruning.pruned = list(sizes), np.zeros(size, dtype=bool)
        pruning.pruned[codes] = True
        return pruning

    def __repr__(self):
        if self.strategy == "none":
            return 'TokenPruning(strategy="none")'
        text = f'strategy="{self.strategy}", layer=' + ('"auto"' if self.auto else str(self.layer))
        for name in EXAMPLES:
            if getattr(self, name) is not None:
                text += f", {name}={getattr(self, name)}"
        if self.pruned is not None and self.auto:
            text += ", no layer is concentrated" if self.layer is None else f", layer {self.layer} chosen"
        if self.pruned is not None:
            split = f", {len(self.split)} codes split into {self.parts}" if self.strategy == "split" else ""
            text += split or f", {self.num_pruned} codes pruned"
        return f"TokenPruning({text})"


def order_by_frequency(column, size, weights):
    """
    Args:
        column (`np.ndarray`): Shape: (N,).
            A layer's codes.
        size (`int`):
            K.
        weights (`np.ndarray`): Shape: (N,).

    Returns:
        `tuple[np.ndarray, np.ndarray]`: the codes from the most to the least frequent, ties to the lower code, and the
        weight of each code. Shape of both: (K,).
    """
    counts = np.bincount(column.astype(np.int64, copy=False), weights=weights, minlength=size)
    return np.argsort(-counts, kind="stable"), counts


def find_concentrated_layer(codes, codebook_sizes, weights=None):
    """
    The least balanced layer between the first and the last in which codes are concentrated.

    Concentrated is a layer whose normalised entropy lies below that of the most even layer by more than 0.02, and by more
    than uniform codes show for this layer in 199 of 200 samples of this size. In a small sample even uniform codes use a
    large codebook less evenly than a small one. As in [`~hourglass.find_verdict`], the same must therefore hold for how far
    each layer lies from the mean of its samples, where any layer of the samples may be the least even one.

    Args:
        codes (`np.ndarray`): Shape: (N, L). Without absent codes, N at least 1.
        codebook_sizes (`list[int]`):
            Codes of each layer.
        weights (`np.ndarray`, *optional*): Shape: (N,).
            Weight of each item; 1 each if not given.

    Returns:
        `int` or `None`: of the concentrated layers the one of the lowest normalised entropy, the earlier of equals; `None`
        if there is none, or fewer than three layers.

    Raises:
        `ValueError`: if `weights` has another length, a negative or non-finite entry, or no positive one.
    """
    weights = check_weights(weights, len(codes))
    if len(codebook_sizes) < 3:
        return None
    random, evenness, null = np.random.default_rng(0), [], []
    for layer, size in enumerate(codebook_sizes):
        _, counts = order_by_frequency(codes[:, layer], size, weights)
        shares = counts[counts > 0] / counts.sum()
        evenness.append(-(shares * np.log2(shares)).sum() / np.log2(size) if size > 1 else 1.0)
        null.append(simulate_uniform(random, weights, size)[0])
    evenness, null = np.array(evenness), np.stack(null)
    expected = null.mean(1)
    chance = np.quantile(null - null.max(0), 0.005, axis=1)
    concentrated = evenness < evenness.max() + np.minimum(HOURGLASS_THRESHOLD, chance)
    evenness_beyond, null = evenness - expected, null - expected[:, None]
    chance = np.quantile(null.min(0) - null.max(0), 0.005)
    concentrated &= evenness_beyond < evenness_beyond.max() + min(HOURGLASS_THRESHOLD, chance)
    concentrated[[0, -1]] = False
    return int(np.where(concentrated, evenness, np.inf).argmin()) if concentrated.any() else None


def _are_whole(values, low, high):
    """Whether all are integers in [low, high); `True` and `False`, which Python counts among them, are not."""
    return all(isinstance(value, int) and not isinstance(value, bool) and low <= value < high for value in values)
