"""From examples to prompts as token ids: pieces of text, each encoded on its own, and SIDs between them."""

from itertools import islice

from .prompts import SID, Title, flatten_text

# Letters that no template changes, and that stand in none.
SENTINEL, SYSTEM_SENTINEL = "Qz7wjXk4vB", "Jq9bVxW3zK"


def encode_prompts(tokenizer, examples, max_length=None):
    """As [`SIDTokenizer.encode_prompts`], which documents it."""
    template = tokenizer.prompt_template
    _check_template(tokenizer)
    max_length = template.max_length if max_length is None else max_length
    tasks = [template.task_of(example) for example in examples]
    examples = _with_titles(tokenizer.catalog, examples, tasks)
    prefix = tokenizer.convert_tokens_to_ids(tokenizer.prompt_prefix)
    suffix = tokenizer.convert_tokens_to_ids(tokenizer.prompt_suffix)

    prompts, num_truncated = [], []
    for row, (head, units, tail) in enumerate(_encode(tokenizer, [template.pieces(example) for example in examples])):
        before, after = prefix + head, tail + suffix
        kept = len(units)
        if max_length is not None:
            room = max_length - len(before) - len(after)
            if template.layout == "purchase" and units and room < len(units[-1]):
                # Not even the latest product fits: the prompt of an empty history, which has no label for it.
                bare = template.pieces({**examples[row], "history": None})
                ((head, _, tail),) = _encode(tokenizer, [bare])
                before, after = prefix + head, tail + suffix
                room = min(0, max_length - len(before) - len(after))
            if room < 0 and tasks[row] == "title":
                before = _cut_title(tokenizer, prefix, head, room)
                room = max_length - len(before) - len(after)
            if room < 0:
                raise ValueError(
                    f"Prompt {row} takes {len(before) + len(after)} tokens without its history, more than "
                    f"max_length={max_length}. Raise max_length, or shorten the profile or the query."
                )
            kept = _num_fitting(units, room)
        num_truncated.append(len(units) - kept)
        prompts.append(before + [token for unit in units[len(units) - kept :] for token in unit] + after)
    return {"input_ids": prompts, "num_truncated": num_truncated}


def encode_sessions(tokenizer, examples, max_length=None):
    """As [`SIDTokenizer.encode_sessions`], which documents it."""
    template = tokenizer.prompt_template
    _check_template(tokenizer)
    if template.layout != "session":
        raise ValueError(
            f'The prompt template has layout={template.layout!r}. Sessions need one with layout="session": '
            'SIDTokenizer.from_base(..., prompt_template=PromptTemplate(layout="session")).'
        )
    max_length = template.max_length if max_length is None else max_length
    sessions = [template.split_session(example, is_prompt=False) for example in examples]
    for row, (_, _, products) in enumerate(sessions):
        if not products:
            raise ValueError(f"Session {row} has no products: there is nothing to learn from. Leave it out.")
    prefix = tokenizer.convert_tokens_to_ids(tokenizer.prompt_prefix)
    # Text and SID apart, since what a prompt ends with is the text before a SID.
    all_texts = iter(_encode_pieces(tokenizer, [piece for head, texts, _ in sessions for piece in (head, *texts)]))
    bought = [product for _, _, products in sessions for product in products]
    all_sids, all_rows = iter(tokenizer.encode_products(bought)), iter(tokenizer.catalog.product_rows(bought).tolist())

    names = ("input_ids", "label_positions", "label_ids", "product_rows", "num_truncated")
    out = {name: [] for name in names}
    for row, (_, _, products) in enumerate(sessions):
        count = len(products)
        head = prefix + next(all_texts)
        texts, sids, rows = (list(islice(column, count)) for column in (all_texts, all_sids, all_rows))
        units = [text + sid for text, sid in zip(texts, sids, strict=True)]
        start = 0
        if max_length is not None:
            # Cut as the prompt of the last purchase, which is the longest, is cut in serving.
            room = max_length - len(head) - len(texts[-1])
            if room < 0:
                raise ValueError(
                    f"Session {row} takes {max_length - room} tokens with its last purchase alone, more than "
                    f"max_length={max_length}. Raise max_length, or shorten the profile or the query."
                )
            start = count - 1 - _num_fitting(units[:-1], room)
        input_ids, positions, label_ids = list(head), [], []
        for text, sid in zip(texts[start:], sids[start:], strict=True):
            first = len(input_ids) + len(text) - 1
            positions += range(first, first + len(sid) + 1)
            label_ids += [*sid, tokenizer.eos_token_id]
            input_ids += text + sid
        values = (input_ids, positions, label_ids, rows[start:], start)
        for name, value in zip(names, values, strict=True):
            out[name].append(value)
    return out


def product_titles(catalog, product_ids):
    """
    Args:
        catalog ([`ProductCatalog`]):
            Products and their texts.
        product_ids (`list[str]`):
            Products.

    Returns:
        `list[str]`: their texts, each on one line, empty where the catalog has none.

    Raises:
        `ValueError`: if the catalog has no texts at all, or not all of the products.
    """
    check_titles(catalog)
    return [flatten_text("title", text) for text in catalog.texts(catalog.product_rows(product_ids))]


def check_titles(catalog):
    """
    Raises:
        `ValueError`: if the catalog has no texts.
    """
    if len(catalog.columns["text_offsets"]) == 1:
        raise ValueError(
            "The catalog has no texts, which are the titles of its products: build it with ProductCatalog.build(..., texts=...), "
            'or write products by their SIDs (history_format="sid").'
        )


def find_prompt_markup(base, template):
    """
    What stands around a prompt: a base tokenizer's begin token, or in a chat the markup of its template around a user's message.

    The chat template is rendered here and never again with what a user says in it, so that text cannot become markup.

    Args:
        base (`PreTrainedTokenizerFast`):
            The text tokenizer.
        template ([`PromptTemplate`]):
            How prompts are built.

    Returns:
        `tuple[list[str], list[str]]`: the tokens before and behind a prompt.

    Raises:
        `ValueError`: if there is no chat template, or it does not give a message back as it is.
    """
    # What surrounds a text is found by what surrounds the tokens of one.
    if not template.chat:
        whole, bare = base("a")["input_ids"], base("a", add_special_tokens=False)["input_ids"]
        start = _find(whole, bare)
        return base.convert_ids_to_tokens(whole[:start] if start is not None else []), []
    rendered = _render_chat(base, template.system)
    whole, bare = (base(text, add_special_tokens=False)["input_ids"] for text in (rendered, SENTINEL))
    if template.system is not None:
        _check_system(base, template.system, whole)
    start = _find(whole, bare)
    if start is not None:
        before, behind = whole[:start], whole[start + len(bare) :]
    else:  # the sentinel has grown together with its neighbours
        before, behind = (base(part, add_special_tokens=False)["input_ids"] for part in rendered.split(SENTINEL))
    return base.convert_ids_to_tokens(before), base.convert_ids_to_tokens(behind)


def _render_chat(base, system):
    if base.chat_template is None:
        raise ValueError(
            "chat=True needs a chat template, and the base tokenizer has none. Set base.chat_template, take a tokenizer of a "
            "chat model, or leave chat=False."
        )
    if system is not None:
        # The rendering is read with control tokens in force: what the system message says must not be one.
        markup = [token for token in {*base.all_special_tokens, *base.get_added_vocab()} if token in system]
        if any(not token.strip().isalnum() for token in markup):
            raise ValueError(f"system={system!r} holds the control token {sorted(markup)[0]!r}. Leave it out.")
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": SENTINEL})
    try:
        rendered = base.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program, which may raise anything
        raise ValueError(
            f"The chat template of the base tokenizer cannot render {'a system message and ' if system is not None else ''}a "
            f"user's message: {error}"
        ) from error
    if rendered.count(SENTINEL) != 1:
        raise ValueError(
            f"The chat template of the base tokenizer gives a user's message {rendered.count(SENTINEL)} times as it is "
            f"(rendered {rendered!r}), and must give it once. Use another chat template, or leave chat=False."
        )
    if system is not None and system.strip() not in rendered:
        raise ValueError(
            f"The chat template of the base tokenizer leaves out or changes the system message {system!r} (rendered "
            f"{rendered!r}). Leave system out."
        )
    return rendered


def _check_system(base, system, rendered_ids):
    """
    Raises:
        `ValueError`: if a system message is read as control tokens, though it holds none as it stands: full-width letters that a
            normaliser changes, for instance, or half a token that the chat template completes.
    """
    added = base.get_added_vocab()
    control = {token_id for token, token_id in added.items() if not token.strip().isalnum()} | {*base.all_special_ids}
    control.discard(base.unk_token_id)
    harmless = base(_render_chat(base, SYSTEM_SENTINEL), add_special_tokens=False)["input_ids"]
    found, expected = ([token for token in ids if token in control] for ids in (rendered_ids, harmless))
    if found != expected:
        tokens = base.convert_ids_to_tokens([token for token in found if token not in expected] or found)
        raise ValueError(
            f"system={system!r} is read as the control tokens {tokens[:5]} by the base tokenizer. Leave out what they are made of."
        )


def _find(whole, part):
    """Where a list stands in another, `None` if nowhere."""
    return next((at for at in range(len(whole)) if part and whole[at : at + len(part)] == part), None)


def _check_template(tokenizer):
    template = tokenizer.prompt_template
    chat, system = tokenizer.prompt_markup_of
    if (template.chat, template.system) != (chat, system):
        raise ValueError(
            f"The prompt template says chat={template.chat} and system={template.system!r}, but the tokens that this tokenizer "
            f"puts around prompts are those of chat={chat} and system={system!r}. Make a tokenizer with "
            "SIDTokenizer.from_base(..., prompt_template=...)."
        )


def _with_titles(catalog, examples, tasks):
    """The examples; to those of the task `"title"` that name a product only, its title from the catalog is added."""
    rows = [row for row, task in enumerate(tasks) if task == "title" and examples[row].get("title") is None]
    if not rows:
        return examples
    examples = list(examples)
    product_ids = [examples[row].get("product") for row in rows]
    if None in product_ids:
        row = rows[product_ids.index(None)]
        raise ValueError(f"Prompt {row} has neither title nor product, found {sorted(examples[row])}.")
    for row, product, title in zip(rows, product_ids, product_titles(catalog, product_ids), strict=True):
        if not title:
            raise ValueError(f"Prompt {row}: product {product!r} has no title in the catalog. Leave it out.")
        examples[row] = {**examples[row], "title": title}
    return examples


def _cut_title(tokenizer, prefix, head, room):
    """Prefix, label and as much of the title as fits; the whole where nothing of it does."""
    cut = head[: max(0, len(head) + room)]
    label = tokenizer.encode_text(tokenizer.prompt_template.label("title"))
    return prefix + (head if cut == label[: len(cut)] else cut)


def _num_fitting(units, room):
    """How many of the latest units take at most `room` tokens."""
    count = 0
    for unit in reversed(units):
        room -= len(unit)
        if room < 0:
            break
        count += 1
    return count


def _encode(tokenizer, prompts):
    """
    Args:
        prompts (`list[Pieces]`): What to encode.

    Returns:
        `list[tuple[list[int], list[list[int]], list[int]]]`: per prompt the tokens of head, of each unit, and of the tail.
    """
    prompts, pieces = _write_titles(tokenizer.catalog, prompts), []
    for head, units, tail in prompts:
        pieces += head
        for unit in units:
            if type(unit) is list:
                pieces += unit
            else:
                pieces.append(unit)
        pieces += tail
    encoded = iter(_encode_pieces(tokenizer, pieces))

    def tokens_of(group):
        if type(group) is not list:
            return next(encoded)
        return [token for _ in group for token in next(encoded)]

    return [(tokens_of(head), [tokens_of(unit) for unit in units], tokens_of(tail)) for head, units, tail in prompts]


def _write_titles(catalog, prompts):
    """The prompts with texts in the place of titles, which stand in units only, and SIDs where there is none."""
    named = [
        piece.product_id
        for prompt in prompts
        for unit in prompt.units
        for piece in (unit if type(unit) is list else (unit,))
        if type(piece) is Title
    ]
    if not named:
        return prompts
    titles = iter(product_titles(catalog, named))

    def written(unit):
        pieces = []
        for piece in unit if type(unit) is list else (unit,):
            if type(piece) is not Title:
                pieces.append(piece)
            elif title := next(titles):
                pieces.append(piece.lead + title)
            else:
                # A space before a SID would become a token of its own.
                pieces += [piece.lead.rstrip(" ")] + ([SID(piece.product_id)] if piece.or_sid else [])
        return pieces

    return [prompt._replace(units=[written(unit) for unit in prompt.units]) for prompt in prompts]


def _encode_pieces(tokenizer, pieces):
    """Token ids of each text and SID, which depend on nothing else: one batch of SIDs, and one of texts."""
    sids = iter(tokenizer.encode_products([piece for piece in pieces if type(piece) is SID]))
    # Labels, and titles of popular products, recur.
    unique = list(dict.fromkeys(piece for piece in pieces if type(piece) is not SID))
    texts = dict(zip(unique, tokenizer.encode_text(unique), strict=True))
    return [next(sids) if type(piece) is SID else texts[piece] for piece in pieces]
