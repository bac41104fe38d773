"""A floor for products without purchases: the nearest in the space of text embeddings, without any training."""

import numpy as np
from training import TOP_K
from training_statistics import METRICS, metrics

LATEST = (1, 5, 20)  # products of a history that count
CHUNK = 500


def text_only(catalogue, embeddings, validation, test):
    """
    Ranks products by the cosine of their embedding with the mean of the latest products of the history; and, where queries
    are constructed of categories, those of the category asked for before all others. How many products of the history count,
    and whether these themselves are ranked, is chosen by NDCG@10 on validation rows. Ties keep the order of the catalogue.

    Args:
        catalogue ([`Catalogue`]): Of N products.
        embeddings (`np.ndarray`): Shape: (N, D).
        validation, test (`Dataset`): Rows of splits.

    Returns:
        `dict[str, dict]`: by `"history"` and perhaps `"history and category"` the `ranks` of what was bought in the test rows,
        0 beyond 50, and what was chosen: `latest`, `ranks_history`.
    """
    points = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    row_of = {product: row for row, product in enumerate(catalogue.product_ids)}
    by_category = [False, True] if catalogue.query_source.startswith("constructed") else [False]
    categories, at, found = np.array(catalogue.categories, dtype=object), METRICS.index("NDCG@10"), {}
    for in_category in by_category:
        options = [(latest, ranks_history) for latest in LATEST for ranks_history in (True, False)]
        asked = categories if in_category else None
        scores = [
            metrics(nearest_ranks(points, row_of, validation, asked, *option))[:, at].mean() for option in options
        ]
        latest, ranks_history = options[int(np.argmax(scores))]
        found["history and category" if in_category else "history"] = {
            "ranks": nearest_ranks(points, row_of, test, asked, latest, ranks_history),
            "latest": latest,
            "ranks_history": ranks_history,
        }
    return found


def nearest_ranks(points, row_of, rows, categories, latest, ranks_history):
    """
    Args:
        points (`np.ndarray`): Shape: (N, D). Of length 1.
        row_of (`dict[str, int]`): Row of each product.
        rows (`Dataset`): R rows of a split.
        categories (`np.ndarray` or `None`): Shape: (N,). Those that equal the query come first, if given.
        latest (`int`): Products of the history whose mean is compared.
        ranks_history (`bool`): Whether the products of the history are ranked.

    Returns:
        `list[int]`: the rank of what was bought, 0 beyond 50.
    """
    wanted = np.array([row_of[product] for product in rows["product"]])
    histories = [np.array([row_of[product] for product in history], dtype=int) for history in rows["history"]]
    queries, ranks = np.array(rows["query"][:], dtype=object), []
    for start in range(0, len(wanted), CHUNK):
        part = histories[start : start + CHUNK]
        means = np.stack([points[history[-latest:]].mean(0) if len(history) else 0 * points[0] for history in part])
        means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
        scores = means @ points.T
        if categories is not None:
            asked = queries[start : start + CHUNK]
            # A cosine is at most 1, so that 3 puts the category before all others.
            scores += 3 * ((categories[None] == asked[:, None]) & (asked != "")[:, None])
        if not ranks_history:
            for row, history in enumerate(part):
                scores[row, history] = -np.inf
        targets = wanted[start : start + CHUNK, None]
        own = np.take_along_axis(scores, targets, axis=1)
        before = (scores > own) | ((scores == own) & (np.arange(len(points)) < targets))
        rank = before.sum(1) + 1
        ranks += np.where((rank <= TOP_K) & np.isfinite(own[:, 0]), rank, 0).tolist()
    return ranks
