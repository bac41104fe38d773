"""From purchases to batches and back."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rqsid import SIDDataCollator
from rqsid.trainer import split_prompts, tokenize_examples

both_families = pytest.mark.parametrize("base_tokenizer", ["llama", "qwen"], indirect=True)
one_family = pytest.mark.parametrize("base_tokenizer", ["qwen"], indirect=True)

PAD = 9
COLLATOR = SIDDataCollator(SimpleNamespace(pad_token_id=PAD))

# Pad and label tokens among the ids, because an end token often is the padding token too.
token_lists = st.lists(st.integers(0, 12), min_size=1, max_size=7)
batches = st.lists(st.tuples(token_lists, token_lists), min_size=1, max_size=6)


def columns_of(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


@both_families
def test_tokenize_examples_is_prompt_answer_and_end(tokenizer, make_purchases):
    rows = make_purchases(12)
    out = tokenize_examples(columns_of(rows), tokenizer)
    assert out["input_ids"] == tokenizer.encode_prompts(rows)["input_ids"]
    for row, label_ids, product_row in zip(rows, out["label_ids"], out["product_rows"], strict=True):
        assert label_ids == tokenizer.encode_products(row["product"]) + [tokenizer.eos_token_id]
        assert tokenizer.catalog.product_ids([product_row]) == [row["product"]]
    assert len({len(ids) for ids in out["label_ids"]}) > 1, "the catalog should give answers of different lengths"
    assert out["num_truncated"] == [0] * len(rows)
    assert set(map(type, out["product_rows"])) == {int}


@one_family
def test_tokenize_examples_truncates_old_history_and_counts(tokenizer, make_purchases):
    row = make_purchases(1)[0] | {"history": ["p3", "p4", "p5"]}
    bare = tokenizer.encode_prompts([row | {"history": ["p5"]}])["input_ids"][0]
    out = tokenize_examples(columns_of([row]), tokenizer, max_prompt_length=len(bare))
    assert out["input_ids"] == [bare]
    assert out["num_truncated"] == [2]


@one_family
def test_tokenize_examples_takes_any_subset_of_the_fields_and_ignores_other_columns(tokenizer):
    out = tokenize_examples({"query": ["milk"], "product": ["p2"], "price": [3.5]}, tokenizer)
    assert out["input_ids"] == tokenizer.encode_prompts([{"query": "milk"}])["input_ids"]


@one_family
def test_tokenize_examples_of_an_empty_batch(tokenizer):
    out = tokenize_examples({"query": [], "product": []}, tokenizer)
    assert out == {"input_ids": [], "label_ids": [], "product_rows": [], "num_truncated": []}


@one_family
@pytest.mark.parametrize(
    "examples, message",
    [
        ({"query": ["milk"], "item": ["p2"]}, r'column "product".*\[\'item\', \'query\'\]'),
        ({"question": ["milk"], "product": ["p2"]}, r"none of the prompt's fields.*\['product', 'question'\]"),
        ({"query": ["milk"], "product": ["p999"]}, "not in the catalog.*p999"),
        ({"query": ["milk"], "history": [["p999"]], "product": ["p2"]}, "not in the catalog.*p999"),
        ({"query": ["milk", ""], "product": ["p2", "p3"]}, "no value for any of the fields"),
    ],
)
def test_tokenize_examples_names_what_is_wrong(tokenizer, examples, message):
    with pytest.raises(ValueError, match=message):
        tokenize_examples(examples, tokenizer)


def test_collator_on_a_batch_built_by_hand():
    batch = COLLATOR(
        [
            {"input_ids": [1, 2, 3], "label_ids": [21, 22, 23, PAD], "product_rows": 5},
            {"input_ids": [4], "label_ids": [24, PAD], "product_rows": 0},
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3, 21, 22, 23, PAD], [PAD, PAD, PAD, PAD, 4, 24, PAD]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [0, 0, 0, 0, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 1, 2]]
    # The end token is the padding token, and a label all the same.
    assert batch["labels"].tolist() == [[-100, 21, 22, 23, PAD], [-100, -100, -100, 24, PAD]]
    assert batch["product_rows"].tolist() == [5, 0]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@settings(max_examples=200, deadline=None)
@given(batches, st.sampled_from([None, 1, 4, 8]))
def test_collator_and_split_prompts_lose_nothing(rows, multiple):
    features = [{"input_ids": prompt, "label_ids": answer} for prompt, answer in rows]
    batch = SIDDataCollator(COLLATOR.tokenizer, pad_to_multiple_of=multiple)(features)
    width, longest_answer = batch["input_ids"].shape[1], max(len(answer) for _, answer in rows)
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    assert width % (multiple or 1) == 0 and longest <= width < longest + (multiple or 1)
    assert batch["labels"].shape == (len(rows), longest_answer + 1)
    assert "product_rows" not in batch

    prompts, prompt_mask = split_prompts(batch["input_ids"], batch["attention_mask"], batch["labels"])
    assert prompts.shape == prompt_mask.shape == (len(rows), max(len(prompt) for prompt, _ in rows))
    for row, (prompt, answer) in enumerate(rows):
        length = len(prompt) + len(answer)
        assert batch["input_ids"][row, width - length :].tolist() == prompt + answer
        assert batch["attention_mask"][row].tolist() == [0] * (width - length) + [1] * length
        assert batch["position_ids"][row, width - length :].tolist() == list(range(length))
        num_ignored = longest_answer + 1 - len(answer)
        assert batch["labels"][row].tolist() == [-100] * num_ignored + answer
        padding = prompts.shape[1] - len(prompt)
        assert prompt_mask[row].tolist() == [0] * padding + [1] * len(prompt)
        assert prompts[row, padding:].tolist() == prompt


def test_collator_names_missing_columns():
    with pytest.raises(ValueError, match=r"lack \['input_ids', 'label_ids'\], found \['product', 'query'\]"):
        COLLATOR([{"query": "milk", "product": "p1"}])
    with pytest.raises(ValueError, match=r"lack \['label_ids'\]"):
        COLLATOR([{"input_ids": [1]}])


def test_collator_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="empty"):
        COLLATOR([])
