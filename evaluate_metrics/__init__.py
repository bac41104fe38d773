"""Modules for Hugging Face `evaluate`: ranked retrieval metrics and the distribution of codes per layer."""

from pathlib import Path

MODULES = ("sid_retrieval", "sid_distribution")


def path(name: str) -> str:
    """
    Absolute folder of one of the modules, which is what `evaluate.load` takes.

    Args:
        name (`str`):
            `"sid_retrieval"` or `"sid_distribution"`.

    Returns:
        `str`: The folder, in a checkout as in an installed wheel.

    Raises:
        ValueError: If there is no module of that name.

    Example:

    ```py
    >>> import evaluate
    >>> from rqsid.evaluate_metrics import path

    >>> metric = evaluate.load(path("sid_retrieval"))
    ```
    """
    if name not in MODULES:
        raise ValueError(f"There is no evaluate module named {name!r} here. Pass one of {', '.join(MODULES)}.")
    return str(Path(__file__).resolve().parent / name)
