"""
How far rqsid's own quantizer and one small decoder-only model, trained from scratch by SIDTrainer, get with the next item.

    python examples/study/accuracy.py --recipe examples/study/recipes/scientific.json --data DIR --encoder MODEL --out runs/study

A recipe is what was chosen on validation rows; test rows are ranked once, with the weights of the best epoch on validation rows.
The floors, popularity and item-transition kNN, are computed on the same rows. Goes on where it was stopped. What to choose is found
out with `--validation_only`, which ranks no test rows, and changes of a recipe:

    python examples/study/accuracy.py --recipe examples/study/recipes/scientific.json --data DIR --encoder MODEL --out runs/study \
        --validation_only --seeds 0 --set augmentation.inserted=0 --set model.hidden_dropout=0.2
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accuracy_tables import write_accuracy_tables
from augmentation import vary_sessions
from catalogues import load_catalogue
from cells import commit, run_cells
from codes import Codes
from datasets import Dataset
from floors import DECAYS, leave_out_history, rank_by_popularity, rank_by_transitions
from item_embeddings import embed
from joint_embeddings import collaborative_vectors, joint_embeddings, neighbours, training_purchases
from training import (
    base_tokenizer,
    build_catalog,
    describe_training,
    make_model,
    rank_rows,
    ranks_of,
    sessions,
    training_arguments,
    user_numbers,
)
from training_cells import TRAINING_CODE
from transformers.utils import logging

from rqsid import PromptTemplate, ResidualQuantizer, ResidualQuantizerConfig, SIDTokenizer, SIDTrainer
from rqsid.trainer.checkpoints import last_checkpoint

SECTIONS = ("name", "embeddings", "quantizer", "arm", "augmentation", "model", "training")
FLOORS = ("popularity", "item-transition kNN")
QUICK = {
    "embeddings": {"dim": 16},
    "quantizer": {"codebook_sizes": [32, 32]},
    "augmentation": {"passes": 1},
    "model": {"width": 32, "depth": 1},
    "training": {"epochs": 1, "train_rows": 200, "validation_rows": 50, "test_rows": 50},
}


def accuracy(catalogue, embeddings, described, out, recipe, seeds=(0, 1, 2), quick=False, validation_only=False):
    """
    Args:
        catalogue ([`Catalogue`]):
            With sequences; its queries are left out.
        embeddings (`np.ndarray`): Shape: (N, E).
            Of the products' texts.
        described (`dict`):
            What they are, from [`embed`].
        out (`str`):
            Folder of results.
        recipe (`dict`):
            From [`read_recipe`].
        seeds (sequence of `int`, *optional*, defaults to `(0, 1, 2)`):
            Of codebooks, variants of sessions and training.
        quick (`bool`, *optional*, defaults to `False`):
            A tiny model, one epoch on a few rows.
        validation_only (`bool`, *optional*, defaults to `False`):
            Whether the validation rows are what is ranked in the end, in cells of their own (`accuracy_trials`), without floors.

    Returns:
        `int`: how many cells were computed.

    Raises:
        `ValueError`: if the catalogue has no sequences.
    """
    if not catalogue.sequences:
        raise ValueError(
            f"{catalogue.name} is split by date and has no sequences, which next-item training and the kNN floor read."
        )
    catalogue = catalogue.without_queries()
    recipe = _merged(recipe, QUICK) if quick else recipe
    shared = {"data": catalogue.settings() | {"task": catalogue.task}}
    rows = {name: recipe["training"][name] for name in ("validation_rows", "test_rows")}
    cells = [shared | {"floor": name, **rows, "seed": 0} for name in FLOORS]
    cells = [] if validation_only else cells
    cells += [shared | {"text": described, "recipe": recipe, "seed": seed} for seed in seeds]
    split = "validation" if validation_only else "test"

    def compute(settings, checkpoint_dir):
        if "floor" in settings:
            return floor_cell(settings, catalogue)
        return recipe_cell(settings, checkpoint_dir, catalogue, embeddings, split)

    return run_cells(out, "accuracy_trials" if validation_only else "accuracy", cells, compute, TRAINING_CODE)


def floor_cell(settings, catalogue):
    """Ranks by popularity, or by transitions with the decay that is best by Recall@10 on validation rows."""
    started = time.perf_counter()
    test, result = _rows(catalogue, "test", settings["test_rows"]), {}
    rank = rank_by_popularity
    if settings["floor"] != "popularity":
        validation = _rows(catalogue, "validation", settings["validation_rows"])
        bought = _product_rows(catalogue, validation)
        recalls = {}
        for decay in DECAYS:
            ranks = np.array(ranks_of(rank_by_transitions(catalogue, validation, decay), bought))
            recalls[decay] = float(((ranks > 0) & (ranks <= 10)).mean())
        result["decay"] = max(recalls, key=recalls.get)
        result["validation"] = {str(decay): round(recall, 6) for decay, recall in recalls.items()}
        rank = partial(rank_by_transitions, decay=result["decay"])
    bought = _product_rows(catalogue, test)
    return result | {
        "item_ranks": ranks_of(rank(catalogue, test), bought),
        "with_history": ranks_of(rank(catalogue, test, with_history=True), bought),
        "users": user_numbers(test),
        "search_seconds": round(time.perf_counter() - started, 2),
        "training_tokens": 0,
        "training_flops": 0,
        "about": catalogue.describe(),
    }


def recipe_cell(settings, checkpoint_dir, catalogue, embeddings, split="test"):
    """
    Trains, and ranks rows of that split once.

    Returns:
        `dict`, JSON-able: `item_ranks`, what is in the history left out, as no one buys it again in these data; `with_history`,
        the same lists as the model gives them; `sid_ranks`; `users`; the curve on validation rows; and costs.
    """
    trainer = fit_recipe(settings, checkpoint_dir, catalogue, embeddings)
    rows = _rows(catalogue, split, settings["recipe"]["training"][f"{split}_rows"])
    products, sids, labels, search_seconds = rank_rows(trainer, rows)
    return {
        "item_ranks": ranks_of(leave_out_history(products, catalogue, rows), labels),
        "with_history": ranks_of(products, labels),
        "sid_ranks": ranks_of(sids, trainer.processing_class.catalog.sid_rows(labels)),
        "users": user_numbers(rows),
        "search_seconds": search_seconds,
        **describe_training(trainer),
        "about": catalogue.describe(),
    }


def fit_recipe(settings, checkpoint_dir, catalogue, embeddings):
    """
    Codebooks, catalog, variants of sessions and a model, all by one seed.

    Returns:
        [`SIDTrainer`]: with the weights of the best epoch; its `processing_class` holds the catalog.
    """
    recipe, seed, num_products = settings["recipe"], settings["seed"], len(catalogue.product_ids)
    training = recipe["training"]
    # 1. SIDs that know texts and training purchases
    options = recipe["embeddings"]
    bought = training_purchases(catalogue)
    vectors = collaborative_vectors(bought, num_products, options["window"], options["dim"], seed=seed)
    joint = joint_embeddings(embeddings, vectors, options["text_weight"])
    quantizer = ResidualQuantizer(ResidualQuantizerConfig(**recipe["quantizer"], seed=seed)).fit(joint)
    codes = Codes(recipe["quantizer"], Path(checkpoint_dir), quantizer, quantizer.encode(joint))
    catalog, quantizer = build_catalog(catalogue, codes, recipe["arm"], joint)
    tokenizer = SIDTokenizer.from_base(
        base_tokenizer(catalogue, training["vocab_size"]),
        catalog,
        quantizer,
        prompt_template=PromptTemplate(layout="session", **training["template"]),
    )
    # 2. sessions and their variants
    varied = dict(recipe["augmentation"])
    similar = neighbours(joint, varied.pop("neighbours"))
    train = vary_sessions(
        sessions(catalogue)[: training["train_rows"]], catalogue.product_ids, similar, seed=seed, **varied
    )
    # 3. the model
    args = training_arguments({"training": training, "arm": recipe["arm"], "seed": seed}, checkpoint_dir)
    args.label_smoothing_factor = training["label_smoothing"]
    trainer = SIDTrainer(
        make_model(recipe["model"], tokenizer, seed),
        args,
        train_dataset=Dataset.from_list(train),
        eval_dataset=_rows(catalogue, "validation", training["validation_rows"]),
        processing_class=tokenizer,
    )
    add_dropout(trainer.model, recipe["model"]["hidden_dropout"])
    trainer.train(resume_from_checkpoint=last_checkpoint(str(checkpoint_dir)))
    return trainer


def add_dropout(model, probability):
    """
    Dropout of embeddings and of what each attention and MLP adds, which Llama's configuration lacks. In training only; what is
    saved is a plain Llama.
    """

    def drop(module, _, output):
        return torch.nn.functional.dropout(output, probability, module.training)

    modules = [model.model.embed_tokens]
    for layer in model.model.layers:
        modules += [layer.self_attn.o_proj, layer.mlp.down_proj]
    return [module.register_forward_hook(drop) for module in modules]


def read_recipe(path):
    """
    Raises:
        `ValueError`: if the file is no JSON object, or does not have the sections of a recipe.
    """
    try:
        recipe = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}). Pass one of examples/study/recipes.") from None
    found = sorted(recipe) if isinstance(recipe, dict) else type(recipe).__name__
    if found != sorted(SECTIONS):
        raise ValueError(f"{path} holds {found}; a recipe has the sections {sorted(SECTIONS)}, and no others.")
    return recipe


def changed(recipe, assignments):
    """
    Args:
        recipe (`dict`):
            From [`read_recipe`].
        assignments (`list[str]`):
            Such as `"model.width=96"`: section, key and a JSON value.

    Returns:
        `dict`: a recipe with those values, which its name tells.

    Raises:
        `ValueError`: for a section or key that the recipe does not have, or a value that is no JSON.
    """
    for assignment in assignments:
        path, _, value = assignment.partition("=")
        section, _, key = path.partition(".")
        if not isinstance(recipe.get(section), dict) or key not in recipe[section]:
            keys = [f"{name}.{key}" for name, values in recipe.items() if isinstance(values, dict) for key in values]
            raise ValueError(f"--set {assignment}: the recipe has no {path!r}. It has {keys}.")
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"--set {assignment}: {value!r} is no JSON. Quote texts: {path}='\"text\"'.") from None
        recipe = _merged(recipe, {section: {key: value}})
    return recipe | {"name": ", ".join([recipe["name"], *assignments])}


def _merged(recipe, changes):
    return recipe | {name: recipe[name] | values for name, values in changes.items()}


def _rows(catalogue, split, count):
    rows = catalogue.splits[split]
    return rows if count is None else rows.select(range(min(count, len(rows))))


def _product_rows(catalogue, rows):
    row_of = {product: row for row, product in enumerate(catalogue.product_ids)}
    return np.array([row_of[product] for product in rows["product"][:]])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="A JSON file, such as those in examples/study/recipes.")
    parser.add_argument("--data", required=True, help="A folder with sequences.")
    parser.add_argument("--encoder", required=True, help="A sentence-transformers model.")
    parser.add_argument("--max_seq_length", type=int, default=64, help="Tokens of a text that the encoder reads.")
    parser.add_argument("--out", default="runs/study", help="Folder of results.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--set", action="append", default=[], help="Another value, such as model.width=96; may be repeated."
    )
    parser.add_argument("--validation_only", action="store_true", help="Rank validation rows; test rows stay unseen.")
    parser.add_argument("--quick", action="store_true", help="A tiny model, one epoch on a few rows; says nothing.")
    args = parser.parse_args(arguments)
    logging.set_verbosity_error()
    commit(TRAINING_CODE)  # before anything that takes time, during which files may change
    recipe, catalogue = changed(read_recipe(args.recipe), args.set), load_catalogue(args.data)
    embeddings, described = embed(catalogue, "sentence encoder", args.out, args.encoder, args.max_seq_length)
    accuracy(catalogue, embeddings, described, args.out, recipe, args.seeds, args.quick, args.validation_only)
    print(f"Tables: {write_accuracy_tables(args.out)}")


if __name__ == "__main__":
    main()
