"""From purchases to batches and back."""

import pytest

from rqsid.trainer import tokenize_examples

both_families = pytest.mark.parametrize("base_tokenizer", ["llama", "qwen"], indirect=True)
one_family = pytest.mark.parametrize("base_tokenizer", ["qwen"], indirect=True)


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
