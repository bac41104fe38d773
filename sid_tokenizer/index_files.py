"""The index.json of LC-Rec, LETTER and MiniOneRec: one object, from each item to the tokens of its SID."""

import json
import os
import re
import string
from itertools import chain

import numpy as np

from .files import replace_atomically
from .sid_tokens import TOKEN_FORMAT, check_token_format, layer_letter, layer_tokens
from .untrusted import shown

MAX_BYTES = 2 * 2**30
BATCH_PRODUCTS = 100_000
LARGEST_CODE = 2**20 - 1  # a slip of the pen beyond it would ask for millions of tokens


def read_index(path, token_format=None, codebook_sizes=None):
    """
    Reads an index such as `{"0": ["<a_183>", "<b_70>", "<c_232>"], "1": …}`, the form in which LC-Rec (arXiv 2311.09049),
    LETTER (arXiv 2405.07314) and MiniOneRec (arXiv 2510.24431) publish SIDs.

    All items have equally many tokens, first layer first. Layers are named as in this library, `a` to `w`, then `y`; the
    indexes of those projects have the same names up to 23 layers. One layer may be missing throughout, as in the index of
    a catalog with a layer dropped: its codes are -1, which [`diagnose`] takes, and which [`ProductCatalog.build`] refuses,
    since it cannot know them.

    Args:
        path (`str` or `os.PathLike`):
            The file, up to 2 GiB.
        token_format (`str`, *optional*, defaults to `"<{letter}_{code}>"`):
            Spelling of the tokens, with the fields `letter` and `code`.
        codebook_sizes (`list[int]`, *optional*):
            Codes of each layer. If not given, every layer has the largest code of all layers + 1: those projects give all
            layers the same size, but leave codes unused, so that a layer's own largest code says less. Pass the sizes
            where they differ, or where the last code occurs in no layer.

    Returns:
        `tuple[list[str], np.ndarray, list[int]]`: the N items in the order of the file; their codes, int32, shape (N, L);
        and the codebook sizes, L numbers.

    Raises:
        `ValueError`: if there is no such file, it is too large or no whole JSON object of lists of strings, names an item
            twice or none, or a list has another length than the others, a token of another spelling or layer than its
            place, or a code outside the sizes given; and for a format that does not tell layers or codes apart.
    """
    token_format = TOKEN_FORMAT if token_format is None else token_format
    check_token_format(token_format)

    # 1. the file
    name = os.path.basename(path)
    if not os.path.isfile(path):
        raise ValueError(f"There is no file {os.fspath(path)}. Check the path.")
    num_bytes = os.path.getsize(path)
    if num_bytes == 0:
        raise ValueError(f"{name} is empty. Write or download it again.")
    if num_bytes > MAX_BYTES:
        raise ValueError(
            f"{name} holds {num_bytes} bytes, more than the {MAX_BYTES} that are accepted. Pass so many products as a "
            "parquet file with a list column codes."
        )
    try:
        with open(path, encoding="utf-8-sig") as file:
            # Tuples tell an object from a list, and keep what a dict would drop: the repetitions of a key.
            content = json.load(file, object_pairs_hook=tuple)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"{name} is not valid JSON ({error}): it is truncated or was edited. Write or download it again."
        ) from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{name} holds a number where lists of tokens belong ({error}).") from None
    if not isinstance(content, tuple):
        raise ValueError(
            f"{name} holds a JSON {_json_type(content)}; it must be an object from items to lists of tokens, such as "
            '{"0": ["<a_183>", "<b_70>"]}.'
        )
    if not content:
        raise ValueError(f"{name} holds no item: its object is empty. Pass the index of at least one item.")

    # 2. a list of tokens for each item, all of one length
    product_ids = [item for item, _ in content]
    rows = [tokens for _, tokens in content]
    try:
        "".join(product_ids).encode()
    except UnicodeEncodeError:
        at = next(at for at, item in enumerate(product_ids) if any("\ud800" <= one <= "\udfff" for one in item))
        raise ValueError(
            f"Item {shown(product_ids[at])} of {name} is no text: it holds half a surrogate pair. Write the index again."
        ) from None
    if len(set(product_ids)) < len(product_ids):
        seen = set()
        repeated = next(item for item in product_ids if item in seen or seen.add(item))
        raise ValueError(
            f"{name} names {len(product_ids) - len(set(product_ids))} items more than once, for instance {shown(repeated)}. "
            "Keep one list of tokens for each item."
        )
    if set(map(type, rows)) != {list}:
        at = next(at for at, tokens in enumerate(rows) if type(tokens) is not list)
        raise ValueError(
            f"Item {shown(product_ids[at])} of {name} has a JSON {_json_type(rows[at])} for its SID; it must be a list of "
            'tokens, such as ["<a_183>", "<b_70>"].'
        )
    lengths = list(map(len, rows))
    num_tokens = lengths[0]
    if lengths.count(num_tokens) < len(rows) or num_tokens == 0:
        at = next((at for at, length in enumerate(lengths) if length != num_tokens), 0)
        raise ValueError(
            f"Item {shown(product_ids[at])} of {name} has {lengths[at]} tokens, item {shown(product_ids[0])} has {num_tokens}; all "
            "SIDs of an index have the same number of tokens, one per layer. Pass SIDs of varying length as the full codes "
            "and the TokenPruning that shortens them."
        )
    flat = list(chain.from_iterable(rows))
    if set(map(type, flat)) != {str}:
        at, token = next((at, token) for at, row in enumerate(rows) for token in row if type(token) is not str)
        raise ValueError(
            f"Item {shown(product_ids[at])} of {name} has a JSON {_json_type(token)} among its tokens; they must be strings, "
            'such as "<a_183>".'
        )

    # 3. codes, place by place: each distinct token is parsed once
    codes, layer = [], -1
    for place in range(num_tokens):
        column = flat[place::num_tokens]
        # What stands first decides whether the index leaves out a layer here; no pruning leaves out two.
        candidates = (layer + 1, layer + 2) if layer + 1 == place else (layer + 1,)
        layer = next((one for one in candidates if _parse(column[0], one, token_format) is not None), layer + 1)
        code_of = {token: _parse(token, layer, token_format) for token in set(column)}
        if None in code_of.values():
            at = next(at for at, token in enumerate(column) if code_of[token] is None)
            expected = token_format.format(letter=layer_letter(layer), code=0)
            raise ValueError(
                f"Item {shown(product_ids[at])} of {name} has the token {shown(column[at])} in place {place}, where a token such as "
                f"{expected!r} belongs: tokens stand in the order of the layers and are spelled {token_format!r}, code "
                f"0 to {LARGEST_CODE}. Pass another token_format, or put the tokens in order."
            )
        codes += [np.full(len(rows), -1, dtype=np.int32)] * (layer - len(codes))
        codes.append(np.fromiter(map(code_of.__getitem__, column), dtype=np.int32, count=len(rows)))
    codes = np.stack(codes, axis=1)

    # 4. codebooks
    if codebook_sizes is None:
        return product_ids, codes, [int(codes.max()) + 1] * codes.shape[1]
    codebook_sizes = [int(size) for size in codebook_sizes]
    if len(codebook_sizes) != codes.shape[1]:
        raise ValueError(
            f"codebook_sizes={codebook_sizes} has {len(codebook_sizes)} layers, {name} has {codes.shape[1]}. Pass one size "
            "for each layer of the index."
        )
    outside = codes >= np.array(codebook_sizes)
    if outside.any():
        at, layer = (int(index[0]) for index in np.nonzero(outside))
        raise ValueError(
            f"Item {shown(product_ids[at])} of {name} has the code {codes[at, layer]} in layer {layer}, outside its codebook of "
            f"{codebook_sizes[layer]} codes. Pass the sizes of the codebooks that this index was made with."
        )
    return product_ids, codes, codebook_sizes


def write_index(catalog, path, token_format=None):
    """
    Writes the SIDs of all products that are not withdrawn as an index for LC-Rec, LETTER or MiniOneRec, whole or not at all.

    The file is what `json.dump({product_id: tokens, …})` writes. With a layer dropped completely SIDs still have one length;
    the remaining tokens keep the letters that they have in the catalog (`<a_1>`, `<c_5>` without the second layer), so
    that they are the tokens of its tokenizer and its model.

    Args:
        catalog ([`ProductCatalog`]):
            Products and their SIDs, all of one length and without suffixes.
        path (`str` or `os.PathLike`):
            File name, by convention ending in `.index.json`.
        token_format (`str`, *optional*, defaults to `"<{letter}_{code}>"`):
            Spelling of the tokens, with the fields `letter` and `code`.

    Raises:
        `ValueError`: if SIDs have varying lengths or suffixes, which the format has no place for, or every product is
            withdrawn; and for a format that does not tell layers or codes apart.
    """
    token_format = TOKEN_FORMAT if token_format is None else token_format
    tokens = [
        np.array(layer, dtype=object)
        for layer in layer_tokens(catalog.codebook_sizes, catalog.suffix_size, token_format)
    ]
    rows = np.flatnonzero(~catalog.withdrawn)
    if len(rows) == 0:
        raise ValueError("Every product of the catalog is withdrawn, so that the index would hold none.")
    sid_rows = catalog.sid_rows(rows)
    is_present = np.asarray(catalog.sid_codes[np.unique(sid_rows)]) >= 0
    if is_present[:, -1].any() or (is_present != is_present[0]).any():
        lengths, counts = np.unique(is_present.sum(1), return_counts=True)
        found = ", ".join(
            f"{count} SIDs of {length} tokens" for length, count in zip(lengths.tolist(), counts.tolist(), strict=True)
        )
        suffixed = int(is_present[:, -1].sum())
        raise ValueError(
            f"The catalog has {found}, {suffixed} of them with a suffix; an index.json holds one token for each layer. "
            'Build the catalog without pruning, and with collisions="reassign" to keep SIDs distinct without suffixes; or '
            "write a parquet file, which holds SIDs of any length."
        )

    layers = np.flatnonzero(is_present[0])
    with replace_atomically(path) as temporary:
        with open(temporary, "w", encoding="utf-8") as file:
            for start in range(0, len(rows), BATCH_PRODUCTS):
                codes = catalog.sid_codes[sid_rows[start : start + BATCH_PRODUCTS]]
                spelled = np.stack([tokens[layer][codes[:, layer]] for layer in layers], axis=1).tolist()
                ids = catalog.product_ids(rows[start : start + BATCH_PRODUCTS])
                file.write("{" if start == 0 else ", ")
                file.write(json.dumps(dict(zip(ids, spelled, strict=True)))[1:-1])
            file.write("}")


def _parse(token, layer, token_format):
    """The code that the token stands for in a layer, or None if it is no token of that layer."""
    pattern, letter = "", layer_letter(layer)
    for literal, field, _, _ in string.Formatter().parse(token_format):
        pattern += re.escape(literal) + {"letter": re.escape(letter), "code": "([0-9]{1,7})"}.get(field, "")
    match = re.fullmatch(pattern, token)
    if match is None:
        return None
    code = int(match[1])
    # Spelled back, so that <a_07> does not pass for <a_7>.
    if code > LARGEST_CODE or token_format.format(letter=letter, code=code) != token:
        return None
    return code


def _json_type(value):
    if isinstance(value, tuple):
        return "object"
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names[type(value)]
