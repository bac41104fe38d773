"""What is refused before training, or goes unnoticed on one process in float32."""

import json
from types import SimpleNamespace

import pytest
import torch

from rqsid.trainer.checkpoints import checkpoint_to_resume
from rqsid.trainer.hub_pushes import push_checkpoint

pytestmark = pytest.mark.parametrize("base_tokenizer, make_tiny_model", [("llama", "llama")], indirect=True)


def test_evaluation_computes_in_the_precision_of_training(model, make_purchases, make_trainer):
    trainer = make_trainer(model, evaluation=make_purchases(3), bf16=True)
    dtypes = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    trainer.evaluate()
    # The loss, the prompts, and a token of the beams at least.
    assert len(dtypes) > 2 and set(dtypes) == {torch.bfloat16}


@pytest.mark.parametrize(
    "name", ["item_recall@20", "eval_item_recall@50", "recall@10", "item_ndcg@20", "mrr", "sid_mrr@10"]
)
def test_a_best_metric_that_nobody_computes(model, make_trainer, name):
    with pytest.raises(
        ValueError, match=r"not computed with eval_top_k=10. There are item_recall@1, item_recall@10, item_"
    ):
        make_trainer(model, metric_for_best_model=name)


@pytest.mark.parametrize(
    "name", [None, "loss", "eval_loss", "item_recall@10", "eval_sid_recall@1", "item_mrr", "runtime"]
)
def test_best_metrics_that_are_computed(model, make_purchases, make_trainer, name):
    trainer = make_trainer(model, evaluation=make_purchases(2), metric_for_best_model=name)
    assert name is None or f"eval_{name.removeprefix('eval_')}" in trainer.evaluate()


def test_zero_resumes_with_as_many_processes(model, make_purchases, make_trainer, tmp_path):
    trainer = make_trainer(model, make_purchases(4), max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-1"
    manifest = json.loads((folder / "sid_checkpoint.json").read_text())
    (folder / "sid_checkpoint.json").write_text(json.dumps(manifest | {"num_processes": 2}))
    args = SimpleNamespace(world_size=1, deepspeed_plugin=None, output_dir=str(tmp_path / "run"))
    assert checkpoint_to_resume(True, args) == str(folder)
    args.deepspeed_plugin = SimpleNamespace(zero_stage=2)
    with pytest.raises(ValueError, match="saved by 2 processes and is resumed by 1, which DeepSpeed ZeRO cannot"):
        checkpoint_to_resume(str(folder), args)


def test_only_one_process_pushes(model, make_trainer):
    trainer = make_trainer(model)
    trainer.is_world_process_zero = lambda: False
    push_checkpoint(trainer, "nowhere")
    assert trainer.push_in_progress is None and trainer.hub_model_id is None
