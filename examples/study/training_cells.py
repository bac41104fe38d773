"""
Experiments 3 to 5, as lists of cells that train: whom an hourglass harms, what probes of the SIDs say, and what the remedies
change.

All start from residual k-means with plain random initialisation, which is what makes hourglasses; codebooks with relocation
are an arm, the cure at the source. A seed draws codebooks, the model's weights and the order of training rows.
"""

from cells import CODE, run_cells
from codes import make_codes
from training import FAMILIES, train_cell

SEEDS, SIZE, LAYERS = (0, 1, 2), 128, 3
BASE = {"quantizer": "RQ-KMeans", "init": "random, no relocation"}
CONFIGURATIONS = ((64, 3), (128, 3), (64, 4))  # codes a layer, layers
SHARES = (0.01, 0.03, 0.25, 0.5)  # of a layer's codes, beside the paper's
THRESHOLDS = (0.1, 0.25, 0.5)
# Dropout of attention forgoes the fused kernel of CPUs, which costs more time than all else in a model this small.
MODEL = {"family": "llama", "width": 64, "depth": 2, "dropout": 0.0}
TRAINING = {
    "epochs": 4,
    "batch_size": 8,
    "learning_rate": 3e-3,
    "weight_decay": 0.1,
    # Sessions differ so much in length that two thirds of a padded batch of 32 are padding; packed attention, though, takes
    # the square of the batch where there is no kernel for it, hence small batches.
    "packing": True,
    "vocab_size": 2000,
    # Without labels: a text that ends with a line break is the query, so words around it are only tokens to compute.
    "template": {"labels": {"query": "", "profile": ""}, "answer": ""},
    "loss_normalize": "vocab",
    "num_beams": 50,
    "train_rows": None,
    "validation_rows": 500,
    "test_rows": None,
}
QUICK_MODEL = MODEL | {"width": 32, "depth": 1}
QUICK_TRAINING = TRAINING | {"epochs": 1, "train_rows": 200, "validation_rows": 50, "test_rows": 50, "num_beams": 50}
UNPRUNED = {
    "name": "unpruned",
    "pruning": {"strategy": "none"},
    "collisions": "share",
    "loss": "cross_entropy",
    "init": BASE["init"],
}
TRAINING_CODE = (*CODE, "trainer", "modeling")


def papers_top_k(size):
    """How many codes the paper prunes: 400 of 4,096, and of other sizes the same share, .098."""
    return 400 if size == 4096 else max(1, round(0.098 * size))


def remedy_arms(size):
    """The unpruned baseline, and what the paper and others do about an hourglass, each in one respect different from it."""
    arms = [UNPRUNED]
    for top_k in sorted({papers_top_k(size), *(max(1, round(share * size)) for share in SHARES)}):
        pruning = {"strategy": "top_k", "layer": 1, "top_k": top_k}
        arms.append(UNPRUNED | {"name": f"top {top_k} of {size} pruned", "pruning": pruning})
    # All codes pruned is the layer dropped: one arm.
    pruning = {"strategy": "drop_layer", "layer": 1}
    arms.append(UNPRUNED | {"name": f"layer dropped (top {size} of {size})", "pruning": pruning})
    for threshold in THRESHOLDS:
        pruning = {"strategy": "threshold", "layer": 1, "threshold": threshold}
        arms.append(UNPRUNED | {"name": f"pruned, p = {threshold}", "pruning": pruning})
    arms += [
        UNPRUNED | {"name": "focal loss", "loss": "focal", "gamma": 1.0},
        UNPRUNED | {"name": "MiLe loss", "loss": "mile", "gamma": 1.0},
        UNPRUNED | {"name": "relocated codebooks", "init": "relocated"},
        UNPRUNED | {"name": "collisions by suffix", "collisions": "suffix"},
        UNPRUNED | {"name": "collisions reassigned", "collisions": "reassign"},
    ]
    top_k = papers_top_k(size)
    # Pruned SIDs collide more. Where every product gets a SID of its own, the tokens are all that differs.
    pruned = {"strategy": "top_k", "layer": 1, "top_k": top_k}
    dropped = {"strategy": "drop_layer", "layer": 1}
    arms += [
        UNPRUNED | {"name": f"top {top_k} of {size} pruned, suffix", "pruning": pruned, "collisions": "suffix"},
        UNPRUNED | {"name": "layer dropped, suffix", "pruning": dropped, "collisions": "suffix"},
        UNPRUNED | {"name": "relocated codebooks, suffix", "init": "relocated", "collisions": "suffix"},
    ]
    split = {"strategy": "split", "layer": 1, "top_k": top_k}
    return [*arms, UNPRUNED | {"name": f"top {top_k} of {size} split", "pruning": split}]


def probe_arms(num_layers):
    """Tokens in the order of the layers and with the first two swapped, each searched with and without its first token given."""
    swapped = [1, 0, *range(2, num_layers)]
    return [
        UNPRUNED | {"given_first_token": True},
        UNPRUNED | {"name": "first two layers swapped", "layer_order": swapped, "given_first_token": True},
    ]


def remedies(
    catalogue, embeddings, described, out, size=SIZE, layers=LAYERS, seeds=SEEDS, quick=False, changes=None, names=None
):
    """
    Experiment 5, the remedies.

    Args:
        catalogue ([`Catalogue`]):
            The data.
        embeddings (`np.ndarray`): Shape: (N, D).
        described (`dict`):
            What they are, from [`embed`].
        out (`str`):
            Folder of results.
        size, layers (`int`):
            Codes of each layer, and layers.
        seeds (sequence of `int`):
            Of codebooks and training.
        quick (`bool`, *optional*, defaults to `False`):
            Two arms, a tiny model, one epoch on a few rows.
        changes (`dict`, *optional*):
            Settings of training that differ from `TRAINING`, such as `epochs`.
        names (sequence of `str`, *optional*):
            Of the arms to compute; all if not given.

    Returns:
        `int`: how many cells were computed.

    Raises:
        `ValueError`: if there is no arm of such a name.
    """
    arms = remedy_arms(size)
    strangers = set(names or ()) - {arm["name"] for arm in arms}
    if strangers:
        raise ValueError(f"No arm is called {sorted(strangers)}. Choose among {[arm['name'] for arm in arms]}.")
    if quick:
        arms = [UNPRUNED, next(arm for arm in arms if arm["pruning"].get("top_k") == papers_top_k(size))]
    if names:
        arms = [arm for arm in arms if arm["name"] in names]
    grid = [(arm, "llama", size, layers, seed) for arm in arms for seed in seeds]
    return _train(catalogue, embeddings, described, out, "remedies", grid, quick, changes)


def harm(catalogue, embeddings, described, out, configurations=CONFIGURATIONS, seeds=SEEDS, quick=False, changes=None):
    """Experiment 3: the unpruned SIDs in three families of models and, by default, three sets of codebooks; see [`remedies`]."""
    families = ("llama", "qwen2") if quick else FAMILIES
    grid = [
        (UNPRUNED, family, size, layers, seed)
        for family in families
        for size, layers in configurations
        for seed in seeds
    ]
    return _train(catalogue, embeddings, described, out, "harm", grid, quick, changes)


def probes(catalogue, embeddings, described, out, size=SIZE, layers=LAYERS, seeds=SEEDS, quick=False, changes=None):
    """Experiment 4: layers swapped, and the first token of the SID given; see [`remedies`]."""
    grid = [(arm, "llama", size, layers, seed) for arm in probe_arms(layers) for seed in seeds]
    return _train(catalogue, embeddings, described, out, "probes", grid, quick, changes)


def cell_settings(catalogue, described, arm, family, size, layers, seed, quick=False, changes=None):
    """What a cell that trains depends on, JSON-able; see [`remedies`]."""
    model, training = (QUICK_MODEL, QUICK_TRAINING) if quick else (MODEL, TRAINING)
    return {
        "data": catalogue.settings() | {"task": catalogue.task},
        "embeddings": described,
        "quantizer": BASE["quantizer"],
        "codebook_size": size,
        "layers": layers,
        "arm": arm,
        "model": model | {"family": family},
        "training": training | (changes or {}),
        "seed": seed,
    }


def _train(catalogue, embeddings, described, out, experiment, grid, quick, changes):
    cells = [cell_settings(catalogue, described, *cell, quick=quick, changes=changes) for cell in grid]

    def compute(settings, checkpoint_dir):
        codes = {
            init: make_codes(
                catalogue,
                embeddings,
                described,
                out,
                settings["quantizer"],
                init,
                settings["codebook_size"],
                settings["layers"],
                settings["seed"],
            )
            for init in {BASE["init"], settings["arm"]["init"]}
        }
        base = codes[BASE["init"]]
        return train_cell(settings, checkpoint_dir, catalogue, codes[settings["arm"]["init"]], base, embeddings)

    # The unpruned baseline is a cell of several experiments.
    reuse = tuple(other for other in ("remedies", "harm") if other != experiment)
    return run_cells(out, experiment, cells, compute, TRAINING_CODE, reuse)
