"""
One process, and two under DDP, DeepSpeed ZeRO-1, 2 and 3, and FSDP2: the same losses, metrics and models, resumed or not.

One run per engine, by the accelerate configurations and the script of the examples, for models of all three families. DDP's
processes are started by accelerate; those of the others are forks with the environment that accelerate gives to its own.
"""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from distributed_training import FAMILIES, SAVED, STEPS
from fresh_process import run_fresh, run_ranks
from loopback_hub import LoopbackHub
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM

from rqsid import SIDTokenizer, search

ROOT = Path(__file__).parents[2]
DRIVER = str(ROOT / "tests" / "helpers" / "distributed_training.py")
LOOK = str(ROOT / "tests" / "helpers" / "launched_environment.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
CONFIGS = ROOT / "examples" / "accelerate_configs"
EXTRAS = ["evaluated_first", "early_stopping", "stream"]
# Names of the configurations, and what the trainer says of itself.
ENGINES = {
    "ddp": "2 processes with DDP",
    "deepspeed_zero1": "2 processes with DeepSpeed ZeRO-1",
    "deepspeed_zero2": "2 processes with DeepSpeed ZeRO-2",
    "deepspeed_zero3": "2 processes with DeepSpeed ZeRO-3",
    "fsdp2": "2 processes with FSDP2",
}
CONFIG = """
tokenizer: {folder}/tokenizer
train: {folder}/train.jsonl
validation: [{folder}/validation.jsonl]
learning_rate: 5e-3
max_steps: {steps}
logging_steps: 1
eval_strategy: steps
eval_steps: {saved}
save_steps: {saved}
eval_top_k: 10
per_device_eval_batch_size: 4
report_to: none
disable_tqdm: true
"""


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory, tokenizer, make_purchases):
    """Models of the base vocabulary, a tokenizer, purchases (13 to evaluate on: 7 and 6 for two processes), arguments."""
    shared = next(part for part in request.config.pluginmanager.get_plugins() if hasattr(part, "TINY_MODELS"))
    folder = tmp_path_factory.mktemp("distributed")
    tokenizer.save_pretrained(folder / "tokenizer")
    for family in FAMILIES:
        # ZeRO-3 takes matrices of more than 100,000 elements apart: one family has some.
        size = {"hidden_size": 256, "intermediate_size": 512} if family == "llama" else {}
        model = shared.TINY_MODELS[family](tokenizer.base_size, **{"initializer_range": 0.1} | size)
        model.save_pretrained(folder / family)
    for name, rows in (("train", make_purchases(49)), ("validation", make_purchases(13, seed=1))):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder, steps=STEPS, saved=SAVED), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def one_process(folder):
    """Batches of 8 on one process, where the others have 4 on each of two."""
    run_fresh(
        Path(DRIVER), folder, "one", 8, *EXTRAS, env=ENVIRONMENT | {"HF_HOME": folder / "hf"}, timeout=600, check=True
    )
    return json.loads((folder / "one.json").read_text())


def launch(engine, folder, *extras, **environment):
    """Two processes in the environment that accelerate makes for each of its own."""
    found = accelerate(engine, folder, LOOK, **environment)["environment"]
    environment = {name: value for name, value in found.items() if not name.startswith("TORCHELASTIC_")}
    run_ranks(2, Path(DRIVER), folder, engine, 4, *extras, env=environment, timeout=600)
    return json.loads((folder / f"{engine}.json").read_text())


def accelerate(engine, folder, script, *arguments, **environment):
    options = [f"--config_file={CONFIGS / engine}.yaml", "--num_processes=2", "--main_process_port=0"]
    environment = ENVIRONMENT | {"HF_HOME": folder / "hf"} | environment
    code = "from accelerate.commands.launch import main; main()"
    run_fresh(code, *options, script, folder, engine, *arguments, env=environment, timeout=600, check=True)
    return json.loads((folder / f"{engine}.json").read_text())


def check(found, expected, engine, folder, families=FAMILIES):
    tokenizer = SIDTokenizer.from_pretrained(folder / "tokenizer")
    for family in families:
        result, one = found[family], expected[family]
        assert result["line"].startswith(f"Training on {ENGINES[engine]}: ")
        # Gradients that were not averaged would show in the second loss.
        assert len(one["losses"]) == STEPS and one["losses"][-1] < one["losses"][0] - 0.5
        assert result["losses"] == pytest.approx(one["losses"], abs=1e-3), (engine, family)
        assert result["resumed"] == pytest.approx(one["losses"][SAVED:], abs=1e-3), (engine, family)
        for name, value in one["metrics"].items():
            tolerance = 1e-3 if name == "eval_loss" else 1e-6
            for metrics in (result["metrics"], result["resumed_metrics"]):
                assert metrics[name] == pytest.approx(value, abs=tolerance), (engine, family, name)
        assert result["metrics"]["eval_num_rows"] == 13 and result["metrics"]["eval_item_recall@10"] > 0
        rankings = [
            rank(folder / name / run, tokenizer)
            for name, run in (("one", family), (engine, family), (engine, f"{family}-resumed"))
        ]
        assert rankings[0] == rankings[1] == rankings[2], (engine, family)


def check_pushes(hub, engine, folder, found):
    """One process pushed, each time what all of them had trained, in one commit."""
    name, output = f"alice/{engine}", folder / engine / "pushed"
    commits = hub.commits(name)[::-1]
    steps = [f"Training in progress, step {step}" for step in (1, 2)]
    assert [commit["message"] for commit in commits] == [*steps, "End of training"]
    assert found["commit"] == commits[-1]["id"] and not list(output.glob("_push-*"))
    for step, commit in enumerate(commits[:2], 1):
        files, checkpoint = hub.files(name, commit["id"]), output / f"checkpoint-{step}"
        if engine == "fsdp2":
            assert (checkpoint / "pytorch_model_fsdp_0").is_dir() and not any("fsdp" in path for path in files)
        else:
            assert files["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
        assert files["last-checkpoint/model.safetensors"] == files["model.safetensors"]
        assert f"13 rows, after {step} optimizer steps" in files["README.md"].decode()
        assert not [path for path in files if path.endswith((".pt", ".pth", ".bin")) or "global_step" in path]
    saved = load_file(folder / engine / "saved" / "model.safetensors")
    first, second, last = (load(hub.files(name, commit["id"])["model.safetensors"]) for commit in commits)
    for pushed, is_same in ((last, True), (second, True), (first, False)):
        assert saved.keys() == pushed.keys() and len(saved) > 10
        assert all(torch.equal(saved[key], pushed[key]) for key in saved) == is_same
    assert f"Training on {ENGINES[engine]}: " in hub.files(name)["README.md"].decode()


def rank(folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.architectures == [type(model).__name__]
    prompts = [{"query": "potato chips"}, {"query": "bottle", "history": ["p3", "p8"]}, {"query": "fresh milk"}]
    found = search(model, tokenizer, prompts, top_k=5)
    assert [len(ranked) for ranked in found] == [5, 5, 5]
    return [[entry["product_id"] for entry in ranked] for ranked in found]


@pytest.mark.slow
@pytest.mark.parametrize("base_tokenizer", ["llama"], indirect=True)
class TestEngines:
    def test_one_process(self, one_process):
        """What the engines are compared with learns, stops early and goes on from its checkpoints."""
        for family in FAMILIES:
            result = one_process[family]
            assert result["line"].startswith("Training on 1 process with no engine: ")
            assert result["resumed"] == pytest.approx(result["losses"][SAVED:], abs=1e-5)
            assert result["resumed_metrics"] == pytest.approx(result["metrics"])

    def test_ddp(self, folder, one_process):
        with LoopbackHub() as hub:
            found = accelerate(
                "ddp", folder, DRIVER, 4, *EXTRAS, "refusals", "pushed", **hub.environment(folder / "ddp-home")
            )
        check(found, one_process, "ddp", folder)
        check_pushes(hub, "ddp", folder, found["pushed"])

        # transformers 5.23 alone would train a model that was evaluated first without synchronising gradients
        assert len(found["evaluated_first"]) == 3
        assert found["evaluated_first"] == pytest.approx(one_process["evaluated_first"], abs=1e-3)

        # early stopping two evaluations after the best one, which is what is left
        stopped = found["early_stopping"]
        assert stopped["recalls"] == pytest.approx(one_process["early_stopping"]["recalls"])
        recalls = stopped["recalls"]
        best = recalls.index(max(recalls))
        assert len(recalls) == best + 3 < 30 and stopped["best"] == f"checkpoint-{2 * (best + 1)}"
        assert stopped["loaded"] == pytest.approx(max(recalls)) and min(recalls) < max(recalls)

        # 49 rows of a stream: no process waits for the other, and what one trains on the other does not
        first, second = ([{tuple(row) for row in batch} for batch in rows] for rows in found["stream"]["rows"])
        assert len(first) == len(second) == 8 and found["stream"]["same"]
        assert all(a != b for a, b in zip(first, second, strict=True))

        refused = found["refusals"]
        assert refused.pop("DDP --use_cpu") == ""
        assert "each would train alone" in refused.pop("torchrun without --use_cpu")
        assert "each would train alone" in refused.pop("FSDP without --use_cpu")
        assert "synchronise nothing" in refused.pop("torchrun --ddp_backend gloo")
        assert "synchronise nothing" in refused.pop("FSDP --ddp_backend gloo")
        assert "plain DDP" in refused.pop("FSDP --use_cpu") and "plain DDP" in refused.pop("--fsdp --use_cpu")
        assert not refused

    def test_zero1_and_zero2(self, folder, one_process):
        found = launch("deepspeed_zero2", folder, "zero1")
        check(found, one_process, "deepspeed_zero2", folder)
        check(found["zero1"], one_process, "deepspeed_zero1", folder, FAMILIES[:1])
        first, second = (yaml.safe_load((CONFIGS / f"deepspeed_zero{stage}.yaml").read_text()) for stage in (1, 2))
        assert first["deepspeed_config"].pop("zero_stage") == 1 and second["deepspeed_config"].pop("zero_stage") == 2
        assert first == second

    @pytest.mark.parametrize("engine", ["deepspeed_zero3", "fsdp2"])
    def test_sharded(self, engine, folder, one_process):
        with LoopbackHub() as hub:
            found = launch(engine, folder, "pushed", **hub.environment(folder / f"{engine}-home"))
        check(found, one_process, engine, folder)
        check_pushes(hub, engine, folder, found["pushed"])
