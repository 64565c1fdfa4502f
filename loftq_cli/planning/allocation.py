"""One choice from every group, so that the errors' sum is least and the costs' within a budget.

The multiple-choice knapsack, solved exactly: dynamic programming over the groups, on lists of
states (cost so far, error so far) without those that another state dominates, bounded as in
Dyer, Kayal and Walker, "A branch and bound algorithm for solving the multiple-choice knapsack
problem" (1984), and Pisinger (1995).

A price on cost makes the groups independent: at price p the sum of min(error + p * cost) less
p * budget bounds the optimum from below. At the best price, which the greedy solution of the linear
relaxation finds, few choices but the cheapest in that sense can be part of an optimum, because what
a choice exceeds its group's minimum by adds to the bound; a state whose bound is above the best
solution known is dropped. That solution comes from completing states with the groups' minima.

The lists stay short where many groups are of equal costs (few distinct sums), as well as if all
differ (the bound is tight). Time is bounded all the same: beyond _MOST_STATES the states with the
least bounds are kept. Deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

_MOST_STATES = 1 << 16
_ROUNDING = 1e-12
"""Of the errors' sum: what bounds are not told apart by."""


@dataclass(frozen=True)
class Choice:
    """``cost`` in whole units (0 or more), ``error`` finite (0 or more)."""

    cost: int
    error: float


@dataclass(frozen=True)
class _Group:
    """Choices that no other one dominates: costs rise, errors fall. ``numbers`` are their places in
    the group as it was given; ``excess`` is error + price * cost above the group's least."""

    index: int
    numbers: list[int]
    costs: list[int]
    errors: list[float]
    excess: list[float]

    @property
    def least(self) -> int:
        """The choice to complete a solution with."""
        return min(range(len(self.costs)), key=lambda number: self.excess[number])


@dataclass
class _Best:
    """The best solution so far: ``stage`` groups are chosen as ``state`` says, the others are at
    their least."""

    error: float
    stage: int
    state: int


def allocate(groups: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """For each of ``groups`` the number of its choice: the sum of costs is at most ``budget``, the
    sum of errors the least possible. A choice that costs more without a smaller error is not taken.

    Raises ValueError if not even the cheapest choices fit.
    """
    kept = [_undominated(group) for group in groups]
    price, greedy = _relax(groups, kept, budget)
    least = [min(_priced(group[k], price) for k in numbers) for group, numbers in zip(groups, kept)]
    bounded = [
        _Group(
            index,
            numbers,
            [groups[index][k].cost for k in numbers],
            [groups[index][k].error for k in numbers],
            [_priced(groups[index][k], price) - least[index] for k in numbers],
        )
        for index, numbers in enumerate(kept)
    ]
    # The most doubtful groups first: the solution becomes good before there are many states.
    bounded.sort(key=lambda group: (sorted([*group.excess, float("inf")])[1], group.index))
    error = sum(group[k].error for group, k in zip(groups, greedy))
    found = _search(bounded, budget, sum(least) - price * budget, error)
    if found is None:
        return greedy
    chosen = list(greedy)
    for group, number in zip(bounded, found):
        chosen[group.index] = group.numbers[number]
    return chosen


def _priced(choice: Choice, price: float) -> float:
    return choice.error + price * choice.cost


def _undominated(group: Sequence[Choice]) -> list[int]:
    order = sorted(range(len(group)), key=lambda k: (group[k].cost, group[k].error))
    kept: list[int] = []
    for k in order:
        if not kept or group[k].error < group[kept[-1]].error:
            kept.append(k)
    return kept


def _relax(
    groups: Sequence[Sequence[Choice]], kept: Sequence[Sequence[int]], budget: int
) -> tuple[float, list[int]]:
    """(price, a solution): upgrades along each group's convex hull, the most error per cost first.
    The price is that of the first one that does not fit, 0 if all do."""
    upgrades = []
    for index, numbers in enumerate(kept):
        hull = _hull([groups[index][k] for k in numbers])
        for low, high in pairwise(hull):
            before, after = groups[index][numbers[low]], groups[index][numbers[high]]
            gain = (before.error - after.error) / (after.cost - before.cost)
            upgrades.append((-gain, index, numbers[low], numbers[high]))
    chosen = [numbers[0] for numbers in kept]
    left = budget - sum(group[k].cost for group, k in zip(groups, chosen))
    if left < 0:
        raise ValueError("the cheapest choices exceed the budget")
    price = 0.0
    for loss, index, low, high in sorted(upgrades):
        cost = groups[index][high].cost - groups[index][low].cost
        if chosen[index] == low and cost <= left:
            chosen[index] = high
            left -= cost
        else:
            price = price or -loss
    return price, chosen


def _hull(choices: Sequence[Choice]) -> list[int]:
    """The corners of the lower convex hull of choices whose costs rise and whose errors fall."""
    corners: list[int] = []
    for number, new in enumerate(choices):
        while len(corners) > 1:
            first, last = choices[corners[-2]], choices[corners[-1]]
            before = (first.error - last.error) * (new.cost - last.cost)
            if before > (last.error - new.error) * (last.cost - first.cost):
                break
            corners.pop()
        corners.append(number)
    return corners


def _search(groups: Sequence[_Group], budget: int, bound: float, error: float) -> list[int] | None:
    """The choices, as places within their groups, of a solution with less than ``error``; None
    if there is none."""
    slack = _ROUNDING * (error + abs(bound))
    best = _Best(error, -1, 0)
    costs, errors, excess = _whole([0]), _real([0]), _real([0])
    history: list[tuple[torch.Tensor, torch.Tensor]] = []
    # Of the groups from each stage on.
    rest_cost = _tails(_whole([group.costs[group.least] for group in groups]))
    rest_error = _tails(_real([group.errors[group.least] for group in groups]))
    rest_minimum = _tails(_whole([group.costs[0] for group in groups]))
    _complete(best, 0, costs + rest_cost[0], errors + rest_error[0], budget)
    for stage, group in enumerate(groups, start=1):
        states = torch.arange(costs.numel()).repeat(len(group.costs))
        numbers = torch.arange(len(group.costs)).repeat_interleave(costs.numel())
        costs = costs[states] + _whole(group.costs)[numbers]
        errors = errors[states] + _real(group.errors)[numbers]
        excess = excess[states] + _real(group.excess)[numbers]
        able = (costs + rest_minimum[stage] <= budget) & (bound + excess < best.error + slack)
        kept = _pareto(costs, errors, able.nonzero().view(-1))
        if kept.numel() > _MOST_STATES:
            nearest = excess[kept].sort(stable=True).indices[:_MOST_STATES]
            kept = kept[nearest.sort().values]
        if kept.numel() == 0:
            break
        costs, errors, excess = costs[kept], errors[kept], excess[kept]
        history.append((states[kept].to(torch.int32), numbers[kept].to(torch.uint8)))
        _complete(best, stage, costs + rest_cost[stage], errors + rest_error[stage], budget)
    if best.stage < 0:
        return None
    found = [group.least for group in groups]
    state = best.state
    for stage in range(best.stage, 0, -1):
        parents, numbers = history[stage - 1]
        found[stage - 1] = int(numbers[state])
        state = int(parents[state])
    return found


def _whole(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _real(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _tails(values: torch.Tensor) -> torch.Tensor:
    """The sum of the values from each place on, and 0 at the end."""
    return torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])


def _pareto(costs: torch.Tensor, errors: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Those of ``states`` that no other one dominates, by cost."""
    states = states[errors[states].sort(stable=True).indices]
    states = states[costs[states].sort(stable=True).indices]
    if states.numel() == 0:
        return states
    least = errors[states].cummin(dim=0).values
    falls = torch.ones_like(states, dtype=torch.bool)
    falls[1:] = errors[states[1:]] < least[:-1]
    return states[falls]


def _complete(
    best: _Best, stage: int, costs: torch.Tensor, errors: torch.Tensor, budget: int
) -> None:
    """Take the best of these solutions if it is better than ``best``."""
    errors = torch.where(costs <= budget, errors, torch.inf)
    state = int(errors.argmin())
    if float(errors[state]) < best.error:
        best.error, best.stage, best.state = float(errors[state]), stage, state
