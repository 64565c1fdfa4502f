"""Families that consumers treat specially get what they can load."""

from __future__ import annotations

from typing import Any

import pytest

import loftq_cli
from loftq_cli.errors import LayoutError

QUICK: dict[str, Any] = {"rank": 4, "iters": 1, "threads": 1}


@pytest.mark.parametrize("bits", [2, 4])
def test_layout_auto_avoids_what_replaces_only_nn_linear(source, tmp_path, bits) -> None:
    manifest = loftq_cli.convert(source("falcon"), output=tmp_path / "out", bits=bits, **QUICK)
    assert manifest["recipe"]["layout"] == "loftq"


@pytest.mark.parametrize(("layout", "method"), [("bnb", "nf"), ("gptq", "uniform")])
def test_such_a_layout_asked_for_is_refused(source, tmp_path, layout, method) -> None:
    with pytest.raises(LayoutError, match="falcon"):
        loftq_cli.convert(
            source("falcon"), output=tmp_path / "out", bits=4, layout=layout, method=method
        )


def test_the_layer_that_t5_casts_its_input_for_stays_in_floating_point(source, tmp_path) -> None:
    manifest = loftq_cli.convert(source("t5"), output=tmp_path / "out", **QUICK)
    kept = {entry["name"] for entry in manifest["passed_through"]}
    quantized = {entry["name"] for entry in manifest["matrices"]}
    assert not any(name.endswith(".wo.weight") for name in quantized)
    assert sum(name.endswith(".wo.weight") for name in kept) == 4
    assert sum(name.endswith(".wi.weight") for name in quantized) == 4
