"""Product embeddings from a dual tower: queries in context on one side, products on the other.

The default is small enough to train in under a minute on a CPU: one table of token embeddings, averaged
(`StaticEmbedding`), for both towers. Its texts are not sentences but lists of tokens split at spaces, because most
products share their title with another: `pid_1026118` is one product, `mfr_69` its manufacturer, and a product that a
household bought enters the query's text by the same token.
"""

import re
import tempfile
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import PrinterCallback

UNKNOWN_TOKEN = "[UNK]"
# Tells the tokenizer made here from that of any other static model.
FEATURE_TOKEN = "[FEATURES]"


class SampledSoftmaxLoss(nn.Module):
    r"""
    Softmax over the products of the batch, corrected for how often each is drawn into one.

    As `MultipleNegativesRankingLoss` (Henderson et al. 2017, arXiv:1705.00652), with two differences. A popular
    product is a negative in most batches, so the plain loss learns \\(\log P(i | q) - \log P(i)\\), and ranking by it
    demotes what people buy; subtracting \\(\log P(i)\\) from the logits in training leaves \\(\log P(i | q)\\) (Yi et
    al. 2019, "Sampling-bias-corrected neural modeling for large corpus item recommendations"). And where a batch holds
    a product twice, the second is no negative of the first.

    Args:
        model (`SentenceTransformer`):
            Both towers.
        log_probabilities (`torch.Tensor` of shape `(N,)`):
            Log of the share that each product has of the training targets.
        scale (`float`, *optional*, defaults to 16.0):
            Factor on the inner products: the inverse of the softmax's temperature.
    """

    def __init__(self, model, log_probabilities, scale=16.0):
        super().__init__()
        self.model = model
        self.register_buffer("log_probabilities", log_probabilities, persistent=False)
        self.scale = scale

    def forward(self, sentence_features, labels):
        """
        Args:
            sentence_features (iterable of two `dict`):
                Tokenized queries and products, `B` of each.
            labels (`torch.LongTensor` of shape `(B,)`):
                Rows of the products in the catalogue.

        Returns:
            `torch.Tensor`: the mean cross-entropy, a scalar.
        """
        queries, products = (self.model(features)["sentence_embedding"] for features in sentence_features)
        logits = self.scale * queries @ products.T - self.log_probabilities[labels]
        same_product = labels[:, None] == labels[None, :]
        logits = logits.masked_fill(same_product.fill_diagonal_(False), -torch.inf)
        return nn.functional.cross_entropy(logits, torch.arange(len(labels), device=labels.device))


def train_dual_tower(
    train, products, dim=128, seed=0, num_epochs=3, batch_size=1024, learning_rate=0.05, scale=16.0, encoder=None
):
    """
    Trains a dual tower on (query in context, product bought) pairs, or loads an encoder.

    The tokenizer, its vocabulary and the popularity correction come from `train` and `products` alone.

    Args:
        train (`datasets.Dataset`):
            Training examples of [`Purchases`].
        products (`datasets.Dataset`):
            Its catalogue, of `N` products.
        dim (`int`, *optional*, defaults to 128):
            Dimension of the embeddings.
        seed (`int`, *optional*, defaults to 0):
            Seed of initialisation and batches.
        num_epochs (`int`, *optional*, defaults to 3):
            Passes over `train`.
        batch_size (`int`, *optional*, defaults to 1024):
            Pairs a step; each has the batch's other products as negatives.
        learning_rate (`float`, *optional*, defaults to 0.05):
            Peak learning rate of AdamW. High, because only few rows of the table see a gradient in a step.
        scale (`float`, *optional*, defaults to 16.0):
            See [`SampledSoftmaxLoss`].
        encoder (`str`, *optional*):
            Name or path of a sentence-transformers model to use instead. It is loaded **as it is, and not trained**,
            so the other arguments have no effect; it reads titles and queries as plain text, which leaves products of
            the same title with the same embedding (see [`duplicate_share`]).

    Returns:
        `SentenceTransformer`: for [`embed_products`] and [`embed_queries`]. Embeddings of the trained model have length
        one.

    Raises:
        ValueError: `train` or `batch_size` is too small to hold a negative, or a target or a history has a product
            that the catalogue lacks.
    """
    if encoder is not None:
        return SentenceTransformer(encoder)
    if min(len(train), batch_size) < 2:
        raise ValueError(
            f"{len(train)} examples in batches of {batch_size} leave no negative, because those are the other products "
            "of a batch; give at least 2 of both"
        )
    product_row = {product: row for row, product in enumerate(products["product_id"][:])}
    bought = train["product"][:]
    unknown = set(bought) - product_row.keys()
    if unknown:
        raise ValueError(f"{len(unknown)} products of train are not in the catalogue, for instance {min(unknown)!r}")

    target = np.array([product_row[product] for product in bought])
    query_texts = _query_texts(train, products)
    product_texts = _product_texts(products)

    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(
        vocab_size=10_000_000, special_tokens=[UNKNOWN_TOKEN, FEATURE_TOKEN], show_progress=False
    )
    tokenizer.train_from_iterator([*product_texts, *query_texts], trainer)
    weights = torch.randn(tokenizer.get_vocab_size(), dim, generator=torch.Generator().manual_seed(seed))
    # What training never saw says nothing: it takes no part in a mean.
    weights[tokenizer.token_to_id(UNKNOWN_TOKEN)] = 0
    static = StaticEmbedding(tokenizer, embedding_weights=weights)
    # On the CPU: a step is a few lookups and one product of two small matrices.
    model = SentenceTransformer(modules=[static, Normalize()], device="cpu")

    counts = torch.bincount(torch.as_tensor(target), minlength=len(products))
    loss = SampledSoftmaxLoss(model, torch.log(counts.clamp(min=1) / len(train)), scale)
    # Texts are tokenized once, not in every epoch: left to the model's own collator, that and its check of every
    # string for an image or a file name take longer than the training.
    product_tokens = _tokenize(static, product_texts).take(pa.array(target))
    pairs = pa.table({"query": _tokenize(static, query_texts), "product": product_tokens, "label": target})
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            num_train_epochs=num_epochs,
            per_device_train_batch_size=min(batch_size, len(train)),
            # A short last batch would have few negatives.
            dataloader_drop_last=True,
            dataloader_pin_memory=False,
            learning_rate=learning_rate,
            warmup_steps=0.05,
            max_grad_norm=0.0,
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
        )
        trainer = SentenceTransformerTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset(pairs),
            loss=loss,
            data_collator=SentenceTransformerDataCollator(preprocess_fn=_token_bags),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model.eval()


def embed_products(model, products):
    """
    Embeds the catalogue.

    Args:
        model (`SentenceTransformer`):
            A model of [`train_dual_tower`].
        products (`datasets.Dataset`):
            Catalogue of [`Purchases`].

    Returns:
        `np.ndarray` of shape `(N, D)`, float32.
    """
    texts = _product_texts(products) if _reads_features(model) else products["title"][:]
    return model.encode(texts, batch_size=256, show_progress_bar=False, convert_to_numpy=True)


def embed_queries(model, examples, products):
    """
    Embeds queries in their context: profile, and what the history holds of the query's type.

    An encoder that was not trained here gets the query alone.

    Args:
        model (`SentenceTransformer`):
            A model of [`train_dual_tower`].
        examples (`datasets.Dataset`):
            `B` examples of [`Purchases`].
        products (`datasets.Dataset`):
            Its catalogue.

    Returns:
        `np.ndarray` of shape `(B, D)`, float32.
    """
    texts = _query_texts(examples, products) if _reads_features(model) else examples["query"][:]
    return model.encode(texts, batch_size=256, show_progress_bar=False, convert_to_numpy=True)


def load_embeddings(path, num_products):
    """
    Reads product embeddings made elsewhere.

    Args:
        path (`str` or `os.PathLike`):
            A `.npy` file, or a `.safetensors` file with one tensor.
        num_products (`int`):
            Rows to expect: one a product, in the order of the catalogue.

    Returns:
        `np.ndarray` of shape `(N, D)`, float32.

    Raises:
        ValueError: neither suffix, several tensors, not two-dimensional, not numbers, another number of rows, or
            values that are not finite.
    """
    suffix = Path(path).suffix
    if suffix == ".npy":
        embeddings = np.load(path, allow_pickle=False)
        if embeddings.dtype.kind not in "fiu":
            raise ValueError(f"{path} holds {embeddings.dtype}, not numbers")
    elif suffix == ".safetensors":
        tensors = load_file(path)
        if len(tensors) != 1:
            raise ValueError(f"{path} holds the tensors {sorted(tensors)}; save the embeddings alone")
        embeddings = next(iter(tensors.values())).float().numpy()
    else:
        raise ValueError(f"cannot read embeddings from {path}: the suffix must be .npy or .safetensors")
    if embeddings.ndim != 2:
        raise ValueError(f"{path} holds an array of shape {embeddings.shape}; expected (products, dimension)")
    if len(embeddings) != num_products:
        raise ValueError(
            f"{path} has {len(embeddings)} rows for {num_products} products; give one row a product, in the order of products.csv in the output folder"
        )
    with np.errstate(over="ignore"):
        embeddings = embeddings.astype(np.float32)
    not_finite = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(not_finite):
        raise ValueError(f"{path}: {len(not_finite)} rows are not finite in float32, the first is row {not_finite[0]}")
    return embeddings


def duplicate_share(embeddings):
    """
    The share of products whose embedding is identical, bit by bit, to another product's.

    No quantizer can tell such products apart: they collide in every layer.

    Args:
        embeddings (`np.ndarray` of shape `(N, D)`):
            Product embeddings.

    Returns:
        `float`
    """
    counts = np.unique(embeddings, axis=0, return_counts=True)[1]
    return float(counts[counts > 1].sum() / len(embeddings))


def _reads_features(model):
    return isinstance(model[0], StaticEmbedding) and model[0].tokenizer.token_to_id(FEATURE_TOKEN) is not None


def _tokenize(static, texts):
    """Token ids of each text, as a column."""
    features = static.preprocess(texts)
    offsets = np.append(features["offsets"].numpy(), len(features["input_ids"]))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(features["input_ids"].numpy()))


def _token_bags(token_ids, **kwargs):
    """What `StaticEmbedding.preprocess` makes of texts, made of the ids of their tokens."""
    lengths = torch.tensor([len(ids) for ids in token_ids])
    return {
        "input_ids": torch.tensor(list(chain.from_iterable(token_ids))),
        "offsets": lengths.cumsum(0) - lengths,
    }


def _token(kind, value):
    return f"{kind}_{value.replace(' ', '_')}"


def _words(text):
    return re.findall(r"\w+", text)


def _product_texts(products):
    texts = []
    columns = ("product_id", "manufacturer", "type", "category", "package_size", "brand")
    for product_id, manufacturer, type_, category, size, brand in zip(*(products[c][:] for c in columns), strict=True):
        features = [
            _token("pid", product_id),
            _token("mfr", manufacturer),
            _token("type", type_),
            _token("category", category),
            # Products of one manufacturer and type share this one: a brand's product line.
            _token("line", f"{manufacturer} {type_}"),
            _token("size", size),
            _token("brand", brand),
        ]
        texts.append(" ".join(features + _words(type_)))
    return texts


def _query_texts(examples, products):
    type_of = dict(zip(products["product_id"][:], products["type"][:], strict=True))
    queries, profiles, histories = (examples[column][:] for column in ("query", "profile", "history"))
    unknown = set(chain.from_iterable(histories)) - type_of.keys()
    if unknown:
        raise ValueError(f"{len(unknown)} products of histories are not in the catalogue, such as {min(unknown)!r}")
    texts = []
    for query, profile, history in zip(queries, profiles, histories, strict=True):
        features = [_token("type", query), *_words(query)]
        features += [_token("profile", part) for part in profile.split(", ")]
        # Of the history, only what is of the query's type, and the latest of that twice: the text becomes a mean, in
        # which all the other purchases would drown the query, and the product bought last is the best single guess.
        bought = [_token("pid", product) for product in history if type_of[product] == query]
        texts.append(" ".join(features + bought + bought[-1:]))
    return texts
