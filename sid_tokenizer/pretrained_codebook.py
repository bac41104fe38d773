"""What residual k-means and RQ-VAE have in common: how they are saved, loaded and pushed."""

import os

from transformers import PreTrainedModel

from .codebook_files import check_dtype, read_config, read_entries, read_weights
from .hub_files import DOWNLOAD_OPTIONS, pop_push_options, pushing_module

# Arguments of transformers' from_pretrained that have nothing to say here.
UNUSED = (
    "_commit_hash",
    "_from_auto",
    "_from_pipeline",
    "adapter_kwargs",
    "code_revision",
    "proxies",
    "trust_remote_code",
)
UNUSED += ("weights_only", "use_safetensors", "ignore_mismatched_sizes")


def refuse_labels(kwargs):
    """
    Raises:
        `ValueError`: if a configuration has `num_labels`, for each of which transformers makes a name, however many a file says.
    """
    if kwargs.get("num_labels") is not None:
        raise ValueError("num_labels is no option of codebooks. Leave it out.")


class PretrainedCodebook(PreTrainedModel):
    """
    The base of [`ResidualQuantizer`] and [`RQVAE`].
    """

    def save_pretrained(self, save_directory, *args, push_to_hub=False, **kwargs):
        """
        As `PreTrainedModel.save_pretrained`. With `push_to_hub=True` the arguments of [`~PretrainedCodebook.push_to_hub`] are taken
        as well, `repo_id` being the folder's name if not given.

        Raises:
            `ValueError`: if the codebooks are not fitted.
        """
        self._require_fitted()
        options = pop_push_options(kwargs, save_directory, more=("diagnosis",))
        super().save_pretrained(save_directory, *args, **kwargs)
        if push_to_hub:
            shards = {name: kwargs[name] for name in ("max_shard_size",) if name in kwargs}
            self.push_to_hub(**options, **shards)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, variant=None, **kwargs):
        """
        As `PreTrainedModel.from_pretrained`, but from safetensors only, and nothing is loaded that does not fit: transformers would
        unpickle, or draw missing weights at random and warn.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A folder, or a repository on the Hub.
            config (`PreTrainedConfig`, *optional*):
                In place of that of the files.
            variant (`str`, *optional*):
                As `save_pretrained` was given it.
            **kwargs:
                `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`, `subfolder`, `dtype`, `device_map`,
                `output_loading_info`; and entries of the configuration.

        Returns:
            The quantizer; with `output_loading_info=True` a tuple with transformers' `dict`, too.

        Raises:
            `ValueError`: if there is no such folder, repository or revision, it holds no codebooks, or its files are damaged, do
                not fit together, or are no safetensors.
            `ConnectionError`: if the Hub cannot be reached, and the files are not in the cache.
        """
        name = os.fspath(pretrained_model_name_or_path)
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False: codebooks are loaded from safetensors only, never from pickles.")
        options = {key: kwargs.pop(key) for key in DOWNLOAD_OPTIONS if key in kwargs}
        for key in UNUSED:
            kwargs.pop(key, None)
        loading = ("dtype", "torch_dtype", "device_map", "max_memory", "output_loading_info")
        loading = {key: kwargs.pop(key) for key in loading if key in kwargs}
        if config is None:
            config, kwargs, commit = read_config(cls.config_class, name, options, kwargs)
            # From here on from one commit, even if somebody pushes meanwhile.
            options |= {} if commit is None else {"revision": commit}
        elif str(getattr(config, "name_or_path", None)) == name:
            # AutoModel has made it of that file, whatever stands there.
            read_entries(cls.config_class, name, options)
            check_dtype(config, name)
        tensors = read_weights(cls, config, name, options, variant)
        loaded = super().from_pretrained(None, *args, config=config, state_dict=tensors, **loading, **kwargs)
        quantizer = loaded[0] if isinstance(loaded, tuple) else loaded
        quantizer._require_fitted()
        quantizer.name_or_path = quantizer.config.name_or_path = name
        quantizer.requires_grad_(False)  # transformers makes every weight that it loads trainable
        return loaded

    def push_to_hub(
        self,
        repo_id,
        *,
        diagnosis=None,
        license=None,
        tags=None,
        commit_message="Upload codebooks",
        max_shard_size="50GB",
        **options,
    ):
        """
        Pushes the codebooks with a card, in one commit. A card that somebody has made their own is kept; see [`push_saved`].

        Args:
            repo_id (`str`):
                The repository, such as `"org/name"`; made if there is none.
            diagnosis ([`Diagnosis`], *optional*):
                What [`diagnose`] found in codes of this quantizer, for the card.
            license (`str`, *optional*):
                The card's, an identifier such as `"apache-2.0"`.
            tags (`list[str]`, *optional*):
                Tags of the card.
            commit_message (`str`, *optional*, defaults to `"Upload codebooks"`):
                What the commit says.
            max_shard_size (`int` or `str`, *optional*, defaults to `"50GB"`):
                As `save_pretrained`.
            **options:
                `commit_description`, `private`, `token`, `revision`, `create_pr` and `tag`, a git tag, as [`push_folder`] takes
                them.

        Returns:
            `CommitInfo`

        Raises:
            `ValueError`: if the codebooks are not fitted, the diagnosis is of others, the repository holds a model of another kind, or
                as [`push_folder`].
            `PermissionError`, `ConnectionError`: as [`push_folder`].
        """
        self._require_fitted()
        card = pushing_module("codebook_card")
        return pushing_module("card_push").push_saved(
            lambda folder: self.save_pretrained(folder, max_shard_size=max_shard_size),
            lambda repo_id, folder: card.codebook_card(self, repo_id, diagnosis, license, tags, folder),
            repo_id,
            "codebook",
            check=card.check_repository,
            tags=tags,
            commit_message=commit_message,
            delete_patterns=card.STALE,
            **options,
        )
