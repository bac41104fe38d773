"""The study's smallest cells, end to end, on catalogues made up here."""

import json

import numpy as np
import pandas as pd
import pytest


@pytest.fixture(scope="module")
def catalogues(study_modules):
    return study_modules["catalogues"]


@pytest.fixture(scope="module")
def cells(study_modules):
    return study_modules["cells"]


ITEMS = {
    "0": {
        "title": "Steel  nail",
        "brand": "Acme",
        "categories": "Tools,Nails, Screws & Bolts,Nails",
        "description": "",
    },
    "1": {"title": "Brass screw", "brand": "", "categories": "Tools,Nails, Screws & Bolts", "description": "Long."},
    "2": {"title": "Hammer", "brand": "Acme", "categories": f"Tools,{'a sentence that slipped in ' * 4}"},
    "3": {"title": "Tape", "categories": ""},
}
BOUGHT = {"u": [0, 1, 2, 3, 0], "v": [3, 2], "w": [1, 1, 0]}


def write_sequences(folder, items=ITEMS, bought=BOUGHT):
    folder.mkdir(exist_ok=True)
    (folder / "Made.inter.json").write_text(json.dumps(bought))
    (folder / "Made.item.json").write_text(json.dumps(items))
    return folder


def write_index(folder, num_items, seed=0):
    (folder / "index").mkdir()
    codes = np.random.default_rng(seed).integers(0, 4, (num_items, 3))
    tokens = {
        str(item): [f"<{'abc'[layer]}_{code}>" for layer, code in enumerate(row)] for item, row in enumerate(codes)
    }
    (folder / "index" / "random.index.json").write_text(json.dumps(tokens))
    return codes


def rows(catalogue, split):
    return [tuple(row.values()) for row in catalogue.splits[split]]


def test_sequences(catalogues, tmp_path):
    catalogue = catalogues.load_catalogue(write_sequences(tmp_path / "made"))
    assert (catalogue.name, catalogue.product_ids) == ("made", ["0", "1", "2", "3"])
    assert catalogue.texts[0] == "Steel nail. Acme. Tools,Nails, Screws & Bolts,Nails"
    assert catalogue.texts[1].endswith("Bolts. Long.") and catalogue.texts[3] == "Tape"
    assert catalogue.categories == ["nails", "nails, screws & bolts", "tools", ""]
    assert "constructed" in catalogue.query_source and "constructed" in catalogue.task
    assert rows(catalogue, "test") == [
        ("u", "", ["0", "1", "2", "3"], "nails", "0"),
        ("w", "", ["1", "1"], "nails", "0"),
    ]
    assert rows(catalogue, "validation") == [
        ("u", "", ["0", "1", "2"], "", "3"),
        ("w", "", ["1"], "nails, screws & bolts", "1"),
    ]
    # two purchases are too few to hold one out
    assert rows(catalogue, "train") == [
        ("u", "", ["0"], "nails, screws & bolts", "1"),
        ("u", "", ["0", "1"], "tools", "2"),
        ("v", "", ["3"], "tools", "2"),
    ]
    assert catalogue.popularity.tolist() == [1, 2, 2, 1]  # u: 0 1 2, v: 3 2, w: 1
    plain = catalogue.without_queries()
    assert plain.task == "next item, given the history" and set(plain.splits["test"]["query"]) == {""}
    assert plain.splits["test"]["product"][:] == catalogue.splits["test"]["product"][:]


def test_items_as_lines_and_no_categories(catalogues, tmp_path):
    folder = write_sequences(tmp_path / "made")
    (folder / "Made.item.json").unlink()
    lines = [
        {"id": item, "asin": f"B{item}", "title": "" if item == 3 else "Thing", "key_terms": "term"}
        for item in range(4)
    ]
    (folder / "Made.items.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    catalogue = catalogues.load_catalogue(folder)
    assert catalogue.texts == ["Thing", "Thing", "Thing", "term"] and catalogue.query_source == "none"
    assert catalogue.task == "next item, given the history"


@pytest.mark.parametrize("max_history", [1, 3, 20])
def test_splits_against_loops(catalogues, max_history):
    random = np.random.default_rng(max_history)
    sequences = [random.integers(0, 9, length) for length in (1, 2, 3, 30, 7)]
    ids, users = [f"p{row}" for row in range(9)], list("abcde")
    found = catalogues.leave_one_out(sequences, ids, users, max_history=max_history)
    expected = {"train": [], "validation": [], "test": []}
    for user, sequence in zip(users, sequences, strict=True):
        for at in range(len(sequence)):
            left = len(sequence) - 1 - at
            split = {0: "test", 1: "validation"}.get(left, "train") if len(sequence) > 2 else "train"
            history = [ids[row] for row in sequence[:at][-max_history:]]
            if at > 0:
                expected[split].append((user, "", history, "", ids[sequence[at]]))
    assert {name: [tuple(row.values()) for row in split] for name, split in found.items()} == expected


PURCHASES = pd.DataFrame(
    {
        "user": ["07", "07", "x", "07", "07"],
        "product": ["b", "00", "b", "c", "b"],
        "time": ["2024-01-02", "2024-01-01", "2024-01-01", "2024-01-02", "2024-03-01"],
        "age": ["35", "35", "", "36", "36"],
        "plan": ["None", "", "gold", "", ""],
    }
)
PRODUCTS = pd.DataFrame(
    {"id": ["00", "b", "c"], "title": ["Nail", "Bolt", "Saw"], "category": ["A > Nails", "A > Bolts", "A"]}
)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables(catalogues, tmp_path, kind):
    purchases = PURCHASES
    if kind == "parquet":
        purchases = PURCHASES.assign(time=pd.to_datetime(PURCHASES["time"]), age=PURCHASES["age"].replace("", None))
    for name, frame in (("purchases", purchases), ("products", PRODUCTS)):
        path = tmp_path / f"{name}.{kind}"
        frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    catalogue = catalogues.load_catalogue(tmp_path)
    # 07 bought 00, then b and c on one day in the order of the file, then b
    assert rows(catalogue, "test") == [("07", "age 36", ["00", "b", "c"], "bolts", "b")]
    assert rows(catalogue, "validation") == [("07", "age 36", ["00", "b"], "a", "c")]
    assert rows(catalogue, "train") == [("07", "age 35, plan None", ["00"], "bolts", "b")]
    assert f"order of purchases.{kind}" in catalogue.tie_order
    # a query of one's own takes the place of the constructed one
    with_query = purchases.assign(query=["q0", "q1", "q2", "q3", "q4"])
    with_query.to_csv(tmp_path / "purchases.csv", index=False)
    (tmp_path / "purchases.parquet").unlink(missing_ok=True)
    catalogue = catalogues.load_catalogue(tmp_path)
    assert catalogue.splits["test"]["query"][:] == ["q4"] and catalogue.query_source.startswith("column query")


def test_completejourney_is_read_as_by_the_quick_start(catalogues, purchases_module, make_frames, monkeypatch):
    made = purchases_module.build_purchases(**make_frames())
    monkeypatch.setattr(purchases_module, "load_purchases", lambda **options: made)
    catalogue = catalogues.load_catalogue("completejourney")
    assert catalogue.product_ids == made.products["product_id"][:]
    assert catalogue.popularity.tolist() == made.popularity.tolist()
    assert set(catalogue.splits["test"].column_names) == {"user", "profile", "history", "query", "product"}
    assert (
        "by time" in catalogue.protocol and "constructed" in catalogue.query_source and "simulated" in catalogue.name
    )


BROKEN = {
    "nothing": (lambda folder: None, "holds neither"),
    "unknown item": (lambda folder: write_sequences(folder, bought={"u": [0, 9]}), "user 'u' has the item 9"),
    "no purchases": (lambda folder: write_sequences(folder, bought={"u": []}), "has no items"),
    "no text": (lambda folder: write_sequences(folder, {"0": {"title": " "}}, {"u": [0]}), "has no text"),
    "truncated": (
        lambda folder: write_sequences(folder).joinpath("Made.inter.json").write_text('{"u": [0'),
        "not valid JSON",
    ),
    "no items file": (lambda folder: write_sequences(folder).joinpath("Made.item.json").unlink(), "needs one"),
    "list": (
        lambda folder: write_sequences(folder).joinpath("Made.inter.json").write_text("[]"),
        "must hold an object",
    ),
    "no products": (lambda folder: PURCHASES.to_csv(folder / "purchases.csv"), "needs one of products"),
    "column": (lambda folder: write_tables_of(folder, PURCHASES.drop(columns="time")), "lacks the columns .'time'."),
    "unknown product": (lambda folder: write_tables_of(folder, PURCHASES.replace("c", "d")), "lacks, such as 'd'"),
    "product twice": (lambda folder: write_tables_of(folder, PURCHASES, PRODUCTS.replace("c", "b")), "'b' twice"),
    "time": (lambda folder: write_tables_of(folder, PURCHASES.replace("2024-03-01", "March")), "row 4 .* 'March'"),
}


def write_tables_of(folder, purchases, products=PRODUCTS):
    purchases.to_csv(folder / "purchases.csv", index=False)
    products.to_csv(folder / "products.csv", index=False)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_data_is_refused(catalogues, tmp_path, name):
    make, message = BROKEN[name]
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        catalogues.load_catalogue(tmp_path)


def test_cells_are_computed_once(cells, tmp_path, capsys):
    computed = []

    def compute(settings, checkpoint_dir):
        checkpoint_dir.mkdir(parents=True)
        computed.append(settings["seed"])
        if settings["seed"] == 2 and computed.count(2) == 1:
            raise KeyboardInterrupt
        return {"value": settings["seed"] ** 2}

    wanted = [{"size": 4, "seed": seed} for seed in range(4)]
    with pytest.raises(KeyboardInterrupt):
        cells.run_cells(tmp_path, "squares", wanted, compute)
    # what was saved of the interrupted cell is still there, for it to go on from
    (checkpoint,) = (tmp_path / "checkpoints" / "squares").iterdir()
    checkpoint.rmdir()
    # a process killed while it wrote a line
    path = tmp_path / "squares.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert [line["seed"] for line in cells.read_cells(tmp_path, "squares")] == [0]
    assert cells.run_cells(tmp_path, "squares", wanted, compute) == 3
    assert computed == [0, 1, 2, 1, 2, 3]
    assert cells.run_cells(tmp_path, "squares", wanted, compute) == 0 and computed[6:] == []
    # another experiment takes over what it shares
    more = [*wanted[:2], {"seed": 99}]
    assert cells.run_cells(tmp_path, "more", more, compute, reuse=("squares", "none")) == 1
    assert (
        cells.read_cells(tmp_path, "more")[0]["experiment"] == "more" and len(cells.read_cells(tmp_path, "more")) == 3
    )
    lines = cells.read_cells(tmp_path, "squares")
    assert [line["result"]["value"] for line in lines] == [0, 1, 4, 9] and len(path.read_bytes().splitlines()) == 4
    assert {"hash", "settings", "commit", "versions", "cpu_seconds"} <= lines[0].keys()
    assert list((tmp_path / "checkpoints" / "squares").iterdir()) == []
    # the order in which settings are written does not matter, their values do
    assert (
        cells.cell_hash({"a": 1, "b": [2]})
        == cells.cell_hash({"b": [2], "a": 1})
        != cells.cell_hash({"a": 1, "b": [3]})
    )


def test_cells_refuse_what_would_mix_results(cells, tmp_path):
    wanted = [{"seed": 0}, {"seed": 1}]
    with pytest.raises(ValueError, match="same settings"):
        cells.run_cells(tmp_path, "twice", [{"seed": 0}, {"seed": 0}], lambda *_: {})

    def compute(settings, checkpoint_dir):
        with pytest.raises(ValueError, match="Another process"):
            cells.run_cells(tmp_path, "locked", wanted, compute)
        return {}

    cells.run_cells(tmp_path, "locked", wanted, compute)
    path = tmp_path / "locked.jsonl"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 5', 1))
    with pytest.raises(ValueError, match="line 1, is damaged"):
        cells.read_cells(tmp_path, "locked")
    with pytest.raises(ValueError, match="not JSON compliant"):
        cells.run_cells(tmp_path, "nan", wanted, lambda *_: {"value": float("nan")})
    assert cells.read_cells(tmp_path, "nan") == []


def test_null_against_definitions(study_modules):
    balance = study_modules["balance"]
    counts = np.random.default_rng(0).multinomial(50, np.full(8, 1 / 8), balance.NULL_SAMPLES)
    ginis = [np.abs(row[:, None] - row[None, :]).sum() / (2 * 8 * 50) for row in counts]
    null = balance.multinomial_null(50, 8)
    assert null["gini"] == pytest.approx([np.mean(ginis), *np.quantile(ginis, (0.01, 0.99))])
    assert null["std"][0] == pytest.approx(np.mean([row.std() for row in counts]))
    entropies = [-sum(p * np.log2(p) for p in row / 50 if p) / 3 for row in counts]
    assert null["normalized_entropy"][0] == pytest.approx(np.mean(entropies))
    drawn = np.random.default_rng(1).integers(0, 64, (3000, 50))
    assert balance.expected_paths(50, 64.0) == pytest.approx(np.mean([len(set(row)) for row in drawn]), rel=0.01)
    assert balance.expected_paths(50, 256.0**8) == pytest.approx(50)


def test_what_is_measured(study_modules):
    codes = np.array([[0, 0, 0], [1, 0, 1], [2, 1, 0], [2, 1, 0], [3, 1, 1], [0, 1, 1]])
    popularity = np.array([9, 1, 1, 1, 1, 1])
    result = json.loads(json.dumps(study_modules["balance"].measure(codes, [4, 2, 2], popularity)))
    assert result["counts"] == [[2, 1, 2, 1], [2, 4], [3, 3]] and result["collision_rate"] == pytest.approx(1 / 6)
    assert result["by_purchases"]["layers"][1]["gini"] == pytest.approx((10 - 4) / (2 * 14))
    drawable = study_modules["balance"].as_diagnosis(result)
    assert drawable.layers[0].name == "a (0)" and [band.shape for band in drawable.null_bands] == [
        (2, 4),
        (2, 2),
        (2, 2),
    ]


def test_laws_and_residuals(study_modules):
    causes = study_modules["causes"]
    for law, draw in causes.LAWS.items():
        points = draw(np.random.default_rng(0), 200, 6, 8)
        assert points.shape == (200, 6) and np.isfinite(points).all(), law
        assert (points == draw(np.random.default_rng(0), 200, 6, 8)).all() and points.std() > 0, law
    alike = causes.norm_statistics(np.tile([[3.0, 4.0]], (20, 1)))
    assert alike == pytest.approx({"mean": 5, "median": 5, "q99": 5, "spread": 0, "energy_of_top": 0.1})
    one = causes.norm_statistics(np.array([[1.0]] * 9 + [[3.0]]))
    assert one["energy_of_top"] == pytest.approx(9 / 18) and one["mean"] == pytest.approx(1.2)


def test_explained_by_hand(study_modules):
    """2 laws x 2 initialisations x 2 seeds; layer 0 follows the law, layer 1 the initialisation, layer 2 both together."""

    def cell(law, init, seed):
        ginis = [law, init, law ^ init]
        result = {"layers": [{"gini": float(gini)} for gini in ginis], "hourglass_score": law + seed}
        return {"settings": {"law": f"law {law}", "init": f"init {init}", "seed": seed}, "result": result}

    made = [cell(law, init, seed) for law in (0, 1) for init in (0, 1) for seed in (0, 1)]
    shares = study_modules["causes"].explained(made)
    zero = dict.fromkeys(("data", "initialisation", "both", "seed"), 0.0)
    assert shares["Gini of layer 0"] == zero | {"data": 1.0}
    assert shares["Gini of layer 1"] == zero | {"initialisation": 1.0}
    assert shares["Gini of layer 2"] == zero | {"both": 1.0}
    assert shares["hourglass score"] == zero | {"data": 0.5, "seed": 0.5}
    assert study_modules["causes"].explained(made[:-1]) is None


def test_tower_wants_rows_and_encoder_a_name(study_modules, catalogues, tmp_path):
    catalogue = catalogues.load_catalogue(write_sequences(tmp_path / "made"))
    embed = study_modules["item_embeddings"].embed
    for kind, message in (
        ("dual tower", "do not fill a batch"),
        ("sentence encoder", "--encoder"),
        ("LDA", "unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            embed(catalogue, kind, tmp_path)


@pytest.mark.slow
def test_end_to_end(study_modules, tmp_path, monkeypatch):
    """Experiments of quantizers by the command line, killed and continued; tables of the same cells are the same bytes."""
    monkeypatch.setattr(study_modules["study"], "TRAINING", {})  # those have tests of their own
    study, causes = study_modules["study"], study_modules["causes"]
    items = {str(item): {"title": f"Secret thing {item}"} for item in range(320)}
    bought = {str(user): np.random.default_rng(user).integers(0, 320, 6).tolist() for user in range(80)}
    folder = write_sequences(tmp_path / "made", items, bought)
    codes = write_index(folder, 320)
    points = np.random.default_rng(0).standard_normal((320, 6)).astype(np.float32)
    monkeypatch.setattr(study_modules["item_embeddings"], "_encode", lambda *_: points)
    laws = ["uniform cube", "K tight clusters, a fifth with shared offsets"]
    monkeypatch.setattr(causes, "LAWS", {law: causes.LAWS[law] for law in laws})
    few = {"laws": laws, "inits": ["random, no relocation", "relocated"], "num_items": 500}
    whole = causes.causes
    monkeypatch.setattr(causes, "causes", lambda out, **options: whole(out, **options | few))

    out = tmp_path / "out"
    arguments = ["all", "--quick", "--data", str(folder), "--encoder", "encoders/tiny", "--out", str(out)]
    study.main([*arguments, "--embeddings", "sentence encoder"])
    first = {path.name: path.read_bytes() for path in sorted((out / "tables").iterdir())}
    texts = {name: content.decode() for name, content in first.items() if name.endswith(".md")}
    assert sorted(texts) == ["causes.md", "picture.md", "published.md"]
    for name, text in texts.items():
        for word in ("data set:", "task:", "protocol:", "tie order:", "seeds:", "commit:", "cost:"):
            assert f"- {word}" in text, name
        assert "Secret" not in text
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in rows if "H / Gini" in line or "null" in line}) == 1
    assert "| 16 | 3 | RQ-VAE | relocated | " in texts["picture.md"] and "encoders/tiny" in texts["picture.md"]
    assert "| initialisations | | data | initialisation | both | seed |" in texts["causes.md"]
    (published,) = study_modules["cells"].read_cells(out, "published")
    assert published["result"]["counts"] == [np.bincount(column, minlength=4).tolist() for column in codes.T]

    before = (out / "causes.jsonl").read_bytes()
    (out / "causes.jsonl").write_bytes(before[:-9])
    study.run_causes(study.make_parser().parse_args(arguments))
    lines = [json.loads(line) for line in (out / "causes.jsonl").read_text().splitlines()]
    same = [json.loads(line) for line in before.decode().splitlines()]
    assert [line["result"] for line in lines] == [line["result"] for line in same]
    assert lines[:-1] == same[:-1]
    (out / "causes.jsonl").write_bytes(before)
    study.main(["tables", "--out", str(out)])
    again = {path.name: path.read_bytes() for path in sorted((out / "tables").iterdir())}
    assert again == first
