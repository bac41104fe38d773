"""The valid SIDs as a trie in flat arrays, walked and expanded in batches."""

import copy
import os

import numpy as np
import torch

from .trie_building import (
    SIDClash,
    as_tensors,
    build_arrays,
    catalog_chunks,
    edge_layout,
    index_type,
    lexical_order,
    sequence_chunks,
)
from .trie_checks import check_catalog_rows, check_sequences, check_sid_rows, products_to_mask
from .trie_files import read_trie, write_trie
from .trie_subsets import pruned, reordered, stacked

__all__ = ["SIDTrie", "check_catalog_rows"]

# What a trie consists of, see `join_levels`, beside the token of each symbol.
PARTS = ("edges", "indptr", "leaf_rows", "short_leaves", "level_starts")
TENSORS = (
    *("_edges", "_indptr", "_leaf_rows", "_short_leaves", "_level_bounds"),
    *("_symbol_tokens", "_sorted_tokens", "_sorted_symbols"),
)


class SIDTrie:
    """
    The valid SIDs of a catalogue, as a prefix tree over token ids.

    Nodes are numbered breadth first, the roots (one, unless tries were stacked) first of all, so edge `e` always leads to
    node `e + num_roots` and the edges of a node are consecutive: one symbol per edge, and one offset per node above the last
    level, are the whole tree. No SID begins another, so the leaves are the nodes without children. The layout is the one of
    [STATIC](https://github.com/youtube/static-constraint-decoding) (compressed sparse rows), less the child ids, which the
    breadth-first order makes redundant. A *symbol* is the number of a token among those of all SIDs.

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
        num_sids (`int`): Number of leaves, which is the number of SIDs; in a forest, of all its tries together.
        num_nodes (`int`): Number of nodes, the roots included.
        num_roots (`int`): Number of roots, the nodes 0 to `num_roots - 1`; 1 unless tries were stacked.
        level_widths (`list[int]`): At each depth below `depth` the largest number of children of a node.
        level_sizes (`list[int]`): At each depth below `depth` the number of nodes with children, of the root that has most.
        min_token_id, max_token_id (`int`): The smallest and the largest id among the tokens of SIDs.
        catalog_version (`str` or `None`): The `version_id` of the catalog that [`SIDTrie.from_tokenizer`] was given.
        product_mask (`np.ndarray` of bool of shape `(num_products,)`, or `None`): The products that [`SIDTrie.restrict`]
            kept; `None` if all.

    Example:

    ```python
    >>> trie = SIDTrie(torch.tensor([[10, 20, 30], [10, 21, -1]]))
    >>> trie.sid_rows(trie.walk(torch.tensor([[10, 21], [10, 20], [11, 20]])))
    tensor([ 1, -1, -1])
    >>> in_stock = SIDTrie.from_tokenizer(tokenizer).restrict(["B0001", "B0002"])
    ```
    """

    def __init__(self, sequences: torch.Tensor, sid_rows: torch.Tensor | None = None):
        check_sequences(sequences)
        if sid_rows is not None:
            check_sid_rows(sid_rows, sequences.shape[0])
        tokens = sequences.detach().cpu().numpy()
        # By ascending token id, so that the children of a node are, too.
        symbol_tokens = np.unique(tokens[tokens >= 0]).astype(np.int64)
        num_symbols = len(symbol_tokens)
        symbols = np.searchsorted(symbol_tokens, tokens.ravel()).reshape(tokens.shape)
        symbols = np.where(tokens >= 0, symbols, -1).astype(np.int16 if num_symbols <= 2**15 else np.int32)
        order = lexical_order(list(symbols.T), [num_symbols] * symbols.shape[1])
        chunks = sequence_chunks(symbols, order, np.arange(len(tokens)))
        try:
            parts = build_arrays(chunks, symbols.shape[1], len(tokens), num_symbols)
        except SIDClash as clash:
            row, other = clash.row, clash.other
            if (tokens[row] == tokens[other]).all():
                raise ValueError(
                    f"Rows {row} and {other} of `sequences` are the same SID {tokens[row].tolist()}. Give every SID one "
                    f"row; products that share a SID belong into the catalog."
                ) from None
            raise ValueError(
                f"Row {row} of `sequences`, {tokens[row].tolist()}, is a prefix of row {other}, "
                f"{tokens[other].tolist()}. A search could not tell where the shorter one ends: SIDs must be prefix-free, "
                f"which layer-specific tokens and a fixed last layer or suffix ensure."
            ) from None
        if sid_rows is not None:
            rows = sid_rows.detach().cpu().numpy()
            parts["leaf_rows"] = rows.astype(index_type(int(rows.max())))[parts["leaf_rows"]]
        self._set_parts(as_tensors(parts), torch.from_numpy(symbol_tokens))

    @classmethod
    def from_tokenizer(cls, tokenizer, sid_rows: torch.Tensor | None = None) -> "SIDTrie":
        """
        The trie of all or some SIDs of a tokenizer's catalog, without those whose products are all withdrawn.

        The trie of all SIDs is kept in `tokenizer.cache` until the catalog changes, so that asking for it again costs nothing.
        Several threads may ask at once.

        Args:
            tokenizer ([`SIDTokenizer`]):
                The tokenizer, whose `sid_sequences` are the paths.
            sid_rows (`torch.LongTensor` of shape `(num_sids,)`, *optional*, defaults to all):
                The catalog's rows of the SIDs that are kept, each once, in any order. To keep products rather than SIDs, use
                [`SIDTrie.restrict`].

        Returns:
            [`SIDTrie`]: The trie, on the CPU, whose SID rows are the catalog's.

        Raises:
            `TypeError`: if `sid_rows` is no integer tensor.
            `ValueError`: if `sid_rows` is empty, has a negative row, one row twice, or a row beyond the catalog; or if no SID
                is left because all products are withdrawn.
        """
        # The version first: if another thread changes the catalog meanwhile, the trie is taken for older than it is, and
        # built again at the next call. The copy keeps the catalog's columns as they are now.
        version = tokenizer.catalog.version_id
        known, trie = tokenizer.cache.get("sid_trie", (None, None))
        if known != version:
            catalog = copy.copy(tokenizer.catalog)
            columns = catalog.columns
            is_live = columns["sid_offsets"][1:] != columns["sid_offsets"][:-1]
            if not is_live.any():
                raise ValueError(
                    "All products of the catalog are withdrawn: there is no SID left. Append or restore some."
                )
            trie = cls.from_codes(
                columns["sid_codes"],
                tokenizer.layer_token_ids(),
                [*tokenizer.layer_order, columns["sid_codes"].shape[1] - 1],
                columns["sid_order"],
                None if is_live.all() else is_live,
            )
            trie.catalog_version, trie._catalog = version, catalog
            tokenizer.cache["sid_trie"] = version, trie
        if sid_rows is None:
            return trie
        check_sid_rows(sid_rows)
        num_sids = len(trie._catalog.columns["sid_codes"])
        if sid_rows.max() >= num_sids:
            raise ValueError(
                f"`sid_rows` has row {int(sid_rows.max())} but the catalog only {num_sids} SIDs. Pass rows of SIDs, not of "
                f"products: `tokenizer.catalog.sid_rows(product_rows)` translates, and `torch.unique` drops repetitions."
            )
        kept = torch.zeros(num_sids, dtype=torch.bool)
        kept[sid_rows.detach().cpu().long()] = True
        return trie._of_sids(
            kept, "The products of all `sid_rows` are withdrawn: there is no SID left. Pass other rows."
        )

    @classmethod
    def from_codes(
        cls,
        codes: np.ndarray,
        layer_token_ids: list[np.ndarray],
        layer_order: list[int] | None = None,
        sid_order: np.ndarray | None = None,
        keep: np.ndarray | None = None,
    ) -> "SIDTrie":
        """
        Builds a trie from codes, in bounded memory beside them: what [`SIDTrie.from_tokenizer`] does with a catalog.

        The children of a node are ordered by layer, later layers first, and within a layer by code. This is the order in
        which a catalog sorts its SIDs, so that nothing has to be sorted if `layer_order` is ascending.

        Args:
            codes (`np.ndarray` of shape `(num_sids, num_layers)`):
                The codes of each SID, -1 where a layer is absent.
            layer_token_ids (`list[np.ndarray]`):
                Per layer the token id of each code. No two codes may have the same.
            layer_order (`list[int]`, *optional*, defaults to ascending):
                The layers in the order of a SID's tokens.
            sid_order (`np.ndarray` of shape `(num_sids,)`, *optional*):
                The rows of `codes` in lexical order, absent codes first, if they do not come in it. If this is not the order
                needed, they are sorted.
            keep (`np.ndarray` of bool of shape `(num_sids,)`, *optional*, defaults to all):
                The rows that become part of the trie. The leaves hold positions in `codes` in any case.

        Returns:
            [`SIDTrie`]

        Raises:
            `ValueError`: if shapes do not fit, a code has no token, two codes have one token, a SID has no code, no SID is
                left, or SIDs are not prefix-free.
        """
        num_layers = len(layer_token_ids)
        layer_order = list(range(num_layers)) if layer_order is None else list(layer_order)
        if codes.ndim != 2 or codes.shape[1] != num_layers or sorted(layer_order) != list(range(num_layers)):
            raise ValueError(
                f"`codes` of shape {codes.shape} and `layer_order` {layer_order} do not fit token ids of {num_layers} layers."
            )
        if len(codes) == 0 or (keep is not None and not keep.any()):
            raise ValueError("There is no SID to build a trie of: it would forbid every token.")
        sizes = [len(layer_token_ids[layer]) for layer in layer_order]
        symbol_starts = (np.cumsum(sizes[::-1])[::-1] - sizes).tolist()
        symbol_tokens = np.concatenate([layer_token_ids[layer] for layer in reversed(layer_order)])
        if len(np.unique(symbol_tokens)) < len(symbol_tokens):
            raise ValueError("`layer_token_ids` has one token for two codes: SIDs could not be told apart.")

        def build(order):
            chunks = catalog_chunks(codes, order, keep, layer_order, symbol_starts, sizes)
            return build_arrays(chunks, num_layers, len(codes), len(symbol_tokens))

        try:
            parts = build(sid_order)
            if parts is None:
                rows = np.arange(len(codes)) if keep is None else np.flatnonzero(keep)
                kept = codes if keep is None else codes[rows]
                order = lexical_order([kept[:, layer] for layer in layer_order], sizes)
                parts = build(order if keep is None else rows[order])
        except SIDClash as clash:
            row, other = (codes[at][layer_order].tolist() for at in (clash.row, clash.other))
            raise ValueError(
                f"The SID of row {clash.row}, codes {row}, is a prefix of or equal to that of row {clash.other}, codes "
                f"{other}. A search could not tell where the shorter one ends: every SID needs a code of the last layer or "
                f"a suffix, and each SID one row."
            ) from None
        trie = object.__new__(cls)
        trie._set_parts(as_tensors(parts), torch.from_numpy(symbol_tokens))
        return trie

    @classmethod
    def stack(cls, tries: list["SIDTrie"]) -> "SIDTrie":
        """
        Puts tries side by side, so that each row of a batch can have one of its own.

        Args:
            tries (`list[SIDTrie]`):
                Tries on one device, of any depth. The same trie may occur more than once, and takes its place each time.

        Returns:
            [`SIDTrie`]: A forest in which the root of the i-th trie is node i (tries with several roots take as many nodes).
            It has neither a `product_mask` nor a catalog: restrict tries before they are stacked.

        Raises:
            `TypeError`: if `tries` holds something else.
            `ValueError`: if there is none, or they lie on different devices.
        """
        tries = list(tries)
        kinds = sorted({type(trie).__name__ for trie in tries if not isinstance(trie, SIDTrie)})
        if kinds:
            raise TypeError(f"`tries` must be a list of `SIDTrie`, got a list with {kinds[0]}.")
        if not tries:
            raise ValueError("There is no trie to stack.")
        devices = sorted({str(trie.device) for trie in tries})
        if len(devices) > 1:
            raise ValueError(f"The tries lie on different devices, {', '.join(devices)}: move them with `to` first.")
        symbol_tokens = tries[0]._symbol_tokens
        parts = [
            {name: getattr(trie, "_" + name) for name in PARTS}
            | {"level_widths": trie.level_widths, "level_sizes": trie.level_sizes}
            for trie in tries
        ]
        if any(not torch.equal(trie._symbol_tokens, symbol_tokens) for trie in tries):
            symbol_tokens = torch.cat([trie._symbol_tokens for trie in tries]).unique()
            for trie, own in zip(tries, parts, strict=True):
                new_symbols = torch.searchsorted(symbol_tokens, trie._symbol_tokens)
                symbols = new_symbols[trie._edges.long() + trie._symbol_shift]
                own |= reordered(*(own[name] for name in PARTS), symbols, len(symbol_tokens))
        forest = object.__new__(cls)
        forest._set_parts(stacked(parts), symbol_tokens)
        versions = {trie.catalog_version for trie in tries}
        forest.catalog_version = versions.pop() if len(versions) == 1 else None
        return forest

    def restrict(self, products) -> "SIDTrie":
        """
        The trie of the SIDs of some products, for instance of those in stock or of a category.

        Args:
            products (`list[str]`, or `np.ndarray` or `torch.Tensor` of bool of shape `(num_products,)`):
                Ids of the products to keep, or a mask over the products that the catalog had when the trie was built. Products
                appended since are unknown to it. A mask is much faster than many ids.

        Returns:
            [`SIDTrie`]: The trie, on the same device. Its `product_mask` tells which products were kept, those of an earlier
            `restrict` only where both keep them, so that of the products that share a SID the others are left out of lists.

        Raises:
            `TypeError`: if `products` is neither ids nor a mask.
            `ValueError`: if a product is unknown, the mask has another length, no product is left that is in the trie and not
                withdrawn, or the trie knows no products because it was not made by [`SIDTrie.from_tokenizer`].
        """
        if self._catalog is None:
            raise ValueError(
                "This trie knows no products: it was stacked, made of sequences or codes, or loaded without a tokenizer. "
                "Restrict one of `SIDTrie.from_tokenizer(tokenizer)` or `SIDTrie.load(path, tokenizer)`, before stacking."
            )
        mask = products_to_mask(self._catalog, products)
        if self.product_mask is not None:
            mask &= self.product_mask
        columns = self._catalog.columns
        kept = np.zeros(len(columns["sid_codes"]), dtype=bool)
        kept[columns["product_sids"][mask & ~columns["product_withdrawn"]]] = True
        trie = self._of_sids(
            torch.from_numpy(kept),
            f"None of the {int(mask.sum())} products that `products` keeps is in the trie and not withdrawn: there is no SID "
            f"left, and a trie without SIDs would forbid every token.",
        )
        mask.flags.writeable = False
        trie.product_mask = mask
        return trie

    def save(self, path) -> None:
        """
        Writes the trie into one safetensors file, whole or not at all.

        Args:
            path (`str`): File name, by convention `sid_trie.safetensors`.
        """
        arrays = {name: getattr(self, "_" + name) for name in (*PARTS, "symbol_tokens") if name != "level_starts"}
        if self.product_mask is not None:
            arrays["product_mask"] = torch.from_numpy(self.product_mask.copy())
        write_trie(
            path,
            arrays,
            {
                "level_starts": self._level_starts,
                "level_widths": self.level_widths,
                "level_sizes": self.level_sizes,
                "catalog_version": self.catalog_version,
            },
        )

    @classmethod
    def load(cls, path, tokenizer=None) -> "SIDTrie":
        """
        Opens a file of [`SIDTrie.save`], memory-mapped, after checking that nothing in it points outside.

        Args:
            path (`str`): The file.
            tokenizer ([`SIDTokenizer`], *optional*):
                The tokenizer that the trie belongs to, which [`SIDTrie.restrict`] needs.

        Returns:
            [`SIDTrie`]: The trie, on the CPU.

        Raises:
            `ValueError`: if the file is truncated or damaged, was written by another format version, or belongs to another
                version of the tokenizer's catalog, or to a tokenizer with other SID tokens.
        """
        catalog = None if tokenizer is None else copy.copy(tokenizer.catalog)
        arrays, numbers = read_trie(path, catalog)
        mask = arrays.pop("product_mask", None)
        symbol_tokens = arrays.pop("symbol_tokens")
        if tokenizer is not None:
            known = torch.from_numpy(np.concatenate(tokenizer.layer_token_ids()))
            strangers = symbol_tokens[~torch.isin(symbol_tokens, known)]
            if len(strangers):
                raise ValueError(
                    f"{os.path.basename(path)} spells SIDs with the token {int(strangers[0])}, which is no SID token of the tokenizer: "
                    "it belongs to another, or was edited. Build it again with `SIDTrie.from_tokenizer(tokenizer)`."
                )
        trie = object.__new__(cls)
        trie._set_parts(arrays | numbers, symbol_tokens)
        trie.catalog_version, trie._catalog = numbers["catalog_version"], catalog
        if mask is not None:
            trie.product_mask = mask.numpy()
        return trie

    @property
    def tokens(self) -> torch.Tensor:
        """The ids of the tokens that SIDs are made of, ascending, whether or not an edge has them."""
        return self._sorted_tokens

    @property
    def device(self) -> torch.device:
        return self._indptr.device

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(getattr(self, name).nbytes for name in TENSORS)

    def to(self, device: torch.device | str) -> "SIDTrie":
        """
        Returns the trie on `device`: itself if it is there. A copy is kept for the next call, one per device; the original
        stays where it is.
        """
        device = torch.device(device)
        if device == self.device:
            return self
        if device not in self._copies:
            trie = copy.copy(self)
            for name in TENSORS:
                setattr(trie, name, getattr(self, name).to(device))
            if trie.device == self.device:  # "cuda" is "cuda:0"
                return self
            self._copies[device] = trie
        return self._copies[device]

    def children(
        self, nodes: torch.Tensor, width: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Lists the children of nodes, in an order that is the same at every call: ascending by token id in a trie of
        sequences, by layer (later ones first) and code in one of a tokenizer.

        Args:
            nodes (`torch.Tensor` of any shape `(...)`): Node ids; -1 and leaves have no children.
            width (`int`, *optional*):
                C. `level_widths[depth]` holds all children of all nodes at a depth; further children are left out. With it
                nothing is read back from an accelerator, so that the call can be compiled and captured.

        Returns:
            `tuple(torch.Tensor)` of three tensors of shape `(..., C)`, with C `width` or else the largest number of
            children among `nodes` and at least 1: token ids (int64, 0 where there is no child), child nodes (int64, -1
            where there is no child) and whether there is a child (bool).
        """
        start, stop = self._edges_of(nodes)
        counts = stop - start
        if width is None:
            width = max(int(counts.max()), 1) if counts.numel() else 1
        offsets = torch.arange(width, device=self.device)
        mask = offsets < counts[..., None]
        edges = torch.where(mask, start[..., None] + offsets, 0)
        tokens = self._symbol_tokens[self._edges[edges].long() + self._symbol_shift]
        return torch.where(mask, tokens, 0), torch.where(mask, edges + self.num_roots, -1), mask

    def walk(self, token_ids: torch.Tensor, roots: torch.Tensor | None = None) -> torch.Tensor:
        """
        Follows sequences of tokens from a root, by binary search among the children of each node.

        Args:
            token_ids (`torch.Tensor` of shape `(R, T)`): Token ids; negative ids are padding and are skipped.
            roots (`torch.Tensor` of shape `(R,)`, *optional*, defaults to node 0 for all):
                The node that each row begins at.

        Returns:
            `torch.Tensor` of shape `(R,)`: The node each row ends at (int64), -1 where it leaves the trie.

        Raises:
            `ValueError`: if `token_ids` is not two-dimensional, or `roots` are not one for each of its rows.
        """
        if token_ids.dim() != 2:
            raise ValueError(f"`token_ids` must have the shape (rows, tokens), got {tuple(token_ids.shape)}.")
        if roots is None:
            nodes = torch.zeros(token_ids.shape[0], dtype=torch.int64, device=self.device)
        elif roots.shape != token_ids.shape[:1]:
            raise ValueError(
                f"`roots` must be one node for each of the {token_ids.shape[0]} rows, got {tuple(roots.shape)}."
            )
        else:
            nodes = roots.long()
        token_ids = token_ids.long().contiguous()
        at = torch.searchsorted(self._sorted_tokens, token_ids).clamp(max=len(self._sorted_tokens) - 1)
        # What no edge holds, where the token is none of a SID.
        symbols = torch.where(self._sorted_tokens[at] == token_ids, self._sorted_symbols[at], 2**32)
        for column in range(token_ids.shape[1]):
            wanted = symbols[:, column]
            inside = nodes.clamp(0, len(self._indptr) - 2)
            before, last = self._indptr[inside].long() - 1, self._indptr[inside + 1].long() - 1
            # `at` goes on to the last edge whose symbol is not larger. No list of children is longer than all steps together.
            at = before
            for step in self._search_steps:
                ahead = torch.minimum(at + step, last)
                at = torch.where(self._edges[ahead] <= wanted, ahead, at)
            found = (nodes == inside) & (at > before) & (self._edges[at.clamp(min=0)] == wanted)
            nodes = torch.where(token_ids[:, column] < 0, nodes, torch.where(found, at + self.num_roots, -1))
        return nodes

    def sid_rows(self, nodes: torch.Tensor) -> torch.Tensor:
        """
        Args:
            nodes (`torch.Tensor` of any shape): Node ids, -1 for none.

        Returns:
            `torch.Tensor` of the same shape: The row, in the catalog, of the SID that ends at each node (int64), -1 for
            inner nodes.
        """
        # Leaves of the last level stand behind the short ones, one by one.
        num_short = len(self._short_leaves)
        at = nodes - (self._level_starts[-2] - num_short)
        if num_short:
            short = torch.searchsorted(self._short_leaves, nodes.to(self._short_leaves.dtype).contiguous())
            at = torch.where(nodes < self._level_starts[-2], short, at)
        rows = self._leaf_rows[at.clamp(0, len(self._leaf_rows) - 1)].long()
        return torch.where(self.is_leaf(nodes), rows, -1)

    def is_leaf(self, nodes: torch.Tensor) -> torch.Tensor:
        """
        Args:
            nodes (`torch.Tensor` of any shape): Node ids, -1 for none.

        Returns:
            `torch.Tensor` of the same shape: Whether a SID ends at each node (bool).
        """
        start, stop = self._edges_of(nodes)
        return (nodes >= 0) & (start == stop)

    def node_depths(self, nodes: torch.Tensor) -> torch.Tensor:
        """
        Args:
            nodes (`torch.Tensor` of any shape): Node ids.

        Returns:
            `torch.Tensor` of the same shape: The number of tokens that lead to each node (int64), 0 for a root.
        """
        return torch.bucketize(nodes, self._level_bounds, right=True) - 1

    def __getstate__(self):
        return {**self.__dict__, "_copies": {}}

    def __repr__(self):
        roots = f", {self.num_roots} roots" if self.num_roots > 1 else ""
        return f"SIDTrie({self.num_sids} SIDs, depth {self.depth}{roots}, on {self.device})"

    def _edges_of(self, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """First edge and the one behind the last, of each node; an empty interval for node -1 and leaves."""
        inside = nodes.clamp(0, len(self._indptr) - 2)
        start = self._indptr[inside].long()
        return start, torch.where(nodes == inside, self._indptr[inside + 1].long(), start)

    def _of_sids(self, kept: torch.Tensor, message: str) -> "SIDTrie":
        """The trie of the SIDs whose rows `kept` marks, or a `ValueError` with `message` if there is none."""
        keep = kept.to(self.device).index_select(0, self._leaf_rows)
        if not keep.any():
            raise ValueError(message)
        trie = copy.copy(self)
        trie._set_parts(pruned(*(getattr(self, "_" + name) for name in PARTS), keep), self._symbol_tokens)
        trie.catalog_version, trie._catalog, trie.product_mask = (
            self.catalog_version,
            self._catalog,
            self.product_mask,
        )
        return trie

    def _set_parts(self, parts: dict, symbol_tokens: torch.Tensor) -> None:
        for name in PARTS:
            setattr(self, "_" + name, parts[name])
        self._level_bounds = torch.tensor(self._level_starts, device=self.device)
        self._symbol_tokens = symbol_tokens
        _, self._symbol_shift = edge_layout(len(symbol_tokens))
        self._sorted_tokens, symbols = symbol_tokens.sort()
        self._sorted_symbols = symbols - self._symbol_shift
        self.min_token_id, self.max_token_id = int(self._sorted_tokens[0]), int(self._sorted_tokens[-1])
        self.num_roots, self.num_nodes = self._level_starts[1], self._level_starts[-1]
        self.depth = len(self._level_starts) - 2
        self.num_sids = len(self._leaf_rows)
        self.level_widths, self.level_sizes = parts["level_widths"], parts["level_sizes"]
        self._search_steps = [2**power for power in reversed(range(max(self.level_widths).bit_length()))]
        self.catalog_version = self.product_mask = self._catalog = None
        self._copies = {}
