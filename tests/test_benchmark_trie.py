"""The trie's benchmark, run through its main function on few SIDs."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    """The module; it lies in a folder that is no package, as scripts find each other."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield __import__("trie")
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("trie", "catalog", "measures"):
            sys.modules.pop(name, None)


@pytest.mark.slow
def test_every_station_runs_and_the_goals_come_last(benchmark, tmp_path, capsys):
    arguments = ["--sids", "30000", "--smaller", "5000", "--threads", "1", "--folder", str(tmp_path)]
    result = benchmark.main([*arguments, "--json", str(tmp_path / "results.json")])
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(result))
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    codes = benchmark.make_codes(30_000)
    nodes = 1 + sum(len(np.unique(codes[:, :length], axis=0)) for length in range(1, 5))
    large = result["build"]
    assert large["sids"] == len(codes) and large["nodes"] == nodes
    assert (
        large["arrays_bytes_per_sid"] == pytest.approx(large["arrays_gb"] * 1e9 / len(codes))
        and large["peak_gb"] > 0.05
    )
    assert result["open_file"]["file_bytes_per_sid"] > 10
    small = result["change"]
    assert small["appended"] == 50 and small["appended_are_found"] and small["withdrawn_are_gone"]
    assert small["appended_searchable_seconds"] == pytest.approx(
        small["append_seconds"] + small["trie_after_append_seconds"]
    )
    assert result["compare"]["dict of dicts"]["build_seconds"] > 0
    last = [line for line in printed.splitlines() if line.startswith("|")][-len(result["goals"]) :]
    for goal, line in zip(result["goals"], last, strict=True):
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        assert cells[0] == goal["goal"] and cells[-1] == ("PASS" if goal["met"] else "MISS")


def test_goals_follow_the_values(benchmark):
    large = {"build_seconds": 31, "arrays_gb": 1.5, "peak_gb": 3}
    small = {"products": 10**6, "appended": 10**4, "restrict_10_percent_ms": 100.1, "restrict_90_percent_ms": 9}
    small |= {"appended_searchable_seconds": 0.9, "appended_are_found": True, "withdrawn_are_gone": False}
    met = [goal["met"] for goal in benchmark.judge({"build": large, "change": small})]
    assert met == [False, True, True, False, True, True, True, False]


def test_a_dictionary_and_codes_in_lexical_order(benchmark):
    codes = benchmark.make_codes(5000)
    assert len(np.unique(codes, axis=0)) == len(codes) and (np.lexsort(codes.T[::-1]) == np.arange(len(codes))).all()
    assert benchmark.build_dict([[1, 2], [1, 3], [4, 5]]) == {1: {2: {}, 3: {}}, 4: {5: {}}}


@pytest.mark.parametrize(
    "arguments, message", [(["--sids", "10"], "at least 2,000 SIDs"), (["--json", "/nowhere/x"], "no such folder")]
)
def test_bad_arguments(benchmark, arguments, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
    assert message in capsys.readouterr().err
