import math
import statistics
from collections import Counter

import evaluate
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rqsid.evaluate_metrics import path

HAND_COMPUTED = {
    "two layers, one code pruned": (
        [[0, 0], [0, 0], [1, 0], [2, -1]],
        [4, 2],
        {
            # Counts 2, 1, 1, 0.
            "entropy_0": 1 / 2 * 1 + 1 / 4 * 2 + 1 / 4 * 2,
            "normalized_entropy_0": 1.5 / 2,
            "gini_0": 2 * (1 + 1 + 2 + 0 + 1 + 1) / (2 * 4 * 4),
            "std_0": math.sqrt((1 + 0 + 0 + 1) / 4),
            "top1pct_share_0": 2 / 4,
            "under_used_0": 1,
            "used_0": 3,
            # Counts 3, 0.
            "entropy_1": 0,
            "normalized_entropy_1": 0,
            "gini_1": 2 * 3 / (2 * 2 * 3),
            "std_1": 1.5,
            "top1pct_share_1": 1,
            "under_used_1": 1,
            "used_1": 1,
            "num_rows": 4,
            "unique_sids": 3,
            "collision_rate": 1 / 4,
            "mean_length": (2 + 2 + 2 + 1) / 4,
        },
    ),
    "three layers, the middle one absent or of one code": (
        [[0, -1, 1], [1, -1, 0]],
        [2, 1, 2],
        {
            **{f"{name}_{layer}": 1 for name in ("entropy", "normalized_entropy") for layer in (0, 2)},
            **{f"{name}_{layer}": 0 for name in ("gini", "std", "under_used") for layer in (0, 2)},
            **{f"top1pct_share_{layer}": 1 / 2 for layer in (0, 2)},
            **{f"used_{layer}": 2 for layer in (0, 2)},
            **{
                f"{name}_1": 0
                for name in ("entropy", "normalized_entropy", "gini", "std", "top1pct_share", "under_used", "used")
            },
            "num_rows": 2,
            "unique_sids": 2,
            "collision_rate": 0,
            "mean_length": 2,
            "hourglass_score": 0 - (1 + 1) / 2,
        },
    ),
}


@pytest.mark.parametrize("case", HAND_COMPUTED)
def test_hand_computed(load, case):
    codes, codebook_sizes, expected = HAND_COMPUTED[case]
    results = load("sid_distribution").compute(codes=codes, codebook_sizes=codebook_sizes)
    assert results == pytest.approx(expected, abs=1e-12)
    assert list(map(type, results.values())) == [float] * len(expected)
    # A layer of one code has entropy 0, not -0.
    assert not any(math.copysign(1, value) < 0 for name, value in results.items() if name != "hourglass_score")


def test_hourglass_score_of_four_layers(load):
    # Normalized entropies 1, 0, 1/2 (two of four codes), 1: (0 + 1/2) / 2 - (1 + 1) / 2.
    codes = [[code, 0, code % 2, code] for code in range(4)]
    results = load("sid_distribution").compute(codes=codes, codebook_sizes=[4, 4, 4, 4])
    assert results["hourglass_score"] == pytest.approx(-0.75)


def test_shares_and_thresholds_of_a_large_codebook(load):
    # K = 201: ceil(2.01) = 3 codes are the top 1 %. Counts 40, 30, 20, then 111 codes once, 87 codes never: 201 in all,
    # so that the mean is 1 and only unused codes fall below a tenth of it.
    codes = [[0]] * 40 + [[1]] * 30 + [[2]] * 20 + [[code] for code in range(3, 114)]
    results = load("sid_distribution").compute(codes=codes, codebook_sizes=[201])
    assert results["top1pct_share_0"] == pytest.approx(90 / 201)
    assert results["under_used_0"] == 201 - 114
    # Counts 97, 2, 1: a mean of 33.3, a tenth of which (3.33) is more than 2; and 20, 1: a tenth of 10.5 is more than 1,
    # while 19, 1 has a tenth of exactly 1, which is not less.
    for counts, under_used in (([97, 2, 1], 2), ([20, 1], 1), ([19, 1], 0)):
        codes = [[code] for code, count in enumerate(counts) for _ in range(count)]
        results = load("sid_distribution").compute(codes=codes, codebook_sizes=[len(counts)])
        assert results["under_used_0"] == under_used


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_equals_the_formulas_one_by_one(data):
    codebook_sizes = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=4))
    row = st.tuples(*[st.integers(-1, size - 1) for size in codebook_sizes]).map(list)
    codes = data.draw(st.lists(row, min_size=1, max_size=40))
    metric = evaluate.load(path("sid_distribution"), keep_in_memory=True)
    results = metric.compute(codes=codes, codebook_sizes=codebook_sizes)

    for layer, size in enumerate(codebook_sizes):
        counter = Counter(row[layer] for row in codes if row[layer] >= 0)
        counts = [counter[code] for code in range(size)]
        total = sum(counts)
        if total == 0:
            assert results[f"entropy_{layer}"] == results[f"gini_{layer}"] == results[f"used_{layer}"] == 0
            continue
        entropy = scipy.stats.entropy(counts, base=2)
        assert results[f"entropy_{layer}"] == pytest.approx(entropy, abs=1e-9)
        if size > 1:
            assert results[f"normalized_entropy_{layer}"] == pytest.approx(entropy / math.log2(size), abs=1e-9)
        pairs = sum(abs(one - other) for one in counts for other in counts)
        assert results[f"gini_{layer}"] == pytest.approx(pairs / (2 * size * total), abs=1e-9)
        assert results[f"std_{layer}"] == pytest.approx(statistics.pstdev(counts), abs=1e-9)
        top = sorted(counts, reverse=True)[: math.ceil(size / 100)]
        assert results[f"top1pct_share_{layer}"] == pytest.approx(sum(top) / total)
        assert results[f"under_used_{layer}"] == sum(10 * count * size < total for count in counts)
        assert results[f"used_{layer}"] == len(counter)
    assert results["unique_sids"] == len(set(map(tuple, codes)))
    assert results["collision_rate"] == pytest.approx(1 - len(set(map(tuple, codes))) / len(codes))
    assert results["mean_length"] == pytest.approx(np.mean([sum(code >= 0 for code in row) for row in codes]))
    assert ("hourglass_score" in results) == (len(codebook_sizes) >= 3)


def test_inputs_agree(load):
    codes = np.random.default_rng(0).integers(-1, 5, (23, 3))
    expected = load("sid_distribution").compute(codes=codes.tolist(), codebook_sizes=[5, 5, 5])
    for form in (codes, torch.from_numpy(codes), list(codes), list(torch.from_numpy(codes)), list(map(tuple, codes))):
        assert load("sid_distribution").compute(codes=form, codebook_sizes=(5, 5, 5)) == expected
    batched, single = load("sid_distribution"), load("sid_distribution")
    for begin in range(0, 23, 10):
        batched.add_batch(codes=codes[begin : begin + 10])
    assert batched.compute(codebook_sizes=[5, 5, 5]) == expected
    for row in codes:
        single.add(codes=row)
    assert single.compute(codebook_sizes=[5, 5, 5]) == expected
    combined = evaluate.combine([load("sid_distribution")])
    assert combined.compute(codes=codes, codebook_sizes=[5, 5, 5]) == expected


BAD_INPUT = {
    "too large": ([[0, 1], [1, 4]], [4, 4], "Row 1 of `codes` holds 4 in layer 1, .* 0 to 3"),
    "too small": ([[0, 1], [-2, 3]], [4, 4], "Row 1 of `codes` holds -2 in layer 0"),
    "row of another length": ([[0, 1], [0]], [4, 4], "Row 1 of `codes` has 1 codes .* 2 layers"),
    "no rows": ([], [4], "no rows"),
    "floats": ([[1], [1.5]], [4], "type float"),
    "booleans": ([[True]], [4], "type bool"),
    "none": ([[None]], [4], "type NoneType"),
    "string for a list": ([[1, 2], "12"], [4, 4], "Row 1 of `codes` is '12'"),
    "flat": ([1, 2], [4, 4], "Row 0 of `codes` is 1"),
    "no sizes": ([[0]], None, "`codebook_sizes` is None"),
    "empty sizes": ([[0]], [], r"`codebook_sizes` is \[\]"),
    "one size for all": ([[0]], 4, "`codebook_sizes` is 4"),
    "size zero": ([[0, 0]], [4, 0], "holds 0 for layer 1"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused(load, case):
    codes, codebook_sizes, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message):
        load("sid_distribution").compute(codes=codes, codebook_sizes=codebook_sizes)


def test_missing_codes_are_refused(load):
    with pytest.raises(ValueError, match="`codes` is missing"):
        load("sid_distribution").add_batch()
