"""``loftq inspect`` and ``loftq error-report``, and the three commands as the README has them."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import loftq_cli
from tests.support import checkpoints
from tests.support.commands import QUICK, Command

INSPECT_KEYS = {
    *("directory", "fingerprint", "format_version", "layers", "loading"),
    *("needs", "passed_through", "recipe", "repository", "source", "tool", "totals"),
    "verified_files",
}
INSPECT_LAYER_KEYS = {
    *("adapter_bytes", "backbone_bytes", "bits", "bits_per_weight"),
    *("bits_per_weight_with_adapter", "block_size", "dtype", "layout", "method"),
    *("name", "rank", "relative_residual", "relative_residual_quantized", "shape"),
    "source_bytes",
}
TOTALS_KEYS = {
    *("adapter_bytes", "backbone_bytes", "bits_per_weight", "bits_per_weight_with_adapter"),
    *("output_bytes", "parameters", "relative_residual", "relative_residual_quantized"),
    "source_bytes",
}
REPORT_KEYS = {
    *("directory", "layers", "recomputed", "repository", "source", "stats", "totals", "worst"),
}
REPORT_LAYER_KEYS = {
    *("bits", "final", "name", "quantized", "rank", "ratio", "relative_residual"),
    *("relative_residual_quantized", "shape", "step", "steps", "weight"),
    "weighted",
}
COMPARE_KEYS = {
    *("conversions", "evaluations", "kinds", "matrices_in_common", "settings", "source"),
}
COMPARED_KEYS = {
    *("adapter_bytes", "backbone_bytes", "bits_per_weight", "bits_per_weight_with_adapter"),
    *("directory", "fingerprint", "label", "layout", "matrices", "merged", "refined"),
    *("relative_residual", "relative_residual_quantized", "repository", "weighted_residual"),
}
MATRICES = checkpoints.matrices(checkpoints.llama())


def test_the_three_commands_work_in_one_directory_as_typed(place: Path) -> None:
    said = []
    for words in ("convert ./model --bits 2 --rank 4 --iters 2", "inspect out/", "error-report"):
        command = [sys.executable, "-m", "loftq_cli", *words.split()]
        result = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        remarks = [line for line in result.stderr.splitlines() if "statistics" not in line]
        assert remarks == []
        said.append(result.stdout)
    assert said[0].splitlines()[-1] == "next: loftq inspect out"
    for name in MATRICES:
        assert name in said[1]
        assert name in said[2]


@pytest.mark.usefixtures("out")
@pytest.mark.parametrize("words", [[], ["out"], ["out/"], ["./out"]])
def test_reports_read_out_unless_told_otherwise(words: list[str], loftq: Command) -> None:
    for command in ("inspect", "error-report"):
        result = loftq(command, *words, "--all")
        assert result.exit_code == 0
        assert result.stderr == ""
        assert all(name in result.stdout for name in MATRICES)


@pytest.mark.usefixtures("out")
def test_conversions_are_compared_and_pages_written(
    place: Path, loftq: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("vl_convert", reason='pip install "loftq-cli[report]"')
    monkeypatch.setattr(library, "javascript_bundle", lambda *words: "")
    assert loftq("convert", "model", "-o", "other", "--bits", "3", *QUICK).exit_code == 0
    result = loftq("compare", "out", "other", "--html", "compared.html")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == "loftq: wrote compared.html\n"
    assert re.search(r"^bits +4 +3$", result.stdout, re.MULTILINE)
    assert re.search(r"^down_proj( +0\.\d{4}){2}$", result.stdout, re.MULTILINE)
    found = json.loads(loftq("compare", "out", "other", "--json", "--offline").stdout)
    assert found == loftq_cli.compare("out", "other")
    assert set(found) == COMPARE_KEYS
    assert {key for each in found["conversions"] for key in each} == COMPARED_KEYS
    result = loftq("error-report", "--html", "report.html")
    assert result.stderr == "loftq: wrote report.html\n"
    for name in ("compared.html", "report.html"):
        assert (place / name).read_text().startswith("<!doctype html>")


@pytest.mark.usefixtures("out")
def test_one_conversion_cannot_be_compared(loftq: Command) -> None:
    for words in (["-v"], ["--verbose"], []):
        result = loftq("compare", "out", *words)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "name two or more" in result.stderr
        assert ("Traceback" in result.stderr) == bool(words)


@pytest.mark.usefixtures("out")
def test_inspect_as_json(loftq: Command) -> None:
    found = json.loads(loftq("inspect", "--json").stdout)
    assert set(found) == INSPECT_KEYS
    assert set(found["totals"]) == TOTALS_KEYS
    assert {key for layer in found["layers"] for key in layer} == INSPECT_LAYER_KEYS
    assert [layer["name"] for layer in found["layers"]] == sorted(MATRICES)
    assert found == loftq_cli.inspect()
    assert found["verified_files"] is None


def test_inspect_verifies_when_asked(out: Path, loftq: Command) -> None:
    count = sum(path.is_file() for path in out.rglob("*")) - 1  # the manifest does not list itself
    assert f"{count} files match the manifest" in loftq("inspect", "--verify").stdout
    assert json.loads(loftq("inspect", "--verify", "--json").stdout)["verified_files"] == count
    with (out / "config.json").open("a") as file:
        file.write(" ")
    assert loftq("inspect").exit_code == 0
    result = loftq("inspect", "--verify")
    assert result.exit_code == 3
    assert result.stdout == ""
    assert "config.json" in result.stderr


@pytest.mark.usefixtures("out")
def test_error_report_as_json(loftq: Command) -> None:
    found = json.loads(loftq("error-report", "--json").stdout)
    assert set(found) == REPORT_KEYS
    assert {key for layer in found["layers"] for key in layer} == REPORT_LAYER_KEYS
    assert found == loftq_cli.error_report()
    assert not found["recomputed"]
    residuals = {layer["name"]: layer["relative_residual"] for layer in found["layers"]}
    assert found["worst"] == sorted(residuals, key=lambda name: -residuals[name])[:5]


@pytest.mark.usefixtures("out")
def test_error_report_as_csv(loftq: Command) -> None:
    found = json.loads(loftq("error-report", "--json").stdout)
    rows = list(csv.DictReader(io.StringIO(loftq("error-report", "--csv").stdout)))
    assert [row["name"] for row in rows] == [layer["name"] for layer in found["layers"]]
    for row, layer in zip(rows, found["layers"], strict=True):
        assert set(row) == {
            *("name", "bits", "rank", "step", "weight", "quantized", "final"),
            *("relative_residual_quantized", "relative_residual", "step_1", "step_2"),
            *("weighted_kind", "weighted_weight", "weighted_quantized", "weighted_final"),
        }
        assert {row[name] for name in row if name.startswith("weighted_")} == {""}
        assert [float(row["step_1"]), float(row["step_2"])] == layer["steps"]
        assert float(row["final"]) == layer["final"]


@pytest.mark.usefixtures("out")
def test_error_report_recomputes_from_the_source(loftq: Command) -> None:
    result = loftq("error-report", "--source", "./model", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["recomputed"]
    checkpoints.write(Path("model"), checkpoints.llama(seed=1))
    result = loftq("error-report", "--source", "./model")
    assert result.exit_code == 3
    assert "the manifest disagrees" in result.stderr
    assert all(name in result.stderr for name in MATRICES)
