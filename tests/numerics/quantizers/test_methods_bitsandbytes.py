"""NF4 with absmax scales is bitsandbytes' own quantizer, to the last bit."""

from __future__ import annotations

import bitsandbytes.functional
import pytest
import torch

from loftq_cli.numerics.quantizers.methods import make_quantizer
from tests.support.quantizing import fit, gaussian
from tests.support.synthetic import llm_like


def theirs(weight: torch.Tensor, block_size: int):
    """bitsandbytes' codes, in our order and shape, and its absmax and state."""
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=block_size, quant_type="nf4"
    )
    packed = packed.view(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[: weight.numel()]
    return codes.view(weight.shape), state.absmax, packed, state


def near_ties(block_size: int) -> torch.Tensor:
    """Blocks of odd scales whose elements sit on NF4's decision boundaries, give or take an ulp."""
    levels = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
    midpoints = (levels[:-1] + levels[1:]) / 2
    scales = gaussian(512, 1).abs() + 0.01
    blocks = midpoints.repeat(512, block_size // 15 + 1)[:, :block_size] * scales
    away = torch.sign(gaussian(512, block_size, seed=1)) * torch.inf
    nudged = torch.nextafter(blocks, away)
    blocks = torch.where(gaussian(512, block_size, seed=2) > 0, blocks, nudged)
    blocks[:, :1] = scales
    return blocks


WEIGHTS = {
    "gaussian": gaussian(512, 1024) * 0.02,
    "llm-like": llm_like(1024, 512),
    "heavy-tailed": gaussian(256, 256) ** 5,
    "single-row": gaussian(1, 4096),
    "single-column": gaussian(4096, 1),
    "rows-of-half-a-block": gaussian(256, 32),
    "rows-across-blocks": gaussian(64, 100),
    "constant": torch.full((64, 64), 0.1),
    "zero": torch.zeros(64, 64),
    "large": gaussian(64, 256) * 1e36,
    "small": gaussian(64, 256) * 1e-36,
    "bfloat16": (gaussian(256, 256) * 0.02).bfloat16().float(),
    "float16": (gaussian(256, 256) * 0.02).half().float(),
}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_codes_and_absmax_are_equal(weight):
    fitted = fit(make_quantizer("nf", 4, 64, "absmax"), weight)
    codes, absmax, _, _ = theirs(weight, 64)
    assert torch.equal(fitted.parameters.scales, absmax)
    assert torch.equal(fitted.codes, codes)


@pytest.mark.parametrize("block_size", [32, 64, 128, 256])
def test_codes_are_equal_even_at_ties(block_size):
    weight = near_ties(block_size)
    fitted = fit(make_quantizer("nf", 4, block_size, "absmax"), weight)
    codes, absmax, _, _ = theirs(weight, block_size)
    assert torch.equal(fitted.parameters.scales, absmax)
    assert torch.equal(fitted.codes, codes)


def test_bitsandbytes_decodes_to_our_values():
    weight = llm_like(256, 512)
    fitted = fit(make_quantizer("nf", 4, 64, "absmax"), weight)
    _, _, packed, state = theirs(weight, 64)
    decoded = bitsandbytes.functional.dequantize_4bit(packed.view(-1, 1), state)
    assert torch.equal(decoded, fitted.values)


def test_subnormal_blocks_keep_their_values_where_bitsandbytes_flushes_them():
    weight = gaussian(8, 64) * 1e-40
    ours = fit(make_quantizer("nf", 4, 64, "absmax"), weight)
    codes, absmax, _, _ = theirs(weight, 64)
    assert torch.equal(ours.parameters.scales, absmax)
    assert bool(((codes == 7) | (codes == 8)).all())
    error = (ours.values.double() - weight.double()).norm() / weight.double().norm()
    assert error < 0.12
