"""How a code is spelled as a token."""

TOKEN_FORMAT = "<{letter}_{code}>"
SUFFIX_LETTER = "x"
LETTERS = "abcdefghijklmnopqrstuvwyz"


def layer_letter(layer):
    """`a`, `b`, `c`, … for layers 0, 1, 2, …, without `x`, which names suffixes; `a1`, `b1`, … from layer 25 on."""
    return LETTERS[layer % len(LETTERS)] + (str(layer // len(LETTERS)) if layer >= len(LETTERS) else "")


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
        `ValueError`: if the format does not tell layers or codes apart.
    """
    try:
        first = [token_format.format(letter=letter, code=code) for letter in "ab" for code in (0, 1)]
    except (AttributeError, KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"token_format={token_format!r} cannot be filled in ({error!r}); it takes the fields letter and code, as in "
            f"{TOKEN_FORMAT!r}."
        ) from None
    if len(set(first)) < 4:
        raise ValueError(
            f"token_format={token_format!r} gives the same token to different layers or codes; use both {{letter}} and "
            "{code}."
        )
    letters = [layer_letter(layer) for layer in range(len(codebook_sizes))] + [SUFFIX_LETTER]
    return [
        [token_format.format(letter=letter, code=code) for code in range(size)]
        for letter, size in zip(letters, [*codebook_sizes, suffix_size], strict=True)
    ]
