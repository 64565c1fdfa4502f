"""What a target is settled by: errors of a sample, without the adapter's part, in the loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import loftq_cli
from loftq_cli.checkpoint.source import open_source
from loftq_cli.machine.observer import Observer
from loftq_cli.planning import estimate, target
from loftq_cli.planning.decomposer import Decomposer
from loftq_cli.planning.make import make_plan
from loftq_cli.settings.options import Options
from loftq_cli.statistics.file import statistics_for
from loftq_cli.statistics.writer import StatisticsWriter
from tests.support import checkpoints
from tests.support.synthetic import llm_like

SHAPES = {
    f"model.layers.{number}.mlp.{kind}_proj.weight": shape
    for number in (0, 1)
    for kind, shape in (("a", (64, 128)), ("b", (96, 64)))
}
WIDTHS = (2, 3, 4, 8)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Four matrices of two sizes, of magnitudes that differ."""
    tensors = {
        name: llm_like(*shape, seed=number) * (1 + number)
        for number, (name, shape) in enumerate(SHAPES.items())
    }
    return checkpoints.write(tmp_path / "model", tensors)


def written(
    path: Path, moments: Mapping[str, torch.Tensor], sensitivity: Mapping[str, float]
) -> str:
    with StatisticsWriter(path, moments, sensitivity=sensitivity) as writer:
        for name, value in moments.items():
            writer.add([name], value, 10)
        writer.publish()
    return str(path)


def converted(model: Path, **settings: Any) -> dict[str, dict[str, Any]]:
    """What the manifest says of every matrix."""
    given = {"layout": "loftq", "threads": 1, "overwrite": True, **settings}
    manifest = loftq_cli.convert(model, model.parent / "out", **given)
    return {record["name"]: record for record in manifest["matrices"]}


def test_with_sensitivities_the_loss_is_made_least(model: Path, tmp_path: Path) -> None:
    """Against every choice of widths. The last matrix has no sensitivity: the others' mean."""
    moments = {name: torch.ones(shape[1]) for name, shape in SHAPES.items()}
    worth = dict(zip(SHAPES, (5.0, 0.01, 0.4)))
    stats = written(tmp_path / "stats", moments, worth)
    plain = written(tmp_path / "plain", moments, {})
    worth[list(SHAPES)[3]] = sum(worth.values()) / 3
    alone = {"iters": 0, "rank": 1, "stats": stats}
    every = {bits: converted(model, bits=bits, **alone) for bits in WIDTHS}

    def loss(widths: Mapping[str, int]) -> float:
        return sum(
            worth[name] * every[bits][name]["weighted"]["quantized"] ** 2 / 2
            for name, bits in widths.items()
        )

    elements = {name: math.prod(shape) for name, shape in SHAPES.items()}
    differing = 0
    for bpw in (2.9, 3.25, 4.6):
        choices = [dict(zip(SHAPES, bits)) for bits in itertools.product(WIDTHS, repeat=4)]
        best = min(
            loss(widths)
            for widths in choices
            if sum(every[b][n]["bits_per_weight"] * elements[n] for n, b in widths.items())
            <= bpw * sum(elements.values())
        )
        by_loss, by_error = (
            converted(model, target_bpw=bpw, **{**alone, "stats": each}) for each in (stats, plain)
        )
        found = loss({name: record["bits"] for name, record in by_loss.items()})
        assert found == pytest.approx(best, rel=1e-5)
        differing += loss({name: record["bits"] for name, record in by_error.items()}) > 1.01 * best
    assert differing


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_what_the_adapter_takes_is_not_counted(kind: str, model: Path, tmp_path: Path) -> None:
    """Errors along the inputs' few large directions, which a pair of that rank takes away."""
    moments = {}
    for number, (name, (_, width)) in enumerate(SHAPES.items()):
        drawn = torch.randn(width, 4, generator=torch.Generator().manual_seed(number))
        large = torch.linalg.qr(drawn).Q
        if kind == "diagonal":
            moments[name] = torch.ones(width)
            moments[name][3 : 3 + 4] = 1e4
        else:
            moments[name] = 1e4 * large @ large.T + torch.eye(width)
    stats = written(tmp_path / "stats", moments, {})
    source = open_source(model)

    def estimated(**settings: Any) -> dict[str, list[float]]:
        options = Options(target_bpw=3.5, threads=1, stats=stats, **settings)
        plan = make_plan(source, options.resolve(), statistics_for(source, stats))
        return estimate.estimate(plan, target._forms(plan), Observer())

    whole, rest = estimated(iters=0, rank=4), estimated(iters=1, rank=4)
    everything = estimated(iters=1, rank=64)
    settings = {"iters": 1, "rank": 4, "feedback": False, "stats": stats}
    for place, bits in enumerate(WIDTHS[:2]):
        for name, record in converted(model, bits=bits, **settings).items():
            weighted = record["weighted"]
            assert weighted["quantized"] ** 2 == pytest.approx(whole[name][place], rel=1e-3)
            assert weighted["final"] ** 2 == pytest.approx(rest[name][place], rel=0.2)
            assert rest[name][place] < 0.05 * whole[name][place]
            assert everything[name][place] < 1e-3 * rest[name][place] or SHAPES[name][1] > 64


def test_rows_are_sampled_over_the_whole_matrix(tmp_path: Path) -> None:
    """Noise that grows from row to row: the sample's estimate is that of the matrix."""
    growing = torch.linspace(0.1, 2, 1500)[:, None]
    weight = torch.randn(1500, 64, generator=torch.Generator().manual_seed(0)) * growing
    tensors = {"h.0.weight": weight.to(torch.bfloat16)}
    source = open_source(checkpoints.write(tmp_path / "m", tensors))
    plan = make_plan(source, Options(target_bpw=3.5, threads=1).resolve())
    forms = target._forms(plan)
    (sampled,) = estimate.estimate(plan, forms, Observer()).values()
    rows = weight.to(torch.bfloat16).float()
    decomposer = Decomposer(plan.recipe, plan.layout, plan.device)
    whole = [estimate.squared_residual(rows, form, decomposer) for form in forms["h.0.weight"]]
    assert sampled == pytest.approx(whole, rel=0.05)
    assert sampled != whole
