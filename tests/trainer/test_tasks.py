"""Several tasks in one dataset."""

import logging
from collections import Counter

import datasets
import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from transformers.utils import logging as transformers_logging

from rqsid import ProductCatalog, PromptTemplate, SIDTokenizer, SIDTrainer, SIDTrainingArguments
from rqsid.trainer import tokenize_examples
from rqsid.trainer.tasks import mix_tasks

pytestmark = pytest.mark.parametrize("base_tokenizer", ["qwen"], indirect=True)
WEIGHTS = {"purchase": 4, "history": 2, "query": 2, "title": 1, "describe": 1}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def with_titles(base_tokenizer):
    """`with_titles(texts=…, **template)`: ten products, of which p3 has no title and p4 is withdrawn."""

    def make(texts="all", **options):
        codes = np.random.default_rng(0).integers(0, 4, (10, 3))
        texts = ["" if row == 3 else f"title {row}" for row in range(10)] if texts == "all" else texts
        catalog = ProductCatalog.build([f"p{row}" for row in range(10)], codes, [4] * 3, texts=texts)
        catalog.withdraw(["p4"])
        return SIDTokenizer.from_base(base_tokenizer, catalog, prompt_template=PromptTemplate(**options))

    return make


def purchases(n=60):
    """A third has no history, and half of them no query."""
    return [
        {
            "profile": {"age": str(row)},
            "history": ["p1"] * (row % 3),
            "query": ["milk", None, "tea", " "][row % 4],
            "product": f"p{row % 10}",
        }
        for row in range(n)
    ]


def rows_by_task(dataset):
    rows = {task: [] for task in WEIGHTS}
    for row in dataset:
        rows[row["task"]].append(row)
    return rows


def check_rows(rows, count):
    by_age = {row["profile"]["age"]: row for row in purchases(count)}
    for task in ("purchase", "history", "query"):
        for row in rows[task]:
            assert {name: row[name] for name in ("profile", "history", "query", "product")} == by_age[
                row["profile"]["age"]
            ]
    assert {row["profile"]["age"] for row in rows["purchase"]} == set(by_age)
    usable = {age for age, row in by_age.items() if row["history"]}
    assert {row["profile"]["age"] for row in rows["history"]} == usable and len(usable) == 40
    usable = {age for age, row in by_age.items() if row["query"] in ("milk", "tea")}
    assert {row["profile"]["age"] for row in rows["query"]} == usable and len(usable) == 30
    titled = {f"p{row}" for row in range(10)} - {"p3", "p4"}
    for task in ("title", "describe"):
        assert {row["product"] for row in rows[task]} == titled
        assert all(row["query"] is None and row["history"] is None for row in rows[task])


def test_tasks_of_a_dataset(with_titles, caplog):
    tokenizer = with_titles()
    logger = transformers_logging.get_logger("rqsid")
    transformers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING, logger.name):
        mixed = mix_tasks(Dataset.from_list(purchases()), tokenizer, WEIGHTS, seed=3)
    transformers_logging.disable_propagation()
    assert isinstance(mixed, Dataset)
    check_rows(rows_by_task(mixed), 60)
    messages = " ".join(record.getMessage() for record in caplog.records)
    assert "20 of 60 purchases have no history" in messages and "30 of 60 purchases have no query" in messages
    assert messages.count("2 of 10 products have no text or are withdrawn") == 1

    tokenized = mixed.map(
        tokenize_examples,
        batched=True,
        batch_size=17,
        remove_columns=mixed.column_names,
        fn_kwargs={"tokenizer": tokenizer},
    )
    prompts = tokenizer.encode_prompts(list(mixed))["input_ids"]
    assert tokenized["input_ids"][:] == prompts
    titles = {tuple(tokenizer.encode_text(f"title {row}")) for row in range(10)}
    for task, row in zip(mixed["task"], tokenized, strict=True):
        assert (tuple(row["label_ids"][:-1]) in titles) == (task == "describe") == (row["product_rows"] == -1)

    again = mix_tasks(Dataset.from_list(purchases()), tokenizer, WEIGHTS, seed=3)
    assert again["task"][:] == mixed["task"][:]
    assert mix_tasks(Dataset.from_list(purchases()), tokenizer, WEIGHTS, seed=4)["task"][:] != mixed["task"][:]


def test_weights_are_those_of_the_drawing(with_titles):
    """By five standard deviations of a binomial distribution."""
    mixed = mix_tasks(Dataset.from_list(purchases(3000)), with_titles(), {"purchase": 6, "query": 3, "title": 3})
    counts = Counter(mixed["task"])
    for task, share in (("purchase", 0.5), ("query", 0.25), ("title", 0.25)):
        assert abs(counts[task] - share * len(mixed)) < 5 * (share * (1 - share) * len(mixed)) ** 0.5
    assert counts["purchase"] >= 3000 and counts["query"] >= 1500


@pytest.mark.parametrize("knows_columns", [True, False])
def test_tasks_of_a_stream(with_titles, knows_columns):
    tokenizer = with_titles()
    stream = Dataset.from_list(purchases()).to_iterable_dataset(num_shards=3)
    if not knows_columns:
        stream = IterableDataset.from_generator(purchases)
        assert stream.column_names is None
    mixed = mix_tasks(stream, tokenizer, WEIGHTS)
    assert isinstance(mixed, IterableDataset) and mixed.num_shards == (3 if knows_columns else 1)
    check_rows(rows_by_task(mixed), 60)
    tokenized = list(mixed.map(tokenize_examples, batched=True, fn_kwargs={"tokenizer": tokenizer}))
    assert [row["input_ids"] for row in tokenized] == tokenizer.encode_prompts(list(mixed))["input_ids"]


def test_sessions_and_titles(with_titles, make_tiny_model, tmp_path):
    tokenizer = with_titles(layout="session")
    sessions = [
        {"profile": str(row), "queries": ["tea"] * (row % 3 + 1), "products": ["p1"] * (row % 3 + 1)}
        for row in range(12)
    ]
    mixed = mix_tasks(Dataset.from_list(sessions), tokenizer, {"purchase": 2, "describe": 1, "title": 1})
    kinds = Counter(mixed["task"])
    assert kinds["purchase"] >= 12 and kinds["title"] >= 8 and kinds["describe"] >= 8
    args = SIDTrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to="none",
        max_steps=2,
        per_device_train_batch_size=4,
        save_strategy="no",
        disable_tqdm=True,
    )
    model = make_tiny_model(tokenizer.base_size)
    result = SIDTrainer(model, args, train_dataset=mixed, processing_class=tokenizer).train()
    assert result.global_step == 2 and np.isfinite(result.training_loss)


@pytest.mark.parametrize(
    "weights, options, message",
    [
        ({"purchase": 1, "sing": 1}, {}, "task='sing' is unknown; choose one of purchase, history"),
        ({}, {}, "weights is empty"),
        ({"purchase": 0}, {}, r"weights\['purchase'\]=0 must be a positive number"),
        ({"purchase": 1, "query": -1}, {}, r"weights\['query'\]=-1 must be a positive"),
        ({"purchase": float("nan")}, {}, r"weights\['purchase'\]=nan must be a positive"),
        ({"purchase": True}, {}, r"weights\['purchase'\]=True must be a positive"),
        ({"purchase": "2"}, {}, r"weights\['purchase'\]='2' must be a positive"),
        ({"query": 1, "title": 1}, {"texts": None}, "catalog has no texts"),
        ({"title": 1}, {"texts": [" "] * 10}, "None of the 10 products has a text"),
        ({"history": 1}, {"fields": ["query"]}, "task='history', but the prompt template has no such field"),
        ({"history": 1}, {"layout": "session"}, "task='history': a prompt template of layout=\"session\""),
        (
            {"purchase": 1},
            {"layout": "session"},
            r"task 'purchase' needs the columns \['products'\]; the purchases have only \['history'",
        ),
        ({"purchase": 1}, {"fields": ["task", "query"]}, 'has a field "task"'),
        ({"purchase": 1}, {"fields": ["country"]}, r"none of the prompt's fields \['country'\]; found \['history', "),
    ],
)
def test_mixtures_that_cannot_work_are_refused(with_titles, weights, options, message):
    with pytest.raises(ValueError, match=message):
        mix_tasks(Dataset.from_list(purchases(4)), with_titles(**options), weights)


def test_purchases_that_cannot_serve_a_task_are_refused(with_titles):
    tokenizer, rows = with_titles(), [{"query": "milk", "product": "p1"}]
    for stream in (False, True):
        dataset = Dataset.from_list(rows)
        dataset = dataset.to_iterable_dataset() if stream else dataset
        with pytest.raises(
            ValueError, match=r"'history' needs the columns \['product', 'history'\].*only \['product', 'query'\]"
        ):
            mix_tasks(dataset, tokenizer, {"query": 1, "history": 1})
    with pytest.raises(ValueError, match="None of the 1 purchases has a history"):
        mix_tasks(Dataset.from_list([{"query": "a", "history": [], "product": "p1"}]), tokenizer, {"history": 1})
    with pytest.raises(ValueError, match='column "task" already'):
        mix_tasks(Dataset.from_list([rows[0] | {"task": "query"}]), tokenizer, {"query": 1})
    with pytest.raises(TypeError, match="purchases is a list"):
        mix_tasks(rows, tokenizer, {"query": 1})
    with pytest.raises(TypeError, match="weights must be a mapping"):
        mix_tasks(Dataset.from_list(rows), tokenizer, ["query"])
