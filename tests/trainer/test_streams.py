"""Training on streams: passes, steps that do not fit into one, going on from a checkpoint, and what is refused before training."""

import copy

import pytest
from datasets import Dataset, IterableDataset

from rqsid import SIDDataCollator
from rqsid.trainer import tokenize_examples

pytestmark = pytest.mark.parametrize("base_tokenizer, make_tiny_model", [("llama", "llama")], indirect=True)


class Recorder(SIDDataCollator):
    """Notes the products of each batch."""

    def __call__(self, features):
        self.seen = [*getattr(self, "seen", []), *(feature["product_rows"] for feature in features)]
        return super().__call__(features)


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def stream_of(rows):
    return Dataset.from_list(rows).to_iterable_dataset()


def numbered(purchases):
    return [row | {"product": f"p{at}"} for at, row in enumerate(purchases)]


def test_what_a_pass_leaves_over_is_no_part_of_a_step(model, tokenizer, make_purchases, make_trainer):
    rows = numbered(make_purchases(6))
    collator = Recorder(tokenizer)
    trainer = make_trainer(
        model,
        stream_of(rows),
        init={"data_collator": collator},
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        learning_rate=0.0,
    )
    trainer.train()
    # Each pass has one step, of the first four rows, and each step is the same, since nothing is learned.
    losses, norms = logged(trainer, "loss"), logged(trainer, "grad_norm")
    assert len(losses) == 3 and losses == pytest.approx([losses[0]] * 3) and norms == pytest.approx([norms[0]] * 3)
    with pytest.raises(ValueError, match="ended after 3 batches, before the 4 of one optimizer step"):
        make_trainer(
            model, stream_of(rows), per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1
        ).train()


def test_a_finished_training_goes_on_where_it_was(model, tokenizer, make_purchases, make_trainer, tmp_path):
    rows = numbered(make_purchases(24))
    options = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-3}
    whole, first, second = Recorder(tokenizer), Recorder(tokenizer), Recorder(tokenizer)
    start = copy.deepcopy(model)
    uninterrupted = make_trainer(
        model, stream_of(rows), init={"data_collator": whole}, max_steps=8, **options, lr_scheduler_type="constant"
    )
    uninterrupted.train()
    options |= {"output_dir": str(tmp_path / "parts"), "lr_scheduler_type": "constant"}
    make_trainer(start, stream_of(rows), init={"data_collator": first}, max_steps=4, **options).train()
    resumed = make_trainer(start, stream_of(rows), init={"data_collator": second}, max_steps=8, **options)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed, "loss")[-4:] == pytest.approx(logged(uninterrupted, "loss")[-4:], rel=1e-6)
    assert second.seen[8:16] == [8, 9, 10, 11, 12, 13, 14, 15]  # behind those that were skipped
    # Nothing is left to do.
    again = make_trainer(start, stream_of(rows), max_steps=8, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8


def test_tokenized_streams_are_taken_as_they_are_and_checked(model, tokenizer, make_purchases, make_trainer):
    rows = make_purchases(8)
    tokenized = tokenize_examples({name: [row[name] for row in rows] for name in rows[0]}, tokenizer)
    rows = Dataset.from_dict(tokenized).to_list()
    streams = [stream_of(rows), IterableDataset.from_generator(lambda: iter(rows))]
    losses = []
    for stream in streams:
        trainer = make_trainer(copy.deepcopy(model), stream, stream, per_device_train_batch_size=8, max_steps=1)
        trainer.train()
        losses.append(logged(trainer, "loss")[0])
        assert trainer.evaluate()["eval_num_rows"] == 8
    assert losses[0] == losses[1] > 0
    long = [*rows, rows[0] | {"input_ids": rows[0]["input_ids"] * 40}]
    with pytest.raises(ValueError, match="train dataset holds a prompt of .* tokens, more than 252"):
        make_trainer(model, stream_of(long), per_device_train_batch_size=8, max_steps=2).train()


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"query": "milk", "item": "p1"}], 'train dataset.*column "product"'),
        ([{"query": "milk", "product": "p999"}], "train dataset.*not in the catalog.*p999"),
        ([{"query": "milk", "products": ["p1"]}], 'column "product".*layout="session"'),
        ([], "train dataset is empty"),
    ],
)
def test_bad_streams_are_refused_before_training(model, make_trainer, rows, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(model, IterableDataset.from_generator(lambda: iter(rows)), max_steps=1)


def test_rows_that_are_no_dicts(model, make_trainer, tokenizer, make_tiny_model):
    with pytest.raises(TypeError, match="eval dataset is a list of list"):
        make_trainer(model).evaluate([["milk", "p1"]])
    with pytest.raises(ValueError, match="context of 3 tokens has no place for a prompt"):
        make_trainer(make_tiny_model(tokenizer.base_size, max_position_embeddings=3))
