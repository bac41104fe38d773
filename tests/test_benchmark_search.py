"""The benchmarks of search, run through their main functions on tiny models, and what they compare with."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rqsid import SIDLogitsProcessor, SIDTrie

FOLDER = Path(__file__).parents[1] / "benchmarks"
NAMES = ("measures", "search_measures", "search_peers", "search_report", "purchases", "search", "beams")
TINY = "--vocabularies 500 --sids 400 --prompts 24 --beams 6 --codebook_size 16 --hidden_size 64 --model_layers 1"
TINY += " --quick --threads 1 --varying 200 10 2 2"


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
def in_this_process(benchmarks, monkeypatch):
    """A process for every measurement would take a minute; turns of a second each would, too."""
    monkeypatch.setattr(benchmarks["search"], "run_alone", lambda function, threads, *arguments: function(*arguments))
    monkeypatch.setattr(benchmarks["search_measures"], "TURN_SECONDS", 0.01)


@pytest.fixture
def tiny(benchmarks):
    options = benchmarks["search"].parse_arguments(TINY.split())
    return *benchmarks["search"].load(500, 400, options), options


def line_of(printed, *cells):
    """The cells of the one line of a table that begins with these."""
    start = "| " + " | ".join(cells) + " |"
    (line,) = [line for line in printed.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in line.strip("| ").split("|")]


@pytest.mark.slow
def test_search(benchmarks, in_this_process, tmp_path, capsys):
    peers = benchmarks["search_peers"]
    result = benchmarks["search"].main([*TINY.split(), "--json", str(tmp_path / "results.json")])
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(result))

    (run,), (memory,) = result["runs"], result["memory"]
    assert set(run["seconds"]) == set(peers.METHODS) - {peers.WITH_END} - set(result["skipped"])
    assert set(memory["methods"]) == {peers.VOCAB, peers.DICTIONARY}
    others = set(run["seconds"]) - {peers.VOCAB, peers.SID}
    assert set(run["equality"]) == others
    assert all(equal["same_sids"] == 1 and equal["score_difference"] < 1e-4 for equal in run["equality"].values())
    for name, seconds in run["seconds"].items():
        where = ["500", "400", "24", "6", name]
        lines = [line for line in printed.splitlines() if line.startswith("| " + " | ".join(where) + " |")]
        timed = [cell.strip() for cell in lines[-1].strip("| ").split("|")]
        assert float(timed[5]) == pytest.approx(seconds["wall"], rel=0.01) and seconds["wall"] > 0
        ratio = run["seconds"][peers.DICTIONARY]["wall"] / seconds["wall"]
        assert float(timed[7]) == pytest.approx(ratio, abs=0.051)
        assert timed[8] == ("100.0%" if name in others else "-")
    for name in (peers.VOCAB, peers.SID):
        shares = run["phases"][name]
        assert sum(shares.values()) == pytest.approx(1) and all(share > 0 for share in shares.values())
        assert run["limit"][name]["seconds"]["wall"] > 0 and run["limit"][name]["overhead"] < 1

    varying = result["varying_length"]
    assert varying["wide_search_complete"] == 1 and varying["wide_search_top_found"] == 1
    for name in ("search", "generate", "wide_search"):
        assert varying[f"{name}_score_error"] < 1e-4
    assert varying["brute_force_error"] < 1e-4 and 0 < varying["short_share"] < 1
    assert f"Search returns {varying['search_in_generate']:.1%} of" in printed
    assert all(goal["met"] is None for goal in result["goals"]) and printed.count("not measured") == 10
    assert printed.rstrip().splitlines()[-1].startswith("| search, sid, 152,000 tokens: share of time beyond")


def test_equality_columns_see_what_differs(benchmarks, in_this_process, monkeypatch):
    search, peers = benchmarks["search"], benchmarks["search_peers"]
    options = search.parse_arguments(TINY.split())
    prepare, find, absent = peers.METHODS[peers.DICTIONARY]

    def find_others(model, tokenizer, constraint, *arguments, with_scores=False):
        rows, scores = find(model, tokenizer, constraint, *arguments, with_scores=with_scores)
        rows[2] = next(row for row in range(400) if row not in rows)
        return rows, scores if scores is None else scores - 0.01

    monkeypatch.setitem(peers.METHODS, peers.DICTIONARY, (prepare, find_others, absent))
    (run,) = search.time_settings(500, 400, [(24, 6)], [peers.VOCAB, peers.DICTIONARY], options)
    equality = run["equality"][peers.DICTIONARY]
    assert equality["same_sids"] == 5 / 6
    assert equality["score_difference"] == pytest.approx(0.01, abs=1e-3)


def test_compare_by_hand(benchmarks):
    found = torch.tensor([3, 1, 7]), torch.tensor([-1.0, -2.0, -3.0])
    reference = torch.tensor([1, 3, 9, 8]), torch.tensor([-2.5, -1.0, 0.0, 0.0])
    assert benchmarks["search_measures"].compare(found, reference) == {"same_sids": 0.5, "score_difference": 0.5}


def test_peers_that_are_absent_are_named(benchmarks, in_this_process, monkeypatch, capsys):
    peers = benchmarks["search_peers"]
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    result = benchmarks["search"].main(
        [*TINY.split(), "--varying", "100", "5", "1", "1", "--methods", peers.VOCAB, "rectokens"]
    )
    assert result["skipped"] == {peers.RECTOKENS: "rectokens is not installed"}
    assert "Left out: generate, rectokens (rectokens is not installed)." in capsys.readouterr().out
    assert list(result["runs"][0]["seconds"]) == [peers.VOCAB]
    with pytest.raises(SystemExit, match="no method of this name"):
        benchmarks["search"].main([*TINY.split(), "--methods", "trees"])


def test_settings(benchmarks, capsys):
    search = benchmarks["search"]
    assert search.parse_arguments(["--quick"]).settings == search.QUICK_SETTINGS
    assert (152_000, 100_000, 512, 50) in search.parse_arguments([]).settings
    options = search.parse_arguments(["--prompts", "64", "512", "--beams", "20", "200", "--sids", "1000000"])
    assert options.settings == [(32_000, 1_000_000, p, k) for p in (64, 512) for k in (20, 200)]
    for wrong in (["--vocabularies", "1000"], ["--beams", "5000"], ["--hidden_size", "100"], ["--json", "/no/x"]):
        with pytest.raises(SystemExit):
            search.parse_arguments(wrong)
    assert "name" in capsys.readouterr().err


def test_dictionary_trie_holds_the_children_of_the_trie(benchmarks, tiny):
    tokenizer = tiny[0]
    children, trie = benchmarks["search_peers"].dictionary_trie(tokenizer)
    nodes = torch.arange(trie.num_nodes)
    assert len(children) == int((~trie.is_leaf(nodes)).sum())
    for prefix, tokens in children.items():
        node = trie.walk(torch.tensor([prefix], dtype=torch.int64).view(1, len(prefix)))
        expected, _, is_child = trie.children(node)
        assert sorted(tokens) == expected[is_child].tolist()


def test_mask_of_rectokens_is_that_of_the_trie(benchmarks, tiny):
    pytest.importorskip("rectokens", reason="a peer of the benchmark, which no extra installs")
    tokenizer, peers = tiny[0], benchmarks["search_peers"]
    constraint = peers.rectokens_trie(tokenizer)
    sids, scores = tokenizer.sid_sequences(), torch.randn(400, 500)
    prompts = torch.full((400, 3), 5)
    for depth in range(sids.shape[1]):
        input_ids = torch.cat([prompts, sids[:, :depth]], dim=1)
        ours = SIDLogitsProcessor(tokenizer, 3)(input_ids, scores.clone())
        assert torch.equal(peers.RectokensProcessor(constraint, 3)(input_ids, scores), ours)


def test_dictionary_trie_with_end_token_adds_it_to_the_score(benchmarks, tiny):
    tokenizer, model, _ = tiny
    peers, measures = benchmarks["search_peers"], benchmarks["search_measures"]
    prepare, find, _ = peers.METHODS[peers.WITH_END]
    prompt = measures.make_prompt(tokenizer, 9)
    rows, scores = find(model, tokenizer, prepare(tokenizer), prompt, 6, with_scores=True)
    ends = torch.full((6, 1), tokenizer.eos_token_id)
    expected = measures.score_all(model, prompt, torch.cat([tokenizer.sid_sequences()[rows], ends], dim=1))
    assert torch.allclose(scores, expected, atol=1e-4)


def test_limit_does_one_prefill_and_a_forward_per_further_level(benchmarks, tiny):
    tokenizer, model, _ = tiny
    shapes = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append((kwargs["input_ids"].shape[1], kwargs["past_key_values"])),
        with_kwargs=True,
    )
    prompt = benchmarks["search_measures"].make_prompt(tokenizer, 24)
    benchmarks["search_measures"].make_limit(model, prompt, 6, 4)()
    hook.remove()
    assert [length for length, _ in shapes] == [24, 6, 6, 6]
    assert shapes[-1][1].get_seq_length() == 24 + 3 * 6


def test_brute_force_is_a_forward_of_prompt_and_sid(benchmarks, tiny):
    tokenizer, model, _ = tiny
    measures = benchmarks["search_measures"]
    sequences = tokenizer.sid_sequences()[:7].clone()
    sequences[2, 3:], sequences[5, 2:] = -1, -1
    prompt = measures.make_prompt(tokenizer, 9)
    scores = measures.score_all(model, prompt, sequences, chunk_rows=3)
    assert torch.allclose(scores, measures.plain_scores(model, prompt, sequences), atol=1e-5)
    # By hand, for the shortest.
    logits = model(torch.tensor([prompt + sequences[5, :2].tolist()])).logits[0, 8:10].double().log_softmax(-1)
    assert scores[5].item() == pytest.approx(sum(logits[at, sequences[5, at]].item() for at in (0, 1)), abs=1e-5)


def test_a_turn_counts_by_its_mean_and_the_least_turn_counts(benchmarks, monkeypatch):
    measures, naps, now = benchmarks["search_measures"], iter([0.03, 0.01, 0.05, 0.03, 0.01, 0.01]), [0.0]

    def nap():
        now[0] += next(naps)

    monkeypatch.setattr(measures, "TURN_SECONDS", 0.035)
    monkeypatch.setattr(
        measures, "time", SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: now[0] / 2)
    )
    seconds = measures.take_turns({"nap": nap}, rounds=2)
    # turns of (.03, .01) and (.05)
    assert seconds["nap"] == pytest.approx({"wall": 0.02, "cpu": 0.01})


@pytest.mark.parametrize("seconds, met", [(0.2, True), (0.21, False)])
def test_goals(benchmarks, seconds, met):
    peers, report = benchmarks["search_peers"], benchmarks["search_report"]

    def run(prompt, own, difference):
        times = {peers.DICTIONARY: {"wall": 8.0, "cpu": 1.0}, peers.VOCAB: {"wall": own, "cpu": 1.0}}
        equality = {peers.DICTIONARY: {"same_sids": 1.0, "score_difference": difference}}
        setting = {"vocabulary": 32_000, "sids": 100_000, "prompt": prompt, "beams": 50}
        return setting | {"seconds": times, "equality": equality, "limit": {peers.VOCAB: {"overhead": own}}}

    peaks = {peers.DICTIONARY: {"peak_mib": 900.0}, peers.VOCAB: {"peak_mib": 270.0}, peers.SID: None}
    memory = [{"vocabulary": 32_000, "sids": 100_000, "prompt": 256, "beams": 50, "methods": peaks}]
    # The shorter prompt is none of the goal's; of the two others the worse counts.
    runs = [run(64, 4.0, 1.0), run(256, 0.1, 1e-6), run(512, seconds, 1e-5)]
    goals = {goal["goal"]: goal for goal in report.judge(runs, memory, "wall")}
    speed = goals["search, vocab, 32,000 tokens: times as fast as the dictionary trie"]
    assert speed == speed | {"value": 8 / seconds, "limit": ">= 40", "met": met}
    assert goals["search, vocab, 32,000 tokens: share of time beyond the model's forwards"]["value"] == seconds
    assert goals["largest difference of their scores"] == {
        "goal": "largest difference of their scores",
        "value": 1e-5,
        "limit": "<= 0.001",
        "met": True,
    }
    assert goals["search, vocab: peak extra memory / dictionary trie's"]["value"] == pytest.approx(0.3)
    assert goals["search, sid: peak extra memory / dictionary trie's"]["met"] is None
    assert goals["search, sid, 152,000 tokens: times as fast as the dictionary trie"]["met"] is None


@pytest.fixture
def small_beams(benchmarks, monkeypatch):
    monkeypatch.setattr(benchmarks["beams"], "TOP_KS", (3, 8))
    arguments = "--products 200 --codebook_size 8 --steps 2 --prompts 3 --generate_prompts 1 --threads 1".split()
    return benchmarks["beams"], arguments


@pytest.mark.slow
def test_beams(small_beams, tmp_path, capsys):
    module, arguments = small_beams
    result = module.main([*arguments, "--json", str(tmp_path / "results.json")])
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(result))
    catalogs = [name + suffix for name in ("varying length", "fixed length") for suffix in ("", ", 10 % allowed")]
    assert list(result["catalogs"]) == catalogs
    for name, catalog in result["catalogs"].items():
        assert catalog["exact_search"]["same_sids"] == 1 and catalog["exact_search"]["score_difference"] < 1e-4
        assert [(point["top_k"], point["num_beams"]) for point in catalog["curve"]] == [
            (top_k, top_k * width) for top_k in (3, 8) for width in module.WIDTHS
        ]
        for point in catalog["curve"]:
            assert 0 <= point["low"] <= point["mean"] <= point["high"] <= 1
        row = line_of(printed, name, "8")
        assert [cell.split(" ")[0] for cell in row[2:]] == [f"{point['mean']:.3f}" for point in catalog["curve"][5:]]
    lengths = result["catalogs"]["varying length"]["share_by_length"]
    assert set(lengths) == {3, 4} and sum(lengths.values()) == pytest.approx(1)
    assert set(result["catalogs"]["fixed length"]["share_by_length"]) == {4}
    assert set(result["catalogs"]["varying length"]["generate"]) == {"search", "0.0", "1.0"}

    again = module.main([*arguments, "--generate_prompts", "0"])
    for name, catalog in again["catalogs"].items():
        assert catalog["curve"] == result["catalogs"][name]["curve"]


def test_a_search_that_is_not_exact_is_seen(small_beams, monkeypatch, capsys):
    module, arguments = small_beams
    monkeypatch.setattr(module, "widest_level", lambda trie: 2)
    result = module.main([*arguments, "--generate_prompts", "0"])
    assert result["catalogs"]["fixed length"]["exact_search"]["same_sids"] < 1
    assert "finds 100.0% of the best on 3 prompts" not in capsys.readouterr().out


def test_share_found_by_hand(benchmarks):
    exact = torch.tensor([[4, 2, 9, -1], [1, 2, 3, 4]])
    found = torch.tensor([[2, 4, 7, -1], [8, 3, -1, -1]])
    assert benchmarks["purchases"].share_found(found, exact).tolist() == pytest.approx([2 / 3, 1 / 4])


def test_interval_covers_the_mean(benchmarks):
    shares = np.random.default_rng(0).random(400)
    values = benchmarks["beams"].interval(shares)
    assert values["mean"] == pytest.approx(shares.mean())
    # 1.96 standard errors of a uniform variable are .028.
    assert values["high"] - values["low"] == pytest.approx(2 * 0.0283, rel=0.15)
    assert benchmarks["beams"].interval(np.ones(5)) == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_prompts_end_with_their_history_and_the_separator(benchmarks):
    purchases = benchmarks["purchases"]
    _, codes, pruning = purchases.make_products(200, 8)
    tokenizer = purchases.make_product_tokenizer(codes, 8, pruning)
    histories = np.array([[3, 50, 7], [9, 9, 120]])
    ids, mask = purchases.make_prompts(tokenizer, histories)
    for row, history in enumerate(histories):
        sids = tokenizer.sid_sequences(tokenizer.catalog.sid_rows(history))
        assert ids[row][mask[row].bool()].tolist() == [*sids[sids >= 0].tolist(), tokenizer.base_size - 1]
        assert (mask[row].diff() >= 0).all()


def test_training_learns(benchmarks):
    purchases = benchmarks["purchases"]
    embeddings, codes, pruning = purchases.make_products(200, 8)
    tokenizer = purchases.make_product_tokenizer(codes, 8, pruning)
    model, loss = purchases.train(tokenizer, purchases.make_purchases(embeddings, 500), 40, batch_size=32)
    assert loss < 0.8 * np.log(len(tokenizer)) and not model.training


def test_widest_level(benchmarks):
    trie = SIDTrie(torch.tensor([[1, 5, 8], [1, 6, 8], [2, 5, 8], [3, 7, -1]]))
    assert benchmarks["search_measures"].widest_level(trie) == 3
