"""Recipes for accuracy and their floors, by hand and on a catalogue made up here."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

RECIPES = sorted((Path(__file__).parents[2] / "examples" / "study" / "recipes").glob("*.json"))
NUM_PRODUCTS = 320


@pytest.fixture(scope="module")
def load(study_modules, tmp_path_factory):
    """`load(sequences, num_products)`: a catalogue of those."""

    def make(sequences, num_products):
        folder = tmp_path_factory.mktemp("data") / "made"
        folder.mkdir()
        items = {str(item): {"title": f"Thing {item}"} for item in range(num_products)}
        (folder / "Made.inter.json").write_text(json.dumps({str(user): rows for user, rows in enumerate(sequences)}))
        (folder / "Made.item.json").write_text(json.dumps(items))
        return study_modules["catalogues"].load_catalogue(folder)

    return make


@pytest.fixture(scope="module")
def small(load):
    """Training purchases: 0 1 2, 0 1 3, 1 2."""
    return load([[0, 1, 2, 3, 4], [0, 1, 3, 2, 5], [1, 2, 0, 1 + 3]], 6)


@pytest.fixture(scope="module")
def recipe(study_modules):
    return study_modules["accuracy"].read_recipe(RECIPES[0])


def test_transitions_by_hand(study_modules, small):
    module = study_modules["joint_embeddings"]
    bought = module.training_purchases(small)
    assert [rows.tolist() for rows in bought] == [[0, 1, 2], [0, 1, 3], [1, 2]]
    counts = np.zeros((6, 6))
    counts[0, 1], counts[1, 2], counts[1, 3] = 2, 2, 1
    assert (module.transitions(bought, 6).toarray() == counts).all()
    counts[0, 2], counts[0, 3] = 1, 1
    assert (module.transitions(bought, 6, window=2).toarray() == counts).all()


def test_collaborative_vectors_see_training_purchases_only(study_modules, load):
    module, random = study_modules["joint_embeddings"], np.random.default_rng(0)
    sequences = [random.permutation(30)[:8].tolist() for _ in range(40)]
    other = [rows[:-2] + [29, 28] for rows in sequences]
    made = [module.training_purchases(load(rows, 31)) for rows in (sequences, other)]
    first, second = (module.collaborative_vectors(bought, 31, window=2, dim=4) for bought in made)
    assert (first == second).all() and first.shape == (31, 4) and not first[30].any()
    assert np.allclose(np.linalg.norm(first[:30], axis=1), 1)
    # The matrix that is decomposed, by its definition: log p(a, b) / (p(a) p'(b)), p' smoothed, nothing below 0.
    together = np.zeros((31, 31))
    for rows in made[0]:
        for at in range(len(rows)):
            for behind in rows[at + 1 : at + 3]:
                together[rows[at], behind] += 1
                together[behind, rows[at]] += 1
    contexts = together.sum(0) ** 0.75
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.log(
            together / together.sum() / (together.sum(1) / together.sum())[:, None] / (contexts / contexts.sum())
        )
    left, values, _ = np.linalg.svd(np.where(together > 0, np.maximum(information, 0), 0))
    expected = left[:, :4] * np.sqrt(values[:4])
    expected /= np.maximum(np.linalg.norm(expected, axis=1, keepdims=True), 1e-9)
    assert np.allclose(first @ first.T, expected @ expected.T, atol=1e-6)


def test_joint_embeddings_and_neighbours(study_modules):
    module = study_modules["joint_embeddings"]
    texts = np.array([[3.0, 0.0], [1.0, 2.0], [1.0, -2.0], [-1.0, 0.0]])
    joint = module.joint_embeddings(texts, np.eye(4)[:, :3], text_weight=0.5)
    assert joint.dtype == np.float32 and np.allclose(joint[:, :2], [[0.5, 0], [0, 0.5], [0, -0.5], [-0.5, 0]])
    assert (joint[:, 2:] == np.eye(4)[:, :3]).all()
    points = np.array([[1.0, 0.0], [2.0, 0.2], [0.0, 1.0], [1.0, 3.0]])
    assert module.neighbours(points, 2).tolist() == [[1, 3], [0, 3], [3, 1], [2, 1]]


def test_floors_by_hand(study_modules, small):
    module = study_modules["floors"]
    validation, test = small.splits["validation"], small.splits["test"]
    # Training purchases: 1 has 3, 0 and 2 have 2, 3 has 1, 4 and 5 none.
    popular = module.rank_by_popularity(small, test)
    assert popular.shape == (3, 6) and popular.tolist()[0] == [4, 5, -1, -1, -1, -1]
    assert popular[2].tolist() == [3, 4, 5, -1, -1, -1]
    # History 0 1 2: behind 2 nothing, behind 1 twice 2 (in the history) and once 3, behind 0 twice 1.
    assert module.rank_by_transitions(small, validation, 0.5)[0].tolist() == [3, 4, 5, -1, -1, -1]
    # History 0 1 3: behind 3 nothing, behind 1 twice 2 and once 3, behind 0 twice 1.
    assert module.rank_by_transitions(small, validation, 0.5)[1].tolist() == [2, 4, 5, -1, -1, -1]
    # History 1 2: nothing but what the history holds and 3, then 0 by its purchases.
    assert module.rank_by_transitions(small, validation, 0.5)[2].tolist() == [3, 0, 4, 5, -1, -1]
    # With the history: 0 1 2 has 2 (from 1) with .5 * 2, 3 with .5, 1 (from 0) with .25 * 2, more often bought than 3.
    assert module.rank_by_transitions(small, validation, 0.5, with_history=True)[0].tolist() == [2, 1, 3, 0, 4, 5]
    assert module.rank_by_popularity(small, test, with_history=True).tolist() == [[1, 0, 2, 3, 4, 5]] * 3


def test_decay_counts_places_back(study_modules, load):
    # Behind 0 once 3, behind 1 twice 4; the last row's history is 0 1, or 1 0.
    catalogue = load([[0, 3, 7, 7], [1, 4, 7, 7], [1, 4, 7, 7], [2, 0, 1, 5], [2, 1, 0, 5]], 8)
    rank = study_modules["floors"].rank_by_transitions
    rows = catalogue.splits["test"]
    assert rank(catalogue, rows, 0.4)[3, :2].tolist() == [4, 3] and rank(catalogue, rows, 0.4)[4, :2].tolist() == [
        3,
        4,
    ]
    assert rank(catalogue, rows, 0.6)[4, :2].tolist() == [4, 3]


def test_history_is_left_out(study_modules, small):
    ranked = np.array([[3, 4, 0, 5, -1], [5, 4, 0, 1, 2], [0, 2, 1, 3, -1]])
    found = study_modules["floors"].leave_out_history(ranked, small, small.splits["test"])
    assert found.tolist() == [[4, 5, -1, -1, -1], [5, 4, -1, -1, -1], [3, -1, -1, -1, -1]]


def test_variants_of_sessions(study_modules):
    vary, ids = study_modules["augmentation"].vary_sessions, list("abcdef")
    sessions = [{"profile": "p", "products": list("abc"), "queries": [""] * 3}]
    similar = np.array([[3], [4], [5], [0], [1], [2]])
    assert vary(sessions, ids, similar, passes=2) == sessions * 2
    assert vary(sessions, ids, similar, 1, replaced=1.0)[0]["products"] == list("def")
    assert vary(sessions, ids, similar, 1, inserted=1.0)[0]["products"] == list("adbecf")
    assert vary(sessions, ids, similar, 1, left_out=1.0) == sessions
    many = vary(sessions, ids, similar, 300, left_out=0.3, seed=1)
    lengths = [len(session["products"]) for session in many]
    assert set(lengths) == {2, 3} and all(len(session["queries"]) == len(session["products"]) for session in many)
    # all three stay with probability .343, two of them with .441, and fewer are no session, which then stays whole
    assert abs(np.mean(np.array(lengths) == 2) - 0.441) < 0.1
    assert (
        many
        == vary(sessions, ids, similar, 300, left_out=0.3, seed=1)
        != vary(sessions, ids, similar, 300, left_out=0.3)
    )
    with pytest.raises(ValueError, match="a query is that of one product"):
        vary([{"profile": "", "products": ["a"], "queries": ["soap"]}], ids, similar, 1)


def test_dropout_in_training_only(study_modules):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=20, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1)
    ).eval()
    tokens = torch.arange(8)[None]
    plain = model(tokens).logits
    hooks = study_modules["accuracy"].add_dropout(model, 0.5)
    assert len(hooks) == 3 and (model(tokens).logits == plain).all()
    model.train()
    assert not torch.allclose(model(tokens).logits, plain)
    for hook in hooks:
        hook.remove()
    assert (model(tokens).logits == plain).all()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_can_be_read(study_modules, path):
    recipe = study_modules["accuracy"].read_recipe(path)
    study_modules["accuracy"].ResidualQuantizerConfig(**recipe["quantizer"], seed=0)
    assert set(study_modules["training_cells"].TRAINING) < set(recipe["training"])
    # as the command of the README would run it
    assert recipe["training"]["test_rows"] is None and recipe["training"]["train_rows"] is None


def test_other_files_are_refused(study_modules, tmp_path, recipe, small):
    read = study_modules["accuracy"].read_recipe
    for text in (
        "{",
        "[]",
        json.dumps({name: recipe[name] for name in list(recipe)[1:]}),
        json.dumps(recipe | {"x": 1}),
    ):
        (tmp_path / "recipe.json").write_text(text)
        with pytest.raises(ValueError, match="recipe.json"):
            read(tmp_path / "recipe.json")
    with pytest.raises(ValueError, match="has no sequences"):
        study_modules["accuracy"].accuracy(replace(small, sequences=[]), None, {}, tmp_path, recipe)


def test_changes_of_a_recipe(study_modules, recipe):
    changed = study_modules["accuracy"].changed
    assert changed(recipe, []) == recipe
    found = changed(recipe, ["model.width=96", "quantizer.codebook_sizes=[64, 64]"])
    assert found["model"] == recipe["model"] | {"width": 96} and found["quantizer"]["codebook_sizes"] == [64, 64]
    assert found["name"] == f"{recipe['name']}, model.width=96, quantizer.codebook_sizes=[64, 64]"
    assert found["training"] == recipe["training"] and recipe["model"]["width"] != 96
    for assignment, message in (
        ("model.wide=96", "no 'model.wide'"),
        ("name=1", "no 'name'"),
        ("model.family=x", "no JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            changed(recipe, [assignment])


def test_tables_by_hand(study_modules, recipe, monkeypatch):
    tables = study_modules["accuracy_tables"]
    monkeypatch.setattr(tables, "statement", lambda block: ["- statement"])
    data = {"name": "made", "digest": "d"}
    rows = {name: recipe["training"][name] for name in ("validation_rows", "test_rows")}
    common = {"users": [0, 1, 2, 3], "search_seconds": 1.0}
    floors = [
        {
            "settings": {"data": data, "floor": name, **rows, "seed": 0},
            "seed": 0,
            "cpu_seconds": 1,
            "result": common | result,
        }
        for name, result in (
            ("popularity", {"item_ranks": [0, 0, 0, 12]}),
            ("item-transition kNN", {"item_ranks": [1, 0, 0, 0], "decay": 0.8}),
        )
    ]
    curve = [{"epoch": 1.0, "ndcg@10": 0.2, "recall@10": 0.5, "loss": 2.0}]
    curve.append({"epoch": 2.0, "ndcg@10": 0.1, "recall@10": 0.75, "loss": 3.0})
    costs = {
        "validation": curve,
        "parameters": 10,
        "training_tokens": 2000,
        "training_flops": 1.2e5,
        "sids": {"unique": 7},
    }
    trained = [
        {
            "settings": {"data": data, "recipe": recipe, "text": {}, "seed": seed},
            "seed": seed,
            "cpu_seconds": 60,
            "commit": "c",
            "result": common | costs | {"item_ranks": ranks, "with_history": [0, 0, 0, 10]},
        }
        for seed, ranks in ((0, [1, 5, 0, 0]), (1, [1, 5, 10, 0]))
    ]
    text = tables.accuracy_tables([*trained, *floors], trials=trained)
    lines = {tuple(line.split(" | ")[:2]): line.split(" | ") for line in text.splitlines() if line.startswith("| ")}
    name = f"| {recipe['name']}"
    assert lines["| popularity", "1"][4] == "0.0000 [0.0000, 0.0000]"
    assert lines["| item-transition kNN", "1"][4] == "0.2500 [0.0000, 0.7500]"
    assert lines[name, "2"][4].startswith("0.6250 ± 0.1768 [")
    assert lines[f"{name}, with history", "2"][4].startswith("0.2500 ± 0.0000 [")
    assert any(line.startswith(f"{name} | +0.0000 [+0.0000, +0.0000] | +0.2500 [") for line in text.splitlines())
    assert lines[name, "1"][2:] == ["10", "2,000", "1.20e+05", "1.0", "60", "1 of 2", "7", "0.5000 |"]
    assert "Decay of the item-transition kNN: 0.8." in text and json.dumps(recipe, indent=2) in text
    (row,) = (
        line for line in text.splitlines() if line.startswith(f"| made {name} | 0, 1 | c | 60 | 2.000 | 1, 1 of 2 | ")
    )
    assert row.split(" | ")[9].startswith("0.6250 ± 0.1768 [")
    assert "Tried on" not in tables.accuracy_tables(trained)
    assert text.index("## Published elsewhere") > text.index("Costs:") and ".0648" in text


@pytest.mark.slow
def test_end_to_end(study_modules, load, recipe, tmp_path):
    module, random = study_modules["accuracy"], np.random.default_rng(0)
    catalogue = load(
        [random.permutation(NUM_PRODUCTS)[: random.integers(5, 30)].tolist() for _ in range(60)], NUM_PRODUCTS
    )
    texts = random.standard_normal((NUM_PRODUCTS, 6)).astype(np.float32)
    assert study_modules["accuracy_tables"].write_accuracy_tables(tmp_path) == []
    for expected in (3, 0):
        assert module.accuracy(catalogue, texts, {"kind": "made"}, tmp_path, recipe, [0], quick=True) == expected
    cells = study_modules["cells"].read_cells(tmp_path, "accuracy")
    results = {cell["settings"].get("floor", "recipe"): cell["result"] for cell in cells}
    assert {len(result["item_ranks"]) for result in results.values()} == {50}
    trained = results["recipe"]
    assert len(trained["validation"]) == 1 and trained["training_tokens"] > 0
    for without, with_history, sid in zip(
        *(trained[key] for key in ("item_ranks", "with_history", "sid_ranks")), strict=True
    ):
        assert (without == 0) == (with_history == 0) and without <= with_history and sid <= with_history
    assert module.accuracy(catalogue, texts, {}, tmp_path, recipe, [0], quick=True, validation_only=True) == 1
    (trial,) = study_modules["cells"].read_cells(tmp_path, "accuracy_trials")
    hits = np.array(trial["result"]["with_history"])
    # The best epoch, whose weights these are, is the one there is.
    assert ((hits > 0) & (hits <= 10)).mean() == pytest.approx(trial["result"]["validation"][0]["recall@10"])
    (path,) = study_modules["accuracy_tables"].write_accuracy_tables(tmp_path)
    text = Path(path).read_text(encoding="utf-8")
    for word in (
        "data set:",
        "task:",
        "protocol:",
        "tie order:",
        "seeds:",
        "commit:",
        "cost:",
        "validation rows: the first 50",
    ):
        assert f"- {word}" in text
