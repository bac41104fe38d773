"""What needs no model: the most popular products, and what followed the purchases of the history in training."""

import numpy as np
from joint_embeddings import training_purchases, transitions
from scipy.sparse import csr_matrix
from training import TOP_K

CHUNK = 1000
DECAYS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
KNN_RULE = (
    "item-transition kNN: the score of a product is how often it was bought directly after a product of the history in training, "
    "summed over the history with weight decay^age (age 0: the last purchase); decay by validation rows; equal scores by training "
    "purchases; products of the history left out"
)


def rank_by_popularity(catalogue, rows, with_history=False):
    """The most bought in training, without products of the history by default. Shape: (R, 50), -1 where a list ends."""
    return _ranked(np.zeros((1, len(catalogue.product_ids))), catalogue, rows, with_history)


def rank_by_transitions(catalogue, rows, decay, with_history=False):
    """
    Args:
        catalogue ([`Catalogue`]):
            Of N products, with sequences.
        rows (`Dataset`):
            Of R rows of one of its splits.
        decay (`float`):
            What each place further back in the history counts.
        with_history (`bool`, *optional*, defaults to `False`):
            Whether products of the history are ranked, too.

    Returns:
        `np.ndarray`: rows of the products found, see `KNN_RULE`; -1 where a list ends. Shape: (R, 50).
    """
    followed = transitions(training_purchases(catalogue), len(catalogue.product_ids))
    histories, row_of = rows["history"][:], {product: row for row, product in enumerate(catalogue.product_ids)}
    lengths = [len(history) for history in histories]
    weights = np.concatenate([decay ** np.arange(length)[::-1] for length in lengths])
    columns = np.array([row_of[product] for history in histories for product in history], dtype=int)
    shape = (len(histories), len(row_of))
    return _ranked(
        csr_matrix((weights, (np.repeat(np.arange(len(histories)), lengths), columns)), shape) @ followed,
        catalogue,
        rows,
        with_history,
    )


def leave_out_history(products, catalogue, rows):
    """
    Args:
        products (`np.ndarray`): Shape: (R, k). Rows of products, best first, -1 where a list ends.
        catalogue ([`Catalogue`]):
            That they are of.
        rows (`Dataset`):
            What was ranked for.

    Returns:
        `np.ndarray`: the same lists without what the row's history holds; what stood behind moves up. Shape: (R, k).
    """
    row_of, kept = {product: row for row, product in enumerate(catalogue.product_ids)}, np.full_like(products, -1)
    for at, history in enumerate(rows["history"][:]):
        ranked = products[at][~np.isin(products[at], [row_of[product] for product in history])]
        kept[at, : len(ranked)] = ranked
    return kept


def _ranked(scores, catalogue, rows, with_history):
    """Best first; equal scores by training purchases, then in the order of the catalogue."""
    popularity = np.asarray(catalogue.popularity, dtype=float)
    histories, row_of = rows["history"][:], {product: row for row, product in enumerate(catalogue.product_ids)}
    ranked = []
    for start in range(0, len(histories), CHUNK):
        some = scores[start : start + CHUNK] if scores.shape[0] > 1 else scores
        some = np.asarray(some.todense() if hasattr(some, "todense") else some, dtype=float)
        part = histories[start : start + CHUNK]
        some = np.broadcast_to(some, (len(part), some.shape[1])) + popularity * (1e-9 / popularity.max())
        for at, history in enumerate(part if not with_history else ()):
            some[at, [row_of[product] for product in history]] = -1
        order = np.argsort(-some, axis=1, kind="stable")[:, :TOP_K]
        ranked.append(np.where(np.take_along_axis(some, order, 1) < 0, -1, order))
    return np.concatenate(ranked)
