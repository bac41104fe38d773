from transformers import AutoConfig, AutoModel, AutoTokenizer

from .catalog import ProductCatalog
from .diagnosis import Diagnosis, LayerStatistics, diagnose
from .prompts import PromptTemplate
from .pruning import TokenPruning
from .quantizer import ResidualQuantizer, ResidualQuantizerConfig
from .tokenization_sid import SIDTokenizer

__all__ = [
    "Diagnosis",
    "LayerStatistics",
    "ProductCatalog",
    "PromptTemplate",
    "ResidualQuantizer",
    "ResidualQuantizerConfig",
    "SIDTokenizer",
    "TokenPruning",
    "diagnose",
]

AutoConfig.register(ResidualQuantizerConfig.model_type, ResidualQuantizerConfig, exist_ok=True)
AutoModel.register(ResidualQuantizerConfig, ResidualQuantizer, exist_ok=True)
# AutoTokenizer finds a class by name only among those registered; the config it is registered under plays no part.
AutoTokenizer.register(ResidualQuantizerConfig, tokenizer_class=SIDTokenizer, exist_ok=True)
