"""
A query embedding without a query encoder: a linear map, fitted on the training rows by ridge regression, from the mean embedding of
the history, that of its last product, and the mean of what was bought with the same query, to the embedding of the product bought.
"""

import numpy as np

ROWS = 256


class QuerySide:
    """
    Features of rows, and linear maps from them to embeddings.

    Args:
        catalogue ([`Catalogue`]): Its training rows say what was bought with a query.
        units (`np.ndarray`): Shape: (N, D). Embeddings of the products, of length 1.
    """

    def __init__(self, catalogue, units):
        self.units, self.train = units, catalogue.splits["train"]
        self.row_of = {product: row for row, product in enumerate(catalogue.product_ids)}
        names, numbers = np.unique(np.asarray(self.train["query"][:], dtype=str), return_inverse=True)
        self.number_of = {name: number for number, name in enumerate(names.tolist())}
        bought = self._product_rows(self.train["product"][:])
        self.counts = np.append(np.bincount(numbers), 0)  # the last one for queries that training has not
        self.sums = np.zeros((len(names) + 1, units.shape[1]))
        for start in range(0, len(bought), ROWS):
            np.add.at(self.sums, numbers[start : start + ROWS], units[bought[start : start + ROWS]])

    def features(self, rows, is_training=False):
        """
        Mean of the history, its last product, and the mean of what was bought with the same query in training, of which a
        training row's own purchase is left out; zeros where there is nothing; and a one.

        Args:
            rows (`dict[str, list]`): Columns of a batch.

        Returns:
            `np.ndarray`: Shape: (R, 3 D + 1).
        """
        lengths = np.array([len(history) for history in rows["history"]])
        flat = self._product_rows([product for history in rows["history"] for product in history])
        means, last = np.zeros((2, len(lengths), self.units.shape[1]))
        np.add.at(means, np.repeat(np.arange(len(lengths)), lengths), self.units[flat])
        means /= np.maximum(lengths, 1)[:, None]
        last[lengths > 0] = self.units[flat[np.cumsum(lengths)[lengths > 0] - 1]]
        numbers = [self.number_of.get(query, len(self.counts) - 1) for query in rows["query"]]
        sums, counts = self.sums[numbers], self.counts[numbers]
        if is_training:
            sums, counts = sums - self.units[self._product_rows(rows["product"])], counts - 1
        of_query = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], 0)
        return np.concatenate([means, last, of_query, np.ones((len(lengths), 1))], 1)

    def fit(self, ridges):
        """
        Minimizes the sum over training rows of ||features W - embedding of the product bought||^2 + ridge ||W||^2, in which the
        last row of W, the intercept, does not count.

        Returns:
            `dict[float, np.ndarray]`: W for each ridge. Shape: (3 D + 1, D).
        """
        dim = self.units.shape[1]
        squares, products = np.zeros((3 * dim + 1, 3 * dim + 1)), np.zeros((3 * dim + 1, dim))
        for rows in self.train.select_columns(["history", "query", "product"]).iter(batch_size=ROWS):
            features = self.features(rows, is_training=True)
            squares += features.T @ features
            products += features.T @ self.units[self._product_rows(rows["product"])]
        penalty = np.diag(np.append(np.ones(3 * dim), 0))
        return {ridge: np.linalg.solve(squares + ridge * penalty, products) for ridge in ridges}

    def embed(self, rows, matrix):
        """Of length 1. Shape: (R, D)."""
        columns = rows.select_columns(["history", "query"])
        return unit_rows(np.concatenate([self.features(part) @ matrix for part in columns.iter(batch_size=ROWS)]))

    def _product_rows(self, products):
        return np.array([self.row_of[product] for product in products], dtype=np.int64)


def unit_rows(vectors):
    """float32, of length 1; a row of zeros stays one."""
    return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)).astype(np.float32)
