"""Which code is nearest: one matrix product, in chunks."""

import torch


def nearest_codes(points, codebook, prices=None):
    """
    Assigns each point to its nearest code, argmin over codes of the squared Euclidean distance (plus the code's price).

    Args:
        points (`torch.Tensor`): Shape: (N, D).
        codebook (`torch.Tensor`): Shape: (K, D).
        prices (`torch.Tensor`, *optional*): Shape: (K,).
            Added to the squared distance to each code before the smallest is taken; see `capacity` in [`lloyd`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: codes of shape (N,) and squared distances, without prices, of shape (N,).
    """
    scores = torch.addmm(score_offsets(codebook, prices), points, codebook.T, beta=-1)
    codes = best_codes(scores)
    best = scores.gather(1, codes[:, None])[:, 0]
    if prices is not None:
        best = best + prices[codes] / 2
    distances = torch.linalg.vector_norm(points, dim=1).square() - 2 * best
    return codes, distances.clamp_min_(0)


def score_offsets(codebook, prices=None):
    """
    argmin_k |x - c_k|^2 + p_k = argmax_k x.c_k - o_k with o_k = (|c_k|^2 + p_k) / 2: one matrix product for all scores, no
    [N, K, D] difference.

    Returns:
        `torch.Tensor`: o. Shape: (K,).
    """
    half_norms = codebook.square().sum(1) / 2
    return half_norms if prices is None else half_norms + prices / 2


def best_codes(scores):
    """argmax over codes. Shape: (N, K) -> (N,)."""
    if scores.device.type == "cpu":
        # Six times faster than torch's, which would take a tenth of the time of the matrix product.
        return torch.from_numpy(scores.detach().numpy().argmax(1))
    return scores.argmax(1)


def chunk_rows(num_codes, device="cpu"):
    """
    Rows to assign at a time. On a CPU chunk and scores stay in the cache; an accelerator wants large products. In both cases
    memory depends on neither N nor K.
    """
    if torch.device(device).type == "cpu":
        return max(1024, min(2048, 2**20 // num_codes))
    return max(1024, min(2**16, 2**26 // num_codes))
