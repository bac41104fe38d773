"""The fine-tuning example in one process, in two with DDP, and in two with DeepSpeed ZeRO-2: the same training."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from rqsid import SIDTokenizer, search

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "examples" / "finetune" / "finetune.py")
ZERO2 = str(ROOT / "examples" / "accelerate_configs" / "deepspeed_zero2.yaml")
BIN = Path(sys.executable).parent

LAUNCHES = {
    "one process": [sys.executable, SCRIPT, "--use_cpu", "--per_device_train_batch_size=8"],
    "DDP": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT, "--use_cpu"],
    # accelerate runs DeepSpeed on a CPU only if the script asks for gloo, and not for --use_cpu.
    "ZeRO-2": [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", ZERO2, "--num_processes=2"),
        *(SCRIPT, "--ddp_backend=gloo"),
    ],
}


@pytest.fixture
def inputs(tmp_path, tokenizer, make_tiny_model, make_purchases):
    """Command-line arguments for a tiny model of the base vocabulary, the tokenizer, and purchases."""
    make_tiny_model(tokenizer.base_size, initializer_range=0.1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for name, rows in (("train", make_purchases(48)), ("validation", make_purchases(13, seed=1))):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    paths = {"model": "model", "tokenizer": "tokenizer", "train": "train.jsonl", "validation": "validation.jsonl"}
    return [f"--{name}={tmp_path / path}" for name, path in paths.items()]


EVALUATE_FIRST = """
import json, sys
from datasets import load_dataset
from transformers import AutoModelForCausalLM
from rqsid import SIDTokenizer, SIDTrainer, SIDTrainingArguments

model, tokenizer, train, validation, output, batch_size = sys.argv[1:]
train, validation = (load_dataset("json", data_files=path, split="train") for path in (train, validation))
args = SIDTrainingArguments(
    output, use_cpu=True, per_device_train_batch_size=int(batch_size), max_steps=3, learning_rate=5e-3, logging_steps=1,
    report_to="none", eval_top_k=5, save_strategy="no", disable_tqdm=True,
)
trainer = SIDTrainer(
    AutoModelForCausalLM.from_pretrained(model), args, train_dataset=train, eval_dataset=validation,
    processing_class=SIDTokenizer.from_pretrained(tokenizer),
)
trainer.evaluate()
trainer.train()
if trainer.is_world_process_zero():
    with open(output + ".json", "w") as file:
        json.dump([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], file)
"""


@pytest.mark.slow
@pytest.mark.parametrize("base_tokenizer, make_tiny_model", [("qwen", "qwen")], indirect=True)
def test_a_model_that_was_evaluated_first_is_trained_by_all_processes(inputs, tmp_path):
    """transformers 5.23 would train it without synchronising gradients: the second loss would differ."""
    (tmp_path / "script.py").write_text(EVALUATE_FIRST)
    paths = [argument.split("=", 1)[1] for argument in inputs]
    losses = []
    for processes, batch_size in ((1, 8), (2, 4)):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        output = str(tmp_path / f"run{processes}")
        result = subprocess.run(
            [sys.executable, *launcher, str(tmp_path / "script.py"), *paths, output, str(batch_size)],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")},
        )
        assert result.returncode == 0, result.stderr[-3000:]
        losses.append(json.loads(Path(output + ".json").read_text()))
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], abs=1e-3)


def launch(name, folder, inputs):
    arguments = ["--per_device_train_batch_size=4"] if name != "one process" else []
    arguments += [f"--output_dir={folder}", "--num_train_epochs=2", "--learning_rate=5e-3", "--logging_steps=1"]
    arguments += ["--report_to=none", "--eval_top_k=5", "--per_device_eval_batch_size=4", "--save_strategy=no"]
    if name == "ZeRO-2":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [*LAUNCHES[name][:3], f"--main_process_port={port}", *LAUNCHES[name][3:]]
    else:
        command = LAUNCHES[name]
    # ninja, which DeepSpeed compiles with, lies beside the interpreter.
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [*command, *inputs, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": path, "HF_HOME": str(folder / "hf")},
    )
    assert result.returncode == 0, f"{name}:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    metrics = json.loads((folder / "eval_results.json").read_text())
    losses = [float(piece.split("'")[3]) for piece in result.stdout.split("\n") if piece.strip().startswith("{'loss'")]
    return losses, metrics


@pytest.mark.slow
@pytest.mark.parametrize("base_tokenizer, make_tiny_model", [("llama", "llama")], indirect=True)
def test_two_processes_train_as_one(inputs, tmp_path):
    runs = {name: launch(name, tmp_path / name.replace(" ", "-"), inputs) for name in LAUNCHES}
    losses, metrics = runs["one process"]
    assert len(losses) == 12 and losses[-1] < losses[0]  # 48 rows, 8 a step, 2 epochs
    for name, (other_losses, other_metrics) in runs.items():
        # Half the steps of a process that trains alone on its half of the batch would be 24.
        assert other_losses == pytest.approx(losses, abs=1e-3), name
        for key in ("eval_num_rows", "eval_item_recall@5", "eval_item_mrr", "eval_sid_mrr"):
            if key in metrics:
                assert other_metrics[key] == pytest.approx(metrics[key], abs=1e-6), (name, key)

    rankings = []
    for name in runs:
        folder = str(tmp_path / name.replace(" ", "-"))
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), SIDTokenizer.from_pretrained(folder)
        ranked = search(model, tokenizer, [{"query": "potato chips"}], top_k=5)[0]
        rankings.append([entry["product_id"] for entry in ranked])
    assert rankings[0] == rankings[1] == rankings[2]
