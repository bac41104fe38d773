"""The remedies of Kuai et al. (EMNLP 2024, arXiv 2407.21488): drop a layer, or its most frequent tokens."""

import numpy as np
import torch

from .checks import check_codes, check_weights

EXAMPLES = {"top_k": 25, "threshold": 0.25}
STRATEGIES = ("none", "top_k", "threshold", "drop_layer")


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
            - `"none"`: nothing; SIDs are what they are without pruning.
        layer (`int`, *optional*, defaults to 1):
            The 0-based layer to prune, any but the last: SIDs must end in a code, or one could be the beginning of
            another.
        top_k (`int`, *optional*):
            Number of codes for `"top_k"`. All codes of the layer is `"drop_layer"`.
        threshold (`float`, *optional*):
            Share p in (0, 1] for `"threshold"`.

    Attributes:
        pruned (`np.ndarray` of bool or `None`): the codes of `layer` that are pruned, once fitted. Shape: (K,).
        codebook_sizes (`list[int]` or `None`): codes of each layer, once fitted.

    Raises:
        `ValueError`: for an unknown strategy, or an argument that the strategy needs, or does not take.

    Example:

    ```python
    pruning = TokenPruning(strategy="top_k", layer=1, top_k=25).fit(codes, quantizer.codebook_sizes)
    pruning.apply(codes)  # [N, L], -1 where a code was pruned
    ```
    """

    def __init__(self, strategy, layer=1, top_k=None, threshold=None):
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy={strategy!r} is unknown; choose one of {', '.join(STRATEGIES)}.")
        for name, value in (("top_k", top_k), ("threshold", threshold)):
            if strategy == name and value is None:
                raise ValueError(f'strategy="{name}" needs {name}=..., for instance {name}={EXAMPLES[name]}.')
            if strategy != name and value is not None:
                raise ValueError(f'{name}={value} goes with strategy="{name}", not with strategy="{strategy}".')
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise ValueError(f"layer={layer!r} must be a 0-based layer index, for instance 1 for the second layer.")
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f'top_k={top_k!r} must be a whole number from 1. To prune nothing use strategy="none".')
        if threshold is not None and (not isinstance(threshold, int | float) or not 0 < threshold <= 1):
            raise ValueError(f"threshold={threshold!r} must be a number in (0, 1]: it is a share of the items.")
        self.strategy, self.layer, self.top_k, self.threshold = strategy, layer, top_k, threshold
        self.codebook_sizes = None
        self.pruned = None

    def fit(self, codes, codebook_sizes, weights=None):
        """
        Chooses the codes to prune by their frequency; ties go to the lower code.

        Args:
            codes (`np.ndarray` or `torch.Tensor`): Shape: (N, L). Without absent codes.
            codebook_sizes (`list[int]`):
                Codes of each layer.
            weights (`np.ndarray`, *optional*): Shape: (N,).
                Counts frequency by these, for instance by interactions; by items if not given.

        Returns:
            [`TokenPruning`]: itself.

        Raises:
            `TypeError`: if the codes are not integers.
            `ValueError`: if the layer is the last or does not exist, `top_k` exceeds its codebook, there is no item, or
                `weights` has another length, a negative or non-finite entry, or no positive one.
        """
        codes = self._check(codes, codebook_sizes)
        size = codebook_sizes[self.layer] if self.strategy != "none" else 0
        if self.strategy == "top_k" and self.top_k > size:
            raise ValueError(
                f'top_k={self.top_k} exceeds the {size} codes of layer {self.layer}; top_k={size} is "drop_layer".'
            )
        pruned = np.zeros(size, dtype=bool)
        if self.strategy == "drop_layer":
            pruned[:] = True
        elif self.strategy != "none":
            if len(codes) == 0:
                raise ValueError("codes hold no item to count frequencies by. Pass the codes of at least one product.")
            counts = np.bincount(codes[:, self.layer], weights=check_weights(weights, len(codes)), minlength=size)
            descending = np.argsort(-counts, kind="stable")
            if self.strategy == "top_k":
                num_pruned = self.top_k
            else:
                # The tolerance keeps a share that is p up to rounding from taking one code more.
                shares = np.cumsum(counts[descending]) / counts.sum()
                num_pruned = int(np.searchsorted(shares, self.threshold - 1e-12)) + 1
            pruned[descending[:num_pruned]] = True
        self.pruned = pruned
        self.codebook_sizes = [int(size) for size in codebook_sizes]
        return self

    def apply(self, codes):
        """
        Args:
            codes (`np.ndarray` or `torch.Tensor`): Shape: (N, L).

        Returns:
            `np.ndarray` (int32): a copy in which pruned codes are -1. Shape: (N, L).

        Raises:
            `ValueError`: if not fitted, or the codes do not fit the codebooks.
        """
        if self.pruned is None:
            raise ValueError("This TokenPruning is not fitted. Call fit(codes, codebook_sizes) first.")
        codes = self._check(codes, self.codebook_sizes).astype(np.int32)
        if self.strategy != "none":
            column = codes[:, self.layer]
            column[self.pruned[column]] = -1
        return codes

    def _check(self, codes, codebook_sizes):
        codes = codes.cpu().numpy() if isinstance(codes, torch.Tensor) else np.asarray(codes)
        check_codes(codes, codebook_sizes)
        if codes.size and codes.min() < 0:
            raise ValueError("codes hold absent (-1) entries. Pass the full codes that the quantizer gave, unpruned.")
        if self.strategy != "none" and self.layer >= len(codebook_sizes) - 1:
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
        return {
            "strategy": self.strategy,
            "layer": self.layer,
            "top_k": self.top_k,
            "threshold": self.threshold,
            "codebook_sizes": self.codebook_sizes,
            "pruned_codes": None if self.pruned is None else np.flatnonzero(self.pruned).tolist(),
        }

    @classmethod
    def from_dict(cls, content):
        """
        Raises:
            `ValueError`: if an entry is missing or a pruned code lies outside its codebook.
        """
        try:
            pruning = cls(content["strategy"], content["layer"], content["top_k"], content["threshold"])
            pruning.codebook_sizes, pruned_codes = content["codebook_sizes"], content["pruned_codes"]
        except KeyError as error:
            raise ValueError(f"The stored pruning lacks {error}: it was edited. Save the bundle again.") from None
        if pruned_codes is not None:
            size = pruning.codebook_sizes[pruning.layer] if pruning.strategy != "none" else 0
            if any(not 0 <= code < size for code in pruned_codes):
                raise ValueError(
                    f"The stored pruning names codes outside the codebook of {size}. Save the bundle again."
                )
            pruning.pruned = np.zeros(size, dtype=bool)
            pruning.pruned[pruned_codes] = True
        return pruning

    def __repr__(self):
        chosen = {"top_k": f", top_k={self.top_k}", "threshold": f", threshold={self.threshold}"}.get(
            self.strategy, ""
        )
        fitted = "" if self.pruned is None else f", {self.num_pruned} codes pruned"
        if self.strategy == "none":
            return 'TokenPruning(strategy="none")'
        return f'TokenPruning(strategy="{self.strategy}", layer={self.layer}{chosen}{fitted})'
