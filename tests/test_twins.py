"""Python and the command line are twins: the same functions, arguments, defaults and remarks."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch

import loftq_cli
from loftq_cli.cli import main
from loftq_cli.errors import StatisticsError, UsageError
from loftq_cli.settings.table import entries
from tests.support import checkpoints

# What is about the terminal: how things are shown, and files that only the command writes.
OF_A_TERMINAL = {
    *("as_json", "as_csv", "quiet", "verbose", "dry_run", "save_recipe", "every", "log_file"),
}
FUNCTIONS = {"plan": "what_fits"}  # plan() is convert that stops before it writes
NAMES = {"recipe_file": "recipe", "texts": "calibrate_text", "refining": "refine"}
FAST: dict[str, Any] = {"rank": 4, "iters": 2, "threads": 1}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoints.write(tmp_path / "model", checkpoints.llama())


def python_name(command: str, option: str | None) -> str:
    if command in ("calibrate", "evaluate", "refine") and option == "texts":
        return "text"
    return NAMES.get(str(option), str(option))


@pytest.mark.parametrize("name", main.commands)
def test_every_command_has_a_function_with_its_options_and_defaults(name: str) -> None:
    function = getattr(loftq_cli, FUNCTIONS.get(name, name.replace("-", "_")))
    assert function.__name__ in loftq_cli.__all__
    known = inspect.signature(function).parameters
    settings = {"preset", *entries()} if name in ("convert", "adapt") else set()
    options = {
        python_name(name, parameter.name): parameter
        for parameter in main.commands[name].params
        if parameter.name not in OF_A_TERMINAL | settings
    }
    assert set(options) == {key for key, each in known.items() if each.kind != each.VAR_KEYWORD}
    for key, parameter in options.items():
        if isinstance(parameter, click.Option) and not parameter.required:
            stated = known[key].default
            unset = parameter.multiple or "UNSET" in str(parameter.default)  # click says so
            given = None if unset else parameter.default
            if name in ("merge", "export", "refine", "adapt", "import-adapter") and key == "output":
                continue  # the command asks for it
            assert str(stated) == str(given) or (not stated and not given), key


def test_plan_is_convert_that_stops_before_it_writes() -> None:
    plan, convert = (inspect.signature(f).parameters for f in (loftq_cli.plan, loftq_cli.convert))
    assert [*plan.values()] == [*convert.values()]


def test_a_plan_says_what_the_conversion_then_is(model: Path, tmp_path: Path) -> None:
    planned = loftq_cli.plan(model, tmp_path / "out", bits=2, **FAST)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    manifest = loftq_cli.convert(model, tmp_path / "out", bits=2, **FAST)
    assert planned["fingerprint"] == manifest["fingerprint"]
    assert planned["totals"]["backbone_bytes"] == manifest["totals"]["backbone_bytes"]


def test_a_merge_from_python_is_the_command_s(model: Path, tmp_path: Path) -> None:
    loftq_cli.convert(model, tmp_path / "out", bits=2, **FAST)
    found = loftq_cli.merge(tmp_path / "out", tmp_path / "merged", dtype="bfloat16")
    assert found["dtype"] == "bfloat16"
    words = ["merge", str(tmp_path / "out"), "-o", str(tmp_path / "other"), "--dtype", "bfloat16"]
    main([*words, "-q"], standalone_mode=False)
    first, second = (tmp_path / name / "model.safetensors" for name in ("merged", "other"))
    assert first.read_bytes() == second.read_bytes()


def test_remarks_reach_the_logger(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "loftq"):
        loftq_cli.convert(model, tmp_path / "out", bits=2, dense_dtype="float32", **FAST)
    said = [record.getMessage() for record in caplog.records if record.name == "loftq"]
    assert any("--dense-dtype float32 changes nothing" in line for line in said)
    assert any("without activation statistics" in line for line in said)
    assert {record.levelname for record in caplog.records if record.name == "loftq"} == {"INFO"}
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "loftq"):
        loftq_cli.convert(model, tmp_path / "other", bits=2, **FAST)
    details = [r.getMessage() for r in caplog.records if r.levelname == "DEBUG"]
    assert sum(": converted, residual" in line for line in details) == 7  # one block


@pytest.mark.parametrize("full", [False, True])
def test_one_matrix_with_moments_is_what_the_conversion_makes_of_it(
    full: bool, model: Path, tmp_path: Path
) -> None:
    tensors = checkpoints.llama()
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = tensors[name]
    moments = loftq_cli.Moments(weight.shape[1], full=full)
    generator = torch.Generator().manual_seed(1)
    moments.add(torch.randn(500, weight.shape[1], generator=generator) * torch.arange(1, 65))
    loftq_cli.save_statistics(tmp_path / "stats", {name: moments}, model=model)
    manifest = loftq_cli.convert(
        model,
        tmp_path / "out",
        bits=2,
        stats=tmp_path / "stats",
        layout="loftq",
        svd="exact",
        **FAST,
    )
    (record,) = (record for record in manifest["matrices"] if record["name"] == name)
    for given in (moments, moments.value()):
        # The fast SVD draws with the tensor's name as its seed, which one matrix has none of.
        found = loftq_cli.decompose(weight, bits=2, rank=4, iters=2, svd="exact", moments=given)
        assert found.weighted is not None
        assert found.weighted.final == pytest.approx(record["weighted"]["final"], rel=1e-6)
    plain = loftq_cli.decompose(weight, bits=2, rank=4, iters=2)
    assert plain.weighted is None
    assert plain.final < found.final


def test_every_setting_of_one_matrix_is_taken_and_others_are_refused() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    found = loftq_cli.decompose(weight, bits=2, rank=8, lora_alpha=16, adapter_dtype="bfloat16")
    assert found.lora_A.dtype == torch.bfloat16
    assert found.scaling == 2.0
    last = loftq_cli.decompose(weight, bits=2, rank=8, keep="last", momentum=False, iters=3)
    assert last.step == 3
    with pytest.raises(UsageError, match="include is not a setting of one matrix"):
        loftq_cli.decompose(weight, include="*")
    with pytest.raises(UsageError, match=r"moments of shape \(3,\): \(64,\) or \(64, 64\)"):
        loftq_cli.decompose(weight, moments=torch.ones(3))
    with pytest.raises(StatisticsError, match="is all zeros"):
        loftq_cli.decompose(weight, moments=torch.zeros(64))
    no_integer: Any = np.int64(4)
    with pytest.raises(UsageError, match="--rank 4: must be a whole number"):
        loftq_cli.decompose(weight, rank=no_integer)
    no_tensor: Any = weight.tolist()
    for wrong in (no_tensor, weight.to("meta"), weight.to_sparse(), weight[0]):
        with pytest.raises(UsageError, match=r"^weight "):
            loftq_cli.decompose(wrong)
