"""What a training says of itself: curves for TensorBoard, and one line on what trains."""

import logging

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.mark.parametrize("base_tokenizer, make_tiny_model", [("llama", "llama")], indirect=True)
def test_curves_and_the_line(model, make_purchases, make_trainer, tmp_path, caplog):
    trainer = make_trainer(
        model,
        make_purchases(8),
        make_purchases(4, seed=1),
        per_device_train_batch_size=4,
        max_steps=2,
        report_to="tensorboard",
    )
    with caplog.at_level(logging.INFO):
        trainer.train()
    metrics = trainer.evaluate()
    size = sum(weight.numel() for weight in model.parameters())
    line = next(message for message in caplog.messages if message.startswith("Training on"))
    assert f"1 process with no engine: {size:,} of {size:,} parameters; 4 rows (about " in line

    folder = next((tmp_path / "run").rglob("events.out.tfevents.*")).parent
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    assert events.Scalars("eval/item_mrr")[-1].value == pytest.approx(metrics["eval_item_mrr"])
