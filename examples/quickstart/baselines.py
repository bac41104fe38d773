"""What a generative model has to beat: popularity, the household's habits, and the dual tower's own nearest products.

Every baseline returns one list of product ids a row, best first, without repetitions and of at most `top_k`.
"""

from itertools import chain

import numpy as np


def most_popular(examples, purchases, top_k=50):
    """
    The products bought most often in the training period, the same for every row; ties in the order of the catalogue.

    Args:
        examples (`datasets.Dataset`):
            Rows to answer.
        purchases ([`Purchases`]):
            Catalogue and counts.
        top_k (`int`, *optional*, defaults to 50):
            Length of the lists.

    Returns:
        `list[list[str]]`
    """
    ranking = np.argsort(-purchases.popularity, kind="stable")[:top_k]
    product_ids = purchases.products.select(ranking)["product_id"][:]
    return [product_ids[:] for _ in range(len(examples))]


def most_popular_for_query(examples, purchases, top_k=50):
    """
    The products of the query's type, by purchases in the training period; ties in the order of the catalogue.

    Nothing is filled up: a type with fewer products gives a shorter list, a query that is no product's type an empty
    one.

    Args:
        examples (`datasets.Dataset`):
            Rows to answer; `query` is read.
        purchases ([`Purchases`]):
            Catalogue and counts.
        top_k (`int`, *optional*, defaults to 50):
            Longest list.

    Returns:
        `list[list[str]]`
    """
    candidates = _products_of_query(examples, purchases)
    return _product_ids(candidates[:, :top_k], purchases)


def household_frequent_for_query(examples, purchases, top_k=50):
    """
    The products of the query's type by how often the household itself bought them; ties, and so everything that it
    never bought, by popularity in the training period.

    A product's frequency is its number of purchases by the household in the training period, plus one where the row's
    history holds it. Only what is known before the basket counts, provided that the rows lie after the training
    period: the counts of a training row would hold its own target. What a household bought between the training
    period and the basket is known through the history only, as it is to the model.

    Args:
        examples (`datasets.Dataset`):
            Rows of the validation or test period; `household`, `history` and `query` are read.
        purchases ([`Purchases`]):
            Catalogue and counts.
        top_k (`int`, *optional*, defaults to 50):
            Longest list.

    Returns:
        `list[list[str]]`

    Raises:
        ValueError: a history has a product that the catalogue lacks.
    """
    candidates = _products_of_query(examples, purchases)
    num_products = len(purchases.products)

    counts = purchases.household_counts
    households, code = np.unique(counts["household"].to_numpy(str), return_inverse=True)
    keys = code * num_products + counts["product_row"].to_numpy()
    order = np.argsort(keys)
    keys, count = keys[order], counts["count"].to_numpy()[order]

    asked = np.asarray(examples["household"][:], dtype=str)
    asked_code = np.searchsorted(households, asked).clip(max=len(households) - 1)
    # Negative keys match nothing: a household without purchases in training.
    asked_code = np.where(households[asked_code] == asked, asked_code, -1)
    wanted = asked_code[:, None] * num_products + candidates
    found = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    frequency = np.where(keys[found] == wanted, count[found], 0)

    history = examples["history"][:]
    rows = np.arange(len(history))
    product_row = {product: row for row, product in enumerate(purchases.products["product_id"][:])}
    unknown = set(chain.from_iterable(history)) - product_row.keys()
    if unknown:
        raise ValueError(f"{len(unknown)} products of histories are not in the catalogue, such as {min(unknown)!r}")
    bought = np.fromiter((product_row[product] for product in chain.from_iterable(history)), np.int64)
    bought_keys = np.repeat(rows, [len(products) for products in history]) * num_products + bought
    frequency = frequency + np.isin(rows[:, None] * num_products + candidates, bought_keys)

    # The candidates come by popularity, so a stable sort leaves ties in that order; padding goes last.
    ranking = np.argsort(np.where(candidates < 0, 1, -frequency), axis=1, kind="stable")[:, :top_k]
    return _product_ids(np.take_along_axis(candidates, ranking, axis=1), purchases)


def dual_tower_top_k(query_embeddings, product_embeddings, product_ids, top_k=50, batch_size=256):
    """
    The products of largest inner product with the query, exactly; ties in the order of the catalogue.

    Args:
        query_embeddings (`np.ndarray` of shape `(B, D)`):
            One row a query.
        product_embeddings (`np.ndarray` of shape `(N, D)`):
            One row a product.
        product_ids (sequence of `str`, of length `N`):
            Ids of the products.
        top_k (`int`, *optional*, defaults to 50):
            Length of the lists.
        batch_size (`int`, *optional*, defaults to 256):
            Queries at a time; `batch_size * N` scores are held at once.

    Returns:
        `list[list[str]]`

    Raises:
        ValueError: the shapes do not fit together.
    """
    product_ids = np.asarray(product_ids[:], dtype=object)
    if query_embeddings.ndim != 2 or query_embeddings.shape[1:] != product_embeddings.shape[1:]:
        raise ValueError(
            f"query embeddings of shape {query_embeddings.shape} and product embeddings of shape "
            f"{product_embeddings.shape} have no inner product; both must come from the same model"
        )
    if len(product_ids) != len(product_embeddings):
        raise ValueError(f"{len(product_ids)} product ids for {len(product_embeddings)} product embeddings")
    top_k = min(top_k, len(product_ids))
    ranked = []
    for start in range(0, len(query_embeddings), batch_size):
        scores = query_embeddings[start : start + batch_size] @ product_embeddings.T
        # The k-th largest score bounds what can be in the answer; sorting only that keeps ties exact and cheap.
        kth = np.partition(scores, -top_k, axis=1)[:, -top_k]
        for row, bound in zip(scores, kth, strict=True):
            near = np.flatnonzero(row >= bound)
            ranked.append(product_ids[near[np.argsort(-row[near], kind="stable")[:top_k]]].tolist())
    return ranked


def _products_of_query(examples, purchases):
    """Rows of the products of each query's type, most popular first, right-padded with -1: `(B, C)`."""
    types, type_code = np.unique(np.asarray(purchases.products["type"][:], dtype=str), return_inverse=True)
    by_type = np.lexsort((-purchases.popularity, type_code))
    size = np.bincount(type_code, minlength=len(types))
    start = np.cumsum(size) - size

    query = np.asarray(examples["query"][:], dtype=str)
    code = np.searchsorted(types, query).clip(max=len(types) - 1)
    size = np.where(types[code] == query, size[code], 0)
    nth = np.arange(max(size.max(initial=0), 1))
    rows = by_type[(start[code][:, None] + nth).clip(max=len(by_type) - 1)]
    return np.where(nth < size[:, None], rows, -1)


def _product_ids(product_rows, purchases):
    """Lists of product ids from rows right-padded with -1."""
    product_ids = np.asarray(purchases.products["product_id"][:], dtype=object)
    ids = product_ids[product_rows]
    return [row[:length].tolist() for row, length in zip(ids, (product_rows >= 0).sum(axis=1), strict=True)]
