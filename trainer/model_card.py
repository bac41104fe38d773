"""Model cards written from the run: what was trained on what, how well it ranks, and how to use it."""

import json
import os
from dataclasses import fields
from enum import Enum

import torch
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from transformers.trainer_utils import HubStrategy, has_length
from transformers.utils import logging

from ..sid_tokenizer.card_push import CARD_FILE, generated_comment
from ..sid_tokenizer.card_sections import (
    FIGURE_FILE,
    as_code,
    citation_section,
    diagnose_catalog,
    diagnosis_section,
    layout_section,
    library_versions,
    save_figure,
    versions_section,
)
from ..sid_tokenizer.files import replace_atomically
from .evaluations import as_list, eval_results, hub_dataset, last_evaluations, results_section
from .launching import describe_training
from .lora import REPO_ID

logger = logging.get_logger(__name__)

MARK = generated_comment("model")
# Where the codebook's commit will stand, which is known when it has been pushed.
CODEBOOK_MARK = "<!-- codebook -->"
PIPELINE = "As a pipeline:\n\n```python\nimport rqsid\nfrom transformers import pipeline\n"
TAGS = ["rqsid", "semantic-ids", "generative-retrieval", "recommendation"]
# Arguments of a card, and what they are in its metadata.
TOLD = {"language": "language", "license": "license", "model_name": "model_name", "finetuned_from": "base_model"}
TOLD |= {"tasks": "pipeline_tag", "dataset_tags": "datasets"}
LIBRARIES = ("rqsid", "transformers", "tokenizers", "torch", "accelerate", "datasets")
# Arguments that make a training what it is. Not what else there is: others say where and how often something is written, and
# may hold paths, names and tokens.
ALWAYS_TOLD = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "max_grad_norm")
ALWAYS_TOLD += ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "seed")
TOLD_IF_SET = ("lr_scheduler_kwargs", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "neftune_noise_alpha")
TOLD_IF_SET += ("label_smoothing_factor", "loss_type", "loss_gamma", "loss_normalize", "init_sid_rows", "packing")
TOLD_IF_SET += ("bf16", "fp16", "tf32", "gradient_checkpointing", "torch_compile", "use_liger_kernel", "data_seed")
TOLD_IF_SET += ("train_sampling_strategy", "auto_find_batch_size", "load_best_model_at_end", "metric_for_best_model")
ADAPTER_OPTIONS = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora")


def write_model_card(trainer, *args, **kwargs):
    """
    Writes [`model_card`] and its figure to `output_dir`.

    Args:
        trainer ([`SIDTrainer`])
        *args, **kwargs:
            As [`model_card`], behind the folder.
    """
    folder = trainer.args.output_dir
    os.makedirs(folder, exist_ok=True)
    card = model_card(trainer, folder, *args, **kwargs)
    with replace_atomically(os.path.join(folder, CARD_FILE)) as temporary:
        card.save(temporary)


def model_card(
    trainer,
    folder,
    language=None,
    license=None,
    tags=None,
    model_name=None,
    finetuned_from=None,
    tasks=None,
    dataset_tags=None,
    dataset=None,
    dataset_args=None,
):
    """
    Makes a card of what the trainer knows: base model, data sets, catalog and SIDs, results with their intervals, use, arguments,
    versions, and what it ran on. Paths of this machine are left out.

    A card in `output_dir` keeps what its metadata say of license, language, data sets and tags, unless it is told otherwise here;
    one that was not written by this function keeps its text, too, and gets the results as metadata.

    Args:
        trainer ([`SIDTrainer`]):
            The trainer.
        folder (`str`):
            Where the figure `sid_layers.png` is written.
        language (`str` or `list[str]`, *optional*):
            Languages of queries and profiles.
        license (`str`, *optional*):
            The model's license; the base model's, where a card of it lies on this machine, if not given. It is never guessed.
        tags (`str` or `list[str]`, *optional*):
            More tags.
        model_name (`str`, *optional*):
            The model's name; that of its repository if not given.
        finetuned_from (`str`, *optional*):
            The base model's repository; where it was loaded from if not given, unless that was a folder.
        tasks (`str` or `list[str]`, *optional*):
            The task in the metadata; `"text-generation"`, which is what `AutoModelForCausalLM` makes of the model, if not given.
        dataset_tags, dataset (`str` or `list[str]`, *optional*):
            Data sets on the Hub, and what to call them; those that training and evaluation data came from if not given.
        dataset_args (`str` or `list[str]`, *optional*):
            What more to say of them.

    Returns:
        `huggingface_hub.ModelCard`
    """
    args, tokenizer = trainer.args, trainer.processing_class
    existing = _existing_card(args.output_dir)
    known = existing.data if existing is not None else ModelCardData()
    is_adapter = hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config")

    repo_id = trainer.hub_model_id or args.hub_model_id or os.path.basename(os.path.abspath(args.output_dir))
    name = model_name or repo_id.split("/")[-1]
    base = finetuned_from or _base_model(trainer, is_adapter) or public_id(known.base_model)
    evaluations = last_evaluations(trainer)
    sources = [hub_dataset(trainer.train_dataset), *(evaluation.dataset for evaluation in evaluations.values())]
    datasets = as_list(dataset_tags) or sorted({source["id"] for source in sources if source}) or known.datasets
    data = ModelCardData(
        language=language or known.language,
        license=license or known.license or _license_of(trainer, base),
        base_model=base,
        base_model_relation=None if base is None else "adapter" if is_adapter else "finetune",
        datasets=datasets or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=as_list(tasks)[0] if tasks else "text-generation",
        tags=list(dict.fromkeys([*as_list(known.tags), *TAGS, *as_list(tags)])),
        model_name=name,
        eval_results=eval_results(evaluations, dataset, dataset_args, args.eval_bootstrap) or None,
        co2_eq_emissions=_emissions(trainer),
    )
    diagnosis = diagnose_catalog(tokenizer.catalog, tokenizer.cache)
    figure = _write_figure(diagnosis, tokenizer, folder)  # which a card that somebody made of ours may show, too
    if existing is not None and not is_generated(existing):
        options = {"language": language, "license": license, "finetuned_from": finetuned_from, "tasks": tasks}
        return keep_text(existing, data, options | {"dataset_tags": dataset_tags, "model_name": model_name})
    libraries = [*LIBRARIES, *["peft"] * is_adapter, *["deepspeed"] * trainer.is_deepspeed_enabled]
    sections = [
        MARK,
        f"# {name}",
        _introduction(trainer, base, is_adapter, datasets, dataset),
        _usage(trainer, repo_id, base, is_adapter),
        results_section(trainer, evaluations),
        layout_section(tokenizer),
        CODEBOOK_MARK if args.hub_codebook_id is not None else "",
        "" if diagnosis is None else diagnosis_section(diagnosis, figure),
        _training(trainer, is_adapter),
        _checkpoints(args),
        versions_section(library_versions(libraries)),
        citation_section(),
    ]
    body = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def name_codebook(card, repo_id, revision):
    """
    Says in a card which codebook a model's SIDs are made of.

    Args:
        card (`ModelCard`):
            The card, changed in place.
        repo_id, revision (`str`):
            The codebook's repository, and its commit.
    """
    card.data["sid_codebook"] = {"repo": repo_id, "revision": revision}
    card.text = card.text.replace(
        CODEBOOK_MARK,
        f"The codebook is also in a repository of its own, [{repo_id}](https://huggingface.co/{repo_id}), at commit `{revision}`.",
    )


def public_id(name):
    """
    Returns:
        `str` or `None`: a name that may be one of the Hub; `None` for folders of this machine, which nobody else has.
    """
    if not isinstance(name, str) or os.path.exists(name):
        return None
    return name if REPO_ID.fullmatch(name) else None


def _existing_card(folder):
    path = os.path.join(folder, CARD_FILE)
    if not os.path.isfile(path):
        return None
    return ModelCard.load(path)


def is_generated(card):
    """
    Returns:
        `bool`: whether a card's text is to be written anew, as it is [`model_card`]'s, or a template that nobody has filled in, such
        as `peft` writes beside every adapter.
    """
    return MARK in card.text or not card.text.strip() or "[More Information Needed]" in card.text


def keep_text(card, data, options):
    """
    Puts results into the metadata of somebody's own card, and what they lack. Their words stand.

    Args:
        card (`ModelCard`):
            The card, changed in place.
        data (`ModelCardData`):
            What [`model_card`] found.
        options (`dict`):
            Arguments of [`model_card`]; what was said there counts more than the card.

    Returns:
        `ModelCard`: `card`.
    """
    said = {name for name, value in options.items() if value is not None}
    replaced = {"eval_results", "co2_eq_emissions"} | {TOLD[name] for name in said if name in TOLD}
    if not public_id(card.data.get("base_model")):
        replaced.add("base_model")
    if data.eval_results is not None:
        replaced.add("model_name")
    for name, value in vars(data).items():
        if name in replaced or (value is not None and card.data.get(name) is None):
            card.data[name] = value
    card.data["tags"] = list(dict.fromkeys([*as_list(card.data.get("tags")), *as_list(data.tags)]))
    return card


def _base_model(trainer, is_adapter):
    model = trainer.accelerator.unwrap_model(trainer.model)
    name = model.active_peft_config.base_model_name_or_path if is_adapter else None
    return public_id(name) or public_id(getattr(model.config, "_name_or_path", None))


def _license_of(trainer, base):
    folder = getattr(trainer.model.config, "_name_or_path", None)
    path = os.path.join(folder, CARD_FILE) if folder and os.path.isdir(folder) else None
    if path is None and base is not None:
        path = try_to_load_from_cache(base, CARD_FILE)
    if not isinstance(path, str) or not os.path.isfile(path):
        return None
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.license
    except ValueError:  # no card that could be read
        return None


def _introduction(trainer, base, is_adapter, datasets, called):
    tokenizer, model = trainer.processing_class, trainer.model
    family = getattr(model.config, "model_type", None) or "causal language model"
    what = f"A LoRA adapter, with the rows of SID tokens, for a {family} model" if is_adapter else f"A {family} model"
    made = f" fine-tuned from [{base}](https://huggingface.co/{base})" if base else " trained"
    data = as_list(called) or datasets
    made += f" on {', '.join(data)}" if data else ""
    asked = ", ".join(tokenizer.prompt_template.fields)
    lines = [
        f"{what}{made} with rqsid: asked for ({asked}), it answers with the semantic ID (SID) of a "
        f"product. Constrained search over the SIDs ranks the {len(tokenizer.catalog):,} products of its catalog."
    ]
    if trainer.args.loss_normalize == "sid":
        lines.append(
            'The loss was normalised over the SID tokens and the end token, not over the vocabulary: search it with `normalize="sid"`.'
        )
    return " ".join(lines)


def _usage(trainer, repo_id, base, is_adapter):
    tokenizer, options = trainer.processing_class, "top_k=10"
    if trainer.args.eval_normalize == "sid":
        options += ', normalize="sid"'
    example = f"[{_example(tokenizer)!r}]"
    if is_adapter:
        below = "" if base else ', base_model="…"'
        load = ["from rqsid import SIDTokenizer, load_lora, search", "", f'model = load_lora("{repo_id}"{below})']
    else:
        load = ["from transformers import AutoModelForCausalLM", "from rqsid import SIDTokenizer, search", ""]
        load += [f'model = AutoModelForCausalLM.from_pretrained("{repo_id}")']
    lines = [
        "## Use",
        "",
        "```python",
        *load,
        f'tokenizer = SIDTokenizer.from_pretrained("{repo_id}")',
        f"search(model, tokenizer, {example}, {options})",
        "```",
    ]
    if is_adapter and not base:
        lines += ["", "`base_model` is the model that the adapter was trained on, which is not on the Hub."]
    if not is_adapter:
        lines += ["", PIPELINE, f'retrieve = pipeline("sid-retrieval", model="{repo_id}")']
        lines += [f"retrieve({example}, {options})", "```"]
    return "\n".join(lines)


def _example(tokenizer):
    template, catalog = tokenizer.prompt_template, tokenizer.catalog
    products = [str(product) for product in catalog.product_ids(range(min(2, len(catalog))))]
    example = {"history": products} if "history" in template.fields or template.layout == "session" else {}
    texts = [name for name in template.fields if name != "history"]
    if "query" in texts:
        texts = ["query"]
    return example | dict.fromkeys(texts, "…")


def _training(trainer, is_adapter):
    args, state = trainer.args, trainer.state
    lines = ["## Training", ""]
    step = trainer.loaded_step if trainer.loaded_step is not None else state.global_step
    if step == 0:
        lines += ["This model was not trained here."]
    else:
        lines += [describe_training(trainer)]
        if args.device.type == "cuda":
            lines[-1] += f" The first process ran on {torch.cuda.get_device_name(args.device)}."
        lines[-1] += f" Published is the model after {step:,} of {state.max_steps:,} optimizer steps"
        if trainer.loaded_step is not None:
            lines[-1] += f", the best of those evaluated by {as_code(args.metric_for_best_model)}"
            lines[-1] += f"; {state.global_step:,} steps were trained"
        # Of a stream, Trainer calls the share of max_steps an epoch.
        lines[-1] += f" ({state.epoch:.2f} epochs)." if state.epoch and has_length(trainer.train_dataset) else "."
        seconds = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]
        if seconds:
            lines[-1] += f" Training took {_duration(seconds[-1])}"
            lines[-1] += ", counted from where it was resumed." if trainer.is_resumed else "."
        emissions = _emissions(trainer)
        if emissions:
            lines[-1] += f" It emitted {emissions['emissions']:,.1f} g of CO2 equivalents, as CodeCarbon measured."
    if is_adapter:
        lines += ["", _adapter(trainer.accelerator.unwrap_model(trainer.model).active_peft_config)]
    lines += ["", "| argument | value |", "|---|---|"]
    lines += [f"| {name} | {as_code(value)} |" for name, value in _told_arguments(trainer).items()]
    return "\n".join(lines)


def _adapter(config):
    modules = config.target_modules
    modules = [modules] if isinstance(modules, str) else sorted(modules or ())
    options = {name: getattr(config, name, None) for name in ADAPTER_OPTIONS}
    options = [
        f"{name} {as_code(value)}" for name, value in options.items() if value is not None and value is not False
    ]
    return f"The adapter: {', '.join(options)}; on {', '.join(map(as_code, modules))}."


def _duration(seconds):
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def _told_arguments(trainer):
    args, told = trainer.args, {}
    defaults = {entry.name: entry.default for entry in fields(args)}
    for name in (*ALWAYS_TOLD, *TOLD_IF_SET):
        value = getattr(args, name, None)
        value = value.value if isinstance(value, Enum) else value
        if name in ALWAYS_TOLD or value != defaults.get(name) and value:
            told[name] = json.dumps(value) if isinstance(value, dict) else value
    told.pop("max_steps" if args.max_steps <= 0 else "num_train_epochs")
    if trainer.max_prompt_length is not None:  # which may be what the model's context leaves
        told["max_prompt_length"] = trainer.max_prompt_length
    return told


def _checkpoints(args):
    if args.hub_strategy not in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS) or not args.push_to_hub:
        return ""
    folders = "`last-checkpoint/`" if args.hub_strategy == HubStrategy.CHECKPOINT else "folders `checkpoint-…/`"
    if not args.hub_push_optimizer:
        return (
            f"## Checkpoints\n\nIn {folders}: model and tokenizer, without the optimizer's state, so that training starts anew from "
            "there."
        )
    return (
        f"## Checkpoints\n\nIn {folders}: model and tokenizer, and the states of optimizer, schedule and random numbers, so that "
        "training can go on. **These states are pickles, which run code when they are loaded. Resume only from a repository whose "
        "owner you trust.** Loading the model reads none of them."
    )


def _emissions(trainer):
    """What a callback measured with CodeCarbon, in grams; `None` if none did, or training has not ended."""
    for callback in trainer.callback_handler.callbacks:
        kilograms = getattr(getattr(callback, "tracker", None), "final_emissions", None)
        if isinstance(kilograms, int | float):
            return {
                "emissions": round(kilograms * 1000, 3),
                "source": "CodeCarbon",
                "training_type": "fine-tuning",
            }
    return None


def _write_figure(diagnosis, tokenizer, folder):
    """Drawn once for a version of the catalog."""
    if diagnosis is None:
        return None
    path, version = os.path.join(folder, FIGURE_FILE), tokenizer.catalog.version_id
    kept, content = tokenizer.cache.get("figure", (None, None))
    if kept != version:
        if not save_figure(diagnosis, path):
            return None
        with open(path, "rb") as file:
            tokenizer.cache["figure"] = version, file.read()
    else:
        with open(path, "wb") as file:
            file.write(content)
    return FIGURE_FILE
