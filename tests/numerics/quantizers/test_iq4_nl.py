"""Method iq4-nl: llama.cpp's levels, at scales that float16 holds, nearest and near the best."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import loftq_cli
from loftq_cli.kernels import native as kernels
from loftq_cli.numerics.quantizers.codebooks import iq4_nl, iq4_nl_table, nearest
from loftq_cli.numerics.quantizers.portable import is_portable
from loftq_cli.numerics.quantizers.scale_storage import round_scales
from tests.support.synthetic import llm_like

LEVELS = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])


def decomposed(weight: torch.Tensor, **settings: Any) -> Any:
    given: dict[str, Any] = {"bits": 4, "method": "iq4-nl", "rank": 4, "iters": 2}
    return loftq_cli.decompose(weight, **{**given, **settings})


def test_the_levels_are_128ths_of_ggml_s() -> None:
    """llama.cpp, ggml/src/ggml-common.h."""
    assert torch.equal(iq4_nl() * 128, LEVELS.float())
    x = torch.linspace(-1.2, 1.2, 4001)
    expected = (x[:, None] - iq4_nl()).abs().argmin(dim=1)
    assert torch.equal(nearest(x, iq4_nl_table()).long(), expected)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("shape", [(64, 128), (48, 96)])
def test_scales_fit_float16_and_codes_are_chosen_at_them(native, shape, monkeypatch) -> None:
    """With no adapter, every value is the level next to its weight at the scale that is stored."""
    if not native:
        monkeypatch.setattr(kernels, "available", lambda: False)
    weight = llm_like(*shape)
    held = decomposed(weight, iters=0).quantized
    d = held.scales / 128
    assert is_portable(d)
    assert torch.equal(d, d.half().float())
    values = d[:, None, None] * LEVELS
    blocks = weight.reshape(-1, 64)
    expected = (values - blocks[..., None]).abs().amin(dim=-1)
    found = (held.decode().reshape(-1, 64) - blocks).abs()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_the_error_is_near_that_of_every_scale_tried() -> None:
    """A grid of 4,000 scales of either sign a block, in float64, is hardly better."""
    weight = llm_like(16, 64)
    found = decomposed(weight, iters=0)
    blocks = weight.double().reshape(-1, 64)
    most = blocks.abs().amax(dim=1)
    best = torch.full((len(blocks),), torch.inf, dtype=torch.float64)
    middles = (LEVELS[1:] + LEVELS[:-1]).double() / 2
    for multiple in torch.linspace(0.6, 1.3, 2000):
        for sign in (1, -1):
            scales = (sign * multiple * most / 127)[:, None]
            values = scales * LEVELS.double()[torch.bucketize(blocks / scales, middles)]
            best = torch.minimum(best, (values - blocks).square().sum(dim=1))
    error = (found.backbone().double() - weight.double()).square().sum()
    assert float(error) < 1.01 * float(best.sum())


def test_it_is_better_than_evenly_spaced_levels_on_normal_weights() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    errors = [
        decomposed(weight, method=method, iters=0, block_size=32).final
        for method in ("uniform-symmetric", "iq4-nl")
    ]
    assert all(second < 0.97 * first for first, second in pairwise(errors))


def test_rounding_leaves_what_float16_has_no_room_for() -> None:
    scales = torch.tensor([0.0, 1e-12, 1e9, 0.1, -0.1])
    rounded = round_scales(scales, "half")
    assert rounded[:3].tolist() == scales[:3].tolist()
    assert torch.equal(rounded[3], -rounded[4])
    assert abs(float(rounded[3]) - 0.1) < 0.1 * 2**-7
    assert torch.equal(round_scales(rounded, "half"), rounded)


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16", "int8"])
def test_every_storage_of_layout_loftq_holds_them(scale_dtype) -> None:
    """int8 has steps of its own, and then llama.cpp has no exact home for them."""
    scales = decomposed(llm_like(64, 128), scale_dtype=scale_dtype).quantized.scales
    assert torch.equal(round_scales(scales, scale_dtype), scales)
    assert is_portable(scales / 128) is (scale_dtype != "int8")
