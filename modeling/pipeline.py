"""Retrieval as a transformers pipeline: examples in, ranked products out."""

import math
from collections.abc import Iterable, Mapping

from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from .search import search
from .trie import SIDTrie
from .trie_checks import products_to_mask

TASK = "sid-retrieval"

# What an example may say about its own search, beside the fields of the prompt.
EXAMPLE_OPTIONS = ("products", "prefix_codes")


class SIDRetrievalPipeline(Pipeline):
    """
    Ranks products for examples, with [`search`].

    Importing `rqsid` registers it as the task `"sid-retrieval"`. `save_pretrained` and `push_to_hub` put its code beside model
    and tokenizer, so that `pipeline(model="org/model", trust_remote_code=True)` loads it where only transformers is installed.
    (transformers then asks for `trust_remote_code=True` also where `rqsid` is installed; to run the installed code instead,
    pass `pipeline_class=SIDRetrievalPipeline`.)

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, see [`search`].
        tokenizer ([`SIDTokenizer`]):
            The tokenizer the model was trained with.
        kwargs (*optional*):
            Those of [`~transformers.Pipeline`] (`device`, `batch_size`), and defaults for the arguments of a call.

    Raises:
        `TypeError`: if the tokenizer is no [`SIDTokenizer`].
        `ValueError`: if the tokenizer's prompts have a field named as an option of an example.

    Example:

    ```python
    >>> retrieve = pipeline("sid-retrieval", model="my-model")
    >>> retrieve({"history": ["B0001", "B0002"], "query": "potato chips"}, top_k=10)
    [{'product_id': 'B0017', 'sid': '<a_17><b_203><c_5>', 'score': 0.31, 'logprob': -1.17}, ...]
    >>> retrieve(dataset["query"], batch_size=32, products=ids_in_stock)  # an iterator, as over any data set
    ```
    """

    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(self, model, tokenizer=None, **kwargs):
        # Not by its class: one that came with its code from a Hub repo is none of ours.
        if not hasattr(tokenizer, "encode_prompts") or not hasattr(tokenizer, "catalog"):
            raise TypeError(
                f"The pipeline needs the SIDTokenizer that the model was trained with, got {type(tokenizer).__name__}. Pass "
                f"`tokenizer=SIDTokenizer.from_pretrained(...)`; without rqsid installed, `trust_remote_code=True`."
            )
        taken = sorted(set(EXAMPLE_OPTIONS) & set(tokenizer.prompt_template.fields))
        if taken:
            raise ValueError(
                f"The prompt template has the fields {taken}, which in an example of the pipeline are options of its search. "
                f"Call `search`, or rename the fields."
            )
        super().__init__(model=model, tokenizer=tokenizer, **kwargs)

    def __call__(self, inputs, **kwargs):
        """
        Args:
            inputs (`dict`, `str`, `list`, `datasets.Dataset` or a column of one, torch data set, or generator):
                Examples: values of the prompt template's fields, or a text, which is taken as the `query`. An example may
                bring its own `products` and `prefix_codes`, which then stand for those of the call.
            top_k (`int`, *optional*, defaults to 10):
                Number of products for each example.
            num_beams (`int`, *optional*, defaults to `max(50, 5 * top_k)`):
                Number of unfinished SIDs kept at each level, see [`search`].
            products (`list[str]` or mask of shape `(num_products,)`, *optional*, defaults to all):
                The products that may be returned: their ids, or a boolean mask over the catalog. It is read once, at the
                call, or where it is given to `pipeline`, there.
            trie ([`SIDTrie`], *optional*, defaults to all SIDs of the tokenizer):
                The SIDs that may be returned; `products` restricts it further.
            prefix_codes (`list[int]`, *optional*):
                The first codes of every SID, see [`search`].
            normalize (`str`, *optional*, defaults to `"vocab"`):
                `"vocab"` or `"sid"`, see [`search`].
            batch_size (`int`, *optional*, defaults to 1):
                Examples searched at once, where there are several.

        Returns:
            `list[dict]` for one example: the products, best first, as `{"product_id", "sid", "score", "logprob"}`, `score`
            being the SID's probability and `logprob` its natural logarithm. A list of these for a list, an iterator for
            a data set or a generator.

        Raises:
            `TypeError`, `ValueError`: as [`search`], for instance if a history names a product that is not in the catalog.
        """
        if hasattr(inputs, "to_dict") and hasattr(inputs, "columns"):
            raise TypeError('A DataFrame would be read as the names of its columns. Pass `frame.to_dict("records")`.')
        if isinstance(inputs, Mapping) and inputs and all(hasattr(value, "column_names") for value in inputs.values()):
            raise TypeError(f"`inputs` holds the data sets {sorted(inputs)}: pass one of them.")
        if isinstance(inputs, list | tuple):
            return super().__call__(list(inputs), **kwargs) if inputs else []
        if not isinstance(inputs, str | Mapping | Dataset) and isinstance(inputs, Iterable):
            # The base class knows torch's data sets and generators only, and would take a column for one example.
            inputs = (example for example in inputs)
        return super().__call__(inputs, **kwargs)

    def save_pretrained(self, save_directory, **kwargs):
        """
        As `Pipeline.save_pretrained`: model, tokenizer, and the code of this pipeline. The model in memory is left as it was, so
        that what it is saved to later, without the code, does not promise it.
        """
        config, held = self.model.config, getattr(self.model.config, "custom_pipelines", None)
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            if held is None:
                vars(config).pop("custom_pipelines", None)
            else:
                config.custom_pipelines = held

    def _sanitize_parameters(
        self, top_k=None, num_beams=None, trie=None, products=None, prefix_codes=None, normalize=None
    ):
        if products is not None:
            trie = (SIDTrie.from_tokenizer(self.tokenizer) if trie is None else trie).restrict(products)
        options = {
            "top_k": top_k,
            "num_beams": num_beams,
            "trie": trie,
            "prefix_codes": prefix_codes,
            "normalize": normalize,
        }
        return {}, {name: value for name, value in options.items() if value is not None}, {}

    def preprocess(self, input_):
        # Prompts are built by `search`, which knows how long they may be.
        if isinstance(input_, str):
            input_ = {"query": input_}
        if not isinstance(input_, Mapping):
            raise TypeError(
                f"An example must be a dict with values for {self.tokenizer.prompt_template.fields}, or a text for the query, "
                f"got {type(input_).__name__}."
            )
        if self.tokenizer.prompt_template.layout == "session" and "products" in input_ and "history" not in input_:
            raise ValueError(
                "The example has products and no history. Here `products` are those that may be returned; give what a session "
                "holds so far as `history` (a list of product ids, `[]` for none)."
            )
        example = {name: value for name, value in input_.items() if name not in EXAMPLE_OPTIONS}
        options = {name: input_.get(name) for name in EXAMPLE_OPTIONS}
        if options["products"] is not None:
            # The base class would look at each id of a list for a tensor to move.
            options["products"] = products_to_mask(self.tokenizer.catalog, options["products"])
        return {"example": example} | options

    def _forward(self, inputs, top_k=10, num_beams=None, trie=None, prefix_codes=None, normalize="vocab"):
        # Lists where a batch was collated; otherwise one example.
        is_batch = isinstance(inputs["example"], list)
        examples, products, prefixes = (
            inputs[name] if is_batch else [inputs[name]] for name in ("example", *EXAMPLE_OPTIONS)
        )
        if any(own is not None for own in products):
            whole = SIDTrie.from_tokenizer(self.tokenizer)
            common = whole if trie is None else trie
            # Equal filters are made once, so that they share a trie.
            keys = [None if own is None else own.tobytes() for own in products]
            tries = {
                key: common if key is None else whole.restrict(own)
                for key, own in dict(zip(keys, products, strict=True)).items()
            }
            trie = [tries[key] for key in keys]
        if prefix_codes is not None or any(own is not None for own in prefixes):
            prefixes = [(prefix_codes or []) if own is None else own for own in prefixes]
        else:
            prefixes = None
        found = search(self.model, self.tokenizer, examples, top_k, num_beams, trie, prefixes, normalize)
        return {"found": found if is_batch else found[0]}

    def postprocess(self, model_outputs):
        return [
            {
                "product_id": entry["product_id"],
                "sid": entry["sid"],
                "score": math.exp(entry["score"]),
                "logprob": entry["score"],
            }
            for entry in model_outputs["found"]
        ]


# Code that came with a model from the Hub serves that model, and does not take the task over in the whole process.
if __name__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME + "."):
    SIDRetrievalPipeline._registered_impl = {TASK: {"impl": SIDRetrievalPipeline, "pt": (AutoModelForCausalLM,)}}
else:
    # transformers warns of a task that is there already, as it is when this module is imported once more.
    PIPELINE_REGISTRY.supported_tasks.pop(TASK, None)
    PIPELINE_REGISTRY.register_pipeline(TASK, SIDRetrievalPipeline, pt_model=AutoModelForCausalLM)
