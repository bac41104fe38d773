"""Residual quantization: embeddings to one code per layer, and back."""

from numbers import Integral

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from .checks import check_codes
from .kmeans import CHUNK_ROWS, kmeans, nearest_codes


class ResidualQuantizerConfig(PreTrainedConfig):
    r"""
    Configuration of a [`ResidualQuantizer`].

    Args:
        codebook_sizes (`list[int]`, *optional*, defaults to `[256, 256, 256]`):
            Codes of each layer, first layer first.
        embedding_dim (`int`, *optional*):
            D. Set by `fit`.
        num_iterations (`int`, *optional*, defaults to 25):
            Lloyd iterations of each layer.
        relocation_threshold (`float`, *optional*, defaults to 0.1):
            Codes with fewer than this share of their layer's mean count are moved while fitting, each to split one of
            the clusters with the largest squared error. `0` is plain k-means from a random start.
        seed (`int`, *optional*, defaults to 0):
            Seed of the initial codebooks and of the relocation.

    Raises:
        `TypeError`: if `codebook_sizes` is no list of integers.
        `ValueError`: for sizes, iterations or thresholds out of range.
    """

    model_type = "rqsid_residual_quantizer"

    codebook_sizes: list[int] | None = None
    embedding_dim: int | None = None
    num_iterations: int = 25
    relocation_threshold: float = 0.1
    seed: int = 0

    def __post_init__(self, **kwargs):
        if self.codebook_sizes is None:
            self.codebook_sizes = [256, 256, 256]
        sizes = self.codebook_sizes
        if not isinstance(sizes, list | tuple) or not all(
            isinstance(size, Integral) and not isinstance(size, bool) for size in sizes
        ):
            raise TypeError(f"codebook_sizes={sizes!r} must be a list of integers, one per layer, as [256, 256, 256].")
        self.codebook_sizes = [int(size) for size in sizes]
        if not self.codebook_sizes or min(self.codebook_sizes) < 1:
            raise ValueError(
                f"codebook_sizes={self.codebook_sizes}: every layer needs at least one code. Pass one positive size per "
                "layer, for instance [256, 256, 256]."
            )
        if self.num_iterations < 1:
            raise ValueError(f"num_iterations={self.num_iterations}: k-means needs at least one iteration.")
        if not 0 <= self.relocation_threshold < 1:
            raise ValueError(
                f"relocation_threshold={self.relocation_threshold} must lie in [0, 1): it is a share of the mean count."
            )
        super().__post_init__(**kwargs)


class ResidualQuantizer(PreTrainedModel):
    r"""
    Residual k-means: each layer quantizes what the layers before it left over (residual vector quantization, as in
    RQ-KMeans tokenizers for generative retrieval).

    Encoding is greedy: layer by layer the nearest code, so that items that share a prefix are near each other.

    Args:
        config ([`ResidualQuantizerConfig`], *optional*):
            The configuration; three layers of 256 codes if not given.

    Example:

    ```python
    quantizer = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=[256, 256, 256])).fit(embeddings)
    codes = quantizer.encode(embeddings)  # [N, 3]
    quantizer.save_pretrained("my-codebook")
    ```
    """

    config_class = ResidualQuantizerConfig
    base_model_prefix = "quantizer"
    main_input_name = "embeddings"

    def __init__(self, config=None):
        super().__init__(config if config is not None else ResidualQuantizerConfig())
        self.codebooks = nn.ParameterList()
        if self.config.embedding_dim is not None:
            self._make_codebooks(self.config.embedding_dim)
        self.post_init()

    def _init_weights(self, module):
        pass  # codebooks are fitted or loaded, never drawn

    def _make_codebooks(self, dim):
        # Parameters rather than buffers, because save_pretrained cannot tell the dtype of a model that has only buffers.
        self.codebooks = nn.ParameterList(
            nn.Parameter(torch.zeros(size, dim), requires_grad=False) for size in self.config.codebook_sizes
        )
        self.config.embedding_dim = dim

    def save_pretrained(self, *args, **kwargs):
        self._require_fitted()
        return super().save_pretrained(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        # transformers makes every weight that it loads trainable.
        (loaded[0] if isinstance(loaded, tuple) else loaded).requires_grad_(False)
        return loaded

    @property
    def codebook_sizes(self):
        """Codes of each layer (`list[int]`)."""
        return list(self.config.codebook_sizes)

    @property
    def num_layers(self):
        """L."""
        return len(self.config.codebook_sizes)

    @torch.no_grad()
    def fit(self, embeddings, show_progress_bar=False):
        """
        Fits all codebooks, layer by layer.

        Args:
            embeddings (`np.ndarray` or `torch.Tensor`): Shape: (N, D). Any float type.
            show_progress_bar (`bool`, *optional*, defaults to `False`):
                Whether to show one bar over all iterations.

        Returns:
            [`ResidualQuantizer`]: itself.

        Raises:
            `TypeError`: if `embeddings` is not an array or tensor of numbers.
            `ValueError`: if it is not 2-dimensional, holds NaN or infinite values, or has fewer rows than a layer has
                codes.
        """
        residuals = self._check(embeddings, expect_dim=None).clone()
        num_points, dim = residuals.shape
        if num_points < max(self.codebook_sizes):
            raise ValueError(
                f"{num_points} embeddings cannot fill a codebook of {max(self.codebook_sizes)} codes. Pass more "
                "embeddings or a smaller codebook_sizes."
            )
        generator = torch.Generator().manual_seed(self.config.seed)
        codebooks = []
        with tqdm(
            total=self.num_layers * self.config.num_iterations, desc="codebooks", disable=not show_progress_bar
        ) as bar:
            for size in self.codebook_sizes:
                codebook = kmeans(
                    residuals,
                    size,
                    num_iterations=self.config.num_iterations,
                    relocation_threshold=self.config.relocation_threshold,
                    generator=generator,
                    progress=bar,
                )
                for chunk in residuals.split(CHUNK_ROWS):
                    chunk -= codebook[nearest_codes(chunk, codebook)[0]]
                codebooks.append(codebook)
        # Only now, so that an interrupted fit leaves the quantizer as it was.
        self._make_codebooks(dim)
        for parameter, codebook in zip(self.codebooks, codebooks, strict=True):
            parameter.data = codebook
        return self

    @torch.no_grad()
    def encode(self, embeddings):
        """
        Args:
            embeddings (`np.ndarray` or `torch.Tensor`): Shape: (N, D).

        Returns:
            `np.ndarray` (int32) or `torch.Tensor` (int64), as the input was: the codes. Shape: (N, L).

        Raises:
            `TypeError`, `ValueError`: as `fit`; also if D differs from the codebooks', or the quantizer is not fitted.
        """
        self._require_fitted()
        points = self._check(embeddings, expect_dim=self.config.embedding_dim)
        codes = torch.empty(len(points), self.num_layers, dtype=torch.int64, device=points.device)
        codebooks = [codebook.float() for codebook in self.codebooks]
        for start in range(0, len(points), CHUNK_ROWS):
            residual = points[start : start + CHUNK_ROWS].clone()
            for layer, codebook in enumerate(codebooks):
                layer_codes = nearest_codes(residual, codebook)[0]
                residual -= codebook[layer_codes]
                codes[start : start + CHUNK_ROWS, layer] = layer_codes
        return codes if isinstance(embeddings, torch.Tensor) else codes.cpu().numpy().astype(np.int32)

    @torch.no_grad()
    def decode(self, codes):
        """
        Sums the codewords of each row; a layer whose code is -1 (pruned) adds nothing.

        Args:
            codes (`np.ndarray` or `torch.Tensor`): Shape: (N, L).

        Returns:
            `np.ndarray` or `torch.Tensor`, as the input was: the reconstructed embeddings, float32. Shape: (N, D).

        Raises:
            `TypeError`: if `codes` are not integers.
            `ValueError`: if `codes` has another number of layers, or a code lies outside its codebook.
        """
        self._require_fitted()
        rows = torch.as_tensor(codes)
        check_codes(rows, self.codebook_sizes)
        rows = rows.to(device=self.codebooks[0].device, dtype=torch.int64)
        decoded = torch.zeros(len(rows), self.config.embedding_dim, device=rows.device)
        for layer, codebook in enumerate(self.codebooks):
            present = rows[:, layer] >= 0
            decoded[present] += codebook[rows[present, layer]].float()
        return decoded if isinstance(codes, torch.Tensor) else decoded.cpu().numpy()

    forward = encode

    @torch.no_grad()
    def relative_error(self, embeddings):
        """
        Squared error of the reconstruction as a share of the embeddings' variance: sum |x - decode(encode(x))|^2 over
        sum |x - mean|^2.

        Args:
            embeddings (`np.ndarray` or `torch.Tensor`): Shape: (N, D).

        Returns:
            `float`

        Raises:
            `TypeError`, `ValueError`: as `encode`.
        """
        points = self._check(embeddings, expect_dim=self.config.embedding_dim)
        error = (points - self.decode(self.encode(points))).double().square().sum()
        return float(error / (points - points.mean(0)).double().square().sum())

    def _require_fitted(self):
        if len(self.codebooks) == 0:
            raise ValueError(
                "This ResidualQuantizer has no codebooks yet. Call fit(embeddings) or from_pretrained first."
            )

    def _check(self, embeddings, expect_dim):
        if not isinstance(embeddings, np.ndarray | torch.Tensor):
            raise TypeError(
                f"embeddings must be a numpy array or a torch tensor, got {type(embeddings).__name__}. Convert it first: "
                "numpy.asarray(rows), or frame.to_numpy()."
            )
        points = torch.as_tensor(embeddings)
        if points.ndim != 2:
            raise ValueError(
                f"embeddings have shape {tuple(points.shape)}; one row per product is needed: (N, D). For a single "
                "product pass embedding[None]."
            )
        if not points.is_floating_point():
            raise TypeError(
                f"embeddings must be floating point, got {points.dtype}. Convert them with .astype('float32')."
            )
        if expect_dim is not None and points.shape[1] != expect_dim:
            raise ValueError(
                f"embeddings have {points.shape[1]} dimensions, the codebooks {expect_dim}. Encode with the embedding "
                "model that the codebooks were fitted on, or fit again."
            )
        device = self.codebooks[0].device if len(self.codebooks) else points.device
        points = points.to(device=device, dtype=torch.float32)
        for start in range(0, len(points), CHUNK_ROWS):
            bad = ~torch.isfinite(points[start : start + CHUNK_ROWS]).all(1)
            if bad.any():
                row = start + int(torch.nonzero(bad)[0])
                raise ValueError(
                    f"embeddings hold NaN, infinite values or values beyond float32 (first in row {row}). Remove those "
                    "products, embed them again, or scale the embeddings down."
                )
        return points
