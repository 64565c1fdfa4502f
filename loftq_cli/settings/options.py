"""What was given of the settings, and what the rest is then."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loftq_cli.errors import LayoutError, UsageError
from loftq_cli.layouts import registry
from loftq_cli.numerics.quantizers import methods
from loftq_cli.settings import maps
from loftq_cli.settings.kinds import check_choice
from loftq_cli.settings.table import DEFAULT, PRESETS, Settings, entries


@dataclass(frozen=True, init=False)
class Options:
    """Settings as somebody gave them, by name; ``preset`` supplies the others."""

    given: Mapping[str, Any]
    preset: str

    def __init__(self, /, preset: Any = None, **given: Any) -> None:
        """None, and no pattern at all, mean that a setting was not given. Raises UsageError for an
        unknown name, or patterns that are none."""
        known = entries()
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, [*known, "preset"], n=1)
                raise UsageError(
                    f"unknown setting {name!r}", hint=f"did you mean {near[0]!r}?" if near else ""
                )
        held = {
            name: known[name].kind.canonical(name, value)
            for name, value in given.items()
            if value is not None
        }
        object.__setattr__(
            self, "given", {n: v for n, v in held.items() if not (isinstance(v, tuple) and not v)}
        )
        object.__setattr__(self, "preset", DEFAULT if preset is None else preset)

    def having(self, **given: Any) -> Options:
        """These options, with others in the place of some."""
        return Options(self.preset, **{**self.given, **given})

    def resolve(self) -> Settings:
        """The settings that these options, the preset and the defaults make, every one checked.

        Raises UsageError.
        """
        check_choice("preset", self.preset, PRESETS)
        known = entries()
        given = {name: known[name].kind.checked(name, value) for name, value in self.given.items()}
        supplied = {name: entry.default_of(self.preset) for name, entry in known.items()}
        settings = {**supplied, **given}
        if settings["method"] != methods.AUTO and "bits" not in given:
            only = methods.widths(settings["method"])
            settings["bits"] = only[0] if len(only) == 1 else settings["bits"]
        if not methods.searches_scales(settings["method"], settings["scale"]):
            # Scales that are not fitted lose by momentum at 2 bits, and stand for what others do.
            settings.update({"momentum": False, "feedback": False, "feedback_passes": 1, **given})
        if "target_bpw" in given and "bits" not in given:
            settings["bits"] = None
        resolved = Settings(**settings)
        _check_together(resolved, given)
        return resolved


def _check_together(settings: Settings, given: Mapping[str, Any]) -> None:
    """Raise UsageError for settings that exclude each other."""
    method = settings.method
    if method != methods.AUTO and methods.method(method).own_scale and "scale" in given:
        raise UsageError(f"--scale does not apply to --method {method}, which fixes its own")
    if settings.feedback_passes > 1 and "feedback_passes" in given:
        _check_passes(settings)
    if settings.target_bpw is not None and "bits" in given:
        raise UsageError(
            f"--target-bpw {settings.target_bpw} and --bits {settings.bits}: only one can decide "
            "the widths",
            hint="--bits-map fixes the width of some matrices under either",
        )
    if settings.scale_dtype != "float32":
        _check_scale_dtype(settings)
    asked = [settings.bits or 0, *maps.parse("--bits-map", settings.bits_map).values()]
    if max(asked) > max(methods.widths(method)):
        raise UsageError(
            f"--method {method} --bits {max(asked)}: {methods.method(method).limit}",
            hint=f"use --bits {max(methods.widths(method))}, or --method nf or uniform",
        )
    if settings.widths and settings.target_bpw is None:
        raise UsageError("widths are what target_bpw settled, and need it beside them")


def _check_passes(settings: Settings) -> None:
    """Raise UsageError if more than one pass of feedback has nothing to do."""
    asked = f"--feedback-passes {settings.feedback_passes}"
    if not settings.feedback:
        raise UsageError(f"{asked} needs --feedback")
    if not methods.searches_scales(settings.method, settings.scale):
        raise UsageError(f"{asked} needs scales that are fitted", hint="use --scale mse")


def _check_scale_dtype(settings: Settings) -> None:
    """Raise LayoutError or UsageError if there are no scales to be stored in that dtype."""
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
