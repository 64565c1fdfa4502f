"""Unusual shapes and values, in every method and width: what is loaded is what was stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file

import loftq_cli
from loftq_cli.errors import LayoutError, ScaleRangeError
from tests.support import plain_layouts as plain
from tests.whole.interop import odd_matrices
from tests.whole.interop.odd_matrices import OddModel

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
]

METHODS = ("nf", "nf-symmetric", "fitted", "uniform", "uniform-block", "uniform-tensor")
RECIPES: list[dict[str, Any]] = [
    *({"method": method, "bits": bits} for method in METHODS for bits in (2, 3, 4)),
    *({"method": method, "bits": 8} for method in METHODS if method != "fitted"),
    *(
        {"method": method, "bits": 2, "scale_dtype": scales}
        for method in ("nf", "uniform")
        for scales in ("bfloat16", "int8")
    ),
]
RANK = 8
BEYOND_FLOAT16 = ("tiny", "huge", "tiny to huge")


def convert(weights: dict[str, torch.Tensor], work: Path, **settings: Any) -> dict[str, Any]:
    """The manifest of a conversion to ``work / "out"``, every residual of which is recomputed."""
    source = odd_matrices.write(work / "source", weights)
    settings = {"rank": RANK, "iters": 2, "threads": 1, **settings}
    manifest = loftq_cli.convert(source, output=work / "out", **settings)
    assert loftq_cli.error_report(work / "out", source=source)["recomputed"]
    records = sorted(manifest["matrices"], key=lambda record: int(record["module"].split(".")[1]))
    assert len(records) == len(weights)
    for name, record in zip(weights, records, strict=True):
        assert record["rank"] == min(RANK, *record["shape"])
        norms = record["frobenius"]
        assert norms["final"] <= norms["weight"] * (1 + 1e-6), name
    return {**manifest, "matrices": records}


def backbone(output: Path, record: dict[str, Any]) -> torch.Tensor:
    """Q, float32, of layouts loftq, gptq and dense, decoded one code at a time."""
    tensors, module = load_file(output / "model.safetensors"), record["module"]
    if record["layout"] == "dense":
        return tensors[record["name"]]
    if record["layout"] == "gptq":
        return torch.tensor(plain.gptq(tensors, module, record["bits"]))
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    entry = config["modules"][module]
    return torch.tensor(plain.loftq(tensors, record["name"], tuple(record["shape"]), entry))


def product(output: Path, record: dict[str, Any]) -> torch.Tensor:
    """B A, float64."""
    pairs = load_file(output / "loftq_init" / "adapter_model.safetensors")
    a, b = (pairs[f"base_model.model.{record['module']}.lora_{side}.weight"] for side in "AB")
    return b.double() @ a.double()


def check_computes(layer: Any, q: torch.Tensor, added: torch.Tensor, name: str) -> None:
    """``layer`` multiplies by Q + B A, as far as float32 can."""
    given = torch.randn(3, q.shape[1])
    with torch.no_grad():
        found = layer(given)
    assert found.isfinite().all(), name
    wanted = given.double() @ (q.double() + added).T
    largest = (given.double().abs() @ (q.double().abs() + added.abs()).T).max()
    assert (found - wanted).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize(
    "settings",
    [{**recipe, "layout": "loftq"} for recipe in RECIPES]
    + [{"method": method, "bits": 3, "layout": "dense"} for method in METHODS],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_the_loaded_model_is_q_plus_the_adapter(settings: dict[str, Any], tmp_path: Path) -> None:
    weights = {**odd_matrices.shapes(), **odd_matrices.values(7, 100)}
    records = convert(weights, tmp_path, **settings)["matrices"]
    model = loftq_cli.load(tmp_path / "out", auto_class=OddModel).eval().get_base_model()
    for name, layer, record in zip(weights, model.layers, records, strict=True):
        q = backbone(tmp_path / "out", record)
        base = layer.base_layer
        assert torch.equal(base.dequantize() if settings["layout"] == "loftq" else base.weight, q)
        check_computes(layer, q, product(tmp_path / "out", record), name)


def test_layout_bnb_holds_the_same_values_in_rows_of_whole_blocks(tmp_path: Path) -> None:
    weights = odd_matrices.values(7, 128)
    records = convert(weights, tmp_path, bits=4, layout="bnb")["matrices"]
    model = loftq_cli.load(tmp_path / "out", auto_class=OddModel).train().get_base_model()
    for name, layer, record in zip(weights, model.layers, records, strict=True):
        held = layer.base_layer.weight
        q = bitsandbytes.functional.dequantize_4bit(held.data, held.quant_state)
        check_computes(layer, q, product(tmp_path / "out", record), name)


def test_layout_bnb_names_every_other_shape(tmp_path: Path) -> None:
    weights = odd_matrices.shapes()
    with pytest.raises(LayoutError) as refused:
        convert(weights, tmp_path, bits=4, layout="bnb")
    for number, weight in enumerate(weights.values()):
        named = f"layers.{number}.weight" in str(refused.value)
        assert named == (weight.shape[1] % 64 != 0), str(refused.value)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_layout_gptq_holds_what_fits_float16(bits: int, tmp_path: Path) -> None:
    weights = odd_matrices.values(32, 128)
    fitting = {name: weight for name, weight in weights.items() if name not in BEYOND_FLOAT16}
    manifest = convert(fitting, tmp_path, bits=bits, method="uniform", layout="gptq")
    for weight, record in zip(fitting.values(), manifest["matrices"], strict=True):
        q = backbone(tmp_path / "out", record)
        residual = (weight.double() - q - product(tmp_path / "out", record)).norm()
        final = record["frobenius"]["final"]
        assert residual == pytest.approx(final, rel=1e-6, abs=1e-7 * float(weight.norm()))


@pytest.mark.parametrize("name", BEYOND_FLOAT16)
def test_layout_gptq_refuses_what_does_not_fit_and_auto_takes_another(
    name: str, tmp_path: Path
) -> None:
    weights = {name: odd_matrices.values(32, 128)[name]}
    settings = {"bits": 4, "method": "uniform"}
    with pytest.raises(ScaleRangeError, match=r"layers\.0\.weight"):
        convert(weights, tmp_path / "asked", layout="gptq", **settings)
    manifest = convert(weights, tmp_path / "auto", layout="auto", **settings)
    assert {record["layout"] for record in manifest["matrices"]} == {"loftq"}
