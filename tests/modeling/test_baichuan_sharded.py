"""Fused checkpoints where each rank reads a part of them: tensor and pipeline parallelism, FSDP2 and ZeRO-3."""

import json
import os

import pytest
import torch
from fresh_process import run_ranks
from safetensors.torch import load_file

SCRIPT = """
import json, os, sys
import torch, torch.distributed as dist
from transformers.distributed import DistributedConfig
from rqsid import BaichuanForCausalLM
from rqsid.modeling.beam_search import beam_search
from rqsid.modeling.head import OutputHead
from rqsid.modeling.trie import SIDTrie

torch.set_num_threads(1)
dist.init_process_group("gloo")
kind, folder, output = sys.argv[1:]
plain = BaichuanForCausalLM.from_pretrained(folder).eval()
if kind == "ZeRO-3":
    import deepspeed
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo instead, which need not be compiled
    from transformers.integrations import HfDeepSpeedConfig
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    held = HfDeepSpeedConfig(settings)
    model = BaichuanForCausalLM.from_pretrained(folder).eval()
    deepspeed.initialize(model=model, config=settings, dist_init_required=False)
else:
    model = BaichuanForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**{kind: 2})).eval()
input_ids = torch.randint(1, 60, (3, 12), generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    expected, found = plain(input_ids).logits, model(input_ids).logits
    errors = {"logits": (found - expected).abs().max().item(), "spread": expected.std().item()}
    head = model(input_ids[:, :7], use_cache=True)
    rest = model(input_ids[:, 7:], past_key_values=head.past_key_values).logits
    errors["cached"] = (rest - expected[:, 7:]).abs().max().item()
plain(input_ids, labels=input_ids).loss.backward()
if kind == "tp_size":
    loss = model(input_ids, labels=input_ids).loss
    loss.backward()
    gradients = [
        (weight.grad.full_tensor() - other.grad).abs().max().item()
        for weight, other in zip(model.parameters(), plain.parameters()) if hasattr(weight.grad, "full_tensor")
    ]
    errors["gradients"], errors["counted"] = max(gradients), len(gradients)
trie = SIDTrie(torch.cartesian_prod(torch.arange(20, 24), torch.arange(30, 34), torch.arange(40, 44))[::2])
results = []
for searched in (plain, model):
    head = OutputHead(searched, trie.tokens)
    assert not head.is_whole
    results.append(beam_search(searched, input_ids, torch.ones_like(input_ids), trie, 40, 32, head=head))
errors["search"] = (results[0][1] - results[1][1]).abs().max().item()
errors["same SIDs"] = (results[0][0] == results[1][0]).float().mean().item()
if kind != "ZeRO-3":
    model.save_pretrained(os.path.join(output, "saved"))
if dist.get_rank() == 0:
    print(json.dumps(errors))
dist.destroy_process_group()
"""


PIPELINE = """
import json, sys
import torch, torch.distributed as dist
from transformers.distributed import DistributedConfig
from rqsid import BaichuanForCausalLM

torch.set_num_threads(1)
dist.init_process_group("gloo")
plain = BaichuanForCausalLM.from_pretrained(sys.argv[1]).eval()
staged = BaichuanForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(pp_size=2)).eval()
input_ids = torch.randint(1, 60, (3, 12), generator=torch.Generator().manual_seed(1))
mask = torch.ones_like(input_ids)
mask[1, :4] = 0
options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
with torch.no_grad():
    error = (staged(input_ids).logits - plain(input_ids).logits).abs().max().item()
    same = torch.equal(staged.generate(input_ids, **options), plain.generate(input_ids, **options))
if dist.get_rank() == 0:
    print(json.dumps({"error": error, "same": same}))
dist.destroy_process_group()
"""


def launch(script, arguments, folder):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = run_ranks(2, script, *arguments, env=environment, cwd=folder, timeout=500)
    return json.loads(next(line for line in done[0].stdout.splitlines() if line.startswith("{")))


@pytest.mark.slow
@pytest.mark.parametrize("make_tiny_model", ["baichuan"], indirect=True)
def test_stages_of_a_pipeline(make_tiny_model, tmp_path):
    """Each rank has other layers, and the positions of the keys in its part of the cache."""
    make_tiny_model(60).save_pretrained(tmp_path / "model")
    found = launch(PIPELINE, [tmp_path / "model"], tmp_path)
    assert found["error"] < 1e-5 and found["same"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tp_size", "fsdp_size", "ZeRO-3"])
@pytest.mark.parametrize("make_tiny_model", ["baichuan"], indirect=True)
def test_a_fused_checkpoint(make_tiny_model, kind, tmp_path):
    # Six heads: ALiBi's slopes for no power of two, half of them on each rank.
    model = make_tiny_model(60, hidden_size=48, num_attention_heads=6)
    model.save_pretrained(tmp_path / "model")
    errors = launch(SCRIPT, [kind, tmp_path / "model", tmp_path], tmp_path)
    assert errors["spread"] > 0.5
    assert errors["logits"] < 1e-5 and errors["cached"] < 1e-5
    assert errors["search"] < 1e-4 and errors["same SIDs"] == 1
    if kind == "tp_size":
        assert errors["gradients"] < 1e-5 and errors["counted"] == 16  # seven projections a layer, embeddings and head
    if kind != "ZeRO-3":
        before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "saved"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
