"""One arm of the comparison: a catalog with its SIDs, a tokenizer, a fine-tuned model, and what it ranks."""

import os
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ProgressCallback,
    set_seed,
)

from rqsid import (
    PromptTemplate,
    SIDLogitsProcessor,
    SIDTrainer,
    SIDTrainingArguments,
    SIDTrie,
    sid_generation_config,
)


@dataclass
class Arm:
    """A trained arm: its trainer, and product ids and SIDs ranked for the test rows."""

    name: str
    trainer: SIDTrainer
    output: object
    rankings: dict


class ProgressBar(ProgressCallback):
    """The Trainer's bar without the log lines between; the report says what they would."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


def train_base_tokenizer(texts, vocab_size=4000):
    """
    A small byte-level BPE of the prompts' text; real checkpoints bring theirs.

    Text is cut at commas, colons and line ends only, so that a frequent phrase ("potato chips", "age 35-44") becomes one
    token: prompts are a third shorter than with words, and so is the training.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[,:\n]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def make_base_tokenizer(arguments, train):
    if arguments.model:
        return AutoTokenizer.from_pretrained(arguments.model)
    examples = train.select(range(min(20_000, len(train)))).select_columns(["profile", "query"]).to_list()
    return train_base_tokenizer(PromptTemplate().split(example)[0] for example in examples)


def make_model(arguments, tokenizer):
    """A checkpoint, or a small model of the Llama-2 architecture from scratch."""
    set_seed(arguments.seed)
    if arguments.model:
        return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden_size,
        intermediate_size=3 * arguments.hidden_size,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=arguments.hidden_size // 32,
        max_position_embeddings=512,
        # The default, 0.02, is meant for wide models; a narrow one would hardly learn in so few steps.
        initializer_range=arguments.hidden_size**-0.5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train_arm(name, arguments, tokenizer, purchases):
    """Fine-tunes, evaluates while training, and ranks the catalog for the test rows."""
    training_arguments = SIDTrainingArguments(
        output_dir=os.path.join(arguments.output, "checkpoints", name),
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=50,
        # A checkpoint has something to forget.
        learning_rate=arguments.learning_rate or (2e-5 if arguments.model else 3e-3),
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.01,
        adam_beta2=0.98,
        num_train_epochs=arguments.epochs,
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=50,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=arguments.seed,
        eval_top_k=50,
        eval_num_beams=arguments.num_beams,
        max_prompt_length=arguments.max_prompt_length,
    )
    trainer = SIDTrainer(
        make_model(arguments, tokenizer),
        training_arguments,
        train_dataset=purchases.train.select(range(min(arguments.train_rows, len(purchases.train)))),
        eval_dataset=purchases.validation.select(range(min(100, len(purchases.validation)))),
        processing_class=tokenizer,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressBar)
    trainer.train()
    trainer.save_model(os.path.join(arguments.output, name))
    return trainer


def rank_test_rows(name, trainer, test):
    """The trainer's constrained search over all test rows."""
    output = trainer.predict(test)
    catalog = trainer.processing_class.catalog
    product_rows, _ = output.predictions
    predictions = [catalog.product_ids(rows[rows >= 0]) for rows in product_rows]
    return Arm(name, trainer, output, {"predictions": predictions, "references": test["product"][:]})


@torch.no_grad()
def invalid_rates(trainer, test, constrained, num_beams=10):
    """
    Share of the answers of `generate()` that are no SID of the catalog, with or without [`SIDLogitsProcessor`].

    Returns:
        `tuple[float, float]`: of the best answer to each prompt, and of all `num_beams` answers.
    """
    tokenizer, model = trainer.processing_class, trainer.model.eval()
    config = sid_generation_config(model, tokenizer, num_beams=num_beams, num_return_sequences=num_beams)
    trie = SIDTrie.from_tokenizer(tokenizer)
    invalid = []
    for start in range(0, len(test), 50):
        examples = test.select(range(start, min(start + 50, len(test)))).to_list()
        prompts = tokenizer.encode_prompts(examples)["input_ids"]
        batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
        width = batch["input_ids"].shape[1]
        processors = [SIDLogitsProcessor(tokenizer, prompt_length=width, trie=trie)] if constrained else []
        sequences = model.generate(**batch, generation_config=config, logits_processor=processors)
        invalid.append((tokenizer.find_sids(sequences[:, width:].tolist()) < 0).reshape(-1, num_beams))
    invalid = np.concatenate(invalid)
    return float(invalid[:, 0].mean()), float(invalid.mean())


def head_codes(codes, popularity, layer, size):
    """
    The head tokens of a layer: the smallest set of most frequent codes that holds half of the training purchases.
    Fixed by the unpruned codes, so that all arms have the same groups. Shape: (K,) of bool.
    """
    counts = np.bincount(codes[:, layer], weights=popularity, minlength=size)
    order = np.argsort(-counts, kind="stable")
    num_head = int(np.searchsorted(np.cumsum(counts[order]), counts.sum() / 2)) + 1
    head = np.zeros(size, dtype=bool)
    head[order[:num_head]] = True
    return head
