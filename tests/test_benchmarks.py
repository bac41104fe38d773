"""The benchmarks, run through their main functions on few rows, and what they measure against other ways to compute it."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from rqsid import ResidualQuantizer, ResidualQuantizerConfig, diagnose

FOLDER = Path(__file__).parents[1] / "benchmarks"
SIZES = ["16", "16", "16"]


@pytest.fixture(scope="module")
def benchmarks():
    """The modules by name; they lie in a folder that is no package, as scripts find each other."""
    names = ("measures", "methods", "report", "quantizers", "encode", "catalog")
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: __import__(name) for name in names}
    finally:
        sys.path.remove(str(FOLDER))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def quantizer_run(benchmarks, tmp_path_factory):
    """Half of the methods' modules look as if they were not installed."""
    folder = tmp_path_factory.mktemp("benchmark")
    points = benchmarks["measures"].synthetic_embeddings(600, dim=12, seed=3)
    np.save(folder / "points.npy", points)
    arguments = [
        "--embeddings",
        str(folder / "points.npy"),
        "--codebook_sizes",
        *SIZES,
        "--seeds",
        "2",
        "--repeats",
        "2",
    ]
    arguments += ["--methods", "rqsid fast", "rqsid random", "scikit", "faiss", "--json", str(folder / "results.json")]
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        find_spec = benchmarks["quantizers"].find_spec
        patch.setattr(benchmarks["quantizers"], "find_spec", lambda name: None if name == "faiss" else find_spec(name))
        patch.setattr(
            "builtins.print", lambda *values, file=None, **_: printed.append(values[0]) if file is None else None
        )
        result = benchmarks["quantizers"].main(arguments)
    return points, result, "\n".join(printed), json.loads((folder / "results.json").read_text())


def test_results_are_printed_and_written(quantizer_run):
    _, result, printed, written = quantizer_run
    assert written == json.loads(json.dumps(result))
    names = [row["method"] for row in written["methods"]]
    assert names == ["rqsid fast", "rqsid random, no relocation", "scikit-learn KMeans"]
    for row in written["methods"]:
        line = next(line for line in printed.splitlines() if line.startswith(f"| {row['method']} |"))
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        assert cells[4] == f"{row['relative_error']:.4f}"
        assert cells[6] == " ".join(f"{value:.2f}" for value in row["gini"])
        assert cells[8] == f"{row['collision_rate']:.4f}"
        assert float(cells[1]) == pytest.approx(row["fit_cpu_seconds"], abs=0.051) and row["fit_cpu_seconds"] > 0
        assert float(cells[10]) == pytest.approx(row["encode_rows_per_second"] / 1000, abs=0.051)
    assert len(written["runs"]) == 2 + 2 + 1
    assert {run["seed"] for run in written["runs"] if run["method"] == "rqsid fast"} == {0, 1}


def test_absent_peers_are_named_and_their_goals_left_open(quantizer_run):
    _, _, printed, written = quantizer_run
    assert "faiss.Kmeans" in written["skipped"] and "faiss-cpu is not installed" in written["skipped"]["faiss.Kmeans"]
    assert "Left out: faiss.Kmeans (faiss-cpu is not installed)." in printed
    for goal in written["goals"]:
        if "faiss" in goal["goal"] or goal["goal"].startswith("quality"):
            assert goal["value"] is None and goal["met"] is None
    assert all(row["relative_error_ratio"] is None for row in written["methods"])


def test_measured_values_are_those_of_the_library(quantizer_run):
    points, _, _, written = quantizer_run
    config = ResidualQuantizerConfig(codebook_sizes=[16] * 3, preset="fast", seed=1)
    quantizer = ResidualQuantizer(config).fit(points)
    diagnosis = diagnose(quantizer.encode(points), [16] * 3)
    run = next(run for run in written["runs"] if run["method"] == "rqsid fast" and run["seed"] == 1)
    assert run["relative_error"] == pytest.approx(quantizer.relative_error(points), rel=1e-5)
    assert run["gini"] == pytest.approx([layer.gini for layer in diagnosis.layers])
    assert run["under_used"] == [layer.under_used for layer in diagnosis.layers]
    assert run["collision_rate"] == pytest.approx(diagnosis.collision_rate)


def test_distribution_by_hand(benchmarks):
    # counts 0, 0, 3, 9: sum_ij |n_i - n_j| = 2 (0 + 3 + 9 + 3 + 9 + 6) = 60
    codes = np.array([[2]] * 3 + [[3]] * 9)
    result = benchmarks["measures"].distribution(codes, [4])
    assert result["gini"] == pytest.approx([60 / (2 * 4 * 12)])
    assert result["under_used"] == [2] and result["collision_rate"] == pytest.approx(1 - 2 / 12)
    assert 0 < result["gini_null"][0] < 0.4
    reconstruction = np.array([[1.0, 0.0], [3.0, 1.0]])
    error = benchmarks["measures"].relative_error(
        np.array([[1.0, 1.0], [3.0, 1.0]]), lambda rows: reconstruction[rows]
    )
    assert error == pytest.approx(1 / 2)


def test_interleaved_times(benchmarks):
    calls, clock = [], iter(range(100))
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = benchmarks["measures"].interleaved_times(functions, 2, lambda: next(clock))
    assert calls == ["a", "b"] * 3 and seconds == {"a": [1, 1], "b": [1, 1]}


def run_of(method, seed, error, cpu=1.0, gini=0.2, under_used=0, collisions=0.1):
    run = {"method": method, "seed": seed, "fit_cpu_seconds": cpu, "fit_memory_mib": None, "relative_error": error}
    return run | {"gini": [gini], "gini_null": [0.1], "under_used": [under_used], "collision_rate": collisions}


def test_goals_are_computed(benchmarks):
    report = benchmarks["report"]
    runs = [run_of("faiss.Kmeans", seed, 0.5, cpu=10) for seed in range(3)]
    runs += [run_of("rqsid fast", seed, 0.49 + 0.01 * seed, cpu=seconds) for seed, seconds in enumerate((1, 5, 90))]
    runs += [run_of("rqsid quality", 0, 0.48, cpu=13), run_of("peer", 0, 0.4), run_of("rqsid other", 0, 0.1)]
    runs += [run_of("rqsid quality", 1, 0.48, cpu=13, gini=0.31, under_used=1)]
    rows = {name: report.summarize(runs, name) for name in dict.fromkeys(run["method"] for run in runs)}
    report.add_ratios(rows, "faiss.Kmeans")
    goals = {goal["goal"]: goal for goal in report.judge(rows, {"share_of_gemm": 0.8, "share_of_faiss": 0.9})}
    expected = {
        "fast: fit CPU / faiss.Kmeans": (0.5, True),  # the median, not the mean
        "fast: relative error / faiss.Kmeans": (1.0, False),
        "quality: fit CPU / faiss.Kmeans": (1.3, False),
        "quality: relative error / faiss.Kmeans": (0.96, True),
        "quality: relative error / the best peer's": (1.2, False),
        "encode: share of the matrix products' speed": (0.8, True),
        "encode: share of faiss' speed": (0.9, False),
        "fast: under-used codes, worst seed": (0, True),
        "quality: under-used codes, worst seed": (1, False),
        "quality: Gini, worst layer and seed": (0.31, False),
        "fast: spread of relative error over seeds": (0.04, False),
        "quality: spread of relative error over seeds": (0.0, True),
    }
    for goal, (value, met) in expected.items():
        assert goals[goal]["value"] == pytest.approx(value) and goals[goal]["met"] is met, goal


def test_unknown_methods_are_refused(benchmarks):
    with pytest.raises(SystemExit, match="no-such-thing: no method of this name"):
        benchmarks["quantizers"].main(["--methods", "no-such-thing"])


def test_peers_reconstruct_what_they_encode(benchmarks):
    points = benchmarks["measures"].synthetic_embeddings(400, dim=8)
    for name in ("scikit-learn KMeans", "rqsid RQVAE, 2 epochs"):
        function, _, _, options, quick_options = benchmarks["methods"].METHODS[name]
        encode, decode = function(points, [8, 8], 0, **(options if options is not None else quick_options))
        codes = np.asarray(encode(points))
        assert codes.shape == (400, 2) and codes.min() >= 0 and codes.max() < 8
        decoded = np.asarray(decode(codes))
        variance = np.square(points - points.mean(0)).sum()
        assert np.square(points - decoded).sum() < 0.98 * variance
        assert np.array_equal(decode(codes[5:9]), decoded[5:9])


def test_layers_of_a_peer_are_nearest_codes(benchmarks):
    """Each layer sees what the one before left over, in fitting and in encoding."""
    points = benchmarks["measures"].synthetic_embeddings(300, dim=6)
    encode, decode = benchmarks["methods"].sklearn_kmeans(points, [4, 4], 0)
    codes = encode(points)
    codebooks = [np.stack([decode(np.array([[c, 0]]))[0] for c in range(4)])]
    codebooks.append(np.stack([decode(np.array([[0, c]]))[0] for c in range(4)]))
    first, second = codebooks[0] - codebooks[0][:1], codebooks[1] - codebooks[1][:1]
    zero = codebooks[0][0]  # first code of both layers
    reconstructions = zero + first[:, None] + second[None]
    left = np.square(points[:, None] - reconstructions[codes[:, 0]]).sum(2)
    assert np.array_equal(left.argmin(1), codes[:, 1])


def test_encode(benchmarks, tmp_path, capsys):
    threads = torch.get_num_threads()
    arguments = [
        "--rows",
        "5000",
        "--dim",
        "16",
        "--codebook_sizes",
        "32",
        "8",
        "--threads",
        "1",
        "--folder",
        str(tmp_path),
    ]
    result = benchmarks["encode"].main([*arguments, "--json", str(tmp_path / "results.json")])
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(result))
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]  # the folder of 2 bytes a number is gone
    assert torch.get_num_threads() == threads
    results = result["results"]
    assert results["encode, memory-mapped"]["rows"] == results["encode, streamed from parquet"]["rows"] == 5000
    for name, values in results.items():
        line = next(line for line in printed.splitlines() if line.startswith(f"| {name} |"))
        assert f"{values['rows_per_second'] / 1000:.1f}" in line
    shares = [results[f"GEMM {when}"]["share_of_gemm_per_second"] for when in ("before", "after")]
    assert sum(shares) == pytest.approx(2)
    assert sum(result["profile"].values()) == pytest.approx(1) and "aten::addmm" in result["profile"]


@pytest.mark.slow
def test_catalog(benchmarks, tmp_path, capsys, monkeypatch):
    module = benchmarks["catalog"]
    monkeypatch.setattr(module, "run_alone", lambda function, threads, *arguments: function(*arguments))
    arguments = ["--products", "3000", "--smaller", "1500", "--threads", "1", "--folder", str(tmp_path)]
    result = module.main([*arguments, "--json", str(tmp_path / "results.json")])
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(result))
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert (
        result["build"]["reloaded_equal"] and result["bundle"]["linked"] and result["change"]["appended_are_visible"]
    )
    assert result["change"]["colliding_after_reassign"] == 0 and result["change"]["sweep_points"] == 1025
    speed = result["look_up"]["ids_per_second"]
    goal = next(goal for goal in result["goals"] if goal["goal"] == "product ids looked up per second")
    assert goal["value"] == speed and goal["met"] == (speed >= 1e6)
    assert all(goal["goal"] in printed for goal in result["goals"]) and "3,000" in printed
    with pytest.raises(SystemExit):
        module.parse_arguments(["--products", "500", "--smaller", "1000"])


def test_memory_of_a_block_is_its_peak(benchmarks):
    result = {}
    with benchmarks["encode"].measure(result, 10):
        array = np.ones(2**23)  # 64 MiB, gone at the end
        array += 1
        time.sleep(0.2)
        del array
    if result["memory_mib"] is not None:
        assert 60 < result["memory_mib"] < 90
    assert result["rows_per_second"] < 10 / 0.2 and result["rows_per_second"] < result["rows_per_cpu_second"]


def test_encode_needs_room(benchmarks, tmp_path):
    with pytest.raises(SystemExit, match="GB free"):
        benchmarks["encode"].main(["--rows", "1000000000000", "--folder", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_peer_that_fails_is_named(benchmarks, tmp_path, monkeypatch, capsys):
    quantizers, calls = benchmarks["quantizers"], []

    def run_alone(context, function, *arguments):
        calls.append(arguments[0])
        if function.__name__ == "prepare":
            return 100, 8
        if arguments[0] == "scikit-learn KMeans":
            raise OSError("out of luck")
        run = run_of(arguments[0], 0, 0.5)
        return {key: value for key, value in run.items() if key not in ("method", "seed")}

    monkeypatch.setattr(quantizers, "run_alone", run_alone)
    monkeypatch.setattr(quantizers, "find_spec", lambda name: name)
    result = quantizers.main(["--methods", "scikit", "Kmeans", "--json", str(tmp_path / "results.json")])
    assert "scikit-learn KMeans" in calls and "faiss.Kmeans" in calls
    assert result["skipped"] == {"scikit-learn KMeans": "failed: OSError: out of luck"}
    assert "scikit-learn KMeans" not in [row["method"] for row in result["methods"]]
    assert "Left out: scikit-learn KMeans (failed: OSError: out of luck)." in capsys.readouterr().out
