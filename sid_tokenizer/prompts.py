"""What a prompt looks like: which fields, in which order, with which words around them."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field


@dataclass
class PromptTemplate:
    r"""
    A prompt is the fields that an example has, in a fixed order, each behind its label, and a label for the answer.

    Training and serving build prompts with the template that is stored in the tokenizer's bundle. Line breaks and runs
    of spaces within a value become one space, so that with the default separator a value cannot look like another field.

    Args:
        fields (`list[str]`, *optional*, defaults to `["profile", "history", "query"]`):
            Fields in order. `history` is a list of product ids, oldest first, which become SIDs; any other field is
            text, or a mapping of text (`{"age": "35-44", "income": "50-74K"}`).
        labels (`dict[str, str]`, *optional*):
            What stands before a field's value; its name and a colon if not given.
        answer (`str`, *optional*, defaults to `"Product:"`):
            What stands before the answer.
        separator (`str`, *optional*, defaults to `"\n"`):
            What stands between fields.
        max_length (`int`, *optional*):
            Longest prompt in tokens. [`SIDTrainer`] sets it to the length that it trains with, so that serving cuts
            histories as training did.

    Raises:
        `ValueError`: if no field is given, or one twice, a label is that of no field, or `max_length` is less than 1.

    Example:

    ```python
    PromptTemplate(fields=["history", "query"], labels={"query": "Search: "})
    ```
    """

    fields: list[str] = field(default_factory=lambda: ["profile", "history", "query"])
    labels: dict[str, str] = field(default_factory=dict)
    answer: str = "Product:"
    separator: str = "\n"
    max_length: int | None = None

    def __post_init__(self):
        if not self.fields or len(set(self.fields)) != len(self.fields):
            raise ValueError(f"fields={self.fields}: name at least one field, and each once.")
        if set(self.labels) - set(self.fields):
            raise ValueError(f"labels for {sorted(set(self.labels) - set(self.fields))}, but fields={self.fields}.")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length={self.max_length} must be at least 1.")

    def label(self, name):
        # A space between the label and SIDs would become a token of its own in most tokenizers.
        return self.labels.get(name, f"{name.capitalize()}:" + ("" if name == "history" else " "))

    def split(self, example):
        """
        Args:
            example (`dict`):
                Values by field; a missing, `None` or empty one is left out.

        Returns:
            `tuple[str, list[str], str]`: the text before the history, the history's product ids, and the text behind it.
            Without a history everything is in the first text.

        Raises:
            `TypeError`: if the example is not a mapping, or a value has the wrong type.
            `ValueError`: if it has none of the template's fields.
        """
        if not isinstance(example, Mapping):
            raise TypeError(
                f"A prompt is built from a dict with the fields {self.fields}, got {type(example).__name__}."
            )
        texts, history = [""], []
        for name in self.fields:
            value = example.get(name)
            if value is None:
                continue
            if name == "history":
                history = value = _product_list(value)
            else:
                value = flatten_text(name, value)
            if len(value) == 0:
                continue
            lead = self.separator if texts[-1] or len(texts) > 1 else ""
            texts[-1] += lead + self.label(name)
            if name == "history":
                texts.append("")
            else:
                texts[-1] += value
        if texts == [""]:
            raise ValueError(
                f"The example has no value for any of the fields {self.fields} (its keys: {sorted(example)}), so there is "
                "nothing to build a prompt from. An empty history alone is no prompt: give a query or a profile too."
            )
        texts[-1] += self.separator + self.answer
        return texts[0], history, texts[1] if len(texts) > 1 else ""

    def to_dict(self):
        """JSON-able; `PromptTemplate(**content)` reads it."""
        return asdict(self)


def _product_list(value):
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise TypeError(f"Field 'history' must be a list of product ids, got {type(value).__name__}: {value!r}.")
    return list(value)


def flatten_text(name, value):
    """
    Returns:
        `str`: a text value on one line; a mapping as `key value, key value`.

    Raises:
        `TypeError`: if it is neither a string nor a mapping.
    """
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if entry is not None and not isinstance(entry, str | int | float):
                raise TypeError(
                    f"Field {name!r} has {key!r}: {entry!r}, which is {type(entry).__name__}. Give text or a number."
                )
        # pandas says NaN for a missing value, and NaN is what differs from itself.
        present = {key: entry for key, entry in value.items() if entry is not None and entry == entry and entry != ""}
        value = ", ".join(f"{key} {entry}" for key, entry in present.items())
    if not isinstance(value, str):
        raise TypeError(f"Field {name!r} must be text or a mapping of text, got {type(value).__name__}: {value!r}.")
    return " ".join(value.split())
