"""The divergence from known predictions and its gradient, against autograd in float64."""

from __future__ import annotations

import pytest
import torch

from loftq_cli.numerics import divergence as module
from loftq_cli.numerics.divergence import divergence
from tests.support.quantizing import gaussian

ROWS, VOCABULARY = 7, 40


def textbook(
    logits: torch.Tensor, values: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean over rows, and its gradient, float64, with the other tokens as one more."""
    logits = logits.detach().double().requires_grad_()
    q = torch.softmax(logits, dim=-1)
    known, p = q.gather(1, tokens), values.double().exp()
    if tokens.shape[1] < logits.shape[1]:
        known, p = (torch.cat([each, 1 - each.sum(1, keepdim=True)], 1) for each in (known, p))
    found = (p * (p / known).log()).sum(dim=1).mean()
    found.backward()
    assert logits.grad is not None
    return found.detach(), logits.grad


def told(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.log_softmax(2 * gaussian(ROWS, VOCABULARY, seed=seed), dim=-1).topk(count)


@pytest.mark.parametrize("count", [1, 5, VOCABULARY])
@pytest.mark.parametrize("piece", [1, 3 * VOCABULARY, 1 << 20])
def test_it_is_the_textbook_s_and_so_is_its_gradient(
    count: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIECE", piece)
    logits, (values, tokens) = 3 * gaussian(ROWS, VOCABULARY), told(count, 1)
    expected, gradient = textbook(logits, values, tokens)
    logits.requires_grad_()
    found = divergence(logits, values, tokens.int())
    torch.testing.assert_close(found.detach().double(), expected, rtol=1e-5, atol=1e-6)
    (2.5 * found).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), 2.5 * gradient, rtol=1e-4, atol=1e-6)


def test_of_bfloat16_the_gradient_is_bfloat16() -> None:
    logits, (values, tokens) = 3 * gaussian(ROWS, VOCABULARY).bfloat16(), told(5, 1)
    expected, gradient = textbook(logits, values, tokens)
    logits.requires_grad_()
    found = divergence(logits, values, tokens)
    found.backward()
    assert (found.dtype, logits.grad.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(found.detach().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.grad.double(), gradient, rtol=2e-2, atol=1e-4)


def test_where_nothing_is_left_for_other_tokens_the_gradient_is_finite() -> None:
    logits = torch.full((ROWS, VOCABULARY), -50.0)
    logits[:, 3] = 50.0
    logits.requires_grad_()
    values, tokens = told(5, 1)
    tokens[:, 0] = 3
    found = divergence(logits, values, tokens)
    found.backward()
    assert found.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_without_gradients_none_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(torch, "empty_like", lambda tensor: made.append(tensor))
    logits, (values, tokens) = gaussian(ROWS, VOCABULARY).requires_grad_(), told(5, 1)
    with torch.no_grad():
        assert not divergence(logits, values, tokens).requires_grad
    assert made == []
