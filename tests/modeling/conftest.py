"""A stand-in for the tokenizer with the members that search and logits processor use, and the brute-force oracle."""

import numpy as np
import pytest
import torch

from rqsid import PromptTemplate

FIRST_SID_TOKEN = 20


class StubCatalog:
    """`group_sizes[s]` products share SID s; within a SID they are in order of popularity already."""

    def __init__(self, group_sizes, codes):
        self.groups = np.split(np.arange(sum(group_sizes)), np.cumsum(group_sizes)[:-1])
        self.num_sids = len(group_sizes)
        self.version_id = "1"
        num_products = sum(group_sizes)
        sid_codes = np.array([[*sid, -1] for sid in codes])
        self.columns = {
            "sid_codes": sid_codes,
            "sid_order": np.lexsort(sid_codes.T[::-1]),
            "sid_offsets": np.append(0, np.cumsum(group_sizes)),
            "product_sids": np.repeat(np.arange(len(group_sizes)), group_sizes),
            "product_withdrawn": np.zeros(num_products, dtype=bool),
        }

    def expand_sids(self, sid_rows, top_k):
        products, positions = np.full((2, len(sid_rows), top_k), -1, dtype=np.int64)
        for row, sids in enumerate(sid_rows):
            pairs = [(product, at) for at, sid in enumerate(sids) if sid >= 0 for product in self.groups[sid]][:top_k]
            for rank, (product, at) in enumerate(pairs):
                products[row, rank], positions[row, rank] = product, at
        return products, positions

    def live_sid_rows(self):
        return np.arange(self.num_sids)

    def product_ids(self, product_rows):
        return [f"p{row}" for row in product_rows]


class StubTokenizer:
    """Codes `[S, layers]`, -1 for an absent layer; code c of layer l is the token `FIRST_SID_TOKEN + l * size + c`."""

    def __init__(self, codes, codebook_size, group_sizes=None, eos_token_id=1, pad_token_id=0):
        self.codes, self.codebook_size = codes, codebook_size
        self.eos_token_id, self.pad_token_id = eos_token_id, pad_token_id
        self.catalog = StubCatalog([1] * len(codes) if group_sizes is None else group_sizes, codes)
        self.layer_order = list(range(len(codes[0])))
        self.cache = {}
        self.vocab_size = FIRST_SID_TOKEN + len(codes[0]) * codebook_size + 3
        self.max_length = None
        self.prompt_template = PromptTemplate()

    def prefix_token_ids(self, prefix_codes):
        size = self.codebook_size
        return [FIRST_SID_TOKEN + layer * size + code for layer, code in enumerate(prefix_codes) if code >= 0]

    def layer_token_ids(self):
        layers = FIRST_SID_TOKEN + np.arange(len(self.layer_order) * self.codebook_size).reshape(
            -1, self.codebook_size
        )
        return [*layers, np.zeros(0, dtype=np.int64)]

    def sid_sequences(self, sid_rows=None):
        rows = [self.prefix_token_ids(codes) for codes in self.codes]
        depth = max(map(len, rows))
        sequences = torch.tensor([row + [-1] * (depth - len(row)) for row in rows])
        return sequences if sid_rows is None else sequences[sid_rows]

    @property
    def max_sid_length(self):
        return max(len(self.prefix_token_ids(codes)) for codes in self.codes)

    def codebook_fingerprint(self):
        return "00000000000000a0"

    def sid_vocabulary(self):
        return torch.arange(FIRST_SID_TOKEN, self.vocab_size - 3)

    def sid_strings(self, sid_rows):
        return ["".join(f"<{'abcdef'[at]}_{code}>" for at, code in enumerate(self.codes[s])) for s in sid_rows]

    def encode_prompts(self, examples, max_length=None):
        self.max_length = max_length
        full = [[2 + ord(letter) % 18 for letter in example["query"]] for example in examples]
        return {
            "input_ids": [ids[-max_length:] for ids in full],
            "num_truncated": [max(0, len(ids) - max_length) for ids in full],
        }


def random_codes(seed, num_sids, num_layers=3, codebook_size=5, absent=0.4):
    """Distinct SIDs in random order; of the layers but the first and the last each is absent at rate `absent`."""
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, codebook_size, (num_sids * 3, num_layers))
    gone = generator.random(codes.shape) < absent
    gone[:, [0, -1]] = False
    codes = list(dict.fromkeys(map(tuple, np.where(gone, -1, codes).tolist())))
    return codes[:num_sids]


@torch.no_grad()
def brute_force(model, prompt, sequences, vocabulary=None):
    """Log-probabilities of all rows of `sequences` by plain forwards of prompt and SID: no cache, padding or mask."""
    scores = torch.empty(len(sequences), dtype=torch.float64)
    lengths = (sequences >= 0).sum(1)
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero()[:, 0]
        sids = sequences[rows, :length]
        input_ids = torch.cat([torch.tensor(prompt).expand(len(rows), -1), sids], 1)
        logits = model(input_ids, use_cache=False).logits[:, len(prompt) - 1 : -1].double()
        if vocabulary is not None:
            outside = torch.ones(logits.shape[-1], dtype=torch.bool).index_fill(0, vocabulary, False)
            logits = logits.masked_fill(outside, -torch.inf)
        scores[rows] = logits.log_softmax(-1).gather(-1, sids[..., None]).sum((1, 2))
    return scores.float()


@pytest.fixture(scope="session")
def make_tokenizer():
    """`make_tokenizer(seed=0, num_sids=30, num_layers=3, codebook_size=5, absent=.4, codes=None, **stub)`."""

    def make(seed=0, num_sids=30, num_layers=3, codebook_size=5, absent=0.4, codes=None, **stub):
        codes = random_codes(seed, num_sids, num_layers, codebook_size, absent) if codes is None else codes
        return StubTokenizer(codes, codebook_size, **stub)

    return make


@pytest.fixture(scope="session")
def brute_force_scores():
    return brute_force
