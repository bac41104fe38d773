"""
Compares residual quantizers on the same embeddings: time to fit, memory, error, balance, collisions and speed of encoding.

    python benchmarks/quantizers.py --json results.json
    python benchmarks/quantizers.py --embeddings out/embeddings --json results.json
    python benchmarks/quantizers.py --quick

Nothing is installed; peers that are absent are named and left out (`pip install 'rqsid[benchmarks]'` has them all). Every fit
gets a process of its own. Seconds are CPU seconds of all its threads, because the time of day also measures what else the
machine does; with more than one thread, rows per second are therefore per CPU second.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--embeddings", help="A .npy or .safetensors file or a folder of shards; synthetic if not given."
    )
    parser.add_argument("--rows", type=int, help="Rows to use, from the first; 60,000, or 10,000 with --quick.")
    parser.add_argument("--codebook_sizes", type=int, nargs="+", default=[256, 256, 256])
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="Names, or parts of names; all if not given.")
    parser.add_argument(
        "--seeds", type=int, help="Fits of the methods that the goals are about; 3, or 2 with --quick."
    )
    parser.add_argument(
        "--repeats", type=int, help="Rounds of encoding, of which the median counts; 7, or 3 with --quick."
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--quick", action="store_true", help="Fewer rows, seeds, methods and iterations, in about a minute."
    )
    parser.add_argument("--json", help="File for the results.")
    options = parser.parse_args(arguments)
    options.rows = options.rows or (10_000 if options.quick else 60_000)
    options.repeats = options.repeats or (3 if options.quick else 7)
    options.seeds = options.seeds or (2 if options.quick else 3)
    if min(options.rows, options.seeds, options.repeats, options.threads) < 1:
        parser.error("--rows, --seeds, --repeats and --threads must be at least 1.")
    if options.json and not Path(options.json).absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no such folder. Make it first.")
    return options


def run_alone(context, function, *arguments):
    """In a new process, so that neither memory nor threads nor settings are left over from another method."""
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def prepare(path, target, num_rows):
    """Writes the embeddings as one .npy file, which everything else reads. Returns (rows, D)."""
    import numpy as np
    from measures import synthetic_embeddings

    from rqsid import EmbeddingReader

    if path is None:
        points = synthetic_embeddings(num_rows)
    else:
        parts, missing = [], num_rows
        for _, chunk in EmbeddingReader(path).chunks():
            parts.append(chunk[:missing].numpy())
            missing -= len(parts[-1])
            if missing == 0:
                break
        points = np.concatenate(parts)
    np.save(target, points)
    return points.shape


def limit_threads(threads, module=None):
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(threads)
    if module is not None:
        imported = import_module(module)
        if module == "faiss":
            imported.omp_set_num_threads(threads)
    threadpool_limits(threads)


def measure_fit(name, embeddings, codebook_sizes, seed, quick, repeats, threads):
    """One fit of one method, and what its codes are worth. With `repeats=0` encoding is not timed."""
    import numpy as np
    import torch
    from measures import (
        distribution,
        interleaved_times,
        make_gemm,
        memory_mib,
        relative_error,
        reset_peak_memory,
    )
    from methods import METHODS

    function, module, _, options, quick_options = METHODS[name]
    limit_threads(threads, module)
    points = np.load(embeddings)
    before = memory_mib("VmRSS")
    reset_peak_memory()
    started = time.process_time()
    encode, decode = function(points, codebook_sizes, seed, **(quick_options if quick else options))
    seconds = time.process_time() - started
    peak = memory_mib("VmHWM")
    codes = np.asarray(encode(points))
    result = {
        "fit_cpu_seconds": seconds,
        "fit_memory_mib": None if peak is None else peak - before,
        "relative_error": relative_error(points, lambda rows: decode(codes[rows])),
        **distribution(codes, codebook_sizes),
    }
    if repeats > 0:
        gemm = make_gemm(torch.from_numpy(points), codebook_sizes)
        times = interleaved_times({"encode": lambda: encode(points), "gemm": gemm}, repeats)
        result["encode_rows_per_second"] = len(points) / float(np.median(times["encode"]))
        result["encode_share_of_gemm"] = float(np.median(np.divide(times["gemm"], times["encode"])))
    return result


def measure_encode(embeddings, codebook_sizes, repeats, threads, with_faiss):
    """Encoding by rqsid, by the exact search of faiss layer by layer, and the matrix products alone, in turns."""
    import numpy as np
    import torch
    from measures import interleaved_times, make_gemm
    from methods import FAISS, METHODS

    limit_threads(threads, "faiss" if with_faiss else None)
    points = np.load(embeddings)
    # Time does not depend on how good the codebooks are.
    functions = {
        "rqsid": METHODS["rqsid fast"][0](
            points, codebook_sizes, 0, preset="fast", num_iterations=1, num_sample_iterations=1
        )[0]
    }
    if with_faiss:
        functions["faiss"] = METHODS[FAISS][0](points, codebook_sizes, 0, iterations=1)[0]
    calls = {name: lambda encode=encode: encode(points) for name, encode in functions.items()}
    calls["gemm"] = make_gemm(torch.from_numpy(points), codebook_sizes)
    times = interleaved_times(calls, repeats)
    result = {f"{name}_rows_per_second": len(points) / float(np.median(seconds)) for name, seconds in times.items()}
    for other in calls.keys() - {"rqsid"}:
        result[f"share_of_{other}"] = float(np.median(np.divide(times[other], times["rqsid"])))
    return result


def main(arguments=None):
    options = parse_arguments(arguments)
    # Before anything imports a library that reads them. What follows happens in processes that inherit them.
    environment = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(options.threads)))
    try:
        return run(options)
    finally:
        for name, value in environment.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def run(options):
    from methods import FAISS, METHODS, SEEDED
    from report import add_ratios, judge, summarize, write_tables

    methods = {name: entry for name, entry in METHODS.items() if entry[4 if options.quick else 3] is not None}
    if options.methods:
        unknown = [part for part in options.methods if not any(part in name for name in methods)]
        if unknown:
            sys.exit(f"--methods {' '.join(unknown)}: no method of this name. There are: {'; '.join(methods)}.")
        # A whole name stands for itself alone: "rqsid fast" is part of others.
        chosen = [
            name
            for name in methods
            for part in options.methods
            if name == part or (part not in methods and part in name)
        ]
        methods = {name: methods[name] for name in dict.fromkeys(chosen)}
    notes, skipped = [], {}
    for name, (_, module, distribution, *_) in list(methods.items()):
        if find_spec(module) is None:
            skipped[name] = f"{distribution} is not installed"
            del methods[name]
            notes.append(f"Left out: {name} ({skipped[name]}).")
    if not methods:
        sys.exit(f"None of the methods can run. {' '.join(notes)}")
    if options.quick:
        notes.append(
            "--quick: fewer rows, seeds and methods, and fewer iterations of slow ones. No basis for judgement."
        )
    largest = max(options.codebook_sizes)
    if FAISS in methods and options.rows > 256 * largest:
        notes.append(f"faiss trains on a random sample of 256 rows per code, its default: {256 * largest} rows here.")

    # Forked from a server that has imported the libraries, once, and has run nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "rqsid"])
    runs, encode = [], None
    with tempfile.TemporaryDirectory() as folder:
        embeddings = str(Path(folder) / "embeddings.npy")
        rows, dim = run_alone(context, prepare, options.embeddings, embeddings, options.rows)
        if rows < options.rows:
            notes.append(f"There are only {rows} embeddings.")
        # Seeds outside, so that the methods that are compared most closely take turns.
        seeded = [(name, seed) for seed in range(options.seeds) for name in SEEDED if name in methods]
        for name, seed in seeded + [(name, 0) for name in methods if name not in SEEDED]:
            if name in skipped:
                continue
            repeats = options.repeats if seed == 0 else 0
            fit = (name, embeddings, options.codebook_sizes, seed, options.quick, repeats, options.threads)
            try:
                measured = run_alone(context, measure_fit, *fit)
            except Exception as error:
                # A peer that fails must not cost the measurements of the others.
                if name.startswith("rqsid"):
                    raise
                skipped[name] = f"failed: {type(error).__name__}: {error}"
                notes.append(f"Left out: {name} ({skipped[name]}).")
                continue
            runs.append({"method": name, "seed": seed, **measured})
            print(
                f"{name}, seed {seed}: {measured['fit_cpu_seconds']:.1f} CPU s, error {measured['relative_error']:.4f}",
                file=sys.stderr,
                flush=True,
            )
        if any(name.startswith("rqsid") for name in methods):
            with_faiss = find_spec("faiss") is not None
            encode = run_alone(
                context,
                measure_encode,
                embeddings,
                options.codebook_sizes,
                options.repeats,
                options.threads,
                with_faiss,
            )

    if not runs:
        sys.exit(f"None of the methods could run. {' '.join(notes)}")
    summaries = {name: summarize(runs, name) for name in methods if name not in skipped}
    add_ratios(summaries, FAISS)
    result = {
        "setting": {
            "embeddings": options.embeddings or "synthetic embeddings",
            "rows": rows,
            "dim": dim,
            "codebook_sizes": options.codebook_sizes,
            "threads": options.threads,
            "seeds": options.seeds,
            "repeats": options.repeats,
            "quick": options.quick,
        },
        "methods": list(summaries.values()),
        "encode": encode,
        "goals": judge(summaries, encode),
        "skipped": skipped,
        "notes": notes,
        "runs": runs,
    }
    if options.json:
        from rqsid.sid_tokenizer.files import write_json

        write_json(options.json, result)
    print(write_tables(result))
    return result


if __name__ == "__main__":
    main()
