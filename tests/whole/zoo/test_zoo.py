"""A fixed fifth of the zoo; ``make zoo`` goes through all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.whole.zoo.results import read
from tests.whole.zoo.sweep import classes, judged

FIFTH = 2


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize(("mapping", "kind", "name"), list(classes([], FIFTH)))
def test_a_class_is_right_or_refused_before_anything_is_computed(
    mapping: str, kind: str, name: str, tmp_path: Path
) -> None:
    verdict, swept = judged(mapping, kind, name, tmp_path), read().verdict(mapping, kind)
    assert swept is not None
    assert verdict.kind == swept.kind, f"{verdict}; docs/results/zoo.json: {swept}"
    if verdict.kind == "unbuilt":
        pytest.skip(f"not made small: {verdict.detail}")
    assert verdict.kind in ("right", "refused"), verdict


def test_the_last_full_sweep_knew_every_class() -> None:
    swept = [(each.mapping, each.model_type, each.architecture) for each in read().found]
    assert swept == list(classes([], None)), "run: make zoo"
