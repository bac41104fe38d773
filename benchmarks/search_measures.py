"""The catalogs, models and prompts of the search benchmarks, what they measure, and the exact scores they compare with."""

import ctypes
import gc
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from importlib import import_module
from unittest.mock import patch

import numpy as np
import torch
from measures import memory_mib
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rqsid import ProductCatalog, SIDTokenizer

# The ranges that `beam_search` names for the profiler, without their "rqsid::".
PHASES = ("prefill", "level", "head", "children", "select")
# A turn of a method lasts as long at least.
TURN_SECONDS = 1


def widest_level(trie):
    """The largest number of unfinished SIDs at any depth: a search with as many beams leaves nothing out."""
    nodes = torch.arange(trie.num_nodes)
    return int(trie.node_depths(nodes[~trie.is_leaf(nodes)]).bincount().max())


def make_codes(num_sids, num_layers, codebook_size, seed=0):
    """Distinct SIDs in random order, the k-th code of a layer with a share of about 1 / sqrt(k)."""
    random = np.random.default_rng(seed)
    keys = np.empty(0, dtype=np.int64)
    while len(keys) < num_sids:
        codes = (random.random((num_sids + num_sids // 4 + 100, num_layers)) ** 2 * codebook_size).astype(np.int64)
        keys = np.union1d(keys, codes @ codebook_size ** np.arange(num_layers)[::-1])
    keys = random.permutation(keys)[:num_sids]
    return np.stack(np.unravel_index(keys, [codebook_size] * num_layers), axis=1).astype(np.int32)


def make_tokenizer(vocabulary, codes, codebook_size, pruning=None):
    """A `SIDTokenizer` with a product per SID and filler words up to `vocabulary` tokens in all."""
    num_layers = codes.shape[1]
    catalog = ProductCatalog.build(
        [f"p{row}" for row in range(len(codes))], codes, [codebook_size] * num_layers, pruning=pruning
    )
    words = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>"])}
    words |= {f"w{number}": number for number in range(len(words), vocabulary - num_layers * codebook_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return SIDTokenizer.from_base(PreTrainedTokenizerFast(tokenizer_object=backend, **special), catalog)


def make_model(vocabulary, options, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=options.hidden_size,
        intermediate_size=options.hidden_size // 3 * 8,
        num_hidden_layers=options.model_layers,
        num_attention_heads=options.hidden_size // 64,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        # Logits with a deviation of about 1 instead of the default's .4: scores that are farther apart.
        initializer_range=0.05,
    )
    return LlamaForCausalLM(config).eval()


def make_prompt(tokenizer, length, seed=0):
    return np.random.default_rng(seed).integers(3, tokenizer.base_size, length).tolist()


def take_turns(calls, rounds):
    """
    Args:
        calls (`dict[str, callable]`): What to time; each has run before.
        rounds (`int`): In each of them every function has its turn: calls until a second is over.

    Returns:
        `dict[str, dict]`: the least `wall` and `cpu` seconds of a call, each the mean of a turn.
    """
    seconds = {name: {"wall": [], "cpu": []} for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            wall, cpu, count = time.perf_counter(), time.process_time(), 0
            while count == 0 or time.perf_counter() - wall < TURN_SECONDS:
                call()
                count += 1
            seconds[name]["wall"].append((time.perf_counter() - wall) / count)
            seconds[name]["cpu"].append((time.process_time() - cpu) / count)
    return {name: {clock: min(values) for clock, values in times.items()} for name, times in seconds.items()}


@torch.no_grad()
def make_limit(model, prompt, num_beams, num_levels, vocabulary=None):
    """
    The model's share of any search that keeps `num_beams` beams and scores exactly: one prefill of the prompt, a forward of
    `num_beams` tokens for each further level, and the head at the positions that are scored, into memory that is there
    already. `vocabulary` are the rows of the head that are needed, all if not given.
    """
    decoder, weight = model.get_decoder(), model.get_output_embeddings().weight
    weight = weight if vocabulary is None else weight[vocabulary]
    logits = torch.empty(num_beams, len(weight))
    prompt_ids, tokens = torch.tensor([prompt]), torch.full((1, num_beams), len(prompt) and prompt[-1])
    masks = []
    for level in range(1, num_levels):
        tree = torch.eye(num_beams, dtype=torch.bool).repeat(1, level)
        masks.append(torch.cat([torch.ones(num_beams, len(prompt), dtype=torch.bool), tree], dim=1)[None, None])

    @torch.no_grad()
    def limit():
        cache = DynamicCache(config=model.config)
        hidden = decoder(input_ids=prompt_ids, past_key_values=cache, use_cache=True).last_hidden_state
        torch.mm(hidden[0, -1:], weight.T, out=logits[:1])
        for level, mask in enumerate(masks):
            hidden = decoder(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=torch.full((1, num_beams), len(prompt) + level),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            torch.mm(hidden[0], weight.T, out=logits)

    return limit


def overhead_of(call, limit, pairs):
    """1 - limit / search, from the median of the ratios of calls that follow each other."""
    ratios = []
    for _ in range(pairs):
        marks = [time.perf_counter()]
        for function in (limit, call):
            function()
            marks.append(time.perf_counter())
        ratios.append((marks[1] - marks[0]) / (marks[2] - marks[1]))
    return 1 - float(np.median(ratios))


def phases_of(call, repeats=5):
    """
    Shares of the time of a search, by the ranges that `beam_search` names for the profiler. A stopwatch takes the profiler's
    place, which would slow small operations more than large ones.
    """
    module, seconds = import_module("rqsid.modeling.beam_search"), defaultdict(float)

    @contextmanager
    def stopwatch(name):
        started = time.perf_counter()
        yield
        seconds[name.removeprefix("rqsid::")] += time.perf_counter() - started

    with patch.object(module, "record_function", stopwatch), stopwatch("all"):
        for _ in range(repeats):
            call()
    shares = {phase: seconds[phase] / seconds["all"] for phase in PHASES}
    return shares | {"rest": 1 - sum(shares.values())}


def compare(found, reference):
    """Share of the reference's SIDs that were found, and the largest difference of scores of those found by both."""
    ours, theirs = (dict(zip(rows.tolist(), scores.tolist(), strict=True)) for rows, scores in (found, reference))
    both = ours.keys() & theirs.keys()
    return {
        "same_sids": len(both) / len(theirs),
        "score_difference": max((abs(ours[row] - theirs[row]) for row in both), default=None),
    }


def trimmed_memory():
    """Memory of this process after giving back what was freed, in MiB; `None` where the system does not tell."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return memory_mib("VmRSS")


@torch.no_grad()
def score_all(model, prompt, sequences, chunk_rows=128):
    """
    Exact log-probabilities of all SIDs by brute force: the prompt's cache repeated for every SID, no mask, no trie.

    Args:
        sequences (`torch.Tensor`): Token ids, padded with -1 on the right. Shape: (num_sids, depth).

    Returns:
        `torch.Tensor`: Shape: (num_sids,).
    """
    parts = []
    for rows in sequences.split(chunk_rows):
        cache = DynamicCache(config=model.config)
        first = model(torch.tensor([prompt]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        cache.batch_repeat_interleave(len(rows))
        # What stands behind a SID's end is seen by nothing that counts.
        tokens = rows.clamp(min=0)
        rest = model(tokens[:, :-1], past_key_values=cache, use_cache=True).logits
        logits = torch.cat([first.expand(len(rows), -1, -1), rest], dim=1)
        scores = logits.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
        parts.append(scores.masked_fill(rows < 0, 0).sum(dim=1))
    return torch.cat(parts)


@torch.no_grad()
def plain_scores(model, prompt, sequences):
    """The same one by one: a forward of prompt and SID, without a cache."""
    scores = []
    for sid in sequences:
        sid = sid[sid >= 0]
        logits = model(torch.cat([torch.tensor(prompt), sid])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        scores.append(logits.log_softmax(dim=-1).gather(-1, sid[:, None]).sum())
    return torch.stack(scores)
