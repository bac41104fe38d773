"""Small tokenizers and models, built here so that no test needs a network."""

import gc
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import fresh_process  # noqa: E402, F401  (which keeps the environment as it is before any test)
import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from rqsid import BaichuanConfig, BaichuanForCausalLM  # noqa: E402

# Threads that wait for each other cost tiny models ten times what they save on a busy machine.
torch.set_num_threads(1)


def pytest_collection_finish():
    """What is imported by now stays; collecting garbage, which each training does, takes a third of a second without this."""
    gc.collect()
    gc.freeze()


TEXTS = [
    "potato chips salted 200g bag",
    "fresh milk 1l bottle, organic",
    "age 35-44, income 50-74k, homeowner, household of 3",
    "profile: history: query: product:",
    "chocolate cookies with hazelnut, family pack",
    "orange juice from concentrate 1.5l",
    "toilet tissue 12 rolls extra soft",
    "frozen pizza four cheese 400g",
] * 4


def llama_base_tokenizer():
    """Metaspace BPE with byte fallback, as Llama-2's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    state = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in state["merges"]]
    return LlamaTokenizer(vocab=state["vocab"], merges=merges)


def qwen_base_tokenizer():
    """Byte-level BPE with control tokens behind the vocabulary, as Qwen1.5's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    state = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in state["merges"]]
    base = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=merges,
        unk_token=None,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    return base


def plain_base_tokenizer():
    """Byte-level BPE in the generic fast class, with nothing but an end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


BASE_TOKENIZERS = {"llama": llama_base_tokenizer, "qwen": qwen_base_tokenizer, "plain": plain_base_tokenizer}


def tiny_llama(vocab_size, seed=0, **config):
    torch.manual_seed(seed)
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4} | config
    config = {"max_position_embeddings": 256, "initializer_range": 0.3} | config
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, pad_token_id=None, **config)).eval()


def tiny_qwen2(vocab_size, seed=0, **config):
    torch.manual_seed(seed)
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4} | config
    config = {"max_position_embeddings": 256, "initializer_range": 0.3, "num_key_value_heads": 2} | config
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=vocab_size, **config)).eval()


def tiny_baichuan(vocab_size, seed=0, **config):
    torch.manual_seed(seed)
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4} | config
    config = {"max_position_embeddings": 256, "initializer_range": 0.3, "position_embedding": "alibi"} | config
    model = BaichuanForCausalLM(BaichuanConfig(vocab_size=vocab_size, **config)).eval()
    # Rows of length one give logits that hardly differ where layers are this narrow.
    torch.nn.init.normal_(model.model.norm.weight, 2, 1)
    return model


TINY_MODELS = {"llama": tiny_llama, "qwen": tiny_qwen2, "baichuan": tiny_baichuan}


@pytest.fixture(scope="session", params=list(BASE_TOKENIZERS))
def base_tokenizer(request):
    return BASE_TOKENIZERS[request.param]()


@pytest.fixture(scope="session", params=["llama", "qwen"])
def make_tiny_model(request):
    """`make_tiny_model(vocab_size, seed=0, **config)`, once for Llama and once for Qwen2; Baichuan where a test says so."""
    return TINY_MODELS[request.param]
