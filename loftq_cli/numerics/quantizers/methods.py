"""The methods of quantizing, by name: what each can do, and its quantizer.

A method is one entry here, or is registered from outside with :func:`register`. Nothing is computed
and torch is not imported before a quantizer is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from loftq_cli.checkpoint import schema
from loftq_cli.errors import UnsupportedInputError

if TYPE_CHECKING:
    from loftq_cli.numerics.quantizers.base import Quantizer, Scale
    from loftq_cli.numerics.quantizers.scale_storage import ScaleDtype, Stored

AUTO = "auto"
"""The setting that leaves the choice to :func:`auto`."""

WIDTHS = (2, 3, 4, 8)
"""Bits of a code, ascending."""


@dataclass(frozen=True)
class Wanted:
    """What a quantizer is made for. ``scale``: "mse" fits scales to the least squared error,
    "absmax" takes the largest magnitude, "fixed" is for methods that have a rule of their own.
    ``portable``: scales are rounded as they are fitted (of methods with zero points only; see
    portable.py). ``native``: the compiled kernels may search for scales."""

    bits: int
    block_size: int
    scale: Scale
    portable: bool = False
    native: bool = False


@dataclass(frozen=True)
class Method:
    """A way to quantize. ``make`` gives the quantizer.

    ``decoding``: "codebook" (scale times level, blocks over the flattened matrix), "affine" (scale
    times code less zero point, blocks along each row) or "trellis" (a codebook's, of levels that
    several codes choose together: trellis_code.py). ``widths``: what it has codes of,
    and ``limit`` why of no others. ``auto_widths``: where method auto takes it. ``own_scale``: it
    defines its scales itself; ``searches``: it does so by searching for the least error.
    ``effort``: how long a sweep takes, that of nf being 1, for estimates of the time that is left.
    ``one_scale``: the whole matrix has one, whatever the block size. ``symmetric``: every zero
    point is 2**(bits - 1). ``on_host``: it searches in the compiled kernels, whatever the device,
    and without them takes far too long. ``rows_together``: so many are quantized together.
    ``stored``: what its scales are rounded to for a container of its own.
    """

    name: str
    make: Callable[[Wanted], Quantizer]
    decoding: Literal["codebook", "affine", "trellis"] = "codebook"
    widths: tuple[int, ...] = WIDTHS
    limit: str = ""
    auto_widths: tuple[int, ...] = ()
    own_scale: bool = False
    searches: bool = False
    one_scale: bool = False
    symmetric: bool = False
    on_host: bool = False
    rows_together: int = 1
    stored: Stored = "float32"
    effort: float = 1.0


_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Make ``method`` known under its name, in the place of one that has it already."""
    _METHODS[method.name] = method
    schema.allow("method", method.name)
    return method


def unregister(name: str) -> None:
    """Forget the method ``name``."""
    del _METHODS[name]
    schema.disallow("method", name)


def names() -> tuple[str, ...]:
    """All methods, in the order in which they are listed."""
    return tuple(_METHODS)


def method(name: str) -> Method:
    """The method ``name``. Raises UnsupportedInputError if there is none: a file names it."""
    if name not in _METHODS:
        raise UnsupportedInputError(
            f"method {name!r} is not one of {', '.join(_METHODS)}",
            hint="pip install --upgrade loftq-cli, or import what it comes from",
        )
    return _METHODS[name]


def auto(bits: int) -> str:
    """The method that "auto" means at that width."""
    return next(found.name for found in _METHODS.values() if bits in found.auto_widths)


def widths(name: str) -> tuple[int, ...]:
    """The widths of a method, ascending; of "auto" all that there are."""
    return WIDTHS if name == AUTO else method(name).widths


def searches_scales(name: str, scale: str) -> bool:
    """Whether scales are searched for, given the method, or "auto", and the setting ``scale`` or
    what became of it."""
    if name != AUTO and method(name).own_scale:
        return method(name).searches
    return scale == "mse"


def on_host(name: str) -> bool:
    """Whether the method, which may be "auto", searches on the host."""
    return name != AUTO and method(name).on_host


def stored_in(name: str, dtype: ScaleDtype) -> Stored:
    """What scales of the method ``name`` are rounded to if ``dtype`` is asked for. bfloat16 holds
    whatever a method rounds to by itself."""
    own = method(name).stored
    return dtype if own == "float32" or dtype == "int8" else own


def make_quantizer(
    name: str,
    bits: int,
    block_size: int,
    scale: Scale,
    portable: bool = False,
    native: bool = False,
) -> Quantizer:
    """The quantizer of the method ``name``; the others are those of :class:`Wanted`. Raises
    ValueError if the method needs a rule for its scales and ``scale`` is "fixed"."""
    found = method(name)
    if scale == "fixed" and not found.own_scale:
        raise ValueError(f"method {name} needs a rule for its scales")
    return found.make(Wanted(bits, block_size, scale, portable, native))


def _normal_float(wanted: Wanted, *, symmetric: bool = False) -> Quantizer:
    from loftq_cli.numerics.quantizers.codebook import CodebookQuantizer
    from loftq_cli.numerics.quantizers.codebooks import normal_float_table

    assert wanted.scale != "fixed"
    table = normal_float_table(wanted.bits, symmetric)
    return CodebookQuantizer(table, wanted.bits, wanted.block_size, wanted.scale, wanted.native)


def _symmetric(wanted: Wanted) -> Quantizer:
    return _normal_float(wanted, symmetric=True)


def _fitted(wanted: Wanted) -> Quantizer:
    from loftq_cli.numerics.quantizers.codebooks import normal_float_table
    from loftq_cli.numerics.quantizers.fitted import FittedQuantizer

    table = normal_float_table(wanted.bits, False)
    return FittedQuantizer(table, wanted.bits, wanted.block_size, "mse", wanted.native)


def _trellis(wanted: Wanted) -> Quantizer:
    from loftq_cli.numerics.quantizers.trellis import TrellisQuantizer

    return TrellisQuantizer(wanted.block_size, wanted.native)


def _iq4_nl(wanted: Wanted) -> Quantizer:
    from loftq_cli.numerics.quantizers.codebook import CodebookQuantizer
    from loftq_cli.numerics.quantizers.codebooks import iq4_nl_table

    return CodebookQuantizer(iq4_nl_table(), wanted.bits, wanted.block_size, "mse", wanted.native)


def _uniform(wanted: Wanted, *, symmetric: bool = False) -> Quantizer:
    from loftq_cli.numerics.quantizers.uniform import UniformQuantizer

    assert wanted.scale != "fixed"
    return UniformQuantizer(
        wanted.bits, wanted.block_size, wanted.scale, wanted.portable, symmetric, wanted.native
    )


def _uniform_symmetric(wanted: Wanted) -> Quantizer:
    return _uniform(wanted, symmetric=True)


def _uniform_block(wanted: Wanted) -> Quantizer:
    from loftq_cli.numerics.quantizers.codebook import CodebookQuantizer
    from loftq_cli.numerics.quantizers.codebooks import evenly_spaced_table

    table = evenly_spaced_table(wanted.bits)
    return CodebookQuantizer(table, wanted.bits, wanted.block_size, "spread")


def _uniform_tensor(wanted: Wanted) -> Quantizer:
    from loftq_cli.numerics.quantizers.uniform import TensorUniformQuantizer

    return TensorUniformQuantizer(wanted.bits)


_OURS = (
    Method("nf", _normal_float, auto_widths=(4,)),
    Method("nf-symmetric", _symmetric),
    Method(
        "fitted",
        _fitted,
        widths=(2, 3, 4),
        limit="levels are fitted up to 4 bits",
        own_scale=True,
        searches=True,
        effort=4.0,
    ),
    Method(
        "trellis",
        _trellis,
        "trellis",
        widths=(2,),
        limit="the trellis code has 2 bits",
        own_scale=True,
        searches=True,
        on_host=True,
        rows_together=256,
        effort=40.0,
    ),
    Method(
        "iq4-nl",
        _iq4_nl,
        widths=(4,),
        limit="llama.cpp has its levels at 4 bits",
        own_scale=True,
        searches=True,
        stored="half",
    ),
    Method("uniform", _uniform, "affine", auto_widths=(2, 3, 8)),
    Method("uniform-symmetric", _uniform_symmetric, "affine", symmetric=True),
    # The uniform quantizers of the LoftQ authors' code.
    Method("uniform-block", _uniform_block, own_scale=True, effort=3.5),
    Method("uniform-tensor", _uniform_tensor, own_scale=True, one_scale=True, effort=3.5),
)
_METHODS.update({each.name: each for each in _OURS})
