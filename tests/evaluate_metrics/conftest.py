import evaluate
import pytest

from rqsid.evaluate_metrics import path


@pytest.fixture
def load(tmp_path):
    """`load(name, config_name=None, **kwargs)`: the module, with its rows kept in the test's own folder."""

    def load(name, config_name=None, **kwargs):
        return evaluate.load(path(name), config_name, cache_dir=str(tmp_path / "rows"), **kwargs)

    return load
