"""The knapsack, held to an exhaustive search, and to a plain table where that is too long."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from loftq_cli.planning.allocation import Choice, allocate

Groups = list[list[Choice]]


def totals(groups: Groups, chosen: Sequence[int]) -> tuple[int, float]:
    picked = [group[number] for group, number in zip(groups, chosen, strict=True)]
    return sum(choice.cost for choice in picked), sum(choice.error for choice in picked)


def exhaustive(groups: Groups, budget: int) -> float:
    every = itertools.product(*(range(len(group)) for group in groups))
    found = (totals(groups, chosen) for chosen in every)
    return min(error for cost, error in found if cost <= budget)


def tabled(groups: Groups, budget: int) -> float:
    """The least error at every cost up to the budget, one unit at a time."""
    least = [0.0] * (budget + 1)
    for group in groups:
        least = [
            min(
                (least[left - c.cost] + c.error for c in group if c.cost <= left),
                default=float("inf"),
            )
            for left in range(budget + 1)
        ]
    return least[budget]


def widths(elements: int, error: float, generator: random.Random) -> list[Choice]:
    """Four widths of a matrix, with errors that fall about as a quantizer's."""
    bits = ((2, 1.0), (3, 0.25), (4, 0.06), (8, 0.0003))
    return [
        Choice(elements * width // 4, error * part * generator.uniform(0.7, 1.3))
        for width, part in bits
    ]


@pytest.mark.parametrize("seed", range(40))
def test_small_cases_are_those_of_an_exhaustive_search(seed: int) -> None:
    generator = random.Random(seed)
    groups = [
        [
            Choice(generator.randint(0, 9), generator.choice([0.0, 1.0, generator.random()]))
            for _ in range(generator.randint(1, 4))
        ]
        for _ in range(generator.randint(1, 5))
    ]
    cheapest = sum(min(choice.cost for choice in group) for group in groups)
    for budget in (cheapest, cheapest + generator.randint(1, 9), 50):
        cost, error = totals(groups, allocate(groups, budget))
        assert cost <= budget
        assert error == pytest.approx(exhaustive(groups, budget), abs=1e-12)


@pytest.mark.parametrize("sizes", [(4,), (4, 8), (4, 12, 20, 28, 44, 52)])
@pytest.mark.parametrize("seed", range(3))
def test_many_matrices_are_those_of_a_table(sizes: tuple[int, ...], seed: int) -> None:
    generator = random.Random(seed)
    groups = [
        widths(size, size * generator.lognormvariate(0, 1), generator)
        for size in generator.choices(sizes, k=24)
    ]
    least = sum(group[0].cost for group in groups)
    for share in (0.1, 0.5, 1.4):
        budget = least + round(least * share)
        cost, error = totals(groups, allocate(groups, budget))
        assert cost <= budget
        assert error == pytest.approx(tabled(groups, budget), rel=1e-9)


@pytest.mark.parametrize("distinct", [False, True], ids=["Llama's shapes", "sizes that all differ"])
def test_hundreds_of_matrices_leave_no_upgrade_that_fits(distinct: bool) -> None:
    generator = random.Random(0)
    shapes = [4096 * 4096] * 4 + [4096 * 11008] * 3
    sizes = [size + 64 * distinct * generator.randint(1, 99999) for size in shapes * 32]
    groups = [widths(size, size * generator.lognormvariate(0, 0.3), generator) for size in sizes]
    budget = sum(sizes) * 11 // 16  # 2.75 bits
    chosen = allocate(groups, budget)
    cost, error = totals(groups, chosen)
    left = budget - cost
    wider = [
        group[next_one].cost - group[number].cost
        for group, number in zip(groups, chosen, strict=True)
        for next_one in range(number + 1, 4)
    ]
    assert 0 <= left < min(wider)
    # No exchange of an upgrade for a downgrade gains either.
    for (i, up), (j, down) in itertools.permutations(enumerate(chosen), 2):
        if up < 3 and down > 0:
            extra = groups[i][up + 1].cost - groups[i][up].cost
            saved = groups[j][down].cost - groups[j][down - 1].cost
            gain = groups[i][up].error - groups[i][up + 1].error
            loss = groups[j][down - 1].error - groups[j][down].error
            assert extra - saved > left or gain <= loss + 1e-9 * error
    assert allocate(groups, budget) == chosen


def test_a_choice_that_gains_nothing_is_not_paid_for() -> None:
    zero = [Choice(2, 0.0), Choice(4, 0.0), Choice(8, 0.0)]
    worse = [Choice(2, 1.0), Choice(4, 1.5), Choice(8, 0.5)]
    assert allocate([zero, worse], 100) == [0, 2]
    assert allocate([zero, worse], 9) == [0, 0]


def test_a_budget_above_every_cost_takes_the_best_of_each() -> None:
    groups = [widths(8, 3.0, random.Random(seed)) for seed in range(5)]
    assert allocate(groups, 10**12) == [3] * 5


def test_a_budget_below_the_cheapest_choices_is_refused() -> None:
    groups = [[Choice(4, 1.0)], [Choice(5, 1.0), Choice(9, 0.0)]]
    assert allocate(groups, 9) == [0, 0]
    with pytest.raises(ValueError, match="exceed the budget"):
        allocate(groups, 8)


def test_more_states_than_are_kept_still_make_a_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loftq_cli.planning.allocation._MOST_STATES", 2)
    generator = random.Random(1)
    groups = [widths(4 * generator.randint(1, 30), 1.0, generator) for _ in range(12)]
    budget = sum(group[1].cost for group in groups)
    cost, error = totals(groups, allocate(groups, budget))
    assert cost <= budget
    assert tabled(groups, budget) <= error <= 1.05 * tabled(groups, budget)
