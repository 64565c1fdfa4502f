"""What a plan settles from the headers: method, layout, ranks, shards, names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from loftq_cli.checkpoint.source import open_source
from loftq_cli.errors import CorruptFileError, EnvironmentFailure, LayoutError, UsageError
from loftq_cli.planning.choices import choose_devices
from loftq_cli.planning.make import make_plan
from loftq_cli.planning.plan import Plan
from loftq_cli.settings.options import Options
from tests.support import checkpoints
from tests.support.checkpoints import BERT, LLAMA
from tests.support.stand_in.runtime import stand_in_devices

BART = {"architectures": ["BartForConditionalGeneration"], "is_encoder_decoder": True}
VISION = {"architectures": ["ViTForImageClassification"]}
BART_TENSORS = {
    f"model.{stack}.layers.0.fc1.weight": torch.zeros(64, 64) for stack in ("encoder", "decoder")
}

Planner = Callable[..., Plan]


@pytest.fixture
def planned(tmp_path: Path) -> Planner:
    """The plan of a conversion of these tensors with these settings."""

    def plan(
        tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any] = LLAMA,
        cuts: tuple[int, ...] = (),
        **settings: Any,
    ) -> Plan:
        source = checkpoints.write(tmp_path / "model", tensors, config, cuts)
        return make_plan(open_source(source), Options(**settings).resolve())

    return plan


@pytest.mark.parametrize(
    ("config", "settings", "method", "layout"),
    [
        (LLAMA, {}, "nf", "bnb"),
        (LLAMA, {"bits": 2}, "uniform", "gptq"),
        (LLAMA, {"bits": 3}, "uniform", "gptq"),
        (LLAMA, {"bits": 4}, "nf", "bnb"),
        (LLAMA, {"bits": 8}, "uniform", "gptq"),
        (LLAMA, {"bits": 4, "method": "uniform"}, "uniform", "gptq"),
        (LLAMA, {"bits": 2, "method": "nf"}, "nf", "loftq"),
        (LLAMA, {"bits": 4, "method": "nf-symmetric"}, "nf-symmetric", "loftq"),
        (LLAMA, {"method": "uniform-block"}, "uniform-block", "loftq"),
        (LLAMA, {"bits": 2, "method": "uniform-tensor"}, "uniform-tensor", "loftq"),
        (LLAMA, {"preset": "paper"}, "nf", "bnb"),
        (LLAMA, {"preset": "paper", "bits": 2}, "nf", "loftq"),
        (LLAMA, {"bits": 2, "layout": "dense"}, "uniform", "dense"),
        (LLAMA, {"layout": "gptq"}, "uniform", "gptq"),
        (LLAMA, {"layout": "bnb"}, "nf", "bnb"),
        (BERT, {}, "nf", "bnb"),
        (BERT, {"bits": 2}, "uniform", "loftq"),
        (VISION, {"bits": 2}, "uniform", "loftq"),
        ({}, {"bits": 2}, "uniform", "loftq"),
    ],
)
def test_method_and_layout_that_auto_chooses(
    config: dict[str, Any], settings: dict[str, Any], method: str, layout: str, planned: Planner
) -> None:
    plan = planned(checkpoints.llama(), config, **settings)
    assert (plan.recipe.method, plan.recipe.layout) == (method, layout)
    assert plan.layout_note is None


def test_an_encoder_decoder_takes_layout_loftq(planned: Planner) -> None:
    assert planned(BART_TENSORS, BART, bits=2).recipe.layout == "loftq"


@pytest.mark.parametrize(
    ("settings", "first", "reason"),
    [
        ({}, "bnb", "in_features 96 is not a multiple of 64"),
        ({"bits": 4, "block_size": 32}, "bnb", "blocks of 64, not 32"),
        ({"bits": 3, "block_size": 256}, "gptq", "groups of 32, 64 or 128, not 256"),
    ],
)
def test_auto_takes_layout_loftq_with_a_note_where_a_matrix_does_not_fit(
    settings: dict[str, Any], first: str, reason: str, planned: Planner
) -> None:
    plan = planned(checkpoints.llama(intermediate=96), **settings)
    assert plan.recipe.layout == "loftq"
    assert not plan.auto_layout
    assert plan.layout_note is not None
    assert f"{first} cannot hold" in plan.layout_note
    assert reason in plan.layout_note
    assert ".weight" in plan.layout_note


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({}, "layout loftq, because bnb has no int8 scales"),
        ({"bits": 2}, "layout loftq, because gptq has no int8 scales"),
        ({"bits": 2, "method": "fitted"}, None),
        ({"layout": "loftq"}, None),
    ],
)
def test_auto_takes_layout_loftq_for_scales_that_only_it_has(
    settings: dict[str, Any], note: str | None, planned: Planner
) -> None:
    plan = planned(checkpoints.llama(), scale_dtype="int8", **settings)
    assert (plan.recipe.layout, plan.recipe.scale_dtype) == ("loftq", "int8")
    assert not plan.auto_layout
    assert plan.layout_note == note


def test_an_explicit_layout_that_cannot_hold_a_matrix_lists_every_one(planned: Planner) -> None:
    with pytest.raises(LayoutError) as caught:
        planned(checkpoints.llama(hidden=64, intermediate=40), bits=2, layout="gptq")
    assert caught.value.exit_code == 2
    for module in ("gate_proj", "up_proj", "down_proj"):
        assert f"mlp.{module}.weight" in caught.value.message
    assert "q_proj" not in caught.value.message
    assert "--layout loftq" in caught.value.hint


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("bnb", {"bits": 2}),
        ("bnb", {"method": "uniform"}),
        ("bnb", {"block_size": 128}),
        ("gptq", {"method": "nf"}),
        ("gptq", {"method": "uniform-block"}),
        ("gptq", {"block_size": 256}),
    ],
)
def test_an_explicit_layout_that_contradicts_the_settings(
    layout: str, settings: dict[str, Any], planned: Planner
) -> None:
    with pytest.raises(LayoutError, match=rf"--layout {layout} cannot hold .*q_proj"):
        planned(checkpoints.llama(), layout=layout, **settings)


def test_gptq_refuses_a_model_with_two_stacks_of_blocks(planned: Planner) -> None:
    with pytest.raises(LayoutError, match=r"model\.decoder\.layers, model\.encoder\.layers"):
        planned(BART_TENSORS, BART, bits=2, layout="gptq")


def test_ranks_are_clamped_to_the_smaller_side(planned: Planner) -> None:
    plan = planned(checkpoints.llama(hidden=64, intermediate=24), rank=48)
    ranks = {name.split(".")[-2]: item.rank for name, item in plan.matrices.items()}
    assert (ranks["q_proj"], ranks["gate_proj"], ranks["down_proj"]) == (48, 24, 24)
    shapes = {spec.name.split(".", 4)[-1]: spec.shape for spec in plan.adapter_specs}
    assert shapes["0.mlp.gate_proj.lora_A.weight"] == (24, 64)
    assert shapes["0.mlp.gate_proj.lora_B.weight"] == (24, 24)


@pytest.mark.parametrize(
    ("alpha", "scalings"), [(None, {48: 1.0, 24: 1.0}), (96.0, {48: 2.0, 24: 4.0})]
)
def test_the_scaling_is_lora_alpha_over_the_clamped_rank(
    alpha: float | None, scalings: dict[int, float], planned: Planner
) -> None:
    plan = planned(checkpoints.llama(hidden=64, intermediate=24), rank=48, lora_alpha=alpha)
    assert {item.rank: item.scaling for item in plan.matrices.values()} == scalings


@pytest.mark.parametrize(
    ("dtype", "setting", "tag"),
    [
        (torch.bfloat16, "source", "BF16"),
        (torch.float16, "source", "F16"),
        (torch.float16, "float32", "F32"),
        (torch.float32, "bfloat16", "BF16"),
    ],
)
def test_the_adapter_takes_the_dtype_of_its_matrix_unless_asked_otherwise(
    dtype: torch.dtype, setting: str, tag: str, planned: Planner
) -> None:
    plan = planned(checkpoints.llama(dtype=dtype), adapter_dtype=setting)
    assert {spec.dtype for spec in plan.adapter_specs} == {tag}


def test_one_source_file_becomes_one_file_and_shards_become_shards(planned: Planner) -> None:
    tensors = checkpoints.llama()
    names = list(tensors)
    assert [shard.name for shard in planned(tensors).shards] == ["model.safetensors"]
    (Path(planned(tensors).source.directory) / "model.safetensors").unlink()
    plan = planned(tensors, cuts=(2, 7))
    assert [shard.name for shard in plan.shards] == [
        f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)
    ]
    held = [{spec.name for spec in shard.specs} for shard in plan.shards]
    for shard, (start, stop) in enumerate(((0, 2), (2, 7), (7, len(names)))):
        assert held[shard] >= set(names[start:stop])


def test_shards_of_other_names_are_renamed_in_their_order(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path, checkpoints.llama(), cuts=(5,))
    index = source / "model.safetensors.index.json"
    for number, letter in ((1, "b"), (2, "a")):
        (source / f"model-0000{number}-of-00002.safetensors").rename(
            source / f"{letter}.safetensors"
        )
        text = index.read_text()
        index.write_text(text.replace(f"model-0000{number}-of-00002", letter))
    plan = make_plan(open_source(source), Options().resolve())
    assert [(shard.source.name, shard.name) for shard in plan.shards] == [
        ("a.safetensors", "model-00001-of-00002.safetensors"),
        ("b.safetensors", "model-00002-of-00002.safetensors"),
    ]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("model.layers.0.self_attn.q_proj.scales", {"bits": 2}),
        ("model.layers.0.self_attn.q_proj.weight.absmax", {}),
        ("model.layers.0.self_attn.q_proj.weight_zeros", {"bits": 2, "layout": "loftq"}),
    ],
)
@pytest.mark.parametrize("cuts", [(), (3,)], ids=["one file", "two shards"])
def test_a_source_tensor_whose_name_the_output_needs_is_refused(
    name: str, settings: dict[str, Any], cuts: tuple[int, ...], planned: Planner
) -> None:
    with pytest.raises(CorruptFileError, match=f"'{name}' is already taken"):
        planned({**checkpoints.llama(), name: torch.zeros(2)}, cuts=cuts, **settings)


def test_sizes_are_those_of_the_tensors(planned: Planner) -> None:
    tensors = {"model.layers.0.q_proj.weight": torch.zeros(64, 64), "norm.weight": torch.zeros(64)}
    plan = planned(tensors, rank=4)
    assert plan.source_bytes == (64 * 64 + 64) * 4
    assert plan.parameters == 64 * 64 + 64
    assert plan.adapter_bytes == 2 * 4 * 64 * 4
    # 4-bit codes and one float32 scale for every 64 of them; bnb adds its table and its state.
    assert plan.bits_per_weight >= 4 + 32 / 64
    assert plan.backbone_bytes == round(64 * 64 * plan.bits_per_weight / 8) + 64 * 4


def test_every_resolved_setting_is_part_of_the_fingerprint(planned: Planner) -> None:
    tensors = checkpoints.llama()
    changes: list[dict[str, Any]] = [
        {"rank": 3},
        {"bits": 3},
        {"iters": 3},
        {"threads": 1},
        {"seed": 3},
        {"block_size": 32},
        {"method": "uniform"},
        {"layout": "loftq"},
        {"scale": "absmax"},
        {"scale_dtype": "bfloat16"},
        {"scale_dtype": "int8"},
        {"order": "svd-first"},
        {"svd": "exact"},
        {"preset": "paper"},
        {"include": ["lm_head.weight"]},
        {"exclude": ["*.q_proj.*"]},
        {"lora_alpha": 16.0},
        {"adapter_dtype": "float16"},
        {"dense_dtype": "float16"},
        {"bits": 2.5},
        {"bits_map": "*.q_proj.*=2"},
        {"bits_map": "*.q_proj.*=3"},
        {"rank_map": "*.q_proj.*=2"},
        {"target_bpw": 3.5},
        {"target_bpw": 3},
    ]
    settings = [{"threads": 2, **change} for change in [{}, *changes]]
    prints = [planned(tensors, **each).fingerprint for each in settings]
    assert len(set(prints)) == len(prints)
    assert planned(tensors, threads=2).fingerprint == prints[0]


def test_the_fingerprint_depends_on_the_headers_and_not_on_the_path(tmp_path: Path) -> None:
    def fingerprint(directory: str, **sizes: Any) -> str:
        source = checkpoints.write(tmp_path / directory, checkpoints.llama(**sizes))
        return make_plan(open_source(source), Options().resolve()).fingerprint

    assert fingerprint("a") == fingerprint("b")
    assert fingerprint("a") == fingerprint("c", seed=1)  # contents are hashed as they are read
    assert fingerprint("a") != fingerprint("d", intermediate=64)


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "mps", "meta", "", "cpu,", "tpu,cuda:0"])
def test_an_unknown_device_is_a_usage_error(device: str, planned: Planner) -> None:
    with pytest.raises(UsageError, match="--device"):
        planned(checkpoints.llama(), device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_a_failure_of_the_environment(planned: Planner) -> None:
    with pytest.raises(EnvironmentFailure, match="0 CUDA devices"):
        planned(checkpoints.llama(), device="cuda:0")


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("cuda:0,cuda:0", "cuda:0 is named twice"),
        ("cuda,cuda:0", "cuda:0 is named twice"),
        ("cuda:0,cpu", "have to be CUDA devices"),
        ("cpu,cpu", "have to be CUDA devices"),
        ("all,cuda:0", "all and auto are given alone"),
        ("cuda:1,auto", "all and auto are given alone"),
    ],
)
def test_devices_that_cannot_be_together_are_a_usage_error(device: str, said: str) -> None:
    with stand_in_devices(2), pytest.raises(UsageError, match=said):
        choose_devices(device)


def test_one_of_several_devices_that_is_not_there_is_named() -> None:
    with stand_in_devices(2), pytest.raises(EnvironmentFailure, match="cuda:2: torch sees 2 CUDA"):
        choose_devices("cuda:0,cuda:2")
    with stand_in_devices(0), pytest.raises(EnvironmentFailure, match="sees no CUDA device"):
        choose_devices("all")


def test_all_are_those_that_torch_sees() -> None:
    with stand_in_devices(3):
        assert [str(device) for device in choose_devices("all")] == ["cuda:0", "cuda:1", "cuda:2"]
        assert choose_devices("auto") == choose_devices("cuda") == (torch.device("cuda", 0),)


def test_devices_that_multiply_otherwise_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in_devices(2):
        newer = lambda device: (8, 0) if device.index else (7, 5)  # noqa: E731
        monkeypatch.setattr(torch.cuda, "get_device_capability", newer)
        with pytest.raises(UsageError, match="some multiply in bfloat16"):
            choose_devices("all")
