"""Every dtype, odd shape and odd value: converted, passed through or refused, in every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loftq_cli
from loftq_cli.checkpoint.dtypes import BITS, FLOATS
from loftq_cli.errors import NonFiniteWeightError, UnsupportedInputError
from tests.support import checkpoints
from tests.support.makers import container, entry

SETTINGS: dict[str, Any] = {"rank": 4, "iters": 1, "threads": 1}
LAYOUTS = [("bnb", 4, "nf"), ("gptq", 2, "uniform"), ("loftq", 3, "nf"), ("dense", 2, "nf")]
CONVERTED = tuple(FLOATS)
REFUSED = tuple(tag for tag in BITS if tag.startswith(("F4", "F6_", "F8_")))
NAME = "model.layers.0.self_attn.q_proj.weight"

every_layout = pytest.mark.parametrize(("layout", "bits", "method"), LAYOUTS)


def source(tmp_path, tag, name=NAME):
    """A checkpoint of one good matrix and one of ``tag``, 64 x 64, every byte of it 1."""
    good = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    size, middle = 64 * 64 * 4, 64 * 64 * BITS[tag] // 8
    header = {
        "model.layers.0.self_attn.k_proj.weight": entry("F32", [64, 64], 0, size),
        name: entry(tag, [64, 64], size, size + middle),
    }
    directory = checkpoints.write(tmp_path / "source", {})
    content = container(header, good.numpy().tobytes() + bytes([1]) * middle)
    (directory / "model.safetensors").write_bytes(content)
    return directory


@pytest.mark.parametrize("tag", BITS)
def test_every_tag_of_the_format_is_converted_passed_through_or_refused(tmp_path, tag):
    directory = source(tmp_path, tag)
    if tag in REFUSED:
        with pytest.raises(UnsupportedInputError, match=rf"{NAME!r} is {tag}"):
            loftq_cli.convert(directory, tmp_path / "out", bits=4, **SETTINGS)
        assert {path.name for path in tmp_path.iterdir()} == {"source"}
        return
    manifest = loftq_cli.convert(directory, tmp_path / "out", bits=4, **SETTINGS)
    converted = {record["name"]: record["dtype"] for record in manifest["matrices"]}
    if tag in CONVERTED:
        assert converted[NAME] == tag
        return
    assert NAME not in converted
    (kept,) = manifest["passed_through"]
    assert (kept["name"], kept["dtype"], kept["reason"]) == (NAME, tag, f"dtype {tag}")
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert bytes([1]) * (64 * 64 * BITS[tag] // 8) in content


@every_layout
@pytest.mark.parametrize(
    "shape", [(1, 64), (32, 64), (64, 1), (3, 5), (5, 64), (64, 100), (7, 127), (32, 96), (33, 160)]
)
def test_any_shape_is_held_or_refused_by_name(tmp_path, layout, bits, method, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    directory = checkpoints.write(tmp_path / "source", {NAME: weight})
    fits = {
        "bnb": shape[1] % 64 == 0,
        "gptq": shape[0] * bits % 32 == 0 and shape[1] * bits % 32 == 0,
    }
    if not fits.get(layout, True):
        with pytest.raises(loftq_cli.errors.LayoutError, match=NAME):
            loftq_cli.convert(
                directory, tmp_path / "out", layout=layout, bits=bits, method=method, **SETTINGS
            )
        return
    manifest = loftq_cli.convert(
        directory, tmp_path / "out", layout=layout, bits=bits, method=method, **SETTINGS
    )
    (record,) = manifest["matrices"]
    assert record["shape"] == list(shape)
    # Recomputed from the stored bytes; the adapter of a thin matrix is exact but for its dtype.
    report = loftq_cli.error_report(tmp_path / "out", directory)
    if min(shape) <= SETTINGS["rank"]:
        assert report["totals"]["relative_residual"] < 1e-4


VALUES = {
    "zeros": torch.zeros(64, 64),
    "subnormals": torch.full((64, 64), 1e-40),
    "one value": torch.full((64, 64), 0.5),
    "float16's largest at three places": torch.zeros(64, 64)
    .index_put_((torch.tensor([0, 31, 63]), torch.tensor([0, 31, 63])), torch.tensor(65504.0))
    .half(),
}


# gptq's scales are float16, where 1e-40 is nothing.
UNSCALED = {("gptq", "subnormals")}


@every_layout
@pytest.mark.parametrize("name", VALUES)
def test_odd_values_give_finite_outputs(tmp_path, layout, bits, method, name):
    directory = checkpoints.write(tmp_path / "source", {NAME: VALUES[name]})
    settings = {**SETTINGS, "layout": layout, "bits": bits, "method": method}
    if (layout, name) in UNSCALED:
        with pytest.raises(loftq_cli.errors.ScaleRangeError, match=NAME):
            loftq_cli.convert(directory, tmp_path / "out", **settings)
        assert {path.name for path in tmp_path.iterdir()} == {"source"}
        return
    manifest = loftq_cli.convert(directory, tmp_path / "out", **settings)
    (record,) = manifest["matrices"]
    assert record["frobenius"]["final"] <= record["frobenius"]["weight"] * 1.0001
    for file in ("model.safetensors", "loftq_init/adapter_model.safetensors"):
        for tensor in load_file(tmp_path / "out" / file).values():
            assert not tensor.is_floating_point() or bool(tensor.isfinite().all())
    loftq_cli.error_report(tmp_path / "out", directory)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (31, 63), (63, 63)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_is_not_finite_is_named_with_its_place(tmp_path, value, place, dtype):
    weight = torch.ones(64, 64, dtype=dtype)
    weight[place] = value
    directory = checkpoints.write(tmp_path / "source", {NAME: weight})
    with pytest.raises(NonFiniteWeightError, match=f"holds {value} at \\[{place[0]}, {place[1]}]"):
        loftq_cli.convert(directory, tmp_path / "out", bits=4, **SETTINGS)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_scalars_vectors_and_empty_tensors_are_copied(tmp_path):
    kept = {
        "model.layers.0.scalar.weight": torch.tensor(3.0),
        "model.layers.0.vector.weight": torch.ones(7),
        "model.layers.0.cube.weight": torch.ones(2, 3, 4),
        "model.layers.0.none.weight": torch.zeros(0, 64),
        "model.layers.0.narrow.weight": torch.zeros(64, 0),
    }
    directory = checkpoints.write(tmp_path / "source", checkpoints.llama() | kept)
    loftq_cli.convert(directory, tmp_path / "out", bits=4, **SETTINGS)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in kept.items())
