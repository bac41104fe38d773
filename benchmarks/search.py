"""
Compares `search` with what others do to get the best SIDs of a prompt out of `generate()`: time, memory, and equality.

    python benchmarks/search.py
    python benchmarks/search.py --quick
    python benchmarks/search.py --prompts 64 256 --beams 50 --vocabularies 152000 --sids 1000000

Without any of the last four options, a choice of settings; with one of them, every combination of what is given. The model is
a Llama with random weights, the SIDs have one length, so that all methods must return the same; catalogs of varying length,
where `generate()` itself loses SIDs, are compared with brute force on the side. Every setting runs in a process of its own, in
which the methods take turns; memory is measured in a process per method.
"""

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from measures import memory_mib, reset_peak_memory
from purchases import make_product_tokenizer, make_products, make_prompts, make_purchases, train
from search_measures import (
    compare,
    make_codes,
    make_limit,
    make_model,
    make_prompt,
    make_tokenizer,
    overhead_of,
    phases_of,
    plain_scores,
    score_all,
    take_turns,
    trimmed_memory,
    widest_level,
)
from search_peers import DICTIONARY, METHODS, PROCESSOR, SID, VOCAB, WITH_END
from search_report import judge, write_tables
from transformers.utils import logging

from rqsid import SIDTrie
from rqsid.modeling import beam_search

# (vocabulary, SIDs, prompt, beams). The goals are about 50 beams, prompts of 256 and 512 and 100,000 SIDs.
SETTINGS = [
    *[(vocabulary, 100_000, prompt, 50) for vocabulary in (32_000, 152_000) for prompt in (64, 256, 512)],
    *[(32_000, 100_000, 256, beams) for beams in (20, 200)],
    *[(vocabulary, 1_000_000, 256, 50) for vocabulary in (32_000, 152_000)],
]
QUICK_SETTINGS = [(32_000, 100_000, 64, 20)]
GRID = {"vocabularies": 32_000, "sids": 100_000, "prompts": 256, "beams": 50}


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", help="Tokens of the prompt, such as 64 256 512.")
    parser.add_argument("--beams", type=int, nargs="+", help="Beams, and SIDs returned, such as 20 50 200.")
    parser.add_argument("--vocabularies", type=int, nargs="+", help="Tokens, those of SIDs included: 32000 152000.")
    parser.add_argument("--sids", type=int, nargs="+", help="SIDs of the catalog, such as 100000 1000000.")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="Names, or parts of names; see search_peers.py.")
    parser.add_argument("--repeats", type=int, help="Rounds that count; 2, or 1 with --quick.")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="What ratios are ratios of.")
    parser.add_argument("--model_layers", type=int, default=6)
    parser.add_argument("--hidden_size", type=int, default=384, help="A multiple of 64, the size of a head.")
    parser.add_argument("--sid_length", type=int, default=4)
    parser.add_argument("--codebook_size", type=int, default=1024)
    parser.add_argument("--varying", type=int, nargs=4, metavar="N", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="A small setting. No basis for judgement.")
    parser.add_argument("--json", help="File for the results.")
    options = parser.parse_args(arguments)
    options.repeats = options.repeats or (1 if options.quick else 2)
    if options.json and not Path(options.json).absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no such folder. Make it first.")
    if (
        options.hidden_size % 64
        or min(options.hidden_size, options.model_layers, options.repeats, options.threads) < 1
    ):
        parser.error("--hidden_size must be a multiple of 64, layers, repeats and threads at least 1.")
    options.settings = QUICK_SETTINGS if options.quick else SETTINGS
    if any(getattr(options, name) for name in GRID):
        axes = [getattr(options, name) or [default] for name, default in GRID.items()]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(GRID))
        options.settings = [tuple(setting) for setting in grid.tolist()]
    for vocabulary, sids, prompt, beams in options.settings:
        room = options.codebook_size**options.sid_length
        if vocabulary < options.codebook_size * options.sid_length + 100 or sids > room // 4:
            parser.error(
                f"a vocabulary of {vocabulary} with {sids} SIDs: {options.sid_length} layers of {options.codebook_size} "
                f"codes need {options.codebook_size * options.sid_length + 100} tokens and name {room // 4} SIDs at most."
            )
        if beams > min(options.codebook_size, sids) or min(prompt, beams) < 1:
            parser.error(f"{beams} beams: at least 1, and no more than the codes of the first layer or the SIDs.")
    return options


def load(vocabulary, num_sids, options):
    logging.set_verbosity_error()
    codes = make_codes(num_sids, options.sid_length, options.codebook_size)
    tokenizer = make_tokenizer(vocabulary, codes, options.codebook_size)
    return tokenizer, make_model(vocabulary, options)


def time_settings(vocabulary, num_sids, settings, methods, options):
    """All prompts and numbers of beams for one model and catalog. Returns a run per setting."""
    tokenizer, model = load(vocabulary, num_sids, options)
    constraints = {name: METHODS[name][0](tokenizer) for name in methods}
    sid_vocabulary = torch.cat([tokenizer.sid_vocabulary(), torch.tensor([tokenizer.eos_token_id])])
    runs = []
    for prompt_length, num_beams in settings:
        prompt = make_prompt(tokenizer, prompt_length)
        calls, results = {}, {}
        # The round that does not count: it brings memory in, and keeps scores.
        for name in methods:
            arguments = (model, tokenizer, constraints[name], prompt, num_beams)
            calls[name] = partial(METHODS[name][1], *arguments, with_scores=False)
            results[name] = METHODS[name][1](*arguments, with_scores=True)
        limits = {}
        for name in methods:
            if name in (VOCAB, SID):
                rows = None if name == VOCAB else sid_vocabulary
                limits[name] = make_limit(model, prompt, num_beams, options.sid_length, rows)
                limits[name]()
        times = take_turns(calls | {(name, "limit"): limit for name, limit in limits.items()}, options.repeats)
        run = {
            "vocabulary": vocabulary,
            "sids": num_sids,
            "prompt": prompt_length,
            "beams": num_beams,
            "seconds": {name: times[name] for name in methods},
            "equality": {},
            "limit": {},
            "phases": {},
        }
        for name in methods:
            if name not in (VOCAB, SID, WITH_END) and VOCAB in results:
                run["equality"][name] = compare(results[VOCAB], results[name])
            if name in limits:
                overhead = overhead_of(calls[name], limits[name], 3 if options.quick else 9)
                run["limit"][name] = {"seconds": times[name, "limit"], "overhead": overhead}
                run["phases"][name] = phases_of(calls[name])
        runs.append(run)
    return runs


def measure_memory(vocabulary, num_sids, prompt_length, num_beams, name, options):
    """Peak extra memory of one prompt, and what the method keeps of the catalog."""
    tokenizer, model = load(vocabulary, num_sids, options)
    prepare, run, _ = METHODS[name]
    before = trimmed_memory()
    constraint = prepare(tokenizer)
    kept = trimmed_memory()
    # Whatever is imported or set up at the first call is not the prompt's.
    run(model, tokenizer, constraint, make_prompt(tokenizer, 4), 2, with_scores=False)
    ready = trimmed_memory()
    if ready is None:
        return None
    reset_peak_memory()
    run(model, tokenizer, constraint, make_prompt(tokenizer, prompt_length), num_beams, with_scores=False)
    return {"peak_mib": memory_mib("VmHWM") - ready, "constraint_mib": kept - before}


def compare_at_varying_length(num_products, num_beams, num_prompts, steps):
    """
    Search and `generate()` against brute force where SIDs are pruned to varying length. The model is trained: one of random
    weights gives a SID of fewer tokens the higher probability, whatever it is.

    Returns:
        `dict`: means over prompts, and the largest errors.
    """
    logging.set_verbosity_error()
    embeddings, codes, pruning = make_products(num_products, codebook_size=64)
    tokenizer = make_product_tokenizer(codes, 64, pruning)
    model, loss = train(tokenizer, make_purchases(embeddings, steps * 128), steps)
    histories = make_purchases(embeddings, num_prompts, seed=10_000)[:, :-1]
    trie, sequences, top_k = SIDTrie.from_tokenizer(tokenizer), tokenizer.sid_sequences(), max(1, num_beams // 5)
    lengths = (sequences >= 0).sum(dim=1)
    rows = []
    for ids, mask in zip(*make_prompts(tokenizer, histories), strict=True):
        ids = ids[mask.bool()]
        exact = score_all(model, ids.tolist(), sequences)
        sample = exact.topk(20).indices
        found = {"generate": METHODS[PROCESSOR][1](model, tokenizer, trie, ids.tolist(), num_beams, with_scores=True)}
        for name, width, count in (
            ("search", num_beams, num_beams),
            ("wide_search", widest_level(trie), len(sequences)),
        ):
            sid_rows, scores = beam_search(model, ids[None], torch.ones_like(ids)[None], trie, width, count)
            found[name] = sid_rows[0], scores[0]
        found = {name: (sid_rows[sid_rows >= 0], scores[sid_rows >= 0]) for name, (sid_rows, scores) in found.items()}
        best, all_best = (exact.topk(count).indices for count in (top_k, num_beams))
        row = {
            "brute_force_error": (plain_scores(model, ids.tolist(), sequences[sample]) - exact[sample])
            .abs()
            .max()
            .item(),
            "search_in_generate": torch.isin(found["generate"][0], found["search"][0]).float().mean().item(),
            "wide_search_complete": float(
                torch.equal(found["wide_search"][0].sort().values, torch.arange(len(exact)))
            ),
            "short_exact": (lengths[all_best] < trie.depth).float().mean().item(),
        }
        for name, (sid_rows, scores) in found.items():
            row[f"{name}_score_error"] = (exact[sid_rows] - scores).abs().max().item()
            row[f"{name}_top_found"] = torch.isin(best, sid_rows[:top_k]).float().mean().item()
            row[f"{name}_beams_found"] = torch.isin(all_best, sid_rows[:num_beams]).float().mean().item()
            row[f"short_{name}"] = (lengths[sid_rows[:num_beams]] < trie.depth).float().mean().item()
        rows.append(row)
    means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    worst = {key: max(row[key] for row in rows) for key in rows[0] if key.endswith("error")}
    share = (lengths < trie.depth).float().mean().item()
    setting = {"sids": len(sequences), "short_share": share, "beams": num_beams, "top_k": top_k}
    return setting | {"prompts": num_prompts, "steps": steps, "loss": loss} | means | worst


def run_alone(function, threads, *arguments):
    """In a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=torch.set_num_threads, initargs=[threads]) as pool:
        return pool.submit(function, *arguments).result()


def choose_methods(names):
    """The methods asked for, and why others are left out."""
    chosen = [name for name in METHODS if name != WITH_END]
    if names:
        unknown = [part for part in names if not any(part in name for name in METHODS)]
        if unknown:
            sys.exit(f"--methods {' '.join(unknown)}: no method of this name. There are: {'; '.join(METHODS)}.")
        # A whole name stands for itself alone: one is part of another.
        whole = [part for part in names if part in METHODS]
        chosen = [
            name for name in METHODS if name in whole or any(part in name for part in names if part not in whole)
        ]
    skipped = {name: METHODS[name][2]() for name in chosen}
    return [name for name in chosen if skipped[name] is None], {
        name: why for name, why in skipped.items() if why is not None
    }


def main(arguments=None):
    options = parse_arguments(arguments)
    methods, skipped = choose_methods(options.methods)
    if not methods:
        sys.exit(f"None of the methods can run: {skipped}")
    notes = [f"Left out: {name} ({why})." for name, why in skipped.items()]
    if options.quick:
        notes.append("--quick: small settings and one round. No basis for judgement.")

    runs, memory = [], []
    for vocabulary, sids in dict.fromkeys(setting[:2] for setting in options.settings):
        settings = [setting[2:] for setting in options.settings if setting[:2] == (vocabulary, sids)]
        arguments = (vocabulary, sids, settings, methods, options)
        runs += run_alone(time_settings, options.threads, *arguments)
        say(f"timed: {vocabulary:,} tokens, {sids:,} SIDs, prompts and beams {settings}")
    # Of each model one setting, nearest to what the goals are about.
    for vocabulary in dict.fromkeys(setting[0] for setting in options.settings):
        settings = [setting for setting in options.settings if setting[0] == vocabulary]
        setting = min(settings, key=lambda setting: (abs(setting[2] - 256), abs(setting[3] - 50), setting[1]))
        # A process takes seconds to start, so --quick has only the two that are compared.
        measured = [name for name in methods if not options.quick or name in (VOCAB, DICTIONARY)]
        peaks = {name: run_alone(measure_memory, options.threads, *setting, name, options) for name in measured}
        names = ("vocabulary", "sids", "prompt", "beams")
        memory.append(dict(zip(names, setting, strict=True)) | {"methods": peaks})
        say(f"memory: {setting}")
    # (products, beams, prompts, training steps)
    varying = (1000, 20, 3, 30) if options.quick else (5000, 50, 20, 200)
    varying_length = run_alone(compare_at_varying_length, options.threads, *(options.varying or varying))
    say("SIDs of varying length compared")

    names = ("repeats", "threads", "clock", "model_layers", "hidden_size", "sid_length", "codebook_size", "quick")
    versions = {name: version(name) for name in ("torch", "transformers")}
    if any("rectokens" in name for name in methods):
        versions["rectokens"] = version("rectokens")
    result = {
        "setting": {name: getattr(options, name) for name in names} | {"versions": versions},
        "runs": runs,
        "memory": memory,
        "varying_length": varying_length,
        "goals": judge(runs, memory, options.clock),
        "skipped": skipped,
        "notes": notes,
    }
    if options.json:
        from rqsid.sid_tokenizer.files import write_json

        write_json(options.json, result)
    print(write_tables(result, methods))
    return result


def say(line):
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
