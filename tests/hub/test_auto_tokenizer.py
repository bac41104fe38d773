"""
What `AutoTokenizer` makes of a tokenizer on the Hub, by the model's type, whether the repository names our class (`auto_map`),
and what the process knows of it. transformers picks another class without a word in some of these cases.
"""

import json
import os

import numpy as np
import pytest
from fresh_process import run_fresh

from rqsid import ProductCatalog, ResidualQuantizer, ResidualQuantizerConfig, SIDTokenizer, TokenPruning
from rqsid.sid_tokenizer.hub import push_folder

MODEL_TYPES = {"llama": "llama", "qwen": "qwen2"}
TEXTS = ["potato chips salted 200g", " two  spaces", "ünï <a_1> </s>"]

LOAD = """
import json, sys

texts, names, stages = json.loads(sys.argv[1])
if "without" not in stages:
    import rqsid
from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import REGISTERED_TOKENIZER_CLASSES, TOKENIZER_MAPPING

found = {}
for stage in stages:
    if stage == "unregistered":
        del REGISTERED_TOKENIZER_CLASSES["SIDTokenizer"], TOKENIZER_MAPPING._extra_content[rqsid.ResidualQuantizerConfig]
    for name in names:
        for trust in (False, True):
            try:
                tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
            except ValueError as error:
                found[f"{name} {trust} {stage}"] = ["ValueError", "trust_remote_code" in str(error), None]
                continue
            kind = type(tokenizer)
            remote = "remote " if kind.__module__.startswith("transformers_modules") else ""
            sids = tokenizer.encode_products(["p0", "p7"]) if hasattr(tokenizer, "catalog") else None
            found[f"{name} {trust} {stage}"] = [remote + kind.__name__, tokenizer(texts)["input_ids"], sids]
print(json.dumps(found))
"""

# As measured: (model, auto_map, trust_remote_code) -> class, where rqsid is not installed, imported but not registered, imported.
EXPECTED = {
    ("llama", False, False): ("TokenizersBackend", "TokenizersBackend", "SIDTokenizer"),
    ("llama", False, True): ("TokenizersBackend", "TokenizersBackend", "SIDTokenizer"),
    ("qwen", False, False): ("Qwen2Tokenizer", "Qwen2Tokenizer", "Qwen2Tokenizer"),
    ("qwen", False, True): ("Qwen2Tokenizer", "Qwen2Tokenizer", "Qwen2Tokenizer"),
    ("llama", True, False): ("ValueError", "ValueError", "SIDTokenizer"),
    ("llama", True, True): ("remote SIDTokenizer", "remote SIDTokenizer", "SIDTokenizer"),
    ("qwen", True, False): ("TokenizersBackend", "TokenizersBackend", "SIDTokenizer"),
    ("qwen", True, True): ("remote SIDTokenizer", "remote SIDTokenizer", "remote SIDTokenizer"),
}


@pytest.fixture
def tokenizers(request):
    shared = next(part for part in request.config.pluginmanager.get_plugins() if hasattr(part, "BASE_TOKENIZERS"))
    embeddings = np.random.default_rng(0).standard_normal((40, 6), dtype=np.float32)
    quantizer = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=[4, 4, 4], num_iterations=2)).fit(embeddings)
    codes = quantizer.encode(embeddings)
    pruning = TokenPruning("top_k", layer=1, top_k=2).fit(codes, [4, 4, 4])
    catalog = ProductCatalog.build([f"p{row}" for row in range(40)], codes, [4, 4, 4], pruning)
    return {name: SIDTokenizer.from_base(shared.BASE_TOKENIZERS[name](), catalog, quantizer) for name in MODEL_TYPES}


@pytest.mark.slow
def test_which_class_auto_tokenizer_picks(hub, hub_client, tokenizers, tmp_path):
    names = {}
    for name, tokenizer in tokenizers.items():
        for auto_map in (True, False):
            folder, names[name, auto_map] = tmp_path / f"{name}-{auto_map}", f"alice/{name}-{auto_map}"
            tokenizer.save_pretrained(folder)
            (folder / "config.json").write_text(json.dumps({"model_type": MODEL_TYPES[name]}))
            if not auto_map:
                config = json.loads((folder / "tokenizer_config.json").read_text())
                del config["auto_map"]
                (folder / "tokenizer_config.json").write_text(json.dumps(config))
            push_folder(str(folder), names[name, auto_map])

    expected_ids = {name: tokenizer(TEXTS)["input_ids"] for name, tokenizer in tokenizers.items()}
    expected_sids = {name: tokenizer.encode_products(["p0", "p7"]) for name, tokenizer in tokenizers.items()}
    found = {}
    for stages in (["without"], ["registered", "unregistered"]):
        environment = os.environ | hub.environment(tmp_path / stages[0])
        arguments = json.dumps([TEXTS, list(names.values()), stages])
        done = run_fresh(LOAD, arguments, env=environment, without_rqsid=stages[0] == "without", check=True)
        found |= json.loads(done.stdout.splitlines()[-1])
    for (name, auto_map, trust), classes in EXPECTED.items():
        for stage, expected in zip(("without", "unregistered", "registered"), classes, strict=True):
            kind, ids, sids = found[f"{names[name, auto_map]} {trust} {stage}"]
            case = (name, auto_map, trust, stage)
            assert kind == expected, case
            if kind == "ValueError":
                assert ids, case  # it asks for trust_remote_code
                continue
            # Whatever the class, SID tokens are tokens; but only ours knows products.
            assert ids == expected_ids[name], case
            assert sids == (expected_sids[name] if kind.endswith("SIDTokenizer") else None), case

    # The sure way.
    for (name, _), repo_id in names.items():
        assert SIDTokenizer.from_pretrained(repo_id).encode_products(["p0", "p7"]) == expected_sids[name]
