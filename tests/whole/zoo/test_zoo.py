"""A fixed fifth of the zoo; ``make zoo`` goes through all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.whole.zoo.sweep import classes, judged

FIFTH = 2


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize(("mapping", "kind", "name"), list(classes([], FIFTH)))
def test_a_class_is_right_or_refused_before_anything_is_computed(
    mapping: str, kind: str, name: str, tmp_path: Path
) -> None:
    verdict = judged(mapping, kind, name, tmp_path)
    if verdict.kind == "unbuilt":
        pytest.skip(f"not made small: {verdict.detail}")
    assert verdict.kind in ("right", "refused"), verdict
