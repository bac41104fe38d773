"""The table between products and SIDs, in columns that can be memory-mapped."""

import numpy as np
import torch

from .checks import check_codes
from .files import read_tensors, write_tensors
from .pruning import TokenPruning
from .strings import check_product_ids, hash_rows, pack_strings, search_strings, unpack_strings

FORMAT_VERSION = 1
COLUMNS = (
    "product_id_bytes",  # uint8 [total]: the UTF-8 of all product ids, end to end
    "product_id_offsets",  # int64 [N + 1]: where each id begins
    "product_id_hashes",  # int64 [N]: hashes of the ids, ascending
    "product_id_order",  # int32/int64 [N]: the product row of each hash
    "text_bytes",  # uint8 [total]: texts for display, as the ids
    "text_offsets",  # int64 [N + 1]
    "product_codes",  # int16/int32 [N, L]: the quantizer's codes, before pruning
    "product_sids",  # int32/int64 [N]: the SID row of each product
    "popularity",  # float64 [N]
    "sid_codes",  # int16/int32 [S, L + 1]: codes of each SID, -1 where absent; the last column is the suffix, -1 for none
    "sid_offsets",  # int64 [S + 1]: where the products of each SID begin in sid_products
    "sid_products",  # int32/int64 [N]: product rows, grouped by SID, most popular first
)


class ProductCatalog:
    r"""
    Which product has which SID, and which products share one.

    Build one with [`ProductCatalog.build`], or read one with [`ProductCatalog.load`]. A *product row* is a position in
    `product_ids` as given to `build`; a *SID row* is a position in `sid_codes`. All columns are numpy arrays (of a loaded
    catalog: memory-mapped), all methods take and give batches.

    Attributes:
        codebook_sizes (`list[int]`): codes of each layer.
        pruning ([`TokenPruning`]): the rule by which SIDs were shortened.
        suffix_size (`int`): number of suffix tokens that break collisions; 0 if products may share a SID.
        sid_codes (`np.ndarray`): Shape: (S, L + 1). -1 where a layer is absent; the last column is the suffix.
        popularity (`np.ndarray`): Shape: (N,).
    """

    def __init__(self, columns, codebook_sizes, pruning, suffix_size):
        self.columns = columns
        self.codebook_sizes = list(codebook_sizes)
        self.pruning = pruning
        self.suffix_size = suffix_size
        self._sid_index = None

    @classmethod
    def build(
        cls,
        product_ids,
        codes,
        codebook_sizes,
        pruning=None,
        popularity=None,
        texts=None,
        collisions="share",
        suffix_size=None,
    ):
        """
        Args:
            product_ids (`list[str]`):
                N distinct, non-empty ids.
            codes (`np.ndarray` or `torch.Tensor`): Shape: (N, L).
                The quantizer's codes, in the order of `product_ids`, not pruned.
            codebook_sizes (`list[int]`):
                Codes of each layer.
            pruning ([`TokenPruning`], *optional*):
                A fitted rule that shortens SIDs; none if not given.
            popularity (`np.ndarray`, *optional*): Shape: (N,).
                Orders the products that share a SID, most popular first, for instance training purchases. Ties and
                a missing popularity keep the order of `product_ids`.
            texts (`list[str]`, *optional*):
                A text of each product for display.
            collisions (`str`, *optional*, defaults to `"share"`):
                `"share"`: products of one SID share it. `"suffix"`: every product of such a group gets a suffix token
                `<x_0>`, `<x_1>`, … in order of popularity, which makes all SIDs distinct.
            suffix_size (`int`, *optional*):
                Suffix tokens to reserve with `"suffix"`; the largest group, and at least 16, if not given.

        Returns:
            [`ProductCatalog`]

        Raises:
            `TypeError`: if a product id is not a string.
            `ValueError`: for duplicate or empty ids, columns of unequal length, codes outside the codebooks, a pruning
                fitted on other codebooks, or too few suffixes.
        """
        check_product_ids(product_ids)
        num_products = len(product_ids)
        codes = codes.cpu().numpy() if isinstance(codes, torch.Tensor) else np.asarray(codes)
        if pruning is None:
            pruning = TokenPruning("none").fit(codes, codebook_sizes)
        if pruning.codebook_sizes is not None and pruning.codebook_sizes != [int(size) for size in codebook_sizes]:
            raise ValueError(
                f"The pruning was fitted on codebooks {pruning.codebook_sizes}, these codes have {list(codebook_sizes)}. "
                "Fit the pruning on the codes of this catalog."
            )
        check_codes(codes, codebook_sizes)
        for name, column in (("codes", codes), ("popularity", popularity), ("texts", texts)):
            if column is not None and len(column) != num_products:
                raise ValueError(f"{name} has {len(column)} rows for {num_products} product ids: one row per product.")
        popularity = np.zeros(num_products) if popularity is None else np.array(popularity, dtype=np.float64)
        if popularity.ndim != 1 or not np.isfinite(popularity).all():
            raise ValueError("popularity must be one finite number per product.")
        if collisions not in ("share", "suffix"):
            raise ValueError(f'collisions={collisions!r} is unknown; choose "share" or "suffix".')
        if suffix_size is not None and collisions != "suffix":
            raise ValueError(f'suffix_size={suffix_size} needs collisions="suffix".')

        # 1. group products by SID, most popular first (lexsort is stable and its last key counts first)
        sids = np.concatenate([pruning.apply(codes), np.full((num_products, 1), -1, dtype=np.int32)], axis=1)
        group, rank = _group(sids, popularity)
        if collisions == "suffix":
            largest = int(np.bincount(group).max())
            suffix_size = max(16, largest) if suffix_size is None else suffix_size
            if largest > suffix_size:
                raise ValueError(
                    f"{largest} products share one SID, but only {suffix_size} suffixes are reserved. Raise suffix_size, "
                    "or quantize with more codes or layers."
                )
            in_collision = np.bincount(group)[group] > 1
            sids[in_collision, -1] = rank[in_collision]
            group, rank = _group(sids, popularity)

        # 2. columns
        product_width = np.int32 if num_products < 2**31 else np.int64
        code_width = np.int16 if max([*codebook_sizes, suffix_size or 0]) < 2**15 else np.int32
        grouped = np.lexsort((rank, group))
        first = grouped[rank[grouped] == 0]
        id_bytes, id_offsets = pack_strings(product_ids)
        text_bytes, text_offsets = pack_strings(texts if texts is not None else [""] * num_products)
        hashes = hash_rows(id_bytes, id_offsets)
        order = np.argsort(hashes, kind="stable")
        columns = {
            "product_id_bytes": id_bytes,
            "product_id_offsets": id_offsets,
            "product_id_hashes": hashes[order],
            "product_id_order": order.astype(product_width),
            "text_bytes": text_bytes,
            "text_offsets": text_offsets,
            "product_codes": codes.astype(code_width),
            "product_sids": group.astype(product_width),
            "popularity": popularity,
            "sid_codes": sids[first].astype(code_width),
            "sid_offsets": np.concatenate(([0], np.cumsum(np.bincount(group)))).astype(np.int64),
            "sid_products": grouped.astype(product_width),
        }
        return cls(columns, [int(size) for size in codebook_sizes], pruning, suffix_size or 0)

    def __getstate__(self):
        # What is made on first use stays out, so that a catalog has the same hash before and after.
        return {**self.__dict__, "_sid_index": None}

    def __len__(self):
        return len(self.columns["product_sids"])

    @property
    def num_sids(self):
        """S, the number of distinct SIDs."""
        return len(self.columns["sid_codes"])

    @property
    def num_layers(self):
        """L, dropped layers included."""
        return len(self.codebook_sizes)

    @property
    def sid_codes(self):
        return self.columns["sid_codes"]

    @property
    def popularity(self):
        return self.columns["popularity"]

    @property
    def codes(self):
        """The quantizer's codes of all products, before pruning. Shape: (N, L)."""
        return self.columns["product_codes"]

    def product_rows(self, product_ids):
        """
        Args:
            product_ids (`list[str]`):
                Ids, repeats allowed.

        Returns:
            `np.ndarray` (int64): their product rows. Shape: (n,).

        Raises:
            `ValueError`: if an id is not in the catalog.
        """
        columns = self.columns
        rows = search_strings(
            product_ids,
            columns["product_id_bytes"],
            columns["product_id_offsets"],
            columns["product_id_hashes"],
            columns["product_id_order"],
        )
        unknown = np.flatnonzero(rows < 0)
        if len(unknown):
            some = ", ".join(sorted({repr(product_ids[position]) for position in unknown})[:3])
            raise ValueError(
                f"{len(unknown)} of {len(product_ids)} product ids are not in the catalog, for instance {some}. Leave them "
                "out, or build the catalog with them."
            )
        return rows

    def product_ids(self, product_rows):
        """
        Args:
            product_rows (`np.ndarray`): Shape: (n,).

        Returns:
            `list[str]`: their ids.
        """
        return unpack_strings(self.columns["product_id_bytes"], self.columns["product_id_offsets"], product_rows)

    def texts(self, product_rows):
        """
        Args:
            product_rows (`np.ndarray`): Shape: (n,).

        Returns:
            `list[str]`: their texts, empty where none was given.
        """
        return unpack_strings(self.columns["text_bytes"], self.columns["text_offsets"], product_rows)

    def sid_rows(self, product_rows):
        """
        Args:
            product_rows (`np.ndarray`): Any shape; -1 stays -1.

        Returns:
            `np.ndarray` (int64): the SID row of each product. Same shape.
        """
        product_rows = np.asarray(product_rows)
        return np.where(product_rows < 0, -1, self.columns["product_sids"][np.maximum(product_rows, 0)]).astype(
            np.int64
        )

    def find_sids(self, sid_codes):
        """
        Args:
            sid_codes (`np.ndarray`): Shape: (n, L + 1). As `self.sid_codes`.

        Returns:
            `np.ndarray` (int64): the row of each SID, -1 where the catalog has none such. Shape: (n,).

        Raises:
            `ValueError`: if `sid_codes` has another number of columns than the catalog's.
        """
        sid_codes = np.asarray(sid_codes)
        if sid_codes.ndim != 2 or sid_codes.shape[1] != self.num_layers + 1:
            raise ValueError(
                f"sid_codes have shape {sid_codes.shape}, expected (n, {self.num_layers + 1}): a column per layer and one "
                "for the suffix, -1 where a SID has none."
            )
        if self._sid_index is None:
            keys = _row_keys(self.sid_codes)
            order = np.argsort(keys, kind="stable")
            self._sid_index = keys[order], order
        keys, order = self._sid_index
        wanted = _row_keys(sid_codes)
        position = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[position] == wanted, order[position], -1).astype(np.int64)

    def products_of(self, sid_row):
        """
        Returns:
            `np.ndarray` (int64): the product rows that share a SID, most popular first.
        """
        start, end = self.columns["sid_offsets"][sid_row : sid_row + 2]
        return self.columns["sid_products"][start:end].astype(np.int64)

    def expand_sids(self, sid_rows, top_k):
        """
        Lists the products of ranked SIDs: SIDs in the order given, products of one SID by popularity.

        Args:
            sid_rows (`np.ndarray`): Shape: (B, n). -1 where there is none.
            top_k (`int`):
                Products to list in each row.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: product rows, and the position in `sid_rows` that each came from; -1 where a
            row has fewer products. Shape of both: (B, top_k).
        """
        sid_rows = np.asarray(sid_rows, dtype=np.int64)
        if sid_rows.shape[1] == 0:
            sid_rows = np.full((len(sid_rows), 1), -1)
        offsets = self.columns["sid_offsets"]
        safe = np.maximum(sid_rows, 0)
        sizes = np.where(sid_rows < 0, 0, offsets[safe + 1] - offsets[safe])
        ends = np.cumsum(sizes, axis=1)
        starts = ends - sizes
        # Rank r of a row belongs to the last SID with products that starts at r or before.
        ranks = np.arange(top_k)
        row, slot = np.nonzero((sizes > 0) & (starts < top_k))
        positions = np.zeros((len(sid_rows), top_k), dtype=np.int64)
        positions[row, starts[row, slot]] = slot
        positions = np.maximum.accumulate(positions, axis=1)
        valid = ranks < ends[:, -1:]
        within = ranks - np.take_along_axis(starts, positions, axis=1)
        index = np.take_along_axis(offsets[safe], positions, axis=1) + within
        products = self.columns["sid_products"][np.where(valid, index, 0)].astype(np.int64)
        return np.where(valid, products, -1), np.where(valid, positions, -1)

    def lengths(self):
        """Codes per SID, suffix included. Shape: (S,)."""
        return (self.sid_codes >= 0).sum(1)

    def save(self, path):
        """
        Writes the catalog into one safetensors file, whole or not at all.

        Args:
            path (`str`):
                File name, by convention `sid_catalog.safetensors`.
        """
        config = {
            "format_version": FORMAT_VERSION,
            "codebook_sizes": self.codebook_sizes,
            "suffix_size": self.suffix_size,
            "pruning": self.pruning.to_dict(),
        }
        write_tensors(path, self.columns, config)

    @classmethod
    def load(cls, path):
        """
        Opens a file of [`~ProductCatalog.save`], memory-mapped.

        Raises:
            `ValueError`: if the file is truncated, of another format version, or its columns do not fit together.
        """
        tensors, config = read_tensors(path, COLUMNS)
        if config.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"The catalog has format version {config.get('format_version')}, this version of rqsid reads "
                f"{FORMAT_VERSION}. Build it again, or install the version that wrote it."
            )
        missing = [key for key in ("codebook_sizes", "pruning", "suffix_size") if key not in config]
        if missing:
            raise ValueError(f"The catalog lacks {', '.join(missing)}: it was edited. Save or download it again.")
        catalog = cls(
            {name: tensor.numpy() for name, tensor in tensors.items()},
            config["codebook_sizes"],
            TokenPruning.from_dict(config["pruning"]),
            config["suffix_size"],
        )
        catalog._check_columns()
        return catalog

    def _check_columns(self):
        columns, num_products, num_sids = self.columns, len(self), self.num_sids
        shapes = {
            "product_id_offsets": (num_products + 1,),
            "product_id_hashes": (num_products,),
            "product_id_order": (num_products,),
            "text_offsets": (num_products + 1,),
            "product_codes": (num_products, self.num_layers),
            "popularity": (num_products,),
            "sid_codes": (num_sids, self.num_layers + 1),
            "sid_offsets": (num_sids + 1,),
            "sid_products": (num_products,),
        }
        for name, shape in shapes.items():
            if columns[name].shape != shape:
                raise ValueError(f"Column {name} of the catalog has shape {columns[name].shape}, expected {shape}.")
        for name in COLUMNS:
            if name != "popularity" and columns[name].dtype.kind not in "iu":
                raise ValueError(f"Column {name} of the catalog holds {columns[name].dtype}, expected integers.")
        bounds = {
            "product_id_order": (0, num_products),
            "product_sids": (0, num_sids),
            "sid_products": (0, num_products),
        }
        for name, (low, high) in bounds.items():
            column = columns[name]
            if len(column) and (column.min() < low or column.max() >= high):
                raise ValueError(f"Column {name} of the catalog points outside [{low}, {high}): the file was edited.")
        for name, end in (
            ("product_id_offsets", len(columns["product_id_bytes"])),
            ("text_offsets", len(columns["text_bytes"])),
            ("sid_offsets", num_products),
        ):
            offsets = columns[name]
            if offsets[0] != 0 or offsets[-1] != end or (np.diff(offsets) < 0).any():
                raise ValueError(f"Column {name} of the catalog is not a list of ascending offsets up to {end}.")
        check_codes(columns["product_codes"], self.codebook_sizes)
        check_codes(columns["sid_codes"], [*self.codebook_sizes, max(1, self.suffix_size)])
        kept = [
            layer for layer in range(self.num_layers) if not self.pruning.num_pruned or layer != self.pruning.layer
        ]
        if (columns["sid_codes"][:, kept] < 0).any():
            raise ValueError(
                "Column sid_codes of the catalog holds absent codes in a layer that is not pruned, so that one SID could be "
                "the beginning of another: the file was edited."
            )

    def __repr__(self):
        return f"ProductCatalog({len(self)} products, {self.num_sids} SIDs, {self.pruning!r})"


def _group(sids, popularity):
    """
    Returns for each product the rank of its SID in lexicographic order and its own rank within the SID by popularity.
    Shape of both: (N,).
    """
    order = np.lexsort((-popularity, *sids.T[::-1]))
    ordered = sids[order]
    is_first = np.concatenate(([True], (ordered[1:] != ordered[:-1]).any(1)))
    group_of_ordered = np.cumsum(is_first) - 1
    starts = np.flatnonzero(is_first)
    group = np.empty(len(sids), dtype=np.int64)
    rank = np.empty(len(sids), dtype=np.int64)
    group[order] = group_of_ordered
    rank[order] = np.arange(len(sids)) - starts[group_of_ordered]
    return group, rank


def _row_keys(rows):
    # Rows as byte strings of one width: exact to compare, whatever the number of layers and codes.
    return np.ascontiguousarray(rows, dtype=np.int32).view(f"S{4 * rows.shape[1]}").ravel()
