"""From purchases, sessions and titles to token ids."""

import pytest
from datasets import Dataset

from rqsid import ProductCatalog, PromptTemplate, SIDTokenizer
from rqsid.trainer import tokenize_examples

both_families = pytest.mark.parametrize("base_tokenizer", ["llama", "qwen"], indirect=True)
one_family = pytest.mark.parametrize("base_tokenizer", ["qwen"], indirect=True)


def columns_of(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


@both_families
def test_tokenize_examples_is_prompt_answer_and_end(tokenizer, make_purchases):
    rows = make_purchases(12)
    out = tokenize_examples(columns_of(rows), tokenizer)
    assert out["input_ids"] == tokenizer.encode_prompts(rows)["input_ids"]
    for row, label_ids, product_row in zip(rows, out["label_ids"], out["product_rows"], strict=True):
        assert label_ids == tokenizer.encode_products(row["product"]) + [tokenizer.eos_token_id]
        assert tokenizer.catalog.product_ids([product_row]) == [row["product"]]
    assert len({len(ids) for ids in out["label_ids"]}) > 1, "the catalog should give answers of different lengths"
    assert out["num_truncated"] == [0] * len(rows)
    assert set(map(type, out["product_rows"])) == {int}


@one_family
def test_tokenize_examples_truncates_old_history_and_counts(tokenizer, make_purchases):
    row = make_purchases(1)[0] | {"history": ["p3", "p4", "p5"]}
    bare = tokenizer.encode_prompts([row | {"history": ["p5"]}])["input_ids"][0]
    out = tokenize_examples(columns_of([row]), tokenizer, max_prompt_length=len(bare))
    assert out["input_ids"] == [bare]
    assert out["num_truncated"] == [2]


@one_family
def test_tokenize_examples_takes_any_subset_of_the_fields_and_ignores_other_columns(tokenizer):
    out = tokenize_examples({"query": ["milk"], "product": ["p2"], "price": [3.5]}, tokenizer)
    assert out["input_ids"] == tokenizer.encode_prompts([{"query": "milk"}])["input_ids"]


@one_family
def test_tokenize_examples_of_an_empty_batch(tokenizer):
    out = tokenize_examples({"query": [], "product": []}, tokenizer)
    assert out == {"input_ids": [], "label_ids": [], "product_rows": [], "num_truncated": []}


@one_family
@pytest.mark.parametrize(
    "examples, message",
    [
        ({"query": ["milk"], "item": ["p2"]}, r'column "product".*\[\'item\', \'query\'\]'),
        ({"question": ["milk"], "product": ["p2"]}, r"none of the prompt's fields.*\['product', 'question'\]"),
        ({"query": ["milk"], "product": ["p999"]}, "not in the catalog.*p999"),
        ({"query": ["milk"], "history": [["p999"]], "product": ["p2"]}, "not in the catalog.*p999"),
        ({"query": ["milk", ""], "product": ["p2", "p3"]}, "no value for any of the fields"),
    ],
)
def test_tokenize_examples_names_what_is_wrong(tokenizer, examples, message):
    with pytest.raises(ValueError, match=message):
        tokenize_examples(examples, tokenizer)


@pytest.fixture
def with_template(tokenizer, base_tokenizer):
    """`with_template(**options)`: a tokenizer on the same codes, with titles, and another template."""

    def make(**options):
        catalog, titles = tokenizer.catalog, [f"title of {row}" for row in range(39)] + [""]
        ids = [f"p{row}" for row in range(40)]
        catalog = ProductCatalog.build(ids, catalog.codes, catalog.codebook_sizes, catalog.pruning, texts=titles)
        return SIDTokenizer.from_base(base_tokenizer, catalog, prompt_template=PromptTemplate(**options))

    return make


@one_family
def test_tokenize_examples_of_all_tasks(with_template):
    tokenizer = with_template()
    tasks = ["purchase", "history", "query", "title", "describe", None]
    row = {"profile": "x", "history": ["p3", "p4"], "query": "milk", "product": "p7"}
    rows = [row | {"task": task} for task in tasks]
    out = tokenize_examples(columns_of(rows), tokenizer)
    assert out["input_ids"] == tokenizer.encode_prompts(rows)["input_ids"]
    assert len(set(map(tuple, out["input_ids"]))) == 5 and out["input_ids"][0] == out["input_ids"][5]
    sid, end = tokenizer.encode_products("p7"), tokenizer.eos_token_id
    title = tokenizer.encode_text("title of 7")
    assert out["label_ids"] == [sid + [end]] * 4 + [title + [end], sid + [end]]
    assert out["product_rows"] == [7, 7, 7, 7, -1, 7]
    # The title of the answer is cut to what the prompt leaves of the length.
    prompt = out["input_ids"][4]
    for room in (1, 2, len(title), len(title) + 1):
        cut = tokenize_examples(columns_of(rows[4:5]), tokenizer, max_prompt_length=len(prompt) + room)
        assert cut["input_ids"] == [prompt] and cut["label_ids"] == [title[:room] + [end]]
    with pytest.raises(ValueError, match="'p7', whose title is the answer, has a prompt as long as max_length"):
        tokenize_examples(columns_of(rows[4:5]), tokenizer, max_prompt_length=len(prompt))
    with pytest.raises(ValueError, match="'p39', whose title is the answer, has no title in the catalog"):
        tokenize_examples({"task": ["describe"], "product": ["p39"]}, tokenizer)
    with pytest.raises(ValueError, match="task='sing' is unknown"):
        tokenize_examples({"task": ["sing"], "product": ["p3"]}, tokenizer)


@one_family
def test_tokenize_examples_of_sessions(with_template):
    tokenizer = with_template(layout="session")
    sessions = [
        {"profile": "x", "queries": ["milk", ""], "products": ["p3", "p4"]},
        {"profile": None, "queries": ["tea"], "products": ["p0"]},
    ]
    out = tokenize_examples(columns_of(sessions), tokenizer)
    assert out == tokenizer.encode_sessions(sessions)
    assert out["product_rows"] == [[3, 4], [0]] and out["num_truncated"] == [0, 0]
    limit = len(out["input_ids"][1])
    cut = tokenize_examples(columns_of(sessions), tokenizer, max_prompt_length=limit)
    assert cut == tokenizer.encode_sessions(sessions, max_length=limit) and cut["num_truncated"] == [1, 0]

    # The next purchase of a session so far is a row with one answer.
    row = {"profile": "x", "queries": ["milk", "tea"], "products": ["p3"], "product": "p4"}
    one = tokenize_examples(columns_of([row]), tokenizer)
    assert one["input_ids"] == tokenizer.encode_prompts([row])["input_ids"] and one["product_rows"] == [4]
    assert one["label_ids"] == [tokenizer.encode_products("p4") + [tokenizer.eos_token_id]]

    with pytest.raises(ValueError, match=r'column "products".*Found \[\'profile\', \'queries\'\]'):
        tokenize_examples({"profile": ["x"], "queries": [["milk"]]}, tokenizer)


@one_family
def test_tokenize_examples_of_sessions_and_titles_together(with_template):
    """One form for all: what follows each of the label positions is predicted."""
    tokenizer = with_template(layout="session")
    rows = [
        {"task": "title", "product": "p5", "profile": None, "products": None},
        {"task": "purchase", "product": None, "profile": "x", "products": ["p3", "p4"]},
        {"task": "describe", "product": "p5", "profile": None, "products": None},
    ]
    out = tokenize_examples(columns_of(rows), tokenizer)
    (session,) = zip(*tokenizer.encode_sessions(rows[1:2]).values(), strict=True)
    assert tuple(out[name][1] for name in tokenizer.encode_sessions([])) == session
    prompts = tokenizer.encode_prompts([rows[0], rows[2]])["input_ids"]
    answers = tokenizer.encode_products("p5"), tokenizer.encode_text("title of 5")
    for row, prompt, answer, product in zip((0, 2), prompts, answers, (5, -1), strict=True):
        assert out["input_ids"][row] == prompt + answer
        assert out["label_positions"][row] == list(range(len(prompt) - 1, len(prompt) + len(answer)))
        assert out["label_ids"][row] == answer + [tokenizer.eos_token_id]
        assert out["product_rows"][row] == [product]
    with pytest.raises(ValueError, match="task='query': a prompt template of layout=\"session\""):
        tokenize_examples({"task": ["query"], "products": [["p1"]]}, tokenizer)


@pytest.mark.parametrize("base_tokenizer, make_tiny_model", [("llama", "llama")], indirect=True)
def test_rows_of_another_codebook_are_refused(tokenizer, model, make_trainer, make_purchases):
    """They look alike: token ids of the same vocabulary, which name other products."""
    rows = Dataset.from_list(make_purchases(6)).map(
        tokenize_examples, batched=True, fn_kwargs={"tokenizer": tokenizer}
    )
    rows = rows.select_columns(["input_ids", "label_ids", "product_rows"])
    make_trainer(model, rows)
    moved = [
        tokenizer.encode_products("p2") + [tokenizer.eos_token_id] if i == 3 else ids
        for i, ids in enumerate(rows["label_ids"])
    ]
    wrong = rows.remove_columns("label_ids").add_column("label_ids", moved)
    with pytest.raises(
        ValueError, match="Row 3 of the train dataset answers with other tokens than the SID of its product"
    ):
        make_trainer(model, wrong)
    with pytest.raises(ValueError, match="Row 0 of the train dataset answers with other tokens"):
        make_trainer(model, wrong.select([3, 0]).to_iterable_dataset(), max_steps=1)
