"""Sums and samples over the processes of a distributed fit."""

import torch
import torch.distributed as dist


def require_process_group():
    """
    Raises:
        `ValueError`: if torch.distributed is not initialised.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "distributed=True, but no process group is initialised. Start the script with `accelerate launch` and create "
            "accelerate.PartialState() (or an Accelerator) before fit, or pass distributed=False."
        )


def is_main():
    return dist.get_rank() == 0


def total(value):
    """The sum of a number over all processes."""
    return int(sum_over_processes(lambda: (torch.tensor([value], dtype=torch.float64),))[0])


def of_all(value):
    """A whole number of each process, in the order of the processes (`list[int]`)."""
    values = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=_device())
    values[dist.get_rank()] = value
    dist.all_reduce(values)
    return values.tolist()


def check_equal(name, value):
    """
    Raises:
        `ValueError`: in all processes, if they do not agree.
    """
    values = of_all(value)
    if len(set(values)) > 1:
        raise ValueError(
            f"The processes' embeddings have {values} {name}. They were not written by one embedding model: embed "
            "the products again."
        )


def in_all(function):
    """
    Calls `function` in every process, and raises in every process if it failed in one: the others would wait for its sums
    for ever.
    """
    result, error = None, None
    try:
        result = function()
    except Exception as caught:
        error = caught
    failed = of_all(error is not None)
    if error is not None:
        raise error
    if any(failed):
        raise RuntimeError(
            f"The distributed fit was given up because process {failed.index(1)} failed; its error is the cause."
        )
    return result


def sum_over_processes(function):
    """
    Returns:
        `tuple[torch.Tensor]`: the sums over all processes of what `function` returns; the same bits in each.
    """
    tensors = in_all(function)
    flat = torch.cat([tensor.flatten() for tensor in tensors]).to(_device())
    dist.all_reduce(flat)
    # Backends may add up in another order in each process; one of them decides, so that codebooks never drift apart.
    dist.broadcast(flat, src=0)
    parts = flat.to(tensors[0].device).split([tensor.numel() for tensor in tensors])
    return tuple(part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True))


def gather_rows(rows):
    """
    Returns:
        `torch.Tensor`: the rows of all processes, in the order of the processes. Shape: (sum of M, D).
    """
    counts = of_all(len(rows))
    gathered = torch.zeros(sum(counts), rows.shape[1], dtype=rows.dtype, device=_device())
    start = sum(counts[: dist.get_rank()])
    gathered[start : start + len(rows)] = rows.to(gathered.device)
    dist.all_reduce(gathered)
    return gathered.to(rows.device)


def _device():
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
