"""Experts of a layer that lie in one tensor, adapters in PEFT's own form, and experts that are not
as they should be."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.conversion.engine import Conversion
from loftq_cli.errors import CorruptFileError, LayoutError, NonFiniteWeightError
from loftq_cli.machine.observer import Observer
from loftq_cli.merging.merge import merge
from tests.support import checkpoints
from tests.support.moe import QUICK

pytestmark = [
    # PEFT looks for its own entry of the fused parameter's rank among modules only.
    pytest.mark.filterwarnings(r"ignore:The following (rank|alpha)_pattern keys.*gate_up_proj"),
]


def spoilt(source: Path, place: Path, spoil: Any) -> Path:
    """A copy of ``source`` whose tensors ``spoil`` has changed."""
    copy = Path(shutil.copytree(source, place))
    tensors = load_file(copy / "model.safetensors")
    spoil(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("kind", "tensor", "named"),
    [
        ("mixtral", "block_sparse_moe.experts.2.w1.weight", "block_sparse_moe.experts.2.w1.weight"),
        ("gpt_oss", "mlp.experts.gate_up_proj", "mlp.experts.2.gate_up_proj.weight"),
    ],
)
def test_an_expert_with_nan_is_named(kind, tensor, named, mixture, tmp_path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors[f"model.layers.1.{tensor}"]
        (weight[2] if weight.dim() == 3 else weight)[1, 2] = float("nan")

    source = spoilt(mixture(kind), tmp_path / "source", spoil)
    with pytest.raises(NonFiniteWeightError, match=re.escape(f"model.layers.1.{named}")):
        loftq_cli.convert(source, tmp_path / "out", **QUICK)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_a_missing_expert_is_named_before_anything_is_computed(kind, mixture, tmp_path) -> None:
    lost = {"mixtral": "block_sparse_moe.experts.2.w3", "qwen2_moe": "mlp.experts.3.up_proj"}[kind]
    name = f"model.layers.0.{lost}.weight"
    source = spoilt(mixture(kind), tmp_path / "source", lambda tensors: tensors.pop(name))
    with pytest.raises(CorruptFileError, match=re.escape(f"{name!r} is missing, of 4 experts")):
        loftq_cli.plan(source, tmp_path / "out", **QUICK)


def test_experts_of_different_shapes_are_refused(mixture, tmp_path) -> None:
    name = "model.layers.0.mlp.experts.2.down_proj.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:, :16].clone()

    source = spoilt(mixture("qwen3_moe"), tmp_path / "source", spoil)
    with pytest.raises(CorruptFileError, match=re.escape(f"{name!r} is [64, 16]")):
        loftq_cli.plan(source, tmp_path / "out", **QUICK)


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4"])
def test_stacks_that_are_excluded_stay_as_they_are(kind, mixture, tmp_path) -> None:
    source = mixture(kind)
    loftq_cli.convert(source, tmp_path / "out", exclude=("*.experts.*",), **QUICK)
    stored, kept = load_file(source / "model.safetensors"), load_backbone(tmp_path / "out")
    names = [name for name in stored if ".experts." in name]
    assert names
    assert all(torch.equal(kept[name], stored[name]) for name in names)


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4", "qwen2_moe"])
def test_each_expert_of_a_stack_is_what_it_is_alone(kind, mixture, tmp_path) -> None:
    """At 8 bits Q + B A is nearly the weight again: the right way round, and in its place."""
    source, output = mixture(kind), tmp_path / "out"
    loftq_cli.convert(source, output, **{**QUICK, "bits": 8, "rank": 32})
    merge(output, tmp_path / "merged", observer=Observer())
    stored, found = load_file(source / "model.safetensors"), load_backbone(tmp_path / "merged")
    assert found.keys() == stored.keys()
    for name in [each for each in stored if ".experts." in each and "bias" not in each]:
        assert found[name].shape == stored[name].shape
        near = (found[name] - stored[name]).norm() / stored[name].norm()
        assert float(near) < 0.01, name


@pytest.mark.parametrize("layout", ["dense", "compressed"])
def test_an_export_names_each_tensor_that_the_layout_cannot_hold_once(
    layout, mixture, tmp_path
) -> None:
    loftq_cli.convert(mixture("llama4"), tmp_path / "out", **QUICK)
    with pytest.raises(LayoutError) as caught:
        loftq_cli.export(tmp_path / "out", tmp_path / "exported", layout=layout)
    stacks = [
        f"model.layers.1.feed_forward.experts.{leaf}" for leaf in ("down_proj", "gate_up_proj")
    ]
    assert all(caught.value.message.count(f"{stack}: of all experts") == 1 for stack in stacks)


def test_a_target_spreads_over_the_experts_of_stacks(mixture, tmp_path) -> None:
    settings = {**QUICK, "bits": None, "target_bpw": 3}
    manifest = loftq_cli.convert(mixture("gpt_oss"), tmp_path / "out", **settings)
    widths = {entry["bits"] for entry in manifest["matrices"] if "cut" in entry}
    assert len(widths) > 1
    assert 2.9 < manifest["totals"]["bits_per_weight"] <= 3


def load_backbone(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def test_the_fused_adapter_is_that_of_the_textbook(mixture, tmp_path) -> None:
    """PEFT's own delta of the fused parameter, added to Q of each expert, is near the weight."""
    output = tmp_path / "out"
    manifest = loftq_cli.convert(mixture("qwen2_moe"), output, **QUICK)
    pairs = load_file(output / "loftq_init" / "adapter_model.safetensors")
    experts_path = "base_model.model.model.layers.1.mlp.experts"
    lora_A = pairs[f"{experts_path}.base_layer.lora_A.weight"]
    lora_B = pairs[f"{experts_path}.base_layer.lora_B.weight"]
    assert lora_A.shape == (4 * 16, 64)
    assert lora_B.shape == (64, 16 * 4)
    delta = torch.einsum("ore,eri->eoi", lora_B.view(64, 16, 4), lora_A.view(4, 16, 64))
    model = loftq_cli.load(output)
    merged = load_file(mixture("qwen2_moe") / "model.safetensors")
    layers = model.get_base_model().model.layers[1].mlp.experts
    while hasattr(layers, "base_layer"):
        layers = layers.base_layer
    residuals = {entry["name"]: entry["frobenius"] for entry in manifest["matrices"]}
    for expert in range(4):
        held = getattr(layers, str(expert))
        for leaf, rows in (("gate_proj", slice(0, 32)), ("up_proj", slice(32, 64))):
            name = f"model.layers.1.mlp.experts.{expert}.{leaf}.weight"
            quantized = getattr(held, leaf)(torch.eye(64)).T.detach()
            left = float((merged[name] - quantized - delta[expert][rows]).norm())
            assert left == pytest.approx(residuals[name]["final"], rel=1e-4)


def test_an_accident_before_or_after_fusing_ends_with_the_same_bytes(
    mixture, tmp_path, monkeypatch
) -> None:
    source = mixture("gpt_oss")
    loftq_cli.convert(source, tmp_path / "whole", **QUICK)
    for number, place in enumerate(("_fuse", "_config")):
        output = tmp_path / f"out{number}"
        with monkeypatch.context() as patch:
            patch.setattr(Conversion, place, interrupted)
            with pytest.raises(KeyboardInterrupt):
                loftq_cli.convert(source, output, **QUICK)
        loftq_cli.convert(source, output, **QUICK)
        expected = checkpoints.comparable(tmp_path / "whole")
        assert checkpoints.comparable(output) == expected


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_experts_in_mxfp4_are_what_they_are_decoded(mixture, tmp_path) -> None:
    """As gpt-oss is published: each expert is decoded by itself, to the values that transformers
    makes of all of them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    plain = load_file(mixture("gpt_oss") / "model.safetensors")
    tensors = {name: tensor.bfloat16() for name, tensor in plain.items()}
    coded = dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        count, columns, rows = coded.pop(name).shape
        blocks = torch.randint(0, 256, (count, rows, columns // 32, 16), generator=generator)
        scales = torch.randint(118, 124, (count, rows, columns // 32), generator=generator)
        coded |= {f"{name}_blocks": blocks.byte(), f"{name}_scales": scales.byte()}
        tensors[name] = convert_moe_packed_tensors(blocks.byte(), scales.byte())
    for folder, held in (("coded", coded), ("decoded", tensors)):
        copy = Path(shutil.copytree(mixture("gpt_oss"), tmp_path / folder))
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
        save_file(
            {name: tensor.contiguous() for name, tensor in held.items()},
            copy / "model.safetensors",
            metadata={"format": "pt"},
        )
        loftq_cli.convert(copy, tmp_path / f"out-{folder}", **QUICK)
    for file in ("model.safetensors", "loftq_init/adapter_model.safetensors"):
        found, expected = (load_file(tmp_path / f"out-{f}" / file) for f in ("coded", "decoded"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
