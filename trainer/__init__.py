from .checkpoints import check_checkpoint, finish_checkpoint, last_checkpoint, read_arguments
from .collator import SIDDataCollator, split_prompts
from .data import tokenize_examples
from .launching import check_launch, configure_cpu_launch, describe_training
from .lora import add_lora, load_lora, save_lora
from .losses import SIDVocabulary, answer_loss
from .prompt_checks import check_prompts
from .prompt_datasets import push_prompts
from .publishing import publish_run, push_metrics
from .purchase_logs import read_purchase_log
from .rankings import rank_strings
from .sid_trainer import SIDTrainer
from .tasks import mix_tasks
from .training_args import SIDTrainingArguments

__all__ = [
    "SIDDataCollator",
    "SIDTrainer",
    "SIDTrainingArguments",
    "SIDVocabulary",
    "add_lora",
    "answer_loss",
    "check_checkpoint",
    "check_launch",
    "check_prompts",
    "configure_cpu_launch",
    "describe_training",
    "finish_checkpoint",
    "last_checkpoint",
    "load_lora",
    "mix_tasks",
    "publish_run",
    "push_metrics",
    "push_prompts",
    "rank_strings",
    "read_arguments",
    "read_purchase_log",
    "save_lora",
    "split_prompts",
    "tokenize_examples",
]
