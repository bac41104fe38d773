"""
Fine-tunes a Llama, Baichuan 2 or Qwen2 checkpoint on purchases, with any engine that accelerate knows.

    python examples/finetune/finetune.py config.yaml --learning_rate 1e-5
    accelerate launch --config_file examples/accelerate_configs/deepspeed_zero2.yaml \
        examples/finetune/finetune.py config.yaml

The YAML file, or the command line, or both, hold the fields of ScriptArguments (config.py) and all of
SIDTrainingArguments; README.md says what they mean.
"""

import logging
import sys

from config import parse_arguments
from loading import load_model, load_purchases, load_tokenizer

from rqsid import SIDTrainer, last_checkpoint, mix_tasks


def main(argv=None):
    script, args = parse_arguments(sys.argv[1:] if argv is None else argv)
    # The line that says what trains, once.
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("rqsid").setLevel(logging.INFO if args.should_log else logging.WARNING)
    tokenizer = load_tokenizer(script.tokenizer)
    train = load_purchases(script.train, "train", tokenizer, script.streaming)
    validation = load_purchases(script.validation, "validation", tokenizer) if script.validation else None
    if script.tasks:
        train = mix_tasks(train, tokenizer, script.tasks, seed=args.seed)
    lora = None
    if script.lora_r is not None:
        from peft import LoraConfig  # optional: pip install 'rqsid[peft]'

        targets = script.lora_target_modules
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=script.lora_r,
            lora_alpha=script.lora_alpha or 16,
            lora_dropout=script.lora_dropout or 0.0,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
        )
    trainer = SIDTrainer(
        load_model(script.model, tokenizer, script.dtype, script.gguf_file),
        args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        **({"peft_config": lora} if lora is not None else {}),
    )

    checkpoint = args.resume_from_checkpoint
    if checkpoint is None and script.resume:
        checkpoint = last_checkpoint(args.output_dir)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    if validation is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
