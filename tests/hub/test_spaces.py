"""The metrics as Spaces, and what `publish_run` and `push_prompts` publish, loaded by a process that has never seen rqsid."""

import json
from pathlib import Path

import evaluate
import numpy as np
import pytest
import yaml
from datasets import Dataset
from fresh_process import run_fresh
from transformers import AutoModelForCausalLM

import rqsid.evaluate_metrics
from rqsid import (
    ProductCatalog,
    ResidualQuantizer,
    ResidualQuantizerConfig,
    SIDTokenizer,
    initialize_sid_rows,
    search,
    tokenize_examples,
)
from rqsid.trainer.prompt_datasets import push_prompts
from rqsid.trainer.publishing import publish_run, push_metrics

NAMES = ["sid_retrieval", "sid_distribution"]
CALLS = {
    "sid_retrieval": {
        "predictions": [["a", "b"], ["c", "d"], ["e"]],
        "references": ["b", "c", "z"],
        "sid_predictions": [["1", "2"], ["3", ""], []],
        "sid_references": ["1", "3", "9"],
        "groups": ["head", "tail", "tail"],
        "bootstrap": 50,
    },
    "sid_distribution": {"codes": [[0, 1, 2], [1, 1, 0], [3, 1, 2]], "codebook_sizes": [4, 2, 3]},
}
EXAMPLES = [{"query": "potato chips", "history": ["p3", "p4"]}, {"query": "milk"}]


def test_push_metrics(hub, hub_client):
    published = push_metrics("org", private=True)
    assert list(published) == NAMES
    for name in NAMES:
        folder = Path(rqsid.evaluate_metrics.path(name))
        files = hub.files(f"org/{name}", repo_type="space")
        expected = {"README.md", "app.py", "requirements.txt", f"{name}.py"}
        assert set(files) - {".gitattributes"} == expected
        assert all(files[file] == (folder / file).read_bytes() for file in expected)
        info = hub_client.space_info(f"org/{name}")
        assert info.private and info.sha == published[name]["commit"]
        head = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
        assert {"title", "sdk", "sdk_version", "app_file", "tags"} <= set(head) and head["app_file"] in files
        metric = evaluate.load(f"org/{name}")
        assert metric.compute(**CALLS[name]) == evaluate.load(str(folder)).compute(**CALLS[name])
    assert hub.commits("org/sid_retrieval", repo_type="space")[0]["message"] == "Publish a metric"
    uploaded = hub.uploaded_bytes
    assert push_metrics("org") == published and hub.uploaded_bytes == uploaded
    assert list(push_metrics("alice", ["sid_distribution"])) == ["sid_distribution"]
    requests = len(hub.requests)
    with pytest.raises(ValueError, match="no evaluate module named 'recall'"):
        push_metrics("org", ["sid_retrieval", "recall"])
    with pytest.raises(ValueError, match="Repo id"):
        push_metrics("org/team")
    assert len(hub.requests) == requests
    with pytest.raises(PermissionError, match="stranger/sid_retrieval"):
        push_metrics("stranger")


FRESH = """
import json, sys
calls, examples = json.loads(sys.argv[1])
import evaluate
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

results = {"metrics": {name: evaluate.load("org/" + name).compute(**call) for name, call in calls.items()}}
results["prompts"] = load_dataset("org/prompts", split="train").to_list()
results["found"] = pipeline("sid-retrieval", model="org/shop", trust_remote_code=True)(examples, top_k=5)
tokenizer = AutoTokenizer.from_pretrained("org/shop", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("org/shop", trust_remote_code=True)
inputs = tokenizer.pad({"input_ids": tokenizer.encode_prompts(examples)["input_ids"]}, return_tensors="pt")
sequences = model.generate(
    **inputs, custom_generate="org/shop", trust_remote_code=True, tokenizer=tokenizer, top_k=5, beams=50
)
results["sids"] = tokenizer.sid_strings(tokenizer.find_sids(sequences[:, inputs["input_ids"].shape[1] :].tolist()))
assert "rqsid" not in sys.modules
print(json.dumps(results))
"""


@pytest.mark.slow
@pytest.mark.parametrize("base_tokenizer, make_tiny_model", [("llama", "baichuan")], indirect=True)
def test_a_fresh_process_without_rqsid(hub, hub_client, base_tokenizer, make_tiny_model, tmp_path):
    """Metrics, prompts, pipeline and `custom_generate` of one run, a Baichuan, from the Hub into an empty home."""
    random = np.random.default_rng(0)
    quantizer = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=[8, 8, 8], num_iterations=2))
    quantizer.fit(random.standard_normal((100, 6), dtype=np.float32))
    catalog = ProductCatalog.build([f"p{row}" for row in range(40)], random.integers(0, 8, (40, 3)), [8, 8, 8])
    tokenizer = SIDTokenizer.from_base(base_tokenizer, catalog, quantizer)
    model = make_tiny_model(tokenizer.base_size)
    initialize_sid_rows(model, tokenizer, seed=1)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "run")
    publish_run(tmp_path / "run", "org/shop")
    rows = Dataset.from_list([{"query": f"milk {row}", "product": f"p{row}"} for row in range(20)])
    prompts = rows.map(tokenize_examples, batched=True, fn_kwargs={"tokenizer": tokenizer})
    push_prompts(prompts, tokenizer, "org/prompts")

    environment = hub.environment(tmp_path / "home")
    done = run_fresh(FRESH, json.dumps([CALLS, EXAMPLES]), env=environment, without_rqsid=True, check=True)
    results = json.loads(done.stdout.splitlines()[-1])
    for name in NAMES:
        local = evaluate.load(rqsid.evaluate_metrics.path(name)).compute(**CALLS[name])
        assert results["metrics"][name] == local
    assert results["prompts"] == prompts.to_list()
    expected = search(AutoModelForCausalLM.from_pretrained(tmp_path / "run"), tokenizer, EXAMPLES, top_k=10)
    names = [[hit["product_id"] for hit in hits[:5]] for hits in expected]
    assert [[hit["product_id"] for hit in hits] for hits in results["found"]] == names
    sids = [list(dict.fromkeys(hit["sid"] for hit in hits))[:5] for hits in expected]
    assert results["sids"] == [sid for row in sids for sid in row]
