"""What a launch really is: refuses those that only look distributed, and says in one line what trains."""

import os

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers.utils import strtobool

# Variables by which MPI's launchers say how many processes they started; accelerate reads the same ones.
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# ZeRO hands an optimizer flat pieces of the parameters, so it must treat each element by itself. DeepSpeed's own list (in
# deepspeed/runtime/zero/utils.py) has the Adam family and Adagrad; SGD and RMSprop are elementwise as well. Others
# factorize or project matrices that the pieces no longer are (Adafactor, GaLore, APOLLO), step inside the backward pass
# (LOMO, layerwise ones), or have a mode that the wrapped optimizer cannot be switched to (schedule-free ones).
ZERO_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_torch_npu_fused", "adagrad", "sgd", "rmsprop")


def configure_cpu_launch(use_cpu=False):
    """
    Lets the command that trains on GPUs train on CPUs: whatever `accelerate launch` or `torchrun` started, with DDP,
    DeepSpeed or FSDP2, over gloo. On a machine with an accelerator nothing is done, unless `use_cpu` is set.

    On its own a launch without GPUs is not distributed, or not by the engine that was asked for: accelerate drops the
    engine where CPUs are asked for, and the process group where they are not.

    Call it before the [`SIDTrainingArguments`] are made.

    Args:
        use_cpu (`bool`, *optional*, defaults to `False`):
            Whether to leave accelerators alone.

    Returns:
        `dict`: arguments for [`SIDTrainingArguments`] that go with it; empty on a machine with an accelerator.

    Example:

    ```python
    args = SIDTrainingArguments("my-model", **configure_cpu_launch())
    ```
    """
    if torch.accelerator.is_available() and not use_cpu:
        return {}
    engine = _requested_engine()
    if engine is None or _started_processes() == 1:
        return {"use_cpu": True}
    # As TrainingArguments does for states of its own: an earlier run's engine must not serve this one.
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    # accelerate puts a model on an engine only where the processes are called so, which its CPU route never does.
    PartialState._shared_state["distributed_type"] = {
        "DeepSpeed": DistributedType.DEEPSPEED,
        "FSDP": DistributedType.MULTI_GPU,
    }[engine]
    return {"use_cpu": True, "accelerator_config": {"use_configured_state": True}}


def check_launch(args):
    """
    Refuses a launch that is not what it looks like: processes that know nothing of each other or do not synchronise, an
    engine that was asked for and is not used, and an optimizer whose state DeepSpeed ZeRO cannot shard.

    Args:
        args (`TrainingArguments`):
            The arguments, after which the processes are what they will be.

    Raises:
        `ValueError`: with what was started, what would have run, and what to do.
    """
    state, started = args.distributed_state, _started_processes()
    engine = _requested_engine(args)
    remedy = (
        "On GPUs, check that torch.cuda.is_available() in every process; on CPUs, pass what "
        "configure_cpu_launch() returns to SIDTrainingArguments, as examples/finetune/finetune.py does"
        + (" (--use_cpu alone does for DDP)." if engine is None else f" (--use_cpu alone would drop {engine}).")
    )
    if state.num_processes < started:
        raise ValueError(
            f"{started} processes were started, but this one finds {state.num_processes}: each would train alone, on all the "
            f"data, and write to the same folder. {remedy}"
        )
    if state.num_processes == 1 and _is_lone_accelerate_launch():
        raise ValueError(
            "`accelerate launch` was asked for several processes and started one: that is what it does with --cpu, a MULTI_CPU "
            "or a NO configuration, and without a GPU (or MASTER_ADDR was set already). Add --multi_gpu (which starts processes on CPUs, too), use a "
            "configuration of examples/accelerate_configs, or `torchrun --nproc_per_node 2`. If one process is meant, unset "
            f"MASTER_ADDR (now {os.environ['MASTER_ADDR']})."
        )
    if state.num_processes > 1 and state.distributed_type == DistributedType.NO:
        raise ValueError(
            f"{state.num_processes} processes have a process group ({state.backend}), but accelerate takes them for single ones "
            f"and would synchronise nothing: that is what --ddp_backend without GPUs does. Leave it out. {remedy}"
        )
    if state.num_processes > 1 and engine is not None and state.distributed_type == DistributedType.MULTI_CPU:
        raise ValueError(
            f"{engine} was asked for, but --use_cpu makes accelerate train with plain DDP instead, each process holding "
            f"everything. {remedy} To have DDP, launch with examples/accelerate_configs/ddp.yaml."
        )
    if engine == "DeepSpeed":
        _check_zero_optimizer(args)


def describe_training(trainer):
    """
    One line on what trains: processes, engine, parameters, work per optimizer step, number formats.

    Args:
        trainer (`Trainer`):
            Made, not necessarily trained yet.

    Returns:
        `str`
    """
    args, accelerator = trainer.args, trainer.accelerator
    # ZeRO-3 leaves empty tensors in the place of parameters that it has taken apart.
    sizes = [(getattr(weight, "ds_numel", weight.numel()), weight) for weight in trainer.model.parameters()]
    trainable = sum(size for size, weight in sizes if weight.requires_grad)
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for _, weight in sizes if weight.requires_grad})
    prompts = trainer._train_batch_size * args.gradient_accumulation_steps * args.world_size
    tokens = _mean_tokens(trainer.train_dataset)
    precision = {"bf16": ", computing in bfloat16", "fp16": ", computing in float16"}
    return (
        f"Training on {args.world_size} process{'es' if args.world_size > 1 else ''} with {_engine_name(accelerator, args)}: "
        f"{trainable:,} of {sum(size for size, _ in sizes):,} parameters; {prompts:,} rows "
        + (f"(about {prompts * tokens:,.0f} tokens) " if tokens is not None else "")
        + f"per optimizer step; {' and '.join(dtypes)} parameters{precision.get(args.mixed_precision, '')}, on "
        f"{args.device.type}."
    )


def _started_processes():
    """What the launcher said; accelerate's and torchrun's variable first."""
    for name in ("WORLD_SIZE", *MPI_SIZES):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 1


def _requested_engine(args=None):
    """`"DeepSpeed"`, `"FSDP"` or `None`: by the launcher's configuration, or by the arguments."""
    if strtobool(os.environ.get("ACCELERATE_USE_DEEPSPEED", "false")) or getattr(args, "deepspeed", None):
        return "DeepSpeed"
    if strtobool(os.environ.get("ACCELERATE_USE_FSDP", "false")) or getattr(args, "fsdp", None):
        return "FSDP"
    return None


def _is_lone_accelerate_launch():
    # Its launcher of single processes leaves an address to meet at where more than one was wanted, and no rank.
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", *MPI_SIZES)
    return {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys() and not any(name in os.environ for name in ranks)


def _check_zero_optimizer(args):
    config = args.deepspeed_plugin.hf_ds_config if args.deepspeed_plugin is not None else None
    if (
        config is None
        or config.get_value("optimizer") is not None
        or (config.get_value("zero_optimization.stage") or 0) == 0
    ):
        return  # an optimizer of DeepSpeed's own, or nothing that is sharded
    name = getattr(args.optim, "value", args.optim)
    if name not in ZERO_OPTIMIZERS:
        # Trainer and accelerate set "zero_allow_untested_optimizer", so that DeepSpeed itself would not say a word.
        raise ValueError(
            f"optim={name} cannot be sharded by DeepSpeed ZeRO-{config.get_value('zero_optimization.stage')}, which hands the "
            f"optimizer flat pieces of the parameters. Use one of {', '.join(ZERO_OPTIMIZERS)}, or FSDP2 or DDP with {name}."
        )


def _engine_name(accelerator, args):
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return f"DeepSpeed ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    if kind == DistributedType.FSDP:
        return f"FSDP{accelerator.state.fsdp_plugin.fsdp_version}"
    if kind == DistributedType.NO:
        return "no engine" if args.n_gpu <= 1 else f"DataParallel over {args.n_gpu} GPUs"
    return "DDP"


def _mean_tokens(dataset, sample=256):
    """Tokens of a row, the answer included, from a few rows spread over the dataset; `None` if they are not known yet."""
    columns = getattr(dataset, "column_names", None) or ()
    if "input_ids" not in columns or not hasattr(dataset, "__len__"):
        return None
    rows = dataset[:: max(1, len(dataset) // sample)]
    lengths = [len(row) for row in rows["input_ids"]]
    if "label_ids" in columns:
        lengths += [len(row) for row in rows["label_ids"]]
    return sum(lengths) / len(rows["input_ids"])
