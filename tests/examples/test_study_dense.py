"""Generative against dense: re-scoring and its weights by hand, methods against brute force, and a cell end to end."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def catalogue(study_modules, tmp_path_factory):
    """320 products of 5 categories, and 60 users who buy 3 to 30 of them."""
    folder, random = tmp_path_factory.mktemp("data") / "made", np.random.default_rng(0)
    folder.mkdir()
    items = {str(item): {"title": f"Secret {item}", "categories": f"All,Kind {item % 5}"} for item in range(320)}
    bought = {str(user): random.integers(0, 320, random.integers(3, 30)).tolist() for user in range(60)}
    (folder / "Made.inter.json").write_text(json.dumps(bought))
    (folder / "Made.item.json").write_text(json.dumps(items))
    return study_modules["catalogues"].load_catalogue(folder)


@pytest.fixture(scope="module")
def towers(study_modules, catalogue, tmp_path_factory):
    """A folder of results with a trained tower, and what [`load_tower`] makes of it."""
    out = tmp_path_factory.mktemp("out")
    return out, study_modules["item_embeddings"].load_tower(catalogue, out, seed=3)


@pytest.fixture
def retrievers(study_modules, catalogue, towers, monkeypatch):
    """All methods, with a search that finds products at random, but always the same ones for a history."""
    module, (_, (tower, embeddings, _)) = study_modules["retrievers"], towers
    seen = []

    def search(model, tokenizer, prompts, top_k, num_beams):
        assert num_beams == 7
        seen.extend(prompts)
        found = []
        for prompt in prompts:
            random = np.random.default_rng([int(product) for product in prompt["history"]])
            ids, scores = random.permutation(320), np.sort(-random.exponential(4, 320))[::-1]
            best = zip(ids[: min(top_k, 195)], scores, strict=False)
            found.append([{"product_id": str(product), "score": score} for product, score in best])
        return found

    monkeypatch.setattr(module, "search", search)
    trainer = SimpleNamespace(model=torch.nn.Linear(1, 1), processing_class=None)
    trainer.model.device = torch.device("cpu")
    made = module.Retrievers(catalogue, trainer, 7, tower, embeddings)
    made.seen = seen
    return made


def test_rescoring_by_hand(study_modules):
    rescoring = study_modules["rescoring"]
    beams, log_probs = (
        torch.tensor([[4, 2, 0], [1, -1, -1]]),
        torch.tensor([[-1.0, -2, -3], [-0.5, -torch.inf, -torch.inf]]),
    )
    tower = torch.tensor([[2, 5], [3, 1]])
    products, scores = rescoring.join_candidates(beams, log_probs, tower)
    assert products.tolist() == [[4, 2, 0, -1, 5], [1, -1, -1, 3, -1]]
    assert rescoring.join_candidates(beams, log_probs) == (beams, log_probs)
    similarities = torch.arange(10.0).view(2, 5) / 10
    log_popularity = torch.tensor([0.0, 1, 2, 3, 4, 5])
    history = torch.tensor([[0, 5, 0], [-1, -1, -1]])
    features = rescoring.make_features(products, scores, similarities, log_popularity, history)
    assert features.shape == (2, 5, len(rescoring.FEATURES)) and features.dtype == torch.float64
    # log-probability, found, similarity, popularity, in history, recency
    expected = [[-1, 1, 0.0, 4, 0, 0], [-2, 1, 0.1, 2, 0, 0], [-3, 1, 0.2, 0, 1, 1], [-3, 0, 0.4, 5, 1, 1 / 2]]
    assert features[0, [0, 1, 2, 4]].numpy() == pytest.approx(np.array(expected))
    assert features[1, [0, 3]].numpy() == pytest.approx(np.array([[-0.5, 1, 0.5, 1, 0, 0], [-0.5, 0, 0.8, 3, 0, 0]]))
    weights = torch.tensor([1.0, 0.5, 0.0, 0.0, 0.0, 4.0], dtype=torch.float64)
    # row 0: -1 + .5, -2 + .5, -3 + .5 + 4, none, -3 + 2; row 1: 0 and -.5
    assert rescoring.rescore(features, products, weights, 3).tolist() == [[0, 4, 5], [1, 3, -1]]
    nothing = torch.zeros(6, dtype=torch.float64)
    assert rescoring.rescore(features, products, nothing, 6).tolist() == [[4, 2, 0, 5, -1, -1], [1, 3, -1, -1, -1, -1]]


def test_planted_weights_are_found(study_modules):
    rescoring, generator = study_modules["rescoring"], torch.Generator().manual_seed(0)
    planted = torch.tensor([1.0, -20.0, 0.1, 0.0], dtype=torch.float64)
    features = torch.randn(6000, 12, 4, generator=generator, dtype=torch.float64) * torch.tensor(
        [1.0, 0.05, 10.0, 1.0]
    )
    products = torch.arange(12).repeat(6000, 1)
    products[:, 10:] = -1
    scores = (features @ planted).masked_fill(products < 0, -torch.inf)
    bought = torch.multinomial(scores.softmax(1), 1, generator=generator)[:, 0]
    weights, used = rescoring.fit_weights(features, products, bought)
    assert used == 6000 and (weights / planted)[:3].tolist() == pytest.approx([1, 1, 1], abs=0.06)
    assert abs(weights[3]) < 0.06
    # rows without their product say nothing, and the order of rows and candidates does not matter
    bought[3000:] = 99
    half, used = rescoring.fit_weights(features, products, bought)
    alone, _ = rescoring.fit_weights(features[:3000].flip(0, 1), products[:3000].flip(0, 1), bought[:3000].flip(0))
    assert used == 3000 and half.tolist() == pytest.approx(alone.tolist(), rel=1e-4, abs=1e-4)
    with pytest.raises(ValueError, match="In none of 6000 validation rows"):
        rescoring.fit_weights(features, products, torch.full((6000,), 99))
    # a feature that says it all keeps a finite weight, a constant one gets none
    features[..., 0], features[..., 1] = products == 3, 7.0
    certain, _ = rescoring.fit_weights(features[:50], products[:50], torch.full((50,), 3))
    assert certain[0] > 3 and certain.isfinite().all() and certain[1] == 0


def test_methods_against_brute_force(study_modules, catalogue, towers, retrievers, monkeypatch):
    _, (tower, embeddings, _) = towers
    rows = catalogue.splits["test"].select(range(20))
    texts = [
        " ".join([row["query"], "", *(f"Secret {product}" for product in row["history"][-5:])])
        for row in rows.to_list()
    ]
    queries = tower.encode(texts)
    similarities = queries @ embeddings.T
    exact = np.argsort(-similarities, axis=1, kind="stable")[:, :50]
    assert (retrievers.by_tower(rows) == exact).mean() > 0.99  # sums of another order may swap neighbours

    popularity = np.asarray(catalogue.popularity)
    for row, ranked in zip(rows.to_list(), retrievers.by_category(rows), strict=True):
        same = [product for product in range(320) if f"kind {product % 5}" == row["query"]]
        assert ranked.tolist() == sorted(same, key=lambda product: -popularity[product])[:50]
    plain = np.argsort(-popularity, kind="stable")[:50]
    assert (retrievers.by_counts(rows) == plain).all()

    counts = np.zeros((320, 320))
    for sequence in catalogue.sequences:
        for steps in (1, 2, 3):
            kept = sequence[:-2]
            np.add.at(counts, (kept[:-steps], kept[steps:]), 1 / steps)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1e-9)
    for row, ranked in zip(rows.to_list(), retrievers.by_transitions(rows), strict=True):
        scores = sum(shares[int(product)] * 0.5**nth for nth, product in enumerate(row["history"][::-1]))
        is_certain = scores[ranked] > 0
        assert scores[ranked] == pytest.approx(np.sort(scores)[::-1][:50])
        assert (np.diff(popularity[ranked[~is_certain]]) <= 0).all()

    found, candidates = retrievers.retrieve(rows)
    assert (found["SID model"] == retrievers.by_sids(rows)).all() and set(retrievers.seen[0]) == {
        "profile",
        "history",
        "query",
    }
    for name, (products, features) in candidates.items():
        products, known = products.numpy(), (products >= 0).numpy()
        assert known.sum(1).tolist() == [len(set(row[row >= 0])) for row in products]
        expected = np.take_along_axis(similarities, products.clip(0), 1)
        wanted = expected[known] if name != "SID model, re-scored" else np.zeros(known.sum())
        assert features[..., 2].numpy()[known] == pytest.approx(wanted, abs=1e-5)
        assert features[..., 3].numpy()[known] == pytest.approx(np.log1p(popularity)[products[known]], rel=1e-6)
        if name == "hybrid, union":
            assert all(set(near) <= set(row) for near, row in zip(exact[:, :45], products, strict=True))
        elif name == "dual tower, re-scored":
            assert (np.diff(expected, axis=1) < 1e-5).all() and products.shape == (20, 200)
            assert all(set(near) <= set(row) for near, row in zip(exact, products, strict=True))
        else:
            assert (products[:, :50] == found["SID model"]).all()
    # by similarity alone what is re-scored comes in the tower's order, and nothing is searched for the tower's own
    retrievers.seen.clear()
    ranked = retrievers.by_rescoring(rows, "dual tower, re-scored", torch.eye(6).double()[2])
    assert (ranked == exact).mean() > 0.99 and not retrievers.seen
    monkeypatch.setattr(retrievers, "encode_queries", lambda _: pytest.fail("Nothing is asked of the tower."))
    ranked = retrievers.by_rescoring(rows, "SID model, re-scored", torch.eye(6).double()[0])
    assert (ranked == found["SID model"]).all()


def test_test_rows_never_enter_the_fit(study_modules, catalogue, retrievers):
    dense, validation, test = study_modules["dense"], catalogue.splits["validation"], catalogue.splits["test"]
    first, weights = dense.compare(retrievers, validation, test)
    assert [len(ranks) for ranks in first["methods"].values()] == [60] * 9 and set(first["methods"]) == set(
        study_modules["dense_tables"].PARTS
    )
    assert first["fitted_rows"]["hybrid"][0] < first["fitted_rows"]["hybrid, union"][0] < 60
    # what a method must not read has no weight
    weight = first["weights"]
    assert weight["SID model, re-scored"]["tower similarity"] == 0 != weight["hybrid"]["tower similarity"]
    assert weight["dual tower, re-scored"]["SID log-probability"] == 0 != weight["hybrid"]["SID log-probability"]
    assert weight["dual tower, re-scored"]["tower similarity"] != 0 == weight["hybrid"]["found by beams"]
    changed = test.select(range(30)).map(lambda row: {"product": str((int(row["product"]) + 1) % 320)})
    second, again = dense.compare(retrievers, validation, changed)
    for name in ("weights", "fitted_rows", "validation_methods"):
        assert second[name] == first[name], name
    assert all((again[name] == weights[name]).all() for name in weights) and second["methods"] != first["methods"]
    # the weights are those of the validation rows: their likelihood there is at least that of any of these
    products, features = (
        torch.cat(parts)
        for parts in zip(
            *(retrievers.retrieve(rows)[1]["hybrid"] for rows in dense._batches(validation, 25)), strict=True
        )
    )
    bought = torch.from_numpy(retrievers.bought(validation))
    alone, _ = study_modules["rescoring"].fit_weights(features, products, bought)
    assert alone.tolist() == pytest.approx(weights["hybrid"].tolist(), rel=1e-4, abs=1e-6)
    hits = (products == bought[:, None]).any(1).sum()
    assert first["fitted_rows"]["hybrid"] == [hits, 60]
    # what a hybrid ranks is what it re-scored
    for name in weights:
        ranked = retrievers.by_rescoring(test, name, weights[name])
        assert study_modules["training"].ranks_of(ranked, retrievers.bought(test)) == first["methods"][name]
    assert first["ceilings"]["hybrid"] >= np.count_nonzero(first["methods"]["hybrid"]) / 60


def test_towers_are_kept_with_their_queries(
    study_modules, catalogue, towers, purchases_module, dual_tower_module, make_frames, monkeypatch, tmp_path
):
    module, queries = study_modules["item_embeddings"], study_modules["towers"]
    out, (tower, embeddings, about) = towers
    assert about["cpu_seconds"] > 0 and about["dim"] == embeddings.shape[1] == 64
    monkeypatch.setattr(queries, "_train_tower", lambda *_: pytest.fail("The tower is there."))
    again, same, _ = module.load_tower(catalogue, out, seed=3)
    rows = catalogue.splits["validation"]
    assert (same == embeddings).all()
    assert (queries.query_encoder(again, catalogue)(rows) == queries.query_encoder(tower, catalogue)(rows)).all()
    # what is asked for is no part of a tower for the next item
    settings = queries.tower_settings
    assert settings(catalogue.without_queries(), 3) != settings(catalogue, 3) != settings(catalogue, 4)
    (folder,) = [path for path in (out / "embeddings").iterdir() if path.is_dir()]
    (folder / "model").rename(folder / "moved")
    with pytest.raises(ValueError, match="tower that was not kept"):
        module.load_tower(catalogue, out, seed=3)
    (folder / "moved").rename(folder / "model")

    purchases = purchases_module.build_purchases(**make_frames())
    monkeypatch.setattr(
        study_modules["catalogues"], "import_example", lambda *_: SimpleNamespace(load_purchases=lambda **_: purchases)
    )
    shop = study_modules["catalogues"].load_catalogue("completejourney")
    tower, embeddings, about = module.load_tower(shop, tmp_path, seed=1)
    made = dual_tower_module.train_dual_tower(purchases.train, purchases.products, seed=1)
    assert (embeddings == dual_tower_module.embed_products(made, purchases.products)).all()
    rows = shop.splits["test"].select(range(7))
    wanted = dual_tower_module.embed_queries(made, rows, purchases.products)
    encode = queries.query_encoder(tower, shop)
    assert encode(rows) == pytest.approx(wanted, abs=1e-6) and encode(rows.select([4])) == pytest.approx(
        wanted[4:5], abs=1e-6
    )
    trainer = SimpleNamespace(model=torch.nn.Linear(1, 1), processing_class=None)
    trainer.model.device = torch.device("cpu")
    methods = study_modules["retrievers"].Retrievers(shop, trainer, 7, tower, embeddings)
    bought = methods.bought(rows)[:, None]
    # a query is the type of what was bought, of which there are fewer than 50
    assert (methods.by_category(rows) == bought).any(1).all() and (methods.by_tower(rows) == bought).any(1).all()
    assert methods.by_transitions(rows).shape == (7, 50)


@pytest.mark.slow
def test_end_to_end(study_modules, catalogue, tmp_path, monkeypatch):
    """The smallest cell: what the SID model ranks is what its trainer ranks, and the table says what it is of."""
    dense, training = study_modules["dense"], study_modules["training"]
    points = np.random.default_rng(0).standard_normal((320, 6)).astype(np.float32)
    trainers = []
    monkeypatch.setattr(dense, "LATENCY", {"single": (1, 3), "batch": (8, 24)})
    monkeypatch.setattr(dense, "fit_model", lambda *args: trainers.append(training.fit_model(*args)) or trainers[-1])
    described = {"kind": "sentence encoder", "of": "tiny", "dim": 6, "digest": "abc"}
    assert dense.dense(catalogue, points, described, tmp_path, size=16, seeds=[0], quick=True) == 1
    (cell,) = study_modules["cells"].read_cells(tmp_path, "dense")
    result, test = cell["result"], training.spread(catalogue.splits["test"], 50)
    products, _, labels, _ = training.rank_rows(trainers[0], test)
    assert result["methods"]["SID model"] == training.ranks_of(products, labels) == result["item_ranks"]
    assert len(result["users"]) == 50 and all(len(ranks) == 50 for ranks in result["methods"].values())
    model = trainers[0].model
    assert (
        result["memory"]["SID model"] == 4 * model.num_parameters() and result["memory"]["item matrix"] == 320 * 64 * 4
    )
    assert all(time > 0 for kind in ("single", "batch") for time in result["latency"][kind].values())

    (path,) = study_modules["dense_tables"].write_dense_tables(tmp_path)
    text = open(path, encoding="utf-8").read()
    for word in (
        "data set:",
        "task:",
        "protocol:",
        "tie order:",
        "seeds:",
        "commit:",
        "cost:",
        "dual tower:",
        "candidates:",
    ):
        assert f"- {word}" in text
    assert "Secret" not in text
    rows = [line for line in text.splitlines() if line.startswith("| hybrid, union | ")]
    assert len(rows) == 10  # metrics, five paired, weights, validation, latency, memory
    hits = {name: np.array(ranks) == 1 for name, ranks in result["methods"].items()}
    assert rows[0].startswith(f"| hybrid, union | {hits['hybrid, union'].mean():.4f} [")
    for row, baseline in zip(rows[1:6], study_modules["dense_tables"].BASELINES, strict=True):
        assert row.startswith(f"| hybrid, union | {hits['hybrid, union'].mean() - hits[baseline].mean():+.4f} [")
    assert dense.dense(catalogue, points, described, tmp_path, size=16, seeds=[0], quick=True) == 0
    # the next item is no search in a category
    plain = catalogue.without_queries()
    retrievers = study_modules["retrievers"].Retrievers(
        plain, trainers[0], 50, *study_modules["item_embeddings"].load_tower(catalogue, tmp_path)[:2]
    )
    assert list(retrievers.floors()) == ["popularity", "item-transition kNN"]
    less = {name: ranks for name, ranks in result["methods"].items() if name != "popularity in the category"}
    next_item = study_modules["dense_tables"].dense_tables([cell | {"result": result | {"methods": less}}])
    assert "| popularity in the category" in text and "| popularity in the category" not in next_item
    assert "| method - popularity in the category" in text and "| method - SID model, re-scored" in next_item
    # of two seeds the table has means and deviations
    twice = study_modules["dense_tables"].dense_tables(
        [cell, cell | {"seed": 1, "settings": cell["settings"] | {"seed": 1}}]
    )
    assert "± 0.0000" in twice and "- seeds: 0, 1" in twice and twice.count("\n## ") == 1
    others = {"seed": 1, "settings": cell["settings"] | {"seed": 1}, "result": result | {"users": [0] * 50}}
    with pytest.raises(ValueError, match="other test rows"):
        study_modules["dense_tables"].dense_tables([cell, cell | others])
