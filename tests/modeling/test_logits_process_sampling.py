"""The processor where scores are sampled from, stored, of half precision, or of a shape that is rare."""

import logging
import re

import numpy as np
import pytest
import torch
from transformers import GenerationConfig
from transformers.utils import logging as hf_logging

from rqsid import ProductCatalog, ResidualQuantizer, ResidualQuantizerConfig, SIDTokenizer
from rqsid.modeling.generation_options import sid_generation_config
from rqsid.modeling.logits_process import SIDLogitsProcessor
from rqsid.modeling.trie import SIDTrie

# Unequal lengths; the second one ends in tokens that could be the beginning of a SID.
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [4, 3, 5, 20, 26], [9]]
END = 1


def pad_left(prompts):
    longest = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
    }


def sampling(num_return_sequences=1, max_new_tokens=4, **options):
    options = {"do_sample": True, "top_k": 0, "eos_token_id": END, "pad_token_id": 0} | options
    return GenerationConfig(
        num_return_sequences=num_return_sequences,
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
        **options,
    )


@torch.no_grad()
def next_scores(model, prompt):
    return model(torch.tensor([prompt]), use_cache=False).logits[0, -1].double().log_softmax(-1)


def renormalised(model, prompt, sids):
    """Probability of each SID where every step is a softmax over the tokens that may follow."""
    probabilities = []
    for sid in sids:
        probability = 1.0
        for at in range(len(sid)):
            children = sorted({other[at] for other in sids if other[:at] == sid[:at]})
            shares = next_scores(model, prompt + sid[:at])[children].softmax(-1)
            probability *= shares[children.index(sid[at])].item()
        probabilities.append(probability)
    return np.array(probabilities)


def chi_square(counts, probabilities):
    expected = probabilities / probabilities.sum() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.fixture(scope="module")
def uneven(make_tiny_model, make_tokenizer):
    """Nine SIDs of lengths 2 and 3, of which one has its first code for itself, and a model that has preferences."""
    codes = [(0, 1, 2), (1, 0, 0), (1, 0, 1), (1, 2, 4), (1, -1, 3), (2, -1, 0), (2, -1, 1), (2, 3, 3), (2, 3, 4)]
    tokenizer = make_tokenizer(codes=codes)
    return tokenizer, make_tiny_model(tokenizer.vocab_size, bos_token_id=None)


def test_sampled_frequencies(uneven, brute_force_scores):
    tokenizer, model = uneven
    sids = [tokenizer.prefix_token_ids(codes) for codes in tokenizer.codes]
    inputs = pad_left(PROMPTS)
    drawn = {}
    for in_place in (False, True):
        torch.manual_seed(0)
        processor = SIDLogitsProcessor(tokenizer, 7, in_place=in_place)
        output = model.generate(**inputs, generation_config=sampling(1000), logits_processor=[processor])
        drawn[in_place] = processor.sid_rows(output.sequences).view(3, 1000)
    assert torch.equal(drawn[False], drawn[True]) and (drawn[False] >= 0).all()
    for prompt, rows in zip(PROMPTS, drawn[False], strict=True):
        counts = rows.bincount(minlength=9).numpy()
        exact = brute_force_scores(model, prompt, tokenizer.sid_sequences()).double().exp().numpy()
        # At 8 degrees of freedom 1 of 10,000 true samples is above 31.8.
        assert chi_square(counts, renormalised(model, prompt, sids)) < 31.8
        assert chi_square(counts, exact) > 100  # the model's own distribution over the nine is another


def test_warpers_act_behind_the_processor(uneven):
    # Before it, the two best tokens of the whole vocabulary begin no SID, and nothing would be left to draw.
    tokenizer, model = uneven
    torch.manual_seed(0)
    processor = SIDLogitsProcessor(tokenizer, 7)
    config = sampling(200, top_k=2, temperature=5.0, output_scores=True)
    output = model.generate(**pad_left(PROMPTS[:1]), generation_config=config, logits_processor=[processor])
    assert (processor.sid_rows(output.sequences) >= 0).all()
    assert not set(next_scores(model, PROMPTS[0]).topk(2).indices.tolist()) & {20, 21, 22}
    assert len(output.sequences[:, 7].unique()) == 2


@pytest.mark.parametrize("do_sample", [True, False])
def test_output_logits_are_the_models(uneven, do_sample):
    tokenizer, model = uneven
    inputs = pad_left(PROMPTS)
    logits = {}
    for in_place in (False, True):
        torch.manual_seed(0)
        processor = SIDLogitsProcessor(tokenizer, 7, in_place=in_place)
        config = sampling(1, do_sample=do_sample, output_logits=True, output_scores=True)
        output = model.generate(**inputs, generation_config=config, logits_processor=[processor])
        logits[in_place] = output.logits
    assert len(logits[False]) >= 3
    for step, (raw, scores) in enumerate(zip(logits[False], output.scores, strict=True)):
        for row, prompt in enumerate(PROMPTS):
            generated = output.sequences[row, 7 : 7 + step].tolist()
            if END not in generated:
                expected = next_scores(model, prompt + generated)
                torch.testing.assert_close(raw[row].log_softmax(-1).double(), expected, atol=1e-4, rtol=0)
        assert scores.isneginf().any() and raw.isfinite().all()
        # This is why writing in place is for beams alone.
        assert torch.equal(logits[True][step], scores)


def test_beams_in_place(uneven):
    tokenizer, model = uneven
    options = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    config = sid_generation_config(model, tokenizer, 6, 4, **options)
    outputs = [
        model.generate(
            **pad_left(PROMPTS),
            generation_config=config,
            logits_processor=[SIDLogitsProcessor(tokenizer, 7, in_place=in_place)],
        )
        for in_place in (False, True)
    ]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert torch.equal(outputs[0].sequences_scores, outputs[1].sequences_scores)
    for name in ("scores", "logits"):
        for one, other in zip(outputs[0][name], outputs[1][name], strict=True):
            assert torch.equal(one, other)
            assert one.isfinite().all() == (name == "logits")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_in_place_writes_the_same(make_tokenizer, dtype):
    tokenizer = make_tokenizer()
    sids = tokenizer.sid_sequences()
    generated = torch.cat([sids[:, :2], torch.tensor([[END, END], [20, 20], [0, 0], [20, 0], [20, 30]])])
    # also a trie in which token 0, which fills the places without a child, is a child
    other = SIDTrie(torch.tensor([[20, 0, 3], [20, 30, 0], [20, 31, -1], [21, 0, -1]]))
    for trie in (None, other):
        for num_generated in (0, 1, 2):
            input_ids = torch.cat([torch.full((len(generated), 4), 5), generated[:, :num_generated]], dim=1)
            scores = torch.randn(len(generated), tokenizer.vocab_size, generator=torch.Generator().manual_seed(0))
            scores = scores.to(dtype)
            before = scores.clone()
            expected = SIDLogitsProcessor(tokenizer, 4, trie)(input_ids, scores)
            assert torch.equal(scores, before)
            is_kept = ~expected.isneginf() & (torch.arange(tokenizer.vocab_size) != END)
            assert is_kept.any() and torch.equal(expected[is_kept], before[is_kept])
            processed = SIDLogitsProcessor(tokenizer, 4, trie, in_place=True)(input_ids, scores)
            assert processed is scores and torch.equal(processed, expected) and processed.dtype == dtype


def test_bf16_model(make_tiny_model, make_tokenizer):
    tokenizer = make_tokenizer()
    model = make_tiny_model(tokenizer.vocab_size, bos_token_id=None).bfloat16()
    inputs = pad_left(PROMPTS)
    processor = SIDLogitsProcessor(tokenizer, 7, in_place=True)
    options = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    config = sid_generation_config(model, tokenizer, 40, 20, **options)
    output = model.generate(**inputs, generation_config=config, logits_processor=[processor])
    rows, scores = processor.sid_rows(output.sequences).view(3, 20), output.sequences_scores.view(3, 20)
    assert (rows >= 0).all() and all(len(row.unique()) == 20 for row in rows)
    assert scores.dtype == torch.float32 and (scores.diff(dim=1) <= 0).all()
    # Logits of 8 bits tie; the log-probabilities are those of their softmax in float32 all the same.
    for row in range(3):
        for at in range(20):
            # the step's row for each token of the SID, which `beam_indices` tells
            steps = output.beam_indices[20 * row + at].tolist()
            sid = tokenizer.prefix_token_ids(tokenizer.codes[rows[row, at]])
            parts = [output.logits[step][steps[step]].log_softmax(-1)[token] for step, token in enumerate(sid)]
            assert sum(parts).item() == pytest.approx(scores[row, at].item(), abs=1e-5)

    for config in (sampling(20), sampling(1, do_sample=False)):
        torch.manual_seed(0)
        output = model.generate(
            **inputs, generation_config=config, logits_processor=[SIDLogitsProcessor(tokenizer, 7)]
        )
        assert (processor.sid_rows(output.sequences) >= 0).all()


@pytest.mark.parametrize("in_place", [False, True])
def test_batches_without_anything_to_decide(uneven, in_place):
    tokenizer, _ = uneven
    processor = SIDLogitsProcessor(tokenizer, 2, in_place=in_place)
    for length in (2, 4):
        none = processor(torch.empty((0, length), dtype=torch.int64), torch.empty((0, tokenizer.vocab_size)))
        assert none.shape == (0, tokenizer.vocab_size)
        assert processor.sid_rows(torch.empty((0, length), dtype=torch.int64)).shape == (0,)
    # All rows have ended, at different steps and with different fillings: nothing but the end is drawn.
    sids = [tokenizer.prefix_token_ids(tokenizer.codes[row]) for row in (5, 0, 4)]
    ended = [sids[0] + [END, 0, 0], sids[1] + [END, END], sids[2] + [END, END, END]]
    input_ids = torch.tensor([[7, 7] + row for row in ended])
    processed = processor(input_ids, torch.randn(3, tokenizer.vocab_size))
    assert torch.equal(processed.softmax(-1), torch.eye(tokenizer.vocab_size)[[END] * 3])
    assert processor.sid_rows(input_ids).tolist() == [5, 0, 4]


@pytest.mark.parametrize("codes", [(2, 1, 4), (3, -1, 0), (3, -1, -1)])
def test_a_trie_with_one_product(uneven, make_tokenizer, brute_force_scores, codes):
    _, model = uneven
    tokenizer = make_tokenizer(codes=[codes])
    processor = SIDLogitsProcessor(tokenizer, 7)
    config = sid_generation_config(
        model, tokenizer, 5, 5, max_new_tokens=7, return_dict_in_generate=True, output_scores=True
    )
    output = model.generate(**pad_left(PROMPTS), generation_config=config, logits_processor=[processor])
    rows, scores = processor.sid_rows(output.sequences).view(3, 5), output.sequences_scores.view(3, 5)
    is_found = scores > -1e8
    assert is_found.tolist() == [[True] + [False] * 4] * 3 and (rows[is_found] == 0).all()
    exact = torch.cat([brute_force_scores(model, prompt, tokenizer.sid_sequences()) for prompt in PROMPTS])
    torch.testing.assert_close(scores[:, 0], exact, atol=1e-4, rtol=0)
    for config in (sampling(4, 7), sampling(1, 7, do_sample=False)):
        output = model.generate(**pad_left(PROMPTS), generation_config=config, logits_processor=[processor])
        assert (processor.sid_rows(output.sequences) == 0).all()
        # the end token comes right behind the SID and ends the batch
        assert output.sequences.shape[1] == 7 + len(tokenizer.sid_sequences()[0]) + 1


# Their keys have 64 and 65 bits, and the tokens of the second need more than 15.
@pytest.mark.parametrize("num_layers, codebook_size", [(8, 256), (5, 2**13)])
def test_large_codebooks(make_tiny_model, make_tokenizer, brute_force_scores, num_layers, codebook_size):
    codes = np.random.default_rng(0).integers(0, codebook_size, (12, num_layers))
    codes[::3] = codebook_size - 1 - codes[::3] % 2
    codes[1::3, : num_layers // 2] = codes[1, : num_layers // 2]
    codes = list(dict.fromkeys(map(tuple, codes.tolist())))
    tokenizer = make_tokenizer(codes=codes, codebook_size=codebook_size)
    model = make_tiny_model(tokenizer.vocab_size, bos_token_id=None)
    processor = SIDLogitsProcessor(tokenizer, 7, in_place=True)
    num_sids = len(codes)
    config = sid_generation_config(
        model, tokenizer, num_sids, num_sids, return_dict_in_generate=True, output_scores=True
    )
    output = model.generate(**pad_left(PROMPTS[:2]), generation_config=config, logits_processor=[processor])
    rows, scores = processor.sid_rows(output.sequences).view(2, -1), output.sequences_scores.view(2, -1)
    exact = torch.stack([brute_force_scores(model, prompt, tokenizer.sid_sequences()) for prompt in PROMPTS[:2]])
    assert torch.equal(rows.sort(dim=1).values, torch.arange(num_sids).expand(2, -1))
    torch.testing.assert_close(scores, exact.sort(dim=1, descending=True).values, atol=1e-3, rtol=0)
    torch.testing.assert_close(scores, exact.gather(1, rows), atol=1e-3, rtol=0)

    processor = SIDLogitsProcessor(tokenizer, 7)
    config = sampling(10, num_layers + 1)
    output = model.generate(**pad_left(PROMPTS[:2]), generation_config=config, logits_processor=[processor])
    assert (processor.sid_rows(output.sequences) >= 0).all()


def test_what_does_not_fit(uneven):
    tokenizer, _ = uneven
    processor = SIDLogitsProcessor(tokenizer, 1)
    with pytest.raises(ValueError, match="holds token 34 but the scores are for 30 tokens only. Resize"):
        processor(torch.tensor([[5]]), torch.zeros(1, 30))
    with pytest.raises(TypeError, match=re.escape("`in_place` must be True or False, got 'yes'")):
        SIDLogitsProcessor(tokenizer, 1, in_place="yes")
    trie = SIDTrie.from_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="`trie` is a stack of 2 tries, and the processor takes one for all prompts"):
        SIDLogitsProcessor(tokenizer, 1, SIDTrie.stack([trie, trie]))


@pytest.fixture
def living(base_tokenizer):
    """A real tokenizer whose catalog may change: 30 products on 20 SIDs or fewer."""
    embeddings = np.random.default_rng(0).standard_normal((30, 6), dtype=np.float32)
    quantizer = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=[6, 6, 6])).fit(embeddings)
    codes = quantizer.encode(embeddings)
    codes[20:] = codes[:20:2]
    ids = [f"p{row}" for row in range(30)]
    catalog = ProductCatalog.build(ids, codes, [6, 6, 6], popularity=np.arange(30) % 7)
    return SIDTokenizer.from_base(base_tokenizer, catalog, quantizer), quantizer, embeddings


def sequences_of(tokenizer, sid_rows):
    """Prompts of 3 tokens, a SID each, end and filling."""
    sids = tokenizer.sid_sequences(np.array(sid_rows))
    generated = torch.cat([sids, torch.full((len(sids), 2), -1)], dim=1)
    generated = torch.where(generated < 0, tokenizer.eos_token_id, generated)
    return torch.cat([torch.full((len(sids), 3), 5), generated], dim=1)


@pytest.mark.parametrize("base_tokenizer", ["llama"], indirect=True)
def test_products_of_what_was_generated(living):
    tokenizer, _, _ = living
    catalog = tokenizer.catalog
    processor = SIDLogitsProcessor(tokenizer, 3)
    everything = sequences_of(tokenizer, range(catalog.num_sids))
    found = processor.decode_products(everything)
    assert found == tokenizer.decode_products(everything[:, 3:])
    assert sorted(sum(found, [])) == sorted(f"p{row}" for row in range(30)) and max(map(len, found)) > 1
    nothing = torch.full_like(everything[:2], tokenizer.eos_token_id)
    assert processor.decode_products(torch.cat([nothing[:1], everything[4:5], nothing[1:]])) == [[], found[4], []]
    assert processor.decode_products(everything[:0]) == []

    # Of a SID whose products the filter divides, only those that it keeps.
    kept = [f"p{row}" for row in range(30) if row % 3]
    filtered = SIDLogitsProcessor(tokenizer, 3, SIDTrie.from_tokenizer(tokenizer).restrict(kept))
    expected = [[product for product in products if product in kept] for products in found]
    assert any(0 < len(part) < len(all_) for part, all_ in zip(expected, found, strict=True))
    assert filtered.decode_products(everything) == expected


@pytest.mark.parametrize("base_tokenizer", ["llama"], indirect=True)
def test_a_trie_older_than_the_catalog_is_told_once(living, monkeypatch):
    tokenizer, quantizer, embeddings = living
    told = []
    monkeypatch.setattr(logging.getLogger("rqsid.modeling.logits_process"), "warning", told.append)
    hf_logging.warning_once.cache_clear()
    sequences = sequences_of(tokenizer, range(tokenizer.catalog.num_sids))
    scores = torch.zeros(len(sequences), len(tokenizer))
    processor = SIDLogitsProcessor(tokenizer, 3, SIDTrie.from_tokenizer(tokenizer).restrict(["p0", "p1"]))
    processor(sequences[:, :4], scores)
    assert told == []
    tokenizer.catalog.append(["new"], embeddings=embeddings[:1], quantizer=quantizer)
    for _ in range(2):
        processor(sequences[:, :4], scores)
        processor.sid_rows(sequences)
    assert len(told) == 1 and "trie was built before the catalog changed" in told[0]
    # `new` shares the SID of `p0`, but the filter is of the catalog as it was
    assert sorted(sum(processor.decode_products(sequences), [])) == ["p0", "p1"]
    assert "new" in sum(SIDLogitsProcessor(tokenizer, 3).decode_products(sequences), [])
    told.clear()
    hf_logging.warning_once.cache_clear()
    SIDLogitsProcessor(tokenizer, 3)(sequences[:, :4], scores)
    assert told == []
