"""From what a user passes as a dataset to rows of token ids, without holding in memory what grows with the data."""

import functools
import os
import secrets
import shutil
import tempfile
import weakref

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from .data import tokenize_examples
from .prompt_checks import check_rows

logger = logging.get_logger(__name__)

CHUNK = 10_000


def prepare_dataset(dataset, name, tokenizer, args, limits, vocabulary=None, training=False):
    """
    Tokenizes purchases, or checks rows that are tokenized already.

    A stream stays a stream. Where several processes train on one, each takes its share of the rows, and begins again (in the
    same order) when they end, so that no process waits for others that have more; one to evaluate on is written to disk first,
    so that each of its rows is counted once.

    Args:
        dataset (`Dataset`, `IterableDataset` or `list[dict]`): Purchases, sessions, or rows of [`tokenize_examples`].
        name (`str`): What messages call it.
        tokenizer ([`SIDTokenizer`]): Builds prompts.
        args ([`SIDTrainingArguments`]): For the processes, and whether anything is ranked.
        limits (`tuple[int, int]`): Tokens of the longest prompt, and of the longest row; `None` for no limit.
        vocabulary ([`SIDVocabulary`], *optional*): What answers must consist of.
        training (`bool`, *optional*, defaults to `False`):
            Whether it is to be trained on. Otherwise sessions become their last purchases, which rankings are compared with.

    Returns:
        `Dataset` or `IterableDataset`

    Raises:
        `TypeError`: if it is none of these.
        `ValueError`: if it is empty, lacks columns, or holds rows that are too long, that were tokenized for other codebooks, or
            answers in text where `vocabulary` has none.
    """
    if isinstance(dataset, list):
        strangers = [row for row in dataset if not isinstance(row, dict)]
        if strangers:
            raise TypeError(f"The {name} dataset is a list of {type(strangers[0]).__name__}; pass a list of dicts.")
        dataset = Dataset.from_list(dataset)
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"The {name} dataset is a {type(dataset).__name__}; pass a Dataset or IterableDataset of `datasets` "
            "(Dataset.from_pandas(frame) makes one of a DataFrame), or a list of dicts."
        )
    # A stream says what it holds, and what is wrong with that, when it is read: its first row is, before training starts.
    first = list(dataset.take(1))
    if not first:
        raise ValueError(f"The {name} dataset is empty: it needs at least one purchase.")
    columns = dataset.column_names or list(first[0])
    is_ready = {"input_ids", "label_ids"} <= set(columns)
    if not is_ready:
        dataset, columns = _tokenize(dataset, columns, first[0], name, tokenizer, args, limits[0], training)
    elif isinstance(dataset, IterableDataset):
        check_rows(pa.Table.from_pylist(first), tokenizer, name)
    if not training and "label_positions" in columns:
        raise ValueError(
            f"The {name} dataset holds tokenized sessions, or sessions among other tasks, whose answers are to be learned at once. "
            "To be ranked they are needed one by one: pass the sessions themselves, of which the last purchases are ranked."
        )
    check = functools.partial(
        _check_rows,
        name=name,
        max_sid_length=tokenizer.max_sid_length,
        limits=limits,
        vocabulary=vocabulary,
        is_ranked=not training and not args.prediction_loss_only,
    )
    if isinstance(dataset, IterableDataset):
        return _share_stream(dataset.map(check, batched=True), args, training)
    names = [column for column in ("input_ids", "label_ids", "label_positions", "product_rows") if column in columns]
    for part, table in enumerate(dataset.select_columns(names).with_format("arrow").iter(batch_size=CHUNK)):
        if is_ready:
            check_rows(table, tokenizer, name, part * CHUNK)
        check({column: table[column] for column in names})
    return dataset


def _tokenize(dataset, columns, first, name, tokenizer, args, max_prompt_length, training):
    template = tokenizer.prompt_template
    if template.layout == "purchase":
        fields = set(template.fields)
        others = set(columns) - {*template.example_keys(), "product", "task", "title"}
        if fields - set(columns) and others:
            # A misspelt column would be left out of every prompt without a word.
            logger.warning(
                f"The {name} dataset has no column {sorted(fields - set(columns))}, which the prompt has a place for; its "
                f"columns {sorted(others)} are not used."
            )
    tokenize = tokenize_examples if training or template.layout == "purchase" else tokenize_last_purchases
    options = {"tokenizer": tokenizer, "max_prompt_length": max_prompt_length}
    try:
        made = list(tokenize({column: [first[column]] for column in columns}, **options))
        on_disk = isinstance(dataset, Dataset)
        extra = {"num_proc": args.dataset_num_proc, "desc": f"prompts ({name})"} if on_disk else {}
        with args.main_process_first(desc=f"prompts ({name})"):
            dataset = dataset.map(tokenize, batched=True, remove_columns=columns, fn_kwargs=options, **extra)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"The {name} dataset cannot be made prompts and answers of: {error} (Rows are counted within batches of 1,000.)"
        ) from error
    if on_disk:
        counts = [0, 0]
        for table in dataset.select_columns(["num_truncated"]).with_format("arrow").iter(batch_size=CHUNK):
            truncated = np.asarray(table["num_truncated"])
            counts = [counts[0] + int((truncated > 0).sum()), counts[1] + int(truncated.sum())]
        if counts[0]:
            logger.warning(
                f"{counts[0]} of {len(dataset)} {name} prompts exceeded {max_prompt_length} tokens: the {counts[1]} oldest "
                "products of their histories were left out. Raise max_prompt_length to keep them."
            )
    return dataset, made


def _check_rows(rows, name, max_sid_length, limits, vocabulary, is_ranked):
    """Checks a batch of tokenized rows, which it returns: `pyarrow` columns of a dataset on disk, lists of a stream."""
    prompts, answers = _lengths(rows["input_ids"]), _lengths(rows["label_ids"])
    is_session = rows.get("label_positions") is not None
    max_prompt, max_row = limits
    # A session ends with an answer, which its prompt is without.
    longest = int(prompts.max()) - (max_sid_length if is_session else 0)
    if max_prompt is not None and longest > max_prompt:
        raise ValueError(
            f"The {name} dataset holds a prompt of {longest} tokens, more than {max_prompt}. Tokenize it with "
            f"max_prompt_length={max_prompt}, or pass the purchases themselves."
        )
    longest = int(prompts.max() if is_session else (prompts + answers).max())
    if max_row is not None and longest > max_row:
        raise ValueError(
            f"The {name} dataset holds a prompt and an answer of {longest} tokens together, more than the model's context of "
            f"{max_row}. Shorten its texts, or set a smaller max_prompt_length."
        )
    if vocabulary is not None:
        vocabulary.check(_flat(rows["label_ids"]), name)
    if is_ranked and rows.get("product_rows") is not None and (np.asarray(rows["product_rows"]) < 0).any():
        raise ValueError(
            f'The {name} dataset has rows of the task "describe", which are answered with text, not with a product that could '
            "be ranked. Leave them out, or set prediction_loss_only=True."
        )
    return rows


def _lengths(column):
    if isinstance(column, pa.ChunkedArray):
        return pc.list_value_length(column).to_numpy()
    return np.fromiter(map(len, column), dtype=np.int64, count=len(column))


def _flat(column):
    if isinstance(column, pa.ChunkedArray):
        return pc.list_flatten(column).to_numpy()
    return np.concatenate([np.asarray(row) for row in column])


def _share_stream(dataset, args, training):
    if args.world_size == 1:
        return dataset
    if training:
        # accelerate deals out the shards, or the batches where there are fewer shards than processes.
        return dataset.repeat(None)
    # One name for all processes, of which the first of each machine writes and the others read.
    name = broadcast_object_list([secrets.token_hex(8)])[0]
    folder = os.path.join(tempfile.gettempdir(), f"rqsid-evaluation-{name}")
    with args.main_process_first(local=True, desc="evaluation rows"):
        rows = Dataset.from_generator(_iterate, gen_kwargs={"stream": dataset}, fingerprint=name, cache_dir=folder)
    if args.local_process_index == 0:
        weakref.finalize(rows, shutil.rmtree, folder, ignore_errors=True)
    return rows


def _iterate(stream):
    yield from stream


def tokenize_last_purchases(examples, tokenizer, max_prompt_length=None):
    """
    Turns a batch of sessions into what [`tokenize_examples`] makes of single purchases: the last purchase of each session is
    the answer, the others are its prompt. Rows with a `product`, which is the next purchase, are left to [`tokenize_examples`].

    Args:
        examples (`dict[str, list]`): Columns of sessions, `products` among them.
        tokenizer ([`SIDTokenizer`]): Builds prompts and answers.
        max_prompt_length (`int`, *optional*): As `max_length` of [`~SIDTokenizer.encode_prompts`].

    Returns:
        `dict[str, list]`: `input_ids`, `label_ids`, `product_rows` and `num_truncated`.

    Raises:
        `ValueError`: if there is no column `products`, or a session is empty.
    """
    if "product" in examples:
        return tokenize_examples(examples, tokenizer, max_prompt_length)
    if "products" not in examples:
        raise ValueError(
            f'Sessions need a column "products" with the ids of the products bought; found {sorted(examples)}.'
        )
    empty = [row for row, products in enumerate(examples["products"]) if not len(products)]
    if empty:
        raise ValueError(
            f"Session {empty[0]} of the batch has no products, so there is nothing to rank. Leave it out."
        )
    answers = [products[-1] for products in examples["products"]]
    rows = [dict(zip(examples, values, strict=True)) for values in zip(*examples.values(), strict=True)]
    rows = [row | {"products": row["products"][:-1]} for row in rows]
    prompts = tokenizer.encode_prompts(rows, max_length=max_prompt_length)
    return {
        "input_ids": prompts["input_ids"],
        "label_ids": [sid + [tokenizer.eos_token_id] for sid in tokenizer.encode_products(answers)],
        "product_rows": tokenizer.catalog.product_rows(answers).tolist(),
        "num_truncated": prompts["num_truncated"],
    }
