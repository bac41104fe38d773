"""Prompts: whatever users, profiles, titles and labels say, the only SIDs are those of products, the only control tokens the markup's."""

import copy

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers

from rqsid import ProductCatalog, PromptTemplate, SIDTokenizer

CHAT = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Full-width letters, which a compatibility normaliser turns into the plain ones.
WIDE = {chr(code): chr(code + 0xFEE0) for code in range(0x21, 0x7F)}
KINDS = ("plain", "NFKC")


def make(base, kind, titles, **template):
    base = copy.deepcopy(base)
    if kind == "NFKC":
        before = base.backend_tokenizer.normalizer
        base.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC()] + ([before] if before else []))
    base.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    # Markup that somebody added as if it were words, of which the second is matched behind the normaliser.
    base.add_tokens([AddedToken("<|tool|>", normalized=False), AddedToken("[CTRL]", normalized=True)])
    base.chat_template = CHAT
    codes = np.random.default_rng(0).integers(0, 4, (len(titles), 3))
    ids = [f"p{row}" for row in range(len(titles))]
    catalog = ProductCatalog.build(ids, codes, [4, 4, 4], texts=titles, collisions="suffix")
    return SIDTokenizer.from_base(base, catalog, prompt_template=PromptTemplate(**template))


def added_tokens(tokenizer):
    return sorted({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens})


def spellings(token):
    return [
        token,
        f" {token} ",
        f"{token}{token}",
        "".join(WIDE.get(letter, letter) for letter in token),
        token[:1] + "\u200b" + token[1:],
        token.replace("<", "﹤").replace(">", "﹥").replace("_", "＿"),
        "▁" + token + "Ġ",
        token.upper(),
    ]


@pytest.fixture(scope="module", params=KINDS)
def tokenizers(request, base_tokenizer):
    """One for each form of a prompt. Titles in the catalog hold every added token in every spelling."""
    probe = make(base_tokenizer, request.param, ["x"] * 20)
    texts = [text for token in added_tokens(probe) for text in spellings(token)]
    titles = ["chips " + " ".join(texts[at::20]) for at in range(19)] + [""]
    forms = {
        "sid": {},
        "title": {"history_format": "title"},
        "both": {"history_format": "both"},
        "chat": {"chat": True, "system": "You recommend products.", "history_format": "both"},
        "session": {"layout": "session"},
        "labels": {
            "fields": ["profile", "history", "query"],
            "labels": {"profile": "<a_1>", "query": "<b_2> ＜c_3＞", "title": "<x_0>"},
            "answer": "<|tool|><a_0>",
            "separator": "\n<c_1>",
            "history_separator": " <b_0> ",
            "history_format": "title",
        },
    }
    return {name: make(base_tokenizer, request.param, titles, **form) for name, form in forms.items()}, texts


def control_tokens(tokenizer):
    """All that no text may become: not the unknown token, which is how some bases spell what they do not know."""
    unknown = {tokenizer.unk_token_id} - {tokenizer.eos_token_id, tokenizer.bos_token_id}
    names = ["<|tool|>", "[CTRL]"]
    return (
        {*tokenizer.sid_vocabulary().tolist(), *tokenizer.all_special_ids, *tokenizer.convert_tokens_to_ids(names)}
    ) - unknown


def assert_only(tokenizer, ids, products):
    """The control tokens of a prompt are the markup around it and the SIDs of these products, in this order."""
    control = control_tokens(tokenizer)
    expected = tokenizer.convert_tokens_to_ids(tokenizer.prompt_prefix)
    for product in products:
        expected = expected + tokenizer.encode_products(product)
    expected += tokenizer.convert_tokens_to_ids(tokenizer.prompt_suffix)
    assert [token for token in ids if token in control] == [token for token in expected if token in control]


def prompts_of(text):
    """Every way in which a text gets into a prompt, with the products that the prompt names, by form."""
    history = ["p3", "p7"]
    yield ("sid", "both", "chat", "labels", "title"), {"query": text}, []
    yield (
        ("sid", "both", "chat"),
        {"profile": {"note": text, text: "value"}, "history": history, "query": text},
        history,
    )
    yield ("title", "labels"), {"profile": text, "history": history, "query": text}, []
    yield ("title",), {"history": ["p19"], "query": text}, ["p19"]  # without a title it is its SID
    yield ("session",), {"profile": text, "queries": [text, text, text], "products": history}, history
    yield ("sid", "labels", "session"), {"task": "title", "title": "x" + text}, []
    yield ("sid", "chat"), {"task": "title", "product": "p4"}, []
    yield ("sid", "title", "labels", "session"), {"task": "describe", "product": "p4"}, ["p4"]
    yield ("sid", "both"), {"task": "query", "query": text + "x"}, []


def check(tokenizers, text):
    for forms, example, products in prompts_of(text):
        if not any(text.split()) and "query" in example and len(example) == 1:
            continue  # an empty query alone is no prompt
        for form in forms:
            tokenizer = tokenizers[form]
            assert_only(tokenizer, tokenizer.encode_prompts([example])["input_ids"][0], products)
    session = tokenizers["session"]
    encoded = session.encode_sessions([{"profile": text, "queries": [text] * 2, "products": ["p3", "p7"]}])
    assert_only(session, encoded["input_ids"][0], ["p3", "p7"])
    for tokenizer in (tokenizers["sid"], tokenizers["chat"]):
        assert not control_tokens(tokenizer) & set(tokenizer.encode_text(text))


def test_every_added_token_in_every_spelling(tokenizers):
    forms, texts = tokenizers
    some = forms["sid"]
    raw = {token for text in texts for token in some(text, add_special_tokens=False)["input_ids"]}
    assert len(raw & control_tokens(some)) > 12 + 16  # the plain call is no defence: SIDs, suffixes and markup
    check(forms, " ".join(texts))
    for text in texts[:: max(1, len(texts) // 25)]:
        check(forms, text)


PIECES = st.sampled_from(
    list("<>_|/ab01 \n▁Ġ＜＞＿ａ") + ["<a_", "1>", "</s", ">", "<|im_", "start|>", "[CT", "RL]", "<|to", "ol|>"]
)


@given(st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text(tokenizers, data):
    forms, texts = tokenizers
    part = st.sampled_from(texts) | PIECES | st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
    check(forms, data.draw(st.lists(part, max_size=8).map("".join)))


def test_tokens_in_halves_over_fields(tokenizers):
    """Pieces are encoded one by one: what two of them spell together is no token."""
    forms, _ = tokenizers
    for first, second in (("<a_", "1>"), ("<|im_", "end|>"), ("<", "a_1>"), ("</", "s>"), ("[CT", "RL]")):
        example = {"profile": {first: second, "x": first}, "query": second}
        for form in ("sid", "both", "chat", "labels"):
            assert_only(forms[form], forms[form].encode_prompts([example])["input_ids"][0], [])


@pytest.mark.parametrize("kind", KINDS)
def test_system_messages_that_are_read_as_control_tokens(base_tokenizer, kind):
    """The system message is the one text that is read with control tokens in force, once, when the tokenizer is made."""
    titles = ["x"] * 4
    fine = make(base_tokenizer, kind, titles, chat=True, system="Recommend <products>, please: a_1 | b [x]")
    assert fine.convert_tokens_to_ids("<|im_start|>") in fine.encode_prompts([{"query": "x"}])["input_ids"][0]
    for system in ("<|im_end|> x", "x [CTRL]", "<|tool|>"):
        with pytest.raises(ValueError, match="system=.* holds the control token"):
            make(base_tokenizer, kind, titles, chat=True, system=system)
    wide = "".join(WIDE[letter] for letter in "[CTRL]")
    if kind == "NFKC":
        with pytest.raises(ValueError, match=r"is read as the control tokens \['\[CTRL\]'\]"):
            make(base_tokenizer, kind, titles, chat=True, system=f"x {wide} y")
    else:
        make(base_tokenizer, kind, titles, chat=True, system=f"x {wide} y")


def test_history_names_products_and_nothing_else(tokenizers):
    """Tokens in the place of product ids are no products."""
    forms, _ = tokenizers
    for name in ("<a_1>", "<a_1><b_2><c_3>", "</s>", "p3\x00", "P3", " p3", ""):
        for example in ({"history": [name], "query": "x"}, {"task": "describe", "product": name}):
            with pytest.raises(ValueError, match="not in the catalog"):
                forms["sid"].encode_prompts([example])
