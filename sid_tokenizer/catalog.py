"""The table between products and SIDs, in columns that can be memory-mapped."""

import copy

import numpy as np

from .catalog_checks import check_sizes
from .catalog_columns import added_columns, columns_at, content_hash, first_columns, regrouped, row_type
from .catalog_file import load_catalog, pickle_by_file, save_catalog
from .catalog_lookups import CatalogLookups
from .catalog_tables import catalog_to_dataset, read_catalog_table, write_catalog_table
from .checks import as_numpy, check_codes
from .codebook_version import check_quantizer, measures_embeddings
from .index_files import read_index, write_index
from .placement import check_inputs, check_policy, place_first, place_more
from .pruning import TokenPruning
from .strings import index_strings, pack_product_ids, search_packed

KEPT_IDS = 1000


class ProductCatalog(CatalogLookups):
    r"""
    Which product has which SID, and which products share one.

    Build one with [`ProductCatalog.build`], or read one with [`ProductCatalog.load`]. A *product row* is a position in
    `product_ids` as given to `build`, products appended later following; a *SID row* is a position in `sid_codes`. Rows
    never change their meaning. All columns are numpy arrays (of a loaded catalog: memory-mapped), all methods take and give
    batches.

    A catalog changes by [`~ProductCatalog.append`], [`~ProductCatalog.withdraw`], [`~ProductCatalog.restore`] and
    [`~ProductCatalog.update_popularity`], each of which makes a new version; no SID ever moves. Earlier versions stay
    available through [`~ProductCatalog.at_version`]. Threads may read while one changes the catalog; changes from several
    threads need a lock of yours. A catalog that lies in a file is pickled as a reference to that file, so that processes on
    one machine map it together.

    Attributes:
        codebook_sizes (`list[int]`): codes of each layer.
        pruning ([`TokenPruning`]): the rule by which SIDs were shortened.
        suffix_size (`int`): number of suffix tokens that break collisions; 0 if products may share a SID.
        collisions (`str`): `"share"`, `"suffix"` or `"reassign"`.
        capacity (`int`): products that one leaf takes where leaves are reassigned.
        codebook_version (`str` or `None`): fingerprint of the quantizer that `build` was given.
        history (`list[dict]`): what each version changed, the oldest that is left first.
        sid_codes (`np.ndarray`): Shape: (S, L + 1). -1 where a layer is absent; the last column is the suffix.
        popularity (`np.ndarray`): Shape: (N,).
        withdrawn (`np.ndarray` of bool): Shape: (N,).

    Example:

    ```python
    catalog = ProductCatalog.build(product_ids, codes, quantizer.codebook_sizes, popularity=purchases, quantizer=quantizer)
    catalog.append(new_ids, embeddings=new_embeddings, quantizer=quantizer)
    catalog.withdraw(["B0001"])
    catalog.save("sid_catalog.safetensors")
    ```
    """

    def __init__(self, columns, codebook_sizes, pruning, suffix_size=0, collisions="share", capacity=1, history=None):
        self.columns = columns
        self.codebook_sizes = list(codebook_sizes)
        self.pruning = pruning
        self.suffix_size = suffix_size
        self.collisions = collisions
        self.capacity = capacity
        self.codebook_version = None
        self.history = history or []
        self.ancestors = []  # ids of versions that were given up: the first, and the last of them
        self.file = None  # where an equal copy lies, see catalog_file.py
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
        capacity=1,
        quantizer=None,
        embeddings=None,
    ):
        """
        Args:
            product_ids (`list[str]`, or a `numpy` or `pyarrow` array of strings):
                N distinct, non-empty ids of at most 1,024 bytes each.
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
                - `"share"`: products of one SID share it.
                - `"suffix"`: every product of such a group gets a suffix token `<x_0>`, `<x_1>`, … in order of popularity,
                  which makes all SIDs distinct.
                - `"reassign"`: the `capacity` most popular products of such a group keep the SID, the others take the
                  nearest SID with room, see [`reassign`]. Needs `quantizer`.
            suffix_size (`int`, *optional*):
                Suffix tokens to reserve with `"suffix"`; the largest group, and at least 16, if not given.
            capacity (`int`, *optional*, defaults to 1):
                Products that may share a SID with `"reassign"`.
            quantizer ([`ResidualQuantizer`] or [`RQVAE`], *optional*):
                What gave the codes. The catalog keeps its fingerprint, and refuses products encoded by another.
            embeddings (`np.ndarray` or `torch.Tensor`, *optional*): Shape: (N, D).
                With `"reassign"`, what added error is measured from; the sums of code vectors if not given.

        Returns:
            [`ProductCatalog`]

        Raises:
            `TypeError`: if a product id is not a string.
            `ValueError`: for duplicate, empty or over-long ids, columns of unequal length, codes outside the codebooks, a
                pruning fitted on other codebooks, too few suffixes, or too little capacity.
        """
        codebook_sizes = [int(size) for size in codebook_sizes]
        codes = as_numpy(codes)
        packed = pack_product_ids(product_ids)
        num_products = len(packed[1]) - 1
        if pruning is None:
            pruning = TokenPruning("none").fit(codes, codebook_sizes)
        if pruning.codebook_sizes is not None and pruning.codebook_sizes != codebook_sizes:
            raise ValueError(
                f"The pruning was fitted on codebooks {pruning.codebook_sizes}, these codes have {codebook_sizes}. "
                "Fit the pruning on the codes of this catalog."
            )
        # A copy, since fitting the rule again would change what SIDs mean.
        pruning = TokenPruning.from_dict(pruning.to_dict())
        check_codes(codes, codebook_sizes)
        popularity = check_inputs(num_products, codes, popularity, texts, embeddings)
        check_policy(collisions, suffix_size, capacity, quantizer, embeddings)
        check_sizes(codebook_sizes)
        version = None if quantizer is None else check_quantizer(quantizer, codebook_sizes)
        if embeddings is not None and quantizer is not None and not measures_embeddings(quantizer):
            raise ValueError(
                "embeddings cannot be compared with this quantizer's code vectors, only those of residual k-means with "
                'metric="euclidean", without normalize_residuals and skipped_codes, can. Leave embeddings out: added error is '
                "then measured between code vectors."
            )
        codebooks = None if quantizer is None else list(quantizer.codebooks)
        sids, suffix_size = place_first(
            codes, pruning, popularity, collisions, suffix_size, capacity, codebooks, embeddings
        )
        columns = first_columns(packed, codes, sids, codebook_sizes, suffix_size, popularity, texts)
        catalog = cls(columns, codebook_sizes, pruning, suffix_size, collisions, capacity)
        catalog.codebook_version = version
        names = ("product_id_hashes", "product_id_order", "product_codes", "product_sids", "sid_codes", "popularity")
        content = content_hash(*[columns[name] for name in names], columns["text_bytes"], columns["text_offsets"])
        catalog._commit(columns, "build", num_products, f"{content} {pruning.to_dict()} {collisions} {capacity}")
        return catalog

    # Changes

    def append(
        self,
        product_ids,
        codes=None,
        popularity=None,
        texts=None,
        embeddings=None,
        quantizer=None,
        collisions=None,
        reuse_withdrawn=False,
    ):
        """
        Adds products. Those that are there keep their rows and SIDs.

        A new product gets the SID of its codes. If products have that SID already, it shares it, or gets the next suffix
        where they have suffixes, or, with `collisions="reassign"`, takes the nearest free SID. The SID of products that
        were all withdrawn is not reused: then, too, the product takes the nearest free one, for which `quantizer` is needed.

        Args:
            product_ids (`list[str]`, or a `numpy` or `pyarrow` array of strings):
                m new ids.
            codes (`np.ndarray` or `torch.Tensor`, *optional*): Shape: (m, L).
                Their full codes. If not given, `quantizer` encodes `embeddings`.
            popularity (`np.ndarray`, *optional*): Shape: (m,).
                0 if not given.
            texts (`list[str]`, *optional*):
                m texts for display.
            embeddings (`np.ndarray` or `torch.Tensor`, *optional*): Shape: (m, D).
                Encoded if there are no codes; and what added error is measured from where the quantizer allows it, see
                `build`.
            quantizer ([`ResidualQuantizer`] or [`RQVAE`], *optional*):
                The quantizer of this catalog, `tokenizer.quantizer` for instance.
            collisions (`str`, *optional*):
                As in `build`, for these products; the catalog's own way if not given.
            reuse_withdrawn (`bool`, *optional*, defaults to `False`):
                Whether SIDs and suffixes of withdrawn products may be given to new ones. A model that was trained with
                them knows them as the old products.

        Returns:
            `np.ndarray` (int64): the rows of the new products. Shape: (m,). Without any, nothing changes.

        Raises:
            `TypeError`, `ValueError`: as `build`; also if an id is in the catalog already, the quantizer is another than the
                catalog's, no suffix is left, or a free SID has to be found without a quantizer. The catalog is then as
                it was.
        """
        collisions = self.collisions if collisions is None else collisions
        check_policy(collisions)
        if collisions == "suffix" and not self.suffix_size:
            raise ValueError(
                'collisions="suffix" needs suffix tokens, of which this catalog has none. Pass "reassign" or "share", or '
                'build a new catalog with collisions="suffix".'
            )
        if quantizer is not None:
            check_quantizer(quantizer, self.codebook_sizes, self.codebook_version)
        if hasattr(product_ids, "__len__") and len(product_ids) == 0:
            return np.zeros(0, dtype=np.int64)
        if codes is None:
            if embeddings is None or quantizer is None:
                raise ValueError("Pass codes, or embeddings and quantizer to encode them with.")
            codes = quantizer.encode(embeddings)
            embeddings = embeddings if hasattr(embeddings, "shape") else None  # a file or a data set was encoded
        codes = as_numpy(codes)
        check_codes(codes, self.codebook_sizes)
        packed = pack_product_ids(product_ids)
        popularity = check_inputs(len(packed[1]) - 1, codes, popularity, texts, embeddings)
        index = index_strings(*packed)
        self._refuse_known(product_ids, search_packed(*packed, *self._id_columns()))

        if embeddings is not None and (quantizer is None or not measures_embeddings(quantizer)):
            embeddings = None
        codebooks = None if quantizer is None else list(quantizer.codebooks)
        sids = place_more(self, codes, popularity, collisions, codebooks, embeddings, reuse_withdrawn)
        columns = added_columns(
            self.columns, *packed, index, codes, sids, self.codebook_sizes, self.suffix_size, popularity, texts
        )
        first = len(self)
        new = [columns[name][first:] for name in ("product_codes", "product_sids", "popularity")]
        text = (
            columns["text_bytes"][columns["text_offsets"][first] :]
            if len(columns["text_offsets"]) > 1
            else index[0][:0]
        )
        self._commit(columns, "append", len(codes), content_hash(*index, *new, sids.astype(np.int32), text))
        return np.arange(first, len(self))

    def withdraw(self, product_ids):
        """
        Takes products out of stock: searches no longer return them. Histories may still name them, and their SIDs stay theirs.

        Raises:
            `ValueError`: if a product is not in the catalog, or withdrawn already.
        """
        self._toggle(product_ids, "withdraw", withdrawn=True)

    def restore(self, product_ids):
        """
        Brings withdrawn products back, with the SIDs that they had. If a SID was given to another product in the meantime
        (`reuse_withdrawn=True`), the two share it.

        Raises:
            `ValueError`: if a product is not in the catalog, or not withdrawn.
        """
        self._toggle(product_ids, "restore", withdrawn=False)

    def update_popularity(self, product_ids, popularity):
        """
        Changes the order in which products of one SID are listed.

        Args:
            product_ids (`list[str]`):
                n products, each once.
            popularity (`np.ndarray`): Shape: (n,).

        Raises:
            `ValueError`: if a product is not in the catalog or named twice, or a popularity is not finite.
        """
        rows = self._distinct_rows(product_ids)
        values = np.asarray(popularity, dtype=np.float64)
        if values.shape != rows.shape or not np.isfinite(values).all():
            raise ValueError(
                f"popularity must be one finite number for each of the {len(rows)} products, got shape {values.shape}."
            )
        before = self.columns["popularity"]
        changed = values != before[rows]
        rows, values = rows[changed], values[changed]
        if not len(rows):
            return
        after = before.copy()
        after[rows] = values
        log_rows = np.concatenate([self.columns["popularity_log_rows"], rows.astype(row_type(len(self)))])
        log_values = np.concatenate([self.columns["popularity_log_values"], before[rows]])
        logs = {"popularity_log_rows": log_rows, "popularity_log_values": log_values}
        columns = regrouped(self.columns | {"popularity": after} | logs)
        self._commit(columns, "update_popularity", len(rows), content_hash(rows, values))

    # Versions

    @property
    def version(self):
        """Number of the current version, from 1."""
        return self.history[-1]["version"] if self.history else 0

    @property
    def oldest_version(self):
        """Number of the oldest version that [`~ProductCatalog.at_version`] can give."""
        return self.history[0]["version"]

    @property
    def version_id(self):
        """`str`: changes with every change, and differs between copies that were changed differently."""
        return self.history[-1]["id"]

    @property
    def origin(self):
        """`str`: the `version_id` that the catalog was built with."""
        return (self.ancestors or [self.history[0]["id"]])[0]

    def at_version(self, version):
        """
        The catalog as it was.

        Args:
            version (`int`):
                From `oldest_version` to `version`.

        Returns:
            [`ProductCatalog`]: a copy that shares most columns. Saving it over a newer version is refused.

        Raises:
            `ValueError`: if there is, or is left, no such version.
        """
        if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= self.version:
            raise ValueError(f"version={version!r}: this catalog has versions 1 to {self.version}.")
        if version < self.oldest_version:
            raise ValueError(
                f"version={version} was given up by forget_versions; {self.oldest_version} is the oldest that is left."
            )
        old = copy.copy(self)
        old.history = self.history[: version - self.oldest_version + 1]
        if version < self.version:
            old.columns = columns_at(self.columns, old.history[-1], self.history[0])
            old.file, old._sid_index = None, None
        return old

    def forget_versions(self, before=None):
        """
        Gives up earlier versions, and the space that the logs of changed popularities take for them.

        Args:
            before (`int`, *optional*):
                The oldest version to keep; the current one if not given.
        """
        before = self.version if before is None else before
        if isinstance(before, bool) or not isinstance(before, int) or not 1 <= before <= self.version:
            raise ValueError(f"before={before!r}: this catalog has versions 1 to {self.version}.")
        if before <= self.oldest_version:
            return
        kept = self.history[before - self.oldest_version :]
        given_up = [entry["id"] for entry in self.history[: -len(kept)]]
        num_withdrawn = kept[0]["withdrawn_log"] - self.history[0]["withdrawn_log"]
        num_popularity = kept[0]["popularity_log"] - self.history[0]["popularity_log"]
        logs = {"withdrawn_log": self.columns["withdrawn_log"][num_withdrawn:].copy()}
        for name in ("popularity_log_rows", "popularity_log_values"):
            logs[name] = self.columns[name][num_popularity:].copy()
        # By the ids a save knows an older state of this catalog, which it may replace, from somebody else's changes.
        ancestors = [*self.ancestors, *given_up]
        self.ancestors = [ancestors[0], *ancestors[1:][-KEPT_IDS:]]
        self.columns, self.history, self.file = self.columns | logs, kept, None

    # Files

    def save(self, path, overwrite=False):
        """
        Writes the catalog into one safetensors file, whole or not at all. Where an equal file lies on the same disk, the new
        one is a hard link to it.

        Args:
            path (`str`):
                File name, by convention `sid_catalog.safetensors`.
            overwrite (`bool`, *optional*, defaults to `False`):
                Whether to replace a file that holds changes to this catalog that this object does not know.

        Raises:
            `ValueError`: if `path` holds a newer version of this catalog, or one with other changes: somebody else saved it
                in the meantime.
        """
        save_catalog(self, path, overwrite)

    @classmethod
    def load(cls, path, version=None):
        """
        Opens a file of [`~ProductCatalog.save`], memory-mapped.

        Args:
            path (`str`):
                The file.
            version (`int`, *optional*):
                An earlier version, see [`~ProductCatalog.at_version`]; the current one if not given.

        Raises:
            `ValueError`: if the file is truncated, of another format version, or its columns do not fit together.
        """
        catalog = load_catalog(cls, path)
        return catalog if version is None else catalog.at_version(version)

    def __reduce_ex__(self, protocol):
        return pickle_by_file(self) or super().__reduce_ex__(protocol)

    @classmethod
    def from_index(cls, path, token_format=None, codebook_sizes=None, **options):
        """
        Builds a catalog from the `index.json` of LC-Rec, LETTER or MiniOneRec.

        Args:
            path, token_format, codebook_sizes: As [`read_index`].
            **options:
                As `build`, in the order of the file: `pruning`, `popularity`, `texts`, `collisions`, ….

        Returns:
            [`ProductCatalog`]
        """
        product_ids, codes, codebook_sizes = read_index(path, token_format, codebook_sizes)
        return cls.build(product_ids, codes, codebook_sizes, **options)

    def to_index(self, path, token_format=None):
        """
        Writes an `index.json` of the products that are not withdrawn, see [`write_index`].

        Raises:
            `ValueError`: if SIDs have varying lengths or suffixes, which that format cannot hold.
        """
        write_index(self, path, token_format)

    @classmethod
    def from_table(cls, source, codebook_sizes=None, columns=None, **options):
        """
        Builds a catalog from a parquet or CSV file, a folder of parquet shards, a `pyarrow.Table` or a data set.

        Args:
            source:
                As [`read_catalog_table`]: a column of ids, one of codes or one per layer, and optionally popularity, text
                and whether a product is withdrawn.
            codebook_sizes (`list[int]`, *optional*):
                Codes of each layer; what the file says of itself if not given.
            columns (`dict[str, str]`, *optional*):
                Names of columns, as the arguments of [`read_catalog_table`]: `{"id_column": "sku"}`.
            **options:
                As `build`: `pruning`, `collisions`, ….

        Returns:
            [`ProductCatalog`]

        Raises:
            `ValueError`: if nothing says how large the codebooks are, or as [`read_catalog_table`] and `build`.
        """
        table = read_catalog_table(source, **(columns or {}))
        withdrawn, stored_sizes = table.pop("withdrawn"), table.pop("codebook_sizes")
        if codebook_sizes is None and stored_sizes is None:
            raise ValueError(
                "Nothing in the table says how many codes each layer has: pass codebook_sizes. The largest code that occurs "
                f"in each layer is {table['codes'].max(0).tolist()}."
            )
        catalog = cls.build(codebook_sizes=codebook_sizes or stored_sizes, **table, **options)
        if withdrawn is not None and withdrawn.any():
            catalog.withdraw(catalog.product_ids(np.flatnonzero(withdrawn)))
        return catalog

    def to_table(self, path):
        """
        Writes a `.parquet` or `.csv` file with a row per product, see [`write_catalog_table`].
        """
        write_catalog_table(self, path)

    def to_dataset(self):
        """
        Returns:
            `datasets.Dataset`: a row per product, with the columns of a parquet file of `to_table`.
        """
        return catalog_to_dataset(self)

    def __copy__(self):
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __getstate__(self):
        # What is made on first use stays out, so that a catalog has the same hash before and after.
        return {**self.__dict__, "_sid_index": None}

    def __repr__(self):
        withdrawn = int(self.withdrawn.sum())
        return (
            f"ProductCatalog({len(self)} products, {self.num_sids} SIDs, {self.pruning!r}"
            + (f", {withdrawn} withdrawn" if withdrawn else "")
            + (f", version {self.version}" if self.version > 1 else "")
            + ")"
        )

    # Shared parts of the above

    def _commit(self, columns, change, count, content):
        """Takes over new columns as a new version, all at once."""
        last = self.history[-1] if self.history else {"id": "", "withdrawn_log": 0, "popularity_log": 0}
        base = self.history[0] if self.history else last
        entry = {
            "version": self.version + 1,
            "change": change,
            "count": count,
            "products": len(columns["product_sids"]),
            "sids": len(columns["sid_codes"]),
            "withdrawn": int(columns["product_withdrawn"].sum()),
            # Counted from the first version on, whatever was given up since.
            "withdrawn_log": base["withdrawn_log"] + len(columns["withdrawn_log"]),
            "popularity_log": base["popularity_log"] + len(columns["popularity_log_rows"]),
            "id": content_hash(np.frombuffer(f"{last['id']} {change} {content}".encode(), dtype=np.uint8)),
        }
        self.columns, self.history, self.file = columns, [*self.history, entry], None

    def _toggle(self, product_ids, change, withdrawn):
        rows = self._distinct_rows(product_ids)
        wrong = rows[self.withdrawn[rows] == withdrawn]
        if len(wrong):
            state = "withdrawn already" if withdrawn else "not withdrawn"
            raise ValueError(
                f"{len(wrong)} of these products are {state}, for instance {self.product_ids(wrong[:1])[0]!r}. Leave them out."
            )
        if not len(rows):
            return
        after = self.withdrawn.copy()
        after[rows] = withdrawn
        log = np.concatenate([self.columns["withdrawn_log"], rows.astype(row_type(len(self)))])
        columns = regrouped(self.columns | {"product_withdrawn": after, "withdrawn_log": log})
        self._commit(columns, change, len(rows), content_hash(rows))

    def _distinct_rows(self, product_ids):
        rows = self.product_rows(product_ids)
        if len(np.unique(rows)) < len(rows):
            ordered = np.sort(rows)
            twice = ordered[1:][ordered[1:] == ordered[:-1]][:1]
            raise ValueError(
                f"{len(rows) - len(np.unique(rows))} products are named more than once, for instance "
                f"{self.product_ids(twice)[0]!r}. Name each once."
            )
        return rows

    def _refuse_known(self, product_ids, rows):
        known = np.flatnonzero(rows >= 0)
        if len(known):
            first = rows[known[0]]
            hint = "restore(...) brings withdrawn products back" if self.withdrawn[first] else "leave them out"
            raise ValueError(
                f"{len(known)} of {len(rows)} products are in the catalog already, for instance "
                f"{self.product_ids([first])[0]!r}. Ids are never given twice: {hint}."
            )
