"""The blocks of the README's section on the Hub run, one after the other."""

import re
from pathlib import Path

import evaluate
import numpy as np

from rqsid import (
    ProductCatalog,
    ResidualQuantizer,
    ResidualQuantizerConfig,
    SIDTokenizer,
    TokenPruning,
    initialize_sid_rows,
    search,
)

README = Path(__file__).parents[2] / "README.md"


def test_the_snippets_run(hub, hub_client, request, tmp_path, monkeypatch):
    shared = next(part for part in request.config.pluginmanager.get_plugins() if hasattr(part, "TINY_MODELS"))
    embeddings = np.random.default_rng(0).standard_normal((60, 6), dtype=np.float32)
    quantizer = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=[6, 6, 6], num_iterations=3)).fit(embeddings)
    codes = quantizer.encode(embeddings)
    pruning = TokenPruning("top_k", layer=1, top_k=2).fit(codes, [6, 6, 6])
    catalog = ProductCatalog.build([f"B{row:04d}" for row in range(60)], codes, [6, 6, 6], pruning)
    tokenizer = SIDTokenizer.from_base(shared.BASE_TOKENIZERS["qwen"](), catalog, quantizer)
    model = shared.TINY_MODELS["qwen"](tokenizer.base_size)
    initialize_sid_rows(model, tokenizer)
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("my-model")
    tokenizer.save_pretrained("my-model")

    section = README.read_text(encoding="utf-8").split("## To the Hub and back\n")[1].split("\n## ")[0]
    namespace = {}
    for snippet in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(compile(snippet, str(README), "exec"), namespace)

    names = {"codebook", "sid_retrieval", "sid_distribution", "model", "collection"}
    assert set(namespace["published"]) == names and not hub.unknown_requests
    example = {"history": ["B0001"], "query": "potato chips"}
    expected = search(model, tokenizer, [example], top_k=10)[0]
    for found in (
        namespace["retrieve"](example, top_k=10),
        search(namespace["model"], namespace["tokenizer"], [example], top_k=10)[0],
    ):
        assert [entry["product_id"] for entry in found] == [entry["product_id"] for entry in expected]
    assert (namespace["quantizer"].encode(embeddings) == codes).all()

    metric = evaluate.load("org/sid_retrieval")
    assert metric.compute(predictions=[["p1", "p2"]], references=["p2"], ks=(1, 2))["item_recall@2"] == 1.0
