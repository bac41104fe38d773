"""What a prompt looks like: which fields, in which order, with which words around them."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from numbers import Integral
from typing import NamedTuple

TASKS = ("purchase", "history", "query", "title", "describe")
CHOICES = {"history_format": ("sid", "title", "both"), "layout": ("purchase", "session")}


class SID(str):
    """The place of a product's SID in a prompt, by the product's id. One for each product of a history: so no container."""

    __slots__ = ()


class Title(NamedTuple):
    """
    The place of a product's title behind `lead`. Where the catalog has none, `lead` stands there without the spaces at its end,
    and the SID behind it if `or_sid`.
    """

    lead: str
    product_id: str
    or_sid: bool


class Pieces(NamedTuple):
    """
    What a prompt is made of: texts (`str`), [`SID`] and [`Title`], each encoded on its own.

    `head` and `tail` always stand; of `units`, the products of a history or the purchases of a session, the oldest are left out
    where the prompt would get too long. A unit is one piece, or a list of some.
    """

    head: list
    units: list
    tail: list


@dataclass
class PromptTemplate:
    r"""
    A prompt is the fields that an example has, in a fixed order, each behind its label, and a label for the answer.

    Training and serving build prompts with the template that is stored in the tokenizer's bundle. Line breaks and runs
    of spaces within a value become one space, so that with the default separator a value cannot look like another field.

    An example may say which `task` it is, unless the template has a field of that name: `"purchase"`, all of its fields (the
    default); `"history"`, those beside the query; `"query"`, that field alone; `"title"`, the text of a product, `title`, or the
    catalog's text of its `product`, to be answered with the SID; `"describe"`, the SID of `product`, to be answered with the
    title. A text that is too long for a prompt of the task `"title"` is cut at its end.

    In the layout `"session"` an example is what one customer bought: text fields, `queries` (one for each purchase, empty for
    none) and `products` (ids, the oldest first). What stands before the query stands once; then each purchase is its query, the
    label of the answer and its SID. A prompt asks for the next purchase, so it has one query more than products. Without
    `queries`, a `query` is that of the next purchase. `history` may be written for `products`.

    Args:
        fields (`list[str]`, *optional*, defaults to `["profile", "history", "query"]`):
            Fields in order. `history` is a list of product ids, oldest first, which become SIDs; any other field is
            text, or a mapping of text (`{"age": "35-44", "income": "50-74K"}`).
        labels (`dict[str, str]`, *optional*):
            What stands before a field's value, or before the `title` of a product; its name and a colon if not given.
        answer (`str`, *optional*, defaults to `"Product:"`):
            What stands before the answer.
        separator (`str`, *optional*, defaults to `"\n"`):
            What stands between fields.
        max_length (`int`, *optional*):
            Longest prompt in tokens. [`SIDTrainer`] sets it to the length that it trains with, so that serving cuts
            histories as training did.
        history_format (`str`, *optional*, defaults to `"sid"`):
            How products of a history are written: `"sid"`, `"title"` (the catalog's text; the SID where that is empty) or
            `"both"` (the title, then the SID).
        history_separator (`str`, *optional*, defaults to `"\n- "`):
            What stands before each product of a history, unless they are SIDs alone.
        chat (`bool`, *optional*, defaults to `False`):
            Whether the prompt is a user's message in the base tokenizer's chat template, and the answer the assistant's.
            [`SIDTokenizer.from_base`] renders it once; the tokens around the message are stored.
        system (`str`, *optional*):
            The system message of a chat.
        layout (`str`, *optional*, defaults to `"purchase"`):
            `"purchase"` or `"session"`, see above.

    Raises:
        `TypeError`: if an argument has the wrong type.
        `ValueError`: if no field is given, or one twice, a label is that of no field, `max_length` is less than 1, a choice is
            unknown, or options contradict each other.

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
    history_format: str = "sid"
    history_separator: str = "\n- "
    chat: bool = False
    system: str | None = None
    layout: str = "purchase"

    def __post_init__(self):
        self._check_types()
        if not self.fields or len(set(self.fields)) != len(self.fields):
            raise ValueError(f"fields={self.fields}: name at least one field, and each once.")
        strangers = sorted(set(self.labels) - {*self.fields, "title"})
        if strangers:
            raise ValueError(f"labels for {strangers}, but fields={self.fields}.")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length={self.max_length} must be at least 1.")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(choices)}.")
        if self.system is not None and not self.chat:
            raise ValueError(f"system={self.system!r} is a message of a chat. Set chat=True, or leave it out.")
        if self.layout == "session":
            self._check_session()

    def _check_types(self):
        texts = {"answer", "separator", "history_separator", "history_format", "layout"}
        kinds = dict.fromkeys(texts, (str, "text")) | {
            "fields": (list | tuple, "a list of names"),
            "labels": (Mapping, "a mapping of text"),
            "max_length": (Integral | None, "a whole number or None"),
            "chat": (bool, "True or False"),
            "system": (str | None, "text or None"),
        }
        for name, (kind, words) in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or (name == "max_length" and isinstance(value, bool)):
                raise TypeError(f"{name}={value!r} must be {words}, got {type(value).__name__}.")
        for name, entries in (("fields", self.fields), ("labels", self.labels.values())):
            strangers = [entry for entry in entries if not isinstance(entry, str)]
            if strangers:
                raise TypeError(f"{name} must hold text, got {type(strangers[0]).__name__}: {strangers[0]!r}.")

    def _check_session(self):
        if self.chat:
            raise ValueError(
                'layout="session" with chat=True: purchases of one session are no single message of a user. Choose one of both.'
            )
        if self.history_format != "sid":
            raise ValueError(
                f'layout="session" with history_format={self.history_format!r}: products of a session are answers, which are SIDs. '
                'Leave it at "sid".'
            )
        taken = sorted({"products", "queries"} & set(self.fields))
        if taken:
            raise ValueError(f'layout="session" has {taken} of its own. Rename the fields.')
        behind = self.fields[self.fields.index("query") + 1 :] if "query" in self.fields else []
        if set(behind) - {"history"}:
            raise ValueError(
                f'layout="session" with fields={self.fields}: what stands behind the query would stand in every purchase. Put '
                "text fields before the query."
            )

    def label(self, name):
        # A space between the label and SIDs would become a token of its own in most tokenizers.
        return self.labels.get(name, f"{name.capitalize()}:" + ("" if name == "history" else " "))

    def example_keys(self):
        """
        Returns:
            `list[str]`: what an example of a purchase or a session may say, beside its `task`.
        """
        if self.layout == "purchase":
            return list(self.fields)
        names = [name for name in self.fields if name not in ("history", "query")]
        return names + (["queries", "query"] if "query" in self.fields else []) + ["products", "history"]

    def task_of(self, example):
        """
        Returns:
            `str`: one of `"purchase"`, `"history"`, `"query"`, `"title"` and `"describe"`.

        Raises:
            `TypeError`: if the example is not a mapping.
            `ValueError`: if its task is unknown, or one that the template has no field for.
        """
        if not isinstance(example, Mapping):
            raise TypeError(
                f"A prompt is built from a dict with the fields {self.fields}, got {type(example).__name__}."
            )
        task = None if "task" in self.fields else example.get("task")
        if task is not None:
            self.check_task(task)
        return task or "purchase"

    def check_task(self, task):
        """
        Raises:
            `ValueError`: if the task is unknown, or one that the template has no field for.
        """
        if task not in TASKS:
            raise ValueError(f"task={task!r} is unknown; choose one of {', '.join(TASKS)}.")
        if task in ("history", "query") and self.layout == "session":
            raise ValueError(
                f'task={task!r}: a prompt template of layout="session" has queries and products in one. Leave the task out.'
            )
        if task in ("history", "query") and task not in self.fields:
            raise ValueError(f"task={task!r}, but the prompt template has no such field, only {self.fields}.")

    def pieces(self, example):
        """
        Args:
            example (`dict`):
                A purchase or a session so far, or with a `task` its `product` or `title`.

        Returns:
            [`Pieces`]: of the prompt.

        Raises:
            `TypeError`, `ValueError`: if the example cannot be a prompt.
        """
        task = self.task_of(example)
        if task == "title":
            if not isinstance(example.get("title"), str) or not example["title"].split():
                raise ValueError(f'The example of the task "title" has no title, found {sorted(example)}.')
            title = flatten_text("title", example["title"])
            return Pieces([self.label("title") + title], [], [self.separator + self.answer])
        if task == "describe":
            if not isinstance(example.get("product"), str):
                raise ValueError(
                    f'The example of the task "describe" has no product id as its product, found {sorted(example)}.'
                )
            lead = self.separator + self.label("title").rstrip()
            return Pieces([self.answer, SID(example["product"]), lead], [], [])
        if self.layout == "session":
            head, texts, products = self.split_session(example, is_prompt=True)
            units = [[text, SID(product)] for text, product in zip(texts, products, strict=False)]
            return Pieces([head], units, [texts[-1]])
        before, history, after = self.split(example)
        lead = self.history_separator
        if self.history_format == "sid":
            units = [SID(product) for product in history]
        elif self.history_format == "title":
            units = [Title(lead, product, or_sid=True) for product in history]
        else:
            units = [[Title(lead, product, or_sid=False), SID(product)] for product in history]
        return Pieces([before], units, [after])

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
        task = self.task_of(example)
        fields = ["query"] if task == "query" else self.fields
        if task == "history":
            fields = [name for name in fields if name != "query"]
        texts, history = [""], []
        for name in fields:
            value = example.get(name)
            if value is None:
                continue
            if name == "history":
                history = value = _product_list(name, value)
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
                f"The example has no value for any of the fields {fields} (its keys: {sorted(example)}), so there is "
                "nothing to build a prompt from. An empty history alone is no prompt: give a query or a profile too."
            )
        texts[-1] += self.separator + self.answer
        return texts[0], history, texts[1] if len(texts) > 1 else ""

    def split_session(self, example, is_prompt):
        """
        Args:
            example (`dict`):
                A session: text fields, `queries` and `products`.
            is_prompt (`bool`):
                Whether the next purchase is asked for, so that there is one query more than products.

        Returns:
            `tuple[str, list[str], list[str]]`: the text that stands once, the text before each SID, and the product ids.

        Raises:
            `TypeError`: if the example is not a mapping, or a value has the wrong type.
            `ValueError`: if it says nothing that a session has, or the numbers of queries and products do not fit.
        """
        if not isinstance(example, Mapping):
            raise TypeError(f"A session is a dict with some of {self.example_keys()}, got {type(example).__name__}.")
        given = {name: example[name] for name in self.example_keys() if example.get(name) is not None}
        if not given:
            raise ValueError(
                f"The example has none of {self.example_keys()} (its keys: {sorted(example)}), so there is nothing to build a "
                "session from."
            )
        for name, twin in (("products", "history"), ("queries", "query")):
            if name in given and twin in given:
                raise ValueError(f"The example has {name} and {twin}, which say the same in a session. Leave one out.")
        name = "history" if "history" in given else "products"
        products = _product_list(name, given.get(name, []))
        count = len(products) + is_prompt
        if "query" in given and not is_prompt:
            raise ValueError(
                "A session to train on has a list of queries, one for each of its products, and no single query."
            )
        queries = [None] * (count - 1) + [given["query"]] if "query" in given else given.get("queries", [None] * count)
        if isinstance(queries, str | Mapping) or not isinstance(queries, Iterable):
            raise TypeError(f"queries must be a list of texts, got {type(queries).__name__}: {queries!r}.")
        queries = list(queries)
        if len(queries) != count:
            raise ValueError(
                f"{len(queries)} queries and {len(products)} products: a "
                + (
                    "prompt has one query more than products."
                    if is_prompt
                    else "session has a query for each product."
                )
                + " Write an empty query where none is known."
            )
        head = []
        for name in self.fields:
            if name in given and name not in ("history", "query"):
                value = flatten_text(name, given[name])
                if value:
                    head.append(self.label(name) + value)
        # Each purchase begins with the separator, wherever it stands, so that what is left out changes nothing behind it.
        texts = []
        for query in queries:
            query = "" if query is None else flatten_text("query", query)
            texts.append(
                (self.separator + self.label("query") + query if query else "") + self.separator + self.answer
            )
        return self.separator.join(head), texts, products

    def to_dict(self):
        """JSON-able; `PromptTemplate(**content)` reads it."""
        return asdict(self)


def _product_list(name, value):
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise TypeError(f"Field {name!r} must be a list of product ids, got {type(value).__name__}: {value!r}.")
    value = list(value)
    for entry in value:
        if not isinstance(entry, str):
            raise TypeError(f"Field {name!r} holds {entry!r}, which is {type(entry).__name__} and not a string.")
    return value


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
