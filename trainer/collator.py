"""From tokenized purchases to batches: prompts and answers in rows, padded or packed, and what is to be predicted where."""

import torch

IGNORED = -100


class SIDDataCollator:
    r"""
    Batches tokenized purchases: prompt and answer in one row, padded on the left, so that all answers end together.

    `labels` are not shifted: they say what follows each of the columns for which logits are wanted. For rows with one answer
    these are the last columns, as many as the longest answer has tokens. A session has answers at several places: then
    `logits_to_keep` holds the columns. Either is what a model's forward takes as `logits_to_keep`, so that logits are computed
    where there are labels and nowhere else.

    Args:
        tokenizer ([`SIDTokenizer`]):
            For its padding token.
        pad_to_multiple_of (`int`, *optional*):
            Rounds the width up.
        packing (`bool`, *optional*, defaults to `False`):
            Whether to lay all rows behind each other in one, without padding. Positions start anew with each of them, by
            which transformers keeps their attention apart (without attention mask and cache).

    Returns, when called with a list of rows of [`tokenize_examples`]:
        `dict[str, torch.Tensor]`: `input_ids`, `position_ids` of shape (B, T), `attention_mask` of shape (B, T) unless packed,
        `labels` of shape (B, A), `logits_to_keep` of shape (A,) where labels are not those of the last columns, and
        `product_rows` of shape (B,) if each row has one. B is 1 if packed.

    Raises:
        `ValueError`: if the batch is empty or rows lack columns.
    """

    def __init__(self, tokenizer, pad_to_multiple_of=None, packing=False):
        if packing and pad_to_multiple_of:
            raise ValueError(
                f"pad_to_multiple_of={pad_to_multiple_of} pads rows, which packing=True does without. Pass one of them."
            )
        self.tokenizer = tokenizer
        self.pad_to_multiple_of = pad_to_multiple_of
        self.packing = packing

    def __call__(self, features):
        if not features:
            raise ValueError("The batch is empty: there is nothing to pad.")
        missing = {"input_ids", "label_ids"} - set(features[0])
        if missing:
            raise ValueError(
                f"Rows lack {sorted(missing)}, found {sorted(features[0])}. Map the dataset with tokenize_examples, or "
                "pass raw purchases to SIDTrainer, which does."
            )
        rows = [_row(feature) for feature in features]
        batch = self._pack(rows) if self.packing else self._pad(rows)
        products = [feature.get("product_rows") for feature in features]
        if not any(product is None or isinstance(product, list) for product in products):
            batch["product_rows"] = torch.tensor(products)
        return batch

    def _pad(self, rows):
        width = max(len(tokens) for tokens, _, _ in rows)
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        pad = self.tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (width - len(tokens)) + tokens for tokens, _, _ in rows])
        lengths = torch.tensor([len(tokens) for tokens, _, _ in rows])
        attention_mask = (torch.arange(width) >= width - lengths[:, None]).long()

        targets = torch.full((len(rows), width), IGNORED)
        for row, (tokens, positions, label_ids) in enumerate(rows):
            targets[row, positions + (width - len(tokens))] = label_ids
        columns = (targets != IGNORED).any(0).nonzero()[:, 0]
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(1) - 1).clamp_min(0),
            "labels": targets[:, columns],
        }
        if columns[0] != width - len(columns):
            batch["logits_to_keep"] = columns
        return batch

    def _pack(self, rows):
        starts = torch.tensor([0, *(len(tokens) for tokens, _, _ in rows)]).cumsum(0).tolist()
        return {
            "input_ids": torch.tensor([[token for tokens, _, _ in rows for token in tokens]]),
            "position_ids": torch.cat([torch.arange(len(tokens)) for tokens, _, _ in rows])[None],
            "labels": torch.cat([label_ids for _, _, label_ids in rows])[None],
            "logits_to_keep": torch.cat([row[1] + start for row, start in zip(rows, starts, strict=False)]),
        }


def _row(feature):
    """Tokens (`list[int]`), places whose next token is to be predicted (A,), and what it is (A,), of one purchase or session."""
    tokens, label_ids = list(feature["input_ids"]), torch.tensor(list(feature["label_ids"]))
    if feature.get("label_positions") is not None:
        return tokens, torch.tensor(list(feature["label_positions"])), label_ids
    # The end token is predicted, and nothing behind it: it need not be read.
    return tokens + label_ids[:-1].tolist(), torch.arange(len(label_ids)) + len(tokens) - 1, label_ids


def split_prompts(input_ids, attention_mask, labels):
    """
    Takes the answers off a batch of [`SIDDataCollator`] whose rows have one answer each.

    Args:
        input_ids, attention_mask (`torch.Tensor`): Shape: (B, T).
        labels (`torch.Tensor`): Shape: (B, A).

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the prompts and their attention mask, padded on the left. Shape: (B, P).
    """
    answer_lengths = (labels != IGNORED).sum(1, keepdim=True) - 1
    source = torch.arange(input_ids.shape[1], device=input_ids.device) - answer_lengths
    mask = attention_mask.gather(1, source.clamp_min(0)) * (source >= 0)
    prompts = input_ids.gather(1, source.clamp_min(0))
    start = int(mask.any(0).float().argmax())
    return prompts[:, start:], mask[:, start:]
