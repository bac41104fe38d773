"""Variants of training sessions, so that a small model sees few of them twice."""

import numpy as np
from catalogues import MAX_HISTORY


def vary_sessions(sessions, product_ids, neighbours, passes, left_out=0.0, replaced=0.0, inserted=0.0, seed=0):
    """
    Each session once a pass. The purchases of a variant are those of the session but for some that are left out, some replaced
    by a similar product, and similar products behind some of them: what comes next after a product, by its own purchases, those
    of its neighbours, and by likeness.

    Args:
        sessions (`list[dict]`):
            From [`sessions`]: `profile`, `products` and `queries`, all queries empty.
        product_ids (`list[str]`):
            Of the N products.
        neighbours (`np.ndarray`): Shape: (N, M).
            Rows of the products similar to each.
        passes (`int`):
            How many variants of each session.
        left_out, replaced, inserted (`float`, *optional*, defaults to 0.0):
            Probability for each purchase.
        seed (`int`, *optional*, defaults to 0):
            Of the variants.

    Returns:
        `list[dict]`: as `sessions`, at least two purchases in each.

    Raises:
        `ValueError`: if sessions have queries, which would not be those of another product.
    """
    if any(any(session["queries"]) for session in sessions):
        raise ValueError(
            "Sessions with queries cannot be varied: a query is that of one product. Use the next-item task."
        )
    random, row_of = np.random.default_rng(seed), {product: row for row, product in enumerate(product_ids)}
    bought = [np.array([row_of[product] for product in session["products"]]) for session in sessions]
    found = []
    for _ in range(passes):
        for session, rows in zip(sessions, bought, strict=True):
            stays = random.random(len(rows)) >= left_out
            rows = rows[stays] if stays.sum() > 1 else rows
            similar = neighbours[rows, random.integers(neighbours.shape[1], size=len(rows))]
            rows = np.where(random.random(len(rows)) < replaced, similar, rows)
            behind = neighbours[rows, random.integers(neighbours.shape[1], size=len(rows))]
            is_followed = random.random(len(rows)) < inserted
            rows = np.stack([rows, behind], 1)[np.stack([np.ones(len(rows), bool), is_followed], 1)]
            products = [product_ids[row] for row in rows[: MAX_HISTORY + 1]]
            found.append({"profile": session["profile"], "products": products, "queries": [""] * len(products)})
    return found
