"""The Trainer: fine-tunes a causal language model to answer with SIDs, and evaluates by searching the catalog."""

import contextlib
import functools
import os

import evaluate
import torch
from transformers import AutoModelForCausalLM, Trainer, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length
from transformers.utils import logging

from ..evaluate_metrics import path as metric_path
from ..modeling.beam_search import MAX_MEMORY, beam_search, default_num_beams
from ..modeling.head import OutputHead
from ..modeling.rows import initialize_sid_rows
from ..modeling.trie import SIDTrie
from ..sid_tokenizer.hub import hub_errors
from .checkpoints import (
    checkpoint_to_resume,
    remove_unfinished,
    rotate_checkpoints,
    stream_position,
    whole_checkpoint,
    write_arguments,
)
from .collator import IGNORED, SIDDataCollator, split_prompts
from .evaluations import Evaluation, hub_dataset, split_bounds
from .hub_pushes import make_codebook_repo, push_checkpoint, push_model
from .launching import check_launch, describe_training
from .lora import add_lora, check_lora, save_lora
from .losses import SIDVocabulary, answer_loss, token_losses
from .model_card import write_model_card
from .packing import check_packing
from .preparation import prepare_dataset
from .rankings import check_best_metric, rank_strings, recall_cutoffs
from .training_args import SIDTrainingArguments

logger = logging.get_logger(__name__)


class SIDTrainer(Trainer):
    r"""
    A `Trainer` for (profile, history, query) -> SID.

    Prompts are built with the tokenizer's template, the loss is taken on the answer's tokens only, and logits are
    computed for them only. Evaluation ranks the catalog for each prompt by constrained beam search and reports Recall,
    NDCG and MRR, item-level first, through the `sid_retrieval` metric.

    Args:
        model (`PreTrainedModel` or `str`):
            A causal language model, or what `AutoModelForCausalLM.from_pretrained` takes. It gets rows for the SID tokens
            if it has none.
        args ([`SIDTrainingArguments`]):
            The arguments.
        train_dataset (`Dataset`, `IterableDataset` or `list[dict]`, *optional*):
            Purchases: `product`, the id of the product bought, and columns of the prompt template's fields, which are
            `profile` (text or a mapping), `history` (a list of product ids, oldest first) and `query` (text) if the
            tokenizer has the default template. A list of dicts, or rows of [`tokenize_examples`], will do too.
        eval_dataset (*optional*):
            As `train_dataset`, or a dict of several.
        processing_class ([`SIDTokenizer`]):
            The tokenizer.
        data_collator (*optional*):
            [`SIDDataCollator`] if not given.
        compute_metrics (*optional*):
            Gets an `EvalPrediction` whose predictions are (product rows, SID rows), both of shape (N, eval_top_k), best
            first and -1 where a list ends, and whose `label_ids` are the product rows bought, of shape (N,). The
            `sid_retrieval` metrics if not given.
        peft_config (`peft.LoraConfig`, *optional*):
            Trains an adapter and the SID tokens' rows, and nothing else; see [`~rqsid.trainer.add_lora`].
        **kwargs:
            As `Trainer`.

    Raises:
        `TypeError`: if `processing_class` is no [`SIDTokenizer`], `args` are no [`SIDTrainingArguments`], there is no
            model, or a dataset is none of the above.
        `ValueError`: if `max_prompt_length` and an answer exceed the model's context, or a dataset is empty, lacks columns, or
            holds answers that the loss cannot be taken on.

    Example:

    ```python
    trainer = SIDTrainer(model, args, train_dataset=train, eval_dataset=validation, processing_class=tokenizer)
    trainer.train()
    trainer.evaluate()
    ```
    """

    def __init__(
        self,
        model,
        args=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        data_collator=None,
        compute_metrics=None,
        peft_config=None,
        **kwargs,
    ):
        # By duck, because a tokenizer that was loaded with trust_remote_code is of another class of the same name.
        if not hasattr(processing_class, "encode_prompts"):
            raise TypeError(
                f"processing_class is {type(processing_class).__name__}; SIDTrainer needs a SIDTokenizer, which "
                "SIDTokenizer.from_base makes."
            )
        if args is None:
            args = SIDTrainingArguments("sid_trainer_output")
        if not isinstance(args, SIDTrainingArguments):
            raise TypeError(f"args is {type(args).__name__}; SIDTrainer needs SIDTrainingArguments.")
        check_launch(args)
        if args.n_gpu > 1:
            raise ValueError(
                f"One process sees {args.n_gpu} GPUs and would train on them with torch.nn.DataParallel, which this loss does not "
                "support and which is slower than DDP. Start the script with `accelerate launch`, or let it see one GPU "
                "(CUDA_VISIBLE_DEVICES=0)."
            )
        if args.hub_codebook_id is not None and getattr(processing_class, "quantizer", None) is None:
            raise ValueError(
                f"hub_codebook_id={args.hub_codebook_id!r}, but the tokenizer has no quantizer, as that of an imported index. Leave "
                "it out, or give the quantizer to SIDTokenizer.from_base."
            )
        if model is None:
            raise TypeError(
                "model is None. SIDTrainer gives the model its SID rows before training, so it takes no model_init: "
                "make the model first and pass it."
            )
        if isinstance(model, str):
            # Whatever type the checkpoint has: updates would be lost in half precision.
            model = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
        if getattr(model.config, "custom_pipelines", None):
            # A pipeline's code lies beside the model that was loaded, not beside the one that will be saved.
            model.config.custom_pipelines = {
                task: entry for task, entry in model.config.custom_pipelines.items() if task != "sid-retrieval"
            } or None
        initialize_sid_rows(model, processing_class, init=args.init_sid_rows, seed=args.seed)
        if peft_config is not None:
            set_seed(args.seed)  # as Trainer does, but before adapters are drawn
            model = add_lora(model, processing_class, peft_config)
        elif hasattr(model, "get_base_model"):
            check_lora(model, processing_class, model.active_peft_config)
        self.max_prompt_length = _max_prompt_length(args, model, processing_class)
        self._limits = self.max_prompt_length, getattr(model.config, "max_position_embeddings", None)
        self._loss_vocabulary = SIDVocabulary(processing_class) if args.loss_normalize == "sid" else None
        self._loss_options = {
            "loss_type": args.loss_type,
            "gamma": args.loss_gamma,
            "label_smoothing": args.label_smoothing_factor,
        }
        self._head, self._is_evaluating = None, False
        self._metric, self._bounds = None, {}
        # What the model card reports: [`Evaluation`]s by prefix of their metrics and by step; at which step the model was what it is,
        # if not at the last; and whether training began with a checkpoint.
        self.evaluations, self.loaded_step, self.is_resumed = {}, None, False
        # On one process only, but asked for on all. The codebook's repository has its full name when it has been made.
        self.hub_codebook_id = None
        self.push_in_progress, self.push_executor, self.pushed_codebooks = None, None, {}

        train_dataset = self._prepare(train_dataset, "train", processing_class, args, training=True)
        if isinstance(eval_dataset, dict):
            eval_dataset = {
                name: self._prepare(dataset, name, processing_class, args) for name, dataset in eval_dataset.items()
            }
        else:
            eval_dataset = self._prepare(eval_dataset, "eval", processing_class, args)
        if args.packing:
            check_packing(model)
        if data_collator is None:
            data_collator = SIDDataCollator(processing_class, packing=args.packing)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics if compute_metrics is not None else self._compute_metrics,
            **kwargs,
        )
        if compute_metrics is None and not isinstance(eval_dataset, dict):
            check_best_metric(args)
        # compute_loss takes the labels as they are, and divides by their number whatever the model's own loss can do.
        self._loss_shifts_labels, self.model_accepts_loss_kwargs = False, True
        halves = {weight.dtype for weight in self.model.parameters() if weight.requires_grad and weight.itemsize < 4}
        if halves and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            # The engines keep copies in float32 to add updates to.
            logger.warning(
                f"Parameters of {', '.join(sorted(map(str, halves)))} are trained as they are: most updates of a usual learning "
                'rate are smaller than their last digit, and lost. Load the model with dtype="float32", and set bf16=True to '
                "compute in half precision."
            )
        # Kept with the tokenizer: serving must cut histories where training did.
        processing_class.prompt_template.max_length = self.max_prompt_length

    def _prepare(self, dataset, name, tokenizer, args, training=False):
        if dataset is None:
            return None
        vocabulary = self._loss_vocabulary if training else None
        return prepare_dataset(dataset, name, tokenizer, args, self._limits, vocabulary, training)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """
        As `Trainer.train`. `resume_from_checkpoint=True` goes on from the newest checkpoint in `args.output_dir` that is whole.

        Raises:
            `ValueError`: if the checkpoint is not whole, or there is none.
        """
        resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args)
        self._finish_current_push()
        self.evaluations, self.loaded_step, self.is_resumed = {}, None, resume_from_checkpoint is not None
        remove_unfinished(self.args.output_dir, self.args.should_save)
        # transformers 5.23 marks a model that was evaluated first as prepared, and would then train it without DDP, each
        # process on its own.
        if self.model_wrapped is self.model and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self.model._is_accelerate_prepared = False
        if self.is_world_process_zero():
            logger.info(describe_training(self))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        position = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None or self.args.ignore_data_skip or has_length(self.train_dataset):
            return position
        if self.state.global_step >= max_steps:
            return num_train_epochs, 0  # nothing is left to train; transformers would take one step more
        return stream_position(resume_from_checkpoint, self.args.gradient_accumulation_steps)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As `Trainer.get_batch_samples`; what a stream leaves over at its end is no step."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(batches) == num_batches or has_length(self.train_dataset):
            return batches, num_items
        if self.state.global_step == 0:
            raise ValueError(
                f"The train dataset is a stream that ended after {len(batches)} batches, before the {num_batches} of one optimizer "
                "step were there. Set a smaller gradient_accumulation_steps or per_device_train_batch_size."
            )
        # transformers 5.23 would add these gradients, scaled as those of a whole step, to the first step of the next pass.
        self.control.should_epoch_stop = True
        return [], None

    def _save_checkpoint(self, model, trial):
        folder = os.path.join(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with whole_checkpoint(folder, self.args):
            super()._save_checkpoint(model, trial)
        if self.args.push_to_hub:
            self._push_from_checkpoint(folder)
        if self.args.should_save:
            rotate_checkpoints(folder, self.args.save_total_limit, self.state.best_model_checkpoint)

    def save_model(self, output_dir=None, _internal_call=False):
        """As `Trainer.save_model`, which with FSDP's sharded state dicts would save neither model nor tokenizer."""
        if _internal_call:
            return super().save_model(output_dir, _internal_call=True)
        self.save_whole_model(output_dir)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def save_whole_model(self, output_dir=None):
        """Saves model, tokenizer and arguments, and pushes nothing. Every process calls it."""
        if not self.saves_shards():
            return super().save_model(output_dir, _internal_call=True)
        plugin = self.accelerator.state.fsdp_plugin
        state_dict_type = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            return super().save_model(output_dir, _internal_call=True)
        finally:
            plugin.set_state_dict_type(state_dict_type)

    def saves_shards(self):
        """Whether checkpoints hold FSDP's shards, and no model that `from_pretrained` could load."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None) if self.is_fsdp_enabled else None
        return plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type)

    def _load_best_model(self):
        super()._load_best_model()
        if os.path.isdir(self.state.best_model_checkpoint):  # else Trainer has said that nothing was loaded
            self.loaded_step = self.state.best_global_step

    def _push_from_checkpoint(self, checkpoint_folder):
        push_checkpoint(self, checkpoint_folder)

    def init_hf_repo(self, token=None, private=None):
        """As `Trainer.init_hf_repo`, with errors of one line; makes `hub_codebook_id`, too."""
        token = token if token is not None else self.args.hub_token
        with hub_errors(self.args.hub_model_id or os.path.basename(os.path.abspath(self.args.output_dir)), token):
            super().init_hf_repo(token, private)
        if self.args.hub_codebook_id is not None and self.is_world_process_zero():
            make_codebook_repo(self, token, private)

    def push_to_hub(
        self,
        commit_message="End of training",
        blocking=True,
        token=None,
        revision=None,
        private=None,
        tag=None,
        **kwargs,
    ):
        """
        Pushes model (or adapter), tokenizer and model card, as they are now, in one commit; the codebook before, to
        `hub_codebook_id`, if there is one. Every process calls it. Pushes of checkpoints that are under way are waited for; what of
        those failed was said in warnings.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                What the commit says.
            blocking (`bool`, *optional*, defaults to `True`):
                Whether to wait until it has been pushed.
            token (`str`, *optional*):
                `args.hub_token` if not given.
            revision (`str`, *optional*):
                The branch to push to, made if there is none; `args.hub_revision` if not given.
            private (`bool`, *optional*):
                Whether a repository that is made is private; `args.hub_private_repo` if not given.
            tag (`str`, *optional*):
                A tag for the commit.
            **kwargs:
                As [`~SIDTrainer.create_model_card`]: `license`, `language`, `tags`, `model_name`, `finetuned_from`, `dataset` …

        Returns:
            `CommitInfo`, or a `Future` of one if not `blocking`; `None` in all processes but the first.

        Raises:
            `PermissionError`, `ValueError`, `ConnectionError`: if the push fails; see [`~rqsid.sid_tokenizer.hub.push_folder`].
        """
        return push_model(self, commit_message, blocking, token, revision, private, tag, kwargs)

    def create_model_card(self, *args, **kwargs):
        """
        Writes the model card, `README.md` in `output_dir`, from the run; see [`~rqsid.trainer.model_card.model_card`]. A card that
        somebody else wrote keeps its text; its metadata get the results, and what they lack.

        Args:
            **kwargs:
                As `Trainer.create_model_card`: `language`, `license`, `tags`, `model_name`, `finetuned_from`, `tasks`,
                `dataset_tags`, `dataset`, `dataset_args`.
        """
        if self.is_world_process_zero():
            write_model_card(self, *args, **kwargs)

    def _save(self, output_dir=None, state_dict=None):
        # As Trainer's, which pickles the arguments in the end, tokens included.
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        if not self.args.should_save and not self.is_distributed_loading_by_transformers:
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        save = functools.partial(save_lora, model) if hasattr(model, "get_base_model") else model.save_pretrained
        save(output_dir, state_dict=state_dict, is_main_process=self.args.should_save)
        if self.args.should_save:
            self.processing_class.save_pretrained(output_dir)
            write_arguments(self.args, output_dir)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """As `Trainer.evaluate`; `eval_dataset` may hold raw purchases."""
        if eval_dataset is not None and not isinstance(eval_dataset, dict | str):
            eval_dataset = self._prepare(eval_dataset, metric_key_prefix, self.processing_class, self.args)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        """
        As `Trainer.predict`; `test_dataset` may hold raw purchases. Predictions are (product rows, SID rows), both of shape
        (N, eval_top_k), `label_ids` the product rows bought.
        """
        test_dataset = self._prepare(test_dataset, metric_key_prefix, self.processing_class, self.args)
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def get_eval_dataloader(self, eval_dataset=None):
        """As `Trainer.get_eval_dataloader`. Prompts are ranked for in rows of their own, also where training packs them."""
        with self._padded():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        """As `Trainer.get_test_dataloader`; see `get_eval_dataloader`."""
        with self._padded():
            return super().get_test_dataloader(test_dataset)

    @contextlib.contextmanager
    def _padded(self):
        collator = self.data_collator
        if getattr(collator, "packing", False):
            self.data_collator = SIDDataCollator(collator.tokenizer)
        try:
            yield
        finally:
            self.data_collator = collator

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As `Trainer.compute_loss`: the loss of the answers' tokens; see [`answer_loss`]."""
        inputs = {name: value for name, value in inputs.items() if name != "product_rows"}
        labels = inputs.pop("labels")
        # Without logits_to_keep the labels are those of the last columns. A cache would be of no use, and transformers keeps
        # packed rows apart only without one.
        inputs.setdefault("logits_to_keep", labels.shape[1])
        outputs = model(**inputs, use_cache=False)
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        else:
            loss = answer_loss(
                *self._narrowed(outputs.logits, labels), **self._loss_options, num_items=num_items_in_batch
            )
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The items are those of all processes, whose gradients are averaged and not added up.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def _narrowed(self, logits, labels):
        if self._loss_vocabulary is None:
            return logits, labels
        return self._loss_vocabulary.to(labels.device).narrow(logits, labels)

    def evaluation_loop(self, *args, **kwargs):
        """As `Trainer.evaluation_loop`; the rows of the output layer are gathered or merged once for all batches."""
        self._is_evaluating, self._loss_sums = True, []
        try:
            output = super().evaluation_loop(*args, **kwargs)
        finally:
            self._head, self._is_evaluating = None, False
        prefix = kwargs.get("metric_key_prefix", "eval")
        if self._loss_sums:
            # Trainer takes the mean of batches, whatever they hold; of processes the last ones hold rows twice.
            total, num_tokens = torch.cat(self._loss_sums).double().sum(0).tolist()
            output.metrics[f"{prefix}_loss"] = total / max(num_tokens, 1)
        self._remember(prefix, output.metrics, kwargs.get("dataloader", args[0] if args else None))
        return output

    def _remember(self, prefix, metrics, dataloader):
        step = self.loaded_step if self.loaded_step is not None else self.state.global_step
        metrics = {name.removeprefix(f"{prefix}_"): value for name, value in metrics.items()}
        bounds, self._bounds = self._bounds, {}
        found = Evaluation(step, metrics, bounds, hub_dataset(getattr(dataloader, "dataset", None)))
        self.evaluations.setdefault(prefix, {})[step] = found

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        num_items = self._get_num_items_in_batch([inputs], self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items)
            loss = loss.detach().mean()
            if self._is_evaluating and self.compute_loss_func is None:
                losses = token_losses(*self._narrowed(outputs.logits, inputs["labels"]), **self._loss_options)
                sums = torch.stack([losses.sum(1), (inputs["labels"] != IGNORED).sum(1)], 1)
                self._loss_sums.append(self.accelerator.gather_for_metrics(sums).cpu())
            del outputs
        if prediction_loss_only:
            return loss, None, None
        if "product_rows" not in inputs:
            raise ValueError(
                "Rows lack product_rows, the products bought, which rankings are compared with. Map the dataset with "
                "tokenize_examples, or set prediction_loss_only=True."
            )
        prompts, mask = split_prompts(inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
        top_k = self.args.eval_top_k
        trie = SIDTrie.from_tokenizer(self.processing_class).to(prompts.device)
        model = self.accelerator.unwrap_model(model)
        # The Trainer's own context is empty: accelerate casts within the forward of the model that it has wrapped.
        with self.accelerator.autocast():
            head = self._head
            if head is None:
                head = OutputHead(
                    model,
                    trie.tokens,
                    self.args.eval_normalize,
                    self._normalizing_vocabulary(),
                )
                if self._is_evaluating:
                    self._head = head
            sid_rows, _ = beam_search(
                model,
                prompts,
                mask,
                trie,
                num_beams=self.args.eval_num_beams or default_num_beams(top_k),
                num_return=top_k,
                max_memory=MAX_MEMORY,
                head=head,
            )
        products, _ = self.processing_class.catalog.expand_sids(sid_rows.cpu().numpy(), top_k)
        # Of one shape on every rank and in every batch, so that they can be gathered.
        return loss, (torch.from_numpy(products).to(prompts.device), sid_rows), inputs["product_rows"]

    def _normalizing_vocabulary(self):
        if self.args.eval_normalize == "vocab":
            return None
        return torch.cat([self.processing_class.sid_vocabulary(), torch.tensor([self.processing_class.eos_token_id])])

    def _compute_metrics(self, eval_prediction):
        bootstrap = self.args.eval_bootstrap if self.is_world_process_zero() else 0
        metrics, self._bounds = split_bounds(self.compute_retrieval_metrics(eval_prediction, bootstrap=bootstrap))
        return metrics

    def compute_retrieval_metrics(self, eval_prediction, groups=None, **kwargs):
        """
        Item-level and SID-level Recall, NDCG and MRR of an `EvalPrediction`, as `predict` and `evaluate` make it.

        Args:
            eval_prediction (`EvalPrediction` or `PredictionOutput`):
                Predictions (product rows, SID rows) and `label_ids` (product rows bought).
            groups (`list[str]`, *optional*):
                A group of each row, to report metrics by.
            **kwargs:
                As `compute` of the `sid_retrieval` metric, for instance `bootstrap=1000`.

        Returns:
            `dict[str, float]`
        """
        if self._metric is None:
            self._metric = evaluate.load(metric_path("sid_retrieval"), keep_in_memory=True)
        rankings = rank_strings(*eval_prediction.predictions, eval_prediction.label_ids, self.processing_class)
        kwargs.setdefault("ks", recall_cutoffs(self.args))
        kwargs.setdefault("ndcg_ks", [min(10, self.args.eval_top_k)])
        groups = [""] * len(eval_prediction.label_ids) if groups is None else list(groups)
        return self._metric.compute(**rankings, groups=groups, **kwargs)


def _max_prompt_length(args, model, tokenizer):
    context = getattr(model.config, "max_position_embeddings", None)
    answer = tokenizer.max_sid_length + 1
    chosen = args.max_prompt_length if args.max_prompt_length is not None else tokenizer.prompt_template.max_length
    if context is None:
        return chosen
    if context <= answer:
        raise ValueError(
            f"The model's context of {context} tokens has no place for a prompt beside an answer of {answer} tokens. Take a model "
            "with a longer context (max_position_embeddings)."
        )
    if chosen is not None and chosen + answer > context:
        raise ValueError(
            f"max_prompt_length={chosen} and an answer of {answer} tokens exceed the model's context of "
            f"{context}. Use at most max_prompt_length={context - answer}."
        )
    return chosen if chosen is not None else context - answer
