"""
What goes wrong in constrained decoding unless somebody thought of it, on a model whose exact ranking is known.

Each test shows the way that looks natural losing products, beside ours that does not. The catalog has SIDs of two, three
and four tokens; `exact` holds the log-probability of every SID by brute force.
"""

import copy

import pytest
import torch
from transformers import GenerationConfig

from rqsid.modeling.generation_options import sid_generation_config
from rqsid.modeling.logits_process import SIDLogitsProcessor
from rqsid.modeling.search import search
from rqsid.modeling.trie import SIDTrie

TOP = 10
PROMPT_LENGTH = 6
PROMPTS = torch.randint(2, 71, (12, PROMPT_LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def known(make_tiny_model, make_tokenizer, brute_force_scores):
    """Tokenizer, model, exact scores `(prompts, SIDs)`, lengths of the SIDs."""
    tokenizer = make_tokenizer(seed=3, num_sids=400, num_layers=4, codebook_size=12, absent=0.3)
    model = make_tiny_model(tokenizer.vocab_size, bos_token_id=None)
    with torch.no_grad():
        model.lm_head.weight *= 8  # preferences as clear as those of a trained model
    sequences = tokenizer.sid_sequences()
    exact = torch.stack([brute_force_scores(model, prompt, sequences) for prompt in PROMPTS.tolist()])
    return tokenizer, model, exact, (sequences >= 0).sum(1)


def generate(model, tokenizer, trie=None, num_beams=100, num_return=TOP, **changes):
    """SID rows `(prompts, num_return)` under our config, or with what `changes` puts in its place."""
    options = sid_generation_config(model, tokenizer, num_beams, num_return).to_dict() | changes
    processor = SIDLogitsProcessor(tokenizer, PROMPT_LENGTH, trie)
    sequences = model.generate(
        input_ids=PROMPTS,
        attention_mask=torch.ones_like(PROMPTS),
        generation_config=GenerationConfig(**options),
        logits_processor=[processor],
    )
    return processor.sid_rows(sequences).view(len(PROMPTS), num_return), sequences


def searched(model, tokenizer, **options):
    """SID rows of `search`, -1 behind the last; product `p{row}` is the only one of SID `row`."""
    results = search(model, tokenizer, PROMPTS.tolist(), **({"top_k": TOP} | options))
    rows = [[int(hit["product_id"][1:]) for hit in found] for found in results]
    return torch.tensor([found + [-1] * (TOP - len(found)) for found in rows])


def best_of(exact):
    return exact.argsort(dim=1, descending=True)[:, :TOP]


def recall(rows, exact):
    found = (rows[:, :, None] == best_of(exact)[:, None]).any(dim=1)
    return found.double().mean().item()


def test_length_penalty(known):
    # 1.0, the default of `generate()`, divides by the length: of two negative sums the longer one gains.
    tokenizer, model, exact, lengths = known
    rows, _ = generate(model, tokenizer)
    assert torch.equal(rows, best_of(exact))
    truth = lengths[rows].double().mean()
    for length_penalty, at_most in ((1.0, 0.8), (2.0, 0.5)):
        rows, _ = generate(model, tokenizer, length_penalty=length_penalty)
        assert recall(rows, exact) < at_most
        assert lengths[rows].double().mean() > truth + 0.2


def test_search_is_wider_than_its_list(known):
    tokenizer, model, exact, lengths = known
    assert torch.equal(searched(model, tokenizer), best_of(exact))
    recalls = [recall(searched(model, tokenizer, num_beams=num_beams), exact) for num_beams in (2, 5, TOP, 5 * TOP)]
    assert recalls == sorted(set(recalls)) and recalls[-2] < 0.96 and recalls[-1] == 1.0
    config = sid_generation_config(model, tokenizer)
    assert config.num_beams >= 5 * config.num_return_sequences


def test_short_sids_in_narrow_beams(known):
    # Where finished SIDs compete with unfinished ones for beams, as in `generate()`, most are lost.
    tokenizer, model, exact, _ = known
    rows, _ = generate(model, tokenizer, num_beams=TOP)
    assert recall(rows, exact) < 0.5
    assert recall(searched(model, tokenizer, num_beams=TOP), exact) > 0.85


def test_a_filter_is_neither_renormalised_nor_applied_afterwards(known):
    tokenizer, model, exact, _ = known
    kept = torch.arange(0, 400, 10)
    trie = SIDTrie.from_tokenizer(tokenizer, kept)
    of_kept = torch.full_like(exact, -torch.inf).index_copy(1, kept, exact[:, kept])
    assert torch.equal(searched(model, tokenizer, trie=trie), best_of(of_kept))
    rows, _ = generate(model, tokenizer, trie)
    assert torch.equal(rows, best_of(of_kept))

    # Renormalised at every step, a SID without siblings is certain, whatever the model thinks of it.
    rows, _ = generate(model, tokenizer, trie, renormalize_logits=True)
    assert recall(rows, of_kept) < 0.6
    # The best 50 of the whole catalog hold fewer than the ten that were asked for.
    unfiltered = exact.argsort(dim=1, descending=True)[:, :50]
    assert (torch.isin(unfiltered, kept).sum(dim=1) < TOP).all()


def test_renormalised_beams_without_a_continuation(known, make_tokenizer, brute_force_scores):
    # Rows of nothing but -inf would become NaN, which ranks first. Ours may only end, whoever renormalises them.
    _, model, _, _ = known
    codes = [(0, 1, 2, 3), (0, -1, -1, 4), (2, 1, -1, 0), (2, -1, 3, 0), (4, 4, 3, 4), (4, 4, 4, 4)]
    tokenizer = make_tokenizer(codes=codes)
    options = {"output_scores": True, "return_dict_in_generate": True, "renormalize_logits": True}
    config = GenerationConfig(**(sid_generation_config(model, tokenizer, TOP, TOP).to_dict() | options))
    processor = SIDLogitsProcessor(tokenizer, PROMPT_LENGTH)
    output = model.generate(
        input_ids=PROMPTS,
        attention_mask=torch.ones_like(PROMPTS),
        generation_config=config,
        logits_processor=[processor],
    )
    assert not output.sequences_scores.isnan().any() and not any(scores.isnan().any() for scores in output.scores)
    rows = processor.sid_rows(output.sequences).view(-1, TOP)
    is_answer = output.sequences_scores.view(-1, TOP) > -1e8
    for found, answers in zip(rows, is_answer, strict=True):
        assert found[answers].sort().values.tolist() == list(range(6))


def test_room_for_the_end_token(known):
    # One token less and no SID of full length could end.
    tokenizer, model, _, lengths = known
    trie = SIDTrie.from_tokenizer(tokenizer, (lengths == 4).nonzero()[:, 0])
    rows, sequences = generate(model, tokenizer, trie)
    assert (rows >= 0).all()
    assert sequences.shape[1] == PROMPT_LENGTH + 4 + 1 and (sequences[:, -1] == tokenizer.eos_token_id).all()


def test_search_takes_nothing_from_the_generation_config(known):
    tokenizer, model, exact, _ = known
    model = copy.deepcopy(model)
    leftovers = {"do_sample": True, "temperature": 0.3, "top_k": 2, "top_p": 0.5, "repetition_penalty": 2.0}
    leftovers |= {"num_beams": 1, "length_penalty": 1.0, "max_new_tokens": 1, "suppress_tokens": [20, 21]}
    for name, value in leftovers.items():
        setattr(model.generation_config, name, value)
    assert torch.equal(searched(model, tokenizer), best_of(exact))


def test_a_history_that_ends_in_sids(known, brute_force_scores):
    # The last tokens of these prompts could begin a SID, or are one; what was generated begins behind them all the same.
    tokenizer, model, _, _ = known
    sids = [tokenizer.prefix_token_ids(codes) for codes in tokenizer.codes[:4]]
    prompts = [[5] + sids[0], [5, 6] + sids[1][:-1], sids[2][:1], [7, 8] + sids[3][:2]]
    exact = torch.stack([brute_force_scores(model, prompt, tokenizer.sid_sequences()) for prompt in prompts])
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    attention_mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    processor = SIDLogitsProcessor(tokenizer, longest)
    sequences = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        generation_config=sid_generation_config(model, tokenizer, 100, TOP),
        logits_processor=[processor],
    )
    assert torch.equal(processor.sid_rows(sequences).view(4, TOP), best_of(exact))
    results = search(model, tokenizer, {"input_ids": input_ids, "attention_mask": attention_mask})
    assert [[f"p{row}" for row in rows] for rows in best_of(exact).tolist()] == [
        [hit["product_id"] for hit in found] for found in results
    ]
