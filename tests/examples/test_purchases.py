from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ALL = {"targets_per_basket": 10_000, "max_train": 10**6, "max_validation": 10**6, "max_test": 10**6}
SPLITS = ("train", "validation", "test")


def rows(dataset):
    return Counter(
        (row["household"], row["profile"], tuple(row["history"]), row["query"], row["product"]) for row in dataset
    )


def assert_same_training(a, b):
    assert a.train.to_dict() == b.train.to_dict()
    assert a.products.to_dict() == b.products.to_dict()
    assert a.popularity.tolist() == b.popularity.tolist()
    pd.testing.assert_frame_equal(a.household_counts, b.household_counts)


def expected_rows(frames, max_history, same_type):
    """Every example of every split, with nothing but loops over the log."""
    type_of = {row.product_id: row.product_type.lower() for row in frames["products"].itertuples()}
    log = frames["transactions"]
    log = sorted({(r.household_id, r.transaction_timestamp, r.product_id) for r in log[log.quantity > 0].itertuples()})
    validation_from, test_from = pd.Timestamp("2017-11-06"), pd.Timestamp("2017-12-04")
    counts = Counter(product for _, time, product in log if time < validation_from)
    log = [row for row in log if counts[row[2]] >= 5]
    profiles = {
        1: "age 35-44, income 50-74k, homeowner, household of 3",
        2: "age 65+, income under 15k, home ownership unknown, household of 5+",
    }

    def latest_distinct(purchases, most):
        latest = {}
        for time, product in purchases[-4 * most :] if most else []:
            latest.pop(product, None)
            latest[product] = (time, product)
        return list(latest.values())[-most:] if most else []

    examples = {name: Counter() for name in SPLITS}
    for household, time, product in log:
        before = [(t, p) for h, t, p in log if h == household and t < time]
        of_type = latest_distinct([(t, p) for t, p in before if type_of[p] == type_of[product]], same_type)
        recent = [purchase for purchase in latest_distinct(before, max_history) if purchase not in of_type]
        room = max_history - len(of_type)
        history = sorted(of_type + recent[len(recent) - min(room, len(recent)) :])
        split = SPLITS[int(time >= validation_from) + int(time >= test_from)]
        example = (
            str(household),
            profiles.get(household, "unknown"),
            tuple(str(p) for _, p in history),
            type_of[product],
            str(product),
        )
        examples[split][example] += 1
    return examples


@pytest.mark.parametrize("max_history, same_type", [(6, 3), (6, 0), (6, 6), (20, 10), (2, 1)])
def test_every_example_against_loops(purchases_module, make_frames, max_history, same_type):
    frames = make_frames()
    purchases = purchases_module.build_purchases(**frames, max_history=max_history, same_type=same_type, **ALL)
    expected = expected_rows(frames, max_history, same_type)
    for name in SPLITS:
        assert rows(getattr(purchases, name)) == expected[name]


def test_counts_against_loops(purchases_module, make_frames):
    frames = make_frames(training=3)
    purchases = purchases_module.build_purchases(**frames, **ALL)
    # With every purchase drawn, training targets are the training purchases.
    bought = Counter(purchases.train["product"])
    assert dict(zip(purchases.products["product_id"], purchases.popularity, strict=True)) == bought
    by_household = Counter(zip(purchases.train["household"], purchases.train["product"], strict=True))
    product_ids = np.array(purchases.products["product_id"][:])
    counts = purchases.household_counts
    counted = dict(
        zip(zip(counts["household"], product_ids[counts["product_row"]], strict=True), counts["count"], strict=True)
    )
    assert counted == by_household


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 500), st.integers(1, 500))
def test_later_periods_change_nothing_before_them(purchases_module, make_frames, validation, test):
    a = purchases_module.build_purchases(**make_frames(), targets_per_basket=1, max_train=60)
    b = purchases_module.build_purchases(
        **make_frames(validation=validation, test=test), targets_per_basket=1, max_train=60
    )
    assert_same_training(a, b)
    assert a.validation.to_dict() != b.validation.to_dict()

    c = purchases_module.build_purchases(**make_frames(test=test), targets_per_basket=1, max_train=60)
    assert_same_training(a, c)
    assert a.validation.to_dict() == c.validation.to_dict()
    assert a.test.to_dict() != c.test.to_dict()


def test_draw_depends_on_the_seed_and_not_on_the_order_of_rows(purchases_module, make_frames):
    frames = make_frames()
    a = purchases_module.build_purchases(**frames, max_train=50)
    shuffled = {name: frame.sample(frac=1, random_state=1) for name, frame in frames.items()}
    b = purchases_module.build_purchases(**shuffled, max_train=50)
    assert_same_training(a, b)
    assert a.test.to_dict() == b.test.to_dict()
    c = purchases_module.build_purchases(**frames, max_train=50, seed=1)
    assert a.train.to_dict() != c.train.to_dict()


def test_limits_of_the_draw(purchases_module, make_frames):
    frames = make_frames()
    everything = purchases_module.build_purchases(**frames, **ALL)
    one = purchases_module.build_purchases(**frames, **(ALL | {"targets_per_basket": 1}))
    log = frames["transactions"]
    log = log[(log.quantity > 0) & log.product_id.astype(str).isin(everything.products["product_id"][:])]
    baskets = log.groupby(["household_id", "transaction_timestamp"]).ngroups
    assert sum(len(getattr(one, name)) for name in SPLITS) == baskets
    assert not rows(one.train) - rows(everything.train)
    few = purchases_module.build_purchases(**frames, max_train=7, max_validation=5, max_test=3)
    assert [len(getattr(few, name)) for name in SPLITS] == [7, 5, 3]


def log_of(*lines):
    """Lines of (household, day, product, quantity)."""
    frame = pd.DataFrame(lines, columns=["household_id", "transaction_timestamp", "product_id", "quantity"])
    return frame.assign(transaction_timestamp=pd.to_datetime(frame["transaction_timestamp"], format="ISO8601"))


def small_frames(make_frames, *lines):
    return make_frames() | {"transactions": log_of(*lines)}


def buys(product, days, household=1, quantity=1):
    return [(household, day, product, quantity) for day in days]


def days(month, *numbers):
    return [f"2017-{month:02}-{number:02}" for number in numbers]


def test_which_products_are_kept(purchases_module, make_frames):
    frames = small_frames(
        make_frames,
        *buys(100, days(1, 1, 2, 3, 4, 5) + days(11, 10) + days(12, 10)),
        # Four purchases in training, however many later.
        *buys(101, days(1, 1, 2, 3, 4) + days(11, 10, 11, 12) + days(12, 10, 11)),
        # The fifth line is a return, or a second line of the same basket.
        *buys(102, days(1, 1, 2, 3, 4)),
        *buys(102, days(1, 5), quantity=0),
        *buys(103, days(1, 1, 2, 3, 4)),
        *buys(103, days(1, 4), quantity=2),
        # Bought by several households; no type; a coupon; not in the catalogue.
        *[line for household in range(5) for line in buys(104, days(2, 1), household)],
        *buys(105, days(1, 1, 2, 3, 4, 5, 6)),
        *buys(106, days(1, 1, 2, 3, 4, 5, 6)),
        *buys(999, days(1, 1, 2, 3, 4, 5, 6)),
    )
    frames["products"].loc[5, "product_type"] = None
    frames["products"].loc[6, "product_category"] = "COUPON/MISC ITEMS"
    purchases = purchases_module.build_purchases(**frames)
    assert purchases.products["product_id"][:] == ["100", "104"]
    assert purchases.popularity.tolist() == [5, 5]
    loose = purchases_module.build_purchases(**frames, min_purchases=4)
    assert loose.products["product_id"][:] == ["100", "101", "102", "103", "104"]
    assert loose.popularity.tolist() == [5, 4, 4, 4, 5]


def test_history_ends_before_the_basket(purchases_module, make_frames):
    training = [line for product in (100, 101, 102, 105) for line in buys(product, days(1, 1, 2, 3, 4, 5), 7)]
    frames = small_frames(
        make_frames,
        *training,
        (1, "2017-11-10 10:00", 100, 1),
        (1, "2017-12-10 10:00", 101, 1),
        # The basket asked about, and another of the same second.
        (1, "2017-12-11 10:00", 102, 1),
        (1, "2017-12-11 10:00", 105, 1),
        (1, "2017-12-11 10:01", 100, 1),
    )
    test = purchases_module.build_purchases(**frames, **ALL).test
    history = dict(zip(test["product"], test["history"], strict=True))
    assert history["101"] == ["100"]
    assert history["102"] == history["105"] == ["100", "101"]
    # 100 was bought before: it is in its own history, and the basket one minute earlier is too.
    assert history["100"] == ["100", "101", "102", "105"]


def test_products_of_the_type_stay_however_old(purchases_module, make_frames):
    # Products 100 and 105 are chips; 101, 102, 103 and 106 are not.
    history = [*buys(105, days(1, 1, 2, 3, 4, 5)), *buys(100, days(1, 6, 7, 8, 9, 10))]
    other = [line for product in (101, 102, 103, 106) for line in buys(product, days(3, 1, 2, 3, 4, 5))]
    frames = small_frames(make_frames, *history, *other, (1, "2017-11-10", 101, 1), (1, "2017-12-10", 100, 1))
    options = ALL | {"max_history": 4}
    test = purchases_module.build_purchases(**frames, same_type=0, **options).test
    assert test["history"][0] == ["102", "103", "106", "101"]
    test = purchases_module.build_purchases(**frames, same_type=1, **options).test
    assert test["history"][0] == ["100", "103", "106", "101"]
    test = purchases_module.build_purchases(**frames, same_type=4, **options).test
    assert test["history"][0] == ["105", "100", "106", "101"]


def test_catalogue_and_profiles(purchases_module, make_frames):
    purchases = purchases_module.build_purchases(**make_frames(), **ALL)
    by_id = {row["product_id"]: row for row in purchases.products}
    assert by_id["101"] == {
        "product_id": "101",
        "title": "tortilla chips, 10 oz, national brand, manufacturer 1",
        "type": "tortilla chips",
        "category": "bag snacks",
        "department": "grocery",
        "brand": "national",
        "manufacturer": "1",
        "package_size": "10 oz",
    }
    assert by_id["100"]["title"] == "potato chips, private brand, manufacturer 0"
    assert by_id["100"]["package_size"] == ""
    profiles = dict(zip(purchases.train["household"], purchases.train["profile"], strict=True))
    assert profiles["1"] == "age 35-44, income 50-74k, homeowner, household of 3"
    assert profiles["2"] == "age 65+, income under 15k, home ownership unknown, household of 5+"
    assert profiles["3"] == "unknown"


def test_refusals(purchases_module, make_frames):
    frames = make_frames()
    build = purchases_module.build_purchases
    with pytest.raises(ValueError, match=r"transactions lacks the columns \['quantity'\]"):
        build(**frames | {"transactions": frames["transactions"].drop(columns="quantity")})
    with pytest.raises(ValueError, match="more than once"):
        build(**frames | {"products": pd.concat([frames["products"]] * 2)})
    with pytest.raises(ValueError, match="must lie before"):
        build(**frames, validation_from="2017-12-04")
    with pytest.raises(ValueError, match="no product has 5000 purchases"):
        build(**frames, min_purchases=5000)
    with pytest.raises(ValueError, match="the test period has no purchase"):
        build(**frames, test_from="2019-01-01")
    with pytest.raises(ValueError, match="same_type=21"):
        build(**frames, same_type=21)


@pytest.mark.slow
def test_the_package_itself(purchases_module, baselines_module):
    purchases = purchases_module.load_purchases(max_train=5_000)
    assert [len(getattr(purchases, name)) for name in SPLITS] == [5_000, 2_000, 2_000]
    assert purchases.popularity.min() == 5
    assert purchases.household_counts["count"].sum() == purchases.popularity.sum()
    by_row = purchases.household_counts.groupby("product_row")["count"].sum()
    np.testing.assert_array_equal(by_row.to_numpy(), purchases.popularity)
    product_ids = set(purchases.products["product_id"])
    assert all(product_ids.issuperset(row["history"]) for row in purchases.test)
    assert max(map(len, purchases.train["history"])) == 20

    def recall(ranked):
        return np.mean(
            [product in products for product, products in zip(purchases.test["product"], ranked, strict=True)]
        )

    popular = recall(baselines_module.most_popular(purchases.test, purchases, top_k=10))
    for_query = recall(baselines_module.most_popular_for_query(purchases.test, purchases, top_k=10))
    habit = recall(baselines_module.household_frequent_for_query(purchases.test, purchases, top_k=10))
    assert 0 < popular < for_query < habit
