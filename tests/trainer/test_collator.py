"""Batches of purchases and sessions, padded and packed, against rows laid out by hand."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rqsid import SIDDataCollator
from rqsid.trainer import split_prompts

PAD = 9
COLLATOR = SIDDataCollator(SimpleNamespace(pad_token_id=PAD))
PACKING = SIDDataCollator(COLLATOR.tokenizer, packing=True)

# Pad and label tokens among the ids, because an end token often is the padding token too.
token_lists = st.lists(st.integers(0, 12), min_size=1, max_size=7)
batches = st.lists(st.tuples(token_lists, token_lists), min_size=1, max_size=6)


@st.composite
def sessions(draw):
    """Rows of one to three answers, whose last token stands at the end; the places of the others are anywhere before."""
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        tokens = draw(st.lists(st.integers(0, 12), min_size=1, max_size=12))
        places = draw(st.sets(st.integers(0, len(tokens) - 1), max_size=len(tokens)))
        positions = sorted({*places, len(tokens) - 1})
        labels = draw(st.lists(st.integers(0, 12), min_size=len(positions), max_size=len(positions)))
        rows.append({"input_ids": tokens, "label_positions": positions, "label_ids": labels})
    return rows


def test_a_batch_built_by_hand():
    batch = COLLATOR(
        [
            {"input_ids": [1, 2, 3], "label_ids": [21, 22, 23, PAD], "product_rows": 5},
            {"input_ids": [4], "label_ids": [24, PAD], "product_rows": 0},
        ]
    )
    # Without the end tokens, behind which nothing is predicted.
    assert batch["input_ids"].tolist() == [[1, 2, 3, 21, 22, 23], [PAD, PAD, PAD, PAD, 4, 24]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [0, 0, 0, 0, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 1]]
    # What follows each of the last four columns. The end token is the padding token, and a label all the same.
    assert batch["labels"].tolist() == [[21, 22, 23, PAD], [-100, -100, 24, PAD]]
    assert batch["product_rows"].tolist() == [5, 0]
    assert "logits_to_keep" not in batch
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_packed_batch_built_by_hand():
    batch = PACKING(
        [
            {"input_ids": [1, 2, 3], "label_ids": [21, 22, PAD], "product_rows": 5},
            {"input_ids": [4, 24, 5, 25], "label_positions": [0, 1, 2, 3], "label_ids": [24, PAD, 25, PAD]},
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3, 21, 22, 4, 24, 5, 25]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert batch["logits_to_keep"].tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert batch["labels"].tolist() == [[21, 22, PAD, 24, PAD, 25, PAD]]
    # A mask would be taken for that of one sequence. One row has no single product.
    assert set(batch) == {"input_ids", "position_ids", "labels", "logits_to_keep"}


def targets_of(batch):
    """Per row what is predicted behind which position, as `{(row, position): label}`; rows of a packed batch are told by positions."""
    columns = batch.get("logits_to_keep", torch.arange(-batch["labels"].shape[1], 0)).tolist()
    starts = (batch["position_ids"] == 0).cumsum(1) - 1 if "attention_mask" not in batch else None
    found = {}
    for row in range(len(batch["labels"])):
        for label, column in zip(batch["labels"][row].tolist(), columns, strict=True):
            if label != -100:
                of_row = row if starts is None else int(starts[row, column])
                found[of_row, int(batch["position_ids"][row, column])] = label
    return found


@settings(max_examples=200, deadline=None)
@given(sessions())
def test_sessions_lose_nothing(rows):
    expected = {
        (row, position): label
        for row, feature in enumerate(rows)
        for position, label in zip(feature["label_positions"], feature["label_ids"], strict=True)
    }
    padded, packed = COLLATOR(rows), PACKING(rows)
    assert targets_of(padded) == targets_of(packed) == expected
    width = max(len(feature["input_ids"]) for feature in rows)
    for row, feature in enumerate(rows):
        assert padded["input_ids"][row, width - len(feature["input_ids"]) :].tolist() == feature["input_ids"]
    assert packed["input_ids"].tolist() == [[token for feature in rows for token in feature["input_ids"]]]
    # No column without a label.
    assert (padded["labels"] != -100).any(0).all() and (packed["labels"] != -100).all()


@settings(max_examples=200, deadline=None)
@given(batches, st.sampled_from([None, 1, 4, 8]))
def test_collator_and_split_prompts_lose_nothing(rows, multiple):
    features = [{"input_ids": prompt, "label_ids": answer} for prompt, answer in rows]
    batch = SIDDataCollator(COLLATOR.tokenizer, pad_to_multiple_of=multiple)(features)
    width, longest_answer = batch["input_ids"].shape[1], max(len(answer) for _, answer in rows)
    longest = max(len(prompt) + len(answer) - 1 for prompt, answer in rows)
    assert width % (multiple or 1) == 0 and longest <= width < longest + (multiple or 1)
    assert batch["labels"].shape == (len(rows), longest_answer)
    assert "product_rows" not in batch

    prompts, prompt_mask = split_prompts(batch["input_ids"], batch["attention_mask"], batch["labels"])
    assert prompts.shape == prompt_mask.shape == (len(rows), max(len(prompt) for prompt, _ in rows))
    for row, (prompt, answer) in enumerate(rows):
        length = len(prompt) + len(answer) - 1
        assert batch["input_ids"][row, width - length :].tolist() == prompt + answer[:-1]
        assert batch["attention_mask"][row].tolist() == [0] * (width - length) + [1] * length
        assert batch["position_ids"][row, width - length :].tolist() == list(range(length))
        assert batch["labels"][row].tolist() == [-100] * (longest_answer - len(answer)) + answer
        padding = prompts.shape[1] - len(prompt)
        assert prompt_mask[row].tolist() == [0] * padding + [1] * len(prompt)
        assert prompts[row, padding:].tolist() == prompt


def test_missing_columns_are_named():
    with pytest.raises(ValueError, match=r"lack \['input_ids', 'label_ids'\], found \['product', 'query'\]"):
        COLLATOR([{"query": "milk", "product": "p1"}])
    with pytest.raises(ValueError, match=r"lack \['label_ids'\]"):
        COLLATOR([{"input_ids": [1]}])


def test_what_cannot_be_batched_is_refused():
    with pytest.raises(ValueError, match="empty"):
        COLLATOR([])
    with pytest.raises(ValueError, match="pad_to_multiple_of=8"):
        SIDDataCollator(COLLATOR.tokenizer, pad_to_multiple_of=8, packing=True)
