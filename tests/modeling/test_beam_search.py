import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rqsid.modeling import beam_search as public_name
from rqsid.modeling.beam_search import _decode, beam_search, default_num_beams, plan_levels, plan_memory
from rqsid.modeling.head import OutputHead
from rqsid.modeling.trie import SIDTrie

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [4, 21, 27, 33, 5], [3, 20, 26, 32], [9], [18, 17, 2, 4, 6, 8]]


def pad_left(prompts):
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    return input_ids, torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])


def make_llama(vocab_size, **config):
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, initializer_range=0.3, **small | config)).eval()


@pytest.fixture(scope="module")
def trie(make_tokenizer):
    return SIDTrie.from_tokenizer(make_tokenizer(num_sids=40))


def test_the_public_name():
    assert public_name is beam_search


def record_shapes(model, monkeypatch):
    shapes, forward = [], model.model.forward

    def record(*args, **kwargs):
        output = forward(*args, **kwargs)
        shapes.append((*kwargs["input_ids"].shape, kwargs["past_key_values"].get_seq_length()))
        return output

    monkeypatch.setattr(model.model, "forward", record)
    return shapes


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_chunks_and_pieces_change_nothing(trie, monkeypatch, attention):
    model = make_llama(40)
    model.set_attn_implementation(attention)
    inputs = pad_left([prompt * 8 for prompt in PROMPTS])
    whole = beam_search(model, *inputs, trie, 24, 40)
    shapes = record_shapes(model, monkeypatch)
    levels = plan_levels(trie, [0], 24)
    assert levels[1][1] > 16
    sizes, pieces = set(), set()
    for max_memory in (1, 350_000, 700_000, 2**30):
        shapes.clear()
        found = beam_search(model, *inputs, trie, 24, 40, max_memory=max_memory)
        assert torch.equal(found[0], whole[0])
        torch.testing.assert_close(found[1], whole[1], atol=1e-4, rtol=0)
        sizes.add(max(rows for rows, *_ in shapes))
        pieces.add(max(positions for _, positions, _ in shapes))
    assert sizes >= {1, 5} and len(sizes) > 2
    # With a byte to spend a prompt is decoded alone, 16 positions at a time; with a gigabyte the longest prompt in one go.
    assert pieces >= {16, 56}


def test_batch_size_is_a_bound(trie, monkeypatch):
    model = make_llama(40)
    whole = beam_search(model, *pad_left(PROMPTS), trie, 10, 10)
    shapes = record_shapes(model, monkeypatch)
    found = beam_search(model, *pad_left(PROMPTS), trie, 10, 10, batch_size=2)
    assert torch.equal(found[0], whole[0])
    assert {rows for rows, *_ in shapes} == {1, 2}
    # Each chunk is cut to its own longest prompt.
    assert [positions for _, positions, cached in shapes if cached == positions] == [7, 4, 6]


def peak_of(function):
    """Bytes of tensors made within `function` that are alive at once, by the storages it allocates."""
    alive, peak = {}, [0]

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            output = operation(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, (list, tuple)) else [output]:
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    key = storage._cdata
                    if key not in alive:
                        alive[key] = storage.nbytes()
                        peak[0] = max(peak[0], sum(alive.values()))
                        torch.utils.weak.weakref.finalize(storage, alive.pop, key, None)
            return output

    with Count():
        function()
    return peak[0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("max_memory", [2**22, 2**24])
def test_estimated_memory_covers_what_is_allocated(make_tokenizer, attention, max_memory):
    trie = SIDTrie.from_tokenizer(make_tokenizer(num_sids=3000, num_layers=4, codebook_size=64))
    model = make_llama(300, hidden_size=64, intermediate_size=256, num_key_value_heads=2)
    model.set_attn_implementation(attention)
    inputs = pad_left([[7] * 120, [8] * 100] * 8)
    assert (
        plan_memory(model.config, OutputHead(model, trie.tokens), 120, plan_levels(trie, [0], 200), 4, max_memory)[0]
        < 16
    )
    peak = peak_of(lambda: beam_search(model, *inputs, trie, 200, 50, max_memory=max_memory))
    assert 0.1 * max_memory < peak <= max_memory


class WidestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **(kwargs or {}))
        inputs = tree_leaves((args, kwargs))
        known = {tensor.untyped_storage().data_ptr() for tensor in inputs if isinstance(tensor, torch.Tensor)}
        if isinstance(output, torch.Tensor) and output.untyped_storage().data_ptr() not in known:
            self.numel = max(self.numel, output.numel())
        return output


@pytest.mark.parametrize("normalize", ["vocab", "sid"])
def test_nothing_is_as_wide_as_the_vocabulary(trie, monkeypatch, normalize):
    size, num_beams = 20_000, 30
    monkeypatch.setattr("rqsid.modeling.head.BLOCK_ON_CPU", 4096)
    model = make_llama(size)
    vocabulary = torch.arange(20, 40) if normalize == "sid" else None
    with WidestTensor() as widest:
        beam_search(model, *pad_left(PROMPTS[:1]), trie, num_beams, 10, normalize, vocabulary)
    assert 0 < widest.numel < size
    with WidestTensor() as widest, torch.no_grad():
        model(pad_left(PROMPTS[:1])[0]).logits.exp()
    assert widest.numel >= size


def test_nothing_waits_for_the_device(trie):
    # Fake tensors have shapes but no values: whatever reads a value back fails. So all shapes follow from the arguments.
    model = make_llama(40)
    head = OutputHead(model, trie.tokens)
    levels = plan_levels(trie, [0], 7)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        input_ids = torch.ones((2, 6), dtype=torch.int64)
        start_nodes = torch.zeros(2, dtype=torch.int64)
        rows, scores = _decode(model, head, input_ids, torch.ones_like(input_ids), trie, start_nodes, levels, 4, 9)
        assert rows.shape == scores.shape == (2, 9)
        with pytest.raises(DataDependentOutputException):
            bool(scores.isnan().any())


def test_levels_are_bounded_by_candidates_and_nodes(make_tokenizer):
    codes = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, -1, 4), (2, -1, 0)]
    trie = SIDTrie.from_tokenizer(make_tokenizer(codes=codes))
    # Below the root three children, all with children; below them at most two, three with children in all.
    assert plan_levels(trie, [0], 50) == [(3, 3), (2, 3), (2, 0)]
    assert plan_levels(trie, [0], 2) == [(3, 2), (2, 2), (2, 0)]
    assert plan_levels(trie, [1], 50) == [(2, 2), (2, 0)]
    assert plan_levels(trie, [0, 1], 50) == [(3, 3), (2, 3), (2, 0)]
    assert plan_levels(trie, [3], 50) == []


def test_rows_with_tries_of_their_own(trie, make_tokenizer):
    model = make_llama(40)
    tokenizer = make_tokenizer(num_sids=40)
    subsets = [torch.arange(0, 40, 3), torch.tensor([5]), torch.arange(40), torch.arange(20, 40)]
    tries = [SIDTrie.from_tokenizer(tokenizer, rows) for rows in subsets]
    roots = torch.tensor([1, 0, 3, 2, 0])
    found = beam_search(model, *pad_left(PROMPTS), SIDTrie.stack(tries), 50, 40, start_nodes=roots)
    for row, root in enumerate(roots.tolist()):
        alone = beam_search(model, *pad_left(PROMPTS[row : row + 1]), tries[root], 50, 40)
        assert torch.equal(found[0][row], alone[0][0]) and len(subsets[root]) == (alone[0] >= 0).sum()
        torch.testing.assert_close(found[1][row], alone[1][0], atol=1e-4, rtol=0)


def test_a_head_made_once(trie):
    model = make_llama(40)
    head = OutputHead(model, trie.tokens)
    expected = beam_search(model, *pad_left(PROMPTS), trie, 20, 10)
    found = beam_search(model, *pad_left(PROMPTS), trie, 20, 10, head=head)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_no_prompts(trie):
    nothing = torch.zeros((0, 4), dtype=torch.int64)
    sid_rows, scores = beam_search(make_llama(40), nothing, nothing, trie, 5, 3)
    assert sid_rows.shape == scores.shape == (0, 3)


@pytest.mark.parametrize("name", ["num_beams", "num_return", "max_memory"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True])
def test_bad_numbers(trie, name, value):
    options = {"num_beams": 5, "num_return": 5} | {name: value}
    with pytest.raises(ValueError, match=f"`{name}` must be a positive integer"):
        beam_search(make_llama(40), *pad_left(PROMPTS), trie, **options)


def test_default_width():
    assert [default_num_beams(top_k) for top_k in (1, 10, 11, 100)] == [50, 50, 55, 500]
    assert math.isclose(default_num_beams(500) / 500, 5)


def test_heads_that_do_not_fit(trie, make_tokenizer):
    model = make_llama(40)
    inputs = pad_left(PROMPTS)
    with pytest.raises(ValueError, match="tokens that `head` does not score"):
        beam_search(model, *inputs, trie, 5, 5, head=OutputHead(model, trie.tokens[1:]))
    head = OutputHead(model, torch.arange(40))
    for options in ({"normalize": "vocab"}, {"vocabulary": torch.arange(9)}):
        with pytest.raises(ValueError, match="leave them out"):
            beam_search(model, *inputs, trie, 5, 5, head=head, **options)
    # More tokens than the trie's are fine.
    expected = beam_search(model, *inputs, trie, 20, 10)
    found = beam_search(model, *inputs, trie, 20, 10, head=head)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("start_nodes", [[-1, 0, 0, 0, 0], [0, 0, 0, 0, 10**6], [0, 0]])
def test_bad_start_nodes(trie, start_nodes):
    with pytest.raises(ValueError, match="`start_nodes` must be 5 nodes between 0 and"):
        beam_search(make_llama(40), *pad_left(PROMPTS), trie, 5, 5, start_nodes=torch.tensor(start_nodes))


def test_a_forest_needs_start_nodes(trie):
    with pytest.raises(ValueError, match="pass the root of each prompt"):
        beam_search(make_llama(40), *pad_left(PROMPTS), SIDTrie.stack([trie, trie]), 5, 5)


def test_prefixes_of_different_depth_stay_within_the_context(make_tokenizer):
    # Learnt positions: one beyond the last is an error, also of a beam that no longer counts.
    torch.manual_seed(0)
    tokenizer = make_tokenizer(num_sids=40, absent=0.0)
    trie = SIDTrie.from_tokenizer(tokenizer)
    config = GPT2Config(vocab_size=40, n_positions=24, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1)
    model = GPT2LMHeadModel(config).eval()
    prompts = [[5] * 22, [6] * 20 + tokenizer.sid_sequences()[0, :2].tolist()]
    starts = trie.walk(torch.tensor([[-1, -1], prompts[1][-2:]]))
    together = beam_search(model, *pad_left(prompts), trie, 50, 40, start_nodes=starts)
    for row in range(2):
        alone = beam_search(model, *pad_left(prompts[row : row + 1]), trie, 50, 40, start_nodes=starts[row : row + 1])
        assert torch.equal(together[0][row], alone[0][0])
    with pytest.raises(ValueError, match="23 tokens and up to 3 of a SID follow, more than the 24 positions"):
        beam_search(model, *pad_left([[5] * 23]), trie, 50, 40)


def test_rotations_that_change_on_the_way(trie):
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 12, "rope_theta": 1e4, "factor": 4.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = make_llama(40, rope_parameters=rope, max_position_embeddings=48)
    for lengths, is_good in (([5, 10], True), ([13, 30], True), ([11], False), ([5, 30], False)):
        inputs = pad_left([[7] * length for length in lengths])
        if is_good:
            together = beam_search(model, *inputs, trie, 50, 40)
            alone = beam_search(model, *pad_left([[7] * lengths[0]]), trie, 50, 40)
            torch.testing.assert_close(together[1][0], alone[1][0], atol=1e-4, rtol=0)
        else:
            with pytest.raises(ValueError, match="rotates positions otherwise beyond 12 tokens"):
                beam_search(model, *inputs, trie, 50, 40)


def test_threads_that_search_one_model_in_training_mode(trie):
    model = make_llama(40, attention_dropout=0.5).train()
    expected = beam_search(model, *pad_left(PROMPTS), trie, 20, 10)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: beam_search(model, *pad_left(PROMPTS), trie, 20, 10), range(40)))
    assert all(torch.equal(rows, expected[0]) and torch.equal(scores, expected[1]) for rows, scores in found)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("normalize", ["vocab", "sid"])
def test_scattered_token_ids(normalize):
    # As of a checkpoint that had its SID tokens before: only their rows are scored, in whatever place.
    tokens = torch.tensor([3, 50, 51, 120, 400, 401, 777, 1023])
    sequences = torch.cartesian_prod(tokens[:3], tokens[3:5], tokens[5:])
    model = make_llama(1024)
    vocabulary = torch.cat([tokens, torch.tensor([1])]) if normalize == "sid" else None
    trie = SIDTrie(sequences)
    assert len(OutputHead(model, trie.tokens, normalize, vocabulary).span_rows[0]) == 8
    sid_rows, scores = beam_search(model, *pad_left(PROMPTS[:2]), trie, 50, 18, normalize, vocabulary)
    for row, prompt in enumerate(PROMPTS[:2]):
        whole = torch.cat([torch.tensor(prompt).expand(len(sequences), -1), sequences], 1)
        with torch.no_grad():
            logits = model(whole).logits[:, len(prompt) - 1 : -1]
        support = logits if vocabulary is None else logits[..., vocabulary]
        exact = (logits.gather(-1, sequences[..., None])[..., 0] - support.logsumexp(-1)).sum(1)
        torch.testing.assert_close(scores[row], exact[sid_rows[row]], atol=1e-4, rtol=0)
        assert sid_rows[row].sort().values.tolist() == list(range(18))
