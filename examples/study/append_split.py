"""Which products a model must not know, the data without them, and the rows that have to do with them."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
from datasets import Dataset


def draw(num_products, share, seed):
    """Rows of the products that are appended, ascending."""
    return np.sort(np.random.default_rng(seed).permutation(num_products)[: max(1, round(share * num_products))])


def without(catalogue, left_out):
    """
    A catalogue that does not know some products: neither as products, nor in histories or as what is bought in training and
    validation rows, nor in sequences and popularity. Histories are shorter by them. Test rows stay as they are, for after
    they were appended.

    Args:
        catalogue ([`Catalogue`]): Of N products.
        left_out (`np.ndarray`): Rows of products.

    Returns:
        [`Catalogue`]
    """
    is_kept = np.ones(len(catalogue.product_ids), dtype=bool)
    is_kept[left_out] = False
    new_rows, kept = np.cumsum(is_kept) - 1, np.flatnonzero(is_kept)
    known = {catalogue.product_ids[row] for row in kept}
    is_chosen = {
        name: np.array([product in known for product in catalogue.splits[name]["product"]], dtype=bool)
        for name in ("train", "validation")
    }
    sequences, has_row = [], []
    for sequence in catalogue.sequences:
        bought = sequence[:-2] if len(sequence) > 2 else sequence
        stays = is_kept[bought]
        # The first purchase of a user is in no training row: what becomes the first loses its row.
        has_row.append(stays[1:] & (np.cumsum(stays)[:-1] > 0))
        if stays.any():
            # -1 for the purchases of the validation and the test row, which are no part of training.
            sequences.append(np.append(new_rows[bought[stays]], [-1, -1]))
    if catalogue.sequences:
        is_chosen["train"] = np.concatenate(has_row)
    splits = {name: _known_only(catalogue.splits[name], known, chosen) for name, chosen in is_chosen.items()}
    columns = {
        name: [getattr(catalogue, name)[row] for row in kept]
        for name in ("product_ids", "titles", "texts", "categories")
    }
    has_log = catalogue.purchases is not None
    purchases = SimpleNamespace(popularity=np.asarray(catalogue.popularity)[kept]) if has_log else None
    splits["test"] = catalogue.splits["test"]
    return replace(catalogue, splits=splits, sequences=sequences, purchases=purchases, index_files=[], **columns)


def _known_only(rows, known, is_chosen):
    columns = rows.select(np.flatnonzero(is_chosen))[:]
    columns["history"] = [[product for product in history if product in known] for history in columns["history"]]
    return Dataset.from_dict(columns, features=rows.features)


def row_kinds(rows, appended):
    """A letter for each row of a split; see [`append_cell`]."""
    return "".join(
        "a" if product in appended else "s" if appended.isdisjoint(history) else "h"
        for product, history in zip(rows["product"], rows["history"], strict=True)
    )
