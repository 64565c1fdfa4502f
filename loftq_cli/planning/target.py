"""``--target-bpw``: widths such that loss or residual is least at an average of stored bits.

The budget is counted as the manifest counts ``totals.bits_per_weight``: codes, scales, zero points
and tables of all quantized matrices, those whose width a map fixes among them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from fractions import Fraction

from loftq_cli.errors import UsageError
from loftq_cli.families.fused import fused_parts
from loftq_cli.layouts.base import Matrix
from loftq_cli.machine.observer import Observer
from loftq_cli.numerics.quantizers import methods
from loftq_cli.planning.allocation import Choice, allocate
from loftq_cli.planning.estimate import estimate
from loftq_cli.planning.make import in_width, with_widths
from loftq_cli.planning.plan import Plan

_NARROW = 3  # bits


def check(plan: Plan) -> None:
    """Raise UsageError for a target that the plan cannot meet, whatever the weights are."""
    target = plan.recipe.target_bpw
    if target is None:
        return
    if not plan.unsettled and not plan.recipe.widths:
        raise UsageError(f"--bits-map leaves no matrix to --target-bpw {target}")
    _refuse_half_settled(plan)
    # As planned, those that are not settled have the least.
    if _stored(plan) > _budget(plan):
        least = math.ceil(Fraction(_stored(plan) * 8, _elements(plan)) * 10_000) / 10_000
        raise UsageError(
            f"--target-bpw {target}: layout {plan.layout.name} takes at least {least} bits per "
            "weight here, scales, zero points and tables included",
            hint=f"ask for {least} or more, or for larger blocks or narrower scales",
        )


def headroom(plan: Plan) -> int:
    """Bytes that settling the widths can add to what the plan counts, at most."""
    return min(_left(plan), _range(plan)) if plan.unsettled else 0


def takes_the_widest(plan: Plan) -> bool:
    """Whether the target leaves every width that is to be settled at its widest."""
    return bool(plan.unsettled) and _left(plan) >= _range(plan)


def may_be_narrow(plan: Plan) -> bool:
    """Whether a matrix has, or may get, so few bits that statistics decide (docs/statistics.md)."""
    wide = plan.unsettled if takes_the_widest(plan) else ()
    held = (item.matrix.bits for name, item in plan.matrices.items() if name not in wide)
    return any(bits <= _NARROW for bits in held)


def _left(plan: Plan) -> int:
    """Bytes of the target beyond what the plan counts."""
    return _budget(plan) - _stored(plan)


def _range(plan: Plan) -> int:
    """Bytes between the narrowest and the widest codes of all that is to be settled."""
    ends = [(forms[0], forms[-1]) for forms in _forms(plan).values()]
    return sum(_bytes(plan, widest) - _bytes(plan, narrowest) for narrowest, widest in ends)


def settle(plan: Plan, observer: Observer) -> Plan:
    """The plan with every width settled, by a pass over the weights if the target leaves a
    choice. Raises what :func:`loftq_cli.planning.estimate.estimate` raises."""
    forms = _forms(plan)
    if takes_the_widest(plan):
        widths = {name: each[-1].bits for name, each in forms.items()}
        observer.note(
            f"{plan.recipe.target_bpw:g} stored bits per weight are more than the widest codes "
            f"take: all matrices get {max(widths.values())} bits"
        )
        return with_widths(plan, widths)
    if plan.statistics is not None and not plan.statistics.sensitivity:
        observer.note(
            "the statistics hold no sensitivities: widths are settled by errors alone "
            "(`loftq calibrate --sensitivity` measures what these cost the model)"
        )
    costs = {name: [_bytes(plan, form) for form in each] for name, each in forms.items()}
    errors = estimate(plan, forms, observer)
    together = _together(plan, forms)
    groups = [
        [
            Choice(
                sum(costs[name][number] - costs[name][0] for name in names),
                sum(errors[name][number] for name in names),
            )
            for number in range(len(forms[names[0]]))
        ]
        for names in together
    ]
    chosen = allocate(groups, _left(plan))
    widths = {
        name: forms[name][number].bits
        for names, number in zip(together, chosen, strict=True)
        for name in names
    }
    counts = sorted(Counter(widths.values()).items())
    listed = ", ".join(f"{count} matrices at {bits} bits" for bits, count in counts)
    settled = with_widths(plan, widths)
    observer.note(f"settled: {listed}; {settled.bits_per_weight:.4f} stored bits per weight")
    return settled


def _together(plan: Plan, forms: Collection[str]) -> list[list[str]]:
    """The names of ``forms``, those together that have to have one width."""
    if not plan.layout.holds_fused_alike:
        return [[name] for name in forms]
    first = {name: parts[0] for parts in fused_parts(forms) for name in parts}
    found: dict[str, list[str]] = {}
    for name in forms:
        found.setdefault(first.get(name, name), []).append(name)
    return list(found.values())


def _refuse_half_settled(plan: Plan) -> None:
    """Raise UsageError if a map gives some of the layers a width that have to have one."""
    if not plan.layout.holds_fused_alike:
        return
    for parts in fused_parts(plan.matrices):
        fixed = [name for name in parts if name not in plan.unsettled]
        left = [name for name in parts if name in plan.unsettled]
        if fixed and left and not plan.recipe.widths:
            raise UsageError(
                f"--bits-map gives {fixed[0]} a width and leaves {left[0]} to --target-bpw: layout "
                f"{plan.layout.name} holds both in one, as servers fuse them",
                hint="have the map match all of them or none",
            )


def _forms(plan: Plan) -> dict[str, list[Matrix]]:
    """Each unsettled matrix in all its widths, ascending; in the plan's order."""
    recipe = plan.recipe
    return {
        name: [in_width(item.matrix, recipe, bits) for bits in methods.widths(recipe.method)]
        for name, item in plan.matrices.items()
        if name in plan.unsettled
    }


def _bytes(plan: Plan, matrix: Matrix) -> int:
    return sum(spec.nbytes for spec in plan.layout.specs(matrix))


def _stored(plan: Plan) -> int:
    return sum(spec.nbytes for item in plan.matrices.values() for spec in item.specs)


def _elements(plan: Plan) -> int:
    return sum(item.matrix.elements for item in plan.matrices.values())


def _budget(plan: Plan) -> int:
    """Bytes that all quantized matrices may take together."""
    assert plan.recipe.target_bpw is not None
    return math.floor(Fraction(plan.recipe.target_bpw) * _elements(plan) / 8)
