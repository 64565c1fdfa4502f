"""What "auto" means for a checkpoint: method, layout, device, variant and threads."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from loftq_cli.errors import EnvironmentFailure, LayoutError, UsageError
from loftq_cli.families.experts import LAYOUT, check_layout, is_expert
from loftq_cli.kernels import native
from loftq_cli.layouts import Layout, make_layout
from loftq_cli.layouts.base import Matrix, Surroundings
from loftq_cli.numerics import lowrank
from loftq_cli.numerics.variant import Variant
from loftq_cli.settings.recipe import FIXED_SCALE_METHODS, Settings


def resolve_method(settings: Settings, bits: int) -> str:
    """The method of ``settings`` at that width: auto is nf at 4 bits and uniform at 2, 3 and 8, so
    that a decoder's default output loads in stock transformers (bnb, gptq)."""
    if settings.method != "auto":
        return settings.method
    if settings.layout == "bnb":
        return "nf"
    return "nf" if bits == 4 and settings.layout != "gptq" else "uniform"


def searches_scales(method: str, scale: str) -> bool:
    """Whether scales are searched for; ``scale`` is a setting's, or a recipe's "fixed"."""
    return method == "fitted" or (scale == "mse" and method not in FIXED_SCALE_METHODS)


def choose_variant(device: torch.device, method: str, scale: str, svd: str) -> Variant:
    """The compiled search where there is a compiler and something to search for, and the fastest
    products of the device."""
    return Variant(
        native=searches_scales(method, scale) and device.type == "cpu" and native.available(),
        products=lowrank.fastest_products(device) if svd == "fast" else torch.float32,
    )


def choose_layout(
    settings: Settings, matrices: Sequence[Matrix], surroundings: Surroundings
) -> tuple[str, str | None]:
    """(layout, remark): auto takes what stock consumers load, where it holds every matrix."""
    kinds = {(matrix.method, matrix.bits) for matrix in matrices}
    if any(is_expert(matrix.name) for matrix in matrices):
        if settings.layout == "auto":
            return LAYOUT, f"layout {LAYOUT}, because PEFT adapts experts in floating point only"
        check_layout(settings.layout)
    if settings.layout != "auto":
        wanted = make_layout(settings.layout)
        obstacles = _obstacles(wanted, matrices, surroundings)
        if obstacles:
            raise LayoutError(f"--layout {wanted.name} cannot hold " + "; ".join(obstacles))
        mixed = settings.target_bpw is not None or len(kinds) > 1
        if mixed and not wanted.mixes:
            raise LayoutError(f"--layout {wanted.name} cannot hold matrices of several widths")
        return wanted.name, None
    if settings.target_bpw is not None or len(kinds) > 1:
        return "loftq", "layout loftq, because bnb and gptq hold one width"
    method, bits = kinds.pop()
    if method == "nf" and bits == 4:
        first = "bnb"
    elif method == "uniform" and is_decoder_only(surroundings):
        first = "gptq"
    else:
        return "loftq", None
    if settings.scale_dtype != "float32":
        return "loftq", f"layout loftq, because {first} has no {settings.scale_dtype} scales"
    obstacles = _obstacles(make_layout(first), matrices, surroundings)
    if not obstacles:
        return first, None
    more = f" (and {len(obstacles) - 1} more)" if len(obstacles) > 1 else ""
    return "loftq", f"layout loftq, because {first} cannot hold {obstacles[0]}{more}"


def _obstacles(layout: Layout, matrices: Sequence[Matrix], surroundings: Surroundings) -> list[str]:
    described = layout.cannot_describe(surroundings)
    held = ((matrix.name, layout.cannot_hold(matrix)) for matrix in matrices)
    return ([f"this model: {described}"] if described else []) + [
        f"{name}: {reason}" for name, reason in held if reason
    ]


def is_decoder_only(surroundings: Surroundings) -> bool:
    """Whether config.json names a causal language model with one stack of blocks."""
    config = surroundings.config
    architectures = config.get("architectures") or []
    name = architectures[0] if architectures and isinstance(architectures[0], str) else ""
    causal = name.endswith(("ForCausalLM", "LMHeadModel"))
    return causal and not config.get("is_encoder_decoder") and len(surroundings.stacks) == 1


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise EnvironmentFailure(
                f"--device {name}: torch sees {count} CUDA devices", hint="use --device cpu"
            )
    return device


def count_cpus() -> int:
    """The CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
