"""Tiny trainings that push to the Hub: a tokenizer with a shared and shortened SIDs, purchases, and a trainer of them."""

import random

import numpy as np
from datasets import Dataset

from rqsid import (
    ProductCatalog,
    ResidualQuantizer,
    ResidualQuantizerConfig,
    SIDTokenizer,
    SIDTrainer,
    SIDTrainingArguments,
    TokenPruning,
)

QUERIES = ["potato chips", "fresh milk", "orange juice", "frozen pizza"]
SIZES = [8, 8, 8]


def make_tokenizer(base, with_quantizer=True):
    generator = np.random.default_rng(0)
    config = ResidualQuantizerConfig(codebook_sizes=SIZES, num_iterations=3)
    quantizer = ResidualQuantizer(config).fit(generator.standard_normal((200, 6), dtype=np.float32))
    codes = generator.integers(0, 8, (40, 3))
    codes[1] = codes[0]
    pruning = TokenPruning(strategy="top_k", layer=1, top_k=3).fit(codes, SIZES)
    catalog = ProductCatalog.build([f"p{row}" for row in range(40)], codes, SIZES, pruning, popularity=np.arange(40))
    return SIDTokenizer.from_base(base, catalog, quantizer if with_quantizer else None)


def make_purchases(n, seed=0):
    generator = random.Random(seed)
    chosen = [generator.randrange(len(QUERIES)) for _ in range(n)]
    return [
        {"history": [f"p{generator.randrange(40)}"], "query": QUERIES[query], "product": f"p{5 * query + 1}"}
        for query in chosen
    ]


def make_trainer(model, tokenizer, output_dir, train=8, evaluation=6, init=None, **args):
    settings = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4}
    settings |= {"learning_rate": 5e-3, "eval_top_k": 10, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    if isinstance(evaluation, int):
        evaluation = Dataset.from_list(make_purchases(evaluation, seed=1)) if evaluation else None
    return SIDTrainer(
        model,
        SIDTrainingArguments(str(output_dir), **settings | args),
        train_dataset=Dataset.from_list(make_purchases(train)),
        eval_dataset=evaluation,
        processing_class=tokenizer,
        **(init or {}),
    )


def push_while_training(make, folder, name, batch_size):
    """
    Pushes each step and the end, to the Hub that the environment names, in each of the processes that a launcher started; what was
    pushed is also saved, to FOLDER/NAME/saved. Checkpoints of FSDP hold shards.
    """
    output = f"{folder}/{name}/pushed"
    args = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    args |= {"push_to_hub": True, "hub_model_id": f"alice/{name}", "hub_strategy": "checkpoint"}
    trainer = make(folder, output, batch_size, family="llama", hub_always_push=True, **args)
    if trainer.is_fsdp_enabled:
        plugin = trainer.accelerator.state.fsdp_plugin
        plugin.state_dict_config = plugin.optim_state_dict_config = None
        plugin.set_state_dict_type("SHARDED_STATE_DICT")
    trainer.train()
    info = trainer.push_to_hub()
    trainer.save_whole_model(f"{folder}/{name}/saved")
    return {"commit": info.oid if info is not None else None}
