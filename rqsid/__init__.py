from .evaluate_metrics import path as metric_path
from .modeling import SIDLogitsProcessor, SIDTrie, initialize_sid_rows, search, sid_generation_config
from .sid_tokenizer import (
    Diagnosis,
    ProductCatalog,
    PromptTemplate,
    ResidualQuantizer,
    ResidualQuantizerConfig,
    SIDTokenizer,
    TokenPruning,
    diagnose,
)
from .trainer import SIDDataCollator, SIDTrainer, SIDTrainingArguments, tokenize_examples

__version__ = "0.1.0.dev0"

__all__ = [
    "Diagnosis",
    "ProductCatalog",
    "PromptTemplate",
    "ResidualQuantizer",
    "ResidualQuantizerConfig",
    "SIDDataCollator",
    "SIDLogitsProcessor",
    "SIDTokenizer",
    "SIDTrainer",
    "SIDTrainingArguments",
    "SIDTrie",
    "TokenPruning",
    "diagnose",
    "initialize_sid_rows",
    "metric_path",
    "search",
    "sid_generation_config",
    "tokenize_examples",
]
