"""``error-report``: the figures are those of the bytes, and a manifest that lies is found out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.cli.commands import main
from loftq_cli.errors import InputError, SourceNotFoundError, VerificationError
from loftq_cli.machine.observer import Observer
from loftq_cli.merging.merge import merge
from tests.reporting.conftest import CASES
from tests.support import checkpoints, textbook
from tests.support import plain_layouts as plain

every_case = pytest.mark.parametrize("case", CASES)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def read(directory: Path, pattern: str = "*.safetensors") -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in directory.glob(pattern):
        tensors |= load_file(path)
    return tensors


def manifest_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "loftq_manifest.json").read_text())


def rewrite(output: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = manifest_of(output)
    change(manifest)
    (output / "loftq_manifest.json").write_text(json.dumps(manifest))


def backbone(output: Path, record: dict[str, Any]) -> torch.Tensor:
    """Q of one matrix, float64, by decoders that are not ours."""
    tensors, name, shape = read(output), record["name"], tuple(record["shape"])
    if record["layout"] == "bnb":
        state = {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        quant_state = functional.QuantState.from_dict(state, device=torch.device("cpu"))
        quant_state.dtype = torch.float32
        return functional.dequantize_4bit(tensors[name], quant_state).double()
    if record["layout"] == "gptq":
        return torch.tensor(plain.gptq(tensors, record["module"], record["bits"])).double()
    if record["layout"] == "loftq":
        config = json.loads((output / "config.json").read_text())["quantization_config"]
        entry = config["modules"][record["module"]]
        return torch.tensor(plain.loftq(tensors, name, shape, entry)).double()
    return tensors[name].double()


@every_case
def test_recomputed_norms_are_those_of_an_independent_computation(case, converted, source):
    output = converted(case)
    report = loftq_cli.error_report(output, source(case))
    assert report["recomputed"]
    weights, adapter = read(source(case)), read(output, "loftq_init/*.safetensors")
    config = json.loads((output / "loftq_init" / "adapter_config.json").read_text())
    for record, layer in zip(manifest_of(output)["matrices"], report["layers"], strict=True):
        weight = weights[record["name"]].double()
        prefix = f"base_model.model.{record['module']}"
        lora_A = adapter[f"{prefix}.lora_A.weight"].double()
        lora_B = adapter[f"{prefix}.lora_B.weight"].double()
        alpha = record["rank"] if config["alpha_pattern"] else config["lora_alpha"]
        product = lora_B @ lora_A * (alpha / record["rank"])
        residual = weight - backbone(output, record) - product
        assert layer["weight"] == pytest.approx(float(weight.norm()), rel=1e-6)
        rounding = 1e-7 * layer["weight"]
        assert layer["final"] == pytest.approx(float(residual.norm()), rel=1e-5, abs=rounding)
        assert layer["relative_residual"] == pytest.approx(layer["final"] / layer["weight"])


def test_an_older_manifest_that_names_no_dtype_of_scales_is_read(converted, source, tmp_path):
    output = Path(shutil.copytree(converted("loftq"), tmp_path / "out"))
    rewrite(output, lambda manifest: manifest["recipe"].pop("scale_dtype"))
    expected = loftq_cli.error_report(converted("loftq"), source("loftq"))
    assert loftq_cli.error_report(output, source("loftq"))["layers"] == expected["layers"]
    assert "scale_dtype" not in loftq_cli.inspect(output)["recipe"]
    merge(output, tmp_path / "merged", observer=Observer())


@pytest.mark.parametrize(
    ("bits", "method"), [(4, "nf"), (2, "nf"), (3, "nf-symmetric"), (2, "uniform-block")]
)
def test_plain_quantization_is_that_of_the_textbook(tmp_path, source, bits, method):
    fixed: dict[str, Any] = {"scale": "absmax"} if method != "uniform-block" else {}
    loftq_cli.convert(
        source(""), tmp_path / "out", bits=bits, method=method, rank=4, iters=1, threads=1, **fixed
    )
    weights = read(source(""))
    for layer in loftq_cli.error_report(tmp_path / "out", source(""))["layers"]:
        weight = weights[layer["name"]].double()
        if method == "uniform-block":
            plain_q = textbook.quantize_uniform_block(weight, bits, 64)
        else:
            levels = textbook.normal_float(bits, method == "nf-symmetric")
            plain_q = textbook.quantize_absmax(weight, levels, 64)
        expected = float((weight - plain_q).norm())
        assert layer["quantized"] == pytest.approx(expected, rel=1e-5)
        assert layer["ratio"] == pytest.approx(layer["final"] / expected, rel=1e-5)


@every_case
def test_without_a_source_it_is_the_manifests_figures(case, converted):
    output = converted(case)
    manifest, report = manifest_of(output), loftq_cli.error_report(output)
    assert not report["recomputed"]
    assert report["source"] is None
    for record, layer in zip(manifest["matrices"], report["layers"], strict=True):
        assert layer["name"] == record["name"]
        assert {key: layer[key] for key in record["frobenius"]} == record["frobenius"]
    for name, value in report["totals"].items():
        assert value == pytest.approx(manifest["totals"][name], rel=1e-12)
    by_residual = sorted(report["layers"], key=lambda layer: -layer["relative_residual"])
    assert report["worst"] == [layer["name"] for layer in by_residual[:5]]


@every_case
def test_recomputing_finds_what_the_manifest_says(case, converted, source):
    stated = loftq_cli.error_report(converted(case))
    actual = loftq_cli.error_report(converted(case), source(case))
    for old, new in zip(stated["layers"], actual["layers"], strict=True):
        for name in ("weight", "quantized", "final"):
            assert new[name] == pytest.approx(old[name], rel=1e-6)


def zero_source(directory: Path) -> Path:
    tensors = checkpoints.llama()
    return checkpoints.write(directory, tensors | {Q_PROJ: torch.zeros(64, 64)})


@pytest.mark.parametrize("layout", ["bnb", "loftq", "dense"])
def test_a_matrix_of_zeros_has_residuals_of_zero(tmp_path, layout):
    directory = zero_source(tmp_path / "source")
    loftq_cli.convert(directory, tmp_path / "out", layout=layout, rank=4, iters=1, threads=1)
    layers = loftq_cli.error_report(tmp_path / "out", directory)["layers"]
    (layer,) = [layer for layer in layers if layer["name"] == Q_PROJ]
    assert (layer["weight"], layer["quantized"], layer["final"]) == (0, 0, 0)
    assert (layer["relative_residual"], layer["ratio"]) == (0, 1)


def scaled(holder: Any, key: Any) -> None:
    holder[key] *= 1.001


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "weight": lambda m: scaled(m["matrices"][0]["frobenius"], "weight"),
    "quantized": lambda m: scaled(m["matrices"][1]["frobenius"], "quantized"),
    "final": lambda m: scaled(m["matrices"][2]["frobenius"], "final"),
    "kept step": lambda m: scaled(
        m["matrices"][0]["frobenius"]["steps"], m["matrices"][0]["step"] - 1
    ),
    "step": lambda m: m["matrices"][0].update(step=40),
    "total": lambda m: scaled(m["totals"], "relative_residual"),
    "total without adapter": lambda m: scaled(m["totals"], "relative_residual_quantized"),
    "rank": lambda m: m["matrices"][0].update(rank=5),
    "bits": lambda m: m["matrices"][0].update(bits=2 if m["matrices"][0]["bits"] != 2 else 4),
    "layout": lambda m: m["matrices"][0].update(layout="dense"),
    "alpha": lambda m: m["recipe"].update(lora_alpha=99.0),
}


@pytest.mark.parametrize("case", ["bnb", "gptq", "gptq-8-bits", "loftq", "sharded"])
@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_altered_in_one_number_is_refused(case, lie, converted, source, tmp_path):
    output = Path(shutil.copytree(converted(case), tmp_path / "out"))
    rewrite(output, LIES[lie])
    with pytest.raises(VerificationError) as caught:
        loftq_cli.error_report(output, source(case))
    assert caught.value.exit_code == 3
    assert "totals" in caught.value.message or "model.layers.0" in caught.value.message


def test_every_disagreement_is_listed_with_both_figures(output, source):
    first, second, *_ = manifest_of(output)["matrices"]

    def lie(manifest: dict[str, Any]) -> None:
        LIES["weight"](manifest)
        LIES["quantized"](manifest)

    rewrite(output, lie)
    with pytest.raises(VerificationError) as caught:
        loftq_cli.error_report(output, source(""))
    for record, name in ((first, "weight"), (second, "quantized")):
        value = record["frobenius"][name]
        assert (
            f"{record['name']}: {name} {value:.6g}, the manifest says {value * 1.001:.6g}"
            in caught.value.message
        )


def test_the_command_exits_with_3(output, source):
    arguments = ["error-report", str(output), "--source", str(source(""))]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    rewrite(output, LIES["final"])
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.stdout) == (3, "")
    assert "the manifest disagrees" in result.stderr


@pytest.mark.parametrize("case", ["bnb", "gptq", "loftq", "loftq-affine", "dense"])
@pytest.mark.parametrize("file", ["model.safetensors", "loftq_init/adapter_model.safetensors"])
def test_altered_weights_are_found_without_the_hashes(case, file, converted, source, tmp_path):
    output = Path(shutil.copytree(converted(case), tmp_path / "out"))
    (record, *_) = manifest_of(output)["matrices"]
    tensors = load_file(output / file)
    for name, tensor in tensors.items():
        if record["module"] in name and not name.endswith(("quant_map", "g_idx", "nf4")):
            first = tensor.view(-1)[:16].contiguous().view(torch.uint8)
            tensor.view(-1)[:16] = (first ^ 0x24).view(tensor.dtype)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, output / file)
    with pytest.raises(VerificationError, match=record["name"]):
        loftq_cli.error_report(output, source(""))


@pytest.mark.parametrize(
    ("name", "replacement", "message"),
    [
        (Q_PROJ, None, "is missing"),
        (Q_PROJ, torch.zeros(2048, dtype=torch.uint8), r"is U8 \[2048\], not U8 \[2048, 1\]"),
        (Q_PROJ, torch.zeros(2048, 1), "is F32"),
        (f"{Q_PROJ}.absmax", torch.zeros(63), r"is F32 \[63\], not F32 \[64\]"),
        (f"{Q_PROJ}.quant_map", torch.zeros(15), r"is F32 \[15\], not F32 \[16\]"),
    ],
)
def test_tensors_of_another_shape_are_found(output, source, name, replacement, message):
    tensors = load_file(output / "model.safetensors")
    del tensors[name]
    if replacement is not None:
        tensors[name] = replacement
    save_file(tensors, output / "model.safetensors")
    with pytest.raises(VerificationError, match=message) as caught:
        loftq_cli.error_report(output, source(""))
    assert repr(name) in caught.value.message


def test_a_broken_weight_file_is_named(output, source):
    (output / "model.safetensors").write_bytes(b"")
    with pytest.raises(VerificationError, match=r"model\.safetensors: 0 bytes are too few"):
        loftq_cli.error_report(output, source(""))


@pytest.mark.parametrize(
    ("tensors", "kind", "message"),
    [
        (checkpoints.llama(hidden=128), InputError, r"\[128, 128\], the conversion was of \[64"),
        (checkpoints.bert(), InputError, "no such tensor"),
        (checkpoints.llama(seed=1), VerificationError, "the manifest disagrees"),
        (
            checkpoints.llama() | {Q_PROJ: torch.zeros(64, 64, dtype=torch.int8)},
            InputError,
            "is I8, not a floating-point matrix",
        ),
        (
            checkpoints.llama() | {Q_PROJ: torch.full((64, 64), float("nan"))},
            InputError,
            f"{Q_PROJ}' holds nan",
        ),
    ],
    ids=["another size", "another model", "other weights", "integers", "nan"],
)
def test_the_wrong_source(output, tmp_path, tensors, kind, message):
    directory = checkpoints.write(tmp_path / "other", tensors)
    with pytest.raises(kind, match=message) as caught:
        loftq_cli.error_report(output, directory)
    assert caught.value.exit_code == 3


def test_a_source_that_the_layout_could_not_hold(converted, tmp_path):
    tensors = checkpoints.llama() | {Q_PROJ: torch.full((64, 64), 3e38)}
    directory = checkpoints.write(tmp_path / "other", tensors)
    with pytest.raises(InputError, match=f"'{Q_PROJ}': .* float16") as caught:
        loftq_cli.error_report(converted("gptq"), directory)
    assert caught.value.exit_code == 3


def test_a_source_that_is_not_there(output, tmp_path):
    with pytest.raises(SourceNotFoundError):
        loftq_cli.error_report(output, tmp_path / "none")


def test_weights_of_a_pipelines_module_are_not_taken_for_the_backbones(tmp_path):
    directory = checkpoints.write(tmp_path / "model", checkpoints.llama())
    name = next(iter(checkpoints.matrices(checkpoints.llama())))
    (directory / "modules.json").write_text('[{"path": ""}, {"path": "1_Dense"}]')
    (directory / "1_Dense").mkdir()
    save_file({name: torch.ones(64, 64)}, directory / "1_Dense" / "model.safetensors")
    settings: dict[str, Any] = {"layout": "dense", "bits": 2, "rank": 4, "iters": 1, "threads": 1}
    loftq_cli.convert(directory, tmp_path / "out", **settings)
    assert (tmp_path / "out" / "1_Dense" / "model.safetensors").is_file()
    assert loftq_cli.error_report(tmp_path / "out", directory)["recomputed"]
