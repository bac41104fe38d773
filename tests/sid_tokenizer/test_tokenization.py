import copy
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets.fingerprint import Hasher
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rqsid import ProductCatalog, ResidualQuantizer, ResidualQuantizerConfig, SIDTokenizer, TokenPruning
from rqsid.sid_tokenizer import PromptTemplate

PRODUCTS = [f"p{row}" for row in range(60)]


def spelled(tokenizer, layer_order=(0, 1, 2)):
    """The tokens of every product's SID by the contract: `<a_code>` for layer 0 and so on, the suffix last."""
    catalog = tokenizer.catalog
    rows = catalog.sid_codes[catalog.sid_rows(np.arange(len(catalog)))].tolist()
    columns = [*layer_order, 3]
    return [[f"<{'abcx'[column]}_{row[column]}>" for column in columns if row[column] >= 0] for row in rows]


def test_products_to_tokens_and_back(sid_tokenizer):
    tokenizer, catalog = sid_tokenizer, sid_tokenizer.catalog
    encoded = tokenizer.encode_products(PRODUCTS)
    tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in encoded]
    assert tokens == spelled(tokenizer)
    assert {len(ids) for ids in encoded} == {2, 3} and tokenizer.max_sid_length == 3
    assert tokenizer.encode_products("p7") == encoded[7]
    assert tokenizer.encode_products(["p7", "p7", "p1"]) == [encoded[7], encoded[7], encoded[1]]
    assert tokenizer.encode_products([]) == []

    for ids, row in zip(encoded, catalog.sid_rows(np.arange(60)), strict=True):
        sharing = catalog.product_ids(catalog.products_of(row))
        assert tokenizer.decode_products(ids) == sharing
        assert tokenizer.decode_products([ids, encoded[0]])[0] == sharing
    assert all(product in group for product, group in zip(PRODUCTS, tokenizer.decode_products(encoded), strict=True))
    popularity = catalog.popularity[catalog.product_rows(max(tokenizer.decode_products(encoded), key=len))]
    assert len(popularity) > 1 and (np.diff(popularity) <= 0).all()


def test_decode_products_takes_what_generation_gives(sid_tokenizer):
    tokenizer = sid_tokenizer
    ids, end = tokenizer.encode_products("p3"), tokenizer.eos_token_id
    expected = tokenizer.decode_products(ids)
    assert "p3" in expected
    for form in (ids + [end], ids + [end, tokenizer.pad_token_id, end], tuple(ids), torch.tensor(ids), np.array(ids)):
        assert tokenizer.decode_products(form) == expected
    assert tokenizer.decode_products(list(np.array(ids))) == expected
    assert tokenizer.decode_products(list(torch.tensor(ids))) == expected
    padded = torch.tensor([ids + [end] * (6 - len(ids)), (tokenizer.encode_products("p9") + [end] * 5)[:6]])
    assert tokenizer.decode_products(padded) == [expected, tokenizer.decode_products(tokenizer.encode_products("p9"))]


def test_tokens_that_are_no_sid_are_refused(sid_tokenizer):
    tokenizer, catalog = sid_tokenizer, sid_tokenizer.catalog
    full = next(ids for ids in tokenizer.encode_products(PRODUCTS) if len(ids) == 3)
    text = tokenizer.encode_text("chips")[0]
    taken = set(map(tuple, tokenizer.encode_products(PRODUCTS)))
    a, b, c = tokenizer.layer_token_ids()[:3]
    outside = next([int(x), int(y), int(z)] for x in a for y in b for z in c if (int(x), int(y), int(z)) not in taken)
    bad = {
        "unknown": outside,
        "incomplete": full[:2],
        "reversed": full[::-1],
        "repeated": full + full[-1:],
        "two": full + full,
        "with text": [text, *full],
        "after the end": [tokenizer.eos_token_id, *full],
        "padding": [-1, *full],
        "label padding": [-100],
        "beyond": [*full, 10**9],
    }
    for name, ids in bad.items():
        assert tokenizer.find_sids([ids]).tolist() == [-1], name
        with pytest.raises(ValueError, match="is no SID of the catalog"):
            tokenizer.decode_products(ids)
    # A row without a SID, as searches fill where there are fewer than asked for; an empty one is none.
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert tokenizer.decode_products([[eos, pad, pad], full])[0] == [] and tokenizer.decode_products([[eos]]) == [[]]
    with pytest.raises(ValueError, match="is no SID"):
        tokenizer.decode_products([[], full])
    found = tokenizer.find_sids([full, outside, full[:1], full + [tokenizer.eos_token_id]])
    row = catalog.sid_rows(catalog.product_rows(tokenizer.decode_products(full)[:1]))[0]
    assert found.tolist() == [row, -1, -1, row]
    with pytest.raises(ValueError, match="is no SID"):
        tokenizer.decode_products([full, outside])


def find_sid(tokenizer, oracle, ids):
    """By the definition: what stands before the first end or padding token."""
    stop = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    return oracle.get(tuple(itertools.takewhile(lambda token: token not in stop, ids)), -1)


@given(st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_find_sids_equals_a_dict(sid_tokenizer, data):
    tokenizer = sid_tokenizer
    sids = [[token for token in row if token >= 0] for row in tokenizer.sid_sequences().tolist()]
    oracle = {tuple(ids): row for row, ids in enumerate(sids)}
    others = [tokenizer.eos_token_id, tokenizer.pad_token_id, -1, -100, 10**9, -(10**12), 2**62, 0, len(tokenizer)]
    pieces = st.sampled_from([*sids, *([token] for token in [*others, *tokenizer.sid_vocabulary().tolist()])])
    rows = data.draw(st.lists(st.lists(pieces, max_size=5).map(lambda parts: sum(parts, [])), max_size=6))
    assert tokenizer.find_sids(rows).tolist() == [find_sid(tokenizer, oracle, ids) for ids in rows]


@pytest.mark.parametrize("order", [[0, 1, 2], [1, 2, 0], [2, 1, 0]])
def test_find_all_sids_in_any_layer_order(base_tokenizer, make_parts, order):
    tokenizer = SIDTokenizer.from_base(base_tokenizer, make_parts(collisions="suffix")[2], layer_order=order)
    rows = [[token for token in row if token >= 0] for row in tokenizer.sid_sequences().tolist()]
    end = tokenizer.eos_token_id
    assert tokenizer.find_sids(rows).tolist() == list(range(60))
    assert tokenizer.find_sids([ids + [end] * 9 for ids in rows]).tolist() == list(range(60))
    assert tokenizer.find_sids([ids[::-1] for ids in rows]).tolist() == [-1] * 60
    assert tokenizer.find_sids([ids[:-1] for ids in rows]).tolist() == [-1] * 60
    assert tokenizer.find_sids([ids + ids for ids in rows]).tolist() == [-1] * 60
    assert tokenizer.find_sids([]).tolist() == [] and tokenizer.find_sids([[], []]).tolist() == [-1, -1]


def test_a_request_does_no_work_on_the_whole_catalog(make_parts, base_tokenizer, monkeypatch):
    tokenizer = SIDTokenizer.from_base(base_tokenizer, *make_parts()[:0:-1])
    expected = tokenizer.encode_products(PRODUCTS), tokenizer.codebook_fingerprint()

    def refuse(*args):
        raise AssertionError("scans the whole catalog")

    monkeypatch.setattr(ProductCatalog, "lengths", refuse)
    monkeypatch.setattr(torch.nn.Parameter, "detach", refuse)
    assert (tokenizer.encode_products(PRODUCTS), tokenizer.codebook_fingerprint()) == expected
    assert tokenizer.max_sid_length == 3 and len(tokenizer.sid_strings(np.array([0, 1]))) == 2
    assert len(tokenizer.encode_prompts([{"history": ["p1"], "query": "milk"}])["input_ids"]) == 1


def test_fingerprint_tells_codebooks_and_tokens_apart(base_tokenizer, make_parts):
    _, quantizer, catalog = make_parts()
    first = SIDTokenizer.from_base(base_tokenizer, catalog, quantizer).codebook_fingerprint()
    assert SIDTokenizer.from_base(base_tokenizer, catalog, quantizer).codebook_fingerprint() == first
    larger = copy.deepcopy(base_tokenizer)
    larger.add_tokens(["frobnicator"])
    others = {
        SIDTokenizer.from_base(base_tokenizer, catalog).codebook_fingerprint(),
        SIDTokenizer.from_base(base_tokenizer, *make_parts(seed=1)[:0:-1]).codebook_fingerprint(),
        SIDTokenizer.from_base(larger, catalog, quantizer).codebook_fingerprint(),
    }
    assert len(others | {first}) == 4


def test_unknown_products_are_refused(sid_tokenizer):
    with pytest.raises(ValueError, match="'p60'.*append them to the catalog"):
        sid_tokenizer.encode_products(["p1", "p60"])
    with pytest.raises(TypeError, match="not a string|list of strings"):
        sid_tokenizer.encode_products([1])


def test_layout_of_tokens_and_codes(sid_tokenizer):
    tokenizer = sid_tokenizer
    layers = tokenizer.layer_token_ids()
    assert [len(layer) for layer in layers] == [4, 5, 6, 0]
    assert tokenizer.convert_ids_to_tokens(layers[1].tolist()) == [f"<b_{code}>" for code in range(5)]
    vocabulary = tokenizer.sid_vocabulary()
    assert vocabulary.tolist() == sorted(np.concatenate(layers).tolist()) == tokenizer.new_token_ids().tolist()
    assert int(vocabulary[0]) == tokenizer.base_size and int(vocabulary[-1]) == len(tokenizer) - 1

    sequences = tokenizer.sid_sequences()
    assert sequences.shape == (tokenizer.catalog.num_sids, 3)
    rows = [[token for token in row if token >= 0] for row in sequences.tolist()]
    assert all(row == padded[: len(row)] for row, padded in zip(rows, sequences.tolist(), strict=True))
    assert tokenizer.find_sids(rows).tolist() == list(range(len(rows)))
    kept = {tuple(row) for row in rows}
    assert len(kept) == len(rows)
    assert not any(row[:length] in kept for row in kept for length in range(len(row)))
    assert torch.equal(tokenizer.sid_sequences(np.array([3, 1])), sequences[[3, 1]])
    assert tokenizer.sid_strings(np.array([2])) == ["".join(tokenizer.convert_ids_to_tokens(rows[2]))]


def test_prefix_token_ids(sid_tokenizer):
    layers = sid_tokenizer.layer_token_ids()
    assert sid_tokenizer.prefix_token_ids([2, -1, 5]) == [layers[0][2], layers[2][5]]
    assert sid_tokenizer.prefix_token_ids([]) == []
    for codes, message in (([0, 0, 0, 0], "4 leading codes"), ([4], "Code 4 lies outside layer 0's 4"), ([-2], "-2")):
        with pytest.raises(ValueError, match=message):
            sid_tokenizer.prefix_token_ids(codes)


def test_the_base_is_copied(base_tokenizer, make_parts):
    before, size = base_tokenizer.backend_tokenizer.to_str(), len(base_tokenizer)
    texts = ["potato chips salted 200g", "<a_1>", "x</s>"]
    ids = base_tokenizer(texts)["input_ids"]
    tokenizer = SIDTokenizer.from_base(base_tokenizer, make_parts()[2])
    tokenizer.add_tokens(["zzz"])
    tokenizer.pad_token = "zzz"
    assert (base_tokenizer.backend_tokenizer.to_str(), len(base_tokenizer)) == (before, size)
    assert base_tokenizer(texts)["input_ids"] == ids


def test_text_is_tokenized_as_by_the_base(base_tokenizer, sid_tokenizer):
    texts = ["potato chips salted 200g", " two  spaces ", "ünï 漢字 🙂", "Profile: x\nHistory:", "a<b c>d_1", ""]
    assert sid_tokenizer.encode_text(texts) == base_tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert sid_tokenizer(texts)["input_ids"] == base_tokenizer(texts)["input_ids"]
    assert sid_tokenizer.encode_text(texts[0]) == sid_tokenizer.encode_text(texts)[0]
    assert sid_tokenizer.encode_text([]) == []
    assert sid_tokenizer.eos_token == base_tokenizer.eos_token and sid_tokenizer.pad_token is not None
    assert sid_tokenizer.padding_side == "left"


def test_sid_strings_survive_decoding_without_special_tokens(sid_tokenizer):
    ids = sid_tokenizer.encode_products("p3") + [sid_tokenizer.eos_token_id]
    spelling = "".join(sid_tokenizer.convert_ids_to_tokens(ids[:-1]))
    assert sid_tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == spelling
    assert sid_tokenizer.tokenize(spelling) == sid_tokenizer.convert_ids_to_tokens(ids[:-1])


def test_base_without_an_end_token_and_no_fast_tokenizer(base_tokenizer, make_parts):
    catalog = make_parts()[2]
    endless = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(base_tokenizer.backend_tokenizer))
    with pytest.raises(ValueError, match="no end token.*eos_token"):
        SIDTokenizer.from_base(endless, catalog)
    with pytest.raises(TypeError, match="base is a str; a fast tokenizer"):
        SIDTokenizer.from_base("meta-llama/Llama-2-7b", catalog)


def test_quantizer_of_another_catalog(base_tokenizer, make_parts):
    catalog = make_parts()[2]
    with pytest.raises(ValueError, match=r"codebooks \[4, 5, 5\], the catalog \[4, 5, 6\]"):
        SIDTokenizer.from_base(base_tokenizer, catalog, make_parts(sizes=(4, 5, 5))[1])
    with pytest.raises(ValueError, match="not fitted"):
        unfitted = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=[4, 5, 6]))
        SIDTokenizer.from_base(base_tokenizer, catalog, unfitted)


@pytest.mark.parametrize("special", [False, True])
def test_sid_tokens_of_the_base(base_tokenizer, make_parts, special, tmp_path):
    catalog = make_parts(collisions="suffix")[2]
    fresh = SIDTokenizer.from_base(base_tokenizer, catalog)
    base = copy.deepcopy(base_tokenizer)
    tokens = fresh.convert_ids_to_tokens(fresh.sid_vocabulary().tolist())
    base.add_tokens(tokens[::-1], special_tokens=special)
    ids = base.convert_tokens_to_ids(tokens)
    with pytest.raises(ValueError, match=f"holds {len(tokens)} of the SID tokens, for instance '<a_0>'.*reuse_tokens"):
        SIDTokenizer.from_base(base, catalog)
    adopted = SIDTokenizer.from_base(base, catalog, reuse_tokens=True)
    assert adopted.convert_tokens_to_ids(tokens) == ids and len(adopted) == len(base)
    assert adopted.new_token_ids().tolist() == []
    encoded = adopted.encode_products(PRODUCTS)
    assert [adopted.convert_ids_to_tokens(row) for row in encoded] == spelled(adopted)
    assert all(product in group for product, group in zip(PRODUCTS, adopted.decode_products(encoded), strict=True))
    assert not set(adopted.encode_text("".join(tokens))) & set(ids)
    adopted.save_pretrained(tmp_path)
    assert SIDTokenizer.from_pretrained(tmp_path).encode_products(PRODUCTS) == encoded
    assert adopted.decode(encoded[0], skip_special_tokens=True).replace(" ", "") == "".join(spelled(adopted)[0])


def test_adopting_some_tokens_adds_the_others(base_tokenizer, make_parts):
    base = copy.deepcopy(base_tokenizer)
    base.add_tokens(["<b_2>", "zzz"])
    tokenizer = SIDTokenizer.from_base(base, make_parts()[2], reuse_tokens=True)
    assert tokenizer.convert_tokens_to_ids("<b_2>") == base.convert_tokens_to_ids("<b_2>") < tokenizer.base_size
    assert len(tokenizer.new_token_ids()) == 4 + 5 + 6 - 1
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode_products("p5")) == spelled(tokenizer)[5]


@pytest.mark.parametrize(
    "token_format, first",
    [("[{letter}{code}]", "[a0]"), ("<|sid_{letter}_{code}|>", "<|sid_a_0|>"), ("{code}{letter}", "0a")],
)
def test_token_formats(base_tokenizer, make_parts, token_format, first, tmp_path):
    tokenizer = SIDTokenizer.from_base(base_tokenizer, make_parts()[2], token_format=token_format)
    assert tokenizer.convert_ids_to_tokens(tokenizer.layer_token_ids()[0].tolist())[0] == first
    encoded = tokenizer.encode_products(PRODUCTS)
    assert all(product in group for product, group in zip(PRODUCTS, tokenizer.decode_products(encoded), strict=True))
    assert not set(tokenizer.encode_text(f"x {first}{first} y")) & set(tokenizer.sid_vocabulary().tolist())
    tokenizer.save_pretrained(tmp_path)
    loaded = SIDTokenizer.from_pretrained(tmp_path)
    assert (loaded.token_format, loaded.encode_products(PRODUCTS)) == (token_format, encoded)


@pytest.mark.parametrize(
    "token_format, message",
    [
        ("<{letter}>", "same token"),
        ("<{code}>", "same token"),
        ("", "same token"),
        ("<{layer}_{code}>", "cannot be filled in.*letter and code"),
        ("<{letter}_{code", "cannot be filled in"),
        ("<{letter.name}_{code}>", "cannot be filled in"),
        ("<{}_{}>", "cannot be filled in"),
        ("<{letter}_{code:{letter}}>", "cannot be filled in"),
    ],
)
def test_bad_token_formats_are_refused(base_tokenizer, make_parts, token_format, message):
    with pytest.raises(ValueError, match=message):
        SIDTokenizer.from_base(base_tokenizer, make_parts()[2], token_format=token_format)


def test_token_format_that_merges_layers_beyond_25(base_tokenizer):
    """Code 10 of layer a and code 0 of layer a1 are one token where no character stands between letter and code."""
    catalog = ProductCatalog.build(["p"], np.zeros((1, 26), dtype=int), [11] + [1] * 25)
    with pytest.raises(ValueError, match="token_format.*same token"):
        SIDTokenizer.from_base(base_tokenizer, catalog, token_format="<{letter}{code}>")


def test_layer_order(base_tokenizer, make_parts):
    catalog = make_parts()[2]
    tokenizer = SIDTokenizer.from_base(base_tokenizer, catalog, layer_order=[1, 0, 2])
    encoded = tokenizer.encode_products(PRODUCTS)
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in encoded] == spelled(tokenizer, [1, 0, 2])
    assert all(product in group for product, group in zip(PRODUCTS, tokenizer.decode_products(encoded), strict=True))
    full = next(ids for ids in encoded if len(ids) == 3)
    with pytest.raises(ValueError, match="no SID"):
        tokenizer.decode_products([full[1], full[0], full[2]])
    layers = tokenizer.layer_token_ids()
    assert tokenizer.prefix_token_ids([3, 1]) == [layers[1][3], layers[0][1]]
    for order in ([0, 1], [0, 1, 1], [1, 2, 3], [0, 1, 2, 2]):
        with pytest.raises(ValueError, match="must name each of the 3 layers once"):
            SIDTokenizer.from_base(base_tokenizer, catalog, layer_order=order)
    with pytest.raises(ValueError, match=r"layer_order=\[0, 2, 1\] ends with layer 1.*Put another layer last"):
        SIDTokenizer.from_base(base_tokenizer, catalog, layer_order=[0, 2, 1])
    unpruned = make_parts(strategy="none")[2]
    assert SIDTokenizer.from_base(base_tokenizer, unpruned, layer_order=[0, 2, 1]).layer_order == [0, 2, 1]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_suffixes_make_every_product_its_own_sid(base_tokenizer, make_parts, order):
    catalog = make_parts(collisions="suffix")[2]
    tokenizer = SIDTokenizer.from_base(base_tokenizer, catalog, layer_order=order)
    encoded = tokenizer.encode_products(PRODUCTS)
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in encoded] == spelled(tokenizer, order)
    assert tokenizer.decode_products(encoded) == [[product] for product in PRODUCTS]
    assert len(tokenizer.layer_token_ids()[3]) == catalog.suffix_size >= 16
    assert {len(ids) for ids in encoded} >= {2, 3, 4} - ({2} if tokenizer.max_sid_length == 3 else set())


@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_other_numbers_of_layers(base_tokenizer, num_layers):
    codes = np.random.default_rng(0).integers(0, 3, (20, num_layers))
    pruning = TokenPruning("drop_layer", layer=0).fit(codes, [3] * num_layers) if num_layers > 1 else None
    catalog = ProductCatalog.build(PRODUCTS[:20], codes, [3] * num_layers, pruning)
    tokenizer = SIDTokenizer.from_base(base_tokenizer, catalog)
    assert tokenizer.max_sid_length == max(1, num_layers - 1)
    groups = tokenizer.decode_products(tokenizer.encode_products(PRODUCTS[:20]))
    assert all(product in group for product, group in zip(PRODUCTS, groups, strict=False))


def test_prompt_is_prefix_text_and_sids(sid_tokenizer, base_tokenizer):
    tokenizer = sid_tokenizer
    found = tokenizer.encode_prompts(
        [{"profile": "age 35", "history": ["p3", "p9"], "query": " potato\n chips"}, {"query": "milk"}]
    )
    bos = [base_tokenizer.bos_token_id] if base_tokenizer("")["input_ids"] else []
    text, sids = tokenizer.encode_text, tokenizer.encode_products(["p3", "p9"])
    assert found["input_ids"] == [
        bos + text("Profile: age 35\nHistory:") + sids[0] + sids[1] + text("\nQuery: potato chips\nProduct:"),
        bos + text("Query: milk\nProduct:"),
    ]
    assert found["num_truncated"] == [0, 0]
    spelling = "".join(tokenizer.convert_ids_to_tokens(sids[0] + sids[1]))
    for skip in (False, True):
        decoded = tokenizer.decode(found["input_ids"][0], skip_special_tokens=skip)
        assert spelling in decoded.replace(" ", "") and "potato chips" in decoded


def test_prompts_do_not_depend_on_their_batch(sid_tokenizer):
    examples = [
        {"history": PRODUCTS[row : row + row % 4], "query": f"query {row}", "profile": {"age": row}}
        for row in range(10)
    ]
    together = sid_tokenizer.encode_prompts(examples, max_length=45)
    alone = [sid_tokenizer.encode_prompts([example], max_length=45) for example in examples]
    assert together["input_ids"] == [one["input_ids"][0] for one in alone]
    assert together["num_truncated"] == [one["num_truncated"][0] for one in alone]
    assert sid_tokenizer.encode_prompts([]) == {"input_ids": [], "num_truncated": []}


def test_truncation_leaves_out_the_oldest_products(sid_tokenizer):
    tokenizer = sid_tokenizer
    history = PRODUCTS[:12]
    example = {"profile": "age 35", "history": history, "query": "potato chips"}
    whole = tokenizer.encode_prompts([example])["input_ids"][0]
    lengths = [len(sid) for sid in tokenizer.encode_products(history)]
    shortest = len(whole) - sum(lengths)
    bare = tokenizer.encode_prompts([example | {"history": []}])["input_ids"][0]
    for max_length in range(len(bare), len(whole) + 3):
        found = tokenizer.encode_prompts([example], max_length=max_length)
        ids, left_out = found["input_ids"][0], found["num_truncated"][0]
        # as few products as the length allows, and the oldest of them
        expected = next((n for n in range(12) if shortest + sum(lengths[n:]) <= max_length), 12)
        assert left_out == expected
        if expected == 12:
            assert ids == bare  # no product, no label
            continue
        assert len(ids) == shortest + sum(lengths[expected:]) <= max_length
        assert ids == tokenizer.encode_prompts([example | {"history": history[expected:]}])["input_ids"][0]
    with pytest.raises(ValueError, match=rf"Prompt 1 takes {len(bare)} tokens.*max_length={len(bare) - 1}.*query"):
        tokenizer.encode_prompts([{"query": "x"}, example], max_length=len(bare) - 1)


def test_bad_prompts_are_refused(sid_tokenizer):
    with pytest.raises(TypeError, match=r"list of examples; wrap a single one"):
        sid_tokenizer.encode_prompts({"query": "milk"})
    with pytest.raises(ValueError, match="no value for any of the fields"):
        sid_tokenizer.encode_prompts([{"query": "milk"}, {}])
    with pytest.raises(ValueError, match="'p60'"):
        sid_tokenizer.encode_prompts([{"history": ["p1", "p60"]}])
    with pytest.raises(TypeError, match="not a string|list of strings"):
        sid_tokenizer.encode_prompts([{"history": ["p1", 7]}])
    with pytest.raises(ValueError, match="cannot be written as UTF-8"):
        sid_tokenizer.encode_prompts([{"query": "half a smiley \ud83d"}])


def test_own_prompt_template_is_kept(base_tokenizer, make_parts, tmp_path):
    template = PromptTemplate(["query", "history"], {"query": "Suche: "}, "→", " ")
    tokenizer = SIDTokenizer.from_base(base_tokenizer, make_parts()[2], prompt_template=template)
    tokenizer.save_pretrained(tmp_path)
    loaded = SIDTokenizer.from_pretrained(tmp_path)
    assert loaded.prompt_template == template
    example = [{"query": "Öl", "history": ["p1"]}]
    assert loaded.encode_prompts(example) == tokenizer.encode_prompts(example)


def test_copies(sid_tokenizer, observe):
    expected = observe(sid_tokenizer)
    assert observe(copy.deepcopy(sid_tokenizer)) == expected
    assert observe(pickle.loads(pickle.dumps(sid_tokenizer))) == expected


def test_hashes_do_not_change_with_use(base_tokenizer, make_parts):
    """What `datasets` hashes decides whether a `map` is found in its cache."""
    tokenizer = SIDTokenizer.from_base(base_tokenizer, *make_parts()[:0:-1])
    before, pickled = Hasher.hash(tokenizer), pickle.dumps(tokenizer)
    tokenizer.encode_prompts([{"history": ["p1"], "query": "milk"}])
    tokenizer.decode_products(tokenizer.encode_products(PRODUCTS))
    tokenizer.codebook_fingerprint()
    assert tokenizer.cache  # something to leave out
    assert Hasher.hash(tokenizer) == before and pickle.dumps(tokenizer) == pickled
    loaded = pickle.loads(pickled)
    assert loaded.encode_text("milk <a_1>") == tokenizer.encode_text("milk <a_1>")
    assert loaded.codebook_fingerprint() == tokenizer.codebook_fingerprint()


def test_save_and_load(sid_tokenizer, observe, tmp_path):
    sid_tokenizer.save_pretrained(tmp_path / "first")
    loaded = SIDTokenizer.from_pretrained(tmp_path / "first")
    assert type(loaded) is SIDTokenizer and observe(loaded) == observe(sid_tokenizer)
    for first, second in zip(loaded.quantizer.codebooks, sid_tokenizer.quantizer.codebooks, strict=True):
        assert torch.equal(first, second) and not first.requires_grad
    loaded.save_pretrained(tmp_path / "second")
    assert observe(SIDTokenizer.from_pretrained(tmp_path / "second")) == observe(sid_tokenizer)
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "second").iterdir())
    for name in names:  # saving what was loaded changes nothing, and no file tells where it was made
        first, second = (tmp_path / "first" / name).read_bytes(), (tmp_path / "second" / name).read_bytes()
        if name != "tokenizer_config.json":  # transformers notes there that it was loaded from a folder
            assert first == second, name
        for path in (tmp_path, Path(__file__).parents[2]):
            assert str(path).encode() not in first + second, name


def test_saving_over_another_bundle(sid_tokenizer, base_tokenizer, make_parts, observe, tmp_path):
    sid_tokenizer.save_pretrained(tmp_path)
    mapped = SIDTokenizer.from_pretrained(tmp_path)
    expected = observe(mapped)
    other = SIDTokenizer.from_base(base_tokenizer, make_parts(num_products=30, sizes=(3, 3), strategy="none")[2])
    other.save_pretrained(tmp_path)
    loaded = SIDTokenizer.from_pretrained(tmp_path)
    assert len(loaded.catalog) == 30 and loaded.quantizer is None and len(loaded) == len(other)
    assert loaded.encode_products(PRODUCTS[:30]) == other.encode_products(PRODUCTS[:30])
    assert observe(mapped) == expected  # what was loaded from the replaced files still works
    mapped.save_pretrained(tmp_path)
    assert observe(SIDTokenizer.from_pretrained(tmp_path)) == expected


def test_trap_own_init_keeps_normalizer_and_pre_tokenizer(sid_tokenizer, tmp_path):
    """transformers strips tokenizer.json to vocabulary and merges for classes with an `__init__` of their own."""
    assert "__init__" in vars(SIDTokenizer)
    sid_tokenizer.save_pretrained(tmp_path)
    before = json.loads(sid_tokenizer.backend_tokenizer.to_str())
    after = json.loads(SIDTokenizer.from_pretrained(tmp_path).backend_tokenizer.to_str())
    for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor", "model"):
        assert after[part] == before[part], part


def test_trap_extra_files_are_saved(sid_tokenizer, tmp_path):
    """transformers never calls `save_vocabulary` on a fast tokenizer."""
    written = sid_tokenizer.save_pretrained(tmp_path)
    names = {"sid_codebook.safetensors", "sid_catalog.safetensors", "sid_prompt.json", "sid_manifest.json"}
    for name in names | {"tokenizer.json", "tokenizer_config.json"}:
        assert (tmp_path / name).stat().st_size > 0
        assert str(tmp_path / name) in written  # what is uploaded to the Hub


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen", "plain"])
def test_trap_auto_tokenizer_in_a_fresh_process(saved, with_package, observe, name):
    """AutoTokenizer takes its own class for some model types (qwen2), unless the folder names ours."""
    expected = observe(saved[-1][name])
    assert with_package[name] == expected
    assert with_package[f"{name} auto"] == [True, expected]
    assert with_package[f"{name} trusted"] == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen", "plain"])
def test_trap_remote_code_in_a_process_without_the_package(saved, without_package, observe, name):
    """Only same-folder imports travel with a tokenizer's code, and only `vocab_files_names` with its data."""
    expected = observe(saved[-1][name])
    assert without_package[name] == expected
    assert without_package[f"{name} again"] == expected


def test_control_tokens_in_a_template_are_refused(base_tokenizer, make_parts):
    _, quantizer, catalog = make_parts()
    template = PromptTemplate(answer=f"Product:{base_tokenizer.eos_token}")
    with pytest.raises(ValueError, match="holds the control token .* spelled out as text"):
        SIDTokenizer.from_base(base_tokenizer, catalog, quantizer, prompt_template=template)


@pytest.mark.parametrize("base_tokenizer", ["llama"], indirect=True)
@pytest.mark.parametrize("begin", ["<s>", "</s>"])  # some tokenizers begin with their end token
def test_prompts_begin_as_the_base_begins(base_tokenizer, make_parts, begin):
    base = copy.deepcopy(base_tokenizer)
    base.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, base.convert_tokens_to_ids(begin))]
    )
    _, quantizer, catalog = make_parts()
    tokenizer = SIDTokenizer.from_base(base, catalog, quantizer)
    prompt = tokenizer.encode_prompts([{"query": "milk"}])["input_ids"][0]
    assert prompt[0] == base.convert_tokens_to_ids(begin)
    assert prompt.count(prompt[0]) == 1


def test_a_base_with_gaps_between_its_ids_is_refused(make_parts):
    """`tokenizers` counts on from the number of tokens, and so would give ids that text tokens have."""
    pieces = {piece: number for number, piece in enumerate(["</s>", *"abcdefgh"])} | {"z": 20}
    backend = Tokenizer(models.BPE(vocab=pieces, merges=[]))
    base = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    with pytest.raises(ValueError, match="has 10 tokens, but ids up to 20: there are gaps"):
        SIDTokenizer.from_base(base, make_parts()[2])
