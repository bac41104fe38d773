"""The losses against their formulas, token by token, and against each other where they must agree."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rqsid.trainer import SIDVocabulary, answer_loss

LOGITS = torch.tensor([[2.0, 0.5, -1.0, 0.0], [0.0, 0.0, 3.0, 0.0], [1.0, 1.0, 1.0, 1.0], [5.0, 0.0, 0.0, 0.0]])
LABELS = torch.tensor([1, 2, -100, 3])


def by_hand(loss_type, gamma):
    losses, weights = [], []
    for row, label in zip(LOGITS.tolist(), LABELS.tolist(), strict=True):
        if label == -100:
            continue
        total = sum(math.exp(logit) for logit in row)
        probs = [math.exp(logit) / total for logit in row]
        losses.append(-math.log(probs[label]))
        entropy = -sum(p * math.log(p) for p in probs)
        weights.append(
            {"cross_entropy": 1, "focal": (1 - probs[label]) ** gamma, "mile": (1 + entropy) ** gamma}[loss_type]
        )
    mean = sum(weights) / len(weights)
    return sum(loss * weight / mean for loss, weight in zip(losses, weights, strict=True)) / len(losses)


@pytest.mark.parametrize("loss_type", ["cross_entropy", "focal", "mile"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_losses_equal_their_formulas(loss_type, gamma):
    expected = by_hand(loss_type, gamma)
    assert answer_loss(LOGITS, LABELS, loss_type, gamma).item() == pytest.approx(expected, rel=1e-5)
    # Shapes do not matter, nor does what the sum is divided by change anything else.
    batched = answer_loss(LOGITS.view(2, 2, 4), LABELS.view(2, 2), loss_type, gamma, num_items=12)
    assert batched.item() == pytest.approx(expected * 3 / 12, rel=1e-5)
    if gamma == 0:
        assert expected == pytest.approx(by_hand("cross_entropy", 0))


def test_weights_are_no_part_of_the_gradient():
    """The gradient of a token is that of its cross-entropy, times its weight."""
    for loss_type in ("focal", "mile"):
        logits = LOGITS.clone().requires_grad_()
        answer_loss(logits, LABELS, loss_type, 2.0).backward()
        plain = LOGITS.clone().requires_grad_()
        answer_loss(plain, LABELS).backward()
        ratio = logits.grad / plain.grad
        for row in (0, 1, 3):
            torch.testing.assert_close(ratio[row], ratio[row, :1].expand(4))
        assert (logits.grad[2] == 0).all()
        assert len({round(value, 3) for value in ratio[[0, 1, 3], 0].tolist()}) == 3


def test_focal_loss_looks_at_the_answer_and_mile_at_the_distribution():
    # The third token is wrong and certain of it: focal weights it most; MiLe weights the least certain one most.
    weight = {}
    for loss_type in ("focal", "mile"):
        logits = torch.tensor([[4.0, 0.0], [0.1, 0.0], [0.0, 4.0]]).requires_grad_()
        labels = torch.tensor([0, 0, 0])
        answer_loss(logits, labels, loss_type, 1.0).backward()
        probs = logits.detach().softmax(-1)[:, 0]
        weight[loss_type] = (logits.grad[:, 0] / (probs - 1)).tolist()
    assert np.argmax(weight["focal"]) == 2 and np.argmax(weight["mile"]) == 1


@pytest.mark.parametrize("loss_type", ["cross_entropy", "focal", "mile"])
def test_nothing_to_learn_and_nothing_left_to_learn(loss_type):
    logits = LOGITS.clone().requires_grad_()
    loss = answer_loss(logits, torch.full((4,), -100), loss_type)
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()
    certain = torch.tensor([[200.0, 0.0], [0.0, 200.0]]).requires_grad_()
    loss = answer_loss(certain, torch.tensor([0, 1]), loss_type)
    loss.backward()
    assert loss.item() == 0 and certain.grad.isfinite().all()
    # A masked token has no probability, and no share in the entropy.
    masked = torch.tensor([[1.0, 2.0, -math.inf], [0.5, 0.0, 0.0]])
    assert math.isfinite(answer_loss(masked, torch.tensor([0, 1]), loss_type).item())


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31 - 1), st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_cross_entropy_of_pieces_adds_up_and_the_others_nearly(seed, sizes):
    generator = torch.Generator().manual_seed(seed)
    pieces = [(torch.randn(n, 7, generator=generator), torch.randint(7, (n,), generator=generator)) for n in sizes]
    whole = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
    together = answer_loss(*whole).item()
    apart = sum(answer_loss(*piece, num_items=sum(sizes)).item() for piece in pieces)
    assert apart == pytest.approx(together, rel=1e-4)


def test_half_precision_is_summed_in_single():
    loss = answer_loss(LOGITS.bfloat16(), LABELS)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(
        answer_loss(LOGITS, LABELS).item(), rel=1e-5
    )  # these logits are exact in bfloat16


@pytest.mark.parametrize("base_tokenizer", ["qwen"], indirect=True)
def test_the_sid_vocabulary_is_the_same_loss_where_nothing_else_is_likely(tokenizer):
    vocabulary = SIDVocabulary(tokenizer)
    ids = torch.cat([tokenizer.sid_vocabulary(), torch.tensor([tokenizer.eos_token_id])])
    assert sorted(vocabulary.token_ids.tolist()) == sorted(ids.tolist())
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, len(tokenizer) + 8, generator=generator)  # rows to spare behind the vocabulary
    labels = ids[torch.randint(len(ids), (2, 3), generator=generator)]
    labels[0, 0] = -100
    narrow = answer_loss(*vocabulary.narrow(logits, labels))
    others = torch.ones(logits.shape[-1], dtype=torch.bool)
    others[ids] = False
    assert narrow.item() == pytest.approx(answer_loss(logits.masked_fill(others, -math.inf), labels).item(), rel=1e-5)
    assert narrow.item() < answer_loss(logits, labels).item() - 0.1
    vocabulary.check(np.array(ids), "train")
    with pytest.raises(ValueError, match='train dataset has answers in text.*"describe".*loss_normalize="vocab"'):
        vocabulary.check(np.array([*ids.tolist(), 5]), "train")
