"""The quick start's modules, which are no package, and a small random purchase log."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"


def load_module(name):
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", QUICKSTART / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def purchases_module():
    return load_module("purchases")


@pytest.fixture(scope="session")
def baselines_module():
    return load_module("baselines")


@pytest.fixture(scope="session")
def dual_tower_module():
    return load_module("dual_tower")


def random_log(seed, begin, end, num_rows=900, num_products=40, num_households=12):
    """Baskets of random size at random hours, some products far more popular than others."""
    rng = np.random.default_rng(seed)
    hours = pd.date_range(begin, end, freq="h", inclusive="left")
    num_baskets = num_rows // 4
    basket = rng.integers(num_baskets, size=num_rows)
    weights = 1 / np.arange(1, num_products + 1)
    return pd.DataFrame(
        {
            "household_id": rng.integers(1, num_households + 1, size=num_baskets)[basket],
            "product_id": 100 + rng.choice(num_products, size=num_rows, p=weights / weights.sum()),
            "quantity": rng.integers(0, 4, size=num_rows),
            "transaction_timestamp": hours[rng.integers(len(hours), size=num_baskets)][basket],
        }
    )


@pytest.fixture(scope="session")
def make_frames():
    """`make_frames(training=0, validation=0, test=0)`: the three frames, with a seed for each period of the log."""

    def make(training=0, validation=0, test=0, num_products=40):
        number = np.arange(num_products)
        products = pd.DataFrame(
            {
                "product_id": 100 + number,
                "manufacturer_id": number % 7,
                "department": "GROCERY",
                "brand": np.where(number % 2, "National", "Private"),
                "product_category": np.where(number % 5 == 4, "COOKIES", "BAG SNACKS"),
                "product_type": np.array(["POTATO CHIPS", "TORTILLA CHIPS", "NUTS", "PRETZELS", "COOKIES"])[
                    number % 5
                ],
                "package_size": [None, "10 OZ", "14 OZ"] * (num_products // 3) + [None] * (num_products % 3),
            }
        )
        demographics = pd.DataFrame(
            {
                "household_id": [1, 2],
                "age": ["35-44", "65+"],
                "income": ["50-74K", "Under 15K"],
                "home_ownership": ["Homeowner", None],
                "household_size": ["3", "5+"],
            }
        )
        log = [
            random_log(training, "2017-01-01", "2017-11-06"),
            random_log(validation + 1000, "2017-11-06", "2017-12-04", 200),
            random_log(test + 2000, "2017-12-04", "2018-01-01", 200),
        ]
        return {"transactions": pd.concat(log), "products": products, "demographics": demographics}

    return make


@pytest.fixture(scope="module")
def study_modules():
    """The modules of examples/study by name."""
    folder = Path(__file__).parents[2] / "examples" / "study"
    sys.path.insert(0, str(folder))
    try:
        yield {path.stem: __import__(path.stem) for path in sorted(folder.glob("*.py"))}
    finally:
        sys.path.remove(str(folder))
