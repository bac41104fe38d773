"""Prepared prompts on the Hub: Parquet files, a data card, and what says which codebooks they were made for."""

import json
import os
import re
import tempfile
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetInfo, Features, IterableDataset, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import cached_file, logging

from ..sid_tokenizer.files import read_json, write_json
from ..sid_tokenizer.hub import hub_errors, push_folder
from .data import tokenize_examples

logger = logging.get_logger(__name__)

DETAILS_FILE = "sid_prompts.json"
FORMAT_VERSION = 1
BATCH_ROWS = 10_000
SHARD_BYTES = 500 * 2**20  # in memory; less on disk
TAGS = ["generative-retrieval", "rqsid", "semantic-ids"]
MEANINGS = {
    "input_ids": "token ids of the prompt; of a session, with the SIDs of its purchases",
    "label_ids": "token ids of the answer, its end token included",
    "label_positions": "places in `input_ids` whose next token is to be predicted",
    "product_rows": "the product bought, as its row in the catalog; -1 where the answer is text",
    "num_truncated": "products left out of the history, because the prompt was too long",
    "product": "id of the product bought",
    "products": "ids of the products bought, the oldest first",
    "queries": "what was asked for before each of `products`",
    "history": "ids of the products bought before, the oldest first",
    "profile": "what is known of the customer",
    "query": "what the customer asks for",
    "task": "what the row trains",
}


def push_prompts(
    dataset,
    tokenizer,
    repo_id,
    *,
    split="train",
    config_name="default",
    tokenizer_id=None,
    private=None,
    token=None,
    revision=None,
    commit_message="Upload prompts",
    tag=None,
    license=None,
):
    """
    Publishes prompts, or the purchases that they are to be made of, as Parquet files with a data card, in one commit.

    `load_dataset(repo_id)` gives rows and features back. Beside the files lies `sid_prompts.json`, which says for which codebooks
    the rows were tokenized; [`check_prompts`] goes by it. Rows are checked and written in pieces, so that no more than one is in
    memory. What a configuration held before is replaced; others stay.

    Args:
        dataset (`Dataset`, `IterableDataset`, `list[dict]`, or a `dict` of them by split, such as a `DatasetDict`):
            Rows of [`tokenize_examples`], or purchases.
        tokenizer ([`SIDTokenizer`]):
            What tokenized them, or is to.
        repo_id (`str`):
            The data set's repository, such as `"org/prompts"`; made if there is none.
        split (`str`, *optional*, defaults to `"train"`):
            What a single dataset is.
        config_name (`str`, *optional*, defaults to `"default"`):
            The configuration, which is what `load_dataset` calls the second of its arguments.
        tokenizer_id (`str`, *optional*):
            Where the tokenizer is on the Hub, for the card; where it was loaded from, if not given.
        private, token, revision, commit_message, tag (*optional*):
            As in [`~rqsid.sid_tokenizer.hub.push_folder`].
        license (`str`, *optional*):
            The licence, for the card.

    Returns:
        `CommitInfo`: the commit; that of the head, if nothing has changed.

    Raises:
        `TypeError`: if `dataset` is none of these.
        `ValueError`: if a split is empty, its rows differ in their columns, lack the tokenizer's, name products that are not in the
            catalog, or were tokenized for other codebooks; and as [`~rqsid.sid_tokenizer.hub.push_folder`].
        `PermissionError`, `ConnectionError`: as [`~rqsid.sid_tokenizer.hub.push_folder`].

    Example:

    ```python
    >>> prompts = purchases.map(tokenize_examples, batched=True, fn_kwargs={"tokenizer": tokenizer})
    >>> push_prompts({"train": prompts}, tokenizer, "org/prompts", private=True)
    ```
    """
    validate_repo_id(repo_id)
    splits = dict(dataset) if isinstance(dataset, Mapping) else {split: dataset}
    for name in [*splits, config_name]:
        if not re.fullmatch(r"[\w.-]+", name) or (name == "data" and name is config_name):
            raise ValueError(f"{name!r} cannot name a split or a configuration: letters, digits, _, - and . can.")
    if tokenizer_id is None and re.fullmatch(r"[\w.-]+/[\w.-]+", tokenizer.name_or_path or ""):
        tokenizer_id = tokenizer.name_or_path if not os.path.isdir(tokenizer.name_or_path) else None
    # As datasets lays out its own repositories.
    data_dir = "data" if config_name == "default" else config_name
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(os.path.join(folder, data_dir))
        infos = {
            name: _write_split(rows, name, tokenizer, os.path.join(folder, data_dir)) for name, rows in splits.items()
        }
        features = [info.pop("features") for info in infos.values()]
        for name, other in zip(infos, features, strict=True):
            if other != features[0]:
                raise ValueError(
                    f"The splits {next(iter(infos))} and {name} have other columns: {_columns(features[0])} and {_columns(other)}. "
                    "Give them the same, or push them as configurations of their own (config_name)."
                )
        details = _details(tokenizer, features[0], tokenizer_id)
        write_json(os.path.join(folder, data_dir, DETAILS_FILE), details)
        data = _card_data(repo_id, revision, token, license)
        MetadataConfigs({config_name: {"data_files": _data_files(infos, data_dir)}}).to_dataset_card_data(data)
        info = DatasetInfo(
            features=features[0],
            splits=SplitDict({name: SplitInfo(name, **info["split"]) for name, info in infos.items()}),
            download_size=sum(info["download_size"] for info in infos.values()),
            dataset_size=sum(info["split"]["num_bytes"] for info in infos.values()),
        )
        DatasetInfosDict({config_name: info}).to_dataset_card_data(data)
        card = f"---\n{data.to_yaml()}\n---\n\n" + _card_text(
            repo_id, config_name, details, features[0], infos, license
        )
        DatasetCard(card).save(os.path.join(folder, "README.md"))
        return push_folder(
            folder,
            repo_id,
            repo_type="dataset",
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
            tag=tag,
            delete_patterns=[f"{data_dir}/*"],
        )


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
        for number, batch in enumerate(_batches(dataset, "the")):
            check_rows(batch, tokenizer, "the", number * BATCH_ROWS)
        return
    name = f"{'data' if config_name == 'default' else config_name}/{DETAILS_FILE}"
    path = cached_file(
        os.fspath(dataset),
        name,
        repo_type="dataset",
        revision=revision,
        token=token,
        _raise_exceptions_for_missing_entries=False,
    )
    if path is None:
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
    if not _is_tokenized(columns):
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


def _batches(dataset, name):
    """Tables of the same columns."""
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
    schema = None  # a stream that does not know its columns: those of its first rows
    for batch in dataset.iter(batch_size=BATCH_ROWS):
        try:
            table = pa.Table.from_pydict(batch, schema=schema)
        except (pa.ArrowInvalid, pa.ArrowTypeError, KeyError) as error:
            raise ValueError(
                f"{name} dataset: rows differ in their columns ({error}). Tell a stream its columns: "
                "dataset.cast(Features({...}))."
            ) from None
        if schema is None:
            features = Features.from_arrow_schema(table.schema)
            schema = features.arrow_schema
            table = table.cast(schema)
        yield table


def _write_split(dataset, name, tokenizer, folder):
    """Checks a split and writes it into shards: its features, its sizes and the names of its files."""
    paths, writer, written = [], None, 0
    num_rows, num_bytes, features = 0, 0, None
    try:
        for table in _batches(dataset, name):
            if features is None:
                features = Features.from_arrow_schema(table.schema)
                _check_columns(table, tokenizer, name)
            check_rows(table, tokenizer, name, num_rows)
            if writer is not None and written + table.nbytes > SHARD_BYTES:
                writer.close()
                writer = None
            if writer is None:
                paths.append(os.path.join(folder, f"{name}-{len(paths):05d}"))
                writer, written = pq.ParquetWriter(paths[-1], table.schema), 0
            writer.write_table(table)
            num_rows, num_bytes, written = num_rows + len(table), num_bytes + table.nbytes, written + table.nbytes
    finally:
        if writer is not None:
            writer.close()
    if num_rows == 0:
        raise ValueError(f"The {name} dataset is empty: there is nothing to publish.")
    names = [f"{os.path.basename(path)}-of-{len(paths):05d}.parquet" for path in paths]
    for path, file_name in zip(paths, names, strict=True):
        os.rename(path, os.path.join(folder, file_name))
    return {
        "features": features,
        "split": {"num_bytes": num_bytes, "num_examples": num_rows},
        "download_size": sum(os.path.getsize(os.path.join(folder, file_name)) for file_name in names),
    }


def _check_columns(table, tokenizer, name):
    """That purchases can be tokenized is tried on the first; tokenized rows are compared one by one."""
    if _is_tokenized(table.column_names):
        return
    if not {"product", "products"} & set(table.column_names):
        raise ValueError(
            f'The {name} dataset holds neither prompts ("input_ids", "label_ids") nor purchases ("product", or "products" of a '
            f"session); found {table.column_names}."
        )
    try:
        tokenize_examples(table.slice(0, 1).to_pydict(), tokenizer)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The {name} dataset cannot be made prompts and answers of: {error}") from error


def _is_tokenized(columns):
    return {"input_ids", "label_ids"} <= set(columns)


def _flat(column):
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False)


def _columns(features):
    return ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items())


def _type_name(feature):
    return str(Features({"column": feature}).arrow_schema.field(0).type).replace("item: ", "").replace("element: ", "")


def _details(tokenizer, features, tokenizer_id):
    catalog = tokenizer.catalog
    return {
        "format_version": FORMAT_VERSION,
        "is_tokenized": _is_tokenized(features),
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


def _data_files(infos, data_dir):
    return [{"split": name, "path": f"{data_dir}/{name}-*"} for name in infos]


def _card_data(repo_id, revision, token, license):
    """Metadata of a new card, and of the one that is there what it says of other configurations."""
    data = {}
    with hub_errors(repo_id, token):
        for branch in dict.fromkeys([revision, None]):  # a branch that is yet to be made begins as main
            try:
                path = hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=branch, token=token)
            except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
                continue
            data = DatasetCard.load(path, ignore_metadata_errors=True).data.to_dict()
            break
    kept = {name: data[name] for name in ("configs", "dataset_info") if name in data}
    license = license if license is not None else data.get("license")
    return DatasetCardData(license=license, tags=TAGS, task_categories=["text-generation"], **kept)


def _card_text(repo_id, config_name, details, features, infos, license):
    catalog, is_tokenized = details["catalog"], details["is_tokenized"]
    what = "Prompts and answers as token ids" if is_tokenized else "Purchases, of which prompts and answers are made,"
    tokenizer_id = details["tokenizer"] or "path/to/tokenizer"
    second = "" if config_name == "default" else f", {config_name!r}"
    where = f"`{details['tokenizer']}`" if details["tokenizer"] else "a tokenizer that is not named here"
    lines = [
        f"# {repo_id.split('/')[-1]}",
        "",
        f"{what} for training a language model to answer with semantic IDs (SIDs), made with rqsid.",
        "",
        "## Columns",
        "",
        "| column | type | meaning |",
        "|---|---|---|",
        *(
            f"| `{name}` | {_type_name(feature)} | {MEANINGS.get(name, 'a field of the prompt')} |"
            for name, feature in features.items()
        ),
        "",
        "## Splits",
        "",
        "| split | rows | bytes in memory | bytes of Parquet |",
        "|---|---|---|---|",
        *(
            f"| {name} | {info['split']['num_examples']:,} | {info['split']['num_bytes']:,} | {info['download_size']:,} |"
            for name, info in infos.items()
        ),
        "",
        "## Made for",
        "",
        "| | |",
        "|---|---|",
        f"| tokenizer | {where}, {details['vocab_size']:,} tokens |",
        f"| codebook | `{details['codebook']}` |",
        f"| catalog | version {catalog['version']} (`{catalog['id']}`), {catalog['products']:,} products |",
        "",
        "Token ids mean nothing to another codebook: `check_prompts` compares, and refuses by name."
        if is_tokenized
        else "Purchases fit each tokenizer whose catalog holds their products.",
        "",
        "## Use",
        "",
        "```python",
        "from datasets import load_dataset",
        "from rqsid import SIDTokenizer, SIDTrainer, SIDTrainingArguments",
        "",
        f"dataset = load_dataset({repo_id!r}{second})",
        f"tokenizer = SIDTokenizer.from_pretrained({tokenizer_id!r})",
        'arguments = SIDTrainingArguments("my-model")',
        f"trainer = SIDTrainer({'base/model'!r}, arguments, dataset[{next(iter(infos))!r}], processing_class=tokenizer)",
        "trainer.train()",
        "```",
        "",
        "## Licence",
        "",
        f"`{license}`" if license else "None is given. Ask whoever published this before you use it.",
        "",
    ]
    return "\n".join(lines)
