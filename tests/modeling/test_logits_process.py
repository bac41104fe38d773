import copy
import re

import pytest
import torch

from rqsid.modeling import SIDLogitsProcessor, sid_generation_config
from rqsid.modeling.trie import SIDTrie

# Unequal lengths; the second one's history holds SID tokens (20 and up), the third one ends in them.
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [4, 21, 27, 33, 5], [3, 20, 26, 32], [9], [18, 17, 2, 4, 6, 8]]


def pad_left(prompts):
    longest = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
    }


def generate(model, tokenizer, processor=None, inputs=None, **options):
    """SID rows and scores, `(prompts, num_return_sequences)` each."""
    inputs = pad_left(PROMPTS) if inputs is None else inputs
    processor = processor or SIDLogitsProcessor(tokenizer, inputs["input_ids"].shape[1])
    config = sid_generation_config(model, tokenizer, **options, return_dict_in_generate=True, output_scores=True)
    output = model.generate(**inputs, generation_config=config, logits_processor=[processor])
    rows = processor.sid_rows(output.sequences).view(len(inputs["input_ids"]), -1)
    return rows, None if output.get("sequences_scores") is None else output.sequences_scores.view_as(rows), output


@pytest.fixture(scope="module")
def fixed(make_tiny_model, make_tokenizer, brute_force_scores):
    """SIDs of one length, for which `generate()` is exact: tokenizer, model, exact scores."""
    tokenizer = make_tokenizer(absent=0.0)
    model = make_tiny_model(tokenizer.vocab_size, bos_token_id=None)
    exact = [brute_force_scores(model, prompt, tokenizer.sid_sequences()) for prompt in PROMPTS]
    return tokenizer, model, torch.stack(exact)


@pytest.fixture(scope="module")
def variable(make_tiny_model, make_tokenizer, brute_force_scores):
    """The same for SIDs of lengths 2 and 3."""
    tokenizer = make_tokenizer()
    model = make_tiny_model(tokenizer.vocab_size, bos_token_id=None)
    exact = [brute_force_scores(model, prompt, tokenizer.sid_sequences()) for prompt in PROMPTS]
    return tokenizer, model, torch.stack(exact)


def test_hand_computed(make_tokenizer):
    # Layers of 2 codes: tokens 20, 21 then 22, 23 then 24, 25; SIDs (20, 22, 24), (20, 25), (21, 23, 24); end token 1.
    tokenizer = make_tokenizer(codes=[(0, 0, 0), (0, -1, 1), (1, 1, 0)], codebook_size=2)
    processor = SIDLogitsProcessor(tokenizer, prompt_length=2)
    scores = torch.arange(8 * 29, dtype=torch.float32).view(8, 29) - 100
    # complete SIDs, their ends and fillings, a beam out of the trie, an end too early
    generated = [[20, 22], [20, 25], [21, 23], [25, 1], [20, 23], [1, 1], [20, 1], [0, 0]]
    input_ids = torch.tensor([[20, 22] + row for row in generated])
    before = scores.clone()
    processed = processor(input_ids, scores)
    expected = torch.full_like(scores, -torch.inf)
    expected[0, 24], expected[2, 24] = scores[0, 24], scores[2, 24]
    expected[[1, 3, 4, 5, 6, 7], 1] = 0.0
    assert torch.equal(processed, expected)
    assert torch.equal(scores, before) and processed.data_ptr() != scores.data_ptr()

    first = processor(input_ids[:1, :2], scores[:1])
    assert (~first.isneginf()).nonzero()[:, 1].tolist() == [20, 21]
    second = processor(input_ids[:1, :3], scores[:1])
    assert (~second.isneginf()).nonzero()[:, 1].tolist() == [22, 25]
    # the same rows as the beams of another order give the same scores: no state is kept
    order = torch.tensor([3, 1, 0, 7, 2, 2, 6, 5])
    assert torch.equal(processor(input_ids[order], scores[order]), expected[order])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(make_tokenizer, dtype):
    tokenizer = make_tokenizer()
    processed = SIDLogitsProcessor(tokenizer, 1)(torch.tensor([[5], [6]]), torch.zeros((2, 40), dtype=dtype))
    assert processed.dtype == dtype


def test_token_id_zero_is_a_token_like_any_other(make_tokenizer):
    # 0 also fills the places without a child, which must neither allow nor forbid it.
    tokenizer = make_tokenizer()
    processor = SIDLogitsProcessor(tokenizer, 0, SIDTrie(torch.tensor([[0, 2], [3, 4], [3, 5]])))
    scores = torch.full((2, 8), -2.0)
    allowed = ~processor(torch.tensor([[0], [3]]), scores).isneginf()
    assert [row.nonzero()[:, 0].tolist() for row in allowed] == [[2], [4, 5]]
    assert processor(torch.empty((1, 0), dtype=torch.int64), scores[:1])[0, 0] == -2.0


def test_beams_equal_brute_force(fixed):
    tokenizer, model, exact = fixed
    rows, scores, _ = generate(model, tokenizer, num_beams=32, num_return_sequences=30)
    expected, order = exact.sort(dim=1, descending=True)
    assert torch.equal(rows, order)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


def test_processor_can_be_used_again(fixed, make_tokenizer):
    tokenizer, model, _ = fixed
    processor = SIDLogitsProcessor(tokenizer, 7)
    first = generate(model, tokenizer, processor, num_beams=6, num_return_sequences=6)
    second = generate(model, tokenizer, processor, num_beams=6, num_return_sequences=6)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1]) and (first[0] >= 0).all()


def test_variable_length(variable):
    # `generate()` may lose short SIDs, but all it returns is valid, distinct and scored exactly.
    tokenizer, model, exact = variable
    rows, scores, output = generate(model, tokenizer, num_beams=60, num_return_sequences=30)
    lengths = (tokenizer.sid_sequences() >= 0).sum(1)
    for row in range(len(PROMPTS)):
        is_valid = rows[row] >= 0
        assert len(rows[row, is_valid].unique()) == is_valid.sum() > 20
        assert set(lengths[rows[row, is_valid]].tolist()) == {2, 3}
        torch.testing.assert_close(scores[row, is_valid], exact[row, rows[row, is_valid]], atol=1e-4, rtol=0)
        assert torch.equal(is_valid, scores[row] > -1e8)
    assert output.sequences.shape[1] == 7 + 3 + 1


def test_padding_token_zero_fills_with_the_end_token(variable):
    # transformers takes `pad_token_id or eos_token_id`; reading up to the first end token is right either way.
    tokenizer, model, _ = variable
    other = copy.copy(tokenizer)
    other.pad_token_id = 2
    results = {}
    for stub, filling in ((tokenizer, 1), (other, 2)):
        rows, scores, output = generate(model, stub, num_beams=60, num_return_sequences=30)
        generated = output.sequences.view(5, 30, -1)[:, :, 7:]
        short = (generated[..., 2] == 1) & (rows >= 0)
        assert short.any() and (generated[short][:, 3] == filling).all()
        results[filling] = rows, scores
    assert torch.equal(results[1][0], results[2][0]) and torch.equal(results[1][1], results[2][1])


@pytest.mark.parametrize("codes", [[(0, 1, 2)], [(0, 1, 2), (0, -1, 3), (4, -1, 1)]])
def test_more_beams_than_sids(variable, make_tokenizer, brute_force_scores, codes):
    _, model, _ = variable
    tokenizer = make_tokenizer(codes=codes)
    rows, scores, _ = generate(model, tokenizer, num_beams=12, num_return_sequences=12)
    assert not scores.isnan().any()
    for row, prompt in enumerate(PROMPTS):
        exact = brute_force_scores(model, prompt, tokenizer.sid_sequences())
        is_found = scores[row] > -1e8
        assert torch.equal(rows[row, is_found], exact.argsort(descending=True))
        torch.testing.assert_close(scores[row, is_found], exact.sort(descending=True).values, atol=1e-4, rtol=0)


def test_a_filter_keeps_scores_and_order(fixed):
    tokenizer, model, exact = fixed
    kept = torch.arange(0, 30, 6)
    processor = SIDLogitsProcessor(tokenizer, 7, SIDTrie.from_tokenizer(tokenizer, kept))
    rows, scores, _ = generate(model, tokenizer, processor, num_beams=20, num_return_sequences=5)
    expected, order = exact[:, kept].sort(dim=1, descending=True)
    assert torch.equal(rows, kept[order])
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


def test_rows_that_are_not_the_catalogs_are_refused(fixed):
    tokenizer, model, _ = fixed
    sequences = tokenizer.sid_sequences()
    for trie in (SIDTrie(sequences[::6]), SIDTrie(sequences, torch.arange(30) + 30)):
        processor = SIDLogitsProcessor(tokenizer, 7, trie)
        with pytest.raises(ValueError, match=re.escape("with `SIDTrie.from_tokenizer(tokenizer, sid_rows)`")):
            generate(model, tokenizer, processor, num_beams=5, num_return_sequences=5)


def test_greedy_gives_valid_sids(fixed, variable):
    for tokenizer, model, _ in (fixed, variable):
        rows, _, output = generate(model, tokenizer, num_beams=1, num_return_sequences=1, output_logits=True)
        assert rows.shape == (5, 1) and (rows >= 0).all()
        # Raw logits come back untouched: the processor works out of place.
        assert all(logits.isfinite().all() for logits in output.logits)
        assert all(scores.isneginf().any() for scores in output.scores)


def test_sampling_gives_valid_sids(variable):
    tokenizer, model, _ = variable
    torch.manual_seed(0)
    processor = SIDLogitsProcessor(tokenizer, 7)
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": 20, "max_new_tokens": 4}
    options |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sequences = model.generate(**pad_left(PROMPTS), logits_processor=[processor], **options)
    rows = processor.sid_rows(sequences)
    assert (rows >= 0).all() and len(rows.unique()) > 10


def test_prompt_may_end_with_the_first_codes(fixed, brute_force_scores):
    tokenizer, model, exact = fixed
    first = tokenizer.sid_sequences()[0, :1]
    inputs = pad_left([PROMPTS[0] + first.tolist()])
    rows, scores, _ = generate(
        model, tokenizer, SIDLogitsProcessor(tokenizer, 7), inputs, num_beams=30, num_return_sequences=4
    )
    kept = (tokenizer.sid_sequences()[:, 0] == first).nonzero()[:, 0]
    expected = exact[0, kept] - brute_force_scores(model, PROMPTS[0], first[None])
    assert len(kept) >= 4
    assert torch.equal(rows[0], kept[expected.argsort(descending=True)[:4]])
    torch.testing.assert_close(scores[0], expected.sort(descending=True).values[:4], atol=1e-4, rtol=0)


# Each of these, held by the model's own generation config, would change or break what is returned.
POLLUTION = {
    "do_sample": True,
    "top_k": 3,
    "top_p": 0.4,
    "min_p": 0.5,
    "typical_p": 0.3,
    "epsilon_cutoff": 0.3,
    "eta_cutoff": 0.3,
    "temperature": 0.5,
    "repetition_penalty": 1.3,
    "length_penalty": 2.0,
    "early_stopping": True,
    "renormalize_logits": True,
    "no_repeat_ngram_size": 1,
    "min_length": 12,
    "min_new_tokens": 6,
    "max_length": 9,
    "max_new_tokens": 2,
    "max_time": 0.0,
    "suppress_tokens": [20, 26],
    "begin_suppress_tokens": [20, 21],
    "bad_words_ids": [[20], [21, 25]],
    "sequence_bias": [[[22], 5.0], [[20, 26], -8.0]],
    "forced_eos_token_id": 33,
    "exponential_decay_length_penalty": (1, 1.5),
    "remove_invalid_values": True,
    "guidance_scale": 2.0,
    "penalty_alpha": 0.6,
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "num_return_sequences": 2,
    "num_beams": 2,
    "eos_token_id": [20, 30],
    "pad_token_id": 21,
    "use_mtp": True,
    "low_memory": True,
    "is_assistant": True,
    "cache_implementation": "static",
}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_options_of_the_model_are_neutralised(fixed):
    tokenizer, model, exact = fixed
    model = copy.deepcopy(model)
    for name, value in POLLUTION.items():
        setattr(model.generation_config, name, value)
    held = model.generation_config.to_dict()
    rows, scores, _ = generate(model, tokenizer, num_beams=32, num_return_sequences=30)
    expected, order = exact.sort(dim=1, descending=True)
    assert torch.equal(rows, order)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
    greedy, _, _ = generate(model, tokenizer, num_beams=1, num_return_sequences=1)
    assert (greedy >= 0).all()
    assert model.generation_config.to_dict() == held


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_narrow_beams_are_not_stopped_early(make_tiny_model, make_tokenizer):
    # With a SID in every beam `early_stopping` would end the search, though a longer SID may still outrank the worst.
    tokenizer = make_tokenizer(seed=1, num_sids=60, num_layers=4, absent=0.5)
    model = make_tiny_model(tokenizer.vocab_size, bos_token_id=None)
    polluted = copy.deepcopy(model)
    polluted.generation_config.early_stopping = True
    for prompt in [*PROMPTS, *([token] * 3 for token in range(2, 14))]:
        inputs = pad_left([prompt])
        rows, scores, _ = generate(model, tokenizer, inputs=inputs, num_beams=3, num_return_sequences=3)
        again, again_scores, _ = generate(polluted, tokenizer, inputs=inputs, num_beams=3, num_return_sequences=3)
        assert torch.equal(rows, again) and torch.equal(scores, again_scores)


@pytest.mark.parametrize(
    "name", ["bad_words_ids", "begin_suppress_tokens", "max_time", "sequence_bias", "suppress_tokens"]
)
def test_options_without_an_off_value(fixed, name):
    # `generate()` merges these into any config that leaves them at None, so the config must be made with the model.
    tokenizer, model, exact = fixed
    model = copy.deepcopy(model)
    options = {"return_dict_in_generate": True, "output_scores": True}
    made_before = sid_generation_config(model, tokenizer, 32, 30, **options)
    setattr(model.generation_config, name, POLLUTION[name])
    made_after = sid_generation_config(model, tokenizer, 32, 30, **options)
    processor = SIDLogitsProcessor(tokenizer, 7)
    expected = exact.sort(dim=1, descending=True).values
    for config, is_exact in ((made_before, False), (made_after, True)):
        output = model.generate(**pad_left(PROMPTS), generation_config=config, logits_processor=[processor])
        assert torch.allclose(output.sequences_scores.view(5, 30), expected, atol=1e-4) == is_exact


@pytest.mark.parametrize(
    "name, value",
    [
        ("forced_bos_token_id", 20),
        ("watermarking_config", {"greenlist_ratio": 0.5}),
        ("stop_strings", ["a"]),
        ("dola_layers", "high"),
        ("prompt_lookup_num_tokens", 3),
        ("assistant_early_exit", 1),
        ("constraints", []),
        ("force_words_ids", [[20]]),
    ],
)
def test_options_that_cannot_be_neutralised_are_named(fixed, name, value):
    tokenizer, model, _ = fixed
    model = copy.deepcopy(model)
    setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=re.escape(f"model.generation_config.{name} = None")):
        sid_generation_config(model, tokenizer)


@pytest.mark.parametrize(
    "name, value",
    [
        ("length_penalty", 1.0),
        ("do_sample", True),
        ("renormalize_logits", True),
        ("repetition_penalty", 1.05),
        ("early_stopping", True),
        ("temperature", 0.7),
        ("top_k", 10),
        ("min_p", 0.1),
        ("no_repeat_ngram_size", 2),
        ("bad_words_ids", [[20]]),
        ("forced_bos_token_id", 20),
        ("eos_token_id", 5),
        ("max_length", 20),
        ("max_new_tokens", 3),
        ("max_new_tokens", None),
        ("num_beam_groups", 2),
        ("lenght_penalty", 0.0),
    ],
)
def test_overrides_that_break_the_ranking_are_named(fixed, name, value):
    tokenizer, model, _ = fixed
    with pytest.raises(ValueError, match=re.escape(f"`{name}={value!r}`")):
        sid_generation_config(model, tokenizer, **{name: value})


def test_config(fixed):
    tokenizer, model, _ = fixed
    config = sid_generation_config(model, tokenizer, 8, 4, output_scores=True, max_new_tokens=6, length_penalty=0.0)
    assert (config.num_beams, config.num_return_sequences, config.max_new_tokens) == (8, 4, 6)
    assert (config.length_penalty, config.do_sample, config.output_scores) == (0.0, False, True)
    assert (config.eos_token_id, config.pad_token_id) == (1, 0)
    # a SID of three tokens and its end
    assert sid_generation_config(model, tokenizer).max_new_tokens == 4
    with pytest.raises(ValueError, match="num_return_sequences"):
        sid_generation_config(model, tokenizer, num_beams=4, num_return_sequences=5)


def test_bad_prompt_length(fixed):
    tokenizer, model, _ = fixed
    for value in (-1, 2.0, True, None):
        with pytest.raises(ValueError, match=re.escape(f"got {value!r}")):
            SIDLogitsProcessor(tokenizer, value)
    processor = SIDLogitsProcessor(tokenizer, 9)
    with pytest.raises(ValueError, match="have 7 tokens, fewer than `prompt_length` 9"):
        generate(model, tokenizer, processor, num_beams=2, num_return_sequences=1)
    with pytest.raises(ValueError, match="have 7 tokens"):
        processor.sid_rows(pad_left(PROMPTS)["input_ids"])


def test_a_prompt_length_inside_the_prompt_is_refused(make_tokenizer):
    tokenizer = make_tokenizer()
    processor = SIDLogitsProcessor(tokenizer, prompt_length=2)
    prompts = torch.full((3, 5), 4)  # token 4 is no SID token
    with pytest.raises(ValueError, match="`prompt_length` 2 none of the sequences begins with a SID"):
        processor(prompts, torch.zeros(3, tokenizer.vocab_size))
