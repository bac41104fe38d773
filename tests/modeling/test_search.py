import copy
import logging
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rqsid import ProductCatalog, ResidualQuantizer, ResidualQuantizerConfig, SIDTokenizer, initialize_sid_rows
from rqsid.modeling.search import beam_search, search
from rqsid.modeling.trie import SIDTrie

# Unequal lengths; the second one's history holds SID tokens (20 and up), the third one ends in them.
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [4, 21, 27, 33, 5], [3, 20, 26, 32], [9], [18, 17, 2, 4, 6, 8]]
ROWS = range(len(PROMPTS))


@pytest.fixture(scope="module")
def setting(make_tiny_model, make_tokenizer, brute_force_scores):
    """Tokenizer, trie, model and the exact score of every SID for every prompt."""
    tokenizer = make_tokenizer()
    model = make_tiny_model(tokenizer.vocab_size)
    sequences = tokenizer.sid_sequences()
    exact = torch.stack([brute_force_scores(model, prompt, sequences) for prompt in PROMPTS])
    assert {len(row[row >= 0]) for row in sequences} == {2, 3}
    return tokenizer, SIDTrie.from_tokenizer(tokenizer), model, exact


def pad_left(prompts, pad=0):
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    return input_ids, torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])


def assert_ranking(results, exact, tokenizer, top_k):
    """Products of a stub with one product per SID are `p{row}`."""
    for found, truth in zip(results, exact, strict=True):
        order = truth.argsort(descending=True)[:top_k]
        assert [hit["product_id"] for hit in found] == [f"p{row}" for row in order.tolist()]
        assert [hit["sid"] for hit in found] == tokenizer.sid_strings(order.tolist())
        assert [hit["score"] for hit in found] == pytest.approx(truth[order].tolist(), abs=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_wide_beams_equal_brute_force(setting, attention, batch_size):
    tokenizer, _, model, exact = setting
    model = copy.deepcopy(model)
    model.set_attn_implementation(attention)
    assert_ranking(search(model, tokenizer, PROMPTS, top_k=30, batch_size=batch_size), exact, tokenizer, 30)
    assert_ranking(search(model, tokenizer, PROMPTS, top_k=4, batch_size=batch_size), exact, tokenizer, 4)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_sids=st.integers(1, 25),
    num_layers=st.integers(1, 4),
    absent=st.sampled_from([0.0, 0.3, 0.8]),
)
def test_random_sids_equal_brute_force(
    make_tiny_model, make_tokenizer, brute_force_scores, seed, num_sids, num_layers, absent
):
    tokenizer = make_tokenizer(seed, num_sids, num_layers, 6, absent)
    model = make_tiny_model(FULL_VOCABULARY, seed=seed % 3)
    generator = np.random.default_rng(seed)
    prompts = [generator.integers(2, FULL_VOCABULARY, generator.integers(1, 9)).tolist() for _ in range(2)]
    exact = torch.stack([brute_force_scores(model, prompt, tokenizer.sid_sequences()) for prompt in prompts])
    assert_ranking(search(model, tokenizer, prompts, top_k=30), exact, tokenizer, 30)


FULL_VOCABULARY = 60


def reference_beam_search(exact_of_prefix, sids, num_beams):
    """Plain beam search over a dictionary of prefix scores; finished SIDs leave the beam for the pool."""
    pool, beams = {}, [()]
    for length in range(1, max(map(len, sids)) + 1):
        prefixes = {sid[:length] for sid in sids if len(sid) >= length and sid[: length - 1] in beams}
        pool |= {prefix: exact_of_prefix[prefix] for prefix in prefixes if prefix in sids}
        beams = sorted(prefixes - set(sids), key=exact_of_prefix.get, reverse=True)[:num_beams]
    return sorted(pool, key=pool.get, reverse=True)


@pytest.mark.parametrize("num_beams", [1, 2, 3])
def test_narrow_beams_equal_a_plain_beam_search(setting, brute_force_scores, num_beams):
    tokenizer, trie, model, exact = setting
    sids = [tuple(token for token in row if token >= 0) for row in tokenizer.sid_sequences().tolist()]
    prefixes = sorted({sid[:length] for sid in sids for length in range(1, len(sid) + 1)})
    padded = torch.tensor([list(prefix) + [-1] * (trie.depth - len(prefix)) for prefix in prefixes])
    sid_rows, scores = beam_search(model, *pad_left(PROMPTS), trie, num_beams, 30)
    for row in ROWS:
        of_prefix = dict(zip(prefixes, brute_force_scores(model, PROMPTS[row], padded).tolist(), strict=True))
        expected = [sids.index(sid) for sid in reference_beam_search(of_prefix, sids, num_beams)]
        found = sid_rows[row][sid_rows[row] >= 0]
        assert found.tolist() == expected and len(expected) < 30
        torch.testing.assert_close(scores[row, : len(found)], exact[row, found], atol=1e-4, rtol=0)


def test_finished_sids_take_no_beam(setting, make_tokenizer, brute_force_scores):
    # One beam, five SIDs of length 2 below a common first code and one of length 3: all six are found.
    _, _, model, _ = setting
    tokenizer = make_tokenizer(codes=[(0, -1, code) for code in range(5)] + [(0, 3, 3)])
    exact = brute_force_scores(model, PROMPTS[0], tokenizer.sid_sequences())[None]
    assert_ranking(search(model, tokenizer, PROMPTS[:1], num_beams=1), exact, tokenizer, 6)


def test_filtered_trie_keeps_scores_and_order(setting):
    # Nothing is renormalised, so the ranking within a subset is the one of all SIDs.
    tokenizer, _, model, exact = setting
    kept = torch.arange(0, 30, 7)
    trie = SIDTrie.from_tokenizer(tokenizer, kept)
    sid_rows, scores = beam_search(model, *pad_left(PROMPTS), trie, 50, 10)
    expected, order = exact[:, kept].sort(dim=1, descending=True)
    assert torch.equal(sid_rows[:, :5], kept[order]) and (sid_rows[:, 5:] == -1).all()
    torch.testing.assert_close(scores[:, :5], expected, atol=1e-4, rtol=0)
    assert scores[:, 5:].isneginf().all()


@pytest.fixture(scope="module")
def real_parts(base_tokenizer, make_tiny_model):
    """A real tokenizer whose 60 products share 40 SIDs or fewer, and a model for it."""
    embeddings = np.random.default_rng(0).standard_normal((60, 6), dtype=np.float32)
    quantizer = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=[6, 6, 6])).fit(embeddings)
    codes = quantizer.encode(embeddings)
    codes[40:] = codes[:40:2]
    catalog = ProductCatalog.build([f"p{row}" for row in range(60)], codes, [6, 6, 6], popularity=np.arange(60) % 7)
    tokenizer = SIDTokenizer.from_base(base_tokenizer, catalog, quantizer)
    model = make_tiny_model(tokenizer.base_size)
    initialize_sid_rows(model, tokenizer)
    return tokenizer, model


@pytest.mark.parametrize("base_tokenizer", ["llama"], indirect=True)
def test_a_subset_returns_its_own_products(real_parts, brute_force_scores):
    tokenizer, model = real_parts
    catalog = tokenizer.catalog
    kept = torch.arange(catalog.num_sids - 1, 0, -3)
    assert any(len(catalog.products_of(row)) > 1 for row in kept.tolist())
    results = search(model, tokenizer, PROMPTS, top_k=60, trie=SIDTrie.from_tokenizer(tokenizer, kept))
    for prompt, found in zip(PROMPTS, results, strict=True):
        exact = brute_force_scores(model, prompt, tokenizer.sid_sequences())
        ranked = sorted(kept.tolist(), key=lambda row: -exact[row])
        expected = [(row, product) for row in ranked for product in catalog.products_of(row)]
        assert [hit["product_id"] for hit in found] == catalog.product_ids(np.array([p for _, p in expected]))
        assert [hit["sid"] for hit in found] == tokenizer.sid_strings(np.array([row for row, _ in expected]))
        assert [hit["score"] for hit in found] == pytest.approx([exact[row].item() for row, _ in expected], abs=1e-4)


@pytest.mark.parametrize("base_tokenizer", ["llama"], indirect=True)
def test_a_trie_with_other_rows_is_refused(real_parts):
    tokenizer, model = real_parts
    sequences = tokenizer.sid_sequences()
    rows = torch.arange(len(sequences))
    by_position, shifted, beyond = (
        SIDTrie(sequences[::3]),
        SIDTrie(sequences, rows.roll(1)),
        SIDTrie(sequences, rows + 1),
    )
    for trie in (by_position, shifted, beyond):
        with pytest.raises(ValueError, match=re.escape("with `SIDTrie.from_tokenizer(tokenizer, sid_rows)`")):
            search(model, tokenizer, PROMPTS, top_k=60, trie=trie)
    # Positions are rows where all SIDs stand in the catalog's order.
    assert search(model, tokenizer, PROMPTS, trie=SIDTrie(sequences)) == search(model, tokenizer, PROMPTS)


def test_a_tokenizer_of_other_codebooks_is_refused(setting):
    tokenizer, _, model, _ = setting
    model = copy.deepcopy(model)
    model.config.sid_codebook = "00000000000000b1"
    with pytest.raises(
        ValueError, match="codebook 00000000000000b1, the tokenizer has codebook 00000000000000a0.*Load"
    ):
        search(model, tokenizer, PROMPTS)
    expected = search(setting[2], tokenizer, PROMPTS)
    for fingerprint in (tokenizer.codebook_fingerprint(), None):
        model.config.sid_codebook = fingerprint
        assert search(model, tokenizer, PROMPTS) == expected


def test_softmax_over_sid_tokens(setting, brute_force_scores):
    tokenizer, trie, model, exact = setting
    vocabulary = torch.cat([tokenizer.sid_vocabulary(), torch.tensor([tokenizer.eos_token_id])])
    narrow = torch.stack(
        [brute_force_scores(model, prompt, tokenizer.sid_sequences(), vocabulary) for prompt in PROMPTS]
    )
    assert (narrow > exact + 1e-3).all()
    assert_ranking(search(model, tokenizer, PROMPTS, top_k=30, normalize="sid"), narrow, tokenizer, 30)
    # What lies outside the vocabulary does not matter, not even the tokens of the trie.
    sid_rows, _ = beam_search(model, *pad_left(PROMPTS), trie, 50, 30, "sid", vocabulary.flip(0))
    assert torch.equal(sid_rows, narrow.argsort(dim=1, descending=True))


@pytest.mark.parametrize("num_sids", [1, 2])
def test_more_beams_and_top_k_than_sids(setting, make_tokenizer, brute_force_scores, num_sids):
    _, _, model, _ = setting
    tokenizer = make_tokenizer(codes=[(2, 1, 4), (3, -1, 0)][:num_sids])
    exact = torch.stack([brute_force_scores(model, prompt, tokenizer.sid_sequences()) for prompt in PROMPTS])
    results = search(model, tokenizer, PROMPTS, top_k=100, num_beams=500)
    assert_ranking(results, exact, tokenizer, 100)
    assert [len(found) for found in results] == [num_sids] * len(PROMPTS)


def test_products_of_one_sid_tie(setting, make_tokenizer, brute_force_scores):
    _, _, model, _ = setting
    tokenizer = make_tokenizer(codes=[(0, 1, 2), (1, -1, 0), (4, 4, 4)], group_sizes=[3, 1, 2])
    exact = brute_force_scores(model, PROMPTS[0], tokenizer.sid_sequences())
    products = {0: ["p0", "p1", "p2"], 1: ["p3"], 2: ["p4", "p5"]}
    expected = [(p, exact[sid].item()) for sid in exact.argsort(descending=True).tolist() for p in products[sid]]
    for top_k in (1, 2, 4, 6, 9):
        (found,) = search(model, tokenizer, PROMPTS[:1], top_k=top_k)
        assert [hit["product_id"] for hit in found] == [product for product, _ in expected[:top_k]]
        assert [hit["score"] for hit in found] == pytest.approx([score for _, score in expected[:top_k]], abs=1e-4)


def test_prefix_codes_condition_the_search(setting, brute_force_scores):
    # Rows with different numbers of valid SIDs, prefixes of different lengths, and a prefix that is a whole SID.
    tokenizer, _, model, exact = setting
    codes = tokenizer.codes
    short = next(code for code in codes if code[1] == -1)
    full = next(code for code in codes if code[1] >= 0)
    prefixes = [[codes[0][0]], [], list(full[:2]), list(short), [short[0]]]
    results = search(model, tokenizer, PROMPTS, top_k=40, prefix_codes=prefixes)
    sizes = set()
    for row, (prefix, found) in enumerate(zip(prefixes, results, strict=True)):
        given = tokenizer.prefix_token_ids(prefix)
        tokens = [tokenizer.prefix_token_ids(code) for code in codes]
        rows = torch.tensor([at for at, sid in enumerate(tokens) if sid[: len(given)] == given])
        of_prefix = brute_force_scores(model, PROMPTS[row], torch.tensor([given])).item() if given else 0.0
        expected, order = (exact[row, rows] - of_prefix).sort(descending=True)
        assert [hit["product_id"] for hit in found] == [f"p{at}" for at in rows[order].tolist()]
        assert [hit["score"] for hit in found] == pytest.approx(expected.tolist(), abs=1e-4)
        sizes.add(len(found))
    assert results[3] == [{"product_id": f"p{codes.index(short)}", "sid": results[3][0]["sid"], "score": 0.0}]
    assert len(sizes) >= 3


def test_prefix_outside_the_trie(setting, make_tokenizer):
    _, _, model, _ = setting
    tokenizer = make_tokenizer(codes=[(0, 1, 2), (1, -1, 0)])
    with pytest.raises(ValueError, match=re.escape("begins with the codes [0, 2] of prompt 1")):
        search(model, tokenizer, PROMPTS[:2], prefix_codes=[[0, 1], [0, 2]])
    with pytest.raises(ValueError, match="1 entries for 2 prompts"):
        search(model, tokenizer, PROMPTS[:2], prefix_codes=[[0]])
    with pytest.raises(ValueError, match=re.escape("prefix [1, -1] ends with -1")):
        search(model, tokenizer, PROMPTS[:2], prefix_codes=[[0], [1, -1]])
    for wrong in ([None, []], [["a"], []], ["ab", []], [[0.5], []]):
        with pytest.raises(TypeError, match="must hold a list of integers for each prompt"):
            search(model, tokenizer, PROMPTS[:2], prefix_codes=wrong)


def test_prefixes_that_are_whole_sids(setting, make_tokenizer):
    _, _, model, _ = setting
    tokenizer = make_tokenizer(codes=[(0, 1, 2), (1, -1, 0)])
    found = search(model, tokenizer, PROMPTS[:2], prefix_codes=[[0, 1, 2], [1, -1, 0]])
    assert [[(hit["product_id"], hit["score"]) for hit in hits] for hits in found] == [[("p0", 0.0)], [("p1", 0.0)]]


def test_forms_of_input(setting):
    tokenizer, _, model, _ = setting
    expected = search(model, tokenizer, PROMPTS)
    input_ids, attention_mask = pad_left(PROMPTS, pad=7)
    assert search(model, tokenizer, {"input_ids": input_ids, "attention_mask": attention_mask}) == expected
    assert search(model, tokenizer, []) == []
    examples = [{"query": "milk"}, {"query": "chips"}]
    as_ids = tokenizer.encode_prompts(examples, max_length=100)["input_ids"]
    assert search(model, tokenizer, examples) == search(model, tokenizer, as_ids)
    # the context of 256 less a SID of three tokens and its end
    assert tokenizer.max_length == 256 - 3 - 1


def test_truncation_is_told(setting, monkeypatch):
    tokenizer, _, model, _ = setting
    told = []
    monkeypatch.setattr(logging.getLogger("rqsid.modeling.search"), "warning", told.append)
    assert len(search(model, tokenizer, [{"query": "a" * 300}, {"query": "b"}])) == 2
    assert told == ["1 of 2 prompts left out the oldest of their history to fit 252 tokens."]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_model_state_is_restored(setting):
    tokenizer, _, model, exact = setting
    model = copy.deepcopy(model)
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    model.train()
    model.model.layers[0].eval()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    before = {name: module.training for name, module in model.named_modules()}
    assert_ranking(search(model, tokenizer, PROMPTS), exact, tokenizer, 10)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert len(set(before.values())) == 2 and torch.is_grad_enabled()
    model.lm_head.forward = None
    with pytest.raises(TypeError):
        search(model, tokenizer, PROMPTS)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_forward_passes(setting, monkeypatch):
    # One prefill of the prompts, then one pass a level; the cache grows by the beams and is never expanded.
    tokenizer, trie, model, _ = setting
    shapes, forward = [], model.model.forward

    def record(*args, **kwargs):
        output = forward(*args, **kwargs)
        cached = kwargs["past_key_values"].layers[0].keys.shape
        shapes.append((tuple(kwargs["input_ids"].shape), cached[0], cached[2]))
        return output

    monkeypatch.setattr(model.model, "forward", record)
    beam_search(model, *pad_left(PROMPTS), trie, 4, 2)
    assert shapes == [((5, 7), 5, 7), ((5, 4), 5, 11), ((5, 4), 5, 15)]


def test_scores_do_not_depend_on_the_batch(setting):
    tokenizer, trie, model, _ = setting
    together = beam_search(model, *pad_left(PROMPTS), trie, 3, 5)
    for row in ROWS:
        alone = beam_search(model, *pad_left(PROMPTS[row : row + 1]), trie, 3, 5)
        assert torch.equal(alone[0][0], together[0][row])
        torch.testing.assert_close(alone[1][0], together[1][row], atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bf16(setting, attention):
    tokenizer, trie, model, exact = setting
    model = copy.deepcopy(model)
    model.set_attn_implementation(attention)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = beam_search(model, *pad_left(PROMPTS), trie, 50, 30)
    half = beam_search(model.bfloat16(), *pad_left(PROMPTS), trie, 50, 30)
    for sid_rows, scores in (autocast, half):
        assert scores.dtype == torch.float32 and (scores.diff(dim=1) <= 0).all()
        assert torch.equal(sid_rows.sort(dim=1).values, torch.arange(30).expand(5, 30))
        # bf16 keeps 8 bits: with logits of this size a SID's score is off by some tenths at most
        assert (scores - exact.gather(1, sid_rows)).abs().max() < 0.7


def test_bf16_scores_are_normalised_in_float32(setting, make_tokenizer):
    _, _, model, _ = setting
    model = copy.deepcopy(model).bfloat16()
    tokenizer = make_tokenizer(codes=[(code,) for code in range(5)])
    input_ids, attention_mask = pad_left(PROMPTS[:1])
    sid_rows, scores = beam_search(model, input_ids, attention_mask, SIDTrie.from_tokenizer(tokenizer), 5, 5)
    with torch.no_grad():
        hidden = model.model(input_ids).last_hidden_state[0, -1]
    expected = (model.lm_head.weight.float() @ hidden.float()).log_softmax(-1)[20:25]
    # Of the logits outside the SIDs only the normaliser is left, so that their rounding nearly cancels out.
    torch.testing.assert_close(scores[0], expected[sid_rows[0]], atol=1e-2, rtol=0)
    torch.testing.assert_close(scores[0].diff(), expected[sid_rows[0]].diff(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "inputs, error, message",
    [
        ({"query": "milk"}, TypeError, "wrap a single example in a list"),
        ("milk", TypeError, "got str"),
        (["milk"], TypeError, "got a list of ['str']"),
        ([{"query": "milk"}, [5]], TypeError, "got a list of ['dict', 'list']"),
        ([[5.0]], TypeError, "got a list of ['list of float']"),
        ([[5, 400]], ValueError, "holds token 400"),
        ([[5], [-1]], ValueError, "holds token -1"),
        ([[5], []], ValueError, "Prompt 1 is empty"),
        ([[5], [5] * 254], ValueError, "Prompt 1 has 254 tokens"),
        ({"input_ids": torch.tensor([[5]])}, ValueError, "`attention_mask`"),
        (
            {"input_ids": torch.tensor([[5, 6], [5, 0]]), "attention_mask": torch.tensor([[1, 1], [1, 0]])},
            ValueError,
            "padded on the left",
        ),
        (
            {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.tensor([[1, 0, 1]])},
            ValueError,
            "padded on the left",
        ),
    ],
)
def test_bad_inputs(setting, inputs, error, message):
    tokenizer, _, model, _ = setting
    with pytest.raises(error, match=re.escape(message)):
        search(model, tokenizer, inputs)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": 0}, "`top_k` must be a positive integer, got 0"),
        ({"top_k": True}, "`top_k` must be a positive integer, got True"),
        ({"num_beams": 2.0}, "`num_beams` must be a positive integer, got 2.0"),
        ({"batch_size": -1}, "`batch_size` must be a positive integer, got -1"),
        ({"normalize": "children"}, '`normalize` must be "vocab" or "sid", got \'children\''),
    ],
)
def test_bad_options(setting, options, message):
    tokenizer, _, model, _ = setting
    with pytest.raises(ValueError, match=re.escape(message)):
        search(model, tokenizer, PROMPTS, **options)


def test_numpy_integers(setting):
    tokenizer, _, model, _ = setting
    options = {"top_k": 3, "num_beams": 20, "batch_size": 2, "max_memory": 2**24}
    expected = search(model, tokenizer, PROMPTS, **options)
    prompts = [list(np.array(prompt)) for prompt in PROMPTS]
    assert search(model, tokenizer, prompts, **{name: np.int64(value) for name, value in options.items()}) == expected


def test_tries_that_cannot_be_told_apart_or_are_none(setting):
    tokenizer, trie, model, _ = setting
    with pytest.raises(ValueError, match="A stack of 2 tries"):
        search(model, tokenizer, PROMPTS, trie=SIDTrie.stack([trie, trie]))
    with pytest.raises(ValueError, match="a list of 2 for 5 prompts"):
        search(model, tokenizer, PROMPTS, trie=[trie, trie])
    for wrong in ("stock", [{}] * 5):
        with pytest.raises(TypeError, match="`trie` must be a SIDTrie or a list of them, got (str|dict)"):
            search(model, tokenizer, PROMPTS, trie=wrong)
    with pytest.raises(TypeError, match="knows no catalog"):
        search(model, object(), PROMPTS)


def test_longest_prompt_that_fits(setting):
    tokenizer, _, model, _ = setting
    assert len(search(model, tokenizer, [[5] * 253])[0]) == 10


def test_unsuited_models(setting, make_tiny_model):
    tokenizer, trie, model, _ = setting
    with pytest.raises(ValueError, match="`vocabulary`"):
        beam_search(model, *pad_left(PROMPTS), trie, 5, 5, normalize="sid")
    with pytest.raises(ValueError, match=re.escape("(5, 7) and (5, 6)")):
        beam_search(model, pad_left(PROMPTS)[0], pad_left(PROMPTS)[1][:, 1:], trie, 5, 5)
    # the trie's last token is 34; a model that was not resized has no row for it
    with pytest.raises(ValueError, match="holds token 34 but the model has only 30 tokens"):
        search(make_tiny_model(30), tokenizer, [[5]])
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        search(broken, tokenizer, PROMPTS)
    broken.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="`flash_attention_2` attention"):
        search(broken, tokenizer, PROMPTS)
    if model.config.model_type == "qwen2":
        sliding = make_tiny_model(tokenizer.vocab_size, use_sliding_window=True, sliding_window=4, max_window_layers=1)
        with pytest.raises(ValueError, match="DynamicSlidingWindowLayer"):
            search(sliding, tokenizer, PROMPTS)


def test_an_impossible_token_is_no_answer(setting):
    # A token of probability zero (-inf logit) leaves its SIDs out instead of ranking them with the rest.
    tokenizer, trie, model, exact = setting
    model = copy.deepcopy(model)
    banned = tokenizer.sid_sequences()[0, 0].item()
    handle = model.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, torch.tensor([banned]), -torch.inf)
    )
    sid_rows, scores = beam_search(model, *pad_left(PROMPTS), trie, 50, 30)
    handle.remove()
    left = (tokenizer.sid_sequences()[:, 0] != banned).nonzero()[:, 0]
    assert 0 < len(left) < 30
    assert torch.equal(sid_rows[:, : len(left)].sort(dim=1).values, left.expand(5, -1))
    assert (sid_rows[:, len(left) :] == -1).all() and scores[:, len(left) :].isneginf().all()
