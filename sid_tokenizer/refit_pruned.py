"""Fitting the layers after a pruned one again, on what is left over when pruned codes subtract nothing."""

import numpy as np
import torch
from tqdm.auto import tqdm

from .embeddings import EmbeddingReader
from .pruning import TokenPruning
from .quantizer import ResidualQuantizer
from .residual_kmeans import fit_residual_kmeans


@torch.no_grad()
def refit_pruned(
    quantizer,
    embeddings,
    pruning,
    column="embedding",
    max_rows_in_memory=None,
    checkpoint_dir=None,
    show_progress_bar=False,
):
    r"""
    Fits the layers after the pruned one again.

    Pruning as in Kuai et al. (EMNLP 2024, arXiv 2407.21488) leaves the codebooks alone: the layers after the pruned one
    describe what the pruned codeword left over, though whoever reads the SID does not see that codeword. Here pruned codes
    subtract nothing, so that the later layers describe what the SID leaves open. The layers up to and including the pruned
    one stay as they are, hence so do their codes and what is pruned. This goes beyond the paper.

    The later layers are new codebooks: rows of a model trained on the old ones do not fit them. They have more to describe
    than before. What SIDs tell of the embeddings then usually has less error, most of all where much is pruned; it need
    not have, and no fewer products need share a SID: measure both.

    Args:
        quantizer ([`ResidualQuantizer`]):
            The fitted quantizer. Not changed.
        embeddings (`np.ndarray`, `torch.Tensor`, `datasets.Dataset`, `datasets.IterableDataset`, `str` or `os.PathLike`):
            Shape: (N, D). Those that the quantizer was fitted on; read as [`ResidualQuantizer.fit`] reads them.
        pruning ([`TokenPruning`]):
            Fitted on the quantizer's codes.
        column (`str`, *optional*, defaults to `"embedding"`):
            The column of a data set that holds the embeddings.
        max_rows_in_memory (`int`, *optional*):
            Rows to hold, as float32; 1 GiB of them if not given.
        checkpoint_dir (`str` or `os.PathLike`, *optional*):
            Where the state is saved after each full pass, and taken up again; not the folder of the first fit.
        show_progress_bar (`bool`, *optional*, defaults to `False`):
            Whether to show one bar over all passes.

    Returns:
        [`ResidualQuantizer`]: a new one, whose configuration has the pruned codes as `skipped_codes`; a copy of the given one
        if nothing is pruned.

    Raises:
        `TypeError`: if `quantizer` or `pruning` is something else, or the embeddings are of a kind that cannot be read.
        `ValueError`: if one of them is not fitted or they do not belong together; if the quantizer has `num_beams` above 1, or
            skips codes already; and whatever `fit` says of the embeddings.

    Example:

    ```python
    pruning = TokenPruning(strategy="top_k", layer=1, top_k=25).fit(quantizer.encode(embeddings), quantizer.codebook_sizes)
    quantizer = refit_pruned(quantizer, embeddings, pruning)
    pruning.apply(quantizer.encode(embeddings))  # [N, L], -1 where a code was pruned
    ```
    """
    if not isinstance(quantizer, ResidualQuantizer):
        raise TypeError(
            f"quantizer must be a ResidualQuantizer, got {type(quantizer).__name__}: only residual k-means can fit its later "
            "layers alone. Fit one, or keep the codebooks as they are."
        )
    quantizer._require_fitted()
    if not isinstance(pruning, TokenPruning):
        raise TypeError(
            f"pruning must be a TokenPruning, got {type(pruning).__name__}. Pass TokenPruning(...).fit(codes, "
            "quantizer.codebook_sizes)."
        )
    if pruning.pruned is None:
        raise ValueError("The pruning is not fitted. Call pruning.fit(codes, quantizer.codebook_sizes) first.")
    if list(pruning.codebook_sizes) != quantizer.codebook_sizes:
        raise ValueError(
            f"The pruning was fitted on codebooks {list(pruning.codebook_sizes)}, the quantizer has "
            f"{quantizer.codebook_sizes}. Fit it on the codes of this quantizer."
        )
    layers, config = quantizer._layers(), quantizer.config
    pruned = np.flatnonzero(pruning.pruned).tolist()
    if not pruned:
        return quantizer._changed(layers)
    if config.num_beams > 1:
        raise ValueError(
            f"num_beams={config.num_beams} would avoid codes that subtract nothing, and so change what is pruned. Set "
            "quantizer.config.num_beams = 1, and fit the pruning on the codes of that."
        )
    if config.skipped_codes:
        raise ValueError(
            f"The quantizer skips codes of the layers {list(config.skipped_codes)} already. Pass the one that was fitted "
            "before anything was pruned."
        )

    # The given quantizer's layers, with the pruned codes subtracting nothing.
    kept = quantizer._changed(layers, skipped_codes={pruning.layer: pruned})
    first_layers = kept._layers()[: pruning.layer + 1]
    reader = EmbeddingReader(embeddings, column, config.embedding_dim, quantizer.codebooks[0].device)
    passes = config.num_iterations + (config.num_sample_iterations if config.sample_per_code else 0)
    total = passes * (len(layers) - len(first_layers))
    with tqdm(total=total, desc="codebooks", disable=not show_progress_bar) as bar:
        refitted = fit_residual_kmeans(
            reader,
            kept.config,
            max_rows_in_memory=max_rows_in_memory,
            checkpoint_dir=checkpoint_dir,
            on_iteration=lambda: bar.update(),
            first_layers=first_layers,
        )
    return quantizer._changed(refitted, skipped_codes={pruning.layer: pruned})
