"""Packed modules whose tensors come from another container than layout ``loftq``.

Such a module waits with the names, dtypes and shapes that the container has, so that transformers
fills it as it fills any; then the codes are taken over, and it is as if they had come in layout
``loftq``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from loftq_cli.checkpoint.dtypes import torch_dtype
from loftq_cli.layouts.base import Layout, Matrix, matrix_of
from loftq_cli.layouts.registry import make_layout
from loftq_cli.loading.packed_weight import PackedWeight
from loftq_cli.numerics.quantizers.methods import method

CONTAINER = "container"
"""The key of an entry of ``modules`` that holds the layout and the matrix of such a module."""


def contained_modules(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """``modules`` of a LoftqConfig for an output whose layout packs, as its ``manifest`` has it."""
    recipe = manifest["recipe"]
    modules = {}
    for record in manifest["matrices"]:
        matrix = matrix_of(record)
        modules[matrix.module] = {
            "bits": matrix.bits,
            "block_size": matrix.block_size,
            "decoding": method(matrix.method).decoding,
            CONTAINER: (make_layout(record["layout"], recipe), matrix),
        }
    return modules


def wait(module: PackedWeight, layout: Layout, matrix: Matrix) -> None:
    """Give ``module`` the tensors of ``matrix`` in ``layout``, on the meta device."""
    module.let_go()
    for spec in layout.specs(matrix):
        empty = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device="meta")
        module.register_buffer(_leaf(spec.name, matrix), empty)


def take_over_all(model: nn.Module, modules: Mapping[str, dict[str, Any]]) -> None:
    """Put the packed form of the tensors that modules waited for in their place; their entries in
    ``modules`` are then those of layout ``loftq``. Raises CorruptFileError if the values make no
    sense."""
    for name, entry in modules.items():
        module = model.get_submodule(name)
        if CONTAINER in entry and isinstance(module, PackedWeight):
            _take_over(module, *entry.pop(CONTAINER))


def _take_over(module: PackedWeight, layout: Layout, matrix: Matrix) -> None:
    stored = {spec.name: _leaf(spec.name, matrix) for spec in layout.specs(matrix)}
    packed = layout.packed(matrix, {name: getattr(module, leaf) for name, leaf in stored.items()})
    for leaf in stored.values():
        delattr(module, leaf)
    module.take(packed)


def waiting(model: nn.Module, modules: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of tensors that a module of ``modules`` waits for and that were not filled; what lies
    on disk, offloaded, was not either."""
    missing = []
    for name, entry in modules.items():
        if CONTAINER not in entry:
            continue
        layout, matrix = entry[CONTAINER]
        for spec in layout.specs(matrix):
            leaf = _leaf(spec.name, matrix)
            if getattr(model.get_submodule(name), leaf).is_meta:
                missing.append(f"{name}.{leaf}")
    return missing


def _leaf(name: str, matrix: Matrix) -> str:
    return name.removeprefix(f"{matrix.module}.")
