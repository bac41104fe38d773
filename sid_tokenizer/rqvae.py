"""Residual quantization of what an encoder makes of the embeddings: RQ-VAE."""

from numbers import Integral, Real

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig

from .checks import check_codes
from .embeddings import EmbeddingReader
from .pretrained_codebook import PretrainedCodebook, refuse_labels
from .quantizer import MAX_BEAMS
from .residual_kmeans import Layer, assign_, beam_codes
from .rqvae_training import data_parallel, train

CHUNK_ROWS = 16384


class RQVAEConfig(PreTrainedConfig):
    r"""
    Configuration of a [`RQVAE`].

    Args:
        codebook_sizes (`list[int]`, *optional*, defaults to `[256, 256, 256]`):
            Codes of each layer, first layer first.
        embedding_dim (`int`, *optional*):
            D. Set by `fit`.
        hidden_sizes (`list[int]`, *optional*, defaults to `[512, 256, 128]`):
            Hidden layers of the encoder; the decoder has them in reverse.
        latent_dim (`int`, *optional*, defaults to 32):
            Dimensions of the space in which codes lie.
        num_epochs (`int`, *optional*, defaults to 40):
            Passes over the embeddings.
        batch_size (`int`, *optional*, defaults to 256):
            Embeddings of a step, over all processes, at most: an epoch is split into batches of equal size.
        learning_rate (`float`, *optional*, defaults to 3e-3):
            Of AdamW, at its highest.
        lr_scheduler_type (`str`, *optional*, defaults to `"cosine"`):
            What the learning rate does after the warmup: `"cosine"` or `"constant"`.
        warmup_ratio (`float`, *optional*, defaults to 0.02):
            Share of the steps in which the learning rate rises.
        weight_decay (`float`, *optional*, defaults to 1e-4):
            Of the weight matrices; codes and biases do not decay.
        commitment_weight (`float`, *optional*, defaults to 0.25):
            Weight of the loss that draws the encoder's output towards its codes.
        dropout (`float`, *optional*, defaults to 0.0):
            Before each linear layer, while training.
        init (`str`, *optional*, defaults to `"k-means"`):
            Initial codebooks: `"k-means"` of the output that the untrained encoder gives for all embeddings, layer by layer,
            or `"random"`.
        revive_threshold (`float`, *optional*, defaults to 0.1):
            Codes with fewer than this share of their layer's mean count are moved after each epoch but the last two. `0`
            never moves one.
        rotation_trick (`bool`, *optional*, defaults to `False`):
            Whether the decoder's gradient reaches the encoder rotated and scaled as the codes rotate and scale its output
            (Fifty et al., arXiv 2410.06424), rather than unchanged.
        sinkhorn_layers (`list[int]`, *optional*, defaults to `[]`):
            Layers, counted from 0, whose codes are assigned evenly within each batch while training (LC-Rec does so in the
            last). `encode` takes the nearest code in every layer. Balance needs batches of several times the layer's codes.
        sinkhorn_epsilon (`float`, *optional*, defaults to 0.003):
            Weight of the entropy, relative to half the range of the distances.
        sinkhorn_iterations (`int`, *optional*, defaults to 50):
            Pairs of normalisations.
        input_scaling (`str`, *optional*, defaults to `"standardize"`):
            `"standardize"` subtracts the mean and divides by one number, so that the mean variance is 1: embeddings of unit
            norm would otherwise leave hardly any loss to learn from. `"none"` takes them as they are.
        metric (`str`, *optional*, defaults to `"euclidean"`):
            `"euclidean"`: the nearest code; or `"cosine"`: the code nearest in direction.
        normalize_residuals (`bool`, *optional*, defaults to `False`):
            Whether each layer sees only the direction of what the layers before it left over. The decoder then gets the sum of
            codes of unit residuals.
        num_beams (`int`, *optional*, defaults to 1):
            Beams of `encode`; as in [`ResidualQuantizerConfig`].
        seed (`int`, *optional*, defaults to 0):
            Seed of everything that is drawn.

    Raises:
        `TypeError`: if a list of sizes is no list of integers.
        `ValueError`: for values out of range.
    """

    model_type = "rqsid_rqvae"

    codebook_sizes: list[int] | None = None
    embedding_dim: int | None = None
    hidden_sizes: list[int] | None = None
    latent_dim: int = 32
    num_epochs: int = 40
    batch_size: int = 256
    learning_rate: float = 3e-3
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.02
    weight_decay: float = 1e-4
    commitment_weight: float = 0.25
    dropout: float = 0.0
    init: str = "k-means"
    revive_threshold: float = 0.1
    rotation_trick: bool = False
    sinkhorn_layers: list[int] | None = None
    sinkhorn_epsilon: float = 0.003
    sinkhorn_iterations: int = 50
    input_scaling: str = "standardize"
    metric: str = "euclidean"
    normalize_residuals: bool = False
    num_beams: int = 1
    seed: int = 0

    def __post_init__(self, **kwargs):
        refuse_labels(kwargs)
        defaults = {"codebook_sizes": [256, 256, 256], "hidden_sizes": [512, 256, 128], "sinkhorn_layers": []}
        for name, default in defaults.items():
            values = default if getattr(self, name) is None else getattr(self, name)
            if not isinstance(values, list | tuple) or not all(
                isinstance(value, Integral) and not isinstance(value, bool) for value in values
            ):
                raise TypeError(f"{name}={values!r} must be a list of integers, as {default or [2]}.")
            setattr(self, name, [int(value) for value in values])
        if not self.codebook_sizes or min(self.codebook_sizes) < 1:
            raise ValueError(
                f"codebook_sizes={self.codebook_sizes}: every layer needs at least one code. Pass one positive size per "
                "layer, for instance [256, 256, 256]."
            )
        dim = self.embedding_dim
        if dim is not None and (not isinstance(dim, Integral) or isinstance(dim, bool) or dim < 1):
            raise ValueError(f"embedding_dim={dim!r} must be an integer, 1 or more; fit sets it.")
        if min(self.hidden_sizes, default=1) < 1:
            raise ValueError(
                f"hidden_sizes={self.hidden_sizes} must be positive; [] makes encoder and decoder linear."
            )
        if not all(0 <= layer < len(self.codebook_sizes) for layer in self.sinkhorn_layers):
            raise ValueError(
                f"sinkhorn_layers={self.sinkhorn_layers} names a layer that does not exist: there are "
                f"{len(self.codebook_sizes)}, counted from 0, the last is {len(self.codebook_sizes) - 1}."
            )
        choices = {
            "init": ("k-means", "random"),
            "input_scaling": ("standardize", "none"),
            "lr_scheduler_type": ("cosine", "constant"),
            "metric": ("euclidean", "cosine"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown: choose {allowed[0]!r} or {allowed[1]!r}."
                )
        for name in ("latent_dim", "num_epochs", "batch_size", "sinkhorn_iterations", "num_beams", "seed"):
            value, least = getattr(self, name), 0 if name == "seed" else 1
            if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer, {least} or more.")
        if self.num_beams > MAX_BEAMS:
            raise ValueError(f"num_beams={self.num_beams} must be at most {MAX_BEAMS}: memory grows with it.")
        for name in ("learning_rate", "sinkhorn_epsilon", "weight_decay", "commitment_weight"):
            value, may_be_zero = getattr(self, name), name in ("weight_decay", "commitment_weight")
            if not isinstance(value, Real) or not (0 < value < float("inf") or (value == 0 and may_be_zero)):
                raise ValueError(
                    f"{name}={value!r} must be a finite number, {'0 or more' if may_be_zero else 'above 0'}."
                )
        for name in ("warmup_ratio", "dropout", "revive_threshold"):
            if not isinstance(getattr(self, name), Real) or not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a number in [0, 1): it is a share.")
        for name in ("rotation_trick", "normalize_residuals"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False.")
        if self.num_beams > 1 and (self.metric == "cosine" or self.normalize_residuals):
            raise ValueError(
                f"num_beams={self.num_beams} compares squared errors, which metric='cosine' and normalize_residuals do not go "
                "by. Use num_beams=1 with them."
            )
        super().__post_init__(**kwargs)


class RQVAE(PretrainedCodebook):
    r"""
    RQ-VAE: an encoder, residual quantization of its output, and a decoder, trained together (TIGER, Rajput et al., arXiv
    2305.05065; LC-Rec, Zheng et al., arXiv 2311.09049).

    Encoding is greedy, as that of [`ResidualQuantizer`], and codes mean the same to whatever takes them.

    Under `accelerate launch --multi_gpu`, which serves CPUs as well, `fit` trains data-parallel: call it in every process with
    the same embeddings. The model stays on the device on which it was trained.

    Args:
        config ([`RQVAEConfig`], *optional*):
            The configuration; three layers of 256 codes if not given.

    Attributes:
        codebooks (`nn.ParameterList`): one of shape (K, latent_dim) per layer.
        training_log_ (`list[dict]`): after `fit`, per epoch the mean losses and the codes revived in each layer. Not saved.

    Example:

    ```python
    quantizer = RQVAE(RQVAEConfig(codebook_sizes=[256, 256, 256])).fit(embeddings)
    codes = quantizer.encode(embeddings)  # [N, 3]
    quantizer.save_pretrained("my-rqvae")
    ```
    """

    config_class = RQVAEConfig
    base_model_prefix = "rqvae"
    main_input_name = "embeddings"

    def __init__(self, config=None):
        super().__init__(config if config is not None else RQVAEConfig())
        self.training_log_ = []
        self.encoder, self.decoder, self.codebooks = nn.Sequential(), nn.Sequential(), nn.ParameterList()
        dim = self.config.embedding_dim
        self.register_buffer("input_mean", torch.zeros(dim or 0))
        # 0 until fitted: weights that nobody trained must not pass for a model.
        self.register_buffer("input_scale", torch.zeros(()))
        if dim is not None:
            widths = [dim, *self.config.hidden_sizes, self.config.latent_dim]
            self.encoder = _make_network(widths, self.config.dropout)
            self.decoder = _make_network(widths[::-1], self.config.dropout)
            self.codebooks = nn.ParameterList(
                nn.Parameter(torch.zeros(size, self.config.latent_dim)) for size in self.config.codebook_sizes
            )
        self.requires_grad_(False)
        self.eval()
        self.post_init()

    def _init_weights(self, module):
        pass  # weights are trained or loaded

    @property
    def codebook_sizes(self):
        """Codes of each layer (`list[int]`)."""
        return list(self.config.codebook_sizes)

    @property
    def num_layers(self):
        """L."""
        return len(self.config.codebook_sizes)

    def fit(self, embeddings, show_progress_bar=False):
        """
        Trains encoder, codebooks and decoder.

        Args:
            embeddings (`np.ndarray`, `torch.Tensor` or whatever [`EmbeddingReader`] takes): Shape: (N, D). Any float type.
                Held in memory as float32.
            show_progress_bar (`bool`, *optional*, defaults to `False`):
                Whether to show one bar over all steps.

        Returns:
            [`RQVAE`]: itself.

        Raises:
            `TypeError`: if `embeddings` are not numbers in a form that can be read.
            `ValueError`: if they are not 2-dimensional, hold NaN or infinite values, are all equal, or have fewer rows than a
                layer has codes; if the loss diverges; or if processes were launched with anything but data parallelism.
        """
        reader = EmbeddingReader(embeddings)
        points = [chunk.detach() for _, chunk in reader.chunks(CHUNK_ROWS)]
        if (reader.num_rows or 0) < max(self.codebook_sizes):
            raise ValueError(
                f"{reader.num_rows} embeddings cannot fill a codebook of {max(self.codebook_sizes)} codes. Pass more "
                "embeddings or a smaller codebook_sizes."
            )
        points = torch.cat(points)
        mean, variance = _moments(points)
        # Values near 1e4 are stored in float32 to 1e-3; less than that is rounding, not structure.
        if not variance.mean() > 1e-12 * (mean.square() + variance).mean():
            raise ValueError(
                f"All {len(points)} embeddings are equal, so that no code can tell one from another. Check the model that "
                "made them."
            )

        config = type(self.config).from_dict({**self.config.to_dict(), "embedding_dim": points.shape[1]})
        standardize = config.input_scaling == "standardize"
        with data_parallel() as accelerator:
            device = accelerator.device
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(
                    config.seed + accelerator.process_index
                )  # of the dropout, which processes do not share
                # Training happens in a new model, so that an interrupted fit leaves this one as it was.
                trained = type(self)(config)
                trained.input_mean.copy_(mean if standardize else torch.zeros_like(mean))
                trained.input_scale.copy_(variance.mean().sqrt() if standardize else torch.ones(()))
                log = train(trained, points, accelerator, show_progress_bar)
        trained.requires_grad_(False).eval()
        self.encoder, self.decoder, self.codebooks = trained.encoder, trained.decoder, trained.codebooks
        self.input_mean, self.input_scale = trained.input_mean, trained.input_scale
        self.config.embedding_dim = config.embedding_dim
        self.training_log_ = log
        return self

    @torch.no_grad()
    def encode(self, embeddings):
        """
        Args:
            embeddings (`np.ndarray`, `torch.Tensor` or whatever [`EmbeddingReader`] takes): Shape: (N, D).

        Returns:
            `torch.Tensor` (int64) for a tensor, `np.ndarray` (int32) otherwise: the codes. Shape: (N, L).

        Raises:
            `TypeError`, `ValueError`: as `fit`; also if D differs from the model's, or the model is not fitted.
        """
        reader = self._read(embeddings)
        codes = [torch.empty(0, self.num_layers, dtype=torch.int64, device=self.device)]
        codes = torch.cat(codes + [self._encode_chunk(chunk) for _, chunk in reader.chunks(CHUNK_ROWS)])
        return codes if isinstance(embeddings, torch.Tensor) else codes.cpu().numpy().astype(np.int32)

    @torch.no_grad()
    def decode(self, codes):
        """
        Decodes the sum of the codewords of each row, to which a layer whose code is -1 (pruned) adds nothing.

        Args:
            codes (`np.ndarray` or `torch.Tensor`): Shape: (N, L).

        Returns:
            `np.ndarray` or `torch.Tensor`, as the input was: the reconstructed embeddings, float32, at the scale of those
            that were fitted. Shape: (N, D).

        Raises:
            `TypeError`: if `codes` are not integers.
            `ValueError`: if `codes` has another number of layers, or a code lies outside its codebook.
        """
        self._require_fitted()
        rows = torch.as_tensor(codes)
        check_codes(rows, self.codebook_sizes)
        decoded = torch.empty(len(rows), self.config.embedding_dim, device=self.device)
        for start in range(0, len(rows), CHUNK_ROWS):
            chunk = rows[start : start + CHUNK_ROWS].to(device=self.device, dtype=torch.int64)
            decoded[start : start + CHUNK_ROWS] = self._decode_chunk(chunk)
        return decoded if isinstance(codes, torch.Tensor) else decoded.cpu().numpy()

    forward = encode

    @torch.no_grad()
    def relative_error(self, embeddings):
        """
        Squared error of the reconstruction as a share of the embeddings' variance: sum |x - decode(encode(x))|^2 over
        sum |x - mean|^2.

        Args:
            embeddings (`np.ndarray`, `torch.Tensor` or whatever [`EmbeddingReader`] takes): Shape: (N, D).

        Returns:
            `float`

        Raises:
            `TypeError`, `ValueError`: as `encode`; also if the embeddings are all equal and so have no variance.
        """
        error = squares = num_rows = 0.0
        sums = shift = None
        for _, chunk in self._read(embeddings).chunks(CHUNK_ROWS):
            error += float((chunk - self._decode_chunk(self._encode_chunk(chunk))).double().square().sum())
            # Sums around a point among the embeddings, which do not cancel as sums around 0 might.
            shift = chunk.double().mean(0) if shift is None else shift
            shifted = chunk.double() - shift
            sums = shifted.sum(0) + (0 if sums is None else sums)
            squares += float(shifted.square().sum())
            num_rows += len(chunk)
        variance = squares - float(sums.square().sum()) / num_rows if num_rows else 0.0
        if not variance > 0:
            raise ValueError(
                f"The {int(num_rows)} embeddings are all equal, so that there is no variance to compare the error with. Pass "
                "embeddings of different products."
            )
        return error / variance

    def latents(self, points):
        """
        Args:
            points (`torch.Tensor`): Shape: (N, D).

        Returns:
            `torch.Tensor`: the encoder's output, which the first layer quantizes, float32. Shape: (N, latent_dim).
        """
        return self.encoder(((points - self.input_mean) / self.input_scale).to(self.dtype)).float()

    def _encode_chunk(self, points):
        self.eval()
        residual, codebooks = self.latents(points), [codebook.float() for codebook in self.codebooks]
        if self.config.num_beams > 1:
            return beam_codes(residual, codebooks, self.config.num_beams)
        return torch.stack([assign_(residual, Layer(codebook), self.config) for codebook in codebooks], dim=1)

    def _decode_chunk(self, codes):
        self.eval()
        quantized = torch.zeros(len(codes), self.config.latent_dim, device=self.device)
        for layer, codebook in enumerate(self.codebooks):
            present = codes[:, layer] >= 0
            quantized[present] += codebook[codes[present, layer]].float()
        return self.decoder(quantized.to(self.dtype)).float() * self.input_scale + self.input_mean

    def _read(self, embeddings):
        self._require_fitted()
        return EmbeddingReader(embeddings, expect_dim=self.config.embedding_dim, device=self.device)

    def _require_fitted(self):
        if len(self.codebooks) == 0 or not self.input_scale > 0:
            raise ValueError("This RQVAE is not fitted yet. Call fit(embeddings) or from_pretrained first.")


def _make_network(widths, dropout):
    """An MLP with ReLU between its layers; nothing after the last."""
    modules = []
    for layer, (width_in, width_out) in enumerate(zip(widths, widths[1:], strict=False)):
        modules += [nn.ReLU()] * (layer > 0) + [nn.Dropout(dropout)] * (dropout > 0) + [nn.Linear(width_in, width_out)]
    return nn.Sequential(*modules)


def _moments(points):
    """Mean and variance of each dimension, in float64 and in chunks. Shape of each: (D,)."""
    mean = sum(chunk.sum(0, dtype=torch.float64) for chunk in points.split(CHUNK_ROWS)) / len(points)
    variance = sum((chunk.double() - mean).square().sum(0) for chunk in points.split(CHUNK_ROWS)) / len(points)
    return mean, variance
