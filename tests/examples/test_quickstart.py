"""The quick start as a command, on little of its data: all stations, then with what a user may bring instead."""

import json
from pathlib import Path

import numpy as np
import pytest
from baichuan_checkpoints import write_checkpoint
from fresh_process import run_fresh
from safetensors.numpy import save_file
from sentencepiece_models import write_baichuan_folder

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "quickstart.py"
SMALL = {"train_rows": 96, "test_rows": 16, "codebook_size": 32, "num_beams": 60}
STATIONS = ["Purchases", "Embeddings", "Codebooks", "Pruning", "Fine-tuning", "Evaluation", "A fresh process", "Time"]


def run_quickstart(output, **options):
    options = SMALL | options | {"output": str(output)}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    result = run_fresh(QUICKSTART, *arguments, cwd=output, timeout=900, check=True)
    report = (output / "report.md").read_text(encoding="utf-8")
    assert all(line in result.stdout for line in report.splitlines())  # what is written was printed too
    return report, json.loads((output / "results.json").read_text())["results"]


@pytest.mark.slow
def test_all_stations(tmp_path):
    report, results = run_quickstart(tmp_path, purchase_rows=3000, strategy="threshold", threshold=0.4, hidden_size=32)
    for station in STATIONS:
        assert station in report
    assert "the same as the one before saving" in report and "different from" not in report
    for figure in ("layers.png", "results.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG") and f"({figure})" in report
    # Systems that need no training are right from the start, the dual tower and the constraint by construction.
    assert results["most popular"]["item_recall@10"] < results["most popular for the query"]["item_recall@10"]
    assert results["dual tower, exact top-k"]["num_rows"] == 16
    for arm in ("full", "pruned"):
        values = results[f"SID model, {arm}"]
        assert values["invalid_rate"] == 0
        assert values["item_recall@10_low"] <= values["item_recall@10"] <= values["item_recall@10_high"]
        assert values["item_recall@50"] <= values["sid_recall@50"]
        assert (tmp_path / arm / "sid_manifest.json").exists() and (tmp_path / arm / "model.safetensors").exists()


def write_baichuan(folder):
    """As it lies on the Hub: a sentencepiece model, fused weights in shards, and code that must not be run."""
    folder.mkdir()
    write_baichuan_folder(folder)
    write_checkpoint(folder, "13B", vocab_size=1000)


@pytest.mark.slow
def test_a_checkpoint_and_embeddings_of_ones_own(tmp_path):
    write_baichuan(tmp_path / "checkpoint")
    embeddings = np.random.default_rng(0).standard_normal((25706, 8), dtype=np.float32)
    save_file({"embeddings": embeddings}, tmp_path / "embeddings.safetensors")
    report, results = run_quickstart(
        tmp_path,
        model=tmp_path / "checkpoint",
        embeddings=tmp_path / "embeddings.safetensors",
        strategy="drop_layer",
        max_prompt_length=400,
    )
    assert "the same as the one before saving" in report
    assert "dual tower, exact top-k" not in results
    assert 'strategy="drop_layer"' in report
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert config["model_type"] == "baichuan"
