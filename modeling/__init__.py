from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .beam_search import beam_search
from .code_export import save_custom_generate, save_pipeline_code
from .configuration_baichuan import BaichuanConfig
from .custom_generate import sid_generate
from .generation_options import sid_generation_config
from .logits_process import SIDLogitsProcessor
from .modeling_baichuan import BaichuanForCausalLM, BaichuanModel
from .pipeline import SIDRetrievalPipeline
from .rows import initialize_sid_rows
from .search import search
from .trie import SIDTrie

# Not in the files themselves, which travel with published models: where this package is installed, its classes are used.
AutoConfig.register("baichuan", BaichuanConfig, exist_ok=True)
AutoModel.register(BaichuanConfig, BaichuanModel, exist_ok=True)
AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM, exist_ok=True)

__all__ = [
    "BaichuanConfig",
    "BaichuanForCausalLM",
    "BaichuanModel",
    "SIDLogitsProcessor",
    "SIDRetrievalPipeline",
    "SIDTrie",
    "beam_search",
    "initialize_sid_rows",
    "save_custom_generate",
    "save_pipeline_code",
    "search",
    "sid_generate",
    "sid_generation_config",
]
