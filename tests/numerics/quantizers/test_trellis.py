"""The quantizer with the trellis code: what it leaves, at given scales, of odd values."""

from __future__ import annotations

import pytest
import torch

from loftq_cli.kernels import native
from loftq_cli.numerics import feedback, refit
from loftq_cli.numerics.alternation import decompose
from loftq_cli.numerics.decomposition import Procedure
from loftq_cli.numerics.quantizers.blocks import Parameters
from loftq_cli.numerics.quantizers.methods import make_quantizer
from loftq_cli.numerics.quantizers.trellis import TrellisQuantizer
from loftq_cli.numerics.weighting import make_weighting
from tests.support import textbook_trellis
from tests.support.quantizing import fit, gaussian, needs_kernels, squared_error
from tests.support.synthetic import llm_like

SHAPES = [
    (256, 64),
    (300, 100),
    (512, 33),
    (1, 300),
    (300, 1),
    (1, 1),
    (23, 40),
    (24, 40),
    (270, 7),
]
QUANTIZER = TrellisQuantizer(64, native=True)
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)


@needs_kernels
def test_of_a_normal_distribution_less_is_left_than_any_four_levels_leave() -> None:
    weight = gaussian(1024, 256)
    left = squared_error(fit(QUANTIZER, weight).values, weight) / weight.numel()
    # Without scales 0.117 (Max, 1960) for four levels, and 2^-4 for any code of 2 bits.
    assert 0.0625 < left < 0.077


@EVERY_SHAPE
@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_values_are_what_the_codes_mean(shape: tuple[int, int], block_size: int) -> None:
    quantizer = TrellisQuantizer(block_size, native=True)
    weight = llm_like(*shape)
    fitted = quantizer.fit(weight, None)
    quantized = quantizer.assemble(fitted.codes, fitted.parameters)
    assert torch.equal(quantized.decode(), fitted.values)
    units = textbook_trellis.values(fitted.codes).view(-1)
    scales = fitted.parameters.scales.double().repeat_interleave(block_size)[: units.numel()]
    torch.testing.assert_close(fitted.values.double().view(-1), units * scales)


@EVERY_SHAPE
def test_scales_are_the_best_for_the_codes(shape: tuple[int, int]) -> None:
    weight = gaussian(*shape)
    fitted = QUANTIZER.fit(weight, None)
    error = (fitted.values - weight).double().view(-1)
    along = (error * fitted.values.double().view(-1)).split(64)
    size = fitted.values.double().view(-1).square().split(64)
    for gradient, squares in zip(along, size, strict=True):
        assert abs(float(gradient.sum())) <= 1e-4 * float(squares.sum())


@pytest.mark.parametrize("shape", [(512, 64), (600, 36), (530, 100)], ids=str)
def test_pieces_of_whole_sequences_are_quantized_as_the_whole(shape: tuple[int, int]) -> None:
    quantizer, weight = QUANTIZER, llm_like(*shape)
    whole = quantizer.fit(weight, None)
    step = quantizer.row_step(shape[1])
    assert step == 256
    parts = [quantizer.fit(piece, None) for piece in weight.split(step)]
    assert torch.equal(torch.cat([part.codes for part in parts]), whole.codes)
    joined = Parameters.join([part.parameters for part in parts])
    assert torch.equal(joined.scales, whole.parameters.scales)
    held = quantizer.assemble(whole.codes, whole.parameters)
    blocks = slice(quantizer.blocks_before(256, shape[1]), len(joined.scales))
    assert torch.equal(held.part(slice(256, None), blocks).decode(), whole.values[256:])


def test_at_given_scales_a_matrix_and_its_columns_have_the_same_codes() -> None:
    quantizer, weight = TrellisQuantizer(32, native=True), gaussian(300, 40)
    scales = gaussian(300 * 40 // 32, seed=3).abs() + 0.5
    encoded = quantizer.encode(weight, Parameters(scales, None))
    assert torch.equal(encoded.parameters.scales, scales)
    index = quantizer.block_index(slice(0, 300), torch.arange(40), 40)
    for column in range(40):
        codes, values = quantizer.encode_at(weight[:, column], scales[index[column]], None)
        assert torch.equal(codes, encoded.codes[:, column])
        assert torch.equal(values, encoded.values[:, column])


@needs_kernels
def test_the_next_step_begins_at_the_scales_of_the_last() -> None:
    weight, left = llm_like(512, 128), []
    fitted = QUANTIZER.fit(weight, None)
    for _ in range(3):
        left.append(squared_error(fitted.values, weight))
        fitted = QUANTIZER.fit(weight, fitted.parameters)
    assert left[2] < left[1] < left[0]
    without = QUANTIZER.fit(weight, Parameters(torch.zeros_like(fitted.parameters.scales), None))
    assert squared_error(without.values, weight) < 1.1 * left[0]  # begins anew where there is none


@needs_kernels
@pytest.mark.parametrize("factor", [10.0, 50.0])
def test_a_column_of_outliers_is_not_cut_off(factor: float) -> None:
    weight = gaussian(512, 128)
    weight[:, 7] *= factor
    left = squared_error(QUANTIZER.fit(weight, None).values, weight)
    assert left < 0.25 * squared_error(0 * weight, weight)


def test_a_small_row_among_large_ones_is_never_worse_than_zero() -> None:
    weight = gaussian(256, 64)
    weight[::2] *= 1e-4
    values = QUANTIZER.fit(weight, None).values
    error = (values - weight).double().square().sum(dim=1)
    assert bool((error <= weight.double().square().sum(dim=1) * (1 + 1e-5)).all())


@needs_kernels
def test_chunks_of_rows_are_whole_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = llm_like(600, 64), gaussian(512, 64, seed=5)
    weighting = make_weighting(inputs.T @ inputs / 512, torch.float32)
    procedure = Procedure(rank=4, iters=1, feedback=True, feedback_passes=3)
    whole = decompose(weight, QUANTIZER, procedure, weighting)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for module in (feedback, refit):
            monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 64 * 70)  # 70 rows
        parts = decompose(weight, QUANTIZER, procedure, weighting)
    finally:
        torch.set_num_threads(before)
    same = whole.quantized.codes == parts.quantized.codes
    assert float(same.float().mean()) > 0.99  # sums in another order
    torch.testing.assert_close(parts.quantized.scales, whole.quantized.scales, rtol=0.05, atol=0.01)
    assert parts.weighted is not None
    assert whole.weighted is not None
    assert parts.weighted.final == pytest.approx(whole.weighted.final, rel=1e-3)


HOSTILE = {
    "zero": torch.zeros(64, 64),
    "zero blocks": torch.cat([torch.zeros(32, 64), gaussian(32, 64)]),
    "constant": torch.full((64, 64), -0.3),
    "outlier": gaussian(64, 64).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(1e4)),
    "subnormal": gaussian(64, 64) * 1e-40,
    "large": gaussian(64, 64).clamp(-3, 3) * 1e37,
    "mixed": gaussian(64, 64) * 10.0 ** torch.arange(-40, 24, 1.0),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kernels", [True, False])
def test_odd_values_stay_finite_and_no_further_than_zero_is(
    name: str, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr(native, "available", lambda: False)
    weight = HOSTILE[name]
    fitted = QUANTIZER.fit(weight, None)
    assert bool(fitted.values.isfinite().all())
    assert bool(fitted.parameters.scales.isfinite().all())
    error = (fitted.values.double() - weight.double()).square().sum()
    assert float(error) <= float(weight.double().square().sum()) * (1 + 1e-6)


@needs_kernels
def test_feedback_and_refit_scales_each_leave_less_and_less_than_fitted_levels() -> None:
    weight = llm_like(512, 256)
    inputs = gaussian(4096, 256, seed=5) @ (gaussian(256, 256, seed=6) / 16 + torch.eye(256))
    weighting = make_weighting(inputs.T @ inputs / len(inputs), torch.float32)
    left = []
    for method, passes in (("fitted", 3), ("trellis", 0), ("trellis", 1), ("trellis", 3)):
        quantizer = make_quantizer(method, 2, 64, "mse", native=True)
        procedure = Procedure(rank=8, iters=2, feedback=passes > 0, feedback_passes=max(passes, 1))
        found = decompose(weight, quantizer, procedure, weighting).weighted
        assert found is not None
        left.append(found.final)
    fitted, alone, once, thrice = left
    assert thrice < once < alone
    assert thrice < 0.9 * fitted
