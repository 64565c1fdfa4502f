"""Which matrix gets which width and rank: maps, the paper's mix, and what contradicts itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loftq_cli.checkpoint.source import open_source
from loftq_cli.errors import LayoutError, PatternError, UsageError
from loftq_cli.planning.make import make_plan
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.widths import assign_ranks, assign_widths
from loftq_cli.settings.options import Options
from tests.support import checkpoints
from tests.support.checkpoints import BERT, LLAMA
from tests.support.contents import Converter

Planner = Callable[..., Plan]


def names(stacks: Mapping[str, int]) -> list[str]:
    return [
        f"{stack}.{number}.{module}.weight"
        for stack, count in stacks.items()
        for number in range(count)
        for module in ("q", "k")
    ]


def widths(stacks: Mapping[str, int], also: Sequence[str] = (), **settings: Any) -> dict[str, Any]:
    every = [*names(stacks), *also]
    found = assign_widths(Options(**settings).resolve(), every, every)
    assert list(found) == every
    return found


@pytest.fixture
def planned(tmp_path: Path) -> Planner:
    def plan(config: Mapping[str, Any] = LLAMA, **settings: Any) -> Plan:
        tensors = checkpoints.llama(layers=4) if config is LLAMA else checkpoints.bert(layers=4)
        source = checkpoints.write(tmp_path / "model", tensors, config)
        return make_plan(open_source(source), Options(**settings).resolve())

    return plan


@pytest.mark.parametrize(
    ("layers", "bits", "wide"),
    [
        (32, 2.5, 8),
        (32, 3.5, 24),
        (6, 2.5, 1),
        (10, 2.4, 2),  # 1.9999999999999996 in binary
        (10, 2.2, 1),
        (3, 2.1, 0),
        (1, 3.9, 0),
        (12, 3.99, 11),
    ],
)
def test_the_first_layers_of_the_paper_s_mix(layers: int, bits: float, wide: int) -> None:
    """int(L * (bits - 2) / 2) of the L layers have 4 bits."""
    found = widths({"model.layers": layers}, bits=bits)
    expected = [4] * wide + [2] * (layers - wide)
    assert [found[f"model.layers.{number}.q.weight"] for number in range(layers)] == expected
    assert [found[f"model.layers.{number}.k.weight"] for number in range(layers)] == expected


def test_layers_are_counted_as_numbers_and_stack_by_stack() -> None:
    stacks = {"encoder.layers": 12, "decoder.layers": 4}
    found = widths(stacks, ["head.weight"], bits=3)
    assert set(found.values()) == {3}
    found = widths(stacks, ["head.weight"], bits=2.5)
    wide = {name for name, bits in found.items() if bits == 4}
    assert wide == set(names({"encoder.layers": 3, "decoder.layers": 1}))
    assert found["head.weight"] == 2


def test_layers_whose_matrices_are_passed_through_are_counted() -> None:
    every = names({"h": 8})
    chosen = [name for name in every if not name.startswith(("h.0.", "h.1."))]
    found = assign_widths(Options(bits=2.5).resolve(), chosen, every)
    assert set(found.values()) == {2}


def test_a_map_overrules_the_rule_for_its_names() -> None:
    found = widths({"h": 4}, bits=2.5, bits_map="*.q.weight=3,h.3.*=8")
    assert [found[f"h.{number}.q.weight"] for number in range(4)] == [3, 3, 3, 8]
    assert [found[f"h.{number}.k.weight"] for number in range(4)] == [4, 2, 2, 8]


def test_a_fraction_that_the_map_leaves_nothing_to_is_a_contradiction() -> None:
    with pytest.raises(UsageError, match=r"--bits-map leaves no matrix to --bits 2\.5"):
        widths({"h": 4}, bits=2.5, bits_map="*=4")
    assert set(widths({"h": 4}, bits=2, bits_map="*=4").values()) == {4}


@pytest.mark.parametrize("bits", [2.0, 3.0, 4.0, 8.0])
def test_whole_numbers_are_widths(bits: float) -> None:
    resolved = Options(bits=bits).resolve().bits
    assert (resolved, type(resolved)) == (bits, int)


@pytest.mark.parametrize("bits", [1.5, 4.5, 5.0, 1.99, float("nan"), float("inf")])
def test_other_numbers_are_not(bits: Any) -> None:
    with pytest.raises(UsageError, match="not one of 2, 3, 4, 8, nor a fraction between 2 and 4"):
        Options(bits=bits).resolve()


def test_a_width_in_quotes_is_text() -> None:
    with pytest.raises(UsageError, match=r"--bits '2\.5': must be a number, not text"):
        Options(bits="2.5").resolve()


@pytest.mark.parametrize("entry", ["*=0", "*=1", "*=5", "*=16"])
def test_widths_that_there_are_not(entry: str) -> None:
    with pytest.raises(UsageError, match=r"--bits-map .*not one of 2, 3, 4, 8"):
        Options(bits_map=entry).resolve()


@pytest.mark.parametrize("entry", ["*=0", "*=65537"])
def test_ranks_out_of_range(entry: str) -> None:
    with pytest.raises(UsageError, match=r"--rank-map .*from 1 to 65536"):
        Options(rank_map=entry).resolve()


def test_ranks_by_name() -> None:
    settings = Options(rank=8, rank_map="*.q.weight=32").resolve()
    assert assign_ranks(settings, names({"h": 1})) == {"h.0.q.weight": 32, "h.0.k.weight": 8}


def test_ranks_are_clamped_to_the_matrix(planned: Planner) -> None:
    plan = planned(rank=4, rank_map="*.q_proj.*=500")
    ranks = {name.split(".")[-2]: item.rank for name, item in plan.matrices.items()}
    assert (ranks["q_proj"], ranks["k_proj"]) == (64, 4)


def test_a_pattern_that_matches_nothing_selected(planned: Planner) -> None:
    for pattern in ("*.qq_proj.*", "lm_head.weight"):
        with pytest.raises(PatternError, match="matches no matrix to quantize"):
            planned(bits_map=f"{pattern}=4")
        with pytest.raises(PatternError, match="matches no matrix to quantize"):
            planned(rank_map=f"{pattern}=4")
    plan = planned(include="lm_head.weight", bits_map="lm_head.weight=8")
    assert plan.matrices["lm_head.weight"].matrix.bits == 8


def test_levels_are_fitted_up_to_four_bits() -> None:
    with pytest.raises(UsageError, match="--method fitted --bits 8"):
        Options(method="fitted", bits_map="*=8").resolve()


@pytest.mark.parametrize(
    ("settings", "methods", "method", "layout"),
    [
        ({"bits": 2.5}, {(2, "uniform"), (4, "nf")}, "auto", "loftq"),
        ({"bits": 2.5, "method": "nf"}, {(2, "nf"), (4, "nf")}, "nf", "loftq"),
        ({"bits": 2.5, "preset": "paper"}, {(2, "nf"), (4, "nf")}, "nf", "loftq"),
        ({"bits": 2, "bits_map": "*.q_proj.*=3"}, {(2, "uniform"), (3, "uniform")}, None, "loftq"),
        ({"bits": 2, "bits_map": "*=4"}, {(4, "nf")}, "nf", "bnb"),
        ({"bits": 4, "bits_map": "*=3"}, {(3, "uniform")}, "uniform", "gptq"),
        ({"bits": 2.5, "layout": "dense"}, {(2, "uniform"), (4, "nf")}, "auto", "dense"),
    ],
)
def test_method_and_layout_of_mixed_widths(
    settings: dict[str, Any],
    methods: set[tuple[int, str]],
    method: str | None,
    layout: str,
    planned: Planner,
) -> None:
    plan = planned(**settings)
    kinds = {(item.matrix.bits, item.matrix.method) for item in plan.matrices.values()}
    assert kinds == methods
    assert plan.recipe.method == (method or "uniform")
    assert plan.recipe.layout == layout
    assert not plan.auto_layout or layout == "gptq"


@pytest.mark.parametrize(
    ("layout", "message"), [("gptq", "several widths"), ("bnb", r"bnb holds 4-bit nf, not 2-bit")]
)
def test_layouts_that_hold_one_width(layout: str, message: str, planned: Planner) -> None:
    with pytest.raises(LayoutError, match=message) as caught:
        planned(bits=2.5, layout=layout)
    assert caught.value.exit_code == 2


def test_auto_says_why_it_takes_layout_loftq(planned: Planner) -> None:
    assert planned(bits=2.5).layout_note == "layout loftq, because bnb and gptq hold one width"
    assert planned(BERT, bits=2.5).recipe.layout == "loftq"


def test_what_is_written_of_mixed_widths_and_ranks(converted: Converter) -> None:
    """The sizes of the stored tensors, worked out by hand for a 64 x 64 matrix."""
    output = converted(
        checkpoints.llama(layers=2),
        bits=3,
        method="nf",
        bits_map="*.0.*=4,*.down_proj.*=8",
        rank=4,
        rank_map="*.1.self_attn.*=2",
    )
    stored = load_file(output / "model.safetensors")
    sizes = {
        name: stored[f"model.layers.{name}.weight"].numel()
        for name in ("0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.down_proj")
    }
    assert sizes == {
        "0.self_attn.q_proj": 64 * 64 * 4 // 8,
        "1.self_attn.q_proj": 64 * 64 * 3 // 8,
        "1.mlp.down_proj": 128 * 64,
    }
    manifest = json.loads((output / "loftq_manifest.json").read_bytes())
    kinds = {record["name"]: (record["bits"], record["rank"]) for record in manifest["matrices"]}
    assert kinds["model.layers.0.mlp.up_proj.weight"] == (4, 4)
    assert kinds["model.layers.0.mlp.down_proj.weight"] == (8, 4)
    assert kinds["model.layers.1.self_attn.k_proj.weight"] == (3, 2)
    assert manifest["recipe"]["bits_map"] == ["*.0.*=4", "*.down_proj.*=8"]
    assert manifest["recipe"]["rank_map"] == ["*.1.self_attn.*=2"]
    adapter = load_file(output / "loftq_init/adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1"
    assert adapter[f"{prefix}.self_attn.k_proj.lora_A.weight"].shape == (2, 64)
    assert adapter[f"{prefix}.mlp.up_proj.lora_B.weight"].shape == (128, 4)
    config = json.loads((output / "loftq_init/adapter_config.json").read_bytes())
    assert config["r"] == 4
    assert set(config["rank_pattern"].values()) == {2}
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert torch.isfinite(adapter[f"{prefix}.mlp.up_proj.lora_B.weight"]).all()
