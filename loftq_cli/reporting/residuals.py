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

from loftq_cli.checkpoint.header import HeaderError, StoredTensor, read_header
from loftq_cli.checkpoint.locate import locate
from loftq_cli.checkpoint.reader import TORCH_DTYPES, TensorFile
from loftq_cli.errors import InputError, VerificationError
from loftq_cli.layouts import adapter, make_layout
from loftq_cli.numerics.alternation import Settings, decompose
from loftq_cli.numerics.metrics import squared_norm
from loftq_cli.numerics.quantizers import Scale, make_quantizer
from loftq_cli.reporting.output import Output, matrix_of, open_output

WORST = 5
"""How many layers are listed as the worst."""

_TOLERANCE = 1e-4
"""Of the weight's norm: what recomputing on another machine may differ by."""


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
        _compare(output, recomputed)
    totals = {
        "relative_residual": _total(layers, "final"),
        "relative_residual_quantized": _total(layers, "quantized"),
    }
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
    weights = {t.name: (shard.path, t) for shard in source.shards for t in shard.header.tensors}
    stored = _stored_tensors(output)
    norms = {}
    for record in output.records:
        name = record["name"]
        found = weights.get(name)
        if found is None or list(found[1].shape) != record["shape"]:
            shape = list(found[1].shape) if found else "no such tensor"
            raise InputError(
                f"{model}: tensor {name!r}: {shape}, the conversion was of {record['shape']}",
                hint="give the checkpoint that was converted",
            )
        path, tensor = found
        with TensorFile(path) as file:
            weight = file.read(tensor).float()
        norms[name] = _norms(output, record, weight, stored)
    return norms


def _norms(
    output: Output,
    record: Mapping[str, Any],
    weight: torch.Tensor,
    stored: Mapping[str, tuple[Path, StoredTensor]],
) -> Norms:
    recipe = output.manifest["recipe"]
    matrix = matrix_of(record)
    layout = make_layout(record["layout"], recipe["dense_dtype"])
    specs = layout.specs(matrix)
    tensors = {spec.name: _read(output, stored, spec.name) for spec in specs}
    name_a, name_b = adapter.names(matrix.module)
    lora_A, lora_B = _read(output, stored, name_a), _read(output, stored, name_b)
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
    )
    plain = decompose(
        weight, quantizer, Settings(rank=1, iters=0, backbone_dtype=layout.rounding(matrix))
    )
    return Norms(plain.weight_norm, plain.quantized_norm, final)


def _stored_tensors(output: Output) -> dict[str, tuple[Path, StoredTensor]]:
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


def _read(
    output: Output, stored: Mapping[str, tuple[Path, StoredTensor]], name: str
) -> torch.Tensor:
    if name not in stored:
        raise VerificationError(f"{output.directory}: tensor {name!r} is missing")
    path, tensor = stored[name]
    if tensor.dtype in TORCH_DTYPES:
        with TensorFile(path) as file:
            return file.read(tensor)
    raise VerificationError(f"{path}: tensor {name!r} has dtype {tensor.dtype}")


def _compare(output: Output, recomputed: Mapping[str, Norms]) -> None:
    wrong = []
    for record in output.records:
        stated, actual = record["frobenius"], recomputed[record["name"]]
        allowed = _TOLERANCE * max(actual.weight, stated["weight"])
        for field in ("weight", "quantized", "final"):
            value = getattr(actual, field)
            if not abs(stated[field] - value) <= allowed:
                wrong.append(
                    f"{record['name']}: {field} {value:.6g}, the manifest says {stated[field]:.6g}"
                )
    if wrong:
        raise VerificationError(f"{output.directory}: the manifest disagrees: " + "; ".join(wrong))


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
    }


def _total(layers: Sequence[Mapping[str, Any]], which: str) -> float:
    weight = math.fsum(layer["weight"] ** 2 for layer in layers)
    return math.sqrt(math.fsum(layer[which] ** 2 for layer in layers) / weight) if weight else 0.0
