"""Families beyond docs/models.md's table: each is converted, loaded in both ways, and compared with
a dense model that carries Q + BA. A fifth of them; with ``ALL_FAMILIES`` in the environment, as
``make zoo`` has it, all."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import loftq_cli
from tests.whole.interop.architectures import (
    QUICK,
    dense,
    make,
    model_class,
    outputs,
    the_plain_way,
)
from tests.whole.interop.further_families import FAMILIES, Family, inputs

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
]


def computed(model: Any, family: Family) -> torch.Tensor:
    """What the model returns. Some draw the order of their patches."""
    torch.manual_seed(0)
    with torch.no_grad():
        return outputs(model.eval(), inputs(family))


def assert_carries(model: Any, family: Family, expected: torch.Tensor) -> None:
    """``model`` computes ``expected`` with every adapter in its place and trainable."""
    assert (computed(model, family) - expected).abs().max() < 2e-5 * expected.abs().max()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * family.matrices


TESTED = sorted(FAMILIES)[:: 1 if "ALL_FAMILIES" in os.environ else 5]


@pytest.mark.parametrize("kind", TESTED)
def test_both_ways_of_loading_compute_with_q_and_the_adapter(kind: str, tmp_path: Path) -> None:
    family, output = FAMILIES[kind], tmp_path / "out"
    source = make(kind, family.name, family.settings, tmp_path / "source")
    manifest = loftq_cli.convert(source, output=output, **{**QUICK, "rank": 4})
    assert len(manifest["matrices"]) == family.matrices
    expected = computed(dense(source, output, manifest, tmp_path / "dense"), family)
    original = computed(model_class(source).from_pretrained(source), family)
    assert (original - expected).abs().max() > 1e-3 * expected.abs().max()
    assert_carries(loftq_cli.load(output), family, expected)
    assert_carries(the_plain_way(output), family, expected)


def test_the_lists_in_the_manual_have_these_families() -> None:
    text = (Path(__file__).parents[3] / "docs/models.md").read_text()
    section = text.partition("### Further families")[2].partition("###")[0]
    found = next(part for part in section.split("\n\n") if part.startswith("`"))
    assert re.findall(r"`([^`]+)`", found) == sorted(FAMILIES)
