"""``--stats``: the weighted residual of what was written, and files that do not fit."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import loftq_cli
from loftq_cli.cli.commands import main
from loftq_cli.errors import (
    InputError,
    MissingStatisticsError,
    OutputConflictError,
    SourceChangedError,
    StatisticsError,
    VerificationError,
)
from loftq_cli.numerics.alternation import decompose
from loftq_cli.planning import decomposer
from tests.support import checkpoints
from tests.support.contents import manifest, product, stored
from tests.support.quantizing import gaussian

SETTINGS: dict[str, Any] = {"threads": 1, "rank": 8, "iters": 3, "bits": 2, "layout": "dense"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoints.write(tmp_path / "model", checkpoints.llama(layers=2), cuts=(5,))


def measure(
    path: Path, model: Path | None, names: list[str], full: bool, width: dict[str, int]
) -> dict[str, torch.Tensor]:
    """Write statistics of made-up inputs; q, k and v share theirs. Returns H by name, float64."""
    shared: dict[str, Any] = {}
    written, kept = {}, {}
    for number, name in enumerate(names):
        key = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj")
        if key not in shared:
            inputs = gaussian(300, width[name], seed=number) * torch.linspace(0.1, 5, width[name])
            inputs[:, 0] += 20
            moments = loftq_cli.Moments(width[name], full=full)
            moments.add(inputs)
            H = inputs.double().T @ inputs.double() / 300
            shared[key] = moments, H if full else torch.diag(H.diagonal())
        written[name], kept[name] = shared[key]
    loftq_cli.save_statistics(path, written, model=model)
    return kept


def widths(source: Path) -> dict[str, int]:
    tensors = stored(source)
    return {name: tensors[name].shape[1] for name in checkpoints.matrices(tensors)}


def norm(matrix: torch.Tensor, H: torch.Tensor) -> float:
    return math.sqrt(float(((matrix.double() @ H) * matrix.double()).sum()))


@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
def test_the_manifest_says_what_was_written_and_that_is_nearer_in_the_outputs(
    source, tmp_path, full
):
    width = widths(source)
    moments = measure(tmp_path / "stats", source, list(width), full, width)
    loftq_cli.convert(source, output=tmp_path / "plain", **SETTINGS)
    out = tmp_path / "out"
    loftq_cli.convert(source, output=out, stats=tmp_path / "stats", **SETTINGS)
    original, backbone, plain = stored(source), stored(out), stored(tmp_path / "plain")
    for record in manifest(out)["matrices"]:
        name, stated, H = record["name"], record["weighted"], moments[record["name"]]
        error = original[name].double() - backbone[name].double() - product(out, name)
        assert stated["kind"] == ("full" if full else "diagonal")
        assert stated["final"] == pytest.approx(norm(error, H), rel=3e-3)
        assert stated["final"] == stated["steps"][record["step"] - 1] == min(stated["steps"])
        assert stated["weight"] == pytest.approx(norm(original[name], H), rel=3e-3)
        assert record["frobenius"]["final"] == pytest.approx(float(error.norm()), rel=1e-4)
        unweighted = original[name].double() - plain[name].double()
        assert norm(error, H) < norm(unweighted - product(tmp_path / "plain", name), H)
    assert all("weighted" not in record for record in manifest(tmp_path / "plain")["matrices"])
    report = loftq_cli.error_report(out, source=source)
    assert report["totals"]["weighted_residual"] < report["totals"]["weighted_residual_quantized"]
    shown = CliRunner().invoke(main, ["error-report", str(out)])
    assert shown.exit_code == 0
    assert "Weighted residuals" in shown.stdout


@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_the_report_computes_weighted_residuals_again(source, tmp_path, full, weighted):
    width, out, stats = widths(source), tmp_path / "out", tmp_path / "stats"
    moments = measure(stats, source, list(width), full, width)
    given = {"stats": stats} if weighted else {}
    loftq_cli.convert(source, output=out, **given, **SETTINGS)
    report = loftq_cli.error_report(out, source=source, stats=stats)
    original, backbone = stored(source), stored(out)
    for layer in report["layers"]:
        name, found, H = layer["name"], layer["weighted"], moments[layer["name"]]
        error = original[name].double() - backbone[name].double() - product(out, name)
        assert found["kind"] == ("full" if full else "diagonal")
        assert found["final"] == pytest.approx(norm(error, H), rel=3e-3)
        assert found["weight"] == pytest.approx(norm(original[name], H), rel=3e-3)
        assert found["final"] < found["quantized"] < found["weight"]
        assert len(found["steps"]) == (SETTINGS["iters"] if weighted else 0)
    squares = [layer["weighted"]["final"] ** 2 for layer in report["layers"]]
    all_of_it = [layer["weighted"]["weight"] ** 2 for layer in report["layers"]]
    expected = math.sqrt(sum(squares) / sum(all_of_it))
    assert report["totals"]["weighted_residual"] == pytest.approx(expected)


def test_a_manifest_that_states_other_weighted_residuals_is_wrong(source, tmp_path):
    width, out, stats = widths(source), tmp_path / "out", tmp_path / "stats"
    measure(stats, source, list(width), True, width)
    loftq_cli.convert(source, output=out, stats=stats, **SETTINGS)
    path = out / "loftq_manifest.json"
    content = json.loads(path.read_text())
    record = content["matrices"][3]
    record["weighted"]["final"] *= 1.01
    path.write_text(json.dumps(content))
    loftq_cli.error_report(out, source=source)
    message = rf"{re.escape(record['name'])}: weighted final [\d.]+, the manifest says"
    with pytest.raises(VerificationError, match=message):
        loftq_cli.error_report(out, source=source, stats=stats)


def test_a_report_wants_the_statistics_that_were_converted_with(source, tmp_path):
    width, out = widths(source), tmp_path / "out"
    for name, full in (("stats", False), ("other", True)):
        measure(tmp_path / name, source, list(width), full, width)
    loftq_cli.convert(source, output=out, stats=tmp_path / "stats", **SETTINGS)
    with pytest.raises(InputError, match="the conversion used statistics of"):
        loftq_cli.error_report(out, source=source, stats=tmp_path / "other")
    other = checkpoints.write(tmp_path / "another", checkpoints.llama(layers=1))
    with pytest.raises(StatisticsError, match="not of"):
        loftq_cli.error_report(out, source=other, stats=tmp_path / "stats")
    result = CliRunner().invoke(main, ["error-report", str(out), "--stats", str(tmp_path / "x")])
    assert result.exit_code == 2
    assert "--stats needs --source" in result.stderr
    words = ["error-report", str(out), "--source", str(source), "--stats"]
    result = CliRunner().invoke(main, [*words, str(tmp_path / "x")])
    assert result.exit_code == 3
    assert "no such file" in result.stderr
    result = CliRunner().invoke(main, [*words, str(tmp_path / "stats")])
    assert result.exit_code == 0
    assert "Weighted residuals" in result.stdout


def test_the_same_statistics_resume_and_others_do_not(source, tmp_path):
    width = widths(source)
    measure(tmp_path / "stats", source, list(width), False, width)
    measure(tmp_path / "other", source, list(width), True, width)
    out = tmp_path / "out"
    first = loftq_cli.convert(source, output=out, stats=str(tmp_path / "stats"), **SETTINGS)
    (tmp_path / "stats").rename(tmp_path / "moved")
    again = loftq_cli.convert(source, output=out, stats=str(tmp_path / "moved"), **SETTINGS)
    assert again == first
    for stats in (str(tmp_path / "other"), None):
        with pytest.raises(OutputConflictError, match="stats"):
            loftq_cli.convert(source, output=out, stats=stats, **SETTINGS)


def test_statistics_that_change_while_they_are_used_are_refused_and_the_work_kept(
    source, tmp_path, monkeypatch
):
    width = widths(source)
    path = tmp_path / "stats"
    measure(path, source, list(width), False, width)
    mtime, original = path.stat().st_mtime_ns, decompose

    def meddling(*arguments):
        os.utime(path, (1, 1))
        return original(*arguments)

    with monkeypatch.context() as patches:
        patches.setattr(decomposer, "decompose", meddling)
        said = r"stats: the statistics changed: \d+ bytes, mtime 20.*Z at first, .*mtime 1970-01-01"
        with pytest.raises(SourceChangedError, match=said):
            loftq_cli.convert(source, output=tmp_path / "out", stats=path, **SETTINGS)
    assert (tmp_path / ".out.loftq-partial").exists()
    os.utime(path, ns=(mtime, mtime))
    loftq_cli.convert(source, output=tmp_path / "out", stats=path, **SETTINGS)


def test_a_matrix_that_was_not_measured_is_converted_without(source, tmp_path):
    width = widths(source)
    left_out, *names = width
    measure(tmp_path / "stats", source, names, False, width)
    args = ["convert", str(source), "-o", str(tmp_path / "out"), "--stats", str(tmp_path / "stats")]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    assert f"1 of {len(width)} matrices" in result.stderr
    records = {record["name"]: record for record in manifest(tmp_path / "out")["matrices"]}
    assert "weighted" not in records[left_out]
    assert all("weighted" in records[name] for name in names)


def test_statistics_that_do_not_fit_are_refused_before_anything_is_written(source, tmp_path):
    width = widths(source)
    name = next(iter(width))
    other = checkpoints.write(tmp_path / "other", checkpoints.llama(layers=1))
    measure(tmp_path / "of-another", other, list(widths(other)), False, widths(other))
    measure(tmp_path / "too-wide", None, [name], False, {name: width[name] + 1})
    measure(tmp_path / "of-nothing", None, ["lm_head.weight"], False, {"lm_head.weight": 64})
    for stats, error, said in (
        ("of-another", StatisticsError, "not of"),
        ("too-wide", StatisticsError, f"{width[name]} inputs"),
        ("of-nothing", MissingStatisticsError, "nothing for tensor"),
    ):
        with pytest.raises(error, match=said):
            loftq_cli.convert(source, output=tmp_path / "out", stats=tmp_path / stats, **SETTINGS)
    missing = ["convert", str(source), "--stats", str(tmp_path / "none"), "-o", str(tmp_path / "o")]
    result = CliRunner().invoke(main, missing)
    assert result.exit_code == 3
    assert "no such file" in result.stderr
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.glob(".*partial*")] == []
