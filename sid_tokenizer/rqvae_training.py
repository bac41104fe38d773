"""How an RQ-VAE learns: losses of the quantized latents, balanced assignment, and revival of under-used codes."""

import importlib
import math
import os
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from tqdm.auto import tqdm
from transformers import get_scheduler

from .assignment import nearest_codes
from .kmeans import kmeans
from .relocation import relocate

CHUNK_ROWS = 16384
INIT_ITERATIONS = 10
REVIVAL_ROWS_PER_CODE = 64
SETTLING_EPOCHS = 2  # as in k-means, the last passes only settle what was moved


def rotate(latent, quantized):
    """
    The rotation trick (Fifty et al., arXiv 2410.06424): the value of `quantized`, but with the gradient of the rotation and
    scaling that take `latent` to it, lambda R = |q| / |e| (I - 2 r r^T + 2 q^ e^^T), where hats are unit vectors and r is
    e^ + q^ made unit. Lambda and R count as constants.

    Args:
        latent (`torch.Tensor`): e. Shape: (N, D).
        quantized (`torch.Tensor`): q. Shape: (N, D).

    Returns:
        `torch.Tensor`: Shape: (N, D).
    """
    source, target = latent.detach(), quantized.detach()
    scale = target.norm(dim=1, keepdim=True) / source.norm(dim=1, keepdim=True).clamp_min(1e-6)
    source, target = functional.normalize(source, dim=1), functional.normalize(target, dim=1)
    halfway = functional.normalize(source + target, dim=1)
    along_halfway = (latent * halfway).sum(1, keepdim=True)
    along_source = (latent * source).sum(1, keepdim=True)
    rotated = scale * (latent - 2 * along_halfway * halfway + 2 * along_source * target)
    return rotated + (quantized - rotated).detach()


def balanced_codes(points, codebook, epsilon, num_iterations):
    """
    Assigns points to codes so that all codes get about equally many: the largest entry of each row of the entropic transport
    plan between points and codes (Cuturi 2013), by Sinkhorn iterations on logarithms. Distances are divided by half their
    range, as LC-Rec does (Zheng et al., arXiv 2311.09049), so that `epsilon` does not depend on their scale.

    Args:
        points (`torch.Tensor`): Shape: (N, D).
        codebook (`torch.Tensor`): Shape: (K, D).
        epsilon (`float`):
            Weight of the entropy; the smaller, the closer to the nearest codes that balance allows.
        num_iterations (`int`):
            Pairs of normalisations.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: codes of shape (N,), and the logarithm of the plan, whose rows sum to 1 and
        whose columns sum to about N / K. Shape: (N, K).
    """
    costs = torch.cdist(points, codebook).square()
    half_range = ((costs.max() - costs.min()) / 2).clamp_min(torch.finfo(costs.dtype).tiny)
    plan = -costs / (half_range * epsilon)
    column_mass = math.log(len(points) / len(codebook))
    for _ in range(num_iterations):
        plan = plan - plan.logsumexp(0, keepdim=True) + column_mass
        plan = plan - plan.logsumexp(1, keepdim=True)
    return plan.argmax(1), plan


class TrainingObjective(nn.Module):
    """
    The losses of one batch, in a module of its own because data-parallel training wraps a `forward`.

    Layer by layer, sg being stop-gradient and r the residual: |sg(r) - code|^2 moves the codes and |r - sg(code)|^2 the
    encoder. The next residual is r - sg(code). Were it r minus the straight-through code, as in LC-Rec, the two would cancel
    and no layer after the first would reach the encoder; were it r - code, later layers would move the codes of earlier ones
    away from the means that greedy encoding needs.

    Args:
        model ([`RQVAE`]): the model to train.
        accelerator (`accelerate.Accelerator`): knows the other processes.
    """

    def __init__(self, model, accelerator):
        super().__init__()
        self.model = model
        self.accelerator = accelerator

    def forward(self, points):
        """
        Args:
            points (`torch.Tensor`): Shape: (N, D).

        Returns:
            `torch.Tensor`: loss, reconstruction, codebook and commitment loss. Mean squared differences; those of the layers
            are averaged. Shape: (4,).
        """
        config = self.model.config
        points = (points - self.model.input_mean) / self.model.input_scale
        latent = self.model.encoder(points)
        # In half precision the nearest code is often not the nearest.
        with torch.autocast(latent.device.type, enabled=False):
            latent = latent.float()
            residual, quantized = latent, torch.zeros_like(latent)
            codebook_loss = commitment_loss = 0
            for layer, codebook in enumerate(self.model.codebooks):
                if config.normalize_residuals:
                    residual = functional.normalize(residual, dim=1)
                with torch.no_grad():
                    codes = self._assign(residual.detach(), codebook, layer)
                codewords = functional.embedding(codes, codebook)
                codebook_loss += functional.mse_loss(codewords, residual.detach()) / len(self.model.codebooks)
                commitment_loss += functional.mse_loss(residual, codewords.detach()) / len(self.model.codebooks)
                residual = residual - codewords.detach()
                quantized = quantized + codewords.detach()
            passed_on = rotate(latent, quantized) if config.rotation_trick else latent + (quantized - latent).detach()
        reconstruction_loss = functional.mse_loss(self.model.decoder(passed_on).float(), points)
        loss = reconstruction_loss + codebook_loss + config.commitment_weight * commitment_loss
        return torch.stack([loss, reconstruction_loss, codebook_loss, commitment_loss])

    def _assign(self, residual, codebook, layer):
        config = self.model.config
        if config.metric == "cosine":
            residual, codebook = functional.normalize(residual, dim=1), functional.normalize(codebook, dim=1)
        if layer not in config.sinkhorn_layers:
            return nearest_codes(residual, codebook)[0]
        # Balance is a property of the whole batch, of which each process holds a part of the same size.
        everyone = self.accelerator.gather(residual)
        codes, _ = balanced_codes(everyone, codebook, config.sinkhorn_epsilon, config.sinkhorn_iterations)
        start = self.accelerator.process_index * len(residual)
        return codes[start : start + len(residual)]


@torch.no_grad()
def initialize(model, points):
    """
    Draws the weights of encoder and decoder (Glorot normal, biases 0) and then the codebooks: by k-means of the whole encoder
    output, layer by layer, or uniformly in (-1/K, 1/K).

    Args:
        model ([`RQVAE`]): Changed in place.
        points (`torch.Tensor`): Shape: (N, D).
    """
    generator = torch.Generator().manual_seed(model.config.seed)
    for network in (model.encoder, model.decoder):
        for module in network:
            if isinstance(module, nn.Linear):
                # Drawn on the CPU, where a seed gives the same numbers whatever the accelerator.
                weight = nn.init.xavier_normal_(torch.empty(module.weight.shape), generator=generator)
                module.weight.copy_(weight)
                module.bias.zero_()
    residuals = encode_in_chunks(model, points) if model.config.init == "k-means" else None
    for codebook in model.codebooks:
        if residuals is None:
            codebook.copy_((torch.rand(codebook.shape, generator=generator) * 2 - 1) / len(codebook))
            continue
        if model.config.normalize_residuals:
            residuals = functional.normalize(residuals, dim=1)
        codebook.copy_(kmeans(residuals, len(codebook), num_iterations=INIT_ITERATIONS, generator=generator))
        residuals -= codebook[_assign_in_chunks(residuals, codebook, model.config)[0]]


@torch.no_grad()
def revive(model, points, states, generator):
    """
    Moves under-used codes to where the error is, layer by layer, as [`relocate`] does in k-means.

    Args:
        model ([`RQVAE`]): Its codebooks change in place.
        points (`torch.Tensor`): Shape: (N, D). In random order; usage is counted on them.
        states (`list[list[torch.Tensor]]`): per layer what the optimizer remembers of each code, changed in place as well: a
            moved code takes over the memory of the one whose cluster it splits. Shape of each: (K, latent_dim).
        generator (`torch.Generator`): Source of all randomness.

    Returns:
        `list[int]`: codes moved in each layer.
    """
    residuals, num_moved = encode_in_chunks(model, points), []
    for codebook, state in zip(model.codebooks, states, strict=True):
        if model.config.normalize_residuals:
            residuals = functional.normalize(residuals, dim=1)
        codes, distances = _assign_in_chunks(residuals, codebook, model.config)
        counts = torch.bincount(codes, minlength=len(codebook)).double()
        errors = torch.zeros_like(counts).index_add_(0, codes, distances.double())
        changed = relocate(codebook, residuals, counts, errors, model.config.revive_threshold, generator)
        moved, split = changed.view(2, len(changed) // 2)
        for memory in state:
            memory[moved] = memory[split]
        num_moved.append(len(moved))
        residuals -= codebook[_assign_in_chunks(residuals, codebook, model.config)[0]]
    return num_moved


@torch.no_grad()
def encode_in_chunks(model, points):
    """
    Returns:
        `torch.Tensor`: the latents, where the model is. Shape: (N, latent_dim).
    """
    training = model.training
    model.eval()
    latents = torch.cat([model.latents(chunk.to(model.device)) for chunk in points.split(CHUNK_ROWS)])
    model.train(training)
    return latents


def _assign_in_chunks(points, codebook, config):
    cosine = config.metric == "cosine"
    directions = functional.normalize(codebook, dim=1) if cosine else codebook
    codes, distances = [], []
    for chunk in points.split(CHUNK_ROWS):
        codes.append(nearest_codes(functional.normalize(chunk, dim=1) if cosine else chunk, directions)[0])
        distances.append((chunk - codebook[codes[-1]]).square().sum(1))
    return torch.cat(codes), torch.cat(distances)


class _Rows:
    """Rows of a tensor for a `DataLoader`, a whole batch at a time."""

    def __init__(self, points):
        self.points = points

    def __len__(self):
        return len(self.points)

    def __getitems__(self, rows):
        return self.points[rows]


@contextmanager
def data_parallel():
    """
    Yields:
        `accelerate.Accelerator`: one that splits batches over the processes.

    Raises:
        `ValueError`: if the processes were launched to split the model rather than the data.
    """
    accelerate = importlib.import_module("accelerate")
    initialized_before = accelerate.state.is_initialized()
    kinds = [
        k for k in ("DEEPSPEED", "FSDP", "MEGATRON_LM") if os.environ.get(f"ACCELERATE_USE_{k}", "").lower() == "true"
    ]
    if initialized_before:
        kinds.append(accelerate.state.AcceleratorState().distributed_type.value)
    unsuitable = [kind for kind in kinds if kind != "NO" and not kind.startswith("MULTI_")]
    if unsuitable:
        raise ValueError(
            f"RQVAE cannot be fitted under {unsuitable[0]}, which splits models: its codebooks must be whole in every process. "
            "It is small; fit it in a run of its own, with plain data parallelism (accelerate launch --multi_gpu) or without."
        )
    device = torch.accelerator.current_accelerator(check_available=True)
    accelerator = accelerate.Accelerator(
        # Unless told so, accelerate runs processes without an accelerator side by side, each on its own. MPS has no float64.
        cpu=not initialized_before and (device is None or device.type == "mps"),
        dataloader_config=accelerate.DataLoaderConfiguration(split_batches=True),
    )
    try:
        yield accelerator
    finally:
        # accelerate keeps the settings of the first Accelerator for the whole process and refuses others; what comes after
        # the fit, perhaps in another precision, must not find those of the fit.
        if not initialized_before:
            accelerate.state.AcceleratorState._reset_state(reset_partial_state=accelerator.num_processes == 1)


def train(model, points, accelerator, show_progress_bar=False):
    """
    Trains a model whose `input_mean` and `input_scale` are set.

    Args:
        model ([`RQVAE`]): Changed in place, and moved to the accelerator's device.
        points (`torch.Tensor`): Shape: (N, D). Float32, the same in every process.
        accelerator (`accelerate.Accelerator`): of [`data_parallel`].
        show_progress_bar (`bool`, *optional*, defaults to `False`):
            Whether the main process shows a bar over all steps.

    Returns:
        `list[dict]`: per epoch its number, the mean losses and the codes revived in each layer.

    Raises:
        `ValueError`: if the loss is no longer finite, or the processes hold different embeddings.
    """
    config, processes = model.config, accelerator.num_processes
    model.to(accelerator.device).train().requires_grad_(True)
    _check_same_everywhere(points, accelerator)
    initialize(model, points)

    # Batches of nearly equal size rather than a small last one, whose gradient would be noise.
    batch_size = len(points) // math.ceil(len(points) / config.batch_size)
    batch_size = max(batch_size // processes, 1) * processes
    generator = torch.Generator().manual_seed(config.seed)
    order = RandomSampler(range(len(points)), generator=generator)
    batches = BatchSampler(order, batch_size, drop_last=len(points) >= batch_size)
    loader = DataLoader(_Rows(points), batch_sampler=batches, collate_fn=lambda batch: batch)
    matrices = [
        weight for network in (model.encoder, model.decoder) for weight in network.parameters() if weight.ndim == 2
    ]
    others = [bias for network in (model.encoder, model.decoder) for bias in network.parameters() if bias.ndim == 1]
    # Decay would pull codes and biases, which are places, towards the origin.
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": [*others, *model.codebooks], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate)
    objective, optimizer, loader = accelerator.prepare(TrainingObjective(model, accelerator), adamw, loader)
    num_steps = config.num_epochs * len(loader)
    schedule = "cosine" if config.lr_scheduler_type == "cosine" else "constant_with_warmup"
    scheduler = get_scheduler(schedule, adamw, math.ceil(config.warmup_ratio * num_steps), num_steps)

    log, num_revival_rows = [], REVIVAL_ROWS_PER_CODE * max(config.codebook_sizes)
    bar = tqdm(total=num_steps, desc="rq-vae", disable=not (show_progress_bar and accelerator.is_main_process))
    with bar:
        for epoch in range(config.num_epochs):
            total = torch.zeros(4, device=accelerator.device)
            for batch in loader:
                losses = objective(batch)
                accelerator.backward(losses[0])
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                total += losses.detach()
                bar.update()
            losses = accelerator.reduce(total / len(loader), reduction="mean")
            if not torch.isfinite(losses).all():
                raise ValueError(
                    f"The loss is {float(losses[0])} after epoch {epoch}. Lower learning_rate={config.learning_rate}, or scale "
                    'the embeddings (input_scaling="standardize").'
                )

            # Under-used codes move in every process alike; what is left of rounding differences ends with the main one's.
            revived = [0] * len(config.codebook_sizes)
            if config.revive_threshold > 0 and epoch < config.num_epochs - SETTLING_EPOCHS:
                sample = points[torch.randperm(len(points), generator=generator)[:num_revival_rows]]
                states = [
                    [adamw.state[codes][name] for name in ("exp_avg", "exp_avg_sq")] for codes in model.codebooks
                ]
                revived = revive(model, sample, states, generator)
                if processes > 1:
                    broadcast = importlib.import_module("accelerate.utils").broadcast
                    for codebook, state in zip(model.codebooks, states, strict=True):
                        for tensor in (codebook.data, *state):
                            broadcast(tensor)
            names = ("loss", "reconstruction_loss", "codebook_loss", "commitment_loss")
            log.append({"epoch": epoch} | dict(zip(names, losses.tolist(), strict=True)) | {"revived": revived})
    return log


def _check_same_everywhere(points, accelerator):
    summary = torch.tensor(
        [[len(points), points.shape[1], float(points.sum(dtype=torch.float64))]], dtype=torch.float64
    )
    everyone = accelerator.gather(summary.to(accelerator.device))
    if not torch.equal(everyone, everyone[:1].expand_as(everyone)):
        raise ValueError(
            f"The {accelerator.num_processes} processes hold different embeddings. Pass all of them in every process; fit "
            "shares the batches out itself."
        )
