"""How codes are distributed over the layers: is there an hourglass, and what do collisions cost?"""

from dataclasses import asdict, dataclass

import numpy as np
import torch

from .checks import check_codes, check_weights
from .quantizer import ResidualQuantizer, ResidualQuantizerConfig
from .sid_tokens import layer_letter

HOURGLASS_THRESHOLD = -0.02
TOLERANCE = 0.01  # what a layer may differ from the next without counting as narrower or wider
NULL_SAMPLES = 200


@dataclass
class LayerStatistics:
    """
    Distribution of one layer's codes. Counts are items, or the sum of `weights` where given.

    Args:
        layer (`int`): 0-based.
        codebook_size (`int`): K.
        present (`float`): share of the (weighted) items that have a code in this layer; below 1 after pruning.
        used (`int`): codes with at least one item.
        under_used (`int`): codes with less than a tenth of the mean count, unused ones included. "Used" cannot see a code
            that serves a single outlier; this does.
        entropy (`float`): Shannon entropy in bits, -sum p log2 p.
        normalized_entropy (`float`): entropy / log2 K, in [0, 1].
        perplexity (`float`): 2^entropy, the number of equally used codes of the same entropy.
        gini (`float`): over all K codes, sum_ij |n_i - n_j| / (2 K sum n) (as in Kuai et al., arXiv 2407.21488).
        std (`float`): population standard deviation of the counts of all K codes.
        cv (`float`): std / mean count.
        top_share (`float`): share held by the most frequent 1 % of codes (at least one code).
        paths_used (`int`): distinct prefixes of this length.
        paths_possible (`int`): the product of the sizes up to this layer (an absent code counts as one more).
    """

    layer: int
    codebook_size: int
    present: float
    used: int
    under_used: int
    entropy: float
    normalized_entropy: float
    perplexity: float
    gini: float
    std: float
    cv: float
    top_share: float
    paths_used: int
    paths_possible: int

    @property
    def name(self):
        return f"{layer_letter(self.layer)} ({self.layer})"


@dataclass
class Diagnosis:
    """
    What [`diagnose`] found.

    Args:
        num_items (`int`): N.
        layers (`list[LayerStatistics]`): first layer first.
        counts (`list[np.ndarray]`): per layer the count of each code. Shape of each: (K,).
        unique_sids (`int`): distinct SIDs.
        colliding_items (`int`): items that share their SID with another.
        largest_group (`int`): items of the most crowded SID.
        mean_length (`float`): codes per SID, averaged over items.
        recall_ceiling (`dict[int, float]`): the best possible item-level Recall@k of a model that always ranks the right
            SID first, the items of a SID being listed by weight: the (weighted) share of items within the first k of
            their SID.
        hourglass_score (`float` or `None`): mean normalised entropy of the middle layers minus that of the first and the
            last; `None` with fewer than three layers.
        null_score (`float` or `None`): 0.5 % quantile of that score for uniform codes in a sample of this size.
        verdict (`str`): "hourglass", "funnel", "narrow top" or "none".
        verdict_layer (`int` or `None`): the least balanced layer that the verdict is about.
        better_optimum (`Diagnosis` or `None`): the diagnosis of a fit with relocation on the embeddings, if given.
    """

    num_items: int
    layers: list[LayerStatistics]
    counts: list[np.ndarray]
    unique_sids: int
    colliding_items: int
    largest_group: int
    mean_length: float
    recall_ceiling: dict[int, float]
    hourglass_score: float | None
    null_score: float | None
    verdict: str
    verdict_layer: int | None
    better_optimum: "Diagnosis | None" = None

    @property
    def collision_rate(self):
        """1 - unique SIDs / items."""
        return 1 - self.unique_sids / self.num_items

    @property
    def survives(self):
        """Whether a verdict of "hourglass" is still there in the better optimum; `None` without embeddings."""
        if self.better_optimum is None:
            return None
        return self.verdict == "hourglass" and self.better_optimum.verdict == "hourglass"

    def to_dict(self):
        """Everything as JSON-able values."""
        content = asdict(self)
        content["counts"] = [counts.tolist() for counts in self.counts]
        content["recall_ceiling"] = {str(k): value for k, value in self.recall_ceiling.items()}
        content["collision_rate"] = self.collision_rate
        content["better_optimum"] = self.better_optimum.to_dict() if self.better_optimum else None
        content["survives"] = self.survives
        return content

    def to_markdown(self):
        """The per-layer table and the summary below it."""
        lines = [
            "| layer | entropy | normalised | Gini | std | top 1 % | under-used | used | paths used / possible |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for layer in self.layers:
            lines.append(
                f"| {layer.name} | {layer.entropy:.2f} bits | {layer.normalized_entropy:.3f} | {layer.gini:.3f} "
                f"| {layer.std:.1f} | {layer.top_share:.1%} | {layer.under_used} | {layer.used} of {layer.codebook_size} "
                f"| {layer.paths_used} / {layer.paths_possible:,} ({layer.paths_used / layer.paths_possible:.2g}) |"
            )
        lines += ["", self.summary()]
        return "\n".join(lines)

    def summary(self):
        """Collisions, ceiling and verdict in a few sentences."""
        ceilings = ", ".join(f"@{k} {value:.3f}" for k, value in self.recall_ceiling.items())
        text = (
            f"{self.num_items} items, {self.unique_sids} unique SIDs (collision rate {self.collision_rate:.3f}), "
            f"{self.colliding_items} items share a SID, the largest group holds {self.largest_group}; mean length "
            f"{self.mean_length:.2f}. Item-level recall ceiling {ceilings}."
        )
        if self.hourglass_score is None:
            return text + " Verdict: none (fewer than three layers have no middle)."
        text += f" Hourglass score {self.hourglass_score:+.3f} (uniform codes of this sample size: {self.null_score:+.3f})."
        where = (
            "" if self.verdict_layer is None else f", layer {layer_letter(self.verdict_layer)} ({self.verdict_layer})"
        )
        text += f" Verdict: {self.verdict}{where}."
        if self.better_optimum is not None and self.verdict == "hourglass":
            text += " It survives better training." if self.survives else " Better training removes it."
        return text

    __str__ = to_markdown


def diagnose(codes, codebook_sizes, weights=None, embeddings=None):
    """
    Measures how evenly each layer uses its codes and what the collisions cost.

    Args:
        codes (`np.ndarray` or `torch.Tensor`): Shape: (N, L). -1 where a layer is absent.
        codebook_sizes (`list[int]`):
            Codes of each layer.
        weights (`np.ndarray`, *optional*): Shape: (N,).
            Weight of each item, for instance its interactions; 1 each if not given.
        embeddings (`np.ndarray` or `torch.Tensor`, *optional*): Shape: (N, D).
            If given, the embeddings are quantized again with relocation of under-used codes, and the report says
            whether an hourglass survives: a real one does, one made by a poor optimum does not.

    Returns:
        [`Diagnosis`]

    Raises:
        `ValueError`: if `codes` is empty or outside the codebooks, or `weights` has another length, a negative or
            non-finite entry, or no positive one.
    """
    codes = codes.cpu().numpy() if isinstance(codes, torch.Tensor) else np.asarray(codes)
    check_codes(codes, codebook_sizes)
    num_items, num_layers = codes.shape
    if num_items == 0:
        raise ValueError("codes hold no item. Pass the codes of at least one product.")
    weights = check_weights(weights, num_items)

    # 1. per layer
    counts, layers = [], []
    prefix, num_prefixes, possible = np.zeros(num_items, dtype=np.int64), 1, 1
    for layer, size in enumerate(codebook_sizes):
        column = codes[:, layer].astype(np.int64)
        here = column >= 0
        counts.append(np.bincount(column[here], weights=weights[here], minlength=size))
        _, prefix = np.unique(prefix * (size + 1) + column + 1, return_inverse=True)
        num_prefixes = int(prefix.max()) + 1
        possible *= 1 if not here.any() else size + int(not here.all())
        layers.append(_layer_statistics(layer, counts[-1], weights.sum(), num_prefixes, possible))

    # 2. collisions: rank of each item within its SID, heaviest first
    order = np.lexsort((-weights, prefix))
    group_sizes = np.bincount(prefix)
    starts = np.concatenate(([0], np.cumsum(group_sizes)[:-1]))
    rank = np.empty(num_items, dtype=np.int64)
    rank[order] = np.arange(num_items) - np.repeat(starts, group_sizes)
    ceiling = {k: float(weights[rank < k].sum() / weights.sum()) for k in (1, 10, 50)}

    # 3. verdict
    score, null_score, verdict, verdict_layer = _verdict(layers, counts, weights)
    diagnosis = Diagnosis(
        num_items=num_items,
        layers=layers,
        counts=counts,
        unique_sids=num_prefixes,
        colliding_items=int(group_sizes[group_sizes > 1].sum()),
        largest_group=int(group_sizes.max()),
        mean_length=float((codes >= 0).sum(1).mean()),
        recall_ceiling=ceiling,
        hourglass_score=score,
        null_score=null_score,
        verdict=verdict,
        verdict_layer=verdict_layer,
    )
    if embeddings is not None:
        if len(embeddings) != num_items:
            raise ValueError(
                f"{len(embeddings)} embeddings for {num_items} rows of codes: pass one embedding per item."
            )
        quantizer = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=list(codebook_sizes))).fit(embeddings)
        diagnosis.better_optimum = diagnose(quantizer.encode(embeddings), codebook_sizes, weights)
    return diagnosis


def _layer_statistics(layer, counts, total, paths_used, paths_possible):
    size, mass = len(counts), counts.sum()
    shares = counts[counts > 0] / mass if mass else np.ones(1)
    entropy = float(-(shares * np.log2(shares)).sum())
    ascending = np.sort(counts)
    # sum_ij |n_i - n_j| = 2 sum_i (2i - K + 1) n_(i) over ascending counts, i from 0
    gini = float(((2 * np.arange(size) - size + 1) * ascending).sum() / (size * mass)) if mass else 0.0
    return LayerStatistics(
        layer=layer,
        codebook_size=size,
        present=float(mass / total),
        used=int((counts > 0).sum()),
        under_used=int((counts < 0.1 * counts.mean()).sum()) if mass else size,
        entropy=abs(entropy),
        normalized_entropy=abs(entropy) / float(np.log2(size)) if size > 1 else 1.0,
        perplexity=float(2**entropy),
        gini=gini,
        std=float(counts.std()),
        cv=float(counts.std() / counts.mean()) if mass else 0.0,
        top_share=float(ascending[-max(1, int(np.ceil(size / 100))) :].sum() / mass) if mass else 0.0,
        paths_used=paths_used,
        paths_possible=paths_possible,
    )


def _verdict(layers, counts, weights):
    """
    An hourglass has a waist: middle layers less even than the ends on average, by more than 0.02, and one of them less even
    than either end, by more than 0.01; both by more than uniform codes in a sample of this size show. The average alone
    would call a funnel an hourglass, since one even end is enough for it. A funnel narrows towards the end, a narrow top at
    the beginning, by more than 0.02 in all.
    """
    evenness = np.array([layer.normalized_entropy for layer in layers if layer.present > 0])
    present = [layer.layer for layer in layers if layer.present > 0]
    if len(evenness) < 3:
        return None, None, "none", None
    score = float(evenness[1:-1].mean() - (evenness[0] + evenness[-1]) / 2)

    # Weighted items count as their effective number, (sum w)^2 / sum w^2 (Kish), since few heavy items vary more.
    sample_size = int(weights.sum() ** 2 / np.square(weights).sum())
    random = np.random.default_rng(0)
    null = np.stack([_null_evenness(random, sample_size, len(counts[layer])) for layer in present])
    null_score = float(np.quantile(null[1:-1].mean(0) - (null[0] + null[-1]) / 2, 0.005))

    threshold = min(HOURGLASS_THRESHOLD, float(np.quantile(null.min(0) - null.max(0), 0.005)))
    waist = min(-TOLERANCE, float(np.quantile(null.min(0) - null.max(0), 0.005)))
    has_waist = evenness[1:-1].min() < min(evenness[0], evenness[-1]) + waist
    if score < min(HOURGLASS_THRESHOLD, null_score) and has_waist:
        return score, null_score, "hourglass", present[1 + int(evenness[1:-1].argmin())]
    widens = evenness[0] < evenness[-1] + threshold and (np.diff(evenness) > -TOLERANCE).all()
    if widens or evenness[0] < evenness[1:].min() + threshold:
        return score, null_score, "narrow top", present[0]
    if evenness[-1] < evenness[0] + threshold and (np.diff(evenness) < TOLERANCE).all():
        return score, null_score, "funnel", present[-1]
    return score, null_score, "none", None


def _null_evenness(random, sample_size, size):
    if size == 1:
        return np.ones(NULL_SAMPLES)
    shares = random.multinomial(sample_size, np.full(size, 1 / size), NULL_SAMPLES) / sample_size
    logs = np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
    return -(shares * logs).sum(1) / np.log2(size)
