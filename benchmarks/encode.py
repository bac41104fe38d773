"""
How fast a large catalogue is encoded, in how much memory, and what takes the time.

    python benchmarks/encode.py
    python benchmarks/encode.py --quick

Embeddings are half-precision numbers in a memory-mapped `.npy` file, which is written into a temporary folder first and takes
7.7 GB for the 10 million rows of 384 numbers; codes go to a memory-mapped file as well. The rows are one block of synthetic
embeddings, again and again: what they are makes no difference to the speed. What was just written lies in the page cache of
the system as far as that has room, so disks are hardly measured.

The yardstick are the matrix products alone, of the same shapes and with the same threads, before and after. Seconds are those
of the clock, since all cores work; where other processes compete for them, compare the CPU seconds, which stand beside.
"""

import argparse
import os
import shutil
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from datasets.utils.logging import disable_progress_bar
from measures import CHUNK_ROWS, make_gemm, markdown_table, memory_mib, synthetic_embeddings

from rqsid import ResidualQuantizer, ResidualQuantizerConfig
from rqsid.sid_tokenizer.files import write_json

BLOCK_ROWS = 2**17


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="10,000,000, or 300,000 with --quick.")
    parser.add_argument("--stream_rows", type=int, help="Rows read as a datasets.IterableDataset; at most 131,072.")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--codebook_sizes", type=int, nargs="+", default=[256, 256, 256])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", help="Where the temporary folder goes; the system's place for them if not given.")
    parser.add_argument("--quick", action="store_true", help="Fewer rows.")
    parser.add_argument("--json", help="File for the results.")
    options = parser.parse_args(arguments)
    options.rows = options.rows or (300_000 if options.quick else 10_000_000)
    options.stream_rows = min(options.stream_rows or BLOCK_ROWS, options.rows, BLOCK_ROWS)
    if min(options.rows, options.stream_rows, options.dim, options.threads, *options.codebook_sizes) < 1:
        parser.error("all numbers must be at least 1.")
    if max(options.codebook_sizes) > min(options.rows, BLOCK_ROWS):
        parser.error(f"{options.rows} rows cannot fill a codebook of {max(options.codebook_sizes)} codes.")
    if options.json and not Path(options.json).absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no such folder. Make it first.")
    return options


def write_embeddings(path, rows, dim):
    """Returns the block that the file repeats, float32. Shape: (min(rows, BLOCK_ROWS), D)."""
    needed, free = 2 * rows * dim, shutil.disk_usage(path.parent).free
    if needed > 0.9 * free:
        sys.exit(
            f"{rows} rows of {dim} half-precision numbers take {needed / 1e9:.1f} GB, but {path.parent} has only "
            f"{free / 1e9:.1f} GB free. Pass fewer --rows, or a --folder on a larger disk."
        )
    block = synthetic_embeddings(min(rows, BLOCK_ROWS), dim)
    half = block.astype(np.float16)
    table = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(rows, dim))
    for start in range(0, rows, len(half)):
        table[start : start + len(half)] = half[: rows - start]
    table.flush()
    return half.astype(np.float32)


@contextmanager
def measure(result, num_rows):
    """
    Leaves in `result` the seconds that the block takes, and the peak of the memory that it adds: RssAnon of
    /proc/self/status, which leaves out mapped files. (Private pages do not: those of a mapped file count as private as long
    as no other process maps it.)
    """
    before, done = memory_mib("RssAnon"), threading.Event()
    peaks = [before or 0.0]

    def watch():
        while not done.wait(0.05):
            peaks.append(memory_mib("RssAnon") or 0.0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started, started_cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
        done.set()
        watcher.join()
    result.update(
        rows=num_rows,
        rows_per_second=num_rows / seconds,
        rows_per_cpu_second=num_rows / cpu_seconds,
        memory_mib=None if before is None else max(peaks + [memory_mib("RssAnon")]) - before,
    )


def measure_gemm(block, codebook_sizes, num_rows):
    """The matrix products alone, for about as many rows, by passes over a block in memory."""
    gemm, result = make_gemm(torch.from_numpy(block), codebook_sizes), {}
    passes = max(1, min(10, num_rows // len(block)))
    gemm()
    with measure(result, passes * len(block)):
        for _ in range(passes):
            gemm()
    return result


def profile(quantizer, table, out):
    """
    Returns:
        `dict[str, float]`: shares of the time of `encode`, by torch operation, largest first, those below half a percent
        together. The rest is what happens outside of torch: in NumPy and Python.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        quantizer.encode(table, out=out)
        seconds = time.perf_counter() - started
    operations = {event.key: event.self_cpu_time_total / 1e6 / seconds for event in profiler.key_averages()}
    ordered = sorted(operations.items(), key=lambda item: -item[1])
    shares = {name: share for name, share in ordered if share >= 0.005}
    shares["smaller torch operations"] = sum(operations.values()) - sum(shares.values())
    return shares | {"NumPy and Python": 1 - sum(operations.values())}


def main(arguments=None):
    options = parse_arguments(arguments)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            return run(options, Path(folder))
    finally:
        torch.set_num_threads(threads_before)


def run(options, folder):
    # 1. embeddings, and codebooks, which need not be good ones
    block = write_embeddings(folder / "embeddings.npy", options.rows, options.dim)
    config = ResidualQuantizerConfig(
        codebook_sizes=options.codebook_sizes, preset="fast", num_iterations=1, num_sample_iterations=1
    )
    quantizer = ResidualQuantizer(config).fit(block)
    table = np.load(folder / "embeddings.npy", mmap_mode="r")
    out = np.lib.format.open_memmap(
        folder / "codes.npy", mode="w+", dtype=np.int16, shape=(len(table), len(options.codebook_sizes))
    )

    # 2. the whole table, between two measurements of the yardstick
    warm = min(len(table), 16 * CHUNK_ROWS)
    quantizer.encode(table[:warm], out=out[:warm])
    results = {"GEMM before": measure_gemm(block, options.codebook_sizes, options.rows)}
    results["encode, memory-mapped"] = mapped = {}
    with measure(mapped, len(table)):
        quantizer.encode(table, out=out)
    results["GEMM after"] = measure_gemm(block, options.codebook_sizes, options.rows)

    # 3. the same rows as a stream, from a parquet file
    stream_rows = options.stream_rows
    Dataset.from_dict({"embedding": block[:stream_rows]}).to_parquet(str(folder / "embeddings.parquet"))
    stream = load_dataset("parquet", data_files=str(folder / "embeddings.parquet"), split="train", streaming=True)
    quantizer.encode(stream.take(min(1000, stream_rows)))  # what the first use loads is none of encode's memory
    results["encode, streamed from parquet"] = streamed = {}
    with measure(streamed, stream_rows):
        stream_codes = quantizer.encode(stream)
    if not np.array_equal(stream_codes, out[:stream_rows]):
        sys.exit("The stream got other codes than the memory-mapped file: this is a bug of rqsid, please report it.")

    for name in ("rows_per_second", "rows_per_cpu_second"):
        gemm = (results["GEMM before"][name] + results["GEMM after"][name]) / 2
        for result in results.values():
            result[name.replace("rows", "share_of_gemm", 1)] = result[name] / gemm
    result = {
        "setting": {name: getattr(options, name) for name in ("rows", "dim", "codebook_sizes", "threads", "quick")},
        "results": results,
        "profile": profile(quantizer, table[:warm], out[:warm]),
    }
    if options.json:
        write_json(options.json, result)
    print(write_tables(result))
    return result


def write_tables(result):
    setting, rows = result["setting"], []
    for name, values in result["results"].items():
        memory = values["memory_mib"]
        rows.append(
            [
                name,
                f"{values['rows']:,}",
                f"{values['rows_per_second'] / 1000:.1f}",
                f"{values['share_of_gemm_per_second']:.2f}",
                f"{values['rows_per_cpu_second'] / 1000:.1f}",
                f"{values['share_of_gemm_per_cpu_second']:.2f}",
                "-" if memory is None else f"{memory:.0f}",
            ]
        )
    header = ["", "rows", "krows/s", "/ GEMM", "krows/CPU s", "/ GEMM", "memory added, MiB"]
    shares = [[name, f"{share:.1%}"] for name, share in result["profile"].items()]
    return "\n".join(
        [
            f"{setting['rows']:,} x {setting['dim']} in float16, codebook sizes {setting['codebook_sizes']}, "
            f"{setting['threads']} thread(s). Memory beside mapped files.",
            "",
            markdown_table(header, rows),
            "",
            markdown_table(["operation", "share of the time of encode"], shares),
        ]
    )


if __name__ == "__main__":
    main()
