"""Small sentencepiece models, trained here, and a folder as Baichuan2 publishes it."""

import io
import json
import os
import random

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

ENGLISH = (
    "potato chips salted bag fresh milk bottle organic chocolate cookies with hazelnut family pack orange juice from"
)
CHINESE = (
    "新鲜牛奶 有机 薯片 原味 巧克力 饼干 家庭装 橙汁 浓缩 卫生纸 超柔 冷冻 比萨 四种奶酪 中国人民 商品 搜索".split()
)

# Baichuan2's own settings, as its report gives them (arXiv 2309.10305, section 2.2) and its model shows them.
BAICHUAN_SETTINGS = {
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "byte_fallback": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "max_sentencepiece_length": 32,
    "character_coverage": 0.9999,
}
# The two that mark the turns of a chat have their true ids, 195 and 196.
BAICHUAN_SYMBOLS = [f"<filler_{i}>" for i in range(86)] + [f"<reserved_{i}>" for i in range(110)]

# As published with the 7B models.
CONFIG = {
    "architectures": ["BaichuanForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_baichuan.BaichuanConfig",
        "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_max_length": 4096,
    "model_type": "baichuan",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 125696,
    "z_loss_weight": 0,
}


def corpus(num_lines=400, seed=0):
    """Product titles in English and Chinese, numbers, and code with runs of spaces."""
    rng = random.Random(seed)
    words = ENGLISH.split()
    lines = []
    for _ in range(num_lines):
        title = [rng.choice(words) for _ in range(rng.randint(2, 7))]
        title.insert(rng.randint(0, len(title)), f"{rng.randint(1, 2000)}{rng.choice(['g', 'ml', 'kg', ''])}")
        lines.append(" ".join(title))
        lines.append("".join(rng.choice(CHINESE) for _ in range(rng.randint(2, 6))) + f"{rng.randint(1, 500)}克")
        lines.append(
            " " * rng.randint(1, 9)
            + "if x:"
            + " " * rng.randint(2, 5)
            + rng.choice(words)
            + "\t# "
            + rng.choice(CHINESE)
        )
    return lines


def train(vocab_size=600, model_type="bpe", lines=None, **settings):
    """
    Returns:
        `bytes`: a sentencepiece model.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus() if lines is None else lines),
        model_writer=model,
        model_type=model_type,
        vocab_size=vocab_size,
        num_threads=1,
        minloglevel=2,
        **settings,
    )
    return model.getvalue()


def train_baichuan(vocab_size=1000, symbols=BAICHUAN_SYMBOLS):
    """
    Returns:
        `bytes`: a small sentencepiece model with the settings of Baichuan2.
    """
    return train(vocab_size, user_defined_symbols=symbols, **BAICHUAN_SETTINGS)


def build_model(pieces, normalizer=(), trainer=()):
    """
    Args:
        pieces (`list[tuple[str, float, int]]`):
            Piece, score and type of each; `<unk>`, `<s>` and `</s>` are put in front.

    Returns:
        `bytes`: a BPE model of exactly these pieces.
    """
    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = 2
    for spec, settings in ((proto.normalizer_spec, normalizer), (proto.trainer_spec, trainer)):
        for name, value in dict(settings).items():
            setattr(spec, name, value)
    for text, score, kind in [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *pieces]:
        piece = proto.pieces.add()
        piece.piece, piece.score, piece.type = text, score, kind
    return proto.SerializeToString()


def write_baichuan_folder(folder, model=None, remote_code=None, **config):
    """
    Writes what a checkpoint of Baichuan2 holds beside its weights and code.

    Args:
        folder (`str` or `os.PathLike`):
            An existing folder.
        model (`bytes`, *optional*):
            The sentencepiece model, one of [`train_baichuan`] if not given.
        remote_code (`str`, *optional*):
            What `tokenization_baichuan.py` and `configuration_baichuan.py` hold; no such files if not given.
        config (`dict`):
            Entries of `config.json` that differ from the 7B model's.
    """

    def added(content):
        flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": True}
        return {"__type": "AddedToken", "content": content, **flags}

    files = {
        "config.json": {**CONFIG, **config},
        "generation_config.json": {
            "bos_token_id": 1,
            "eos_token_id": 2,
            "user_token_id": 195,
            "assistant_token_id": 196,
        },
        "tokenizer_config.json": {
            "add_bos_token": False,
            "add_eos_token": False,
            "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
            "bos_token": added("<s>"),
            "clean_up_tokenization_spaces": False,
            "eos_token": added("</s>"),
            "model_max_length": 4096,
            "pad_token": added("<unk>"),
            "sp_model_kwargs": {},
            "tokenizer_class": "BaichuanTokenizer",
            "unk_token": added("<unk>"),
        },
    }
    for name, content in files.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(content, file)
    with open(os.path.join(folder, "tokenizer.model"), "wb") as file:
        file.write(train_baichuan() if model is None else model)
    if remote_code is not None:
        for name in ("tokenization_baichuan.py", "configuration_baichuan.py"):
            with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                file.write(remote_code)
