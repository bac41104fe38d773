"""The command `rqsid diagnose`: what the report says, in which form files may come, and what is refused with which words."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import csv, parquet
from safetensors.numpy import save_file

from rqsid import TokenPruning, catalogue_files, catalogue_report, diagnose
from rqsid.cli import main
from rqsid.sid_tokenizer import figures
from rqsid.sid_tokenizer.pruning_sweep import sweep

NUM_ITEMS, SIZES = 1500, [16, 16, 16]
IDS = [f"{row:05d}" for row in range(NUM_ITEMS)]
FIGURES = {"layers.png", "layers.svg", "flow.png", "flow.svg", "sweep.png", "sweep.svg"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A catalog with neither waist nor end, codes of it with a waist, and purchases, in all forms that are read."""
    folder, random = tmp_path_factory.mktemp("catalog"), np.random.default_rng(0)
    points = random.standard_normal((NUM_ITEMS, 6)).astype(np.float32)
    codes = random.integers(0, 16, (NUM_ITEMS, 3)).astype(np.uint8)
    codes[:, 1] = np.where(random.random(NUM_ITEMS) < 0.7, codes[:, 1] % 2, codes[:, 1])
    np.save(folder / "points.npy", points)
    (folder / "shards").mkdir()
    for shard, rows in enumerate((slice(0, 700), slice(700, None))):
        save_file({"embeddings": points[rows]}, folder / "shards" / f"embeddings-{shard:05d}.safetensors")
        table = pyarrow.table({"product_id": IDS[rows]})
        parquet.write_table(table, folder / "shards" / f"product_ids-{shard:05d}.parquet")
    np.save(folder / "codes.npy", codes)
    shuffled = random.permutation(NUM_ITEMS)
    lists = pyarrow.array(codes[shuffled].tolist())
    table = pyarrow.table({"product_id": [IDS[row] for row in shuffled], "codes": lists})
    parquet.write_table(table, folder / "shuffled.parquet")
    parquet.write_table(
        pyarrow.table({"a": codes[:, 0], "product_id": IDS, "b": codes[:, 1], "c": codes[:, 2]}),
        folder / "columns.parquet",
    )
    (folder / "ids.txt").write_text("\n".join(IDS) + "\n")
    counts = random.integers(0, 5, NUM_ITEMS)
    purchases = pyarrow.table({"product_id": [*IDS, "gone"], "count": [*counts.tolist(), int(counts.sum()) // 3]})
    parquet.write_table(purchases, folder / "purchases.parquet")
    csv.write_csv(purchases, folder / "purchases.csv")
    singles = pyarrow.table({"product_id": np.repeat([*IDS, "gone"], [*counts, counts.sum() // 3])})
    parquet.write_table(singles, folder / "singles.parquet")
    np.save(folder / "counts.npy", counts)
    return folder


@pytest.fixture
def no_figures(monkeypatch):
    """They take longest, and have tests of their own."""
    monkeypatch.setattr(catalogue_report, "plot_layers", lambda diagnoses, path: None)
    monkeypatch.setattr(catalogue_report, "plot_flow", lambda diagnoses, path: None)
    monkeypatch.setattr(catalogue_report, "plot_sweep", lambda curve, path: None)


def run(output, **options):
    """Runs the command; returns its exit status and the report, as JSON and as text."""
    arguments = ["diagnose", "--output_dir", str(output)]
    for name, value in options.items():
        arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    status = main(arguments)
    if status:
        return status, None, None
    return status, json.loads((output / "report.json").read_text()), (output / "report.md").read_text()


def test_embeddings_alone(folder, tmp_path, capsys):
    output, options = tmp_path / "new" / "folder", {"embeddings": folder / "points.npy", "codebook_sizes": SIZES}
    _, found, text = run(output, **options)
    files = {path.name: path.read_bytes() for path in output.iterdir()}
    assert files.keys() == FIGURES | {"report.md", "report.json"}
    assert found["label"] == "plain" and found["remedies_of"] == "better training"
    printed = capsys.readouterr()
    assert (
        found["verdict"] in printed.out and found["recommendation"] in printed.out and "Traceback" not in printed.err
    )
    assert text.splitlines()[2] == found["verdict"] and text.rstrip().endswith(found["recommendation"])
    # the order of what is said
    parts = [
        "| layer | entropy",
        "| | plain | better training |",
        "```python",
        "| remedy |",
        "pruned = ",
        "![Cost of pruning](sweep.png)",
        "| items that lose one |",
        "Pruning exactly one token loses nothing, because its absence names it",
        "## Recommendation",
    ]
    assert [text.index(part) for part in parts] == sorted(text.index(part) for part in parts)
    assert found["by_items"]["verdict"] == "none" and "no remedy needed" in found["recommendation"]
    # the same again, to the byte
    assert run(output, **options)[1] == found
    assert files == {path.name: path.read_bytes() for path in output.iterdir()}


def test_codes_of_ones_own_against_better_training(folder, tmp_path):
    _, found, text = run(tmp_path, embeddings=folder / "points.npy", codes=folder / "codes.npy", codebook_sizes=SIZES)
    assert found["verdict"].startswith("There is an hourglass in your codes: layer b (1) is the waist")
    assert "better training removes it" in found["verdict"] and "no remedy needed" in found["recommendation"]
    codes = np.load(folder / "codes.npy").astype(int)
    assert found["layer_to_treat"] == 1 and len(found["remedies"]) == 6
    for row in found["remedies"][1:]:
        # the line that the report gives does what the table says
        assert row["call"] in text
        pruned = eval(row["call"], {"TokenPruning": TokenPruning, "codes": codes})
        expected = diagnose(pruned, SIZES)
        assert (row["unique_sids"], row["largest_group"]) == (expected.unique_sids, expected.largest_group)
        assert row["tokens_pruned"] == len(set(codes[pruned[:, 1] < 0, 1]))
        assert row["recall_ceiling"] == {str(k): value for k, value in expected.recall_ceiling.items()}
        assert row["mean_length"] == pytest.approx((pruned >= 0).sum() / NUM_ITEMS)
    nothing, one, *_, dropped = found["remedies"]
    assert one["unique_sids"] == nothing["unique_sids"] == len(np.unique(codes, axis=0)) > dropped["unique_sids"]


@pytest.mark.parametrize("bought", [False, True])
def test_the_curve_is_that_of_the_layer_that_is_examined(folder, tmp_path, monkeypatch, no_figures, bought):
    drawn = []
    monkeypatch.setattr(catalogue_report, "plot_sweep", lambda curve, path: drawn.append((curve.to_dict(), path)))
    options = {"codes": folder / "columns.parquet", "codebook_sizes": SIZES}
    options |= {"purchases": folder / "purchases.csv"} if bought else {}
    _, found, text = run(tmp_path, **options)
    codes = np.load(folder / "codes.npy")
    expected = sweep(codes, SIZES, found["layer_to_treat"])
    assert found["sweep"] == expected.to_dict() and str(expected) in text and found["sweep"]["layer"] == 1
    assert len(found["sweep"]["unique_sids"]) == len(found["sweep"]["recall_ceiling"]["50"]) == 17
    assert [path[-9:] for _, path in drawn] == ["sweep.png", "sweep.svg"]
    assert all(curve == found["sweep"] for curve, _ in drawn)
    for row in found["remedies"]:  # the table of remedies lies on the curve
        assert found["sweep"]["unique_sids"][row["tokens_pruned"]] == row["unique_sids"]
        assert found["sweep"]["largest_group"][row["tokens_pruned"]] == row["largest_group"]
        for k, ceiling in row["recall_ceiling"].items():
            assert found["sweep"]["recall_ceiling"][k][row["tokens_pruned"]] == pytest.approx(ceiling, abs=1e-12)
    weights = np.load(folder / "counts.npy")
    weighted = sweep(codes, SIZES, 1, weights)
    assert (
        found["sweep_by_purchases"] == (weighted.to_dict() if bought else None)
        and weighted.to_dict() != expected.to_dict()
    )
    assert (str(weighted) in text) == bought and text.count("Pruning exactly one token loses nothing") == 1 + bought


def test_an_hourglass_that_survives(tmp_path, no_figures):
    """Tight clusters, of whose items a minority carries one of a few shared offsets."""
    random = np.random.default_rng(0)
    centres, offsets = (random.standard_normal((64, 32)) for _ in range(2))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    offsets *= 0.5 / np.linalg.norm(offsets, axis=1, keepdims=True)
    points = centres[random.integers(0, 64, 12_000)]
    chosen = random.random(12_000) < 0.2
    points[chosen] += offsets[random.integers(0, 63, chosen.sum())]
    points += 0.05 / np.sqrt(32) * random.standard_normal((12_000, 32))
    points[:3] = points[3]
    np.save(tmp_path / "points.npy", points.astype(np.float32))
    _, found, _ = run(tmp_path / "out", embeddings=tmp_path / "points.npy", codebook_sizes=[64, 64, 64])
    better = found["by_items"]["better_optimum"]
    assert (better["verdict"], better["verdict_layer"], found["layer_to_treat"]) == ("hourglass", 1, 1)
    assert "in the embeddings, not in the training" in found["recommendation"]
    assert "exactly one token is lossless" in found["recommendation"]
    assert "4 of the 12000 products have the very embedding of another" in found["recommendation"]


@pytest.mark.parametrize("ids", ["shards", "codes", "text"])
@pytest.mark.parametrize("log", ["purchases.parquet", "purchases.csv", "singles.parquet"])
def test_purchases_weigh_by_interactions(folder, tmp_path, no_figures, ids, log):
    options = {"purchases": folder / log, "codebook_sizes": SIZES, "codes": folder / "columns.parquet"}
    options |= {"embeddings": folder / "shards"} if ids == "shards" else {}
    options |= {"product_ids": folder / "ids.txt", "codes": folder / "codes.npy"} if ids == "text" else {}
    _, found, text = run(tmp_path, **options)
    weights = np.load(folder / "counts.npy")
    expected = diagnose(np.load(folder / "codes.npy"), SIZES, weights)
    assert found["by_purchases"]["counts"] == [counts.tolist() for counts in expected.counts]
    assert found["by_items"]["counts"] != found["by_purchases"]["counts"]
    ceiling = found["remedies"][0]["recall_ceiling_by_purchases"]
    assert ceiling == {str(k): value for k, value in expected.recall_ceiling.items()}
    extra = weights.sum() // 3
    assert found["unknown_purchases"] == pytest.approx(extra / (extra + weights.sum()))
    assert "25.0% of the purchases name products that are not in the catalog" in text
    assert "Weighted by purchases: hourglass in layer b (1)" in found["verdict"]
    assert ("--embeddings" in found["verdict"]) == (ids != "shards")  # nothing can be said about better training


def test_codes_are_put_into_the_order_of_the_embeddings(folder, tmp_path, no_figures):
    options = {"embeddings": folder / "shards", "codebook_sizes": SIZES, "purchases": folder / "purchases.csv"}
    _, found, _ = run(tmp_path, codes=folder / "shuffled.parquet", **options)
    _, same, _ = run(tmp_path, codes=folder / "columns.parquet", **options)
    assert found.pop("calls") != same.pop("calls")  # they name the files
    assert found == same


@pytest.mark.parametrize("sizes", [[16], [16, 16], [16, 1, 16], [4, 4, 4, 4]])
def test_other_numbers_of_layers(folder, tmp_path, sizes):
    _, found, text = run(tmp_path, embeddings=folder / "points.npy", codebook_sizes=sizes)
    assert len(found["by_items"]["layers"]) == len(sizes)
    assert ("remedy" in text) == (len(sizes) > 2) or "No verdict" in found["verdict"]
    assert (tmp_path / "flow.png").exists() == (len(sizes) > 1)
    assert (tmp_path / "sweep.png").exists() == ("loses nothing" in text) == (len(sizes) > 2)
    assert (found["sweep"] is not None) == (len(sizes) > 2) and found["sweep_by_purchases"] is None


def test_without_matplotlib_the_report_says_so(folder, tmp_path, monkeypatch, capsys):
    class Importer:
        def import_module(name):
            raise ImportError("No module named 'matplotlib'")

    monkeypatch.setattr(figures, "importlib", Importer)
    _, _, text = run(tmp_path, codes=folder / "codes.npy", codebook_sizes=SIZES)
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.json"}
    assert "sweep.png" not in text and "loses nothing" in text
    assert "pip install 'rqsid[plots]'" in text and "pip install 'rqsid[plots]'" in capsys.readouterr().out


def test_the_seed_counts(folder, tmp_path, no_figures):
    options = {"embeddings": folder / "points.npy", "codebook_sizes": SIZES}
    _, first, _ = run(tmp_path, **options)
    _, other, _ = run(tmp_path, seed=1, **options)
    assert other["by_items"]["counts"] != first["by_items"]["counts"]


def test_nothing_of_an_earlier_report_is_left(folder, tmp_path, monkeypatch):
    for name in ("plot_layers", "plot_flow", "plot_sweep"):
        monkeypatch.setattr(catalogue_report, name, lambda diagnoses, path: Path(path).write_text("drawn"))
    run(tmp_path, codes=folder / "codes.npy", codebook_sizes=SIZES)
    assert {path.name for path in tmp_path.iterdir()} == FIGURES | {"report.md", "report.json"}
    (tmp_path / "notes.txt").write_text("mine")
    np.save(tmp_path / "single.npy", np.load(folder / "codes.npy")[:, :1])
    run(tmp_path, codes=tmp_path / "single.npy", codebook_sizes=[16])
    report = {"report.md", "report.json", "layers.png", "layers.svg"}
    assert {path.name for path in tmp_path.iterdir()} == report | {"notes.txt", "single.npy"}

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(catalogue_report, "plot_layers", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, codes=folder / "codes.npy", codebook_sizes=SIZES)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "single.npy"}


@pytest.mark.parametrize("own", [False, True])
def test_python_of_the_report_runs_as_it_stands(folder, tmp_path, no_figures, own):
    options = {"embeddings": folder / "points.npy", "codebook_sizes": SIZES}
    options |= {"codes": folder / "columns.parquet"} if own else {}
    _, found, text = run(tmp_path, **options)
    training, remedies = re.findall("```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(training, names)
    better = diagnose(names["codes"], SIZES)
    assert [counts.tolist() for counts in better.counts] == found["by_items"]["better_optimum"]["counts"]
    names = {}
    exec(remedies, names)
    assert diagnose(names["pruned"], SIZES).unique_sids == found["remedies"][-1]["unique_sids"]
    assert "Both fits saw all products" in text or "The better training saw all products" in text


def test_a_fit_on_a_sample_is_said_to_be_one(folder, tmp_path, no_figures):
    _, found, text = run(tmp_path, embeddings=folder / "points.npy", codebook_sizes=[4, 4, 4])
    assert found["rows_fitted"] == 400 and "a random sample of 400 of the 1500 products" in text


def test_an_hourglass_that_training_turns_into_a_funnel_is_not_said_to_be_in_the_embeddings(
    folder, tmp_path, monkeypatch, no_figures
):
    codes = np.random.default_rng(0).integers(0, 16, (NUM_ITEMS, 3))
    codes[:1000, 2] = 0
    monkeypatch.setattr(catalogue_report, "refit", lambda reader, config, seed: (None, codes))
    _, found, _ = run(tmp_path, embeddings=folder / "points.npy", codes=folder / "codes.npy", codebook_sizes=SIZES)
    assert "better training removes it and leaves a funnel in layer c (2)" in found["verdict"]
    assert "removes the hourglass and leaves a funnel in layer c (2)" in found["recommendation"]
    assert "in the embeddings" not in found["recommendation"]


def test_a_verdict_by_purchases_alone_is_not_passed_over(tmp_path, no_figures):
    codes = np.random.default_rng(0).integers(0, 16, (NUM_ITEMS, 3))
    np.save(tmp_path / "codes.npy", codes)
    (tmp_path / "ids.txt").write_text("\n".join(IDS))
    write(tmp_path, "bought.parquet", product_id=IDS, count=np.where(codes[:, 1] == 3, 50, 1))
    options = {"codes": tmp_path / "codes.npy", "product_ids": tmp_path / "ids.txt", "codebook_sizes": SIZES}
    _, found, _ = run(tmp_path, purchases=tmp_path / "bought.parquet", **options)
    assert found["by_items"]["verdict"] == "none" and found["by_purchases"]["verdict"] == "hourglass"
    assert "By purchases there is a verdict of its own, hourglass in layer b (1)" in found["recommendation"]


def test_ids_beside_shards_have_one_name_whatever_the_catalog_calls_them(folder, tmp_path, no_figures):
    write(tmp_path, "bought.parquet", asin=pyarrow.array(IDS[:9]).dictionary_encode())
    options = {"embeddings": folder / "shards", "codebook_sizes": SIZES, "id_column": "asin"}
    _, found, _ = run(tmp_path, purchases=tmp_path / "bought.parquet", **options)
    assert found["unknown_purchases"] == 0 and sum(found["by_purchases"]["counts"][0]) == 9


@pytest.mark.parametrize("text", ["a\nb c\n", "a\r\nb c\r\n", "\ufeffa\nb c"])
def test_lines_of_ids(tmp_path, text):
    (tmp_path / "ids.txt").write_bytes(text.encode())
    assert catalogue_files.read_product_ids(tmp_path / "ids.txt").to_pylist() == ["a", "b c"]
    (tmp_path / "ids.txt").write_bytes(text.replace(" ", "\u2028").encode())
    assert catalogue_files.read_product_ids(tmp_path / "ids.txt").to_pylist() == ["a", "b\u2028c"]


def write(folder, name, **columns):
    parquet.write_table(pyarrow.table(columns), folder / name)


@pytest.fixture(scope="module")
def wrong(folder, tmp_path_factory):
    """Files that must be refused, beside the right ones."""
    wrong = tmp_path_factory.mktemp("wrong")
    shutil.copytree(folder, wrong, dirs_exist_ok=True)
    codes = np.load(folder / "codes.npy").astype(int)
    np.save(wrong / "short.npy", codes[1:])
    np.save(wrong / "floats.npy", codes / 1)
    np.save(wrong / "pruned.npy", np.where(codes == codes[7, 1], -1, codes))
    write(wrong, "ragged.parquet", codes=pyarrow.array([[1, 2], [3]] * (NUM_ITEMS // 2)))
    write(wrong, "named.parquet", product_id=IDS, a=codes[:, 0], title=IDS)
    write(wrong, "others.parquet", product_id=["x" + i for i in IDS], codes=pyarrow.array(codes.tolist()))
    write(wrong, "twice.parquet", product_id=[*IDS[:-1], IDS[0]])
    write(wrong, "holes.parquet", product_id=[*IDS[:-1], None])
    write(wrong, "unknown.parquet", product_id=["x", "y"])
    write(wrong, "negative.parquet", product_id=IDS[:2], count=[1, -2])
    write(wrong, "words.parquet", product_id=IDS[:2], count=["one", "two"])
    write(wrong, "renamed.parquet", item=IDS[:2])
    write(wrong, "zero.parquet", product_id=IDS[:2], count=[0, 0])
    write(wrong, "empty.parquet", product_id=pyarrow.array([], pyarrow.string()))
    (wrong / "hole.txt").write_text("\n".join([*IDS[:3], "", *IDS[4:]]))
    (wrong / "latin.txt").write_bytes("\n".join([*IDS[1:], "é"]).encode("latin-1"))
    (wrong / "broken.parquet").write_text("hello")
    (wrong / "broken.npy").write_text("hello")
    (wrong / "a_file").write_text("")
    return wrong


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "pass --embeddings, --codes or both"),
        ({"embeddings": "none.npy"}, "There is no file or folder"),
        ({"embeddings": "points.npy", "codes": "none.npy"}, "There is no file .*none.npy"),
        ({"codes": "codes.npy", "codebook_sizes": None}, "Perhaps: --codebook_sizes 16 16 16"),
        ({"codes": "codes.npy", "codebook_sizes": [16, 16]}, "one column per layer"),
        ({"codes": "codes.npy", "codebook_sizes": [8, 16, 16]}, "Layer 0 holds the code 15"),
        ({"embeddings": "points.npy", "codes": "short.npy"}, "1499 codes for 1500 products"),
        ({"codes": "floats.npy"}, "float64 of shape"),
        ({"codes": "pruned.npy"}, "holds the code -1 in row .*unpruned"),
        ({"codes": "ragged.parquet"}, r"lengths \[2, 1\]"),
        ({"codes": "named.parquet"}, "Column 'title' of .* holds string"),
        ({"codes": "broken.parquet"}, "not a readable .parquet"),
        ({"codes": "broken.npy"}, "not a readable .npy"),
        ({"codes": "purchases.csv"}, "must end in .parquet or .npy"),
        ({"embeddings": "shards", "codes": "others.parquet"}, "1500 have no codes"),
        ({"embeddings": "points.npy", "product_ids": "twice.parquet"}, "more than once, for instance '00000'"),
        ({"embeddings": "points.npy", "product_ids": "holes.parquet"}, "empty in 1 rows"),
        ({"embeddings": "points.npy", "product_ids": "unknown.parquet"}, "2 product ids for 1500 products"),
        ({"embeddings": "points.npy", "product_ids": "points.npy"}, "must end in .parquet or .csv or .txt"),
        ({"embeddings": "points.npy", "purchases": "purchases.csv"}, "needs the ids of the products"),
        ({"embeddings": "shards", "purchases": "unknown.parquet"}, "None of the 2 rows .*'x'.*'00000'"),
        ({"embeddings": "shards", "purchases": "zero.parquet"}, "'count' of .*zero.parquet is 0 for every product"),
        ({"embeddings": "shards", "purchases": "empty.parquet"}, "holds no purchase"),
        ({"embeddings": "points.npy", "product_ids": "hole.txt"}, "Line 4 of .*hole.txt is empty"),
        ({"embeddings": "points.npy", "product_ids": "latin.txt"}, "latin.txt is not text in UTF-8"),
        ({"embeddings": "points.npy", "seed": -3}, "--seed -3"),
        ({"embeddings": "points.npy", "output_dir": "a_file/inside"}, "a_file"),
        ({"embeddings": "shards", "purchases": "negative.parquet"}, "count -2.0 in row 1"),
        ({"embeddings": "shards", "purchases": "words.parquet"}, "counts must be numbers"),
        ({"embeddings": "shards", "purchases": "renamed.parquet"}, r"no column 'product_id', only \['item'\]"),
        ({"embeddings": "shards", "purchases": "singles.parquet", "count_column": "n"}, "no column 'n'"),
        ({"embeddings": "points.npy", "codebook_sizes": [4000]}, "cannot fill a codebook of 4000"),
        ({"embeddings": "points.npy", "codebook_sizes": [0]}, "at least one code"),
        ({"embeddings": "points.npy", "output_dir": "a_file"}, "is a file"),
    ],
)
def test_bad_input_is_explained_in_a_line(wrong, tmp_path, capsys, options, message):
    files = {"embeddings", "codes", "product_ids", "purchases", "output_dir"}
    options = {"codebook_sizes": SIZES, "output_dir": tmp_path / "out"} | options
    arguments = ["diagnose"]
    for name, value in options.items():
        if value is not None:
            value = wrong / value if name in files else value
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("rqsid diagnose: error: ") and re.search(message, line), line
    assert not printed.out and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, expected", [(["--help"], "diagnose"), (["diagnose", "--help"], "rqsid diagnose --embeddings")]
)
def test_help(arguments, expected, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0 and expected in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["paint"], ["diagnose", "--codebook_sizes", "many"]])
def test_what_argparse_refuses(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and "usage: rqsid" in capsys.readouterr().err
