"""What "auto" means for a checkpoint: method, layout, device, variant and threads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict

import torch

from loftq_cli.errors import EnvironmentFailure, LayoutError, UsageError
from loftq_cli.families.experts import is_expert
from loftq_cli.kernels import native
from loftq_cli.layouts import registry
from loftq_cli.layouts.base import Layout, Matrix, Surroundings
from loftq_cli.machine import launched
from loftq_cli.numerics import lowrank
from loftq_cli.numerics.quantizers import methods
from loftq_cli.numerics.variant import Variant
from loftq_cli.settings.table import Settings


def resolve_method(settings: Settings, bits: int) -> str:
    """The method of ``settings`` at that width. What auto means is the layout's to say, or else
    such that a decoder's default output loads in stock transformers (bnb, gptq)."""
    if settings.method != methods.AUTO:
        return settings.method
    wanted = None
    if settings.layout != registry.AUTO:
        wanted = registry.layout_class(settings.layout).method_at(bits)
    return wanted or methods.auto(bits)


def choose_variant(device: torch.device, method: str, scale: str, svd: str) -> Variant:
    """The compiled search if there is a compiler and something to search for, and the fastest
    products of the device."""
    searches = methods.searches_scales(method, scale)
    here = device.type == "cpu" or methods.on_host(method)
    return Variant(
        native=searches and here and native.available(),
        products=lowrank.fastest_products(device) if svd == "fast" else torch.float32,
    )


def choose_layout(
    settings: Settings, matrices: Sequence[Matrix], surroundings: Surroundings
) -> tuple[str, str | None]:
    """(layout, remark): auto takes what stock consumers load, if it holds every matrix. Raises
    LayoutError if the layout that was asked for cannot hold one."""
    kinds = {(matrix.method, matrix.bits) for matrix in matrices}
    mixed = settings.target_bpw is not None or len(kinds) > 1
    experts = any(is_expert(matrix.name) for matrix in matrices)
    if settings.layout != registry.AUTO:
        wanted = registry.make_layout(settings.layout, asdict(settings))
        _check_layout(wanted, matrices, surroundings, mixed=mixed, experts=experts)
        if settings.target_bpw is None or settings.widths:  # else widths are still to be settled
            _check_together(wanted, matrices)
        return wanted.name, None
    if experts:
        holder = registry.holding_everything().name
        return holder, f"layout {holder}, which keeps experts packed"
    ranked = [registry.make_layout(name, asdict(settings)) for name in _ranked()]
    last = registry.holding_everything().name
    if mixed:
        uniform = " and ".join(layout.name for layout in ranked if not layout.mixes)
        return last, f"layout {last}, because {uniform} hold one width"
    ((method, bits),) = kinds
    first = next((each for each in ranked if each.suits(method, bits, surroundings)), None)
    if first is None:
        return last, None
    if settings.scale_dtype not in first.scale_dtypes:
        return last, f"layout {last}, because {first.name} has no {settings.scale_dtype} scales"
    obstacles = _obstacles(first, matrices, surroundings)
    if not obstacles:
        return first.name, None
    more = f" (and {len(obstacles) - 1} more)" if len(obstacles) > 1 else ""
    return last, f"layout {last}, because {first.name} cannot hold {obstacles[0]}{more}"


def _ranked() -> list[str]:
    """The layouts that auto asks, in that order."""
    asked = [layout for layout in registry.every() if layout.auto_rank is not None]
    return [layout.name for layout in sorted(asked, key=lambda layout: layout.auto_rank or 0)]


def _check_layout(
    wanted: Layout,
    matrices: Sequence[Matrix],
    surroundings: Surroundings,
    *,
    mixed: bool,
    experts: bool,
) -> None:
    """Raise LayoutError if the layout that was asked for cannot hold what is selected."""
    if experts and not wanted.holds_experts:
        raise LayoutError(
            f"--layout {wanted.name} cannot hold experts: transformers fuses them, and the "
            "libraries that read it know no such module",
            hint=f"use --layout {registry.holding_everything().name}, or leave the experts out",
        )
    obstacles = _obstacles(wanted, matrices, surroundings)
    if obstacles:
        raise LayoutError(f"--layout {wanted.name} cannot hold " + "; ".join(obstacles))
    if mixed and not wanted.mixes:
        raise LayoutError(f"--layout {wanted.name} cannot hold matrices of several widths")


def _check_together(wanted: Layout, matrices: Sequence[Matrix]) -> None:
    together = wanted.cannot_combine(matrices)
    if together:
        raise LayoutError(
            f"--layout {wanted.name} cannot hold {together}",
            hint="give them one width in --bits-map, or use --layout loftq",
        )


def _obstacles(layout: Layout, matrices: Sequence[Matrix], surroundings: Surroundings) -> list[str]:
    described = layout.cannot_describe(surroundings)
    held = ((matrix.name, layout.cannot_hold(matrix)) for matrix in matrices)
    return ([f"this model: {described}"] if described else []) + [
        f"{name}: {reason}" for name, reason in held if reason
    ]


def choose_devices(name: str) -> tuple[torch.device, ...]:
    """The devices that share a conversion: one, several as ``cuda:0,cuda:1``, or ``all``. Raises
    UsageError or EnvironmentFailure."""
    names = [part.strip() for part in name.split(",")]
    place = launched.place() if names == ["all"] or len(names) > 1 else None
    if place is not None:
        raise UsageError(
            f"--device {name}: of several processes ({place}) each has one device",
            hint="give cuda, or leave the option out",
        )
    if names == ["all"]:
        names = [f"cuda:{number}" for number in range(_cuda_devices())]
        if not names:
            raise EnvironmentFailure(
                "--device all: torch sees no CUDA device", hint="use --device cpu"
            )
    if len(names) == 1:
        return (choose_device(names[0]),)
    if {"all", "auto"} & {*names}:
        raise UsageError(f"--device {name}: all and auto are given alone")
    devices = tuple(map(choose_device, names))
    if {device.type for device in devices} != {"cuda"}:
        raise UsageError(
            f"--device {name}: several devices have to be CUDA devices",
            hint="the CPU computes in another order, so the bytes would differ",
        )
    twice = next((str(device) for device in devices if devices.count(device) > 1), None)
    if twice:
        raise UsageError(f"--device {name}: {twice} is named twice")
    if len({lowrank.fastest_products(device) for device in devices}) > 1:
        raise UsageError(
            f"--device {name}: some multiply in bfloat16 and some cannot",
            hint="the bytes would differ: name those that are alike",
        )
    return devices


def _cuda_devices() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def choose_device(name: str) -> torch.device:
    """The device that is called ``name``; a CUDA device with its number, as its tensors have it. Of
    several processes on one host, each has another of its devices, unless they are told which.
    Raises UsageError, EnvironmentFailure."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = _cuda_devices()
        if (device.index or 0) >= count:
            raise EnvironmentFailure(
                f"--device {name}: torch sees {count} CUDA devices", hint="use --device cpu"
            )
        number, processes = launched.local()
        if processes > 1 and device.index is None:
            return torch.device("cuda", number % count)
        if device.index is None:
            return torch.device("cuda", torch.cuda.current_device())
    return device


def count_cpus() -> int:
    """The CPUs this process may use: of several processes on one host, its share."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        found = len(os.sched_getaffinity(0))
    else:
        found = os.cpu_count() or 1
    return max(1, found // launched.local()[1])
