"""How a SIDTokenizer is saved, loaded and pushed."""

import os

from transformers import PreTrainedTokenizerFast

from .bundle import CATALOG_FILE, MANIFEST_FILE, read_manifest, write_bundle
from .catalog_file import note_path
from .files import check_file
from .hub_files import find_file, pop_push_options, pushing_module
from .staged_save import recovered, staged_save
from .tokenizer_files import TOKENIZER_CONFIG, check_other_files, check_tokenizer_config, tokenizer_errors


class PretrainedSIDTokenizer(PreTrainedTokenizerFast):
    """
    The base of [`SIDTokenizer`].
    """

    def save_pretrained(self, save_directory, *args, push_to_hub=False, **kwargs):
        """
        As `PreTrainedTokenizerFast.save_pretrained`. If the save dies half-way, the folder still loads as it was. A catalog that
        has not changed since it was loaded or last saved is linked, not written again. With `push_to_hub=True` the arguments of
        [`~SIDTokenizer.push_to_hub`] are taken as well, `repo_id` being the folder's name if not given.

        Raises:
            `ValueError`: if the folder holds changes to this catalog that it does not know, because somebody else saved them in
                the meantime.
        """
        options = pop_push_options(kwargs, save_directory)
        if os.path.isfile(save_directory):
            raise ValueError(f"{save_directory} is a file. Pass a folder.")
        with staged_save(save_directory, self.catalog, CATALOG_FILE, MANIFEST_FILE, read_manifest) as staging:
            saved = super().save_pretrained(staging, *args, **kwargs)
        note_path(self.catalog, os.path.join(staging, CATALOG_FILE), os.path.join(save_directory, CATALOG_FILE))
        if push_to_hub:
            self.push_to_hub(**options)
        return tuple(os.path.join(save_directory, os.path.relpath(path, staging)) for path in saved)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """
        As `PreTrainedTokenizerFast.from_pretrained`, of a bundle whose files are those that were saved together.

        Raises:
            `ValueError`: if there is no such folder, repository or revision, it holds no bundle, or a file is damaged or belongs
                to another save.
            `PermissionError`: if access to the repository has to be asked for.
            `ConnectionError`: if the Hub cannot be reached, and the files are not in the cache.
        """
        name = pretrained_model_name_or_path
        local = os.path.join(name, kwargs.get("subfolder") or "") if os.path.isdir(name) else name
        if not os.path.exists(name):
            manifest, commit = find_file(name, MANIFEST_FILE, **kwargs)
            if manifest is None:
                raise ValueError(
                    f"{name} has no {MANIFEST_FILE}: it holds no SIDTokenizer. Load another tokenizer with AutoTokenizer, and make "
                    "a SIDTokenizer of it with SIDTokenizer.from_base."
                )
            # All files of one commit, even if somebody pushes meanwhile.
            kwargs = kwargs | {"revision": commit}
            # Before transformers reads it, which it does long before __init__.
            check_tokenizer_config(find_file(name, TOKENIZER_CONFIG, **kwargs)[0])
        with tokenizer_errors(), recovered(local) as folder:
            if os.path.isfile(os.path.join(folder, MANIFEST_FILE)):
                config = os.path.join(folder, TOKENIZER_CONFIG)
                check_tokenizer_config(config if os.path.isfile(config) else None)
            if folder == local:
                tokenizer = super().from_pretrained(name, *args, **kwargs)
            else:
                tokenizer = super().from_pretrained(folder, *args, **kwargs | {"subfolder": ""})
                tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = os.fspath(name)
        # How it was loaded, which transformers would save with it: the same tokenizer would make other files.
        for key in ("is_local", "local_files_only"):
            tokenizer.init_kwargs.pop(key, None)
        return tokenizer

    def push_to_hub(self, repo_id, *, license=None, tags=None, commit_message="Upload tokenizer", **options):
        """
        Pushes the bundle in one commit, with a card if there is none. In the repository of a model its files stay as they are,
        and so does its card.

        Args:
            repo_id (`str`):
                The repository, such as `"org/name"`; made if there is none.
            license (`str`, *optional*):
                That of a new card, an identifier such as `"apache-2.0"`.
            tags (`list[str]`, *optional*):
                Tags of the card.
            commit_message (`str`, *optional*, defaults to `"Upload tokenizer"`):
                What the commit says.
            **options:
                `commit_description`, `private`, `token`, `revision`, `create_pr` and `tag`, a git tag, as [`push_folder`] takes
                them.

        Returns:
            `CommitInfo`

        Raises:
            `ValueError`, `PermissionError`, `ConnectionError`: as [`push_folder`].
            `ImportError`: if this is the code that came with a tokenizer.
        """
        card = pushing_module("tokenizer_card")
        return pushing_module("card_push").push_saved(
            self.save_pretrained,
            lambda repo_id, folder: card.tokenizer_card(self, repo_id, license, tags, folder),
            repo_id,
            "tokenizer",
            tags=tags,
            commit_message=commit_message,
            delete_patterns=card.STALE,
            **options,
        )

    def _save_pretrained(self, save_directory, file_names, legacy_format=None, filename_prefix=None):
        if filename_prefix:
            raise ValueError(f"filename_prefix={filename_prefix!r}: the files of a bundle have fixed names.")
        file_names = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        return (*file_names, *write_bundle(self, save_directory))

    @classmethod
    def _from_pretrained(cls, resolved_vocab_files, *args, **kwargs):
        # transformers parses these before it calls __init__, and would not name a damaged one.
        manifest = read_manifest(resolved_vocab_files.get("manifest_file"))
        if resolved_vocab_files.get("tokenizer_file") is not None:
            check_file(resolved_vocab_files["tokenizer_file"], manifest["files"]["tokenizer.json"])
        others = {*resolved_vocab_files} - {*cls.vocab_files_names, "tokenizer_config_file"}
        check_other_files([resolved_vocab_files[kind] for kind in others])
        with tokenizer_errors(everything=True):
            return super()._from_pretrained(resolved_vocab_files, *args, **kwargs)

    @classmethod
    def convert_to_native_format(cls, trust_remote_code=False, **kwargs):
        # transformers would reduce tokenizer.json to vocabulary and merges, because SIDTokenizer has its own __init__, and so
        # lose normaliser and pre-tokenizer without a word.
        return kwargs
