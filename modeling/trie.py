"""The set of valid SIDs as a trie in flat arrays, walked and expanded in batches."""

import copy

import numpy as np
import torch


class SIDTrie:
    """
    The valid SIDs of a catalogue, as a prefix tree over token ids.

    Nodes are numbered breadth first and the children of a node by ascending token id, so edge `e` always leads to node
    `e + 1` and the edges of a node are consecutive: one token per edge and one offset per node are the whole tree. The
    layout is the one of [STATIC](https://github.com/youtube/static-constraint-decoding) (compressed sparse rows), less
    the child ids, which the breadth-first order makes redundant.

    A trie never changes once it is built, and nothing about a walk is kept in it.

    Args:
        sequences (`torch.Tensor` of shape `(num_sids, depth)`):
            Token ids of the SIDs, one row per SID, padded with -1 on the right. No row may be a prefix of another.
        sid_rows (`torch.LongTensor` of shape `(num_sids,)`, *optional*, defaults to the positions in `sequences`):
            The catalog's row of each SID, which is what the leaves hold. The default is right only where `sequences`
            are all SIDs of a catalog in its order: for a subset use [`SIDTrie.from_tokenizer`].

    Raises:
        `TypeError`: if `sequences` or `sid_rows` is no integer tensor.
        `ValueError`: if `sequences` is empty, has a token after a -1, holds a SID twice, or a SID that is the prefix of
            another; if `sid_rows` has another length, a negative row or one row twice.

    Attributes:
        depth (`int`): Number of tokens of the longest SID.
        num_sids (`int`): Number of SIDs, which is the number of leaves.
        num_nodes (`int`): Number of nodes, the root (node 0) included.
        max_token_id (`int`): The largest token id on any edge.
        catalog_version (`str` or `None`): The `version_id` of the catalog that [`SIDTrie.from_tokenizer`] was given.

    Example:

    ```python
    >>> trie = SIDTrie(torch.tensor([[10, 20, 30], [10, 21, -1]]))
    >>> trie.sid_rows(trie.walk(torch.tensor([[10, 21], [10, 20], [11, 20]])))
    tensor([ 1, -1, -1])
    >>> in_stock = SIDTrie.from_tokenizer(tokenizer, torch.tensor([4, 17, 256]))
    ```
    """

    def __init__(self, sequences: torch.Tensor, sid_rows: torch.Tensor | None = None):
        if not isinstance(sequences, torch.Tensor):
            raise TypeError(f"`sequences` must be a tensor of token ids, got {type(sequences).__name__}.")
        if sequences.is_floating_point() or sequences.is_complex() or sequences.dtype == torch.bool:
            raise TypeError(f"`sequences` must hold integers, got {sequences.dtype}.")
        if sequences.dim() != 2 or sequences.numel() == 0:
            raise ValueError(
                f"`sequences` must have the shape (num_sids, depth) with at least one SID and one token, got "
                f"{tuple(sequences.shape)}. A trie without SIDs would forbid every token."
            )
        if sid_rows is not None:
            _check_sid_rows(sid_rows, sequences.shape[0])

        # 1. order the SIDs lexicographically; an absent token sorts first, so a prefix stands right before its extension
        tokens = sequences.detach().cpu().numpy()
        present = tokens >= 0
        if tokens.min() < -1:
            raise ValueError(f"Token ids must be non-negative (-1 pads), got {tokens.min()}.")
        misplaced = ~present[:, 0] | (present[:, 1:] & ~present[:, :-1]).any(axis=1)
        if misplaced.any():
            row = int(misplaced.argmax())
            raise ValueError(
                f"Row {row} of `sequences`, {tokens[row].tolist()}, starts with -1 or has a token after a -1. -1 may "
                f"only pad on the right: drop absent layers before stacking the rows."
            )
        self.catalog_version = None
        self.max_token_id = int(tokens.max())
        first_token_id = int(tokens.min(where=present, initial=self.max_token_id))
        codes = np.where(present, tokens.astype(np.int64) - (first_token_id - 1), 0)
        lengths = present.sum(axis=1)
        order = _lexical_order(codes, self.max_token_id - first_token_id + 2)
        codes, lengths = codes[order], lengths[order]

        # 2. level by level, a row opens a new edge where its prefix differs from the row before
        num_sids = len(codes)
        self.num_sids = num_sids
        self.depth = int(lengths.max())
        opens_edge = np.zeros(num_sids, dtype=bool)
        opens_edge[0] = True
        nodes = np.zeros(num_sids, dtype=np.int64)
        level_start, level_size = 0, 1
        token_type = np.int16 if self.max_token_id - first_token_id <= np.iinfo(np.int16).max else np.int32
        leaf_rows = order if sid_rows is None else sid_rows.detach().cpu().numpy()[order]
        row_type = np.int32 if leaf_rows.max() <= np.iinfo(np.int32).max else np.int64
        level_starts, edge_tokens, child_counts, node_rows = [0], [], [], [np.array([-1], dtype=row_type)]
        for column in range(self.depth):
            opens_edge[1:] |= codes[1:, column] != codes[:-1, column]
            is_last = lengths == column + 1
            clash = is_last[:-1] & ~opens_edge[1:]
            if clash.any():
                at = int(clash.argmax())
                row, other = int(order[at]), int(order[at + 1])
                if lengths[at] == lengths[at + 1]:
                    raise ValueError(
                        f"Rows {row} and {other} of `sequences` are the same SID {tokens[row].tolist()}. Give every "
                        f"SID one row; products that share a SID belong into the catalog."
                    )
                raise ValueError(
                    f"Row {row} of `sequences`, {tokens[row].tolist()}, is a prefix of row {other}, "
                    f"{tokens[other].tolist()}. A search could not tell where the shorter one ends: SIDs must be "
                    f"prefix-free, which layer-specific tokens and a fixed last layer or suffix ensure."
                )
            is_edge = opens_edge & (codes[:, column] > 0)
            edge_tokens.append((codes[is_edge, column] - 1).astype(token_type))
            child_counts.append(np.bincount(nodes[is_edge] - level_start, minlength=level_size))
            level_start += level_size
            level_size = len(edge_tokens[-1])
            level_starts.append(level_start)
            # Rows that ended at an earlier level get a meaningless node here; they open no edge, so it is never read.
            nodes = level_start - 1 + np.cumsum(is_edge)
            rows = np.full(level_size, -1, dtype=row_type)
            rows[nodes[is_last] - level_start] = leaf_rows[is_last]
            node_rows.append(rows)

        # 3. offsets in the narrowest type that holds them
        self.num_nodes = level_start + level_size
        counts = np.concatenate([*child_counts, np.zeros(level_size, dtype=np.int64)])
        indptr = np.zeros(self.num_nodes + 1, dtype=np.int64)
        np.cumsum(counts, out=indptr[1:])
        if self.num_nodes <= np.iinfo(np.int32).max:
            indptr = indptr.astype(np.int32)
        self._first_token_id = first_token_id
        # Halving that many times leaves nothing of the longest list of children.
        self._search_steps = int(counts.max()).bit_length()
        self._edge_tokens = torch.from_numpy(np.concatenate(edge_tokens))
        self._indptr = torch.from_numpy(indptr)
        self._node_rows = torch.from_numpy(np.concatenate(node_rows))
        self._level_starts = torch.tensor(level_starts)

    @classmethod
    def from_tokenizer(cls, tokenizer, sid_rows: torch.Tensor | None = None) -> "SIDTrie":
        """
        Builds the trie of all or some SIDs of a tokenizer's catalog.

        Args:
            tokenizer ([`SIDTokenizer`]):
                The tokenizer, whose `sid_sequences` become the paths.
            sid_rows (`torch.LongTensor` of shape `(num_sids,)`, *optional*, defaults to all):
                The catalog's rows of the SIDs that are kept, each once, in any order. SIDs whose products are all withdrawn
                are left out.

        Returns:
            [`SIDTrie`]: The trie, on the CPU, whose SID rows are the catalog's.

        Raises:
            `TypeError`: if `sid_rows` is no integer tensor.
            `ValueError`: if `sid_rows` is empty, has a negative row, one row twice, or a row beyond the catalog; or if no SID
                is left because all products are withdrawn.
        """
        catalog = tokenizer.catalog
        live_rows = torch.from_numpy(catalog.live_sid_rows())
        if len(live_rows) == 0:
            raise ValueError(
                "All products of the catalog are withdrawn: there is no SID left. Append or restore some."
            )
        if sid_rows is None:
            sid_rows = live_rows
        else:
            _check_sid_rows(sid_rows)
            if sid_rows.max() >= catalog.num_sids:
                raise ValueError(
                    f"`sid_rows` has row {int(sid_rows.max())} but the catalog only {catalog.num_sids} SIDs. Pass rows of SIDs, "
                    f"not of products: `tokenizer.catalog.sid_rows(product_rows)` translates, and `torch.unique` drops "
                    f"repetitions."
                )
            sid_rows = sid_rows.detach().cpu()
            sid_rows = sid_rows[torch.isin(sid_rows, live_rows)]
            if len(sid_rows) == 0:
                raise ValueError(
                    "The products of all `sid_rows` are withdrawn: there is no SID left. Pass other rows."
                )
        trie = cls(tokenizer.sid_sequences(sid_rows.numpy()), sid_rows)
        trie.catalog_version = catalog.version_id
        return trie

    @property
    def device(self) -> torch.device:
        return self._indptr.device

    def to(self, device: torch.device | str) -> "SIDTrie":
        """
        Returns the trie on `device`. The original stays where it is; tensors already there are shared.
        """
        trie = copy.copy(self)
        for name in ("_edge_tokens", "_indptr", "_node_rows", "_level_starts"):
            setattr(trie, name, getattr(self, name).to(device))
        return trie

    def children(self, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Lists the children of nodes.

        Args:
            nodes (`torch.Tensor` of any shape `(...)`): Node ids; -1 and leaves have no children.

        Returns:
            `tuple(torch.Tensor)` of three tensors of shape `(..., C)`, with C the largest number of children among
            `nodes` and at least 1: token ids ascending (int64, 0 where there is no child), child nodes (int64, -1
            where there is no child) and whether there is a child (bool).
        """
        start, stop = self._edges_of(nodes)
        counts = stop - start
        width = max(int(counts.max()), 1) if counts.numel() else 1
        offsets = torch.arange(width, device=self.device)
        mask = offsets < counts[..., None]
        edges = torch.where(mask, start[..., None] + offsets, 0)
        tokens = torch.where(mask, self._edge_tokens[edges].long() + self._first_token_id, 0)
        return tokens, torch.where(mask, edges + 1, -1), mask

    def walk(self, token_ids: torch.Tensor) -> torch.Tensor:
        """
        Follows sequences of tokens from the root, by binary search among the sorted children of each node.

        Args:
            token_ids (`torch.Tensor` of shape `(R, T)`): Token ids; negative ids are padding and are skipped.

        Returns:
            `torch.Tensor` of shape `(R,)`: The node each row ends at (int64), -1 where it leaves the trie.

        Raises:
            `ValueError`: if `token_ids` is not two-dimensional.
        """
        if token_ids.dim() != 2:
            raise ValueError(f"`token_ids` must have the shape (rows, tokens), got {tuple(token_ids.shape)}.")
        nodes = torch.zeros(token_ids.shape[0], dtype=torch.int64, device=self.device)
        last_edge = len(self._edge_tokens) - 1
        for column in range(token_ids.shape[1]):
            tokens = token_ids[:, column].long()
            wanted = tokens - self._first_token_id
            low, high = self._edges_of(nodes)
            stop = high
            for _ in range(self._search_steps):
                middle = (low + high) // 2
                # An empty interval may lie behind the last edge; it stays as it is, whatever is read for it.
                goes_right = (low < high) & (self._edge_tokens[middle.clamp(max=last_edge)] < wanted)
                low, high = torch.where(goes_right, middle + 1, low), torch.where(goes_right, high, middle)
            found = (low < stop) & (self._edge_tokens[low.clamp(max=last_edge)] == wanted)
            nodes = torch.where(tokens < 0, nodes, torch.where(found, low + 1, -1))
        return nodes

    def sid_rows(self, nodes: torch.Tensor) -> torch.Tensor:
        """
        Args:
            nodes (`torch.Tensor` of any shape): Node ids, -1 for none.

        Returns:
            `torch.Tensor` of the same shape: The row, in the catalog, of the SID that ends at each node (int64), -1 for
            inner nodes.
        """
        return torch.where(nodes < 0, -1, self._node_rows[nodes.clamp(min=0)].long())

    def is_leaf(self, nodes: torch.Tensor) -> torch.Tensor:
        """
        Args:
            nodes (`torch.Tensor` of any shape): Node ids, -1 for none.

        Returns:
            `torch.Tensor` of the same shape: Whether a SID ends at each node (bool).
        """
        return (nodes >= 0) & (self._node_rows[nodes.clamp(min=0)] >= 0)

    def node_depths(self, nodes: torch.Tensor) -> torch.Tensor:
        """
        Args:
            nodes (`torch.Tensor` of any shape): Node ids.

        Returns:
            `torch.Tensor` of the same shape: The number of tokens that lead to each node (int64), 0 for the root.
        """
        return torch.bucketize(nodes, self._level_starts, right=True) - 1

    def _edges_of(self, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """First edge and the one behind the last, of each node; an empty interval for node -1."""
        inside = nodes.clamp(min=0)
        start = self._indptr[inside].long()
        return start, torch.where(nodes < 0, start, self._indptr[inside + 1].long())


def check_catalog_rows(trie: SIDTrie, tokenizer, sid_rows: torch.Tensor) -> None:
    """
    Checks that SIDs found in a trie are the catalog's SIDs of the same rows.

    Args:
        trie ([`SIDTrie`]): The trie that `sid_rows` were read from.
        tokenizer ([`SIDTokenizer`]): The tokenizer with the catalog.
        sid_rows (`torch.Tensor` of any shape): SID rows; -1 for none.

    Raises:
        `ValueError`: if the trie has another path for a row than the catalog, or the catalog has no such row.
    """
    rows = sid_rows[sid_rows >= 0].unique().cpu()
    wrong = rows >= tokenizer.catalog.num_sids
    if not wrong.any():
        paths = tokenizer.sid_sequences(rows.numpy()).to(trie.device)
        wrong = trie.sid_rows(trie.walk(paths)).cpu() != rows
    if wrong.any():
        raise ValueError(
            f"The trie's SID of row {int(rows[wrong][0])} is not the SID that the catalog has in this row, so that wrong "
            f"products would be returned. Build the trie of a subset with `SIDTrie.from_tokenizer(tokenizer, sid_rows)`, "
            f"from this tokenizer."
        )


def _check_sid_rows(sid_rows: torch.Tensor, num_sids: int | None = None) -> None:
    if not isinstance(sid_rows, torch.Tensor):
        raise TypeError(
            f"`sid_rows` must be a tensor of the catalog's SID rows, got {type(sid_rows).__name__}: `torch.tensor(rows)`."
        )
    if sid_rows.is_floating_point() or sid_rows.is_complex() or sid_rows.dtype == torch.bool:
        raise TypeError(
            f"`sid_rows` must hold integers, got {sid_rows.dtype}. Of a boolean mask take `mask.nonzero()[:, 0]`."
        )
    if sid_rows.dim() != 1 or len(sid_rows) == 0 or num_sids not in (None, len(sid_rows)):
        raise ValueError(
            f"`sid_rows` must have the shape ({'num_sids' if num_sids is None else num_sids},) with at least one row, got "
            f"{tuple(sid_rows.shape)}. A trie without SIDs would forbid every token."
        )
    if sid_rows.min() < 0:
        raise ValueError(f"`sid_rows` must be rows of the catalog, 0 or more, got {int(sid_rows.min())}.")
    ascending = sid_rows.sort().values
    repeated = ascending[1:][ascending[1:] == ascending[:-1]]
    if len(repeated):
        raise ValueError(
            f"`sid_rows` holds row {int(repeated[0])} more than once. A SID needs one row only, also if several products "
            f"share it: pass `torch.unique(sid_rows)`."
        )


def _lexical_order(codes: np.ndarray, num_symbols: int) -> np.ndarray:
    """Order of the rows of `codes` (`(num_sids, depth)`, values in `[0, num_symbols)`), first column first."""
    depth = codes.shape[1]
    if num_symbols**depth >= 2**63:
        return np.lexsort(codes.T[::-1])
    keys = codes[:, 0].copy()
    for column in range(1, depth):
        keys *= num_symbols
        keys += codes[:, column]
    return np.argsort(keys, kind="stable")
