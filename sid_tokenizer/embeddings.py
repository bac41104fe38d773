"""Reading embeddings in chunks, pass after pass, from whatever holds them."""

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

CHUNK_ROWS = 16384
KINDS = (
    "a numpy array (memory-mapped or not), a torch tensor, a datasets.Dataset or IterableDataset, or the path of a .npy "
    "file, of a .safetensors file or of a folder of .safetensors shards"
)


STABLE = (
    "A stream must give the same rows in the same order in every pass: do not shuffle it, and check that its source is "
    "complete."
)


class EmbeddingReader:
    r"""
    Yields the rows of an embedding table as float32 chunks, as often as wanted, in memory bounded by the chunk.

    Args:
        embeddings (`np.ndarray`, `torch.Tensor`, `datasets.Dataset`, `datasets.IterableDataset`, `str` or `os.PathLike`):
            Shape: (N, D). Any float type. A data set has one row per product and the vector in `column`. A path is a
            `.npy` file, a `.safetensors` file of one tensor, or a folder of such shards, read in the order of their
            names; files are memory-mapped.
        column (`str`, *optional*, defaults to `"embedding"`):
            Column of a data set that holds the vectors.
        expect_dim (`int`, *optional*):
            D that the rows must have.
        device (`str` or `torch.device`, *optional*):
            Where chunks go; where they are if not given.

    Attributes:
        num_rows (`int` or `None`): N; `None` until the first pass over a stream of unknown length is complete.
        dim (`int`): D.

    Raises:
        `TypeError`: if `embeddings` is of another kind, or does not hold floating point numbers.
        `ValueError`: if rows have another shape, D differs between shards or from `expect_dim`, or a path cannot be read;
            and, while reading, if a row holds NaN or infinite values, or a pass has another number of rows than the first.
    """

    def __init__(self, embeddings, column="embedding", expect_dim=None, device=None):
        self.column = column
        self.device = device
        self.num_rows = None
        self._stream = None
        if isinstance(embeddings, str | os.PathLike):
            self._parts = _open_path(Path(embeddings))
        elif isinstance(embeddings, np.ndarray | torch.Tensor):
            self._parts = [embeddings]
        elif hasattr(embeddings, "column_names") and hasattr(embeddings, "iter"):
            self._parts, self._stream = [], self._open_dataset(embeddings)
        else:
            raise TypeError(
                f"embeddings must be {KINDS}; got {type(embeddings).__name__}. Convert it first: numpy.asarray(rows), or "
                "frame.to_numpy()."
            )
        dims = [_check_matrix(part) for part in self._parts]
        if len(set(dims)) > 1:
            raise ValueError(
                f"The shards have {sorted(set(dims))} dimensions. They were not written by one embedding model: embed the "
                "products again, into an empty folder."
            )
        self.dim = dims[0] if dims else self._dim_of_stream()
        if self._stream is None:
            self.num_rows = sum(len(part) for part in self._parts)
        if expect_dim is not None and self.dim != expect_dim:
            raise ValueError(
                f"embeddings have {self.dim} dimensions, the codebooks {expect_dim}. Encode with the embedding model that "
                "the codebooks were fitted on, or fit again."
            )

    @property
    def in_memory(self):
        """The tensor or array itself, where there is just one."""
        return self._parts[0] if len(self._parts) == 1 else None

    def chunks(self, rows=CHUNK_ROWS, buffer=None):
        """
        One pass.

        Args:
            rows (`int`, *optional*, defaults to 16384):
                Rows of a chunk, at most.
            buffer (`torch.Tensor`, *optional*): Shape: (rows, D). Float32.
                Where each chunk is copied to, in the place of the one before: fresh memory would cost more than the copy.

        Yields:
            `tuple[int, torch.Tensor]`: the row where the chunk begins, and the chunk, float32. Shape: (rows, D). Without a
            `buffer` it may share memory with the embeddings: do not write to it.
        """
        start = 0
        for part in self._pieces(rows):
            if buffer is None:
                chunk = torch.as_tensor(part).to(device=self.device, dtype=torch.float32)
            else:
                chunk = buffer[: len(part)].copy_(torch.as_tensor(part))
            # One number instead of a mask: a sum is finite only if every summand is.
            if not torch.isfinite(chunk.sum()) and not torch.isfinite(chunk).all():
                row = start + int(torch.nonzero(~torch.isfinite(chunk).all(1))[0])
                raise ValueError(
                    f"embeddings hold NaN, infinite values or values beyond float32 (first in row {row}). Remove those "
                    "products, embed them again, or scale the embeddings down."
                )
            if self.num_rows is not None and start + len(chunk) > self.num_rows:
                raise ValueError(
                    f"The embeddings have more rows in this pass than the {self.num_rows} before. {STABLE}"
                )
            yield start, chunk
            start += len(chunk)
        if self.num_rows is None:
            self.num_rows = start
        if start != self.num_rows:
            raise ValueError(
                f"The embeddings ended after {start} rows in this pass, but had {self.num_rows} before. {STABLE}"
            )

    def _pieces(self, rows):
        for part in self._parts:
            for start in range(0, len(part), rows):
                yield _readable(part[start : start + rows])
        if self._stream is not None:
            for batch in self._stream.iter(batch_size=rows):
                yield self._stack(batch)

    def _open_dataset(self, dataset):
        columns = dataset.column_names
        if columns is not None and self.column not in columns:
            raise ValueError(
                f"The data set has no column {self.column!r}, only {list(columns)}. Name the column that holds the "
                'embeddings: column="…".'
            )
        if hasattr(dataset, "__len__"):
            self.num_rows = len(dataset)
        return (dataset.select_columns([self.column]) if columns is not None else dataset).with_format("numpy")

    def _dim_of_stream(self):
        first = next(iter(self._stream.iter(batch_size=1)), None)
        if first is None:
            raise ValueError("The data set is empty. Pass the embeddings of at least one product.")
        return self._stack(first).shape[1]

    def _stack(self, batch):
        if self.column not in batch:
            raise ValueError(f"The data set has no column {self.column!r}, only {list(batch)}: name it with column=.")
        values = batch[self.column]
        values = values if isinstance(values, np.ndarray) and values.dtype != object else list(values)
        try:
            values = np.asarray(values)
        except ValueError:  # rows of different lengths
            values = np.empty(len(values), dtype=object)
        if values.ndim != 2 or values.dtype == object:
            raise ValueError(
                f"Column {self.column!r} does not hold vectors of one length D. Every row needs a list of D numbers: embed "
                "the products again with one model."
            )
        if values.dtype.kind != "f":
            raise TypeError(f"Column {self.column!r} holds {values.dtype}; embeddings must be floating point.")
        if getattr(self, "dim", values.shape[1]) != values.shape[1]:
            raise ValueError(
                f"Column {self.column!r} has rows of {values.shape[1]} dimensions after rows of {self.dim}. Embed all "
                "products with one model."
            )
        return values


class _Shard:
    """One tensor of a safetensors file, read slice by slice."""

    def __init__(self, path):
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                if len(names) == 1:
                    self._slice = file.get_slice(names[0])
                    self.shape = tuple(self._slice.get_shape())
                    self.dtype = self._slice.get_dtype()
        except Exception as error:
            raise ValueError(f"{path} is not a readable safetensors file ({error}). Write it again.") from error
        if len(names) != 1:
            raise ValueError(f"{path} holds the tensors {sorted(names)}; save the embeddings alone.")
        self.ndim = len(self.shape)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        return self._slice[rows]


def _open_path(path):
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise ValueError(
                f"The folder {path} holds no .safetensors file. For parquet shards pass the data set: "
                f'datasets.load_dataset("parquet", data_dir="{path}", split="train").'
            )
        return [_Shard(file) for file in files]
    if not path.is_file():
        raise ValueError(f"There is no file or folder {path}. Pass the path of {KINDS.split('path of ')[1]}.")
    if path.suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r")
            if not isinstance(array, np.ndarray):
                raise ValueError("it is an archive of several arrays")
            return [array]
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{path} is not a readable .npy file of numbers ({error}). Write it again.") from error
    if path.suffix == ".safetensors":
        return [_Shard(path)]
    raise ValueError(f"Cannot read embeddings from {path}: pass {KINDS}.")


def _check_matrix(part):
    """Returns D."""
    if part.ndim != 2:
        raise ValueError(
            f"embeddings have shape {tuple(part.shape)}; one row per product is needed: (N, D). For a single product pass "
            "embedding[None]."
        )
    name = str(part.dtype).removeprefix("torch.").lower()
    # numpy's name of a type of another byte order is ">f4".
    floating = getattr(part.dtype, "kind", "") == "f" or name.startswith(
        ("float", "bfloat", "f16", "f32", "f64", "bf16")
    )
    if not floating or part.shape[1] == 0:
        raise TypeError(
            f"embeddings must be floating point with at least one dimension, got {part.dtype} of shape "
            f"{tuple(part.shape)}. Convert them with .astype('float32')."
        )
    return part.shape[1]


def _readable(piece):
    """torch refuses arrays that run backwards or are of another byte order, and warns of read-only ones, to which nothing here writes."""
    if not isinstance(piece, np.ndarray):
        return piece
    if not piece.dtype.isnative or piece.dtype.itemsize > 8:
        return piece.astype(np.float64 if piece.dtype.itemsize > 4 else np.float32)
    if min(piece.strides) < 0:
        piece = piece.copy()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(piece)  # whose conversion from half precision is many times faster than NumPy's
