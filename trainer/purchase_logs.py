"""From a log with one line for each purchase to what a model is trained on: purchases with their histories, or sessions."""

from itertools import groupby

from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetGenerationError

from ..sid_tokenizer.prompts import flatten_text

LAYOUTS = ("purchase", "session")
CHUNK = 1000


def read_purchase_log(
    log, user="user", product="product", query=None, time=None, profile=(), layout="purchase", max_history=50
):
    """
    Reads a log whose lines are single purchases, all lines of one user behind each other, without holding more of it in memory
    than the purchases of one user.

    Args:
        log (`Dataset` or `IterableDataset`):
            The lines, sorted by user. Where a stream has several shards (files), a user must be in one of them only; then they
            are read by as many processes and workers.
        user, product (`str`, *optional*, default to `"user"` and `"product"`):
            Columns with the user and the id of the product.
        query (`str`, *optional*):
            Column with what was searched for.
        time (`str`, *optional*):
            Column by which a user's purchases are put in order. As they stand if not given.
        profile (`list[str]`, *optional*):
            Columns that describe the user, taken from a user's first line.
        layout (`str`, *optional*, defaults to `"purchase"`):
            `"purchase"` gives a row for each purchase: `history`, `product` and, where there are such columns, `profile` and
            `query`. A user's first purchase is left out where there is nothing to predict it from. `"session"` gives a row for
            each user: `products`, and `queries` and `profile` likewise.
        max_history (`int`, *optional*, defaults to 50):
            Products in a history, or purchases in a session; the oldest are left out. A session that is longer becomes
            several, so that each purchase is learned once.

    Returns:
        `Dataset` (on disk) of a `Dataset`, `IterableDataset` of an `IterableDataset`.

    Raises:
        `TypeError`: if `log` is neither, or `profile` or `max_history` have the wrong type.
        `ValueError`: if columns are missing (the message says which there are), a line has no user or time, or lines are not
            sorted by user. Of a stream where it is read.
    """
    if not isinstance(log, Dataset | IterableDataset):
        raise TypeError(
            f"log is a {type(log).__name__}; pass a Dataset or IterableDataset of `datasets`, for instance "
            'load_dataset("parquet", data_files=..., split="train", streaming=True).'
        )
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; choose one of {', '.join(LAYOUTS)}.")
    if isinstance(profile, str) or not isinstance(max_history, int):
        raise TypeError(
            f"profile={profile!r} must be a list of columns, and max_history={max_history!r} a whole number: "
            'profile=["age", "income"], max_history=50.'
        )
    if max_history < 1:
        raise ValueError(f"max_history={max_history} must be at least 1.")
    columns = {"user": user, "product": product, "query": query, "time": time}
    columns = {name: column for name, column in columns.items() if column is not None}
    _check_columns(log.column_names, columns, profile)
    options = {"columns": columns, "profile": tuple(profile), "layout": layout, "max_history": max_history}
    if isinstance(log, Dataset):
        if next(_rows([log], **options), None) is None:
            raise ValueError(
                "The log gives no row: nothing stands before any of its purchases. Users need a second purchase, or the log a "
                "query or a profile."
            )
        try:
            return Dataset.from_generator(_rows, gen_kwargs={"shards": [log], **options})
        except DatasetGenerationError as error:
            raise error.__cause__ or error from None
    count = log.num_shards
    shards = [log] if count == 1 else [log.shard(count, index) for index in range(count)]
    return IterableDataset.from_generator(_rows, gen_kwargs={"shards": shards, **options})


def _check_columns(found, columns, profile):
    missing = [] if found is None else sorted({*columns.values(), *profile} - set(found))
    if missing:
        raise ValueError(
            f"The log has no columns {missing}, only {sorted(found)}. Say which columns hold what: "
            "read_purchase_log(log, user=..., product=..., query=..., time=..., profile=[...])."
        )


def _rows(shards, columns, profile, layout, max_history):
    for log in shards:
        previous = None
        for user, lines in groupby(_lines(log, columns, profile), key=lambda line: line[columns["user"]]):
            # Who comes again later would be two users; of all users nobody keeps a list.
            if previous is not None and not user > previous:
                raise ValueError(
                    f"The log is not sorted by user: {user!r} comes behind {previous!r}. Sort it first, for instance with "
                    f"log.sort({columns['user']!r})."
                )
            previous = user
            lines = list(lines)
            if "time" in columns:
                lines.sort(key=lambda line: line[columns["time"]])
            yield from (_sessions if layout == "session" else _purchases)(lines, columns, profile, max_history)


def _lines(log, columns, profile):
    names = list(dict.fromkeys([*columns.values(), *profile]))
    needed = [columns[name] for name in ("user", "product", "time") if name in columns]
    # In batches, because a stream that is read line by line within a DataLoader's worker deals out its shards once more.
    for batch in log.iter(batch_size=CHUNK):
        _check_columns(list(batch), columns, profile)
        for values in zip(*(batch[name] for name in names), strict=True):
            line = dict(zip(names, values, strict=True))
            for name in needed:
                if line[name] is None or line[name] != line[name]:
                    raise ValueError(f"The log has a line without {name}: {line}. Leave such lines out.")
            yield line


def _purchases(lines, columns, profile, max_history):
    who, products = _profile(lines, profile), [line[columns["product"]] for line in lines]
    is_known = bool(profile and flatten_text("profile", who["profile"]))
    for at, line in enumerate(lines):
        row = who | {"history": products[max(0, at - max_history) : at], "product": products[at]}
        if "query" in columns:
            row["query"] = line[columns["query"]] or ""
        if row["history"] or is_known or row.get("query", "").split():
            yield row


def _sessions(lines, columns, profile, max_history):
    who = _profile(lines, profile)
    for start in range(0, len(lines), max_history):
        part = lines[start : start + max_history]
        row = who | {"products": [line[columns["product"]] for line in part]}
        if "query" in columns:
            row["queries"] = [line[columns["query"]] or "" for line in part]
        yield row


def _profile(lines, profile):
    return {"profile": {name: lines[0][name] for name in profile}} if profile else {}
