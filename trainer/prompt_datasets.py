"""Prepared prompts on the Hub: Parquet files, a data card, and what says which codebooks they were made for."""

import os
import re
import tempfile
from collections.abc import Mapping

import pyarrow.parquet as pq
from datasets import DatasetInfo, Features, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..sid_tokenizer.card_push import generated_comment
from ..sid_tokenizer.files import write_json
from ..sid_tokenizer.hub import push_folder
from .data import tokenize_examples
from .evaluations import as_list
from .model_card import public_id
from .prompt_checks import DETAILS_FILE, batches, check_rows, is_tokenized, prompt_details

SHARD_BYTES = 500 * 2**20  # in memory; less on disk
TAGS = ["generative-retrieval", "rqsid", "semantic-ids"]
MARK = generated_comment("data set")
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
    the rows were tokenized; [`~rqsid.trainer.prompt_checks.check_prompts`] goes by it. Rows are checked and written in pieces, of
    which one is in memory at a time. What a configuration held before is replaced; others stay. A card that somebody has made their
    own keeps its words.

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
    for name in splits:
        # A hyphen would make the files of one split look like those of another.
        if not re.fullmatch(r"\w+(\.\w+)*", name):
            raise ValueError(f"{name!r} cannot name a split: letters, digits, _, and dots between them can.")
    if config_name == "data" or not re.fullmatch(r"\w[\w.-]*", config_name):
        raise ValueError(
            f"{config_name!r} cannot name a configuration: letters, digits, _, - and . can, and `data` is taken."
        )
    if not splits:
        raise ValueError("There are no splits to publish: the dict of datasets is empty.")
    if tokenizer_id is None:
        tokenizer_id = public_id(tokenizer.name_or_path)
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
        details = prompt_details(tokenizer, features[0], tokenizer_id)
        write_json(os.path.join(folder, data_dir, DETAILS_FILE), details)
        info = DatasetInfo(
            features=features[0],
            splits=SplitDict({name: SplitInfo(name, **info["split"]) for name, info in infos.items()}),
            download_size=sum(info["download_size"] for info in infos.values()),
            dataset_size=sum(info["split"]["num_bytes"] for info in infos.values()),
        )

        # Of the commit that is pushed onto, lest a configuration is lost that somebody pushes meanwhile.
        def add_card(api, repo_id, head):
            there = _existing_card(api, repo_id, head)
            data = _card_data(there, license)
            MetadataConfigs({config_name: {"data_files": _data_files(infos, data_dir)}}).to_dataset_card_data(data)
            DatasetInfosDict({config_name: info}).to_dataset_card_data(data)
            if there is not None and there.text.strip() and MARK not in there.text:
                text = there.text  # somebody's own
            else:
                section = _configuration(repo_id, config_name, details, features[0], infos)
                text = _card_text(repo_id, _other_configurations(there, data) | {config_name: section}, data.license)
            DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n").save(os.path.join(folder, "README.md"))
            return []

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
            prepare=add_card,
        )


def _write_split(dataset, name, tokenizer, folder):
    """Checks a split and writes it into shards: its features, its sizes and the names of its files."""
    paths, writer, written = [], None, 0
    num_rows, num_bytes, features = 0, 0, None
    try:
        for table in batches(dataset, name):
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
    if is_tokenized(table.column_names):
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


def _columns(features):
    return ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items())


def _type_name(feature):
    return str(Features({"column": feature}).arrow_schema.field(0).type).replace("item: ", "").replace("element: ", "")


def _data_files(infos, data_dir):
    return [{"split": name, "path": f"{data_dir}/{name}-*"} for name in infos]


def _existing_card(api, repo_id, head):
    try:
        path = api.hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=head)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None
    try:
        return DatasetCard.load(path)
    except Exception as error:  # what YAML makes of anything that somebody may have written
        raise ValueError(
            f"The card in {repo_id} has metadata that cannot be read ({' '.join(str(error).split())}), which say what other "
            "configurations there are. Mend it there, or delete it."
        ) from None


def _card_data(there, license):
    """Metadata of a new card, with what is said there already."""
    data = {} if there is None else there.data.to_dict()
    tags = list(dict.fromkeys([*as_list(data.pop("tags", None)), *TAGS]))
    # In one order, so that pushing the same again changes nothing.
    data = {"task_categories": ["text-generation"], "tags": tags} | data
    if license is not None:
        data["license"] = license
    return DatasetCardData(**data)


def _other_configurations(there, data):
    """What a card of ours says of configurations that are still there, by their names."""
    if there is None:
        return {}
    configs = {entry["config_name"] for entry in data.get("configs") or ()}
    text = there.text.split("\n## Licence\n")[0]
    found = {part.split("`")[0]: part for part in text.split("\n## Configuration `")[1:]}
    return {name: f"## Configuration `{part.strip()}" for name, part in found.items() if name in configs}


def _card_text(repo_id, configurations, license):
    lines = [
        MARK,
        "",
        f"# {repo_id.split('/')[-1]}",
        "",
        "For training a language model to answer with semantic IDs (SIDs), made with rqsid.",
    ]
    for name in sorted(configurations):
        lines += ["", configurations[name]]
    said = f"`{license}`" if license else "None is given. Ask whoever published this before you use it."
    return "\n".join([*lines, "", "## Licence", "", said])


def _configuration(repo_id, config_name, details, features, infos):
    catalog, is_tokenized = details["catalog"], details["is_tokenized"]
    what = "Prompts and answers as token ids" if is_tokenized else "Purchases, of which prompts and answers are made"
    tokenizer_id = details["tokenizer"] or "path/to/tokenizer"
    second = "" if config_name == "default" else f", {config_name!r}"
    where = f"`{details['tokenizer']}`" if details["tokenizer"] else "a tokenizer that is not named here"
    lines = [
        f"## Configuration `{config_name}`",
        "",
        f"{what}.",
        "",
        "### Columns",
        "",
        "| column | type | meaning |",
        "|---|---|---|",
        *(
            f"| `{name}` | {_type_name(feature)} | {MEANINGS.get(name, 'a field of the prompt')} |"
            for name, feature in features.items()
        ),
        "",
        "### Splits",
        "",
        "| split | rows | bytes in memory | bytes of Parquet |",
        "|---|---|---|---|",
        *(
            f"| {name} | {info['split']['num_examples']:,} | {info['split']['num_bytes']:,} | {info['download_size']:,} |"
            for name, info in infos.items()
        ),
        "",
        "### Made for",
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
        "### Use",
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
    ]
    return "\n".join(lines)
