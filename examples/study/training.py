"""
One cell of the experiments that train: a catalog of SIDs, a small language model from scratch, and the ranks that it gives to
what was bought in the test rows.
"""

import time

import numpy as np
import torch
from catalogues import MAX_HISTORY, import_example
from codes import head_and_tail
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, set_seed

from rqsid import (
    BaichuanConfig,
    BaichuanForCausalLM,
    ProductCatalog,
    PromptTemplate,
    SIDTokenizer,
    SIDTrainer,
    SIDTrainingArguments,
    TokenPruning,
    search,
)
from rqsid.trainer.checkpoints import last_checkpoint

TOP_K = 50
CONTEXT = 512
FLOPS_RULE = (
    "6 x parameters x training tokens (Kaplan et al., arXiv 2001.08361; embeddings counted, attention's own part not)"
)
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "baichuan": (BaichuanConfig, BaichuanForCausalLM, {"position_embedding": "rope"}),
}


def train_cell(settings, checkpoint_dir, catalogue, codes, base_codes, embeddings):
    """
    Trains, chooses the epoch by the validation rows, and ranks the test rows once.

    Args:
        settings (`dict`):
            Of the cell: `arm` (pruning, collisions, order of layers, loss), `model`, `training`, `seed`.
        checkpoint_dir (`Path`):
            Folder of checkpoints, one an epoch, from which a cell that was stopped goes on.
        catalogue ([`Catalogue`]):
            The data.
        codes ([`Codes`]):
            The SIDs of this cell before pruning.
        base_codes ([`Codes`]):
            Those by which test rows are grouped, the same for all arms.
        embeddings (`np.ndarray`): Shape: (N, D).
            What was quantized; read where codes are split or reassigned.

    Returns:
        `dict`, JSON-able: `item_ranks` and `sid_ranks`, the rank of what was bought in each test row, 0 beyond 50; `users`, a
        number for the user of each row; `groups` of [`head_and_tail`]; `given_first_token`, item ranks with the first token of
        the SID given, if the arm asks for it; `validation`, the curve; and costs: `parameters`, `training_tokens`,
        `training_flops`, `search_seconds` (test rows, forward pass of the loss included), SIDs and their lengths.
    """
    trainer = fit_model(settings, checkpoint_dir, catalogue, codes, embeddings)
    test = spread(catalogue.splits["test"], settings["training"]["test_rows"])
    products, sids, labels, search_seconds = rank_rows(trainer, test)
    result = {
        "item_ranks": ranks_of(products, labels),
        "sid_ranks": ranks_of(sids, trainer.processing_class.catalog.sid_rows(labels)),
        "users": user_numbers(test),
        "groups": head_and_tail(base_codes.codes, base_codes.sizes, catalogue.popularity, labels),
        "search_seconds": search_seconds,
        **describe_training(trainer),
        "about": catalogue.describe(),
    }
    if settings["arm"].get("given_first_token"):
        num_beams = settings["training"]["num_beams"]
        result["given_first_token"] = ranks_given_first_token(trainer, test, labels, codes.codes, num_beams)
    return result


def fit_model(settings, checkpoint_dir, catalogue, codes, embeddings):
    """
    A small model trained from scratch on the SIDs of an arm; see [`train_cell`].

    Returns:
        [`SIDTrainer`]: with the weights of the best epoch; its `processing_class` holds the catalog.
    """
    arm, training = settings["arm"], settings["training"]
    catalog, quantizer = build_catalog(catalogue, codes, arm, embeddings)
    layout = "session" if catalogue.sequences else "purchase"
    tokenizer = SIDTokenizer.from_base(
        base_tokenizer(catalogue, training["vocab_size"]),
        catalog,
        quantizer,
        layer_order=arm.get("layer_order"),
        prompt_template=PromptTemplate(layout=layout, **training["template"]),
    )
    train = Dataset.from_list(sessions(catalogue)) if catalogue.sequences else catalogue.splits["train"]
    trainer = SIDTrainer(
        make_model(settings["model"], tokenizer, settings["seed"]),
        training_arguments(settings, checkpoint_dir),
        train_dataset=spread(train, training["train_rows"]),
        eval_dataset=_first(catalogue.splits["validation"], training["validation_rows"]),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(str(checkpoint_dir)))
    return trainer


def rank_rows(trainer, rows):
    """
    Args:
        trainer ([`SIDTrainer`]):
            Of [`fit_model`].
        rows (`Dataset`):
            Of a split of a catalogue.

    Returns:
        `tuple`: rows of the products that were found, the best first, and those of the SIDs, both of shape (R, 50) and -1 where
        a list ends; the products bought, shape (R,); and seconds, forward pass of the loss included.
    """
    started = time.perf_counter()
    (products, sids), labels, _ = trainer.predict(rows)
    seconds = round(time.perf_counter() - started, 2)
    if not np.array_equal(labels, trainer.processing_class.catalog.product_rows(rows["product"][:])):
        raise ValueError(
            "Rows came back in another order than they have, so that users and groups would not be theirs."
        )
    return products, sids, labels, seconds


def describe_training(trainer):
    """What a cell says of its model: curve on the validation rows, parameters, tokens, FLOPs, SIDs."""
    parameters, tokens = trainer.model.num_parameters(), training_tokens(trainer)
    return {
        "validation": validation_curve(trainer),
        "parameters": parameters,
        "training_tokens": tokens,
        "training_flops": 6 * parameters * tokens,
        "sids": describe_sids(trainer.processing_class.catalog),
    }


def user_numbers(rows):
    """A number for the user of each row."""
    return np.unique(np.asarray(rows["user"][:], dtype=str), return_inverse=True)[1].tolist()


def build_catalog(catalogue, codes, arm, embeddings):
    """The catalog of an arm, and the quantizer of its codes, which is another one where codes were split."""
    pruning, quantizer, sizes, rows = TokenPruning(**arm["pruning"]), codes.quantizer, codes.sizes, codes.codes
    if pruning.strategy == "split":
        pruning.fit(rows, sizes, quantizer=quantizer, embeddings=embeddings)
        quantizer, sizes = pruning.quantizer, pruning.codebook_sizes
        rows = quantizer.encode(embeddings)
    else:
        pruning.fit(rows, sizes)
    extra = {"embeddings": embeddings} if arm["collisions"] == "reassign" else {}
    catalog = ProductCatalog.build(
        catalogue.product_ids,
        rows,
        sizes,
        pruning,
        popularity=catalogue.popularity,
        collisions=arm["collisions"],
        quantizer=quantizer,
        **extra,
    )
    return catalog, quantizer


def base_tokenizer(catalogue, vocab_size):
    """A small byte-level BPE of what training prompts say beside SIDs, each text once, in the order of the alphabet."""
    train = catalogue.splits["train"]
    texts = sorted(set(zip(train["profile"][:], train["query"][:], strict=True)) - {("", "")})
    template = PromptTemplate()
    prompts = [template.answer]  # all that there is where neither profiles nor queries are
    prompts += [template.split({"profile": profile, "query": query})[0] for profile, query in texts]
    return import_example("quickstart", "arms").train_base_tokenizer(prompts, vocab_size)


def sessions(catalogue):
    """
    Sessions to train on: what each user bought before the validation row, every purchase with its query. The first purchase
    of a user, which is in no training row, is learned too, with the category of its product where queries are constructed of
    those. What is longer than a history of 20 and a purchase is cut into sessions of that length.

    Returns:
        `list[dict]`: `profile`, `products` and `queries`.
    """
    train = catalogue.splits["train"]
    queries, profiles, found, at = train["query"][:], train["profile"][:], [], 0
    is_constructed = catalogue.query_source.startswith("constructed")
    for sequence in catalogue.sequences:
        bought = sequence[:-2] if len(sequence) > 2 else sequence
        if len(bought) < 2:
            continue  # no training row
        end = at + len(bought) - 1
        asked = [catalogue.categories[bought[0]] if is_constructed else "", *queries[at:end]]
        products = [catalogue.product_ids[row] for row in bought]
        for start in range(0, len(bought), MAX_HISTORY + 1):
            part = slice(start, start + MAX_HISTORY + 1)
            found.append({"profile": profiles[end - 1], "products": products[part], "queries": asked[part]})
        at = end
    return found


def make_model(settings, tokenizer, seed):
    """A small model from scratch, of one of the paper's three families."""
    if settings["family"] not in FAMILIES:
        raise ValueError(f"The family {settings['family']!r} is unknown. Choose one of {', '.join(FAMILIES)}.")
    config, model, options = FAMILIES[settings["family"]]
    set_seed(seed)
    return model(
        config(
            vocab_size=tokenizer.base_size,
            hidden_size=settings["width"],
            intermediate_size=3 * settings["width"],
            num_hidden_layers=settings["depth"],
            num_attention_heads=max(settings["width"] // 32, 1),
            num_key_value_heads=max(settings["width"] // 32, 1),
            max_position_embeddings=CONTEXT,
            # The default, 0.02, is meant for wide models; a narrow one would hardly learn in so few steps.
            initializer_range=settings["width"] ** -0.5,
            attention_dropout=settings["dropout"],
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )
    )


def training_arguments(settings, checkpoint_dir):
    training, arm = settings["training"], settings["arm"]
    return SIDTrainingArguments(
        output_dir=str(checkpoint_dir),
        num_train_epochs=training["epochs"],
        per_device_train_batch_size=training["batch_size"],
        per_device_eval_batch_size=64,
        learning_rate=training["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=training["weight_decay"],
        adam_beta2=0.98,
        loss_type=arm["loss"],
        loss_gamma=arm.get("gamma", 1.0),
        loss_normalize=training["loss_normalize"],
        packing=training["packing"],
        # The epoch that is searched with is the best on the validation rows, and never on test rows.
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="item_ndcg@10",
        greater_is_better=True,
        logging_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=settings["seed"],
        eval_top_k=TOP_K,
        eval_num_beams=training["num_beams"],
        eval_bootstrap=0,
    )


def ranks_of(ranked_rows, wanted_rows):
    """
    Args:
        ranked_rows (`np.ndarray`): Shape: (R, k). Best first, -1 where a list ends.
        wanted_rows (`np.ndarray`): Shape: (R,).

    Returns:
        `list[int]`: the rank of what is wanted, from 1, and 0 where it is not in the list.
    """
    hits = np.asarray(ranked_rows) == np.asarray(wanted_rows)[:, None]
    return np.where(hits.any(1), hits.argmax(1) + 1, 0).tolist()


def ranks_given_first_token(trainer, test, labels, codes, num_beams):
    """
    Item ranks where the first token of the right SID is given. With the layers swapped that is the second layer's token, the
    control. It need not say as much as the first layer's: compare what an arm gains first.
    """
    tokenizer, prompts = trainer.processing_class, test.remove_columns("user").to_list()
    prefixes = [[int(code)] for code in codes[labels, tokenizer.layer_order[0]]]
    model = trainer.model.eval()
    found = search(model, tokenizer, prompts, top_k=TOP_K, num_beams=num_beams, prefix_codes=prefixes)
    ranked = np.full((len(prompts), TOP_K), -1)
    for row, products in enumerate(found):
        ranked[row, : len(products)] = tokenizer.catalog.product_rows([product["product_id"] for product in products])
    return ranks_of(ranked, labels)


def training_tokens(trainer):
    """Tokens that the model read in all epochs, padding not counted; an answer behind its prompt but for the last token."""
    rows, tokens = trainer.train_dataset, 0
    has_answers = "label_positions" not in rows.column_names
    for batch in rows.iter(batch_size=1000):
        tokens += sum(map(len, batch["input_ids"]))
        tokens += sum(len(answer) - 1 for answer in batch["label_ids"]) if has_answers else 0
    return tokens * int(trainer.args.num_train_epochs)


def validation_curve(trainer):
    """What was measured on the validation rows after each epoch."""
    names = {"loss": "eval_loss", "recall@10": "eval_item_recall@10", "ndcg@10": "eval_item_ndcg@10"}
    return [
        {"epoch": entry["epoch"]} | {name: round(float(entry[key]), 6) for name, key in names.items()}
        for entry in trainer.state.log_history
        if "eval_item_ndcg@10" in entry
    ]


def describe_sids(catalog):
    """How many SIDs there are, how long and how crowded."""
    report = catalog.collision_report(ks=(1, 10, 50))
    report = report if isinstance(report, dict) else vars(report)
    lengths = catalog.lengths()[catalog.sid_rows(np.arange(len(catalog)))]
    return {
        "unique": int(catalog.num_sids),
        "mean_length": round(float(np.mean(lengths)), 4),
        "collision_rate": round(1 - catalog.num_sids / len(catalog), 4),
        "pruned": int(catalog.pruning.num_pruned),
        "recall_ceiling": {str(k): round(float(value), 4) for k, value in report["recall_ceiling"].items()},
    }


def spread(rows, count):
    """At most `count` rows at even distances, all if `None`: the first may be unlike the others, as users with long histories."""
    if count is None or count >= len(rows):
        return rows
    return rows.select(np.linspace(0, len(rows) - 1, count).astype(int))


def _first(rows, count):
    return rows if count is None else rows.select(range(min(count, len(rows))))
