import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rqsid.modeling import head as head_module
from rqsid.modeling.head import OutputHead, read_rows

FIRST, LAST, SIZE = 20, 43, 60
TOKENS = torch.arange(FIRST, LAST + 1)
VOCABULARY = torch.tensor([1, 20, 22, 23, 30, 43, 59])


def make_model(model_type="llama", **config):
    """A tiny model whose weights are large enough for its logits to differ."""
    torch.manual_seed(0)
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4} | config
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, vocab_size=SIZE, **config)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def expected(model, input_ids, vocabulary):
    logits = model(input_ids=input_ids, use_cache=False).logits.float()
    support = logits if vocabulary is None else logits[..., vocabulary]
    return (logits - support.logsumexp(-1, keepdim=True))[..., FIRST : LAST + 1]


@torch.no_grad()
def assert_scores(model, vocabulary, is_whole=False, atol=1e-5):
    input_ids = torch.arange(12).view(2, 6)
    head = OutputHead(model, TOKENS, "vocab" if vocabulary is None else "sid", vocabulary)
    assert head.is_whole == is_whole
    truth = expected(model, input_ids, vocabulary)
    torch.testing.assert_close(head.log_probs(head(input_ids=input_ids)), truth, atol=atol, rtol=1e-5)
    last = head.log_probs(head(last=2, input_ids=input_ids))
    torch.testing.assert_close(last, truth[:, -2:], atol=atol, rtol=1e-5)
    return head


@pytest.mark.parametrize("vocabulary", [None, VOCABULARY, torch.arange(FIRST, LAST + 1)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_linear_head_is_used_in_place(vocabulary, tied):
    model = make_model(tie_word_embeddings=tied)
    head = assert_scores(model, vocabulary)
    if vocabulary is None:
        assert head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    else:
        assert len(head.weight) == LAST - FIRST + 1 + sum(not FIRST <= token <= LAST for token in vocabulary.tolist())


@pytest.mark.parametrize("block", [1, 100, 5000])
@pytest.mark.parametrize("vocabulary", [None, VOCABULARY])
def test_blocks_of_any_size(monkeypatch, block, vocabulary):
    monkeypatch.setattr(head_module, "BLOCK_ON_CPU", block)
    assert_scores(make_model(), vocabulary)


@pytest.mark.parametrize("vocabulary", [None, VOCABULARY])
def test_a_head_with_bias(vocabulary):
    model = make_model("phi")
    assert model.lm_head.bias.abs().min() > 0
    assert_scores(model, vocabulary)


@pytest.mark.parametrize("vocabulary", [None, VOCABULARY])
@pytest.mark.parametrize(
    "model_type, option", [("cohere", {"logit_scale": 0.25}), ("granite", {"logits_scaling": 4.0})]
)
def test_scaled_logits_are_taken_from_the_model(model_type, option, vocabulary):
    model = make_model(model_type, num_key_value_heads=2, eos_token_id=1, **option)
    assert_scores(model, vocabulary, is_whole=True)


@pytest.mark.parametrize("vocabulary", [None, VOCABULARY])
def test_a_hook_on_the_head_is_not_passed_over(vocabulary):
    model = make_model()
    handle = model.lm_head.register_forward_hook(lambda module, args, logits: logits * 2 + 3)
    # Twice the logits is a linear map still, and merged; a hyperbolic tangent is none.
    assert not torch.equal(assert_scores(model, vocabulary).weight, model.lm_head.weight)
    handle.remove()
    model.lm_head.register_forward_hook(lambda module, args, logits: logits.tanh())
    assert_scores(model, vocabulary, is_whole=True)


@pytest.mark.parametrize("vocabulary", [None, VOCABULARY])
@pytest.mark.parametrize(
    "tied, config",
    [
        (False, {"target_modules": ["q_proj", "lm_head"]}),
        (False, {"trainable_token_indices": {"embed_tokens": [20, 22, 43], "lm_head": [20, 22, 43]}}),
        (True, {"trainable_token_indices": [20, 22, 43]}),
        (False, {"modules_to_save": ["lm_head"]}),
    ],
)
def test_adapters_on_the_head_are_merged(tied, config, vocabulary):
    plain = make_model(tie_word_embeddings=tied)
    before = expected(plain, torch.arange(12).view(2, 6), vocabulary)
    import peft

    config = {"target_modules": ["q_proj"]} | config
    model = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(r=4, **config))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    weight, bias = read_rows(model, None)
    assert {name: module.training for name, module in model.named_modules()} == modes
    rows = (weight - plain.lm_head.weight).abs().amax(1) > 1e-3
    changed = config.get("trainable_token_indices")
    assert rows.nonzero()[:, 0].tolist() == ([20, 22, 43] if changed else list(range(SIZE))) and bias is None
    model.eval()
    assert not torch.allclose(expected(model, torch.arange(12).view(2, 6), vocabulary), before, atol=1e-2)
    assert_scores(model, vocabulary, atol=1e-4)


def test_siblings_do_not_tie_in_bf16():
    model = make_model(hidden_size=64).bfloat16()
    for parameter in (model.lm_head.weight,):
        parameter.data[FIRST : LAST + 1] = parameter.data[FIRST] + torch.randn(LAST - FIRST + 1, 64).bfloat16() * 0.002
    head = OutputHead(model, TOKENS)
    input_ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        found = head.log_probs(head(input_ids=input_ids))[:, -1]
        hidden = model.model(input_ids=input_ids).last_hidden_state[:, -1]
        own = model(input_ids=input_ids).logits[:, -1, FIRST : LAST + 1]
    exact = hidden.double() @ model.lm_head.weight[FIRST : LAST + 1].double().T
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.diff(dim=1), exact.diff(dim=1).float(), atol=1e-4, rtol=0)
    assert len(own[0].unique()) < len(found[0].unique()) == LAST - FIRST + 1


def test_bad_normalisation():
    model = make_model()
    with pytest.raises(ValueError, match="got 'sid' and no `vocabulary`"):
        OutputHead(model, TOKENS, "sid")
    with pytest.raises(ValueError, match="got 'vocab' and a `vocabulary`"):
        OutputHead(model, TOKENS, "vocab", VOCABULARY)
