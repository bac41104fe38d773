"""Embeddings of a catalogue, made once and kept: by a sentence encoder as it is, or by a dual tower trained on the log."""

import hashlib
import json
import sys
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
    wanted = {"kind": kind, "data": catalogue.settings()}
    if kind == "sentence encoder":
        wanted |= {"encoder": str(encoder), "max_seq_length": max_seq_length}
    else:
        wanted |= {"seed": seed, **TOWER}
    name = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]
    path = Path(out) / "embeddings" / f"{name}.npy"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"embedding {len(catalogue.texts)} products: {kind}", flush=True)
        if kind == "sentence encoder":
            embeddings = _encode(encoder, catalogue.texts, max_seq_length)
        elif catalogue.purchases is not None:
            tower = import_example("quickstart", "dual_tower")
            model = tower.train_dual_tower(catalogue.purchases.train, catalogue.purchases.products, seed=seed)
            embeddings = tower.embed_products(model, catalogue.purchases.products)
        else:
            embeddings = _encode(_train_tower(catalogue, path.parent / name, seed), catalogue.texts)
        with replace_atomically(path) as temporary, open(temporary, "wb") as file:
            np.save(file, embeddings.astype(np.float32), allow_pickle=False)
    embeddings = np.load(path, allow_pickle=False)
    digest = hashlib.sha256(embeddings.tobytes()).hexdigest()[:12]
    of_encoder = f"{encoder_name(encoder)}, first {max_seq_length} tokens" if encoder else ""
    label = of_encoder if kind == "sentence encoder" else f"trained on the log, seed {seed}"
    return embeddings, {"kind": kind, "of": label, "dim": embeddings.shape[1], "digest": digest}


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
    title_of = dict(zip(catalogue.product_ids, catalogue.titles, strict=True))
    queries = [
        " ".join([query, profile, *(title_of[product] for product in history[-HISTORY_TITLES:])]).strip()
        for query, profile, history in zip(train["query"], train["profile"], train["history"], strict=True)
    ]
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
