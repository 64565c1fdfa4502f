"""What is said of distributions and states, against definitions in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loftq_cli.evaluation.compare import Predictions, States
from tests.support.quantizing import gaussian


def softmax(row: list[float]) -> list[float]:
    largest = max(row)
    powers = [math.exp(value - largest) for value in row]
    return [power / sum(powers) for power in powers]


@given(st.integers(2, 300), st.integers(2, 9), st.integers(1, 3))
def test_sums_are_those_of_the_definitions(length: int, vocabulary: int, windows: int) -> None:
    found = Predictions()
    surprise = kl = 0.0
    agreeing = count = 0
    for number in range(windows):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(0, vocabulary, (length,), generator=generator)
        ours = 3 * gaussian(length, vocabulary, seed=2 * number)
        theirs = 3 * gaussian(length, vocabulary, seed=2 * number + 1)
        found.add(ids, ours, theirs)
        for place in range(length - 1):
            p, q = (softmax(logits[place].tolist()) for logits in (theirs, ours))
            surprise -= math.log(q[int(ids[place + 1])])
            kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            agreeing += p.index(max(p)) == q.index(max(q))
            count += 1
    assert found.tokens == count
    assert found.perplexity == pytest.approx(math.exp(surprise / count), rel=1e-4)
    assert found.kl == pytest.approx(kl, rel=1e-3, abs=1e-5)
    assert found.agreeing == agreeing


def test_a_model_is_no_distance_from_itself() -> None:
    ids, logits = torch.arange(20) % 7, gaussian(20, 7)
    found, states = Predictions(), States()
    found.add(ids, logits, logits)
    states.add(logits, logits)
    assert (found.kl, found.agreeing) == (0.0, 19)
    assert found.perplexity == found.source_perplexity
    assert states.cosine == pytest.approx(1.0)
    assert states.relative_error == 0.0


def test_states_by_their_definitions() -> None:
    found = States()
    ours, theirs = gaussian(10, 5, seed=1).half(), gaussian(10, 5, seed=2)
    found.add(ours[:4], theirs[:4])
    found.add(ours[4:], theirs[4:])
    a, b = ours.double(), theirs.double()
    cosines = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    assert found.cosine == pytest.approx(float(cosines.mean()))
    assert found.relative_error == pytest.approx(float((a - b).norm() / b.norm()))


def test_what_is_certain_and_wrong_has_no_finite_perplexity() -> None:
    found = Predictions()
    found.add(torch.tensor([0, 1]), torch.tensor([[1000.0, -1000.0]] * 2))
    assert found.perplexity == math.inf
