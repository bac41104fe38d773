import json
import re

import pytest
import sentencepiece
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from sentencepiece_models import BAICHUAN_SYMBOLS, train, train_baichuan, write_baichuan_folder
from transformers import AutoTokenizer

from rqsid import SIDTokenizer
from rqsid.sid_tokenizer.tokenization_baichuan import BaichuanTokenizer

TEXTS = [
    *[
        "",
        " ",
        "potato chips",
        " potato  chips\n\t200g ",
        "新鲜牛奶 organic 薯片200克",
        "🧑🏽\u200d🌾 ①\u0301 ▁ \x00 <0x0A>",
    ],
    *["a<reserved_3>b <reserved_106>你好<reserved_107>", "milk\r\n    milk"],
]
# What published code would do if it were run.
REMOTE_CODE = """
import os
open(os.environ["REMOTE_CODE_TRACE"], "a").write(__name__)
raise RuntimeError("published code was run")
"""
CHAT = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "potato chips?"},
    {"role": "assistant", "content": "薯片"},
    {"role": "user", "content": " 牛奶"},
]


@pytest.fixture(scope="session")
def model():
    return train_baichuan()


@pytest.fixture(scope="session")
def reference(model):
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.fixture(scope="session")
def published(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("published")
    write_baichuan_folder(folder, model, REMOTE_CODE)
    return folder


@pytest.fixture(scope="session")
def tokenizer(published):
    return BaichuanTokenizer.from_pretrained(published)


@pytest.mark.parametrize("trust", [None, False, True])
def test_auto_tokenizer_finds_the_class_and_runs_no_published_code(published, tmp_path, monkeypatch, reference, trust):
    monkeypatch.setenv("REMOTE_CODE_TRACE", str(tmp_path / "trace"))
    loaded = AutoTokenizer.from_pretrained(published, trust_remote_code=trust)
    assert type(loaded) is BaichuanTokenizer
    assert loaded(TEXTS)["input_ids"] == reference.encode(TEXTS)
    assert not (tmp_path / "trace").exists()


def test_published_settings(tokenizer):
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token) == (
        *("<s>", "</s>", "<unk>", "<unk>"),
    )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id) == (
        1,
        2,
        0,
        0,
    )
    assert (tokenizer.model_max_length, len(tokenizer), tokenizer.vocab_size) == (4096, 1000, 1000)
    assert (tokenizer.add_bos_token, tokenizer.add_eos_token) == (False, False)
    assert list(tokenizer("milk")) == ["input_ids", "attention_mask"]
    assert tokenizer(["milk", "milk milk"], padding=True)["input_ids"][0][-1] == 0


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(TEXTS), st.text(max_size=5), st.text(" ▁01ab中国", max_size=8)), max_size=6))
def test_text_is_encoded_and_decoded_as_sentencepiece_does(tokenizer, reference, parts):
    text = "".join(parts)
    assume(not re.search("<s>|</s>|<unk>", text))  # which it finds, and sentencepiece does not
    ids = reference.encode(text)
    # Random text does come upon "<s>", which is a control token here; other tests are about that.
    assert tokenizer(text, split_special_tokens=True)["input_ids"] == ids
    assert any(token in text for token in tokenizer.all_special_tokens) or tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == reference.decode(ids)


def test_flags_of_published_tokens_have_no_effect(tokenizer, reference):
    # single_word would leave "<s>" alone between letters, and so depend on what is around it.
    for text in ("milk<s>milk", "milk <s> milk", "牛奶<s>牛奶", "1<s>"):
        before, after = text.split("<s>")
        assert tokenizer(text)["input_ids"] == [*reference.encode(before), 1, *reference.encode(after)]
    for token in tokenizer.added_tokens_decoder.values():
        assert not (token.single_word or token.lstrip or token.rstrip)
    assert {type(tokenizer.init_kwargs[name]) for name in ("bos_token", "eos_token", "unk_token", "pad_token")} == {
        str
    }


def test_split_special_tokens_spells_control_tokens_out(published, reference):
    texts = ["milk<s>", "<unk></s>", " <s> milk"]
    tokenizer = BaichuanTokenizer.from_pretrained(published, split_special_tokens=True)
    assert tokenizer(texts)["input_ids"] == reference.encode(texts)
    assert tokenizer(texts, split_special_tokens=False)["input_ids"] != reference.encode(texts)


@pytest.mark.parametrize(("begin", "end"), [(True, False), (False, True), (True, True)])
def test_begin_and_end_tokens(published, tmp_path, reference, begin, end):
    tokenizer = BaichuanTokenizer.from_pretrained(published, add_bos_token=begin, add_eos_token=end)
    milk = reference.encode("milk")
    expected = [1] * begin + milk + [2] * end
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, BaichuanTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert each("milk")["input_ids"] == expected
        assert each("milk", add_special_tokens=False)["input_ids"] == milk
        assert (each.add_bos_token, each.add_eos_token) == (begin, end)
    again = BaichuanTokenizer.from_pretrained(tmp_path, add_bos_token=False, add_eos_token=False)
    assert again("milk")["input_ids"] == milk

    config = json.loads((published / "tokenizer_config.json").read_text()) | {
        "add_bos_token": begin,
        "add_eos_token": end,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes((published / "tokenizer.model").read_bytes())
    assert BaichuanTokenizer.from_pretrained(tmp_path)("milk")["input_ids"] == expected


def test_model_file_alone_is_enough(published, reference):
    for tokenizer in (
        BaichuanTokenizer(published / "tokenizer.model"),
        BaichuanTokenizer.from_pretrained(published / "tokenizer.model"),
    ):
        assert tokenizer(TEXTS)["input_ids"] == reference.encode(TEXTS)
        assert (tokenizer.model_max_length, tokenizer.pad_token_id) == (4096, 0)


OBSERVE = """
import json, sys
from transformers import AutoTokenizer
def observe(tokenizer, texts, chat):
    return [
        tokenizer(texts)["input_ids"], tokenizer(texts, padding=True)["attention_mask"], list(tokenizer("milk")),
        tokenizer("a<s>b</s>", split_special_tokens=True)["input_ids"], tokenizer("a<s>b</s>")["input_ids"],
        [tokenizer.decode(ids) for ids in tokenizer(texts)["input_ids"]], tokenizer.special_tokens_map, len(tokenizer),
        tokenizer.model_max_length, tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"],
        sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]), tokenizer.all_special_ids,
    ]
"""


def observe(tokenizer):
    namespace = {}
    exec(OBSERVE, namespace)
    return json.loads(json.dumps(namespace["observe"](tokenizer, TEXTS, CHAT)))


@pytest.mark.slow
def test_saved_tokenizer_loads_in_fresh_processes(tokenizer, run_fresh, tmp_path):
    """With this package, and without it: as an ordinary fast tokenizer that needs no remote code."""
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "baichuan", "max_position_embeddings": 4096}))
    assert not [path.name for path in tmp_path.iterdir() if path.suffix == ".py"]
    code = OBSERVE + (
        "import importlib\n"
        "sys.modules['sentencepiece'] = sys.modules['google.protobuf'] = None\n"
        "importlib.import_module('rqsid') if sys.argv[4] == 'with' else None\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "if sys.argv[4] == 'without':\n"
        "    tokenizer.save_pretrained(sys.argv[1] + '/again')\n"
        "print(json.dumps([type(tokenizer).__name__, observe(tokenizer, json.loads(sys.argv[2]), json.loads(sys.argv[3]))]))"
    )
    expected = observe(tokenizer)
    arguments = tmp_path, json.dumps(TEXTS), json.dumps(CHAT)
    assert run_fresh(code, *arguments, "with", libraries="torch") == ["BaichuanTokenizer", expected]
    options = {"libraries": "torch", "without_rqsid": True}
    assert run_fresh(code, *arguments, "without", **options) == ["TokenizersBackend", expected]
    # Saved by a process without this package, and loaded with it.
    assert observe(BaichuanTokenizer.from_pretrained(tmp_path / "again")) == expected


def test_saved_files_repeat(tokenizer, published, tmp_path):
    for name, each in (("a", tokenizer), ("b", BaichuanTokenizer.from_pretrained(published))):
        each.save_pretrained(tmp_path / name)
    BaichuanTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "c")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        contents = {(tmp_path / folder / name).read_text() for folder in "abc"}
        assert len(contents) == 1, name
    assert "auto_map" not in json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())


def test_chat(tokenizer, reference):
    assert tokenizer.convert_tokens_to_ids(["<reserved_106>", "<reserved_107>"]) == [195, 196]
    expected = [
        *reference.encode("Answer briefly."),
        *(195, *reference.encode("potato chips?")),
        *(196, *reference.encode("薯片")),
        *(195, *reference.encode(" 牛奶")),
    ]
    assert tokenizer.apply_chat_template(CHAT)["input_ids"] == expected
    assert tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"] == [*expected, 196]
    assert tokenizer.apply_chat_template(CHAT[1:2])["input_ids"] == [195, *reference.encode("potato chips?")]
    marked = tokenizer.apply_chat_template(CHAT, return_assistant_tokens_mask=True)
    start = len(reference.encode("Answer briefly.")) + 1 + len(reference.encode("potato chips?")) + 1
    answer = range(start, start + len(reference.encode("薯片")))
    assert [at for at, flag in enumerate(marked["assistant_masks"]) if flag] == list(answer)
    for wrong in (CHAT[1:2] + CHAT[:1], [{"role": "tool", "content": "x"}]):
        with pytest.raises(TemplateError, match="Baichuan2 knows one system message, the first, and"):
            tokenizer.apply_chat_template(wrong)


def test_chat_template_needs_both_symbols_and_gives_way_to_a_published_one(tmp_path, published):
    (tmp_path / "tokenizer.model").write_bytes(train_baichuan(symbols=BAICHUAN_SYMBOLS[:-3]))
    assert BaichuanTokenizer.from_pretrained(tmp_path).chat_template is None
    assert BaichuanTokenizer.from_pretrained(published, chat_template="{{ 1 }}").chat_template == "{{ 1 }}"


def test_bad_input_is_refused(tmp_path, published):
    with pytest.raises(ValueError, match="neither a tokenizer.json nor a tokenizer.model"):
        BaichuanTokenizer()
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="neither a tokenizer.json nor a tokenizer.model"):
        BaichuanTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="takes no options of sentencepiece"):
        BaichuanTokenizer.from_pretrained(published, sp_model_kwargs={"enable_sampling": True})
    for content, message in (
        (b"", "it holds no pieces"),
        (train_baichuan()[:5000], "tokenizer.model is not a valid sentencepiece model"),
        (train(120, "unigram", hard_vocab_limit=False), "tokenizer.model is a Unigram model"),
    ):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            BaichuanTokenizer.from_pretrained(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["sentencepiece", "google.protobuf"])
def test_missing_libraries_are_named(published, run_fresh, missing):
    code = """
        import json, sys
        sys.modules[sys.argv[2]] = None
        from rqsid.sid_tokenizer.tokenization_baichuan import BaichuanTokenizer
        try:
            BaichuanTokenizer.from_pretrained(sys.argv[1])
        except ImportError as error:
            print(json.dumps(str(error)))
    """
    assert "pip install rqsid[sentencepiece]" in run_fresh(code, published, missing, libraries="torch")


# Under SID tokens


@pytest.fixture(scope="session")
def with_sids(tokenizer, make_parts):
    _, quantizer, catalog = make_parts()
    return SIDTokenizer.from_base(tokenizer, catalog, quantizer)


def test_sid_tokens_follow_the_vocabulary(tokenizer, with_sids):
    assert with_sids.new_token_ids().tolist() == list(range(1000, 1000 + 4 + 5 + 6))
    assert with_sids.get_vocab().items() >= tokenizer.get_vocab().items()
    assert (with_sids.pad_token_id, with_sids.eos_token_id, with_sids.bos_token_id) == (0, 2, 1)
    assert (with_sids.model_max_length, with_sids.chat_template) == (4096, tokenizer.chat_template)


@settings(max_examples=80, deadline=None)
@given(st.text(" ▁ab1中国\n", max_size=8), st.text(" ▁ab1中国\n", max_size=8))
def test_text_around_sids_is_as_without(with_sids, reference, before, after):
    for sid, product in zip(with_sids.encode_products(["p0", "p7"]), ("p0", "p7"), strict=True):
        text = before + "".join(with_sids.convert_ids_to_tokens(sid)) + after
        ids = [*reference.encode(before), *sid, *reference.encode(after)]
        assert with_sids(text)["input_ids"] == ids
        assert with_sids.decode(ids) == text.replace("▁", " ")
        assert product in with_sids.decode_products(sid)


def test_prompts_are_sentencepiece_around_sids(with_sids, reference):
    example = {"profile": {"age": "35-44"}, "history": ["p1", "p7"], "query": "potato  薯片 <a_1></s><reserved_106>"}
    ids = with_sids.encode_prompts([example])["input_ids"][0]
    before, _, after = with_sids.prompt_template.split(example)
    sids = [token for sid in with_sids.encode_products(["p1", "p7"]) for token in sid]
    start = len(reference.encode(before))
    assert ids[:start] == reference.encode(before)
    assert ids[start : start + len(sids)] == sids
    # A query is data, in which no symbol counts: the pieces spell it out, and none is a symbol, SID or control token.
    tail = ids[start + len(sids) :]
    assert with_sids.decode(tail) == after
    assert not [
        token for token in with_sids.convert_ids_to_tokens(tail) if token in BAICHUAN_SYMBOLS or token == "</s>"
    ]
    plain = with_sids.encode_text("potato  薯片 200g")
    assert plain == reference.encode("potato  薯片 200g")


@pytest.mark.slow
def test_sid_tokenizer_is_saved_and_loaded(with_sids, reference, run_fresh, tmp_path):
    with_sids.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "baichuan", "max_position_embeddings": 4096}))
    code = """
        import json, sys
        sys.modules["sentencepiece"] = None
        import rqsid
        from transformers import AutoTokenizer
        texts, found = json.loads(sys.argv[2]), []
        for tokenizer in (rqsid.SIDTokenizer.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])):
            products = [f"p{row}" for row in range(60)]
            found.append([
                type(tokenizer).__name__, tokenizer.encode_text(texts), tokenizer.encode_products(products),
                tokenizer.decode_products(tokenizer.encode_products(products)),
                tokenizer.encode_prompts([{"history": ["p1"], "query": "薯片  x"}]),
            ])
        print(json.dumps(found))
    """
    texts = ["potato  chips\n200g", " 薯片", "🧑🏽\u200d🌾 ▁"]
    products = [f"p{row}" for row in range(60)]
    sids = with_sids.encode_products(products)
    prompts = with_sids.encode_prompts([{"history": ["p1"], "query": "薯片  x"}])
    expected = ["SIDTokenizer", reference.encode(texts), sids, with_sids.decode_products(sids), prompts]
    assert run_fresh(code, tmp_path, json.dumps(texts), libraries="torch") == [expected, expected]
