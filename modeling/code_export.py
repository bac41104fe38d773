"""Writes the code that a model takes along to the Hub."""

import json
import os

from transformers.dynamic_module_utils import get_relative_import_files

from ..sid_tokenizer.files import read_json, replace_atomically
from . import custom_generate, pipeline

README = """\
---
tags:
- custom_generate
---

# SIDs by tree search

`generate.py` ranks the semantic IDs of the catalog that this repository's tokenizer holds, by their exact log-probability:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name!r}, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained({name!r})
inputs = tokenizer.pad(
    {{"input_ids": tokenizer.encode_prompts([{{"query": "potato chips"}}])["input_ids"]}}, return_tensors="pt"
)
sequences = model.generate(
    **inputs, custom_generate={name!r}, trust_remote_code=True, tokenizer=tokenizer, top_k=10, beams=50
)
tokenizer.decode_products(sequences[:, inputs["input_ids"].shape[1] :])
```
"""


def save_custom_generate(save_directory, name=None):
    """
    Writes the search into a model's folder as `custom_generate/generate.py`, with the modules that it needs beside it, so that
    `model.generate(..., custom_generate="org/model", trust_remote_code=True)` runs it wherever transformers is installed.

    Each file is replaced atomically, `generate.py` last, so that a folder with one has all that it imports.

    Args:
        save_directory (`str`):
            The model's folder; it is made if need be.
        name (`str`, *optional*, defaults to `save_directory`):
            What the example in `custom_generate/README.md` calls the model, such as `"org/model"`.

    Returns:
        `list[str]`: the files written.

    Raises:
        `ValueError`: if `save_directory` is a file.

    Example:

    ```python
    >>> model.save_pretrained("my-model")
    >>> tokenizer.save_pretrained("my-model")
    >>> save_custom_generate("my-model", "org/my-model")
    ```
    """
    if os.path.isfile(save_directory):
        raise ValueError(f"{save_directory} is a file. Pass the folder of a model.")
    folder = os.path.join(save_directory, "custom_generate")
    os.makedirs(folder, exist_ok=True)
    # transformers copies a module's relative imports only from beside it, so the search is here once more even where a
    # pipeline has put it into the model's folder already.
    contents = {"README.md": README.format(name=os.fspath(save_directory) if name is None else name)}
    contents |= _module_contents(custom_generate.__file__, "generate.py")
    return _write(folder, contents)


def save_pipeline_code(save_directory):
    """
    Writes the code of [`SIDRetrievalPipeline`] into a folder that holds a saved model and its tokenizer, and names it in the
    model's `config.json`, so that `pipeline(model="org/model", trust_remote_code=True)` runs it wherever transformers is
    installed. The folder then holds what `SIDRetrievalPipeline.save_pretrained` would have written; the model is not loaded.

    Each file is replaced atomically, `config.json` last, so that a config that names the code has all of it beside it.

    Args:
        save_directory (`str`):
            The model's folder.

    Returns:
        `list[str]`: the files written.

    Raises:
        `ValueError`: if the folder has no `config.json`, as that of an adapter, or one that is no JSON.

    Example:

    ```python
    >>> model.save_pretrained("my-model")
    >>> tokenizer.save_pretrained("my-model")
    >>> save_pipeline_code("my-model")
    ```
    """
    config_file = os.path.join(save_directory, "config.json")
    if not os.path.isfile(config_file):
        raise ValueError(
            f"There is no {config_file} that could name the pipeline. Pass the folder of a saved model; an adapter has to be "
            "merged into its model first."
        )
    config = read_json(config_file)
    source = pipeline.__file__
    config["custom_pipelines"] = {
        task: {
            "impl": f"pipeline.{entry['impl'].__name__}",
            "pt": [model_class.__name__ for model_class in entry["pt"]],
        }
        for task, entry in pipeline.SIDRetrievalPipeline._registered_impl.items()
    }
    contents = _module_contents(source, "pipeline.py")
    contents["config.json"] = json.dumps(config, indent=2, sort_keys=True) + "\n"  # as transformers writes it
    return _write(save_directory, contents)


def _module_contents(source, name):
    """A module, under `name` and last, and all that it imports from beside it."""
    files = {os.path.basename(path): path for path in get_relative_import_files(source)}
    contents = {}
    for file_name, path in sorted(files.items()) + [(name, source)]:
        with open(path, encoding="utf-8") as file:
            contents[file_name] = file.read()
    return contents


def _write(folder, contents):
    for file_name, content in contents.items():
        with replace_atomically(os.path.join(folder, file_name)) as temporary:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(content)
    return [os.path.join(folder, file_name) for file_name in contents]
