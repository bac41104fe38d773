from .collator import SIDDataCollator, split_prompts
from .data import tokenize_examples
from .losses import SIDVocabulary, answer_loss
from .purchase_logs import read_purchase_log
from .sid_trainer import SIDTrainer, rank_strings
from .training_args import SIDTrainingArguments

__all__ = [
    "SIDDataCollator",
    "SIDTrainer",
    "SIDTrainingArguments",
    "SIDVocabulary",
    "answer_loss",
    "rank_strings",
    "read_purchase_log",
    "split_prompts",
    "tokenize_examples",
]
