"""From purchases to token ids: prompts and answers."""


def tokenize_examples(examples, tokenizer, max_prompt_length=None):
    """
    Turns a batch of purchases into token ids; made for `datasets.Dataset.map(batched=True)`.

    Args:
        examples (`dict[str, list]`):
            Columns: the prompt template's fields, and `product`, the id of the product bought.
        tokenizer ([`SIDTokenizer`]):
            Builds prompts and answers.
        max_prompt_length (`int`, *optional*):
            As `max_length` of [`~SIDTokenizer.encode_prompts`].

    Returns:
        `dict[str, list]`: `input_ids` (the prompt), `label_ids` (the SID and the end token), `product_rows` (the product
        in the catalog), and `num_truncated` (products left out of the history).

    Raises:
        `ValueError`: if there is no column `product`, or the examples cannot be prompts.
    """
    if "product" not in examples:
        raise ValueError(
            f'The dataset needs a column "product" with the id of the product bought; found {sorted(examples)}.'
        )
    fields = [name for name in tokenizer.prompt_template.fields if name in examples]
    rows = [
        dict(zip(fields, values, strict=True)) for values in zip(*(examples[name] for name in fields), strict=True)
    ]
    if not fields:
        raise ValueError(
            f"The dataset has none of the prompt's fields {tokenizer.prompt_template.fields}; found {sorted(examples)}."
        )
    prompts = tokenizer.encode_prompts(rows, max_length=max_prompt_length)
    products = list(examples["product"])
    return {
        "input_ids": prompts["input_ids"],
        "label_ids": [sid + [tokenizer.eos_token_id] for sid in tokenizer.encode_products(products)],
        "product_rows": tokenizer.catalog.product_rows(products).tolist(),
        "num_truncated": prompts["num_truncated"],
    }
