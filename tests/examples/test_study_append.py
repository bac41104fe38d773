"""Experiment 8 of the study: products that a model has not seen join its catalog, on a catalogue made up here."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from rqsid import search

NUM_PRODUCTS, SIZE = 320, 6


@pytest.fixture(scope="module")
def catalogue(study_modules, tmp_path_factory):
    """320 products of 5 categories or none, 60 users who buy 3 to 30 of them, and some who buy few."""
    folder, random = tmp_path_factory.mktemp("data") / "made", np.random.default_rng(0)
    folder.mkdir()
    items = {
        str(item): {"title": f"Thing {item}", "categories": f"All,Kind {item % 5}" if item % 9 else ""}
        for item in range(NUM_PRODUCTS)
    }
    bought = {str(user): random.integers(0, NUM_PRODUCTS, random.integers(3, 30)).tolist() for user in range(60)}
    # With 7 and 8 left out, nothing is left to train on of the first, second and third, one purchase of the fourth.
    few = {"one": [7], "two": [7, 8], "three": [7, 1, 2], "four": [7, 6], "five": [7, 1, 8, 6, 1, 7], "six": [1, 7, 6]}
    (folder / "Made.inter.json").write_text(json.dumps(bought | few))
    (folder / "Made.item.json").write_text(json.dumps(items))
    return study_modules["catalogues"].load_catalogue(folder)


@pytest.fixture(scope="module")
def points():
    return np.random.default_rng(0).standard_normal((NUM_PRODUCTS, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def left_out(study_modules):
    drawn = study_modules["append_split"].draw(NUM_PRODUCTS, 0.05, seed=0)
    assert len(set(drawn.tolist())) == 16 and (study_modules["append_split"].draw(320, 0.05, seed=1) != drawn).any()
    return np.union1d(drawn, [7, 8])


def words_of(catalogue):
    """All product ids that training may read."""
    rows = [catalogue.splits[name] for name in ("train", "validation")]
    histories = [product for split in rows for history in split["history"] for product in history]
    return {*catalogue.product_ids, *histories, *(product for split in rows for product in split["product"])}


def test_sequences_without_products(study_modules, catalogue, left_out):
    training, seen = study_modules["training"], study_modules["append_split"].without(catalogue, left_out)
    names = {catalogue.product_ids[row] for row in left_out}
    assert words_of(catalogue) >= names and not words_of(seen) & names
    assert len(seen.product_ids) == len(seen.texts) == len(seen.titles) == len(seen.categories) == 320 - len(left_out)
    kept = np.setdiff1d(np.arange(NUM_PRODUCTS), left_out)
    assert (seen.popularity == catalogue.popularity[kept]).all() and seen.digest != catalogue.digest
    assert seen.splits["test"] is catalogue.splits["test"]

    # by hand: each user's purchases but for the last two, those of products left out taken away, cut at 21
    expected = []
    for sequence in catalogue.sequences:
        bought = [str(row) for row in (sequence[:-2] if len(sequence) > 2 else sequence) if row not in left_out]
        parts = [bought[start : start + 21] for start in range(0, len(bought), 21)]
        expected += parts if len(bought) > 1 else []
    sessions, category = training.sessions(seen), dict(zip(seen.product_ids, seen.categories, strict=True))
    assert [session["products"] for session in sessions] == expected
    assert ["1", "6"] in expected and not names & {product for part in expected for product in part}
    for session in sessions:
        assert session["queries"] == [category[product] for product in session["products"]]
    validation = seen.splits["validation"]
    assert 0 < len(validation) < len(catalogue.splits["validation"])
    # the one purchase before the validation row of "three" is left out
    assert validation["history"][validation["user"].index("three")] == []
    users = {row["user"] for row in seen.splits["train"]}
    assert "five" in users and not users & {"one", "two", "three", "four", "six"}


def test_rows_by_date_without_products(study_modules, catalogue, left_out):
    dated = replace(catalogue, sequences=[], purchases=SimpleNamespace(popularity=catalogue.popularity))
    seen = study_modules["append_split"].without(dated, left_out)
    names = {catalogue.product_ids[row] for row in left_out}
    assert words_of(dated) >= names and not words_of(seen) & names and seen.sequences == []
    assert (seen.popularity == np.delete(catalogue.popularity, left_out)).all()
    for name in ("train", "validation"):
        expected = [
            row | {"history": [product for product in row["history"] if product not in names]}
            for row in catalogue.splits[name].to_list()
            if row["product"] not in names
        ]
        assert seen.splits[name].to_list() == expected
        assert seen.splits[name].features == catalogue.splits[name].features


def test_appended_products_are_found(study_modules, catalogue, points, left_out, tmp_path):
    append, training, cells = (study_modules[name] for name in ("append", "training", "training_cells"))
    seen, kept = study_modules["append_split"].without(catalogue, left_out), np.delete(np.arange(320), left_out)
    popularity = (
        np.arange(len(kept)) % 3
    )  # a third of the products without purchases, so that their SIDs are untrained
    seen = replace(seen, sequences=[], purchases=SimpleNamespace(popularity=popularity))
    codes = study_modules["codes"].make_codes(seen, points[kept], {}, tmp_path, "RQ-KMeans", "relocated", SIZE, 3, 0)
    names = [catalogue.product_ids[row] for row in left_out]
    pruning = {"strategy": "top_k", "layer": 1, "top_k": 3}
    for arm in (cells.UNPRUNED, cells.UNPRUNED | {"pruning": pruning}):
        catalog, quantizer = training.build_catalog(seen, codes, arm, points[kept])
        tokenizer = training.SIDTokenizer.from_base(training.base_tokenizer(seen, 300), catalog, quantizer)
        before = tokenizer.encode_products(seen.product_ids)
        trained = {tuple(sid) for sid, count in zip(before, seen.popularity, strict=True) if count}
        placed, paths = append.append_products(tokenizer, names, points[left_out])
        assert tokenizer.encode_products(seen.product_ids) == before
        assert (catalog.codes[302:] == quantizer.encode(points[left_out])).all() and len(catalog) == 320
        after = [tuple(sid) for sid in tokenizer.encode_products(names)]
        for sid, path in zip(after, paths, strict=True):
            assert path == "f" if sid in trained else path == "pn"[all(sid[:2] != other[:2] for other in trained)]
        assert len(set(paths)) > 1
        taken = sum(sid in {tuple(sid) for sid in before} for sid in after)
        counts = {path: paths.count(path) for path in "fpn"}
        assert placed == {"products": 18, "on_taken_sids": taken, "paths": counts}

        model = training.make_model(cells.QUICK_MODEL, tokenizer, seed=0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        found = search(model, tokenizer, [{"history": [names[0], "5"], "query": "kind 1"}], top_k=320, num_beams=320)
        assert sorted(product["product_id"] for product in found[0]) == sorted(catalogue.product_ids)


def test_text_only_by_hand(study_modules):
    module = study_modules["append_text"]
    points = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.6, 0.8], [0.6, 0.8]])
    row_of = {name: row for row, name in enumerate("abcde")}
    rows = {"product": ["b", "c", "a", "e", "d"], "history": [["c", "a"], ["c", "a"], ["a"], ["c"], []]}
    rows["query"] = ["x", "y", "y", "", "x"]
    # nearest to a: a b d e c, d and e being equal; nearest to c: c d e b a; to nothing all alike
    assert module.nearest_ranks(points, row_of, rows, None, 1, True) == [2, 5, 1, 3, 4]
    assert module.nearest_ranks(points, row_of, rows, None, 1, False) == [1, 0, 0, 2, 4]
    # the mean of a and c lies between b on one side and d, e on the other, in whose order rounding has no say
    categories = np.array(["y", "x", "x", "x", "y"], dtype=object)
    # x of the nearest to a: b d c; y: a e; without a query as above
    assert module.nearest_ranks(points, row_of, rows, categories, 1, True) == [1, 5, 1, 3, 3]
    made = SimpleNamespace(product_ids=list("abcde"), categories=list("yxxxy"), query_source="constructed: so")
    lengths = np.array([[1.0], [2.0], [3.0], [4.0], [5.0]])
    found = module.text_only(made, points * lengths, {name: rows[name][2:3] for name in rows}, rows)
    assert found["history"] == {"ranks": module.nearest_ranks(points, row_of, rows, None, 1, True)} | {
        "latest": 1,
        "ranks_history": True,
    }
    assert found["history and category"]["ranks"] == [1, 5, 1, 3, 3]
    made.query_source = "none"
    assert list(module.text_only(made, points, rows, rows)) == ["history"]


def test_embeddings_that_know_purchases_are_refused(study_modules, catalogue, points, tmp_path):
    with pytest.raises(ValueError, match="'dual tower', trained on purchases"):
        study_modules["append"].append(catalogue, points, {"kind": "dual tower"}, tmp_path)


@pytest.mark.slow
def test_cells_and_tables(study_modules, catalogue, points, tmp_path, monkeypatch):
    append, tables = study_modules["append"], study_modules["append_tables"]
    trainers, fit = [], append.fit_model
    monkeypatch.setattr(
        append, "fit_model", lambda *arguments: trainers.append((arguments, fit(*arguments))) or trainers[-1][1]
    )
    # All 63 test rows and a fifth of the products, so that some rows are of appended products that share their SID.
    monkeypatch.setattr(append, "SHARE", 0.2)
    training = study_modules["training_cells"]
    monkeypatch.setattr(training, "QUICK_TRAINING", training.QUICK_TRAINING | {"test_rows": None})
    described, options = {"kind": "sentence encoder", "of": "nothing"}, {"size": SIZE, "seeds": [0], "quick": True}
    assert tables.write_append_tables(tmp_path) == []
    assert append.append(catalogue, points, described, tmp_path, **options) == 2
    assert append.append(catalogue, points, described, tmp_path, **options) == 0
    (known, trainer), (everything, _) = trainers
    appended = {str(row) for row in study_modules["append_split"].draw(NUM_PRODUCTS, 0.2, seed=0)}
    assert not words_of(known[2]) & appended and everything[2] is catalogue
    catalog = trainer.processing_class.catalog
    rows = {row for products in trainer.train_dataset["product_rows"] for row in products}
    assert not appended & set(catalog.product_ids(sorted(rows))) and len(catalog) == NUM_PRODUCTS

    cells = {
        cell["settings"]["trained_on"]: cell["result"]
        for cell in study_modules["cells"].read_cells(tmp_path, "append")
    }
    without, with_all = cells["seen products"], cells["all products"]
    test = catalogue.splits["test"]
    kinds = [
        "a" if product in appended else "h" if appended & set(history) else "s"
        for product, history in zip(test["product"], test["history"], strict=True)
    ]
    assert without["kinds"] == with_all["kinds"] == "".join(kinds) and set(kinds) == {*"ahs"}
    assert without["users"] == with_all["users"] and without["groups"] == with_all["groups"]
    tokenizer, seen = trainer.processing_class, known[2]
    row_of = {product: row for row, product in enumerate(catalogue.product_ids)}
    theirs = points[[row_of[product] for product in catalog.product_ids(np.arange(NUM_PRODUCTS))]]
    assert (catalog.codes == tokenizer.quantizer.encode(theirs)).all()
    bought = [product for product, count in zip(seen.product_ids, seen.popularity, strict=True) if count]
    trained = {tuple(sid) for sid in tokenizer.encode_products(bought)}
    starts = {sid[:2] for sid in trained}
    expected = [
        "-" if kind != "a" else "f" if tuple(sid) in trained else "p" if tuple(sid[:2]) in starts else "n"
        for sid, kind in zip(tokenizer.encode_products(test["product"][:]), kinds, strict=True)
    ]
    assert without["paths"] == "".join(expected) and len(set(expected)) > 2
    assert sum(without["placed"]["paths"].values()) == without["placed"]["products"] == 64
    for name in ("item_ranks", "sid_ranks", "new_first"):
        assert len(without[name]) == len(test)
    for item, sid, first, kind in zip(
        *(without[name] for name in ("item_ranks", "sid_ranks", "new_first", "kinds")), strict=True
    ):
        # appended products only rise, all others only fall, where they come first inside their SIDs
        assert (item == 0 or 0 < first <= item) if kind == "a" else (first == 0 or 0 < item <= first)
        assert item == 0 or 0 < sid <= item
    assert without["new_first"] != without["item_ranks"]
    # the catalog of the trainer has appended products first by now: searched anew they are where they were reckoned to be
    products, _, labels, _ = append.rank_rows(trainer, test)
    assert append.ranks_of(products, labels) == without["new_first"]

    (path,) = tables.write_append_tables(tmp_path)
    text = open(path, encoding="utf-8").read()
    for word in ("data set:", "task:", "protocol:", "tie order:", "change: 20%", "seeds:", "commit:", "cost:"):
        assert f"- {word}" in text
    for row in ("| appended | trained without |", "| seen | difference |", "| appended - seen | trained with all | |"):
        assert row in text


def test_tables_by_hand(study_modules, monkeypatch):
    tables = study_modules["append_tables"]
    monkeypatch.setattr(tables, "statement", lambda block: ["- statement"])
    monkeypatch.setattr(tables, "cost_table", lambda costs: [f"costs: {', '.join(costs)}"])
    common = {
        "data": {"name": "made", "task": "search, given"},
        "model": {"family": "llama"},
        "codebook_size": 12,
        "layers": 3,
        "training": {},
    }
    common |= {"embeddings": {"kind": "k", "of": "o"}, "arm": {"name": "unpruned"}, "share": 0.05}
    known = {"item_ranks": [0, 12, 1, 0], "sid_ranks": [9, 3, 1, 0], "kinds": "aahs", "users": [0, 1, 2, 3]}
    everything = known | {"item_ranks": [1, 1, 1, 1]}
    known |= {"paths": "fn--", "new_first": [2, 11, 1, 0], "text_only": {"history": {"ranks": [3, 0, 1, 2]}}}
    known["text_only"]["history"] |= {"latest": 5, "ranks_history": False}
    known["placed"] = {"products": 8, "on_taken_sids": 2, "paths": {"f": 1, "p": 3, "n": 4}}
    cells = [
        {"settings": common | {"trained_on": way, "seed": seed}, "seed": seed, "result": result}
        for way, result, seeds in (("seen products", known, (0, 1)), ("all products", everything, (0,)))
        for seed in seeds
    ]
    text = tables.append_tables(cells)
    assert "Seeds: 0." in text and "costs: unpruned, trained without, unpruned, trained with all" in text
    item, sid = text.split("SID-level:")[:2]
    first = {
        tuple(line.split(" | ")[:2]): line.split(" | ")[2:] for line in item.splitlines() if line.startswith("| ")
    }
    assert first["| appended", "trained without"][:4] == ["2", *["0.0000 [0.0000, 0.0000]"] * 3]
    assert first["| appended", "trained without"][4] == "0.5000 [0.0000, 1.0000]"
    assert first["| appended", "difference"][3] == "-1.0000 [-1.0000, -1.0000]"
    assert first["| seen", "trained without"][:2] == ["2", "0.5000 [0.0000, 1.0000]"]
    assert first["| seen, appended in history", "difference"][1] == "+0.0000 [+0.0000, +0.0000]"
    assert first["| appended", "text only: history"][2] == "0.5000 [0.0000, 1.0000]"
    assert first["| appended", "trained without - text only: history"][2] == "-0.5000 [-1.0000, +0.0000]"
    assert "## made, search, llama, K = 12, 3 layers" in text
    assert first["| appended - seen", "difference"][2].startswith("-0.5000 [-1.0000, ")
    # of two appended rows one has its SID at rank 3, one at rank 9, their products beyond rank 10
    nothing, all_of_it = "0.0000 [0.0000, 0.0000]", "1.0000 [1.0000, 1.0000]"
    assert f"| appended | 2 | {nothing} | {nothing} | {nothing} | {all_of_it} | 2 of 2 |" in sid
    assert first["| appended", "trained without, appended first"][2] == "0.5000 [0.0000, 1.0000]"
    assert "| appended, first two tokens known | 0 | none | none | none | none | 0 of 0 |" in sid
    assert "| 0 | 8 | 2 (25.0%) | 1 (12.5%) | 3 (37.5%) | 4 (50.0%) |" in sid
    assert "Chosen for text only: seed 0, history: latest 5, themselves left out." in sid
    other = cells[2] | {"result": everything | {"kinds": "ahhs"}}
    with pytest.raises(ValueError, match="cannot be paired"):
        tables.append_tables([*cells[:2], other])
    assert "No seed has both models so far." in tables.append_tables(cells[1:2])
