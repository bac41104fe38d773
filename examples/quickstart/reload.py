"""Loads what the quick start saved, in a process of its own, and ranks products for one household and query."""

import json
import sys

from transformers import AutoModelForCausalLM
from transformers.utils import logging

from rqsid import SIDTokenizer, search


def main(folder, example_file):
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with open(example_file, encoding="utf-8") as file:
        example = json.load(file)
    tokenizer = SIDTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ranked = search(model, tokenizer, [example], top_k=10)[0]
    rows = tokenizer.catalog.product_rows([entry["product_id"] for entry in ranked])
    for entry, text in zip(ranked, tokenizer.catalog.texts(rows), strict=True):
        print(json.dumps(entry | {"text": text}))


if __name__ == "__main__":
    main(*sys.argv[1:])
