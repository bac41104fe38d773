"""A shop's years in short: a model is trained once, while products come, go, and come back, and colleagues save too."""

import json
import os

import numpy as np
import pytest
from datasets import Dataset
from fresh_process import run_fresh
from transformers import AutoModelForCausalLM

from rqsid import (
    ProductCatalog,
    ResidualQuantizer,
    ResidualQuantizerConfig,
    SIDLogitsProcessor,
    SIDTokenizer,
    SIDTrainer,
    SIDTrainingArguments,
    SIDTrie,
    TokenPruning,
    search,
    sid_generation_config,
)

OLD = [f"B{row:04d}" for row in range(100)]
NEW = [f"N{row:04d}" for row in range(40)]
EXAMPLES = [{"history": OLD[:4], "query": "potato chips"}, {"query": "fresh milk"}]


@pytest.fixture(scope="module")
def embeddings():
    return np.random.default_rng(0).standard_normal((140, 6), dtype=np.float32)


@pytest.fixture(scope="module")
def quantizer(embeddings):
    return ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=[6, 6, 6])).fit(embeddings[:100])


@pytest.fixture(scope="module", params=["share", "suffix", "reassign"])
def trained(request, embeddings, quantizer, tmp_path_factory):
    """A folder with model and tokenizer of the old products, and their ranking."""
    shared = next(part for part in request.config.pluginmanager.get_plugins() if hasattr(part, "BASE_TOKENIZERS"))
    codes = quantizer.encode(embeddings[:100])
    pruning = TokenPruning("top_k", layer=1, top_k=2).fit(codes, quantizer.codebook_sizes)
    catalog = ProductCatalog.build(
        OLD,
        codes,
        quantizer.codebook_sizes,
        pruning,
        np.random.default_rng(1).integers(0, 9, 100),
        collisions=request.param,
        quantizer=quantizer,
    )
    tokenizer = SIDTokenizer.from_base(shared.BASE_TOKENIZERS["llama"](), catalog, quantizer)
    folder = tmp_path_factory.mktemp("trained")
    purchases = Dataset.from_list([{"history": OLD[:3], "product": product} for product in OLD[:16]])
    arguments = SIDTrainingArguments(
        str(folder / "run"), max_steps=2, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, eval_top_k=5
    )
    trainer = SIDTrainer(
        shared.TINY_MODELS["llama"](tokenizer.base_size),
        arguments,
        train_dataset=purchases,
        eval_dataset=purchases,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(folder / "model"))
    return folder, trainer


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder), SIDTokenizer.from_pretrained(folder)


def test_products_come_and_go(trained, embeddings, quantizer):
    folder, _ = trained
    model, tokenizer = load(folder / "model")
    catalog = tokenizer.catalog
    everything = {"top_k": 200, "num_beams": 400}
    before = search(model, tokenizer, EXAMPLES, **everything)
    sids = tokenizer.encode_products(OLD)

    catalog.append(NEW, embeddings=embeddings[100:], quantizer=tokenizer.quantizer)
    assert tokenizer.encode_products(OLD) == sids
    grown = search(model, tokenizer, EXAMPLES, **everything)
    for row, (old, new) in enumerate(zip(before, grown, strict=True)):
        assert {entry["product_id"] for entry in new} == {*OLD, *NEW}
        scores = {entry["product_id"]: entry["score"] for entry in new}
        assert all(abs(scores[entry["product_id"]] - entry["score"]) < 1e-4 for entry in old), row

    gone = [grown[0][0]["product_id"], *NEW[:10], *OLD[50:60]]
    catalog.withdraw(sorted(set(gone)))
    stale = SIDTrie(tokenizer.sid_sequences())  # of all SIDs, as one made before the withdrawal
    for trie in (None, stale):
        found = search(model, tokenizer, EXAMPLES, trie=trie, **everything)
        for old, new in zip(grown, found, strict=True):
            expected = [entry["product_id"] for entry in old if entry["product_id"] not in gone]
            assert [entry["product_id"] for entry in new] == expected
    # Whose purchases stay in histories, under the SIDs that the model knows.
    assert tokenizer.encode_prompts([{"history": [gone[0]]}])["input_ids"]

    catalog.restore([gone[0]])
    assert search(model, tokenizer, EXAMPLES, **everything)[0][0]["product_id"] == gone[0]


def test_generate_returns_no_withdrawn_product(trained):
    folder, _ = trained
    model, tokenizer = load(folder / "model")
    best = search(model, tokenizer, EXAMPLES[:1], top_k=3)[0]
    tokenizer.catalog.withdraw([entry["product_id"] for entry in best])
    inputs = tokenizer.pad(
        {"input_ids": tokenizer.encode_prompts(EXAMPLES[:1])["input_ids"]}, return_tensors="pt", padding=True
    )
    length = inputs["input_ids"].shape[1]
    sequences = model.generate(
        **inputs,
        generation_config=sid_generation_config(model, tokenizer, num_beams=20, num_return_sequences=10),
        logits_processor=[SIDLogitsProcessor(tokenizer, prompt_length=length)],
    )
    products = [product for group in tokenizer.decode_products(sequences[:, length:]) for product in group]
    assert products and not {entry["product_id"] for entry in best} & set(products)


def test_evaluation_sees_the_catalog_of_now(trained):
    _, trainer = trained
    catalog = trainer.processing_class.catalog
    rows = Dataset.from_list([{"history": OLD[:3], "product": OLD[0]}])
    products = trainer.predict(rows).predictions[0]
    first = catalog.product_ids(products[0, :1])
    catalog.withdraw(first)
    try:
        assert products[0, 0] not in trainer.predict(rows).predictions[0]
    finally:
        catalog.restore(first)


def test_checkpoints_share_one_catalog(trained):
    folder, _ = trained
    paths = sorted(folder.glob("run/checkpoint-*/sid_catalog.safetensors")) + [
        folder / "model" / "sid_catalog.safetensors"
    ]
    assert len(paths) == 3 and len({os.stat(path).st_ino for path in paths}) == 1


def test_of_two_colleagues_the_second_is_told(trained, embeddings, tmp_path):
    folder, _ = trained
    load(folder / "model")[1].save_pretrained(tmp_path)
    first, second = (SIDTokenizer.from_pretrained(tmp_path) for _ in range(2))
    options = {"quantizer": first.quantizer}
    first.catalog.append(NEW[:1], embeddings=embeddings[100:101], **options)
    second.catalog.append(NEW[1:2], embeddings=embeddings[101:102], **options)
    first.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="somebody saved it in the meantime"):
        second.save_pretrained(tmp_path)
    loaded = SIDTokenizer.from_pretrained(tmp_path)
    assert loaded.catalog.find_products(NEW[:2]).tolist() == [100, -1]
    loaded.catalog.append(NEW[1:2], embeddings=embeddings[101:102], **options)
    loaded.save_pretrained(tmp_path)
    assert SIDTokenizer.from_pretrained(tmp_path).catalog.version == 3


@pytest.mark.slow
def test_a_new_process_opens_old_versions(trained, embeddings, tmp_path):
    folder, _ = trained
    _, tokenizer = load(folder / "model")
    before = tokenizer.encode_products(OLD), [entry["change"] for entry in tokenizer.history]
    tokenizer.catalog.append(NEW, embeddings=embeddings[100:], quantizer=tokenizer.quantizer)
    tokenizer.catalog.withdraw(OLD[:5])
    tokenizer.save_pretrained(tmp_path)
    code = """
import json, sys
from rqsid import ProductCatalog, SIDTokenizer
tokenizer = SIDTokenizer.from_pretrained(sys.argv[1])
old = ProductCatalog.load(sys.argv[1] + "/sid_catalog.safetensors", version=1)
print(json.dumps([
    tokenizer.encode_products([f"B{row:04d}" for row in range(100)]),
    [entry["change"] for entry in tokenizer.history],
    [len(old), int(old.withdrawn.sum()), len(tokenizer.catalog), int(tokenizer.catalog.withdrawn.sum())],
]))
"""
    result = run_fresh(code, tmp_path, check=True)
    sids, changes, counts = json.loads(result.stdout.splitlines()[-1])
    assert sids == before[0] and changes == [*before[1], "append", "withdraw"]
    assert counts == [100, 0, 140, 5]
