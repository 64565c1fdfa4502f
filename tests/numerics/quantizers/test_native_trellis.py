"""Panels of columns in the kernel: without feedback to the bit what a column at a time has, with it
the best codes for what each column is to be after the errors behind it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from loftq_cli.kernels import native
from loftq_cli.numerics import feedback
from loftq_cli.numerics.quantizers import native_trellis, viterbi
from loftq_cli.numerics.quantizers.methods import method
from loftq_cli.numerics.quantizers.native_trellis import quantize_panel
from loftq_cli.numerics.quantizers.trellis import TrellisQuantizer
from loftq_cli.numerics.quantizers.trellis_code import BITS, SEQUENCE, SHORTEST, WINDOW
from tests.support import textbook_trellis
from tests.support.quantizing import gaussian, needs_kernels

pytestmark = needs_kernels
QUANTIZER = TrellisQuantizer(64, native=True)
EVERY_HEIGHT = pytest.mark.parametrize("rows", [10, 24, 256, 270, 530])


def drawn(rows: int, columns: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """(targets, scales) of a panel."""
    scales = gaussian(columns, rows, seed=1).exp() / 10
    return gaussian(columns, rows) * scales, scales


@EVERY_HEIGHT
@pytest.mark.parametrize("power", [-35, 0, 20])
def test_without_errors_codes_are_those_of_each_column(rows: int, power: int) -> None:
    targets, scales = (each * 10.0**power for each in drawn(rows))
    codes, values = quantize_panel(
        targets, torch.zeros_like(targets), torch.eye(12), scales, None, None
    )
    for column in range(12):
        expected = QUANTIZER.encode_at(targets[column], scales[column], None)
        assert torch.equal(codes[column], expected[0])
        assert torch.equal(values[column], expected[1])


@EVERY_HEIGHT
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_column_makes_up_for_those_behind_it(rows: int, dtype: torch.dtype | None) -> None:
    targets, scales = drawn(rows)
    added = gaussian(12, rows, seed=2) / 20
    factor = torch.eye(12) + gaussian(12, 12, seed=3).triu(1) / 4
    codes, values = quantize_panel(targets, added, factor, scales, None, dtype)
    # Each column again by itself, after the errors in float64.
    errors = targets.double() - values.double()
    wanted = targets.double() + added.double() + (factor.double() - torch.eye(12)) @ errors
    units = textbook_trellis.values(codes.T).T
    exact = (units.float() * scales).to(dtype or torch.float32).float()
    assert torch.equal(values, exact)
    for column in range(12):
        alone = QUANTIZER.encode_at(wanted[column].float(), scales[column], None)[1]
        cost, least = (
            float((wanted[column] - each.double()).square().sum())
            for each in (units[column] * scales[column].double(), alone)
        )
        assert cost == pytest.approx(least, rel=1e-4)


def test_the_kernel_has_room_for_the_columns_of_a_panel() -> None:
    """What C, Triton and the methods' table have of the code's numbers is what the code has."""
    source = (Path(native.__file__).parent / "trellis.c").read_text("utf-8")
    decoder = (Path(native.__file__).parent / "dequantize.c").read_text("utf-8")
    fused = (Path(native.__file__).parent / "triton_dequantize.py").read_text("utf-8")

    def defined(text: str, name: str) -> int:
        (found,) = re.findall(rf"^#define {name} (\d+)", text, re.MULTILINE)
        return int(found)

    assert defined(source, "PANEL") == native_trellis._PANEL >= feedback._PANEL
    assert defined(source, "SEQUENCE") == defined(decoder, "SEQUENCE") == SEQUENCE
    assert defined(source, "SHORTEST") == defined(decoder, "SHORTEST") == SHORTEST
    assert defined(source, "WINDOW") == WINDOW
    assert defined(source, "SEAM") == viterbi._SEAM
    codes = WINDOW // BITS
    assert f"_SEQUENCE, _SHORTEST, _CODES = {SEQUENCE}, {SHORTEST}, {codes} " in fused
    assert method("trellis").rows_together == SEQUENCE
    with pytest.raises(AssertionError, match="more columns"):
        quantize_panel(*drawn(24, 65), torch.eye(65), torch.ones(65, 24), None, None)


@EVERY_HEIGHT
def test_threads_change_nothing(rows: int) -> None:
    targets, scales = drawn(rows)
    factor = torch.eye(12) + gaussian(12, 12, seed=3).triu(1) / 4
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(quantize_panel(targets, 0 * scales, factor, scales, None, None))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*each) for each in zip(*found, strict=True))


def test_what_overflowed_is_no_crash() -> None:
    targets, scales = drawn(300)
    targets[3, 5], targets[4, 7] = torch.inf, torch.nan
    codes, _ = quantize_panel(targets, 0 * scales, torch.eye(12), scales, None, None)
    assert int(codes.max()) < 4
