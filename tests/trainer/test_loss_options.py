"""The losses in a training: against plain forwards, over accumulated batches, and where answers are text."""

import copy

import pytest
import torch
from datasets import Dataset

from rqsid import ProductCatalog, SIDTokenizer, mix_tasks
from rqsid.trainer import SIDVocabulary, answer_loss

llama = pytest.mark.parametrize("base_tokenizer, make_tiny_model", [("llama", "llama")], indirect=True)
three = pytest.mark.parametrize(
    "options", [{"loss_type": "focal", "loss_gamma": 2.0}, {"loss_type": "mile"}, {"loss_normalize": "sid"}]
)


@pytest.fixture
def model(model, make_trainer, make_purchases):
    # Sure of some tokens and unsure of others, so that weights differ.
    make_trainer(model, make_purchases(24), per_device_train_batch_size=8, max_steps=12, learning_rate=5e-3).train()
    return model.eval()


@torch.no_grad()
def answers_of(model, tokenizer, rows):
    """Logits of the answers' tokens, by one plain forward a row, and the tokens."""
    logits, labels = [], []
    for row in rows:
        prompt = tokenizer.encode_prompts([row])["input_ids"][0]
        answer = tokenizer.encode_products(row["product"]) + [tokenizer.eos_token_id]
        whole = model(torch.tensor([prompt + answer]), use_cache=False).logits[0]
        logits.append(whole[len(prompt) - 1 : -1])
        labels += answer
    return torch.cat(logits), torch.tensor(labels)


@llama
@three
def test_the_trainer_takes_the_loss_that_it_is_told_to(model, tokenizer, make_purchases, make_trainer, options):
    rows = make_purchases(6)
    logits, labels = answers_of(model, tokenizer, rows)
    plain = answer_loss(logits, labels).item()
    if options.get("loss_normalize") == "sid":
        logits, labels = SIDVocabulary(tokenizer).narrow(logits, labels)
    expected = answer_loss(logits, labels, options.get("loss_type", "cross_entropy"), options.get("loss_gamma", 1.0))
    assert abs(expected.item() - plain) > 0.01
    trainer = make_trainer(model, rows, rows, per_device_train_batch_size=6, max_steps=1, **options)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    trainer.train()
    assert trainer.state.log_history[-2]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    # Scores are taken as the loss was.
    assert trainer.args.eval_normalize == options.get("loss_normalize", "vocab")


@llama
@three
def test_what_accumulating_gradients_does_to_a_loss(model, make_purchases, make_trainer, options):
    rows, losses = make_purchases(8), []
    for batch_size, steps in ((8, 1), (1, 8)):
        trainer = make_trainer(
            copy.deepcopy(model),
            rows,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            **options,
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    if "loss_type" in options:  # weights have the mean 1 in each batch, as documented
        assert losses[0] != pytest.approx(losses[1], rel=1e-4) and losses[0] == pytest.approx(losses[1], rel=0.5)
    else:
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@llama
def test_answers_in_text_have_no_sid_vocabulary(model, tokenizer, base_tokenizer, make_purchases, make_trainer):
    catalog = tokenizer.catalog
    codes = catalog.sid_codes[catalog.sid_rows(range(len(catalog)))][:, :3]
    titled = ProductCatalog.build(
        catalog.product_ids(range(len(catalog))), codes.clip(0), [8, 8, 8], texts=["fresh milk"] * len(catalog)
    )
    with_titles = SIDTokenizer.from_base(base_tokenizer, titled)
    purchases = Dataset.from_list(make_purchases(20))
    mixed = mix_tasks(purchases, with_titles, {"purchase": 1, "describe": 1})
    model.config.sid_codebook = None
    make = lambda data, **options: make_trainer(  # noqa: E731
        model, data, init={"processing_class": with_titles}, max_steps=2, **options
    )
    with pytest.raises(ValueError, match='answers in text.*loss_normalize="sid".*Leave out the task "describe"'):
        make(mixed, loss_normalize="sid")
    with pytest.raises(ValueError, match="answers in text"):  # a stream says so when it gets there
        make(mixed.to_iterable_dataset(), loss_normalize="sid").train()
    trainer = make(mixed)
    trainer.train()
    with pytest.raises(ValueError, match='task "describe".*prediction_loss_only=True'):
        trainer.evaluate(mixed)
    trainer.args.prediction_loss_only = True
    assert trainer.evaluate(mixed)["eval_loss"] > 0
    assert all(entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)


@llama
@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_type": "hinge"}, "loss_type='hinge' is unknown; choose one of cross_entropy, focal, mile"),
        ({"loss_gamma": -1.0}, "loss_gamma=-1.0 must not be negative"),
        ({"loss_normalize": "all"}, 'loss_normalize=\'all\' is unknown; choose "vocab" or "sid"'),
        ({"loss_type": "focal", "label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 with loss_type='focal'"),
    ],
)
def test_unknown_losses_are_refused(model, make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(model, **options)
