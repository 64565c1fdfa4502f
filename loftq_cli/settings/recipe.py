"""What was asked for: options with their defaults and presets, and the resolved recipe.

``Options`` are the settings as given (None: not given). :meth:`Options.resolve` fills in the
preset and the defaults and checks ranges; what depends on the checkpoint (``method`` and
``layout`` auto) is settled by :mod:`loftq_cli.planning.plan`, which makes the ``Recipe``.
A recipe holds every setting that can change a byte of the output, and nothing else.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from loftq_cli.errors import LayoutError, UsageError
from loftq_cli.layouts import registry
from loftq_cli.machine.paths import expanded
from loftq_cli.numerics.quantizers import methods
from loftq_cli.settings import maps

if TYPE_CHECKING:
    from loftq_cli.numerics.decomposition import Keep, Order, Svd
    from loftq_cli.numerics.quantizers.base import Scale
    from loftq_cli.numerics.quantizers.scale_storage import ScaleDtype

BITS = methods.WIDTHS
MIXED = (2, 4)
"""The widths that a fraction between them mixes."""
BLOCK_SIZES = (32, 64, 128, 256)
SCALES = ("mse", "absmax")
SCALE_DTYPES = ("float32", "bfloat16", "int8")
ORDERS = ("quantize-first", "svd-first")
SVDS = ("fast", "exact")
PRESETS = ("default", "paper")
KEEPS = ("best", "last")
ADAPTER_DTYPES = ("source", "float32", "float16", "bfloat16")
DENSE_DTYPES = ADAPTER_DTYPES
MAX_RANK = 65_536
MAX_ITERS = 1_000


def method_choices() -> tuple[str, ...]:
    """What ``method`` may be."""
    return (methods.AUTO, *methods.names())


def layout_choices() -> tuple[str, ...]:
    """What ``layout`` may be."""
    return (registry.AUTO, *registry.names())


_DEFAULTS: dict[str, Any] = {
    "bits": 4,
    "method": "auto",
    "rank": 16,
    "iters": 5,
    "block_size": 64,
    "layout": "auto",
    "scale": "mse",
    "scale_dtype": "float32",
    "order": "quantize-first",
    "svd": "fast",
    "keep": "best",
    "momentum": True,
    "feedback": True,
    "embeddings": False,
    "stats": None,
    "lora_alpha": None,
    "adapter_dtype": "source",
    "dense_dtype": "source",
    "device": "auto",
    "threads": None,
    "seed": 0,
    "target_bpw": None,
}
_BEFORE: dict[str, Any] = {
    "momentum": False,
    "feedback": False,
    "include": (),
    "exclude": (),
    "bits_map": (),
    "rank_map": (),
    "widths": (),
    "layout_fallback": None,
}
"""What a manifest without a setting meant, if that is not the default."""

_PRESET_DEFAULTS: dict[str, dict[str, Any]] = {
    "default": {},
    # What the LoftQ reference code does.
    "paper": {
        "method": "nf",
        "scale": "absmax",
        "svd": "exact",
        "keep": "last",
        "momentum": False,
        "feedback": False,
    },
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "block_size": BLOCK_SIZES,
    "scale": SCALES,
    "scale_dtype": SCALE_DTYPES,
    "order": ORDERS,
    "svd": SVDS,
    "keep": KEEPS,
    "adapter_dtype": ADAPTER_DTYPES,
    "dense_dtype": DENSE_DTYPES,
    "momentum": (False, True),
    "feedback": (False, True),
    "embeddings": (False, True),
}


@dataclass(frozen=True)
class Options:
    """Settings as given by the user; None means the preset's or the default value."""

    bits: float | None = None
    method: str | None = None
    rank: int | None = None
    iters: int | None = None
    block_size: int | None = None
    layout: str | None = None
    scale: str | None = None
    scale_dtype: str | None = None
    order: str | None = None
    svd: str | None = None
    keep: str | None = None
    momentum: bool | None = None
    feedback: bool | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    embeddings: bool | None = None
    stats: str | None = None
    lora_alpha: float | None = None
    adapter_dtype: str | None = None
    dense_dtype: str | None = None
    device: str | None = None
    threads: int | None = None
    seed: int | None = None
    preset: str = "default"
    bits_map: tuple[str, ...] = ()
    rank_map: tuple[str, ...] = ()
    target_bpw: float | None = None
    widths: tuple[str, ...] = ()

    @staticmethod
    def from_settings(settings: Mapping[str, Any]) -> Options:
        """Options from keyword arguments. Raises UsageError for an unknown one."""
        known = [field.name for field in fields(Options)]
        for name in settings:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise UsageError(
                    f"unknown setting {name!r}", hint=f"did you mean {near[0]!r}?" if near else ""
                )
        patterns = {name: _patterns(name, settings.get(name)) for name in ("include", "exclude")}
        entries = {
            name: maps.canonical(_flag(name), settings.get(name))
            for name in ("bits_map", "rank_map", "widths")
        }
        given = {**settings, **patterns, **entries}
        if given.get("preset") is None:
            given["preset"] = "default"
        return Options(**given)

    def resolve(self) -> Settings:
        """The settings that these options, the preset and the defaults make, every range checked.

        Raises UsageError.
        """
        _check_choice("preset", self.preset, PRESETS)
        supplied = {**_DEFAULTS, **_PRESET_DEFAULTS[self.preset]}
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if "stats" in given:
            given["stats"] = _checked_path("stats", given["stats"])
        method = given.get("method", supplied["method"])
        _check_choice("method", method, method_choices())
        _check_choice("layout", given.get("layout", supplied["layout"]), layout_choices())
        own = method != methods.AUTO and methods.method(method).own_scale
        if own and "scale" in given:
            raise UsageError(f"--scale does not apply to --method {method}, which fixes its own")
        if not methods.searches_scales(method, given.get("scale", supplied["scale"])):
            # Scales that are not fitted lose by momentum at 2 bits, and stand for what others do.
            supplied.update(momentum=False, feedback=False)
        del given["preset"]
        if "target_bpw" in given:
            _check_target(given)
            supplied["bits"] = None
        settings = Settings(**{**supplied, **given})
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(settings, name), choices)
        _check_scale_dtype(settings)
        settings = replace(settings, bits=_checked_bits(settings.bits))
        asked = [settings.bits or 0, *_checked_map("bits_map", settings.bits_map)]
        if max(asked) > max(methods.widths(method)):
            raise UsageError(
                f"--method {method} --bits {max(asked)}: {methods.method(method).limit}",
                hint="use --method nf or uniform",
            )
        for rank in _checked_map("rank_map", settings.rank_map):
            _check_range("rank_map", rank, 1, MAX_RANK)
        if settings.widths and settings.target_bpw is None:
            raise UsageError("widths are what target_bpw settled, and need it beside them")
        _checked_map("widths", settings.widths)
        if not isinstance(settings.device, str):
            raise UsageError(f"--device {settings.device!r}: use auto, cpu, cuda or cuda:N")
        _check_range("rank", settings.rank, 1, MAX_RANK)
        _check_range("iters", settings.iters, 0, MAX_ITERS)
        _check_range("seed", settings.seed, 0, 2**63 - 1)
        if settings.threads is not None:
            _check_range("threads", settings.threads, 1, 1024)
        alpha = settings.lora_alpha
        if alpha is not None:
            _check_positive("lora_alpha", alpha)
        return settings


@dataclass(frozen=True)
class Settings:
    """Every setting has a value, but ``method``, ``layout`` and ``device`` may still be "auto",
    which the checkpoint and the machine decide. ``lora_alpha`` None: the rank; ``threads`` None:
    all; ``bits`` None: ``target_bpw`` decides, an average of stored bits. ``bits_map`` and
    ``rank_map`` overrule ``bits``, ``target_bpw`` and ``rank`` (see maps); ``widths`` are entries
    for the matrices whose width the target has settled. ``stats``: the path of a file of activation
    statistics."""

    bits: float | None
    method: str
    rank: int
    iters: int
    block_size: int
    layout: str
    scale: Scale
    scale_dtype: ScaleDtype
    order: Order
    svd: Svd
    keep: Keep
    momentum: bool
    feedback: bool
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    embeddings: bool
    stats: str | None
    lora_alpha: float | None
    adapter_dtype: str
    dense_dtype: str
    device: str
    threads: int | None
    seed: int
    bits_map: tuple[str, ...]
    rank_map: tuple[str, ...]
    target_bpw: float | None
    widths: tuple[str, ...]

    def recipe(self, **settled: Any) -> Recipe:
        """The recipe of these settings, with what the checkpoint and the machine have decided in
        their place."""
        return Recipe(**{**vars(self), **settled})


@dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """Every setting that can change a byte of the output, resolved.

    ``method`` (but for "auto" where widths that differ have methods that differ), ``layout`` and
    ``threads`` are settled; ``scale`` is "fixed" where the method defines it, ``scale_dtype``
    concerns layout ``loftq`` only; ``stats`` is the sha256 of the file; ``device`` is the device
    type; ``kernels`` the variant of the inner loops (numerics.variant). ``layout_fallback`` says
    why layout auto had to leave its first choice while converting. ``structure`` is the sha256 of
    what transformers says of the tensors (integrations.anatomy), None if that changes nothing.
    """

    threads: int
    layout_fallback: str | None
    kernels: str
    structure: str | None = None

    @staticmethod
    def read(held: Mapping[str, Any]) -> Recipe:
        """The recipe that a manifest holds, which may be from before there were all settings."""
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in held.items()}
        return Recipe(**{**_DEFAULTS, **_BEFORE, **values})

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, as the manifest holds it."""
        values = asdict(self)
        if self.structure is None:
            del values["structure"]
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }

    def with_fallback(self) -> Recipe:
        """The recipe that layout auto continues with when a scale does not fit float16."""
        held = registry.holding_everything().name
        return replace(self, layout=held, layout_fallback="float16-range")


def fingerprint(recipe: dict[str, Any], sources: list[tuple[str, int, str]]) -> str:
    """sha256 over the recipe and, per source file, (name, size, header sha256): never a path."""
    text = json.dumps(
        {"recipe": recipe, "sources": sorted(sources)}, sort_keys=True, separators=(",", ":")
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    """One pattern, several, or none."""
    if value is None:
        return ()
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) for p in patterns):
        raise UsageError(f"{_flag(name)} {value!r}: must be a pattern or a list of patterns")
    return tuple(patterns)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_scale_dtype(settings: Settings) -> None:
    """Raise LayoutError or UsageError where there are no scales to be stored in that dtype."""
    if settings.scale_dtype == "float32":
        return
    asked = f"--scale-dtype {settings.scale_dtype}"
    able = [each.name for each in registry.every() if settings.scale_dtype in each.scale_dtypes]
    if settings.layout not in (registry.AUTO, *able):
        listed = " or ".join(able)
        raise LayoutError(
            f"{asked}: layout {settings.layout} cannot hold such scales, only layout {listed} can",
            hint=f"use --layout {listed} or auto",
        )
    if settings.method != methods.AUTO and methods.method(settings.method).one_scale:
        raise UsageError(
            f"{asked} does not apply to --method {settings.method}, which has one scale"
        )


def _checked_bits(bits: Any) -> float | None:
    """``bits``, whole numbers as int. Raises UsageError."""
    if bits is not None and not _is_number(bits):
        raise UsageError(f"--bits {_shown(bits)}: must be a number, not {_kind(bits)}")
    if isinstance(bits, float) and bits.is_integer():
        bits = int(bits)
    fraction = isinstance(bits, float) and MIXED[0] < bits < MIXED[1]
    if not fraction and bits is not None and (type(bits) is not int or bits not in BITS):
        listed = ", ".join(str(width) for width in BITS)
        raise UsageError(f"--bits {bits}: not one of {listed}, nor a fraction between 2 and 4")
    return bits  # type: ignore[no-any-return]


def _check_target(given: Mapping[str, Any]) -> None:
    target = given["target_bpw"]
    _check_positive("target_bpw", target)
    if "bits" in given:
        bits = _checked_bits(given["bits"])
        raise UsageError(
            f"--target-bpw {target} and --bits {bits}: only one can decide the widths",
            hint="--bits-map fixes the width of some matrices under either",
        )


def _checked_map(name: str, entries: tuple[str, ...]) -> list[int]:
    """The numbers in a map. Raises UsageError, also for widths that there are not."""
    numbers = list(maps.parse(_flag(name), entries).values())
    for number in numbers if name != "rank_map" else ():
        _check_choice(name, number, BITS)
    return numbers


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        if choices == (False, True):
            raise UsageError(f"{_flag(name)} {value!r}: must be true or false, not {_kind(value)}")
        shown = value if isinstance(choices[0], str) else _shown(value)
        listed = ", ".join(str(choice) for choice in choices)
        raise UsageError(f"{_flag(name)} {shown}: not one of {listed}")


def _check_range(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UsageError(
            f"{_flag(name)} {_shown(value)}: must be a whole number from {low} to {high}"
        )


def _check_positive(name: str, value: Any) -> None:
    if not (_is_number(value) and 0 < value <= sys.float_info.max):
        raise UsageError(f"{_flag(name)} {_shown(value)}: must be a positive number")


def _checked_path(name: str, value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise UsageError(f"{_flag(name)} {value!r}: must be the path of a file, not {_kind(value)}")
    return str(expanded(value))


def _shown(value: Any) -> str:
    """A value where a number belongs: ``"2"`` is none."""
    return repr(value) if isinstance(value, str) else str(value)


def _kind(value: Any) -> str:
    """What a value is, as who writes a recipe would call it."""
    kinds = {str: "text", bool: "true or false", list: "a list", dict: "a table"}
    return kinds.get(type(value), f"a value of type {type(value).__name__}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
