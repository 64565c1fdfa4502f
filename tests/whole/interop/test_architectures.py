"""Every family of docs/models.md: a small random model is converted, loaded with transformers and
PEFT, compared with a dense model that carries Q + BA, and trained for a step."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import loftq_cli
from loftq_cli.checkpoint.request import Request
from loftq_cli.conversion.prepare import prepare
from loftq_cli.machine.observer import Observer
from loftq_cli.settings.options import Options
from tests.whole.interop.architectures import FAMILIES, check, the_plain_way

every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_it_is_converted_loaded_compared_and_trained(
    family: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    manifest = check(saved(family), tmp_path, loftq_cli.load)
    assert len(manifest["matrices"]) == FAMILIES[family][3]


@pytest.mark.parametrize("layout", ["loftq", "dense"])
@every_family
def test_the_plain_way(
    family: str, layout: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    check(saved(family), tmp_path, the_plain_way, layout=layout)


def test_the_table_in_the_manual_has_these_families_and_their_layouts(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    text = (Path(__file__).parents[3] / "docs/models.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| `.* \| (\w+(?:, \w+)?) \|$", text, re.MULTILINE)
    found = []
    for family in FAMILIES:
        layouts = []
        for bits in (4, 2):
            options = Options(bits=bits, rank=8, threads=1)
            plan, _ = prepare(
                Request(str(saved(family))), tmp_path / "out", options, observer=Observer()
            )
            layouts.append(plan.layout.name)
        found.append((family, ", ".join(dict.fromkeys(layouts))))
    assert rows == found
