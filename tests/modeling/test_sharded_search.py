"""Search where ranks hold parts of the model each: same results, and no rank waits for one that has fewer prompts."""

import json
import os

import pytest
from fresh_process import run_ranks

SCRIPT = """
import copy, json, os, sys
import torch, torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM
from rqsid.modeling.beam_search import beam_search
from rqsid.modeling.head import OutputHead
from rqsid.modeling.trie import SIDTrie

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
kind, output = sys.argv[1:]
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3
)
plain = LlamaForCausalLM(config).eval()
if kind.endswith("lora"):
    from peft import LoraConfig, get_peft_model
    plain = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]))
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
trie = SIDTrie(torch.cartesian_prod(torch.arange(20, 24), torch.arange(30, 34), torch.arange(40, 44))[::2])
small = SIDTrie(torch.tensor([[20], [21]]))
# Of rank 0 five prompts, decoded one by one; of rank 1 one prompt, or none, and a trie of another depth.
count = [5, 1][rank]
input_ids = torch.randint(1, 60, (5, 40), generator=torch.Generator().manual_seed(1))[:count]
jobs = [(input_ids, trie), (input_ids[: count - 1], trie), (input_ids, [trie, small][rank])]
sizes = [{"max_memory": 1}, {"max_memory": 1}, {}]
vocabulary = torch.tensor([1, *range(20, 60, 3)])
options = [("vocab", None), ("sid", vocabulary)]
search = lambda model, ids, trie, normalize, more: beam_search(
    model, ids, torch.ones_like(ids), trie, 20, 8, *normalize, **more
)
expected = [search(plain, *job, normalize, {}) for job in jobs for normalize in options]
if kind.startswith("fsdp2"):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (2,))
    model = copy.deepcopy(plain)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
else:
    import deepspeed
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo instead, which need not be compiled
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    engine = deepspeed.initialize(model=copy.deepcopy(plain), config=settings, dist_init_required=False)[0]
    model = engine.module.eval()
local = sum(p.to_local().numel() if kind.startswith("fsdp2") else p.ds_tensor.numel() for p in model.parameters())
found = [search(model, *job, normalize, more) for job, more in zip(jobs, sizes) for normalize in options]
# One head for all batches of an evaluation.
head = OutputHead(model, trie.tokens)
rows, scores = beam_search(model, input_ids, torch.ones_like(input_ids), trie, 20, 8, head=head)
equal = [torch.equal(a[0], b[0]) and torch.allclose(a[1], b[1], atol=1e-4) for a, b in zip(found, expected)]
equal.append(torch.equal(rows, expected[0][0]) and torch.allclose(scores, expected[0][1], atol=1e-4))
share = local / sum(p.numel() for p in plain.parameters())
with open(f"{output}.{rank}", "w") as file:
    json.dump({"equal": equal, "share": share, "finite": bool(expected[0][1].isfinite().all())}, file)
dist.barrier()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2-lora", "zero3"])
def test_sharded_search_is_plain_search(tmp_path, kind):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    run_ranks(2, SCRIPT, kind, tmp_path / "result", env=environment)
    for rank in range(2):
        result = json.loads((tmp_path / f"result.{rank}").read_text())
        assert result["equal"] == [True] * 7 and result["finite"] and result["share"] < 0.6
