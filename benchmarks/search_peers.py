"""The ways to get the best SIDs of a prompt, each from what it keeps of the catalog to a callable."""

import inspect
from collections import defaultdict
from importlib.util import find_spec

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from rqsid import SIDLogitsProcessor, SIDTrie, search, sid_generation_config


def search_with(normalize):
    def find(model, tokenizer, trie, prompt, num_beams, with_scores=True):
        found = search(
            model, tokenizer, [prompt], top_k=num_beams, num_beams=num_beams, trie=trie, normalize=normalize
        )[0]
        rows = tokenizer.catalog.sid_rows(tokenizer.catalog.product_rows([hit["product_id"] for hit in found]))
        return torch.from_numpy(rows).long(), torch.tensor([hit["score"] for hit in found])

    return find


def generate(model, tokenizer, trie, prompt, config, with_scores, **options):
    """`generate()` for one prompt; `sequences_scores` need `output_scores`, which keeps every step's scores."""
    config.return_dict_in_generate = config.output_scores = with_scores
    input_ids = torch.tensor([prompt])
    output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config, **options)
    sequences = (output.sequences if with_scores else output)[:, len(prompt) :]
    ended = (sequences == tokenizer.eos_token_id).cumsum(dim=1) > 0
    rows = trie.sid_rows(trie.walk(sequences.masked_fill(ended, -1)))
    return rows, output.sequences_scores if with_scores else None


def stop_at_depth(tokenizer, trie, num_beams):
    """
    Beam search that ends after the last token of a SID of fixed length, without an end token: one step less, and scores
    that are those of the SID alone. So the peers do the least that they can.
    """
    return GenerationConfig(
        num_beams=num_beams,
        num_return_sequences=num_beams,
        max_new_tokens=trie.depth,
        do_sample=False,
        length_penalty=0.0,
        early_stopping=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def dictionary_trie(tokenizer):
    """From each beginning of a SID, as a tuple, to the list of the tokens that may follow."""
    children, previous = defaultdict(list), ()
    for sid in sorted(tuple(token for token in sid if token >= 0) for sid in tokenizer.sid_sequences().tolist()):
        for depth in range(len(sid)):
            if sid[: depth + 1] != previous[: depth + 1]:
                children[sid[:depth]].append(sid[depth])
        previous = sid
    return dict(children), SIDTrie.from_tokenizer(tokenizer)


def generate_with_dictionary(end_token):
    def find(model, tokenizer, constraint, prompt, num_beams, with_scores=False):
        children, trie = constraint
        end = [tokenizer.eos_token_id]

        def allowed(batch_id, sequence):
            # Only the end follows a SID that is complete, or what already ended; an empty list would be an error.
            return children.get(tuple(sequence[len(prompt) :].tolist()), end)

        config = stop_at_depth(tokenizer, trie, num_beams)
        config.max_new_tokens += end_token
        return generate(model, tokenizer, trie, prompt, config, with_scores, prefix_allowed_tokens_fn=allowed)

    return find


def generate_with_processor(**options):
    def find(model, tokenizer, trie, prompt, num_beams, with_scores=False):
        processor = SIDLogitsProcessor(tokenizer, len(prompt), trie=trie, **options)
        config = sid_generation_config(model, tokenizer, num_beams=num_beams, num_return_sequences=num_beams)
        processors = LogitsProcessorList([processor])
        return generate(model, tokenizer, trie, prompt, config, with_scores, logits_processor=processors)

    return find


class RectokensProcessor(LogitsProcessor):
    """
    The mask of rectokens that runs on a CPU. Its own decoding loop asserts CUDA, and keeps each beam's node; `generate()`
    reorders beams, so the node is found anew by a binary search in the keys (parent, token) of its trie.
    """

    def __init__(self, constraint, prompt_length):
        (self.trie, self.keys), _ = constraint
        self.prompt_length = prompt_length

    def __call__(self, input_ids, scores):
        from rectokens.decoding.vntk import vtnk_pytorch

        nodes = torch.zeros(len(input_ids), dtype=torch.int64)
        for tokens in input_ids[:, self.prompt_length :].T:
            nodes = torch.searchsorted(self.keys, nodes * self.trie.vocab_size + tokens) + 1
        return vtnk_pytorch(scores, nodes, self.trie, input_ids.shape[1] - self.prompt_length)[2]


def rectokens_trie(tokenizer):
    from rectokens.schemas.compact_csr_trie import CompactCSRTrie

    sequences = tokenizer.sid_sequences()
    order = range(len(sequences))
    rows = sequences.tolist()
    sequences = sequences[sorted(order, key=rows.__getitem__)]
    del rows
    # Its dense layers are tables of vocabulary x vocabulary, 23 GB at 152,000 tokens.
    trie = CompactCSRTrie.from_sorted_batch(sequences, len(tokenizer), dense_lookup_layers=0)
    # Its mask reads a full list of children from every node, for the last nodes beyond the end of the table.
    end = trie.stacked_cols_vals[:, -1:].expand(-1, max(trie.layer_max_branches))
    trie = trie._replace(stacked_cols_vals=torch.cat([trie.stacked_cols_vals, end], dim=1))
    parents = torch.repeat_interleave(torch.arange(len(trie.row_ptrs) - 1), trie.row_ptrs.diff())
    keys = parents * trie.vocab_size + trie.stacked_cols_vals[0, : len(parents)]
    return (trie, keys), SIDTrie.from_tokenizer(tokenizer)


def generate_with_rectokens(model, tokenizer, constraint, prompt, num_beams, with_scores=False):
    trie = constraint[1]
    processors = LogitsProcessorList([RectokensProcessor(constraint, len(prompt))])
    config = stop_at_depth(tokenizer, trie, num_beams)
    return generate(model, tokenizer, trie, prompt, config, with_scores, logits_processor=processors)


def no_in_place():
    if "in_place" not in inspect.signature(SIDLogitsProcessor).parameters:
        return "SIDLogitsProcessor has no argument in_place"


def no_rectokens():
    if find_spec("rectokens") is None:
        return "rectokens is not installed"


VOCAB, SID = "search, vocab", "search, sid"
DICTIONARY = "generate, dictionary trie"
WITH_END = "generate, dictionary trie and end token"
PROCESSOR = "generate, SIDLogitsProcessor"
IN_PLACE = "generate, SIDLogitsProcessor in place"
RECTOKENS = "generate, rectokens"

# WITH_END is what most repositories do. It adds the end token's log-probability to the score, so its SIDs may be others.
# name: (what it keeps of the catalog, from tokenizer; the SIDs of a prompt; why it cannot run, or None)
METHODS = {
    VOCAB: (SIDTrie.from_tokenizer, search_with("vocab"), lambda: None),
    SID: (SIDTrie.from_tokenizer, search_with("sid"), lambda: None),
    DICTIONARY: (dictionary_trie, generate_with_dictionary(end_token=False), lambda: None),
    WITH_END: (dictionary_trie, generate_with_dictionary(end_token=True), lambda: None),
    PROCESSOR: (SIDTrie.from_tokenizer, generate_with_processor(), lambda: None),
    IN_PLACE: (SIDTrie.from_tokenizer, generate_with_processor(in_place=True), no_in_place),
    RECTOKENS: (rectokens_trie, generate_with_rectokens, no_rectokens),
}
