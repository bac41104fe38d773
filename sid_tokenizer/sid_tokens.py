"""How a code is spelled as a token."""

import re
import string

from .untrusted import shown

TOKEN_FORMAT = "<{letter}_{code}>"
SUFFIX_LETTER = "x"
LETTERS = "abcdefghijklmnopqrstuvwyz"


def layer_letter(layer):
    """`a`, `b`, `c`, … for layers 0, 1, 2, …, without `x`, which names suffixes; `a1`, `b1`, … from layer 25 on."""
    return LETTERS[layer % len(LETTERS)] + (str(layer // len(LETTERS)) if layer >= len(LETTERS) else "")


def check_token_format(token_format):
    """
    Args:
        token_format (`str`):
            Format of a token, of any origin.

    Raises:
        `ValueError`: if it is no text of at most 100 characters with the plain fields `letter` and `code`, codes filled with up to
            nine zeros (`{code:03}`) at most. Python's formats can do more: read attributes, and pad to any width.
    """
    advice = f"it takes the fields letter and code, as in {TOKEN_FORMAT!r}, or {{code:03}}"
    if not isinstance(token_format, str) or len(token_format) > 100:
        raise ValueError(f"token_format={shown(token_format)} is no format of a token; {advice}.")
    try:
        parts = list(string.Formatter().parse(token_format))
        token_format.encode()
    except ValueError as error:
        raise ValueError(f"token_format={token_format!r} cannot be filled in ({error!r}); {advice}.") from None
    for _, name, spec, conversion in parts:
        filled = name == "code" and re.fullmatch("0[1-9]d?", spec)
        if name is not None and (name not in ("letter", "code") or conversion or (spec and not filled)):
            field = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ValueError(
                f"token_format={token_format!r} cannot be filled in: {{{field}}} is no plain field; {advice}."
            )
    first = [token_format.format(letter=letter, code=code) for letter in "ab" for code in (0, 1)]
    if len(set(first)) < 4:
        raise ValueError(
            f"token_format={token_format!r} gives the same token to different layers or codes; use both {{letter}} and "
            "{code}."
        )


def layer_tokens(codebook_sizes, suffix_size=0, token_format=TOKEN_FORMAT):
    """
    Spells out all tokens of all layers, and of the suffix as one layer more.

    Args:
        codebook_sizes (`list[int]`):
            Codes of each layer.
        suffix_size (`int`, *optional*, defaults to 0):
            Number of suffix tokens.
        token_format (`str`, *optional*, defaults to `"<{letter}_{code}>"`):
            Format of a token, with the fields `letter` (`a`, `b`, …; `x` for suffixes), and `code`.

    Returns:
        `list[list[str]]`: L + 1 lists.

    Raises:
        `ValueError`: if the format does not tell layers or codes apart, or has other fields.
    """
    check_token_format(token_format)
    letters = [layer_letter(layer) for layer in range(len(codebook_sizes))] + [SUFFIX_LETTER]
    return [
        [token_format.format(letter=letter, code=code) for code in range(size)]
        for letter, size in zip(letters, [*codebook_sizes, suffix_size], strict=True)
    ]
