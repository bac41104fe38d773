from .evaluate_metrics import path as metric_path
from .modeling import SIDLogitsProcessor, SIDTrie, initialize_sid_rows, search, sid_generation_config
from .sid_tokenizer import (
    RQVAE,
    Diagnosis,
    EmbeddingReader,
    ProductCatalog,
    PromptTemplate,
    ResidualQuantizer,
    ResidualQuantizerConfig,
    RQVAEConfig,
    SIDTokenizer,
    TokenPruning,
    diagnose,
    plot_flow,
    plot_layers,
)
from .trainer import SIDDataCollator, SIDTrainer, SIDTrainingArguments, tokenize_examples

__version__ = "0.1.0.dev0"

__all__ = [
    "Diagnosis",
    "EmbeddingReader",
    "ProductCatalog",
    "PromptTemplate",
    "ResidualQuantizer",
    "ResidualQuantizerConfig",
    "RQVAE",
    "RQVAEConfig",
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
    "plot_flow",
    "plot_layers",
    "search",
    "sid_generation_config",
    "tokenize_examples",
]
