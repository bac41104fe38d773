"""A small model trained on synthetic purchases: unlike one of random weights it is sure of some SIDs and not of others."""

import numpy as np
import torch
from measures import synthetic_embeddings
from search_measures import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from rqsid import ResidualQuantizer, ResidualQuantizerConfig, TokenPruning

NUM_LAYERS = 4


def make_products(num_products, codebook_size, seed=0):
    """
    Embeddings in clusters of Zipf-like sizes, the codes that a `ResidualQuantizer` gives them, and a rule that prunes an eighth
    of the second layer's codes, the most frequent.

    Returns:
        `tuple`: embeddings (`np.ndarray`, (N, 32)), codes (`np.ndarray`, (N, 4)), and a fitted [`TokenPruning`].
    """
    embeddings = synthetic_embeddings(num_products, dim=32, seed=seed)
    sizes = [codebook_size] * NUM_LAYERS
    config = ResidualQuantizerConfig(codebook_sizes=sizes, preset="fast", seed=seed)
    codes = np.asarray(ResidualQuantizer(config).fit(embeddings).encode(embeddings))
    pruning = TokenPruning("top_k", layer=1, top_k=max(codebook_size // 8, 1)).fit(codes, sizes)
    return embeddings, codes, pruning


def make_product_tokenizer(codes, codebook_size, pruning=None):
    """No words to speak of: prompts are SIDs and a separator, the last of the 16 tokens before those of SIDs."""
    return make_tokenizer(16 + NUM_LAYERS * codebook_size, codes, codebook_size, pruning)


def make_purchases(embeddings, num_purchases, history_length=3, seed=0):
    """
    Rows of products bought one after the other, the last of which is to be predicted.

    A user has an anchor, drawn by popularity, which falls off as 1 / (rank + 20), and buys products with a probability
    proportional to popularity * exp(6 * cosine with the anchor).

    Args:
        embeddings (`np.ndarray`): Of unit norm. Shape: (N, D).

    Returns:
        `np.ndarray` (int64). Shape: (num_purchases, history_length + 1).
    """
    random = np.random.default_rng(seed)
    popularity = 1 / (np.random.default_rng(17).permutation(len(embeddings)) + 20)
    purchases = np.empty((num_purchases, history_length + 1), dtype=np.int64)
    for start in range(0, num_purchases, 1024):
        size = len(purchases[start : start + 1024])
        anchors = random.choice(len(embeddings), size, p=popularity / popularity.sum())
        cumulative = (np.exp(6 * embeddings[anchors] @ embeddings.T) * popularity).cumsum(axis=1)
        draws = random.random((size, history_length + 1)) * cumulative[:, -1:]
        for row in range(size):
            purchases[start + row] = np.searchsorted(cumulative[row], draws[row])
    return purchases


def make_prompts(tokenizer, histories):
    """The SIDs of the histories and a separator, padded on the left. Returns ids and mask, each (B, P)."""
    sids = tokenizer.sid_sequences(tokenizer.catalog.sid_rows(histories.reshape(-1)))
    tokens = sids.view(len(histories), -1)
    # Absent tokens go to the left, the others keep their order.
    order = (tokens >= 0).long().argsort(dim=1, stable=True)
    tokens = tokens.gather(1, order)
    mask = tokens >= 0
    tokens = tokens.masked_fill(~mask, tokenizer.pad_token_id)
    tokens, mask = tokens[:, mask.any(dim=0)], mask[:, mask.any(dim=0)]
    separator = torch.full((len(tokens), 1), tokenizer.base_size - 1)
    return torch.cat([tokens, separator], dim=1), torch.cat([mask, torch.ones_like(separator).bool()], dim=1).long()


def train(tokenizer, purchases, steps, batch_size=128, seed=0):
    """The loss is on the SID and the end token behind it, softmax over the whole vocabulary, as in `SIDTrainer`."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    random = np.random.default_rng(seed)
    losses = []
    for _ in range(steps):
        batch = purchases[random.integers(0, len(purchases), batch_size)]
        prompts, mask = make_prompts(tokenizer, batch[:, :-1])
        answers = tokenizer.sid_sequences(tokenizer.catalog.sid_rows(batch[:, -1]))
        answers = torch.cat([answers, torch.full((len(answers), 1), -1)], dim=1)
        answers[torch.arange(len(answers)), (answers >= 0).sum(dim=1)] = tokenizer.eos_token_id
        inputs = torch.cat([prompts, answers[:, :-1].clamp(min=0)], dim=1)
        # What is fed behind an end is seen by nothing that has a label.
        attention_mask = torch.cat([mask, torch.ones_like(answers[:, :-1])], dim=1)
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        logits = model(
            inputs, attention_mask=attention_mask, position_ids=positions, logits_to_keep=answers.shape[1]
        ).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return model.eval(), float(np.mean(losses[-20:]))


def share_found(found, exact):
    """Share of each row of `exact` that is in the same row of `found`. Shapes: (B, K), -1 for none. Returns (B,)."""
    hits = (exact[:, :, None] == found[:, None, :]).any(dim=2) & (exact >= 0)
    return (hits.sum(dim=1) / (exact >= 0).sum(dim=1)).numpy().astype(np.float64)
