"""
What a catalog of ten million products costs: to build, to open, to ask, to change and to keep.

    python benchmarks/catalog.py
    python benchmarks/catalog.py --quick

Ids are 12 to 20 characters; codes are synthetic, with Zipf-like frequencies in every layer, so that many products share SIDs.
Every station that is measured for memory runs in a process of its own, which has imported everything before it starts to
measure. Private memory is RssAnon of /proc/self/status: what the process holds beside mapped files, whose pages the system may
drop at any time. What was just written lies in the page cache, so that disks are hardly measured.

The yardsticks, in the same run and on the smaller catalog: a Python `dict` from id to SID, `pyarrow.compute.index_in`, and the
`index.json` of LC-Rec and its descendants read with `json.load`.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

# Arrow's own allocator keeps what is freed, which would be taken for memory that a catalog reuses.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from measures import markdown_table, memory_mib
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rqsid import ProductCatalog, ResidualQuantizer, ResidualQuantizerConfig, SIDTokenizer, SIDTrie
from rqsid.sid_tokenizer.catalog_columns import COLUMNS
from rqsid.sid_tokenizer.files import write_json
from rqsid.sid_tokenizer.pruning_sweep import sweep

SIZES = [1024, 1024, 1024]
CATALOG_FILE = "sid_catalog.safetensors"


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", type=int, help="10,000,000, or 500,000 with --quick.")
    parser.add_argument("--smaller", type=int, help="The catalog that changes: 1,000,000, or 100,000 with --quick.")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", help="Where the temporary folder goes; the system's place for them if not given.")
    parser.add_argument("--quick", action="store_true", help="Fewer products.")
    parser.add_argument("--json", help="File for the results.")
    options = parser.parse_args(arguments)
    options.products = options.products or (500_000 if options.quick else 10_000_000)
    options.smaller = options.smaller or (100_000 if options.quick else 1_000_000)
    if options.smaller < 1000 or options.products < options.smaller:
        parser.error(
            "there must be at least 1,000 products, and no more in the smaller catalog than in the larger one."
        )
    if options.json and not Path(options.json).absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no such folder. Make it first.")
    return options


def make_products(first, number, seed):
    """Ids as an Arrow array, codes [number, 3] and popularities of products `first`, `first` + 1, …"""
    random = np.random.default_rng(seed)
    numbers = pa.array(np.arange(first, first + number)).cast(pa.string())
    tails = pa.array(random.integers(0, 10**8, number)).cast(pa.string())
    ids = pc.binary_join_element_wise("B", pc.utf8_lpad(numbers, 9, "0"), "-", tails, "")
    # The k-th code with a share of about 1 / sqrt(k), in an order of each layer's own.
    codes = np.empty((number, len(SIZES)), dtype=np.int32)
    for layer, size in enumerate(SIZES):
        ranks = np.minimum((random.random(number) ** 2 * size).astype(np.int32), size - 1)
        codes[:, layer] = np.random.default_rng(layer).permutation(size)[ranks]
    return ids, codes, random.zipf(1.5, number).clip(max=10**6).astype(np.float64)


def timed(function, *arguments, **options):
    started = time.perf_counter()
    value = function(*arguments, **options)
    return value, time.perf_counter() - started


def anonymous_bytes():
    """Private memory in use, without what was freed and not yet given back; `None` where the system does not tell."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    mebibytes = memory_mib("RssAnon")
    return None if mebibytes is None else mebibytes * 2**20


def build(path, products):
    """Builds and saves the large catalog."""
    ids, codes, popularity = make_products(0, products, seed=0)
    before = anonymous_bytes()
    catalog, seconds = timed(ProductCatalog.build, ids, codes, SIZES, popularity=popularity)
    _, save_seconds = timed(catalog.save, path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    loaded = ProductCatalog.load(path)
    equal = all(np.array_equal(catalog.columns[name], loaded.columns[name]) for name in COLUMNS)
    return {
        "products": products,
        "sids": catalog.num_sids,
        "build_seconds": seconds,
        "save_seconds": save_seconds,
        "file_bytes_per_product": os.path.getsize(path) / products,
        "build_peak_bytes_per_product": None if before is None else (peak - before) / products,
        "reloaded_equal": equal,
    }


def look_up(path, products):
    """Opens the large catalog and asks for a million products, in random order, from strings and back."""
    number = min(products, 1_000_000)
    wanted_rows = np.random.default_rng(1).integers(0, products, number)
    ids, codes = make_products(0, products, seed=0)[:2]
    ids, codes = ids.take(pa.array(wanted_rows)), codes[wanted_rows]
    wanted = ids.to_pylist()
    before = anonymous_bytes()
    catalog, open_seconds = timed(ProductCatalog.load, path)
    opened = anonymous_bytes()
    rows, first_seconds = timed(catalog.product_rows, wanted)
    seconds = min(timed(catalog.product_rows, wanted)[1] for _ in range(3))
    _, arrow_seconds = timed(catalog.product_rows, ids)
    sid_rows, sid_seconds = timed(catalog.sid_rows, rows)
    sids = catalog.sid_codes[sid_rows]
    back, back_seconds = timed(catalog.product_ids, rows)
    _, find_seconds = timed(catalog.find_sids, sids)
    if (rows != wanted_rows).any() or back != wanted or (sids[:, :-1] != codes).any():
        sys.exit("Look-ups gave wrong products: this is a bug of rqsid, please report it.")
    del back, sids, rows, sid_rows
    used = anonymous_bytes()
    return {
        "open_seconds": open_seconds,
        "private_bytes_per_product_opened": None if before is None else (opened - before) / products,
        "private_bytes_per_product_used": None if before is None else (used - before) / products,
        "ids_per_second_first": number / first_seconds,
        "ids_per_second": number / seconds,
        "ids_per_second_arrow": number / arrow_seconds,
        "sid_rows_per_second": number / sid_seconds,
        "rows_to_ids_per_second": number / back_seconds,
        "find_sids_per_second_first": number / find_seconds,
    }


def open_bundle(folder, products):
    """Opens a tokenizer with the large catalog: all files are compared with the hashes in the manifest."""
    catalog = ProductCatalog.load(folder / CATALOG_FILE)
    tokenizer = SIDTokenizer.from_base(small_base(), catalog)
    _, first_seconds = timed(tokenizer.save_pretrained, folder / "bundle")
    _, linked_seconds = timed(tokenizer.save_pretrained, folder / "checkpoint-1")
    names = [folder / CATALOG_FILE, folder / "bundle" / CATALOG_FILE, folder / "checkpoint-1" / CATALOG_FILE]
    _, seconds = timed(SIDTokenizer.from_pretrained, folder / "bundle")
    _, copy_seconds = timed(shutil.copyfile, names[0], folder / "copy")
    return {
        "bundle_open_seconds": seconds,
        "first_checkpoint_seconds": first_seconds,
        "next_checkpoint_seconds": linked_seconds,
        "copy_seconds": copy_seconds,
        "linked": len({os.stat(name).st_ino for name in names}) == 1,
    }


def change(path, products):
    """Appends to, withdraws from and searches in the smaller catalog, and prunes its codes."""
    ids, codes, popularity = make_products(0, products, seed=0)
    catalog, build_seconds = timed(ProductCatalog.build, ids, codes, SIZES, popularity=popularity)
    catalog.save(path)
    catalog = ProductCatalog.load(path)
    number = max(100, products // 100)
    new_ids, new_codes, new_popularity = make_products(products, number, seed=1)
    before = catalog.sid_codes.copy(), catalog.sid_rows(np.arange(products))
    rows, append_seconds = timed(catalog.append, new_ids, new_codes, new_popularity)
    if (before[0] != catalog.sid_codes[: len(before[0])]).any() or (
        before[1] != catalog.sid_rows(np.arange(products))
    ).any():
        sys.exit("Appending moved products: this is a bug of rqsid, please report it.")
    tokenizer = SIDTokenizer.from_base(small_base(), catalog)
    trie, trie_seconds = timed(SIDTrie.from_tokenizer, tokenizer)
    found = trie.sid_rows(trie.walk(tokenizer.sid_sequences(catalog.sid_rows(rows)))).numpy()
    products_found = catalog.expand_sids(found[:, None], catalog.collision_report().largest_group)[0]
    visible = bool((products_found == rows[:, None]).any(1).all())
    gone = catalog.product_ids(rows[: number // 2])
    _, withdraw_seconds = timed(catalog.withdraw, gone)
    _, popularity_seconds = timed(catalog.update_popularity, new_ids.to_pylist(), np.arange(number))
    _, save_seconds = timed(catalog.save, path)
    _, version_seconds = timed(ProductCatalog.load, path, version=1)
    _, suffix_seconds = timed(ProductCatalog.build, ids, codes, SIZES, popularity=popularity, collisions="suffix")
    curve, sweep_seconds = timed(sweep, codes, SIZES, layer=1, weights=popularity)
    quantizer = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=SIZES, preset="fast", num_iterations=1))
    quantizer.fit(np.random.default_rng(0).standard_normal((20_000, 32), dtype=np.float32))
    moved, reassign_seconds = timed(
        ProductCatalog.build, ids, codes, SIZES, popularity=popularity, collisions="reassign", quantizer=quantizer
    )
    return {
        "products": products,
        "colliding_products": catalog.collision_report().colliding_products,
        "build_seconds": build_seconds,
        "appended": number,
        "append_seconds": append_seconds,
        "trie_seconds": trie_seconds,
        "appended_are_visible": visible,
        "withdraw_seconds": withdraw_seconds,
        "update_popularity_seconds": popularity_seconds,
        "save_seconds": save_seconds,
        "open_old_version_seconds": version_seconds,
        "build_suffix_seconds": suffix_seconds,
        "build_reassign_seconds": reassign_seconds,
        "colliding_after_reassign": moved.collision_report().colliding_products,
        "sweep_seconds": sweep_seconds,
        "sweep_points": len(curve.unique_sids),
    }


def compare(folder, products):
    """The smaller catalog beside what people keep in its place."""
    ids, codes = make_products(0, products, seed=0)[:2]
    path = folder / "compared.safetensors"
    ProductCatalog.build(ids, codes, SIZES).save(path)
    strings = ids.to_pylist()
    tokens = [
        np.array([f"<{letter}_{code}>" for code in range(size)]) for letter, size in zip("abc", SIZES, strict=True)
    ]
    spelled = np.stack([tokens[layer][codes[:, layer]] for layer in range(len(SIZES))], axis=1).tolist()
    (folder / "index.json").write_text(json.dumps(dict(zip(strings, spelled, strict=True))))
    order = np.random.default_rng(2).permutation(products)
    wanted = [strings[row] for row in order]
    del spelled, strings

    before = anonymous_bytes()
    catalog, seconds = timed(ProductCatalog.load, path)
    catalog.product_rows(wanted)
    rows, row_seconds = timed(catalog.product_rows, wanted)
    sids, sid_seconds = timed(lambda catalog, rows: catalog.sid_codes[catalog.sid_rows(rows)], catalog, rows)
    del rows, sids
    after = anonymous_bytes()
    index, json_seconds = timed(json.loads, (folder / "index.json").read_text())
    held = anonymous_bytes()
    _, dict_seconds = timed(lambda index: [index[name] for name in wanted], index)
    _, arrow_seconds = timed(pc.index_in, pa.array(wanted), value_set=ids)
    result = {
        "ProductCatalog": (seconds, row_seconds + sid_seconds, before, after),
        "index.json in a dict": (json_seconds, dict_seconds, after, held),
        "pyarrow index_in, which builds its table each time": (None, arrow_seconds, None, None),
    }
    return {
        name: {
            "open_seconds": opening,
            "per_second": products / looking,
            "private_bytes": None if start is None else (end - start) / products,
        }
        for name, (opening, looking, start, end) in result.items()
    }


def small_base():
    pieces = {piece: number for number, piece in enumerate(["</s>", *"abcdefghijklmnopqrstuvwxyz:<>_/ "])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=pieces, merges=[])), eos_token="</s>")


def run_alone(function, threads, *arguments):
    """In a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=torch.set_num_threads, initargs=[threads]) as pool:
        return pool.submit(function, *arguments).result()


def judge(result):
    """Goals, and whether this run met them."""
    large, used, small = result["build"], result["look_up"], result["change"]
    rows = [
        ("build, minutes", large["build_seconds"] / 60, "<=", 5),
        ("saved and reloaded with equal content", large["reloaded_equal"], "is", True),
        ("open the catalog, s", used["open_seconds"], "<=", 3),
        ("open the tokenizer with it, hashes checked, s", result["bundle"]["bundle_open_seconds"], "<=", 3),
        ("product ids looked up per second", used["ids_per_second"], ">=", 1e6),
        ("private bytes per product", used["private_bytes_per_product_used"], "<=", 50),
        ("unchanged catalogs of checkpoints are one file", result["bundle"]["linked"], "is", True),
        (f"append {small['appended']:,} to {small['products']:,}, s", small["append_seconds"], "<=", 5),
        ("appended products are in the trie", small["appended_are_visible"], "is", True),
    ]
    goals = []
    for goal, value, sign, limit in rows:
        met = None if value is None else bool(value <= limit if sign == "<=" else value >= limit)
        goals.append({"goal": goal, "value": value, "limit": limit, "sign": sign, "met": met})
    return goals


def main(arguments=None):
    options = parse_arguments(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        folder = Path(folder)
        path = folder / CATALOG_FILE
        result = {"setting": {name: getattr(options, name) for name in ("products", "smaller", "threads", "quick")}}
        result["build"] = run_alone(build, options.threads, path, options.products)
        result["look_up"] = run_alone(look_up, options.threads, path, options.products)
        result["bundle"] = run_alone(open_bundle, options.threads, folder, options.products)
        result["change"] = run_alone(change, options.threads, folder / "smaller.safetensors", options.smaller)
        result["compare"] = run_alone(compare, options.threads, folder, options.smaller)
    result["goals"] = judge(result)
    if options.json:
        write_json(options.json, result)
    print(write_tables(result))
    return result


def write_tables(result):
    def cell(value):
        return "-" if value is None else value if isinstance(value, str) else f"{value:,.4g}"

    lines = []
    titles = {"build": "building and saving", "look_up": "opening and asking", "bundle": "tokenizer and checkpoints"}
    for part, title in {**titles, "change": "changing (the smaller catalog)"}.items():
        rows = [[name.replace("_", " "), cell(value)] for name, value in result[part].items()]
        lines += [markdown_table([title, ""], rows), ""]
    ours = result["compare"]["ProductCatalog"]
    rows = [
        [
            name,
            cell(values["open_seconds"]),
            cell(values["per_second"]),
            f"{ours['per_second'] / values['per_second']:.2f}",
            cell(values["private_bytes"]),
        ]
        for name, values in result["compare"].items()
    ]
    header = [f"{result['setting']['smaller']:,} products", "open, s", "ids to SIDs per s", "rqsid is times as fast"]
    lines += [markdown_table([*header, "private bytes/product"], rows), ""]
    verdict = {True: "PASS", False: "MISS", None: "not measured"}
    goals = [
        [goal["goal"], cell(goal["value"]), f"{goal['sign']} {goal['limit']:,}", verdict[goal["met"]]]
        for goal in result["goals"]
    ]
    lines += [f"The goals are set for 10,000,000 products; this run had {result['setting']['products']:,}.", ""]
    return "\n".join([*lines, markdown_table(["goal", "here", "limit", ""], goals)])


if __name__ == "__main__":
    main()
