"""The verdict on the shape of the layers, against what uniform codes show in a sample of the same items."""

import numpy as np

HOURGLASS_THRESHOLD = -0.02
TOLERANCE = 0.01  # what a layer may differ from the next without counting as narrower or wider
NULL_SAMPLES = 200
HEAVIEST = 4096  # items that are simulated one by one
BAND = (0.01, 0.99)


def simulate_uniform(random, weights, size):
    """
    What the layer looks like if each item draws its code uniformly at random.

    Equal weights make that a multinomial sample. Otherwise the 4096 heaviest items draw a code each, since it is they
    that make small samples uneven; the rest, which are many and light, are drawn as their effective number
    (sum w)^2 / sum w^2 (Kish) of equal items, which has the mean and the variance of their sum.

    Args:
        random (`np.random.Generator`):
            Source of the 200 samples.
        weights (`np.ndarray`): Shape: (N,).
            Weights of the items that have a code in this layer.
        size (`int`):
            K.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: normalised entropy of each sample, shape (200,); and for each rank of the codes
        sorted by frequency the 1 % and the 99 % quantile of its count, shape (2, K).
    """
    weights = weights[weights > 0]
    if len(weights) == 0 or size == 1:
        return np.ones(NULL_SAMPLES), np.full((2, size), weights.sum() / size)
    heaviest, lighter = weights[:0], weights
    if weights.min() != weights.max():
        parted = np.partition(weights, max(len(weights) - HEAVIEST, 0))
        # Sorted, since in which order a partition leaves them depends on the processor, and each draws a code in its turn.
        heaviest, lighter = np.sort(parted[-HEAVIEST:]), parted[:-HEAVIEST]
    num_equal, unit = 0, 0.0
    if len(lighter):
        num_equal = max(1, round(lighter.sum() ** 2 / np.square(lighter).sum()))
        unit = lighter.sum() / num_equal

    evenness, descending = np.empty(NULL_SAMPLES), np.empty((NULL_SAMPLES, size))
    step = max(1, 2**21 // max(size, len(heaviest)))
    for start in range(0, NULL_SAMPLES, step):
        rows = min(step, NULL_SAMPLES - start)
        counts = unit * random.multinomial(num_equal, np.full(size, 1 / size), rows)
        if len(heaviest):
            cells = random.integers(0, size, (rows, len(heaviest))) + size * np.arange(rows)[:, None]
            counts += np.bincount(cells.ravel(), np.tile(heaviest, rows), rows * size).reshape(rows, size)
        shares = counts / counts.sum(1, keepdims=True)
        logs = np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
        evenness[start : start + rows] = -(shares * logs).sum(1) / np.log2(size)
        descending[start : start + rows] = -np.sort(-counts, axis=1)
    return evenness, np.quantile(descending, BAND, axis=0)


def find_verdict(evenness, null):
    """
    An hourglass has a waist: middle layers less even than the ends on average, by more than 0.02, and one of them less even
    than either end, by more than 0.01; both by more than uniform codes in a sample of this size show. The average alone
    would call a funnel an hourglass, since one even end is enough for it. A funnel narrows towards the end, a narrow top at
    the beginning, by more than 0.02 in all.

    In a small sample even uniform codes use a large codebook less evenly than a small one. A verdict must therefore hold
    both for the layers as they are and for how far each lies from the mean of its samples.

    Args:
        evenness (`np.ndarray`): Shape: (L,).
            Normalised entropy of the layers that are present, at least three.
        null (`np.ndarray`): Shape: (L, 200).
            The same for samples of uniform codes, from [`simulate_uniform`].

    Returns:
        `tuple[float, float, str, int | None]`: score, its 0.5 % quantile for uniform codes, verdict, and the position of
        the layer that the verdict is about.
    """
    expected = null.mean(1)
    score, null_score, plain, _ = _find_shape(evenness, null)
    *_, verdict, position = _find_shape(evenness - expected, null - expected[:, None])
    return (score, null_score, verdict, position) if plain == verdict else (score, null_score, "none", None)


def _find_shape(evenness, null):
    score = float(evenness[1:-1].mean() - (evenness[0] + evenness[-1]) / 2)
    null_score = float(np.quantile(null[1:-1].mean(0) - (null[0] + null[-1]) / 2, 0.005))
    chance = float(np.quantile(null.min(0) - null.max(0), 0.005))
    threshold, waist = min(HOURGLASS_THRESHOLD, chance), min(-TOLERANCE, chance)

    has_waist = evenness[1:-1].min() < min(evenness[0], evenness[-1]) + waist
    if score < min(HOURGLASS_THRESHOLD, null_score) and has_waist:
        return score, null_score, "hourglass", 1 + int(evenness[1:-1].argmin())
    widens = evenness[0] < evenness[-1] + threshold and (np.diff(evenness) > -TOLERANCE).all()
    if widens or evenness[0] < evenness[1:].min() + threshold:
        return score, null_score, "narrow top", 0
    if evenness[-1] < evenness[0] + threshold and (np.diff(evenness) < TOLERANCE).all():
        return score, null_score, "funnel", len(evenness) - 1
    return score, null_score, "none", None
