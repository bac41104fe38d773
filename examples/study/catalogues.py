"""
Products and who bought them, read from three sources into one form:

- a folder with `*.inter.json` ({user: [items in the order of time]}) and `*.item.json` ({item: {title, ...}}) or
  `*.items.jsonl` (one {id, title, ...} a line), and perhaps `index/*.index.json`: the layout of LC-Rec, LETTER and others;
- a folder with `purchases.parquet` (or `.csv`: user, product, time and perhaps query; every other column is taken for the
  user's profile) and `products.parquet` (or `.csv`: id, title and perhaps category; every other column is more text);
- `completejourney`, the package that the quick start reads.
"""

import hashlib
import importlib.util
import json
import re
import sys
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset

MAX_HISTORY = 20
# Names of categories hold ", ", paths are joined without the space.
PATH_SEPARATOR = re.compile(r",(?! )|\s*>\s*|\s*\|\s*")
LONGEST_CATEGORY = 60  # beyond it, descriptions that slipped into the path
TEXT_FIELDS = ("title", "brand", "categories", "category", "description", "key_terms")
LEAVE_ONE_OUT = "leave-one-out (last purchase = test, the one before = validation), history <= 20"


@dataclass
class Catalogue:
    """
    Products, and purchases cut into training, validation and test rows.

    Args:
        name (`str`): of the data set.
        product_ids (`list[str]`): of the N products.
        titles (`list[str]`): a short text of each.
        texts (`list[str]`): all that is known of each, for an encoder.
        categories (`list[str]`): the last part of each one's category path, empty where there is none.
        query_source (`str`): where the queries of the rows come from, or `"none"`: then the task is the next item.
        protocol (`str`): how rows are split.
        tie_order (`str`): the order of purchases of the same time.
        splits (`dict[str, Dataset]`): `"train"`, `"validation"` and `"test"`, with the columns `user`, `profile`, `history`
            (product ids, the oldest first), `query` and `product`.
        sequences (`list[np.ndarray]`): rows of the products that each user bought, in the order of time; empty where
            purchases are split by date.
        index_files (`list[Path]`): published SIDs.
        purchases (`object`, *optional*): what the quick start made of its package.
    """

    name: str
    product_ids: list[str]
    titles: list[str]
    texts: list[str]
    categories: list[str]
    query_source: str
    protocol: str
    tie_order: str
    splits: dict[str, Dataset]
    sequences: list[np.ndarray] = field(default_factory=list)
    index_files: list[Path] = field(default_factory=list)
    purchases: object = None

    @property
    def task(self):
        """What is to be found, and what is given."""
        if self.query_source == "none":
            return "next item, given the history"
        return f"product search, given profile (if any), history and query ({self.query_source})"

    @cached_property
    def popularity(self):
        """
        Purchases of each product in training, the first of a sequence too. Shape: (N,).
        """
        if self.purchases is not None:
            return np.asarray(self.purchases.popularity)
        rows = [sequence[:-2] if len(sequence) > 2 else sequence for sequence in self.sequences]
        return np.bincount(np.concatenate(rows), minlength=len(self.product_ids))

    @cached_property
    def digest(self):
        """Tells whether products, texts or training rows are those of an earlier run."""
        digest = hashlib.sha256()
        for values in (self.product_ids, self.texts, self.popularity.tolist()):
            digest.update(json.dumps(values).encode())
        if self.query_source.startswith("column"):  # constructed ones follow from the texts
            for name, rows in self.splits.items():
                for column in ("profile", "query", "product"):
                    digest.update(json.dumps([name, column, rows[column][:]]).encode())
        return digest.hexdigest()[:12]

    def without_queries(self):
        """The same purchases as the task of the next item."""
        splits = {
            name: rows.remove_columns("query").add_column("query", [""] * len(rows))
            for name, rows in self.splits.items()
        }
        return replace(self, query_source="none", splits=splits)

    def settings(self):
        """What a cell that was computed on this data carries, JSON-able."""
        return {"name": self.name, "products": len(self.product_ids), "digest": self.digest}

    def describe(self):
        """Data set, task, protocol and tie order in one line each, for tables."""
        sizes = ", ".join(f"{len(rows)} {name}" for name, rows in self.splits.items())
        return {
            "data set": f"{self.name}: {len(self.product_ids)} products, {int(self.popularity.sum())} training purchases; "
            f"rows: {sizes}",
            "task": self.task,
            "protocol": self.protocol,
            "tie order": self.tie_order,
        }


def load_catalogue(data):
    """
    Args:
        data (`str` or `os.PathLike`):
            A folder of one of the layouts above, or `"completejourney"`.

    Returns:
        [`Catalogue`]

    Raises:
        `ImportError`: if the package of completejourney is not installed.
        `ValueError`: if the folder has neither layout, or a file does not hold what it must.
    """
    if str(data) == "completejourney":
        return _load_completejourney()
    folder = Path(data)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder. Pass a folder with purchases and products, or 'completejourney'.")
    if sorted(folder.glob("*.inter.json")):
        return _load_sequences(folder)
    if _table_file(folder, "purchases", required=False):
        return _load_tables(folder)
    raise ValueError(
        f"{folder} holds neither a *.inter.json nor a purchases.parquet or purchases.csv, only "
        f"{sorted(path.name for path in folder.iterdir())[:8]}. See the README of the study for the two layouts."
    )


def import_example(folder, name):
    """A module of another example; those are no packages, and two of them may have the same name."""
    full_name = f"{folder}_{name}"
    if full_name not in sys.modules:
        path = Path(__file__).parents[1] / folder / f"{name}.py"
        spec = importlib.util.spec_from_file_location(full_name, path)
        sys.modules[full_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full_name])
    return sys.modules[full_name]


def leave_one_out(sequences, product_ids, users, query_of=None, profile_of=None, max_history=MAX_HISTORY):
    """
    The last purchase of a sequence of three or more is its test row, the one before its validation row, and every earlier
    one but the first a training row. Shorter sequences are training rows only. A row's history is the `max_history`
    purchases before it.

    Args:
        sequences (`list[np.ndarray]`):
            Rows of products, one array a user.
        product_ids (`list[str]`):
            Of all products.
        users (`list[str]`):
            One a sequence.
        query_of, profile_of (`np.ndarray` of `str`, *optional*):
            The query and the profile of each purchase, in the order of the concatenated sequences; empty if not given.
        max_history (`int`, *optional*, defaults to 20):
            Longest history.

    Returns:
        `dict[str, Dataset]`
    """
    lengths = np.array([len(sequence) for sequence in sequences])
    bought = np.concatenate(sequences)
    start = np.repeat(np.cumsum(lengths) - lengths, lengths)
    position, left = np.arange(len(bought)) - start, np.repeat(lengths, lengths)
    left = left - 1 - position
    is_long = np.repeat(lengths > 2, lengths)
    chosen = {
        "train": (position > 0) & ((left > 1) | ~is_long),
        "validation": (left == 1) & is_long,
        "test": (left == 0) & is_long,
    }
    ids, users = pa.array(product_ids), pa.array(np.repeat(np.array(users, dtype=object), lengths))
    empty = np.full(len(bought), "", dtype=object)
    texts = {"query": empty if query_of is None else query_of, "profile": empty if profile_of is None else profile_of}
    splits = {}
    for name, mask in chosen.items():
        targets = np.flatnonzero(mask)
        sizes = np.minimum(position[targets], max_history)
        ends = np.cumsum(sizes)
        rows = np.repeat(targets - sizes, sizes) + np.arange(sizes.sum()) - np.repeat(ends - sizes, sizes)
        offsets = pa.array(np.append(0, ends).astype(np.int32))
        splits[name] = Dataset(
            pa.table(
                {
                    "user": users.take(pa.array(targets)),
                    "profile": pa.array(texts["profile"][targets], pa.string()),
                    "history": pa.ListArray.from_arrays(offsets, ids.take(pa.array(bought[rows]))),
                    "query": pa.array(texts["query"][targets], pa.string()),
                    "product": ids.take(pa.array(bought[targets])),
                }
            )
        )
    return splits


def last_category(path):
    """The last part of a category path that reads like the name of a category; empty if there is none."""
    parts = [part.strip() for part in PATH_SEPARATOR.split(str(path or ""))]
    parts = [part for part in parts if part and len(part) <= LONGEST_CATEGORY]
    return parts[-1].lower() if parts else ""


def _load_sequences(folder):
    inter, *more = sorted(folder.glob("*.inter.json"))
    if more:
        raise ValueError(f"{folder} holds {1 + len(more)} files *.inter.json. Keep one data set in a folder.")
    items = sorted([*folder.glob("*.item.json"), *folder.glob("*.items.jsonl")])
    if len(items) != 1:
        raise ValueError(f"{folder} needs one *.item.json or *.items.jsonl beside {inter.name}, found {len(items)}.")
    fields = _read_items(items[0])
    histories = _parse(inter, inter.read_text(encoding="utf-8"))
    if not isinstance(histories, dict) or not all(isinstance(bought, list) for bought in histories.values()):
        raise ValueError(f"{inter.name} must hold an object from users to lists of items.")
    row_of = {item: row for row, item in enumerate(fields)}
    sequences = []
    for user, bought in histories.items():
        unknown = [item for item in bought if str(item) not in row_of]
        if unknown or not bought:
            what = f"the item {unknown[0]!r}, which {items[0].name} lacks" if unknown else "no items"
            raise ValueError(f"{inter.name}: user {user!r} has {what}.")
        sequences.append(np.array([row_of[str(item)] for item in bought]))
    if not sequences:
        raise ValueError(f"{inter.name} holds no users.")
    name = folder.name
    return _make(
        name,
        fields,
        sequences,
        list(histories),
        tie_order=f"as in {inter.name} (order of purchases of one day: whatever the file has)",
        index_files=sorted((folder / "index").glob("*.json")),
    )


def _load_tables(folder):
    purchases_file, products_file = _table_file(folder, "purchases"), _table_file(folder, "products")
    log, products = _read_table(purchases_file), _read_table(products_file)
    for path, frame, columns in (
        (purchases_file, log, ("user", "product", "time")),
        (products_file, products, ("id", "title")),
    ):
        missing = [column for column in columns if column not in frame.columns]
        if missing:
            raise ValueError(f"{path.name} lacks the columns {missing}, it has {list(frame.columns)}. Rename them.")
    if products["id"].duplicated().any():
        repeated = products["id"][products["id"].duplicated()].iloc[0]
        raise ValueError(f"{products_file.name} lists the product {repeated!r} twice. Keep one row a product.")
    unknown = ~log["product"].isin(products["id"])
    if unknown.any() or log.empty:
        what = f"{unknown.sum()} purchases of products that {products_file.name} lacks, such as "
        what = what + repr(log["product"][unknown].iloc[0]) if unknown.any() else "no purchases"
        raise ValueError(f"{purchases_file.name} holds {what}.")
    log["time"] = _times(log["time"], purchases_file)
    # Stable: purchases of one user at one time stay in the order of the file.
    log = log.sort_values(["user", "time"], kind="stable").reset_index(drop=True)

    names = [column for column in log.columns if column not in ("user", "product", "time", "query")]
    profiles = None
    if names:
        profiles = np.array(
            [
                ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True) if value != "")
                for values in zip(*(log[name].astype(str) for name in names), strict=True)
            ],
            dtype=object,
        )
    fields = {
        row["id"]: {name: row[name] for name in products.columns if name != "id"}
        for row in products.to_dict("records")
    }
    rows = products.reset_index().set_index("id")["index"].loc[log["product"]].to_numpy()
    starts = np.flatnonzero(np.append(True, log["user"].to_numpy()[1:] != log["user"].to_numpy()[:-1]))
    return _make(
        folder.name,
        fields,
        np.split(rows, starts[1:]),
        log["user"].iloc[starts].tolist(),
        tie_order=f"purchases of one user at one time in the order of {purchases_file.name}",
        queries=log["query"].to_numpy(object) if "query" in log.columns else None,
        profiles=profiles,
        index_files=sorted((folder / "index").glob("*.json")),
    )


def _make(name, fields, sequences, users, tie_order, queries=None, profiles=None, index_files=()):
    """A catalogue from {product id: {field: text}} and sequences."""
    titles, texts, categories = [], [], []
    for product_id, values in fields.items():
        values = {key: " ".join(str(value or "").split()) for key, value in values.items()}
        known = [key for key in TEXT_FIELDS if key in values] + [key for key in values if key not in TEXT_FIELDS]
        # Key terms are made of the title; they stand in where that is empty.
        title = values.get("title") or values.get("key_terms") or ""
        parts = [title, *(values[key] for key in known if key not in ("title", "key_terms"))]
        text = ". ".join(part for part in parts if part)
        if not text:
            raise ValueError(f"{name}: product {product_id!r} has no text at all. Give it a title.")
        titles.append(title)
        texts.append(text)
        categories.append(last_category(values.get("categories") or values.get("category")))
    source = "none"
    if queries is not None:
        source = "column query of the purchases"
    elif any(categories):
        source = "constructed: the last part of the category path of the product bought"
        queries = np.array(categories, dtype=object)[np.concatenate(sequences)]
    product_ids = list(fields)
    splits = leave_one_out(sequences, product_ids, users, queries, profiles)
    return Catalogue(
        name,
        product_ids,
        titles,
        texts,
        categories,
        source,
        LEAVE_ONE_OUT,
        tie_order,
        splits,
        sequences,
        list(index_files),
    )


def _load_completejourney():
    purchases = import_example("quickstart", "purchases").load_purchases(max_train=10**7)
    products = purchases.products
    splits = {
        name: getattr(purchases, name).rename_column("household", "user") for name in ("train", "validation", "test")
    }
    columns = ("title", "category", "department")
    validation_from, test_from = purchases.split_dates
    return Catalogue(
        name="completejourney (its README: simulated, for education)",
        product_ids=products["product_id"][:],
        titles=products["title"][:],
        texts=[". ".join(parts) for parts in zip(*(products[column][:] for column in columns), strict=True)],
        categories=products["type"][:],
        query_source="constructed: the type of the product bought",
        protocol=f"by time: validation from {validation_from}, test from {test_from}; history <= 20, half of it for products "
        "of the query's type; at most two rows a basket",
        tie_order="products of one basket in the order of their ids; no product of a basket is in the history of another",
        splits=splits,
        purchases=purchases,
    )


def _read_items(path):
    """{item: {field: text}}, in the order of the file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        items = _parse(path, text)
    else:
        rows = [_parse(path, line) for line in text.splitlines() if line.strip()]
        if not all(isinstance(row, dict) and "id" in row for row in rows):
            raise ValueError(f"{path.name} has a line that is no object with an id.")
        items = {
            str(row["id"]): {key: value for key, value in row.items() if key not in ("id", "asin")} for row in rows
        }
        if len(items) < len(rows):
            raise ValueError(f"{path.name} lists {len(rows) - len(items)} items twice. Keep one line an item.")
    if not isinstance(items, dict) or not items or not all(isinstance(values, dict) for values in items.values()):
        raise ValueError(f"{path.name} must hold an object from items to objects of texts, such as their title.")
    return items


def _parse(path, text):
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path.name} is not valid JSON ({error}). Write or download it again.") from None


def _table_file(folder, name, required=True):
    found = [folder / f"{name}{suffix}" for suffix in (".parquet", ".csv") if (folder / f"{name}{suffix}").is_file()]
    if len(found) > 1 or (required and not found):
        raise ValueError(f"{folder} needs one of {name}.parquet and {name}.csv, found {len(found)}.")
    return found[0] if found else None


def _read_table(path):
    """All columns as they stand in the file: ids keep their zeros, the brand "None" stays one; empty where null."""
    try:
        if path.suffix == ".csv":
            return pd.read_csv(path, dtype=str, keep_default_na=False)
        frame = pd.read_parquet(path)
    except (pa.ArrowInvalid, pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} cannot be read ({error}). Write it again.") from None
    for column in frame.columns.drop("time", errors="ignore"):
        if pd.api.types.is_float_dtype(frame[column]) and column in ("user", "product", "id"):
            raise ValueError(f"{path.name}: {column} holds floating-point numbers. Make ids strings or integers.")
        frame[column] = frame[column].astype("string").fillna("").astype(object)
    return frame


def _times(column, path):
    """Numbers, or dates; an empty one has no place in an order."""
    times = pd.to_numeric(column, errors="coerce") if column.dtype.kind not in "M" else column
    if times.isna().any() and column.dtype.kind not in "M":
        times = pd.to_datetime(column, errors="coerce", format="ISO8601", utc=True)
    if times.isna().any():
        row = int(np.flatnonzero(times.isna())[0])
        raise ValueError(
            f"{path.name}, row {row} (rows count from 0): the time {column.iloc[row]!r} is neither a number nor an ISO 8601 "
            "date, as those of the other rows must be, too."
        )
    return times
