"""How the modules are found, loaded, shown and run in several processes."""

import json
import os
import re
import runpy
import shutil
from pathlib import Path

import evaluate
import pytest
import yaml
from fresh_process import run_fresh, start_fresh

import rqsid.evaluate_metrics

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["sid_retrieval", "sid_distribution"]
CALLS = {
    "sid_retrieval": {"predictions": [["a", "b"], ["c"]], "references": ["b", "c"]},
    "sid_distribution": {"codes": [[0, 1], [1, 1]]},
}


@pytest.mark.parametrize("name", NAMES)
def test_path_is_the_folder(name):
    folder = rqsid.evaluate_metrics.path(name)
    assert isinstance(folder, str) and os.path.isabs(folder)
    files = {"__init__.py", "README.md", "app.py", "requirements.txt", f"{name}.py"}
    assert files <= {file.name for file in Path(folder).iterdir()}


@pytest.mark.parametrize("name", ["recall", "", None])
def test_path_refuses_other_names(name):
    with pytest.raises(ValueError, match="sid_retrieval, sid_distribution"):
        rqsid.evaluate_metrics.path(name)


@pytest.mark.parametrize("name", NAMES)
def test_load_from_a_checkout(name, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    module = evaluate.load(f"evaluate_metrics/{name}", module_type="metric", cache_dir=str(tmp_path))
    assert module.name == name


@pytest.mark.parametrize("name", NAMES)
def test_readme_is_the_card_of_a_space(name):
    text = (Path(rqsid.evaluate_metrics.path(name)) / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["title"] and head["sdk"] == "gradio" and head["app_file"] == "app.py"
    assert head["tags"] == ["evaluate", "metric"]


@pytest.mark.parametrize("name", NAMES)
def test_readme_examples_run(name):
    text = (Path(rqsid.evaluate_metrics.path(name)) / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    namespace = {}
    for block in blocks:
        before, _, call = block.rpartition("\nmetric.compute")
        exec(before, namespace)
        result = eval("metric.compute" + call.split("\n# ")[0], namespace)
        assert result["num_rows"] == (2 if name == "sid_retrieval" else 4)
        if "\n# " in call:
            assert result == json.loads(call.split("\n# ")[1].replace("'", '"'))


@pytest.mark.parametrize("name", NAMES)
def test_app_hands_the_widget_a_metric_that_takes_columns_alone(name, monkeypatch):
    shown = []
    monkeypatch.setattr(evaluate.utils, "launch_gradio_widget", shown.append)
    runpy.run_path(os.path.join(rqsid.evaluate_metrics.path(name), "app.py"), run_name="__main__")
    (metric,) = shown
    assert metric.name == name
    assert set(metric.features) == set(CALLS[name])
    assert metric.compute(**CALLS[name])["num_rows"] == 2


def environment(tmp_path):
    """A home of its own, no network, and no trace of the package on the way to a module."""
    return os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_modules_stand_alone_in_a_fresh_process(tmp_path):
    for name in NAMES:
        shutil.copytree(rqsid.evaluate_metrics.path(name), tmp_path / name)
    script = """
import json, sys
import evaluate
calls = json.loads(sys.argv[1])
calls["sid_distribution"]["codebook_sizes"] = [2, 2]
results = {name: evaluate.load("./" + name).compute(**call) for name, call in calls.items()}
assert not [name for name in sys.modules if name.split(".")[0] == "rqsid"]
print(json.dumps(results))
"""
    process = run_fresh(script, json.dumps(CALLS), cwd=tmp_path, env=environment(tmp_path), check=True)
    results = json.loads(process.stdout.splitlines()[-1])
    assert results["sid_retrieval"]["item_mrr"] == 0.75
    assert results["sid_distribution"]["entropy_0"] == 1.0


@pytest.mark.slow
def test_two_processes_with_uneven_rows(tmp_path, load):
    # Eight rows: three in process 0, five in process 1, in batches of one and two.
    ranks = [1, 2, 0, 1, 3, 0, 2, 1]
    rows = {
        "predictions": [[f"p{at}" if at == rank else f"x{at}" for at in range(1, 4)] for rank in ranks],
        "references": [f"p{rank}" for rank in ranks],
        "sid_predictions": [["s1", "", "s2"]] * 8,
        "sid_references": ["s1", "s2"] * 4,
        "groups": ["head", "tail", "tail", "", "head", "head", "tail", ""],
    }
    codes = [[rank, rank % 2] for rank in ranks]
    script = """
import json, sys
import evaluate
process_id, folder, rows, codes, paths = int(sys.argv[1]), sys.argv[2], *map(json.loads, sys.argv[3:])
options = {"num_process": 2, "process_id": process_id, "cache_dir": folder, "experiment_id": "uneven"}
mine = range(3) if process_id == 0 else range(3, 8)
metric = evaluate.load(paths["sid_retrieval"], "sid", **options)
for begin in range(mine.start, mine.stop, 1 + process_id):
    end = min(begin + 1 + process_id, mine.stop)
    metric.add_batch(**{name: column[begin:end] for name, column in rows.items()})
results = [metric.compute(ks=(1, 3), ndcg_ks=(3,), bootstrap=100)]
distribution = evaluate.load(paths["sid_distribution"], **options)
distribution.add_batch(codes=codes[mine.start : mine.stop])
results.append(distribution.compute(codebook_sizes=[4, 2]))
print(json.dumps(results))
"""
    paths = {name: rqsid.evaluate_metrics.path(name) for name in NAMES}
    processes = [
        start_fresh(
            script,
            process_id,
            tmp_path / "shared",
            *map(json.dumps, (rows, codes, paths)),
            env=environment(tmp_path / str(process_id)),
        )
        for process_id in range(2)
    ]
    outputs = []
    for process in processes:
        try:
            stdout, stderr = process.communicate(timeout=300)
        finally:
            process.kill()
        assert process.returncode == 0, stderr
        outputs.append(json.loads(stdout.splitlines()[-1]))
    assert outputs[1] == [None, None]
    # Rows are read in the order of the processes, so that even the resamples are those of one process.
    alone = load("sid_retrieval", "sid").compute(**rows, ks=(1, 3), ndcg_ks=(3,), bootstrap=100)
    assert outputs[0][0] == pytest.approx(alone)
    assert outputs[0][0]["item_recall@1"] == 3 / 8 and outputs[0][0]["item_recall@3"] == 6 / 8
    assert outputs[0][1] == pytest.approx(load("sid_distribution").compute(codes=codes, codebook_sizes=[4, 2]))
