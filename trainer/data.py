"""From purchases to token ids: prompts and answers."""

from ..sid_tokenizer.prompt_encoding import product_titles


def tokenize_examples(examples, tokenizer, max_prompt_length=None):
    """
    Turns a batch of purchases into token ids; made for `datasets.Dataset.map(batched=True)`.

    Args:
        examples (`dict[str, list]`):
            Columns: the prompt template's fields, and `product`, the id of the product bought. With a column `task`, which
            [`mix_tasks`] makes, each row is of one of the tasks of a [`PromptTemplate`]; a row that is to be answered with a
            product's title (`"describe"`) has the product's id in `product`, too. If the template has `layout="session"`, a
            row without `product` is a whole session: `products` (ids, the oldest first), and `queries`, if any.
        tokenizer ([`SIDTokenizer`]):
            Builds prompts and answers.
        max_prompt_length (`int`, *optional*):
            As `max_length` of [`~SIDTokenizer.encode_prompts`]. A title that is the answer is cut to what the prompt leaves of
            it.

    Returns:
        `dict[str, list]`: `input_ids` (the prompt), `label_ids` (the SID and the end token), `product_rows` (the product
        in the catalog), and `num_truncated` (products left out of the history). Where the answer is a title, `label_ids` are its
        tokens and the end token, and `product_rows` is -1.

        Of sessions: `input_ids`, `label_positions`, `label_ids`, `product_rows` (a list per row) and `num_truncated` of
        [`~SIDTokenizer.encode_sessions`]. Rows of other tasks beside them get the same form: prompt and answer in `input_ids`.

    Raises:
        `ValueError`: if a column is missing, or the examples cannot be prompts.
    """
    template = tokenizer.prompt_template
    has_tasks = "task" in examples and "task" not in template.fields
    if template.layout == "session" and (has_tasks or "product" not in examples):
        return _tokenize_sessions(examples, tokenizer, max_prompt_length, has_tasks)
    if "product" not in examples:
        sessions = (
            ' Sessions ("products") are for a tokenizer with prompt_template=PromptTemplate(layout="session", ...).'
            if "products" in examples
            else ""
        )
        raise ValueError(
            f'The dataset needs a column "product" with the id of the product bought; found {sorted(examples)}.{sessions}'
        )
    fields = [name for name in template.example_keys() if name in examples]
    if not fields and not has_tasks:
        raise ValueError(
            f"The dataset has none of the prompt's fields {template.example_keys()}; found {sorted(examples)}."
        )
    names = [*fields, *_task_columns(examples, has_tasks, fields)]
    return _tokenize_rows(_rows_of(examples, names), list(examples["product"]), tokenizer, max_prompt_length)


def _tokenize_sessions(examples, tokenizer, max_prompt_length, has_tasks):
    """Sessions, and rows of other tasks among them in the same form."""
    template = tokenizer.prompt_template
    if "products" not in examples and not (has_tasks and "product" in examples):
        raise ValueError(
            'The prompt template has layout="session": the dataset needs a column "products" with the ids of the products bought '
            f'in each session, the oldest first, and "queries" with a query for each, if there are queries; or "product" with '
            f"the next one. Found {sorted(examples)}."
        )
    fields = [name for name in template.example_keys() if name in examples]
    rows = _rows_of(examples, [*fields, *_task_columns(examples, has_tasks, fields)])
    is_session = [template.task_of(row) == "purchase" for row in rows]
    sessions = tokenizer.encode_sessions(
        [row for row, whole in zip(rows, is_session, strict=True) if whole], max_length=max_prompt_length
    )
    others = [at for at, whole in enumerate(is_session) if not whole]
    products = [examples["product"][at] for at in others] if others else []
    items = _tokenize_rows([rows[at] for at in others], products, tokenizer, max_prompt_length)
    items["label_positions"] = []
    for prompt, answer in zip(items["input_ids"], items["label_ids"], strict=True):
        items["label_positions"].append(list(range(len(prompt) - 1, len(prompt) - 1 + len(answer))))
        prompt += answer[:-1]  # nothing is predicted from the end token
    items["product_rows"] = [[row] for row in items["product_rows"]]
    columns = {}
    for name in sessions:
        session, item = iter(sessions[name]), iter(items[name])
        columns[name] = [next(session) if whole else next(item) for whole in is_session]
    return columns


def _tokenize_rows(rows, products, tokenizer, max_prompt_length):
    """Prompts of any task and their answers."""
    template, end = tokenizer.prompt_template, tokenizer.eos_token_id
    max_length = template.max_length if max_prompt_length is None else max_prompt_length
    prompts = tokenizer.encode_prompts(rows, max_length=max_prompt_length)
    label_ids = [sid + [end] for sid in tokenizer.encode_products(products)]
    product_rows = tokenizer.catalog.product_rows(products).tolist()

    described = [at for at, row in enumerate(rows) if template.task_of(row) == "describe"]
    titles = product_titles(tokenizer.catalog, [products[at] for at in described]) if described else []
    for at, title, tokens in zip(described, titles, tokenizer.encode_text(titles), strict=True):
        room = len(tokens) if max_length is None else max_length - len(prompts["input_ids"][at])
        if not title or room < 1:
            why = "has no title in the catalog" if not title else f"has a prompt as long as max_length={max_length}"
            raise ValueError(f"Product {products[at]!r}, whose title is the answer, {why}. Leave it out.")
        label_ids[at], product_rows[at] = tokens[:room] + [end], -1
    return {
        "input_ids": prompts["input_ids"],
        "label_ids": label_ids,
        "product_rows": product_rows,
        "num_truncated": prompts["num_truncated"],
    }


def _task_columns(examples, has_tasks, fields):
    """Columns that only rows with a task read; one that the template has as a field is that field."""
    return [name for name in ("task", "title", "product") if has_tasks and name in examples and name not in fields]


def _rows_of(examples, names):
    return [dict(zip(names, values, strict=True)) for values in zip(*(examples[name] for name in names), strict=True)]
