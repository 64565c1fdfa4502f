"""Mixture-of-experts models: what is converted loads in transformers and PEFT, and trains."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.checkpoint.source import open_source
from loftq_cli.errors import InputError, LayoutError, UsageError
from loftq_cli.families import experts
from loftq_cli.machine.observer import Observer
from loftq_cli.merging.merge import merge
from loftq_cli.planning.make import anatomy_of
from loftq_cli.planning.selection import select
from tests.support import models, moe
from tests.support.moe import QUICK, adapted, logits, model_class, train

pytestmark = [
    # PEFT looks for its own entry of the fused parameter's rank among modules only.
    pytest.mark.filterwarnings(r"ignore:The following (rank|alpha)_pattern keys.*gate_up_proj"),
]

EXPERTS: dict[str, Any] = {"include": ("*.experts.*",), "layout": "dense"}


def expected(source: Path, output: Path, work: Path) -> torch.Tensor:
    """Logits of the source with Q + BA, read from a dense output, in the place of every matrix."""
    tensors = load_file(source / "model.safetensors")
    tensors |= load_file(output / "model.safetensors")
    pairs = load_file(output / "loftq_init" / "adapter_model.safetensors")
    for name in [name for name in pairs if name.endswith(".lora_A.weight")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        product = pairs[name.replace(".lora_A.", ".lora_B.")] @ pairs[name]
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"] + product
    work.mkdir()
    save_file(tensors, work / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "config.json", work)
    return logits(model_class(source).from_pretrained(work))


@pytest.mark.parametrize("kind", moe.KINDS)
def test_experts_are_passed_through_and_the_rest_loads_and_trains(kind, mixture, tmp_path) -> None:
    source, output = mixture(kind), tmp_path / "out"
    manifest = loftq_cli.convert(source, output=output, layout="dense", **QUICK)
    names = {entry["name"] for entry in manifest["matrices"]}
    assert not any(".experts." in name for name in names)
    attention = [n for n in names if ".self_attn." in n]
    assert len(attention) == (10 if kind.startswith("deepseek") else 8)
    model = adapted(output)
    reference = expected(source, output, tmp_path / "reference")
    torch.testing.assert_close(
        logits(model), reference, rtol=0, atol=5e-6 * float(reference.abs().max())
    )
    before, after = train(model)
    assert after < before


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "qwen3_moe_mixed"])
@pytest.mark.parametrize("way", [adapted, loftq_cli.load])
def test_experts_in_floating_point_load_and_train(kind, way, mixture, tmp_path) -> None:
    source, output = mixture(kind), tmp_path / "out"
    manifest = loftq_cli.convert(source, output=output, **EXPERTS, **QUICK)
    assert manifest["recipe"]["layout"] == "dense"
    found = [e for e in manifest["matrices"] if ".experts." in e["name"]]
    assert len(found) == 4 * 3 * (1 if kind == "qwen3_moe_mixed" else 2)
    assert all(0 < e["frobenius"]["final"] < e["frobenius"]["quantized"] for e in found)
    model = way(output)
    reference = expected(source, output, tmp_path / "reference")
    torch.testing.assert_close(
        logits(model), reference, rtol=0, atol=5e-6 * float(reference.abs().max())
    )
    before, after = train(model)
    assert after < before
    trained = logits(model)
    merged = logits(model.merge_and_unload())
    torch.testing.assert_close(merged, trained, rtol=0, atol=5e-6 * float(trained.abs().max()))


def test_a_merge_of_the_start_is_the_same_model(mixture, tmp_path) -> None:
    source, output, merged = mixture("mixtral"), tmp_path / "out", tmp_path / "merged"
    loftq_cli.convert(source, output=output, **EXPERTS, **QUICK)
    merge(output, merged, observer=Observer())
    reference = expected(source, output, tmp_path / "reference")
    found = logits(model_class(merged).from_pretrained(merged))
    torch.testing.assert_close(found, reference, rtol=0, atol=5e-6 * float(reference.abs().max()))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe_mixed"])
def test_a_trained_fused_adapter_merges_as_peft_merges_it(kind, mixture, tmp_path) -> None:
    output, trained = tmp_path / "out", tmp_path / "trained"
    loftq_cli.convert(mixture(kind), output=output, **EXPERTS, **QUICK)
    model = adapted(output)
    train(model)
    model.save_pretrained(trained)
    merge(output, tmp_path / "merged", adapter=trained, observer=Observer())
    theirs = logits(model.merge_and_unload())
    ours = logits(model_class(output).from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-6 * float(theirs.abs().max()))
    file = trained / "adapter_model.safetensors"
    held = load_file(file)
    lost = {name for name in held if ".layers.1." in name and ".experts.base_layer." in name}
    assert len(lost) == 2
    save_file({name: tensor for name, tensor in held.items() if name not in lost}, file)
    with pytest.raises(InputError, match=r"experts\.gate_up_proj' missing.*target_parameters"):
        merge(output, tmp_path / "again", adapter=trained, observer=Observer())


WAYS = {
    family: (adapted, loftq_cli.load)[number % 2]
    for number, family in enumerate((*moe.FUSED_BY_PEFT, *moe.FUSED_BY_US))
} | {"mixtral": adapted, "gpt_oss": adapted}


@pytest.mark.parametrize(
    ("family", "way", "settings"),
    [
        *((family, way, {}) for family, way in WAYS.items()),
        ("gpt_oss", loftq_cli.load, {}),
        *((family, loftq_cli.load, {"method": "trellis"}) for family in ("mixtral", "gpt_oss")),
    ],
)
def test_experts_of_every_family_stay_packed_and_train(family, way, settings, tmp_path) -> None:
    """Converted by default; loaded, trained, saved by PEFT, loaded again, and merged. The zoo
    loads in both ways."""
    source = models.save(moe.family(family), tmp_path / "source")
    output, trained = tmp_path / "out", tmp_path / "trained"
    manifest = loftq_cli.convert(source, output=output, **QUICK, **settings)
    assert manifest["recipe"]["layout"] == "loftq"
    assert any(".experts." in entry["name"] for entry in manifest["matrices"])
    left = [entry["name"] for entry in manifest["passed_through"] if ".experts." in entry["name"]]
    assert all(name.endswith("_bias") for name in left)
    merge(output, tmp_path / "merged", observer=Observer())
    reference = logits(model_class(source).from_pretrained(tmp_path / "merged"))
    model = way(output)
    tolerance = 1e-5 * float(reference.abs().max())
    torch.testing.assert_close(logits(model), reference, rtol=0, atol=tolerance)
    before, after = train(model)
    assert after < before
    model.save_pretrained(trained)
    again = logits(loftq_cli.load(output, adapter=trained))
    assert torch.equal(again, logits(model))
    merge(output, tmp_path / "both", adapter=trained, observer=Observer())
    both = logits(model_class(source).from_pretrained(tmp_path / "both"))
    torch.testing.assert_close(both, again, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("settings", "layout", "converted"),
    [
        ({}, "loftq", True),
        ({"layout": "loftq"}, "loftq", True),
        ({"exclude": ("*.experts.*",)}, "gptq", False),
        ({"layout": "dense"}, "dense", False),
        ({"layout": "compressed"}, "compressed", False),  # unless they are included
        ({"rank": 48}, "gptq", False),  # an expert has a side of 32
    ],
)
def test_which_experts_are_converted(settings, layout, converted, mixture, tmp_path) -> None:
    manifest = loftq_cli.convert(mixture("qwen3_moe"), tmp_path / "out", **{**QUICK, **settings})
    assert manifest["recipe"]["layout"] == layout
    found = [entry for entry in manifest["matrices"] if ".experts." in entry["name"]]
    assert len(found) == (24 if converted else 0)


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("method", ["uniform", "uniform-symmetric"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_in_layout_compressed_are_read_packed_and_by_transformers_alone(
    kind, method, mixture, tmp_path
) -> None:
    output, settings = tmp_path / "out", {**EXPERTS, **QUICK, "method": method, "block_size": 32}
    loftq_cli.convert(mixture(kind), output, **{**settings, "bits": 4, "layout": "compressed"})
    merge(output, tmp_path / "merged", observer=Observer())
    reference = logits(model_class(output).from_pretrained(tmp_path / "merged"))
    tolerance = 1e-5 * float(reference.abs().max())
    model = loftq_cli.load(output)
    torch.testing.assert_close(logits(model), reference, rtol=0, atol=tolerance)
    before, after = train(model)
    assert after < before
    if method == "uniform":
        return  # transformers 5.23 decodes experts without their zero points, and raises
    loftq_cli.export(output, tmp_path / "dense", layout="dense")
    entry = transformers.CompressedTensorsConfig(dequantize=True)
    alone = model_class(output).from_pretrained(
        output, dtype=torch.float32, quantization_config=entry
    )
    expected_state = model_class(output).from_pretrained(tmp_path / "dense").state_dict()
    assert all(torch.equal(t, expected_state[name]) for name, t in alone.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (
            "mixtral",
            "24 tensors of experts with 196,608 weights are passed through; --include "
            "'*.experts.*' converts them, in layout loftq or dense",
        ),
        (
            "deepseek_v3",
            "12 tensors of experts with 24,576 weights, and 6 layers that PEFT takes "
            "for experts are passed through; --include '*.experts.*' converts them, in layout "
            "loftq or dense",
        ),
        (
            "gpt_oss",
            "4 tensors of experts with 196,608 weights are passed through; --include "
            "'*.experts.*' converts them, in layout loftq",
        ),
        ("llama", None),
    ],
)
def test_one_line_counts_what_is_passed_through(kind, line, mixture, tmp_path) -> None:
    source = models.save(models.llama(), tmp_path / kind) if kind == "llama" else mixture(kind)
    opened = open_source(source)
    config, found = opened.config.content, anatomy_of(opened)
    kept = select(opened.tensors, config, anatomy=found).kept
    assert experts.note(kept, config, found.experts) == line


def test_layers_that_peft_mistakes_for_experts_say_so(mixture, tmp_path) -> None:
    manifest = loftq_cli.convert(mixture("deepseek_v3"), output=tmp_path / "out", **QUICK)
    reasons = {entry["name"]: entry["reason"] for entry in manifest["passed_through"]}
    for name in ("0.mlp.up_proj", "1.mlp.shared_experts.gate_proj"):
        assert reasons[f"model.layers.{name}.weight"] == "PEFT takes it for an expert"


@pytest.mark.parametrize(
    ("kind", "settings", "error", "words"),
    [
        ("mixtral", {**EXPERTS, "layout": "gptq"}, LayoutError, "cannot hold experts"),
        ("mixtral", {"exclude": ("*.experts.0.*",)}, UsageError, "all experts or none"),
        ("qwen3_moe", {**EXPERTS, "rank": 48}, UsageError, "has rank 32"),
        ("mixtral", {**EXPERTS, "rank_map": "*.w1.*=4"}, UsageError, "has rank 4"),
        ("gpt_oss", EXPERTS, LayoutError, "_proj, which is of all experts of a layer"),
        ("gpt_oss", {"exclude": ("*.experts.0.*",)}, UsageError, "all experts or none"),
        ("gpt_oss", {"include": ("*.experts.*",), "rank": 80}, UsageError, "has rank 64"),
        ("deepseek_v3", {"include": ("*.0.mlp.*",)}, UsageError, "takes it for an expert"),
    ],
)
def test_what_would_not_load_is_refused(kind, settings, error, words, mixture, tmp_path) -> None:
    with pytest.raises(error, match=words):
        loftq_cli.convert(mixture(kind), output=tmp_path / "out", **{**QUICK, **settings})
