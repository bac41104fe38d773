"""Moving codes that are of little use to where the error is."""

import torch

from .assignment import best_codes, chunk_rows, score_offsets

# Of the cost of giving a code up, the share that splitting another must win back at once. The cost is an upper bound,
# and the iterations that follow win several times what the split itself wins. Larger values lower the error a little on
# heavy tails and leave more codes to outliers.
COST_SHARE = 0.1


def relocate(codebook, sample, counts, errors, threshold, generator=None):
    r"""
    Moves under-used codes, in place, each into a crowded cluster, which it splits, where that pays.

    Giving up a code costs at most n |c - c'|^2, when its n points go to the nearest code c' that is not under-used. Splitting a
    cluster of n points at its centre along a direction v gains about n (E|(x - c).v|)^2, the squared error between its two
    halves. Codes with fewer than `threshold` times the mean count are moved, cheapest first, into the clusters with the
    most to gain, as long as the gain exceeds a tenth of the cost: so an outlier far from everything else keeps its code.

    The direction is the main one of half of a sample of the cluster, the gain is measured on the other half: on the
    same points it would look larger than it is.

    Args:
        codebook (`torch.Tensor`): Shape: (K, D). The mean of each cluster. Changed in place.
        sample (`torch.Tensor`): Shape: (M, D). Random points, at best dozens per code.
        counts (`torch.Tensor`): Shape: (K,). Points per code.
        errors (`torch.Tensor`): Shape: (K,). Squared error per code.
        threshold (`float`):
            Codes with fewer than this share of the mean count are candidates.
        generator (`torch.Generator`, *optional*):
            Source of all randomness.

    Returns:
        `torch.Tensor`: the codes that changed.
    """
    under_used = counts < threshold * counts.mean()
    candidates = torch.nonzero(under_used).flatten()
    # A donor must have error to give: with more codes than distinct points there are fewer donors than candidates.
    donor_errors = errors.masked_fill(under_used | (errors <= 1e-6 * counts * codebook.double().square().sum(1)), 0)
    num_donors = min(2 * len(candidates), int((donor_errors > 0).sum()))
    if len(candidates) == 0 or num_donors == 0:
        return candidates[:0]
    donors = torch.topk(donor_errors, num_donors).indices

    # 1. what each donor would gain
    offsets, spreads = _split_directions(codebook, sample, donors, generator)
    gains = counts[donors] * spreads.double().square()
    # A donor of which the sample holds too little is judged by its error, as if its points lay on a line.
    unseen = spreads == 0
    spreads = torch.where(unseen, (errors[donors] / counts[donors]).sqrt().to(spreads.dtype), spreads)
    gains = torch.where(unseen, 0.5 * errors[donors], gains)
    best_donors = torch.argsort(gains, descending=True, stable=True)

    # 2. what giving up each candidate costs
    kept = codebook[~under_used]
    distances = torch.cdist(codebook[candidates], kept).square().amin(1).double()
    costs = counts[candidates] * distances
    cheapest = torch.argsort(costs, stable=True)

    # 3. pair them up while it pays
    num_pairs = min(len(candidates), num_donors)
    best_donors, cheapest = best_donors[:num_pairs], cheapest[:num_pairs]
    pays = gains[best_donors] > COST_SHARE * costs[cheapest]
    best_donors, moved = best_donors[pays], candidates[cheapest[pays]]
    split = donors[best_donors]
    halves = offsets[best_donors] * spreads[best_donors, None]
    codebook[moved] = codebook[split] + halves
    codebook[split] -= halves
    return torch.cat([moved, split])


def _split_directions(codebook, sample, donors, generator):
    """Unit vectors along which to split each donor, and the mean absolute deviation along them. Shapes: (n, D), (n,)."""
    num_donors, dim = len(donors), codebook.shape[1]
    slot = torch.full((len(codebook),), -1, device=codebook.device)
    slot[donors] = torch.arange(num_donors, device=codebook.device)
    rows = chunk_rows(len(codebook), sample.device)
    offsets, columns = score_offsets(codebook), codebook.T
    codes = torch.cat([best_codes(torch.addmm(offsets, chunk, columns, beta=-1)) for chunk in sample.split(rows)])
    members = torch.nonzero(slot[codes] >= 0).flatten()
    owner = slot[codes[members]]
    centred = sample.index_select(0, members) - codebook[donors].index_select(0, owner)
    # Alternate members of each donor; the sample is in random order already.
    by_owner = torch.argsort(owner, stable=True)
    fitting = torch.zeros(len(owner), dtype=torch.bool, device=owner.device)
    fitting[by_owner[::2]] = True

    direction = torch.randn(num_donors, dim, generator=generator).to(codebook)
    direction = torch.nn.functional.normalize(direction, dim=1)
    fit_points, fit_owner = centred[fitting], owner[fitting]
    for _ in range(3):  # power iteration on each donor's scatter matrix
        projections = (fit_points * direction.index_select(0, fit_owner)).sum(1, keepdim=True)
        product = torch.zeros_like(direction).index_add_(0, fit_owner, projections * fit_points)
        moved = product.square().sum(1, keepdim=True) > 0
        direction = torch.where(moved, torch.nn.functional.normalize(product, dim=1), direction)

    test_owner = owner[~fitting]
    deviation = (centred[~fitting] * direction[test_owner]).sum(1).abs()
    total = torch.zeros(num_donors, device=codebook.device).index_add_(0, test_owner, deviation)
    seen = torch.bincount(test_owner, minlength=num_donors)
    spread = torch.where(seen >= 4, total / seen.clamp_min(1), torch.zeros_like(total))
    return direction, spread
