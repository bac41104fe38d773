"""Whole sessions in one pass: the loss of one row for each purchase, and the last purchase as what is ranked."""

import copy
import random

import pytest
import torch
from datasets import Dataset
from transformers import pipeline

from rqsid import PromptTemplate, SIDTokenizer, SIDTrainer, SIDTrainingArguments, search
from rqsid.trainer import tokenize_examples

FAMILIES = "base_tokenizer, make_tiny_model"
all_families = pytest.mark.parametrize(
    FAMILIES, [("llama", "llama"), ("qwen", "qwen"), ("llama", "baichuan")], indirect=True
)
llama = pytest.mark.parametrize(FAMILIES, [("llama", "llama")], indirect=True)
QUERIES = ["potato chips", "fresh milk", "orange juice", "frozen pizza", ""]


@pytest.fixture
def sessions_tokenizer(tokenizer, base_tokenizer):
    template = PromptTemplate(fields=["profile", "query"], layout="session")
    return SIDTokenizer.from_base(base_tokenizer, tokenizer.catalog, tokenizer.quantizer, prompt_template=template)


def make_sessions(n, seed=0, longest=4):
    generator = random.Random(seed)
    rows = []
    for _ in range(n):
        length = generator.randint(1, longest)
        products = [f"p{generator.randrange(40)}" for _ in range(length)]
        queries = [generator.choice(QUERIES) for _ in range(length)]
        rows.append(
            {"profile": {"age": generator.choice(["35-44", "45-54"])}, "queries": queries, "products": products}
        )
    return rows


def purchases_of(sessions):
    """One row for each purchase, with what came before it."""
    return [
        {
            "profile": row["profile"],
            "queries": row["queries"][: at + 1],
            "products": row["products"][:at],
            "product": row["products"][at],
        }
        for row in sessions
        for at in range(len(row["products"]))
    ]


@pytest.fixture
def train_on(sessions_tokenizer, tmp_path):
    def make(model, train=None, evaluation=None, **args):
        args = {
            "max_steps": 1,
            "logging_steps": 1,
            "disable_tqdm": True,
            "save_strategy": "no",
            "eval_top_k": 5,
        } | args
        args = SIDTrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none", **args)
        return SIDTrainer(
            model, args, train_dataset=train, eval_dataset=evaluation, processing_class=sessions_tokenizer
        )

    return make


def loss_and_gradients(trainer, features):
    model = trainer.model.eval()
    model.zero_grad()
    loss = trainer.compute_loss(model, trainer.data_collator(features))
    loss.backward()
    return loss.item(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


@all_families
@pytest.mark.parametrize("packing", [True, False])
def test_a_session_has_the_loss_and_gradients_of_its_purchases(model, sessions_tokenizer, train_on, packing):
    sessions = make_sessions(5)
    trainer = train_on(model, sessions, packing=packing)
    whole = trainer.train_dataset.to_list()
    one_by_one = purchases_of(sessions)
    rows = train_on(model, one_by_one).train_dataset.to_list()
    assert len(whole) == 5 and len(rows) == len(one_by_one) > 10
    assert sum(len(row["label_ids"]) for row in whole) == sum(len(row["label_ids"]) for row in rows)

    loss, gradients = loss_and_gradients(trainer, whole)
    expected, expected_gradients = loss_and_gradients(train_on(model), rows)
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, at=name: at + text
        )


@llama
def test_a_step_on_sessions_is_a_step_on_their_purchases(model, train_on):
    sessions = make_sessions(8, seed=1)
    purchases = purchases_of(sessions)
    options = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}
    runs = [
        train_on(copy.deepcopy(model), sessions, per_device_train_batch_size=8, **options),
        train_on(
            copy.deepcopy(model),
            sessions,
            packing=True,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            **options,
        ),
        train_on(copy.deepcopy(model), purchases, per_device_train_batch_size=len(purchases), **options),
    ]
    losses = []
    for trainer in runs:
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses == pytest.approx([losses[2]] * 3, rel=1e-5)
    for trainer in runs[:2]:
        for name, weight in runs[2].model.state_dict().items():
            torch.testing.assert_close(trainer.model.state_dict()[name], weight, rtol=1e-4, atol=1e-5)
            assert not torch.equal(weight, model.state_dict()[name])


@llama
def test_the_last_purchase_is_ranked(model, sessions_tokenizer, train_on):
    sessions = make_sessions(7, seed=2)
    trainer = train_on(model, evaluation=sessions, packing=True)
    rows = [row | {"products": row["products"][:-1]} for row in sessions]
    found = search(trainer.model, sessions_tokenizer, rows, top_k=5)
    labels = trainer.predict(Dataset.from_list(sessions))
    assert sessions_tokenizer.catalog.product_ids(labels.label_ids) == [row["products"][-1] for row in sessions]
    for ranked, entries in zip(labels.predictions[0], found, strict=True):
        assert sessions_tokenizer.catalog.product_ids(ranked) == [entry["product_id"] for entry in entries]
    # The same rows with the last purchase in a column of its own.
    named = [row | {"product": whole["products"][-1]} for row, whole in zip(rows, sessions, strict=True)]
    again = trainer.predict(Dataset.from_list(named))
    assert (again.predictions[0] == labels.predictions[0]).all() and (again.label_ids == labels.label_ids).all()


@llama
def test_what_sessions_cannot_be(model, sessions_tokenizer, train_on):
    with pytest.raises(ValueError, match="Session 1 of the batch has no products"):
        train_on(model, evaluation=[make_sessions(1)[0], {"profile": {"age": "35-44"}, "queries": [], "products": []}])
    with pytest.raises(ValueError, match=r'column "products".*\[\'item\', \'queries\'\]'):
        train_on(model, evaluation=[{"queries": ["milk"], "item": ["p1"]}])
    rows = tokenize_examples(
        {name: [row[name] for row in make_sessions(2)] for name in make_sessions(1)[0]}, sessions_tokenizer
    )
    with pytest.raises(ValueError, match="tokenized sessions.*pass the sessions themselves"):
        train_on(model, evaluation=Dataset.from_dict(rows))


@llama
def test_long_sessions_lose_their_oldest_purchases_and_say_so(model, sessions_tokenizer, train_on, caplog):
    sessions = make_sessions(4, seed=3, longest=8)
    lengths = [len(row["input_ids"]) for row in train_on(model, sessions).train_dataset.to_list()]
    limit = sorted(lengths)[1]
    with caplog.at_level("WARNING"):
        trainer = train_on(model, sessions, max_prompt_length=limit)
    assert f"train prompts exceeded {limit} tokens" in caplog.text
    kept = [len(row["input_ids"]) for row in trainer.train_dataset.to_list()]
    assert max(kept) <= limit + sessions_tokenizer.max_sid_length and max(kept) < max(lengths)


@llama
def test_sessions_are_searched_and_served(model, sessions_tokenizer, caplog):
    session = {"profile": {"age": "35-44"}, "queries": ["fresh milk", "cookies"], "products": ["p3"]}
    with caplog.at_level("WARNING"):
        found = search(model, sessions_tokenizer, [session], top_k=3)
        search(model, sessions_tokenizer, [{"task": "describe", "product": "p3"}], top_k=1)
    assert "are not used" not in caplog.text
    retrieve = pipeline("sid-retrieval", model=model, tokenizer=sessions_tokenizer)
    request = {"profile": {"age": "35-44"}, "queries": ["fresh milk", "cookies"], "history": ["p3"]}
    ranked = retrieve(request, top_k=3)
    assert [entry["product_id"] for entry in ranked] == [entry["product_id"] for entry in found[0]]
    only = retrieve(request | {"products": ["p7", "p9"]}, top_k=3)
    assert {entry["product_id"] for entry in only} == {"p7", "p9"}
    # What was bought would be taken for what may be returned.
    with pytest.raises(ValueError, match="products and no history"):
        retrieve(session, top_k=3)
