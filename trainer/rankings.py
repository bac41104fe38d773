"""Rankings as the `sid_retrieval` metric reads them, and which of its metrics there are."""

import re

import numpy as np


def rank_strings(product_rows, sid_rows, label_rows, tokenizer):
    """
    Turns rows of the catalog into the strings that the `sid_retrieval` metric compares.

    Args:
        product_rows, sid_rows (`np.ndarray`): Shape: (N, k). Ranked, -1 where a list ends.
        label_rows (`np.ndarray`): Shape: (N,). The product rows bought.
        tokenizer ([`SIDTokenizer`]):
            For its catalog.

    Returns:
        `dict[str, list]`: `predictions`, `references`, `sid_predictions` and `sid_references`.
    """
    catalog = tokenizer.catalog
    label_rows = np.asarray(label_rows)
    return {
        "predictions": _strings_of(product_rows, catalog.product_ids),
        "references": catalog.product_ids(label_rows),
        "sid_predictions": _strings_of(sid_rows, tokenizer.sid_strings),
        "sid_references": tokenizer.sid_strings(catalog.sid_rows(label_rows)),
    }


def _strings_of(rows, name):
    rows = np.asarray(rows)
    # Each distinct row is spelled once; the same products are ranked for many prompts.
    unique, inverse = np.unique(rows[rows >= 0], return_inverse=True)
    strings = np.array(name(unique), dtype=object)[inverse]
    return [list(part) for part in np.split(strings, np.cumsum((rows >= 0).sum(1))[:-1])]


def check_best_metric(args):
    """
    Trainer would look for the metric after the first evaluation, and before the first checkpoint is saved.

    Args:
        args ([`SIDTrainingArguments`])

    Raises:
        `ValueError`: if `metric_for_best_model` is one of the `sid_retrieval` metric's that is not computed.
    """
    name = (args.metric_for_best_model or "loss").removeprefix("eval_")
    found = re.fullmatch(r"(item_|sid_)?(recall|ndcg|mrr)(?:@(\d+))?", name)
    cutoffs = {"recall": recall_cutoffs(args), "ndcg": [min(10, args.eval_top_k)], "mrr": [None]}
    if found is None or (found[1] and (int(found[3]) if found[3] else None) in cutoffs[found[2]]):
        return
    known = [f"item_{kind}" + (f"@{k}" if k else "") for kind, ks in cutoffs.items() for k in ks]
    raise ValueError(
        f"metric_for_best_model={args.metric_for_best_model!r} is not computed with eval_top_k={args.eval_top_k}. There are "
        f"{', '.join(known)}, the same with sid_ in front, and loss."
    )


def recall_cutoffs(args):
    """
    Returns:
        `list[int]`: the k for which Recall@k is computed.
    """
    return [k for k in (1, 10, 50) if k <= args.eval_top_k]
