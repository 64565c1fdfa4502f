"""``loftq inspect``: what an output holds, from its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from loftq_cli.checkpoint import dtypes
from loftq_cli.checkpoint.dtypes import BITS
from loftq_cli.checkpoint.locate import Place
from loftq_cli.checkpoint.output import Output, open_output
from loftq_cli.checkpoint.small_file import read_json
from loftq_cli.checkpoint.source import CONFIG
from loftq_cli.errors import InputError
from loftq_cli.families.classes import auto_class, brings_code
from loftq_cli.layouts import adapter
from loftq_cli.layouts.base import matrix_of
from loftq_cli.layouts.needs import needs
from loftq_cli.layouts.registry import layout_class
from loftq_cli.loading.intact import verified
from loftq_cli.loading.trained_beside import trained_beside


def inspect(place: Place, *, verify: bool = False) -> dict[str, Any]:
    """Totals, per-layer table and loading snippet of the conversion in ``place``.

    ``verify`` re-hashes every file. Raises InputError or VerificationError.
    """
    output, repository = open_output(place.directory), place.repository
    left = trained_beside(output)
    hashed = verified(output) if verify else None
    manifest = output.manifest
    layers = [_layer(record, manifest["recipe"]) for record in output.records]
    elements = sum(layer["shape"][0] * layer["shape"][1] for layer in layers)
    adapter_bits = sum(layer["adapter_bytes"] for layer in layers) * 8
    totals = dict(manifest["totals"])
    totals["bits_per_weight_with_adapter"] = totals["bits_per_weight"] + adapter_bits / elements
    totals["output_bytes"] = sum(entry["size"] for entry in manifest["outputs"])
    return {
        "directory": str(place.directory),
        "repository": repository and asdict(repository),
        "format_version": manifest["format_version"],
        "tool": manifest["tool"],
        "source": {key: value for key, value in manifest["source"].items() if key != "files"},
        "recipe": manifest["recipe"],
        "fingerprint": manifest["fingerprint"],
        "totals": totals,
        "layers": layers,
        "passed_through": len(manifest["passed_through"]),
        **{key: manifest[key] for key in ("backbone", "refined") if key in manifest},
        **({} if left is None else {"trained_adapter": str(left)}),
        "verified_files": hashed,
        "needs": needs(layers[0]["layout"]),
        "loading": snippet(
            output, None if repository is None else repository.repo_id, place.revision
        ),
    }


def snippet(output: Output, place: str | None = None, revision: str | None = None) -> str:
    """Python that loads the backbone and attaches the adapter, if there is one, for training, from
    ``place``, by default the output's directory, or from a ``revision`` of it if it is on the
    hub."""
    if not output.has_backbone:
        return _of_adapter(output, place or str(output.directory), revision)
    place = place or str(output.directory)
    at = "" if revision is None else f", revision={revision!r}"
    runs = ", trust_remote_code=True" if brings_code(_config(output)) else ""
    layouts = [layout_class(record["layout"]) for record in output.records]
    if any(layout.packs for layout in layouts):
        return f"import loftq_cli\n\nmodel = loftq_cli.load({place!r}{at}{runs})"
    registers = any("loftq_cli" in layout.imports for layout in layouts)
    loaded = auto_class(_config(output))
    backbone = (
        f"from transformers import {loaded}\n\n"
        f"model = {loaded}.from_pretrained({place!r}{at}{runs})"
    )
    first = "import loftq_cli\n" if registers else ""
    if not output.has_adapter:
        return first + ("\n" if registers else "") + backbone
    return (
        f"{first}from peft import PeftModel\n{backbone}\n"
        f"model = PeftModel.from_pretrained(model, {place!r}{at}, "
        'subfolder="loftq_init", is_trainable=True)'
    )


def _of_adapter(output: Output, place: str, revision: str | None) -> str:
    """Python that loads the backbone from where it is, and the adapter from ``place``."""
    backbone = output.manifest["backbone"]
    base = output.manifest["recipe"]["base_model"] or backbone["id"]
    commit = "" if backbone["revision"] is None else f", revision={backbone['revision']!r}"
    at = "" if revision is None else f", revision={revision!r}"
    loaded = backbone["class"]
    return (
        f"from peft import PeftModel\nfrom transformers import {loaded}\n\n"
        f"model = {loaded}.from_pretrained({base!r}{commit})\n"
        f"model = PeftModel.from_pretrained(model, {place!r}{at}, is_trainable=True)"
    )


def _layer(record: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    rows, columns = record["shape"]
    elements = rows * columns
    adapter_dtype = dtypes.resolve(recipe["adapter_dtype"], record["dtype"])
    specs = adapter.specs(matrix_of(record), record["rank"], adapter_dtype)
    adapter_bytes = sum(spec.nbytes for spec in specs)
    norms = record["frobenius"]
    weight = norms["weight"] or 1.0
    return {
        "name": record["name"],
        "shape": [rows, columns],
        "dtype": record["dtype"],
        "method": record["method"],
        "bits": record["bits"],
        "block_size": record["block_size"],
        "rank": record["rank"],
        "layout": record["layout"],
        "bits_per_weight": record["bits_per_weight"],
        "bits_per_weight_with_adapter": record["bits_per_weight"] + adapter_bytes * 8 / elements,
        "source_bytes": elements * BITS[record["dtype"]] // 8,
        "backbone_bytes": round(record["bits_per_weight"] * elements / 8),
        "adapter_bytes": adapter_bytes,
        "relative_residual": norms["final"] / weight,
        "relative_residual_quantized": norms["quantized"] / weight,
    }


def _config(output: Output) -> Mapping[str, Any]:
    """What config.json says, nothing if it cannot be read."""
    try:
        return read_json(output.directory / CONFIG).content
    except InputError:
        return {}
