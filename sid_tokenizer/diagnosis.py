"""How codes are distributed over the layers: is there an hourglass, and what do collisions cost?"""

from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from .checks import check_codes, check_weights
from .embeddings import EmbeddingReader
from .figures import plot_flow, plot_layers
from .hourglass import find_verdict, simulate_uniform
from .layer_flow import bin_flows, extend_prefixes
from .quantizer import ResidualQuantizerConfig
from .refit import duplicate_share, refit
from .sid_tokens import layer_letter


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
        children_mean (`float`): of the prefixes that end before this layer, how many codes of this layer follow each, on
            average over prefixes, whatever their weight (one to many; an absent code counts as one). Before the first
            layer there is one prefix, the empty one.
        children_median (`float`): the same, median.
        children_max (`int`): the same, maximum.
        single_child_share (`float`): share of those prefixes that only one code follows, so that this layer says nothing
            about their items.
        parents_mean (`float`): how many of those prefixes lead to a used code, on average (many to one); 0 if none is used.
        parents_max (`int`): the same, maximum.
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
    children_mean: float
    children_median: float
    children_max: int
    single_child_share: float
    parents_mean: float
    parents_max: int

    @property
    def name(self):
        return f"{layer_letter(self.layer)} ({self.layer})"

    @property
    def utilisation(self):
        """Share of the codes with at least one item, used / K."""
        return self.used / self.codebook_size


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
        null_bands (`list[np.ndarray]`): per layer the 1 % and the 99 % quantile of the counts, sorted from the most to the
            least frequent code, if each item drew its code at random. Shape of each: (2, K).
        flows (`list[np.ndarray]`): per pair of adjacent layers the count that flows between codes, in at most 32 bins of
            codes of like frequency per layer, the most frequent first, and one more for absent codes where there are
            some. Shape of each: (bins, bins).
        duplicate_share (`float` or `None`): share of the items whose embedding another item has too, which no quantizer
            can tell apart; `None` without embeddings.
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
    null_bands: list[np.ndarray]
    flows: list[np.ndarray]
    duplicate_share: float | None = None
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
        content = asdict(replace(self, better_optimum=None))
        for layer, statistics in zip(content["layers"], self.layers, strict=True):
            layer["utilisation"] = statistics.utilisation
        for name in ("counts", "null_bands", "flows"):
            content[name] = [array.tolist() for array in content[name]]
        content["recall_ceiling"] = {str(k): value for k, value in self.recall_ceiling.items()}
        content["collision_rate"] = self.collision_rate
        content["better_optimum"] = self.better_optimum.to_dict() if self.better_optimum else None
        content["survives"] = self.survives
        return content

    def to_markdown(self):
        """The per-layer table, a table of the flow between layers, and the summary below them."""
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
        if len(self.layers) > 1:
            lines += [
                "",
                "| layer | codes after one prefix: mean | median | max | only one | prefixes before one code: mean | max |",
                "|---|---|---|---|---|---|---|",
            ]
        for layer in self.layers[1:]:
            lines.append(
                f"| {layer.name} | {layer.children_mean:.2f} | {layer.children_median:g} | {layer.children_max} "
                f"| {layer.single_child_share:.1%} | {layer.parents_mean:.1f} | {layer.parents_max} |"
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
        if self.duplicate_share:
            text += f" {round(self.duplicate_share * self.num_items)} items share their embedding with another."
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

    def plot(self, path=None, kind="layers"):
        """
        Draws the diagnosis; needs matplotlib (`pip install 'rqsid[plots]'`). To lay several over each other, or side by
        side, see [`~figures.plot_layers`] and [`~figures.plot_flow`].

        Args:
            path (`str` or `os.PathLike`, *optional*):
                File to write, `.png` or `.svg`.
            kind (`str`, *optional*, defaults to `"layers"`):
                - `"layers"`: the counts of each layer's codes from the most to the least frequent.
                - `"flow"`: layers as columns, as tall as their codes are evenly used, and what flows between them.

        Returns:
            `matplotlib.figure.Figure`

        Raises:
            `ImportError`: without matplotlib.
            `ValueError`: for another kind or suffix, or the flow of a single layer.
        """
        if kind not in ("layers", "flow"):
            raise ValueError(f'kind={kind!r} is unknown; choose "layers" or "flow".')
        return plot_layers(self, path) if kind == "layers" else plot_flow(self, path)

    __str__ = to_markdown


def diagnose(codes, codebook_sizes, weights=None, embeddings=None, seed=0):
    """
    Measures how evenly each layer uses its codes and what the collisions cost.

    A verdict is given only beyond what uniform codes show in 200 simulated samples of items of these weights; see
    [`~hourglass.simulate_uniform`].

    Args:
        codes (`np.ndarray` or `torch.Tensor`): Shape: (N, L). -1 where a layer is absent.
        codebook_sizes (`list[int]`):
            Codes of each layer.
        weights (`np.ndarray`, *optional*): Shape: (N,).
            Weight of each item, for instance its interactions; 1 each if not given. The verdict is then about
            interactions.
        embeddings (`np.ndarray`, `torch.Tensor` or whatever [`EmbeddingReader`] reads, *optional*): Shape: (N, D).
            If given, the embeddings are quantized again with relocation of under-used codes, and the report says
            whether an hourglass survives: a real one does, one made by a poor optimum does not. The codebooks are fitted
            on a random sample of at most 100 rows per code; all rows are then encoded, in chunks.
        seed (`int`, *optional*, defaults to 0):
            Seed of that sample and of the fit.

    Returns:
        [`Diagnosis`]

    Raises:
        `ValueError`: if `codes` is empty or outside the codebooks, or `weights` has another length, a negative or
            non-finite entry, or no positive one; if there are not as many embeddings as codes, or fewer than a codebook
            has codes.
        `TypeError`: if `codes` are not integers, or `embeddings` are nothing that can be read.
    """
    codes = codes.cpu().numpy() if isinstance(codes, torch.Tensor) else np.asarray(codes)
    check_codes(codes, codebook_sizes)
    num_items, num_layers = codes.shape
    if num_items == 0:
        raise ValueError("codes hold no item. Pass the codes of at least one product.")
    weights = check_weights(weights, num_items)

    # 1. per layer
    counts, layers = [], []
    random, null, null_bands = np.random.default_rng(0), [], []
    prefix, num_prefixes, possible = np.zeros(num_items, dtype=np.int64), 1, 1
    for layer, size in enumerate(codebook_sizes):
        column = codes[:, layer].astype(np.int64)
        here = column >= 0
        counts.append(np.bincount(column[here], weights=weights[here], minlength=size))
        prefix, children, parents = extend_prefixes(prefix, column, size)
        num_prefixes = int(children.sum())
        possible *= 1 if not here.any() else size + int(not here.all())
        paths = {"paths_used": num_prefixes, "paths_possible": possible} | _flow_statistics(children, parents)
        layers.append(_layer_statistics(layer, counts[-1], weights.sum(), paths))
        layer_null, band = simulate_uniform(random, weights[here], size)
        null.append(layer_null)
        null_bands.append(band)

    # 2. collisions: rank of each item within its SID, heaviest first
    order = np.lexsort((-weights, prefix))
    group_sizes = np.bincount(prefix)
    starts = np.concatenate(([0], np.cumsum(group_sizes)[:-1]))
    rank = np.empty(num_items, dtype=np.int64)
    rank[order] = np.arange(num_items) - np.repeat(starts, group_sizes)
    ceiling = {k: float(weights[rank < k].sum() / weights.sum()) for k in (1, 10, 50)}

    # 3. verdict
    score, null_score, verdict, verdict_layer = None, None, "none", None
    present = [layer.layer for layer in layers if layer.present > 0]
    if len(present) >= 3:
        evenness = np.array([layers[layer].normalized_entropy for layer in present])
        score, null_score, verdict, position = find_verdict(evenness, np.stack([null[layer] for layer in present]))
        verdict_layer = None if position is None else present[position]
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
        null_bands=null_bands,
        flows=bin_flows(codes, counts, weights),
    )
    if embeddings is not None:
        reader = EmbeddingReader(embeddings)
        if reader.num_rows is None:
            for _ in reader.chunks():  # a stream tells its length at its end
                pass
        if reader.num_rows != num_items:
            raise ValueError(
                f"{reader.num_rows} embeddings for {num_items} rows of codes: pass one embedding per item."
            )
        diagnosis.duplicate_share = duplicate_share(reader)
        config = ResidualQuantizerConfig(codebook_sizes=list(codebook_sizes), preset="fast", seed=seed)
        _, better_codes = refit(reader, config, seed)
        diagnosis.better_optimum = diagnose(better_codes, codebook_sizes, weights)
    return diagnosis


def _flow_statistics(children, parents):
    used = parents[parents > 0]
    return {
        "children_mean": float(children.mean()),
        "children_median": float(np.median(children)),
        "children_max": int(children.max()),
        "single_child_share": float((children == 1).mean()),
        "parents_mean": float(used.mean()) if len(used) else 0.0,
        "parents_max": int(parents.max()),
    }


def _layer_statistics(layer, counts, total, paths):
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
        **paths,
    )
