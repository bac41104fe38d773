"""From purchases to token ids: prompts, answers and batches."""

import torch


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


class SIDDataCollator:
    r"""
    Batches tokenized purchases: prompt and answer in one row, padded on the left, so that all answers end together.

    `labels` cover only the last columns, the longest answer and one column before it: pass their width to the model as
    `logits_to_keep`, and logits are computed where there are labels and nowhere else.

    Args:
        tokenizer ([`SIDTokenizer`]):
            For its padding token.
        pad_to_multiple_of (`int`, *optional*):
            Rounds the width up.

    Returns, when called with a list of rows of [`tokenize_examples`]:
        `dict[str, torch.Tensor]`: `input_ids`, `attention_mask`, `position_ids` of shape (B, T), `labels` of shape
        (B, A + 1) where A is the longest answer, and `product_rows` of shape (B,) if the rows have them.
    """

    def __init__(self, tokenizer, pad_to_multiple_of=None):
        self.tokenizer = tokenizer
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, features):
        if not features:
            raise ValueError("The batch is empty: there is nothing to pad.")
        missing = {"input_ids", "label_ids"} - set(features[0])
        if missing:
            raise ValueError(
                f"Rows lack {sorted(missing)}, found {sorted(features[0])}. Map the dataset with tokenize_examples, or "
                "pass raw purchases to SIDTrainer, which does."
            )
        rows = [list(feature["input_ids"]) + list(feature["label_ids"]) for feature in features]
        answer_lengths = torch.tensor([len(feature["label_ids"]) for feature in features])
        width = max(len(row) for row in rows)
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        pad = self.tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        columns = torch.arange(width)
        attention_mask = (columns >= width - lengths[:, None]).long()

        num_kept = int(answer_lengths.max()) + 1
        labels = input_ids[:, -num_kept:].clone()
        labels[torch.arange(num_kept) < num_kept - answer_lengths[:, None]] = -100
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(1) - 1).clamp_min(0),
            "labels": labels,
        }
        if "product_rows" in features[0]:
            batch["product_rows"] = torch.tensor([feature["product_rows"] for feature in features])
        return batch


def split_prompts(input_ids, attention_mask, labels):
    """
    Takes the answers off a batch of [`SIDDataCollator`].

    Args:
        input_ids, attention_mask (`torch.Tensor`): Shape: (B, T).
        labels (`torch.Tensor`): Shape: (B, A + 1).

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the prompts and their attention mask, padded on the left. Shape: (B, P).
    """
    answer_lengths = (labels != -100).sum(1, keepdim=True)
    source = torch.arange(input_ids.shape[1], device=input_ids.device) - answer_lengths
    mask = attention_mask.gather(1, source.clamp_min(0)) * (source >= 0)
    prompts = input_ids.gather(1, source.clamp_min(0))
    start = int(mask.any(0).float().argmax())
    return prompts[:, start:], mask[:, start:]
