"""Several tasks in one dataset: what LC-Rec (arXiv 2311.09049) trains on beside the purchases themselves."""

import math
from collections.abc import Mapping
from numbers import Real

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value, interleave_datasets
from transformers.utils import logging

from ..sid_tokenizer.prompt_encoding import check_titles
from ..sid_tokenizer.prompts import flatten_text

logger = logging.get_logger(__name__)

ITEM_TASKS = ("title", "describe")
CHUNK = 10_000


def mix_tasks(purchases, tokenizer, weights, seed=0):
    """
    Makes one dataset of several tasks, drawn at random with given weights.

    The tasks are those of a [`PromptTemplate`]: `"purchase"` (all fields -> SID), `"history"` (what stands beside the query ->
    SID), `"query"` (the query -> SID), `"title"` (a product's title -> SID) and `"describe"` (SID -> title). The first three run
    over the purchases that have what the task needs; the last two over the catalog's products that have a text and are not
    withdrawn. Rows are drawn until each task has gone through its own at least once; those of smaller ones come again.

    Args:
        purchases (`Dataset` or `IterableDataset`):
            Purchases, or sessions if the tokenizer's template has `layout="session"`, which then are the task `"purchase"`. A
            stream is read once for each task that runs over it.
        tokenizer ([`SIDTokenizer`]):
            For its template and its catalog.
        weights (`dict[str, float]`):
            Tasks, and how often each is drawn, in relation to the others.
        seed (`int`, *optional*, defaults to 0):
            Of the drawing.

    Returns:
        `Dataset` or `IterableDataset`, as `purchases`: their columns and `task`, for [`tokenize_examples`] or [`SIDTrainer`].
        Columns that a task does not have are `None`.

    Raises:
        `TypeError`: if `purchases` is no dataset, or `weights` no mapping.
        `ValueError`: if a task is unknown, or the template has no field for it; a weight is not positive; the purchases lack a
            column, or none of them can serve a task; or the catalog has no texts.

    Example:

    ```python
    train = mix_tasks(train, tokenizer, {"purchase": 4, "history": 2, "query": 2, "title": 1, "describe": 1})
    trainer = SIDTrainer(model, args, train_dataset=train, processing_class=tokenizer)
    ```
    """
    # 1. arguments
    if not isinstance(purchases, Dataset | IterableDataset):
        raise TypeError(
            f"purchases is a {type(purchases).__name__}; pass a Dataset or IterableDataset of `datasets` "
            "(Dataset.from_list(rows) makes one)."
        )
    template = tokenizer.prompt_template
    if "task" in template.fields:
        raise ValueError(
            f'The prompt template has a field "task" ({template.fields}), so that the column cannot say which task a row is. '
            "Rename the field."
        )
    _check_weights(weights, template)
    columns = purchases.column_names
    if columns is None:  # a stream that does not know before its first row
        columns = sorted(set().union(*purchases.take(1)))
    if "task" in columns:
        raise ValueError('The purchases have a column "task" already. Remove or rename it.')
    for task in weights:
        _check_columns(task, template, columns)

    # 2. a dataset for each task
    products, parts = None, []
    if set(weights) & set(ITEM_TASKS):
        kind = getattr((purchases.features or {}).get("product"), "dtype", "string")
        products = _titled_products(tokenizer.catalog, kind if kind in ("string", "large_string") else "string")
    for task in weights:
        if task in ITEM_TASKS:
            part = products
            if isinstance(purchases, IterableDataset):
                shards = max(1, min(purchases.num_shards, len(part)))
                # Catalogs often are sorted by kind of product, and nobody shuffles a stream.
                part = part.to_iterable_dataset(num_shards=shards).shuffle(seed=seed, buffer_size=CHUNK)
        else:
            part = _usable_purchases(purchases, task)
        parts.append(part.map(_with_task, batched=True, fn_kwargs={"task": task}, **_words(part, f"task {task}")))

    # 3. drawn one by one
    total = math.fsum(weights.values())
    return interleave_datasets(
        parts,
        probabilities=[weight / total for weight in weights.values()],
        seed=seed,
        stopping_strategy="all_exhausted",
    )


def _check_weights(weights, template):
    if not isinstance(weights, Mapping):
        raise TypeError(f'weights must be a mapping such as {{"purchase": 4, "title": 1}}, got {weights!r}.')
    if not weights:
        raise ValueError('weights is empty: name at least one task, for instance {"purchase": 1}.')
    for task, weight in weights.items():
        template.check_task(task)
        if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 < weight < math.inf:
            raise ValueError(f"weights[{task!r}]={weight!r} must be a positive number. Leave out what is not wanted.")


def _check_columns(task, template, columns):
    if task in ITEM_TASKS:
        return
    if template.layout == "session":
        needed = ["products"]
    else:
        needed = ["product"] if task == "purchase" else ["product", task]
    missing = [name for name in needed if name not in columns]
    if missing:
        raise ValueError(f"The task {task!r} needs the columns {needed}; the purchases have only {sorted(columns)}.")
    if not set(template.example_keys()) & set(columns):
        raise ValueError(
            f"The purchases have none of the prompt's fields {template.example_keys()}; found {sorted(columns)}."
        )


def _usable_purchases(purchases, task):
    """Those that have a history, or a query, where that is what the task is about."""
    if task == "purchase":
        return purchases
    kept = purchases.filter(
        _has_value, input_columns=[task], batched=True, fn_kwargs={"name": task}, **_words(purchases, f"has {task}")
    )
    if not isinstance(purchases, Dataset):
        logger.warning(f"Purchases of the stream without a {task} are left out of the task {task!r}, uncounted.")
    elif len(kept) == 0:
        raise ValueError(f"None of the {len(purchases)} purchases has a {task}. Leave the task {task!r} out.")
    elif len(kept) < len(purchases):
        logger.warning(
            f"{len(purchases) - len(kept)} of {len(purchases)} purchases have no {task} and are left out of the task {task!r}."
        )
    return kept


def _has_value(values, name):
    if name == "history":
        return [value is not None and len(value) > 0 for value in values]
    return [value is not None and flatten_text(name, value) != "" for value in values]


def _with_task(rows, task):
    return {"task": [task] * len(next(iter(rows.values())))}


def _titled_products(catalog, kind):
    """`Dataset` of one column, `product`, on disk: ids of the products that have a text and are not withdrawn."""
    check_titles(catalog)
    # A dataset without a row cannot be made of a generator.
    if next(_titled_product_ids(catalog), None) is None:
        raise ValueError(
            f"None of the {len(catalog)} products has a text and is not withdrawn. Leave the tasks of titles out."
        )
    products = Dataset.from_generator(
        _titled_product_ids,
        features=Features({"product": Value(kind)}),
        gen_kwargs={"catalog": catalog},
        # The catalog's own hash of its contents; hashing it anew would read all of it.
        fingerprint=f"titled-{catalog.version_id}-{kind}",
    )
    if len(products) < len(catalog):
        logger.warning(
            f"{len(catalog) - len(products)} of {len(catalog)} products have no text or are withdrawn, and are left out of the "
            "tasks of titles."
        )
    return products


def _titled_product_ids(catalog):
    for start in range(0, len(catalog), CHUNK):
        rows = np.arange(start, min(start + CHUNK, len(catalog)))
        rows = rows[~np.asarray(catalog.withdrawn[rows], dtype=bool)]
        for product_id, text in zip(catalog.product_ids(rows), catalog.texts(rows), strict=True):
            if text.split():
                yield {"product": product_id}


def _words(dataset, desc):
    """What a progress bar says, which streams have none of."""
    return {"desc": desc} if isinstance(dataset, Dataset) else {}
