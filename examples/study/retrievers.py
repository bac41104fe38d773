"""Ways to find products for the same rows: popularity, transitions, a dual tower, a model of SIDs, and both re-scored."""

import numpy as np
import torch
from rescoring import join_candidates, make_features, rescore
from scipy.sparse import csr_matrix
from towers import query_encoder
from training import TOP_K

from rqsid import SIDTrie, search

CANDIDATES = 200  # products that are re-scored; a union has the tower's first 50 besides
HYBRID, UNION = "hybrid", "hybrid, union"
# Without what the other one says, so that a hybrid's gain is not taken for the other's if popularity and history explain it.
SIDS_ALONE, TOWER_ALONE = "SID model, re-scored", "dual tower, re-scored"
RESCORED = (SIDS_ALONE, TOWER_ALONE, HYBRID, UNION)
STEPS, DECAY = 3, 0.5  # of transitions


class Retrievers:
    """
    What is looked up more than once, and the methods. All take R rows of a split, of which none reads the product bought, and
    rank products by their rows in the catalogue, -1 where a list ends.

    Args:
        catalogue ([`Catalogue`]):
            Of N products.
        trainer ([`SIDTrainer`]):
            Of [`fit_model`].
        num_beams (`int`):
            Of the search.
        tower (`SentenceTransformer`), item_embeddings (`np.ndarray`):
            Of [`load_tower`]; the embeddings of shape (N, D).
    """

    def __init__(self, catalogue, trainer, num_beams, tower, item_embeddings):
        self.model, self.tokenizer, self.num_beams = trainer.model.eval(), trainer.processing_class, num_beams
        self.tower, self.encode_queries = tower, query_encoder(tower, catalogue)
        self.items = torch.from_numpy(item_embeddings).to(self.model.device)
        self.row_of = {product: row for row, product in enumerate(catalogue.product_ids)}
        popularity = torch.from_numpy(np.asarray(catalogue.popularity, dtype=np.float32))
        self.log_popularity = popularity.log1p().to(self.model.device)
        # Ties in the order of the catalogue.
        self.by_popularity = np.argsort(-np.asarray(catalogue.popularity), kind="stable")
        is_constructed = catalogue.query_source.startswith("constructed")
        self.categories = np.asarray(catalogue.categories)[self.by_popularity] if is_constructed else None
        self.transitions = self._count_transitions(catalogue.splits["train"])

    def bought(self, rows):
        """The products bought, what rankings are compared with. Shape: (R,)."""
        return self._rows_of(rows["product"][:])

    def by_counts(self, rows):
        """The products with most training purchases. Ties in the order of the catalogue. Shape: (R, 50)."""
        return np.repeat(self._padded(self.by_popularity[None, :TOP_K]), len(rows), 0)

    def by_category(self, rows):
        """As `by_counts`, of the products of the category asked for, where queries are constructed of categories."""
        ranked = np.full((len(rows), TOP_K), -1)
        queries, inverse = np.unique(np.asarray(rows["query"][:], dtype=str), return_inverse=True)
        for at, query in enumerate(queries):
            best = self.by_popularity[self.categories == query][:TOP_K]
            ranked[inverse == at, : len(best)] = best
        return ranked

    def by_transitions(self, rows):
        r"""
        Item-transition kNN: \\(\sum_n 2^{-n} P(\text{product} \mid h_n)\\) for the n-th latest product of the history, from 0. Of
        the transitions from a product those to the next, second and third one bought in training rows count 1, 1/2 and 1/3;
        their shares are P. The query is not read. Ties by popularity. Shape: (R, 50).
        """
        history = self._history(rows["history"][:])
        row, nth = np.nonzero(history >= 0)
        shape = (len(rows), len(self.row_of))
        scores = (csr_matrix((DECAY**nth, (row, history[row, nth])), shape=shape) @ self.transitions).toarray()
        # In the columns' order of popularity a stable sort breaks ties by it.
        order = np.argsort(-scores[:, self.by_popularity], axis=1, kind="stable")[:, :TOP_K]
        return self._padded(self.by_popularity[order])

    def by_tower(self, rows):
        """The products of largest inner product with the query, of all products; ties in no certain order. Shape: (R, 50)."""
        return self._padded(self._nearest(self._embedded(rows), TOP_K).cpu().numpy())

    def by_sids(self, rows):
        """Those of the most probable SIDs; products of one SID by training purchases. Shape: (R, 50)."""
        return self._beams(rows, TOP_K)[0].cpu().numpy()

    def by_rescoring(self, rows, name, weights):
        """The candidates of one of [`RESCORED`], re-scored; only what these need is computed. Shape: (R, 50)."""
        beams = None if name == TOWER_ALONE else self._beams(rows, CANDIDATES)
        queries = None if name == SIDS_ALONE else self._embedded(rows)
        products, features = self._candidates(rows, name, beams, queries)
        return rescore(features, products, weights, TOP_K).cpu().numpy()

    def retrieve(self, rows):
        """
        What all methods but those of [`RESCORED`] find, and what these re-score, of one search.

        Returns:
            `tuple[dict, dict]`: ranked products by method, and products and features (tensors) by method that re-scores.
        """
        beams, queries = self._beams(rows, CANDIDATES), self._embedded(rows)
        found = {name: method(rows) for name, method in self.floors().items()}
        found["dual tower"] = self._padded(self._nearest(queries, TOP_K).cpu().numpy())
        found["SID model"] = beams[0][:, :TOP_K].cpu().numpy()
        return found, {name: self._candidates(rows, name, beams, queries) for name in RESCORED}

    def floors(self):
        """Methods that learn nothing, by name; one of them only where queries are constructed."""
        of_category = {} if self.categories is None else {"popularity in the category": self.by_category}
        return {"popularity": self.by_counts, **of_category, "item-transition kNN": self.by_transitions}

    def memory(self):
        """
        Bytes of what each part keeps in memory between queries: weights as they are, tables, indexes. Tokenizers, titles,
        categories and what a search needs while it runs are not counted.
        """
        columns = self.tokenizer.catalog.columns
        ids = sum(column.nbytes for name, column in columns.items() if name.startswith("product_id"))
        trie = SIDTrie.from_tokenizer(self.tokenizer)
        return {
            "product ids": ids,
            "popularity": self.log_popularity.nbytes,
            "transitions": sum(getattr(self.transitions, name).nbytes for name in ("data", "indices", "indptr")),
            "tower": sum(parameter.nbytes for parameter in self.tower.parameters()),
            "item matrix": self.items.nbytes,
            "SID model": sum(parameter.nbytes for parameter in self.model.parameters()),
            "trie and catalog": trie.nbytes + sum(column.nbytes for column in columns.values()) - ids,
        }

    def _candidates(self, rows, name, beams, queries):
        """What a method does not read is the same for all candidates, and so gets no weight."""
        if name == TOWER_ALONE:
            products = self._nearest(queries, CANDIDATES)
            log_probs = torch.full(products.shape, -torch.inf, device=products.device)
        else:
            products, log_probs = join_candidates(*beams, self._nearest(queries, TOP_K) if name == UNION else None)
        if name == SIDS_ALONE:
            similarities = torch.zeros(products.shape, device=products.device)
        else:
            similarities = torch.einsum("rd,rcd->rc", queries, self.items[products.clamp(min=0)])
        history = torch.from_numpy(self._history(rows["history"][:])).to(products.device)
        return products, make_features(products, log_probs, similarities, self.log_popularity, history)

    def _beams(self, rows, count):
        prompts = rows.remove_columns(["user", "product"]).to_list()
        found = search(self.model, self.tokenizer, prompts, top_k=count, num_beams=self.num_beams)
        products, log_probs = np.full((len(rows), count), -1), np.full((len(rows), count), -np.inf, dtype=np.float32)
        for row, ranked in enumerate(found):
            products[row, : len(ranked)] = self._rows_of([product["product_id"] for product in ranked])
            log_probs[row, : len(ranked)] = [product["score"] for product in ranked]
        return torch.from_numpy(products).to(self.items.device), torch.from_numpy(log_probs).to(self.items.device)

    def _embedded(self, rows):
        return torch.from_numpy(np.asarray(self.encode_queries(rows), dtype=np.float32)).to(self.items.device)

    def _nearest(self, queries, count):
        return (queries @ self.items.T).topk(min(count, len(self.items)), dim=1).indices

    def _history(self, histories):
        """Shape: (R, H), the latest first, -1 behind the oldest."""
        history = np.full((len(histories), max(map(len, histories), default=0) or 1), -1)
        for row, products in enumerate(histories):
            history[row, : len(products)] = self._rows_of(products)[::-1]
        return history

    def _count_transitions(self, train):
        starts, ends, weights = [], [], []
        for rows in train.iter(batch_size=10_000):
            history, bought = self._history(rows["history"]), self._rows_of(rows["product"])
            row, nth = np.nonzero(history[:, :STEPS] >= 0)
            starts.append(history[row, nth])
            ends.append(bought[row])
            weights.append(1 / (1 + nth))
        starts, ends, weights = map(np.concatenate, (starts, ends, weights))
        shape = (len(self.row_of), len(self.row_of))
        totals = np.bincount(starts, weights, minlength=shape[0])
        return csr_matrix((weights / totals[starts], (starts, ends)), shape=shape)

    def _rows_of(self, product_ids):
        return np.fromiter((self.row_of[product] for product in product_ids), np.int64, len(product_ids))

    def _padded(self, ranked):
        return np.pad(ranked, ((0, 0), (0, TOP_K - ranked.shape[1])), constant_values=-1)
