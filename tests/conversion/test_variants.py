"""Every setting and every odd matrix converts, and is as close as it says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loftq_cli
from loftq_cli.errors import InputError, NonFiniteWeightError, ScaleRangeError
from tests.support import checkpoints
from tests.support.bench import QUERY, Bench, Recorder
from tests.support.contents import FAST, Converter, manifest, product, stored

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# (settings, shape of the matrices): what must work at all.
VARIANTS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "bits 2": ({"bits": 2}, (64, 64)),
    "bits 3": ({"bits": 3}, (64, 64)),
    "bits 4": ({"bits": 4}, (64, 64)),
    "bits 8": ({"bits": 8}, (64, 64)),
    "absmax": ({"bits": 2, "scale": "absmax"}, (64, 64)),
    "nf2": ({"bits": 2, "method": "nf"}, (64, 64)),
    "nf8": ({"bits": 8, "method": "nf"}, (64, 64)),
    "nf-symmetric": ({"bits": 3, "method": "nf-symmetric"}, (64, 64)),
    "fitted": ({"bits": 2, "method": "fitted"}, (64, 64)),
    "fitted, dense": ({"bits": 3, "method": "fitted", "layout": "dense"}, (64, 64)),
    "trellis": ({"bits": 2, "method": "trellis"}, (64, 64)),
    "trellis, dense": ({"bits": 2, "method": "trellis", "layout": "dense"}, (300, 40)),
    "8-bit scales, trellis": ({"bits": 2, "method": "trellis", "scale_dtype": "int8"}, (64, 48)),
    "16-bit scales": ({"bits": 2, "scale_dtype": "bfloat16"}, (64, 64)),
    "8-bit scales": ({"bits": 2, "method": "nf", "scale_dtype": "int8"}, (64, 64)),
    "8-bit scales, short blocks": ({"bits": 3, "scale_dtype": "int8"}, (7, 37)),
    "8-bit scales, fitted": ({"bits": 2, "method": "fitted", "scale_dtype": "int8"}, (64, 64)),
    "8-bit scales, paper": ({"bits": 2, "preset": "paper", "scale_dtype": "int8"}, (64, 64)),
    "8-bit scales, uniform-block": (
        {"bits": 2, "method": "uniform-block", "scale_dtype": "int8"},
        (64, 64),
    ),
    "uniform-block": ({"bits": 2, "method": "uniform-block", "layout": "loftq"}, (64, 64)),
    "uniform-block, dense": ({"bits": 3, "method": "uniform-block", "layout": "dense"}, (64, 64)),
    "uniform-tensor": ({"bits": 2, "method": "uniform-tensor", "layout": "loftq"}, (64, 64)),
    "uniform-tensor, dense": ({"bits": 4, "method": "uniform-tensor", "layout": "dense"}, (64, 64)),
    "blocks of 32": ({"bits": 2, "block_size": 32}, (64, 64)),
    "blocks of 256": ({"bits": 2, "block_size": 256}, (64, 64)),
    "no steps": ({"bits": 2, "iters": 0}, (64, 64)),
    "svd-first": ({"bits": 2, "order": "svd-first"}, (64, 64)),
    "exact svd": ({"bits": 2, "svd": "exact"}, (64, 64)),
    "paper": ({"bits": 2, "preset": "paper"}, (64, 64)),
    "rank above the sides": ({"bits": 2, "rank": 100}, (24, 40)),
    "rows that are no multiple of a block": ({"bits": 3, "method": "nf"}, (7, 37)),
    "groups with a short one": ({"bits": 3, "method": "uniform"}, (7, 37)),
    "a single row": ({"bits": 2}, (1, 50)),
    "a single column": ({"bits": 2}, (50, 1)),
    "a single element": ({"bits": 2}, (1, 1)),
    "lora-alpha": ({"bits": 2, "lora_alpha": 32.0}, (64, 64)),
    "16-bit adapter": ({"bits": 2, "adapter_dtype": "bfloat16"}, (64, 64)),
    "16-bit backbone": ({"bits": 2, "layout": "dense", "dense_dtype": "float16"}, (64, 64)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_converts_and_its_bytes_are_as_close_as_it_says(
    variant: str, converted: Converter
) -> None:
    settings, shape = VARIANTS[variant]
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.layers.{layer}.fc.weight": torch.randn(*shape, generator=generator)
        for layer in range(2)
    }
    output = converted(tensors, **settings)
    # Recomputed from the packed bytes and the source; raises where the manifest disagrees.
    report = loftq_cli.error_report(output, source=output.parent / "model")
    for layer in report["layers"]:
        assert 0 <= layer["final"] <= layer["quantized"] * (1 + 1e-6)
        assert layer["weight"] == pytest.approx(float(tensors[layer["name"]].double().norm()))
        assert len(layer["steps"]) == settings.get("iters", FAST["iters"])


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({"iters": 0}, 1.0),
        ({"iters": 3}, 1.0),
        ({"iters": 3, "order": "svd-first"}, 1.0),
        ({"iters": 3, "lora_alpha": 32.0}, 8.0),
        ({"iters": 3, "adapter_dtype": "bfloat16"}, 1.0),
    ],
)
def test_the_stated_residual_is_that_of_the_stored_tensors(
    settings: dict[str, Any], scaling: float, converted: Converter
) -> None:
    tensors = checkpoints.llama()
    output = converted(tensors, bits=2, layout="dense", **settings)
    backbone = stored(output)
    for record in manifest(output)["matrices"]:
        name, stated = record["name"], record["frobenius"]
        weight = tensors[name].double()
        residual = weight - backbone[name].double() - product(output, name, scaling)
        # The conversion computes in float32, this test in float64.
        assert stated["final"] == pytest.approx(float(residual.norm()), rel=1e-5)
        kept = stated["steps"][record["step"] - 1] if record["step"] else stated["quantized"]
        assert stated["final"] == kept
        assert stated["final"] == min(stated["steps"], default=stated["quantized"])


def test_totals_sum_over_the_matrices(converted: Converter) -> None:
    output = converted(checkpoints.llama(), bits=2)
    found = manifest(output)
    squares = {
        which: math.fsum(record["frobenius"][which] ** 2 for record in found["matrices"])
        for which in ("weight", "quantized", "final")
    }
    totals = found["totals"]
    assert totals["relative_residual"] == math.sqrt(squares["final"] / squares["weight"])
    assert totals["relative_residual_quantized"] == math.sqrt(
        squares["quantized"] / squares["weight"]
    )
    backbone = sum(tensor.nbytes for tensor in stored(output).values())
    adapter = load_file(output / "loftq_init/adapter_model.safetensors")
    assert totals["backbone_bytes"] == backbone
    assert totals["adapter_bytes"] == sum(tensor.nbytes for tensor in adapter.values())


def test_without_steps_the_adapter_starts_as_peft_starts_it(converted: Converter) -> None:
    output = converted(checkpoints.llama(), bits=2, iters=0, rank=8)
    adapter = load_file(output / "loftq_init/adapter_model.safetensors")
    bounds = {"down_proj": 1 / math.sqrt(128)}
    drawn = set()
    for name, tensor in adapter.items():
        if "lora_B" in name:
            assert not tensor.any()
        else:
            bound = bounds.get(name.split(".")[-3], 1 / math.sqrt(64))
            assert 0.9 * bound < float(tensor.abs().max()) <= bound
            drawn.add(tuple(tensor.flatten()[:8].tolist()))
    assert len(drawn) == len(adapter) // 2  # no two modules share a draw


def test_the_seed_changes_what_is_drawn(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "model", checkpoints.llama())
    drawn = []
    for seed in (0, 1):
        output = tmp_path / f"out{seed}"
        loftq_cli.convert(source, output=output, seed=seed, **{**FAST, "iters": 0})
        drawn.append((output / "loftq_init/adapter_model.safetensors").read_bytes())
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("value", [0.0, 0.3, -1e-30], ids=["zero", "constant", "tiny"])
@pytest.mark.parametrize(
    "settings",
    [{"bits": 2}, {"bits": 4}, {"bits": 2, "method": "nf"}, {"bits": 2, "order": "svd-first"}],
    ids=["gptq", "bnb", "nf2", "svd-first"],
)
def test_a_matrix_of_equal_values_converts_and_its_adapter_can_train(
    value: float, settings: dict[str, Any], converted: Converter
) -> None:
    tensors = {**checkpoints.llama(), QUERY: torch.full((64, 64), value)}
    output = converted(tensors, **settings)
    loftq_cli.error_report(output, source=output.parent / "model")
    adapter = load_file(output / "loftq_init/adapter_model.safetensors")
    prefix = f"base_model.model.{QUERY.removesuffix('.weight')}"
    # Where a direction of B is zero A must not be, or its gradient vanishes too.
    columns = adapter[f"{prefix}.lora_B.weight"].abs().amax(dim=0)
    rows = adapter[f"{prefix}.lora_A.weight"].abs().amax(dim=1)
    assert ((columns > 0) | (rows > 0)).all()
    assert all(tensor.isfinite().all() for tensor in adapter.values())


def test_a_matrix_of_zeros_has_no_residual(converted: Converter) -> None:
    output = converted({**checkpoints.llama(), QUERY: torch.zeros(64, 64)}, bits=2)
    records = {record["name"]: record for record in manifest(output)["matrices"]}
    assert records[QUERY]["frobenius"]["final"] == 0.0


def test_the_adapter_names_the_backbone_that_it_is_told(converted: Converter) -> None:
    for told in (None, "me/mine"):
        output = converted(checkpoints.llama(), base_model=told, overwrite=True)
        config = json.loads((output / "loftq_init/adapter_config.json").read_bytes())
        assert config["base_model_name_or_path"] == told


def test_clamped_ranks_are_written_down(converted: Converter) -> None:
    output = converted(checkpoints.llama(intermediate=24), rank=40)
    config = json.loads((output / "loftq_init/adapter_config.json").read_bytes())
    assert (config["r"], config["lora_alpha"]) == (40, 40)
    assert len(config["rank_pattern"]) == 3
    assert set(config["rank_pattern"].values()) == {24}
    assert config["alpha_pattern"] == config["rank_pattern"]


def test_layout_gptq_gives_way_where_a_scale_does_not_fit_float16(bench: Bench) -> None:
    tensors = checkpoints.llama()
    tensors[QUERY] = tensors[QUERY] * 1e9
    bench.write(tensors, cuts=(5,))
    recorder = Recorder()
    found = bench.convert(recorder, bits=2).manifest
    (note,) = [note for note in recorder.notes if "statistics" not in note]
    assert "layout loftq, because gptq cannot hold" in note
    assert QUERY in note
    assert {record["layout"] for record in found["matrices"]} == {"loftq"}
    assert found["recipe"]["layout"] == "loftq"
    assert found["recipe"]["layout_fallback"] == "float16-range"
    loftq_cli.error_report(bench.output, source=bench.source)
    assert bench.convert(bits=2).nothing_to_do


def test_a_conversion_that_left_gptq_resumes_as_it_was(bench: Bench) -> None:
    tensors = checkpoints.llama()
    tensors[QUERY] = tensors[QUERY] * 1e9
    bench.write(tensors, cuts=(5,))
    bench.interrupt("model.norm.weight", bits=2)
    recorder = Recorder()
    bench.convert(recorder, bits=2)
    assert QUERY in recorder.named("kept")
    (note,) = [note for note in recorder.notes if "statistics" not in note]
    assert "resuming" in note


def test_an_explicit_gptq_whose_scale_does_not_fit_names_the_tensor(
    tmp_path: Path, converted: Converter
) -> None:
    tensors = checkpoints.llama()
    tensors[QUERY] = tensors[QUERY] * 1e9
    with pytest.raises(ScaleRangeError, match=QUERY) as caught:
        converted(tensors, bits=2, layout="gptq")
    assert caught.value.exit_code == 2
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_named_and_nothing_is_left(
    dtype: str, value: float, tmp_path: Path, converted: Converter
) -> None:
    tensors = checkpoints.llama(dtype=DTYPES[dtype])
    tensors[QUERY][3, 60] = value
    tensors[QUERY][5, 1] = -value
    with pytest.raises(NonFiniteWeightError) as caught:
        converted(tensors, cuts=(1,))
    message = caught.value.message
    assert caught.value.exit_code == 3
    assert "model-00002-of-00002.safetensors" in message
    assert QUERY in message
    assert f"{value} at [3, 60]" in message
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_value_that_is_not_finite_outside_the_matrices_is_passed_through(
    converted: Converter,
) -> None:
    tensors = checkpoints.llama()
    tensors["lm_head.weight"][0, 0] = math.nan
    assert stored(converted(tensors))["lm_head.weight"][0, 0].isnan()


def test_an_adapter_too_large_for_its_dtype_is_named_and_nothing_is_left(
    tmp_path: Path, converted: Converter
) -> None:
    tensors = checkpoints.llama()
    tensors[QUERY] = tensors[QUERY] * 1e30
    with pytest.raises(InputError, match=QUERY) as caught:
        converted(tensors, adapter_dtype="float16")
    assert "float16" in caught.value.message
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
