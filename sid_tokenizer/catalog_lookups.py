"""What can be asked of a catalog."""

import numpy as np

from .collisions import report_collisions
from .sid_keys import digit_sizes, find_keys, sid_keys
from .strings import search_strings, unpack_strings


class CatalogLookups:
    """
    The half of [`ProductCatalog`] that reads its columns, always for whole batches.
    """

    def __len__(self):
        return len(self.columns["product_sids"])

    @property
    def num_sids(self):
        """S, the number of distinct SIDs, those of withdrawn products included."""
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
    def withdrawn(self):
        return self.columns["product_withdrawn"]

    @property
    def codes(self):
        """The quantizer's codes of all products, before pruning. Shape: (N, L)."""
        return self.columns["product_codes"]

    def find_products(self, product_ids):
        """
        Args:
            product_ids (`list[str]`, or a `numpy` or `pyarrow` array of strings):
                Ids, repeats allowed.

        Returns:
            `np.ndarray` (int64): their product rows, -1 where the catalog has no such product. Shape: (n,).

        Raises:
            `TypeError`: if an id is not a string.
        """
        return search_strings(product_ids, *self._id_columns())

    def product_rows(self, product_ids):
        """
        As [`~ProductCatalog.find_products`], of products that must be there.

        Raises:
            `TypeError`: if an id is not a string.
            `ValueError`: if an id is not in the catalog.
        """
        rows = self.find_products(product_ids)
        unknown = np.flatnonzero(rows < 0)
        if len(unknown):
            names = list(product_ids)  # by position, which is no label as in a pandas Series
            some = ", ".join(sorted({repr(str(names[position])) for position in unknown[:1000]})[:3])
            raise ValueError(
                f"{len(unknown)} of {len(product_ids)} product ids are not in the catalog, for instance {some}. Leave them "
                "out, or append them to the catalog."
            )
        return rows

    def product_ids(self, product_rows):
        """
        Args:
            product_rows (`np.ndarray`): Shape: (n,).

        Returns:
            `list[str]`: their ids.
        """
        columns = self.columns
        return unpack_strings(columns["product_id_bytes"], columns["product_id_offsets"], product_rows)

    def texts(self, product_rows):
        """
        Args:
            product_rows (`np.ndarray`): Shape: (n,).

        Returns:
            `list[str]`: their texts, empty where none was given.
        """
        columns = self.columns
        if len(columns["text_offsets"]) == 1:
            return [""] * len(self.product_ids(product_rows))
        return unpack_strings(columns["text_bytes"], columns["text_offsets"], product_rows)

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

    def live_sid_rows(self):
        """
        Returns:
            `np.ndarray` (int64): the rows of the SIDs that have a product that is not withdrawn, ascending.
        """
        return np.flatnonzero(np.diff(self.columns["sid_offsets"]))

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
        sizes = digit_sizes(self.codebook_sizes, self.suffix_size)
        # Columns once, since another thread may put others in their place; and the index only with those it was made for.
        columns, index = self.columns, self._sid_index
        if index is None or index[0] is not columns["sid_order"]:
            index = columns["sid_order"], sid_keys(columns["sid_codes"], sizes)[columns["sid_order"]]
            self._sid_index = index
        # A code outside its codebook would make the key of another SID.
        inside = ((sid_codes >= -1) & (sid_codes < np.array(sizes) - 1)).all(1)
        position = find_keys(index[1], sid_keys(sid_codes, sizes))
        return np.where((position >= 0) & inside, columns["sid_order"][position], -1).astype(np.int64)

    def products_of(self, sid_row):
        """
        Returns:
            `np.ndarray` (int64): the product rows that share a SID, most popular first, without those withdrawn.
        """
        columns = self.columns
        if not 0 <= sid_row < len(columns["sid_codes"]):
            raise ValueError(f"sid_row={sid_row}: the catalog has SID rows 0 to {len(columns['sid_codes']) - 1}.")
        start, end = columns["sid_offsets"][sid_row : sid_row + 2]
        return columns["sid_products"][start:end].astype(np.int64)

    def expand_sids(self, sid_rows, top_k, product_mask=None):
        """
        Lists the products of ranked SIDs: SIDs in the order given, products of one SID by popularity, without those
        withdrawn.

        Args:
            sid_rows (`np.ndarray`): Shape: (B, n). -1 where there is none.
            top_k (`int`):
                Products to list in each row.
            product_mask (`np.ndarray` of bool, *optional*): Shape: (N,).
                The products that may be listed, for instance those in stock; all if not given. Of a mask made for an earlier
                version of this catalog, which is shorter, products appended since are left out.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: product rows, and the position in `sid_rows` that each came from; -1 where a
            row has fewer products. Shape of both: (B, top_k).

        Raises:
            `ValueError`: if `product_mask` is not boolean, or longer than the catalog.
        """
        sid_rows = np.asarray(sid_rows, dtype=np.int64)
        if sid_rows.shape[1] == 0:
            sid_rows = np.full((len(sid_rows), 1), -1)
        columns = self.columns
        offsets, sid_products = columns["sid_offsets"], columns["sid_products"]
        if product_mask is not None:
            product_mask = np.asarray(product_mask)
            if (
                product_mask.dtype != bool
                or product_mask.ndim != 1
                or len(product_mask) > len(columns["product_sids"])
            ):
                raise ValueError(
                    f"product_mask must be booleans, one for each of the {len(columns['product_sids'])} products, got "
                    f"{product_mask.dtype} of shape {product_mask.shape}."
                )
            sid_rows, offsets, sid_products = _kept_products(sid_rows, offsets, sid_products, product_mask)
        if len(sid_products) == 0:
            nothing = np.full((len(sid_rows), top_k), -1, dtype=np.int64)
            return nothing, nothing.copy()
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
        products = sid_products[np.where(valid, index, 0)].astype(np.int64)
        return np.where(valid, products, -1), np.where(valid, positions, -1)

    def lengths(self):
        """Codes per SID, suffix included. Shape: (S,)."""
        return (self.sid_codes >= 0).sum(1)

    def collision_report(self, ks=(1, 10, 50)):
        """
        What shared SIDs cost: pairs, products, largest group, and the item-level recall that no model can exceed.

        Args:
            ks (`tuple[int]`, *optional*, defaults to `(1, 10, 50)`):
                Depths of the recall ceiling.

        Returns:
            [`CollisionReport`]
        """
        columns = self.columns
        return report_collisions(np.diff(columns["sid_offsets"]), columns["sid_products"], columns["popularity"], ks)

    def _id_columns(self):
        columns = self.columns
        names = ("product_id_bytes", "product_id_offsets", "product_id_hashes", "product_id_order")
        return [columns[name] for name in names]


def _kept_products(sid_rows, offsets, sid_products, product_mask):
    """
    The SIDs that occur, numbered anew, with those of their products that the mask keeps.

    Returns:
        `tuple[np.ndarray, np.ndarray, np.ndarray]`: the new numbers, in the shape of `sid_rows`; where the products of each
        begin; and the products.
    """
    # Each SID once, however many rows name it: no more than all products of the catalog are looked at.
    sids, numbers = np.unique(sid_rows, return_inverse=True)
    numbers = numbers.reshape(sid_rows.shape)
    if len(sids) and sids[0] < 0:
        sids, numbers = sids[1:], numbers - 1
    sizes = offsets[sids + 1] - offsets[sids]
    ends = np.cumsum(sizes)
    products = sid_products[np.repeat(offsets[sids] - (ends - sizes), sizes) + np.arange(ends[-1] if len(ends) else 0)]
    kept = products < len(product_mask)
    kept[kept] = product_mask[products[kept]]
    passed = np.append(0, np.cumsum(kept))
    return numbers, np.append(0, passed[ends]), products[kept]
