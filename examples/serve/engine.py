"""Model, catalogue and filters: what knows how to search, and nothing of HTTP."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from rqsid import SIDTokenizer, SIDTrie, search

FIELDS = {"profile", "history", "query"}


class RequestRefused(ValueError):
    """What was asked cannot be answered; the message is for the one who asked."""


@dataclass
class Query:
    """A request that was checked and made ready. `trie` is None where the filters leave no product."""

    prompt: list[int]
    top_k: int
    trie: SIDTrie | None
    ignored: list[str]
    history_left_out: int


class SearchEngine:
    """
    Args:
        model (`PreTrainedModel`), tokenizer ([`SIDTokenizer`]):
            As they were saved together.
        segments (`dict[str, list[str]]`, *optional*):
            Product ids by the name of a segment.
        num_beams (`int`, *optional*, defaults to 50):
            Of every search. One number, so that no answer depends on the requests that it was computed with.
        normalize (`str`, *optional*, defaults to `"vocab"`):
            See [`search`].
    """

    def __init__(self, model, tokenizer, segments=None, num_beams=50, normalize="vocab"):
        if set(tokenizer.prompt_template.fields) - FIELDS:
            raise ValueError(
                f"The model's prompts have the fields {tokenizer.prompt_template.fields}, requests only {sorted(FIELDS)}. "
                "Add the others to the request in app.py."
            )
        self.model, self.tokenizer, self.num_beams, self.normalize = model, tokenizer, num_beams, normalize
        self.trie = SIDTrie.from_tokenizer(tokenizer).to(model.device)
        self.segments = {}
        for name, product_ids in (segments or {}).items():
            mask = self._mask(tokenizer.catalog.product_rows(product_ids))
            if not self._has_products(mask):
                raise ValueError(f"Segment {name!r} has no product that could be returned. Leave it out.")
            self.segments[name] = self.trie.restrict(mask)

        context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        limits = [tokenizer.prompt_template.max_length, context and context - tokenizer.max_sid_length - 1]
        self.max_length = min((limit for limit in limits if limit), default=None)

    @classmethod
    def load(cls, folder, segments=None, device=None, max_batch=1, **options):
        """Loads model, tokenizer and segments, and searches once, so that the first request is as fast as the others."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = SIDTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
        engine = cls(model, tokenizer, read_segments(segments) if segments else None, **options)
        example = {"history": tokenizer.catalog.product_ids(np.array([0])), "query": "a", "profile": "a"}
        engine.search([engine.prepare({name: example[name] for name in tokenizer.prompt_template.fields})] * max_batch)
        return engine

    def prepare(self, example, top_k=1, segment=None, only=None, exclude=None, ignore_unknown=False):
        """
        Checks a request and does what needs no model: prompt and filter.

        Args:
            example (`dict`): `profile`, `history` and `query`, or some of them.
            top_k (`int`, *optional*, defaults to 1): Number of products.
            segment (`str`, *optional*): Name of the segment to search in.
            only, exclude (`list[str]`, *optional*): Ids of the products that alone may, or may not, be returned.
            ignore_unknown (`bool`, *optional*, defaults to `False`): Whether to leave out ids that the catalogue lacks.

        Returns:
            `Query`

        Raises:
            `RequestRefused`: for an unknown segment or product, a field the model knows nothing of, no field at all, or texts
                longer than the model reads.
        """
        strangers = sorted(set(example) - set(self.tokenizer.prompt_template.example_keys()))
        if strangers:
            raise RequestRefused(f"This model was trained without {', '.join(strangers)}: leave it out.")
        if segment is not None and segment not in self.segments:
            raise RequestRefused(f"There is no segment {segment!r}, only {sorted(self.segments)[:20]}.")

        # 1. ids to rows of the catalogue
        lists = {"history": example.get("history") or [], "only": only or [], "exclude": exclude or []}
        rows = {name: self.tokenizer.catalog.find_products(ids) for name, ids in lists.items()}
        unknown = {
            name: [product_id for product_id, row in zip(ids, rows[name], strict=True) if row < 0]
            for name, ids in lists.items()
        }
        for name, ids in unknown.items():
            if ids and not ignore_unknown:
                more = f" and {len(ids) - 10} more" if len(ids) > 10 else ""
                raise RequestRefused(
                    f"Unknown products in {name}: {', '.join(map(repr, ids[:10]))}{more}. Leave them out, or send "
                    '"ignore_unknown": true.'
                )
            rows[name] = rows[name][rows[name] >= 0]
        ignored = list(dict.fromkeys(product_id for ids in unknown.values() for product_id in ids))
        history = [product_id for product_id in lists["history"] if product_id not in ignored]

        # 2. the prompt, cut as `search` would cut it
        try:
            encoded = self.tokenizer.encode_prompts([{**example, "history": history}], max_length=self.max_length)
        except ValueError as error:
            raise RequestRefused(str(error)) from None

        # 3. the filter
        trie = self.trie if segment is None else self.segments[segment]
        if only is not None or len(rows["exclude"]):
            mask = self._mask(rows["only"] if only is not None else slice(None))
            mask[rows["exclude"]] = False
            if segment is not None:
                mask &= trie.product_mask
            trie = trie.restrict(mask) if self._has_products(mask) else None
        return Query(encoded["input_ids"][0], top_k, trie, ignored, encoded["num_truncated"][0])

    def search(self, queries):
        """Searches for all queries at once. Returns a list of products for each."""
        found = search(
            self.model,
            self.tokenizer,
            [query.prompt for query in queries],
            top_k=max(query.top_k for query in queries),
            num_beams=self.num_beams,
            trie=[query.trie for query in queries],
            normalize=self.normalize,
        )
        return [products[: query.top_k] for products, query in zip(found, queries, strict=True)]

    def _mask(self, rows):
        mask = np.zeros(len(self.tokenizer.catalog), dtype=bool)
        mask[rows] = True
        return mask

    def _has_products(self, mask):
        return mask[self.tokenizer.catalog.withdrawn == 0].any()


def read_segments(path):
    """
    Args:
        path (`str`): JSON, `{"snacks": ["B1", "B2"]}`, or parquet with the columns `segment` and `product_id`.

    Returns:
        `dict[str, list[str]]`
    """
    if Path(path).suffix == ".parquet":
        import pyarrow.parquet as pq

        table = pq.read_table(path, columns=["segment", "product_id"])
        grouped = table.group_by("segment").aggregate([("product_id", "list")])
        return dict(zip(grouped["segment"].to_pylist(), grouped["product_id_list"].to_pylist(), strict=True))
    segments = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(segments, dict) or not all(isinstance(ids, list) for ids in segments.values()):
        raise ValueError(f'{path} must hold an object of lists, as {{"snacks": ["B1", "B2"]}}.')
    return segments
