"""
Experiment 6: a model of SIDs, a dual tower's exact neighbours and hybrids of both on the same rows, with what each costs.

The hybrids re-score the products that the search of SIDs found, or those and the tower's first 50, by a combination whose weights
come from validation rows alone. The combination has popularity and history, too; what these do without the other model is measured
beside the hybrids. See [`rescoring`](rescoring.py) for its features and [`retrievers`](retrievers.py) for the methods.
"""

import time

import numpy as np
import torch
from cells import run_cells
from codes import head_and_tail, make_codes
from item_embeddings import load_tower
from rescoring import FEATURES, fit_weights, rescore
from retrievers import CANDIDATES, RESCORED, Retrievers
from towers import tower_settings
from training import TOP_K, describe_training, fit_model, ranks_of, spread, user_numbers
from training_cells import LAYERS, SEEDS, SIZE, TRAINING_CODE, UNPRUNED, cell_settings

BATCH = 256
WEIGHT_ROWS = 2000  # of validation, that weights of what re-scores are fitted on
# Sizes of batches, and rows from which a median is taken: what a service waits for, and what it gets through.
LATENCY = {"single": (1, 50), "batch": (64, 512)}


def dense(catalogue, embeddings, described, out, size=SIZE, layers=LAYERS, seeds=SEEDS, quick=False, changes=None):
    """
    Experiment 6; one cell a seed, which draws codebooks, model, order of rows and tower.

    Args:
        catalogue ([`Catalogue`]):
            The data.
        embeddings (`np.ndarray`): Shape: (N, D).
            What SIDs are made of. The tower's own embeddings are made here, by [`load_tower`].
        described (`dict`):
            What they are, from [`embed`].
        out (`str`):
            Folder of results.
        size, layers (`int`):
            Codes of each layer, and layers.
        seeds (sequence of `int`):
            Of everything above.
        quick (`bool`, *optional*, defaults to `False`):
            A tiny model, one epoch on a few rows.
        changes (`dict`, *optional*):
            Settings of training that differ from `TRAINING`, such as `epochs`.

    Returns:
        `int`: how many cells were computed.
    """
    tower = {name: value for name, value in tower_settings(catalogue).items() if name not in ("data", "seed")}
    cells = [
        cell_settings(catalogue, described, UNPRUNED, "llama", size, layers, seed, quick, changes)
        | {"tower": tower, "candidates": CANDIDATES, "weight_rows": 50 if quick else WEIGHT_ROWS}
        for seed in seeds
    ]

    def compute(settings, checkpoint_dir):
        names = ("quantizer", "codebook_size", "layers", "seed")
        options = {name: settings[name] for name in names} | {"init": settings["arm"]["init"]}
        codes = make_codes(catalogue, embeddings, described, out, **options)
        tower, item_embeddings, about_tower = load_tower(catalogue, out, settings["seed"])
        trainer = fit_model(settings, checkpoint_dir, catalogue, codes, embeddings)
        training = settings["training"]
        retrievers = Retrievers(catalogue, trainer, training["num_beams"], tower, item_embeddings)
        validation = spread(catalogue.splits["validation"], settings["weight_rows"])
        test = spread(catalogue.splits["test"], training["test_rows"])
        result, weights = compare(retrievers, validation, test)
        return {
            **result,
            "item_ranks": result["methods"]["SID model"],
            "users": user_numbers(test),
            "groups": head_and_tail(codes.codes, codes.sizes, catalogue.popularity, retrievers.bought(test)),
            "latency": measure_latency(retrievers, test, weights),
            "memory": retrievers.memory(),
            "tower": about_tower,
            **describe_training(trainer),
            "about": catalogue.describe(),
        }

    return run_cells(out, "dense", cells, compute, TRAINING_CODE)


def compare(retrievers, validation, test):
    """
    Fits the weights of what re-scores on the validation rows, and only then looks at the test rows, once.

    Args:
        retrievers ([`Retrievers`]):
            All methods.
        validation, test (`Dataset`):
            Rows.

    Returns:
        `tuple[dict, dict]`: JSON-able, `methods`, by name the rank of what was bought in each test row, 0 beyond 50; `ceilings`,
        the share of test rows whose product is among the candidates; `weights` by method that re-scores and feature;
        `fitted_rows`, the validation rows that they were fitted on, of how many; `validation_methods`, Recall@10 and NDCG@10
        on those rows; `search_seconds`, of all methods on the test rows. And the weights as tensors.
    """
    bought = torch.from_numpy(retrievers.bought(validation))
    found, candidates = _collect([retrievers.retrieve(rows) for rows in _batches(validation, BATCH)])
    weights, fitted_rows = {}, {}
    for name, (products, features) in candidates.items():
        weights[name], fitted_rows[name] = fit_weights(features, products, bought.to(products.device))
    ranked = found | _rescored(candidates, weights)
    on_validation = {name: _brief_metrics(ranks_of(products, bought)) for name, products in ranked.items()}
    del candidates, found, ranked

    started, ranks, is_candidate = time.perf_counter(), {}, {name: [] for name in RESCORED}
    for rows in _batches(test, BATCH):
        found, candidates = retrievers.retrieve(rows)
        bought = retrievers.bought(rows)
        for name, products in (found | _rescored(candidates, weights)).items():
            ranks.setdefault(name, []).extend(ranks_of(products, bought))
        for name, (products, _) in candidates.items():
            is_candidate[name].append((products.cpu().numpy() == bought[:, None]).any(1))
    result = {
        "methods": ranks,
        "ceilings": {name: round(float(np.concatenate(parts).mean()), 6) for name, parts in is_candidate.items()},
        "weights": {name: dict(zip(FEATURES, values.tolist(), strict=True)) for name, values in weights.items()},
        "fitted_rows": {name: [count, len(validation)] for name, count in fitted_rows.items()},
        "validation_methods": on_validation,
        "search_seconds": round(time.perf_counter() - started, 2),
    }
    return result, weights


def measure_latency(retrievers, rows, weights):
    """
    Milliseconds a row of each method by itself, from rows to ranked products, on this machine as busy as it was: the median
    over calls. Methods take turns with every batch, so that other work on the machine hits them alike; the first batch of each
    size is run once more before and not counted.

    Returns:
        `dict`: `single` and `batch` by method, the sizes of batches, device and threads.
    """
    methods = retrievers.floors() | {"dual tower": retrievers.by_tower, "SID model": retrievers.by_sids}
    for name in RESCORED:
        methods[name] = lambda rows, name=name: retrievers.by_rescoring(rows, name, weights[name])
    device = retrievers.model.device.type
    measured = {"device": device, "threads": torch.get_num_threads(), "sizes": LATENCY}
    for kind, (size, count) in LATENCY.items():
        batches = list(_batches(spread(rows, count), size))
        times = {name: [] for name in methods}
        for batch in [batches[0], *batches]:
            for name, method in methods.items():
                started = time.perf_counter()
                method(batch)
                times[name].append(1000 * (time.perf_counter() - started) / len(batch))
        measured[kind] = {name: round(float(np.median(values[1:])), 4) for name, values in times.items()}
    return measured


def _collect(parts):
    """Batches of [`Retrievers.retrieve`] as one."""
    found = {name: np.concatenate([lists[name] for lists, _ in parts]) for name in parts[0][0]}
    candidates = {
        name: tuple(torch.cat(tensors) for tensors in zip(*(part[name] for _, part in parts), strict=True))
        for name in parts[0][1]
    }
    return found, candidates


def _rescored(candidates, weights):
    return {
        name: rescore(features, products, weights[name], TOP_K).cpu().numpy()
        for name, (products, features) in candidates.items()
    }


def _brief_metrics(ranks):
    rank = np.asarray(ranks)
    is_hit = (rank > 0) & (rank <= 10)
    gain = np.where(is_hit, 1 / np.log2(1 + np.maximum(rank, 1)), 0.0)
    return {"recall@10": round(float(is_hit.mean()), 6), "ndcg@10": round(float(gain.mean()), 6)}


def _batches(rows, size):
    for start in range(0, len(rows), size):
        yield rows.select(range(start, min(start + size, len(rows))))
