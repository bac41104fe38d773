"""
Trains tiny models through examples/finetune/finetune.py, several in one launch, and writes down what came of it:

    python distributed_training.py FOLDER NAME BATCH_SIZE EXTRA…

FOLDER holds a model for each family, a tokenizer and purchases; results go to FOLDER/NAME.json, models to FOLDER/NAME/family.
"""

import json
import os
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune"
FAMILIES = ("llama", "qwen", "baichuan")
STEPS, SAVED = 6, 3


def train_families(folder, name, batch_size, families=FAMILIES):
    """Each family trained in one go, and again from a checkpoint in the middle."""
    sys.path.insert(0, str(EXAMPLE))
    import finetune

    from rqsid.trainer.launching import describe_training

    results = {}
    for family in families:
        output = f"{folder}/{name}/{family}"
        config = [f"{folder}/config.yaml", f"--model={folder}/{family}", f"--per_device_train_batch_size={batch_size}"]
        whole = finetune.main([*config, f"--output_dir={output}"])
        log, line = whole.state.log_history, describe_training(whole)
        resume = f"--resume_from_checkpoint={output}/checkpoint-{SAVED}"
        resumed = finetune.main([*config, f"--output_dir={output}-resumed", resume]).state.log_history
        results[family] = {"losses": losses(log), "metrics": last_metrics(log), "line": line}
        results[family] |= {"resumed": losses(resumed)[SAVED - STEPS :], "resumed_metrics": last_metrics(resumed)}
    return results


def losses(log):
    return [entry["loss"] for entry in log if "loss" in entry]


def last_metrics(log):
    entry = [entry for entry in log if "eval_loss" in entry][-1]
    return {name: value for name, value in entry.items() if not name.endswith(("runtime", "per_second"))}


def make_trainer(folder, output, batch_size, family="qwen", stream=False, callbacks=None, **args):
    from datasets import load_dataset
    from loading import load_model, load_tokenizer

    from rqsid import SIDTrainer, SIDTrainingArguments
    from rqsid.trainer.launching import configure_cpu_launch

    settings = {"learning_rate": 5e-3, "logging_steps": 1, "eval_top_k": 10, "report_to": "none", "disable_tqdm": True}
    settings |= {"save_strategy": "no", "per_device_train_batch_size": batch_size} | configure_cpu_launch() | args
    tokenizer = load_tokenizer(f"{folder}/tokenizer")
    train, validation = (
        load_dataset("json", data_files=f"{folder}/{name}.jsonl", split="train", streaming=stream and name == "train")
        for name in ("train", "validation")
    )
    return SIDTrainer(
        load_model(f"{folder}/{family}", tokenizer),
        SIDTrainingArguments(output, **settings),
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def zero1(folder, name, batch_size):
    """The configuration of ZeRO-1 differs from that of ZeRO-2 by the stage, of which processes learn by this variable."""
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = "1"
    return train_families(folder, "deepspeed_zero1", batch_size, FAMILIES[:1])


def evaluated_first(folder, name, batch_size):
    """transformers 5.23 would train such a model without synchronising gradients: the second loss would differ."""
    trainer = make_trainer(folder, f"{folder}/{name}/evaluated", batch_size, max_steps=3)
    trainer.evaluate()
    trainer.train()
    return losses(trainer.state.log_history)


def early_stopping(folder, name, batch_size):
    from transformers import EarlyStoppingCallback

    trainer = make_trainer(
        folder,
        f"{folder}/{name}/stopped",
        batch_size,
        family="baichuan",
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        num_train_epochs=9,
        **{
            "eval_strategy": "steps",
            "save_strategy": "steps",
            "eval_steps": 2,
            "save_steps": 2,
            "save_total_limit": 1,
        },
        **{"load_best_model_at_end": True, "metric_for_best_model": "item_recall@10", "greater_is_better": True},
    )
    trainer.train()
    recalls = [entry["eval_item_recall@10"] for entry in trainer.state.log_history if "eval_item_recall@10" in entry]
    best = Path(trainer.state.best_model_checkpoint).name
    return {"recalls": recalls, "best": best, "loaded": trainer.evaluate()["eval_item_recall@10"]}


def stream(folder, name, batch_size):
    """What each process trained on, of a stream of an odd number of rows."""
    import torch
    import torch.distributed as dist

    trainer = make_trainer(folder, f"{folder}/{name}/stream", batch_size, stream=True, max_steps=8)
    rows, plain = [], trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        if model.training:
            mask = inputs["attention_mask"].bool()
            rows.append([tuple(ids[kept].tolist()) for ids, kept in zip(inputs["input_ids"], mask, strict=True)])
        return plain(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    weights = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])
    gathered = [None] * dist.get_world_size() if dist.is_initialized() else [(rows, weights)]
    if dist.is_initialized():
        dist.all_gather_object(gathered, (rows, weights))
    return {"rows": [part[0] for part in gathered], "same": all(torch.equal(part[1], weights) for part in gathered)}


def pushed(folder, name, batch_size):
    from pushing_training import push_while_training

    return push_while_training(make_trainer, folder, name, batch_size)


def refusals(folder, name, batch_size):
    """What check_launch says of launches that are not what they look like, in processes that a launcher started."""
    from rqsid import SIDTrainingArguments
    from rqsid.trainer.launching import check_launch

    launches = {
        "torchrun without --use_cpu": ({}, {}),
        "torchrun --ddp_backend gloo": ({}, {"ddp_backend": "gloo"}),
        "FSDP without --use_cpu": ({"ACCELERATE_USE_FSDP": "true"}, {}),
        "FSDP --use_cpu": ({"ACCELERATE_USE_FSDP": "true"}, {"use_cpu": True}),
        "FSDP --ddp_backend gloo": ({"ACCELERATE_USE_FSDP": "true"}, {"ddp_backend": "gloo"}),
        "--fsdp --use_cpu": ({}, {"use_cpu": True, "fsdp": True}),
        "DDP --use_cpu": ({}, {"use_cpu": True}),
    }
    found = {}
    for launch, (environment, options) in launches.items():
        os.environ.update(environment)
        try:
            check_launch(SIDTrainingArguments(f"{folder}/{name}/refused", report_to="none", **options))
            found[launch] = ""
        except ValueError as error:
            found[launch] = str(error)
        for variable in environment:
            del os.environ[variable]
    return found


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo instead, which need not be compiled
    folder, name, batch_size, *extras = sys.argv[1:]
    results = train_families(folder, name, int(batch_size))
    for extra in extras:
        results[extra] = globals()[extra](folder, name, int(batch_size))
    if os.environ.get("RANK", "0") == "0":
        Path(folder, f"{name}.json").write_text(json.dumps(results))
