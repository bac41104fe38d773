"""Arguments of SIDTrainer."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .losses import LOSSES


# With a __repr__ of its own, the class would print hub_token; that of TrainingArguments does not.
@dataclass(repr=False)
class SIDTrainingArguments(TrainingArguments):
    r"""
    `TrainingArguments` with what [`SIDTrainer`] needs besides.

    Args:
        max_prompt_length (`int`, *optional*):
            Longest prompt in tokens; the oldest products of longer histories are left out. What the model's context
            leaves beside the longest answer if not given.
        dataset_num_proc (`int`, *optional*):
            Processes that build prompts.
        init_sid_rows (`str`, *optional*):
            How new embedding rows start: `"codebook"` or `"noise"`, see [`initialize_sid_rows`].
        packing (`bool`, *optional*, defaults to `False`):
            Whether the rows of a batch are trained as one, without padding; see [`SIDDataCollator`].

        > Parameters that control the loss

        loss_type (`str`, *optional*, defaults to `"cross_entropy"`):
            `"cross_entropy"`, `"focal"` or `"mile"`; see [`~rqsid.trainer.answer_loss`].
        loss_gamma (`float`, *optional*, defaults to 1.0):
            The exponent of the focal and the MiLe loss.
        loss_normalize (`str`, *optional*, defaults to `"vocab"`):
            Whether probabilities are taken over the whole vocabulary (`"vocab"`), or over SID tokens and the end token
            (`"sid"`). A model that was trained so is to be searched so: `search(..., normalize="sid")`.

        > Parameters that control evaluation

        eval_top_k (`int`, *optional*, defaults to 50):
            Products to rank for each prompt.
        eval_num_beams (`int`, *optional*):
            Beams of the search; see [`search`] for the default.
        eval_normalize (`str`, *optional*):
            Whether scores are log-probabilities over the whole vocabulary (`"vocab"`), or over SID tokens and the end token
            (`"sid"`). As the loss if not given.
        eval_bootstrap (`int`, *optional*, defaults to 1000):
            Resamples of the evaluation's rows for the 95 % intervals on the model card; 0 for none. They are not logged.

        > Parameters that control pushes to the Hub

        hub_codebook_id (`str`, *optional*):
            A repository for the tokenizer's quantizer, pushed before the model, whose card names its commit. It is as private as
            the model's.
        hub_push_optimizer (`bool`, *optional*, defaults to `False`):
            Whether checkpoints are pushed (`hub_strategy="checkpoint"` and `"all_checkpoints"`) with what training goes on from:
            the states of optimizer, schedule and random numbers. These files are pickles, which whoever resumes from the repository
            has to trust; the model card says so. Without them, a checkpoint on the Hub is a model.

    > [!NOTE]
    > `remove_unused_columns` defaults to `False`, since the collator reads columns that a model's forward does not know,
    > and `label_names` to `["labels"]`. Each process reads its own share of a stream (`dispatch_batches=False` in
    > `accelerator_config`): batches of different widths cannot be dealt out by one.

    Raises:
        `ValueError`: for values out of range.
    """

    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False: the collator needs all."})
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "Keys of the inputs that are labels."}
    )
    max_prompt_length: int | None = field(default=None, metadata={"help": "Longest prompt in tokens."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that build prompts."})
    init_sid_rows: str | None = field(
        default=None, metadata={"help": 'How new embedding rows start: "codebook" or "noise".'}
    )
    packing: bool = field(default=False, metadata={"help": "Train the rows of a batch as one, without padding."})
    loss_type: str = field(default="cross_entropy", metadata={"help": '"cross_entropy", "focal" or "mile".'})
    loss_gamma: float = field(default=1.0, metadata={"help": "The exponent of the focal and the MiLe loss."})
    loss_normalize: str = field(
        default="vocab", metadata={"help": 'Softmax of the loss over "vocab" or "sid" tokens.'}
    )
    eval_top_k: int = field(default=50, metadata={"help": "Products to rank for each prompt."})
    eval_num_beams: int | None = field(default=None, metadata={"help": "Beams of the search."})
    eval_normalize: str | None = field(default=None, metadata={"help": 'Softmax over "vocab" or "sid" tokens.'})
    eval_bootstrap: int = field(default=1000, metadata={"help": "Resamples for the intervals on the model card."})
    hub_codebook_id: str | None = field(default=None, metadata={"help": "A repository for the codebook."})
    hub_push_optimizer: bool = field(
        default=False, metadata={"help": "Push checkpoints with the optimizer's state, which are pickles."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns=True would drop columns that SIDDataCollator reads; leave it False."
            )
        for name in ("max_prompt_length", "eval_top_k", "eval_num_beams"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if self.eval_bootstrap < 0:
            raise ValueError(f"eval_bootstrap={self.eval_bootstrap} must not be negative; 0 makes no intervals.")
        if self.hub_codebook_id is not None and self.hub_codebook_id == self.hub_model_id:
            raise ValueError(
                f"hub_codebook_id and hub_model_id are both {self.hub_model_id!r}. The codebook's repository is one of its own; the "
                "model's holds it too, as part of the tokenizer."
            )
        if self.batch_eval_metrics or not self.eval_do_concat_batches:
            raise ValueError(
                "batch_eval_metrics=True and eval_do_concat_batches=False hand metrics to compute_metrics in pieces, while "
                "rankings are scored over all rows. Leave both at their defaults."
            )
        if self.eval_normalize is None:
            self.eval_normalize = self.loss_normalize
        for name in ("loss_normalize", "eval_normalize"):
            if getattr(self, name) not in ("vocab", "sid"):
                raise ValueError(f'{name}={getattr(self, name)!r} is unknown; choose "vocab" or "sid".')
        if self.loss_type not in LOSSES:
            raise ValueError(f"loss_type={self.loss_type!r} is unknown; choose one of {', '.join(LOSSES)}.")
        if self.loss_gamma < 0:
            raise ValueError(f"loss_gamma={self.loss_gamma} must not be negative.")
        if self.loss_type != "cross_entropy" and self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} with loss_type={self.loss_type!r}: the one makes every "
                "answer less certain, the other weights them by how certain they are. Choose one of them."
            )
        if self.accelerator_config.dispatch_batches is None:
            self.accelerator_config.dispatch_batches = False
        if self.init_sid_rows not in (None, "codebook", "noise"):
            raise ValueError(f'init_sid_rows={self.init_sid_rows!r} is unknown; choose "codebook" or "noise".')
