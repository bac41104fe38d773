"""`pipeline("sid-retrieval")`: against `search`, over every kind of input, and from a folder without rqsid."""

import importlib
import json
import logging
import math
import shutil
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset, DatasetDict
from fresh_process import run_fresh
from transformers import AutoModelForCausalLM, pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.pt_utils import KeyDataset

from rqsid import (
    ProductCatalog,
    ResidualQuantizer,
    ResidualQuantizerConfig,
    SIDTokenizer,
    SIDTrie,
    TokenPruning,
    initialize_sid_rows,
    search,
)
from rqsid.modeling import pipeline as pipeline_module
from rqsid.modeling.code_export import save_custom_generate
from rqsid.modeling.pipeline import SIDRetrievalPipeline

NUM_PRODUCTS = 40
IDS = [f"p{row}" for row in range(NUM_PRODUCTS)]
EXAMPLES = [
    {"profile": {"age": "35-44"}, "history": ["p3", "p4"], "query": "potato chips"},
    {"profile": None, "history": [], "query": "milk"},
    {"profile": None, "history": ["p9"] * 9, "query": None},
]

on_both = pytest.mark.parametrize(
    "base_tokenizer, make_tiny_model", [("llama", "llama"), ("qwen", "qwen")], indirect=True, scope="module"
)
on_one = pytest.mark.parametrize(
    "base_tokenizer, make_tiny_model", [("llama", "llama")], indirect=True, scope="module"
)


@pytest.fixture(scope="module")
def tokenizer(base_tokenizer):
    """SIDs of two lengths; p0 and p1 share one."""
    random = np.random.default_rng(0)
    quantizer = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=[8, 8, 8], num_iterations=2))
    quantizer.fit(random.standard_normal((100, 6), dtype=np.float32))
    codes = random.integers(0, 8, (NUM_PRODUCTS, 3))
    codes[1] = codes[0]
    pruning = TokenPruning("top_k", layer=1, top_k=3).fit(codes, [8, 8, 8])
    catalog = ProductCatalog.build(IDS, codes, [8, 8, 8], pruning, popularity=np.arange(NUM_PRODUCTS))
    return SIDTokenizer.from_base(base_tokenizer, catalog, quantizer)


@pytest.fixture(scope="module")
def model(make_tiny_model, tokenizer):
    model = make_tiny_model(tokenizer.base_size)
    initialize_sid_rows(model, tokenizer, seed=1)
    return model


@pytest.fixture(scope="module")
def retrieve(model, tokenizer):
    return pipeline("sid-retrieval", model=model, tokenizer=tokenizer, device="cpu")


def assert_like_search(found, expected):
    """Equal products in equal order, with log-probability and probability."""
    assert len(found) == len(expected)
    for ranked, truth in zip(found, expected, strict=True):
        assert [list(entry) for entry in ranked] == [["product_id", "sid", "score", "logprob"]] * len(ranked)
        assert [entry["product_id"] for entry in ranked] == [entry["product_id"] for entry in truth]
        assert [entry["sid"] for entry in ranked] == [entry["sid"] for entry in truth]
        assert [entry["logprob"] for entry in ranked] == pytest.approx([entry["score"] for entry in truth], abs=1e-4)
        assert all(entry["score"] == math.exp(entry["logprob"]) for entry in ranked)


@on_both
def test_one_example_and_several(retrieve, model, tokenizer):
    expected = search(model, tokenizer, EXAMPLES, top_k=7)
    assert_like_search([retrieve(EXAMPLES[0], top_k=7)], expected[:1])
    for batch_size in (1, 2, 3, 8):
        assert_like_search(retrieve(EXAMPLES, top_k=7, batch_size=batch_size), expected)
    assert_like_search(retrieve(tuple(EXAMPLES), top_k=7), expected)
    assert retrieve([]) == []
    assert len(retrieve(EXAMPLES[0])) == 10
    assert_like_search([retrieve("milk", top_k=7)], search(model, tokenizer, [{"query": "milk"}], top_k=7))
    whole = retrieve(EXAMPLES[1], top_k=1000, normalize="sid")
    assert sorted(entry["product_id"] for entry in whole) == sorted(IDS)
    # Each SID's probability once: two products share one. The end token and what is no SID have the rest.
    assert sum({entry["sid"]: entry["score"] for entry in whole}.values()) < 1


@on_one
def test_data_sets_columns_and_generators(retrieve, model, tokenizer):
    expected = search(model, tokenizer, EXAMPLES, top_k=3)
    rows = Dataset.from_list(EXAMPLES)
    nested = Dataset.from_list([{"example": example, "product": "p1"} for example in EXAMPLES])
    streams = [rows, nested["example"], KeyDataset(nested, "example"), rows.to_iterable_dataset()]
    streams += [(example for example in EXAMPLES), dict(enumerate(EXAMPLES)).values()]
    for stream in streams:
        found = retrieve(stream, top_k=3, batch_size=2)
        assert not isinstance(found, list)
        assert_like_search(list(found), expected)
    queries = Dataset.from_dict({"query": ["milk", "chips", "milk"]})
    expected = search(model, tokenizer, queries.to_list(), top_k=3)
    assert_like_search(list(retrieve(queries["query"], top_k=3, batch_size=3)), expected)


@on_both
def test_filters(retrieve, model, tokenizer):
    stock, others = IDS[1:9], ["p20", "p0", "p33"]
    whole = SIDTrie.from_tokenizer(tokenizer)
    expected = search(model, tokenizer, EXAMPLES, top_k=20, trie=whole.restrict(stock))
    assert sorted(entry["product_id"] for entry in expected[0]) == sorted(stock)  # without p0, whose SID p1 has too
    assert_like_search(retrieve(EXAMPLES, top_k=20, products=stock), expected)
    mask = np.isin(IDS, stock)
    assert_like_search(retrieve(EXAMPLES, top_k=20, products=mask, batch_size=2), expected)
    assert_like_search(retrieve(EXAMPLES, top_k=20, trie=whole.restrict(stock)), expected)
    # The filter of one call is none of the next.
    assert len(retrieve(EXAMPLES[0], top_k=40)) == NUM_PRODUCTS
    assert_like_search(
        retrieve(EXAMPLES, top_k=20, trie=whole.restrict(stock), products=IDS[5:]),
        search(model, tokenizer, EXAMPLES, top_k=20, trie=whole.restrict(IDS[5:9])),
    )
    # An example's own filter stands for the call's.
    own = [EXAMPLES[0], EXAMPLES[1] | {"products": others}, EXAMPLES[2] | {"products": None}]
    tries = [whole.restrict(stock), whole.restrict(others), whole.restrict(stock)]
    expected = search(model, tokenizer, EXAMPLES, top_k=20, trie=tries)
    for batch_size in (1, 3):
        assert_like_search(retrieve(own, top_k=20, products=stock, batch_size=batch_size), expected)
    found = retrieve(own, top_k=40, batch_size=3)
    assert [len(ranked) for ranked in found] == [NUM_PRODUCTS, 3, NUM_PRODUCTS]
    with pytest.raises(ValueError, match="nowhere"):
        retrieve(EXAMPLES[0], products=["p1", "nowhere"])


@on_one
def test_first_codes(retrieve, model, tokenizer):
    code, other = (int(tokenizer.catalog.sid_codes[row, 0]) for row in tokenizer.catalog.sid_rows([3, 4]))
    assert code != other
    expected = search(model, tokenizer, EXAMPLES, prefix_codes=[[code]] * 3)
    assert_like_search(retrieve(EXAMPLES, prefix_codes=[code], batch_size=2), expected)
    own = [EXAMPLES[0] | {"prefix_codes": [other]}, EXAMPLES[1], EXAMPLES[2] | {"prefix_codes": []}]
    expected = search(model, tokenizer, EXAMPLES, prefix_codes=[[other], [code], []])
    assert_like_search(retrieve(own, prefix_codes=[code], batch_size=3), expected)
    expected = search(model, tokenizer, EXAMPLES, prefix_codes=[[other], [], []])
    assert_like_search(retrieve(own), expected)


@on_one
def test_defaults_given_to_pipeline(model, tokenizer):
    retrieve = pipeline(
        "sid-retrieval", model=model, tokenizer=tokenizer, top_k=4, num_beams=3, products=IDS[:30], batch_size=2
    )
    trie = SIDTrie.from_tokenizer(tokenizer).restrict(IDS[:30])
    assert_like_search(retrieve(EXAMPLES), search(model, tokenizer, EXAMPLES, top_k=4, num_beams=3, trie=trie))
    wide = search(model, tokenizer, EXAMPLES, top_k=4, num_beams=200)
    assert_like_search(retrieve(EXAMPLES, num_beams=200, trie=SIDTrie.from_tokenizer(tokenizer)), wide)
    with pytest.raises(TypeError, match="topk"):
        retrieve(EXAMPLES[0], topk=3)


@on_one
def test_changes_of_the_catalog_are_seen(model, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    own = SIDTokenizer.from_pretrained(tmp_path)
    retrieve = pipeline("sid-retrieval", model=model, tokenizer=own, top_k=NUM_PRODUCTS + 1)
    assert len(retrieve("milk")) == NUM_PRODUCTS
    own.catalog.withdraw(["p7"])
    own.catalog.append(["new"], codes=np.array([[5, 5, 5]]))
    found = {entry["product_id"] for entry in retrieve("milk")}
    assert found == {*IDS, "new"} - {"p7"}


@on_both
def test_a_saved_folder(retrieve, model, tokenizer, tmp_path):
    """With rqsid imported: as saved by hand, and as the pipeline saves itself."""
    expected = search(model, tokenizer, EXAMPLES, top_k=5)
    model.save_pretrained(tmp_path / "by-hand")
    tokenizer.save_pretrained(tmp_path / "by-hand")
    loaded = pipeline("sid-retrieval", model=str(tmp_path / "by-hand"), device="cpu")
    assert type(loaded) is SIDRetrievalPipeline and type(loaded.tokenizer) is SIDTokenizer
    assert_like_search(loaded(EXAMPLES, top_k=5), expected)

    shared = model.config.to_dict()
    retrieve.save_pretrained(tmp_path / "saved")
    entry = json.loads((tmp_path / "saved" / "config.json").read_text())["custom_pipelines"]
    assert entry == {
        "sid-retrieval": {
            "impl": "pipeline.SIDRetrievalPipeline",
            "pt": ["AutoModelForCausalLM"],
        }
    }
    assert model.config.to_dict() == shared
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipeline("sid-retrieval", model=str(tmp_path / "saved"))
    ours = pipeline("sid-retrieval", model=str(tmp_path / "saved"), pipeline_class=SIDRetrievalPipeline)
    assert_like_search(ours(EXAMPLES, top_k=5), expected)
    for task in ("sid-retrieval", None):
        remote = pipeline(task, model=str(tmp_path / "saved"), trust_remote_code=True, dtype="bfloat16", device="cpu")
        assert type(remote).__module__.startswith("transformers_modules.") and remote.model.dtype == torch.bfloat16
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    # One by one, because at this precision padding changes digits.
    expected = [search(reference, tokenizer, [example], top_k=5)[0] for example in EXAMPLES]
    assert_like_search(remote(EXAMPLES, top_k=5), expected)
    # Code from a folder serves its model and takes nothing over.
    assert PIPELINE_REGISTRY.supported_tasks["sid-retrieval"]["impl"] is SIDRetrievalPipeline
    remote.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "pipeline.py").read_text() == (tmp_path / "saved" / "pipeline.py").read_text()
    assert json.loads((tmp_path / "again" / "config.json").read_text())["custom_pipelines"] == entry


@on_one
def test_a_model_in_memory_does_not_promise_code(retrieve, model, tokenizer, tmp_path):
    retrieve.save_pretrained(tmp_path / "pipeline")
    assert "custom_pipelines" in json.loads((tmp_path / "pipeline" / "config.json").read_text())
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    assert "custom_pipelines" not in json.loads((tmp_path / "model" / "config.json").read_text())
    assert pipeline("sid-retrieval", model=str(tmp_path / "model"))("milk") == retrieve("milk")


@on_one
def test_equal_filters_are_made_once(retrieve, tokenizer, monkeypatch):
    made, original = [], SIDTrie.restrict
    monkeypatch.setattr(SIDTrie, "restrict", lambda trie, products: made.append(1) or original(trie, products))
    ids = tokenizer.catalog.product_ids(np.arange(6))
    examples = [{"query": "milk", "products": some} for some in (ids[:3], ids[:3], ids[3:], ids[2::-1])]
    found = retrieve(examples, batch_size=4)
    assert len(made) == 2
    for example, hits in zip(examples, found, strict=True):
        assert {hit["product_id"] for hit in hits} == set(example["products"])


@on_one
def test_frames_and_several_data_sets_are_refused(retrieve):
    frame = pandas.DataFrame({"query": ["milk", "chips", "tea"]})
    with pytest.raises(TypeError, match="to_dict"):
        retrieve(frame)
    data = Dataset.from_pandas(frame)
    with pytest.raises(TypeError, match=r"holds the data sets \['test', 'train'\]"):
        retrieve(DatasetDict(train=data, test=data))


def test_importing_twice_is_silent(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    before = PIPELINE_REGISTRY.supported_tasks["sid-retrieval"]["impl"]
    try:
        again = importlib.reload(pipeline_module)
        assert PIPELINE_REGISTRY.supported_tasks["sid-retrieval"]["impl"] is again.SIDRetrievalPipeline is not before
        assert not caplog.records
    finally:
        pipeline_module.SIDRetrievalPipeline = before
        PIPELINE_REGISTRY.supported_tasks["sid-retrieval"] = before._registered_impl["sid-retrieval"]


@on_one
def test_bad_input(retrieve, base_tokenizer, make_tiny_model, model, tokenizer, tmp_path):
    with pytest.raises(TypeError, match="needs the SIDTokenizer.*got LlamaTokenizer"):
        pipeline("sid-retrieval", model=model, tokenizer=base_tokenizer)
    model.save_pretrained(tmp_path)
    base_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="needs the SIDTokenizer.*got "):
        pipeline("sid-retrieval", model=str(tmp_path))
    with pytest.raises(TypeError, match="got NoneType"):
        SIDRetrievalPipeline(model)
    with pytest.raises(ValueError, match="no_such_product"):
        retrieve({"history": ["p1", "no_such_product"]})
    with pytest.raises(ValueError, match="Resize the\nmodel's|Resize the model"):
        pipeline("sid-retrieval", model=make_tiny_model(tokenizer.base_size), tokenizer=tokenizer)("milk")
    with pytest.raises(TypeError, match="An example must be a dict.*got int"):
        retrieve(3)
    with pytest.raises(TypeError, match="got list"):
        retrieve([["milk"]])
    with pytest.raises(ValueError, match="no value for any of the fields"):
        retrieve({"title": "milk"})
    with pytest.raises(ValueError, match="`top_k` must be a positive integer"):
        retrieve("milk", top_k=0)
    tokenizer.prompt_template.fields.append("products")
    try:
        with pytest.raises(ValueError, match="fields \\['products'\\]"):
            SIDRetrievalPipeline(model, tokenizer)
    finally:
        tokenizer.prompt_template.fields.remove("products")


@on_one
def test_the_search_is_told_only_of_what_the_prompt_reads(retrieve, monkeypatch):
    """It warns of keys that no field reads, among which an example's own options do not count."""
    warned = []
    search_module = importlib.import_module("rqsid.modeling.search")
    monkeypatch.setattr(search_module.logger, "warning_once", warned.append)
    retrieve({"history": ["p1"], "produkts": IDS[:5]})
    assert len(warned) == 1 and "produkts" in warned.pop()
    retrieve({"history": ["p1"], "products": IDS[:5], "prefix_codes": []})
    assert not warned


WITHOUT_RQSID = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

examples = json.load(open(sys.argv[1]))
results = {}
for name in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    inputs = tokenizer.pad({"input_ids": tokenizer.encode_prompts(examples)["input_ids"]}, return_tensors="pt")
    plain = AutoModelForCausalLM.from_pretrained(name)
    brought = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    options = {"tokenizer": tokenizer, "top_k": 4, "beams": 60}
    sequences = [
        plain.generate(**inputs, custom_generate=name, trust_remote_code=True, **options),
        brought.generate(**inputs, **options),
    ]
    retrieve = pipeline("sid-retrieval", model=name, trust_remote_code=True)
    inferred = pipeline(model=name, trust_remote_code=True)
    results[name] = {
        "modules": [type(part).__module__ for part in (tokenizer, retrieve, inferred)],
        "sequences": [found.tolist() for found in sequences],
        "ordinary": brought.generate(**inputs, max_new_tokens=3, do_sample=False).shape[0],
        "found": retrieve(examples, top_k=5, batch_size=2, products=["p1", "p5", "p9", "p13"]),
        "inferred": inferred(examples, top_k=5),
    }
assert "rqsid" not in sys.modules
print(json.dumps(results))
"""


@pytest.mark.slow
@on_one
def test_a_fresh_process_without_rqsid(retrieve, model, tokenizer, tmp_path):
    """Tokenizer, pipeline and `custom_generate` from one folder, and from the Hub's cache as a download leaves it."""
    folder = tmp_path / "my-model.v2"
    retrieve.save_pretrained(folder)
    bundle = {path.name for path in folder.iterdir()}
    save_custom_generate(folder)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model.save_pretrained(tmp_path / "model")
    parts = [{path.name for path in (tmp_path / name).iterdir()} for name in ("tokenizer", "model")]
    code = {path.name for path in (folder / "custom_generate").iterdir()} - {"generate.py", "README.md"}
    assert bundle == parts[0] | parts[1] | code | {"pipeline.py"}
    assert not parts[0] & parts[1] and not (parts[0] | parts[1]) & (code | {"pipeline.py"})

    cache = tmp_path / "home" / "hub" / "models--org--shop"
    commit = "0123456789abcdef" * 2 + "01234567"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    shutil.copytree(folder, cache / "snapshots" / commit)
    (tmp_path / "examples.json").write_text(json.dumps(EXAMPLES))
    environment = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "",
    }
    names = [str(folder), "org/shop"]
    arguments = [tmp_path / "examples.json", *names]
    done = run_fresh(WITHOUT_RQSID, *arguments, env=environment, cwd=tmp_path, without_rqsid=True, check=True)
    results = json.loads(done.stdout.splitlines()[-1])

    inputs = tokenizer.pad({"input_ids": tokenizer.encode_prompts(EXAMPLES)["input_ids"]}, return_tensors="pt")
    sids = [list({e["sid"]: 0 for e in ranked})[:4] for ranked in search(model, tokenizer, EXAMPLES, num_beams=60)]
    trie = SIDTrie.from_tokenizer(tokenizer).restrict(["p1", "p5", "p9", "p13"])
    for name in names:
        result = results[name]
        assert all(module.startswith("transformers_modules.") for module in result["modules"])
        for sequences in result["sequences"]:
            answers = torch.tensor(sequences)[:, inputs["input_ids"].shape[1] :]
            rows = tokenizer.find_sids(answers.tolist())
            assert tokenizer.sid_strings(rows) == [sid for ranked in sids for sid in ranked]
        assert result["ordinary"] == len(EXAMPLES)
        assert_like_search(result["found"], search(model, tokenizer, EXAMPLES, top_k=5, trie=trie))
        assert_like_search(result["inferred"], search(model, tokenizer, EXAMPLES, top_k=5))
    assert Path(tmp_path / "modules" / "transformers_modules" / "org" / "shop" / commit / "pipeline.py").exists()
