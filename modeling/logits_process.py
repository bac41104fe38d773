"""The valid SIDs as a constraint for `generate()`: the compatible path beside `search`."""

import numpy as np
import torch
from transformers import LogitsProcessor
from transformers.utils import logging

from .trie import SIDTrie, check_catalog_rows

logger = logging.get_logger(__name__)


class SIDLogitsProcessor(LogitsProcessor):
    """
    Lets `generate()` produce valid SIDs only.

    The processor walks the trie anew for the tokens behind the prompt at every step. It keeps no state, so neither
    reordered beams nor a second `generate()` can confuse it. Scores of allowed tokens pass unchanged, all others become
    -inf: nothing is renormalised, so that `sequences_scores` are log-probabilities. On a complete SID the end token
    costs nothing (0) and is the only one allowed; the same holds for sequences that have ended and for beams that left
    the trie, which exist where there are more beams than valid SIDs (their `sequences_scores` are below -1e8).

    [`search`] is faster and exact. `generate()` keeps a finished SID only if it ranks among the `num_beams` best of its
    step, and so loses some short SIDs in catalogs of variable length.

    With `do_sample=True` each token is drawn from the softmax over those allowed, which is another distribution than the
    model's over whole SIDs: a SID with few siblings is drawn more often. `top_k` (50 unless set), `top_p` and
    `temperature` of `generate()` act behind the processor; `top_k=0` draws from all tokens that are allowed.

    Args:
        tokenizer ([`SIDTokenizer`]):
            The tokenizer the model was trained with.
        prompt_length (`int`):
            Number of columns of the `input_ids` given to `generate()`, padding included. SIDs within the prompt are
            never taken for generated ones. Less by n if the last n tokens of every prompt begin the SID.
        trie ([`SIDTrie`], *optional*, defaults to all SIDs of the tokenizer):
            The SIDs that are allowed, for instance those in stock: `trie.restrict(products)`. Its rows must be the
            catalog's, which [`SIDLogitsProcessor.sid_rows`] checks.
        in_place (`bool`, *optional*, defaults to `False`):
            Whether to overwrite the scores instead of returning new ones, which on the CPU takes most of the step's
            time at a large vocabulary. For beam search only: greedy decoding and sampling store the very tensor that
            they pass in as `output_logits`, which then would be the masked scores. The processor sees neither the
            decoding method nor whether logits are wanted, and so cannot warn.

    Raises:
        `TypeError`: if `in_place` is no bool.
        `ValueError`: if `prompt_length` is negative, larger than what `generate()` passes, or too small, so that no
            sequence begins with a SID behind it; if the scores have no column for a token of the trie; if `trie` is a
            stack of several.

    Example:

    ```python
    >>> processor = SIDLogitsProcessor(tokenizer, prompt_length=inputs["input_ids"].shape[1], in_place=True)
    >>> config = sid_generation_config(model, tokenizer, num_beams=50, num_return_sequences=10)
    >>> sequences = model.generate(**inputs, generation_config=config, logits_processor=[processor])
    >>> sid_rows = processor.sid_rows(sequences)
    >>> products = processor.decode_products(sequences)
    ```
    """

    def __init__(self, tokenizer, prompt_length: int, trie: SIDTrie | None = None, in_place: bool = False):
        if isinstance(prompt_length, bool) or not isinstance(prompt_length, int) or prompt_length < 0:
            raise ValueError(f"`prompt_length` must be an integer of at least 0, got {prompt_length!r}.")
        if not isinstance(in_place, bool):
            raise TypeError(f"`in_place` must be True or False, got {in_place!r}.")
        self.tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token_id
        self.prompt_length = prompt_length
        self.trie = SIDTrie.from_tokenizer(tokenizer) if trie is None else trie
        if self.trie.num_roots > 1:
            raise ValueError(
                f"`trie` is a stack of {self.trie.num_roots} tries, and the processor takes one for all prompts. "
                f"`search(..., trie=[...])` takes one for each."
            )
        self.in_place = in_place

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._check_length(input_ids)
        trie = self._current_trie(input_ids.device)
        if trie.max_token_id >= scores.shape[1]:
            raise ValueError(
                f"The trie holds token {trie.max_token_id} but the scores are for {scores.shape[1]} tokens only. Resize "
                f"the model's embeddings to the tokenizer first."
            )
        if len(input_ids) == 0:
            return scores
        generated = input_ids[:, self.prompt_length :]
        nodes = trie.walk(generated)
        # On CUDA the one point at which the host waits for the device; `generate()` does so at every step anyway.
        if generated.shape[1] and not ((nodes >= 0).any() | (generated == self.eos_token_id).any()):
            raise ValueError(
                f"Behind column `prompt_length` {self.prompt_length} none of the sequences begins with a SID: the prompt "
                f'reaches further. Build the processor with `prompt_length=inputs["input_ids"].shape[1]`.'
            )
        # What is not outside the trie is as deep as there are tokens. With a given width nothing is read back.
        level = generated.shape[1]
        tokens, _, is_child = trie.children(nodes, trie.level_widths[level] if level < trie.depth else 1)
        # The end token is nobody's child. Its column takes what is read where there is no child, and is written last.
        columns = torch.where(is_child, tokens, self.eos_token_id)
        allowed = scores.gather(1, columns)
        processed = scores if self.in_place else torch.empty_like(scores)
        processed.fill_(-torch.inf).scatter_(1, columns, allowed)
        # Of the nodes, only leaves and -1 (ended, or outside the trie) have no children.
        processed[:, self.eos_token_id] = torch.where(is_child.any(dim=1), -torch.inf, 0.0).to(scores.dtype)
        return processed

    def sid_rows(self, sequences: torch.LongTensor) -> torch.LongTensor:
        """
        Reads the SIDs out of what `generate()` returned.

        Everything from the first end token on is ignored, whatever the padding is: `generate()` fills with the end
        token when the padding token's id is 0.

        Args:
            sequences (`torch.LongTensor` of shape `(R, length)`): The prompts with what was generated.

        Returns:
            `torch.LongTensor` of shape `(R,)`: The row of each SID in the catalog, -1 where there is no valid one.

        Raises:
            `ValueError`: if `sequences` are shorter than the prompt, or the rows of the trie are not the catalog's.
        """
        self._check_length(sequences)
        generated = sequences[:, self.prompt_length :]
        has_ended = (generated == self.eos_token_id).cumsum(dim=1) > 0
        trie = self._current_trie(sequences.device)
        rows = trie.sid_rows(trie.walk(generated.masked_fill(has_ended, -1)))
        check_catalog_rows(trie, self.tokenizer, rows)
        return rows

    def decode_products(self, sequences: torch.LongTensor) -> list[list[str]]:
        """
        Reads the products out of what `generate()` returned.

        Unlike [`SIDTokenizer.decode_products`] it knows the filter: of the products that share a SID only those that
        the trie was restricted to come back. Sequences without a valid SID have none instead of raising an error.

        Args:
            sequences (`torch.LongTensor` of shape `(R, length)`): The prompts with what was generated.

        Returns:
            `list[list[str]]`: For each sequence the ids of its SID's products, most popular first.

        Raises:
            `ValueError`: as [`SIDLogitsProcessor.sid_rows`].
        """
        catalog, mask = self.tokenizer.catalog, self.trie.product_mask
        products = []
        for row in self.sid_rows(sequences).tolist():
            product_rows = catalog.products_of(row) if row >= 0 else np.empty(0, dtype=np.int64)
            if mask is not None:
                # A product that was appended after the trie had been restricted is in no filter.
                product_rows = product_rows[product_rows < len(mask)]
                product_rows = product_rows[mask[product_rows]]
            products.append(catalog.product_ids(product_rows))
        return products

    def _check_length(self, input_ids: torch.Tensor) -> None:
        if input_ids.shape[1] < self.prompt_length:
            raise ValueError(
                f"The sequences have {input_ids.shape[1]} tokens, fewer than `prompt_length` {self.prompt_length}. "
                f"Build the processor with the length of the padded `input_ids` given to `generate()`."
            )

    def _current_trie(self, device: torch.device) -> SIDTrie:
        if self.trie.catalog_version not in (None, self.tokenizer.catalog.version_id):
            logger.warning_once(
                "The trie was built before the catalog changed: SIDs of products appended since are not generated, and "
                "those whose products were all withdrawn since still are. Build a new processor, with a new trie."
            )
        return self.trie.to(device)
