"""Codebooks of the experiments that train: each fitted once and kept, with the groups of test rows that all arms share."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from catalogues import import_example
from cells import cell_hash

from rqsid import RQVAE, ResidualQuantizer, ResidualQuantizerConfig, RQVAEConfig
from rqsid.sid_tokenizer.files import replace_atomically

LONG = 1e10  # products x dimensions x codes, from which on a fit is worth a checkpoint after each pass


@dataclass
class Codes:
    """
    Args:
        settings (`dict`): what the codebooks depend on, JSON-able.
        folder (`Path`): where they lie.
        quantizer ([`ResidualQuantizer`] or [`RQVAE`]): the codebooks.
        codes (`np.ndarray` of int32): those of all products, unpruned. Shape: (N, L).
    """

    settings: dict
    folder: Path
    quantizer: object
    codes: np.ndarray

    @property
    def sizes(self):
        return [int(size) for size in self.quantizer.codebook_sizes]


def check_size(codebook_size, num_products):
    """
    Raises:
        `ValueError`: if a layer has more codes than a twentieth of the products.
    """
    if codebook_size > num_products / 20:
        raise ValueError(
            f"{codebook_size} codes a layer for {num_products} products are fewer than 20 products a code: uneven by chance "
            f"alone. Choose --sizes of at most {num_products // 20}, or pass --any_size and compare with the null."
        )


def make_codes(catalogue, embeddings, described, out, quantizer, init, codebook_size, layers, seed, epochs=40):
    """
    Fits codebooks, or loads those that an earlier run left in `<out>/codes/<hash of the settings>`.

    Args:
        catalogue ([`Catalogue`]):
            Of N products.
        embeddings (`np.ndarray`): Shape: (N, D).
        described (`dict`):
            What they are, from [`embed`].
        out (`str` or `os.PathLike`):
            Folder of the study.
        quantizer, init (`str`):
            As in the picture: `"RQ-KMeans"` or `"RQ-VAE"`; `"random, no relocation"` or `"relocated"`.
        codebook_size, layers, seed, epochs (`int`):
            Codes of each layer, layers, seed, and epochs of an RQ-VAE.

    Returns:
        [`Codes`]
    """
    settings = {
        "data": catalogue.settings(),
        "embeddings": described,
        "quantizer": quantizer,
        "init": init,
        "codebook_size": codebook_size,
        "layers": layers,
        "seed": seed,
    } | ({"epochs": epochs} if quantizer == "RQ-VAE" else {})
    folder = Path(out) / "codes" / cell_hash(settings)
    if not folder.is_dir():
        fitted = fit_quantizer(embeddings, settings, [codebook_size] * layers, folder.with_suffix(".fit"))
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        fitted.save_pretrained(str(unfinished / "quantizer"))
        with replace_atomically(unfinished / "codes.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, fitted.encode(embeddings).astype(np.int32), allow_pickle=False)
        os.replace(unfinished, folder)
        shutil.rmtree(folder.with_suffix(".fit"), ignore_errors=True)
    kind = RQVAE if quantizer == "RQ-VAE" else ResidualQuantizer
    fitted = kind.from_pretrained(str(folder / "quantizer"))
    return Codes(settings, folder, fitted, np.load(folder / "codes.npy", allow_pickle=False))


def fit_quantizer(embeddings, settings, codebook_sizes, checkpoint_dir):
    """The quantizer that settings of a cell name. What is called relocated is each quantizer's default."""
    relocated, seed = settings["init"] == "relocated", settings["seed"]
    if settings["quantizer"] == "RQ-KMeans":
        options = {} if relocated else {"relocation_threshold": 0}
        config = ResidualQuantizerConfig(codebook_sizes=codebook_sizes, init="random", seed=seed, **options)
        is_long = embeddings.size * sum(codebook_sizes) > LONG
        return ResidualQuantizer(config).fit(embeddings, checkpoint_dir=checkpoint_dir if is_long else None)
    options = {} if relocated else {"init": "random", "revive_threshold": 0}
    config = RQVAEConfig(codebook_sizes=codebook_sizes, num_epochs=settings["epochs"], seed=seed, **options)
    return RQVAE(config).fit(embeddings)


def head_and_tail(codes, codebook_sizes, popularity, product_rows):
    """
    The group of each row of a split in each layer: head (`h`) if the code of the product bought belongs to the smallest set
    of most frequent codes that holds half of the mass, tail (`t`) otherwise. The codes are the unpruned ones, and the mass is
    counted on products or training purchases, so that the groups are the same whatever an arm makes of the codes.

    Args:
        codes (`np.ndarray`): Shape: (N, L). Unpruned.
        codebook_sizes (`list[int]`): Codes of each layer.
        popularity (`np.ndarray`): Shape: (N,). Training purchases of each product.
        product_rows (`np.ndarray`): Shape: (R,). The products bought.

    Returns:
        `dict[str, list[str]]`: by `"items"` and by `"interactions"`, for each layer a string of R letters.
    """
    head_codes = import_example("quickstart", "arms").head_codes
    groups = {}
    for name, mass in (("items", np.ones(len(codes))), ("interactions", np.asarray(popularity))):
        groups[name] = []
        for layer, size in enumerate(codebook_sizes):
            is_head = head_codes(codes, mass, layer, size)[codes[product_rows, layer]]
            groups[name].append("".join(np.where(is_head, "h", "t")))
    return groups
