"""Embedding rows for SID tokens: made once, before training, and the same on every process."""

import torch

INITS = ("codebook", "noise")


def initialize_sid_rows(model, tokenizer, init=None, seed=0):
    """
    Gives a model rows for the SID tokens that the tokenizer added to its base, in the input embeddings and, where it is
    not tied to them, in the output head.

    Rows that already exist beyond the base vocabulary (Qwen1.5 has some spare) are used before the matrix grows; it never
    shrinks. A model whose rows were made for these codebooks is left as it is, also when it was saved and loaded since.

    Args:
        model (`PreTrainedModel`):
            Changed in place.
        tokenizer ([`SIDTokenizer`]):
            Its new tokens.
        init (`str`, *optional*):
            `"codebook"`: each row is the base rows' mean plus a random projection of the code's centroid, scaled to the
            base rows' deviation, so that codes that are near each other start near each other. `"noise"`: mean plus
            normal noise of that deviation (identical rows, as the mean alone gives, would have to be told apart by
            training). `"codebook"` if not given and the tokenizer has a quantizer.
        seed (`int`, *optional*, defaults to 0):
            Seed of the projection and the noise.

    Returns:
        `bool`: whether rows were made.

    Raises:
        `ValueError`: for an unknown `init`, `"codebook"` without a quantizer, or a model whose rows were made for other
            SID tokens or codebooks.
    """
    if init is None:
        init = "noise" if tokenizer.quantizer is None else "codebook"
    if init not in INITS:
        raise ValueError(f"init={init!r} is unknown; choose one of {', '.join(INITS)}.")
    if init == "codebook" and tokenizer.quantizer is None:
        raise ValueError('init="codebook" needs a tokenizer with a quantizer; use init="noise" for an imported index.')
    new_ids = tokenizer.new_token_ids()
    fingerprint = tokenizer.codebook_fingerprint()
    found = getattr(model.config, "sid_codebook", None)
    if found == fingerprint:
        return False
    if found is not None:
        raise ValueError(
            f"The model has rows for the SID tokens of codebook {found}, the tokenizer has codebook {fingerprint}. Load the "
            "tokenizer that was saved with the model; to give up what the rows have learned and make new ones, set "
            "model.config.sid_codebook = None first."
        )

    embeddings = model.get_input_embeddings()
    size = max(embeddings.num_embeddings, len(tokenizer))
    if size > embeddings.num_embeddings:
        model.resize_token_embeddings(size, mean_resizing=False)
    is_base = torch.ones(len(tokenizer), dtype=torch.bool)
    is_base[new_ids] = False
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(len(new_ids), embeddings.embedding_dim, generator=generator)
    if init == "codebook":
        directions = _project_codebooks(tokenizer, new_ids, directions, generator)

    matrices = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not matrices[0]:
        matrices.append(head.weight)
    with torch.no_grad():
        for matrix in matrices:
            base = matrix[: len(tokenizer)][is_base.to(matrix.device)].float()
            rows = base.mean(0) + base.std(0) * directions.to(matrix.device)
            matrix[new_ids.to(matrix.device)] = rows.to(matrix.dtype)
    # Saved with the model, so that a second call (a restarted run, say) does not overwrite trained rows.
    model.config.sid_codebook = fingerprint
    return True


def _project_codebooks(tokenizer, new_ids, noise, generator):
    """Centroids, standardised per layer and projected to the model's width; suffix tokens keep their noise. (n, H)."""
    directions = noise.clone()
    row_of_token = torch.full((len(tokenizer),), -1)
    row_of_token[new_ids] = torch.arange(len(new_ids))
    dim = tokenizer.quantizer.config.embedding_dim
    projection = torch.randn(dim, noise.shape[1], generator=generator) / dim**0.5
    for ids, codebook in zip(tokenizer.layer_token_ids(), tokenizer.quantizer.codebooks, strict=False):
        rows = row_of_token[torch.from_numpy(ids)]
        centred = codebook.float().cpu() - codebook.float().cpu().mean(0)
        # One scale for all dimensions: the codebook's own geometry is what the projection is to keep.
        scaled = centred / centred.square().mean().sqrt().clamp_min(1e-12)
        directions[rows[rows >= 0]] = (scaled @ projection)[rows >= 0]
    return directions
