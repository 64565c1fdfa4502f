"""``loftq error-report``: how far Q + BA is from W, per layer.

The manifest's figures, or, given the original checkpoint, figures recomputed from the packed bytes
and the original weights, with which the manifest must then agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from loftq_cli.checkpoint.header import HeaderError, read_header
from loftq_cli.checkpoint.locate import locate
from loftq_cli.checkpoint.output import Output, open_output
from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.checkpoint.stored import Stored, read
from loftq_cli.errors import InputError, LoftqError, NonFiniteWeightError, VerificationError
from loftq_cli.layouts import adapter, layout_of
from loftq_cli.layouts.base import matrix_of, turned
from loftq_cli.numerics import native
from loftq_cli.numerics.alternation import decompose
from loftq_cli.numerics.decomposition import Settings
from loftq_cli.numerics.metrics import first_non_finite, squared_norm
from loftq_cli.numerics.quantizers import Scale, make_quantizer
from loftq_cli.numerics.variant import Variant

_FLOAT_DTYPES = ("F32", "F16", "BF16")

WORST = 5
"""How many layers are listed as the worst."""

_TOLERANCE = 1e-4
_ROUNDING = 1e-6
"""What recomputing on another machine may differ by: of the figure, and of the weight's norm."""


@dataclass(frozen=True)
class Norms:
    """Absolute Frobenius norms of one matrix."""

    weight: float
    quantized: float
    final: float


def error_report(directory: Path, source: str | None = None) -> dict[str, Any]:
    """Per-layer residuals, totals and the worst layers.

    With ``source`` every residual but the intermediate steps' is recomputed. Raises InputError for
    a source of another model and VerificationError, with every matrix concerned, where the
    manifest disagrees.
    """
    output = open_output(directory)
    recomputed = None if source is None else recompute(output, source)
    layers = []
    for record in output.records:
        stated = record["frobenius"]
        norms = (
            Norms(stated["weight"], stated["quantized"], stated["final"])
            if recomputed is None
            else recomputed[record["name"]]
        )
        layers.append(_layer(record, norms))
    if recomputed is not None:
        _compare(output, layers)
    totals = _totals(layers)
    weighted = [layer["weighted"] for layer in layers if layer["weighted"] is not None]
    if weighted:
        totals["weighted_residual_quantized"] = _total(weighted, "quantized")
        totals["weighted_residual"] = _total(weighted, "final")
    worst = sorted(layers, key=lambda layer: -layer["relative_residual"])[:WORST]
    return {
        "directory": str(directory),
        "source": source,
        "recomputed": recomputed is not None,
        "layers": layers,
        "totals": totals,
        "worst": [layer["name"] for layer in worst],
    }


def recompute(output: Output, model: str) -> dict[str, Norms]:
    """Norms of every matrix, from the stored bytes and the weights of ``model``."""
    source = locate(model, say=lambda text: None)
    for shard in source.shards:
        source.supply.ensure(shard.name)
    weights = {t.name: (shard.path, t) for shard in source.shards for t in shard.header.tensors}
    stored = _stored_tensors(output)
    norms = {}
    for record in output.records:
        name = record["name"]
        found = weights.get(name)
        matrix = matrix_of(record)
        if found is None or found[1].shape != matrix.stored_shape:
            shape = list(found[1].shape) if found else "no such tensor"
            expected = list(matrix.stored_shape)
            raise InputError(
                f"{model}: tensor {name!r}: {shape}, the conversion was of {expected}",
                hint="give the checkpoint that was converted",
            )
        path, tensor = found
        if tensor.dtype not in _FLOAT_DTYPES:
            raise InputError(
                f"{model}: tensor {name!r} is {tensor.dtype}, not a floating-point matrix",
                hint="give the checkpoint that was converted",
            )
        with TensorFile(path) as file:
            weight = turned(file.read(tensor).float(), matrix.kind).contiguous()
        bad = first_non_finite(weight)
        if bad is not None:
            raise NonFiniteWeightError(f"{model}: tensor {name!r} holds {bad[1]} at {list(bad[0])}")
        norms[name] = _norms(output, record, weight, stored)
    return norms


def _norms(
    output: Output,
    record: Mapping[str, Any],
    weight: torch.Tensor,
    stored: Stored,
) -> Norms:
    recipe = output.manifest["recipe"]
    matrix = matrix_of(record)
    layout = layout_of(record, recipe)
    tensors = {spec.name: read(output.directory, stored, spec) for spec in layout.specs(matrix)}
    adapter_dtype = adapter.stored_dtype(recipe["adapter_dtype"], matrix.dtype)
    first, second = (
        read(output.directory, stored, spec)
        for spec in adapter.specs(matrix, record["rank"], adapter_dtype)
    )
    lora_A, lora_B = adapter.sides(matrix, first, second)
    alpha = recipe["lora_alpha"]
    scaling = 1.0 if alpha is None else alpha / record["rank"]
    residual = weight - layout.decode(matrix, tensors)
    residual.addmm_(lora_B.float() * scaling, lora_A.float(), alpha=-1)
    final = math.sqrt(squared_norm(residual))
    quantizer = make_quantizer(
        matrix.method,
        matrix.bits,
        matrix.block_size,
        cast(Scale, recipe["scale"]),
        layout.scale_dtype,
        native=Variant.parse(recipe["kernels"]).native and native.available(),
    )
    settings = Settings(
        rank=1,
        iters=0,
        backbone_dtype=layout.rounding(matrix),
        scale_dtype=recipe.get("scale_dtype", "float32"),
    )
    try:
        plain = decompose(weight, quantizer, settings)
    except LoftqError as error:  # the weights that were converted could be quantized
        raise InputError(
            f"tensor {matrix.name!r}: {error.message}",
            hint="give the checkpoint that was converted",
        ) from error
    return Norms(plain.weight_norm, plain.quantized_norm, final)


def _stored_tensors(output: Output) -> Stored:
    stored = {}
    for entry in output.manifest["outputs"]:
        if entry["name"].endswith(".safetensors"):
            path = output.directory / entry["name"]
            try:
                header = read_header(path)
            except (HeaderError, OSError) as error:
                raise VerificationError(f"{path}: {error}") from error
            stored.update({tensor.name: (path, tensor) for tensor in header.tensors})
    return stored


def _compare(output: Output, layers: Sequence[Mapping[str, Any]]) -> None:
    """Raise VerificationError where the manifest disagrees with the recomputed ``layers``, or with
    itself."""
    wrong = []
    for record, layer in zip(output.records, layers, strict=True):
        stated = record["frobenius"]
        figures = {name: (stated[name], layer[name]) for name in ("weight", "quantized", "final")}
        if record["step"] > 0:
            kept = stated["steps"][record["step"] - 1 : record["step"]]
            figures[f"step {record['step']}"] = (kept[0] if kept else math.nan, layer["final"])
        rounding = _ROUNDING * layer["weight"]
        wrong += [f"{record['name']}: {fault}" for fault in _differences(figures, rounding)]
    stated = output.manifest["totals"]
    figures = {name: (stated[name], value) for name, value in _totals(layers).items()}
    wrong += [f"totals: {fault}" for fault in _differences(figures, _ROUNDING)]
    if wrong:
        raise VerificationError(f"{output.directory}: the manifest disagrees: " + "; ".join(wrong))


def _differences(figures: Mapping[str, tuple[float, float]], rounding: float) -> list[str]:
    """What differs in (stated, recomputed) ``figures`` by more than rounding explains."""
    return [
        f"{name} {actual:.6g}, the manifest says {stated:.6g}"
        for name, (stated, actual) in figures.items()
        if not abs(stated - actual) <= _TOLERANCE * actual + rounding  # NaN differs
    ]


def _totals(layers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {
        "relative_residual": _total(layers, "final"),
        "relative_residual_quantized": _total(layers, "quantized"),
    }


def _layer(record: Mapping[str, Any], norms: Norms) -> dict[str, Any]:
    weight = norms.weight or 1.0
    return {
        "name": record["name"],
        "shape": record["shape"],
        "bits": record["bits"],
        "rank": record["rank"],
        "step": record["step"],
        "weight": norms.weight,
        "quantized": norms.quantized,
        "steps": record["frobenius"]["steps"],
        "final": norms.final,
        "relative_residual": norms.final / weight,
        "relative_residual_quantized": norms.quantized / weight,
        "ratio": norms.final / norms.quantized if norms.quantized else 1.0,
        "weighted": record.get("weighted"),
    }


def _total(layers: Sequence[Mapping[str, Any]], which: str) -> float:
    weight = math.fsum(layer["weight"] ** 2 for layer in layers)
    return math.sqrt(math.fsum(layer[which] ** 2 for layer in layers) / weight) if weight else 0.0
