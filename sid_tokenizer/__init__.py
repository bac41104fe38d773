from transformers import AutoConfig, AutoModel, AutoTokenizer

from .catalog import ProductCatalog
from .collisions import CollisionReport
from .diagnosis import Diagnosis, LayerStatistics, diagnose
from .embeddings import EmbeddingReader
from .figures import plot_flow, plot_layers, plot_sweep
from .prompts import PromptTemplate
from .pruning import TokenPruning
from .pruning_sweep import PruningSweep, sweep
from .quantizer import ResidualQuantizer, ResidualQuantizerConfig
from .refit_pruned import refit_pruned
from .rqvae import RQVAE, RQVAEConfig
from .sentencepiece_bpe import fast_tokenizer_from_sentencepiece
from .splitting import split_codes
from .tokenization_baichuan import BaichuanTokenizer
from .tokenization_sid import SIDTokenizer

__all__ = [
    "BaichuanTokenizer",
    "RQVAE",
    "CollisionReport",
    "Diagnosis",
    "EmbeddingReader",
    "LayerStatistics",
    "ProductCatalog",
    "PromptTemplate",
    "PruningSweep",
    "RQVAEConfig",
    "ResidualQuantizer",
    "ResidualQuantizerConfig",
    "SIDTokenizer",
    "TokenPruning",
    "diagnose",
    "fast_tokenizer_from_sentencepiece",
    "plot_flow",
    "plot_layers",
    "plot_sweep",
    "refit_pruned",
    "split_codes",
    "sweep",
]

AutoConfig.register(ResidualQuantizerConfig.model_type, ResidualQuantizerConfig, exist_ok=True)
AutoModel.register(ResidualQuantizerConfig, ResidualQuantizer, exist_ok=True)
AutoConfig.register(RQVAEConfig.model_type, RQVAEConfig, exist_ok=True)
AutoModel.register(RQVAEConfig, RQVAE, exist_ok=True)
# AutoTokenizer finds a class by name only among those registered; the config it is registered under plays no part.
AutoTokenizer.register(ResidualQuantizerConfig, tokenizer_class=SIDTokenizer, exist_ok=True)
