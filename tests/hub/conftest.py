"""The loopback Hub, and this process's clients turned towards it."""

import sys
from pathlib import Path
from types import SimpleNamespace

import datasets  # noqa: F401
import evaluate  # noqa: F401
import huggingface_hub
import huggingface_hub.hf_api
import huggingface_hub.hf_file_system
import numpy as np
import pytest
import transformers
from loopback_hub import LoopbackHub
from published_parts import PRODUCTS, SIZES

import rqsid.sid_tokenizer.hub
from rqsid import (
    RQVAE,
    ProductCatalog,
    ResidualQuantizer,
    ResidualQuantizerConfig,
    RQVAEConfig,
    SIDTokenizer,
    TokenPruning,
)
from rqsid.sid_tokenizer import card_sections

LIBRARIES = ("huggingface_hub", "transformers", "datasets", "evaluate", "peft", "accelerate")
REMOTE_CODE = ("transformers_modules", "evaluate_modules", "datasets_modules")


@pytest.fixture
def hub():
    """A Hub of this test's own; see `loopback_hub.LoopbackHub`."""
    with LoopbackHub() as hub:
        yield hub
    assert hub.errors == []


@pytest.fixture
def hub_client(hub, monkeypatch, tmp_path):
    """
    Makes `huggingface_hub`, `transformers`, `datasets` and `evaluate` of this process work against `hub` as alice, with
    empty caches; afterwards they are what they were. Yields an `HfApi`. Waits between retries are not slept but noted in
    `hub.slept`.
    """
    home = tmp_path / "hf_home"
    modules_cache = home / "modules"
    modules_cache.mkdir(parents=True)
    (modules_cache / "__init__.py").touch()
    settings = {
        "ENDPOINT": hub.endpoint,
        "HF_ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HUB_DATASETS_URL": hub.endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}",
        "HUB_EVALUATE_URL": hub.endpoint + "/spaces/{path}/resolve/{revision}/{name}",
        "HF_LIST_ENDPOINT": hub.endpoint + "/api/spaces?filter={type}",
        "HF_HUB_OFFLINE": False,
        "HF_DATASETS_OFFLINE": False,
        "HF_EVALUATE_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HOME": str(home),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_CACHE": str(home / "hub"),
        "HUGGINGFACE_HUB_CACHE": str(home / "hub"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_MODULES_CACHE": str(modules_cache),
        "HF_DATASETS_CACHE": home / "datasets",
        "DOWNLOADED_DATASETS_PATH": home / "datasets" / "downloads",
        "EXTRACTED_DATASETS_PATH": home / "datasets" / "downloads" / "extracted",
        "HF_EVALUATE_CACHE": home / "evaluate",
        "HF_METRICS_CACHE": home / "metrics",
        "DOWNLOADED_EVALUATE_PATH": home / "evaluate" / "downloads",
        "EXTRACTED_EVALUATE_PATH": home / "evaluate" / "downloads" / "extracted",
    }
    # Modules copy settings of others by `from … import`, so each name is replaced wherever it lies.
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in LIBRARIES:
            for setting, value in settings.items():
                if setting in vars(module):
                    old = vars(module)[setting]
                    monkeypatch.setitem(vars(module), setting, Path(value) if isinstance(old, Path) else value)

    file_system = huggingface_hub.hf_file_system.hffs
    for client in (huggingface_hub.hf_api.api, file_system, file_system._api):
        monkeypatch.setattr(client, "endpoint", hub.endpoint)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "")
    monkeypatch.setenv("DISABLE_SAFETENSORS_CONVERSION", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    hub.slept = []
    clock = SimpleNamespace(sleep=hub.slept.append)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", clock)
    monkeypatch.setattr(huggingface_hub.file_download, "time", clock)
    monkeypatch.setattr(rqsid.sid_tokenizer.hub, "time", clock)

    # Code that other tests loaded from other caches lies in modules of the same names.
    monkeypatch.syspath_prepend(str(modules_cache))
    remote = {name: module for name, module in sys.modules.items() if name.split(".")[0] in REMOTE_CODE}
    for name in remote:
        del sys.modules[name]
    huggingface_hub.close_session()
    huggingface_hub.HfFileSystem.clear_instance_cache()

    yield huggingface_hub.HfApi()

    huggingface_hub.close_session()
    huggingface_hub.HfFileSystem.clear_instance_cache()
    for name in [name for name in sys.modules if name.split(".")[0] in REMOTE_CODE]:
        del sys.modules[name]
    sys.modules.update(remote)


@pytest.fixture(scope="session")
def embeddings():
    return np.random.default_rng(0).standard_normal((90, 5)).astype(np.float32)


@pytest.fixture(scope="session")
def quantizers(embeddings):
    config = ResidualQuantizerConfig(codebook_sizes=SIZES, num_iterations=3)
    priced = ResidualQuantizerConfig(codebook_sizes=SIZES, num_iterations=3, capacity=2.0, normalize_residuals=True)
    vae = RQVAEConfig(codebook_sizes=SIZES, hidden_sizes=[8], latent_dim=4, num_epochs=1, batch_size=45)
    return {
        "kmeans": ResidualQuantizer(config).fit(embeddings),
        "priced": ResidualQuantizer(priced).fit(embeddings),
        "rqvae": RQVAE(vae).fit(embeddings),
    }


@pytest.fixture(scope="session")
def make_tokenizer(quantizers, embeddings, base_tokenizer):
    """`make_tokenizer(quantizer=True)`: of 90 products, with two codes pruned; without its quantizer if wanted."""

    def make(quantizer=True, **options):
        codes = quantizers["kmeans"].encode(embeddings)
        pruning = TokenPruning("top_k", layer=1, top_k=2).fit(codes, SIZES)
        catalog = ProductCatalog.build(PRODUCTS, codes, SIZES, pruning, collisions="suffix")
        return SIDTokenizer.from_base(base_tokenizer, catalog, quantizers["kmeans"] if quantizer else None, **options)

    return make


@pytest.fixture
def quick_figures(monkeypatch):
    """Figures take a second each; `test_sections` draws a real one."""
    monkeypatch.setattr(
        card_sections,
        "plot_layers",
        lambda diagnosis, path: Path(path).write_bytes(b"\x89PNG" + diagnosis.counts[0].tobytes()),
    )
