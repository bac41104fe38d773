"""A published Baichuan carries its own code: with rqsid, without it, and with rqsid and `trust_remote_code`."""

import json
import shutil

import numpy as np
import pytest
import torch
from fresh_process import run_fresh
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from rqsid import (
    BaichuanConfig,
    BaichuanForCausalLM,
    ProductCatalog,
    ResidualQuantizer,
    ResidualQuantizerConfig,
    SIDTokenizer,
    TokenPruning,
    initialize_sid_rows,
    save_custom_generate,
    search,
)
from rqsid.modeling import BaichuanModel

EXAMPLES = [{"query": "potato chips", "history": ["p3", "p4"]}, {"query": "milk"}, {"profile": "age 35-44"}]
CODE = {"alibi.py", "configuration_baichuan.py", "modeling_baichuan.py", "norm_head.py"}

WITHOUT_RQSID = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "rqsid":
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Blocked())
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

examples, name, adapter, output = json.load(open(sys.argv[1])), *sys.argv[2:]
refusals = []
for auto in (AutoConfig, AutoModelForCausalLM):
    try:
        auto.from_pretrained(name)
    except ValueError as error:
        refusals.append(str(error))
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
model, info = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, output_loading_info=True)
inputs = tokenizer.pad({"input_ids": tokenizer.encode_prompts(examples)["input_ids"]}, return_tensors="pt")
sequences = model.generate(**inputs, tokenizer=tokenizer, top_k=4, beams=60)
with torch.no_grad():
    logits = model(**inputs).logits[:, -1]
model.save_pretrained(output)
with torch.no_grad():
    adapted = PeftModel.from_pretrained(model, adapter).eval()(**inputs).logits[:, -1]
assert "rqsid" not in sys.modules
results = {"info": {key: sorted(map(str, value)) for key, value in info.items()}, "module": type(model).__module__}
results |= {"refusals": refusals, "sequences": sequences.tolist(), "logits": logits.tolist(), "adapted": adapted.tolist()}
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def tokenizer(base_tokenizer):
    random = np.random.default_rng(0)
    quantizer = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=[8, 8, 8], num_iterations=2))
    quantizer.fit(random.standard_normal((100, 6), dtype=np.float32))
    codes = random.integers(0, 8, (40, 3))
    pruning = TokenPruning("top_k", layer=1, top_k=3).fit(codes, [8, 8, 8])
    catalog = ProductCatalog.build([f"p{row}" for row in range(40)], codes, [8, 8, 8], pruning)
    return SIDTokenizer.from_base(base_tokenizer, catalog, quantizer)


@pytest.fixture
def model(make_tiny_model, tokenizer, positions):
    model = make_tiny_model(tokenizer.base_size, position_embedding=positions)
    initialize_sid_rows(model, tokenizer, seed=1)
    return model


pytestmark = pytest.mark.parametrize("base_tokenizer, make_tiny_model", [("llama", "baichuan")], indirect=True)


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["rope", "alibi"])
def test_a_fresh_process_without_rqsid(model, tokenizer, positions, tmp_path):
    """From the Hub's cache, as a download leaves it."""
    folder = tmp_path / "my-model.v2"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_custom_generate(folder)
    assert CODE <= {path.name for path in folder.iterdir()}
    cache = tmp_path / "home" / "hub" / "models--org--shop"
    commit = "0123456789abcdef" * 2 + "01234567"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    shutil.copytree(folder, cache / "snapshots" / commit)

    inputs = tokenizer.pad({"input_ids": tokenizer.encode_prompts(EXAMPLES)["input_ids"]}, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    sids = [list({e["sid"]: 0 for e in ranked})[:4] for ranked in search(model, tokenizer, EXAMPLES, num_beams=60)]
    rows = tokenizer.new_token_ids().tolist()
    config = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        init_lora_weights=False,
        trainable_token_indices={"embed_tokens": rows, "lm_head": rows},
    )
    adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        adapted.get_output_embeddings().token_adapter.trainable_tokens_delta["default"].mul_(3).add_(0.5)
        adapted_logits = adapted(**inputs).logits[:, -1]
    assert (adapted_logits - logits).abs().max() > 0.1
    adapted.save_pretrained(tmp_path / "adapter")

    (tmp_path / "examples.json").write_text(json.dumps(EXAMPLES))
    environment = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "",
    }
    arguments = [tmp_path / "examples.json", "org/shop", tmp_path / "adapter", tmp_path / "again"]
    done = run_fresh(WITHOUT_RQSID, *arguments, env=environment, cwd=tmp_path, without_rqsid=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])

    assert len(result["refusals"]) == 2 and all("trust_remote_code" in refusal for refusal in result["refusals"])
    assert result["module"].startswith("transformers_modules.org.shop.") and not any(result["info"].values())
    torch.testing.assert_close(torch.tensor(result["logits"]), logits, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(result["adapted"]), adapted_logits, atol=1e-4, rtol=1e-5)
    answers = torch.tensor(result["sequences"])[:, inputs["input_ids"].shape[1] :]
    assert tokenizer.sid_strings(tokenizer.find_sids(answers.tolist())) == [sid for ranked in sids for sid in ranked]
    saved, again = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert saved.keys() == again.keys() and "model.layers.0.self_attn.W_pack.weight" in saved
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    assert CODE <= {path.name for path in (tmp_path / "again").iterdir()}


@pytest.mark.parametrize("positions", ["alibi"])
def test_where_rqsid_is_installed_its_own_classes_are_used(model, tokenizer, positions, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert type(AutoTokenizer.from_pretrained(tmp_path / "model")) is SIDTokenizer
    decoder, info = AutoModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert type(decoder) is BaichuanModel and not info["missing_keys"]
    assert torch.equal(decoder.layers[0].self_attn.k_proj.weight, model.model.layers[0].self_attn.k_proj.weight)
    decoder.save_pretrained(tmp_path / "decoder")
    assert CODE <= {path.name for path in (tmp_path / "decoder").iterdir()}
    again = AutoModel.from_pretrained(tmp_path / "decoder", trust_remote_code=True)
    assert type(again) is BaichuanModel and all(map(torch.equal, again.parameters(), decoder.parameters()))
    for trusted in (False, True):
        config = AutoConfig.from_pretrained(tmp_path / "model", trust_remote_code=trusted)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=trusted)
        assert type(config) is BaichuanConfig and type(loaded) is BaichuanForCausalLM
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_baichuan.BaichuanConfig",
        "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
    }
