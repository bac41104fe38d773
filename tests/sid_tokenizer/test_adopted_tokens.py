"""Checkpoints that hold the SID tokens of an index already, as those trained by LC-Rec or MiniOneRec do."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rqsid import ProductCatalog, SIDTokenizer, initialize_sid_rows, search
from rqsid.sid_tokenizer.index_files import read_index

NUM_ITEMS, SIZES = 50, [8, 8, 8]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """A published index: integer items, all codebooks of one size, some codes unused."""
    random = np.random.default_rng(0)
    codes = np.stack([random.integers(0, size, NUM_ITEMS) for size in (8, 5, 7)], axis=1)
    codes[0] = [7, 0, 1]
    tokens = [[f"<{letter}_{code}>" for letter, code in zip("abc", row, strict=True)] for row in codes.tolist()]
    path = tmp_path_factory.mktemp("index") / "Toys.index.json"
    path.write_text(json.dumps({str(item): row for item, row in enumerate(tokens)}))
    return path, tokens


@pytest.fixture(scope="module")
def catalog(index):
    product_ids, codes, codebook_sizes = read_index(index[0])
    assert codebook_sizes == SIZES
    return ProductCatalog.build(product_ids, codes, codebook_sizes)


def checkpoint(base_tokenizer, new_tokens, special=False, tied=False, spare=0):
    """What those projects leave: tokens added, the matrices resized, here with rows that tell themselves apart."""
    base = copy.deepcopy(base_tokenizer)
    base.add_tokens(new_tokens, special_tokens=special)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(base_tokenizer), tie_word_embeddings=tied, pad_token_id=None, **sizes)
    model = LlamaForCausalLM(config).eval()
    model.resize_token_embeddings(len(base) + spare, mean_resizing=False)
    for matrix in matrices_of(model):
        torch.nn.init.normal_(matrix)
    return base, model


def matrices_of(model):
    matrices = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings().weight
    return matrices if head is matrices[0] else [*matrices, head]


def occurring(tokens):
    """As those projects collect them: a sorted set, so that ids follow the alphabet and not the codes."""
    return sorted({token for row in tokens for token in row})


EVERYTHING = [f"<{letter}_{code}>" for letter in "abc" for code in range(8)]


@pytest.mark.parametrize("special, tied, spare", [(False, False, 0), (False, True, 37), (True, False, 37)])
def test_a_checkpoint_with_all_tokens(base_tokenizer, catalog, index, special, tied, spare):
    base, model = checkpoint(base_tokenizer, sorted(EVERYTHING, reverse=True), special, tied, spare)
    with pytest.raises(ValueError, match="holds 24 of the SID tokens, for instance '<a_0>'.*reuse_tokens=True"):
        SIDTokenizer.from_base(base, catalog)
    tokenizer = SIDTokenizer.from_base(base, catalog, reuse_tokens=True)
    assert len(tokenizer) == len(base) and tokenizer.new_token_ids().tolist() == []
    assert tokenizer.convert_tokens_to_ids(EVERYTHING) == base.convert_tokens_to_ids(EVERYTHING)

    before = [matrix.detach().clone() for matrix in matrices_of(model)]
    assert len(before) == 1 if tied else len(before) == 2
    initialize_sid_rows(model, tokenizer)
    assert all(torch.equal(old, new) for old, new in zip(before, matrices_of(model), strict=True))
    assert_it_works(model, tokenizer, index[1])


@pytest.mark.parametrize("special, spare", [(False, 0), (True, 3), (False, 37)])
def test_a_checkpoint_with_the_tokens_that_occur(base_tokenizer, catalog, index, special, spare, tmp_path):
    old_tokens = occurring(index[1])
    missing = sorted(set(EVERYTHING) - set(old_tokens))
    assert 0 < len(missing) < 8
    base, model = checkpoint(base_tokenizer, old_tokens, special, spare=spare)
    with pytest.raises(ValueError, match=f"holds {len(old_tokens)} of the SID tokens"):
        SIDTokenizer.from_base(base, catalog)
    tokenizer = SIDTokenizer.from_base(base, catalog, reuse_tokens=True)
    assert tokenizer.convert_tokens_to_ids(old_tokens) == base.convert_tokens_to_ids(old_tokens)
    new_ids = tokenizer.new_token_ids().tolist()
    assert sorted(tokenizer.convert_ids_to_tokens(new_ids)) == missing
    assert new_ids == list(range(len(base), len(base) + len(missing)))

    before = [matrix.detach().clone() for matrix in matrices_of(model)]
    assert initialize_sid_rows(model, tokenizer)
    for old, new in zip(before, matrices_of(model), strict=True):
        assert len(new) == max(len(base) + spare, len(tokenizer))
        kept = torch.ones(len(old), dtype=torch.bool)
        kept[[token for token in new_ids if token < len(old)]] = False
        assert torch.equal(new[: len(old)][kept], old[kept])
        rows = new[new_ids].detach()
        assert len(torch.unique(rows, dim=0)) == len(missing) and rows.isfinite().all() and rows.std() > 0.5
        assert not any(torch.equal(old[token], new[token]) for token in new_ids if token < len(old))
    assert_it_works(model, tokenizer, index[1])

    # The whole way through a folder.
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    loaded, model_again = SIDTokenizer.from_pretrained(tmp_path), LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.new_token_ids().tolist() == new_ids and not initialize_sid_rows(model_again, loaded)
    assert all(torch.equal(*pair) for pair in zip(matrices_of(model), matrices_of(model_again), strict=True))
    assert_it_works(model_again, loaded, index[1])


def assert_it_works(model, tokenizer, tokens):
    items = [str(item) for item in range(NUM_ITEMS)]
    encoded = tokenizer.encode_products(items)
    assert [tokenizer.convert_ids_to_tokens(row) for row in encoded] == tokens
    sharing = [[items[at] for at in range(NUM_ITEMS) if tokens[at] == row] for row in tokens]
    assert tokenizer.decode_products(encoded) == sharing

    # A query that spells a SID out stays text.
    examples = [{"query": "chips"}, {"history": ["0", "7"], "query": "".join(tokens[3])}]
    prompts = tokenizer.encode_prompts(examples)["input_ids"]
    assert not set(prompts[0]) & set(tokenizer.sid_vocabulary().tolist())
    assert [token for token in prompts[1] if token in set(sum(encoded, []))] == encoded[0] + encoded[7]

    found = search(model, tokenizer, examples, top_k=5, num_beams=64)
    for prompt, results in zip(prompts, found, strict=True):
        scores = {"".join(row): score_of(model, prompt, ids) for row, ids in zip(tokens, encoded, strict=True)}
        best = sorted((scores["".join(row)] for row in tokens), reverse=True)[:5]
        assert [result["score"] for result in results] == pytest.approx(best, abs=1e-4)
        for result in results:
            assert result["sid"] == "".join(tokens[int(result["product_id"])])
            assert result["score"] == pytest.approx(scores[result["sid"]], abs=1e-4)


@torch.no_grad()
def score_of(model, prompt, sid):
    log_probs = model(torch.tensor([prompt + sid])).logits[0].log_softmax(-1)
    return sum(float(log_probs[len(prompt) + at - 1, token]) for at, token in enumerate(sid))


@pytest.mark.parametrize("token_format", ["<{letter}{code}>", "<|sid_{letter}_{code}|>", "[{letter}:{code:02d}]"])
def test_another_spelling(base_tokenizer, catalog, index, token_format):
    """Not those of the default spelling that lie there as well, from an index of long ago."""
    spell = {
        f"<{letter}_{code}>": token_format.format(letter=letter, code=code) for letter in "abc" for code in range(8)
    }
    tokens = [[spell[token] for token in row] for row in index[1]]
    base, model = checkpoint(base_tokenizer, [*occurring(tokens), "<a_0>", "<c_3>"])
    path = index[0].parent / "spelled.index.json"
    path.write_text(json.dumps({str(item): row for item, row in enumerate(tokens)}))
    ids, codes, sizes = read_index(path, token_format)
    assert np.array_equal(codes, catalog.codes) and sizes == SIZES
    with pytest.raises(ValueError, match="already holds .* of the SID tokens"):
        SIDTokenizer.from_base(base, catalog, token_format=token_format)
    tokenizer = SIDTokenizer.from_base(base, catalog, token_format=token_format, reuse_tokens=True)
    assert tokenizer.convert_tokens_to_ids(occurring(tokens)) == base.convert_tokens_to_ids(occurring(tokens))
    before = matrices_of(model)[0].detach().clone()
    initialize_sid_rows(model, tokenizer)
    assert torch.equal(matrices_of(model)[0][: len(before)], before)
    assert_it_works(model, tokenizer, tokens)


def test_the_default_spelling_beside_another_is_no_obstacle(base_tokenizer, catalog):
    base, _ = checkpoint(base_tokenizer, ["<a_0>", "<c_3>"])
    tokenizer = SIDTokenizer.from_base(base, catalog, token_format="<{letter}{code}>")
    assert len(tokenizer.new_token_ids()) == 24 and len(tokenizer) == len(base) + 24


def test_a_suffixed_catalog_adopts_what_there_is(base_tokenizer, index):
    """Suffix tokens are ours alone, and so new."""
    product_ids, codes, sizes = read_index(index[0])
    codes[1] = codes[0]
    suffixed = ProductCatalog.build(product_ids, codes, sizes, collisions="suffix")
    base, model = checkpoint(base_tokenizer, EVERYTHING)
    tokenizer = SIDTokenizer.from_base(base, suffixed, reuse_tokens=True)
    new = tokenizer.convert_ids_to_tokens(tokenizer.new_token_ids().tolist())
    assert new == [f"<x_{rank}>" for rank in range(suffixed.suffix_size)]
    before = matrices_of(model)[1].detach().clone()
    initialize_sid_rows(model, tokenizer)
    assert torch.equal(matrices_of(model)[1][: len(base)], before)
    assert tokenizer.decode_products(tokenizer.encode_products(product_ids)) == [[product] for product in product_ids]
