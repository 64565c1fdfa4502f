"""Scales in float32, bfloat16 and int8: golden values, idempotence, and codes chosen after."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loftq_cli.layouts.base import Matrix, Surroundings
from loftq_cli.layouts.loftq import PackedLayout
from loftq_cli.numerics.alternation import decompose, make_sweep
from loftq_cli.numerics.decomposition import Procedure
from loftq_cli.numerics.quantizers.blocks import Quantized
from loftq_cli.numerics.quantizers.scale_storage import pack_scales, round_scales, unpack_scales
from tests.support.quantizing import PROPERTY, SEARCHES, quantizer_of, recomputed
from tests.support.synthetic import llm_like

every_storage = pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
every_search = pytest.mark.parametrize("scale", SEARCHES)


def test_int8_by_hand():
    # 127 / 127 = 1 is a bfloat16; the second group's step is 0.5, its last two scales are ties.
    scales = torch.tensor([127.0, -1.0, 0.2, 0.0] + [2.0] * 60 + [-63.5, 0.5, 0.75, 1.25])
    codes, steps = pack_scales(scales, "int8")
    assert steps is not None
    assert (codes.dtype, steps.dtype) == (torch.int8, torch.bfloat16)
    assert steps.tolist() == [1.0, 0.5]
    # 0.2 would round to 0, but a scale that is not zero stays so; ties go to even.
    assert codes.tolist() == [127, -1, 1, 0] + [2] * 60 + [-127, 1, 2, 2]
    expected = [127.0, -1.0, 1.0, 0.0] + [2.0] * 60 + [-63.5, 0.5, 1.0, 1.0]
    assert unpack_scales(codes, steps).tolist() == expected


def test_bfloat16_by_hand():
    scales = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -(2.0**-130)])
    stored, steps = pack_scales(scales, "bfloat16")
    assert steps is None
    assert stored.dtype == torch.bfloat16
    assert unpack_scales(stored, None).tolist() == [1.0, 1.0, 1 + 2**-6, -(2.0**-130)]


@every_storage
@PROPERTY
@given(
    values=st.lists(st.floats(-float(2**100), float(2**100), width=32), min_size=1, max_size=150),
)
def test_rounding_twice_changes_nothing(dtype, values):
    once = round_scales(torch.tensor(values), dtype)
    assert torch.equal(round_scales(once, dtype), once)


@PROPERTY
@given(values=st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=150))
def test_int8_is_within_half_a_step(values):
    scales = torch.tensor(values)
    rounded = round_scales(scales, "int8").double()
    for start in range(0, len(values), 64):
        group, near = scales[start : start + 64].double(), rounded[start : start + 64]
        step = float(group.abs().max()) / 127
        # Half a step, half a unit of bfloat16 for the largest, a whole step where 0 is avoided.
        error = (group - near).abs()
        assert bool((error <= step * torch.where(group.abs() < step / 2, 1.01, 0.76)).all())
        if step > 1e-30:
            assert bool(((near != 0) == (group != 0)).all())


@every_storage
@every_search
@pytest.mark.parametrize("method", ["nf", "fitted", "uniform"])
def test_codes_are_chosen_for_the_scales_as_stored(dtype, scale, method):
    weight = llm_like(96, 200)
    settings = Procedure(rank=8, iters=3, scale_dtype=dtype)
    d = decompose(weight, quantizer_of(method, 3, 32, scale), settings)
    scales = d.quantized.scales
    assert torch.equal(round_scales(scales, dtype), scales)
    assert d.final == pytest.approx(recomputed(d, weight), rel=1e-5)
    # No other code is closer to what the last step quantized: compare with every level at T = 0.
    swept = make_sweep(weight, quantizer_of(method, 3, 32, scale), settings).quantize(None, None)
    quantized = swept.quantized
    every = torch.stack(
        [
            Quantized(
                3, 32, torch.full_like(quantized.codes, code), *_parameters(quantized)
            ).decode()
            for code in range(8)
        ]
    )
    best = (every - weight).abs().amin(dim=0)
    ours = (quantized.decode() - weight).abs()
    assert bool((ours <= best * (1 + 1e-4) + 1e-7 * float(weight.abs().max())).all())


def _parameters(
    quantized: Quantized,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    return quantized.scales, quantized.zeros, quantized.levels


@every_search
@pytest.mark.parametrize("method", ["nf", "fitted", "uniform"])
@pytest.mark.parametrize(("dtype", "loss"), [("bfloat16", 0.001), ("int8", 0.001)])
def test_at_two_bits_little_is_lost(dtype, loss, scale, method):
    weight = llm_like(256, 512)
    quantizer = quantizer_of(method, 2, 64, scale)
    plain, ours = (
        make_sweep(weight, quantizer, Procedure(rank=1, iters=0, scale_dtype=kind))
        .quantize(None, None)
        .squared
        for kind in ("float32", dtype)
    )
    assert ours**0.5 <= (1 + loss) * plain**0.5


@pytest.mark.parametrize(
    ("dtype", "tags", "bits"),
    [("float32", ["F32"], 2.5), ("bfloat16", ["BF16"], 2.25), ("int8", ["I8", "BF16"], 2.1289)],
)
def test_the_layout_stores_and_decodes_them(dtype, tags, bits):
    matrix = Matrix("m.weight", (64, 512), "F32", "nf", 2, 64)
    layout = PackedLayout(dtype)
    weight = llm_like(64, 512)
    settings = Procedure(rank=1, iters=0, scale_dtype=dtype)
    quantized = decompose(weight, quantizer_of("nf", 2, 64, "mse"), settings).quantized
    specs = {spec.name: spec for spec in layout.specs(matrix)}
    tensors = layout.encode(matrix, quantized)
    assert set(tensors) == set(specs)
    assert [spec.dtype for name, spec in specs.items() if "_scale" in name] == tags
    assert torch.equal(layout.decode(matrix, tensors), quantized.decode())
    stored = sum(spec.nbytes for name, spec in specs.items() if "levels" not in name)
    assert stored * 8 / weight.numel() == pytest.approx(bits, abs=1e-4)
    entry = layout.quantization_config([matrix], Surroundings({}, (), ()))["modules"]["m"]
    assert entry.get("scales", "float32") == dtype
