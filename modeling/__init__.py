from .beam_search import beam_search
from .code_export import save_custom_generate
from .custom_generate import sid_generate
from .generation_options import sid_generation_config
from .logits_process import SIDLogitsProcessor
from .pipeline import SIDRetrievalPipeline
from .rows import initialize_sid_rows
from .search import search
from .trie import SIDTrie

__all__ = [
    "SIDLogitsProcessor",
    "SIDRetrievalPipeline",
    "SIDTrie",
    "beam_search",
    "initialize_sid_rows",
    "save_custom_generate",
    "search",
    "sid_generate",
    "sid_generation_config",
]
