"""From what a user passes as a dataset to rows of token ids, without holding in memory what grows with the data."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from .data import tokenize_examples

logger = logging.get_logger(__name__)

CHUNK = 10_000


def prepare_dataset(dataset, name, tokenizer, args, limits, vocabulary=None, training=False):
    """
    Tokenizes purchases, or checks rows that are tokenized already.

    A stream stays a stream. Where several processes train on one, each takes its share of the rows, and begins again when they
    end, so that no process waits for others that have more; one to evaluate on is written to disk first, so that each of its
    rows is counted once.

    Args:
        dataset (`Dataset`, `IterableDataset` or `list[dict]`): Purchases, sessions, or rows of [`tokenize_examples`].
        name (`str`): What messages call it.
        tokenizer ([`SIDTokenizer`]): Builds prompts.
        args ([`SIDTrainingArguments`]): For the number of processes.
        limits (`tuple[int, int]`): Tokens of the longest prompt, and of the longest row; `None` for no limit.
        vocabulary ([`SIDVocabulary`], *optional*): What answers must consist of.
        training (`bool`, *optional*, defaults to `False`):
            Whether it is to be trained on. Otherwise sessions become their last purchases, which rankings are compared with.

    Returns:
        `Dataset` or `IterableDataset`

    Raises:
        `TypeError`: if it is none of these.
        `ValueError`: if it is empty, lacks columns, or holds rows that are too long, or answers in text where `vocabulary` has
            none.
    """
    if isinstance(dataset, list):
        dataset = Dataset.from_list(dataset)
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"The {name} dataset is a {type(dataset).__name__}; pass a Dataset or IterableDataset of `datasets` "
            "(Dataset.from_pandas(frame) makes one of a DataFrame), or a list of dicts."
        )
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"The {name} dataset is empty: it needs at least one purchase.")
    if not {"input_ids", "label_ids"} <= set(dataset.column_names or ()):
        dataset = _tokenize(dataset, name, tokenizer, args, limits[0], training)
    elif not training and "label_positions" in dataset.column_names:
        raise ValueError(
            f"The {name} dataset holds tokenized sessions, whose purchases were to be learned at once. To be ranked they are "
            "needed one by one: pass the sessions themselves, of which the last purchases are ranked."
        )
    if isinstance(dataset, IterableDataset):
        if vocabulary is not None:
            dataset = dataset.map(_check_answers, batched=True, fn_kwargs={"vocabulary": vocabulary, "name": name})
        dataset = _share_stream(dataset, args, training)
    if isinstance(dataset, IterableDataset):
        return dataset
    _check_rows(dataset, name, tokenizer, limits, vocabulary)
    return dataset


def _tokenize(dataset, name, tokenizer, args, max_prompt_length, training):
    template = tokenizer.prompt_template
    columns, known = set(dataset.column_names or ()), {*template.example_keys(), "product", "task", "title"}
    if template.layout == "purchase":
        fields, others = set(template.fields), columns - known
        if fields - columns and others:
            # A misspelt column would be left out of every prompt without a word.
            logger.warning(
                f"The {name} dataset has no column {sorted(fields - columns)}, which the prompt has a place for; its columns "
                f"{sorted(others)} are not used."
            )
    options = {"num_proc": args.dataset_num_proc, "desc": f"prompts ({name})"} if isinstance(dataset, Dataset) else {}
    with args.main_process_first(desc=f"prompts ({name})"):
        dataset = dataset.map(
            tokenize_examples if training or template.layout == "purchase" else tokenize_last_purchases,
            batched=True,
            remove_columns=dataset.column_names,
            fn_kwargs={"tokenizer": tokenizer, "max_prompt_length": max_prompt_length},
            **options,
        )
    if isinstance(dataset, Dataset):
        counts = [0, 0]
        for table in _tables(dataset, ["num_truncated"]):
            truncated = np.asarray(table["num_truncated"])
            counts = [counts[0] + int((truncated > 0).sum()), counts[1] + int(truncated.sum())]
        if counts[0]:
            logger.warning(
                f"{counts[0]} of {len(dataset)} {name} prompts exceeded {max_prompt_length} tokens: the {counts[1]} oldest "
                "products of their histories were left out. Raise max_prompt_length to keep them."
            )
    return dataset


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


def _share_stream(dataset, args, training):
    if args.world_size == 1:
        return dataset
    if not training:
        return Dataset.from_generator(lambda: iter(dataset))
    # accelerate deals out the shards, or the batches where there are fewer shards than processes.
    return dataset.repeat(None)


def _tables(dataset, columns):
    """The rows in pieces (`pyarrow.Table`): a whole column of a dataset on disk may not fit into memory."""
    return dataset.select_columns(columns).with_format("arrow").iter(batch_size=CHUNK)


def _check_rows(dataset, name, tokenizer, limits, vocabulary):
    is_session = "label_positions" in dataset.column_names
    max_prompt, max_row = limits
    for table in _tables(dataset, ["input_ids", "label_ids"]):
        lengths = pc.list_value_length(table["input_ids"]).to_numpy()
        answers = pc.list_value_length(table["label_ids"]).to_numpy()
        # A session ends with an answer, which its prompt is without.
        longest = int(lengths.max()) - (tokenizer.max_sid_length if is_session else 0)
        if max_prompt is not None and longest > max_prompt:
            raise ValueError(
                f"The {name} dataset holds a prompt of {longest} tokens, more than {max_prompt}. Tokenize it with "
                f"max_prompt_length={max_prompt}, or pass the purchases themselves."
            )
        longest = int(lengths.max() if is_session else (lengths + answers).max())
        if max_row is not None and longest > max_row:
            raise ValueError(
                f"The {name} dataset holds a prompt and an answer of {longest} tokens together, more than the model's context "
                f"of {max_row}. Shorten its texts, or set a smaller max_prompt_length."
            )
        if vocabulary is not None:
            vocabulary.check(_flat(table["label_ids"]), name)


def _check_answers(rows, vocabulary, name):
    vocabulary.check(np.concatenate([np.asarray(ids) for ids in rows["label_ids"]]), name)
    return rows


def _flat(column):
    return pc.list_flatten(column).to_numpy() if isinstance(column, pa.ChunkedArray) else column.flatten().to_numpy()
