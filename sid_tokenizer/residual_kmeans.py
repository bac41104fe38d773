"""Fitting the codebooks of all layers in bounded memory, alone or together with other processes."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import normalize
from transformers.utils import logging

from . import processes
from .assignment import best_codes, chunk_rows
from .fit_checkpoint import FitCheckpoint
from .initialization import initial_codebook
from .kmeans import lloyd, settle_prices

logger = logging.get_logger(__name__)

SAMPLE_PER_CODE = 64  # rows per code that initialisation and relocation look at
MAX_FLOATS_IN_MEMORY = 2**28  # 1 GiB


@dataclass
class Layer:
    """
    One fitted layer.

    Args:
        codebook (`torch.Tensor`): Shape: (K, D).
        prices (`torch.Tensor` or `None`): Shape: (K,). See `capacity` in [`ResidualQuantizerConfig`].
        scale (`torch.Tensor` or `None`): mean length of the residuals that were normalised. Shape: (1,).
        subtracted (`torch.Tensor` or `None`): the codebook with zeros in the rows of skipped codes, `None` where no code is
            skipped. Shape: (K, D).
    """

    codebook: torch.Tensor
    prices: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    subtracted: torch.Tensor | None = None

    @property
    def codewords(self):
        """What each code subtracts from a residual, and adds when decoded."""
        return self.codebook if self.subtracted is None else self.subtracted


def assignment_terms(layer, cosine):
    """The offsets (K,) and columns (D, K) of which `x @ columns - offsets` is largest at the code of x."""
    if cosine:
        columns = normalize(layer.codebook, dim=1)
        offsets = torch.zeros(len(columns), device=columns.device)
    else:
        columns = layer.codebook
        offsets = columns.square().sum(1) / 2
    return (offsets if layer.prices is None else offsets + layer.prices / 2), columns.T


def assign_(residual, layer, config, terms=None, leaves=True):
    """
    Codes of one layer; leaves in `residual`, in place, what the layer leaves over.

    Args:
        residual (`torch.Tensor`): Shape: (N, D).
        layer ([`Layer`])
        config ([`ResidualQuantizerConfig`])
        terms (`tuple`, *optional*): what [`assignment_terms`] gives for the layer.
        leaves (`bool`, *optional*, defaults to `True`): `False` where nobody will look at what is left over.

    Returns:
        `torch.Tensor`: Shape: (N,).
    """
    cosine = config.metric == "cosine"
    offsets, columns = terms or assignment_terms(layer, cosine)
    if config.normalize_residuals:
        normalize(residual, dim=1, out=residual)
    # The length of a residual does not change which direction is nearest, unless codes have prices.
    seen = normalize(residual, dim=1) if cosine and layer.prices is not None else residual
    codes = best_codes(torch.addmm(offsets, seen, columns, beta=-1))
    if leaves:
        residual -= layer.codewords.index_select(0, codes)  # several times faster than indexing
    return codes


def beam_codes(points, codebooks, num_beams):
    """
    The path of least squared error among those that stay within the best `num_beams` at each layer (Babenko and Lempitsky
    2014 for additive quantization; the default encoder of residual quantizers in faiss).

    Args:
        points (`torch.Tensor`): Shape: (N, D).
        codebooks (`list[torch.Tensor]`): Shape of each: (K, D).
        num_beams (`int`)

    Returns:
        `torch.Tensor`: Shape: (N, L).
    """
    residual, error = points[:, None], torch.linalg.vector_norm(points, dim=1).square()[:, None]
    paths = torch.empty(len(points), 1, 0, dtype=torch.int64, device=points.device)
    for codebook in codebooks:
        # |r - c|^2 = |r|^2 - 2 r.c + |c|^2
        errors = error[..., None] - 2 * residual @ codebook.T + codebook.square().sum(1)
        error, best = errors.flatten(1).topk(min(num_beams, errors[0].numel()), largest=False)
        beam, code = best // len(codebook), best % len(codebook)
        residual = torch.take_along_dim(residual, beam[..., None], 1) - codebook[code]
        paths = torch.cat([torch.take_along_dim(paths, beam[..., None], 1), code[..., None]], dim=2)
    return paths[:, 0]


def fit_residual_kmeans(
    reader,
    config,
    distributed=False,
    max_rows_in_memory=None,
    checkpoint_dir=None,
    on_iteration=lambda: None,
    first_layers=(),
):
    """
    Args:
        reader ([`EmbeddingReader`]):
            The embeddings; with `distributed`, this process's share of them.
        config ([`ResidualQuantizerConfig`]):
            What to fit.
        distributed (`bool`, *optional*, defaults to `False`):
            Whether sums are taken over all processes.
        max_rows_in_memory (`int`, *optional*):
            Rows to hold, as float32; 1 GiB of them if not given. If there are more, every full pass reads them again.
        checkpoint_dir (`str` or `os.PathLike`, *optional*):
            Where the state is left after each full pass, and taken up again.
        on_iteration (callable, *optional*):
            Called after each pass.
        first_layers (`list[Layer]`, *optional*):
            Layers that stay as they are, and after which the fit begins.

    Returns:
        `list[Layer]`: of all layers, the given ones first.

    Raises:
        `ValueError`: with fewer rows than a layer has codes, unequal D over processes, or another fit's checkpoint.
    """
    reduce = processes.sum_over_processes if distributed else None
    in_all = processes.in_all if distributed else lambda function: function()
    largest = max(config.codebook_sizes[len(first_layers) :])

    # 1. one pass that checks all rows, counts them, and holds as many as allowed
    def read():
        if max_rows_in_memory is not None and max_rows_in_memory < 1:
            raise ValueError(
                f"max_rows_in_memory={max_rows_in_memory} leaves no rows to start from. Pass a positive number, or None "
                "for 1 GiB of rows."
            )
        return _read(reader, config.seed, max_rows_in_memory or max(largest, MAX_FLOATS_IN_MEMORY // reader.dim))

    if distributed:
        processes.check_equal("dimensions", reader.dim)
    table = in_all(read)
    if distributed:
        num_rows = processes.total(reader.num_rows)
        held_all = processes.total(int(len(table) < reader.num_rows)) == 0
    else:
        num_rows, held_all = reader.num_rows, len(table) == reader.num_rows
    num_local = reader.num_rows
    if num_rows < largest:
        raise ValueError(
            f"{num_rows} embeddings cannot fill a codebook of {largest} codes. Pass more embeddings or a smaller "
            "codebook_sizes."
        )
    # The sample is the same in all processes, so that all take the same decisions.
    size = max(SAMPLE_PER_CODE, config.sample_per_code) * largest
    sample = _random_rows(table, min(len(table), -(-size * num_local // num_rows)), config.seed)
    if distributed:
        sample = processes.gather_rows(sample)
        sample = _random_rows(sample, len(sample), config.seed)
    if len(sample) < largest:
        raise ValueError(
            f"max_rows_in_memory={max_rows_in_memory} leaves {len(sample)} rows to start {largest} codes from. Allow more."
        )
    if not held_all:
        table = sample[:0]  # what follows reads the rows again, and needs the memory
    if num_rows > 1 and bool((sample == sample[0]).all()):

        def others():
            chunks = table.split(chunk_rows(1)) if held_all else (chunk for _, chunk in reader.chunks())
            number = sum(int((chunk != sample[0]).any(1).sum()) for chunk in chunks)
            return (torch.tensor([number], dtype=torch.float64),)

        all_equal = float((others() if reduce is None else reduce(others))[0]) == 0
    else:
        all_equal = False
    if all_equal:
        raise ValueError(
            f"All {num_rows} embeddings are equal, so every product would get the same SID. Check the encoder and its input."
        )
    checkpoint = FitCheckpoint(checkpoint_dir, config, reader.dim, num_rows, sample, distributed)

    # 2. layer by layer
    layers, codes = checkpoint.layers(Layer), []
    if len(layers) < len(first_layers):
        checkpoint.save(first_layers)
    elif not all(torch.equal(one.codebook, other.codebook) for one, other in zip(first_layers, layers, strict=False)):
        raise ValueError(
            f"{checkpoint.path} is the state of a fit that went on from other codebooks. Go on from those, delete it, or pass "
            "another checkpoint_dir."
        )
    layers[: len(first_layers)] = first_layers  # a checkpoint does not hold what they subtract
    for index, num_codes in enumerate(config.codebook_sizes):
        before, codes_before, rows = layers[:index], list(codes), chunk_rows(num_codes, table.device)

        def residuals(before=before, codes_before=codes_before, rows=rows):
            return (
                table.split(rows)
                if held_all
                else _streamed_residuals(reader, config, before, codes_before, rows, sample.device)
            )

        if index == len(layers):
            layers.append(_fit_layer(index, residuals, sample, config, reduce, checkpoint, on_iteration))
            num_distinct = len(torch.unique(layers[-1].codebook, dim=0))
            if num_distinct < num_codes:
                logger.warning(
                    f"Layer {index} has only {num_distinct} distinct codes instead of {num_codes}: fewer distinct residuals reach it. "
                    "Many embeddings are equal, or an earlier layer met them exactly; a smaller codebook would do."
                )
            checkpoint.save(layers)
        layer, terms = layers[index], assignment_terms(layers[index], config.metric == "cosine")

        def assign_streamed(num_codes=num_codes, residuals=residuals, layer=layer, terms=terms):
            codes_of_layer = torch.empty(num_local, dtype=torch.int16 if num_codes <= 2**15 else torch.int32)
            start = 0
            for rest in residuals():
                codes_of_layer[start : start + len(rest)] = assign_(rest, layer, config, terms)
                start += len(rest)
            return codes_of_layer

        if not held_all and index + 1 < len(config.codebook_sizes):
            codes.append(in_all(assign_streamed))
        for rest in (*table.split(rows), *sample.split(rows)):
            assign_(rest, layer, config, terms)
    return layers


def _fit_layer(index, residuals, sample, config, reduce, checkpoint, on_iteration):
    size, cosine = config.codebook_sizes[index], config.metric == "cosine"
    unit = cosine or config.normalize_residuals
    seed = config.seed * 1_000_003 + 1009 * index
    points = normalize(sample, dim=1) if unit else sample
    settings = {"spherical": cosine, "seed": seed, "relocation_threshold": config.relocation_threshold}
    settings["sample"] = points[: SAMPLE_PER_CODE // 2 * size]

    def passes():
        return (normalize(chunk, dim=1) for chunk in residuals()) if unit else residuals()

    # 1. a start, from the sample alone
    num_done, codebook, prices = checkpoint.unfinished(index)
    if codebook is None:
        codebook = initial_codebook(
            points[: SAMPLE_PER_CODE * size], size, config.init, seed, config.relocation_threshold
        )
        if cosine:
            codebook = normalize(codebook, dim=1)
        if config.sample_per_code > 0:
            few = points[: config.sample_per_code * size]
            codebook, _ = lloyd(
                lambda: few.split(chunk_rows(size, few.device)),
                codebook,
                config.num_sample_iterations,
                after_iteration=lambda *state: on_iteration(),
                **settings,
            )

    # 2. all rows
    def after_iteration(*state):
        checkpoint.save_unfinished(index, *state)
        on_iteration()

    codebook, prices = lloyd(
        passes,
        codebook,
        config.num_iterations,
        capacity=config.capacity,
        prices=prices,
        reduce=reduce,
        first_iteration=num_done,
        after_iteration=after_iteration,
        **settings,
    )
    if config.capacity is not None:
        prices = settle_prices(passes, codebook, prices, config.capacity, reduce)
    layer = Layer(codebook, prices)
    if unit:
        _measure_lengths(layer, residuals, config, reduce)
    return layer


def _measure_lengths(layer, residuals, config, reduce):
    """The mean length of the residuals; and, of codes that are directions, the length that leaves the least error."""
    cosine = config.metric == "cosine"

    def statistics():
        sums = torch.zeros(len(layer.codebook) + 1, 2, dtype=torch.float64, device=layer.codebook.device)
        terms = assignment_terms(layer, cosine)
        for chunk in residuals():
            lengths = torch.linalg.vector_norm(chunk, dim=1)
            seen = normalize(chunk, dim=1) if config.normalize_residuals else chunk.clone()
            projected = seen.clone()
            codes = assign_(seen, layer, config, terms)
            projections = (projected * layer.codebook[codes]).sum(1)
            values = torch.stack([projections, torch.ones_like(projections)], dim=1).double()
            sums[:-1].index_add_(0, codes, values)
            sums[-1] += torch.stack([lengths.double().sum(), torch.tensor(float(len(chunk)), device=lengths.device)])
        return (sums,)

    sums = reduce(statistics)[0] if reduce is not None else statistics()[0]
    # A code without points keeps its direction.
    means = torch.where(sums[:, 1] > 0, sums[:, 0] / sums[:, 1].clamp_min(1), 1.0).float()
    if cosine:
        layer.codebook = layer.codebook * means[:-1, None]
    if config.normalize_residuals:
        layer.scale = means[-1:]


def _streamed_residuals(reader, config, layers, codes, rows, device):
    """What the layers left over of each row, in the order of the rows, from the codes that they gave it."""
    buffer = torch.empty(rows, reader.dim, device=device)
    for start, residual in reader.chunks(rows, buffer):
        for layer, of_layer in zip(layers, codes, strict=True):
            if config.normalize_residuals:
                normalize(residual, dim=1, out=residual)
            residual -= layer.codewords[of_layer[start : start + len(residual)].to(residual.device, torch.int64)]
        yield residual


def _read(reader, seed, max_rows):
    """At most `max_rows` rows: all, or a uniform sample (algorithm R of Vitter 1985, a chunk at a time)."""
    table, random = None, np.random.default_rng(seed)
    for start, chunk in reader.chunks():
        if table is None:
            rows = max_rows if reader.num_rows is None else min(max_rows, reader.num_rows)
            table = torch.empty(rows, reader.dim, device=chunk.device)  # untouched pages cost nothing
        fits = max(0, min(len(chunk), len(table) - start))
        table[start : start + fits] = chunk[:fits]
        # Row i takes the place of a random one with probability max_rows / (i + 1); the last to come keeps the place.
        places = random.integers(0, np.arange(start + fits, start + len(chunk)) + 1)
        taken = np.flatnonzero(places < len(table))[::-1]
        places, first = np.unique(places[taken], return_index=True)
        table[torch.as_tensor(places)] = chunk[fits:][torch.as_tensor(taken[first].copy())]
    if table is None:
        return torch.empty(0, reader.dim)
    return table[: reader.num_rows]


def _random_rows(table, size, seed):
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))[:size]
    return table[order.to(table.device)]
