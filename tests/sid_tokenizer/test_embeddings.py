"""Every source of embeddings gives the same rows, and what is no table of vectors is refused."""

import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, Features, IterableDataset, List, Value, load_dataset
from safetensors.numpy import save_file

from rqsid.sid_tokenizer.embeddings import EmbeddingReader

ROWS = np.random.default_rng(0).standard_normal((250, 6)).astype(np.float32)


def read(embeddings, rows=64, **arguments):
    starts, chunks = zip(*EmbeddingReader(embeddings, **arguments).chunks(rows), strict=True)
    assert list(starts) == np.cumsum([0, *map(len, chunks)])[:-1].tolist()
    assert all(len(chunk) <= rows and chunk.dtype == torch.float32 for chunk in chunks)
    return torch.cat(chunks).numpy()


def dataset(rows=ROWS, dtype="float32", length=-1):
    features = Features({"embedding": List(Value(dtype), length=length)})
    return Dataset.from_dict({"embedding": list(np.asarray(rows).astype(dtype))}, features=features)


def stream(rows=ROWS, column="embedding"):
    return IterableDataset.from_generator(lambda: ({column: row} for row in rows))


def write_shards(folder, sizes=(100, 1, 0, 149), rows=ROWS):
    for shard, start in enumerate(np.cumsum([0, *sizes])[:-1]):
        save_file({"embedding": rows[start : start + sizes[shard]]}, folder / f"{shard:03}.safetensors")


def read_only(rows):
    rows = rows.copy()
    rows.flags.writeable = False
    return rows


@pytest.mark.parametrize(
    "make",
    [
        lambda: ROWS,
        lambda: read_only(ROWS),
        lambda: np.asfortranarray(ROWS),
        lambda: np.repeat(np.repeat(ROWS, 2, 0), 3, 1)[::2, ::3],
        lambda: ROWS[::-1].copy()[::-1],
        lambda: ROWS[:, ::-1].copy()[:, ::-1],
        lambda: ROWS.astype(">f4"),
        lambda: ROWS.astype(np.float64),
        lambda: ROWS.astype(np.longdouble),
        lambda: torch.tensor(ROWS),
        lambda: torch.tensor(ROWS.T.copy()).T,
        lambda: torch.tensor(ROWS).double(),
        dataset,
        lambda: dataset(length=6),
        lambda: dataset(dtype="float64"),
        lambda: Dataset.from_dict({"embedding": ROWS.tolist(), "id": list(range(250))}),
        lambda: dataset(ROWS[::-1]).select(range(249, -1, -1)),
        lambda: dataset().to_iterable_dataset(num_shards=3),
        stream,
    ],
)
def test_same_rows_from_everything_in_memory_and_from_streams(make):
    np.testing.assert_array_equal(read(make()), ROWS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    half = torch.tensor(ROWS).to(dtype)
    np.testing.assert_array_equal(read(half), half.float())
    if dtype == torch.float16:
        np.testing.assert_array_equal(read(half.numpy()), half.float())
        np.testing.assert_array_equal(read(dataset(half.numpy(), "float16")), half.float())


def test_files(tmp_path):
    np.save(tmp_path / "rows.npy", ROWS)
    save_file({"anything": ROWS}, tmp_path / "rows.safetensors")
    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards")
    Dataset.from_dict({"vector": ROWS.tolist()}).to_parquet(tmp_path / "rows.parquet")
    parquet = {"data_files": str(tmp_path / "rows.parquet"), "split": "train", "cache_dir": str(tmp_path / "cache")}
    memmap = np.memmap(tmp_path / "raw", dtype=np.float32, mode="w+", shape=ROWS.shape)
    memmap[:] = ROWS
    for source in (
        tmp_path / "rows.npy",
        str(tmp_path / "rows.safetensors"),
        tmp_path / "shards",
        np.memmap(tmp_path / "raw", dtype=np.float32, mode="r", shape=ROWS.shape),
    ):
        np.testing.assert_array_equal(read(source), ROWS)
    for streaming in (False, True):
        source = load_dataset("parquet", streaming=streaming, **parquet)
        np.testing.assert_array_equal(read(source, column="vector"), ROWS)


def test_number_of_rows_and_dimensions():
    for source, known in ((ROWS, 250), (dataset(), 250), (stream(), None)):
        reader = EmbeddingReader(source)
        assert (reader.num_rows, reader.dim) == (known, 6)
        for _ in range(2):
            assert sum(len(chunk) for _, chunk in reader.chunks(99)) == 250 == reader.num_rows
    assert list(EmbeddingReader(ROWS[:0]).chunks()) == []


def test_a_mapped_file_is_read_slice_by_slice(tmp_path):
    """A table of 3.2 GB in a sparse file: whoever read all of it would take seconds and the memory."""
    np.lib.format.open_memmap(tmp_path / "rows.npy", mode="w+", dtype=np.float32, shape=(100_000_000, 8)).flush()
    start, chunk = next(EmbeddingReader(tmp_path / "rows.npy").chunks(1000))
    assert start == 0 and chunk.shape == (1000, 8)


def test_large_finite_values_are_no_false_alarm():
    """Their sum is infinite."""
    assert np.isfinite(read(np.full((100, 8), 3e38, dtype=np.float32))).all()
    with pytest.raises(ValueError, match="beyond float32.*row 9"):
        read(np.r_[np.ones((9, 8)), [[1e300] * 8]])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 63, 64, 249])
def test_the_row_of_a_bad_value_is_named(tmp_path, row, value):
    rows = ROWS.copy()
    rows[row, 5] = value
    write_shards(tmp_path, rows=rows)
    for source in (rows, torch.tensor(rows), dataset(rows), stream(rows), tmp_path):
        with pytest.raises(ValueError, match=rf"first in row {row}\)"):
            read(source)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: ROWS[0], ValueError, r"shape \(6,\).*embedding\[None\]"),
        (lambda: ROWS[:, :0], TypeError, "at least one dimension"),
        (lambda: ROWS.astype(int), TypeError, "floating point.*int64"),
        (lambda: torch.ones(3, 3, dtype=torch.int32), TypeError, "floating point.*int32"),
        (lambda: ROWS.astype(object), TypeError, "floating point.*object"),
        (lambda: ROWS.tolist(), TypeError, "got list"),
        (lambda: 3, TypeError, "got int"),
        (lambda: dataset(ROWS.astype(int), "int32"), TypeError, "int"),
        (lambda: Dataset.from_dict({"embedding": [[1.0, 2.0], [1.0]]}), ValueError, "vectors of one length"),
        (lambda: Dataset.from_dict({"embedding": [[1.0, 2.0], None]}), ValueError, "vectors of one length"),
        (lambda: Dataset.from_dict({"embedding": [[1.0, 2.0], [None, 1.0]]}), ValueError, "NaN.*row 1"),
        (lambda: Dataset.from_dict({"embedding": [1.0, 2.0]}), ValueError, "vectors of one length"),
        (lambda: Dataset.from_dict({"embedding": ["a", "b"]}), ValueError, "vectors of one length"),
        (lambda: Dataset.from_dict({"embedding": []}), ValueError, "empty"),
        (lambda: Dataset.from_dict({"x": [[1.0]]}), ValueError, r"no column 'embedding'.*\['x'\].*column="),
        (lambda: stream(column="x"), ValueError, r"no column 'embedding'.*\['x'\]"),
        (lambda: stream([*ROWS[:64], *ROWS[:64, :3]]), ValueError, "3 dimensions after rows of 6"),
    ],
)
def test_what_is_no_table_of_vectors_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        read(make())


def test_array2d_rows_are_refused():
    features = Features({"embedding": Array2D((2, 3), "float32")})
    table = Dataset.from_dict({"embedding": ROWS.reshape(-1, 2, 3).tolist()}, features=features)
    with pytest.raises(ValueError, match="vectors of one length"):
        read(table)


def test_bad_files(tmp_path):
    np.save(tmp_path / "good.npy", ROWS)
    save_file({"embedding": ROWS}, tmp_path / "good.safetensors")
    for name in ("good.npy", "good.safetensors"):
        content = (tmp_path / name).read_bytes()
        for number, part in enumerate((content[:-1], content[:50], b"", b"x" * 200)):
            path = tmp_path / f"bad{number}.{name.split('.')[1]}"
            path.write_bytes(part)
            with pytest.raises(ValueError, match=rf"bad{number}.* is not a readable.*Write it again"):
                read(path)
    np.save(tmp_path / "pickle.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="pickle.npy is not a readable .npy file of numbers"):
        read(tmp_path / "pickle.npy")
    np.savez(tmp_path / "archive.npz", ROWS)
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    with pytest.raises(ValueError, match="archive.npy is not a readable.*archive of several"):
        read(tmp_path / "archive.npy")
    save_file({"a": ROWS, "b": ROWS}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"two.safetensors holds the tensors \['a', 'b'\]"):
        read(tmp_path / "two.safetensors")
    (tmp_path / "rows.csv").write_text("1,2")
    for path, message in (("rows.csv", "Cannot read"), ("nothing.npy", "no file or folder")):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no .safetensors file.*parquet"):
        read(tmp_path / "empty")
    write_shards(tmp_path / "empty", (100, 150))
    save_file({"embedding": ROWS[:, :4].copy()}, tmp_path / "empty" / "002.safetensors")
    with pytest.raises(ValueError, match=r"\[4, 6\] dimensions"):
        read(tmp_path / "empty")
    with pytest.raises(ValueError, match="6 dimensions, the codebooks 5"):
        EmbeddingReader(ROWS, expect_dim=5)


def test_a_stream_that_ends_early_in_a_later_pass():
    passes = []

    def rows():
        passes.append(1)
        yield from ({"embedding": row} for row in (ROWS if len(passes) < 3 else ROWS[:100]))

    reader = EmbeddingReader(IterableDataset.from_generator(rows))  # looks at the first row: pass one
    assert sum(len(chunk) for _, chunk in reader.chunks()) == 250
    with pytest.raises(ValueError, match="ended after 100 rows in this pass, but had 250.*do not shuffle"):
        list(reader.chunks())


def test_a_stream_that_grows_in_a_later_pass():
    passes = []

    def rows():
        passes.append(1)
        yield from ({"embedding": row} for row in (ROWS if len(passes) < 3 else [*ROWS, *ROWS]))

    reader = EmbeddingReader(IterableDataset.from_generator(rows))
    assert sum(len(chunk) for _, chunk in reader.chunks()) == 250
    with pytest.raises(ValueError, match="more rows in this pass than the 250 before"):
        list(reader.chunks())


def test_any_path_like(tmp_path):
    class Path:
        def __fspath__(self):
            return str(tmp_path / "rows.npy")

    np.save(tmp_path / "rows.npy", ROWS)
    np.testing.assert_array_equal(read(Path()), ROWS)
