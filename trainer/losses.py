"""What a wrong answer costs: cross-entropy, and the two losses against long tails that the paper compares pruning with."""

import numpy as np
import torch
import torch.nn.functional as F

from .collator import IGNORED

LOSSES = ("cross_entropy", "focal", "mile")


def answer_loss(logits, labels, loss_type="cross_entropy", gamma=1.0, label_smoothing=0.0, num_items=None):
    r"""
    The mean loss of the tokens that have a label.

    With the probability \\( p_t \\) of the right token and the entropy \\( H \\) (in nats) of the predicted distribution, neither
    of which gradients flow through, a token's cross-entropy is weighted by

    - `"cross_entropy"`: 1;
    - `"focal"`: \\( \alpha (1 - p_t)^\gamma \\) (Lin et al. 2017, [arXiv 1708.02002](https://huggingface.co/papers/1708.02002));
    - `"mile"`: \\( \alpha (1 + H)^\gamma \\) (Su et al. 2024, "MiLe Loss", [arXiv 2310.19531](https://huggingface.co/papers/2310.19531)).

    \\( \alpha \\) makes the weights' mean 1, so that the loss keeps the scale of cross-entropy. The mean is that of the tokens at
    hand: where gradients are accumulated, or processes share a step, each batch is scaled by itself, so that one batch of 8
    and 8 batches of 1 give the same cross-entropy, but not quite the same focal and MiLe loss.

    Args:
        logits (`torch.Tensor`): Shape: (..., V).
        labels (`torch.Tensor`): What follows each of them, -100 where nothing is to be learned. Shape: (...).
        loss_type (`str`, *optional*, defaults to `"cross_entropy"`): One of the above.
        gamma (`float`, *optional*, defaults to 1.0): The exponent.
        label_smoothing (`float`, *optional*, defaults to 0.0): Share of the target that is spread over all tokens.
        num_items (`int` or `torch.Tensor`, *optional*):
            What the sum is divided by: the labels of all batches of a step. Those at hand if not given.

    Returns:
        `torch.Tensor` (float32): a scalar. 0 where no token has a label.
    """
    losses = token_losses(logits, labels, loss_type, gamma, label_smoothing)
    if num_items is None:
        num_items = (labels != IGNORED).sum().clamp_min(1)
    return losses.sum() / num_items


def token_losses(logits, labels, loss_type="cross_entropy", gamma=1.0, label_smoothing=0.0):
    """
    Args:
        As [`answer_loss`].

    Returns:
        `torch.Tensor` (float32): the loss of each token, 0 where there is no label. Shape: (...).
    """
    has_label = labels != IGNORED
    logits, known = logits[has_label].float(), labels[has_label]
    losses = F.cross_entropy(logits, known, reduction="none", label_smoothing=label_smoothing)
    if loss_type != "cross_entropy" and len(losses):
        losses = losses * _weights(logits.detach(), known, loss_type, gamma)
    return losses.new_zeros(labels.shape).masked_scatter(has_label, losses)


def _weights(logits, labels, loss_type, gamma):
    log_probs = logits.log_softmax(-1)
    if loss_type == "focal":
        weights = (1 - log_probs.gather(-1, labels[:, None])[:, 0].exp()) ** gamma
    else:
        weights = (1 + torch.special.entr(log_probs.exp()).sum(-1)) ** gamma
    # Where every token is certain, focal weights are all 0, and so is what they weigh.
    return weights / weights.mean().clamp_min(torch.finfo(weights.dtype).tiny)


class SIDVocabulary:
    """
    The SID tokens and the end token, as a vocabulary of their own for the loss.

    Args:
        tokenizer ([`SIDTokenizer`]): Whose tokens.
    """

    def __init__(self, tokenizer):
        self.token_ids = torch.cat([tokenizer.sid_vocabulary(), torch.tensor([tokenizer.eos_token_id])]).unique()
        self.columns = torch.full((len(tokenizer),), -1)
        self.columns[self.token_ids] = torch.arange(len(self.token_ids))

    def to(self, device):
        self.token_ids, self.columns = self.token_ids.to(device), self.columns.to(device)
        return self

    def check(self, label_ids, name):
        """
        Args:
            label_ids (`np.ndarray`): Tokens of answers. Shape: (n,).
            name (`str`): What the message calls the dataset.

        Raises:
            `ValueError`: if one is not of this vocabulary.
        """
        others = np.setdiff1d(label_ids, self.token_ids.cpu().numpy())
        if len(others):
            raise ValueError(
                f'The {name} dataset has answers in text (token {int(others[0])}, for instance), while loss_normalize="sid" '
                'knows SID tokens only. Leave out the task "describe", or set loss_normalize="vocab".'
            )

    def narrow(self, logits, labels):
        """
        Args:
            logits (`torch.Tensor`): Shape: (..., V).
            labels (`torch.Tensor`): Shape: (...).

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: logits of the tokens of this vocabulary, and labels as their places among them.
        """
        has_label = labels != IGNORED
        labels = torch.where(has_label, self.columns[labels.where(has_label, 0)], IGNORED)
        return logits[..., self.token_ids], labels
