"""docs/output-format.md: its examples run, and it leaves no field out."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loftq_cli.checkpoint.output import FORMAT_VERSION as MANIFEST_VERSION
from loftq_cli.checkpoint.packing import pack, unpack
from loftq_cli.checkpoint.schema import manifest_schema
from loftq_cli.layouts.base import matrix_of
from loftq_cli.layouts.loftq import FORMAT_VERSION
from loftq_cli.layouts.registry import layout_of
from loftq_cli.numerics.quantizers.methods import WIDTHS
from loftq_cli.settings.recipe import fingerprint
from loftq_cli.settings.table import BLOCK_SIZES
from tests.reporting.conftest import CASES

LOFTQ = (
    "loftq",
    "loftq-affine",
    "loftq-trellis",
    "loftq-bfloat16",
    "loftq-int8",
    "loftq-affine-int8",
)
DOCUMENT = (Path(__file__).parents[2] / "docs" / "output-format.md").read_text("utf-8")


def block(language: str) -> str:
    """The only code block in ``language``."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    return found


def test_the_worked_example_of_packing():
    rows = {
        label: value.split("(")[0].split()
        for label, value in re.findall(r"(\w+) +(.+)", block("text"))
    }
    codes = [int(code) for code in rows["codes"]]
    packed = pack(torch.tensor(codes, dtype=torch.uint8), 3)
    assert [f"{byte:02X}" for byte in packed.tolist()] == rows["hex"]
    assert [f"{byte:08b}"[::-1] for byte in packed.tolist()] == rows["bytes"]
    assert [f"{code:03b}"[::-1] for code in codes] == rows["stream"]
    assert unpack(packed, 3, len(codes)).tolist() == codes


@pytest.mark.parametrize("case", [*LOFTQ, "loftq-tensor", "clamped"])
def test_the_decoder_that_it_shows_decodes(case, converted):
    names: dict[str, Any] = {}
    exec(block("python"), names)
    tensors = load_file(converted(case) / "model.safetensors")
    config = json.loads((converted(case) / "config.json").read_text())["quantization_config"]
    manifest = json.loads((converted(case) / "loftq_manifest.json").read_text())
    assert {record["module"] for record in manifest["matrices"]} == set(config["modules"])
    for record in manifest["matrices"]:
        name, matrix = record["name"], matrix_of(record)
        parts: dict[str, Any] = {
            part: tensors[f"{name}_{part}"].tolist()
            for part in ("scales", "scale_steps", "levels", "zeros")
            if f"{name}_{part}" in tensors
        }
        if "zeros" in parts:
            parts["zeros"] = bytes(parts["zeros"])
        entry = config["modules"][record["module"]]
        flat = names["decode"](matrix.shape, entry, bytes(tensors[name].tolist()), **parts)
        expected = torch.tensor(flat).view(matrix.shape)
        layout = layout_of(record, manifest["recipe"])
        assert torch.equal(layout.decode(matrix, tensors), expected)


def test_the_example_of_the_config_is_one():
    config = json.loads("{" + block("json") + "}")["quantization_config"]
    assert config["format_version"] == FORMAT_VERSION
    for entry in config["modules"].values():
        assert entry["bits"] in WIDTHS
        assert entry["block_size"] in BLOCK_SIZES


def fields(schema: dict[str, Any]) -> Iterator[str]:
    for name, inner in schema.get("properties", {}).items():
        yield name
        yield from fields(inner)
    if "items" in schema:
        yield from fields(schema["items"])


@pytest.mark.parametrize("name", sorted(set(fields(manifest_schema()))))
def test_every_field_of_the_manifest_is_explained(name):
    assert re.search(rf"`(?:\w+\.)?{name}[`.]", DOCUMENT)


@pytest.mark.parametrize("case", ["bnb", "gptq", *LOFTQ, "dense"])
def test_every_tensor_of_a_layout_is_explained(case, converted):
    manifest = json.loads((converted(case) / "loftq_manifest.json").read_text())
    (record, *_) = manifest["matrices"]
    for name in load_file(converted(case) / "model.safetensors"):
        if name.startswith(f"{record['module']}."):
            assert f"`X.{name.removeprefix(record['module']).lstrip('.')}`" in DOCUMENT


@pytest.mark.parametrize("case", CASES)
def test_the_fingerprint_is_computed_as_it_says(case, converted, source):
    manifest = json.loads((converted(case) / "loftq_manifest.json").read_text())
    sources = []
    for file in manifest["source"]["files"]:
        content = (source(case) / file["name"]).read_bytes()
        if file["name"].endswith(".safetensors"):
            content = content[: 8 + int.from_bytes(content[:8], "little")]
        sources.append((file["name"], file["size"], hashlib.sha256(content).hexdigest()))
    assert fingerprint(manifest["recipe"], sources) == manifest["fingerprint"]


def test_it_names_the_versions():
    assert f"Format version {MANIFEST_VERSION} of the manifest" in DOCUMENT
    assert f"format version {FORMAT_VERSION} of the layout `loftq`" in DOCUMENT
