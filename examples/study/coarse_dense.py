"""
A coarse SID, and dense ranking of the products inside it, in the manner of GDR (Yuan et al., arXiv 2401.10487): the model
generates the first two tokens, similarity to a query embedding orders what has them.

GDR trains a query encoder; here the query side is the linear map of [`QuerySide`], and products' embeddings stay as they are.
"""

import time

import numpy as np
import torch
from codes import head_and_tail
from query_side import QuerySide, unit_rows
from training import TOP_K, describe_training, fit_model, ranks_of, spread, user_numbers
from training_statistics import METRICS, metrics

from rqsid import SIDTrie
from rqsid.modeling.beam_search import beam_search

RIDGES = (0.01, 0.1, 1.0, 10.0)
WEIGHTS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0)  # of log-probabilities; cosines are below 1
ROWS = 256


def coarse_dense_cell(settings, checkpoint_dir, catalogue, codes, base_codes, embeddings):
    """
    As [`train_cell`], of a model of the coarse SIDs. SIDs and products of `num_beams` beams are ranked by
    `weight * log-probability of the SID + cosine(query, product)`; weight and ridge are the best by NDCG@10 on the arm's
    `weight_rows` validation rows. The epoch is chosen as elsewhere: with products inside a SID by training purchases.

    Returns:
        `dict`: as of [`train_cell`], and `popularity_ranks`, the products inside a SID by training purchases, `dense_ranks`,
        all products by the cosine alone, and `dense`, what was chosen.
    """
    trainer = fit_model(settings, checkpoint_dir, catalogue, codes, embeddings)
    catalog, training = trainer.processing_class.catalog, settings["training"]
    units = unit_rows(embeddings)

    started = time.perf_counter()
    queries = QuerySide(catalogue, units)
    maps = queries.fit(RIDGES)
    validation = spread(catalogue.splits["validation"], settings["arm"]["weight_rows"])
    chosen = _choose(
        catalog, *scored_sids(trainer, validation, training["num_beams"]), validation, queries, maps, units
    )
    fit_seconds = time.perf_counter() - started

    test = spread(catalogue.splits["test"], training["test_rows"])
    labels = catalog.product_rows(test["product"][:])
    started = time.perf_counter()
    sids, scores = scored_sids(trainer, test, training["num_beams"])
    vectors = queries.embed(test, maps[chosen["ridge"]])
    (products,) = rank_inside(catalog, sids, scores, vectors, units, [chosen["weight"]])
    search_seconds = round(time.perf_counter() - started, 2)
    return {
        "item_ranks": ranks_of(products, labels),
        "sid_ranks": ranks_of(sids[:, :TOP_K], catalog.sid_rows(labels)),
        "popularity_ranks": ranks_of(catalog.expand_sids(sids, TOP_K)[0], labels),
        "dense_ranks": ranks_of(rank_all(vectors, units), labels),
        "users": user_numbers(test),
        "groups": head_and_tail(base_codes.codes, base_codes.sizes, catalogue.popularity, labels),
        "search_seconds": search_seconds,
        "dense": chosen | {"seconds": round(fit_seconds, 2)},
        **describe_training(trainer),
        "about": catalogue.describe(),
    }


def scored_sids(trainer, rows, num_beams):
    """
    Returns:
        `tuple[np.ndarray, np.ndarray]`: rows of the SIDs found, the best first, -1 where a list ends, and their log-probabilities.
        Shape of both: (R, num_beams).
    """
    tokenizer, trie = trainer.processing_class, SIDTrie.from_tokenizer(trainer.processing_class)
    prompts = tokenizer.encode_prompts(rows.remove_columns("user").to_list())["input_ids"]
    order = sorted(
        range(len(prompts)), key=lambda at: -len(prompts[at])
    )  # prompts of similar length are hardly padded
    sids, scores = np.full((len(rows), num_beams), -1), np.full((len(rows), num_beams), -np.inf, dtype=np.float32)
    for start in range(0, len(order), ROWS):
        part = order[start : start + ROWS]
        lengths = torch.tensor([len(prompts[at]) for at in part])
        longest = int(lengths.max())
        pad = tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(prompts[at])) + prompts[at] for at in part])
        mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
        found = beam_search(
            trainer.model, *(tensor.to(trainer.model.device) for tensor in (ids, mask)), trie, num_beams, num_beams
        )
        sids[part], scores[part] = (tensor.cpu().numpy() for tensor in found)
    return sids, scores


def rank_inside(catalog, sids, scores, vectors, units, weights):
    """
    Args:
        catalog ([`ProductCatalog`]): Of the coarse SIDs.
        sids, scores (`np.ndarray`): Shape: (R, B). From [`scored_sids`].
        vectors (`np.ndarray`): Shape: (R, D). Of the queries, of length 1.
        units (`np.ndarray`): Shape: (N, D). Of the products, of length 1.
        weights (`list[float]`): Of the log-probabilities.

    Returns:
        `list[np.ndarray]`: for each weight the products of all these SIDs, the best 50 first, -1 where a list ends. Equal ones
        come by the SID's place, then by training purchases. Shape: (R, 50).
    """
    counts = np.append(np.bincount(catalog.sid_rows(np.arange(len(catalog))), minlength=catalog.num_sids), 0)
    ranked = [np.full((len(sids), TOP_K), -1) for _ in weights]
    for start in range(0, len(sids), ROWS):
        part = slice(start, start + ROWS)
        products, places = catalog.expand_sids(sids[part], max(TOP_K, int(counts[sids[part]].sum(1).max())))
        cosines = np.take_along_axis(vectors[part] @ units.T, products, 1)
        found = np.take_along_axis(scores[part], np.maximum(places, 0), 1)
        for weight, into in zip(weights, ranked, strict=True):
            score = np.where(products < 0, -np.inf, weight * found + cosines)
            best = np.argsort(-score, axis=1, kind="stable")[:, :TOP_K]
            into[part] = np.take_along_axis(products, best, 1)
    return ranked


def rank_all(vectors, units):
    """The 50 products of the greatest cosine. Shape: (R, 50)."""
    parts = [torch.from_numpy(vectors[start : start + ROWS] @ units.T) for start in range(0, len(vectors), ROWS)]
    return np.concatenate([torch.topk(part, min(TOP_K, len(units))).indices.numpy() for part in parts])


def _choose(catalog, sids, scores, rows, queries, maps, units):
    """Ridge and weight of the best NDCG@10 on the rows, the first of equals; and what NDCG@10 they and popularity have."""
    labels, at, best = catalog.product_rows(rows["product"][:]), METRICS.index("NDCG@10"), None

    def ndcg(ranked):
        return round(float(metrics(ranks_of(ranked, labels))[:, at].mean()), 6)

    for ridge, matrix in maps.items():
        ranked = rank_inside(catalog, sids, scores, queries.embed(rows, matrix), units, WEIGHTS)
        for weight, products in zip(WEIGHTS, ranked, strict=True):
            found = ndcg(products)
            if best is None or found > best["validation_ndcg@10"]:
                best = {"ridge": ridge, "weight": weight, "validation_ndcg@10": found}
    return best | {"validation_ndcg@10_by_popularity": ndcg(catalog.expand_sids(sids, TOP_K)[0])}
