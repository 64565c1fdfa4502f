"""What a conversion is of: its recipe and its source, by hashes."""

from __future__ import annotations

from loftq_cli.checkpoint.journal import Subject
from loftq_cli.planning.plan import Plan


def subject(plan: Plan) -> Subject:
    """What the work on ``plan`` is of."""
    return Subject(plan.fingerprint, plan.recipe.as_dict(), plan.sources)
