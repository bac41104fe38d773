"""The study's smallest cells that train, on a catalogue made up here."""

import json
import shutil
import sys

import numpy as np
import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """320 products of 5 categories or none, and 60 users who buy 3 to 30 of them."""
    folder, random = tmp_path_factory.mktemp("data") / "made", np.random.default_rng(0)
    folder.mkdir()
    items = {
        str(item): {"title": f"Thing {item}", "categories": f"All,Kind {item % 5}" if item % 9 else ""}
        for item in range(320)
    }
    bought = {str(user): random.integers(0, 320, random.integers(3, 30)).tolist() for user in range(60)}
    (folder / "Made.inter.json").write_text(json.dumps(bought | {"short": [1, 2]}))
    (folder / "Made.item.json").write_text(json.dumps(items))
    return folder


@pytest.fixture(scope="module")
def catalogue(study_modules, folder):
    return study_modules["catalogues"].load_catalogue(folder)


def test_sessions_hold_the_training_rows(study_modules, catalogue):
    sessions = study_modules["training"].sessions(catalogue)
    train = catalogue.splits["train"]
    learned = [
        (query, product)
        for session in sessions
        for query, product in zip(session["queries"], session["products"], strict=True)
    ]
    category = dict(zip(catalogue.product_ids, catalogue.categories, strict=True))
    assert all(query == category[product] for query, product in learned)
    # the first purchase of each user, in no row of its own, comes on top
    firsts = [catalogue.product_ids[row[0]] for row in catalogue.sequences if len(row) > 3 or len(row) == 2]
    assert sorted(product for _, product in learned) == sorted([*train["product"][:], *firsts])
    assert max(len(session["products"]) for session in sessions) == 21
    held_out = sum(len(catalogue.splits[name]) for name in ("validation", "test"))
    assert held_out == 120 and catalogue.popularity.sum() >= len(learned)


def test_next_item_needs_no_text(study_modules, catalogue, tmp_path):
    training, plain = study_modules["training"], catalogue.without_queries()
    points = np.random.default_rng(0).standard_normal((320, 6)).astype(np.float32)
    options = {"quantizer": "RQ-KMeans", "init": "relocated", "codebook_size": 16, "layers": 3, "seed": 0}
    codes = study_modules["codes"].make_codes(plain, points, {}, tmp_path, **options)
    catalog, quantizer = training.build_catalog(plain, codes, study_modules["training_cells"].UNPRUNED, points)
    template = training.PromptTemplate(layout="session")
    base = training.base_tokenizer(plain, 300)
    tokenizer = training.SIDTokenizer.from_base(base, catalog, quantizer, prompt_template=template)
    sessions = tokenizer.encode_sessions(training.sessions(plain))
    assert sum(map(len, sessions["product_rows"])) == len(plain.splits["train"]) + sum(
        len(row) > 3 or len(row) == 2 for row in plain.sequences
    )


def test_groups_by_hand(study_modules):
    codes = np.array([[0, 1], [0, 1], [1, 0], [2, 1], [3, 0]])
    popularity = np.array([1, 1, 8, 1, 1])
    groups = study_modules["codes"].head_and_tail(codes, [4, 2], popularity, np.array([2, 0, 4, 1]))
    # by items: code 0 holds 2 of 5, with the next, code 1, 3 of 5; by purchases code 1 holds 8 of 12
    assert groups["items"] == ["hhth", "thth"]
    assert groups["interactions"] == ["httt", "htht"]


def test_metrics_by_hand(study_modules):
    statistics, training = study_modules["training_statistics"], study_modules["training"]
    ranked = np.array([[7, 3, 5], [3, -1, -1], [5, 7, -1]])
    assert training.ranks_of(ranked, np.array([5, 3, 3])) == [3, 1, 0]
    values = statistics.metrics([1, 3, 0, 8, 30])
    named = dict(zip(statistics.METRICS, values.mean(0).tolist(), strict=True))
    log = np.log2
    assert named == pytest.approx(
        {
            "Recall@1": 1 / 5,
            "Recall@5": 2 / 5,
            "Recall@10": 3 / 5,
            "Recall@50": 4 / 5,
            "NDCG@5": (1 + 1 / log(4)) / 5,
            "NDCG@10": (1 + 1 / log(4) + 1 / log(9)) / 5,
            "MRR": (1 + 1 / 3 + 1 / 8 + 1 / 30) / 5,
        }
    )
    # users, not rows, are resampled: two users of equal rows each leave 0, half or all
    rows = np.array([[1.0]] * 50 + [[0.0]] * 50)
    assert statistics.interval(rows, [0] * 50 + [1] * 50).tolist() == [[0.0], [1.0]]
    alone = statistics.interval(rows, range(100))
    assert 0.35 < alone[0, 0] < 0.45 < 0.55 < alone[1, 0] < 0.65
    # every user has a hit on the head and a miss on the tail: nothing is uncertain
    values, is_head = np.array([1.0, 0.0] * 20), np.array([True, False] * 20)
    difference = statistics.interval_of_difference(values, is_head, np.arange(40) // 2)
    assert difference.tolist() == [[1.0], [1.0]]
    # by the standard error of two independent halves, sqrt(.25 / 500 + .25 / 500)
    values, is_head = np.arange(1000) % 2.0, np.arange(1000) < 500
    low, high = statistics.interval_of_difference(values, is_head, np.arange(1000))[:, 0]
    assert (low, high) == pytest.approx((-1.96 * 0.0316, 1.96 * 0.0316), abs=0.008)


def test_arms_are_what_they_say(study_modules, catalogue, tmp_path):
    training, cells = study_modules["training"], study_modules["training_cells"]
    points = np.random.default_rng(0).standard_normal((320, 6)).astype(np.float32)
    options = {"quantizer": "RQ-KMeans", "codebook_size": 16, "layers": 3, "seed": 0}
    codes = study_modules["codes"].make_codes(catalogue, points, {}, tmp_path, init="relocated", **options)
    again = study_modules["codes"].make_codes(catalogue, points, {}, tmp_path, init="relocated", **options)
    assert (again.codes == codes.codes).all() and (codes.quantizer.encode(points) == codes.codes).all()
    assert [path.name for path in (tmp_path / "codes").iterdir()] == [codes.folder.name]
    arms = cells.remedy_arms(16)
    assert len({arm["name"] for arm in arms}) == len(arms) == 18
    assert "top 400 of 4096 pruned" in {arm["name"] for arm in cells.remedy_arms(4096)}  # the paper's, to the letter
    described = {}
    for arm in arms:
        catalog, quantizer = training.build_catalog(catalogue, codes, arm, points)
        described[arm["name"]] = training.describe_sids(catalog)
        assert list(quantizer.codebook_sizes) == catalog.codebook_sizes, arm
    assert (
        described["top 8 of 16 pruned"]["pruned"] == 8
        and described["layer dropped (top 16 of 16)"]["mean_length"] == 2
    )
    assert described["collisions by suffix"]["unique"] == described["collisions reassigned"]["unique"] == 320
    everything = {"strategy": "top_k", "layer": 1, "top_k": 16}
    catalog, _ = training.build_catalog(catalogue, codes, cells.UNPRUNED | {"pruning": everything}, points)
    assert training.describe_sids(catalog) == described["layer dropped (top 16 of 16)"]
    with pytest.raises(ValueError, match="20 products a code"):
        study_modules["codes"].check_size(17, 320)
    study_modules["codes"].check_size(16, 320)


@pytest.mark.slow
def test_cells_go_on_and_come_out_equal(study_modules, folder, catalogue, tmp_path, monkeypatch):
    """`remedies --quick` by the command line; a cell that is stopped after an epoch ends as an undisturbed one."""
    study, cells, training = study_modules["study"], study_modules["cells"], study_modules["training"]
    points = np.random.default_rng(0).standard_normal((320, 6)).astype(np.float32)
    monkeypatch.setattr(sys.modules["item_embeddings"], "_encode", lambda *_: points)
    out = tmp_path / "out"
    arguments = ["--quick", "--data", str(folder), "--encoder", "tiny", "--out", str(out), "--epochs", "2"]
    study.main(["remedies", *arguments])
    first = cells.read_cells(out, "remedies")
    assert [cell["settings"]["arm"]["name"] for cell in first] == ["top 2 of 16 pruned", "unpruned"]
    text = (out / "tables" / "remedies.md").read_text()
    for word in ("data set:", "task:", "protocol:", "tie order:", "seeds:", "commit:", "cost:"):
        assert f"- {word}" in text
    assert "| top 2 of 16 pruned | 1 | +" in text or "| top 2 of 16 pruned | 1 | -" in text
    result = first[1]["result"]
    assert len(result["item_ranks"]) == len(set(result["users"])) == 50 and max(result["sid_ranks"]) > 0
    assert result["groups"] == first[0]["result"]["groups"] and len(result["validation"]) == 2
    assert result["training_flops"] == 6 * result["parameters"] * result["training_tokens"]

    lines = (out / "remedies.jsonl").read_bytes().splitlines(keepends=True)
    (unpruned,) = [line for line in lines if json.loads(line)["settings"]["arm"]["name"] == "unpruned"]
    (out / "remedies.jsonl").write_bytes(b"".join(line for line in lines if line != unpruned))
    save = training.SIDTrainer._save_checkpoint

    def stop(self, *args):
        save(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(training.SIDTrainer, "_save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        study.main(["remedies", *arguments])
    (left,) = (out / "checkpoints" / "remedies").iterdir()
    assert len(list(left.glob("checkpoint-*"))) == 1
    monkeypatch.setattr(training.SIDTrainer, "_save_checkpoint", save)
    shutil.rmtree(out / "codes")
    seen = []
    step = training.SIDTrainer.training_step
    monkeypatch.setattr(training.SIDTrainer, "training_step", lambda self, *args: seen.append(1) or step(self, *args))
    study.main(["remedies", *arguments])
    again = cells.read_cells(out, "remedies")
    assert again[0] == first[0] and len(seen) == -(-len(training.sessions(catalogue)) // 8)  # one epoch of two
    assert again[1]["result"] | {"search_seconds": None} == result | {"search_seconds": None}


@pytest.mark.slow
def test_probes(study_modules, folder, tmp_path, monkeypatch):
    points = np.random.default_rng(0).standard_normal((320, 6)).astype(np.float32)
    monkeypatch.setattr(sys.modules["item_embeddings"], "_encode", lambda *_: points)
    out = tmp_path / "out"
    study_modules["study"].main(["probes", "--quick", "--data", str(folder), "--encoder", "tiny", "--out", str(out)])
    swapped, unpruned = study_modules["cells"].read_cells(out, "probes")
    assert swapped["settings"]["arm"]["layer_order"] == [1, 0, 2]
    assert swapped["result"]["groups"] == unpruned["result"]["groups"]
    for cell in (swapped, unpruned):
        # at most 50 of 320 products are ranked, of which about 20 begin with the token given
        found = {name: np.count_nonzero(cell["result"][name]) for name in ("item_ranks", "given_first_token")}
        assert found["item_ranks"] < found["given_first_token"] == 50
    text = (out / "tables" / "probes.md").read_text()
    # item-level, SID-level, given the first token, what that changes, and two differences from the baseline
    assert text.count("| first two layers swapped | 1 | ") == 6
