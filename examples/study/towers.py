"""Dual towers trained on the log: queries in their context on one side, products on the other."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from catalogues import import_example

from rqsid.sid_tokenizer.files import replace_atomically

HISTORY_TITLES = 5  # of the latest products, in the query of a tower; of more, the mean of all words says less
TOWER = {"num_train_epochs": 3, "per_device_train_batch_size": 256, "embedding_dim": 64, "scale": 16.0}


def tower_settings(catalogue, seed=0):
    """What the dual tower of a catalogue depends on, JSON-able."""
    how = TOWER if catalogue.purchases is None else {"of": "examples/quickstart/dual_tower.py"}
    wanted = {"kind": "dual tower", "data": catalogue.settings(), "seed": seed, **how}
    # The same purchases with and without their queries have one digest, but not one tower.
    return wanted | ({"queries": "none"} if catalogue.query_source == "none" else {})


def make_tower(catalogue, folder, seed):
    """Trains a tower unless it is there, and keeps what that cost. Returns the folder of the model."""
    model = folder / "model"
    if model.is_dir():
        return model
    started = time.process_time()
    if catalogue.purchases is None:
        _train_tower(catalogue, folder, seed)
    else:
        example, partial = import_example("quickstart", "dual_tower"), folder / "model.tmp"
        tower = example.train_dual_tower(catalogue.purchases.train, catalogue.purchases.products, seed=seed)
        shutil.rmtree(partial, ignore_errors=True)
        tower.save_pretrained(str(partial))
        os.replace(partial, model)
    with replace_atomically(folder / "cost.json") as temporary:
        Path(temporary).write_text(json.dumps({"cpu_seconds": round(time.process_time() - started, 1)}))
    return model


def embed_products(folder, catalogue):
    """
    Embeddings of all products, shape (N, D), by the tower in a folder. That of the quick start reads features of its products,
    others read their texts.
    """
    from sentence_transformers import SentenceTransformer

    tower = SentenceTransformer(str(folder))
    if catalogue.purchases is not None:
        return import_example("quickstart", "dual_tower").embed_products(tower, catalogue.purchases.products)
    return tower.encode_document(catalogue.texts, batch_size=64, convert_to_numpy=True, show_progress_bar=False)


def query_encoder(tower, catalogue):
    """
    Args:
        tower (`SentenceTransformer`):
            Of [`load_tower`].
        catalogue ([`Catalogue`]):
            That the tower was trained on.

    Returns:
        `Callable`: `encode(rows)` embeds what is asked for in B rows of any split, in its context and as in training: float32,
        shape (B, D). The products bought are not read. Products are looked up in tables made here, once.
    """
    if catalogue.purchases is None:
        title_of = dict(zip(catalogue.product_ids, catalogue.titles, strict=True))

        def encode(rows):
            texts = _query_texts(rows, title_of)
            return tower.encode_query(texts, batch_size=256, convert_to_numpy=True, show_progress_bar=False)

        return encode
    example, products = import_example("quickstart", "dual_tower"), catalogue.purchases.products
    row_of = {product: row for row, product in enumerate(catalogue.product_ids)}

    def encode_features(rows):
        # The example makes a table of the products that it gets, which for one row need not be all.
        read = sorted({row_of[product] for history in rows["history"][:] for product in history})
        return example.embed_queries(tower, rows, products.select(read))

    return encode_features


def _query_texts(rows, title_of):
    """Query, profile and the titles of the latest products of the history."""
    return [
        " ".join([query, profile, *(title_of[product] for product in history[-HISTORY_TITLES:])]).strip()
        for query, profile, history in zip(rows["query"][:], rows["profile"][:], rows["history"][:], strict=True)
    ]


def _train_tower(catalogue, folder, seed):
    """The tower of the embedding example, trained on this catalogue's training rows. Returns the folder of the model."""
    train = catalogue.splits["train"]
    if len(train) < TOWER["per_device_train_batch_size"]:
        raise ValueError(
            f"{len(train)} training rows do not fill a batch of {TOWER['per_device_train_batch_size']}, so that there is no "
            "dual tower. Use sentence embeddings alone: --embeddings 'sentence encoder'."
        )
    example = Path(__file__).parents[1] / "embed_products"
    sys.path.insert(0, str(example))
    try:
        from embed_products import ScriptArguments
        from product_files import stream_products
        from sentence_transformers import SentenceTransformerTrainingArguments
        from train_tower import train_tower
    finally:
        sys.path.remove(str(example))

    folder.mkdir(parents=True, exist_ok=True)
    products, pairs = str(folder / "products.parquet"), str(folder / "pairs.parquet")
    pq.write_table(pa.table({"product_id": catalogue.product_ids, "text": catalogue.texts}), products)
    queries = _query_texts(train, dict(zip(catalogue.product_ids, catalogue.titles, strict=True)))
    pq.write_table(pa.table({"query": queries, "product_id": train["product"][:]}), pairs)
    script = ScriptArguments(
        products=products,
        pairs=pairs,
        text_columns=["text"],
        embedding_dim=TOWER["embedding_dim"],
        scale=TOWER["scale"],
    )
    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=TOWER["num_train_epochs"],
        per_device_train_batch_size=TOWER["per_device_train_batch_size"],
        warmup_steps=0.05,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    args.learning_rate = None  # the example's own
    return train_tower(script, args, lambda: stream_products(products, "product_id", ["text"], 100_000))
