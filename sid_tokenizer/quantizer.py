"""Residual quantization: embeddings to one code per layer, and back."""

import copy
from numbers import Integral, Real

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from .checks import check_codes
from .embeddings import EmbeddingReader
from .initialization import INITIALIZATIONS
from .pretrained_codebook import PretrainedCodebook, refuse_labels
from .processes import in_all, require_process_group
from .residual_kmeans import Layer, assign_, assignment_terms, beam_codes, fit_residual_kmeans

PRESETS = {
    "quality": {"num_iterations": 25, "sample_per_code": 0, "num_sample_iterations": 0},
    "fast": {"num_iterations": 5, "sample_per_code": 64, "num_sample_iterations": 15},
}
METRICS = ("euclidean", "cosine")
MAX_BEAMS = 4096
MAX_SEED = 2**42
ENCODE_ROWS = 2048  # small enough that residuals and scores stay in the cache


class ResidualQuantizerConfig(PreTrainedConfig):
    r"""
    Configuration of a [`ResidualQuantizer`].

    Args:
        codebook_sizes (`list[int]`, *optional*, defaults to `[256, 256, 256]`):
            Codes of each layer, first layer first.
        embedding_dim (`int`, *optional*):
            D. Set by `fit`.
        preset (`str`, *optional*, defaults to `"quality"`):
            Gives `num_iterations`, `sample_per_code` and `num_sample_iterations` where they are not given:
            - `"quality"`: 25 passes over all rows.
            - `"fast"`: 15 passes over 64 rows per code, then 5 over all rows. For large data: what takes long there is
              passes over all rows.
        num_iterations (`int`, *optional*):
            Passes over all rows for each layer.
        sample_per_code (`int`, *optional*):
            Random rows per code for the passes before those; `0` does without.
        num_sample_iterations (`int`, *optional*):
            Passes over these rows.
        init (`str`, *optional*, defaults to `"random"`):
            `"random"`, `"k-means++"` or `"staged"`; see [`initial_codebook`].
        relocation_threshold (`float`, *optional*, defaults to 0.25):
            Codes with fewer than this share of their layer's mean count are moved while fitting, each to split a cluster with a
            large squared error, where that pays. `0` is plain k-means.
        metric (`str`, *optional*, defaults to `"euclidean"`):
            `"euclidean"`: the nearest code; or `"cosine"`: the code nearest in direction (spherical k-means), with the
            length that leaves the least error.
        normalize_residuals (`bool`, *optional*, defaults to `False`):
            Whether each layer sees only the direction of what the layers before it left over. Then `decode` knows the
            lengths on average only.
        capacity (`float`, *optional*):
            Largest count of a code while fitting, as a multiple of its layer's mean count, at least 1. It is held by
            prices, which encoding adds to squared distances, so that a product's code still depends on nothing but its
            embedding. It is met within a few per cent where that is possible; equal embeddings cannot be parted, and 1 is the
            hardest to meet.
        num_beams (`int`, *optional*, defaults to 1):
            Beams of `encode`. More than one finds codes of less squared error, at the price of prefixes that are no longer
            the nearest ones: neighbours share fewer of them.
        skipped_codes (`dict[int, list[int]]`, *optional*):
            Per layer, any but the last, the codes that subtract nothing from a residual and add nothing when decoded, because
            they are left out of SIDs. Set by [`refit_pruned`].
        seed (`int`, *optional*, defaults to 0):
            Seed of all randomness.

    Raises:
        `TypeError`: if `codebook_sizes` is no list of integers, or `skipped_codes` no mapping of lists of them.
        `ValueError`: for values out of range, or options that exclude each other.
    """

    model_type = "rqsid_residual_quantizer"

    codebook_sizes: list[int] | None = None
    embedding_dim: int | None = None
    preset: str = "quality"
    num_iterations: int | None = None
    sample_per_code: int | None = None
    num_sample_iterations: int | None = None
    init: str = "random"
    relocation_threshold: float = 0.25
    metric: str = "euclidean"
    normalize_residuals: bool = False
    capacity: float | None = None
    num_beams: int = 1
    skipped_codes: dict | None = None
    seed: int = 0

    def __post_init__(self, **kwargs):
        refuse_labels(kwargs)
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
        for name, allowed in (("preset", tuple(PRESETS)), ("init", INITIALIZATIONS), ("metric", METRICS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not known. Pass one of {', '.join(map(repr, allowed))}."
                )
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.embedding_dim is not None and not _is_whole(self.embedding_dim, 1):
            raise ValueError(f"embedding_dim={self.embedding_dim!r} must be an integer, 1 or more; fit sets it.")
        for name, least in (
            ("num_iterations", 1),
            ("sample_per_code", 0),
            ("num_sample_iterations", 0),
            ("num_beams", 1),
            ("seed", 0),
        ):
            if not _is_whole(getattr(self, name), least):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be an integer, at least {least} and below 2**63."
                )
        if self.seed >= MAX_SEED:
            raise ValueError(f"seed={self.seed} must be below 2**42: layers draw with multiples of it.")
        if self.num_beams > MAX_BEAMS:
            raise ValueError(f"num_beams={self.num_beams} must be at most {MAX_BEAMS}: memory grows with it.")
        for name in ("relocation_threshold", "capacity"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
                raise ValueError(f"{name}={value!r} must be a number.")
        if not isinstance(self.normalize_residuals, bool):
            raise ValueError(f"normalize_residuals={self.normalize_residuals!r} must be True or False.")
        if not 0 <= self.relocation_threshold < 1:
            raise ValueError(
                f"relocation_threshold={self.relocation_threshold} must lie in [0, 1): it is a share of the mean count."
            )
        if self.capacity is not None and not 1 <= self.capacity < float("inf"):
            raise ValueError(
                f"capacity={self.capacity} leaves no room for all items. It is a multiple of the mean count: pass 1 for equal "
                "counts, or more."
            )
        if self.num_beams > 1 and (self.metric == "cosine" or self.normalize_residuals or self.capacity is not None):
            raise ValueError(
                f"num_beams={self.num_beams} compares squared errors, which metric='cosine', normalize_residuals and capacity "
                "do not go by. Use num_beams=1 with them."
            )
        self.skipped_codes = _checked_skipped_codes(self.skipped_codes, self.codebook_sizes)
        if self.num_beams > 1 and self.skipped_codes:
            raise ValueError(
                f"num_beams={self.num_beams} would avoid skipped_codes, which lower no error, and so change what is pruned. Use "
                "num_beams=1 with them."
            )
        super().__post_init__(**kwargs)


def _is_whole(value, least):
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= value < 2**63


def _checked_skipped_codes(skipped, sizes):
    """Whole numbers, sorted; JSON has made strings of the layers. `None` where nothing is skipped."""
    if skipped is None:
        return None
    if not isinstance(skipped, dict):
        raise TypeError(f"skipped_codes={skipped!r} must map layers to lists of codes, as {{1: [7, 30]}}.")
    checked = {}
    for layer, codes in skipped.items():
        layer = int(layer) if isinstance(layer, str) and layer.isdecimal() else layer
        codes = codes.tolist() if isinstance(codes, np.ndarray) else codes
        if not isinstance(codes, list | tuple) or not all(
            isinstance(number, Integral) and not isinstance(number, bool) for number in (layer, *codes)
        ):
            raise TypeError(f"skipped_codes={skipped!r} must map layers to lists of codes, as {{1: [7, 30]}}.")
        if not 0 <= layer < len(sizes) - 1:
            raise ValueError(
                f"skipped_codes names the layer {layer}; with {len(sizes)} layers, counted from 0, it must be one before the "
                "last, since SIDs must end in a code."
            )
        if len(set(codes)) < len(codes) or not all(0 <= code < sizes[layer] for code in codes):
            raise ValueError(
                f"skipped_codes of layer {layer} must be distinct codes from 0 to {sizes[layer] - 1}, got {list(codes)}."
            )
        if codes:
            checked[int(layer)] = sorted(int(code) for code in codes)
    return dict(sorted(checked.items())) or None


class ResidualQuantizer(PretrainedCodebook):
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
        self.codebooks, self.prices, self.scales = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        if self.config.embedding_dim is not None:
            sizes, dim = self.config.codebook_sizes, self.config.embedding_dim
            self._set_layers(
                [
                    Layer(
                        torch.zeros(size, dim),
                        torch.zeros(size) if self.config.capacity is not None else None,
                        torch.ones(1) if self.config.normalize_residuals else None,
                    )
                    for size in sizes
                ]
            )
        self.post_init()

    def _init_weights(self, module):
        pass  # codebooks are fitted or loaded, never drawn

    def _set_layers(self, layers):
        # Parameters rather than buffers, because save_pretrained cannot tell the dtype of a model that has only buffers.
        for name, values in (
            ("codebooks", [layer.codebook for layer in layers]),
            ("prices", [layer.prices for layer in layers if layer.prices is not None]),
            ("scales", [layer.scale for layer in layers if layer.scale is not None]),
        ):
            parameters = nn.ParameterList(nn.Parameter(value.contiguous(), requires_grad=False) for value in values)
            setattr(self, name, parameters)
        self.config.embedding_dim = layers[0].codebook.shape[1]

    def _layers(self):
        layers = [
            Layer(
                codebook.data.float(),
                self.prices[index].data.float() if len(self.prices) else None,
                self.scales[index].data.float() if len(self.scales) else None,
            )
            for index, codebook in enumerate(self.codebooks)
        ]
        for index, codes in (self.config.skipped_codes or {}).items():
            layers[index].subtracted = layers[index].codebook.clone()
            layers[index].subtracted[codes] = 0
        return layers

    def _changed(self, layers, **changes):
        """A new quantizer of other layers, with changes of the configuration; it shares no memory with this one."""
        changed = type(self)(type(self.config).from_dict({**self.config.to_dict(), **changes}))
        changed._set_layers(copy.deepcopy(layers))
        return changed.to(dtype=self.codebooks[0].dtype)

    @property
    def codebook_sizes(self):
        """Codes of each layer (`list[int]`)."""
        return list(self.config.codebook_sizes)

    @property
    def num_layers(self):
        """L."""
        return len(self.config.codebook_sizes)

    @torch.no_grad()
    def fit(
        self,
        embeddings,
        column="embedding",
        distributed=False,
        checkpoint_dir=None,
        max_rows_in_memory=None,
        device=None,
        show_progress_bar=False,
    ):
        """
        Fits all codebooks, layer by layer.

        Args:
            embeddings (`np.ndarray`, `torch.Tensor`, `datasets.Dataset`, `datasets.IterableDataset`, `str` or `os.PathLike`):
                Shape: (N, D). Any float type; see [`EmbeddingReader`] for what a path may be. Nothing larger than
                `max_rows_in_memory` is loaded: what does not fit is read again in every full pass.
            column (`str`, *optional*, defaults to `"embedding"`):
                The column of a data set that holds the embeddings.
            distributed (`bool`, *optional*, defaults to `False`):
                Whether all processes of the process group fit together, each on its own share of the embeddings, which
                it passes here. All get the same codebooks, of the quality that one process would reach on all of the
                embeddings; rounding differs, so the codebooks are not the same bits.
            checkpoint_dir (`str` or `os.PathLike`, *optional*):
                Where the state is saved after each full pass. A fit with the same arguments goes on from there, and gives
                what an uninterrupted one would have given.
            max_rows_in_memory (`int`, *optional*):
                Rows to hold, as float32; 1 GiB of them if not given.
            device (`str` or `torch.device`, *optional*):
                Where to compute; where the embeddings are if not given.
            show_progress_bar (`bool`, *optional*, defaults to `False`):
                Whether to show one bar over all passes.

        Returns:
            [`ResidualQuantizer`]: itself.

        Raises:
            `TypeError`: if `embeddings` is of another kind, or not floating point.
            `ValueError`: if they are not 2-dimensional, hold NaN or infinite values, are fewer than a layer has codes, all
                equal, or change between passes; if there is no process group, or the checkpoint is another fit's; if the
                configuration has `skipped_codes`.
        """
        if self.config.skipped_codes:
            raise ValueError(
                "skipped_codes name codes of codebooks that fit would replace. Fit a quantizer without them, and pass it to "
                "refit_pruned with a pruning of its own codes."
            )
        if distributed:
            require_process_group()

        def open_reader():
            return EmbeddingReader(embeddings, column, device=device)

        reader = in_all(open_reader) if distributed else open_reader()
        config = self.config
        passes = config.num_iterations + (config.num_sample_iterations if config.sample_per_code else 0)
        with tqdm(total=self.num_layers * passes, desc="codebooks", disable=not show_progress_bar) as bar:
            layers = fit_residual_kmeans(
                reader, config, distributed, max_rows_in_memory, checkpoint_dir, lambda: bar.update()
            )
        # Only now, so that an interrupted fit leaves the quantizer as it was.
        self._set_layers(layers)
        return self

    @torch.no_grad()
    def encode(self, embeddings, column="embedding", num_beams=None, out=None, show_progress_bar=False):
        """
        Args:
            embeddings (`np.ndarray`, `torch.Tensor`, `datasets.Dataset`, `datasets.IterableDataset`, `str` or `os.PathLike`):
                Shape: (N, D). As for `fit`; read in chunks.
            column (`str`, *optional*, defaults to `"embedding"`):
                The column of a data set that holds the embeddings.
            num_beams (`int`, *optional*):
                Beams; the configuration's if not given.
            out (`np.ndarray`, *optional*): Shape: (N, L).
                Where to write the codes, for instance a memory-mapped array of a small integer type.
            show_progress_bar (`bool`, *optional*, defaults to `False`):
                Whether to show a bar over the rows.

        Returns:
            `np.ndarray` (int32, or `out`); `torch.Tensor` (int64) for a tensor: the codes. Shape: (N, L).

        Raises:
            `TypeError`, `ValueError`: as `fit`; also if D differs from the codebooks', the quantizer is not fitted, or `out`
                has another shape or too small a type.
        """
        self._require_fitted()
        reader = EmbeddingReader(embeddings, column, self.config.embedding_dim, self.codebooks[0].device)
        num_beams = self.config.num_beams if num_beams is None else num_beams
        self._check_beams(num_beams)
        if out is not None:
            self._check_out(out, reader.num_rows)
        layers, cosine = self._layers(), self.config.metric == "cosine"
        terms = [assignment_terms(layer, cosine) for layer in layers]
        parts = []
        with tqdm(total=reader.num_rows, desc="codes", unit=" rows", disable=not show_progress_bar) as bar:
            rows = max(256, ENCODE_ROWS // num_beams)
            buffer = torch.empty(rows, reader.dim, device=self.codebooks[0].device)
            for start, chunk in reader.chunks(rows, buffer):
                if num_beams > 1:
                    codes = beam_codes(chunk, [layer.codebook for layer in layers], num_beams)
                else:
                    codes = torch.empty(len(chunk), len(layers), dtype=torch.int32, device=chunk.device)
                    for index, layer in enumerate(layers):
                        leaves = index < len(layers) - 1
                        codes[:, index] = assign_(chunk, layer, self.config, terms[index], leaves)
                if out is not None:
                    self._check_out(out, max(len(out), start + len(chunk)))  # a stream does not tell its length before
                    out[start : start + len(chunk)] = codes.cpu().numpy()
                else:
                    parts.append(codes.int())
                bar.update(len(chunk))
        if out is not None:
            self._check_out(out, reader.num_rows)
            return out
        codes = torch.cat(parts) if parts else torch.empty(0, len(layers), dtype=torch.int32)
        return codes.long() if isinstance(embeddings, torch.Tensor) else codes.cpu().numpy()

    @torch.no_grad()
    def decode(self, codes):
        """
        Sums the codewords of each row; a layer whose code is -1 (pruned), or one of `skipped_codes`, adds nothing.

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
        scale = torch.ones(1, device=rows.device)
        for index, layer in enumerate(self._layers()):
            scale = scale if layer.scale is None else scale * layer.scale
            present = rows[:, index] >= 0
            decoded[present] += scale * layer.codewords[rows[present, index]]
        return decoded if isinstance(codes, torch.Tensor) else decoded.cpu().numpy()

    forward = encode

    @torch.no_grad()
    def relative_error(self, embeddings, column="embedding"):
        """
        Squared error of the reconstruction as a share of the embeddings' variance: sum |x - decode(encode(x))|^2 over
        sum |x - mean|^2.

        Args:
            embeddings (`np.ndarray`, `torch.Tensor`, `datasets.Dataset`, `datasets.IterableDataset`, `str` or `os.PathLike`):
                Shape: (N, D).
            column (`str`, *optional*, defaults to `"embedding"`):
                The column of a data set that holds the embeddings.

        Returns:
            `float`: 0 where embeddings are all equal and met exactly.

        Raises:
            `TypeError`, `ValueError`: as `encode`.
        """
        self._require_fitted()
        reader = EmbeddingReader(embeddings, column, self.config.embedding_dim, self.codebooks[0].device)
        error, rows, total, squares = 0.0, 0, 0.0, 0.0
        shift = None
        for _, chunk in reader.chunks():
            error += float((chunk - self.decode(self.encode(chunk))).double().square().sum())
            # Deviations from some row: those from zero would cancel where all embeddings lie far from it.
            shift = chunk[0].double() if shift is None else shift
            centred = chunk.double() - shift
            rows, total, squares = rows + len(chunk), total + centred.sum(0), squares + float(centred.square().sum())
        if rows == 0:
            raise ValueError("There are no embeddings to measure the error on. Pass at least one.")
        variance = squares - float(total.square().sum()) / rows
        return error / variance if variance > 0 else (0.0 if error == 0 else float("inf"))

    def _require_fitted(self):
        if len(self.codebooks) == 0:
            raise ValueError(
                "This ResidualQuantizer has no codebooks yet. Call fit(embeddings) or from_pretrained first."
            )

    def _check_beams(self, num_beams):
        config = self.config
        plain = config.metric == "euclidean" and not config.normalize_residuals and config.capacity is None
        if num_beams < 1 or (num_beams > 1 and (not plain or config.skipped_codes)):
            raise ValueError(
                f"num_beams={num_beams}: pass 1, or more for a quantizer with metric='euclidean' and neither normalize_residuals "
                "nor capacity nor skipped_codes, because beams compare squared errors."
            )

    def _check_out(self, out, num_rows):
        if not isinstance(out, np.ndarray) or out.dtype.kind not in "iu":
            raise TypeError(f"out must be a numpy array of integers, got {getattr(out, 'dtype', type(out).__name__)}.")
        if out.ndim != 2 or out.shape[1] != self.num_layers or (num_rows is not None and len(out) != num_rows):
            raise ValueError(f"out has shape {out.shape}, but the codes have ({num_rows}, {self.num_layers}).")
        if np.iinfo(out.dtype).max < max(self.codebook_sizes) - 1:
            raise ValueError(f"out is {out.dtype}, which cannot hold codes up to {max(self.codebook_sizes) - 1}.")
