"""The benchmark of training, run through its main function on tiny models, and what it computes."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

FOLDER = Path(__file__).parents[1] / "benchmarks"
NAMES = ("measures", "search_measures", "training_rows", "training_measures", "training_report", "training")
QWEN = "Qwen1.5-0.5B"
TINY = {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 24}
TINY |= {"num_attention_heads": 2, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def benchmarks():
    """The modules by name; they lie in a folder that is no package, as scripts find each other."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: __import__(name) for name in NAMES}
    finally:
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.fixture
def tiny(benchmarks, monkeypatch):
    """A setting whose shape goes by Qwen's name, so that goals are judged; all measurements in this process."""
    monkeypatch.setitem(benchmarks["training_rows"].SHAPES, QWEN, TINY)
    monkeypatch.setattr(benchmarks["training_rows"], "NUM_PRODUCTS", 300)
    monkeypatch.setattr(benchmarks["training_measures"], "map_large_blocks", lambda: None)
    monkeypatch.setattr(
        benchmarks["training"], "run_alone", lambda function, threads, *arguments: function(*arguments)
    )
    return {"shape": QWEN, "layers": 2, "prompt": 40, "rows": 2, "checkpointing": False}


def table(printed, start):
    """The cells of each line of the table whose header begins so."""
    lines = printed.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(f"| {start}"))
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("| ").split("|")])
    return rows


@pytest.mark.slow
def test_all_parts(benchmarks, tiny, tmp_path, capsys):
    arguments = "--layers 2 --prompts 40 --rows 2 --threads 1 --clock cpu".split()
    result = benchmarks["training"].main([*arguments, "--json", str(tmp_path / "results.json")])
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(result))
    report, rows = benchmarks["training_report"], benchmarks["training_rows"]

    (run,), (memory,), (sessions,) = result["runs"], result["memory"], result["sessions"]
    for methods in (run["methods"], sessions["methods"]):
        reference = next(iter(methods.values()))["losses"]
        for values in methods.values():
            assert len(values["losses"]) == 2 and values["losses"] == pytest.approx(reference, abs=1e-5)
            for clock in ("wall", "cpu"):
                whole, forward_backward, optimizer = (
                    values[part][clock] for part in ("seconds", "forward_backward", "optimizer")
                )
                assert 0 < forward_backward and 0 < optimizer and forward_backward + optimizer < whole
    assert reference[0] != reference[1]
    # 2 rows of 40 tokens and an answer of 5, the last of which only the stock Trainer reads.
    assert {name: (values["answers"], values["tokens"]) for name, values in run["methods"].items()} == {
        rows.STOCK: (2, 2 * 45),
        rows.SID: (2, 2 * 44),
    }
    assert {values["answers"] for values in sessions["methods"].values()} == {16}
    assert set(memory["methods"]) == {rows.STOCK, rows.SID}

    speed = table(printed, "shape | layers | prompt | rows | forward")
    assert [row[:4] for row in speed] == [[QWEN, "2", "40", "2"]]
    assert float(speed[0][4]) == pytest.approx(report.speed_ratio(run, "cpu"), abs=0.006)
    assert float(speed[0][6]) == pytest.approx(report.speed_ratio(run, "cpu") / report.flop_limit(run), abs=0.006)
    assert f"{QWEN} has 24 layers, here 2." in printed and "bfloat16" not in printed
    goals = {row[0]: row[3] for row in table(printed, "goal")}
    assert goals["largest difference of losses"] == "PASS"
    assert goals["24 layers: peak extra memory / stock Trainer's"] == "not measured"
    assert "train_runtime" not in printed and printed.rstrip().splitlines()[-1].startswith("| largest difference")


@pytest.mark.slow
def test_a_loss_that_differs_is_seen(benchmarks, tiny, monkeypatch, capsys):
    rows, measures = benchmarks["training_rows"], benchmarks["training_measures"]

    class Wrong(measures.SIDTrainer):
        def compute_loss(self, *args, **kwargs):
            return 1.001 * super().compute_loss(*args, **kwargs)

    monkeypatch.setattr(measures, "SIDTrainer", Wrong)
    arguments = "--layers 1 --prompts 40 --rows 2 --parts speed --threads 1".split()
    result = benchmarks["training"].main(arguments)
    loss = result["runs"][0]["methods"][rows.STOCK]["losses"][0]
    assert result["goals"][-1]["value"] == pytest.approx(loss / 1000, rel=0.2) and not result["goals"][-1]["met"]
    assert table(capsys.readouterr().out, "goal")[-1][-1] == "MISS"


@pytest.mark.slow
def test_memory_counts_what_only_the_stock_trainer_holds(benchmarks, tiny, monkeypatch):
    if benchmarks["measures"].memory_mib("VmHWM") is None:
        pytest.skip("There is no /proc.")
    rows, measures = benchmarks["training_rows"], benchmarks["training_measures"]
    # So many tokens that neither activations nor gradients are as large as logits.
    monkeypatch.setitem(rows.SHAPES, QWEN, TINY | {"vocab_size": 6000})
    setting = tiny | {"layers": 1, "prompt": 100, "rows": 12}
    stock, own = (measures.measure_memory(name, setting, "plain") for name in (rows.STOCK, rows.SID))
    logits = 12 * 105 * 6000 * 4 / 2**20
    # Logits, and at least their softmax, for the whole row instead of the answer.
    assert own > 0 and 1.5 * logits < stock - own < 6 * logits


@pytest.mark.parametrize("kind, peak", [("accumulating", 10.0), ("plain", 6.0)])
def test_steps_start_with_the_optimizers_states(benchmarks, monkeypatch, kind, peak):
    measures = benchmarks["training_measures"]
    model = torch.nn.Linear(2**10, 2**10, bias=False)  # 4 MiB
    before = copy.deepcopy(model.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    trainer = type("Trainer", (), {"training_step": None, "add_callback": lambda self, callback: None})()
    monkeypatch.setattr(measures, "start_peak", lambda: 100.0)
    monkeypatch.setattr(measures, "peak_mib", lambda: 110.0)
    watch = measures.Watch(trainer, kind)
    watch.on_train_begin(None, None, None, model=model, optimizer=optimizer)
    assert torch.equal(model.weight, before) and "exp_avg" in optimizer.state[model.weight]
    assert (model.weight.grad is None) == (kind == "plain")
    watch.on_step_end(None, None, None)
    assert watch.peak_mib == peak


def test_models_start_alike(benchmarks, tiny):
    rows = benchmarks["training_rows"]
    tokenizer = rows.load_tokenizer(tiny)
    first, again = (rows.make_model(tiny, tokenizer).state_dict() for _ in range(2))
    assert all(torch.equal(weight, again[name]) for name, weight in first.items())


@pytest.mark.parametrize("num_logits, recomputed", [(5, False), (30, False), (5, True)])
def test_operations_are_those_that_torch_counts(benchmarks, tiny, num_logits, recomputed):
    rows = benchmarks["training_rows"]
    model = rows.make_model(tiny, rows.load_tokenizer(tiny)).train()
    model.set_attn_implementation("eager")
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch, length, layers, hidden = 3, 30, 2, TINY["hidden_size"]
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.ones(batch, length, dtype=torch.long), logits_to_keep=num_logits, use_cache=False).logits
        logits.sum().backward()
    # Eager attention also multiplies what the mask takes away.
    masked = batch * (length**2 - length * (length + 1) // 2)
    extra = (3 + recomputed) * layers * 2 * 2 * hidden * masked
    config = TINY | {"num_hidden_layers": layers}
    flops = rows.training_flops(config, [length] * batch, batch * num_logits, recomputed)
    assert counter.get_total_flops() == flops + extra


def test_sessions_hold_the_prompts_of_their_rows(benchmarks, tiny):
    rows = benchmarks["training_rows"]
    tokenizer = rows.load_tokenizer(tiny)
    purchases, sessions = rows.make_session_rows(tokenizer, num_users=2, prompt=128)
    assert len(purchases) == 16 and len(sessions) == 2
    for user, session in enumerate(sessions):
        own = purchases[8 * user : 8 * user + 8]
        assert len(own[-1]["input_ids"]) == 128
        for row, label in zip(own, session["label_positions"][::5], strict=True):
            assert session["input_ids"][: label + 1] == row["input_ids"]
        assert session["label_ids"] == [token for row in own for token in row["label_ids"]]
    work = {
        name: rows.work_of(name, tiny, batch) for name, batch in ((rows.ROWS, purchases), (rows.SESSIONS, sessions))
    }
    assert {name: values["answers"] for name, values in work.items()} == {rows.ROWS: 16, rows.SESSIONS: 16}
    assert work[rows.SESSIONS]["tokens"] == 2 * (128 + 4)
    assert work[rows.ROWS]["tokens"] == sum(len(row["input_ids"]) + 4 for row in purchases)


@pytest.mark.parametrize("seconds, met", [(2.0, True), (2.2, False)])
def test_goals(benchmarks, seconds, met):
    report, rows = benchmarks["training_report"], benchmarks["training_rows"]

    def times(forward_backward, flops, losses=(11.0, 10.0)):
        return {
            "seconds": {"cpu": 2 * forward_backward},
            "forward_backward": {"cpu": forward_backward},
            "flops_done": flops,
            "losses": losses,
        }

    setting = {"shape": QWEN, "layers": 6, "prompt": 256, "rows": 8, "checkpointing": False}
    runs = [
        setting | {"methods": {rows.STOCK: times(6.0, 63), rows.SID: times(seconds, 20, (11.0, 10.00005))}},
        setting | {"layers": 24, "methods": {rows.STOCK: times(4.0, 30), rows.SID: times(2.5, 20)}},
        setting | {"shape": "small", "methods": {rows.STOCK: times(1.0, 30), rows.SID: times(2.5, 20, (0.0, 0.0))}},
    ]
    peaks = {rows.STOCK: {"plain": 100.0, "accumulating": 1.0}, rows.SID: {"plain": 41.0, "accumulating": 1.0}}
    memory = [
        setting | {"layers": 24, "methods": peaks},
        setting | {"layers": 12, "methods": peaks},
        setting | {"layers": 12, "checkpointing": True, "methods": peaks | {rows.SID: {"plain": None}}},
    ]
    values = {rows.ROWS: 7.0, rows.ROWS_PACKED: 6.0, rows.SESSIONS: 1.0, rows.SESSIONS_PACKED: seconds}
    sessions = [setting | {"methods": {name: times(value, 1) for name, value in values.items()}}]
    goals = {goal["goal"]: goal for goal in report.judge(runs, memory, sessions, "cpu")}
    share = goals["forward and backward: share of the FLOP limit"]
    assert share["value"] == pytest.approx(min(6 / seconds / 3.15, 1.6 / 1.5)) and share["met"] == met
    assert goals["forward and backward, 6 layers: rows per second / stock Trainer's"]["met"] == met
    assert goals["forward and backward, 24 layers: rows per second / stock Trainer's"]["value"] == 1.6
    assert goals["24 layers: peak extra memory / stock Trainer's"]["met"]
    assert not goals["12 layers: peak extra memory / stock Trainer's"]["met"]
    assert goals["gradient checkpointing: peak extra memory / stock Trainer's"]["met"] is None
    assert goals["sessions, packed: answers per second / one answer a row"]["value"] == 6 / seconds
    assert goals["largest difference of losses"]["value"] == pytest.approx(5e-5)


def test_utilisation_by_hand(benchmarks):
    values = {"flops": 3e14, "flops_done": 4e14, "seconds": {"wall": 2.0}}
    assert benchmarks["training_report"].utilisation(values, 500) == pytest.approx(0.3)
    # Qwen1.5-0.5B has 308 million weights in matrix products of its layers, and 156 million in the output layer.
    rows = benchmarks["training_rows"]
    flops = rows.training_flops(rows.SHAPES[QWEN], [1], 1)
    assert flops == pytest.approx(6 * (308.3e6 + 155.6e6), rel=1e-3)


def test_settings(benchmarks, capsys):
    training = benchmarks["training"]
    assert training.parse_arguments(["--quick"]).settings == training.QUICK_SETTINGS
    assert (QWEN, 24, 256, 4, False) in training.parse_arguments([]).settings
    options = training.parse_arguments(["--layers", "6", "12", "--rows", "4", "--checkpointing"])
    assert options.settings == [(QWEN, layers, 256, 4, True) for layers in (6, 12)] == options.sessions
    assert training.parse_arguments(["--shape", "Llama-2-7B"]).settings[0][:2] == ("Llama-2-7B", 32)
    for wrong in (["--layers", "0"], ["--prompts", "9000"], ["--json", "/no/x"], ["--shape", "GPT"]):
        with pytest.raises(SystemExit):
            training.parse_arguments(wrong)
    assert "at least 1" in capsys.readouterr().err
