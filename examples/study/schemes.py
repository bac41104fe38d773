"""
Experiment 7: other ways to name a product, each on the same trainer, with the same model, data and epochs.

These are schemes, not replications: of DSI, NCI, TIGER and GDR only the identifiers are taken, and not their models, losses,
generated queries, encoders or sizes.
"""

from cells import run_cells
from coarse_dense import coarse_dense_cell
from codes import make_codes
from scheme_codes import PlainCodes, atomic_codes, kept_hierarchical_codes
from training import train_cell
from training_cells import (
    BASE,
    LAYERS,
    SEEDS,
    SIZE,
    TRAINING_CODE,
    UNPRUNED,
    cell_settings,
    papers_top_k,
    remedies,
    remedy_arms,
)
from training_comparisons import NOISE_BASELINE, SUFFIX_BASELINE

COARSE_LAYERS = 2
WEIGHT_ROWS = 2000  # of validation, by which ridge and weight of the dense ranking are chosen


def scheme_arms(num_epochs=40, weight_rows=WEIGHT_ROWS):
    """
    What `remedies` has not. Rows of new tokens start from the codebooks where there are any, and from noise elsewhere; what that
    alone changes says the first arm, the baseline from noise. The second is the baseline of the three that follow: as they do,
    it starts from noise, and names each product alone.

    Args:
        num_epochs (`int`, *optional*, defaults to 40): Of the RQ-VAE.
        weight_rows (`int`, *optional*, defaults to 2000): Validation rows by which the ranking inside coarse SIDs is chosen.
    """
    plain = {name: value for name, value in UNPRUNED.items() if name != "init"}
    return [
        UNPRUNED | {"name": "unpruned, rows from noise", "scheme": "noise"},
        UNPRUNED | {"name": NOISE_BASELINE, "scheme": "noise", "collisions": "suffix"},
        plain | {"name": "atomic ids (as DSI)", "scheme": "atomic"},
        plain | {"name": "hierarchical k-means (as NCI)", "scheme": "hierarchical"},
        plain
        | {"name": "RQ-VAE, suffix (as TIGER)", "scheme": "RQ-VAE", "init": "relocated", "collisions": "suffix"}
        | {"quantizer_epochs": num_epochs},
        UNPRUNED
        | {"name": "coarse SID, dense inside (as GDR)", "scheme": "coarse", "coarse_layers": COARSE_LAYERS}
        | {"weight_rows": weight_rows},
    ]


def shared_arms(size):
    """
    Those of `remedies` that are schemes, too: SIDs shared, of better codebooks, with suffixes, and pruned by the paper's share.
    """
    pruned = f"top {papers_top_k(size)} of {size} pruned"
    names = (UNPRUNED["name"], "relocated codebooks", SUFFIX_BASELINE, pruned)
    return [arm for arm in remedy_arms(size) if arm["name"] in names]


def schemes(
    catalogue, embeddings, described, out, size=SIZE, layers=LAYERS, seeds=SEEDS, quick=False, changes=None, names=None
):
    """
    See [`remedies`], of which four arms are cells of this experiment, too (two if quick): they are computed if they are missing,
    as cells of `remedies`, after the others.

    Returns:
        `int`: how many cells were computed.

    Raises:
        `ValueError`: if there is no arm of such a name.
    """
    arms, shared = scheme_arms(*([2, 50] if quick else [])), [arm["name"] for arm in shared_arms(size)]
    strangers = set(names or ()) - {arm["name"] for arm in arms} - set(shared)
    if strangers:
        known = [arm["name"] for arm in arms] + shared
        raise ValueError(f"No arm is called {sorted(strangers)}. Choose among {known}.")
    if names:
        arms = [arm for arm in arms if arm["name"] in names]
        shared = [name for name in shared if name in names]
    cells = [
        cell_settings(catalogue, described, arm, "llama", size, layers, seed, quick, changes)
        for arm in arms
        for seed in seeds
    ]

    def compute(settings, checkpoint_dir):
        arm, seed = settings["arm"], settings["seed"]

        def codes(quantizer, init, layers=layers, **options):
            return make_codes(catalogue, embeddings, described, out, quantizer, init, size, layers, seed, **options)

        base = codes(BASE["quantizer"], BASE["init"])
        if arm["scheme"] == "coarse":
            coarse = codes(BASE["quantizer"], BASE["init"], layers=arm["coarse_layers"])
            result = coarse_dense_cell(settings, checkpoint_dir, catalogue, coarse, base, embeddings)
            return result | {"codebook_sizes": coarse.sizes}
        if arm["scheme"] == "noise":
            named = PlainCodes(base.codes, base.sizes)
        elif arm["scheme"] == "atomic":
            named = atomic_codes(len(embeddings))
        elif arm["scheme"] == "hierarchical":
            named = kept_hierarchical_codes(catalogue, embeddings, described, out, layers, seed)
        else:
            fitted = codes("RQ-VAE", arm["init"], epochs=arm["quantizer_epochs"])
            named = PlainCodes(fitted.codes, fitted.sizes)
        result = train_cell(settings, checkpoint_dir, catalogue, named, base, embeddings)
        return result | {"codebook_sizes": named.sizes}

    computed = run_cells(out, "schemes", cells, compute, TRAINING_CODE)
    if shared:
        options = {"size": size, "layers": layers, "seeds": seeds, "quick": quick, "changes": changes, "names": shared}
        computed += remedies(catalogue, embeddings, described, out, **options)
    return computed
