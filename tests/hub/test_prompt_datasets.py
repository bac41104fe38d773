"""`push_prompts` and `load_dataset`: equal rows and features, one commit, and prompts of other codebooks refused."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value, load_dataset
from huggingface_hub import DatasetCard

from rqsid import (
    ProductCatalog,
    PromptTemplate,
    ResidualQuantizer,
    ResidualQuantizerConfig,
    SIDTokenizer,
    mix_tasks,
    tokenize_examples,
)
from rqsid.trainer import prompt_checks, prompt_datasets
from rqsid.trainer.prompt_checks import check_prompts
from rqsid.trainer.prompt_datasets import push_prompts

IDS = [f"p{row}" for row in range(40)]
ROWS = [
    {"profile": {"age": "35-44"}, "history": IDS[row : row + row % 4], "query": "milk", "product": IDS[row]}
    for row in range(30)
]


def make_tokenizer(base, seed=0, **template):
    random = np.random.default_rng(seed)
    quantizer = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=[8, 8, 8], num_iterations=2))
    quantizer.fit(random.standard_normal((100, 6), dtype=np.float32))
    titles = [f"milk {row}" for row in range(40)]
    catalog = ProductCatalog.build(IDS, random.integers(0, 8, (40, 3)), [8, 8, 8], texts=titles)
    return SIDTokenizer.from_base(base, catalog, quantizer, prompt_template=PromptTemplate(**template))


on_one = pytest.mark.parametrize("base_tokenizer", ["llama"], indirect=True, scope="module")
on_a_model = pytest.mark.parametrize(
    "base_tokenizer, make_tiny_model", [("llama", "llama")], indirect=True, scope="module"
)


@pytest.fixture(scope="module")
def tokenizer(base_tokenizer):
    return make_tokenizer(base_tokenizer)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    rows = Dataset.from_list(ROWS)
    return rows.map(
        tokenize_examples, batched=True, remove_columns=rows.column_names, fn_kwargs={"tokenizer": tokenizer}
    )


def assert_equal(found, expected):
    assert found.features == expected.features and found.to_list() == expected.to_list()


@on_one
def test_rows_and_features_come_back(hub, hub_client, tokenizer, prompts):
    splits = DatasetDict(train=prompts.select(range(20)), validation=prompts.select(range(20, 30)))
    options = {"private": True, "tag": "v1", "license": "cc-by-4.0", "tokenizer_id": "org/shop"}
    commit = push_prompts(splits, tokenizer, "org/prompts", commit_message="Prompts", **options)
    assert [entry["message"] for entry in hub.commits("org/prompts", repo_type="dataset")] == ["Prompts"]
    assert hub.refs("org/prompts", repo_type="dataset")["tags"]["v1"] == commit.oid
    assert hub_client.dataset_info("org/prompts").private
    loaded = load_dataset("org/prompts", revision="v1")
    assert list(loaded) == ["train", "validation"]
    for name, rows in loaded.items():
        assert_equal(rows, splits[name])
    stream = load_dataset("org/prompts", split="validation", streaming=True)
    assert list(stream) == splits["validation"].to_list()

    files = hub.files("org/prompts", repo_type="dataset")
    shards = [f"data/{name}-00000-of-00001.parquet" for name in splits]
    assert set(files) - {".gitattributes"} == {"README.md", "data/sid_prompts.json", *shards}
    card = DatasetCard(files["README.md"].decode())
    sizes = {entry["name"]: entry["num_examples"] for entry in card.data.dataset_info["splits"]}
    assert sizes == {"train": 20, "validation": 10} and card.data.license == "cc-by-4.0"
    assert card.data.dataset_info["download_size"] == sum(len(files[name]) for name in shards)
    for fact in ("`org/shop`", tokenizer.codebook_fingerprint(), tokenizer.catalog.version_id, "| train | 20 |"):
        assert fact in card.text
    assert all(f"| `{name}` |" in card.text for name in prompts.column_names)

    uploaded = hub.uploaded_bytes
    assert push_prompts(splits, tokenizer, "org/prompts", **options).oid == commit.oid
    assert hub.uploaded_bytes == uploaded


@on_a_model
def test_what_the_card_says_runs(hub, hub_client, tokenizer, prompts, make_tiny_model, tmp_path):
    """From the card's own lines, with a model in place of the one that it cannot know."""
    push_prompts(prompts, tokenizer, "org/prompts", tokenizer_id=str(tmp_path / "tokenizer"))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = DatasetCard.load("org/prompts").text
    code = text.split("```python\n")[1].split("```")[0]
    assert code.endswith("trainer.train()\n")
    namespace = {"model": make_tiny_model(tokenizer.base_size)}
    code = code.replace("'base/model'", "model").replace(
        'SIDTrainingArguments("my-model")',
        f"SIDTrainingArguments({str(tmp_path / 'run')!r}, max_steps=1, use_cpu=True, report_to='none', save_strategy='no')",
    )
    exec(code, namespace)
    assert namespace["trainer"].state.global_step == 1


@on_one
def test_streams_are_written_in_pieces(hub, hub_client, tokenizer, prompts, monkeypatch):
    """As many shards as it takes, the same for a stream that knows its columns and for one that does not."""
    monkeypatch.setattr(prompt_checks, "BATCH_ROWS", 7)
    monkeypatch.setattr(prompt_datasets, "SHARD_BYTES", 2000)
    monkeypatch.setattr(pq.ParquetWriter, "write_table", checked(pq.ParquetWriter.write_table, 7))
    streams = {
        "known": prompts.to_iterable_dataset(),
        "unknown": IterableDataset.from_generator(lambda: iter(prompts)),
    }
    assert streams["unknown"].features is None
    purchases = Dataset.from_list(ROWS).to_iterable_dataset()
    streams["mapped"] = purchases.map(
        tokenize_examples, batched=True, remove_columns=list(ROWS[0]), fn_kwargs={"tokenizer": tokenizer}
    )
    push_prompts(streams, tokenizer, "org/prompts")
    files = hub.files("org/prompts", repo_type="dataset")
    assert sum(name.startswith("data/known-") for name in files) > 1
    loaded = load_dataset("org/prompts")
    for name in streams:
        assert_equal(loaded[name], prompts)
    # Fewer shards in place of many.
    monkeypatch.setattr(prompt_datasets, "SHARD_BYTES", 2**30)
    push_prompts(prompts, tokenizer, "org/prompts", split="known")
    files = hub.files("org/prompts", repo_type="dataset")
    assert [name for name in files if name.endswith(".parquet")] == ["data/known-00000-of-00001.parquet"]
    assert_equal(load_dataset("org/prompts")["known"], prompts)


def checked(write, limit):
    def write_table(self, table):
        assert len(table) <= limit
        return write(self, table)

    return write_table


@on_one
def test_purchases_and_other_configurations(hub, hub_client, tokenizer, prompts):
    purchases = Dataset.from_list(ROWS)
    push_prompts(purchases, tokenizer, "org/prompts", config_name="purchases", license="mit")
    push_prompts({"train": prompts}, tokenizer, "org/prompts")
    push_prompts(ROWS[:3], tokenizer, "org/prompts", config_name="few", revision="trial")
    assert_equal(load_dataset("org/prompts", "purchases", split="train"), purchases)
    assert_equal(load_dataset("org/prompts", split="train"), prompts)
    few = load_dataset("org/prompts", "few", split="train", revision="trial")
    assert few.to_list() == purchases.select(range(3)).to_list()
    assert DatasetCard.load("org/prompts").data.license == "mit"
    configs = DatasetCard(hub.files("org/prompts", revision="trial", repo_type="dataset")["README.md"].decode())
    assert [entry["config_name"] for entry in configs.data.configs] == ["default", "few", "purchases"]
    check_prompts("org/prompts", tokenizer, config_name="purchases")
    # the text has a section of each, and that of another is not lost
    assert re.findall("^## (.*)", configs.text, re.M) == [
        *(f"Configuration `{name}`" for name in ("default", "few", "purchases")),
        "Licence",
    ]
    section = configs.text.split("## Configuration `purchases`")[1]
    assert (
        f"| train | {len(purchases)} |" in section
        and 'load_dataset("org/prompts", "purchases")' in section.replace("'", '"')
    )


@on_one
def test_cards_of_data_sets(hub, hub_client, tokenizer, monkeypatch):
    """Under the repository's full name; what somebody has made their own keeps its words; what cannot be read is not lost."""
    where = {"path_in_repo": "README.md", "repo_id": "alice/prompts", "repo_type": "dataset"}
    push_prompts(ROWS, tokenizer, "prompts")
    push_prompts(ROWS[:3], tokenizer, "prompts", config_name="few")
    card = DatasetCard(hub.files("alice/prompts", repo_type="dataset")["README.md"].decode())
    assert [entry["config_name"] for entry in card.data.configs] == ["default", "few"]
    assert "load_dataset('alice/prompts', 'few')" in card.text and "load_dataset('prompts'" not in card.text
    own = f"---\nlicense: mit\nlanguage: de\ntags: [mine]\n{card.data.to_yaml()}\n---\n\n# My words\n"
    own = own.replace("tags:\n- generative-retrieval\n- rqsid\n- semantic-ids\n", "")
    hub_client.upload_file(path_or_fileobj=own.encode(), **where)
    push_prompts(ROWS[:4], tokenizer, "prompts", config_name="more")
    card = DatasetCard(hub.files("alice/prompts", repo_type="dataset")["README.md"].decode())
    assert card.text.strip() == "# My words" and (card.data.license, card.data.language) == ("mit", "de")
    assert card.data.tags[0] == "mine" and "rqsid" in card.data.tags
    assert [entry["config_name"] for entry in card.data.configs] == ["default", "few", "more"]
    # one that the Hub has not refused, as it refuses lists in place of a mapping
    monkeypatch.setattr(DatasetCard, "load", lambda path: DatasetCard("---\n- license\n---\n"))
    commits = len(hub.commits("alice/prompts", repo_type="dataset"))
    with pytest.raises(ValueError, match="The card in alice/prompts has metadata that cannot be read"):
        push_prompts(ROWS, tokenizer, "alice/prompts")
    assert len(hub.commits("alice/prompts", repo_type="dataset")) == commits


@on_one
def test_prompts_of_another_codebook_are_refused(
    hub, hub_client, base_tokenizer, tokenizer, prompts, tmp_path, caplog
):
    push_prompts(prompts, tokenizer, "org/prompts")
    loaded = load_dataset("org/prompts", split="train")
    for rows in ("org/prompts", loaded, loaded.to_iterable_dataset(), loaded.to_list()):
        check_prompts(rows, tokenizer)
    other = make_tokenizer(base_tokenizer, seed=3)
    ours, theirs = tokenizer.codebook_fingerprint(), other.codebook_fingerprint()
    with pytest.raises(
        ValueError, match=f"org/prompts were tokenized for codebook {ours}, the tokenizer has codebook {theirs}"
    ):
        check_prompts("org/prompts", other)
    with pytest.raises(ValueError, match=f"Row 0 of the .*'p0'.*than the tokenizer's \\({theirs}\\)"):
        check_prompts(loaded, other)
    with pytest.raises(ValueError, match=f"codebook.*{theirs}"):
        push_prompts(prompts, other, "org/others")
    assert not hub_client.repo_exists("org/others", repo_type="dataset")

    # The catalog may have grown since; another one of the same codebooks is none that it descends from.
    tokenizer.save_pretrained(tmp_path / "grown")
    grown = SIDTokenizer.from_pretrained(tmp_path / "grown")
    grown.catalog.append(["new"], codes=np.array([[5, 5, 5]]))
    check_prompts("org/prompts", grown)
    check_prompts(loaded, grown)
    codes = np.random.default_rng(9).integers(0, 8, (40, 3))
    rebuilt = SIDTokenizer.from_base(base_tokenizer, ProductCatalog.build(IDS, codes, [8, 8, 8]), tokenizer.quantizer)
    with pytest.raises(ValueError, match="does not descend from"):
        check_prompts("org/prompts", rebuilt)
    longer = make_tokenizer(base_tokenizer, separator=" | ")
    longer.catalog = tokenizer.catalog
    check_prompts("org/prompts", longer)
    with pytest.raises(ValueError, match="has no data/sid_prompts.json"):
        (tmp_path / "empty").mkdir()
        check_prompts(str(tmp_path / "empty"), tokenizer)
    with pytest.raises(ValueError, match="has no other/sid_prompts.json"):
        check_prompts("org/prompts", tokenizer, config_name="other")


@on_one
def test_sessions_and_tasks_are_compared_too(base_tokenizer):
    template = {"layout": "session", "fields": ["history", "query"]}
    tokenizer, other = (make_tokenizer(base_tokenizer, seed, **template) for seed in (0, 3))
    sessions = Dataset.from_list([{"products": IDS[row : row + 3], "queries": ["milk"] * 3} for row in range(9)])
    options = {"batched": True, "remove_columns": sessions.column_names, "fn_kwargs": {"tokenizer": tokenizer}}
    rows = sessions.map(tokenize_examples, **options)
    assert len(rows[0]["product_rows"]) == 3
    check_prompts(rows, tokenizer)
    with pytest.raises(ValueError, match="Row 0 .*'p0'"):
        check_prompts(rows, other)
    wrong = rows.to_list()
    wrong[5]["label_ids"][-2] -= 1
    with pytest.raises(ValueError, match="Row 5 .*'p5'"):
        check_prompts(wrong, tokenizer)
    # Titles are answers, too, and no SIDs.
    tokenizer = make_tokenizer(base_tokenizer)
    mixed = mix_tasks(Dataset.from_list(ROWS), tokenizer, {"purchase": 0.5, "describe": 0.5}, seed=0)
    options |= {"remove_columns": mixed.column_names, "fn_kwargs": {"tokenizer": tokenizer}}
    rows = mixed.map(tokenize_examples, **options)
    assert {-1} < set(rows["product_rows"])
    check_prompts(rows, tokenizer)


@on_one
def test_bad_datasets(hub, hub_client, tokenizer, prompts):
    for dataset, match in (
        ([], "train dataset is empty"),
        ({"a": prompts, "b": ROWS}, "The splits a and b have other columns"),
        ([{"title": "milk"}], 'holds neither prompts .* nor purchases .*"product"'),
        ([{"product": "p1", "colour": "red"}], "none of the prompt's fields"),
        (ROWS + [ROWS[0] | {"product": "nowhere"}], "nowhere"),
        ({"train-2": prompts}, "'train-2' cannot name a split"),
        ({}, "no splits"),
        (IterableDataset.from_generator(odd_rows), "rows differ in their columns.*cast"),
    ):
        with pytest.raises(ValueError, match=match) as raised:
            push_prompts(dataset, tokenizer, "org/prompts")
        assert "\n" not in str(raised.value)
    with pytest.raises(TypeError, match="train dataset is a int"):
        push_prompts(3, tokenizer, "org/prompts")
    with pytest.raises(ValueError, match="cannot name a configuration"):
        push_prompts(prompts, tokenizer, "org/prompts", config_name="data")
    broken = prompts.to_list()
    broken[4]["input_ids"] = [10**6]
    with pytest.raises(ValueError, match="input_ids holds token ids from .* to 1000000"):
        push_prompts(broken, tokenizer, "org/prompts")
    broken = prompts.to_list()
    broken[4]["product_rows"] = 40
    with pytest.raises(ValueError, match="product_rows reach 40, the catalog has 40"):
        push_prompts(broken, tokenizer, "org/prompts")
    assert not hub.requests
    with pytest.raises(PermissionError) as raised:
        push_prompts(prompts, tokenizer, "org/prompts", token=hub.read_token)
    assert hub.read_token not in str(raised.value)


def odd_rows():
    for _ in range(prompt_checks.BATCH_ROWS):
        yield {"product": "p1", "query": "milk"}
    yield {"product": "p1", "query": 3}


@on_one
def test_a_stream_that_is_told_its_columns(hub, hub_client, tokenizer):
    """A first batch without any profile does not decide what profiles are."""
    features = Features({"product": Value("string"), "query": Value("string"), "profile": Value("string")})
    rows = [{"product": "p1", "query": "milk", "profile": None}] * 3
    stream = IterableDataset.from_generator(lambda: iter(rows), features=features)
    push_prompts(stream, tokenizer, "org/prompts")
    assert load_dataset("org/prompts", split="train").features == features
    details = json.loads(hub.files("org/prompts", repo_type="dataset")["data/sid_prompts.json"])
    assert details["is_tokenized"] is False
