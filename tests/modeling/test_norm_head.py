"""The normalised output layer, and everybody who replaces it: resizing, adapters, quantizers, users."""

import copy
import pickle

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from rqsid import BaichuanForCausalLM
from rqsid.modeling.head import OutputHead
from rqsid.modeling.norm_head import NormHead, as_norm_head

INPUT_IDS = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(0))
TRAINED = list(range(50, 60))
BOTH = {"embed_tokens": TRAINED, "lm_head": TRAINED}

on_baichuan = pytest.mark.parametrize("make_tiny_model", ["baichuan"], indirect=True)
pytestmark = on_baichuan


@pytest.fixture
def model(make_tiny_model):
    return make_tiny_model(60)


@torch.no_grad()
def logits_of(model):
    return model(INPUT_IDS, use_cache=False).logits


@torch.no_grad()
def truth_of(model):
    """Every row normalised by hand, in float64."""
    hidden = model.get_decoder()(INPUT_IDS, use_cache=False).last_hidden_state.double()
    rows = model.get_output_embeddings().weight.double()
    return (hidden @ (rows / rows.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12)).T).float()


def train(model, steps=3):
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.05)
    for _ in range(steps):
        model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_logits_and_their_independence_of_row_lengths(model):
    before = logits_of(model)
    torch.testing.assert_close(before, truth_of(model), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        model.lm_head.weight *= torch.linspace(0.01, 100, 60)[:, None]
    torch.testing.assert_close(logits_of(model), before, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        model.lm_head.weight[7] = 0
    assert (logits_of(model)[..., 7] == 0).all()


def test_nothing_is_written_back(model):
    weight = model.lm_head.weight.detach().clone()
    lengths = weight.norm(dim=1)
    assert (lengths - 1).abs().min() > 0.1  # so that a normalised copy would show
    for training in (True, False, True):
        model.train(training)(INPUT_IDS)
    assert torch.equal(model.lm_head.weight, weight)


def test_gradients_leave_the_length_of_rows_alone(model):
    model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    weight, gradient = model.lm_head.weight, model.lm_head.weight.grad
    assert gradient.abs().max() > 1e-3
    along = (weight * gradient).sum(1) / (weight.norm(dim=1) * gradient.norm(dim=1).clamp_min(1e-12))
    assert along.abs().max() < 1e-4


def test_half_precision(model):
    expected = logits_of(model)
    half = logits_of(copy.deepcopy(model).to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).abs().max() < 0.1 * expected.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert logits_of(model).dtype == torch.bfloat16


def test_resizing_keeps_it_normalised(model):
    before = logits_of(model)
    model.resize_token_embeddings(70, mean_resizing=False)
    assert type(model.lm_head) is NormHead and model.lm_head.weight.shape == (70, 32)
    torch.testing.assert_close(logits_of(model)[..., :60], before)
    torch.testing.assert_close(logits_of(model), truth_of(model), atol=1e-5, rtol=1e-5)
    model.resize_token_embeddings(60)  # of which INPUT_IDS are
    assert type(model.lm_head) is NormHead
    torch.testing.assert_close(logits_of(model), before)


def test_a_plain_layer_in_its_place_is_normalised(model):
    layer = nn.Linear(32, 60, bias=False)
    model.set_output_embeddings(layer)
    assert type(model.lm_head) is NormHead and model.lm_head.weight is layer.weight
    torch.testing.assert_close(logits_of(model), truth_of(model), atol=1e-5, rtol=1e-5)
    tied = copy.deepcopy(model)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    torch.testing.assert_close(logits_of(tied), truth_of(tied), atol=1e-5, rtol=1e-5)


def test_the_first_version_has_a_plain_head(make_tiny_model):
    model = make_tiny_model(60, normalize_head=False)
    assert type(model.lm_head) is nn.Linear
    model.resize_token_embeddings(64)
    assert type(model.lm_head) is nn.Linear


@torch.no_grad()
@pytest.mark.parametrize("normalize, vocabulary", [("vocab", None), ("sid", torch.tensor([1, 50, 51, 59]))])
def test_the_search_reads_its_rows(model, normalize, vocabulary):
    tokens = torch.arange(50, 60)
    head = OutputHead(model, tokens, normalize, vocabulary)
    assert not head.is_whole
    logits = logits_of(model).double()
    support = logits if vocabulary is None else logits[..., vocabulary]
    expected = logits[..., 50:] - support.logsumexp(-1, keepdim=True)
    found = head.log_probs(head(input_ids=INPUT_IDS, use_cache=False))
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


# Adapters


def test_rows_of_a_mixed_batch(model):
    before = logits_of(model)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, trainable_token_indices=BOTH)
    adapted = get_peft_model(model, config).eval()
    after = logits_of(train(adapted).eval())
    with torch.no_grad():
        mixed = adapted(INPUT_IDS, use_cache=False, adapter_names=["__base__", "default"]).logits
    torch.testing.assert_close(mixed, torch.stack([before[0], after[1]]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_the_embeddings_alone_or_tied(make_tiny_model, tied):
    """`trainable_token_indices` as a list, as for a tied model."""
    model = make_tiny_model(60, tie_word_embeddings=tied)
    before = logits_of(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=TRAINED)).eval()
    torch.testing.assert_close(logits_of(adapted), before, atol=1e-5, rtol=1e-5)
    after = logits_of(train(adapted).eval())
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, truth_of(adapted.get_base_model()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear", "trainable_token_indices": BOTH},
        {"target_modules": ["q_proj", "v_proj"], "trainable_token_indices": BOTH},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_lora_starts_where_the_model_was_and_ends_as_it_was_trained(make_tiny_model, model, options, tmp_path):
    before = logits_of(model)
    adapted = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **options)).eval()
    torch.testing.assert_close(logits_of(adapted), before)
    head = adapted.get_output_embeddings().weight.detach().clone()
    train(adapted)
    moved = (adapted.get_output_embeddings().weight - head).abs().amax(1)
    assert (moved[TRAINED] > 0).all()
    if "trainable_token_indices" in options:
        assert (moved[: TRAINED[0]] == 0).all()
    after = logits_of(adapted)
    assert (after - before).abs().max() > 0.1
    # What the weights are now, with every row normalised by hand.
    torch.testing.assert_close(after, truth_of(adapted.get_base_model()), atol=1e-5, rtol=1e-5)
    with adapted.disable_adapter():
        assert torch.equal(logits_of(adapted), before)
    torch.testing.assert_close(logits_of(copy.deepcopy(adapted)), after)
    # Between processes, as DDP's launchers do; nothing of the kind is saved.
    torch.testing.assert_close(logits_of(pickle.loads(pickle.dumps(adapted))), after)

    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_tiny_model(60), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(loaded), after)
    merged = loaded.merge_and_unload()
    assert type(merged) is BaichuanForCausalLM and type(merged.lm_head) is NormHead
    torch.testing.assert_close(logits_of(merged), after, atol=2e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = BaichuanForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits_of(again), logits_of(merged))


def test_two_adapters_and_merging_in_place(model):
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=BOTH)
    adapted = get_peft_model(model, config).eval()
    first = logits_of(train(adapted, 1))
    other = {"embed_tokens": [1, 2], "lm_head": [1, 2]}
    adapted.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=other))
    assert torch.equal(logits_of(adapted), first)
    adapted.set_adapter("other")
    torch.testing.assert_close(logits_of(train(adapted, 1)), truth_of(adapted.get_base_model()), atol=1e-5, rtol=1e-5)
    adapted.set_adapter("default")
    torch.testing.assert_close(logits_of(adapted), first)
    adapted.merge_adapter()
    torch.testing.assert_close(logits_of(adapted), first, atol=2e-5, rtol=1e-5)
    adapted.unmerge_adapter()
    torch.testing.assert_close(logits_of(adapted), first, atol=2e-5, rtol=1e-5)


def test_the_frozen_layer_gets_no_gradient(model):
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=BOTH))
    adapted(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    base = adapted.get_output_embeddings().token_adapter.base_layer
    assert type(base) is NormHead and base.weight.grad is None


def test_what_cannot_be_normalised_is_refused(model):
    with pytest.raises(ValueError, match="Leave lm_head out of `target_modules`"):
        get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="bias=False"):
        model.lm_head = nn.Linear(32, 60)
    with pytest.raises(TypeError, match="Embedding.*without bias"):
        model.lm_head = nn.Embedding(60, 32)

    class Quantized(nn.Linear):
        pass

    with pytest.raises(TypeError, match="Quantized.*leave lm_head out"):
        as_norm_head(Quantized(32, 60, bias=False))
    assert as_norm_head(None) is None
    assert peft.__version__  # the refusals above are peft's own types
