"""What ALiBi cannot do is refused by name."""

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import DynamicCache, GenerationConfig

from rqsid import BaichuanConfig, BaichuanForCausalLM

INPUT_IDS = torch.arange(1, 9)[None]

pytestmark = pytest.mark.parametrize("make_tiny_model", ["baichuan"], indirect=True)


@pytest.fixture
def model(make_tiny_model):
    return make_tiny_model(60)


@pytest.mark.parametrize("attention", ["flex_attention"])
def test_attention_without_biases(model, attention):
    model.set_attn_implementation(attention)
    # Compiling flex attention's masks takes 20 seconds.
    with torch.compiler.set_stance("force_eager"), pytest.raises(ValueError, match="takes no ALiBi biases"):
        model(INPUT_IDS)


def test_continuous_batching(model):
    with pytest.raises(ValueError, match="without the positions that ALiBi needs"):
        model.generate_batch([[3, 4, 5]], generation_config=GenerationConfig(max_new_tokens=3, do_sample=False))


def test_caches_without_positions(model):
    cache = DynamicCache(config=model.config)
    for layer in range(model.config.num_hidden_layers):
        cache.update(torch.zeros(1, 4, 3, 8), torch.zeros(1, 4, 3, 8), layer)
    with pytest.raises(ValueError, match="holds 3 tokens, and the positions of 0"):
        model(INPUT_IDS, past_key_values=cache)
    tuned = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="Prefix tuning fills caches without positions"):
        tuned(input_ids=INPUT_IDS)


def test_masks_of_another_length(model):
    with pytest.raises(ValueError, match="mask is for 5 keys, and there are 8"):
        model(INPUT_IDS, attention_mask=torch.ones(1, 1, 8, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model.model(INPUT_IDS, inputs_embeds=model.get_input_embeddings()(INPUT_IDS))


def test_rotations_beside_alibi(model, tmp_path):
    with pytest.raises(ValueError, match="describe a rotation, and this model has none"):
        BaichuanConfig(position_embedding="alibi", rope_parameters={"rope_type": "linear", "factor": 2.0})
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="describe a rotation, and this model has none"):
        BaichuanForCausalLM.from_pretrained(tmp_path, rope_scaling={"rope_type": "linear", "factor": 2.0})
