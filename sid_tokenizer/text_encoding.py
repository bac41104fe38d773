"""Text as data: encoding in which nothing that a user types becomes a SID or a control token."""

import json

import numpy as np
from tokenizers import AddedToken, Tokenizer


class TextEncoder:
    r"""
    A copy of a tokenizer's backend that knows neither SID nor control tokens, so that no query can inject one.

    Removing the tokens is what it takes: `encode_special_tokens=True` leaves added tokens that are not special, as SIDs
    are, in force. Words that somebody added to a base tokenizer's vocabulary as plain text are kept if they consist of
    letters, digits and spaces, or of one character; any other added token, as `<|user|>` or another index's `<d_5>`,
    counts as a control token.

    Args:
        backend (`tokenizers.Tokenizer`):
            The full backend, with SID tokens.
        blocked_ids (`np.ndarray`): Shape: (n,).
            Token ids that text must never become: SID tokens and special tokens.
    """

    def __init__(self, backend, blocked_ids):
        state = json.loads(backend.to_str())
        added = state["added_tokens"]
        state["added_tokens"], state["post_processor"], state["truncation"], state["padding"] = [], None, None, None
        self.backend = Tokenizer.from_str(json.dumps(state))
        size = max([backend.get_vocab_size(with_added_tokens=True), *(token["id"] + 1 for token in added)])
        self.blocked = np.zeros(size, dtype=bool)
        self.blocked[blocked_ids] = True

        # A flag does not tell a word from markup: add_tokens("<|user|>") makes what add_tokens("word") makes. Special
        # tokens are the caller's to block, which lets the unknown token through.
        words = []
        for token in added:
            letters = "".join(token["content"].lstrip("▁Ġ").split())
            # Runs of spaces, which some models hold as added tokens, are text as well. So are single characters, which the
            # model would spell as themselves, and which would then be lost.
            if not letters or letters.isalnum() or (len(letters) == 1 and letters.isprintable()):
                if token["normalized"] and not token["special"] and not self.blocked[token["id"]]:
                    words.append(token)
            elif not token["special"]:
                self.blocked[token["id"]] = True
        self.backend.add_tokens(
            [AddedToken(**{key: value for key, value in token.items() if key != "id"}) for token in words]
        )
        self.word_ids = {self.backend.token_to_id(token["content"]): token["id"] for token in words}

    def encode_batch(self, texts):
        """
        Args:
            texts (`list[str]`):
                Any text.

        Returns:
            `list[list[int]]`: token ids, never a blocked one.

        Raises:
            `TypeError`: if a text is not a string.
            `ValueError`: if a text cannot be written as UTF-8 (a lone surrogate).
        """
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"Text must be a string, got {type(text).__name__}: {text!r}.")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"The text {text!r} cannot be written as UTF-8 ({error.reason}). Clean it, for instance with "
                    'text.encode("utf-8", "replace").decode().'
                ) from None
        encoded = [encoding.ids for encoding in self.backend.encode_batch(texts, add_special_tokens=False)]
        if self.word_ids:
            encoded = [[self.word_ids.get(token, token) for token in ids] for ids in encoded]
        # A model can hold control pieces in its own vocabulary (Unigram does) and so spell them from text.
        return [
            [token for token in ids if not self.blocked[token]] if self.blocked[ids].any() else ids for ids in encoded
        ]
