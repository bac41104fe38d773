"""Embeddings of a catalogue, made once and kept: by a sentence encoder as it is, or by a dual tower trained on the log."""

import hashlib
import json
from pathlib import Path

import numpy as np
from towers import embed_products, make_tower, tower_settings

from rqsid.sid_tokenizer.files import replace_atomically

KINDS = ("sentence encoder", "dual tower")


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
            embeddings = embed_products(make_tower(catalogue, path.with_suffix(""), seed), catalogue)
        with replace_atomically(path) as temporary, open(temporary, "wb") as file:
            np.save(file, embeddings.astype(np.float32), allow_pickle=False)
    embeddings = np.load(path, allow_pickle=False)
    digest = hashlib.sha256(embeddings.tobytes()).hexdigest()[:12]
    of_encoder = f"{encoder_name(encoder)}, first {max_seq_length} tokens" if encoder else ""
    label = of_encoder if kind == "sentence encoder" else f"trained on the log, seed {seed}"
    return embeddings, {"kind": kind, "of": label, "dim": embeddings.shape[1], "digest": digest}


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
