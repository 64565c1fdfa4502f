"""A layout and a method from outside the package, one file each, go all the way."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import loftq_cli
from loftq_cli.cli import main
from loftq_cli.errors import LayoutError, UsageError, VerificationError
from loftq_cli.layouts import registry
from loftq_cli.numerics.quantizers import methods
from tests.support import checkpoints

LAYOUT, METHOD = "toy-bytes", "toy-powers"
FAST: dict[str, Any] = {"bits": 3, "rank": 4, "iters": 2, "threads": 1}
SETTINGS = {**FAST, "layout": LAYOUT, "method": METHOD}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Both files are imported, which makes them known; they are forgotten again, as other tests
    list what there is."""
    names = ("tests.support.toy_layout", "tests.support.toy_method")
    for name in names:
        importlib.import_module(name)
    yield
    for name in names:
        del sys.modules[name]
    if LAYOUT in registry.names():
        registry.unregister(LAYOUT)
    if METHOD in methods.names():
        methods.unregister(METHOD)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoints.write(tmp_path / "model", checkpoints.llama())


def merge(place: Path) -> None:
    words = ["merge", str(place / "out"), "-o", str(place / "merged")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output


def test_they_convert_inspect_and_report(model: Path, tmp_path: Path) -> None:
    manifest = loftq_cli.convert(model, tmp_path / "out", **SETTINGS)
    assert {record["layout"] for record in manifest["matrices"]} == {LAYOUT}
    assert {record["method"] for record in manifest["matrices"]} == {METHOD}
    found = loftq_cli.inspect(tmp_path / "out", verify=True)
    assert found["recipe"]["method"] == METHOD
    assert "import loftq_cli" in found["loading"]
    report = loftq_cli.error_report(tmp_path / "out", model)
    assert report["recomputed"]
    assert (
        0 < report["totals"]["relative_residual"] < report["totals"]["relative_residual_quantized"]
    )
    merge(tmp_path)


def test_the_command_knows_them_too(model: Path, tmp_path: Path) -> None:
    words = ["convert", str(model), "-o", str(tmp_path / "out"), "--layout", LAYOUT]
    more = ["--method", METHOD, "--bits", "3", "--dry-run"]
    result = CliRunner().invoke(main, [*words, *more])
    assert result.exit_code == 0, result.output
    assert LAYOUT in CliRunner().invoke(main, ["convert", "--help"]).output


def test_what_is_merged_is_what_the_toys_mean(model: Path, tmp_path: Path) -> None:
    """From the files alone: scale times power of two, plus B A."""
    loftq_cli.convert(model, tmp_path / "out", **SETTINGS)
    merge(tmp_path)
    backbone = load_file(tmp_path / "out/model.safetensors")
    pairs = load_file(tmp_path / "out/loftq_init/adapter_model.safetensors")
    merged = load_file(tmp_path / "merged/model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    codes, scales = backbone[f"{name}.weight"], backbone[f"{name}.weight.toy_scales"]
    powers = torch.tensor([-1, -0.5, -0.25, 0, 0.125, 0.25, 0.5, 1])
    quantized = powers[codes.long()] * scales.repeat_interleave(64).view(codes.shape)
    lora_A, lora_B = (pairs[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    torch.testing.assert_close(merged[f"{name}.weight"], quantized + lora_B @ lora_A)


def test_they_load_and_compute(tmp_path: Path) -> None:
    """Layout loftq holds whatever a method makes; the toy layout itself needs no quantizer of
    transformers to be read by the merge."""
    from tests.support import models

    model = models.save(models.llama(), tmp_path / "model")
    loftq_cli.convert(model, tmp_path / "out", **{**SETTINGS, "layout": "loftq"})
    loaded = loftq_cli.load(tmp_path / "out", trainable=False)
    merge(tmp_path)
    tokens = torch.arange(12)[None]
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(tokens).logits, plain(tokens).logits, atol=1e-5, rtol=1e-4
        )


def test_what_they_say_they_cannot_do_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--method toy-powers --bits 4: 3 bits have powers"):
        loftq_cli.convert(model, tmp_path / "out", **{**SETTINGS, "bits": 4})
    with pytest.raises(UsageError, match="--scale does not apply to --method toy-powers"):
        loftq_cli.convert(model, tmp_path / "out", scale="absmax", **SETTINGS)
    with pytest.raises(LayoutError, match=r"toy-bytes cannot hold .*: bytes of levels, not"):
        loftq_cli.convert(model, tmp_path / "out", **{**SETTINGS, "method": "uniform"})
    with pytest.raises(LayoutError, match=r"bnb cannot hold .*4-bit nf, not 3-bit toy-powers"):
        loftq_cli.convert(model, tmp_path / "out", **{**SETTINGS, "layout": "bnb"})


@pytest.mark.parametrize("forgotten", ["layout", "method"])
def test_an_output_of_one_that_is_not_there_any_more_is_refused_by_name(
    forgotten: str, model: Path, tmp_path: Path
) -> None:
    loftq_cli.convert(model, tmp_path / "out", **SETTINGS)
    forget = registry.unregister if forgotten == "layout" else methods.unregister
    forget(SETTINGS[forgotten])
    said = rf"\.{forgotten}: '{SETTINGS[forgotten]}' is not one of"
    with pytest.raises(VerificationError, match=said):
        loftq_cli.inspect(tmp_path / "out")


def test_a_recipe_and_the_dry_run_know_them(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(SETTINGS))
    manifest = loftq_cli.convert(model, tmp_path / "out", recipe=recipe)
    assert manifest["recipe"]["layout"] == LAYOUT
