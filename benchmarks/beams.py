"""
How many beams a search needs: the share of the exact best SIDs that it finds, over the number of beams.

    python benchmarks/beams.py
    python benchmarks/beams.py --quick

A small Llama is trained on synthetic purchases, so that its probabilities are as uneven as those of a model in use. Products
are embeddings in clusters of Zipf-like sizes, their SIDs those of a `ResidualQuantizer`, once pruned to varying length and once
not; a user buys what is near to what was bought before, popular products first. What is exact comes from brute force, with
which a search as wide as the trie is compared on a few prompts. The warning at the end is `generate()` with its default length penalty.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from measures import markdown_table
from purchases import (
    NUM_LAYERS,
    make_product_tokenizer,
    make_products,
    make_prompts,
    make_purchases,
    share_found,
    train,
)
from search_measures import score_all, widest_level
from search_peers import generate
from transformers import LogitsProcessorList
from transformers.utils import logging

from rqsid import (
    SIDLogitsProcessor,
    SIDTrie,
    sid_generation_config,
)
from rqsid.modeling import beam_search

TOP_KS = (10, 50, 100)
WIDTHS = (1, 2, 3, 5, 10)


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", type=int, help="5,000, or 1,500 with --quick.")
    parser.add_argument("--codebook_size", type=int, default=64)
    parser.add_argument("--steps", type=int, help="Training steps of 128 purchases; 300, or 40 with --quick.")
    parser.add_argument("--prompts", type=int, help="Prompts that are searched; 100, or 20 with --quick.")
    parser.add_argument("--generate_prompts", type=int, help="Prompts given to generate(); 40, or 4 with --quick.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count()))
    parser.add_argument("--quick", action="store_true", help="Less of everything. No basis for judgement.")
    parser.add_argument("--json", help="File for the results.")
    options = parser.parse_args(arguments)
    for name, full, quick in (
        ("products", 5000, 1500),
        ("steps", 300, 40),
        ("prompts", 100, 20),
        ("generate_prompts", 40, 4),
    ):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    if min(options.products, options.steps, options.prompts, options.threads) < 1 or options.generate_prompts < 0:
        parser.error("--products, --steps, --prompts and --threads must be at least 1, --generate_prompts at least 0.")
    if options.json and not Path(options.json).absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no such folder. Make it first.")
    return options


def search_all(model, prompts, trie, num_beams, num_return, batch_size):
    """Sorted SID rows of all prompts, -1 where there are no more. Shape: (B, num_return)."""
    parts = []
    for ids, mask in zip(prompts[0].split(batch_size), prompts[1].split(batch_size), strict=True):
        parts.append(beam_search(model, ids, mask, trie, num_beams, num_return)[0])
    return torch.cat(parts)


def interval(shares, seed=0):
    """Mean over prompts and its 95 % bootstrap interval."""
    draws = np.random.default_rng(seed).integers(0, len(shares), (2000, len(shares)))
    low, high = np.quantile(shares[draws].mean(axis=1), [0.025, 0.975])
    return {"mean": float(shares.mean()), "low": float(low), "high": float(high)}


def recall_curve(model, prompts, trie, exact):
    """For each top_k and number of beams the share of the exact top_k that is found."""
    top_ks = [top_k for top_k in TOP_KS if top_k <= trie.num_sids]
    curve, found = [], {}
    for top_k in top_ks:
        for width in WIDTHS:
            num_beams = top_k * width
            if num_beams not in found:
                # One search serves all lists: a longer one begins with the shorter.
                num_return = min(max(TOP_KS), trie.num_sids)
                found[num_beams] = search_all(model, prompts, trie, num_beams, num_return, max(1, 800 // num_beams))
            shares = share_found(found[num_beams][:, :top_k], exact[:, :top_k])
            curve.append({"top_k": top_k, "width": width, "num_beams": num_beams} | interval(shares))
    return curve


def check_exact(model, prompts, trie, scores, exact):
    """Whether a search that leaves no beam out finds what brute force found best, and the largest difference of scores."""
    worst, least = 0.0, 1.0
    for ids, mask, prompt_scores, best in zip(*prompts, scores, exact, strict=True):
        ids = ids[mask.bool()][None]
        found, found_scores = beam_search(model, ids, torch.ones_like(ids), trie, widest_level(trie), len(best))
        worst = max(worst, (prompt_scores[found[0]] - found_scores[0]).abs().max().item())
        least = min(least, torch.isin(best, found[0]).float().mean().item())
    return {"score_difference": worst, "same_sids": least}


def generate_with(model, tokenizer, trie, prompts, num_beams, length_penalty):
    """What `generate()` returns, best first. Shape: (B, num_beams)."""
    found = []
    for ids, mask in zip(*prompts, strict=True):
        prompt = ids[mask.bool()].tolist()
        config = sid_generation_config(model, tokenizer, num_beams=num_beams, num_return_sequences=num_beams)
        config.length_penalty = length_penalty
        processors = LogitsProcessorList([SIDLogitsProcessor(tokenizer, len(prompt), trie=trie)])
        found.append(generate(model, tokenizer, trie, prompt, config, False, logits_processor=processors)[0])
    return torch.stack(found)


def measure(name, embeddings, codes, pruning, options):
    """Trains a model for one catalog and measures the curves of it."""
    tokenizer = make_product_tokenizer(codes, options.codebook_size, pruning)
    lengths = (tokenizer.sid_sequences() >= 0).sum(dim=1)
    purchases = make_purchases(embeddings, options.steps * 128, seed=options.seed)
    started = time.perf_counter()
    model, loss = train(tokenizer, purchases, options.steps, seed=options.seed)
    say(f"{name}: trained in {time.perf_counter() - started:.0f} s, loss {loss:.3f}")
    # Other users, of the same kind.
    histories = make_purchases(embeddings, options.prompts, seed=options.seed + 10_000)[:, :-1]
    prompts = make_prompts(tokenizer, histories)

    sequences = tokenizer.sid_sequences()
    scores = torch.stack(
        [
            score_all(model, ids[mask.bool()].tolist(), sequences, chunk_rows=1024)
            for ids, mask in zip(*prompts, strict=True)
        ]
    )
    say(f"{name}: {len(sequences)} SIDs scored for each prompt after {time.perf_counter() - started:.0f} s")

    in_stock = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(options.seed))
    in_stock = in_stock[: max(len(sequences) // 10, 1)]
    results = {}
    for suffix, allowed in (("", torch.arange(len(sequences))), (", 10 % allowed", in_stock)):
        trie = SIDTrie.from_tokenizer(tokenizer, allowed)
        exact = allowed[scores[:, allowed].topk(min(max(TOP_KS), len(allowed)), dim=1).indices]
        few = tuple(part[:3] for part in prompts)
        results[name + suffix] = {
            "sids": trie.num_sids,
            "share_by_length": {int(length): (lengths == length).float().mean().item() for length in lengths.unique()},
            "loss": loss,
            "exact_search": check_exact(model, few, trie, scores[:3], exact[:3]),
            "curve": recall_curve(model, prompts, trie, exact),
        }
        if suffix == "" and options.generate_prompts:
            some = tuple(part[: options.generate_prompts] for part in prompts)
            best = exact[: options.generate_prompts, :10]
            results[name]["generate"] = {
                str(penalty): interval(
                    share_found(generate_with(model, tokenizer, trie, some, 50, penalty)[:, :10], best)
                )
                for penalty in (0.0, 1.0)
            }
            found = search_all(model, some, trie, 50, 10, 16)
            results[name]["generate"]["search"] = interval(share_found(found, best))
        say(f"{name}{suffix}: measured after {time.perf_counter() - started:.0f} s")
    return results


def main(arguments=None):
    options = parse_arguments(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    try:
        embeddings, codes, pruning = make_products(options.products, options.codebook_size, options.seed)
        measured = measure("varying length", embeddings, codes, pruning, options)
        measured |= measure("fixed length", embeddings, codes, None, options)
    finally:
        torch.set_num_threads(threads)
    names = ("products", "codebook_size", "steps", "prompts", "generate_prompts", "seed", "threads", "quick")
    result = {"setting": {name: getattr(options, name) for name in names}, "catalogs": measured}
    if options.json:
        from rqsid.sid_tokenizer.files import write_json

        write_json(options.json, result)
    print(write_tables(result))
    return result


def say(line):
    print(line, file=sys.stderr, flush=True)


def write_tables(result):
    def cell(value):
        return f"{value['mean']:.3f} ({value['low']:.3f}-{value['high']:.3f})"

    setting = result["setting"]
    lines = [
        f"{setting['products']:,} products, {NUM_LAYERS} layers of {setting['codebook_size']} codes, Llama of 2 layers x 128 "
        f"after {setting['steps']} steps, {setting['prompts']} prompts, seed {setting['seed']}.",
        *(["--quick: less of everything. No basis for judgement."] if setting["quick"] else []),
        "",
    ]
    rows, warnings, widths = [], [], {}
    for name, catalog in result["catalogs"].items():
        checked = catalog["exact_search"]
        lengths = ", ".join(f"{share:.0%} of {length} tokens" for length, share in catalog["share_by_length"].items())
        lines.append(
            f"{name}: {catalog['sids']:,} SIDs ({lengths} in the catalog); a search that leaves no beam out finds "
            f"{checked['same_sids']:.1%} of the best on 3 prompts, with scores that differ by {checked['score_difference']:.1e} "
            "at most."
        )
        for point in catalog["curve"]:
            widths.setdefault((name, point["top_k"]), []).append(point)
        if "generate" in catalog:
            values = catalog["generate"]
            warnings.append([name, *(cell(values[key]) for key in ("search", "0.0", "1.0"))])
    for (name, top_k), points in widths.items():
        rows.append([name, str(top_k), *(cell(point) for point in points)])
    if warnings:
        lines += [
            "",
            f"Share of the exact best 10 found with 50 beams, on {setting['generate_prompts']} prompts:",
            "",
            markdown_table(
                ["catalog", "search", "generate, length penalty 0", "generate, its default of 1"], warnings
            ),
        ]
    lines += [
        "",
        "Share of the exact best top_k SIDs that a search finds, by num_beams / top_k; mean over prompts and 95 % bootstrap "
        "interval.",
        "",
    ]
    return "\n".join([*lines, markdown_table(["catalog", "top_k", *(f"{width}x" for width in WIDTHS)], rows)])


if __name__ == "__main__":
    main()
