"""The models and rows of the training benchmark, and what a step costs in operations."""

import numpy as np
import torch
from datasets import Dataset
from search_measures import make_codes, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from rqsid import PromptTemplate, initialize_sid_rows, tokenize_examples

STOCK, SID = "stock Trainer", "SIDTrainer"
ROWS, ROWS_PACKED = "one answer a row", "one answer a row, packed"
SESSIONS, SESSIONS_PACKED = "sessions", "sessions, packed"
SESSION_METHODS = (ROWS, ROWS_PACKED, SESSIONS, SESSIONS_PACKED)
SID_LENGTH, NUM_PRODUCTS, PURCHASES = 4, 10_000, 8

# From the models' config.json: what decides which operations there are. "small" is for --quick.
SHAPES = {
    "Qwen1.5-0.5B": {
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "Llama-2-7B": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "small": {
        "vocab_size": 32_000,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "tie_word_embeddings": True,
    },
}


def load_tokenizer(setting):
    logging.set_verbosity_error()
    vocabulary = SHAPES[setting["shape"]]["vocab_size"]
    codebook_size = min(1024, vocabulary // (2 * SID_LENGTH))
    codes = make_codes(min(NUM_PRODUCTS, codebook_size**SID_LENGTH // 4), SID_LENGTH, codebook_size)
    return make_tokenizer(vocabulary, codes, codebook_size)


def make_model(setting, tokenizer, seed=0):
    """Random weights, the same at every call; bfloat16 on a GPU."""
    is_llama = setting["shape"].startswith("Llama")
    config = (LlamaConfig if is_llama else Qwen2Config)(
        **SHAPES[setting["shape"]] | {"num_hidden_layers": setting["layers"]},
        num_key_value_heads=SHAPES[setting["shape"]]["num_attention_heads"],
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    on_gpu = torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        model = (LlamaForCausalLM if is_llama else Qwen2ForCausalLM)(config)
    model = model.to(torch.bfloat16 if on_gpu else torch.float32)
    initialize_sid_rows(model, tokenizer, init="noise", seed=seed)
    return model


def make_rows(tokenizer, num_rows, prompt, seed=0):
    """Purchases as rows of [`tokenize_examples`], all of one width, with prompts of random words: no text is read."""
    random = np.random.default_rng(seed)
    rows = random.integers(0, len(tokenizer.catalog), num_rows)
    sids = tokenizer.encode_products([f"p{row}" for row in rows])
    return [
        {
            "input_ids": random.integers(3, tokenizer.base_size, prompt).tolist(),
            "label_ids": [*sid, tokenizer.eos_token_id],
            "product_rows": int(row),
        }
        for row, sid in zip(rows, sids, strict=True)
    ]


def make_session_rows(tokenizer, num_users, prompt, seed=0):
    """
    What `num_users` customers bought, once as a row a purchase, whose prompt is the session so far, and once as a row a session.
    The template of the tokenizer becomes that of sessions.

    Args:
        prompt (`int`): Tokens of the last purchase's prompt. A quarter is the profile, the rest queries and SIDs.

    Returns:
        `tuple[list[dict], list[dict]]`: `PURCHASES` times `num_users` rows, and `num_users`, of [`tokenize_examples`].
    """
    tokenizer.prompt_template = PromptTemplate(fields=["profile", "query"], layout="session")
    random = np.random.default_rng(seed)

    def words(count):
        return " ".join(f"w{number}" for number in random.integers(3, tokenizer.base_size, count))

    # A label, "Query:" or "Product:", is one token.
    unit = max(prompt * 3 // 4 // PURCHASES, SID_LENGTH + 3)
    profile = max(prompt + SID_LENGTH - PURCHASES * unit - 1, 1)
    sessions, rows = [], []
    for _ in range(num_users):
        products = [f"p{row}" for row in random.integers(0, len(tokenizer.catalog), PURCHASES)]
        queries = [words(unit - SID_LENGTH - 2) for _ in products]
        sessions.append({"profile": words(profile), "queries": queries, "products": products})
        for at, product in enumerate(products):
            rows.append(sessions[-1] | {"queries": queries[: at + 1], "products": products[:at], "product": product})
    return [
        Dataset.from_dict(tokenize_examples(Dataset.from_list(part)[:], tokenizer)).to_list()
        for part in (rows, sessions)
    ]


def work_of(method, setting, batch):
    """
    Returns:
        `dict[str, int]`: the `answers` and `tokens` of a step with this batch, padding not counted; and its operations, see
        [`training_flops`]: `flops`, and `flops_done` with those of gradient checkpointing.
    """
    answers = [len(row["label_ids"]) for row in batch]
    lengths = [len(row["input_ids"]) for row in batch]
    if "label_positions" not in batch[0]:
        # The stock Trainer also reads the end token, from which nothing is predicted.
        lengths = [length + answer - (method != STOCK) for length, answer in zip(lengths, answers, strict=True)]
    config = SHAPES[setting["shape"]] | {"num_hidden_layers": setting["layers"]}
    num_logits = sum(lengths) if method == STOCK else sum(answers)
    return {
        "answers": sum(answers) // (SID_LENGTH + 1),
        "tokens": sum(lengths),
        "flops": training_flops(config, lengths, num_logits),
        "flops_done": training_flops(config, lengths, num_logits, setting["checkpointing"]),
    }


def training_flops(config, lengths, num_logits, recomputed=False):
    """
    Floating point operations of the matrix products in forward and backward, 2 for a multiplication and an addition: no model of
    this shape can be trained with fewer. Backward takes twice the forward, once for the inputs' gradients and once for the
    weights'; in attention, once for either factor.

    Args:
        config (`dict`): An entry of `SHAPES`.
        lengths (`list[int]`): Tokens of each row. A token attends to itself and those before it.
        num_logits (`int`): Tokens that the output layer is applied to.
        recomputed (`bool`, *optional*, defaults to `False`): Whether the layers' forward is computed twice (gradient checkpointing).

    Returns:
        `int`
    """
    hidden, width = config["hidden_size"], config["intermediate_size"]
    weights = 4 * hidden**2 + 3 * hidden * width
    # Queries with keys, and probabilities with values: 2 products of `hidden` multiplications for a pair of tokens.
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    layer = 2 * weights * sum(lengths) + 2 * 2 * hidden * pairs
    head = 2 * hidden * config["vocab_size"] * num_logits
    # A layer's last product is needed by none of its gradients.
    again = layer - 2 * hidden * width * sum(lengths) if recomputed else 0
    return config["num_hidden_layers"] * (3 * layer + again) + 3 * head
