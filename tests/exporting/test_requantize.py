"""Codes of a trained model: those of the merged checkpoint, with errors fed back if there are
statistics, and a manifest that says what is left."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.checkpoint.output import open_output
from loftq_cli.errors import InputError, LayoutError, StatisticsError, UsageError
from loftq_cli.reporting import card
from tests.support import checkpoints, models
from tests.support.contents import manifest, stored
from tests.support.exported import SETTINGS, decoded
from tests.support.quantizing import gaussian


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``model``, its conversion ``out``, what training made of the adapter,
    ``trained``, and ``stats``."""
    place = tmp_path_factory.mktemp("trained")
    tensors = checkpoints.llama(hidden=64, intermediate=32)
    source = checkpoints.write(place / "model", tensors, cuts=(5,))
    loftq_cli.convert(source, place / "out", layout="gptq", **SETTINGS)
    train(place / "out/loftq_init", place / "trained")
    names = [record["name"] for record in manifest(place / "out")["matrices"]]
    written = {}
    for number, name in enumerate(names):
        width = tensors[name].shape[1]
        written[name] = loftq_cli.Moments(width, full=True)
        written[name].add(inputs(number, width))
    loftq_cli.save_statistics(place / "stats", written, model=source)
    return place


def inputs(number: int, width: int) -> torch.Tensor:
    """(300, width), some directions far larger than others."""
    mixed = gaussian(300, width, seed=number) @ gaussian(width, width, seed=100 + number)
    return mixed * torch.linspace(0.1, 3, width)


def train(start: Path, place: Path) -> None:
    """What training could have saved: other values in the same tensors."""
    shutil.copytree(start, place)
    held = load_file(place / "adapter_model.safetensors")
    moved = {n: t + 0.1 * gaussian(*t.shape, seed=k) for k, (n, t) in enumerate(held.items())}
    save_file(moved, place / "adapter_model.safetensors")


def products(folder: Path) -> dict[str, torch.Tensor]:
    """B A in float64 by tensor; the scaling is 1."""
    held = load_file(folder / "adapter_model.safetensors")
    pairs = {name.partition(".lora_")[0] for name in held}
    return {
        f"{name.removeprefix('base_model.model.')}.weight": held[f"{name}.lora_B.weight"].double()
        @ held[f"{name}.lora_A.weight"].double()
        for name in pairs
    }


def export(place: Path, output: Path, **wanted: Any) -> dict[str, Any]:
    settings = {"layout": "compressed", "adapter": place / "trained", "merge": True, **wanted}
    return loftq_cli.export(place / "out", output, **settings)


@pytest.mark.parametrize("layout", ["gptq", "awq", "loftq", "compressed"])
def test_without_statistics_it_is_what_a_conversion_makes_of_the_merged_model(
    place, tmp_path, layout
):
    result = export(place, tmp_path / "packed", layout=layout)
    loftq_cli.merge(place / "out", tmp_path / "merged", adapter=place / "trained")
    loftq_cli.convert(
        tmp_path / "merged", tmp_path / "plain", layout=layout, **{**SETTINGS, "iters": 0}
    )
    ours, theirs = stored(tmp_path / "packed"), stored(tmp_path / "plain")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert result["merged"]["off"] == result["merged"]["plain"]
    assert result["merged"]["stats"] is None
    assert not (tmp_path / "packed/loftq_init").exists()
    assert (result["adapter"], result["rank"]) == (None, None)
    expected = [r["frobenius"]["quantized"] for r in manifest(tmp_path / "plain")["matrices"]]
    found = manifest(tmp_path / "packed")
    assert [record["frobenius"]["final"] for record in found["matrices"]] == expected
    assert {record["rank"] for record in found["matrices"]} == {0}


def test_distances_are_those_of_the_files(place, tmp_path):
    """Against float64: E = Q' - (Q + B A), D = B A - B0 A0, both in ||.||_H."""
    result = export(place, tmp_path / "packed", stats=place / "stats")
    now, before = decoded(tmp_path / "packed"), decoded(place / "out")
    after, start = products(place / "trained"), products(place / "out/loftq_init")
    errors = moves = weights = 0.0
    for number, record in enumerate(manifest(tmp_path / "packed")["matrices"]):
        name = record["name"]
        X = inputs(number, record["shape"][1]).double()
        H = X.T @ X / len(X)
        E = now[name].double() - before[name].double() - after[name]
        D = after[name] - start[name]
        W = before[name].double() + after[name]
        error, move, weight = (float((M @ H * M).sum().sqrt()) for M in (E, D, W))
        assert record["weighted"]["final"] == pytest.approx(error, rel=2e-3)  # moments in bfloat16
        assert record["frobenius"]["final"] == pytest.approx(float(E.norm()), rel=1e-4)
        assert record["weighted"]["final"] < 0.95 * record["weighted"]["quantized"]
        errors, moves, weights = errors + error**2, moves + move**2, weights + weight**2
    merged = result["merged"]
    assert merged["off"] == pytest.approx(math.sqrt(errors / weights), rel=2e-3)
    assert merged["moved"] == pytest.approx(math.sqrt(moves / weights), rel=2e-3)
    assert merged["plain"] > 1.05 * merged["off"]
    totals = manifest(tmp_path / "packed")["totals"]
    records = manifest(tmp_path / "packed")["matrices"]
    squares = [
        math.fsum(r["frobenius"][which] ** 2 for r in records) for which in ("final", "weight")
    ]
    assert totals["relative_residual"] == pytest.approx(math.sqrt(squares[0] / squares[1]))


def test_the_result_is_known_to_every_command(place, tmp_path):
    packed = tmp_path / "packed"
    export(place, packed, stats=place / "stats")
    seen = loftq_cli.inspect(packed, verify=True)
    assert seen["totals"]["adapter_bytes"] == 0
    assert "PeftModel" not in seen["loading"]
    assert loftq_cli.error_report(packed)["layers"][0]["weighted"] is not None
    with pytest.raises(InputError, match="a trained adapter was merged into its codes"):
        loftq_cli.error_report(packed, place / "model")
    with pytest.raises(UsageError, match="has no adapter: one was merged"):
        loftq_cli.merge(packed, tmp_path / "merged")
    loftq_cli.export(packed, tmp_path / "again", layout="gptq")
    ours, theirs = decoded(packed), decoded(tmp_path / "again")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    text = card.body(open_output(packed), "me/packed")
    assert "quantized once more" in text
    assert "lora" not in card.metadata(open_output(packed))["tags"]


def test_another_conversions_adapter_does_not_fit_any_more(place, tmp_path):
    """One that was trained on the start makes up for other errors."""
    export(place, tmp_path / "packed")
    adapter = tmp_path / "adapter"
    shutil.copytree(place / "trained", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    told = {**config, "base_model_name_or_path": str(place / "out")}
    (adapter / "adapter_config.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match=r"trained on .*out, another conversion"):
        loftq_cli.merge(tmp_path / "packed", tmp_path / "merged", adapter=adapter)


def test_it_loads_as_a_model_that_computes_with_the_codes(tmp_path):
    source = models.save(models.llama(), tmp_path / "source")
    out = tmp_path / "out"
    loftq_cli.convert(source, out, layout="loftq", **SETTINGS)
    train(out / "loftq_init", tmp_path / "trained")
    packed = tmp_path / "packed"
    loftq_cli.export(out, packed, layout="loftq", adapter=tmp_path / "trained", merge=True)
    model = loftq_cli.load(packed).eval()
    loftq_cli.export(packed, tmp_path / "dense", layout="dense")
    dense = loftq_cli.load(tmp_path / "dense").eval()
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits)
    for name, value in decoded(packed).items():
        assert torch.equal(dense.state_dict()[name], value)


def test_what_was_trained_in_full_comes_along(place, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(place / "trained", adapter)
    held = load_file(adapter / "adapter_model.safetensors")
    head = gaussian(*stored(place / "model")["lm_head.weight"].shape, seed=9)
    held["base_model.model.lm_head.weight"] = head
    save_file(held, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    told = {**config, "modules_to_save": ["lm_head"]}
    (adapter / "adapter_config.json").write_text(json.dumps(told))
    export(place, tmp_path / "packed", adapter=adapter)
    assert torch.equal(stored(tmp_path / "packed")["lm_head.weight"], head)
    loftq_cli.inspect(tmp_path / "packed", verify=True)


@pytest.mark.parametrize(
    ("wanted", "error", "words"),
    [
        ({"adapter": None}, UsageError, "--merge needs --adapter"),
        ({"merge": False, "stats": "stats"}, UsageError, "--stats needs --merge"),
        ({"pad_ranks": True}, UsageError, "--pad-ranks is for adapters"),
        ({"base_model": "me/it"}, UsageError, "--base-model is for adapters"),
        ({"layout": "bnb"}, LayoutError, "bnb holds 4-bit nf"),
        ({"stats": "model/config.json"}, InputError, "config.json"),
    ],
)
def test_what_is_refused(place, tmp_path, wanted, error, words):
    if isinstance(wanted.get("stats"), str):
        wanted = {**wanted, "stats": place / wanted["stats"]}
    with pytest.raises(error, match=words):
        export(place, tmp_path / "packed", **wanted)
    assert not any(tmp_path.iterdir())


def test_statistics_that_lack_a_matrix_are_refused(place, tmp_path):
    moments = loftq_cli.Moments(64, full=True)
    moments.add(inputs(0, 64))
    name = manifest(place / "out")["matrices"][0]["name"]
    loftq_cli.save_statistics(tmp_path / "few", {name: moments})
    with pytest.raises(StatisticsError, match="nothing for tensor"):
        export(place, tmp_path / "packed", stats=tmp_path / "few")


def test_an_adapter_whose_training_diverged_is_refused(place, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(place / "trained", adapter)
    held = load_file(adapter / "adapter_model.safetensors")
    held[min(held)][0, 0] = float("nan")
    save_file(held, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"tensor .* becomes nan"):
        export(place, tmp_path / "packed", adapter=adapter)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
