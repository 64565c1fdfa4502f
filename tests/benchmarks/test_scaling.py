"""The simulation of many devices: its ends are known, and it leaves no job out."""

from __future__ import annotations

from pathlib import Path

import pytest

from loftq_cli.checkpoint.request import Request
from loftq_cli.conversion.jobs import jobs
from loftq_cli.conversion.prepare import prepare
from loftq_cli.machine.observer import Observer
from loftq_cli.settings.options import Options
from tests.benchmarks.scaling import shapes
from tests.benchmarks.scaling.costs import Costs, measure
from tests.benchmarks.scaling.simulate import HASHES, load, simulate
from tests.support import checkpoints


def test_one_device_takes_the_sum_many_the_longest_and_a_slow_disk_all_bytes(
    tmp_path: Path,
) -> None:
    model = checkpoints.write(tmp_path / "model", checkpoints.llama(layers=2), cuts=(6, 13))
    options = Options(threads=1, rank=4, layout="loftq")
    plan, _ = prepare(Request(str(model)), tmp_path / "out", options, observer=Observer())
    sides = {item.matrix.shape for item in plan.matrices.values()}
    costs = Costs({(a, b): a * b * 1e-3 for a, b in sides}, 0.0, "a device")
    found = jobs(plan)
    loads = [load(plan, job, costs) for job in found]
    by_job = {id(job): each for job, each in zip(found, loads, strict=True)}
    elements = sum(item.matrix.elements for item in plan.matrices.values())
    assert sum(each.seconds for each in loads) == pytest.approx(elements * 1e-3)
    # Read twice: every matrix by itself, and every shard as a whole.
    sizes = sum(shard.source.header.size for shard in plan.shards)
    matrices = sum(t.nbytes for t in plan.source.tensors if t.name in plan.matrices)
    assert sum(each.read for each in loads) == sizes + matrices
    written = sum(each.written for each in loads)
    assert written > plan.backbone_bytes

    fast = simulate(found, by_job, 1, 1e15, 0.0)
    assert fast.seconds == pytest.approx(elements * 1e-3, rel=1e-6)
    assert fast.limit == "the devices"
    many = simulate(found, by_job, len(found), 1e15, 0.0)
    assert many.seconds == pytest.approx(max(each.seconds for each in loads), rel=1e-6)
    two = simulate(found, by_job, 2, 1e15, 0.0)
    assert fast.seconds / 2 <= two.seconds <= fast.seconds / 2 + max(e.seconds for e in loads)
    slow = simulate(found, by_job, len(found), 1.0, 0.0)
    moved = sum(each.read + each.written for each in loads)
    assert slow.seconds - slow.last == pytest.approx(moved, rel=0.1)
    assert slow.last == pytest.approx(HASHES * written)


def test_checkpoints_of_headers_have_the_sizes_of_the_models() -> None:
    """Parameters as published: 69.0, 405.9 and 671.0 billion."""
    counts = {"Llama-2-70B": 68.98e9, "Llama-3.1-405B": 405.85e9, "DeepSeek-V3": 671.0e9}
    for name, config in shapes.MODELS.items():
        weights = (t for t in shapes.tensors(config) if not t.name.endswith("_scale_inv"))
        found = sum(spec.elements for spec in weights)
        assert found == pytest.approx(counts[name], rel=0.001), name


def test_a_checkpoint_of_headers_can_be_planned(tmp_path: Path) -> None:
    small = {**shapes.DEEPSEEK_V3, "num_hidden_layers": 4, "n_routed_experts": 8, "n_group": 1}
    model = shapes.write(tmp_path / "model", {**small, "topk_group": 1})
    options = Options(threads=1, layout="loftq")
    plan, _ = prepare(Request(str(model)), tmp_path / "out", options, observer=Observer())
    # Shared experts and dense layers stay as they are: PEFT would take them for experts.
    assert len(plan.matrices) == 4 * 5 + 8 * 3
    assert plan.source.encoded == ("FP8",)


def test_costs_are_kept_as_they_were_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tests.benchmarks.scaling.costs.MOST", 64 * 32)
    costs = measure([(64, 64), (32, 64)])
    assert costs.matrices.keys() == {(64, 64), (32, 64)}
    assert min(*costs.matrices.values(), costs.byte) > 0
    costs.write(tmp_path / "costs.json")
    assert Costs.read(tmp_path / "costs.json") == costs
