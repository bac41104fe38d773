"""
Makes product embeddings for a ResidualQuantizer, of a catalogue of any size.

With an encoder as it is, any model that sentence-transformers loads:

    python examples/embed_products/embed_products.py --products products.parquet --text_columns title brand \
        --encoder BAAI/bge-small-en-v1.5 --output_dir out

With a dual tower that is trained first, on pairs of a query and the product that was bought for it. Left out, `--encoder` is
a table of embeddings of subwords, which are averaged: small enough for a CPU.

    accelerate launch examples/embed_products/embed_products.py --products products.parquet --text_columns title brand \
        --pairs pairs.parquet --encoder google-bert/bert-base-uncased --num_train_epochs 1 --output_dir out

Products are parquet, CSV or JSON lines with a column `product_id` (or `--id_column`) and columns of text, or a `.txt` file
with one product a line, whose id is the number of the line, counted from 1. A pattern such as 'products/*.parquet' means all
its files, in the order of their names. Pairs have the columns `query` and `product_id`. The catalogue is streamed and never
in memory; queries and the texts of products that have a pair are. All arguments of SentenceTransformerTrainingArguments are
accepted.

In the folder `embeddings` of `--output_dir`, every shard of `--shard_rows` products becomes `embeddings-00000.safetensors`
with `product_ids-00000.parquet` beside it, or, with `--format parquet`, one file with the columns product_id and embedding.
When all are there, a manifest follows (`.manifest.json`; hidden, because datasets would take it for a data file). A run that
was interrupted goes on where it stopped when it is started again with the same arguments; the processes of `accelerate
launch` take turns at shards, and may be more or fewer than before. (`accelerate launch --cpu` starts just one process; without
accelerators use `torchrun --nproc_per_node 2` and `--use_cpu`.) Then:

    quantizer = ResidualQuantizer(config).fit("out/embeddings")
    dataset = load_dataset("parquet", data_dir="out/embeddings", split="train")  # --format parquet
    product_ids = load_product_ids("out/embeddings")  # in the order of the rows
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from product_files import check_unique, hash_strings, stream_products
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from tqdm.auto import tqdm
from train_tower import configure, train_tower
from transformers import HfArgumentParser

from rqsid.sid_tokenizer.files import read_json, replace_atomically, write_json

MANIFEST = ".manifest.json"


@dataclass
class ScriptArguments:
    products: str = field(metadata={"help": "Products: parquet, CSV, JSON lines or text, a file or a pattern."})
    pairs: str | None = field(default=None, metadata={"help": "Pairs of query and product_id to train on."})
    encoder: str | None = field(default=None, metadata={"help": "Checkpoint to train or to embed with."})
    id_column: str = field(default="product_id", metadata={"help": "Column of product ids."})
    text_columns: list[str] = field(default_factory=list, metadata={"help": "Columns that make a product's text."})
    query_prompt: str | None = field(
        default=None, metadata={"help": "Text before each query, if the encoder wants one."}
    )
    product_prompt: str | None = field(
        default=None, metadata={"help": "Text before each product, such as 'passage: '."}
    )
    max_seq_length: int | None = field(default=None, metadata={"help": "Tokens of a text that the encoder reads."})
    format: str = field(
        default="safetensors", metadata={"help": "Of the shards.", "choices": ["safetensors", "parquet"]}
    )
    dtype: str = field(default="float32", metadata={"help": "Of the shards.", "choices": ["float32", "float16"]})
    shard_rows: int = field(default=100_000, metadata={"help": "Products of a shard; one shard is held in memory."})
    embedding_dim: int = field(default=128, metadata={"help": "D, if there is no --encoder."})
    vocab_size: int = field(default=30_000, metadata={"help": "Most subwords, if there is no --encoder."})
    scale: float = field(default=16.0, metadata={"help": "Inverse temperature of the softmax in training."})


def embed_catalogue(model, make_products, num_rows, folder, config, batch_size, rank=0, world_size=1, autocast=None):
    """
    Writes the shards that `folder` lacks, and the manifest when none is missing.

    Args:
        model (`SentenceTransformer`):
            The encoder.
        make_products (`Callable`):
            Gives a new iterator of [`stream_products`] with tables of `config["shard_rows"]` rows.
        num_rows (`int`):
            The number of products, from [`check_unique`].
        folder (`pathlib.Path`):
            Where shards go.
        config (`dict`):
            What the embeddings depend on, JSON-able; every shard keeps it. Used here: `products`, `shard_rows`, `format`
            and `dtype`.
        batch_size (`int`):
            Texts that the encoder sees at once.
        rank, world_size (`int`, *optional*, default to 0 and 1):
            This process embeds the shards whose number leaves `rank` when divided by `world_size`.
        autocast (`torch.dtype`, *optional*):
            Precision to compute in.

    Raises:
        `ValueError`: if `folder` holds shards of other arguments or other products, or an embedding is not finite.
    """
    num_shards = -(-num_rows // config["shard_rows"])
    paths = [folder / f"embeddings-{shard:05}.{config['format']}" for shard in range(num_shards)]
    folder.mkdir(parents=True, exist_ok=True)
    strays = sorted({*folder.glob("embeddings-*.safetensors"), *folder.glob("embeddings-*.parquet")} - set(paths))
    if strays:
        raise ValueError(
            f"{strays[0]} is none of the {num_shards} {config['format']} shards that {num_rows} products in shards of "
            f"{config['shard_rows']} make: it is of another run. Choose another --output_dir, or remove its shards."
        )
    own = range(rank, num_shards, world_size)
    own_rows = sum(min(config["shard_rows"], num_rows - shard * config["shard_rows"]) for shard in own)
    bar = tqdm(total=own_rows, unit=" products", desc="embedding", disable=rank != 0)
    for shard, table in enumerate(make_products()):
        if shard not in own:
            continue
        rows = hashlib.sha256(hash_strings(table["product_id"]).tobytes() + hash_strings(table["text"]).tobytes())
        config_of_shard = config | {"rows": len(table), "content": rows.hexdigest()}
        if paths[shard].exists():
            _check_shard(paths[shard], config_of_shard)
            bar.update(len(table))
            continue
        # Until every shard is there, nothing may say so.
        (folder / MANIFEST).unlink(missing_ok=True)
        for target in (paths[shard], _ids_path(paths[shard])):
            # A run that was killed leaves what it had begun to write.
            for leftover in folder.glob(f"{target.name}.*.tmp"):
                leftover.unlink()
        texts = table["text"].to_pylist()
        embeddings = torch.empty(len(texts), model.get_embedding_dimension(), dtype=getattr(torch, config["dtype"]))
        for start in range(0, len(texts), 16 * batch_size):
            with torch.autocast(model.device.type, dtype=autocast, enabled=autocast is not None):
                part = model.encode_document(
                    texts[start : start + 16 * batch_size],
                    batch_size=batch_size,
                    convert_to_tensor=True,
                    show_progress_bar=False,
                )
            embeddings[start : start + len(part)] = part.cpu()
            bar.update(len(part))
        bad = torch.nonzero(~torch.isfinite(embeddings).all(1))
        if len(bad):
            row, product_id = int(bad[0]), table["product_id"][int(bad[0])].as_py()
            raise ValueError(
                f"The embedding of product {product_id!r} (row {shard * config['shard_rows'] + row}) is not finite in "
                f"{config['dtype']}. Try --dtype float32 and no --fp16; if that does not help, the encoder is broken."
            )
        _write_shard(paths[shard], table["product_id"], embeddings, config_of_shard)
    bar.close()
    # Whichever process ends last finds all shards; nobody waits.
    if all(path.exists() for path in paths):
        shards = [{"file": path.name, "rows": config["shard_rows"]} for path in paths]
        shards[-1]["rows"] = num_rows - (num_shards - 1) * config["shard_rows"]
        manifest = config | {"rows": num_rows, "dim": model.get_embedding_dimension(), "shards": shards}
        write_json(folder / MANIFEST, manifest)
        print(f"{num_rows} embeddings of {manifest['dim']} dimensions are in {folder}.")


def load_product_ids(folder):
    """
    Args:
        folder (`str` or `os.PathLike`):
            The folder `embeddings` of a finished run.

    Returns:
        `list[str]`: the product ids, in the order of the rows of the embeddings.

    Raises:
        `ValueError`: if the run was not finished, or shards and manifest do not agree.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder} has no {MANIFEST}: it is not a folder of embed_products.py, or the run was not finished. Start it "
            "again with the same arguments."
        )
    product_ids = []
    for shard in read_json(folder / MANIFEST)["shards"]:
        path = _ids_path(folder / shard["file"])
        if not path.is_file():
            raise ValueError(f"{path} is missing. Start the run again with the same arguments.")
        found = pq.read_table(path, columns=["product_id"])["product_id"].to_pylist()
        if len(found) != shard["rows"]:
            raise ValueError(f"{path} holds {len(found)} ids, the manifest says {shard['rows']}. Embed again.")
        product_ids += found
    return product_ids


def _ids_path(path):
    if path.suffix == ".parquet":
        return path
    return path.with_name(path.name.replace("embeddings-", "product_ids-")).with_suffix(".parquet")


def _write_shard(path, product_ids, embeddings, config):
    text = json.dumps(config, sort_keys=True)
    columns = {"product_id": product_ids}
    if config["format"] == "parquet":
        values = pa.array(embeddings.numpy().reshape(-1))
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(values, embeddings.shape[1])
    with replace_atomically(_ids_path(path)) as temporary:
        table = pa.table(columns).replace_schema_metadata({"config": text})
        pq.write_table(table, temporary, row_group_size=10_000)
    # Last, because a shard is complete as soon as it has this file.
    if config["format"] == "safetensors":
        with replace_atomically(path) as temporary:
            save_file({"embeddings": embeddings}, temporary, metadata={"config": text})


def _check_shard(path, wanted):
    try:
        if path.suffix == ".parquet":
            found = json.loads(pq.read_schema(path).metadata[b"config"])
        else:
            with safe_open(path, framework="pt") as file:
                found = json.loads(file.metadata()["config"])
            pq.read_schema(_ids_path(path))
    except (SafetensorError, pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} or the ids beside it cannot be read ({error}). Remove both and start again."
        ) from None
    for name, value in wanted.items():
        # The same products and weights may have moved.
        if name in ("products", "encoder") or found.get(name) == value:
            continue
        if name in ("rows", "content"):
            raise ValueError(
                f"{path} was made of other products than {wanted['products']} holds now at its rows. Choose another "
                "--output_dir, or remove the shards."
            )
        if name == "weights":
            raise ValueError(
                f"{path} was made with other weights than {wanted['encoder']} has now. Choose another --output_dir, or "
                "remove the shards."
            )
        raise ValueError(
            f"{path} was made with {name}={found.get(name)!r}, and this run has {value!r}. Repeat the arguments of the run "
            "that it is to continue, or choose another --output_dir."
        )


def _fingerprint(model):
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def main():
    parser = HfArgumentParser((ScriptArguments, SentenceTransformerTrainingArguments))
    parser.set_defaults(output_dir="", learning_rate=None, warmup_steps=0.05)
    parser.set_defaults(per_device_train_batch_size=256, per_device_eval_batch_size=256)
    script, args = parser.parse_args_into_dataclasses()
    if not args.output_dir:
        raise ValueError("Say where models and embeddings go: --output_dir FOLDER.")
    if script.pairs is None and script.encoder is None:
        raise ValueError("Pass an --encoder to embed with, --pairs to train one, or both.")
    if script.format == "parquet" and script.dtype != "float32":
        raise ValueError(f"--format parquet holds float32; --dtype {script.dtype} needs --format safetensors.")
    least = {"shard_rows": 1, "embedding_dim": 1, "vocab_size": 256}
    for name, smallest in least.items():
        if getattr(script, name) < smallest:
            raise ValueError(f"--{name} {getattr(script, name)} must be at least {smallest}.")
    if min(args.per_device_train_batch_size, args.per_device_eval_batch_size) < 1:
        raise ValueError("--per_device_train_batch_size and --per_device_eval_batch_size must be at least 1.")
    if script.scale <= 0:
        raise ValueError(f"--scale {script.scale} must be positive: it is an inverse temperature.")

    def make_products():
        return stream_products(script.products, script.id_column, script.text_columns, script.shard_rows)

    # All products before any training, so that a bad row is not found out hours later.
    num_rows = check_unique(make_products, script.products)
    encoder = script.encoder if script.pairs is None else str(train_tower(script, args, make_products))
    model = SentenceTransformer(encoder, device=str(args.device))
    configure(model, script)
    autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    config = {
        "products": script.products,
        "encoder": encoder,
        "weights": _fingerprint(model),
        "prompt": model.prompts.get("document"),
        "max_seq_length": str(model.max_seq_length),
        "precision": str(autocast or "as the encoder"),
        "id_column": script.id_column,
        "text_columns": script.text_columns,
        "shard_rows": script.shard_rows,
        "format": script.format,
        "dtype": script.dtype,
    }
    folder = Path(args.output_dir) / "embeddings"
    embed_catalogue(
        model,
        make_products,
        num_rows,
        folder,
        config,
        batch_size=args.per_device_eval_batch_size,
        rank=args.process_index,
        world_size=args.world_size,
        autocast=autocast,
    )


if __name__ == "__main__":
    main()
