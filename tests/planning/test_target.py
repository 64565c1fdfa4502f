"""``--target-bpw``: the optimum of what there is, within the budget, settled once."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loftq_cli
from loftq_cli.checkpoint.request import Request
from loftq_cli.checkpoint.source import open_source
from loftq_cli.conversion import engine, run
from loftq_cli.conversion.prepare import prepare
from loftq_cli.errors import LayoutError, NonFiniteWeightError, OutputConflictError, UsageError
from loftq_cli.families.fused import fused_parts
from loftq_cli.machine.observer import Observer
from loftq_cli.planning import target
from loftq_cli.planning.describe import describe
from loftq_cli.planning.make import make_plan
from loftq_cli.settings.options import Options
from tests.support import checkpoints
from tests.support.synthetic import llm_like

PLAIN: dict[str, Any] = {"iters": 0, "rank": 1, "threads": 1}
NAMES = [
    f"model.layers.{number}.mlp.{kind}_proj.weight" for number in (0, 1) for kind in ("a", "b")
]


class Listener(Observer):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.passes: list[str] = []
        self.total = self.done = 0

    def begin(self, total: int, doing: str = "converting", unit: str = "B") -> None:
        self.passes.append(doing)
        self.total, self.done = total, 0

    def advance(self, nbytes: int) -> None:
        self.done += nbytes

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Four matrices of two sizes, of magnitudes that differ, in two shards."""
    shapes = ((64, 128), (96, 64), (64, 128), (96, 64))
    tensors = {
        name: llm_like(*shape, seed=number) * (1 + number)
        for number, (name, shape) in enumerate(zip(NAMES, shapes, strict=True))
    }
    return checkpoints.write(tmp_path / "model", tensors, cuts=(3,))


def figures(manifest: dict[str, Any]) -> dict[str, tuple[int, float]]:
    """(stored bytes, squared residual of plain quantization) of each matrix."""
    return {
        record["name"]: (
            round(record["bits_per_weight"] * math.prod(record["shape"]) / 8),
            record["frobenius"]["quantized"] ** 2,
        )
        for record in manifest["matrices"]
    }


Converting = Callable[..., dict[str, Any]]


@pytest.fixture
def converting(model: Path, tmp_path: Path) -> Converting:
    def convert(**settings: Any) -> dict[str, Any]:
        return loftq_cli.convert(model, tmp_path / "out", overwrite=True, **{**PLAIN, **settings})

    return convert


@pytest.mark.parametrize("full", [False, True])
def test_with_statistics_the_weighted_residual_is_made_least(
    full: bool, model: Path, tmp_path: Path, converting: Converting
) -> None:
    written = {}
    for number, name in enumerate(NAMES):
        width = 128 if number % 2 == 0 else 64
        inputs = torch.randn(300, width, generator=torch.Generator().manual_seed(number))
        inputs *= torch.linspace(0.1, 3, width) * 4.0 ** (3 - number)
        written[name] = loftq_cli.Moments(width, full=full)
        written[name].add(inputs)
    loftq_cli.save_statistics(tmp_path / "stats", written, model=model)
    stats = {"stats": str(tmp_path / "stats")}
    every = {}
    for bits in (2, 3, 4, 8):
        records = converting(bits=bits, layout="loftq", **stats)["matrices"]
        every[bits] = {
            record["name"]: (
                round(record["bits_per_weight"] * math.prod(record["shape"]) / 8),
                record["weighted"]["quantized"] ** 2,
            )
            for record in records
        }
    elements = sum(math.prod(shape) for shape in ((64, 128), (96, 64))) * 2
    differing = 0
    for bpw in (2.9, 3.1, 4.0, 6.0):
        best = min(
            (sum(every[bits][name][1] for bits, name in zip(widths, NAMES)), widths)
            for widths in itertools.product(every, repeat=4)
            if sum(every[bits][name][0] for bits, name in zip(widths, NAMES)) * 8 <= bpw * elements
        )
        found = {r["name"]: r["bits"] for r in converting(target_bpw=bpw, **stats)["matrices"]}
        total = sum(every[found[name]][name][1] for name in NAMES)
        assert total == pytest.approx(best[0], rel=1e-5)
        plain = {r["name"]: r["bits"] for r in converting(target_bpw=bpw)["matrices"]}
        differing += sum(every[plain[name]][name][1] for name in NAMES) > 1.01 * total
    assert differing


def test_what_the_statistics_lack_counts_with_average_inputs(
    model: Path, tmp_path: Path, converting: Converting
) -> None:
    moments = loftq_cli.Moments(128)
    moments.add(torch.full((4, 128), 1e-4))
    loftq_cli.save_statistics(tmp_path / "stats", {NAMES[0]: moments}, model=model)
    found = converting(target_bpw=3.6, stats=str(tmp_path / "stats"))["matrices"]
    plain = converting(target_bpw=3.6)["matrices"]
    # Equal inputs everywhere: the allocation is the one without statistics.
    assert [record["bits"] for record in found] == [record["bits"] for record in plain]


@pytest.mark.parametrize("settings", [{}, {"method": "nf", "scale_dtype": "int8"}])
def test_the_widths_are_those_of_an_exhaustive_search(
    settings: dict[str, Any], converting: Converting
) -> None:
    """Small matrices are not sampled, so that the estimates are what the manifest states."""
    every = {
        bits: figures(converting(bits=bits, layout="loftq", **settings)) for bits in (2, 3, 4, 8)
    }
    elements = sum(math.prod(shape) for shape in ((64, 128), (96, 64))) * 2
    for bpw in (2.9, 3.25, 4.6, 6.0):
        solutions = [
            [every[bits][name] for bits, name in zip(widths, NAMES, strict=True)]
            for widths in itertools.product(every, repeat=4)
        ]
        least = min(
            sum(error for _, error in solution)
            for solution in solutions
            if sum(cost for cost, _ in solution) * 8 <= bpw * elements
        )
        manifest = converting(target_bpw=bpw, **settings)
        found = figures(manifest)
        assert manifest["totals"]["bits_per_weight"] <= bpw
        assert sum(error for _, error in found.values()) == pytest.approx(least, rel=1e-6)
        left = bpw * elements / 8 - sum(cost for cost, _ in found.values())
        upgrades = [
            every[bits][record["name"]][0] - found[record["name"]][0]
            for record in manifest["matrices"]
            for bits in every
            if bits > record["bits"]
        ]
        assert left < min(upgrades)


def test_the_recipe_holds_what_was_asked_for_and_what_was_settled(converting: Converting) -> None:
    manifest = converting(target_bpw=4.5, bits_map=f"{NAMES[1]}=8")
    recipe = manifest["recipe"]
    assert (recipe["bits"], recipe["target_bpw"], recipe["method"]) == (None, 4.5, "auto")
    assert recipe["bits_map"] == [f"{NAMES[1]}=8"]
    settled = {record["name"]: record["bits"] for record in manifest["matrices"]}
    assert settled.pop(NAMES[1]) == 8
    assert recipe["widths"] == sorted(f"{name}={bits}" for name, bits in settled.items())
    assert manifest["totals"]["bits_per_weight"] <= 4.5


def test_the_same_command_makes_no_second_pass(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(**{**PLAIN, "target_bpw": 3.5})

    def convert(output: str) -> tuple[Listener, run.Outcome]:
        listener = Listener()
        plan, path = prepare(Request(str(model)), tmp_path / output, options, observer=listener)
        return listener, run.run(plan, path, overwrite=False, observer=listener)

    listener, first = convert("out")
    assert listener.passes == ["settling widths", "converting"]
    assert listener.done == listener.total
    assert any(note.startswith("settled: ") for note in listener.notes)
    listener, again = convert("out")
    assert (listener.passes, again.nothing_to_do) == ([], True)
    # Resumed, with the widths of the journal, whatever a pass would say now.
    writes = []
    original = engine.Conversion._config

    def interrupted(self: engine.Conversion) -> dict[str, Any]:
        writes.append(self)
        if len(writes) == 1:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(engine.Conversion, "_config", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert("other")
    monkeypatch.setattr(target, "settle", lambda plan, observer: pytest.fail("a second pass"))
    listener, resumed = convert("other")
    assert any("resuming" in note for note in listener.notes)
    assert resumed.manifest["recipe"] == first.manifest["recipe"]
    assert checkpoints.comparable(tmp_path / "other") == checkpoints.comparable(tmp_path / "out")


def test_another_conversion_in_the_way_is_refused_before_the_pass(
    model: Path, tmp_path: Path, converting: Converting, monkeypatch: pytest.MonkeyPatch
) -> None:
    converting(target_bpw=3.5)
    monkeypatch.setattr(target, "settle", lambda plan, observer: pytest.fail("a pass"))
    with pytest.raises(OutputConflictError, match=r"target_bpw 3\.5 there, 3\.6 now") as caught:
        loftq_cli.convert(model, tmp_path / "out", **PLAIN, target_bpw=3.6)
    assert "widths" not in caught.value.message


def test_a_target_below_the_least_is_refused_with_the_least(converting: Converting) -> None:
    # Of 28672 weights in blocks of 64: 2-bit codes, a float32 scale and a 2-bit zero point.
    least = 2 + (32 + 2) / 64
    with pytest.raises(UsageError, match=r"--target-bpw 2\.53: .*at least 2\.5313 bits") as caught:
        converting(target_bpw=2.53)
    assert caught.value.exit_code == 2
    manifest = converting(target_bpw=2.5313)
    assert manifest["totals"]["bits_per_weight"] == least
    assert {record["bits"] for record in manifest["matrices"]} == {2}
    with pytest.raises(UsageError, match="at least"):
        converting(target_bpw=3, bits_map="*.0.*=8")


def test_a_target_above_the_most_takes_the_widest_and_says_so(model: Path, tmp_path: Path) -> None:
    options = Options(**{**PLAIN, "target_bpw": 20})
    listener = Listener()
    plan, path = prepare(Request(str(model)), tmp_path / "out", options, observer=listener)
    manifest = run.run(plan, path, overwrite=False, observer=listener).manifest
    assert {record["bits"] for record in manifest["matrices"]} == {8}
    assert listener.passes == ["converting"]
    assert any("all matrices get 8 bits" in note for note in listener.notes)


def test_fitted_levels_have_at_most_four_bits(converting: Converting) -> None:
    manifest = converting(target_bpw=20, method="fitted")
    assert {record["bits"] for record in manifest["matrices"]} == {4}


@pytest.mark.parametrize("layout", ["bnb", "gptq"])
def test_layouts_of_one_width_are_refused(layout: str, converting: Converting) -> None:
    with pytest.raises(LayoutError):
        converting(target_bpw=3.5, layout=layout)


@pytest.fixture
def llama(tmp_path: Path) -> Converting:
    """As ``converting``, of a small Llama, whose layers servers fuse."""
    source = checkpoints.write(tmp_path / "llama", checkpoints.llama(hidden=64, intermediate=128))
    held = {"layout": "compressed", "method": "uniform", "block_size": 32}

    def convert(**settings: Any) -> dict[str, Any]:
        given = {**PLAIN, **held, **settings}
        return loftq_cli.convert(source, tmp_path / "out", overwrite=True, **given)

    return convert


def test_layers_that_servers_fuse_get_one_width(llama: Converting) -> None:
    manifest = llama(target_bpw=4.4)
    assert manifest["totals"]["bits_per_weight"] <= 4.4
    widths = {record["name"]: record["bits"] for record in manifest["matrices"]}
    assert len(set(widths.values())) > 1
    for parts in fused_parts(widths):
        assert len({widths[name] for name in parts}) == 1, parts
    assert any(len(parts) == 3 for parts in fused_parts(widths))


def test_a_map_that_matches_some_of_them_is_refused(llama: Converting) -> None:
    with pytest.raises(UsageError, match=r"--bits-map gives .*q_proj.* and leaves .*k_proj"):
        llama(target_bpw=4.4, bits_map="*.q_proj.*=4")
    with pytest.raises(LayoutError, match="parts that servers fuse in several widths"):
        llama(bits=4, bits_map="*.q_proj.*=2")
    manifest = llama(target_bpw=4.4, bits_map="*.[qkv]_proj.*=4")
    fixed = {r["bits"] for r in manifest["matrices"] if "self_attn.o" not in r["name"]}
    assert 4 in fixed


@pytest.mark.parametrize("bpw", [0, -1, float("nan"), float("inf"), True, "3"])
def test_what_is_no_target(bpw: Any, converting: Converting) -> None:
    with pytest.raises(UsageError, match=r"--target-bpw .*must be a positive number"):
        converting(target_bpw=bpw)


def test_contradictions(converting: Converting) -> None:
    with pytest.raises(UsageError, match=r"--target-bpw 3 and --bits 2: only one"):
        converting(target_bpw=3, bits=2)
    with pytest.raises(UsageError, match=r"--bits-map leaves no matrix to --target-bpw 3"):
        converting(target_bpw=3, bits_map="*=2")
    with pytest.raises(UsageError, match="widths are what target_bpw settled"):
        converting(widths=["a=2"])
    with pytest.raises(UsageError, match="the recipe's widths are of other matrices"):
        converting(target_bpw=3, widths=["a=2"])


def test_a_dry_run_reads_headers_only(model: Path, tmp_path: Path) -> None:
    for shard in model.glob("*.safetensors"):  # all weights gone, sizes kept
        with shard.open("r+b") as file:
            length = 8 + int.from_bytes(file.read(8), "little")
            size = shard.stat().st_size
            file.truncate(length)
            file.truncate(size)
    plan = make_plan(open_source(model), Options(target_bpw=3.5, bits_map=("*.0.*=3",)).resolve())
    described = describe(plan, tmp_path / "out")
    bits = {entry["name"]: entry["bits"] for entry in described["selected"]}
    assert bits == {NAMES[0]: 3, NAMES[1]: 3, NAMES[2]: None, NAMES[3]: None}
    assert described["totals"]["bits_per_weight"] == pytest.approx(3.5, abs=1e-3)
    assert described["totals"]["bits_per_weight"] <= 3.5
    assert described["recipe"]["widths"] == []


def test_bad_weights_in_the_sample(model: Path, tmp_path: Path, converting: Converting) -> None:
    tensors = {"h.0.weight": torch.full((64, 64), float("nan"))}
    checkpoints.write(tmp_path / "model", tensors)
    (model / "model.safetensors.index.json").unlink()
    with pytest.raises(NonFiniteWeightError, match=r"model\.safetensors: tensor 'h\.0\.weight'"):
        converting(target_bpw=3.5)
    assert not (tmp_path / ".out.loftq-partial").exists()


def test_the_manifest_on_disk_is_valid(converting: Converting, tmp_path: Path) -> None:
    converting(target_bpw=3.5)
    found = loftq_cli.inspect(tmp_path / "out", verify=True)
    assert len({layer["bits"] for layer in found["layers"]}) > 1
    manifest = json.loads((tmp_path / "out/loftq_manifest.json").read_bytes())
    assert found["recipe"] == manifest["recipe"]
