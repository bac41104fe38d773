"""Experiment 2, the cause: which inputs make an hourglass, and how much of it is the initialisation's doing?"""

import numpy as np
from balance import measure
from cells import run_cells

from rqsid import ResidualQuantizer, ResidualQuantizerConfig

NUM_ITEMS, DIM, SIZES, SEEDS, NUM_LAYERS = 20_000, 64, (64, 256), (0, 1, 2), 3
INITS = {
    "random, no relocation": {"init": "random", "relocation_threshold": 0},
    "k-means++, no relocation": {"init": "k-means++", "relocation_threshold": 0},
    "relocated": {"init": "random"},
}


def _clusters(random, num_clusters, num_items, dim, zipf=False):
    """Centres of unit length, and which of them each item belongs to."""
    centres = random.standard_normal((num_clusters, dim))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    shares = 1 / np.arange(1, num_clusters + 1) if zipf else np.ones(num_clusters)
    return centres, random.choice(num_clusters, num_items, p=shares / shares.sum())


def uniform(random, num_items, dim, size):
    return random.uniform(-1, 1, (num_items, dim))


def gaussian(random, num_items, dim, size):
    return random.standard_normal((num_items, dim))


def lognormal_norms(random, num_items, dim, size):
    """Heavy-tailed: directions at random, lengths log-normal with s = 1."""
    points = random.standard_normal((num_items, dim))
    return points / np.linalg.norm(points, axis=1, keepdims=True) * random.lognormal(0, 1, (num_items, 1))


def student(random, num_items, dim, size):
    """Heavy-tailed: multivariate Student's t with 2 degrees of freedom."""
    return random.standard_normal((num_items, dim)) / np.sqrt(random.chisquare(2, (num_items, 1)) / 2)


def zipf_clusters(random, num_items, dim, size, num_clusters=300):
    """Clusters of Zipf(1) sizes, each a Gaussian of radius 0.3."""
    centres, cluster = _clusters(random, num_clusters, num_items, dim, zipf=True)
    return centres[cluster] + 0.3 / np.sqrt(dim) * random.standard_normal((num_items, dim))


def many_zipf_clusters(random, num_items, dim, size):
    return zipf_clusters(random, num_items, dim, size, num_clusters=2000)


def cluster_per_code(random, num_items, dim, size):
    """As many clusters as codes, of Zipf(1) sizes: a long tail of sizes and nothing else."""
    return zipf_clusters(random, num_items, dim, size, num_clusters=size)


def heavy_tailed_clusters(random, num_items, dim, size):
    """As many clusters as codes, of equal sizes, with items at log-normal distances (s = 1)."""
    centres, cluster = _clusters(random, size, num_items, dim)
    noise = random.standard_normal((num_items, dim)) / np.sqrt(dim)
    return centres[cluster] + 0.03 * random.lognormal(0, 1, (num_items, 1)) * noise


def own_offsets(random, num_items, dim, size):
    """As many clusters as codes, tight; a fifth of the items lies 0.5 away, each in a direction of its own."""
    return _offset_clusters(random, num_items, dim, size, shared=False)


def shared_offsets(random, num_items, dim, size):
    """The same, but that fifth shares K - 1 directions: the second layer can absorb it."""
    return _offset_clusters(random, num_items, dim, size, shared=True)


def _offset_clusters(random, num_items, dim, size, shared):
    centres, cluster = _clusters(random, size, num_items, dim)
    offsets = random.standard_normal((size - 1 if shared else num_items, dim))
    offsets *= 0.5 / np.linalg.norm(offsets, axis=1, keepdims=True)
    which = random.integers(0, size - 1, num_items) if shared else np.arange(num_items)
    chosen = random.random((num_items, 1)) < 0.2
    noise = 0.05 / np.sqrt(dim) * random.standard_normal((num_items, dim))
    return centres[cluster] + chosen * offsets[which] + noise


LAWS = {
    "uniform cube": uniform,
    "isotropic Gaussian": gaussian,
    "heavy tails: log-normal norms": lognormal_norms,
    "heavy tails: Student t, df 2": student,
    "Zipf clusters: K": cluster_per_code,
    "Zipf clusters: 300": zipf_clusters,
    "Zipf clusters: 2000": many_zipf_clusters,
    "K clusters, log-normal radius": heavy_tailed_clusters,
    "K tight clusters, a fifth with own offsets": own_offsets,
    "K tight clusters, a fifth with shared offsets": shared_offsets,
}


def causes(out, num_items=NUM_ITEMS, dim=DIM, sizes=SIZES, seeds=SEEDS, laws=tuple(LAWS), inits=tuple(INITS)):
    """
    Draws points of each law, quantizes them from each initialisation and measures layers and residuals, in cells. A seed
    draws the points as well as the initial codebooks; cells of the same seed and size have the same points.
    """
    cells = [
        {
            "law": law,
            "items": num_items,
            "dim": dim,
            "codebook_size": size,
            "layers": NUM_LAYERS,
            "init": init,
            "seed": seed,
        }
        for law in laws
        for size in sizes
        for init in inits
        for seed in seeds
    ]
    return run_cells(out, "causes", cells, compute_cause)


def compute_cause(settings, checkpoint_dir):
    random = np.random.default_rng([settings["seed"], 1])
    size = settings["codebook_size"]
    points = LAWS[settings["law"]](random, settings["items"], settings["dim"], size).astype(np.float32)
    sizes = [size] * settings["layers"]
    config = ResidualQuantizerConfig(codebook_sizes=sizes, seed=settings["seed"], **INITS[settings["init"]])
    quantizer = ResidualQuantizer(config).fit(points)  # seconds: not worth a checkpoint after each pass
    codes = quantizer.encode(points)
    result = measure(codes, sizes) | {"relative_error": quantizer.relative_error(points)}
    result["residuals"] = [norm_statistics(points - points.mean(0))]
    for layer in range(settings["layers"]):
        kept = codes.copy()
        kept[:, layer + 1 :] = -1
        result["residuals"].append(norm_statistics(points - quantizer.decode(kept)))
    return result


def norm_statistics(residuals):
    """
    Lengths of what a layer gets: first the points around their mean, then what each layer leaves.

    Returns:
        `dict`: mean, median and 99 % quantile; `spread`, the coefficient of variation; and `energy_of_top`, the share of the
        squared lengths that the longest 10 % hold, 0.1 where all are alike.
    """
    norms = np.sort(np.linalg.norm(residuals.astype(np.float64), axis=1))
    squares, top = np.square(norms), max(1, round(len(norms) / 10))
    return {
        "mean": float(norms.mean()),
        "median": float(np.median(norms)),
        "q99": float(np.quantile(norms, 0.99)),
        "spread": float(norms.std() / norms.mean()),
        "energy_of_top": float(squares[-top:].sum() / squares.sum()),
    }


def explained(cells):
    """
    How much of the differences between cells of one codebook size each thing explains: the sums of squares of a two-way
    analysis of variance, as shares of the total. A law's share is what the data explains whatever the initialisation.

    Args:
        cells (`list[dict]`): of one codebook size, every law with every initialisation and every seed.

    Returns:
        `dict[str, dict[str, float]]` or `None`: by measure (`gini 0`, ..., `hourglass score`) the shares of `data`,
        `initialisation`, `both` (their interaction) and `seed` (what is left); `None` if combinations are missing.
    """
    names = [tuple(dict.fromkeys(cell["settings"][key] for cell in cells)) for key in ("law", "init", "seed")]
    if len(cells) != np.prod([len(values) for values in names]) or min(map(len, names)) < 2:
        return None
    measures = {f"Gini of layer {layer}": lambda result, at=layer: result["layers"][at]["gini"] for layer in range(3)}
    measures["hourglass score"] = lambda result: result["hourglass_score"]
    shares = {}
    for name, read in measures.items():
        values = np.empty([len(levels) for levels in names])
        for cell in cells:
            at = tuple(
                levels.index(cell["settings"][key]) for levels, key in zip(names, ("law", "init", "seed"), strict=True)
            )
            values[at] = read(cell["result"])
        values -= values.mean()
        total = np.square(values).sum()
        data, init = values.mean((1, 2)), values.mean((0, 2))
        pairs = values.mean(2)
        parts = {
            "data": np.square(data).sum() * values[0].size,
            "initialisation": np.square(init).sum() * values[:, 0].size,
            "both": np.square(pairs - data[:, None] - init).sum() * values.shape[2],
            "seed": np.square(values - pairs[:, :, None]).sum(),
        }
        shares[name] = {part: float(value / total) if total > 0 else 0.0 for part, value in parts.items()}
    return shares
