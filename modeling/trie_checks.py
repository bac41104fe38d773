"""What a trie is given, checked before it is used."""

import numpy as np
import torch


def check_sequences(sequences) -> None:
    """Checks a matrix of token ids, -1 behind the end of a SID."""
    if not isinstance(sequences, torch.Tensor):
        raise TypeError(f"`sequences` must be a tensor of token ids, got {type(sequences).__name__}.")
    if sequences.is_floating_point() or sequences.is_complex() or sequences.dtype == torch.bool:
        raise TypeError(f"`sequences` must hold integers, got {sequences.dtype}.")
    if sequences.dim() != 2 or sequences.numel() == 0:
        raise ValueError(
            f"`sequences` must have the shape (num_sids, depth) with at least one SID and one token, got "
            f"{tuple(sequences.shape)}. A trie without SIDs would forbid every token."
        )
    if sequences.min() < -1:
        raise ValueError(f"Token ids must be non-negative (-1 pads), got {int(sequences.min())}.")
    present = sequences >= 0
    misplaced = ~present[:, 0] | (present[:, 1:] & ~present[:, :-1]).any(dim=1)
    if misplaced.any():
        row = int(misplaced.int().argmax())
        raise ValueError(
            f"Row {row} of `sequences`, {sequences[row].tolist()}, starts with -1 or has a token after a -1. -1 may only "
            f"pad on the right: drop absent layers before stacking the rows."
        )


def check_sid_rows(sid_rows, num_sids: int | None = None) -> None:
    """Checks that `sid_rows` are distinct rows of a catalog, `num_sids` of them if given."""
    if not isinstance(sid_rows, torch.Tensor):
        raise TypeError(
            f"`sid_rows` must be a tensor of the catalog's SID rows, got {type(sid_rows).__name__}: `torch.tensor(rows)`."
        )
    if sid_rows.is_floating_point() or sid_rows.is_complex() or sid_rows.dtype == torch.bool:
        raise TypeError(
            f"`sid_rows` must hold integers, got {sid_rows.dtype}. Of a boolean mask take `mask.nonzero()[:, 0]`."
        )
    if sid_rows.dim() != 1 or len(sid_rows) == 0 or num_sids not in (None, len(sid_rows)):
        raise ValueError(
            f"`sid_rows` must have the shape ({'num_sids' if num_sids is None else num_sids},) with at least one row, got "
            f"{tuple(sid_rows.shape)}. A trie without SIDs would forbid every token."
        )
    if sid_rows.min() < 0:
        raise ValueError(f"`sid_rows` must be rows of the catalog, 0 or more, got {int(sid_rows.min())}.")
    ascending = sid_rows.sort().values
    repeated = ascending[1:][ascending[1:] == ascending[:-1]]
    if len(repeated):
        raise ValueError(
            f"`sid_rows` holds row {int(repeated[0])} more than once. A SID needs one row only, also if several products "
            f"share it: pass `torch.unique(sid_rows)`."
        )


def check_catalog_rows(trie, tokenizer, sid_rows: torch.Tensor) -> None:
    """
    Checks that SIDs found in a trie are the catalog's SIDs of the same rows.

    Args:
        trie ([`SIDTrie`]): The trie, with one root, that `sid_rows` were read from.
        tokenizer ([`SIDTokenizer`]): The tokenizer with the catalog.
        sid_rows (`torch.Tensor` of any shape): SID rows; -1 for none.

    Raises:
        `ValueError`: if the trie has another path for a row than the catalog, or the catalog has no such row.
    """
    rows = sid_rows[sid_rows >= 0].unique().cpu()
    wrong = rows >= tokenizer.catalog.num_sids
    if not wrong.any():
        paths = tokenizer.sid_sequences(rows.numpy()).to(trie.device)
        wrong = trie.sid_rows(trie.walk(paths)).cpu() != rows
    if wrong.any():
        raise ValueError(
            f"The trie's SID of row {int(rows[wrong][0])} is not the SID that the catalog has in this row, so that wrong "
            f"products would be returned. Build the trie of a subset with `SIDTrie.from_tokenizer(tokenizer, sid_rows)`, "
            f"from this tokenizer."
        )


def products_to_mask(catalog, products) -> np.ndarray:
    """
    A mask over a catalog's products, of product ids or of a mask.

    Args:
        catalog ([`ProductCatalog`]): The catalog.
        products (`list[str]`, or `np.ndarray` or `torch.Tensor` of bool of shape `(num_products,)`): The products.

    Returns:
        `np.ndarray` of bool of shape `(num_products,)`: A copy.

    Raises:
        `TypeError`: if `products` is neither.
        `ValueError`: if a product is unknown or the mask has another shape.
    """
    num_products = len(catalog.columns["product_sids"])
    products = products.detach().cpu().numpy() if isinstance(products, torch.Tensor) else products
    if isinstance(products, np.ndarray) and products.dtype == bool:
        if products.shape != (num_products,):
            raise ValueError(
                f"The mask over products has the shape {products.shape}, but the catalog had {num_products} products when "
                f"the trie was built: it must be ({num_products},). If products were appended since, take a trie of the "
                f"catalog as it is now: `SIDTrie.from_tokenizer(tokenizer)`."
            )
        return products.copy()
    if isinstance(products, np.ndarray) and products.dtype.kind not in "OUT":
        raise TypeError(
            f"`products` must be product ids or a mask of booleans over all products, got {products.dtype}. Of product "
            f"rows make a mask: `mask = np.zeros(len(catalog), dtype=bool); mask[rows] = True`."
        )
    if isinstance(products, str) or not hasattr(products, "__len__"):
        raise TypeError(
            f"`products` must be a list of product ids or a mask of booleans over all products, got "
            f"{type(products).__name__}."
        )
    products = list(products)
    wrong = [product for product in products if not isinstance(product, str)]
    if wrong:
        raise TypeError(
            f"`products` must be a list of product ids or a mask of booleans over all products, got a list with "
            f"{wrong[0]!r}. Make a list of booleans an array: `np.array(mask)`."
        )
    mask = np.zeros(num_products, dtype=bool)
    if products:
        mask[catalog.product_rows(products)] = True
    return mask
