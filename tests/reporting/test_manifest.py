"""The manifest: as its schema says, and true of the files."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import loftq_cli
from loftq_cli.checkpoint.schema import faults, manifest_schema
from tests.reporting.conftest import CASES
from tests.support.makers import PROPERTY

SCHEMA = json.loads((Path(loftq_cli.__file__).parent / "manifest.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
every_case = pytest.mark.parametrize("case", CASES)


def manifest_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "loftq_manifest.json").read_text("utf-8"))


def tensors_of(directory: Path, pattern: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(directory.glob(pattern)):
        found |= load_file(path)
    return found


def test_the_schema_is_one_and_allows_nothing_unsaid():
    VALIDATOR.check_schema(SCHEMA)
    assert manifest_schema() == SCHEMA
    objects = [schema for schema in subschemas(SCHEMA) if schema.get("type") == "object"]
    assert len(objects) > 10
    for schema in objects:
        assert schema["additionalProperties"] is False
        assert set(schema["required"]) <= set(schema["properties"])


def subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
        for item in schema.values():
            yield from subschemas(item)


@every_case
def test_a_conversions_manifest_is_valid(case, converted):
    manifest = manifest_of(converted(case))
    VALIDATOR.validate(manifest)
    assert list(faults(manifest, SCHEMA)) == []


@every_case
def test_it_is_utf8_with_sorted_keys(case, converted):
    text = (converted(case) / "loftq_manifest.json").read_text("utf-8")
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


@every_case
def test_files_are_listed_with_their_sizes_and_hashes(case, converted, source):
    output, manifest = converted(case), manifest_of(converted(case))

    def listing(directory: Path, paths: list[Path]) -> list[dict[str, Any]]:
        return [
            {
                "name": path.relative_to(directory).as_posix(),
                "size": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path in sorted(paths)
        ]

    files = [path for path in output.rglob("*") if path.is_file()]
    files.remove(output / "loftq_manifest.json")
    assert manifest["outputs"] == listing(output, files)
    assert manifest["source"]["files"] == listing(source(case), list(source(case).iterdir()))


@every_case
def test_totals_are_those_of_the_tensors(case, converted, source):
    manifest = manifest_of(converted(case))
    before = tensors_of(source(case), "*.safetensors")
    backbone = tensors_of(converted(case), "*.safetensors")
    adapter = tensors_of(converted(case), "loftq_init/*.safetensors")
    kept = {entry["name"] for entry in manifest["passed_through"]}
    names = {record["name"] for record in manifest["matrices"]}
    assert names | kept == set(before)
    assert not names & kept

    def nbytes(tensors: dict[str, Any]) -> int:
        return sum(tensor.nbytes for tensor in tensors.values())

    stored = nbytes({name: tensor for name, tensor in backbone.items() if name not in kept})
    weights = sum(before[name].numel() for name in names)
    totals = manifest["totals"]
    assert totals["parameters"] == sum(tensor.numel() for tensor in before.values())
    assert totals["source_bytes"] == nbytes(before)
    assert totals["backbone_bytes"] == nbytes(backbone)
    assert totals["adapter_bytes"] == nbytes(adapter)
    assert totals["bits_per_weight"] == pytest.approx(stored * 8 / weights, rel=1e-12)
    for record in manifest["matrices"]:
        assert record["shape"] == list(before[record["name"]].shape)
        prefix = f"base_model.model.{record['module']}"
        assert adapter[f"{prefix}.lora_A.weight"].shape == (record["rank"], record["shape"][1])
        assert adapter[f"{prefix}.lora_B.weight"].shape == (record["shape"][0], record["rank"])
    for entry in manifest["passed_through"]:
        assert entry["shape"] == list(backbone[entry["name"]].shape)
        assert entry["reason"]


@every_case
def test_residuals_are_consistent(case, converted):
    manifest = manifest_of(converted(case))
    squares: dict[str, list[float]] = {"weight": [], "quantized": [], "final": []}
    for record in manifest["matrices"]:
        norms = record["frobenius"]
        assert len(norms["steps"]) == manifest["recipe"]["iters"]
        assert 0 <= norms["final"] <= norms["weight"]
        if record["step"] == 0:
            assert norms["final"] == norms["quantized"]
        else:
            assert norms["final"] == norms["steps"][record["step"] - 1]
        for name, values in squares.items():
            values.append(norms[name] ** 2)
    weight, totals = math.fsum(squares["weight"]), manifest["totals"]
    for name, which in (
        ("relative_residual", "final"),
        ("relative_residual_quantized", "quantized"),
    ):
        expected = math.sqrt(math.fsum(squares[which]) / weight)
        assert totals[name] == pytest.approx(expected, rel=1e-12)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside ``value``."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def mutate(data: st.DataObject, manifest: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``manifest`` with one value replaced, removed or added."""
    changed = copy.deepcopy(manifest)
    *path, key = data.draw(st.sampled_from(list(places(manifest))), "place")
    holder = changed
    for step in path:
        holder = holder[step]
    what = data.draw(st.sampled_from(["replace", "remove", "add"]), "what")
    if what == "remove":
        del holder[key]
    elif what == "add" and isinstance(holder, dict):
        holder["surplus"] = 1
    else:
        holder[key] = data.draw(
            st.sampled_from([None, True, -1, 0, 1, 1.5, -0.5, "", "0" * 64, "x\n", [], [1, 2], {}]),
            "value",
        )
    return changed


@PROPERTY
@given(data=st.data())
def test_our_checker_agrees_with_jsonschema(converted, data):
    changed = mutate(data, manifest_of(converted("bnb")))
    assert (not list(faults(changed, SCHEMA))) == VALIDATOR.is_valid(changed)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"fingerprint": "0" * 63}, "fingerprint: '0"),
        ({"fingerprint": "0" * 64 + "\n"}, "does not match"),
        ({"tool": {"name": "loftq-cli"}}, "tool.version: missing"),
        ({"surplus": 1}, "'surplus': not a field that this version knows"),
        ({"matrices": []}, "matrices: fewer than 1 entries"),
        ({"passed_through": {}}, "passed_through: {} is not array"),
        ({"format_version": 1.0}, "format_version: 1.0 is not one of 1"),
        ({"format_version": True}, "format_version: True is not one of 1"),
    ],
)
def test_faults_name_the_place(converted, change, fault):
    found = list(faults({**manifest_of(converted("bnb")), **change}, SCHEMA))
    assert len(found) == 1
    assert fault in found[0]


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), 1e51, 10**400, -1, "1", None, True],
    ids=lambda v: str(v)[:9],
)
def test_norms_are_finite_numbers(converted, value):
    manifest = manifest_of(converted("bnb"))
    manifest["matrices"][0]["frobenius"]["final"] = value
    found = list(faults(manifest, SCHEMA))
    assert found
    assert all(fault.startswith("matrices[0].frobenius.final: ") for fault in found)


def test_activation_weighted_residuals_have_their_place(converted):
    manifest = manifest_of(converted("bnb"))
    record = manifest["matrices"][0]
    record["weighted"] = {**record["frobenius"], "kind": "diagonal"}
    VALIDATOR.validate(manifest)
    assert list(faults(manifest, SCHEMA)) == []
