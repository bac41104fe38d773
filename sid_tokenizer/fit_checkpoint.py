"""The state of a fit between two passes, in one file."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import processes
from .files import replace_atomically
from .untrusted import is_whole, parse_json, read_header

FILE = "fit.safetensors"


class FitCheckpoint:
    r"""
    Keeps finished layers and the codebook in progress, so that an interrupted fit goes on from its last full pass.

    The file carries the configuration and a digest of a sample of the embeddings; another fit's file is refused.

    Args:
        folder (`str` or `os.PathLike` or `None`):
            Where the file is. With `None` nothing is saved.
        config ([`ResidualQuantizerConfig`]):
            Of the fit.
        dim (`int`): D.
        num_rows (`int`): N.
        sample (`torch.Tensor`): Shape: (M, D).
            What the fit drew from the embeddings.
        distributed (`bool`):
            Whether other processes take part; the first one writes.

    Raises:
        `ValueError`: if the folder has the state of another fit, or cannot be read.
    """

    def __init__(self, folder, config, dim, num_rows, sample, distributed):
        self.path = None if folder is None else Path(folder) / FILE
        self.distributed = distributed
        self._tensors, self._state = {}, {"finished": 0}
        if self.path is None:
            return
        arguments = config.to_dict()
        for ignored in (
            "transformers_version",
            "embedding_dim",
            "architectures",
            "dtype",
            "num_beams",
            "_name_or_path",
        ):
            arguments.pop(ignored, None)
        digest = hashlib.sha256(sample.cpu().numpy().tobytes()).hexdigest()
        self.fit = json.dumps([arguments, dim, num_rows, digest], sort_keys=True)
        self._in_all(lambda: self._load(sample.device))
        if distributed and len(set(processes.of_all(self._position()))) > 1:
            raise ValueError(
                f"Not all processes find the same state in {self.path}. checkpoint_dir must be a folder that all of them see."
            )

    def layers(self, layer_class):
        """The finished layers."""
        return [self._layer(layer_class, index) for index in range(self._state["finished"])]

    def unfinished(self, index):
        """Iterations done, codebook and prices of the layer in progress; `(0, None, None)` if there is none."""
        if self._state.get("unfinished") != index:
            return 0, None, None
        return self._state["iterations"], self._tensors[f"{index}.codebook"], self._tensors.get(f"{index}.prices")

    def save_unfinished(self, index, iterations, codebook, prices):
        """Called after each full pass of the layer `index`."""
        state = {"finished": index, "unfinished": index, "iterations": iterations}
        self._write({**self._finished(index), **_named(index, codebook=codebook, prices=prices)}, state)

    def save(self, layers):
        """Called after each layer."""
        tensors = {}
        for index, layer in enumerate(layers):
            tensors |= _named(index, codebook=layer.codebook, prices=layer.prices, scale=layer.scale)
        self._write(tensors, {"finished": len(layers)})

    def _finished(self, num_layers):
        return {name: tensor for name, tensor in self._tensors.items() if int(name.split(".")[0]) < num_layers}

    def _layer(self, layer_class, index):
        return layer_class(*(self._tensors.get(f"{index}.{name}") for name in ("codebook", "prices", "scale")))

    def _write(self, tensors, state):
        self._tensors, self._state = tensors, state
        if self.path is None:
            return

        def write():
            if self.distributed and not processes.is_main():
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            with replace_atomically(self.path) as temporary:
                save_file(contiguous, temporary, metadata={"fit": self.fit, "state": json.dumps(state)})

        self._in_all(write)

    def _in_all(self, function):
        return processes.in_all(function) if self.distributed else function()

    def _position(self):
        """How far the fit has come, as one number."""
        return 1_000_000 * self._state["finished"] + self._state.get("iterations", 0)

    def _load(self, device):
        if not self.path.is_file():
            return
        try:
            shapes, metadata = read_header(self.path)
            if "fit" not in metadata or "state" not in metadata:
                raise ValueError("it has no state of a fit")
            same = metadata["fit"] == self.fit
            if same:
                # Only then, since the tensors of another fit may be of any size.
                state = parse_json(metadata["state"].encode())
                self._check(shapes, state)
                with safe_open(self.path, framework="pt") as file:
                    tensors = {name: file.get_tensor(name).to(device) for name in shapes}
                if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
                    raise ValueError("it holds NaN or infinite values")
        except (SafetensorError, ValueError, OSError) as error:
            raise ValueError(f"{self.path} cannot be read ({error}). Delete it to fit from the start.") from error
        if not same:
            raise ValueError(
                f"{self.path} is the state of a fit of other embeddings or with another configuration. Go on with those, "
                "delete it, or pass another checkpoint_dir."
            )
        self._tensors, self._state = tensors, state

    def _check(self, shapes, state):
        """That a state is one that a fit with this configuration writes, and the tensors those that belong to it."""
        arguments, dim = json.loads(self.fit)[:2]
        sizes = arguments["codebook_sizes"]
        finished = state.get("finished") if isinstance(state, dict) else None
        if not is_whole(finished, 0, len(sizes)):
            raise ValueError("its state is none of a fit")
        layers = finished
        if "unfinished" in state:
            layers += 1
            if (
                not is_whole(state["unfinished"], finished, min(finished, len(sizes) - 1))
                or set(state) != {"finished", "unfinished", "iterations"}
                or not is_whole(state["iterations"], 0, 2**31)
            ):
                raise ValueError("its state is none of a fit")
        for index in range(layers):
            if f"{index}.codebook" not in shapes:
                raise ValueError(f"it lacks the codebook of layer {index}")
        expected = {"codebook": lambda size: [size, dim], "prices": lambda size: [size], "scale": lambda size: [1]}
        for name, (dtype, shape) in shapes.items():
            index, _, part = name.partition(".")
            good = index.isdecimal() and len(index) < 4 and int(index) < layers and part in expected
            if not good or dtype not in ("F16", "BF16", "F32", "F64"):
                raise ValueError(f"{name!r} is no tensor of its state")
            if shape != expected[part](sizes[int(index)]):
                raise ValueError(f"{name!r} has the shape {shape}")


def _named(index, **tensors):
    return {f"{index}.{name}": tensor for name, tensor in tensors.items() if tensor is not None}
