"""Search on Baichuan, whose positions travel with the cache (ALiBi) and whose output layer is normalised."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import pipeline

from rqsid import (
    ProductCatalog,
    ResidualQuantizer,
    ResidualQuantizerConfig,
    SIDLogitsProcessor,
    SIDTokenizer,
    TokenPruning,
    initialize_sid_rows,
    search,
    sid_generate,
    sid_generation_config,
)
from rqsid.modeling import model_checks
from rqsid.modeling.beam_search import plan_memory
from rqsid.modeling.head import OutputHead

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [4, 21, 27, 33, 5], [9], [18, 17, 2, 4, 6, 8]]
EXAMPLES = [{"query": "potato chips", "history": ["p3", "p4"]}, {"query": "milk"}, {"profile": "age 35-44"}]

on_baichuan = pytest.mark.parametrize("make_tiny_model", ["baichuan"], indirect=True)
both_positions = pytest.mark.parametrize("positions", ["rope", "alibi"])


def assert_equals_brute_force(model, tokenizer, brute_force_scores, **options):
    results = search(model, tokenizer, PROMPTS, top_k=30, **options)
    for prompt, found in zip(PROMPTS, results, strict=True):
        exact = brute_force_scores(model, prompt, tokenizer.sid_sequences())
        order = exact.argsort(descending=True)[:30]
        assert [hit["product_id"] for hit in found] == [f"p{row}" for row in order.tolist()]
        assert [hit["score"] for hit in found] == pytest.approx(exact[order].tolist(), abs=1e-4)
    assert len({hit["product_id"] for hit in results[0]}) == 30


@both_positions
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@on_baichuan
def test_wide_beams_equal_brute_force(make_tiny_model, make_tokenizer, brute_force_scores, positions, attention):
    tokenizer = make_tokenizer()
    model = make_tiny_model(tokenizer.vocab_size, position_embedding=positions)
    model.set_attn_implementation(attention)
    for options in ({}, {"batch_size": 2}, {"max_memory": 1}):  # the last one: a few positions in a forward pass
        assert_equals_brute_force(model, tokenizer, brute_force_scores, **options)


@both_positions
@on_baichuan
def test_positions_matter(make_tiny_model, make_tokenizer, positions):
    """So that equality above says something: another order of the prompt, or other distances, rank otherwise."""
    tokenizer = make_tokenizer()
    model = make_tiny_model(tokenizer.vocab_size, position_embedding=positions)
    forward, backward = search(model, tokenizer, [PROMPTS[0], PROMPTS[0][:-1][::-1] + PROMPTS[0][-1:]], top_k=30)
    assert [hit["product_id"] for hit in forward] != [hit["product_id"] for hit in backward]


@both_positions
@on_baichuan
def test_where_it_is_not_known_it_is_tried(
    make_tiny_model, make_tokenizer, brute_force_scores, monkeypatch, positions
):
    """As where the class has come with a published model, from a package of another name."""
    monkeypatch.setattr(model_checks, "TESTED", ())
    tokenizer = make_tokenizer()
    model = make_tiny_model(tokenizer.vocab_size, position_embedding=positions)
    assert_equals_brute_force(model, tokenizer, brute_force_scores)
    assert model in model_checks._TRIED and model_checks._LINEAR[model]


@both_positions
@on_baichuan
def test_adapters_and_trained_rows(make_tiny_model, make_tokenizer, brute_force_scores, positions):
    tokenizer = make_tokenizer()
    rows = list(range(20, 35))
    config = LoraConfig(
        r=2,
        target_modules="all-linear",
        trainable_token_indices={"embed_tokens": rows, "lm_head": rows},
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(make_tiny_model(tokenizer.vocab_size, position_embedding=positions), config).eval()
    with torch.no_grad():
        model.get_output_embeddings().token_adapter.trainable_tokens_delta["default"].mul_(5).add_(0.3)
    assert_equals_brute_force(model, tokenizer, brute_force_scores)


@on_baichuan
def test_the_memory_of_biases_is_counted(make_tiny_model):
    sizes = {}
    for positions in ("rope", "alibi"):
        model = make_tiny_model(60, position_embedding=positions)
        head = OutputHead(model, torch.arange(20, 40))
        sizes[positions] = plan_memory(model.config, head, 200, [(5, 5), (5, 20)], 4, 2**26)[0]
    assert 1 <= sizes["alibi"] < 0.8 * sizes["rope"]


@pytest.fixture(scope="module")
def tokenizer(base_tokenizer):
    random = np.random.default_rng(0)
    quantizer = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=[8, 8, 8], num_iterations=2))
    quantizer.fit(random.standard_normal((100, 6), dtype=np.float32))
    codes = random.integers(0, 8, (40, 3))
    pruning = TokenPruning("top_k", layer=1, top_k=3).fit(codes, [8, 8, 8])
    catalog = ProductCatalog.build([f"p{row}" for row in range(40)], codes, [8, 8, 8], pruning)
    return SIDTokenizer.from_base(base_tokenizer, catalog, quantizer)


@both_positions
@pytest.mark.parametrize("base_tokenizer, make_tiny_model", [("llama", "baichuan")], indirect=True)
def test_all_the_ways_to_search_agree(make_tiny_model, tokenizer, positions):
    model = make_tiny_model(tokenizer.base_size, position_embedding=positions)
    initialize_sid_rows(model, tokenizer, seed=1)
    expected = search(model, tokenizer, EXAMPLES, top_k=6, num_beams=40)
    prompts = tokenizer.encode_prompts(EXAMPLES)["input_ids"]
    inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")

    retrieve = pipeline("sid-retrieval", model=model, tokenizer=tokenizer, device="cpu")
    found = retrieve(EXAMPLES, top_k=6, num_beams=40, batch_size=3)
    assert [[hit["sid"] for hit in hits] for hits in found] == [[hit["sid"] for hit in hits] for hits in expected]

    sequences = model.generate(
        **inputs,
        custom_generate=sid_generate,
        sid_tokenizer=tokenizer,
        top_k=6,
        beams=40,
        return_dict_in_generate=True,
    )
    assert sequences.sequences_scores.view(3, 6)[:, 0].tolist() == pytest.approx(
        [hits[0]["score"] for hits in expected], abs=1e-4
    )

    # generate() reorders the cache, and with it the positions.
    config = sid_generation_config(model, tokenizer, num_beams=40, num_return_sequences=6)
    width = inputs["input_ids"].shape[1]
    processors = [SIDLogitsProcessor(tokenizer, prompt_length=width)]
    output = model.generate(
        **inputs,
        generation_config=config,
        logits_processor=processors,
        return_dict_in_generate=True,
        output_scores=True,
    )
    sids = tokenizer.sid_strings(tokenizer.find_sids(output.sequences[:, width:].tolist()))
    for row, hits in enumerate(expected):
        distinct = list(dict.fromkeys(hit["sid"] for hit in hits))
        assert sids[6 * row : 6 * row + len(distinct)][:3] == distinct[:3]
