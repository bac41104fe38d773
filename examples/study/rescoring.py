"""
Candidates re-scored: a linear combination of what the model of SIDs, the dual tower and the log say of each, with the weights
that make the products bought most probable among the candidates of validation rows.
"""

import torch

FEATURES = (
    "SID log-probability",
    "found by beams",
    "tower similarity",
    "log(1 + popularity)",
    "in history",
    "recency",
)
RIDGE = 1e-3  # keeps weights finite where a feature alone tells products bought from others
LONGEST_FIT = 200


def join_candidates(beam_products, log_probs, tower_products=None):
    """
    The products of the beams and, if given, those of the tower behind them, each once.

    Args:
        beam_products (`torch.Tensor`): Shape: (R, C). Best first, -1 where a list ends.
        log_probs (`torch.Tensor`): Shape: (R, C). Of their SIDs, -inf where a list ends.
        tower_products (`torch.Tensor`, *optional*): Shape: (R, T). No -1.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: products, -1 where there is none, and their log-probabilities, -inf for those that the
        beams did not find. Shape of both: (R, C) or (R, C + T).
    """
    if tower_products is None:
        return beam_products, log_probs
    is_known = (tower_products[:, :, None] == beam_products[:, None, :]).any(-1)
    unknown = log_probs.new_full(tower_products.shape, -torch.inf)
    return torch.cat([beam_products, tower_products.masked_fill(is_known, -1)], 1), torch.cat([log_probs, unknown], 1)


def make_features(products, log_probs, similarities, log_popularity, history):
    """
    Args:
        products (`torch.Tensor`): Shape: (R, C). Of [`join_candidates`].
        log_probs (`torch.Tensor`): Shape: (R, C).
        similarities (`torch.Tensor`): Shape: (R, C). Of query and product in the dual tower.
        log_popularity (`torch.Tensor`): Shape: (N,). log(1 + training purchases).
        history (`torch.Tensor`): Shape: (R, H). The user's products, the latest first, -1 where it ends.

    Returns:
        `torch.Tensor`: [`FEATURES`] of each candidate, float64, shape (R, C, 6). A candidate that the beams did not find gets the
        lowest log-probability among those of its row that they did, and 0 as *found by beams*, whose weight sets how much less
        it is worth. *Recency* is 1 / n for the n-th latest product of the history, counted from 1, and 0 for all others; where
        a product is in it more than once, the latest counts.
    """
    is_found = log_probs > -torch.inf
    lowest = log_probs.masked_fill(~is_found, torch.inf).amin(1, keepdim=True)
    lowest = lowest.masked_fill(
        lowest == torch.inf, 0.0
    )  # no product found: one value for all, which changes no order
    is_there = (products[:, :, None] == history[:, None, :]) & (products >= 0)[:, :, None]
    in_history = is_there.any(-1)
    nth = is_there.double().argmax(-1) + 1  # argmax gives the first of equals
    features = [
        torch.where(is_found, log_probs, lowest),
        is_found,
        similarities,
        log_popularity[products.clamp(min=0)],
        in_history,
        in_history / nth,
    ]
    return torch.stack([feature.double() for feature in features], -1)


def fit_weights(features, products, bought):
    r"""
    Minimises \\(-\frac{1}{R'} \sum_r \log \text{softmax}_c(w \cdot x_{rc})\\) at the products bought, the listwise loss of ListNet
    (Cao et al. 2007) with one target a list, over the R' rows whose candidates hold what was bought; others say nothing of
    weights. Convex, and so small that L-BFGS sees all rows at once.

    Args:
        features (`torch.Tensor`): Shape: (R, C, F).
        products (`torch.Tensor`): Shape: (R, C). -1 where there is no candidate.
        bought (`torch.Tensor`): Shape: (R,).

    Returns:
        `tuple[torch.Tensor, int]`: the weights, float64, shape (F,), and R'.

    Raises:
        `ValueError`: if no row has what was bought among its candidates.
    """
    is_bought = products == bought[:, None]
    is_useful = is_bought.any(1)
    if not is_useful.any():
        raise ValueError(
            f"In none of {len(bought)} validation rows is the product bought among the candidates, so that there is nothing to "
            "fit weights on. Train longer, or take more validation rows."
        )
    features, is_product = features[is_useful], products[is_useful] >= 0
    targets = is_bought[is_useful].int().argmax(1)
    # The penalty is on weights per standard deviation, so that units do not matter; what is constant gets none.
    deviations = features[is_product].std(0, correction=0)
    deviations = torch.where(deviations > 1e-12, deviations, torch.inf)
    scaled = features / deviations
    weights = torch.zeros(features.shape[-1], dtype=torch.float64, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=LONGEST_FIT, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        scores = (scaled @ weights).masked_fill(~is_product, -torch.inf)
        loss = torch.nn.functional.cross_entropy(scores, targets) + RIDGE / 2 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach() / deviations, len(targets)


def rescore(features, products, weights, top_k):
    """
    Args:
        features (`torch.Tensor`): Shape: (R, C, F).
        products (`torch.Tensor`): Shape: (R, C). -1 where there is no candidate.
        weights (`torch.Tensor`): Shape: (F,).
        top_k (`int`): Products to keep.

    Returns:
        `torch.Tensor`: the candidates of the highest scores, best first, -1 where there are no more; of equal ones the first.
        Shape: (R, top_k).
    """
    scores = (features @ weights).masked_fill(products < 0, -torch.inf)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    ranked = products.gather(1, order)
    return torch.nn.functional.pad(ranked, (0, top_k - ranked.shape[1]), value=-1)
