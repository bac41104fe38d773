"""The study's identifier schemes, and the comparisons in the tables of trained cells, on made-up catalogues and ranks."""

import json

import numpy as np
import pytest
from sklearn.linear_model import Ridge


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """320 products of 5 categories or none, and 60 users who buy 3 to 12 of them."""
    folder, random = tmp_path_factory.mktemp("data") / "made", np.random.default_rng(0)
    folder.mkdir()
    items = {
        str(item): {"title": f"Thing {item}", "categories": f"All,Kind {item % 5}" if item % 9 else ""}
        for item in range(320)
    }
    bought = {str(user): random.integers(0, 320, random.integers(3, 12)).tolist() for user in range(60)}
    (folder / "Made.inter.json").write_text(json.dumps(bought))
    (folder / "Made.item.json").write_text(json.dumps(items))
    return folder


@pytest.fixture(scope="module")
def catalogue(study_modules, folder):
    return study_modules["catalogues"].load_catalogue(folder)


@pytest.fixture(scope="module")
def points():
    return np.random.default_rng(0).standard_normal((320, 6)).astype(np.float32)


def make_cell(
    arm, seed, ranks, groups="hhtt", task="product search, given profile (constructed: category)", users=None, **other
):
    """As a line of a results file, with the ranks of each row."""
    copies = len(ranks) // len(groups)
    users = list(range(len(ranks))) if users is None else users
    result = {
        "item_ranks": ranks,
        "sid_ranks": ranks,
        "users": users,
        "groups": {kind: [groups * copies] * 3 for kind in ("items", "interactions")},
        "about": {"data set": "made up", "task": task},
        "parameters": 10,
        "training_tokens": 20,
        "training_flops": 1200,
        "search_seconds": 1.0,
        "validation": [{"epoch": 1.0, "ndcg@10": 0.1}],
        "sids": {"unique": 5, "mean_length": 3.0, "collision_rate": 0.5, "pruned": 0, "recall_ceiling": {"10": 1.0}},
    }
    settings = {
        "data": {"name": "made up", "task": task},
        "embeddings": {"kind": "none", "of": "nothing"},
        "codebook_size": 4,
        "layers": 3,
        "model": {"family": "llama"},
        "training": {"epochs": 1},
        "arm": arm if isinstance(arm, dict) else {"name": arm},
        "seed": seed,
    }
    return {
        "settings": settings | other,
        "seed": seed,
        "result": result,
        "cpu_seconds": 1.0,
        "commit": "c",
        "versions": {"torch": "2"},
    }


def test_differences_by_group_and_their_summary(study_modules):
    tables, comparisons = study_modules["training_tables"], study_modules["training_comparisons"]
    random = np.random.default_rng(0)
    base = [random.permutation([1, 0] * 100).tolist() for _ in range(2)]
    # "tail": every tail row is found, head rows are as they were; "equal": nothing changes; "fewer": other rows
    tail = [np.where(np.arange(200) % 4 > 1, 1, ranks).tolist() for ranks in base]
    cells = [make_cell("unpruned", seed, ranks) for seed, ranks in enumerate(base)]
    cells += [make_cell("tail", seed, ranks) for seed, ranks in enumerate(tail)]
    cells += [make_cell("equal", seed, ranks) for seed, ranks in enumerate(base)]
    cells += [make_cell("fewer", 0, base[0][:100])]
    text = tables.training_tables("Made up", cells)
    missed = np.mean(
        [np.mean([rank == 0 for rank, row in zip(ranks, range(200), strict=True) if row % 4 > 1]) for ranks in base]
    )
    nothing = "+0.0000<br>[+0.0000, +0.0000]"
    assert f"| tail | {nothing} | {missed:+.4f}<br>[" in text
    assert f"| equal |{f' {nothing} |' * 6}" in text
    assert text.count("| fewer | none with the same rows |") == 2 and "| fewer | 1 | " in text
    assert "- test rows: 100 of 100 users or 200 of 200 users" in text
    # two arms with the baseline's rows, two metrics of items and one of SIDs
    assert "6 comparisons, for which" in text and text.count("Recall@10: arm - unpruned | difference |") == 2
    each = ", ".join(f"{np.sum(np.array(new) != old) / 200:+.4f}" for new, old in zip(tail, base, strict=True))
    assert text.count(f"| {each} | better (p < .001) | better (p ") == 3
    same = "no difference shown (p 1.000)"
    assert text.count(f"| equal | +0.0000 [+0.0000, +0.0000] | +0.0000, +0.0000 | {same} | {same} |") == 3
    assert text.count("| 5 and 5 |") == 2  # SIDs, where those are counted
    # a worse arm, of the other order of columns; of other seeds one says nothing
    found = "\n".join(comparisons.summary({"unpruned": [cells[2]], "worse": [cells[0]]}))
    assert found.count("| worse (p < .001) | one seed: not known |") == 3
    assert comparisons.summary({"unpruned": [cells[0]], "fewer": [cells[-1]]}) == []


def test_seeds_that_disagree_show_nothing_of_other_seeds(study_modules):
    """One arm under two names, of which each model is luckier or not: users alone tell the models apart."""
    comparisons, random = study_modules["training_comparisons"], np.random.default_rng(1)
    rates = {"unpruned": (0.5, 0.45, 0.4), "again": (0.49, 0.5, 0.45), "better": (0.71, 0.66, 0.6)}
    arms = {
        name: [
            make_cell(name, seed, (random.random(4000) < rate).astype(int).tolist()) for seed, rate in enumerate(of)
        ]
        for name, of in rates.items()
    }
    found = [line.split(" | ")[3:5] for line in comparisons.summary(arms) if line.startswith(("| again", "| better"))]
    assert all(these.startswith("better (p ") for these, _ in found) and len(found) == 6
    assert [others[:6] for _, others in found] == ["no dif", "better"] * 3


def test_arms_of_one_name_are_refused_if_they_differ(study_modules):
    tables, ranks = study_modules["training_tables"], [1, 0, 1, 0]
    cells = [make_cell({"name": "focal loss", "gamma": gamma}, seed, ranks) for seed, gamma in enumerate((1.0, 2.0))]
    with pytest.raises(ValueError, match="all called 'focal loss'"):
        tables.training_tables("Made up", cells)
    assert tables.file_name("made up, K = 4 (3 layers)") == "made-up-k-4-3-layers"


def test_the_first_token_given_is_compared(study_modules):
    tables, cells = study_modules["training_tables"], []
    for name, given in (("unpruned", [1, 1, 0, 0]), ("first two layers swapped", [1, 1, 1, 0])):
        cells.append(make_cell(name, 0, [1, 0, 0, 0]))
        cells[-1]["result"]["given_first_token"] = given
    text = tables.training_tables("Made up", cells)
    gains = text.split("### What the first token given changes")[1].split("###")[0]
    assert "| unpruned | 1 | +0.2500<br>" in gains and "| first two layers swapped | 1 | +0.5000<br>" in gains
    paired = text.split("### Paired with *unpruned*, item-level, the first token given")[1].split("###")[0]
    assert paired.count("| +0.2500<br>") == 7


def test_arms_with_suffixes_have_a_baseline_of_their_own(study_modules):
    comparisons = study_modules["training_comparisons"]
    ranks = [1, 0, 1, 0]

    def arm(name, collisions, strategy):
        return [make_cell({"name": name, "collisions": collisions, "pruning": {"strategy": strategy}}, 0, ranks)]

    arms = {
        "unpruned": arm("unpruned", "share", "none"),
        "pruned": arm("pruned", "share", "top_k"),
        "collisions by suffix": arm("collisions by suffix", "suffix", "none"),
        "pruned, suffix": arm("pruned, suffix", "suffix", "top_k"),
        "focal, suffix": arm("focal, suffix", "suffix", "none"),
    }
    for name, scheme in ((comparisons.NOISE_BASELINE, "noise"), ("unpruned, noise", "noise"), ("atomic", "atomic")):
        arms[name] = [make_cell({"name": name, "scheme": scheme}, 0, ranks)]
    found = comparisons.baselines(arms)
    assert list(found.pop(comparisons.NOISE_BASELINE)) == [comparisons.NOISE_BASELINE, "atomic"]
    assert list(found) == ["unpruned", "collisions by suffix"] and found["unpruned"] == arms
    assert list(found["collisions by suffix"]) == ["collisions by suffix", "pruned, suffix", "focal, suffix"]
    text = "\n".join(comparisons.summary(found["collisions by suffix"], "collisions by suffix"))
    assert text.count("| pruned, suffix |") == 3 and "| item-level NDCG@10: arm - collisions by suffix |" in text
    assert comparisons.baselines({"pruned": arms["pruned"]}) == {}


def test_p_values_and_holm_by_hand(study_modules):
    statistics = study_modules["training_statistics"]
    # the smallest times 4, the next times 3, of which one must not be less than its predecessor
    assert statistics.holm([0.03, 0.01, 0.012, 0.9]) == pytest.approx([0.06, 0.04, 0.04, 0.9])
    assert statistics.holm([0.7, 0.6]) == [1.0, 1.0] and statistics.holm([]) == []
    assert statistics.holm([0.03, np.nan, 0.01]) == pytest.approx([0.03, np.nan, 0.02], nan_ok=True)
    # 60 of 400 users gain a hit, 40 lose one: z = 20 / sqrt(100 - 1) = 2.01, p = .044
    change = np.repeat([1.0, -1.0, 0.0], [60, 40, 300])[:, None]
    (p_value,) = statistics.p_values({0: change}, list(range(400)))
    assert p_value == pytest.approx(0.044, abs=0.01)
    # each user's rows count once when they are equal: four copies of everything say nothing more
    (copied,) = statistics.p_values({0: np.repeat(change, 4, 0)}, np.repeat(np.arange(400), 4).tolist())
    assert copied == pytest.approx(p_value)
    # three seeds of .04, .05 and .06, the same for all users: t = .05 / (.01 / sqrt(3)) = 8.66 of 2 degrees, p = .013
    seeds = {seed: np.full((400, 1), mean) for seed, mean in enumerate((0.04, 0.05, 0.06))}
    assert statistics.p_values(seeds, range(400))[0] == pytest.approx(0)
    assert statistics.p_values(seeds, range(400), other_seeds=True)[0] == pytest.approx(0.0131, abs=1e-4)
    # seeds that agree add nothing to users, however few they are
    agreeing = statistics.p_values({0: change, 1: change}, range(400), other_seeds=True)
    assert agreeing[0] == pytest.approx(p_value) and np.isnan(statistics.p_values({0: change}, range(400), True)[0])


def test_headings_tell_blocks_apart(study_modules):
    tables = study_modules["training_tables"]
    ranks = [1, 0, 1, 0]
    cells = [
        make_cell("unpruned", 0, ranks),
        make_cell("unpruned", 0, ranks, task="next item, given the history"),
        make_cell("unpruned", 0, ranks, training={"epochs": 2}),
    ]
    text = tables.training_tables("Made up", cells)
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "## made up, product search, llama, K = 4, 3 layers, epochs = 1",
        "## made up, next item, llama, K = 4, 3 layers",
        "## made up, product search, llama, K = 4, 3 layers, epochs = 2",
    ]
    assert "In short" not in text and "Paired" not in text.split("## ", 1)[1]


def test_hierarchical_codes_are_nested_clusters(study_modules, catalogue, points, tmp_path):
    scheme_codes = study_modules["scheme_codes"]
    # three far groups of three near ones of three products each, and what a product of the middle groups sold most
    place = np.arange(27)
    known = np.stack([100.0 * (place // 9), 5.0 * (place // 3 % 3)], 1) + np.random.default_rng(0).normal(
        0, 0.1, (27, 2)
    )
    made = scheme_codes.hierarchical_codes(known, -place, layers=3, seed=0)
    assert made.sizes == [3, 3, 3] and len(np.unique(made.codes, axis=0)) == 27
    for codes, group in ((made.codes[:, 0], place // 9), (made.codes[:, 0] * 3 + made.codes[:, 1], place // 3)):
        pairs = set(zip(codes.tolist(), group.tolist(), strict=True))
        assert len(pairs) == len(set(codes.tolist())) == len(set(group.tolist()))
    assert made.codes[:, 2].tolist() == [0, 1, 2] * 9
    # of any points: unique, and within one prefix numbered from 0 without gaps
    kept = [scheme_codes.kept_hierarchical_codes(catalogue, points, {}, tmp_path, 3, seed=1) for _ in range(2)]
    assert (kept[0].codes == kept[1].codes).all() and kept[0].sizes == kept[1].sizes
    codes, sizes = kept[0].codes, kept[0].sizes
    assert sizes[:2] == [7, 7] and (codes.max(0) < sizes).all() and codes[:, 2].max() == sizes[2] - 1
    assert len(np.unique(codes, axis=0)) == 320
    for prefix in np.unique(codes[:, :2], axis=0):
        leaf = np.flatnonzero((codes[:, :2] == prefix).all(1))
        assert sorted(codes[leaf, 2].tolist()) == list(range(len(leaf)))
        sold = catalogue.popularity[leaf[np.argsort(codes[leaf, 2])]]
        assert (np.diff(sold) <= 0).all()
    # the clusters of a parent are those of its products alone: the nearest of its children's means is a product's own
    parent = np.flatnonzero(codes[:, 0] == 0)
    means = np.stack([points[parent][codes[parent, 1] == child].mean(0) for child in np.unique(codes[parent, 1])])
    nearest = np.square(points[parent][:, None] - means).sum(2).argmin(1)
    assert (np.unique(codes[parent, 1])[nearest] == codes[parent, 1]).mean() > 0.9
    # equal products, more of them than clusters: their leaf numbers tell them apart
    equal = scheme_codes.hierarchical_codes(np.zeros((30, 2)), np.ones(30), layers=3, seed=0)
    assert equal.sizes == [4, 4, 30] and len(np.unique(equal.codes, axis=0)) == 30


def test_catalogs_of_the_schemes(study_modules, catalogue, points):
    training, arms = study_modules["training"], study_modules["schemes"].scheme_arms()
    assert len({arm["name"] for arm in arms}) == len(arms) == 6
    shared = {arm["name"] for arm in study_modules["schemes"].shared_arms(128)}
    assert shared == {"unpruned", "relocated codebooks", "collisions by suffix", "top 13 of 128 pruned"}
    by_scheme = {arm["scheme"]: arm for arm in arms}
    assert by_scheme["noise"]["collisions"] == "suffix"
    atomic = study_modules["scheme_codes"].atomic_codes(320)
    catalog, quantizer = training.build_catalog(catalogue, atomic, by_scheme["atomic"], points)
    described = training.describe_sids(catalog)
    assert quantizer is None and catalog.codebook_sizes == [320]
    assert (described["unique"], described["mean_length"], described["collision_rate"]) == (320, 1, 0)
    codes = study_modules["scheme_codes"].PlainCodes(np.arange(320)[:, None] // [64, 4, 2] % [5, 16, 1], [5, 16, 2])
    catalog, _ = training.build_catalog(catalogue, codes, by_scheme["RQ-VAE"], points)
    assert catalog.suffix_size >= 4 and training.describe_sids(catalog)["unique"] == 320


def test_coarse_codes_are_the_first_layers(study_modules, catalogue, points, tmp_path):
    options = {"quantizer": "RQ-KMeans", "init": "random, no relocation", "codebook_size": 16, "seed": 3}
    make = study_modules["codes"].make_codes
    coarse, fine = (make(catalogue, points, {}, tmp_path, layers=layers, **options) for layers in (2, 3))
    assert (coarse.codes == fine.codes[:, :2]).all()


def test_query_side_by_hand(study_modules, catalogue, points):
    query_side = study_modules["query_side"]
    units = query_side.unit_rows(points)
    assert np.linalg.norm(units, axis=1) == pytest.approx(1) and not query_side.unit_rows(np.zeros((1, 3))).any()
    queries = query_side.QuerySide(catalogue, units)
    rows = catalogue.splits["train"][:8] | {}
    rows["history"][0] = []
    rows["query"][1] = "never asked"
    train, row_of = catalogue.splits["train"], {name: row for row, name in enumerate(catalogue.product_ids)}
    for is_training in (False, True):
        found = queries.features(rows, is_training)
        for at, (history, query) in enumerate(zip(rows["history"], rows["query"], strict=True)):
            vectors = units[[row_of[product] for product in history]]
            same = [
                units[row_of[product]]
                for number, (asked, product) in enumerate(zip(train["query"], train["product"], strict=True))
                if asked == query and not (is_training and number == at)
            ]
            wanted = [vectors.mean(0), vectors[-1]] if len(history) else [np.zeros(6)] * 2
            wanted += [np.mean(same, 0) if same else np.zeros(6), [1.0]]
            if not (is_training and query == "never asked"):  # no training row
                assert found[at] == pytest.approx(np.concatenate(wanted), abs=1e-6), (at, is_training)
    # ridge regression as of scikit-learn, whose intercept is not penalized either
    matrices = queries.fit((1.0, 10.0))
    features = queries.features(train[:], is_training=True)
    bought = units[[row_of[product] for product in train["product"]]]
    for ridge, matrix in matrices.items():
        known = Ridge(alpha=ridge).fit(features[:, :-1], bought)
        assert matrix == pytest.approx(np.vstack([known.coef_.T, known.intercept_]), abs=1e-5)
    vectors = queries.embed(catalogue.splits["test"], matrices[1.0])
    assert vectors.shape == (60, 6) and np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)


def test_ranking_inside_coarse_sids(study_modules, monkeypatch):
    from rqsid import ProductCatalog

    coarse_dense, random = study_modules["coarse_dense"], np.random.default_rng(0)
    monkeypatch.setattr(coarse_dense, "ROWS", 3)
    popularity = random.integers(0, 4, 120)
    ids = [str(row) for row in range(120)]
    catalog = ProductCatalog.build(ids, random.integers(0, 5, (120, 2)), [5, 5], popularity=popularity)
    units = study_modules["query_side"].unit_rows(random.standard_normal((120, 4)))
    units[50:] = units[:70]  # equal products: their order must be the SID's place and popularity
    vectors = study_modules["query_side"].unit_rows(random.standard_normal((7, 4)))
    sids = np.stack([random.permutation(catalog.num_sids)[:6] for _ in range(7)])
    scores = -np.sort(random.exponential(1, sids.shape), axis=1).astype(np.float32)
    sids[2, 4:], scores[2, 4:] = -1, -np.inf
    sid_of = catalog.sid_rows(np.arange(120))
    ranked = coarse_dense.rank_inside(catalog, sids, scores, vectors, units, [0.0, 0.3, 1000.0])
    cosines = vectors @ units.T  # as there, so that equal products have equal bits
    for weight, products in zip((0.0, 0.3, 1000.0), ranked, strict=True):
        for row in range(7):
            found = [
                (-(np.float32(weight) * score + cosines[row, product]), place, -popularity[product], product)
                for place, (sid, score) in enumerate(zip(sids[row], scores[row], strict=True))
                for product in np.flatnonzero(sid_of == sid)
            ]
            wanted = [product for *_, product in sorted(found)][:50]
            assert products[row].tolist() == wanted + [-1] * (50 - len(wanted)), (weight, row)
    everything = coarse_dense.rank_all(vectors, units)
    assert (np.take_along_axis(cosines, everything, 1) == -np.sort(-cosines, 1)[:, :50]).all()


@pytest.mark.slow
def test_schemes_end_to_end(study_modules, catalogue, points, tmp_path, monkeypatch):
    schemes, coarse_dense, cells = (study_modules[name] for name in ("schemes", "coarse_dense", "cells"))
    fitted, fit = [], coarse_dense.fit_model
    monkeypatch.setattr(coarse_dense, "fit_model", lambda *arguments: fitted.append(fit(*arguments)) or fitted[-1])
    described = {"kind": "made", "of": "up", "dim": 6, "digest": "0"}
    options = {"size": 16, "seeds": [0], "quick": True}
    assert schemes.schemes(catalogue, points, described, tmp_path, names=["atomic ids (as DSI)"], **options) == 1
    assert not (tmp_path / "remedies.jsonl").exists()
    with pytest.raises(ValueError, match="No arm is called .'DSI'"):
        schemes.schemes(catalogue, points, described, tmp_path, names=["DSI"], **options)
    assert schemes.schemes(catalogue, points, described, tmp_path, **options) == 7
    assert schemes.schemes(catalogue, points, described, tmp_path, **options) == 0
    own = {cell["settings"]["arm"]["name"]: cell for cell in cells.read_cells(tmp_path, "schemes")}
    of_suffix = own.pop("collisions by suffix, rows from noise")["result"]
    own = {cell["settings"]["arm"]["scheme"]: cell["result"] for cell in own.values()}
    own["suffix, noise"] = of_suffix
    (unpruned,) = (
        cell["result"]
        for cell in cells.read_cells(tmp_path, "remedies")
        if cell["settings"]["arm"]["name"] == "unpruned"
    )
    for name, result in own.items():
        assert result["groups"] == unpruned["groups"] and result["users"] == unpruned["users"], name
        assert max(result["item_ranks"]) > 0
    for name in ("atomic", "hierarchical", "RQ-VAE", "suffix, noise"):
        assert own[name]["item_ranks"] == own[name]["sid_ranks"]
        assert own[name]["sids"]["unique"] == 320
    assert own["noise"]["sids"] == unpruned["sids"] and own["noise"]["parameters"] == unpruned["parameters"]
    assert own["noise"]["validation"] != unpruned["validation"]
    # 304 codes more, of 32 numbers each, as input and output rows are one
    assert own["atomic"]["parameters"] - unpruned["parameters"] == 32 * (320 - 3 * 16)

    # the beams are those of the trainer, whose products of a SID come by popularity
    training, (trainer,) = study_modules["training"], fitted
    test = training.spread(catalogue.splits["test"], 50)
    products, sids, labels, _ = training.rank_rows(trainer, test)
    coarse = own["coarse"]
    assert coarse["popularity_ranks"] == training.ranks_of(products, labels)
    assert coarse["sid_ranks"] == training.ranks_of(sids, trainer.processing_class.catalog.sid_rows(labels))
    # ridge and weight are the best on the validation rows, and rank the test rows
    query_side, statistics = study_modules["query_side"], study_modules["training_statistics"]
    units, spread = (
        query_side.unit_rows(points),
        [int(row * 59 / 49) for row in range(50)],
    )  # from the first to the last
    validation = catalogue.splits["validation"].select(spread)
    queries, catalog = query_side.QuerySide(catalogue, units), trainer.processing_class.catalog
    maps = queries.fit(coarse_dense.RIDGES)

    def ranks(rows, ridge, weights):
        searched = coarse_dense.scored_sids(trainer, rows, 50)
        ranked = coarse_dense.rank_inside(catalog, *searched, queries.embed(rows, maps[ridge]), units, weights)
        wanted = catalog.product_rows(rows["product"][:])
        return [training.ranks_of(products, wanted) for products in ranked]

    at, found = statistics.METRICS.index("NDCG@10"), {}
    for ridge in maps:
        for weight, ranked in zip(coarse_dense.WEIGHTS, ranks(validation, ridge, coarse_dense.WEIGHTS), strict=True):
            found[ridge, weight] = statistics.metrics(ranked)[:, at].mean()
    chosen = coarse["dense"]
    assert len(set(found.values())) > 1 and chosen["validation_ndcg@10"] == pytest.approx(
        max(found.values()), abs=1e-6
    )
    assert found[chosen["ridge"], chosen["weight"]] == max(found.values())
    assert coarse["item_ranks"] == ranks(test, chosen["ridge"], [chosen["weight"]])[0]
    assert coarse["sids"]["mean_length"] == 2 and coarse["item_ranks"] != coarse["popularity_ranks"]

    (file,) = [
        path
        for path in study_modules["training_tables"].write_training_tables(tmp_path)
        if path.endswith("schemes.md")
    ]
    with open(file, encoding="utf-8") as opened:
        text = opened.read()
    assert text.count("\n## ") == 1 and "not replications" in text
    # seven arms and three metrics against the baseline, three arms against that with suffixes, from noise
    assert "21 comparisons" in text and "9 comparisons" in text
    # paired metrics, of one seed
    assert any(f"| atomic ids (as DSI) | 1 | {sign}" in text for sign in "+-")
    assert f"- seed 0: ridge {coarse['dense']['ridge']}, weight " in text
    assert "similarity alone" in text and "| 320 | 320 | 1 | 0.000 |" in text
