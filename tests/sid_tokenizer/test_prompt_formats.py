"""Histories as titles, chat templates, sessions, and what is stored of them."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rqsid import ProductCatalog, PromptTemplate, SIDTokenizer
from rqsid.sid_tokenizer.files import checksum, file_entry

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:;<>|/_-. \n"
END, START, STOP = 0, 1, 2
CHAT = (
    "{% for message in messages %}<|go|>{{ message.role }}\n{{ message.content | trim }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|go|>assistant\n{% endif %}"
)
TITLES = ["chips", "", "oat\nmilk  1l", "</s><a_1>", "tea <|stop|>", "rye"]
CODES = [[0, 0], [0, 1], [1, 0], [1, 2], [2, 2], [2, 0]]


def letter_base(chat_template=CHAT):
    """A token for each letter, so that ids can be written down: 3 and its place among the letters."""
    pieces = {piece: at for at, piece in enumerate(["</s>", "<|go|>", "<|stop|>", *LETTERS])}
    base = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=pieces, merges=[])),
        eos_token="</s>",
        extra_special_tokens=["<|go|>", "<|stop|>"],
    )
    base.chat_template = chat_template
    return base


def spelled(*parts):
    """Ids of texts by their letters; lists of ids stay as they are."""
    return [
        token for part in parts for token in (part if isinstance(part, list) else [3 + LETTERS.index(x) for x in part])
    ]


def sid(product):
    """`<a_0>` stands behind the letters, and each layer has three codes."""
    first, second = CODES[int(product[1:])]
    return [3 + len(LETTERS) + first, 3 + len(LETTERS) + 3 + second]


@pytest.fixture(scope="module")
def make():
    """`make(**template)`: a tokenizer on letters; products p0 to p5 have titles, one of them an empty one."""

    def make(base=None, texts=TITLES, **options):
        catalog = ProductCatalog.build([f"p{row}" for row in range(6)], np.array(CODES), [3, 3], texts=texts)
        base = letter_base() if base is None else base
        return SIDTokenizer.from_base(base, catalog, prompt_template=PromptTemplate(**options))

    return make


def prompt(tokenizer, example, **options):
    return tokenizer.encode_prompts([example], **options)["input_ids"][0]


# Histories


def test_a_history_of_titles(make):
    example = {"history": ["p0", "p1", "p2"], "query": "tea"}
    tail = "\nQuery: tea\nProduct:"
    found = prompt(make(history_format="title"), example)
    # p1 has no title and so its SID, without a space before it
    assert found == spelled("History:", "\n- chips", "\n-", sid("p1"), "\n- oat milk 1l", tail)
    found = prompt(make(history_format="both"), example)
    expected = ["History:", "\n- chips", sid("p0"), "\n-", sid("p1"), "\n- oat milk 1l", sid("p2"), tail]
    assert found == spelled(*expected)
    found = prompt(make(history_format="title", history_separator="; ", labels={"history": "Had"}), example)
    assert found == spelled("Had", "; chips", ";", sid("p1"), "; oat milk 1l", tail)
    assert prompt(make(), example) == spelled("History:", sid("p0"), sid("p1"), sid("p2"), tail)


@pytest.mark.parametrize("history_format", ["sid", "title", "both"])
def test_truncation_leaves_out_whole_products(make, history_format):
    tokenizer = make(history_format=history_format)
    example = {"profile": "x", "history": ["p0", "p1", "p2", "p5", "p0"], "query": "tea"}
    whole = [prompt(tokenizer, example | {"history": example["history"][start:]}) for start in range(6)]
    assert [len(ids) for ids in whole] == sorted({len(ids) for ids in whole}, reverse=True)
    assert whole[5] == spelled("Profile: x\nQuery: tea\nProduct:")
    for max_length in range(len(whole[5]), len(whole[0]) + 2):
        found = tokenizer.encode_prompts([example], max_length=max_length)
        start = next(start for start in range(6) if len(whole[start]) <= max_length)
        assert found == {"input_ids": [whole[start]], "num_truncated": [start]}
    with pytest.raises(ValueError, match=f"takes {len(whole[5])} tokens without its history"):
        tokenizer.encode_prompts([example], max_length=len(whole[5]) - 1)


def test_no_token_of_a_space_stands_before_a_sid(make_parts, base_tokenizer):
    catalog = make_parts(collisions="suffix")[2]
    vocabulary = None
    for history_format in ("title", "both"):
        template = PromptTemplate(history_format=history_format)
        tokenizer = SIDTokenizer.from_base(base_tokenizer, catalog, prompt_template=template)
        vocabulary = set(tokenizer.sid_vocabulary().tolist())
        ids = prompt(tokenizer, {"history": ["p1", "p2", "p3"], "query": "milk"})
        before = [left for left, right in zip(ids, ids[1:], strict=False) if right in vocabulary - {left}]
        assert all(tokenizer.decode([token]).strip() for token in before)
        bos = tokenizer.convert_tokens_to_ids(tokenizer.prompt_prefix)
        units = [tokenizer.encode_text(f"\n- text of p{row}") for row in (1, 2, 3)]
        if history_format == "both":
            units = [u + s for u, s in zip(units, tokenizer.encode_products(["p1", "p2", "p3"]), strict=True)]
        text = tokenizer.encode_text
        assert ids == bos + text("History:") + sum(units, []) + text("\nQuery: milk\nProduct:")


def test_titles_of_a_catalog_without_texts_are_refused(make):
    with pytest.raises(ValueError, match=r"catalog has no texts.*texts=.*history_format=\"sid\""):
        make(texts=None, history_format="both")
    tokenizer = make(texts=None)
    with pytest.raises(ValueError, match="catalog has no texts"):
        prompt(tokenizer, {"task": "title", "product": "p0"})
    tokenizer.prompt_template.history_format = "title"
    with pytest.raises(ValueError, match="catalog has no texts"):
        prompt(tokenizer, {"history": ["p0"]})


# Chats


def test_a_prompt_is_the_message_of_a_user(make):
    tokenizer = make(chat=True, history_format="title")
    assert tokenizer.prompt_prefix == ["<|go|>", *"user", "\n"]
    assert tokenizer.prompt_suffix == ["<|stop|>", "\n", "<|go|>", *"assistant", "\n"]
    before, behind = [[START], "user\n"], [[STOP], "\n", [START], "assistant\n"]
    body = ["History:", "\n- chips", "\nQuery: tea\nProduct:"]
    assert prompt(tokenizer, {"history": ["p0"], "query": "tea"}) == spelled(*before, *body, *behind)
    tokenizer = make(chat=True, system="Be brief.")
    before = [[START], "system\nBe brief.", [STOP], "\n", *before]
    assert prompt(tokenizer, {"query": "tea"}) == spelled(*before, "Query: tea\nProduct:", *behind)


def test_the_markup_of_a_chat_counts(make):
    tokenizer = make(chat=True)
    bare, example = prompt(tokenizer, {"query": "tea"}), {"history": ["p0", "p2"], "query": "tea"}
    whole = prompt(tokenizer, example)
    assert tokenizer.encode_prompts([example], max_length=len(whole))["num_truncated"] == [0]
    found = tokenizer.encode_prompts([example], max_length=len(whole) - 1)
    assert found["num_truncated"] == [1] and found["input_ids"][0] == prompt(tokenizer, example | {"history": ["p2"]})
    assert prompt(tokenizer, example, max_length=len(bare)) == bare
    with pytest.raises(ValueError, match=f"takes {len(bare)} tokens without its history"):
        prompt(tokenizer, example, max_length=len(bare) - 1)


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("base_tokenizer", ["qwen"], indirect=True)
def test_a_chat_of_text_is_what_the_template_renders(base_tokenizer, make_parts):
    base_tokenizer.chat_template = CHATML
    try:
        template = PromptTemplate(chat=True, system="You know all products.")
        tokenizer = SIDTokenizer.from_base(base_tokenizer, make_parts()[2], prompt_template=template)
        messages = [
            {"role": "system", "content": template.system},
            {"role": "user", "content": "Profile: age 35\nQuery: potato chips\nProduct:"},
        ]
        expected = base_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert prompt(tokenizer, {"profile": "age 35", "query": "potato chips"}) == expected
    finally:
        base_tokenizer.chat_template = None


@pytest.mark.parametrize("base_tokenizer", ["llama"], indirect=True)
def test_a_space_beside_the_message_is_no_token_twice(base_tokenizer, make_parts):
    """Llama puts a space before every text; the one that the template has there is the same."""
    base_tokenizer.chat_template = "<s>[INST] {{ messages[0].content }} [/INST]"
    try:
        template = PromptTemplate(chat=True)
        tokenizer = SIDTokenizer.from_base(base_tokenizer, make_parts()[2], prompt_template=template)
        ids = prompt(tokenizer, {"query": "milk"})
        assert tokenizer.decode(ids) == "<s>[INST] Query: milk\nProduct: [/INST]"
    finally:
        base_tokenizer.chat_template = None


@pytest.mark.parametrize(
    "chat_template, options, message",
    [
        (None, {}, "chat=True needs a chat template, and the base tokenizer has none"),
        ("{{ messages[-1].content | upper }}", {}, "gives a user's message 0 times as it is"),
        ("{{ messages[-1].content }}{{ messages[-1].content }}", {}, "gives a user's message 2 times"),
        ("nothing", {}, "gives a user's message 0 times as it is .*'nothing'"),
        (
            "{{ messages[-1].content }}",
            {"system": "Be brief."},
            "leaves out or changes the system message 'Be brief.'",
        ),
        ("{{ raise_exception('no system role') }}", {"system": "x"}, "render a system message and .*no system role"),
        (CHAT, {"system": "x<|stop|>"}, r"system='x<\|stop\|>' holds the control token '<\|stop\|>'"),
    ],
)
def test_chats_that_cannot_be_rendered_are_refused(make, chat_template, options, message):
    with pytest.raises(ValueError, match=message):
        make(letter_base(chat_template), chat=True, **options)


def test_a_template_that_asks_for_other_markup_is_refused(make):
    tokenizer = make()
    tokenizer.prompt_template = PromptTemplate(chat=True, system="x")
    with pytest.raises(ValueError, match="chat=True and system='x', but .* those of chat=False and system=None"):
        prompt(tokenizer, {"query": "tea"})
    tokenizer.prompt_template = PromptTemplate(fields=["query"])
    assert prompt(tokenizer, {"query": "tea"}) == spelled("Query: tea\nProduct:")


HOSTILE = st.lists(
    st.sampled_from(
        ["</s>", "<|go|>", "<|stop|>", "<|im_start|>", "<a_", "1>", "<b_0>", "assistant", "\n", " ", "x", "ü"]
    )
).map("".join)


@given(HOSTILE, HOSTILE, HOSTILE)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_that_is_typed_becomes_markup_or_a_sid(make, profile, query, title):
    tokenizer = make(texts=["x" + title, *TITLES[1:]], chat=True, system="Be brief.", history_format="both")
    markup = [START, STOP, START, STOP, START]  # those of the system message, the user and the assistant
    control = {END, START, STOP, *tokenizer.sid_vocabulary().tolist()}
    example = {"profile": {"a": profile}, "history": ["p0", "p3", "p4"], "query": "x" + query}
    ids = prompt(tokenizer, example)
    sids = sid("p0") + sid("p3") + sid("p4")
    assert [token for token in ids if token in control] == markup[:3] + sids + markup[3:]
    for task, expected in (("title", []), ("describe", sid("p0"))):
        ids = prompt(tokenizer, {"task": task, "product": "p0"})
        assert [token for token in ids if token in control] == markup[:3] + expected + markup[3:]


# Sessions


def test_a_session_by_hand(make):
    tokenizer = make(layout="session")
    session = {"profile": "x", "queries": ["tea", "", "a b"], "products": ["p4", "p1", "p4"]}
    out = tokenizer.encode_sessions([session])
    texts = ["\nQuery: tea\nProduct:", "\nProduct:", "\nQuery: a b\nProduct:"]
    assert out["input_ids"] == [spelled("Profile: x", texts[0], sid("p4"), texts[1], sid("p1"), texts[2], sid("p4"))]
    first = len("Profile: x" + texts[0]) - 1
    second, third = first + 2 + len(texts[1]), first + 4 + len(texts[1] + texts[2])
    assert out["label_positions"] == [[at + step for at in (first, second, third) for step in range(3)]]
    assert out["label_ids"] == [[*sid("p4"), END, *sid("p1"), END, *sid("p4"), END]]
    assert out["product_rows"] == [[4, 1, 4]] and out["num_truncated"] == [0]
    assert third + 3 == len(out["input_ids"][0])  # it ends with the last token of the last SID

    plain = tokenizer.encode_sessions([{"products": ["p4", "p1"]}, {"products": ["p0"]}])
    assert plain["input_ids"] == [
        spelled("\nProduct:", sid("p4"), "\nProduct:", sid("p1")),
        spelled("\nProduct:", sid("p0")),
    ]
    assert plain["label_positions"] == [[8, 9, 10, 19, 20, 21], [8, 9, 10]]
    assert plain["product_rows"] == [[4, 1], [0]]
    assert tokenizer.encode_sessions([]) == {name: [] for name in plain}


@st.composite
def sessions(draw):
    count = draw(st.integers(1, 6))
    session = {
        "products": draw(st.lists(st.sampled_from([f"p{row}" for row in range(60)]), min_size=count, max_size=count))
    }
    text = (
        st.none()
        | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
        | st.sampled_from(["<a_1>", "milk 1l"])
    )
    if draw(st.booleans()):
        session["queries"] = draw(st.lists(text, min_size=count, max_size=count))
    if draw(st.booleans()):
        session["profile"] = draw(text | st.fixed_dictionaries({"age": text}))
    return session


def cut(session, at):
    """What is known before purchase `at`."""
    products = {"products": session["products"][:at]}
    return session | products | ({"queries": session["queries"][: at + 1]} if "queries" in session else {})


@given(st.lists(sessions(), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_prompts_are_prefixes_of_sessions(session_tokenizer, drawn):
    tokenizer = session_tokenizer
    out = tokenizer.encode_sessions(drawn)
    for row, session in enumerate(drawn):
        input_ids, positions, label_ids = (out[name][row] for name in ("input_ids", "label_positions", "label_ids"))
        sids = tokenizer.encode_products(session["products"])
        assert label_ids == [token for ids in sids for token in [*ids, tokenizer.eos_token_id]]
        assert len(positions) == len(label_ids) and positions == sorted(set(positions))
        start = 0
        for at, ids in enumerate(sids):
            own = positions[start : start + len(ids) + 1]
            (expected,) = tokenizer.encode_prompts([cut(session, at)])["input_ids"]
            assert input_ids[: own[0] + 1] == expected
            # One row per purchase reads prompt and SID, and predicts SID and end token from the prompt's last token on.
            assert own == list(range(len(expected) - 1, len(expected) + len(ids)))
            assert input_ids[own[0] + 1 : own[-1] + 1] == ids
            start += len(ids) + 1
        assert positions[-1] == len(input_ids) - 1
        assert tokenizer.catalog.product_ids(out["product_rows"][row]) == session["products"]


@given(st.lists(sessions(), min_size=1, max_size=3), st.integers(0, 80))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sessions_and_prompts_are_cut_alike(session_tokenizer, drawn, room):
    """The oldest purchases go, the profile stays, and as few go as must."""
    tokenizer = session_tokenizer
    alone = [cut(session | {"products": session["products"][-1:]}, 0) for session in drawn]
    alone = [
        one | ({"queries": session["queries"][-1:]} if "queries" in session else {})
        for one, session in zip(alone, drawn, strict=True)
    ]
    max_length = max(map(len, tokenizer.encode_prompts(alone)["input_ids"])) + room
    out = tokenizer.encode_sessions(drawn, max_length=max_length)
    for row, session in enumerate(drawn):
        last = len(session["products"]) - 1
        found = tokenizer.encode_prompts([cut(session, last)], max_length=max_length)
        left_out = out["num_truncated"][row]
        assert found["num_truncated"] == [left_out]
        answer = len(tokenizer.encode_products(session["products"][-1]))
        assert out["input_ids"][row][:-answer] == found["input_ids"][0] and len(found["input_ids"][0]) <= max_length
        shorter = [
            session | {name: session[name][start:] for name in ("queries", "products") if name in session}
            for start in range(last + 1)
        ]
        whole = tokenizer.encode_sessions(shorter)
        lengths = [len(ids) - answer for ids in whole["input_ids"]]
        assert left_out == next(start for start in range(last + 1) if lengths[start] <= max_length)
        for name in ("input_ids", "label_positions", "label_ids", "product_rows"):
            assert out[name][row] == whole[name][left_out]


@pytest.fixture(scope="module")
def session_tokenizer(request, make_parts):
    bases = next(
        p for p in request.config.pluginmanager.get_plugins() if hasattr(p, "BASE_TOKENIZERS")
    ).BASE_TOKENIZERS
    return SIDTokenizer.from_base(bases["llama"](), make_parts()[2], prompt_template=PromptTemplate(layout="session"))


def test_bad_sessions_are_refused(make):
    tokenizer = make(layout="session")
    long = {"profile": "x" * 30, "queries": ["tea"], "products": ["p0"]}
    cases = [
        ({"products": ["p0"]}, TypeError, "wrap a single one"),
        ([{"products": []}], ValueError, "Session 0 has no products"),
        ([{"products": ["p9"]}], ValueError, "'p9'"),
        ([{"queries": ["a"], "products": ["p0", "p1"]}], ValueError, "1 queries and 2 products"),
        ([long], ValueError, "Session 0 takes 59 tokens with its last purchase alone, more than max_length=58"),
    ]
    for examples, error, message in cases:
        with pytest.raises(error, match=message):
            tokenizer.encode_sessions(examples, max_length=58)
    assert len(tokenizer.encode_sessions([long], max_length=59)["input_ids"][0]) == 61
    with pytest.raises(ValueError, match=r"layout='purchase'. Sessions need one with layout=\"session\""):
        make().encode_sessions([{"products": ["p0"]}])


# Tasks


def test_prompts_of_tasks(make):
    tokenizer = make()
    example = {"profile": "x", "history": ["p0"], "query": "tea", "product": "p2"}
    tasks = ["purchase", "history", "query", "title", "describe"]
    found = tokenizer.encode_prompts([example | {"task": task} for task in tasks])["input_ids"]
    assert found == [
        spelled("Profile: x\nHistory:", sid("p0"), "\nQuery: tea\nProduct:"),
        spelled("Profile: x\nHistory:", sid("p0"), "\nProduct:"),
        spelled("Query: tea\nProduct:"),
        spelled("Title: oat milk 1l\nProduct:"),
        spelled("Product:", sid("p2"), "\nTitle:"),
    ]
    # A product that the catalog does not have yet
    assert prompt(tokenizer, {"task": "title", "title": "rice"}) == spelled("Title: rice\nProduct:")


def test_long_titles_are_cut_at_their_end(make):
    tokenizer = make(chat=True)
    example = {"task": "title", "title": "abcdef"}
    whole = prompt(tokenizer, example)
    for num_cut in range(6):
        shorter = prompt(tokenizer, {"task": "title", "title": "abcdef"[: 6 - num_cut]})
        assert prompt(tokenizer, example, max_length=len(whole) - num_cut) == shorter
    with pytest.raises(ValueError, match="more than max_length"):
        prompt(tokenizer, example, max_length=len(whole) - 7)


def test_titles_that_are_not_there(make):
    tokenizer = make()
    with pytest.raises(ValueError, match="Prompt 1: product 'p1' has no title in the catalog"):
        tokenizer.encode_prompts([{"task": "title", "product": product} for product in ("p0", "p1")])
    with pytest.raises(ValueError, match=r"Prompt 0 has neither title nor product, found \['query', 'task'\]"):
        tokenizer.encode_prompts([{"task": "title", "query": "x"}])


# Bundles


def edit_prompt(folder, change):
    """Edits `sid_prompt.json`, and the manifest as if it had been written so."""
    path = folder / "sid_prompt.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    manifest = json.loads((folder / "sid_manifest.json").read_text())
    manifest.pop("checksum")
    manifest["files"]["sid_prompt.json"] = file_entry(str(path))
    (folder / "sid_manifest.json").write_text(json.dumps(manifest | {"checksum": checksum(manifest)}))


def test_a_bundle_from_before_loads(make, tmp_path):
    tokenizer = make(labels={"query": "Search: "}, max_length=50)
    tokenizer.save_pretrained(tmp_path)
    old = ["fields", "labels", "answer", "separator", "max_length"]
    edit_prompt(
        tmp_path,
        lambda prompt: {"template": {name: prompt["template"][name] for name in old}, "prefix": prompt["prefix"]},
    )
    loaded = SIDTokenizer.from_pretrained(tmp_path)
    assert loaded.prompt_template == tokenizer.prompt_template and loaded.prompt_suffix == []
    examples = [{"profile": "x", "history": ["p0", "p1"] * 5, "query": "tea"}]
    assert loaded.encode_prompts(examples) == tokenizer.encode_prompts(examples)
    assert loaded.encode_prompts(examples)["num_truncated"] == [5]  # 40 letters of text leave room for five


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda prompt: prompt | {"middle": []}, "sid_prompt.json holds middle, which this version"),
        (lambda prompt: prompt | {"template": prompt["template"] | {"tone": "kind"}}, "sid_prompt.json.*'tone'"),
        (
            lambda prompt: prompt | {"template": prompt["template"] | {"layout": "tree"}},
            "sid_prompt.json.*layout='tree'",
        ),
        (lambda prompt: prompt | {"template": prompt["template"] | {"chat": "no"}}, "sid_prompt.json.*chat='no'"),
        (lambda prompt: prompt | {"suffix": "abc"}, "sid_prompt.json puts 'abc' around prompts, which is no list"),
        (lambda prompt: prompt | {"suffix": ["<|unknown|>"]}, r"sid_prompt.json puts '<\|unknown\|>' around prompts"),
        (lambda prompt: {"template": prompt["template"]}, "sid_prompt.json holds no prompt template.*prefix"),
    ],
)
def test_edited_prompts_are_refused_by_name(make, tmp_path, change, words):
    make().save_pretrained(tmp_path)
    edit_prompt(tmp_path, change)
    with pytest.raises(ValueError, match=words):
        SIDTokenizer.from_pretrained(tmp_path)


@pytest.mark.slow
def test_chats_and_sessions_in_a_fresh_process_without_the_package(make, run_fresh, tmp_path):
    tokenizers = {
        "chat": make(chat=True, system="Be brief.", history_format="both", history_separator="; "),
        "session": make(layout="session", max_length=60),
    }
    purchases = [{"profile": "x", "history": ["p0", "p1", "p3"], "query": "tea <|stop|>"}]
    whole = [{"profile": "x", "queries": ["tea", "b", "</s>"], "products": ["p4", "p1", "p0"]}]
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(tmp_path / name)
    found = run_fresh(
        """
import json, sys
from transformers import AutoTokenizer

folder, purchases, whole = sys.argv[1], *map(json.loads, sys.argv[2:])
chat, session = (AutoTokenizer.from_pretrained(f"{folder}/{name}", trust_remote_code=True) for name in ("chat", "session"))
print(json.dumps({
    "module": type(chat).__module__,
    "chat": chat.encode_prompts(purchases + [{"task": "title", "product": "p2"}]),
    "templates": [chat.prompt_template.to_dict(), session.prompt_template.to_dict()],
    "session": session.encode_sessions(whole),
    "next": session.encode_prompts([whole[0] | {"products": ["p4", "p1"]}]),
}))
""",
        tmp_path,
        json.dumps(purchases),
        json.dumps(whole),
        without_rqsid=True,
        HF_MODULES_CACHE=str(tmp_path / "modules"),
    )
    chat, session = tokenizers["chat"], tokenizers["session"]
    assert found.pop("module").startswith("transformers_modules")
    assert found == {
        "chat": chat.encode_prompts([*purchases, {"task": "title", "product": "p2"}]),
        "templates": [chat.prompt_template.to_dict(), session.prompt_template.to_dict()],
        "session": session.encode_sessions(whole),
        "next": session.encode_prompts([whole[0] | {"products": ["p4", "p1"]}]),
    }
    assert found["session"]["num_truncated"] == [1] and found["next"]["num_truncated"] == [1]
