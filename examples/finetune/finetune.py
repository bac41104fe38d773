"""
Fine-tunes a Llama, Baichuan 2 or Qwen2 checkpoint on purchases, with any engine that accelerate knows.

    python examples/finetune/finetune.py --model Qwen/Qwen1.5-0.5B --tokenizer my-tokenizer \
        --train train.parquet --validation validation.parquet --output_dir my-model --eval_strategy epoch

    accelerate launch --config_file examples/accelerate_configs/deepspeed_zero2.yaml examples/finetune/finetune.py ...

`--tokenizer` is a folder or a Hub repository that a SIDTokenizer was saved to. Purchases are parquet, CSV or JSON lines with
the columns `profile`, `history` (a list of product ids), `query` and `product`, any of the first three in any subset. All
arguments of SIDTrainingArguments are accepted.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoModelForCausalLM, HfArgumentParser

from rqsid import SIDTokenizer, SIDTrainer, SIDTrainingArguments

FORMATS = {"parquet": "parquet", "csv": "csv", "json": "json", "jsonl": "json"}


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "Checkpoint, local or on the Hub."})
    tokenizer: str = field(metadata={"help": "A saved SIDTokenizer, local or on the Hub."})
    train: str = field(metadata={"help": "Purchases to train on."})
    validation: str | None = field(default=None, metadata={"help": "Purchases to evaluate on."})


def read_purchases(path):
    suffix = path.rsplit(".", 1)[-1]
    if suffix not in FORMATS:
        raise ValueError(f"{path} ends with .{suffix}; purchases are read from {', '.join(FORMATS)} files.")
    return load_dataset(FORMATS[suffix], data_files=path, split="train")


def main():
    script, args = HfArgumentParser((ScriptArguments, SIDTrainingArguments)).parse_args_into_dataclasses()
    trainer = SIDTrainer(
        # Whatever the checkpoint has: updates would be lost in half precision. --bf16 computes in it all the same.
        AutoModelForCausalLM.from_pretrained(script.model, dtype="float32"),
        args,
        train_dataset=read_purchases(script.train),
        eval_dataset=read_purchases(script.validation) if script.validation else None,
        processing_class=SIDTokenizer.from_pretrained(script.tokenizer),
    )
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    if script.validation:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.save_model()


if __name__ == "__main__":
    main()
