"""A fast tokenizer that knows a catalog: products to SID tokens and back, prompts, and one bundle that holds it all."""

import copy
import hashlib
from collections.abc import Iterable, Mapping
from itertools import chain

import numpy as np
import torch
from tokenizers import AddedToken

from .bundle import (
    CATALOG_FILE,
    CODEBOOK_FILE,
    MANIFEST_FILE,
    PROMPT_FILE,
    check_layer_order,
    read_bundle,
)
from .codebook_version import check_quantizer
from .pretrained_tokenizer import PretrainedSIDTokenizer
from .prompt_encoding import check_titles, encode_prompts, encode_sessions, find_prompt_markup
from .prompts import PromptTemplate
from .sid_tokens import TOKEN_FORMAT, layer_tokens
from .text_encoding import TextEncoder


class SIDTokenizer(PretrainedSIDTokenizer):
    r"""
    A base text tokenizer with SID tokens, a [`ProductCatalog`], the quantizer's codebooks and a [`PromptTemplate`].

    Make one with [`SIDTokenizer.from_base`]; [`~SIDTokenizer.save_pretrained`] and `from_pretrained` keep everything
    together, beside a model if wanted.

    Attributes:
        catalog ([`ProductCatalog`]): products and their SIDs.
        quantizer ([`ResidualQuantizer`] or `None`): the codebooks; `None` for an imported index.
        prompt_template ([`PromptTemplate`]): how prompts are built.
        layer_order (`list[int]`): the layers in the order of a SID's tokens.

    Example:

    ```python
    tokenizer = SIDTokenizer.from_base(base_tokenizer, catalog, quantizer)
    token_ids = tokenizer.encode_products(["B0001", "B0002"])
    tokenizer.decode_products(token_ids)  # per SID the products that share it, best first
    tokenizer.encode_prompts([{"history": ["B0001"], "query": "potato chips"}])["input_ids"]
    ```
    """

    vocab_files_names = {
        "tokenizer_file": "tokenizer.json",
        "manifest_file": MANIFEST_FILE,
        "catalog_file": CATALOG_FILE,
        "codebook_file": CODEBOOK_FILE,
        "prompt_file": PROMPT_FILE,
    }
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(
        self,
        *args,
        manifest_file=None,
        catalog_file=None,
        codebook_file=None,
        prompt_file=None,
        sid_parts=None,
        **kwargs,
    ):
        if sid_parts is None:
            files = {
                "tokenizer.json": kwargs.get("tokenizer_file"),
                CATALOG_FILE: catalog_file,
                CODEBOOK_FILE: codebook_file,
                PROMPT_FILE: prompt_file,
            }
            sid_parts = read_bundle(manifest_file, files)
        super().__init__(*args, **kwargs)
        for name, saved in sid_parts["special_tokens"].items():
            if getattr(self, name) != saved:
                raise ValueError(
                    f"tokenizer_config.json gives {name}={getattr(self, name)!r}, {MANIFEST_FILE} {saved!r}: it is missing, "
                    "was edited, or belongs to another save. Save or download the bundle again."
                )
        self.catalog = sid_parts["catalog"]
        self.quantizer = sid_parts["quantizer"]
        self.prompt_template = sid_parts["prompt_template"]
        self.prompt_prefix, self.prompt_suffix = sid_parts["prompt_prefix"], sid_parts["prompt_suffix"]
        # What they were made for; a template put in its place later may ask for others.
        self.prompt_markup_of = self.prompt_template.chat, self.prompt_template.system
        self.token_format = sid_parts["token_format"]
        self.layer_order = sid_parts["layer_order"]
        self.base_size = sid_parts["base_size"]
        strangers = [
            token for token in self.prompt_prefix + self.prompt_suffix if self._tokenizer.token_to_id(token) is None
        ]
        if strangers:
            raise ValueError(
                f"{PROMPT_FILE} puts {strangers[0]!r} around prompts, which tokenizer.json does not hold: the files belong to "
                "different saves. Save or download the bundle again."
            )
        self._index_tokens()
        sids = set(self.sid_vocabulary().tolist())
        if sids & set(self.convert_tokens_to_ids(self.prompt_prefix + self.prompt_suffix)):
            raise ValueError(
                f"{PROMPT_FILE} puts SID tokens around prompts: it was edited. Save or download the bundle again."
            )

    @classmethod
    def from_base(
        cls,
        base,
        catalog,
        quantizer=None,
        layer_order=None,
        token_format=TOKEN_FORMAT,
        reuse_tokens=False,
        prompt_template=None,
    ):
        """
        Args:
            base (`PreTrainedTokenizerFast`):
                A text tokenizer with an end token. It is copied, not changed.
            catalog ([`ProductCatalog`]):
                Products and their SIDs.
            quantizer ([`ResidualQuantizer`], *optional*):
                The codebooks, stored with the tokenizer. None for an imported index. A catalog that was built without its
                quantizer notes the version of this one, and refuses others from then on.
            layer_order (`list[int]`, *optional*):
                Order of the layers in a SID's tokens, the quantizer's if not given.
            token_format (`str`, *optional*, defaults to `"<{letter}_{code}>"`):
                Spelling of SID tokens.
            reuse_tokens (`bool`, *optional*, defaults to `False`):
                Whether to adopt SID tokens that `base` already has; otherwise such a tokenizer is refused.
            prompt_template ([`PromptTemplate`], *optional*):
                How prompts are built; the default template if not given.

        Returns:
            [`SIDTokenizer`]

        Raises:
            `TypeError`: if `base` is no fast tokenizer.
            `ValueError`: if `base` has no end token or already holds SID tokens, the quantizer has other codebooks than
                the catalog, the order makes one SID the beginning of another, the ids of `base` have gaps, or the template
                asks for titles that the catalog lacks or for a chat template that `base` lacks.
        """
        if not hasattr(base, "backend_tokenizer"):
            raise TypeError(
                f"base is a {type(base).__name__}; a fast tokenizer (PreTrainedTokenizerFast) is needed. Load it with "
                "AutoTokenizer, or convert it first."
            )
        if base.eos_token_id is None:
            raise ValueError(
                'The base tokenizer has no end token, which ends a SID. Set one, e.g. base.eos_token = "</s>".'
            )
        if quantizer is not None and quantizer.codebook_sizes != catalog.codebook_sizes:
            raise ValueError(
                f"The quantizer has codebooks {quantizer.codebook_sizes}, the catalog {catalog.codebook_sizes}. Pass the "
                "quantizer that encoded this catalog."
            )
        if quantizer is not None and len(quantizer.codebooks) == 0:
            raise ValueError("The quantizer is not fitted. Call fit(embeddings) first, or leave it out.")
        if quantizer is not None:
            if not hasattr(quantizer, "prices"):
                raise ValueError(
                    f"A {type(quantizer).__name__} cannot be stored with a tokenizer, only a ResidualQuantizer. Save it in a "
                    "folder of its own, and leave quantizer out."
                )
            version = check_quantizer(quantizer, catalog.codebook_sizes, catalog.codebook_version)
            if catalog.codebook_version is None:
                catalog.codebook_version, catalog.file = version, None
        layer_order = check_layer_order(layer_order, catalog)

        last_id = max(base.get_vocab().values())
        if last_id >= len(base):
            raise ValueError(
                f"The base tokenizer has {len(base)} tokens, but ids up to {last_id}: there are gaps, in which new tokens would "
                "get ids that others have. Fill the gaps with placeholder tokens first."
            )
        backend = copy.deepcopy(base.backend_tokenizer)
        tokens = [
            token
            for layer in layer_tokens(catalog.codebook_sizes, catalog.suffix_size, token_format)
            for token in layer
        ]
        present = [token for token in tokens if backend.token_to_id(token) is not None]
        if present and not reuse_tokens:
            raise ValueError(
                f"The base tokenizer already holds {len(present)} of the SID tokens, for instance {present[0]!r}. Pass "
                "reuse_tokens=True to adopt them, or another token_format."
            )
        # Not special, so that decode(skip_special_tokens=True) keeps them; not normalized, so that the text's
        # normaliser cannot change their spelling.
        backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])

        template = prompt_template if prompt_template is not None else PromptTemplate()
        literals = [template.answer, template.separator, template.history_separator, *template.labels.values()]
        markup = [token for token in base.all_special_tokens if any(token in literal for literal in literals)]
        if markup:
            raise ValueError(
                f"The prompt template holds the control token {markup[0]!r}, which would be spelled out as text. Leave it "
                "out of labels, separator and answer."
            )
        if template.history_format != "sid":
            check_titles(catalog)
        prefix, suffix = find_prompt_markup(base, template)
        tokenizer = cls(
            tokenizer_object=backend,
            sid_parts={
                "catalog": catalog,
                "quantizer": quantizer,
                "prompt_template": template,
                "prompt_prefix": prefix,
                "prompt_suffix": suffix,
                "token_format": token_format,
                "layer_order": layer_order,
                "base_size": len(base),
                "special_tokens": {"eos_token": base.eos_token},
            },
            **base.special_tokens_map,
            extra_special_tokens=list(base.extra_special_tokens),
            model_max_length=base.model_max_length,
            chat_template=base.chat_template,
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def _index_tokens(self):
        """Arrays between codes and token ids, for whole batches at once."""
        layers = layer_tokens(self.catalog.codebook_sizes, self.catalog.suffix_size, self.token_format)
        ids = [[self._tokenizer.token_to_id(token) for token in tokens] for tokens in layers]
        if any(token_id is None for layer in ids for token_id in layer):
            raise ValueError(
                "tokenizer.json lacks some of the catalog's SID tokens: the files belong to different saves. Save or "
                "download the bundle again."
            )
        self._layer_token_ids = [np.array(layer, dtype=np.int64) for layer in ids]
        all_ids = np.concatenate(self._layer_token_ids)
        if len(np.unique(all_ids)) != len(all_ids):
            raise ValueError(
                f"token_format={self.token_format!r} gives the same token to different codes; use both {{letter}} and "
                "{code}, and a character between them."
            )
        size = len(self)
        if int(all_ids.max()) >= size:
            raise ValueError(
                f"tokenizer.json gives a SID token the id {int(all_ids.max())}, but has {size} tokens: there are gaps, or it was "
                "edited. Save or download the bundle again."
            )
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            token_id = getattr(self, f"{name}_id")
            if token_id is not None and token_id in all_ids:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is a SID token of token_format={self.token_format!r}. Choose another "
                    "token_format, or another token."
                )
        self._token_layer = np.full(size, -1, dtype=np.int64)
        self._token_code = np.full(size, -1, dtype=np.int64)
        for layer, ids in enumerate(self._layer_token_ids):
            self._token_layer[ids] = layer
            self._token_code[ids] = np.arange(len(ids))
        # What is made on first use. The name is one that datasets leaves out of a tokenizer's hash, which would otherwise
        # change with use, and with it the fingerprint of every `map`.
        self.cache = {}

    def __getstate__(self):
        return {**self.__dict__, "cache": {}}

    @property
    def max_sid_length(self):
        """Tokens of the longest SID, without the end token."""
        version, length = self.cache.get("max_sid_length", (None, None))
        if version != self.catalog.version_id:
            version, length = self.catalog.version_id, int(self.catalog.lengths().max())
            self.cache["max_sid_length"] = version, length
        return length

    @property
    def history(self):
        """What each version of the catalog changed, the first first."""
        return self.catalog.history

    def layer_token_ids(self):
        """
        Returns:
            `list[np.ndarray]`: per layer the token id of each code, and last those of the suffixes.
        """
        return self._layer_token_ids

    def new_token_ids(self):
        """
        Returns:
            `torch.LongTensor`: ids of the SID tokens that the base tokenizer did not have, ascending: those whose
            embedding rows a model has yet to learn.
        """
        vocabulary = self.sid_vocabulary()
        return vocabulary[vocabulary >= self.base_size]

    def codebook_fingerprint(self):
        """
        Returns:
            `str`: 16 hexadecimal digits that change with the codebooks, or with the ids of the SID tokens. A model's rows
            for SID tokens belong to one fingerprint.
        """
        if "fingerprint" not in self.cache:
            digest = hashlib.sha256(np.concatenate(self._layer_token_ids).tobytes())
            if self.quantizer is None:
                # Nothing but the products tells an imported index from another; those appended later are no part of this.
                digest.update(self.catalog.origin.encode())
            else:
                for codebook in self.quantizer.codebooks:
                    digest.update(codebook.detach().float().cpu().numpy().tobytes())
            self.cache["fingerprint"] = digest.hexdigest()[:16]
        return self.cache["fingerprint"]

    def sid_vocabulary(self):
        """
        Returns:
            `torch.LongTensor`: ids of all SID and suffix tokens, ascending.
        """
        return torch.from_numpy(np.sort(np.concatenate(self._layer_token_ids)))

    def sid_sequences(self, sid_rows=None):
        """
        Args:
            sid_rows (`np.ndarray`, *optional*): Shape: (n,).
                Rows of the catalog's SIDs; all if not given.

        Returns:
            `torch.LongTensor`: the token ids of each SID, -1 behind its end. Shape: (n, longest).
        """
        codes = self.catalog.sid_codes if sid_rows is None else self.catalog.sid_codes[sid_rows]
        tokens = np.full(codes.shape, -1, dtype=np.int64)
        for column, layer in enumerate([*self.layer_order, self.catalog.num_layers]):
            here = codes[:, layer] >= 0
            tokens[here, column] = self._layer_token_ids[layer][codes[here, layer]]
        tokens = np.take_along_axis(tokens, np.argsort(tokens < 0, axis=1, kind="stable"), axis=1)
        return torch.from_numpy(tokens[:, : self.max_sid_length].copy())

    def sid_strings(self, sid_rows):
        """
        Returns:
            `list[str]`: SIDs as their tokens, for instance `<a_17><b_203><c_5>`.
        """
        return ["".join(self.convert_ids_to_tokens(ids)) for ids in _ragged(self.sid_sequences(sid_rows))]

    def encode_products(self, product_ids):
        """
        Args:
            product_ids (`str` or `list[str]`):
                One product or several.

        Returns:
            `list[int]` or `list[list[int]]`: the token ids of each SID, of varying length, without an end token.

        Raises:
            `ValueError`: if a product is not in the catalog.
        """
        if isinstance(product_ids, str):
            return self.encode_products([product_ids])[0]
        if not isinstance(product_ids, Iterable):
            raise TypeError(f"Product ids must be strings, got {type(product_ids).__name__}: {product_ids!r}.")
        rows = self.catalog.product_rows(list(product_ids))
        return _ragged(self.sid_sequences(self.catalog.sid_rows(rows)))

    def decode_products(self, token_ids):
        """
        Args:
            token_ids (`list[int]`, `list[list[int]]` or `torch.Tensor`):
                The tokens of one SID or several; end and padding tokens behind a SID are ignored.

        Returns:
            `list[str]` or `list[list[str]]`: the products that share each SID, most popular first, without those withdrawn; none
            where there are only end and padding tokens, as [`sid_generate`] fills rows beyond the last SID. A filter is not known
            here: where one was used, read with [`SIDLogitsProcessor.decode_products`].

        Raises:
            `ValueError`: if the tokens are no SID of the catalog.
        """
        if isinstance(token_ids, str):
            raise TypeError(
                f"decode_products takes token ids, got text: {token_ids!r}. Call convert_tokens_to_ids first."
            )
        token_ids = token_ids.tolist() if isinstance(token_ids, torch.Tensor | np.ndarray) else list(token_ids)
        if not token_ids or np.ndim(token_ids[0]) == 0:
            return self.decode_products([token_ids])[0]
        sid_rows = self.find_sids(token_ids)
        for row, ids in zip(sid_rows, token_ids, strict=True):
            if row < 0 and not (len(ids) and {*ids} <= {self.eos_token_id, self.pad_token_id}):
                tokens = [self.convert_ids_to_tokens(int(i)) if 0 <= i < len(self) else int(i) for i in ids]
                raise ValueError(
                    f"{tokens} is no SID of the catalog. Generate with SIDLogitsProcessor or search(), which give no "
                    "others."
                )
        return [self.catalog.product_ids(self.catalog.products_of(row)) if row >= 0 else [] for row in sid_rows]

    def find_sids(self, token_ids):
        """
        Args:
            token_ids (`list[list[int]]`):
                Tokens of SIDs; end and padding tokens behind a SID are ignored.

        Returns:
            `np.ndarray` (int64): the SID row of each, -1 where the tokens are no SID of the catalog. Shape: (n,).
        """
        num_layers = self.catalog.num_layers
        position_of_layer = np.argsort([*self.layer_order, num_layers])
        # 1. a matrix of the leading tokens. The longest SID has num_layers + 1 of them and one more shows that a row is
        # longer, so that a row of any length costs no more.
        lengths = np.fromiter(map(len, token_ids), dtype=np.int64, count=len(token_ids))
        flat = np.fromiter(chain.from_iterable(token_ids), dtype=np.int64, count=int(lengths.sum()))
        columns = np.arange(num_layers + 2)
        inside = columns < lengths[:, None]
        ids = np.full(inside.shape, -1, dtype=np.int64)
        ids[inside] = flat[((np.cumsum(lengths) - lengths)[:, None] + columns)[inside]]

        # 2. what stands before the first end or padding token must be SID tokens in the order of the layers
        ends = ~inside | (ids == self.eos_token_id) | (ids == self.pad_token_id)
        before_end = np.cumsum(ends, axis=1) == 0
        in_range = (ids >= 0) & (ids < len(self._token_layer))
        layers = np.where(in_range, self._token_layer[np.where(in_range, ids, 0)], -1)
        is_ascending = np.diff(position_of_layer[layers], axis=1) > 0
        valid = ((layers >= 0) | ~before_end).all(1) & (is_ascending | ~before_end[:, 1:]).all(1)

        # 3. their codes, in the columns of their layers
        codes = np.full((len(ids), num_layers + 1), -1, dtype=np.int64)
        row, column = np.nonzero(before_end & valid[:, None])
        codes[row, layers[row, column]] = self._token_code[ids[row, column]]
        return np.where(valid, self.catalog.find_sids(codes), -1)

    def prefix_token_ids(self, prefix_codes):
        """
        Args:
            prefix_codes (`list[int]`):
                The leading codes of a SID in the order of its tokens; -1 where the layer is absent.

        Returns:
            `list[int]`: their token ids.

        Raises:
            `ValueError`: if there are more codes than layers, or one lies outside its codebook.
        """
        if len(prefix_codes) > self.catalog.num_layers:
            raise ValueError(f"{len(prefix_codes)} leading codes for SIDs of {self.catalog.num_layers} layers.")
        ids = []
        for layer, code in zip(self.layer_order, prefix_codes, strict=False):
            if not -1 <= code < self.catalog.codebook_sizes[layer]:
                raise ValueError(
                    f"Code {code} lies outside layer {layer}'s {self.catalog.codebook_sizes[layer]} codes."
                )
            if code >= 0:
                ids.append(int(self._layer_token_ids[layer][code]))
        return ids

    def encode_text(self, texts):
        """
        Encodes text as data: whatever it says, it becomes neither a SID nor a control token.

        Args:
            texts (`str` or `list[str]`):
                Any text, for instance a user's query.

        Returns:
            `list[int]` or `list[list[int]]`: token ids, without begin and end tokens.

        Raises:
            `TypeError`: if a text is not a string.
            `ValueError`: if a text cannot be written as UTF-8 (a lone surrogate).
        """
        if isinstance(texts, str):
            return self.encode_text([texts])[0]
        if "text_encoder" not in self.cache:
            added = self._tokenizer.get_added_tokens_decoder()
            special = [token_id for token_id, token in added.items() if token.special]
            blocked = {*self.sid_vocabulary().tolist(), *self.all_special_ids, *special}
            # Text may hold unknown characters, unless the unknown token has a second office.
            if self.unk_token_id not in (self.eos_token_id, self.bos_token_id):
                blocked.discard(self.unk_token_id)
            self.cache["text_encoder"] = TextEncoder(self._tokenizer, np.array(sorted(blocked)))
        return self.cache["text_encoder"].encode_batch(texts)

    def encode_prompts(self, examples, max_length=None):
        """
        Builds prompts: the one function that training and serving use.

        Args:
            examples (`list[dict]`):
                Values of the prompt template's fields, or what else a [`PromptTemplate`] takes: sessions, and other tasks.
            max_length (`int`, *optional*):
                Longest prompt in tokens, markup of a chat included; the template's `max_length` if not given. The oldest
                products of a history are left out first; text never is, but for the end of a title of the task `"title"`.

        Returns:
            `dict`: `input_ids` (`list[list[int]]`), and `num_truncated` (`list[int]`): how many products of each history
            were left out.

        Raises:
            `TypeError`, `ValueError`: if an example cannot be a prompt, a history names a product that is not in the
                catalog, or a prompt is too long even without its history.
        """
        if isinstance(examples, Mapping):
            raise TypeError("encode_prompts takes a list of examples; wrap a single one: [example].")
        return encode_prompts(self, examples, max_length)

    def encode_sessions(self, examples, max_length=None):
        """
        Builds sessions to train on, each with all of its purchases supervised at once. The template has `layout="session"`.

        The prompt that [`~SIDTokenizer.encode_prompts`] makes of a session cut before purchase i is `input_ids` up to and
        including the first label position of that purchase. Where nothing is left out, the loss at all label positions is that
        of one row per purchase, prompt, SID and end token.

        Args:
            examples (`list[dict]`):
                Text fields, `products` (`list[str]`, the oldest first), and as many `queries` (`list[str]`), if any.
            max_length (`int`, *optional*):
                Longest prompt of the last purchase in tokens, the template's `max_length` if not given. The oldest purchases are
                left out first; the fields before the query never are.

        Returns:
            `dict`, with a list per session: `input_ids`, up to the last token of the last SID; `label_positions`, the places
            whose next token is to be predicted; `label_ids`, what it is: the tokens of a SID, and the end token, although the
            session goes on with the next purchase there; `product_rows`, the products bought; and `num_truncated` (`int`), how
            many purchases were left out.

        Raises:
            `TypeError`, `ValueError`: if the template has another layout, an example is no session, names a product that is not in
                the catalog, or is too long even with its last purchase alone.
        """
        if isinstance(examples, Mapping):
            raise TypeError("encode_sessions takes a list of examples; wrap a single one: [example].")
        return encode_sessions(self, examples, max_length)


def _ragged(sequences):
    """Rows of a -1-padded matrix as lists."""
    lengths = (sequences >= 0).sum(1).tolist()
    return [row[:length] for row, length in zip(sequences.tolist(), lengths, strict=True)]


SIDTokenizer.register_for_auto_class()
