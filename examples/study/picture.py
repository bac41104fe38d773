"""
Experiment 1, the picture: how evenly are tokens used in each layer, for which codebooks, trainings and embeddings? And how
evenly in the SIDs that others have published?
"""

import numpy as np
from balance import measure
from cells import run_cells
from codes import fit_quantizer

from rqsid.sid_tokenizer.index_files import read_index

SIZES, LAYERS, SEEDS = (64, 256), (3, 4), (0, 1, 2)
QUANTIZERS, INITS = ("RQ-KMeans", "RQ-VAE"), ("random, no relocation", "relocated")


def picture(
    catalogue,
    embeddings,
    described,
    out,
    sizes=SIZES,
    layers=LAYERS,
    seeds=SEEDS,
    quantizers=QUANTIZERS,
    epochs=40,
    any_size=False,
):
    """
    Quantizes the embeddings in all ways and measures each, in cells.

    Args:
        catalogue ([`Catalogue`]):
            Of N products.
        embeddings (`np.ndarray`): Shape: (N, D).
        described (`dict`):
            What they are, from [`embed`].
        out (`str`):
            Folder of results.
        sizes, layers, seeds (sequence of `int`):
            Codebook sizes, numbers of layers and seeds. A size above N / 20 is left out: its codes would hold fewer than 20
            products, and unevenness be chance.
        quantizers (sequence of `str`):
            Which.
        epochs (`int`):
            Of an RQ-VAE.
        any_size (`bool`, *optional*, defaults to `False`):
            Whether larger ones are kept, too; the null says what chance makes of them.
    """
    kept = [size for size in sizes if any_size or size <= len(embeddings) / 20]
    if not kept:
        raise ValueError(f"{len(embeddings)} products are too few for codebooks of {min(sizes)}: 20 products a code.")
    if len(kept) < len(sizes):
        left_out = [size for size in sizes if size not in kept]
        print(
            f"{catalogue.name}: codebooks of {left_out} are left out, more than a twentieth of {len(embeddings)} products."
        )
    cells = [
        {
            "data": catalogue.settings(),
            "embeddings": described,
            "quantizer": quantizer,
            "init": init,
            "codebook_size": size,
            "layers": num_layers,
            "seed": seed,
        }
        | ({"epochs": epochs} if quantizer == "RQ-VAE" else {})
        for quantizer in quantizers
        for size in kept
        for num_layers in layers
        for init in INITS
        for seed in seeds
    ]

    def compute(settings, checkpoint_dir):
        codebook_sizes = [settings["codebook_size"]] * settings["layers"]
        codes, error = quantize(embeddings, settings, codebook_sizes, checkpoint_dir)
        result = measure(codes, codebook_sizes, catalogue.popularity)
        return result | {"relative_error": error, "about": _about(catalogue, embeddings=described)}

    return run_cells(out, "picture", cells, compute)


def quantize(embeddings, settings, codebook_sizes, checkpoint_dir):
    """Codes, shape (N, L), and the relative error."""
    quantizer = fit_quantizer(embeddings, settings, codebook_sizes, checkpoint_dir)
    return quantizer.encode(embeddings), quantizer.relative_error(embeddings)


def published(catalogue, out):
    """
    Measures the SIDs in the folder `index` beside the data. A file's codebook size is taken for the power of two that holds
    its largest code, since that is how such codebooks are made and a file does not say.
    """

    def compute(settings, checkpoint_dir):
        path = next(path for path in catalogue.index_files if path.name == settings["index"])
        product_ids, codes, sizes = read_index(path)
        row_of = {product: row for row, product in enumerate(product_ids)}
        missing = [product for product in catalogue.product_ids if product not in row_of]
        if missing or len(product_ids) > len(catalogue.product_ids):
            raise ValueError(
                f"{path.name} has {len(product_ids)} items and lacks {len(missing)} of the {len(catalogue.product_ids)} products."
            )
        codes = codes[[row_of[product] for product in catalogue.product_ids]]
        sizes = [int(2 ** np.ceil(np.log2(size))) for size in sizes]
        return measure(codes, sizes, catalogue.popularity) | {"about": _about(catalogue)}

    cells = [{"data": catalogue.settings(), "index": path.name} for path in catalogue.index_files]
    return run_cells(out, "published", cells, compute)


def _about(catalogue, embeddings=None):
    """What the tables say of the data. No task is trained here, but a tower's rows are those of one."""
    about = catalogue.describe() | {"task": "none: quantization alone; training purchases only weigh the items"}
    if embeddings and embeddings["kind"] == "dual tower":
        about["task"] = f"none: quantization alone; the tower's training rows are those of: {catalogue.task}"
    return about
