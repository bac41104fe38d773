"""
What a trie of a hundred million SIDs costs: to build, to keep, to open and to walk; and what filters and new products cost.

    python benchmarks/trie.py
    python benchmarks/trie.py --quick

SIDs are four uniformly random codes of 1,024 each, the worst case for a prefix tree: below the second level hardly two of them
share anything. Every station runs in a process of its own. The yardsticks, in the same run and on the smaller number of SIDs,
are a dictionary of dictionaries, which is what most `prefix_allowed_tokens_fn` walk, and the trie of rectokens.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from catalog import anonymous_bytes, run_alone, small_base, timed
from measures import markdown_table

from rqsid import ProductCatalog, SIDTokenizer, SIDTrie
from rqsid.sid_tokenizer.files import write_json

NUM_LAYERS, CODES = 4, 1024
FIRST_TOKEN = 32_000
ROWS = 1024


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sids", type=int, help="100,000,000, or 1,000,000 with --quick.")
    parser.add_argument("--smaller", type=int, help="SIDs that are filtered, changed and compared: 1,000,000.")
    parser.add_argument("--threads", type=int, default=1, help="Building takes one in any case.")
    parser.add_argument("--folder", help="Where the temporary folder goes; the system's place for them if not given.")
    parser.add_argument("--quick", action="store_true", help="Fewer SIDs.")
    parser.add_argument("--json", help="File for the results.")
    options = parser.parse_args(arguments)
    options.sids = options.sids or (1_000_000 if options.quick else 100_000_000)
    options.smaller = options.smaller or min(options.sids, 200_000 if options.quick else 1_000_000)
    if options.smaller < 2000 or options.sids < options.smaller:
        parser.error("there must be at least 2,000 SIDs, and no more in the smaller trie than in the larger one.")
    if options.json and not Path(options.json).absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no such folder. Make it first.")
    return options


def make_codes(number, seed=0):
    """Distinct SIDs in lexical order, int16 of shape (about `number`, 4)."""
    keys = np.random.default_rng(seed).integers(0, CODES**NUM_LAYERS, number)
    keys.sort()
    keys = keys[np.append(True, keys[1:] != keys[:-1])]
    codes = np.empty((len(keys), NUM_LAYERS), dtype=np.int16)
    for layer in reversed(range(NUM_LAYERS)):
        codes[:, layer] = keys % CODES
        keys //= CODES
    return codes


def token_ids():
    return np.split(FIRST_TOKEN + np.arange(NUM_LAYERS * CODES), NUM_LAYERS)


def some_paths(codes, seed=1):
    rows = np.random.default_rng(seed).integers(0, len(codes), ROWS)
    return rows, torch.from_numpy(codes[rows] + np.arange(NUM_LAYERS) * CODES + FIRST_TOKEN)


def best_of(function, repeats=20):
    return min(timed(function)[1] for _ in range(repeats))


def write_codes(folder, number):
    codes = make_codes(number)
    np.save(folder / "sorted.npy", codes)
    np.save(folder / "shuffled.npy", codes[np.random.default_rng(2).permutation(len(codes))])
    return len(codes)


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def build(folder):
    """From the codes of a catalog, which come with the order of its SIDs."""
    codes = np.load(folder / "sorted.npy")
    order = np.arange(len(codes), dtype=np.int32)
    before = peak_bytes()
    trie, seconds = timed(SIDTrie.from_codes, codes, token_ids(), sid_order=order)
    peak = peak_bytes()
    _, save_seconds = timed(trie.save, folder / "trie.safetensors")
    save_peak = peak_bytes()
    nodes = torch.arange(1, 1 + ROWS)
    rows, paths = some_paths(codes)
    check(trie, paths, rows)
    return {
        "sids": trie.num_sids,
        "nodes": trie.num_nodes,
        "build_seconds": seconds,
        "arrays_gb": trie.nbytes / 1e9,
        "arrays_bytes_per_sid": trie.nbytes / trie.num_sids,
        "peak_gb": peak / 1e9,
        "peak_gb_before_building": before / 1e9,
        "save_seconds": save_seconds,
        "peak_gb_after_saving": save_peak / 1e9,
        "root_children_ms": 1e3 * best_of(lambda: trie.children(torch.tensor([0]))),
        f"children_of_{ROWS}_nodes_ms": 1e3 * best_of(lambda: trie.children(nodes, trie.level_widths[1])),
        f"walk_{ROWS}_rows_3_tokens_ms": 1e3 * best_of(lambda: trie.walk(paths[:, :3])),
        f"walk_{ROWS}_rows_4_tokens_ms": 1e3 * best_of(lambda: trie.walk(paths)),
    }


def build_with_sort(folder):
    """From codes that come in no order."""
    codes = np.load(folder / "shuffled.npy")
    trie, seconds = timed(SIDTrie.from_codes, codes, token_ids())
    peak = peak_bytes()
    rows, paths = some_paths(codes)
    check(trie, paths, rows)
    return {"build_seconds": seconds, "peak_gb": peak / 1e9}


def open_file(folder):
    rows, paths = some_paths(np.load(folder / "sorted.npy", mmap_mode="r"))
    before = anonymous_bytes()
    trie, seconds = timed(SIDTrie.load, folder / "trie.safetensors")
    _, walk_seconds = timed(check, trie, paths, rows)
    after = anonymous_bytes()
    return {
        "load_seconds": seconds,
        "first_walk_ms": 1e3 * walk_seconds,
        "file_bytes_per_sid": os.path.getsize(folder / "trie.safetensors") / trie.num_sids,
        "private_mb": None if before is None else (after - before) / 1e6,
    }


def check(trie, paths, rows):
    if (trie.sid_rows(trie.walk(paths)).numpy() != rows).any():
        sys.exit("The trie leads to wrong SIDs: this is a bug of rqsid, please report it.")


def change(number):
    """Filters, and products that come and go: a catalog with a product per SID."""
    codes = make_codes(number)
    ids = [f"B{row:09d}" for row in range(len(codes))]
    catalog = ProductCatalog.build(ids, codes, [CODES] * NUM_LAYERS)
    tokenizer = SIDTokenizer.from_base(small_base(), catalog)
    _, first_seconds = timed(SIDTrie.from_tokenizer, tokenizer)
    trie, again_seconds = timed(SIDTrie.from_tokenizer, tokenizer)
    result = {"products": len(catalog), "trie_seconds": first_seconds, "trie_again_ms": 1e3 * again_seconds}
    random = np.random.default_rng(3)
    for share in (10, 90):
        mask = random.random(len(catalog)) < share / 100
        result[f"restrict_{share}_percent_ms"] = 1e3 * best_of(lambda mask=mask: trie.restrict(mask), 5)
        found = trie.restrict(mask)._leaf_rows.sort().values.numpy()
        if (found != np.sort(catalog.sid_rows(np.flatnonzero(mask)))).any():
            sys.exit("A filter keeps wrong SIDs: this is a bug of rqsid, please report it.")
    some = [ids[row] for row in random.permutation(len(ids))[: len(ids) // 100]]
    result["restrict_to_1_percent_by_id_ms"] = 1e3 * best_of(lambda: trie.restrict(some), 3)
    filters = [trie.restrict(random.random(len(catalog)) < 0.1) for _ in range(8)]
    result["stack_8_filters_of_10_percent_ms"] = 1e3 * best_of(lambda: SIDTrie.stack(filters), 3)

    # SIDs that nobody has yet.
    new_codes = make_codes(number // 50, seed=4)
    new_codes = new_codes[catalog.find_sids(np.pad(new_codes, ((0, 0), (0, 1)), constant_values=-1)) < 0][
        : number // 100
    ]
    new_ids = pa.array([f"N{row:09d}" for row in range(len(new_codes))])
    started = time.perf_counter()
    rows = catalog.append(new_ids, new_codes)
    appended = time.perf_counter()
    trie = SIDTrie.from_tokenizer(tokenizer)
    done = time.perf_counter()
    paths = tokenizer.sid_sequences(catalog.sid_rows(rows))
    visible = bool((trie.sid_rows(trie.walk(paths)).numpy() == catalog.sid_rows(rows)).all())
    catalog.withdraw(new_ids)
    gone = bool((SIDTrie.from_tokenizer(tokenizer).walk(paths[:, :NUM_LAYERS]) < 0).all())
    return result | {
        "appended": len(new_ids),
        "append_seconds": appended - started,
        "trie_after_append_seconds": done - appended,
        "appended_searchable_seconds": done - started,
        "appended_are_found": visible,
        "withdrawn_are_gone": gone,
    }


def compare(number):
    """One set of SIDs in a SIDTrie and in what others keep; each as it comes from sorted tokens."""
    codes = make_codes(number)
    rows, paths = some_paths(codes)
    tokens = codes.astype(np.int64) + np.arange(NUM_LAYERS) * CODES + FIRST_TOKEN
    trie, seconds = timed(SIDTrie.from_codes, codes, token_ids())
    check(trie, paths, rows)
    own = {"build_seconds": seconds, "bytes": trie.nbytes, "walk_ms": 1e3 * best_of(lambda: trie.walk(paths[:, :3]))}
    result = {"rqsid SIDTrie": own}

    lists = tokens.tolist()
    before = anonymous_bytes()
    root, seconds = timed(build_dict, lists)
    after = anonymous_bytes()
    wanted = paths[:, :3].tolist()
    result["dict of dicts"] = {
        "build_seconds": seconds,
        "bytes": None if before is None else after - before,
        "walk_ms": 1e3 * best_of(lambda: [root[a][b][c] for a, b, c in wanted]),
    }
    try:
        # Of the package only this module: others want CUDA as soon as they are imported.
        from rectokens.schemas.compact_csr_trie import CompactCSRTrie
    except Exception as error:
        result["rectokens CompactCSRTrie"] = {"absent": f"{type(error).__name__}: {error}"}
        return result
    sids = torch.from_numpy(tokens - FIRST_TOKEN)
    peer, seconds = timed(CompactCSRTrie.from_sorted_batch, sids, NUM_LAYERS * CODES, 1)
    tensors = [peer.row_ptrs, peer.stacked_cols_vals, peer.dense_states, *peer.dense_mask_by_layer]
    size = sum(tensor.nbytes for tensor in tensors)
    result["rectokens CompactCSRTrie"] = {"build_seconds": seconds, "bytes": size, "walk_ms": None}
    return result


def build_dict(sids):
    root = {}
    for sid in sids:
        node = root
        for token in sid:
            node = node.setdefault(token, {})
    return root


def judge(result):
    """Goals, and whether this run met them."""
    large, small = result["build"], result["change"]
    rows = [
        ("build from a catalog's codes, s", large["build_seconds"], "<=", 30),
        ("arrays, GB", large["arrays_gb"], "<=", 1.5),
        ("peak memory, codes included, GB", large["peak_gb"], "<=", 16),
        (f"restrict {small['products']:,} to 10 %, ms", small["restrict_10_percent_ms"], "<=", 100),
        (f"restrict {small['products']:,} to 90 %, ms", small["restrict_90_percent_ms"], "<=", 100),
        (f"{small['appended']:,} appended and in the trie, s", small["appended_searchable_seconds"], "<=", 1),
        ("appended products are found", small["appended_are_found"], "is", True),
        ("withdrawn products are not", small["withdrawn_are_gone"], "is", True),
    ]
    return [
        {
            "goal": goal,
            "value": value,
            "limit": limit,
            "sign": sign,
            "met": bool(value <= limit if sign == "<=" else value),
        }
        for goal, value, sign, limit in rows
    ]


def main(arguments=None):
    options = parse_arguments(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        folder = Path(folder)
        result = {"setting": {name: getattr(options, name) for name in ("sids", "smaller", "threads", "quick")}}
        run_alone(write_codes, options.threads, folder, options.sids)
        for station in (build, build_with_sort, open_file):
            result[station.__name__] = run_alone(station, options.threads, folder)
        for station in (change, compare):
            result[station.__name__] = run_alone(station, options.threads, options.smaller)
    result["goals"] = judge(result)
    if options.json:
        write_json(options.json, result)
    print(write_tables(result))
    return result


def write_tables(result):
    def cell(value):
        return "-" if value is None else value if isinstance(value, str) else f"{value:,.4g}"

    lines = []
    titles = {
        "build": "the large trie",
        "build_with_sort": "the same, codes in no order",
        "open_file": "opening its file",
        "change": "filters and changes (the smaller catalog)",
    }
    for part, title in titles.items():
        rows = [[name.replace("_", " "), cell(value)] for name, value in result[part].items()]
        lines += [markdown_table([title, ""], rows), ""]
    ours, number, rows = result["compare"]["rqsid SIDTrie"], result["setting"]["smaller"], []
    for name, values in result["compare"].items():
        if "absent" in values:
            lines += [f"Left out: {name} ({values['absent']}).", ""]
            continue
        ratios = [
            "-" if values[key] is None else f"{values[key] / ours[key]:.2g}"
            for key in ("build_seconds", "bytes", "walk_ms")
        ]
        size = None if values["bytes"] is None else values["bytes"] / number
        rows.append([name, cell(values["build_seconds"]), cell(size), cell(values["walk_ms"]), " / ".join(ratios)])
    header = [
        f"{number:,} SIDs",
        "build, s",
        "bytes/SID",
        f"walk {ROWS} x 3, ms",
        "times rqsid's: build / bytes / walk",
    ]
    lines += [markdown_table(header, rows), ""]
    goals = [
        [goal["goal"], cell(goal["value"]), f"{goal['sign']} {goal['limit']:,}", "PASS" if goal["met"] else "MISS"]
        for goal in result["goals"]
    ]
    setting = result["setting"]
    lines += [
        f"The goals are set for 100,000,000 SIDs and 1,000,000 that change; this run had {setting['sids']:,} and "
        f"{setting['smaller']:,}, and torch had {setting['threads']} thread(s).",
        "",
    ]
    return "\n".join([*lines, markdown_table(["goal", "here", "limit", ""], goals)])


if __name__ == "__main__":
    main()
