"""Training a dual tower on (query, product) pairs: one encoder for both sides, softmax over the products of a batch."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from product_files import stream_pairs
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from sentence_transformers.util import all_gather, all_gather_with_grad
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn

from rqsid.sid_tokenizer.files import read_json

# High for a table of embeddings, because only few of its rows see a gradient in a step.
LEARNING_RATES = {"table": 0.05, "encoder": 2e-5}


class SampledSoftmaxLoss(nn.Module):
    r"""
    Softmax over the products of the batch, of all processes together, corrected for how often each is drawn into one.

    The plain in-batch softmax (Henderson et al. 2017, arXiv:1705.00652) learns \\(\log P(i | q) - \log P(i)\\), because a
    popular product is a negative in most batches; subtracting \\(\log P(i)\\) from the logits in training leaves
    \\(\log P(i | q)\\) (Yi et al. 2019, "Sampling-bias-corrected neural modeling for large corpus item recommendations").
    Where a batch holds a product twice, the second is no negative of the first.

    Args:
        model (`SentenceTransformer`):
            Both towers. Its embeddings have length one.
        log_probabilities (`torch.Tensor`):
            Log of the share that each product has of the pairs. Shape: (N,).
        scale (`float`):
            Factor on the inner products: the inverse of the softmax's temperature.
    """

    def __init__(self, model, log_probabilities, scale):
        super().__init__()
        self.model = model
        self.register_buffer("log_probabilities", log_probabilities, persistent=False)
        self.scale = scale

    def forward(self, sentence_features, labels):
        """
        Args:
            sentence_features (iterable of two `dict`):
                Tokenized queries and products, B of each.
            labels (`torch.LongTensor`):
                Rows of the products in `log_probabilities`. Shape: (B,).

        Returns:
            `torch.Tensor`: the mean cross-entropy over the B queries of this process, a scalar.
        """
        queries, products = (self.model(features)["sentence_embedding"] for features in sentence_features)
        all_labels, rank = labels, 0
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            products, all_labels = all_gather_with_grad(products), all_gather(labels)
            rank = torch.distributed.get_rank()
        own = rank * len(labels) + torch.arange(len(labels), device=labels.device)
        logits = self.scale * queries @ products.T - self.log_probabilities[all_labels]
        repeated = labels[:, None] == all_labels[None, :]
        repeated[torch.arange(len(labels), device=labels.device), own] = False
        return nn.functional.cross_entropy(logits.masked_fill(repeated, -torch.inf), own)


@dataclass
class PairCollator(SentenceTransformerDataCollator):
    """Looks the text of each pair's product up, so that no text is kept once per pair."""

    product_texts: pa.Array | None = None

    def __call__(self, features):
        rows = [
            {"query": row["query"], "product": self.product_texts[row["label"]].as_py(), "label": row["label"]}
            for row in features
        ]
        return super().__call__(rows)


def train_tower(script, args, make_products):
    """
    Trains a dual tower and saves it in the folder `model` of `args.output_dir`; does nothing if that is there, complete,
    and trained with the same arguments.

    Args:
        script (`ScriptArguments`):
            Where pairs and encoder are, and what to train.
        args (`SentenceTransformerTrainingArguments`):
            How to train. `learning_rate` may be `None`.
        make_products (`Callable`):
            Gives a new iterator of [`stream_products`].

    Returns:
        `pathlib.Path`: the folder of the model.

    Raises:
        `ValueError`: if the folder holds a model that was trained otherwise, a pair has a product that is not among the
            products, or pairs do not fill a batch.
    """
    folder = Path(args.output_dir) / "model"
    how = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "seed")
    what = ("pairs", "products", "encoder", "id_column", "text_columns", "query_prompt", "product_prompt")
    what += ("max_seq_length", "embedding_dim", "vocab_size", "scale")
    wanted = {name: getattr(script, name) for name in what} | {name: getattr(args, name) for name in how}
    if folder.exists():
        record = folder / "training.json"
        found = read_json(record) if record.is_file() else {}
        for name, value in wanted.items():
            if name not in found or found[name] != value:
                raise ValueError(
                    f"{folder} holds a model that was trained with {name}={found.get(name)!r}, and now {name} is {value!r}. "
                    "Choose another --output_dir, or move the model away."
                )
        print(f"{folder} is trained already.")
        return folder

    batch_rows = args.per_device_train_batch_size * args.world_size
    queries, labels, product_texts = _read_pairs(script, make_products)
    if batch_rows < 2 or len(queries) < batch_rows:
        raise ValueError(
            f"{len(queries)} pairs do not fill a batch of {batch_rows} ({args.world_size} processes), or there is no negative "
            "in one, because negatives are the other products of a batch. Change --per_device_train_batch_size."
        )
    if script.encoder is not None:
        model = SentenceTransformer(script.encoder, device=str(args.device))
    else:
        model = _make_table(pa.chunked_array([queries, product_texts]), script, args)
    if not any(isinstance(module, Normalize) for module in model):
        model.append(Normalize())
    configure(model, script)
    if args.learning_rate is None:
        args.learning_rate = LEARNING_RATES["table" if isinstance(model[0], StaticEmbedding) else "encoder"]
    # A short last batch has few negatives, and batches of different sizes cannot be gathered.
    args.dataloader_drop_last = True

    counts = torch.from_numpy(np.bincount(labels, minlength=len(product_texts)))
    loss = SampledSoftmaxLoss(model, torch.log(counts / len(labels)), script.scale)
    prompts = {"query": model.prompts.get("query"), "product": model.prompts.get("document")}
    trainer = SentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=Dataset(pa.table({"query": queries, "label": labels})),
        loss=loss,
        data_collator=PairCollator(model.preprocess, prompts=prompts, product_texts=product_texts),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.is_world_process_zero():
        partial = folder.with_name("model.tmp")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(str(partial))
        (partial / "training.json").write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
        os.rename(partial, folder)
    trainer.accelerator.wait_for_everyone()
    return folder


def configure(model, script):
    """
    Sets what the script's arguments say about how a model reads texts; what they leave out stays as the model has it.
    """
    for name, prompt in (("query", script.query_prompt), ("document", script.product_prompt)):
        if prompt is not None:
            model.prompts[name] = prompt
    if script.max_seq_length is not None and not isinstance(model[0], StaticEmbedding):
        model.max_seq_length = script.max_seq_length


def _read_pairs(script, make_products):
    """Returns the queries, the row of each pair's product in the texts, and the texts of all products with a pair."""
    pairs = pa.concat_tables(stream_pairs(script.pairs, script.id_column)).combine_chunks()
    products = pairs["product_id"].combine_chunks().dictionary_encode()
    rows, texts = [], []
    for table in make_products():
        found = pc.index_in(table["product_id"], value_set=products.dictionary)
        rows.append(found.drop_null().to_numpy())
        texts.append(table["text"].filter(found.is_valid()).cast(pa.large_string()))
    rows, texts = np.concatenate(rows), pa.chunked_array(chunk for text in texts for chunk in text.chunks)
    labels = products.indices.to_numpy()
    missing = np.isin(labels, rows, invert=True)
    if missing.any():
        pair = int(missing.argmax())
        raise ValueError(
            f"{script.pairs}, row {pair} (rows count from 0): product {pairs['product_id'][pair].as_py()!r} is not in "
            f"{script.products} ({missing.sum()} of {len(labels)} pairs have such a product). Add the products or remove the "
            "pairs; if ids should match, look for a different spelling, such as lost leading zeros."
        )
    texts = texts.take(np.argsort(rows)).combine_chunks()
    return pairs["query"].cast(pa.large_string()).combine_chunks(), labels.astype(np.int64), texts


def _make_table(texts, script, args):
    """A table of embeddings of the subwords of `texts`, averaged. Bytes are in the vocabulary, so no word is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=script.vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((chunk.to_pylist() for chunk in _chunks(texts)), trainer)
    # Processes must not depend on breaking ties alike.
    tokenizer = Tokenizer.from_str(broadcast_object_list([tokenizer.to_str()])[0])
    generator = torch.Generator().manual_seed(args.seed)
    weights = torch.randn(tokenizer.get_vocab_size(), script.embedding_dim, generator=generator)
    return SentenceTransformer(
        modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device=str(args.device)
    )


def _chunks(texts, rows=10_000):
    for start in range(0, len(texts), rows):
        yield texts.slice(start, rows)
