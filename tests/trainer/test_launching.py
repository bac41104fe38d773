"""Launches that look distributed and are not, optimizers that ZeRO cannot shard, and the line that says what trains."""

import os
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from transformers.training_args import OptimizerNames

from rqsid.trainer.launching import ZERO_OPTIMIZERS, check_launch, configure_cpu_launch, describe_training

LAUNCHER_VARIABLES = (
    "WORLD_SIZE",
    "RANK",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in [*LAUNCHER_VARIABLES, *(name for name in os.environ if name.startswith("ACCELERATE_"))]:
        monkeypatch.delenv(name, raising=False)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make_args(processes=1, kind=DistributedType.NO, backend=None, **args):
    state = SimpleNamespace(num_processes=processes, distributed_type=kind, backend=backend)
    args = {"deepspeed": None, "fsdp": None, "deepspeed_plugin": None, "optim": "adamw_torch_fused"} | args
    return SimpleNamespace(distributed_state=state, **args)


# What accelerate 1.15 makes of each launch on a machine without GPUs; tests/trainer/test_distributed.py starts some of them.
FSDP, DEEPSPEED = {"ACCELERATE_USE_FSDP": "true"}, {"ACCELERATE_USE_DEEPSPEED": "true"}
TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
LONE = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
REFUSED = {
    "torchrun without --use_cpu": (TORCHRUN, {}, "2 processes were started, but this one finds 1"),
    "mpirun": ({"OMPI_COMM_WORLD_SIZE": "4"}, {}, "4 processes were started, but this one finds 1"),
    "DeepSpeed without gloo": (TORCHRUN | DEEPSPEED, {"kind": DistributedType.DEEPSPEED}, "2 processes were started"),
    "accelerate launch --cpu --num_processes 2": (LONE, {}, "asked for several processes and started one"),
    "--ddp_backend gloo": (TORCHRUN, {"processes": 2, "backend": "gloo"}, "synchronise nothing"),
    "FSDP --ddp_backend gloo": (TORCHRUN | FSDP, {"processes": 2, "backend": "gloo"}, "synchronise nothing"),
    "FSDP --use_cpu": (
        TORCHRUN | FSDP,
        {"processes": 2, "kind": DistributedType.MULTI_CPU},
        "FSDP was asked for, but",
    ),
    "--fsdp --use_cpu": (
        TORCHRUN,
        {"processes": 2, "kind": DistributedType.MULTI_CPU, "fsdp": True},
        "FSDP was asked",
    ),
    "DeepSpeed --use_cpu": (
        TORCHRUN | DEEPSPEED,
        {"processes": 2, "kind": DistributedType.MULTI_CPU},
        "DeepSpeed was asked for, but",
    ),
}
ACCEPTED = {
    "one process": ({}, {}),
    "accelerate launch --num_processes 1": ({"ACCELERATE_USE_CPU": "False"}, {}),
    "an address of the cluster's": ({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}, {}),
    "DDP on CPUs": (TORCHRUN, {"processes": 2, "kind": DistributedType.MULTI_CPU, "backend": "gloo"}),
    "DDP on GPUs": (TORCHRUN, {"processes": 2, "kind": DistributedType.MULTI_GPU, "backend": "nccl"}),
    "FSDP": (TORCHRUN | FSDP, {"processes": 2, "kind": DistributedType.MULTI_GPU}),
    "DeepSpeed": (TORCHRUN | DEEPSPEED, {"processes": 2, "kind": DistributedType.DEEPSPEED}),
    "one of DeepSpeed": (TORCHRUN | DEEPSPEED | {"WORLD_SIZE": "1"}, {"kind": DistributedType.DEEPSPEED}),
}


@pytest.mark.parametrize("launch", REFUSED)
def test_refused(launch, monkeypatch):
    environment, args, message = REFUSED[launch]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        check_launch(make_args(**args))


@pytest.mark.parametrize("launch", ACCEPTED)
def test_accepted(launch, monkeypatch):
    environment, args = ACCEPTED[launch]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_launch(make_args(**args))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_shards_elementwise_optimizers_only(stage, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    plugin = DeepSpeedPlugin(zero_stage=stage)
    for name in OptimizerNames:
        args = make_args(kind=DistributedType.DEEPSPEED, deepspeed_plugin=plugin, optim=name)
        if name.value in ZERO_OPTIMIZERS:
            check_launch(args)
        else:
            with pytest.raises(ValueError, match=f"optim={name.value} cannot be sharded by DeepSpeed ZeRO-{stage}"):
                check_launch(args)


def test_optimizers_that_zero_does_not_get(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for config in (
        {"zero_optimization": {"stage": 0}},
        {"zero_optimization": {"stage": 3}, "optimizer": {"type": "AdamW"}},
    ):
        plugin = DeepSpeedPlugin(hf_ds_config=config | {"train_micro_batch_size_per_gpu": 1})
        check_launch(make_args(kind=DistributedType.DEEPSPEED, deepspeed_plugin=plugin, optim="adafactor"))
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    check_launch(make_args(optim="adafactor"))


def test_an_elementwise_optimizer_does_not_see_the_pieces():
    """Why the others are refused: updated in two flat halves, a matrix changes as it does whole, or it does not."""
    from transformers.optimization import Adafactor

    made = {
        "adagrad": lambda weights: torch.optim.Adagrad(weights, lr=0.1),
        "rmsprop": lambda weights: torch.optim.RMSprop(weights, lr=0.1),
        "sgd": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9),
        "adamw_torch": lambda weights: torch.optim.AdamW(weights, lr=0.1),
        "adafactor": lambda weights: Adafactor(weights, lr=0.1, relative_step=False, scale_parameter=False),
    }
    for name, make in made.items():
        torch.manual_seed(0)
        whole = torch.randn(6, 8)
        pieces, gradients = [half.clone() for half in whole.flatten().chunk(2)], torch.randn(3, 6, 8)
        optimizers = make([whole]), make(pieces)
        for gradient in gradients:
            whole.grad = gradient
            for piece, half in zip(pieces, gradient.flatten().chunk(2), strict=True):
                piece.grad = half.clone()
            for optimizer in optimizers:
                optimizer.step()
        assert torch.allclose(whole.flatten(), torch.cat(pieces), atol=1e-6) == (name in ZERO_OPTIMIZERS), name


def test_nothing_is_done_where_there_is_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert configure_cpu_launch() == {}
    assert configure_cpu_launch(use_cpu=True) == {"use_cpu": True}
    assert PartialState._shared_state == {}


@pytest.mark.parametrize("base_tokenizer, make_tiny_model", [("llama", "llama")], indirect=True)
def test_the_line(model, make_trainer, make_purchases):
    for weight in model.model.layers.parameters():
        weight.requires_grad = False
    trainer = make_trainer(
        model, make_purchases(10), bf16=True, per_device_train_batch_size=3, gradient_accumulation_steps=2
    )
    trained = 2 * model.get_input_embeddings().weight.numel() + 32  # input and output rows, and the last norm
    total = sum(weight.numel() for weight in model.parameters())
    tokens = sum(len(row["input_ids"]) + len(row["label_ids"]) for row in trainer.train_dataset) / 10 * 6
    assert describe_training(trainer) == (
        f"Training on 1 process with no engine: {trained:,} of {total:,} parameters; 6 rows (about {tokens:,.0f} tokens) per "
        "optimizer step; float32 parameters, computing in bfloat16, on cpu."
    )


@pytest.mark.parametrize("base_tokenizer, make_tiny_model", [("llama", "llama")], indirect=True)
def test_the_line_of_a_stream(model, make_trainer, make_purchases):
    from datasets import Dataset

    stream = Dataset.from_list(make_purchases(10)).to_iterable_dataset()
    line = describe_training(make_trainer(model, stream, max_steps=1))
    assert "; 8 rows per optimizer step; float32 parameters, on cpu." in line
