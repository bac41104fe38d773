"""The whole road in the words of the README, on every base tokenizer: products to SIDs, prompts, a model, a ranking."""

import numpy as np
import pytest
import torch
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
    search,
)

PRODUCT_IDS = [f"B{row:04d}" for row in range(120)]
SIZES = [8, 8, 8]
EXAMPLES = [
    {"profile": "age 35-44", "history": PRODUCT_IDS[:4], "query": "potato chips"},
    {"history": [], "query": "fresh milk <a_1></s><|endoftext|>"},
    {"history": PRODUCT_IDS[7:40]},
]


@pytest.fixture(scope="module")
def parts():
    random = np.random.default_rng(0)
    embeddings = random.standard_normal((120, 6), dtype=np.float32)
    quantizer = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=SIZES)).fit(embeddings)
    return quantizer, quantizer.encode(embeddings), random.integers(0, 5, 120)


def brute_force(model, tokenizer, prompt):
    """All products by the teacher-forced log-probability of their SID, ties by popularity and then catalog order."""
    ranked, answers = [], tokenizer.encode_products(PRODUCT_IDS)
    for length in sorted({len(answer) for answer in answers}):
        rows = [row for row, answer in enumerate(answers) if len(answer) == length]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answers[row] for row in rows])).logits
        scores = logits[:, len(prompt) - 1 : -1].double().log_softmax(-1)
        for row, score in zip(rows, scores, strict=True):
            total = sum(score[step, token].item() for step, token in enumerate(answers[row]))
            ranked.append((-total, tuple(answers[row]), -tokenizer.catalog.popularity[row], row))
    return sorted(ranked, key=lambda entry: (round(entry[0], 5), *entry[1:]))


@pytest.mark.parametrize("strategy", [{"top_k": 3}, {"threshold": 0.5}, {"drop_layer": None}, {"none": None}])
@pytest.mark.parametrize("collisions", ["share", "suffix"])
def test_search_ranks_products_as_brute_force_does(parts, base_tokenizer, make_tiny_model, strategy, collisions):
    quantizer, codes, popularity = parts
    ((name, value),) = strategy.items()
    pruning = TokenPruning(name, layer=1, **({name: value} if value else {})).fit(codes, quantizer.codebook_sizes)
    catalog = ProductCatalog.build(
        PRODUCT_IDS, codes, quantizer.codebook_sizes, pruning, popularity, collisions=collisions
    )
    tokenizer = SIDTokenizer.from_base(base_tokenizer, catalog, quantizer)
    model = make_tiny_model(tokenizer.base_size)
    initialize_sid_rows(model, tokenizer)

    found = search(model, tokenizer, EXAMPLES, top_k=len(PRODUCT_IDS), num_beams=200)
    prompts = tokenizer.encode_prompts(EXAMPLES)["input_ids"]
    for ranked, prompt in zip(found, prompts, strict=True):
        expected = brute_force(model, tokenizer, prompt)
        assert [entry["product_id"] for entry in ranked] == [PRODUCT_IDS[row] for *_, row in expected]
        np.testing.assert_allclose([entry["score"] for entry in ranked], [-entry[0] for entry in expected], atol=1e-4)


@pytest.mark.parametrize("base_tokenizer, make_tiny_model", [("llama", "llama")], indirect=True)
def test_pruning_nothing_is_the_fixed_length_pipeline(parts, base_tokenizer, make_tiny_model, tmp_path):
    quantizer, codes, popularity = parts
    losses, rankings = [], []
    purchases = Dataset.from_list([EXAMPLES[0] | {"product": product} for product in PRODUCT_IDS[:16]])
    for pruning in (None, TokenPruning("none", layer=1).fit(codes, SIZES)):
        catalog = ProductCatalog.build(PRODUCT_IDS, codes, SIZES, pruning, popularity)
        tokenizer = SIDTokenizer.from_base(base_tokenizer, catalog, quantizer)
        arguments = SIDTrainingArguments(
            str(tmp_path), max_steps=3, report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1
        )
        trainer = SIDTrainer(
            make_tiny_model(tokenizer.base_size), arguments, train_dataset=purchases, processing_class=tokenizer
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        rankings.append(search(trainer.model, tokenizer, EXAMPLES, top_k=20))
    assert len(losses[0]) == 3 and losses[0] == losses[1]
    assert rankings[0] == rankings[1]


@pytest.mark.parametrize("base_tokenizer, make_tiny_model", [("qwen", "qwen")], indirect=True)
def test_all_codes_of_a_layer_are_the_layer(parts, base_tokenizer, make_tiny_model):
    quantizer, codes, popularity = parts
    sequences = []
    for pruning in (TokenPruning("drop_layer", layer=1), TokenPruning("top_k", layer=1, top_k=8)):
        catalog = ProductCatalog.build(PRODUCT_IDS, codes, SIZES, pruning.fit(codes, SIZES), popularity)
        sequences.append(SIDTokenizer.from_base(base_tokenizer, catalog, quantizer).encode_products(PRODUCT_IDS))
    assert sequences[0] == sequences[1]
    assert {len(sequence) for sequence in sequences[0]} == {2}
