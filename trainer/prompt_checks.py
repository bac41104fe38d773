"""Which codebooks prompts were tokenized for, and whether those are a tokenizer's."""

import json
import os

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers.utils import logging

from ..sid_tokenizer.files import read_json
from ..sid_tokenizer.hub import hub_errors

logger = logging.get_logger(__name__)

DETAILS_FILE = "sid_prompts.json"
FORMAT_VERSION = 1
BATCH_ROWS = 10_000


def check_prompts(dataset, tokenizer, config_name="default", revision=None, token=None):
    """
    Checks that prompts were tokenized for a tokenizer's codebooks. Of a name, `sid_prompts.json` is read; of a dataset, answers are
    compared with the SIDs that the tokenizer gives their products, without any file.

    Purchases that are not tokenized fit each tokenizer whose catalog holds their products.

    Args:
        dataset (`str`, `Dataset` or `IterableDataset`):
            A repository or folder of [`push_prompts`], or rows.
        tokenizer ([`SIDTokenizer`]):
            What they are to be trained with.
        config_name (`str`, *optional*, defaults to `"default"`):
            The configuration.
        revision, token (`str`, *optional*):
            Of the repository.

    Raises:
        `ValueError`: if they were tokenized for other codebooks, for another vocabulary, or for a catalog that this one does not
            descend from.
    """
    if not isinstance(dataset, str | os.PathLike):
        for number, batch in enumerate(batches(dataset, "the")):
            check_rows(batch, tokenizer, "the", number * BATCH_ROWS)
        return
    name = f"{'data' if config_name == 'default' else config_name}/{DETAILS_FILE}"
    path = os.path.join(dataset, name)
    if not os.path.isdir(dataset):
        with hub_errors(dataset, token):
            try:
                path = hf_hub_download(dataset, name, repo_type="dataset", revision=revision, token=token)
            except EntryNotFoundError:
                path = None
    if path is None or not os.path.isfile(path):
        raise ValueError(
            f"{dataset} has no {name}, which says for which codebooks its rows were tokenized: push_prompts writes it. Pass the "
            "rows themselves (load_dataset), which are then compared one by one."
        )
    details = read_json(path)
    if details.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{name} has format version {details.get('format_version')}, this version of rqsid reads {FORMAT_VERSION}."
        )
    if not details["is_tokenized"]:
        return
    found = tokenizer.codebook_fingerprint()
    remedy = "Load the tokenizer that they were made with, or tokenize the purchases anew."
    if details["codebook"] != found:
        raise ValueError(
            f"The prompts of {dataset} were tokenized for codebook {details['codebook']}, the tokenizer has codebook {found}: their "
            f"SIDs would name other products. {remedy}"
        )
    if details["vocab_size"] != len(tokenizer):
        raise ValueError(
            f"The prompts of {dataset} were tokenized with {details['vocab_size']} tokens, the tokenizer has {len(tokenizer)}. {remedy}"
        )
    known = [entry["id"] for entry in tokenizer.history] + list(tokenizer.catalog.ancestors)
    if details["catalog"]["id"] not in known:
        raise ValueError(
            f"The prompts of {dataset} name products of catalog version {details['catalog']['version']} "
            f"({details['catalog']['id']}), which this catalog (version {tokenizer.catalog.version}, {tokenizer.catalog.version_id}) "
            f"does not descend from. {remedy}"
        )
    if details["prompt"] != _prompt(tokenizer):
        logger.warning(
            f"The prompts of {dataset} were built from another prompt template than the tokenizer's: a model trained on them would "
            "be asked with other prompts than it has seen."
        )


def check_rows(batch, tokenizer, name="train", start=0):
    """
    Checks a batch of rows, tokenized or purchases, against a tokenizer.

    Args:
        batch (`pa.Table`): The rows.
        tokenizer ([`SIDTokenizer`])
        name (`str`, *optional*, defaults to `"train"`): What messages call the dataset.
        start (`int`, *optional*, defaults to 0): The place of the first row.

    Raises:
        `ValueError`: naming the row.
    """
    columns = batch.column_names
    if not is_tokenized(columns):
        if "product" in columns:
            tokenizer.catalog.product_rows(batch["product"].combine_chunks())
        return
    for column in ("input_ids", "label_ids"):
        ids = _flat(batch[column])
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(tokenizer):
            raise ValueError(
                f"{name} dataset: {column} holds token ids from {ids.min()} to {ids.max()}, the tokenizer has {len(tokenizer)}. It was "
                "tokenized by another."
            )
    if "product_rows" not in columns:
        return
    # 1. the products of each row: one, or those of a session
    products = batch["product_rows"].combine_chunks()
    is_list = pa.types.is_list(products.type) or pa.types.is_large_list(products.type)
    counts = products.value_lengths().to_numpy(zero_copy_only=False) if is_list else np.ones(len(products), int)
    products = np.asarray(products.flatten() if is_list else products, dtype=np.int64)
    if len(products) and products.max() >= len(tokenizer.catalog):
        raise ValueError(
            f"{name} dataset: product_rows reach {products.max()}, the catalog has {len(tokenizer.catalog)} products. It was tokenized "
            "for another."
        )
    # 2. their SIDs with end tokens, one behind the other; a row that is answered with text has none
    unique, inverse = np.unique(products, return_inverse=True)
    sids = tokenizer.sid_sequences(tokenizer.catalog.sid_rows(np.maximum(unique, 0))).numpy()
    sids = np.concatenate([sids, np.full((len(sids), 1), tokenizer.eos_token_id)], 1)[inverse]
    row_of_product = np.repeat(np.arange(len(batch)), counts)
    is_text = np.zeros(len(batch), dtype=bool)
    is_text[row_of_product[products < 0]] = True
    sids[is_text[row_of_product]] = -1
    expected_lengths = np.bincount(row_of_product, (sids >= 0).sum(1), len(batch)).astype(np.int64)
    # 3. compared with the answers
    labels = batch["label_ids"].combine_chunks()
    lengths = labels.value_lengths().to_numpy(zero_copy_only=False)
    differs = (lengths != expected_lengths) & ~is_text
    if not differs.any():
        row_of_label = np.repeat(np.arange(len(batch)), lengths)
        mine = ~is_text[row_of_label]
        wrong = np.asarray(labels.flatten())[mine] != sids[sids >= 0]
        differs[row_of_label[mine][wrong]] = True
    if differs.any():
        row = int(np.flatnonzero(differs)[0])
        product = tokenizer.catalog.product_ids(products[row_of_product == row][:1])[0]
        raise ValueError(
            f"Row {start + row} of the {name} dataset answers with other tokens than the SID of its product {product!r}: it was "
            f"tokenized for another codebook than the tokenizer's ({tokenizer.codebook_fingerprint()}). Load the tokenizer that it was "
            "made with, or tokenize the purchases anew."
        )


def batches(dataset, name):
    """
    Args:
        dataset (`Dataset`, `IterableDataset` or `list[dict]`): Rows.
        name (`str`): What messages call it.

    Returns:
        `Iterator[pa.Table]`: up to `BATCH_ROWS` rows each, all of the same columns.
    """
    if isinstance(dataset, list):
        dataset = Dataset.from_list(dataset)
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"{name} dataset is a {type(dataset).__name__}; pass a Dataset or IterableDataset of `datasets`, a list of dicts, or a dict "
            "of them by split."
        )
    if dataset.features is not None:
        yield from dataset.with_format("arrow").iter(batch_size=BATCH_ROWS)
        return
    schema = None  # of a stream that does not know its columns: what datasets takes those of its first rows for
    for batch in dataset.iter(batch_size=BATCH_ROWS):
        try:
            schema = Dataset.from_dict(batch).features.arrow_schema if schema is None else schema
            if set(batch) != set(schema.names):
                raise KeyError(", ".join(sorted(set(batch) ^ set(schema.names))))
            yield pa.Table.from_pydict(batch, schema=schema)
        except (pa.ArrowInvalid, pa.ArrowTypeError, KeyError) as error:
            raise ValueError(
                f"{name} dataset: rows differ in their columns ({' '.join(str(error).split())}). Tell a stream its columns: "
                "dataset.cast(Features({...}))."
            ) from None


def prompt_details(tokenizer, features, tokenizer_id):
    """
    Returns:
        `dict`: what `sid_prompts.json` says of rows with these `features`.
    """
    catalog = tokenizer.catalog
    return {
        "format_version": FORMAT_VERSION,
        "is_tokenized": is_tokenized(features),
        "tokenizer": tokenizer_id,
        "codebook": tokenizer.codebook_fingerprint(),
        "vocab_size": len(tokenizer),
        "catalog": {"version": catalog.version, "id": catalog.version_id, "products": len(catalog)},
        "prompt": _prompt(tokenizer),
    }


def _prompt(tokenizer):
    """What prompts are built by, apart from how long they may be."""
    template = {name: value for name, value in tokenizer.prompt_template.to_dict().items() if name != "max_length"}
    prompt = {"template": template, "prefix": tokenizer.prompt_prefix, "suffix": tokenizer.prompt_suffix}
    return json.loads(json.dumps(prompt))


def is_tokenized(columns):
    """
    Returns:
        `bool`: whether rows are those of [`tokenize_examples`].
    """
    return {"input_ids", "label_ids"} <= set(columns)


def _flat(column):
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
