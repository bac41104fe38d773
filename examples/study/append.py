"""
Experiment 8, change: products that join the catalog of a finished model. Codebooks are fitted and the model is trained
without them; then they are appended, encoded by the codebooks as these are, and every test row is searched with the weights
as these are. Beside it stands a model of the same seed that was trained with all products, on the same rows.

    seen products -> codebooks -> catalog -> model
    appended products -> codebooks (frozen) -> ProductCatalog.append -> search by the same model
"""

import numpy as np
from append_split import draw, row_kinds, without
from append_text import text_only
from cells import run_cells
from codes import head_and_tail, make_codes
from training import TOP_K, describe_training, fit_model, rank_rows, ranks_of, user_numbers
from training_cells import LAYERS, SEEDS, SIZE, TRAINING_CODE, UNPRUNED, cell_settings, papers_top_k

SHARE = 0.05
WITHOUT, ALL = "seen products", "all products"  # what codebooks and model know


def append(catalogue, embeddings, described, out, size=SIZE, layers=LAYERS, seeds=SEEDS, quick=False, changes=None):
    """
    Experiment 8; two cells for each arm (unpruned, top 9.8 % of the second layer's codes pruned) and seed, which draws the
    products that are appended, too. Arguments and result as of [`remedies`].

    Raises:
        `ValueError`: for embeddings other than a sentence encoder's: they were trained on purchases of what is left out.
    """
    if described.get("kind") != "sentence encoder":
        raise ValueError(
            f"The embeddings are of the kind {described.get('kind')!r}, trained on purchases of the products that training "
            "must not know. Pass those of a sentence encoder: --encoder, and no --embeddings."
        )
    top_k = papers_top_k(size)
    pruning = {"strategy": "top_k", "layer": 1, "top_k": top_k}
    arms = [UNPRUNED, UNPRUNED | {"name": f"top {top_k} of {size} pruned", "pruning": pruning}]
    cells = [
        cell_settings(catalogue, described, arm, "llama", size, layers, seed, quick, changes)
        | {"share": SHARE, "trained_on": trained_on}
        for arm in arms[: 1 if quick else None]
        for seed in seeds
        for trained_on in (WITHOUT, ALL)
    ]

    def compute(settings, checkpoint_dir):
        return append_cell(settings, checkpoint_dir, catalogue, embeddings, out)

    return run_cells(out, "append", cells, compute, TRAINING_CODE)


def append_cell(settings, checkpoint_dir, catalogue, embeddings, out):
    """
    Args:
        settings, checkpoint_dir, catalogue, embeddings, out:
            As for [`train_cell`] and [`make_codes`]; `trained_on` says whether the model knows the appended products.

    Returns:
        `dict`, JSON-able: what [`train_cell`] returns, and `kinds`, a letter for each test row: `a` if its product is one of
        the appended, else `h` if its history has one of them, else `s`. Where they were appended also `placed` and `paths`
        of [`append_products`], the latter for each row and `-` where its product was seen; `new_first`, item ranks if appended
        products came first rather than last among those that share a SID; and `text_only` of [`text_only`].
    """
    appended = draw(len(catalogue.product_ids), settings["share"], settings["seed"])
    seen = without(catalogue, appended)
    if settings["trained_on"] == ALL:
        part, order = catalogue, np.arange(len(catalogue.product_ids))
    else:
        part, order = seen, np.append(np.setdiff1d(np.arange(len(catalogue.product_ids)), appended), appended)
    num_known = len(part.product_ids)

    def fit_codes(part, embeddings):
        names = ("quantizer", "codebook_size", "layers", "seed")
        options = {name: settings[name] for name in names} | {"init": settings["arm"]["init"]}
        return make_codes(part, embeddings, settings["embeddings"], out, **options)

    known = embeddings[order[:num_known]]
    trainer = fit_model(settings, checkpoint_dir, part, fit_codes(part, known), known)
    tokenizer = trainer.processing_class
    ids = [catalogue.product_ids[row] for row in order[num_known:]]
    placed, paths = append_products(tokenizer, ids, embeddings[order[num_known:]]) if ids else ({}, "")

    test = catalogue.splits["test"]
    test = test.select(range(min(len(test), settings["training"]["test_rows"] or len(test))))
    products, sids, labels, search_seconds = rank_rows(trainer, test)
    # The groups of the other experiments: all products, unpruned codes of codebooks that know all.
    base = fit_codes(catalogue, embeddings)
    rule = f"{settings['share']:.0%} of the products, drawn by the seed, join the catalog after codebooks were fitted and the model was"
    result = {
        "item_ranks": ranks_of(products, labels),
        "sid_ranks": ranks_of(sids, tokenizer.catalog.sid_rows(labels)),
        "users": user_numbers(test),
        "kinds": row_kinds(test, {catalogue.product_ids[row] for row in appended}),
        "groups": head_and_tail(base.codes, base.sizes, catalogue.popularity, order[labels]),
        "search_seconds": search_seconds,
        **describe_training(trainer),
        "about": catalogue.describe() | {"change": f"{rule} trained without them; nothing is trained again"},
    }
    if ids:
        tokenizer.catalog.update_popularity(ids, np.full(len(ids), tokenizer.catalog.popularity.max() + 1))
        result |= {
            "placed": placed,
            "paths": "".join(paths[label - num_known] if label >= num_known else "-" for label in labels),
            "new_first": ranks_of(tokenizer.catalog.expand_sids(sids, TOP_K)[0], labels),
            "text_only": text_only(catalogue, embeddings, seen.splits["validation"], test),
        }
    return result


def append_products(tokenizer, product_ids, embeddings):
    """
    Appends products to the tokenizer's catalog, which gives them the SIDs of their codes.

    Args:
        tokenizer ([`SIDTokenizer`]): Of a trained model.
        product_ids (`list[str]`): m ids.
        embeddings (`np.ndarray`): Shape: (m, D).

    Returns:
        `tuple[dict, str]`: `products`, how many there are, and `on_taken_sids`, how many got a SID that a product had already;
        and a letter for each: `f` if training purchases had the full SID, `p` if they had its first two tokens, else `n`.
    """
    catalog = tokenizer.catalog
    trained = set(_token_lists(tokenizer, np.flatnonzero(catalog.popularity > 0)))
    prefixes = {tokens[:2] for tokens in trained}
    num_sids = catalog.num_sids
    rows = catalog.append(product_ids, embeddings=embeddings, quantizer=tokenizer.quantizer)
    paths = [
        "f" if tokens in trained else "p" if tokens[:2] in prefixes else "n"
        for tokens in _token_lists(tokenizer, rows)
    ]
    taken = int((catalog.sid_rows(rows) < num_sids).sum())
    counts = {path: paths.count(path) for path in "fpn"}
    return {"products": len(rows), "on_taken_sids": taken, "paths": counts}, "".join(paths)


def _token_lists(tokenizer, product_rows):
    tokens = tokenizer.sid_sequences(tokenizer.catalog.sid_rows(product_rows)).tolist()
    return [tuple(token for token in sid if token >= 0) for sid in tokens]
