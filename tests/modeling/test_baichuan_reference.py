"""Baichuan2 against its architecture written out in plain torch, in every way that a model is called."""

import copy
import functools
import math
from types import SimpleNamespace

import pytest
import torch
from plain_baichuan import alibi_slopes, attend, pad_rows, plain_logits, random_rows, random_weights, split_weights
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from rqsid.modeling.configuration_baichuan import BaichuanConfig
from rqsid.modeling.modeling_baichuan import BaichuanForCausalLM

VOCABULARY = 60
CASES = [
    (position, attention, heads)
    for position in ("rope", "alibi")
    for attention in ("eager", "sdpa")
    for heads in (8, 6)
]
# In float32, where logits are about 1.
CLOSE = {"atol": 1e-5, "rtol": 0, "check_dtype": False}


@functools.cache
def weights_of(num_heads):
    return random_weights(num_heads, VOCABULARY, 8 * num_heads, 72, 2)


@functools.cache
def make_model(position, attention, num_heads, **options):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 8 * num_heads, "intermediate_size": 72, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": num_heads, "max_position_embeddings": 4096}
    options = {"eos_token_id": None, "pad_token_id": 0, "normalize_head": True} | options
    config = BaichuanConfig(position_embedding=position, **sizes, **options)
    model = BaichuanForCausalLM._from_config(config, attn_implementation=attention)
    model.load_state_dict(split_weights(weights_of(num_heads)))
    return model.eval()


@functools.cache
def plain(position, num_heads, token_ids, positions=None, normalize_head=True, eps=1e-6):
    return plain_logits(
        weights_of(num_heads), list(token_ids), num_heads, position, normalize_head, eps, positions=positions
    )


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request):
    """A model, and `truth(token_ids, positions=None)`, the logits of one sequence by the reference."""
    position, attention, num_heads = request.param

    def truth(token_ids, positions=None):
        positions = None if positions is None else tuple(positions)
        return plain(position, num_heads, tuple(token_ids), positions)

    model = make_model(position, attention, num_heads)
    assert model.config._attn_implementation == attention
    return SimpleNamespace(model=model, truth=truth, position=position, attention=attention, num_heads=num_heads)


def mask_of(sees, form):
    """A 4-D mask of a bool one `[batch, queries, keys]`."""
    if form == "bool":
        return sees[:, None]
    lowest = -torch.inf if form == "additive, -inf" else torch.finfo(torch.float32).min
    return torch.zeros(sees[:, None].shape).masked_fill(~sees[:, None], lowest)


def largest_difference(one, other):
    return (one - other).abs().max().item()


# The reference itself.


def test_slopes_by_hand():
    assert alibi_slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert alibi_slopes(6) == [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]
    root = math.sqrt(0.5)
    assert alibi_slopes(12) == pytest.approx([*alibi_slopes(8), root, root / 2, root / 4, root / 8])
    # Of 13B: 32 powers of 2^(-1/4), then 2^(-1/8), 2^(-3/8) ... 2^(-15/8).
    slopes = alibi_slopes(40)
    assert slopes[:4] == pytest.approx([0.8408964, 0.7071068, 0.5946036, 0.5]) and slopes[31] == 1 / 256
    assert slopes[32:] == pytest.approx(
        [0.9170040, 0.7711054, 0.6484198, 0.5452539, 0.4585020, 0.3855527, 0.3242099, 0.2726269]
    )


@pytest.mark.parametrize("num_heads", [1, 2, 3, 5, 6, 7, 8, 12, 31, 32, 33, 40, 63])
def test_slopes_are_those_of_bloom(num_heads):
    bias = build_alibi_tensor(torch.ones((1, 2)), num_heads, torch.float32)
    torch.testing.assert_close(bias[:, 0, 1], torch.tensor(alibi_slopes(num_heads)), atol=1e-6, rtol=0)


def test_attention_by_hand():
    # Nothing but distance counts where queries are zero: a slope of ln 2 halves the weight with every position.
    value = torch.tensor([[1.0], [0.0], [0.0]])
    out = attend(torch.zeros(3, 1), torch.ones(3, 1), value, math.log(2), [0, 1, 2])
    assert out[:, 0].tolist() == pytest.approx([1, 1 / 3, 1 / 7])
    out = attend(torch.zeros(3, 1), torch.ones(3, 1), value, math.log(2), [4, 6, 6])
    assert out[:, 0].tolist() == pytest.approx([1, 1 / 5, 1 / 9])
    out = attend(torch.full((2, 4), 0.5), torch.tensor([[0.0] * 4, [1.0] * 4]), torch.eye(2), 0.0, [0, 1])
    # Scores 0 and 4 * .5 / sqrt(4) = 1.
    assert out[1].tolist() == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)])


@pytest.mark.parametrize("positions", [None, [3, 4, 5, 9, 10, 30, 31]])
def test_rotated_without_norm_head_the_reference_is_llama(positions):
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=6,
        rms_norm_eps=1e-2,
    )
    llama = LlamaForCausalLM(config).eval().double()
    llama.load_state_dict(split_weights(weights_of(6)))
    (row,) = random_rows(0, 7)
    at = None if positions is None else torch.tensor([positions])
    with torch.no_grad():
        logits = llama(torch.tensor([row]), position_ids=at, attention_mask=torch.ones(1, 7)).logits[0]
    truth = plain("rope", 6, tuple(row), None if positions is None else tuple(positions), False, 1e-2)
    assert largest_difference(logits, truth) < 1e-5


@pytest.mark.parametrize("position, other", [("rope", "alibi"), ("alibi", "rope")])
@pytest.mark.parametrize("num_heads", [8, 6])
def test_positions_and_norm_head_matter(position, other, num_heads):
    (row,) = random_rows(1, 14)
    truth = plain(position, num_heads, tuple(row))
    assert truth.std() > 0.5
    assert largest_difference(truth[1:], plain(None, num_heads, tuple(row))[1:]) > 0.3
    assert largest_difference(truth[1:], plain(other, num_heads, tuple(row))[1:]) > 0.3
    assert largest_difference(truth, plain(position, num_heads, tuple(row), normalize_head=False)) > 0.3
    shuffled = plain(position, num_heads, (row[1], row[0], *row[2:]))
    assert largest_difference(truth[2:], shuffled[2:]) > 0.03


# The model.


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 14])
def test_whole_sequences(case, length):
    rows = random_rows(length, length, length)
    logits = case.model(torch.tensor(rows)).logits
    assert logits.dtype == torch.float32 and logits.shape == (2, length, VOCABULARY)
    torch.testing.assert_close(logits, torch.stack([case.truth(row) for row in rows]), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_numbers_of_the_config_are_used(position):
    (row,) = random_rows(2, 9)
    ids = torch.tensor([row])
    model = make_model(position, "sdpa", 6, rms_norm_eps=0.05)
    truth = plain(position, 6, tuple(row), eps=0.05)
    torch.testing.assert_close(model(ids).logits[0], truth, **CLOSE)
    assert largest_difference(truth, plain(position, 6, tuple(row))) > 0.01
    model = make_model(position, "sdpa", 6, normalize_head=False)
    torch.testing.assert_close(model(ids).logits[0], plain(position, 6, tuple(row), normalize_head=False), **CLOSE)
    model = make_model(position, "sdpa", 6, hidden_act="relu")
    assert largest_difference(model(ids).logits[0], plain(position, 6, tuple(row))) > 0.1


@torch.no_grad()
def test_what_is_seen_inside(case):
    (row,) = random_rows(2, 9)
    out = case.model(torch.tensor([row]), output_hidden_states=True, output_attentions=case.attention == "eager")
    assert [states.shape for states in out.hidden_states] == [(1, 9, 8 * case.num_heads)] * 3
    torch.testing.assert_close(case.model.get_output_embeddings()(out.hidden_states[-1])[0], case.truth(row), **CLOSE)
    if case.attention == "eager":
        assert len(out.attentions) == 2
        for weights in out.attentions:
            assert weights.shape == (1, case.num_heads, 9, 9) and (weights.triu(1) == 0).all()
            torch.testing.assert_close(weights.sum(-1), torch.ones(1, case.num_heads, 9))
            # Far from uniform, without which nothing here would show much.
            assert weights[0, :, -1].amax() > 0.5


@torch.no_grad()
def test_embeddings_in_and_a_part_of_the_logits_out(case):
    (row,) = random_rows(3, 9)
    ids, truth = torch.tensor([row]), case.truth(row)
    logits = case.model(inputs_embeds=case.model.get_input_embeddings()(ids)).logits[0]
    torch.testing.assert_close(logits, truth, **CLOSE)
    torch.testing.assert_close(case.model(ids, logits_to_keep=2).logits[0], truth[-2:], **CLOSE)
    keep = torch.tensor([0, 4, 7])
    torch.testing.assert_close(case.model(ids, logits_to_keep=keep).logits[0], truth[keep], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 4, 2]])
@pytest.mark.parametrize("kind", ["none", "bare", "dynamic", "static"])
def test_cached_in_chunks(case, chunks, kind):
    rows = random_rows(4, 12, 12)
    truth = torch.stack([case.truth(row) for row in rows])
    cache = {
        "none": lambda: None,
        "bare": DynamicCache,
        "dynamic": lambda: DynamicCache(config=case.model.config),
        "static": lambda: StaticCache(config=case.model.config, max_cache_len=16),
    }[kind]()
    start = 0
    for size in chunks:
        out = case.model(torch.tensor(rows)[:, start : start + size], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        torch.testing.assert_close(out.logits, truth[:, start : start + size], **CLOSE)
        start += size
    assert cache.get_seq_length() == 12


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("give_positions", [False, True])
def test_padded_batches(case, side, give_positions):
    rows = random_rows(5, 9, 3, 12, 1)
    ids, mask, positions = pad_rows(rows, side)
    out = case.model(ids, attention_mask=mask, position_ids=positions if give_positions else None)
    for at, row in enumerate(rows):
        torch.testing.assert_close(out.logits[at][mask[at].bool()], case.truth(row), **CLOSE)
    # What stands in the padding makes no difference.
    other = case.model(ids.masked_fill(mask == 0, 7), attention_mask=mask, position_ids=positions)
    for at, row in enumerate(rows):
        torch.testing.assert_close(other.logits[at][mask[at].bool()], case.truth(row), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_padded_prompts_go_on_in_the_cache(case, side, kind):
    rows, further = random_rows(6, 6, 2, 9), random_rows(7, 4, 4, 4)
    ids, mask, positions = pad_rows(rows, side)
    make = {"dynamic": DynamicCache, "static": functools.partial(StaticCache, max_cache_len=20)}[kind]
    cache = make(config=case.model.config)
    case.model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    lengths = mask.sum(1, keepdim=True)
    start = 0
    for size in (1, 2, 1):
        # Behind right padding there is a hole in the cache, which positions do not have.
        mask = torch.cat([mask, torch.ones((3, size), dtype=torch.int64)], 1)
        out = case.model(
            torch.tensor(further)[:, start : start + size],
            attention_mask=mask,
            position_ids=lengths + torch.arange(start, start + size),
            past_key_values=cache,
            use_cache=True,
        )
        for at, row in enumerate(rows):
            truth = case.truth(row + further[at])[len(row) + start : len(row) + start + size]
            torch.testing.assert_close(out.logits[at], truth, **CLOSE)
        start += size


@torch.no_grad()
def test_left_padding_in_chunks(case):
    rows = random_rows(8, 10, 3, 6)
    ids, mask, positions = pad_rows(rows, "left")
    cache, logits = DynamicCache(config=case.model.config), []
    # The first chunk of the second row is nothing but padding.
    for start, end in ((0, 4), (4, 9), (9, 10)):
        inputs = {"position_ids": positions[:, start:end], "attention_mask": mask[:, :end]}
        logits.append(case.model(ids[:, start:end], past_key_values=cache, use_cache=True, **inputs).logits)
    logits = torch.cat(logits, 1)
    for at, row in enumerate(rows):
        torch.testing.assert_close(logits[at][mask[at].bool()], case.truth(row), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("positions", [range(60, 70), [0, 1, 2, 3, 9, 10, 11, 40, 41, 300]])
def test_positions_with_offsets_and_gaps(case, positions):
    positions = list(positions)
    rows = random_rows(9, 10, 10)
    ids, at = torch.tensor(rows), torch.tensor([positions])
    truth = torch.stack([case.truth(row, positions) for row in rows])
    plainly = torch.stack([case.truth(row) for row in rows])
    # Only distances count, but those do. transformers reads jumps as packed sequences where there is neither mask nor cache.
    gap = positions[-1] - positions[0] > 9
    assert (largest_difference(truth, plainly) > 0.05) == gap
    logits = case.model(ids, attention_mask=torch.ones_like(ids), position_ids=at).logits
    torch.testing.assert_close(logits, truth, **CLOSE)
    torch.testing.assert_close(case.model(ids, position_ids=at, use_cache=True).logits, truth, **CLOSE)
    cache = DynamicCache(config=case.model.config)
    for start, end in ((0, 5), (5, 6), (6, 10)):
        out = case.model(ids[:, start:end], position_ids=at[:, start:end], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(out.logits, truth[:, start:end], **CLOSE)


@torch.no_grad()
def test_positions_that_differ_by_row(case):
    rows = random_rows(10, 8, 8)
    positions = [list(range(50, 58)), [0, 1, 5, 6, 7, 20, 21, 22]]
    ids = torch.tensor(rows)
    cache = DynamicCache(config=case.model.config)
    logits = []
    for start, end in ((0, 4), (4, 5), (5, 8)):
        at = torch.tensor(positions)[:, start:end]
        logits.append(case.model(ids[:, start:end], position_ids=at, past_key_values=cache, use_cache=True).logits)
    for row, at, own in zip(rows, positions, torch.cat(logits, 1), strict=True):
        torch.testing.assert_close(own, case.truth(row, at), **CLOSE)


def forms(attention):
    return ["additive", "additive, -inf"] + ["bool"] * (attention == "sdpa")


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(7, 7), (7, 3)])
def test_a_tree_on_a_cached_prefix(case, lengths):
    prompts = random_rows(11, *lengths)
    beams, leaves = random_rows(12, 2, 2), random_rows(13, 3, 3)
    parents = [1, 0, 1]
    ids, mask, positions = pad_rows(prompts, "left")
    lengths = mask.sum(1, keepdim=True)
    for form in forms(case.attention):
        cache = DynamicCache(config=case.model.config)
        case.model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        # Two beams at one position, each of which sees the prompt and itself; then three children at the next one.
        sees = torch.cat([mask[:, None].bool().expand(-1, 2, -1), torch.eye(2).bool().expand(2, -1, -1)], -1)
        first = case.model(
            torch.tensor(beams),
            attention_mask=mask_of(sees, form),
            position_ids=lengths.expand(-1, 2),
            past_key_values=cache,
            use_cache=True,
        ).logits
        sees = torch.cat([sees[:, parents], torch.eye(3).bool().expand(2, -1, -1)], -1)
        second = case.model(
            torch.tensor(leaves),
            attention_mask=mask_of(sees, form),
            position_ids=(lengths + 1).expand(-1, 3),
            past_key_values=cache,
            use_cache=True,
        ).logits
        for at, prompt in enumerate(prompts):
            for leaf, parent in enumerate(parents):
                truth = case.truth([*prompt, beams[at][parent], leaves[at][leaf]])
                torch.testing.assert_close(first[at, parent], truth[-2], **CLOSE)
                torch.testing.assert_close(second[at, leaf], truth[-1], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_tree_in_one_pass(case, use_cache):
    (prompt,), (nodes,) = random_rows(14, 5), random_rows(15, 5)
    parents = [-1, -1, 0, 1, 1]
    paths = [[node] if parent < 0 else [parent, node] for node, parent in enumerate(parents)]
    sees = torch.zeros((1, 10, 10), dtype=torch.bool)
    sees[0, :5, :5] = torch.ones(5, 5).tril().bool()
    sees[0, 5:, :5] = True
    for node, path in enumerate(paths):
        sees[0, 5 + node, [5 + step for step in path]] = True
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 5, 6, 6, 6]])
    for form in forms(case.attention):
        ids = torch.tensor([prompt + nodes])
        inputs = {"attention_mask": mask_of(sees, form), "position_ids": positions, "use_cache": use_cache}
        logits = case.model(ids, **inputs).logits[0]
        torch.testing.assert_close(logits[:5], case.truth(prompt), **CLOSE)
        for node, path in enumerate(paths):
            truth = case.truth(prompt + [nodes[step] for step in path])
            torch.testing.assert_close(logits[5 + node], truth[-1], **CLOSE)


@torch.no_grad()
def test_packed_sequences(case):
    rows = random_rows(16, 5, 1, 7)
    positions = torch.tensor([[at for row in rows for at in range(len(row))]])
    ids = torch.tensor([sum(rows, [])])
    logits = case.model(ids, position_ids=positions, use_cache=False).logits[0]
    torch.testing.assert_close(logits, torch.cat([case.truth(row) for row in rows]), **CLOSE)


@torch.no_grad()
def test_a_cache_reordered_repeated_selected_and_cropped(case):
    rows, (last,) = random_rows(17, 8, 3, 5), random_rows(18, 4)
    ids, mask, positions = pad_rows(rows, "left")
    cache = DynamicCache(config=case.model.config)
    case.model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)

    def check(order, dropped):
        """The next token, on a copy, of rows whose last tokens are gone."""
        own = torch.tensor(order)
        out = case.model(
            torch.tensor([last])[:, : len(order)].T,
            attention_mask=torch.cat([mask[own, : 8 - dropped], torch.ones((len(order), 1), dtype=torch.int64)], 1),
            position_ids=mask[own, : 8 - dropped].sum(1, keepdim=True),
            past_key_values=copy.deepcopy(cache),
            use_cache=True,
        ).logits
        for at, row in enumerate(order):
            truth = case.truth([*rows[row][: len(rows[row]) - dropped], last[at]])
            torch.testing.assert_close(out[at, 0], truth[-1], **CLOSE)

    cache.reorder_cache(torch.tensor([2, 0, 0]))
    check([2, 0, 0], 0)
    cache.crop(-2)
    check([2, 0, 0], 2)
    cache.batch_select_indices(torch.tensor([0, 1]))
    check([2, 0], 2)
    cache.batch_repeat_interleave(2)
    check([2, 2, 0, 0], 2)


# generate().


def plain_greedy(truth, prompt, steps):
    row = list(prompt)
    for _ in range(steps):
        row.append(int(truth(row)[-1].argmax()))
    return row[len(prompt) :]


def plain_beams(truth, prompt, steps, num_beams):
    beams = [(0.0, [])]
    for _ in range(steps):
        grown = []
        for score, row in beams:
            log_probs = truth([*prompt, *row])[-1].log_softmax(-1).tolist()
            grown += [(score + log_prob, [*row, token]) for token, log_prob in enumerate(log_probs)]
        beams = sorted(grown, reverse=True)[:num_beams]
    return [row for _, row in beams]


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_greedy_generation(case, options):
    prompts = random_rows(19, 7, 3)
    ids, mask, _ = pad_rows(prompts, "left")
    options = {"do_sample": False, "max_new_tokens": 5, "disable_compile": True} | options
    out = case.model.generate(ids, attention_mask=mask, **options)
    assert out[:, 7:].tolist() == [plain_greedy(case.truth, prompt, 5) for prompt in prompts]


def test_generation_with_a_prompt_lookup(case):
    (prompt,) = random_rows(20, 6)
    prompt = prompt + prompt
    ids = torch.tensor([prompt])
    out = case.model.generate(ids, do_sample=False, max_new_tokens=5, prompt_lookup_num_tokens=3)
    assert out[0, 12:].tolist() == plain_greedy(case.truth, prompt, 5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beam_generation(case, cache):
    prompts = random_rows(21, 6, 2)
    ids, mask, _ = pad_rows(prompts, "left")
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 3, "do_sample": False}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    out = case.model.generate(ids, attention_mask=mask, **options)
    assert out[:, 6:].tolist() == sum([plain_beams(case.truth, prompt, 3, 3) for prompt in prompts], [])


# Training.


def gradients_of_the_reference(case, row):
    weights = {name: tensor.double().requires_grad_() for name, tensor in weights_of(case.num_heads).items()}
    logits = plain_logits(weights, row, case.num_heads, case.position, True)
    loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(row[1:]))
    names = list(weights)
    return loss.detach(), split_weights(
        dict(zip(names, torch.autograd.grad(loss, [weights[name] for name in names]), strict=True))
    )


def backward(model, rows, **inputs):
    ids, mask, positions = pad_rows(rows, "right")
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels, use_cache=False, **inputs)
    out.loss.backward()
    return out.loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_loss_and_gradients(case):
    (row,) = random_rows(22, 9)
    model = copy.deepcopy(case.model).train()
    loss, gradients = backward(model, [row])
    true_loss, true_gradients = gradients_of_the_reference(case, row)
    torch.testing.assert_close(loss, true_loss, **CLOSE)
    assert set(gradients) == set(true_gradients)
    for name, gradient in true_gradients.items():
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(
            gradients[name].double(), gradient, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(case, use_reentrant):
    rows = random_rows(23, 9, 4)
    model = copy.deepcopy(case.model).train()
    loss, gradients = backward(model, rows)
    other = copy.deepcopy(case.model).train()
    other.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert other.is_gradient_checkpointing
    calls = []
    for layer in other.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    other_loss, other_gradients = backward(other, rows)
    assert len(calls) == 4, "every layer has to be computed twice"
    assert torch.equal(loss, other_loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, atol=1e-7, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_the_head_is_normalised_as_it_is_now(position):
    # Published code normalised once for inference, and then did not notice what training changed.
    (row,) = random_rows(24, 6)
    model = copy.deepcopy(make_model(position, "sdpa", 8))
    ids, head = torch.tensor([row]), model.get_output_embeddings()
    before = model(ids).logits
    head.weight.mul_(3.0)
    torch.testing.assert_close(model(ids).logits, before, **CLOSE)
    head.weight[5] = -head.weight[5]
    head.weight[6] = 0.0
    after = model(ids).logits
    torch.testing.assert_close(after[..., 5], -before[..., 5], **CLOSE)
    # A row without a direction, as resizing may leave it, has the logit 0, and not NaN.
    assert (after[..., 6] == 0).all() and after.isfinite().all()
    assert torch.equal(model.train()(ids).logits, after) and (head.weight[6] == 0).all()


# Low precision.


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0, 3000])
def test_half_precision(case, dtype, offset):
    rows = random_rows(25, 12, 2, 7)
    # Positions beyond 256 are no longer distinct in bfloat16, so that nobody may compute with them in it.
    model = copy.deepcopy(case.model).to(dtype)
    for side in ("left", "right"):
        ids, mask, positions = pad_rows(rows, side)
        logits = model(ids, attention_mask=mask, position_ids=positions + offset).logits
        for at, row in enumerate(rows):
            own = logits[at][mask[at].bool()]
            assert own.isfinite().all()
            limit = 0.15 if dtype == torch.bfloat16 else 0.02
            assert largest_difference(own.double(), case.truth(row)) < limit


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_see_nothing_give_no_nan(case, dtype):
    rows = random_rows(26, 6, 1)
    model = copy.deepcopy(case.model).to(dtype)
    ids, mask, positions = pad_rows(rows, "left")
    mask[1] = 0
    out = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
    assert out.logits.isfinite().all()
    step = torch.cat([mask, torch.tensor([[1], [0]])], 1)
    out = model(
        ids[:, :1], attention_mask=step, position_ids=torch.tensor([[6], [0]]), past_key_values=out.past_key_values
    )
    assert out.logits.isfinite().all()


def test_autocast(case):
    rows = random_rows(27, 9, 4)
    model = copy.deepcopy(case.model).train()
    ids, mask, positions = pad_rows(rows, "left")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids, attention_mask=mask, position_ids=positions, labels=ids.masked_fill(mask == 0, -100))
    for at, row in enumerate(rows):
        assert largest_difference(out.logits[at][mask[at].bool()].double(), case.truth(row)) < 0.15
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_long_sequences(position, attention):
    (row,) = random_rows(28, 300)
    truth = plain(position, 6, tuple(row))
    model = make_model(position, attention, 6)
    ids = torch.tensor([row])
    torch.testing.assert_close(model(ids).logits[0], truth, **CLOSE)
    model = copy.deepcopy(model).bfloat16()
    assert (model(ids).logits[0].double() - truth).abs().amax() < 0.2
