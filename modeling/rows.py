"""Embedding rows for SID tokens: made once, before training, and the same on every process."""

import contextlib
import importlib
import math

import torch
from torch.distributed.tensor import DTensor

INITS = ("codebook", "noise")

# Base rows that a random direction is mixed of, and what is held in float32 at a time.
MIXED_ROWS = 64
CHUNK_BYTES = 64 * 2**20


def initialize_sid_rows(model, tokenizer, init=None, seed=0):
    """
    Gives a model rows for the SID tokens that the tokenizer added to its base, in the input embeddings and, where it is
    not tied to them, in the output head.

    Rows that already exist beyond the base vocabulary (Qwen1.5 has some spare) are used before the matrix grows; it never
    shrinks. A model whose rows were made for these codebooks is left as it is, also when it was saved and loaded since.
    Everything random is drawn and computed on the CPU, so that one seed gives every process the same rows. Under DeepSpeed
    ZeRO-3 all processes must call it.

    Args:
        model (`PreTrainedModel`):
            Changed in place.
        tokenizer ([`SIDTokenizer`]):
            Its new tokens.
        init (`str`, *optional*):
            `"codebook"`: each row is the base rows' mean plus a random projection of the code's centroid, whose directions
            have the base rows' covariance, so that codes that are near each other start near each other. `"noise"`: mean
            plus noise of that covariance (identical rows, as the mean alone gives, would have to be told apart by
            training). `"codebook"` if not given and the tokenizer has a quantizer.
        seed (`int`, *optional*, defaults to 0):
            Seed of the projection and the noise.

    Returns:
        `bool`: whether rows were made.

    Raises:
        `ValueError`: for an unknown `init`, `"codebook"` without a quantizer, a model whose rows were made for other SID
            tokens or codebooks, or one whose matrices cannot be given rows any more: sharded by FSDP2 or tensor
            parallelism, wrapped by an adapter, quantized, or without values.
    """
    if init is None:
        init = "noise" if tokenizer.quantizer is None else "codebook"
    if init not in INITS:
        raise ValueError(f"init={init!r} is unknown; choose one of {', '.join(INITS)}.")
    if init == "codebook" and tokenizer.quantizer is None:
        raise ValueError('init="codebook" needs a tokenizer with a quantizer; use init="noise" for an imported index.')
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
    _check_matrices(model)

    old_size = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > old_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    # Text tokens that the model lacked (a pad token added to its tokenizer, say) are new to it as well.
    new_ids = torch.arange(min(old_size, tokenizer.base_size), tokenizer.base_size)
    new_ids = torch.cat([new_ids, tokenizer.new_token_ids()])
    is_base = torch.ones(len(tokenizer), dtype=torch.bool)
    is_base[new_ids] = False
    base_ids = is_base.nonzero().flatten()

    # Row i is the mean plus coordinates[i] in random directions, or plus a direction of its own.
    coordinates, is_projected = torch.zeros(0, 0), torch.zeros(len(new_ids), dtype=torch.bool)
    if init == "codebook":
        coordinates, is_projected = _standardized_centroids(tokenizer, new_ids)
    num_own = int((~is_projected).sum())
    generator = torch.Generator().manual_seed(seed)
    shape = (num_own + coordinates.shape[1], MIXED_ROWS)
    picks = base_ids[torch.randint(len(base_ids), shape, generator=generator)]
    weights = torch.randn(shape, generator=generator) / math.sqrt(MIXED_ROWS)

    matrices = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not matrices[0]:
        matrices.append(head.weight)
    for matrix in matrices if len(new_ids) else ():
        with torch.no_grad(), _gathered(matrix):
            mean = _mean_of_rows(matrix, base_ids)
            directions = _mix_rows(matrix, mean, picks, weights)
            rows = mean.repeat(len(new_ids), 1)
            rows[~is_projected] += directions[:num_own]
            if is_projected.any():
                rows[is_projected] += coordinates @ directions[num_own:]
            matrix[new_ids.to(matrix.device)] = rows.to(matrix)
    # Saved with the model, so that a second call (a restarted run, say) does not overwrite trained rows.
    model.config.sid_codebook = fingerprint
    return True


def _standardized_centroids(tokenizer, new_ids):
    """Per new token that is a code its centroid, of mean 0 and squared length 1 by layer, (n, D); which tokens are, (N,)."""
    row_of_token = torch.full((len(tokenizer),), -1)
    row_of_token[new_ids] = torch.arange(len(new_ids))
    is_code = torch.zeros(len(new_ids), dtype=torch.bool)
    centroids = torch.zeros(len(new_ids), tokenizer.quantizer.config.embedding_dim)
    for ids, codebook in zip(tokenizer.layer_token_ids(), tokenizer.quantizer.codebooks, strict=False):
        codebook = codebook.detach().float().cpu()
        centred = codebook - codebook.mean(0)
        # One scale for all dimensions: the codebook's own geometry is what the projection is to keep.
        scaled = centred / centred.square().sum(1).mean().sqrt().clamp_min(1e-12)
        rows = row_of_token[torch.from_numpy(ids)]
        centroids[rows[rows >= 0]] = scaled[rows >= 0]
        is_code[rows[rows >= 0]] = True
    return centroids[is_code], is_code


def _mean_of_rows(matrix, ids):
    """The mean of some of a matrix's rows. Shape: (H,)."""
    total = torch.zeros(matrix.shape[1], dtype=torch.float64)
    for chunk in ids.split(max(1, CHUNK_BYTES // (4 * matrix.shape[1]))):
        total += matrix[chunk.to(matrix.device)].cpu().float().sum(0)
    return (total / len(ids)).float()


def _mix_rows(matrix, mean, picks, weights):
    """
    Random directions of the rows' own covariance: mixing centred rows with independent weights of variance 1/m gives it
    without a matrix of H x H, and without a decomposition.

    Args:
        matrix (`torch.Tensor`): Shape: (V, H).
        mean (`torch.Tensor`): Shape: (H,).
        picks (`torch.Tensor`): Rows drawn at random. Shape: (n, m).
        weights (`torch.Tensor`): Normal, of variance 1/m. Shape: (n, m).

    Returns:
        `torch.Tensor` (float32, on the CPU): Shape: (n, H).
    """
    mixed = []
    size = max(1, CHUNK_BYTES // (4 * picks.shape[1] * matrix.shape[1]))
    for chunk, factors in zip(picks.split(size), weights.split(size), strict=True):
        rows = matrix[chunk.to(matrix.device)].cpu().float() - mean
        mixed.append(torch.bmm(factors[:, None], rows)[:, 0])
    return torch.cat(mixed)


def _gathered(matrix):
    """The whole of a matrix that ZeRO-3 has partitioned; what rank 0 writes into it is what all keep."""
    if not hasattr(matrix, "ds_id"):
        return contextlib.nullcontext()
    return importlib.import_module("deepspeed").zero.GatheredParameters(matrix, modifier_rank=0)


def _check_matrices(model):
    if getattr(model, "peft_config", None):
        raise ValueError(
            "The model has an adapter and no rows for the SID tokens, which cannot be made below it. Call "
            "initialize_sid_rows(model, tokenizer) on the model itself, and add the adapter then."
        )
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = getattr(layer, "weight", None)
        if isinstance(weight, DTensor) or getattr(model, "_tp_size", None):
            raise ValueError(
                "The model's matrices are distributed over processes (FSDP2 or tensor parallelism), and cannot be given rows "
                "any more. Load the model whole, call initialize_sid_rows(model, tokenizer), and distribute it then; to load "
                "it in parts, save it with its rows first."
            )
        if weight is not None and (weight.is_meta or not weight.is_floating_point()):
            raise ValueError(
                f"The weight of {type(layer).__name__} is {'without values' if weight.is_meta else weight.dtype}, so it can "
                "be given no rows for the SID tokens. Load the model without offloading, and leave its embeddings and output "
                "layer out of quantization."
            )
