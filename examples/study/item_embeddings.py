"""Embeddings of a catalogue, made once and kept: by a sentence encoder as it is, or by a dual tower trained on the log."""

import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from catalogues import import_example

from rqsid.sid_tokenizer.files import replace_atomically

KINDS = ("sentence encoder", "dual tower")
HISTORY_TITLES = 5  # of the latest products, in the query of a tower; of more, the mean of all words says less
TOWER = {"num_train_epochs": 3, "per_device_train_batch_size": 256, "embedding_dim": 64, "scale": 16.0}


def embed(catalogue, kind, out, encoder=None, max_seq_length=128, seed=0):
    """
    Args:
        catalogue ([`Catalogue`]):
            Of N products.
        kind (`str`):
            `"sentence encoder"`: each product's text by `encoder`, which is not trained. `"dual tower"`: trained on the
            training rows, query and titles of the latest history on one side, the product's text on the other; for
            completejourney the tower of the quick start.
        out (`str` or `os.PathLike`):
            Folder of the study. A file in its folder `embeddings` is made once for each catalogue, encoder and seed.
        encoder (`str`, *optional*):
            A sentence-transformers model, local or on the Hub.
        max_seq_length (`int`, *optional*, defaults to 128):
            Tokens of a text that the encoder reads; titles, brands and categories stand first.
        seed (`int`, *optional*, defaults to 0):
            Of the tower.

    Returns:
        `tuple[np.ndarray, dict]`: the embeddings, float32, shape (N, D); and what a cell that depends on them carries.

    Raises:
        `ValueError`: for another kind, an encoder that is missing, or a catalogue without training rows for a tower.
    """
    if kind not in KINDS:
        raise ValueError(f"The embeddings {kind!r} are unknown. Choose one of {KINDS}.")
    if kind == "sentence encoder" and not encoder:
        raise ValueError("Sentence embeddings need --encoder: a sentence-transformers model, local or on the Hub.")
    if kind == "sentence encoder":
        wanted = {
            "kind": kind,
            "data": catalogue.settings(),
            "encoder": str(encoder),
            "max_seq_length": max_seq_length,
        }
    else:
        wanted = tower_settings(catalogue, seed)
    path = _path(out, wanted)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"embedding {len(catalogue.texts)} products: {kind}", flush=True)
        if kind == "sentence encoder":
            embeddings = _encode(encoder, catalogue.texts, max_seq_length)
        else:
            embeddings = _embed_products(_make_tower(catalogue, path.with_suffix(""), seed), catalogue)
        with replace_atomically(path) as temporary, open(temporary, "wb") as file:
            np.save(file, embeddings.astype(np.float32), allow_pickle=False)
    embeddings = np.load(path, allow_pickle=False)
    digest = hashlib.sha256(embeddings.tobytes()).hexdigest()[:12]
    of_encoder = f"{encoder_name(encoder)}, first {max_seq_length} tokens" if encoder else ""
    label = of_encoder if kind == "sentence encoder" else f"trained on the log, seed {seed}"
    return embeddings, {"kind": kind, "of": label, "dim": embeddings.shape[1], "digest": digest}


def tower_settings(catalogue, seed=0):
    """What the dual tower of a catalogue depends on, JSON-able."""
    how = TOWER if catalogue.purchases is None else {"of": "examples/quickstart/dual_tower.py"}
    wanted = {"kind": "dual tower", "data": catalogue.settings(), "seed": seed, **how}
    # The same purchases with and without their queries have one digest, but not one tower.
    return wanted | ({"queries": "none"} if catalogue.query_source == "none" else {})


def load_tower(catalogue, out, seed=0):
    """
    The dual tower whose embeddings [`embed`] gives; it is trained if it is not there.

    Args:
        catalogue ([`Catalogue`]):
            Of N products.
        out (`str` or `os.PathLike`):
            Folder of the study.
        seed (`int`, *optional*, defaults to 0):
            Of the tower.

    Returns:
        `tuple[SentenceTransformer, np.ndarray, dict]`: the tower, for [`query_encoder`]; the products' embeddings, float32, shape
        (N, D); and what a table says of it: `dim`, `digest` of the embeddings, `parameters`, and `cpu_seconds` of its training,
        `None` if that was not kept.

    Raises:
        `ValueError`: if there are embeddings of a tower that was not kept, or no tower can be trained; see [`embed`].
    """
    from sentence_transformers import SentenceTransformer

    embeddings, described = embed(catalogue, "dual tower", out, seed=seed)
    path = _path(out, tower_settings(catalogue, seed))
    folder = path.with_suffix("")
    if not (folder / "model").is_dir():
        raise ValueError(
            f"{path} holds the products' embeddings of a tower that was not kept, so that no query can be embedded. Move the "
            "file away; tower and embeddings are then made anew."
        )
    tower, cost = SentenceTransformer(str(folder / "model")), folder / "cost.json"
    return (
        tower,
        embeddings,
        {
            "dim": described["dim"],
            "digest": described["digest"],
            "parameters": sum(parameter.numel() for parameter in tower.parameters()),
            "cpu_seconds": json.loads(cost.read_text())["cpu_seconds"] if cost.is_file() else None,
        },
    )


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


def encoder_name(encoder):
    """As on the Hub; of a local folder the name, that of the package for one that lies in a wheel."""
    path = Path(str(encoder))
    if not path.is_dir():
        return str(encoder)
    return path.resolve().parent.name if path.name in ("model", "") else path.name


def _encode(encoder, texts, max_seq_length=None):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(encoder))
    if max_seq_length is not None:
        model.max_seq_length = max_seq_length
    return model.encode_document(texts, batch_size=64, convert_to_numpy=True, show_progress_bar=False)


def _path(out, wanted):
    name = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]
    return Path(out) / "embeddings" / f"{name}.npy"


def _embed_products(folder, catalogue):
    """The tower of the quick start reads features of its products, others read their texts."""
    from sentence_transformers import SentenceTransformer

    tower = SentenceTransformer(str(folder))
    if catalogue.purchases is not None:
        return import_example("quickstart", "dual_tower").embed_products(tower, catalogue.purchases.products)
    return tower.encode_document(catalogue.texts, batch_size=64, convert_to_numpy=True, show_progress_bar=False)


def _query_texts(rows, title_of):
    """Query, profile and the titles of the latest products of the history."""
    return [
        " ".join([query, profile, *(title_of[product] for product in history[-HISTORY_TITLES:])]).strip()
        for query, profile, history in zip(rows["query"][:], rows["profile"][:], rows["history"][:], strict=True)
    ]


def _make_tower(catalogue, folder, seed):
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
