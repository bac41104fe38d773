"""The HTTP service: a real server on a loopback port, in a thread or as a command, and what it answers."""

import asyncio
import http.client
import json
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import uvicorn
from fresh_process import start_fresh
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rqsid import ProductCatalog, PromptTemplate, SIDTokenizer, search

FOLDER = Path(__file__).parents[2] / "examples" / "serve"
MODULES = ("app", "batching", "engine", "gate", "metrics", "serve")
PRODUCTS = [f"B{number:02}" for number in range(40)]
SEGMENTS = {"snacks": PRODUCTS[:9], "drinks": PRODUCTS[20:], "one": ["B03"]}


@pytest.fixture(scope="module")
def modules():
    """The example's modules by name; they lie in a folder that is no package, as scripts find each other."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: __import__(name) for name in MODULES}
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def bundle():
    """A model of random weights and 40 products with 16 SIDs: most are shared, B15 is withdrawn."""
    pieces = ["</s>", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:<>_/ \n-,"]
    backend = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    base = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    codes = np.random.default_rng(0).integers(0, 4, (40, 2))
    catalog = ProductCatalog.build(PRODUCTS, codes, [4, 4], popularity=np.arange(40.0))
    catalog.withdraw(["B15"])
    tokenizer = SIDTokenizer.from_base(base, catalog)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=200,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


@pytest.fixture
def engine(modules, bundle):
    """Watched: `engine.batches` are the queries of each call, and calls wait while `engine.open` is not set."""
    engine = modules["engine"].SearchEngine(*bundle, segments=SEGMENTS)
    real_search = engine.search

    def watched_search(queries):
        engine.batches.append(queries)
        assert engine.open.wait(20)
        return real_search(queries)

    engine.batches, engine.open, engine.search = [], threading.Event(), watched_search
    engine.open.set()
    yield engine
    engine.open.set()


class Server:
    """The app in a thread, behind a real socket."""

    def __init__(self, app):
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=20))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        wait_for(lambda: self.server.started)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def call(self, method, path, body=None, headers=()):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        body = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, body, {"Content-Type": "application/json", **dict(headers)})
        response = connection.getresponse()
        content = response.read().decode()
        connection.close()
        is_json = response.getheader("Content-Type") == "application/json"
        return response.status, json.loads(content) if is_json else content, response

    def search(self, **body):
        return self.call("POST", "/search", body)[:2]

    def metrics(self):
        lines = [line for line in self.call("GET", "/metrics")[1].splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def stop(self):
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@pytest.fixture
def serve(modules, engine):
    """`serve(**limits)`: a server that is ready."""
    servers = []

    def start(load=lambda: engine, **limits):
        servers.append(Server(modules["app"].create_app(load, modules["app"].Limits(**limits))))
        return servers[-1]

    yield start
    engine.open.set()
    for server in servers:
        server.stop()


def ready(server):
    wait_for(lambda: server.call("GET", "/ready")[0] == 200)
    return server


@pytest.fixture
def pool():
    with ThreadPoolExecutor(32) as pool:
        yield pool


def ids(answer):
    return [product["product_id"] for product in answer["products"]]


def block(server, engine, pool, waiting, **body):
    """One search in the thread and `waiting` ones in the queue, until `engine.open` is set."""
    engine.open.clear()
    first = pool.submit(server.search, query="first")
    wait_for(lambda: engine.batches)
    others = [pool.submit(server.search, query=f"number {number}", **body) for number in range(waiting)]
    wait_for(lambda: server.metrics()["rqsid_queue_depth"] == waiting)
    return [first, *others]


EXAMPLES = [
    {"query": "potato chips"},
    {"profile": "age 35", "history": PRODUCTS[:3], "query": "milk"},
    {"profile": {"age": "35-44", "household": 3}, "query": "cola"},
    {"history": PRODUCTS[10:14]},
    {"history": PRODUCTS[3:] * 3, "query": "cut to fit the context"},
    {"profile": "x" * 60, "query": "y"},
]


def test_answers_are_those_of_search(serve, bundle, pool):
    server = ready(serve(max_top_k=40, max_batch=3, max_wait_ms=20))
    top_ks = [10, 3, 40, 1, 7, 20]
    bodies = [example | {"top_k": top_k} for example, top_k in zip(EXAMPLES, top_ks, strict=True)]
    answers = list(pool.map(lambda body: server.search(**body), bodies * 2))
    for example, top_k, (status, answer) in zip(EXAMPLES * 2, top_ks * 2, answers, strict=True):
        expected = search(*bundle, [example], top_k=top_k)[0]
        assert status == 200 and len(expected) == min(top_k, 39)
        assert ids(answer) == [product["product_id"] for product in expected]
        assert [product["sid"] for product in answer["products"]] == [product["sid"] for product in expected]
        scores = [product["score"] for product in answer["products"]]
        assert scores == pytest.approx([product["score"] for product in expected], abs=1e-4)
    # 111 products of two tokens do not fit beside the text into 200 positions.
    assert [answer["history_left_out"] > 0 for _, answer in answers[:6]] == [False] * 4 + [True, False]


def test_concurrent_searches_are_computed_together(serve, engine, pool):
    server = ready(serve(max_batch=4, max_wait_ms=0))
    requests = block(server, engine, pool, 6)
    engine.open.set()
    assert [request.result()[0] for request in requests] == [200] * 7
    assert [len(batch) for batch in engine.batches] == [1, 4, 2]
    metrics = server.metrics()
    assert metrics["rqsid_batch_size_count"] == 3 and metrics["rqsid_batch_size_sum"] == 7
    buckets = [metrics[f'rqsid_batch_size_bucket{{le="{bound}"}}'] for bound in ("1", "2", "4", "+Inf")]
    assert buckets == [1, 2, 3, 3]
    assert metrics["rqsid_queue_depth"] == metrics["rqsid_requests_in_flight"] == 0
    assert metrics['rqsid_requests_total{status="200"}'] == metrics["rqsid_request_seconds_count"] == 7


def test_a_search_waits_for_others_but_not_for_long(serve, engine, pool):
    server = ready(serve(max_batch=4, max_wait_ms=1500))
    started = time.monotonic()
    first = pool.submit(server.search, query="one")
    wait_for(lambda: server.metrics()["rqsid_queue_depth"] == 1)
    second = pool.submit(server.search, query="two")
    assert first.result()[0] == second.result()[0] == 200
    assert [len(batch) for batch in engine.batches] == [2] and time.monotonic() - started >= 1.5


def test_a_full_batch_waits_for_nobody(serve, engine, pool):
    server = ready(serve(max_batch=4, max_wait_ms=60_000, timeout_s=50))
    assert {status for status, _ in pool.map(lambda _: server.search(query="full"), range(4))} == {200}
    assert [len(batch) for batch in engine.batches] == [4]


REFUSED = [
    ({"query": "a", "top_k": 21}, "body.top_k"),
    ({"query": "a", "top_k": 0}, "body.top_k"),
    ({"query": "a", "top_k": "5"}, "body.top_k"),
    ({"query": "a", "top_k": True}, "body.top_k"),
    ({"query": "a", "top_k": float("nan")}, "body.top_k"),
    ({"query": 7}, "body.query"),
    ({"query": "a" * 1001}, "body.query"),
    ({"query": "a\ud800"}, "body.query"),
    ({"profile": "a" * 1001}, "body.profile"),
    ({"profile": {"age": [1]}}, "body.profile"),
    ({"profile": {"age": float("inf")}}, "body.profile"),
    ({"history": "B01"}, "body.history"),
    ({"history": [1]}, "body.history"),
    ({"history": ["B01"] * 201}, "body.history"),
    ({"history": ["B01", "\ud800"]}, "body.history"),
    ({"quarry": "a"}, "body.quarry"),
    ({"query": "a", "\ud800": 1}, "unicode"),
    ({"profile": {"\ud800": 1}}, "body.profile"),
    ({"filters": {"\ud800": 1}}, "body.filters"),
    ({"query": "a", "filters": {"only": ["B01"] * 1001}}, "body.filters.only"),
    ({"query": "a", "filters": {"segments": "snacks"}}, "body.filters.segments"),
    ({"query": "a", "filters": ["snacks"]}, "body.filters"),
    ({"query": "a", "filters": {"segment": "tools"}}, "There is no segment 'tools', only ['drinks', 'one', 'snacks']"),
    ({"query": "a", "filters": {"exclude": ["Z1"]}}, "Unknown products in exclude: 'Z1'."),
    ({"history": ["B01", "Z1", "B02", "Z2"], "query": "a"}, "Unknown products in history: 'Z1', 'Z2'."),
    ({"history": [f"Z{n:02}" for n in range(13)]}, "'Z09' and 3 more"),
    ({}, "no value for any of the fields"),
    ({"history": []}, "no value for any of the fields"),
    ({"profile": "p" * 150, "query": "q" * 150}, "tokens without its history"),
    (b"{", "JSON decode error"),
    (b'["query"]', "body"),
    (b"", "body"),
]


def test_refused(serve, engine):
    server = ready(serve())
    for body, message in REFUSED:
        status, answer, _ = server.call("POST", "/search", body)
        assert status == 422 and message in answer["detail"], (body, status, answer)
        assert len(answer["detail"]) <= 1000
    assert not engine.batches
    assert server.metrics()['rqsid_requests_total{status="422"}'] == len(REFUSED)
    for odd in (b"[" * 100_000, b'{"top_k": ' + b"9" * 10_000 + b"}"):
        assert server.call("POST", "/search", odd)[0] in (400, 422)


def test_unknown_products_can_be_ignored(serve):
    server = ready(serve())
    known = {"history": ["B01", "B02"], "query": "a"}
    status, answer = server.search(history=["Z1", "B01", "Z2", "B02", "Z1"], query="a", ignore_unknown=True)
    assert status == 200 and answer["ignored"] == ["Z1", "Z2"]
    assert answer["products"] == server.search(**known)[1]["products"]
    assert answer["products"] != server.search(history=["B01"], query="a")[1]["products"]
    for filters, expected in (({"only": ["Z1", "B03"]}, ["B03"]), ({"exclude": [*PRODUCTS[:39], "Z1"]}, ["B39"])):
        status, answer = server.search(query="a", filters=filters, ignore_unknown=True)
        assert status == 200 and ids(answer) == expected and answer["ignored"] == ["Z1"]
    # Nothing is left, which is not the same as no filter.
    status, answer = server.search(query="a", filters={"only": ["Z1"]}, ignore_unknown=True)
    assert status == 200 and answer["products"] == [] and answer["ignored"] == ["Z1"]


def exchange(server, *parts):
    """Sends raw bytes, and reads what comes back until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        for part in parts:
            connection.sendall(part)
        answer = b""
        while received := connection.recv(65536):
            answer += received
    return answer.decode()


HEAD = b"POST /search HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


def test_large_bodies_are_refused_before_they_are_read(serve, engine):
    server = ready(serve(max_body_kb=2))
    # Announced and never sent: whoever waits for the body would wait for ever.
    assert exchange(server, HEAD + b"Content-Length: 2001\r\n\r\n").startswith("HTTP/1.1 413")
    # Without a length, and without an end.
    chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
    assert exchange(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunk, chunk).startswith("HTTP/1.1 413")
    body = b'{"query": "a"}'
    assert server.call("POST", "/search", body + b" " * (2001 - len(body)))[0] == 413
    assert server.call("POST", "/search", body + b" " * (2000 - len(body)))[0] == 200
    assert server.metrics()['rqsid_requests_total{status="413"}'] == 3 and len(engine.batches) == 1


def test_slow_bodies_are_given_up(serve):
    server = ready(serve(timeout_s=0.2))
    assert exchange(server, HEAD + b"Content-Length: 20\r\n\r\n", b'{"query"').startswith("HTTP/1.1 408")


def test_too_many_requests(serve, engine, pool):
    server = ready(serve(max_batch=2, max_requests=4))
    admitted = block(server, engine, pool, 3)
    assert server.metrics()["rqsid_requests_in_flight"] == 4
    status, answer, response = server.call("POST", "/search", {"query": "one too many"})
    assert (
        status == 429
        and response.getheader("Retry-After") == "1"
        and answer == {"detail": "Too many searches at once."}
    )
    assert server.call("GET", "/health")[0] == 200  # and all that while the worker is blocked
    engine.open.set()
    assert [request.result()[0] for request in admitted] == [200] * 4
    assert server.search(query="room again")[0] == 200


def test_what_timed_out_is_not_computed(serve, engine, pool):
    server = ready(serve(timeout_s=0.5, max_wait_ms=0))
    requests = block(server, engine, pool, 3)
    assert [request.result()[0] for request in requests] == [504] * 4
    metrics = server.metrics()
    assert metrics["rqsid_queue_depth"] == metrics["rqsid_requests_in_flight"] == 0
    engine.open.set()
    assert server.search(query="after")[0] == 200
    assert [len(batch) for batch in engine.batches] == [1, 1]
    assert metrics['rqsid_requests_total{status="504"}'] == 4 and metrics["rqsid_request_seconds_count"] == 0


def test_who_has_left_is_not_computed_for(serve, engine, pool):
    server = ready(serve(max_wait_ms=0))
    requests = block(server, engine, pool, 1)
    body = b'{"query": "gone"}'
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_for(lambda: server.metrics()["rqsid_queue_depth"] == 2)
    wait_for(lambda: server.metrics()["rqsid_queue_depth"] == 1)
    engine.open.set()
    assert [request.result()[0] for request in requests] == [200, 200]
    assert [len(batch) for batch in engine.batches] == [1, 1]
    assert server.metrics()['rqsid_requests_total{status="499"}'] == 1


def test_health_before_and_after_loading(serve, engine, bundle):
    loaded = threading.Event()

    def load():
        assert loaded.wait(20)
        return engine

    server = serve(load)
    assert server.call("GET", "/health")[:2] == (200, {"status": "alive"})
    assert server.call("GET", "/ready")[:2] == (503, {"status": "loading"})
    status, _, response = server.call("POST", "/search", {"query": "a"})
    assert status == 503 and response.getheader("Retry-After")
    assert not any("catalog" in name for name in server.metrics())
    loaded.set()
    ready(server)
    catalog = bundle[1].catalog
    assert server.call("GET", "/ready")[1] == {"status": "ready", "catalog_version": catalog.version_id}
    assert server.metrics()[f'rqsid_catalog_info{{version="{catalog.version}",id="{catalog.version_id}"}}'] == 1
    assert server.search(query="a")[0] == 200


def test_filters(serve, bundle, engine, pool):
    """Beams enough for all SIDs, so that a filtered ranking is the whole one without what the filter leaves out."""
    server = ready(serve(max_top_k=40, max_batch=16, max_wait_ms=0))
    snacks, drinks = set(SEGMENTS["snacks"]), set(SEGMENTS["drinks"])
    filters = [
        (None, set(PRODUCTS)),
        ({}, set(PRODUCTS)),
        ({"segment": "snacks"}, snacks),
        ({"segment": "drinks"}, drinks),
        ({"segment": "one"}, {"B03"}),
        ({"only": ["B05", "B30", "B30"]}, {"B05", "B30"}),
        ({"exclude": PRODUCTS[5:]}, set(PRODUCTS[:5])),
        ({"exclude": ["B00"]}, set(PRODUCTS[1:])),
        ({"exclude": []}, set(PRODUCTS)),
        ({"segment": "drinks", "only": PRODUCTS[10:25], "exclude": ["B21"]}, drinks & set(PRODUCTS[10:25]) - {"B21"}),
    ]
    ranking = [product["product_id"] for product in search(*bundle, [{"query": "same"}], top_k=40)[0]]
    engine.open.clear()
    first = pool.submit(server.search, query="first")
    wait_for(lambda: engine.batches)
    bodies = [{"query": "same", "top_k": 40} | ({} if given is None else {"filters": given}) for given, _ in filters]
    answers = [pool.submit(server.search, **body) for body in bodies]
    wait_for(lambda: server.metrics()["rqsid_queue_depth"] == len(filters))
    engine.open.set()
    assert first.result()[0] == 200
    for (given, kept), answer in zip(filters, answers, strict=True):
        status, answer = answer.result()
        assert status == 200 and ids(answer) == [product for product in ranking if product in kept], given
    assert [len(batch) for batch in engine.batches] == [1, len(filters)]
    for given in ({"only": []}, {"segment": "snacks", "only": ["B30"]}, {"only": ["B15"]}, {"exclude": PRODUCTS}):
        assert server.search(query="nothing is left", filters=given) == (
            200,
            {"products": [], "ignored": [], "history_left_out": 0},
        )
    assert len(engine.batches) == 2


def test_a_bad_request_does_not_harm_others(serve, engine, pool):
    server = ready(serve(max_wait_ms=0))
    requests = block(server, engine, pool, 2)
    assert server.search(query="a", filters={"segment": "tools"})[0] == 422
    assert server.search(query="a", filters={"only": ["Z1"]})[0] == 422
    engine.open.set()
    assert [request.result()[0] for request in requests] == [200] * 3
    assert [len(batch) for batch in engine.batches] == [1, 2]


def test_a_search_that_fails_takes_no_others_with_it(serve, engine, bundle, pool):
    server = ready(serve(max_wait_ms=0, max_batch=8))
    real_search = engine.search

    def search_or_fail(queries):
        if any(query.top_k == 13 for query in queries):
            engine.batches.append(queries)
            assert engine.open.wait(20)
            raise RuntimeError("a secret")
        return real_search(queries)

    engine.search = search_or_fail
    engine.open.clear()
    first = pool.submit(server.search, query="first")
    wait_for(lambda: engine.batches)
    top_ks = [5, 13, 7, 13]
    requests = [pool.submit(server.search, query="same", top_k=top_k) for top_k in top_ks]
    wait_for(lambda: server.metrics()["rqsid_queue_depth"] == 4)
    engine.open.set()
    assert first.result()[0] == 200
    ranking = [product["product_id"] for product in search(*bundle, [{"query": "same"}], top_k=7)[0]]
    for top_k, request in zip(top_ks, requests, strict=True):
        status, answer = request.result()
        if top_k == 13:
            assert status == 500 and "secret" not in str(answer) and "log" in answer["detail"]
        else:
            assert status == 200 and ids(answer) == ranking[:top_k]
    # Together once, then each alone once.
    assert sorted(len(batch) for batch in engine.batches) == [1, 1, 1, 1, 1, 4]
    assert server.search(query="still here")[0] == 200 and server.call("GET", "/ready")[0] == 200


def test_an_error_that_nobody_expected_is_counted(serve, engine, monkeypatch):
    server = ready(serve())
    monkeypatch.setattr(engine, "prepare", lambda *args, **kwargs: 1 / 0)
    assert server.search(query="a") == (500, "Internal Server Error")
    assert server.metrics()['rqsid_requests_total{status="500"}'] == 1


def test_stopping_answers_what_was_admitted(serve, engine, pool):
    server = ready(serve(max_batch=2, max_wait_ms=0))
    requests = block(server, engine, pool, 3)
    server.server.should_exit = True
    with pytest.raises(OSError):
        wait_for(lambda: server.call("GET", "/health") and False)
    engine.open.set()
    assert [request.result()[0] for request in requests] == [200] * 4
    server.stop()
    assert [len(batch) for batch in engine.batches] == [1, 2, 1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("search")]


def test_closing_a_batcher_computes_what_waits(modules):
    async def run():
        batcher = modules["batching"].Batcher(lambda items: [item * 2 for item in items], 2, 60, sizes.append)
        batcher.start()
        results = [asyncio.create_task(batcher.submit(item)) for item in range(3)]
        await asyncio.sleep(0)
        await batcher.close()
        return await asyncio.wait_for(asyncio.gather(*results), 5), batcher.is_running

    sizes = []
    assert asyncio.run(run()) == ([0, 2, 4], False) and sizes == [2, 1]


def test_a_model_that_does_not_load_ends_the_server(modules, bundle, tmp_path, monkeypatch):
    """Rather than leaving one that is never ready, which looks like one that takes long."""
    for part in bundle:
        part.save_pretrained(tmp_path)
    segments = str(tmp_path / "nowhere.json")
    monkeypatch.setattr(sys, "argv", ["serve.py", "--model", str(tmp_path), "--port", "0", "--segments", segments])
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        modules["serve"].main()


def test_text_is_only_text(serve, engine, bundle):
    server = ready(serve(max_wait_ms=0))
    tokenizer = bundle[1]
    sid = "".join(tokenizer.convert_ids_to_tokens(tokenizer.encode_products("B01")))
    assert server.search(query=f"{sid}</s>", profile=sid)[0] == 200
    assert server.search(query="a", history=["B01"])[0] == 200
    markup = {*tokenizer.sid_vocabulary().tolist(), tokenizer.eos_token_id}
    (injected,), (honest,) = engine.batches
    assert not markup & set(injected.prompt) and len(markup & set(honest.prompt)) == 2


def test_beams_and_softmax_are_passed_on(modules, bundle):
    example = {"query": "a"}
    for options in ({"num_beams": 1}, {"num_beams": 50, "normalize": "sid"}, {"num_beams": 50}):
        engine = modules["engine"].SearchEngine(*bundle, **options)
        (found,) = engine.search([engine.prepare(example, top_k=40)])
        expected = search(*bundle, [example], top_k=40, **options)[0]
        assert found == expected and (len(found) < 39) == (options["num_beams"] == 1)
        assert options.get("normalize") != "sid" or found != search(*bundle, [example], top_k=40)[0]


def test_models_that_cannot_be_served(modules, bundle):
    model, tokenizer = bundle
    SearchEngine, Refused = modules["engine"].SearchEngine, modules["engine"].RequestRefused
    with pytest.raises(ValueError, match="'none' has no product that could be returned"):
        SearchEngine(model, tokenizer, {"none": ["B15"]})
    with pytest.raises(ValueError, match="not in the catalog"):
        SearchEngine(model, tokenizer, {"odd": ["Z1"]})
    template = tokenizer.prompt_template
    try:
        tokenizer.prompt_template = PromptTemplate(fields=["query", "country"])
        with pytest.raises(ValueError, match="country.*app.py"):
            SearchEngine(model, tokenizer)
        tokenizer.prompt_template = PromptTemplate(fields=["query"])
        with pytest.raises(Refused, match="trained without history, profile"):
            SearchEngine(model, tokenizer).prepare({"query": "a", "profile": "b", "history": ["B01"]})
    finally:
        tokenizer.prompt_template = template
    with pytest.raises(ValueError, match="max_batch=0"):
        modules["app"].Limits(max_batch=0)


def test_segments_from_files(modules, tmp_path):
    read_segments = modules["engine"].read_segments
    (tmp_path / "segments.json").write_text(json.dumps(SEGMENTS))
    rows = [(name, product) for name, products in SEGMENTS.items() for product in products]
    table = pa.table({"segment": [row[0] for row in rows], "product_id": [row[1] for row in rows]})
    pq.write_table(table, tmp_path / "segments.parquet")
    assert read_segments(tmp_path / "segments.json") == read_segments(tmp_path / "segments.parquet") == SEGMENTS
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold an object of lists"):
        read_segments(tmp_path / "list.json")


@pytest.mark.slow
def test_the_command(bundle, tmp_path):
    for part in bundle:
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "segments.json").write_text(json.dumps(SEGMENTS))
    options = {"model": tmp_path / "model", "segments": tmp_path / "segments.json", "port": 0, "max_top_k": 5}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    (tmp_path / "log").touch()
    with open(tmp_path / "log", "r+b") as log, start_fresh(FOLDER / "serve.py", *arguments, stderr=log) as process:
        wait_for(lambda: "Uvicorn running on" in (tmp_path / "log").read_text() or process.poll() is not None, 60)
        line = next(line for line in (tmp_path / "log").read_text().splitlines() if "Uvicorn running on" in line)
        server = Server.__new__(Server)
        server.port = int(line.split("http://127.0.0.1:")[1].split()[0])
        wait_for(lambda: server.call("GET", "/ready")[0] == 200, 60)
        status, answer = server.search(query="a", top_k=5, filters={"segment": "snacks"})
        expected = [product["product_id"] for product in search(*bundle, [{"query": "a"}], top_k=40)[0]]
        assert status == 200 and ids(answer) == [product for product in expected if product in SEGMENTS["snacks"]][:5]
        assert server.search(query="a", top_k=6)[0] == 422
        process.send_signal(signal.SIGTERM)
        assert "Application shutdown complete" in process.communicate(timeout=20)[1]
