"""Small catalogs and quantizers, and a way to look at saved files from a process that knows nothing yet."""

import json
import os

import fresh_process
import numpy as np
import pytest

from rqsid import ProductCatalog, ResidualQuantizer, ResidualQuantizerConfig, SIDTokenizer, TokenPruning


@pytest.fixture(scope="session")
def run_fresh():
    """`run_fresh(code, *args, **environment)`: runs code in a fresh process and returns the JSON of its last line."""

    def run(code, *args, libraries=None, without_rqsid=False, **environment):
        options = {"env": os.environ | environment, "libraries": libraries, "without_rqsid": without_rqsid}
        result = fresh_process.run_fresh(code, *args, check=True, **options)
        return json.loads(result.stdout.strip().splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def make_parts():
    """`make_parts(...)`: embeddings, a fitted quantizer and a catalog of products `p0`, `p1`, …"""

    def make(num_products=60, sizes=(4, 5, 6), seed=0, strategy="top_k", layer=1, collisions="share", **pruning):
        if strategy == "top_k":
            pruning = {"top_k": 2} | pruning
        embeddings = np.random.default_rng(seed).standard_normal((num_products, 6)).astype(np.float32)
        config = ResidualQuantizerConfig(codebook_sizes=list(sizes), num_iterations=5, seed=seed)
        quantizer = ResidualQuantizer(config).fit(embeddings)
        codes = quantizer.encode(embeddings)
        rule = TokenPruning(strategy, layer=layer, **pruning).fit(codes, quantizer.codebook_sizes)
        popularity = np.random.default_rng(seed).integers(0, 5, num_products).astype(float)
        ids = [f"p{row}" for row in range(num_products)]
        catalog = ProductCatalog.build(
            ids, codes, quantizer.codebook_sizes, rule, popularity, [f"text of {i}" for i in ids], collisions
        )
        return embeddings, quantizer, catalog

    return make


# What a tokenizer does, as JSON-able values: run here and in processes that loaded the tokenizer from its folder.
OBSERVE = """
def observe(tokenizer):
    products = [f"p{row}" for row in range(60)]
    examples = [{"profile": {"age": "35-44"}, "history": ["p1", "p7", "p1"], "query": "potato  chips"}, {"query": "é</s>"}]
    texts = ["potato chips salted 200g", " two  spaces", "ünï <a_1> <|im_end|> </s>", ""]
    sids = tokenizer.encode_products(products)
    return {
        "class": type(tokenizer).__name__,
        "sids": sids,
        "sharing": tokenizer.decode_products(sids),
        "text": tokenizer.encode_text(texts),
        "raw": tokenizer(texts)["input_ids"],
        "padded": tokenizer(texts[:2], padding=True)["input_ids"],
        "prompts": tokenizer.encode_prompts(examples),
        "decoded": tokenizer.decode(tokenizer.encode_prompts(examples)["input_ids"][0]),
        "special": [tokenizer.special_tokens_map, tokenizer.all_special_ids, len(tokenizer)],
        "parts": [tokenizer.layer_order, tokenizer.token_format, tokenizer.base_size, tokenizer.max_sid_length],
        "template": tokenizer.prompt_template.to_dict(),
        "texts": tokenizer.catalog.texts(tokenizer.catalog.product_rows(products)),
        "codes": tokenizer.quantizer.encode(tokenizer.quantizer.codebooks[0].detach()).tolist(),
        "chat": [tokenizer.chat_template, tokenizer.model_max_length, tokenizer.padding_side],
    }
"""


@pytest.fixture(scope="session")
def observe():
    """`observe(tokenizer)`: what it does with products, texts and prompts."""
    namespace = {}
    exec(OBSERVE, namespace)
    return lambda tokenizer: json.loads(json.dumps(namespace["observe"](tokenizer)))


@pytest.fixture(scope="session")
def saved(tmp_path_factory, request, make_parts):
    """A folder of everything that can be saved, and the objects: starting a process takes seconds, so all share two."""
    folder = tmp_path_factory.mktemp("saved")
    embeddings, quantizer, catalog = make_parts(collisions="suffix")
    np.save(folder / "embeddings.npy", embeddings)
    quantizer.save_pretrained(folder / "codebook")
    catalog.save(folder / "catalog.safetensors")
    make_base = next(
        plugin for plugin in request.config.pluginmanager.get_plugins() if hasattr(plugin, "BASE_TOKENIZERS")
    ).BASE_TOKENIZERS
    tokenizers, model_types = {}, {"llama": "llama", "qwen": "qwen2"}
    for name in make_base:
        tokenizers[name] = SIDTokenizer.from_base(make_base[name](), catalog, quantizer, layer_order=[1, 0, 2])
        tokenizers[name].save_pretrained(folder / name)
        if name in model_types:  # as when the model lies in the same folder
            (folder / name / "config.json").write_text(json.dumps({"model_type": model_types[name]}))
    return folder, embeddings, quantizer, catalog, tokenizers


@pytest.fixture(scope="session")
def with_package(saved, run_fresh, tmp_path_factory):
    """What a fresh process that imports rqsid finds in the folder of `saved`."""
    return run_fresh(
        OBSERVE
        + """
import json, sys
import numpy as np
from transformers import AutoModel, AutoTokenizer
from rqsid import ProductCatalog, ResidualQuantizer, SIDTokenizer

folder = sys.argv[1]
quantizer, auto = ResidualQuantizer.from_pretrained(folder + "/codebook"), AutoModel.from_pretrained(folder + "/codebook")
embeddings = np.load(folder + "/embeddings.npy")
catalog = ProductCatalog.load(folder + "/catalog.safetensors")
rows = catalog.product_rows([f"p{row}" for row in range(60)][::-1])
found = {
    "codes": quantizer.encode(embeddings).tolist(),
    "auto": [type(auto).__name__, auto.encode(embeddings).tolist()],
    "codebooks": [codebook.numpy().tobytes().hex() for codebook in quantizer.codebooks],
    "decoded": quantizer.decode(quantizer.encode(embeddings)).tobytes().hex(),
    "config": [quantizer.config.seed, quantizer.config.num_iterations, quantizer.codebook_sizes],
    "rows": rows.tolist(),
    "sids": catalog.sid_codes[catalog.sid_rows(rows)].tolist(),
    "expanded": [part.tolist() for part in catalog.expand_sids(np.arange(10)[None], 15)],
    "pruning": catalog.pruning.to_dict(),
}
for name in ("llama", "qwen", "plain"):
    found[name] = observe(SIDTokenizer.from_pretrained(f"{folder}/{name}"))
    auto = AutoTokenizer.from_pretrained(f"{folder}/{name}")
    found[name + " auto"] = [isinstance(auto, SIDTokenizer), observe(auto)]
    found[name + " trusted"] = observe(AutoTokenizer.from_pretrained(f"{folder}/{name}", trust_remote_code=True))
print(json.dumps(found))
""",
        saved[0],
        HF_MODULES_CACHE=str(tmp_path_factory.mktemp("modules")),
    )


@pytest.fixture(scope="session")
def without_package(saved, run_fresh, tmp_path_factory):
    """The same through `trust_remote_code`, in a process that cannot import rqsid; and after saving from there."""
    return run_fresh(
        OBSERVE
        + """
import json, sys
from transformers import AutoTokenizer

folder, second, found = sys.argv[1], sys.argv[2], {}
for name in ("llama", "qwen", "plain"):
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/{name}", trust_remote_code=True)
    assert type(tokenizer).__module__.startswith("transformers_modules")
    found[name] = observe(tokenizer)
    tokenizer.save_pretrained(f"{second}/{name}")
    found[name + " again"] = observe(AutoTokenizer.from_pretrained(f"{second}/{name}", trust_remote_code=True))
print(json.dumps(found))
""",
        saved[0],
        tmp_path_factory.mktemp("second"),
        without_rqsid=True,
        HF_MODULES_CACHE=str(tmp_path_factory.mktemp("modules")),
    )


@pytest.fixture(scope="session")
def sid_tokenizer(base_tokenizer, make_parts):
    """On each base tokenizer, with codebooks and SIDs of two or three tokens."""
    _, quantizer, catalog = make_parts()
    return SIDTokenizer.from_base(base_tokenizer, catalog, quantizer)
