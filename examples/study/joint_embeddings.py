"""Embeddings that know both what products are called and what was bought together, from training purchases alone."""

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.linalg import svds

CHUNK = 1000


def training_purchases(catalogue):
    """Rows of the products that each user bought before the validation row. A list of `np.ndarray`."""
    return [sequence[:-2] if len(sequence) > 2 else sequence for sequence in catalogue.sequences]


def transitions(sequences, num_products, window=1):
    """
    Args:
        sequences (`list[np.ndarray]`):
            Rows of products, in the order of time.
        num_products (`int`):
            N.
        window (`int`, *optional*, defaults to 1):
            How many places apart two purchases may be.

    Returns:
        `scipy.sparse.csr_matrix`: how often the column's product was bought after the row's. Shape: (N, N).
    """
    first, second = [], []
    for distance in range(1, window + 1):
        first += [sequence[:-distance] for sequence in sequences]
        second += [sequence[distance:] for sequence in sequences]
    first, second = np.concatenate(first), np.concatenate(second)
    return coo_matrix((np.ones(len(first)), (first, second)), shape=(num_products, num_products)).tocsr()


def collaborative_vectors(sequences, num_products, window, dim, smoothing=0.75, seed=0):
    """
    Truncated SVD of positive pointwise mutual information (Levy and Goldberg 2014), each side with the root of the singular
    values; frequencies of contexts smoothed as there.

    Args:
        sequences (`list[np.ndarray]`):
            Rows of products.
        num_products (`int`):
            N.
        window, dim (`int`):
            How many places apart two purchases count as bought together, and D.
        smoothing (`float`, *optional*, defaults to 0.75):
            Exponent of the contexts' frequencies.
        seed (`int`, *optional*, defaults to 0):
            Of the vector that the decomposition starts from.

    Returns:
        `np.ndarray`: rows of length 1, or 0 where a product was bought with no other. Shape: (N, D).
    """
    together = transitions(sequences, num_products, window)
    together = (together + together.T).tocoo()
    of_row = np.asarray(together.sum(1)).ravel()
    of_column = np.asarray(together.sum(0)).ravel() ** smoothing
    information = np.log(together.data * of_column.sum() / (of_row[together.row] * of_column[together.col]))
    is_positive = information > 0
    places = together.row[is_positive], together.col[is_positive]
    matrix = coo_matrix((information[is_positive], places), shape=together.shape).tocsr()
    start = np.random.default_rng(seed).standard_normal(num_products)
    vectors, values, _ = svds(matrix, k=dim, v0=start)
    return _unit(vectors * np.sqrt(values))


def joint_embeddings(texts, collaborative, text_weight):
    """
    Args:
        texts (`np.ndarray`): Shape: (N, E). Embeddings of the products' texts.
        collaborative (`np.ndarray`): Shape: (N, D).
        text_weight (`float`): Length of the first part; the second has 1.

    Returns:
        `np.ndarray`: float32. Shape: (N, E + D).
    """
    return np.hstack([text_weight * _unit(texts - texts.mean(0)), collaborative]).astype(np.float32)


def neighbours(embeddings, count):
    """The `count` most similar other products by cosine, the nearest first. Shape: (N, count)."""
    unit, found = _unit(embeddings), []
    for start in range(0, len(unit), CHUNK):
        similarity = unit[start : start + CHUNK] @ unit.T
        rows = np.arange(len(similarity))
        similarity[rows, start + rows] = -np.inf
        found.append(np.argsort(-similarity, axis=1, kind="stable")[:, :count])
    return np.concatenate(found)


def _unit(vectors):
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
