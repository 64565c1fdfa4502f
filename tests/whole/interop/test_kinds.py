"""Embeddings and transposed layers in transformers' own models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import loftq_cli
from loftq_cli.machine.observer import Observer
from loftq_cli.merging.merge import merge
from tests.whole.interop.architectures import (
    GROUPED,
    QUICK,
    TWO_STACKS,
    arguments,
    check,
    dense,
    make,
    model_class,
    outputs,
    the_plain_way,
)


@pytest.mark.parametrize("layout", ["loftq", "dense"])
@pytest.mark.parametrize("method", ["nf", "uniform"])
@pytest.mark.parametrize("load", [loftq_cli.load, the_plain_way])
def test_word_embeddings(
    layout: str, method: str, load: Any, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    source = saved("DeBERTa-v2, v3")
    settings = {"embeddings": True, "layout": layout, "method": method}
    manifest = check(source, tmp_path, load, **settings)
    kinds = {e["name"]: e.get("kind") for e in manifest["matrices"] if e.get("kind")}
    assert kinds == {"embeddings.word_embeddings.weight": "embedding"}
    report = loftq_cli.error_report(tmp_path / "out", source=source)
    assert report["recomputed"]


# PEFT may save the table along with its pair.
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("layout", ["loftq", "dense"])
@pytest.mark.parametrize(
    ("kind", "name", "settings"),
    [
        # The root of the width is the factor, and no whole number.
        ("gemma2", "Gemma2ForCausalLM", {**GROUPED, "hidden_size": 96}),
        ("bart", "BartForCausalLM", {**TWO_STACKS, "d_model": 96, "scale_embedding": True}),
    ],
)
def test_embeddings_that_the_model_scales(
    kind: str, name: str, settings: Any, layout: str, tmp_path: Path
) -> None:
    source = make(kind, name, {**settings, "tie_word_embeddings": False}, tmp_path / "source")
    check(source, tmp_path, loftq_cli.load, layout=layout, embeddings=True)
    model = loftq_cli.load(tmp_path / "out").eval()
    with torch.no_grad():
        expected = outputs(model, arguments(model))
    model.save_pretrained(tmp_path / "trained")
    model_class(source).from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "backbone")
    for directory in ("out", "backbone"):
        backbone = model_class(source).from_pretrained(tmp_path / directory)
        again = peft.PeftModel.from_pretrained(backbone, tmp_path / "trained").eval()
        with torch.no_grad():
            assert torch.equal(outputs(again, arguments(again)), expected)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("GPT-2", {}),
        ("GPT-2", {"method": "trellis"}),
        ("DeBERTa-v2, v3", {"embeddings": True}),
        ("DeBERTa-v2, v3", {"embeddings": True, "method": "trellis"}),
    ],
)
@pytest.mark.parametrize("layout", ["loftq", "dense"])
def test_merged_it_is_the_dense_model(
    family: str, settings: Any, layout: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    source, output = saved(family), tmp_path / "out"
    manifest = loftq_cli.convert(source, output=output, **{**QUICK, **settings, "layout": layout})
    merge(output, tmp_path / "merged", observer=Observer())
    reference = dense(source, output, manifest, tmp_path / "dense")
    merged = model_class(source).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        wanted = outputs(reference, arguments(reference))
        found = outputs(merged, arguments(merged))
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()


@pytest.mark.parametrize(
    ("family", "settings"), [("GPT-2", {}), ("DeBERTa-v2, v3", {"embeddings": True})]
)
def test_reports_are_of_the_matrix_as_the_model_has_it(
    family: str, settings: Any, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    source, output = saved(family), tmp_path / "out"
    manifest = loftq_cli.convert(source, output=output, **{**QUICK, **settings})
    approximation = dense(source, output, manifest, tmp_path / "dense").state_dict()
    original = model_class(source).from_pretrained(source).state_dict()
    report = loftq_cli.error_report(output, source=source)
    assert report["recomputed"]
    for layer in report["layers"]:
        difference = original[layer["name"]] - approximation[layer["name"]]
        assert layer["final"] == pytest.approx(float(difference.double().norm()), rel=1e-5)
        assert layer["weight"] == pytest.approx(float(original[layer["name"]].norm()), rel=1e-5)
    found = loftq_cli.inspect(output, verify=True)
    assert found["verified_files"]
    adapter = load_file(output / "loftq_init" / "adapter_model.safetensors")
    for layer in found["layers"]:
        module = layer["name"].removesuffix(".weight")
        held = [t.nbytes for name, t in adapter.items() if f".{module}.lora_" in name]
        assert (len(held), layer["adapter_bytes"]) == (2, sum(held))
        sides = list(original[layer["name"]].shape)
        assert layer["shape"] == (sides[::-1] if family == "GPT-2" else sides)
