"""Sizes as people write them, ``24GiB`` or ``3.5GB``, to bytes and back."""

from __future__ import annotations

import re
from fractions import Fraction

from loftq_cli.errors import UsageError

_STEPS = ("", "k", "m", "g", "t")
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)(i?)b\s*", re.IGNORECASE | re.ASCII)
_BARE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)\s*", re.IGNORECASE | re.ASCII)
_MOST = 10**18


def size_of(option: str, text: str) -> int:
    """The bytes that ``text`` means: a number and kB, MB, GB, TB (powers of 1000), KiB, MiB, GiB,
    TiB (of 1024) or B; case does not matter. Raises UsageError, which names the ``option``."""
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise UsageError(
            f"{option} {text!r}: must be a size such as 24GiB or 3.5GB", hint=_hint(text)
        )
    number, step, binary = match.groups()
    if binary and not step:
        raise UsageError(f"{option} {text!r}: must be a size such as 24GiB or 3.5GB")
    nbytes = Fraction(number) * (1024 if binary else 1000) ** _STEPS.index(step.lower())
    if not 1 <= nbytes <= _MOST:
        raise UsageError(f"{option} {text!r}: must be from 1 byte to 1,000,000 TB")
    return int(nbytes)


def _hint(text: object) -> str:
    match = _BARE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        return ""
    number, step = match.groups()
    step = step.upper() or "G"
    return f"{number}{step}iB is 1024 to a step, as memory is sold, {number}{step}B is 1000"


def binary(nbytes: float) -> str:
    """Bytes as memory is sold: in KiB, MiB or GiB."""
    return _in_steps(nbytes, 1024, ("B", "KiB", "MiB", "GiB"))


def decimal(nbytes: float) -> str:
    """Bytes as disks are sold: in kB, MB or GB."""
    return _in_steps(nbytes, 1000, ("B", "kB", "MB", "GB"))


def _in_steps(nbytes: float, step: int, units: tuple[str, ...]) -> str:
    for unit in units:
        if nbytes < step or unit == units[-1]:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= step
    raise AssertionError
