"""
What was published loads in a fresh process with an empty cache: with rqsid, and without it through `trust_remote_code`, with equal
results; a pinned revision stays what it was; from the cache without a connection.
"""

import json
import os

import numpy as np
import pytest
import torch
from fresh_process import run_fresh

from rqsid import (
    ProductCatalog,
    ResidualQuantizer,
    ResidualQuantizerConfig,
    SIDTokenizer,
    TokenPruning,
    initialize_sid_rows,
    search,
)
from rqsid.trainer.publishing import publish_run

FAMILIES = {"llama": "llama", "qwen": "qwen", "baichuan": "plain"}
EXAMPLES = [{"query": "potato chips", "history": ["p3", "p4"]}, {"query": "milk <a_1></s>", "profile": "age 35-44"}]

WITH_RQSID = """
import json, sys

import rqsid
from rqsid import ResidualQuantizer, SIDTokenizer, search
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

name, codebook, pinned, examples = json.loads(sys.argv[1])
found = {}
for revision in (None, pinned):
    tokenizer = SIDTokenizer.from_pretrained(name, revision=revision)
    assert type(AutoTokenizer.from_pretrained(name, revision=revision)) is SIDTokenizer
    model = AutoModelForCausalLM.from_pretrained(name, revision=revision)
    retrieve = pipeline("sid-retrieval", model=model, tokenizer=tokenizer)
    quantizer = ResidualQuantizer.from_pretrained(codebook, revision=revision and "v1")
    found[str(revision)] = {
        "search": [[(hit["product_id"], hit["score"]) for hit in hits] for hits in search(model, tokenizer, examples, 5)],
        "pipeline": [[(hit["product_id"], hit["logprob"]) for hit in hits] for hits in retrieve(examples, top_k=5)],
        "products": len(tokenizer.catalog),
        "codes": tokenizer.quantizer.encode(quantizer.codebooks[0].detach()).tolist(),
    }
print(json.dumps(found))
"""

WITHOUT_RQSID = """
import json, sys

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

name, pinned, examples = json.loads(sys.argv[1])
found = {}
for revision in (None, pinned):
    trust = {"trust_remote_code": True, "revision": revision}
    tokenizer = AutoTokenizer.from_pretrained(name, **trust)
    model = AutoModelForCausalLM.from_pretrained(name, **trust)
    inputs = tokenizer.pad({"input_ids": tokenizer.encode_prompts(examples)["input_ids"]}, return_tensors="pt")
    generated = model.generate(**inputs, tokenizer=tokenizer, top_k=5, beams=60, return_dict_in_generate=True)
    rows = tokenizer.find_sids(generated.sequences[:, inputs["input_ids"].shape[1] :].tolist())
    retrieve = pipeline(model=name, **trust)
    assert "rqsid" not in sys.modules
    found[str(revision)] = {
        "generate": [tokenizer.sid_strings(rows), generated.sequences_scores.tolist()],
        "pipeline": [[(hit["product_id"], hit["logprob"]) for hit in hits] for hits in retrieve(examples, top_k=5)],
        "products": len(tokenizer.catalog),
    }
named = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).generate(
    **inputs, custom_generate=name, trust_remote_code=True, tokenizer=tokenizer, top_k=5, beams=60
)
found["named"] = tokenizer.sid_strings(tokenizer.find_sids(named[:, inputs["input_ids"].shape[1] :].tolist()))
print(json.dumps(found))
"""


@pytest.fixture
def run(request, family, tmp_path):
    """A folder of a model of this family with its bundle, and what it finds."""
    shared = next(part for part in request.config.pluginmanager.get_plugins() if hasattr(part, "TINY_MODELS"))
    embeddings = np.random.default_rng(0).standard_normal((60, 6), dtype=np.float32)
    quantizer = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=[6, 6, 6], num_iterations=3)).fit(embeddings)
    codes = quantizer.encode(embeddings)
    pruning = TokenPruning("top_k", layer=1, top_k=2).fit(codes, [6, 6, 6])
    catalog = ProductCatalog.build([f"p{row}" for row in range(60)], codes, [6, 6, 6], pruning)
    tokenizer = SIDTokenizer.from_base(shared.BASE_TOKENIZERS[FAMILIES[family]](), catalog, quantizer)
    model = shared.TINY_MODELS[family](tokenizer.base_size)
    initialize_sid_rows(model, tokenizer)
    model.save_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    return str(tmp_path / "run"), model, tokenizer


def hits(model, tokenizer):
    return [[(hit["product_id"], hit["score"]) for hit in ranked] for ranked in search(model, tokenizer, EXAMPLES, 5)]


def same(found, expected):
    products = [[product for product, _ in ranked] for ranked in found]
    scores = [score for ranked in found for _, score in ranked]
    assert products == [[product for product, _ in ranked] for ranked in expected]
    assert scores == pytest.approx([score for ranked in expected for _, score in ranked], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", list(FAMILIES))
def test_what_was_published_loads(hub, hub_client, run, family, tmp_path):
    folder, model, tokenizer = run
    name, codebook = "org/model", "org/codebook"
    first = publish_run(folder, name, codebook_id=codebook, metrics=False, private=True, tag="v1")
    pinned, before = first["model"]["commit"], hits(model, tokenizer)

    # main moves: other weights, and a product more
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(-1)
    tokenizer.catalog.append(["p60"], embeddings=np.ones((1, 6), np.float32), quantizer=tokenizer.quantizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    publish_run(folder, name, codebook_id=codebook, metrics=False)
    after = hits(model, tokenizer)
    assert before != after and hub.refs("org/codebook")["tags"]["v1"] == first["codebook"]["commit"]

    environment = os.environ | hub.environment(tmp_path / "with")
    arguments = json.dumps([name, codebook, pinned, EXAMPLES])
    done = run_fresh(WITH_RQSID, arguments, env=environment, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    codes = tokenizer.quantizer.encode(tokenizer.quantizer.codebooks[0].detach()).tolist()
    for revision, expected, products in (("None", after, 61), (pinned, before, 60)):
        same(found[revision]["search"], expected)
        same(found[revision]["pipeline"], expected)
        assert found[revision]["products"] == products and found[revision]["codes"] == codes

    trusting = os.environ | hub.environment(tmp_path / "without")
    done = run_fresh(WITHOUT_RQSID, json.dumps([name, pinned, EXAMPLES]), env=trusting, without_rqsid=True, check=True)
    remote = json.loads(done.stdout.splitlines()[-1])
    for revision, expected, products in (("None", after, 61), (pinned, before, 60)):
        same(remote[revision]["pipeline"], expected)
        assert remote[revision]["products"] == products
        sids, scores = remote[revision]["generate"]
        assert scores == sorted(scores[:5], reverse=True) + sorted(scores[5:], reverse=True)
        # search ranks products, some of which share their SID; generate ranks SIDs
        rows = tokenizer.catalog.product_rows([ranked[0][0] for ranked in expected])
        assert [sids[0], sids[5]] == tokenizer.sid_strings(tokenizer.catalog.sid_rows(rows))
        assert [scores[0], scores[5]] == pytest.approx([ranked[0][1] for ranked in expected], abs=1e-4)
    if family == "llama":
        requests = len(hub.requests)
        offline = environment | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        done = run_fresh(WITH_RQSID, arguments, env=offline, check=True)
        assert json.loads(done.stdout.splitlines()[-1]) == found
        assert len(hub.requests) == requests
