"""Identifiers that are no codes of residual k-means: atomic ones, and those of hierarchical k-means."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cells import cell_hash
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from rqsid.sid_tokenizer.files import replace_atomically


@dataclass
class PlainCodes:
    """
    Codes without codebooks, for what takes [`Codes`]; rows of their tokens start from noise.

    Args:
        codes (`np.ndarray` of int32): Shape: (N, L).
        sizes (`list[int]`): codes of each layer.
        quantizer (*optional*): none.
    """

    codes: np.ndarray
    sizes: list[int]
    quantizer: object = None


def atomic_codes(num_products):
    """One layer, in which each product has a code of its own (DSI, Tay et al., arXiv 2202.06991, its atomic identifiers)."""
    return PlainCodes(np.arange(num_products, dtype=np.int32)[:, None], [num_products])


def hierarchical_codes(embeddings, popularity, layers, seed):
    """
    Codes as NCI's (Wang et al., arXiv 2206.02743): k-means of all products, then of those within each cluster. A code is the
    number of the cluster within its parent, so that the same code of two parents has nothing in common; the last one numbers
    the products of a leaf, by training purchases. Each product has an identifier of its own.

    NCI stops to split where a cluster is small; here all identifiers have the same length, and k is the least with which
    balanced clusters would leave at most k products in a leaf. They are not balanced: the last layer is as large as the largest leaf.

    Args:
        embeddings (`np.ndarray`): Shape: (N, D).
        popularity (`np.ndarray`): Shape: (N,).
        layers (`int`): Tokens of an identifier, from 2.
        seed (`int`): Of k-means.

    Returns:
        [`PlainCodes`]
    """
    num_clusters = int(np.ceil(len(embeddings) ** (1 / layers) - 1e-9))
    codes, leaves = np.zeros((len(embeddings), layers), dtype=np.int32), [np.arange(len(embeddings))]
    for layer in range(layers - 1):
        parents, leaves = leaves, []
        for rows in parents:
            labels = _cluster(embeddings[rows], num_clusters, seed)
            codes[rows, layer] = labels
            leaves += [rows[labels == label] for label in np.unique(labels)]
    for rows in leaves:
        codes[rows[np.argsort(-np.asarray(popularity)[rows], kind="stable")], -1] = np.arange(len(rows))
    return PlainCodes(codes, [num_clusters] * (layers - 1) + [int(codes[:, -1].max()) + 1])


def kept_hierarchical_codes(catalogue, embeddings, described, out, layers, seed):
    """As [`hierarchical_codes`], made once and kept beside the codebooks: a cell that goes on must find the same ones."""
    settings = {"data": catalogue.settings(), "embeddings": described, "layers": layers, "seed": seed}
    path = Path(out) / "codes" / f"hierarchical-{cell_hash(settings)}.npy"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = hierarchical_codes(embeddings, catalogue.popularity, layers, seed)
        with replace_atomically(path) as temporary, open(temporary, "wb") as file:
            np.save(file, np.vstack([made.codes, made.sizes]).astype(np.int32), allow_pickle=False)
    kept = np.load(path, allow_pickle=False)
    return PlainCodes(kept[:-1], kept[-1].tolist())


def _cluster(points, num_clusters, seed):
    """Labels of at most `num_clusters` clusters; equal points have equal ones."""
    if len(points) <= num_clusters:
        return np.unique(points, axis=0, return_inverse=True)[1].reshape(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters: some stay empty
        return KMeans(num_clusters, random_state=seed, n_init=1).fit_predict(points)
