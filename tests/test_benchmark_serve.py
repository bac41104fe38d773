"""The load test of the service, run through its main function with little load, and what it makes of the answers."""

import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
MODULES = ("measures", "app", "batching", "engine", "gate", "metrics")


@pytest.fixture(scope="module")
def benchmark():
    path = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    try:
        yield __import__("serve")
    finally:
        sys.path[:] = path
        for name in ("serve", *MODULES):
            sys.modules.pop(name, None)


def test_serve(benchmark, tmp_path, capsys):
    threads = torch.get_num_threads()
    sizes = {"products": 300, "hidden_size": 16, "layers": 1, "history": 3, "clients": 6, "max_batch": 3, "rounds": 1}
    options = {**sizes, "seconds": 1.0, "threads": 1, "json": tmp_path / "results.json"}
    result = benchmark.main(["--quick", *(f"--{name}={value}" for name, value in options.items())])
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(result))
    assert torch.get_num_threads() == threads

    batched, alone, overload = result["arms"].values()
    assert alone["mean_batch"] == 1 and 1 < batched["mean_batch"] <= 3
    # 24 clients for 6 places.
    assert set(overload["statuses"]) == {"200", "429"} and set(batched["statuses"]) == {"200"}
    goals = {goal["goal"]: goal for goal in result["goals"]}
    ratio = goals["searches per second, batched over one by one"]["value"]
    assert ratio == batched["searches_per_second"] / alone["searches_per_second"]
    assert goals["share of 429 at overload"]["met"] and goals["answers other than 200 and 429 at overload"]["met"]
    for name, arm in result["arms"].items():
        assert arm["p50_ms"] <= arm["p95_ms"] <= arm["p99_ms"]
        line = next(line for line in printed.splitlines() if line.startswith(f"| {name} |"))
        assert f"| {arm['searches_per_second']:.1f} |" in line and f"200: {arm['statuses']['200']}" in line
    assert printed.rstrip().splitlines()[-1].startswith("| share of 429 at overload |")


def test_what_is_made_of_answers(benchmark):
    answers = [[200, 0.1]] * 50 + [[200, 0.3]] * 49 + [[200, 1.3], [429, 0.01], [0, 9.0]]
    arm = benchmark.summarize(answers, 4.0)
    assert arm["searches_per_second"] == 25 and arm["statuses"] == {"200": 100, "429": 1, "0": 1}
    assert [arm["p50_ms"], arm["p95_ms"], arm["p99_ms"]] == pytest.approx([200, 300, 310])
    with pytest.raises(SystemExit, match="No search was answered: {500: 3}"):
        benchmark.summarize([[500, 0.1]] * 3, 4.0)


@pytest.mark.parametrize(
    "arm, change, missed",
    [
        ("batched", {}, []),
        ("one by one", {"searches_per_second": 8.0}, ["searches per second, batched over one by one"]),
        ("one by one", {"statuses": {"200": 9, "504": 1}}, ["answers other than 200 while there is room"]),
        ("batched", {"statuses": {"200": 9, "0": 1}}, ["answers other than 200 while there is room"]),
        ("overload", {"statuses": {"200": 9, "429": 9, "0": 1}}, ["answers other than 200 and 429 at overload"]),
        ("overload", {"statuses": {"200": 999, "429": 1}}, ["share of 429 at overload"]),
        ("overload", {"searches_per_second": 4.9}, ["searches per second, overload over batched"]),
    ],
)
def test_goals(benchmark, arm, change, missed):
    arms = {
        "batched": {"searches_per_second": 10.0, "statuses": {"200": 10}},
        "one by one": {"searches_per_second": 7.5, "statuses": {"200": 10}},
        "overload": {"searches_per_second": 5.1, "statuses": {"200": 10, "429": 1}},
    }
    arms[arm] |= change
    assert [goal["goal"] for goal in benchmark.judge({"arms": arms}) if not goal["met"]] == missed


def test_arguments(benchmark):
    quick, usual = benchmark.parse_arguments(["--quick", "--layers", "3"]), benchmark.parse_arguments([])
    assert (quick.products, quick.layers, usual.products, usual.layers) == (20_000, 3, 100_000, 4)
    for wrong in (["--clients", "0"], ["--history", "20000", "--quick"], ["--json", "/nowhere/at/all.json"]):
        with pytest.raises(SystemExit):
            benchmark.parse_arguments(wrong)
