"""Rows trained behind each other without padding: the same loss, gradients and metrics as rows of their own."""

import copy

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

from rqsid import SIDDataCollator, initialize_sid_rows
from rqsid.trainer.packing import check_packing

FAMILIES = "base_tokenizer, make_tiny_model"
all_families = pytest.mark.parametrize(
    FAMILIES, [("llama", "llama"), ("qwen", "qwen"), ("llama", "baichuan")], indirect=True
)
llama = pytest.mark.parametrize(FAMILIES, [("llama", "llama")], indirect=True)


def loss_and_gradients(trainer, model, batch):
    model.zero_grad()
    loss = trainer.compute_loss(model.eval(), dict(batch))
    loss.backward()
    return loss.item(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


@all_families
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_have_the_loss_and_gradients_of_padded_ones(
    model, tokenizer, make_purchases, make_trainer, attention
):
    model.set_attn_implementation(attention)
    trainer = make_trainer(model, make_purchases(6), packing=True)
    rows = trainer.train_dataset.to_list()
    assert len({len(row["input_ids"]) for row in rows}) > 2
    packed, padded = trainer.data_collator(rows), SIDDataCollator(tokenizer)(rows)
    assert packed["input_ids"].shape[0] == 1 and packed["input_ids"].numel() < padded["input_ids"].numel()
    loss, gradients = loss_and_gradients(trainer, model, packed)
    expected, expected_gradients = loss_and_gradients(trainer, model, padded)
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, at=name: at + text
        )
    # Were the rows seen as one, nearly all of them would be predicted from other prompts.
    whole = {name: value for name, value in packed.items() if name != "position_ids"}
    assert abs(trainer.compute_loss(model, whole).item() - expected) > 0.01


@llama
def test_packed_training_and_evaluation_equal_padded_ones(model, make_purchases, make_trainer):
    train, test = make_purchases(48), make_purchases(9, seed=1)
    runs = []
    for packing in (False, True):
        trainer = make_trainer(
            copy.deepcopy(model),
            train,
            test,
            packing=packing,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=5,
            learning_rate=1e-3,
            per_device_eval_batch_size=4,
        )
        trainer.train()
        metrics = trainer.evaluate()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        runs.append((losses, {name: metrics[name] for name in metrics if "item" in name or "loss" in name}))
    assert len(runs[0][0]) == 5 and runs[1][0] == pytest.approx(runs[0][0], rel=1e-4)
    assert runs[1][1] == pytest.approx(runs[0][1], rel=1e-4) and 0 < runs[0][1]["eval_item_mrr"] < 1


def test_other_families_are_tried():
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    mistral = MistralConfig(**sizes, intermediate_size=64, num_key_value_heads=2, initializer_range=0.3)
    model = MistralForCausalLM(mistral).train()
    check_packing(model)
    assert model.training
    # ALiBi by places in the row, and a cache-less mask that knows no rows.
    bloom = BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)
    with pytest.raises(ValueError, match="packing=True.*BloomForCausalLM.*packing=False"):
        check_packing(BloomForCausalLM(bloom))


@pytest.mark.parametrize("base_tokenizer", ["qwen"], indirect=True)
def test_a_model_that_cannot_pack_is_refused_before_training(tokenizer, make_purchases, make_trainer):
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=tokenizer.base_size, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)
    model = BloomForCausalLM(config)
    initialize_sid_rows(model, tokenizer)
    with pytest.raises(ValueError, match="packing=False"):
        make_trainer(model, make_purchases(2), packing=True)
