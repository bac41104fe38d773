from .logits_process import SIDLogitsProcessor, sid_generation_config
from .rows import initialize_sid_rows
from .search import beam_search, search
from .trie import SIDTrie

__all__ = [
    "SIDLogitsProcessor",
    "SIDTrie",
    "beam_search",
    "initialize_sid_rows",
    "search",
    "sid_generation_config",
]
