"""Writes the code that a model takes along to the Hub."""

import os

from transformers.dynamic_module_utils import get_relative_import_files

from ..sid_tokenizer.files import replace_atomically
from . import custom_generate

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
    source = custom_generate.__file__
    # transformers copies a module's relative imports only from beside it, so the search is here once more even where a
    # pipeline has put it into the model's folder already.
    files = {os.path.basename(path): path for path in get_relative_import_files(source)}
    contents = {}
    for file_name, path in sorted(files.items()) + [("generate.py", source)]:
        with open(path, encoding="utf-8") as file:
            contents[file_name] = file.read()
    contents = {"README.md": README.format(name=os.fspath(save_directory) if name is None else name)} | contents
    for file_name, content in contents.items():
        with replace_atomically(os.path.join(folder, file_name)) as temporary:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(content)
    return [os.path.join(folder, file_name) for file_name in contents]
