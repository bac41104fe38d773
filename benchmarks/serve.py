"""
What batching gives the HTTP service of examples/serve, and what it does with more requests than it can answer.

    python benchmarks/serve.py
    python benchmarks/serve.py --quick

A Llama of random weights over a synthetic catalogue, served on a loopback port; clients in a process of their own, each of which
sends its next search when it has the answer to the last one. Every fourth search is limited to a segment. The servers (with
batching, without, and with more clients than it lets in) take turns, so that a machine that slows down slows all of them.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import uvicorn
from measures import markdown_table
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rqsid import ProductCatalog, SIDTokenizer
from rqsid.sid_tokenizer.files import write_json

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent / "examples" / "serve"))
from app import Limits, create_app  # noqa: E402
from engine import SearchEngine  # noqa: E402

SIZES = [256, 256, 256]
OVERLOAD = "overload"


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", type=int, help="100,000, or 20,000 with --quick.")
    parser.add_argument("--hidden_size", type=int, help="256, or 128 with --quick.")
    parser.add_argument("--layers", type=int, help="4, or 2 with --quick.")
    parser.add_argument("--history", type=int, default=20, help="Products of a history.")
    parser.add_argument("--num_beams", type=int, default=50)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--max_batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, help="3, or 2 with --quick.")
    parser.add_argument("--seconds", type=float, help="Of a round: 10, or 2 with --quick.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="Smaller and shorter.")
    parser.add_argument("--json", help="File for the results.")
    options = parser.parse_args(arguments)
    usual = {"products": 100_000, "hidden_size": 256, "layers": 4, "rounds": 3, "seconds": 10.0}
    quick = {"products": 20_000, "hidden_size": 128, "layers": 2, "rounds": 2, "seconds": 2.0}
    for name, value in (quick if options.quick else usual).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if min(options.clients, options.max_batch, options.rounds, options.products - options.history) < 1:
        parser.error("clients, max_batch and rounds must be at least 1, and products more than a history holds.")
    if options.json and not Path(options.json).absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no such folder. Make it first.")
    return options


def make_engine(options):
    """Random weights: what they are makes no difference to the time that a search takes."""
    product_ids = [f"B{number:07}" for number in range(options.products)]
    codes = np.random.default_rng(0).integers(0, SIZES[0], (options.products, len(SIZES)))
    pieces = ["</s>", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:<>_/ \n-,"]
    backend = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    base = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer = SIDTokenizer.from_base(base, ProductCatalog.build(product_ids, codes, SIZES))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=4 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        max_position_embeddings=1024,
    )
    segments = {"even": product_ids[::2], "tenth": product_ids[::10]}
    model = LlamaForCausalLM(config).eval().to(options.device)
    return SearchEngine(model, tokenizer, segments, num_beams=options.num_beams)


def make_bodies(options, number=256):
    random = np.random.default_rng(1)
    bodies = []
    for turn in range(number):
        history = [f"B{row:07}" for row in random.integers(0, options.products, options.history)]
        body = {"profile": "age 35-44, income 50-74k", "history": history, "query": f"potato chips {turn}"}
        if turn % 4 == 0:
            body["filters"] = {"segment": ("even", "tenth")[turn // 4 % 2]}
        bodies.append(json.dumps(body))
    return bodies


class Server:
    """The service in threads of this process, on a port of its own; idle, it costs nothing."""

    def __init__(self, engine, **limits):
        app = create_app(lambda: engine, Limits(timeout_s=30.0, **limits))
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not (self.server.started and app.state.service.is_ready):
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def batches(self):
        """Number of batches, and of searches in them, so far."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as response:
            lines = response.read().decode().splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if line.startswith("rqsid_batch_size"))
        return np.array([int(values["rqsid_batch_size_count"]), int(values["rqsid_batch_size_sum"])])

    def stop(self):
        self.server.should_exit = True
        self.thread.join()


def send_load(server, bodies, clients, seconds):
    """Returns the status and the seconds of each answer, and the length of the round."""
    order = {"port": server.port, "bodies": bodies, "clients": clients, "seconds": seconds}
    command = [sys.executable, FOLDER / "serve_clients.py"]
    result = subprocess.run(command, input=json.dumps(order), capture_output=True, text=True, check=True)
    result = json.loads(result.stdout)
    return result["answers"], result["seconds"]


def summarize(answers, seconds):
    """Of the answers with 200: how many a second, and how long they took."""
    times = np.array([taken for status, taken in answers if status == 200])
    if len(times) == 0:
        sys.exit(f"No search was answered: {dict(Counter(status for status, _ in answers))}.")
    quantiles = dict(zip(("p50_ms", "p95_ms", "p99_ms"), np.percentile(times, [50, 95, 99]) * 1000, strict=True))
    statuses = Counter(str(status) for status, _ in answers)
    return {"searches_per_second": len(times) / seconds, **quantiles, "statuses": dict(statuses)}


def main(arguments=None):
    options = parse_arguments(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    engine, bodies = make_engine(options), make_bodies(options)
    few, many = options.clients, 4 * options.clients
    limits = {
        "batched": {"max_batch": options.max_batch, "max_requests": few},
        "one by one": {"max_batch": 1, "max_requests": few},
        OVERLOAD: {"max_batch": options.max_batch, "max_requests": few},
    }
    servers = {name: Server(engine, **given) for name, given in limits.items()}
    answers, seconds = {name: [] for name in servers}, Counter()
    for server in servers.values():
        send_load(server, bodies, few, min(1, options.seconds))
    batches = {name: -server.batches() for name, server in servers.items()}
    for _ in range(options.rounds):
        for name, server in servers.items():
            found, taken = send_load(server, bodies, many if name == OVERLOAD else few, options.seconds)
            answers[name] += found
            seconds[name] += taken
    torch.set_num_threads(threads)
    result = {"setting": vars(options) | {"json": None}, "arms": {}}
    for name, server in servers.items():
        number, searches = (batches[name] + server.batches()).tolist()
        result["arms"][name] = summarize(answers[name], seconds[name]) | {"mean_batch": searches / number}
        server.stop()
    result["goals"] = judge(result)
    if options.json:
        write_json(options.json, result)
    print(write_tables(result))
    return result


def judge(result):
    """Goals, and whether this run met them."""
    batched, alone, overload = (result["arms"][name] for name in ("batched", "one by one", OVERLOAD))
    with_room = [count for arm in (batched, alone) for status, count in arm["statuses"].items() if status != "200"]
    others = [count for status, count in overload["statuses"].items() if status not in ("200", "429")]
    refused = overload["statuses"].get("429", 0) / sum(overload["statuses"].values())
    speed = batched["searches_per_second"]
    rows = [
        ("searches per second, batched over one by one", speed / alone["searches_per_second"], ">=", 1.3),
        ("searches per second, overload over batched", overload["searches_per_second"] / speed, ">=", 0.5),
        ("answers other than 200 while there is room", sum(with_room), "<=", 0),
        ("answers other than 200 and 429 at overload", sum(others), "<=", 0),
        ("share of 429 at overload", refused, ">=", 0.01),
    ]
    return [
        {
            "goal": goal,
            "value": value,
            "sign": sign,
            "limit": limit,
            "met": bool(value <= limit if sign == "<=" else value >= limit),
        }
        for goal, value, sign, limit in rows
    ]


def write_tables(result):
    setting = result["setting"]
    rows = [
        [
            name,
            f"{arm['searches_per_second']:.1f}",
            *(f"{arm[key]:.0f}" for key in ("p50_ms", "p95_ms", "p99_ms")),
            f"{arm['mean_batch']:.1f}",
            ", ".join(f"{status}: {count}" for status, count in sorted(arm["statuses"].items())),
        ]
        for name, arm in result["arms"].items()
    ]
    header = [f"{setting['clients']} clients", "searches/s", "p50 ms", "p95 ms", "p99 ms", "mean batch", "answers"]
    goals = [
        [goal["goal"], f"{goal['value']:.4g}", f"{goal['sign']} {goal['limit']}", "PASS" if goal["met"] else "MISS"]
        for goal in result["goals"]
    ]
    return "\n".join(
        [
            f"{setting['products']:,} products, a Llama of {setting['layers']} layers x {setting['hidden_size']}, histories "
            f"of {setting['history']}, {setting['num_beams']} beams, {setting['device']}, {setting['threads']} threads; the clients run on the same "
            "machine. Overload: batched, with four times as many clients as may be inside. Times are those of the answers with 200.",
            "",
            markdown_table(header, rows),
            "",
            markdown_table(["goal", "here", "limit", ""], goals),
        ]
    )


if __name__ == "__main__":
    main()
