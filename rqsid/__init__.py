import importlib
from typing import TYPE_CHECKING

from .evaluate_metrics import path as metric_path
from .modeling import (
    BaichuanConfig,
    BaichuanForCausalLM,
    SIDLogitsProcessor,
    SIDRetrievalPipeline,
    SIDTrie,
    initialize_sid_rows,
    save_custom_generate,
    save_pipeline_code,
    search,
    sid_generate,
    sid_generation_config,
)
from .sid_tokenizer import (
    RQVAE,
    BaichuanTokenizer,
    CollisionReport,
    Diagnosis,
    EmbeddingReader,
    ProductCatalog,
    PromptTemplate,
    PruningSweep,
    ResidualQuantizer,
    ResidualQuantizerConfig,
    RQVAEConfig,
    SIDTokenizer,
    TokenPruning,
    diagnose,
    fast_tokenizer_from_sentencepiece,
    plot_flow,
    plot_layers,
    plot_sweep,
    refit_pruned,
    split_codes,
    sweep,
)

if TYPE_CHECKING:
    from .trainer import (
        SIDDataCollator,
        SIDTrainer,
        SIDTrainingArguments,
        check_prompts,
        last_checkpoint,
        load_lora,
        mix_tasks,
        publish_run,
        push_metrics,
        push_prompts,
        read_purchase_log,
        tokenize_examples,
    )

__version__ = "0.1.0.dev0"

__all__ = [
    "BaichuanConfig",
    "BaichuanForCausalLM",
    "BaichuanTokenizer",
    "CollisionReport",
    "Diagnosis",
    "EmbeddingReader",
    "ProductCatalog",
    "PromptTemplate",
    "PruningSweep",
    "ResidualQuantizer",
    "ResidualQuantizerConfig",
    "RQVAE",
    "RQVAEConfig",
    "SIDDataCollator",
    "SIDLogitsProcessor",
    "SIDRetrievalPipeline",
    "SIDTokenizer",
    "SIDTrainer",
    "SIDTrainingArguments",
    "SIDTrie",
    "TokenPruning",
    "check_prompts",
    "diagnose",
    "fast_tokenizer_from_sentencepiece",
    "initialize_sid_rows",
    "last_checkpoint",
    "load_lora",
    "metric_path",
    "mix_tasks",
    "plot_flow",
    "plot_layers",
    "plot_sweep",
    "publish_run",
    "push_metrics",
    "push_prompts",
    "read_purchase_log",
    "refit_pruned",
    "save_custom_generate",
    "save_pipeline_code",
    "search",
    "sid_generate",
    "sid_generation_config",
    "split_codes",
    "sweep",
    "tokenize_examples",
]

# Imported when first asked for: datasets, evaluate and pandas, which only training needs, are a fifth of the whole import.
_OF_TRAINER = set(__all__) - set(globals())


def __getattr__(name):
    if name != "trainer" and name not in _OF_TRAINER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    trainer = importlib.import_module(f"{__name__}.trainer")
    return trainer if name == "trainer" else getattr(trainer, name)


def __dir__():
    return sorted({*globals(), *__all__})
