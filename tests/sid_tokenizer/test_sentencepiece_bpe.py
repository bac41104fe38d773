import functools
import json
import random

import pytest
import sentencepiece
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from sentencepiece_models import BAICHUAN_SETTINGS, build_model, train, train_baichuan
from tokenizers import Tokenizer

from rqsid.sid_tokenizer.sentencepiece_bpe import fast_tokenizer_from_sentencepiece

SYMBOLS = ["<u1>", "<u12>", "▁▁▁", "\n", "中国", "1", "<0x41>x"]
KEEP = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
MODELS = {
    "baichuan": train_baichuan,
    "baichuan, bare": lambda: train(500, **BAICHUAN_SETTINGS),
    "llama": lambda: train(byte_fallback=True, split_digits=True, **KEEP),
    "llama, large": lambda: train(900, byte_fallback=True, split_by_whitespace=False, **KEEP),
    "without bytes": lambda: train(character_coverage=0.98, **KEEP),
    "without prefix or bytes": lambda: train(character_coverage=0.98, add_dummy_prefix=False, **KEEP),
    "removing": lambda: train(normalization_rule_name="identity", byte_fallback=True),
    "removing, without prefix": lambda: train(normalization_rule_name="identity", add_dummy_prefix=False),
    "symbols": lambda: train(add_dummy_prefix=False, byte_fallback=True, user_defined_symbols=SYMBOLS, **KEEP),
    "symbols and prefix": lambda: train(byte_fallback=True, user_defined_symbols=SYMBOLS, **KEEP),
    "symbols, removing": lambda: train(
        normalization_rule_name="identity", user_defined_symbols=[s for s in SYMBOLS if "▁" not in s]
    ),
    "controls": lambda: train(control_symbols=["<sep>", "<cls>"], pad_id=3, byte_fallback=True, **KEEP),
}
FRAGMENTS = [
    *["<s>", "</s>", "<unk>", "<s", "</s> ", "<0x0A>", "<0x41>", "<0xE4>", "<0x41>x", "<u1>", "<u12>", "<u1", "<sep>"],
    *[
        "<reserved_3>",
        "<reserved_106>",
        "<reserved_",
        "<reserved_1066>",
        "▁",
        "▁▁",
        " ▁ ",
        "  ",
        "   ",
        "\t",
        "\n",
        "\r\n",
    ],
    *[
        "chocolate",
        "cookies",
        " milk",
        "薯片",
        "中国",
        "中国人民",
        "牛奶 ",
        "200g",
        "1234567890",
        "🧑🏽\u200d🌾",
        "é",
        "e\u0301",
    ],
]
HOSTILE = [
    *["", " ", "  ", "   ", "    ", " a", "a ", "  a  ", " \n ", "\t", "\t\ta", "\n", "\n\n\n", "a\r\nb\r\n", "\r"],
    *[
        "potato chips",
        "potato  chips",
        " potato chips ",
        "potato   chips    salted",
        "新鲜牛奶",
        "新鲜牛奶 organic 薯片200克",
    ],
    *[
        "🧑🏽\u200d🌾",
        "👩\u200d👩\u200d👧\u200d👦 👍🏿",
        "🇨🇳",
        "ｆｕｌｌ ｗｉｄｔｈ　１２３",
        "㈱①Ⅷﬁ½",
        "1" * 50,
        "3.14159e-10",
        "1,234,567.89",
    ],
    *[
        "\x00",
        "a\x00b",
        "\x01\x02",
        "\x7f",
        "\x1b[0m",
        "\x85",
        "\u2028\u2029",
        "\u200b",
        "a\u200db",
        "\ufeffa",
        "\u00ad",
    ],
    *[
        "\xa0",
        "a\xa0b",
        "\u3000",
        "中\u3000国",
        "\u2003x",
        "e\u0301",
        "q\u0301\u0323",
        "①\u0301",
        "한\u1112\u1161\u11ab",
        "ไทย",
        "हिन्दी",
    ],
    *[
        "▁",
        "▁▁",
        " ▁",
        "▁ ",
        "a▁b",
        "▁potato",
        " ▁ potato▁▁chips ▁",
        "<0x0A>",
        "<0x41>",
        "<0xe4>",
        "<0x41>x",
        "<0xZZ>",
    ],
    *[
        "<reserved_3>",
        "a<reserved_3>b",
        "<reserved_3><reserved_106>",
        "<reserved_",
        " <reserved_1066> ",
        "<u1>x<u12>",
        "x<u1> <u12",
    ],
    *["<s>", "</s>", "a<s>b", "<s> </s>", "<unk>", "a <unk> b", "<s></s>", "<<s>>", "<sep>x<cls>"],
    *[
        "chocolate" * 200,
        "a" * 3000,
        "中国" * 500,
        " " * 700,
        "▁" * 70,
        "x" * 33 + " " * 33,
        "\U0010ffff",
        "\ue000",
        "\ufffd",
        "\ufdd0",
    ],
    "if x:\n    return  [1, 2]\t# 注释\r\n",
]


@functools.cache
def model(name):
    return MODELS[name]()


@functools.cache
def processor(name):
    return sentencepiece.SentencePieceProcessor(model_proto=model(name))


@pytest.fixture(scope="session")
def convert(tmp_path_factory):
    """`convert(content)`: the fast tokenizer of a model that is given as bytes."""

    def converted(content):
        path = tmp_path_factory.mktemp("models") / "tokenizer.model"
        path.write_bytes(content)
        return fast_tokenizer_from_sentencepiece(path)

    return converted


@pytest.fixture(scope="session")
def fast(convert):
    """`fast(name)`: the tokenizer of one of `MODELS`, once as it is and once without special tokens in text."""

    @functools.cache
    def tokenizer(name, plain=True):
        tokenizer = convert(model(name))
        tokenizer.encode_special_tokens = plain
        return tokenizer

    return tokenizer


def check(tokenizer, name, text):
    reference = processor(name)
    ids = reference.encode(text)
    assert tokenizer.encode(text).ids == ids, (text, reference.id_to_piece(ids))
    # Two things that the docstring excepts: the unknown symbol, and "▁" in front of a text where whitespace is removed.
    if reference.unk_id() not in ids and not ("removing" in name and text.lstrip(" ").startswith("▁")):
        assert tokenizer.decode(ids, skip_special_tokens=False) == reference.decode(ids), text


def is_lone_symbol(name, text):
    """The third: a dummy prefix, and nothing but one symbol behind it."""
    return name in ("symbols and prefix", "symbols, removing") and text.strip(" ").replace(" ", "▁") in SYMBOLS


@pytest.mark.parametrize("name", MODELS)
def test_hostile_corpus_equals_sentencepiece(fast, name):
    texts = [text for text in HOSTILE if not is_lone_symbol(name, text)]
    assert len(texts) > len(HOSTILE) - 5
    for text in texts:
        check(fast(name), name, text)
    # Control symbols count only where nothing else could be meant.
    for text in texts:
        if not any(symbol in text for symbol in ("<s>", "</s>", "<unk>", "<sep>", "<cls>", "<pad>")):
            check(fast(name, plain=False), name, text)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=150, deadline=None)
@given(
    text=st.lists(
        st.one_of(
            st.sampled_from(FRAGMENTS),
            st.text(" ▁0123456789", max_size=6),
            st.text("abcdehiknoprst 中国牛奶薯片", max_size=8),
            st.characters(exclude_categories=["Cs"]),
        ),
        max_size=12,
    ).map("".join)
)
@example(text=" ▁ ▁")
def test_random_text_equals_sentencepiece(fast, name, text):
    assume(not is_lone_symbol(name, text))
    check(fast(name), name, text)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_models_equal_sentencepiece(convert, data):
    """Pieces that overlap in every way, since pieces of real models do so rarely, with scores in any order."""
    alphabet = data.draw(st.sampled_from(["a", "ab", "ab", "abc", "a▁", "ab中"]))
    pieces = list(alphabet)
    for _ in range(data.draw(st.integers(1, 14))):
        piece = data.draw(st.sampled_from(pieces)) + data.draw(st.sampled_from(pieces))
        if piece not in pieces and len(piece) <= 9:
            pieces.append(piece)
    merged = data.draw(st.permutations(pieces[len(alphabet) :]))
    scored = [(c, -100.0 - at, 1) for at, c in enumerate(alphabet)] + [
        (p, -float(at), 1) for at, p in enumerate(merged)
    ]
    order = data.draw(st.permutations(scored))
    content = build_model(order, PLAIN)
    reference, tokenizer = sentencepiece.SentencePieceProcessor(model_proto=content), convert(content)
    for text in data.draw(st.lists(st.text(alphabet.replace("▁", " "), max_size=40), min_size=1, max_size=10)):
        assert tokenizer.encode(text).ids == reference.encode(text), (order, text)


def test_merges_follow_scores_and_not_ids(convert):
    # The ids of "a", "b", "c", "ab" are 3, 4, 5, 6.
    tokenizer = convert(build_model([*CHARS, ("ab", -2.0, 1), ("bc", -1.0, 1), ("abc", -3.0, 1)], PLAIN))
    assert tokenizer.encode("ab").ids == [6]
    assert tokenizer.encode("abc").tokens == ["abc"]  # by way of a + bc, although ab + c has the lower ids
    assert tokenizer.encode("abbc").tokens == ["ab", "bc"]
    tokenizer = convert(build_model([*CHARS, ("ab", -2.0, 1), ("bc", -1.0, 1)], PLAIN))
    assert tokenizer.encode("abc").tokens == ["a", "bc"]
    tokenizer = convert(build_model([*CHARS, ("ab", -1.0, 1), ("bc", -2.0, 1)], PLAIN))
    assert tokenizer.encode("abc").tokens == ["ab", "c"]


def test_user_defined_symbols_are_part_of_no_merge(convert):
    pieces = [("a", -10.0, 1), ("b", -11.0, 1), ("c", 0.0, 4), ("ab", -1.0, 1), ("abc", -2.0, 1), ("ca", -3.0, 1)]
    tokenizer = convert(build_model(pieces, PLAIN))
    assert tokenizer.encode("abcab").tokens == ["ab", "c", "ab"]
    # Also where somebody takes the added tokens out, so that symbols are text.
    assert json.loads(tokenizer.to_str())["model"]["merges"] == [["a", "b"]]


def test_ids_are_those_of_the_model(fast):
    for name in MODELS:
        reference, tokenizer = processor(name), fast(name)
        assert tokenizer.get_vocab_size() == len(reference)
        assert [tokenizer.id_to_token(i) for i in range(len(reference))] == [
            reference.id_to_piece(i) for i in range(len(reference))
        ]
        added = tokenizer.get_added_tokens_decoder()
        special = {i for i in range(len(reference)) if reference.is_control(i) or reference.is_unknown(i)}
        assert {i for i, token in added.items() if token.special} == special
    reference, tokenizer = processor("baichuan"), fast("baichuan")
    assert [tokenizer.token_to_id(token) for token in ("<unk>", "<s>", "</s>", "<reserved_106>")] == [0, 1, 2, 195]
    assert len(tokenizer.get_added_tokens_decoder()) == 3 + 86 + 110


def test_saved_tokenizer_is_the_same(fast):
    for name in MODELS:
        tokenizer, again = fast(name, plain=False), Tokenizer.from_str(fast(name, plain=False).to_str())
        assert again.to_str() == tokenizer.to_str()
        assert [e.ids for e in again.encode_batch(HOSTILE)] == [e.ids for e in tokenizer.encode_batch(HOSTILE)]


def test_exception_control_symbols_in_text(fast):
    tokenizer, reference = fast("baichuan", plain=False), processor("baichuan")
    assert tokenizer.encode("milk<s>  </s><unk>").ids == [*reference.encode("milk"), 1, *reference.encode("  "), 2, 0]
    assert 1 not in reference.encode("milk<s>")
    # Ordinary text is encoded as it is on either side, also by a model that puts a space in front, then on either side.
    tokenizer, reference = fast("llama", plain=False), processor("llama")
    assert tokenizer.encode("milk<s>milk").ids == [*reference.encode("milk"), 1, *reference.encode("milk")]


def test_exception_lone_symbol_behind_dummy_prefix(fast):
    name = "symbols and prefix"
    symbol, space = processor(name).piece_to_id("<u1>"), processor(name).piece_to_id("▁")
    assert (processor(name).encode("<u1>"), fast(name).encode("<u1>").ids) == ([space, symbol], [symbol])
    assert fast(name).encode("<u1>\n").ids == processor(name).encode("<u1>\n")


def test_exceptions_of_decoding(fast):
    name = "without bytes"
    ids = [*processor(name).encode("milk"), processor(name).unk_id()]
    assert processor(name).decode(ids) == "milk ⁇ "
    assert (fast(name).decode(ids), fast(name).decode(ids, skip_special_tokens=False)) == ("milk", "milk<unk>")

    tokenizer, reference = fast("baichuan"), processor("baichuan")
    good, cut = [reference.piece_to_id(f"<0x{b:02X}>") for b in "é".encode()], reference.piece_to_id("<0xE4>")
    assert (reference.decode([*good, cut]), tokenizer.decode([*good, cut])) == ("é\ufffd", "\ufffd" * 3)
    assert tokenizer.decode([cut, cut]) == reference.decode([cut, cut]) == "\ufffd" * 2
    assert (
        tokenizer.decode([1, *reference.encode("milk"), 2])
        == reference.decode([1, *reference.encode("milk"), 2])
        == "milk"
    )

    name = "removing"
    ids = processor(name).encode("▁ ▁ milk")
    assert (processor(name).decode(ids), fast(name).decode(ids)) == ("milk", "    milk")


def changed(content, change):
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(content)
    change(proto)
    return proto.SerializeToString()


def set_field(spec, name, value):
    return lambda proto: setattr(getattr(proto, spec), name, value)


CHARS = [("a", -10.0, 1), ("b", -11.0, 1), ("c", -12.0, 1)]
BYTES = [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
PLAIN = {"add_dummy_prefix": False, "remove_extra_whitespaces": False}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: train(120, "unigram", hard_vocab_limit=False), "is a Unigram model; only BPE"),
        (lambda: train(120, "char", hard_vocab_limit=False), "is a character model; only BPE"),
        (lambda: train(60, "word", hard_vocab_limit=False), "is a word model; only BPE"),
        (lambda: train(), "normalizes text by the rule 'nmt_nfkc'"),
        (lambda: train(normalization_rule_name="nfkc_cf"), "normalizes text by the rule 'nfkc_cf'"),
        (lambda: train(treat_whitespace_as_suffix=True, **KEEP), "treat_whitespace_as_suffix=True"),
        (
            lambda: changed(train(**KEEP), set_field("normalizer_spec", "escape_whitespaces", False)),
            "escape_whitespaces=False",
        ),
        (lambda: build_model([*CHARS, ("ab", -1.0, 1), ("bc", -1.0, 1)]), "'ab' and 'bc' have the same score -1. "),
        (lambda: build_model([*CHARS, ("ab", float("nan"), 1)]), "'ab' has the score nan"),
        (lambda: build_model([*CHARS, ("ab", -1.0, 5)]), "the unused piece 'ab' would be merged"),
        (lambda: build_model([*CHARS, ("ax", -1.0, 1)]), "the piece 'ax' is made of the character 'x'"),
        (lambda: train(normalization_rule_name="identity", user_defined_symbols=["x▁"]), "user-defined symbol 'x▁'"),
        (
            lambda: build_model([*CHARS, *BYTES, ("<0xab>", 0.0, 4)], PLAIN, {"byte_fallback": True}),
            "cannot reproduce: 'a<0xab>",
        ),
        (lambda: b"", "not a valid sentencepiece model .it holds no pieces"),
        (lambda: b"not a model at all", "not a valid sentencepiece model .* truncated, or something else"),
        (lambda: train(**KEEP)[:3000], "not a valid sentencepiece model"),
        (lambda: build_model([("a", -1.0, 1), ("a", -2.0, 1)]), "not a valid sentencepiece model .*already defined"),
        (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(tmp_path, make, message):
    path = tmp_path / "some.model"
    path.write_bytes(make())
    with pytest.raises(ValueError, match=f"some.model.*{message}"):
        fast_tokenizer_from_sentencepiece(path)


def test_denormalization_is_refused(tmp_path):
    rules = tmp_path / "rules.tsv"
    rules.write_text("61\t62\n")
    path = tmp_path / "some.model"
    path.write_bytes(train(denormalization_rule_tsv=str(rules), **KEEP))
    with pytest.raises(ValueError, match="some.model has a denormalization rule"):
        fast_tokenizer_from_sentencepiece(path)


def test_pieces_that_nothing_reaches_are_no_obstacle(convert):
    # "abcd" cannot be made of two pieces, "acb" neither; equal scores and unused pieces matter only where something merges.
    unreachable = [("abca", -1.0, 1), ("cabc", -1.0, 1), ("acb", -5.0, 5), ("x y", 0.0, 4)]
    content = build_model([*CHARS, ("ab", -2.0, 1), *unreachable], {"remove_extra_whitespaces": False})
    tokenizer, reference = convert(content), sentencepiece.SentencePieceProcessor(model_proto=content)
    for text in ("abcabc", "acb", "x y", "a  b"):
        assert tokenizer.encode(text).ids == reference.encode(text), text


def test_final_comparison_finds_what_no_rule_foresees(tmp_path, monkeypatch):
    import rqsid.sid_tokenizer.sentencepiece_bpe as module

    path = tmp_path / "tokenizer.model"
    path.write_bytes(model("baichuan"))
    right = module._ordered_merges
    monkeypatch.setattr(module, "_ordered_merges", lambda *args: right(*args)[::-1])
    with pytest.raises(ValueError, match="something that tokenizers cannot reproduce"):
        fast_tokenizer_from_sentencepiece(path)


@pytest.mark.parametrize("missing", ["sentencepiece", "google.protobuf.message"])
def test_missing_libraries_are_named(tmp_path, monkeypatch, missing):
    import sys

    path = tmp_path / "tokenizer.model"
    path.write_bytes(model("baichuan"))
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install rqsid\[sentencepiece\]"):
        fast_tokenizer_from_sentencepiece(path)


def test_conversion_repeats(convert):
    assert convert(model("symbols")).to_str() == convert(model("symbols")).to_str()
    rng = random.Random(0)
    texts = ["".join(rng.choices(FRAGMENTS, k=5)) for _ in range(50)]
    tokenizer = convert(model("symbols"))
    assert [e.ids for e in tokenizer.encode_batch(texts)] == [tokenizer.encode(text).ids for text in texts]


def test_missing_file_is_the_usual_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.model"):
        fast_tokenizer_from_sentencepiece(tmp_path / "nowhere.model")
