"""Text as data: encoding in which nothing that a user types becomes a SID or a control token."""

import json

import numpy as np
from tokenizers import AddedToken, Tokenizer

MAX_GAP = 2**20


class TextEncoder:
    r"""
    A copy of a tokenizer's backend that knows neither SID nor control tokens, so that no query can inject one.

    Nothing is escaped, and no text is changed or refused: `<a_1>` and `</s>` are encoded as the characters that they are, and
    decode to them again. This is done in three steps.

    1. All added tokens are taken out of the copy. `encode_special_tokens=True` would leave those that are not special, as SIDs
       are, in force. No spelling can bring back what is not there: neither spaces around a token, nor full-width letters
       (`＜a_1＞`) that a normaliser turns into plain ones, nor a token written in two fields, since each piece of a prompt is
       encoded on its own.
    2. Words go back in, see below.
    3. What comes out is looked through once more, for control pieces that the model's own vocabulary holds, as that of a
       Unigram model can: these are left out.

    In a prompt all that users and catalogs say comes this way: queries, keys and values of profiles, titles, and the labels of the
    template. SIDs come in as ids, found by product id, and the markup of a chat was rendered without them once and for all. Words that somebody added to a base tokenizer's vocabulary as plain text are kept if they consist of
    letters, digits and spaces, or of one character; any other added token, as `<|user|>` or another index's `<d_5>`,
    counts as a control token.

    Args:
        backend (`tokenizers.Tokenizer`):
            The full backend, with SID tokens.
        blocked_ids (`np.ndarray`): Shape: (n,).
            Token ids that text must never become: SID tokens and special tokens.

    Raises:
        `ValueError`: if ids lie far beyond the number of tokens, which would take memory for the gap.
    """

    def __init__(self, backend, blocked_ids):
        # Before it is written out, which goes through all ids up to the largest, whether they are tokens or not.
        vocabulary = backend.get_vocab(with_added_tokens=True)
        size = max([0, *vocabulary.values(), *backend.get_added_tokens_decoder()]) + 1
        if size > 2 * len(vocabulary) + MAX_GAP:
            raise ValueError(
                f"The tokenizer has {len(vocabulary)} tokens, but ids up to {size - 1}: it was edited. Save or download it again."
            )
        state = json.loads(backend.to_str())
        added = state["added_tokens"]
        state["added_tokens"], state["post_processor"], state["truncation"], state["padding"] = [], None, None, None
        self.backend = Tokenizer.from_str(json.dumps(state))
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
