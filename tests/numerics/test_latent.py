"""The trainable form of a quantized matrix, against autograd on a textbook version in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loftq_cli.numerics.latent import Fixed, Latent, Pair, Scaled
from loftq_cli.numerics.quantizers.blocks import Quantized
from loftq_cli.numerics.quantizers.portable import is_portable
from loftq_cli.numerics.quantizers.scale_storage import Stored, round_scales
from tests.support import textbook_trellis
from tests.support.quantizing import fit, gaussian, prepared, quantizer_of

# (method, bits, block size, portable scales); 40 columns end with a short group of 16.
FORMS = [
    ("uniform", 2, 16, True),
    ("uniform", 3, 24, False),
    ("uniform-symmetric", 2, 16, True),
    ("uniform-symmetric", 4, 24, False),
    ("nf", 4, 16, False),
    ("nf", 2, 64, False),
    ("fitted", 2, 24, False),
    ("uniform-tensor", 3, 16, False),
]
NOTHING = Pair(torch.zeros(1, 4), torch.zeros(1, 1), 1.0)
every_form = pytest.mark.parametrize(("method", "bits", "size", "portable"), FORMS)


def made(method: str, bits: int, size: int, portable: bool) -> tuple[torch.Tensor, Quantized, Pair]:
    """A matrix, its quantization and a pair."""
    weight = gaussian(12, 40)
    scale = "fixed" if method in ("fitted", "trellis", "uniform-tensor") else "mse"
    quantizer = prepared(quantizer_of(method, bits, size, scale, portable), weight)
    fitted = fit(quantizer, weight)
    quantized = quantizer.assemble(fitted.codes, fitted.parameters)
    return weight, quantized, Pair(gaussian(4, 40, seed=1), gaussian(12, 4, seed=2) / 10, 0.5)


def textbook(
    latent: Latent, held: Quantized, pair: Pair
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(leaves, W) in float64: scale * (code - zero), or scale * level, code by code, the rounding
    passed by (value + (stored - value).detach())."""
    leaves = {name: value.double().requires_grad_() for name, value in latent.parameters.items()}
    rows, columns = held.shape
    if held.levels is None:
        block = torch.arange(columns) // held.block_size
        groups = int(block[-1]) + 1
        index = block + torch.arange(rows)[:, None] * groups
        assert held.zeros is not None
        step = torch.tensor(1.0, dtype=torch.float64)
        stored = latent.codes().double()
        offset = held.zeros.double()[index]
    else:
        place = torch.arange(rows * columns).view(rows, columns)
        index = place // held.block_size if held.block_size else torch.zeros_like(place)
        levels = held.levels.double()
        step = (levels.max() - levels.min()) / (len(levels) - 1)
        stored = levels[latent.codes().long()] / step
        offset = torch.zeros(rows, columns, dtype=torch.float64)
    scales = held.scales.double() * leaves["scales"].exp()
    # Portable scales are rounded, too, and passed by in proportion.
    scales = scales * (latent.scales().double() / scales).detach()
    codes = leaves["codes"] + (stored - leaves["codes"]).detach()
    value = (codes - offset) * step * scales[index]
    return leaves, value + pair.scaling * leaves["B"] @ leaves["A"]


@every_form
def test_it_begins_as_what_it_is_made_of(method, bits, size, portable):
    weight, held, pair = made(method, bits, size, portable)
    expected = held.decode() + pair.scaling * pair.lora_B @ pair.lora_A
    for original in (None, weight, -3 * weight):
        latent = Latent(held, pair, original)
        latent.settle()
        assert torch.equal(latent.codes(), held.codes)
        assert torch.equal(latent.scales(), held.scales)
        assert torch.equal(latent.quantized().decode(), held.decode())
        torch.testing.assert_close(latent.weight(), expected, rtol=1e-6, atol=1e-6)


@every_form
def test_gradients_are_autograd_s(method, bits, size, portable):
    weight, held, pair = made(method, bits, size, portable)
    latent = Latent(held, pair, weight)
    generator = torch.Generator().manual_seed(3)
    for name, value in latent.parameters.items():  # somewhere else than at the start
        spread = {"codes": 0.7, "scales": 0.2}.get(name, 0.05)
        value += spread * torch.randn(value.shape, generator=generator)
    latent.settle()
    grad = gaussian(12, 40, seed=4)
    leaves, value = textbook(latent, held, pair)
    torch.testing.assert_close(latent.weight().double(), value.detach(), rtol=1e-5, atol=1e-5)
    (value * grad.double()).sum().backward()
    for name, found in latent.pull(grad).items():
        expected = leaves[name].grad
        assert expected is not None
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5, msg=name)


@every_form
def test_a_code_is_the_nearest_to_its_latent_value(method, bits, size, portable):
    _, held, pair = made(method, bits, size, portable)
    latent = Latent(held, pair)
    latent.parameters["codes"] += 3 * torch.rand(
        held.shape, generator=torch.Generator().manual_seed(5)
    )
    latent.settle()
    values = torch.arange(2**bits).float() if held.levels is None else held.levels
    if held.levels is not None:
        values = values * (2**bits - 1) / (values.max() - values.min())
    distances = (latent.parameters["codes"][..., None] - values).abs()
    assert torch.equal(latent.codes().long(), distances.argmin(dim=-1))
    assert not torch.equal(latent.codes(), held.codes)


@pytest.mark.parametrize("method", ["uniform", "uniform-symmetric"])
def test_portable_scales_stay_portable(method):
    _, held, pair = made(method, 2, 16, True)
    assert is_portable(held.scales)
    latent = Latent(held, pair)
    latent.parameters["scales"] += 0.1 * gaussian(len(held.scales))
    latent.settle()
    assert is_portable(latent.scales())
    assert not torch.equal(latent.scales(), held.scales)
    assert torch.equal(latent.scales().sign(), held.scales.sign())


def test_a_scale_that_would_leave_the_range_of_portable_ones_stays() -> None:
    smallest, largest = 2.0**-24, 65_024.0
    held = Quantized(
        2,
        2,
        torch.zeros(1, 4, dtype=torch.uint8),
        torch.tensor([smallest, largest]),
        torch.ones(2, dtype=torch.uint8),
    )
    latent = Latent(held, NOTHING)
    latent.parameters["scales"] = torch.tensor([-0.69, 0.69])
    assert latent.scales().tolist() == [smallest, largest]


def test_original_values_say_where_in_its_bin_a_code_begins() -> None:
    codes = torch.tensor([[0, 1, 2, 3, 1]], dtype=torch.uint8)
    held = Quantized(2, 8, codes, torch.tensor([0.5]), torch.tensor([2], dtype=torch.uint8))
    original = torch.tensor([[-1.1, -0.5, 0.1, 9.0, 9.0]])  # in codes: -0.2, 1, 2.2, 20, 20
    latent = Latent(held, Pair(torch.zeros(1, 5), torch.zeros(1, 1), 1.0), original)
    expected = torch.tensor([[-0.2, 1.0, 2.2, 3.45, 1.45]])
    torch.testing.assert_close(latent.parameters["codes"], expected)


def test_of_a_matrix_without_codes_only_the_pair_is_trained() -> None:
    weight, _, pair = made("uniform", 2, 16, True)
    fixed = Fixed(weight, pair)
    grad = gaussian(12, 40, seed=4)
    sides = {"A": pair.lora_A, "B": pair.lora_B}
    leaves = {name: side.double().requires_grad_() for name, side in sides.items()}
    value = weight.double() + pair.scaling * leaves["B"] @ leaves["A"]
    torch.testing.assert_close(fixed.weight().double(), value.detach(), rtol=1e-5, atol=1e-5)
    (value * grad.double()).sum().backward()
    found = fixed.pull(grad)
    assert found.keys() == fixed.parameters.keys() == leaves.keys()
    for name, leaf in leaves.items():
        torch.testing.assert_close(found[name].double(), leaf.grad, rtol=1e-4, atol=1e-5)
    fixed.settle()
    assert torch.equal(fixed.pair.lora_A, pair.lora_A)
    assert torch.equal(weight, made("uniform", 2, 16, True)[0])


def test_of_the_trellis_code_pair_and_scales_are_trained() -> None:
    _, held, pair = made("trellis", 2, 24, False)
    scaled = Scaled(held, pair)
    expected = held.decode() + pair.scaling * pair.lora_B @ pair.lora_A
    torch.testing.assert_close(scaled.weight(), expected)
    generator = torch.Generator().manual_seed(3)
    for value in scaled.parameters.values():
        value += 0.1 * torch.randn(value.shape, generator=generator)
    scaled.settle()
    leaves = {name: each.double().requires_grad_() for name, each in scaled.parameters.items()}
    scales = held.scales.double() * leaves["scales"].exp()
    each = scales.repeat_interleave(24)[: held.codes.numel()].view(held.shape)
    value = textbook_trellis.values(held.codes) * each
    value = value + pair.scaling * leaves["B"] @ leaves["A"]
    torch.testing.assert_close(scaled.weight().double(), value.detach(), rtol=1e-5, atol=1e-5)
    grad = gaussian(12, 40, seed=4)
    (value * grad.double()).sum().backward()
    found = scaled.pull(grad)
    assert found.keys() == leaves.keys()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        torch.testing.assert_close(found[name].double(), leaf.grad, rtol=1e-4, atol=1e-5)
    assert torch.equal(scaled.quantized().codes, held.codes)
    assert torch.equal(scaled.quantized().scales, scaled.scales())


@pytest.mark.parametrize("stored", ["int8", "bfloat16", "half"])
def test_scales_are_trained_as_they_are_stored(stored: Stored) -> None:
    weight, held, pair = made("nf", 4, 20, False)
    held = replace(held, scales=round_scales(held.scales * 1e-3, stored))
    latent = Latent(held, pair, weight * 1e-3, stored)
    torch.testing.assert_close(latent.scales(), held.scales, rtol=0, atol=0)
    latent.parameters["scales"] += 0.3 * gaussian(len(held.scales), 1, seed=7).view(-1)
    found = latent.quantized()
    assert not torch.equal(found.scales, held.scales)
    assert torch.equal(round_scales(found.scales, stored), found.scales)
    product = pair.scaling * pair.lora_B @ pair.lora_A
    torch.testing.assert_close(latent.weight(), found.decode() + product)
