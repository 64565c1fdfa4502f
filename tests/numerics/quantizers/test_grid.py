"""Searched (mse) scales, by tensor operations and by the compiled kernels."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loftq_cli.kernels import native
from loftq_cli.numerics.alternation import decompose
from loftq_cli.numerics.decomposition import Procedure
from loftq_cli.numerics.quantizers import codebook as codebook_quantizer
from loftq_cli.numerics.quantizers import uniform as uniform_quantizer
from loftq_cli.numerics.quantizers.grid import grid
from loftq_cli.numerics.quantizers.methods import make_quantizer
from tests.support.quantizing import (
    PROPERTY,
    SCALED_METHODS,
    SEARCHES,
    WIDTHS,
    fit,
    gaussian,
    needs_kernels,
    quantizer_of,
    squared_error,
)
from tests.support.synthetic import llm_like

scaled_methods = pytest.mark.parametrize("method", SCALED_METHODS)
every_search = pytest.mark.parametrize("search", SEARCHES)


def error(method: str, bits: int, block_size: int, scale: str, weight: torch.Tensor) -> float:
    return squared_error(fit(quantizer_of(method, bits, block_size, scale), weight).values, weight)


def energy(weight: torch.Tensor) -> float:
    return squared_error(weight, torch.zeros_like(weight))


# -- never worse than absmax -----------------------------------------------------------------------


def assert_not_worse(method: str, bits: int, search: str, weight: torch.Tensor) -> None:
    absmax, searched = (error(method, bits, 32, s, weight) for s in ("absmax", search))
    # Candidates are compared by float32 sums over the block, which are this exact.
    rounding = 1e-7 * energy(weight)
    assert searched <= absmax * (1 + 1e-5) + rounding


@scaled_methods
@every_search
@PROPERTY
@given(
    bits=st.sampled_from(WIDTHS),
    values=st.lists(
        st.floats(-1000, 1000, width=32).filter(lambda x: x == 0 or abs(x) > 1e-9),
        min_size=1,
        max_size=40,
    ),
)
def test_searched_scales_are_never_worse_than_absmax(method, search, bits, values):
    assert_not_worse(method, bits, search, torch.tensor([values]))


@scaled_methods
@every_search
@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0, -1.0])
def test_searched_scales_are_not_worse_in_any_block(method, search, shift):
    weight = torch.rand(256, 32, generator=torch.Generator().manual_seed(0)) - 0.5 + shift
    for bits in WIDTHS:
        absmax, searched = (
            (fit(quantizer_of(method, bits, 32, scale), weight).values.double() - weight)
            .square()
            .sum(dim=1)
            for scale in ("absmax", search)
        )
        rounding = 1e-7 * weight.double().square().sum(dim=1)
        assert bool((searched <= absmax * (1 + 1e-5) + rounding).all())


@every_search
@pytest.mark.parametrize("factor", [1.0, 1e-30, 1e30])
def test_searched_scales_are_not_worse_on_an_llm_like_matrix(search, factor):
    weight = llm_like(64, 96) * factor
    for method, bits in itertools.product(SCALED_METHODS, WIDTHS):
        assert_not_worse(method, bits, search, weight)


@every_search
@pytest.mark.parametrize(
    ("method", "bits", "gain"),
    [("nf", 2, 0.15), ("nf", 4, 0.03), ("uniform", 2, 0.3), ("uniform", 3, 0.1)],
)
def test_searched_scales_gain_much_on_an_llm_like_matrix(search, method, bits, gain):
    weight = llm_like(256, 256)
    absmax, searched = (error(method, bits, 64, s, weight) for s in ("absmax", search))
    assert searched < (1 - gain) * absmax


@every_search
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mirrored_blocks_are_quantized_as_well_as_their_images(search, bits):
    """NormalFloat has more levels above zero than below; a negative scale turns that round."""
    weight = llm_like(64, 96).abs()
    quantizer = quantizer_of("nf", bits, 32, search)
    plain, mirrored = fit(quantizer, weight), fit(quantizer, -weight)
    assert torch.equal(mirrored.values, -plain.values)
    assert bool((mirrored.parameters.scales < 0).any())


@every_search
def test_symmetric_levels_are_never_mirrored(search):
    fitted = fit(quantizer_of("nf-symmetric", 2, 32, search), llm_like(64, 96))
    assert bool((fitted.parameters.scales >= 0).all())


# -- starting from earlier scales ------------------------------------------------------------------


@scaled_methods
@every_search
def test_starting_beside_earlier_scales_ends_close_to_what_they_reached(method, search):
    # Beside, not at: see loftq_cli/numerics/quantizers/grid.py. A block may end in another optimum.
    weight = llm_like(128, 192)
    quantizer = quantizer_of(method, 2, 64, search)
    cold = quantizer.fit(weight, None)
    warm = quantizer.fit(weight, cold.parameters)
    assert squared_error(warm.values, weight) <= squared_error(cold.values, weight) * 1.02


@pytest.mark.parametrize("method", ["nf", "uniform"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_starting_beside_earlier_scales_is_better_than_at_them(method, bits, monkeypatch):
    weight = llm_like(256, 256)
    settings = Procedure(rank=16, iters=5)
    quantizer = make_quantizer(method, bits, 64, "mse")
    beside = decompose(weight, quantizer, settings).final

    def at(bits: int, *, warm: bool, mirrored: bool = False) -> tuple[float, ...]:
        return (1.0,) if warm else grid(bits, warm=False, mirrored=mirrored)

    monkeypatch.setattr(codebook_quantizer, "grid", at)
    monkeypatch.setattr(uniform_quantizer, "grid", at)
    assert beside < decompose(weight, quantizer, settings).final


@scaled_methods
@every_search
@pytest.mark.parametrize("stale", [0.0, 1e-30, 1e-6, 1e6, 1e30])
def test_stale_starting_scales_are_survived(method, search, stale):
    weight = llm_like(64, 128)
    for bits in WIDTHS:
        quantizer = quantizer_of(method, bits, 64, search)
        start = fit(quantizer, weight * stale).parameters
        values = fit(quantizer, weight, start).values
        assert squared_error(values, weight) < 0.6 * energy(weight)


# -- the compiled kernels --------------------------------------------------------------------------


@needs_kernels
@scaled_methods
@pytest.mark.parametrize("shape", [(64, 192), (33, 100), (1, 300), (300, 1), (5, 7)], ids=str)
def test_kernels_search_as_the_tensor_operations_do(method, shape):
    weight = llm_like(*shape)
    for bits, block_size in itertools.product(WIDTHS, (32, 64, 128, 256)):
        ours, theirs = (
            fit(quantizer_of(method, bits, block_size, scale), weight)
            for scale in ("mse-native", "mse")
        )
        scales, expected = ours.parameters.scales, theirs.parameters.scales
        assert scales.shape == expected.shape
        # A tie between two candidates may fall either way; then both are equally good.
        same = torch.isclose(scales, expected, rtol=1e-4)
        assert float(same.float().mean()) > 0.85
        errors = [squared_error(fitted.values, weight) for fitted in (ours, theirs)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-2, abs=1e-10 * energy(weight))


@needs_kernels
@scaled_methods
@pytest.mark.parametrize("block_size", [512, 4096])
def test_blocks_too_long_for_the_kernels_are_searched_all_the_same(method, block_size):
    weight = llm_like(16, 4096)
    ours, theirs = (
        fit(quantizer_of(method, 2, block_size, scale), weight) for scale in ("mse-native", "mse")
    )
    assert torch.equal(ours.codes, theirs.codes)


@needs_kernels
@scaled_methods
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_do_not_crash_the_kernels(method, value):
    """An overflow between two steps is reported by its residual, so the kernels must survive it."""
    weight = gaussian(4, 128)
    weight[1, 3] = value
    for bits in WIDTHS:
        fitted = fit(quantizer_of(method, bits, 64, "mse-native"), weight)
        residual = weight - fitted.values
        assert not bool(torch.isfinite(residual[1]).all())
        assert bool(torch.isfinite(residual[2:]).all())


@needs_kernels
def test_loading_the_kernels_leaves_subnormal_arithmetic_alone():
    """A library linked with -ffast-math would flush subnormals to zero in the whole process."""
    script = (
        "import torch\n"
        "from loftq_cli.kernels import native\n"
        "assert native.available()\n"
        "x = torch.full((64,), 1e-40)\n"
        "assert bool((x * 0.5 > 0).all()), 'flushed'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("LOFTQ_NATIVE", "0", "LOFTQ_NATIVE=0"),
        ("CC", "/nonexistent/compiler", "could not be built"),
        ("CC", sys.executable, "could not be built"),
        ("PATH", "", "no C compiler"),
    ],
    ids=["switched-off", "missing-compiler", "not-a-compiler", "nothing-on-the-path"],
)
def test_without_a_compiler_there_is_a_reason_and_no_library(
    monkeypatch, tmp_path, variable, value, reason
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("LOFTQ_NATIVE", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    kernels = native.load.__wrapped__()
    assert kernels.library is None
    assert reason in kernels.reason


@needs_kernels
def test_the_build_is_kept_in_the_cache_and_found_again(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.load.__wrapped__().library is not None
    (built,) = tmp_path.rglob("*.so")
    first = built.stat()
    assert native.load.__wrapped__().library is not None
    assert [path.stat() for path in tmp_path.rglob("*.so")] == [first]


@needs_kernels
@pytest.mark.parametrize("content", [b"", b"\x7fELF" + bytes(100)])
def test_a_build_that_was_damaged_in_the_cache_is_made_again(monkeypatch, tmp_path, content):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "first"))
    native.load.__wrapped__()
    (built,) = tmp_path.rglob("*.so")
    damaged = tmp_path / "second/loftq" / built.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(content)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
    assert native.load.__wrapped__().library is not None
    assert damaged.read_bytes() == built.read_bytes()
