"""The embedding example, run through its main() as from a command line, on small catalogues in files."""

import json
import math
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import load_dataset
from fresh_process import run_ranks, start_fresh
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel, BertTokenizerFast

FOLDER = Path(__file__).parents[2] / "examples" / "embed_products"
SCRIPT = str(FOLDER / "embed_products.py")
KINDS = {"lantern": "camping", "kettle": "tea", "rug": "floor", "violin": "music", "sandal": "beach"}


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(FOLDER))
    try:
        import embed_products

        yield embed_products
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with a BERT of random weights that reads letters."""
    folder = tmp_path_factory.mktemp("bert")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(vocabulary), initializer_range=0.3, **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(example, monkeypatch):
    """`run("--products", ...)`: the script with these arguments."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [SCRIPT, "--use_cpu", *map(str, arguments)])
        example.main()

    return run


def write_products(num_products=40, path="products.csv"):
    kinds = list(KINDS)
    rows = [
        {"product_id": f"{row:04}", "title": f"{kinds[row % 5]} {row // 5}", "brand": ["", "acme", "None"][row % 3]}
        for row in range(num_products)
    ]
    pd.DataFrame(rows).to_csv(path, index=False)
    return [f"{row['title']} {row['brand']}".strip() for row in rows]


def write_pairs(products, path="pairs.parquet", copies=6):
    """Queries share no word with products; the kind of product has to be learned."""
    wants, endings = list(KINDS.values()), ["stuff", "things", "gift"]
    rows = [(f"{wants[row % 5]} {endings[copy % 3]}", f"{row:04}") for row in products for copy in range(copies)]
    # Shuffled, so that nothing works only because pairs come in the order of the products.
    pd.DataFrame(rows, columns=["query", "product_id"]).sample(frac=1, random_state=0).to_parquet(path, index=False)


def read_shards(folder="out/embeddings"):
    return torch.cat([load_file(path)["embeddings"] for path in sorted(Path(folder).glob("*.safetensors"))])


OUT = ("--output_dir=out",)
TRAIN = ("--products=products.csv", "--pairs=pairs.parquet", "--text_columns", "title", "brand", "--embedding_dim=16")
TRAIN += ("--num_train_epochs=16", "--save_strategy=no", "--shard_rows=15")


def test_loss_by_hand(example):
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    products = torch.tensor([[2.0, 0.0], [0.0, 3.0], [2.0, 0.0]])
    log_probabilities = torch.log(torch.tensor([0.1, 0.2, 0.1, 0.2, 0.4]))
    # A feature dict stands for its embeddings: the model hands back what it gets.
    loss_class = sys.modules["train_tower"].SampledSoftmaxLoss
    loss = loss_class(lambda features: features, log_probabilities, scale=2.0)
    found = loss([{"sentence_embedding": queries}, {"sentence_embedding": products}], torch.tensor([4, 1, 4]))

    # scale * inner product, divided by the share, against the batch's other products; rows 0 and 2 are product 4.
    row_0 = math.exp(4) / 0.4 / (math.exp(4) / 0.4 + math.exp(0) / 0.2)
    row_1 = math.exp(6) / 0.2 / (math.exp(6) / 0.2 + 2 * math.exp(0) / 0.4)
    row_2 = math.exp(4) / 0.4 / (math.exp(4) / 0.4 + math.exp(6) / 0.2)
    assert found.item() == pytest.approx(-(math.log(row_0) + math.log(row_1) + math.log(row_2)) / 3, rel=1e-5)


def test_safetensors_shards(example, run, bert):
    texts = write_products()
    run("--products=products.csv", "--text_columns", "title", "brand", f"--encoder={bert}", *OUT, "--shard_rows=15")
    files = sorted(path.name for path in Path("out/embeddings").glob("*.safetensors"))
    assert files == [f"embeddings-0000{shard}.safetensors" for shard in range(3)]
    assert [len(load_file(f"out/embeddings/{name}")["embeddings"]) for name in files] == [15, 15, 10]
    embeddings = read_shards()
    assert embeddings.dtype == torch.float32
    # The ids keep their zeros and "None" is a brand, though the file is a CSV.
    np.testing.assert_allclose(embeddings, SentenceTransformer(bert, device="cpu").encode(texts), atol=1e-5)
    assert example.load_product_ids("out/embeddings") == [f"{row:04}" for row in range(40)]
    manifest = json.loads(Path("out/embeddings/.manifest.json").read_text())
    assert (manifest["rows"], manifest["dim"], manifest["dtype"]) == (40, 16, "float32")
    assert [shard["rows"] for shard in manifest["shards"]] == [15, 15, 10]


def test_parquet_shards_of_lines(example, run, bert):
    lines = ["red shoe", "http://example.com/shoe.jpg", "blue shoe", "shoe"]
    Path("lines.txt").write_text("\n".join(lines) + "\n")
    run(
        "--products=lines.txt", f"--encoder={bert}", *OUT, "--format=parquet", "--shard_rows=3", "--product_prompt=p: "
    )
    dataset = load_dataset("parquet", data_dir="out/embeddings", split="train")
    assert dataset["product_id"][:] == ["1", "2", "3", "4"] == example.load_product_ids("out/embeddings")
    assert dataset.features["embedding"].length == 16 and dataset.features["embedding"].feature.dtype == "float32"
    expected = SentenceTransformer(bert, device="cpu").encode([f"p: {line}" for line in lines])
    np.testing.assert_allclose(dataset.with_format("numpy")["embedding"][:], expected, atol=1e-5)


def test_json_lines_in_several_files_and_half_precision(example, run, bert):
    """Ids that are numbers, a text of a number and a missing one, in the order of the files' names."""
    frame = pd.DataFrame({"sku": [7, 8, 9], "title": ["a", "b", None], "price": [1.5, None, 2.0]})
    for number in (1, 0):
        frame.assign(sku=frame.sku + 10 * number).to_json(f"part-{number}.jsonl", orient="records", lines=True)
    run("--products=part-*.jsonl", "--id_column=sku", "--text_columns", "title", "price", f"--encoder={bert}", *OUT)
    assert example.load_product_ids("out/embeddings") == ["7", "8", "9", "17", "18", "19"]
    expected = SentenceTransformer(bert, device="cpu").encode(["a 1.5", "b", "2"] * 2)
    np.testing.assert_allclose(read_shards(), expected, atol=1e-5)
    half = ("--dtype=float16", "--output_dir=half")
    run("--products=part-*.jsonl", "--id_column=sku", "--text_columns", "title", "price", f"--encoder={bert}", *half)
    assert torch.equal(read_shards("half/embeddings"), read_shards().half())


@pytest.mark.parametrize("format", ["safetensors", "parquet"])
def test_a_run_goes_on_where_it_stopped(example, run, bert, format):
    write_products()
    arguments = ("--products=products.csv", "--text_columns", "title", f"--encoder={bert}", *OUT, "--shard_rows=15")
    run(*arguments, f"--format={format}")
    folder = Path("out/embeddings")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.iterdir())}
    lost = folder / f"embeddings-00001.{format}"
    lost.unlink()
    (folder / f"{lost.name}.abc.tmp").write_text("half a shard")
    (folder / ".manifest.json").unlink()
    with pytest.raises(ValueError, match="was not finished"):
        example.load_product_ids(folder)
    run(*arguments, f"--format={format}")
    assert sorted(folder.iterdir()) == list(before)
    for path, (content, written) in before.items():
        assert path.read_bytes() == content
        again = path.name in (lost.name, "product_ids-00001.parquet", ".manifest.json")
        assert (path.stat().st_mtime_ns != written) == again


def test_another_run_is_refused_by_name(run, bert, tmp_path):
    write_products()
    arguments = ["--products=products.csv", "--text_columns=title", f"--encoder={bert}", *OUT, "--shard_rows=15"]
    run(*arguments)
    before = {path: path.stat().st_mtime_ns for path in Path("out/embeddings").iterdir()}
    for other, name in {
        "--shard_rows=14": "shard_rows=15, and this run has 14",
        "--shard_rows=20": "embeddings-00002.safetensors is none of the 2",
        "--dtype=float16": "dtype='float32'",
        "--format=parquet": "none of the 3 parquet shards",
        "--text_columns=product_id": "text_columns=",
        "--max_seq_length=9": "max_seq_length='512'",
        "--product_prompt=x": "prompt=''",
        "--bf16": "precision=",
    }.items():
        with pytest.raises(ValueError, match=name):
            run(*arguments, other)
    model = SentenceTransformer(bert, device="cpu")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained("other", create_model_card=False)
    with pytest.raises(ValueError, match="other weights than"):
        run(*arguments, "--encoder=other")
    text = Path("products.csv").read_text()
    Path("products.csv").write_text(text.replace("rug 7", "rug 9"))
    with pytest.raises(ValueError, match="00002.safetensors was made of other products"):
        run(*arguments)
    assert {path: path.stat().st_mtime_ns for path in Path("out/embeddings").iterdir()} == before
    # Weights and products that have only moved are the same.
    Path("moved.csv").write_text(text)
    run(*arguments, "--products=moved.csv")


def test_damaged_files_are_named(example, run, bert):
    write_products(6)
    arguments = ("--products=products.csv", "--text_columns=title", f"--encoder={bert}", *OUT, "--shard_rows=3")
    run(*arguments)
    shard = Path("out/embeddings/embeddings-00001.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="00001.safetensors or the ids beside it cannot be read"):
        run(*arguments)
    shard.write_bytes(whole)
    ids = Path("out/embeddings/product_ids-00001.parquet")
    pd.DataFrame({"product_id": ["0003"]}).to_parquet(ids)
    with pytest.raises(ValueError, match="holds 1 ids, the manifest says 3"):
        example.load_product_ids("out/embeddings")
    ids.unlink()
    with pytest.raises(ValueError, match="product_ids-00001.parquet is missing"):
        example.load_product_ids("out/embeddings")


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "holds no rows"),
        ("product_id,title\n", "holds no rows"),
        ("id,title\na,x\n", "no column 'product_id', only 'id', 'title'"),
        ("product_id,title\na,x\nb,y\na,z\n", "'a' of row 0 appears again in row 2"),
        ("product_id,title\na,x\n ,y\n", "row 1 .*product_id is empty"),
        ("product_id,title\na,x\nb,y\nc, \n", "row 2 .*no text in title"),
        ("product_id,title\na,x\nb,y,z\n", "cannot be read as csv"),
        ({"product_id": [1.0, None], "title": ["x", "y"]}, "holds double"),
        ({"product_id": ["a", None], "title": ["x", "y"]}, "row 1 .*product_id is empty"),
        ({"product_id": ["a", "b"], "title": ["x", None]}, "row 1 .*no text"),
        ({"product_id": ["a", "b"], "title": [1.5, math.nan]}, "row 1 .*no text"),
        ({"product_id": ["a", "b"], "title": [["x"], ["y"]]}, "holds list"),
    ],
)
def test_bad_products(run, bert, content, message):
    path = "products.csv" if isinstance(content, str) else "products.parquet"
    if isinstance(content, str):
        Path(path).write_text(content)
    else:
        pd.DataFrame(content).to_parquet(path)
    # Two rows of a table at a time: rows are counted across tables.
    with pytest.raises(ValueError, match=message):
        run(f"--products={path}", "--text_columns=title", f"--encoder={bert}", *OUT, "--shard_rows=2")
    assert not Path("out").exists() or not list(Path("out").rglob("*"))


def test_equal_hashes_of_different_ids_are_no_duplicates(example, monkeypatch):
    product_files = sys.modules["product_files"]
    monkeypatch.setattr(product_files, "hash_strings", lambda column: np.zeros(len(column), dtype=np.uint64))
    tables = [pa.table({"product_id": ["a", "b"]}), pa.table({"product_id": ["c"]})]
    assert product_files.check_unique(lambda: iter(tables), "products.csv") == 3
    tables.append(pa.table({"product_id": ["d", "b"]}))
    with pytest.raises(ValueError, match="'b' of row 1 appears again in row 4"):
        product_files.check_unique(lambda: iter(tables), "products.csv")


def test_embeddings_that_are_not_finite(run, bert):
    write_products(6)
    model = SentenceTransformer(bert, device="cpu")
    with torch.no_grad():
        model[0].auto_model.embeddings.word_embeddings.weight[model.tokenizer.vocab["k"]] = math.nan
    model.save_pretrained("broken", create_model_card=False)
    # Row 1 is a kettle.
    with pytest.raises(ValueError, match=r"'0001' \(row 1\) is not finite"):
        run("--products=products.csv", "--text_columns=title", "--encoder=broken", *OUT)
    assert not list(Path("out/embeddings").iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--encoder to embed with, --pairs to train one"),
        (["--encoder=x", "--format=parquet", "--dtype=float16"], "float32"),
        (["--encoder=x", "--shard_rows=0"], "--shard_rows 0"),
        (["--encoder=x", "--text_columns", "title", "title"], "names a column twice"),
        (["--encoder=x", "--products=products.tsv"], "no suffix that says how to read it"),
        (["--pairs=pairs.parquet", "--scale=0"], "--scale 0.0 must be positive"),
        (["--pairs=pairs.parquet", "--per_device_train_batch_size=999"], "240 pairs do not fill a batch of 999"),
        (["--pairs=unknown.parquet"], r"row 12 .*'2' is not in products.csv \(6 of 18 pairs"),
        (["--pairs=empty.csv"], "empty.csv, row 1 .*query is empty"),
        (["--pairs=pairs.txt"], "pairs have two columns"),
    ],
)
def test_bad_arguments(run, arguments, message):
    write_products()
    with pytest.raises(ValueError, match="say which of them hold the text"):
        run("--products=products.csv", "--encoder=x", *OUT)
    write_pairs(range(40))
    frame = pd.read_parquet("pairs.parquet").sort_values("product_id").iloc[:18]
    frame.assign(product_id=frame["product_id"].replace({"0002": "2"})).to_parquet("unknown.parquet")
    Path("empty.csv").write_text("query,product_id\na,0001\n,0002\n")
    with pytest.raises(ValueError, match=message):
        run("--products=products.csv", "--text_columns=title", *OUT, *arguments)


def precision_at_4(model, rows, texts):
    """Of the four products nearest to each want, the share that is of the wanted kind, among the products in `rows`."""
    products = model.encode_document([texts[row] for row in rows])
    ranked = np.argsort(-model.encode_query(list(KINDS.values())) @ products.T, axis=1)[:, :4]
    return np.mean(np.array(rows)[ranked] % 5 == np.arange(5)[:, None])


def test_training_brings_queries_to_their_products(example, run, capsys):
    texts = write_products()
    write_pairs(range(20))
    run(*TRAIN, "--output_dir=untrained", "--per_device_train_batch_size=40", "--learning_rate=0")
    run(*TRAIN, *OUT, "--per_device_train_batch_size=40")
    untrained, trained = (SentenceTransformer(f"{folder}/model", device="cpu") for folder in ("untrained", "out"))
    # Of five kinds, one in five is right by chance; products 20 to 39 are in no pair.
    for rows in (range(20), range(20, 40)):
        assert precision_at_4(untrained, rows, texts) < 0.5
        assert precision_at_4(trained, rows, texts) > 0.9
    embeddings = read_shards()
    np.testing.assert_allclose(embeddings, trained.encode(texts), atol=1e-6)
    np.testing.assert_allclose(embeddings.norm(dim=1), 1, rtol=1e-5)

    weights = Path("out/model/model.safetensors").stat().st_mtime_ns
    run(*TRAIN, *OUT, "--per_device_train_batch_size=40")
    assert "trained already" in capsys.readouterr().out
    assert Path("out/model/model.safetensors").stat().st_mtime_ns == weights
    with pytest.raises(ValueError, match="trained with num_train_epochs=16.0, and now num_train_epochs is 9.0"):
        run(*TRAIN, *OUT, "--per_device_train_batch_size=40", "--num_train_epochs=9")


def test_training_a_bert(run, bert):
    texts = write_products()
    write_pairs(range(40))
    run(*TRAIN, f"--encoder={bert}", *OUT, "--per_device_train_batch_size=48", "--learning_rate=5e-3")
    untrained, trained = (SentenceTransformer(path, device="cpu") for path in (bert, "out/model"))
    assert precision_at_4(untrained, range(40), texts) < 0.5
    assert precision_at_4(trained, range(40), texts) > 0.8
    np.testing.assert_allclose(read_shards(), trained.encode(texts), atol=1e-5)


@pytest.mark.slow
def test_a_killed_run_is_finished_by_the_next(example, run, bert):
    texts = write_products(1500)
    arguments = ("--products=products.csv", "--text_columns", "title", "brand", f"--encoder={bert}", *OUT)
    arguments += ("--shard_rows=10",)
    third = Path("out/embeddings/embeddings-00002.safetensors")
    with start_fresh(Path(SCRIPT), "--use_cpu", *arguments) as process:
        until = time.monotonic() + 120
        while not third.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    made = {path: path.stat().st_mtime_ns for path in Path("out/embeddings").glob("embeddings-*.safetensors")}
    assert 3 <= len(made) < 150 and not Path("out/embeddings/.manifest.json").exists()
    run(*arguments)
    assert all(path.stat().st_mtime_ns == written for path, written in made.items())
    np.testing.assert_allclose(read_shards(), SentenceTransformer(bert, device="cpu").encode(texts), atol=1e-5)
    assert example.load_product_ids("out/embeddings") == [f"{row:04}" for row in range(1500)]
    assert not list(Path("out/embeddings").glob("*.tmp"))


@pytest.mark.slow
def test_two_processes_make_what_one_makes(example, run):
    """Negatives come from both processes: with half the batch each, the same training as one process with all of it."""
    write_products()
    write_pairs(range(40))
    run(*TRAIN, *OUT, "--per_device_train_batch_size=40")
    two = ["--output_dir=two", "--per_device_train_batch_size=20"]
    run_ranks(2, Path(SCRIPT), "--use_cpu", *TRAIN, *two)
    one, two = (load_file(f"{folder}/model/model.safetensors")["embedding.weight"] for folder in ("out", "two"))
    torch.testing.assert_close(two, one, atol=1e-4, rtol=0)
    torch.testing.assert_close(read_shards("two/embeddings"), read_shards(), atol=1e-4, rtol=0)
    assert example.load_product_ids("two/embeddings") == example.load_product_ids("out/embeddings")


def test_shards_are_shared_among_processes(example, run, bert):
    """Without a process group: three ranks, one after the other; whoever is last writes the manifest."""
    write_products()
    model = SentenceTransformer(bert, device="cpu")
    product_files = sys.modules["product_files"]

    def make_products():
        return product_files.stream_products("products.csv", "product_id", ["title", "brand"], 7)

    config = {"products": "products.csv", "shard_rows": 7, "format": "safetensors", "dtype": "float32"}
    folder, made = Path("shared"), []
    for rank in (2, 0, 1):
        assert not (folder / ".manifest.json").exists()
        example.embed_catalogue(model, make_products, 40, folder, config, batch_size=4, rank=rank, world_size=3)
        made.append(sorted(int(path.stem[-5:]) for path in folder.glob("*.safetensors")))
    assert made == [[2, 5], [0, 2, 3, 5], [0, 1, 2, 3, 4, 5]]
    assert example.load_product_ids(folder) == [f"{row:04}" for row in range(40)]
    for lost in (1, 2):
        (folder / f"embeddings-0000{lost}.safetensors").unlink()
    # Rank 1 alone cannot finish: the manifest, which says that all is there, must not stay.
    example.embed_catalogue(model, make_products, 40, folder, config, batch_size=4, rank=1, world_size=3)
    assert not (folder / ".manifest.json").exists()
