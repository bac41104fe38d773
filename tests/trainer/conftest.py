"""A catalog with shared and shortened SIDs, tokenizers on it, and purchases that a tiny model can learn."""

import random

import numpy as np
import pytest
from datasets import Dataset

from rqsid import (
    ProductCatalog,
    ResidualQuantizer,
    ResidualQuantizerConfig,
    SIDTokenizer,
    SIDTrainer,
    SIDTrainingArguments,
    TokenPruning,
    initialize_sid_rows,
)

NUM_PRODUCTS = 40
CODEBOOK_SIZES = [8, 8, 8]
QUERIES = ["potato chips", "fresh milk", "orange juice", "frozen pizza", "cookies", "tissue", "bottle", "family pack"]


@pytest.fixture(scope="session")
def tokenizer(base_tokenizer):
    generator = np.random.default_rng(0)
    config = ResidualQuantizerConfig(codebook_sizes=CODEBOOK_SIZES, num_iterations=3)
    quantizer = ResidualQuantizer(config).fit(generator.standard_normal((200, 6), dtype=np.float32))
    codes = generator.integers(0, 8, (NUM_PRODUCTS, 3))
    codes[1] = codes[0]  # two products that share a SID
    pruning = TokenPruning(strategy="top_k", layer=1, top_k=3).fit(codes, CODEBOOK_SIZES)
    catalog = ProductCatalog.build(
        [f"p{row}" for row in range(NUM_PRODUCTS)], codes, CODEBOOK_SIZES, pruning, popularity=np.arange(NUM_PRODUCTS)
    )
    return SIDTokenizer.from_base(base_tokenizer, catalog, quantizer)


@pytest.fixture
def model(make_tiny_model, tokenizer):
    # With the rows made already, so that the model is what the trainer trains, and a test may look at it before.
    model = make_tiny_model(tokenizer.base_size)
    initialize_sid_rows(model, tokenizer, seed=1)
    return model


@pytest.fixture(scope="session")
def make_purchases():
    """`make_purchases(n, seed=0, max_history=3)`: the query decides the product; histories are noise."""

    def make(n, seed=0, max_history=3):
        generator = random.Random(seed)
        rows = []
        for _ in range(n):
            query = generator.randrange(len(QUERIES))
            history = [f"p{generator.randrange(NUM_PRODUCTS)}" for _ in range(generator.randint(0, max_history))]
            profile = {"age": generator.choice(["35-44", "45-54"])}
            rows.append(
                {"profile": profile, "history": history, "query": QUERIES[query], "product": f"p{5 * query + 1}"}
            )
        return rows

    return make


@pytest.fixture
def make_trainer(tokenizer, make_purchases, tmp_path):
    """`make_trainer(model, train=None, evaluation=None, init=None, **args)`; datasets are lists of purchases."""

    def make(model, train=None, evaluation=None, init=None, **args):
        args = {"eval_top_k": 10, "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no"} | args
        args = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "report_to": "none"} | args
        datasets = {"train_dataset": train, "eval_dataset": evaluation}
        datasets = {
            name: Dataset.from_list(rows) if isinstance(rows, list) else rows for name, rows in datasets.items()
        }
        init = {"processing_class": tokenizer} | (init or {})
        return SIDTrainer(model, SIDTrainingArguments(**args), **datasets, **init)

    yield make
    tokenizer.prompt_template.max_length = None  # a trainer leaves its own; the tokenizer serves all tests
