"""Baichuan2's tokenizer, which is published as a sentencepiece model and slow remote code only, as a fast tokenizer."""

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from .sentencepiece_bpe import fast_tokenizer_from_sentencepiece

USER, ASSISTANT = "<reserved_106>", "<reserved_107>"
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message['role'] == 'system' and loop.first %}
        {{- message['content'] }}
    {%- elif message['role'] == 'user' %}
        {{- '<reserved_106>' + message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<reserved_107>' }}
        {%- generation %}
            {{- message['content'] }}
        {%- endgeneration %}
    {%- else %}
        {{- raise_exception('Baichuan2 knows one system message, the first, and messages of user and assistant, not '
            + message['role'] + ' as message ' + loop.index|string + '.') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<reserved_107>' }}
{%- endif %}
"""


class BaichuanTokenizer(PreTrainedTokenizerFast):
    r"""
    The tokenizer of Baichuan2 (arXiv 2309.10305): the ids of its sentencepiece model, at the speed of a fast tokenizer.

    `from_pretrained` reads a folder as Baichuan2 publishes it, or one that [`~BaichuanTokenizer.save_pretrained`] wrote, which
    loads as an ordinary fast tokenizer where this class is not installed, too. `AutoTokenizer.from_pretrained` finds this class
    once it is imported, and then never runs the code that is published with Baichuan2, not even with `trust_remote_code=True`.
    See [`fast_tokenizer_from_sentencepiece`] for what equals sentencepiece.

    Text is encoded as it is, without a space in front, and runs of spaces are kept. User-defined symbols such as `<reserved_106>`
    are found in text, as sentencepiece does; so are the begin, end and unknown token, unless `split_special_tokens=True`. They are
    found wherever they stand: the flags `single_word` and `normalized` of published configurations have no effect.

    Args:
        vocab_file (`str`, *optional*):
            The sentencepiece model, `tokenizer.model`. Not read if there is a `tokenizer_file`.
        tokenizer_file (`str`, *optional*):
            A saved `tokenizer.json`.
        bos_token (`str`, *optional*, defaults to `"<s>"`):
            Begin token.
        eos_token (`str`, *optional*, defaults to `"</s>"`):
            End token.
        unk_token (`str`, *optional*, defaults to `"<unk>"`):
            Unknown token. No text needs it, since characters that are no piece are spelled in bytes.
        pad_token (`str`, *optional*, defaults to `"<unk>"`):
            Padding token.
        add_bos_token (`bool`, *optional*):
            Whether to put the begin token in front of every text. As saved, or not, if neither this nor `add_eos_token` is given.
        add_eos_token (`bool`, *optional*):
            Whether to put the end token behind every text. As saved, or not, if neither this nor `add_bos_token` is given.
        sp_model_kwargs (`dict`, *optional*):
            Must be empty: a fast tokenizer does not sample.
        chat_template (`str`, *optional*):
            If not given, that of Baichuan2-Chat where the vocabulary has `<reserved_106>` and `<reserved_107>`, which mark the
            turns of user and assistant.
        model_max_length (`int`, *optional*, defaults to 4096):
            Longest sequence that the model takes, in tokens.
        kwargs (`dict`, *optional*):
            As for `PreTrainedTokenizerFast`.

    Raises:
        `ImportError`: if a `tokenizer.model` is to be read, and sentencepiece or protobuf is not installed.
        `ValueError`: if there is neither `tokenizer.json` nor `tokenizer.model`, the latter cannot be converted, or
            `sp_model_kwargs` asks for something.

    Example:

    ```python
    tokenizer = BaichuanTokenizer.from_pretrained("baichuan-inc/Baichuan2-7B-Base")
    tokenizer("potato chips")["input_ids"]
    tokenizer.save_pretrained("my-model")  # tokenizer.json, which needs neither sentencepiece nor this class
    ```
    """

    vocab_files_names = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}

    def __init__(
        self,
        vocab_file=None,
        tokenizer_file=None,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        add_bos_token=None,
        add_eos_token=None,
        sp_model_kwargs=None,
        chat_template=None,
        model_max_length=4096,
        **kwargs,
    ):
        if sp_model_kwargs:
            raise ValueError(
                f"sp_model_kwargs={sp_model_kwargs!r}: a fast tokenizer takes no options of sentencepiece, and does not sample. "
                "Leave them out."
            )
        if kwargs.get("tokenizer_object") is None and tokenizer_file is None:
            kwargs["tokenizer_object"] = _convert(vocab_file)
        tokens = {"bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token, "pad_token": pad_token}
        # As strings: the flags of a published AddedToken must not come to replace those of the backend's token.
        kwargs |= {name: None if token is None else str(token) for name, token in tokens.items()}
        added = {"add_bos_token": add_bos_token, "add_eos_token": add_eos_token}
        kwargs |= {name: value for name, value in added.items() if value is not None}
        # The published entry names code that a saved folder does not hold; without this class it would have to be run.
        kwargs.pop("auto_map", None)
        super().__init__(
            tokenizer_file=tokenizer_file, chat_template=chat_template, model_max_length=model_max_length, **kwargs
        )
        if self.chat_template is None and {USER, ASSISTANT} <= self.get_vocab().keys():
            self.chat_template = CHAT_TEMPLATE
        # transformers saves these two in the post-processor only.
        around = self._tokenizer.encode("").ids
        if add_bos_token is None and add_eos_token is None:
            self._add_bos_token = self.bos_token_id is not None and around[:1] == [self.bos_token_id]
            self._add_eos_token = self.eos_token_id is not None and around[-1:] == [self.eos_token_id]

    @classmethod
    def convert_to_native_format(cls, trust_remote_code=False, **kwargs):
        # transformers would order the merges of a tokenizer.model by id, and reduce a tokenizer.json to vocabulary and merges,
        # because this class has its own __init__. Converted here, since it reports errors of __init__ as others.
        if kwargs.get("tokenizer_file") is None and kwargs.get("tokenizer_object") is None:
            kwargs["tokenizer_object"] = _convert(kwargs.get("vocab_file"))
        return kwargs


def _convert(vocab_file):
    if vocab_file is None:
        raise ValueError(
            "There is neither a tokenizer.json nor a tokenizer.model. Pass a folder that holds one of them, or vocab_file=..."
        )
    return fast_tokenizer_from_sentencepiece(vocab_file)


class BaichuanTokenizerKey(PreTrainedConfig):
    """
    What [`BaichuanTokenizer`] is registered under. AutoTokenizer prefers published code to a class that is registered under the
    model's own configuration, but not to one that it finds by name alone.
    """


AutoTokenizer.register(BaichuanTokenizerKey, tokenizer_class=BaichuanTokenizer, exist_ok=True)
