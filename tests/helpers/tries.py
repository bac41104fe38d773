"""Tries as dictionaries, and the little of a tokenizer that a trie is built from."""

from itertools import product

import numpy as np
import torch

from rqsid import SIDTokenizer


def matrix(sids):
    """Token ids, -1 behind the end of a SID."""
    depth = max(map(len, sids))
    return torch.tensor([list(sid) + [-1] * (depth - len(sid)) for sid in sids])


def paths_of(trie, root=0):
    """The SIDs that a search could reach through `children`, and their rows."""
    nodes, paths, found = torch.tensor([root]), [()], {}
    for depth in range(trie.depth + 1):
        assert trie.node_depths(nodes).tolist() == [depth] * len(nodes)
        rows, leaves = trie.sid_rows(nodes).tolist(), trie.is_leaf(nodes).tolist()
        tokens, children, mask = trie.children(nodes)
        below = []
        for at, path in enumerate(paths):
            assert leaves[at] == (not mask[at].any()) == (rows[at] >= 0)
            if leaves[at]:
                found[path] = rows[at]
            here = zip(tokens[at].tolist(), children[at].tolist(), mask[at].tolist(), strict=True)
            below += [((*path, token), child) for token, child, is_child in here if is_child]
        if not below:
            break
        paths, nodes = [path for path, _ in below], torch.tensor([child for _, child in below])
    assert len(set(found)) == len(found) and not below
    return found


def check_trie(trie, expected, root=0):
    """
    Compares a trie, or one root of a forest, with the dictionary of its SIDs and rows: all paths by `children` and by
    `walk`, and paths that leave the trie everywhere.
    """
    assert paths_of(trie, root) == expected
    prefixes = sorted({sid[:length] for sid in expected for length in range(len(sid) + 1)})
    roots = torch.full((len(prefixes),), root)
    padded = matrix([*prefixes, (0,) * trie.depth])[:-1]
    nodes = trie.walk(padded, roots)
    assert (nodes >= 0).all() and len(nodes.unique()) == len(prefixes)
    assert trie.sid_rows(nodes).tolist() == [expected.get(prefix, -1) for prefix in prefixes]
    near = sorted({token + shift for sid in expected for token in sid for shift in (-1, 0, 1)} | {0, 2**31, 2**40})
    known = set(prefixes)
    # Of many, some.
    step = max(1, len(prefixes) * len(near) // 5000)
    outside = [(*prefix, token) for prefix, token in list(product(prefixes, near))[::step] if token >= 0]
    outside = [path for path in outside if path not in known]
    assert (trie.walk(matrix(outside), torch.full((len(outside),), root)) == -1).all()


def check_levels(trie, expected):
    """The counts by which a search sizes its tensors, of a trie with one root."""
    children = {}
    for sid in expected:
        for length in range(len(sid)):
            children.setdefault(length, {}).setdefault(sid[:length], set()).add(sid[length])
    assert trie.depth == max(map(len, expected)) and trie.num_sids == len(expected)
    assert trie.level_widths == [max(map(len, children[depth].values())) for depth in range(trie.depth)]
    assert trie.level_sizes == [len(children[depth]) for depth in range(trie.depth)]
    assert trie.num_nodes == 1 + sum(len(tokens) for level in children.values() for tokens in level.values())


class CatalogTokens:
    """A catalog with token ids, without text: `layer_token_ids` in any order, `layer_order` any."""

    def __init__(self, catalog, layer_order=None, seed=None):
        self.catalog, self.cache = catalog, {}
        self.layer_order = list(range(catalog.num_layers)) if layer_order is None else list(layer_order)
        sizes = [*catalog.codebook_sizes, catalog.suffix_size]
        ids = 40 + np.arange(sum(sizes))
        if seed is not None:
            # As reuse_tokens finds them: anywhere in the vocabulary, and not ascending by code.
            ids = np.random.default_rng(seed).choice(10 * sum(sizes), sum(sizes), replace=False)
        self._layer_token_ids = np.split(ids, np.cumsum(sizes)[:-1])

    def layer_token_ids(self):
        return self._layer_token_ids

    @property
    def max_sid_length(self):
        return int(self.catalog.lengths().max())

    def sid_sequences(self, sid_rows=None):
        return SIDTokenizer.sid_sequences(self, sid_rows)

    def sids(self, sid_rows):
        """`{tokens: row}` of rows of the catalog."""
        sid_rows = np.asarray(sid_rows)
        rows = self.sid_sequences(sid_rows).tolist()
        return {tuple(t for t in row if t >= 0): int(at) for row, at in zip(rows, sid_rows, strict=True)}
