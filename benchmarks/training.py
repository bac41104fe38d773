"""
Compares `SIDTrainer` with the stock `Trainer` of transformers on the same batches, model and loss: time, memory, and equality.

    python benchmarks/training.py --threads 1 --clock cpu
    python benchmarks/training.py --quick
    python benchmarks/training.py --layers 12 24 --prompts 256 --rows 4 --parts speed memory

Without --layers, --prompts and --rows, a choice of settings; with one of them, every combination of what is given. The model has
the shape of Qwen1.5-0.5B, random weights, and fewer layers where it is said so. Then sessions of 8 purchases, whose answers are all
learned in one pass, are compared with a row for each. On a GPU, models of two shapes in their full depth, in bfloat16. Every
setting runs in a process of its own, in which the methods take turns; memory is measured in a process per method.
"""

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from itertools import product
from pathlib import Path

import torch
from training_measures import compare, measure_memory
from training_report import judge, write_tables
from training_rows import SESSION_METHODS, SHAPES, SID, STOCK

KINDS = {"memory": "plain", "accumulating": "accumulating"}
PARTS = ("speed", *KINDS, "sessions")
# (shape, layers, prompt, rows of a batch, gradient checkpointing)
SETTINGS = [
    ("Qwen1.5-0.5B", 6, 256, 8, False),
    ("Qwen1.5-0.5B", 6, 512, 4, False),
    ("Qwen1.5-0.5B", 12, 256, 8, False),
    ("Qwen1.5-0.5B", 12, 256, 16, True),
    ("Qwen1.5-0.5B", 24, 256, 4, False),
]
GPU_SETTINGS = [
    ("Qwen1.5-0.5B", 24, 256, 32, False),
    ("Qwen1.5-0.5B", 24, 512, 16, False),
    ("Qwen1.5-0.5B", 24, 256, 32, True),
    ("Llama-2-7B", 32, 256, 8, False),
    ("Llama-2-7B", 32, 512, 4, False),
]
QUICK_SETTINGS = [("small", 2, 64, 4, False)]
# (shape, layers, tokens of the last purchase's prompt, customers of a batch, gradient checkpointing)
SESSIONS, GPU_SESSIONS = [("Qwen1.5-0.5B", 6, 256, 2, False)], [("Qwen1.5-0.5B", 24, 256, 8, False)]
QUICK_SESSIONS = [("small", 2, 128, 2, False)]
NAMES = ("shape", "layers", "prompt", "rows", "checkpointing")
# Dense bfloat16 on tensor cores, from the makers' data sheets (SXM boards).
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989}


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", help="Layers of the model, such as 6 24.")
    parser.add_argument("--prompts", type=int, nargs="+", help="Tokens of a prompt, such as 256 512.")
    parser.add_argument("--rows", type=int, nargs="+", help="Rows of a batch; of sessions, customers.")
    parser.add_argument("--checkpointing", action="store_true", help="With gradient checkpointing.")
    parser.add_argument("--shape", choices=SHAPES, help="Of the model; Qwen1.5-0.5B, or small with --quick.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="What to measure; all if not given.")
    parser.add_argument("--steps", type=int, default=1, help="Steps of a turn that count; one before does not.")
    parser.add_argument("--repeats", type=int, default=1, help="Turns of each method.")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="What ratios are ratios of.")
    parser.add_argument("--peak_tflops", type=float, help="Of the GPU in bfloat16, for model-FLOPs utilisation.")
    parser.add_argument("--quick", action="store_true", help="A small model. No basis for judgement.")
    parser.add_argument("--json", help="File for the results.")
    options = parser.parse_args(arguments)
    if options.json and not Path(options.json).absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no such folder. Make it first.")
    numbers = [options.steps, options.repeats, options.threads]
    numbers += (options.layers or []) + (options.prompts or []) + (options.rows or [])
    if min(numbers) < 1:
        parser.error("Layers, prompts, rows, steps, repeats and threads must be at least 1.")
    if torch.cuda.is_available() and options.clock == "cpu":
        parser.error("--clock cpu: a GPU's time is not the processor's. Leave it at wall.")
    on_gpu = torch.cuda.is_available()
    options.settings = QUICK_SETTINGS if options.quick else GPU_SETTINGS if on_gpu else SETTINGS
    options.sessions = QUICK_SESSIONS if options.quick else GPU_SESSIONS if on_gpu else SESSIONS
    if options.layers or options.prompts or options.rows or options.shape or options.checkpointing:
        shape, layers, prompt, rows, _ = options.settings[0]
        if options.shape:
            shape, layers = options.shape, SHAPES[options.shape]["num_hidden_layers"]
        grid = ([shape], options.layers or [layers], options.prompts or [prompt], options.rows or [rows])
        options.settings = options.sessions = list(product(*grid, [options.checkpointing]))
    if max(setting[2] for setting in options.settings) > 4000:
        parser.error("--prompts: 4,000 tokens at most.")
    return options


def run_alone(function, threads, *arguments):
    """In a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=torch.set_num_threads, initargs=[threads]) as pool:
        return pool.submit(function, *arguments).result()


def main(arguments=None):
    options = parse_arguments(arguments)
    settings = [dict(zip(NAMES, setting, strict=True)) for setting in options.settings]
    session_settings = [dict(zip(NAMES, setting, strict=True)) for setting in options.sessions]
    runs, memory, sessions = [], [], []
    for setting in settings if "speed" in options.parts else ():
        methods = run_alone(compare, options.threads, setting, (STOCK, SID), options.steps, options.repeats)
        runs.append(setting | {"methods": methods})
        say(f"timed: {setting}")
    kinds = [kind for part, kind in KINDS.items() if part in options.parts]
    for setting in settings if kinds else ():
        peaks = {
            method: {kind: run_alone(measure_memory, options.threads, method, setting, kind) for kind in kinds}
            for method in (STOCK, SID)
        }
        memory.append(setting | {"methods": peaks})
        say(f"memory: {setting} {peaks}")
    for setting in session_settings if "sessions" in options.parts else ():
        methods = run_alone(compare, options.threads, setting, SESSION_METHODS, options.steps, options.repeats)
        sessions.append(setting | {"methods": methods})
        say(f"sessions: {setting}")

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    peak = options.peak_tflops or next((peak for name, peak in PEAK_TFLOPS.items() if name in device), None)
    result = {
        "setting": {name: getattr(options, name) for name in ("steps", "repeats", "threads", "clock", "quick")}
        | {"device": device, "peak_tflops": peak, "shapes": SHAPES}
        | {"versions": {name: version(name) for name in ("torch", "transformers")}},
        "runs": runs,
        "memory": memory,
        "sessions": sessions,
        "goals": judge(runs, memory, sessions, options.clock),
    }
    if options.json:
        from rqsid.sid_tokenizer.files import write_json

        write_json(options.json, result)
    print(write_tables(result))
    return result


def say(line):
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
