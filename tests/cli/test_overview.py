"""What the reports begin with, on terminals of all sizes."""

from __future__ import annotations

import json
import re
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest

import loftq_cli
from loftq_cli.cli import reports
from tests.support import manifests
from tests.support.commands import Command

REPORTS = ("inspect", "error-report")
every_report = pytest.mark.parametrize("report", REPORTS)


class Terminal(TextIOWrapper):
    def isatty(self) -> bool:
        return True


def on_terminal(
    monkeypatch: pytest.MonkeyPatch, report: str, columns: int, encoding: str = "utf-8", **told: Any
) -> list[str]:
    """The lines of ``report`` on a terminal of so many columns."""
    raw = BytesIO()
    screen = Terminal(raw, encoding=encoding, write_through=True)
    with monkeypatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        patch.setattr(sys, "stdout", screen)
        if report == "inspect":
            reports.inspection(loftq_cli.inspect("large"), as_json=False, every=False)
        else:
            found = {**loftq_cli.error_report("large"), **told}
            reports.residuals(found, as_json=False, as_csv=False, every=False)
    return raw.getvalue().decode(encoding).splitlines()


@pytest.fixture
def large(place: Path) -> Path:
    return manifests.write(place / "large", manifests.large(experts=5))


@every_report
@pytest.mark.usefixtures("large")
def test_a_thousand_matrices_are_a_page_of_80_columns(report, monkeypatch):
    lines = on_terminal(monkeypatch, report, 80)
    snippet = next((n for n, line in enumerate(lines) if line == "load it with:"), len(lines))
    assert max(map(len, lines[:snippet])) <= 80
    assert len(lines) < 80
    assert "1520" in lines[1 if report == "error-report" else 3]


@every_report
@pytest.mark.usefixtures("large")
def test_a_row_for_each_kind_has_its_figures(report, monkeypatch, loftq: Command):
    layers = json.loads(loftq(report, "large", "--json").stdout)["layers"]
    (row,) = [
        line
        for line in on_terminal(monkeypatch, report, 80)
        if re.match(r"experts.down_proj +400 +8192x28672 +2 +64", line)
    ]
    own = [each for each in layers if each["name"].endswith("down_proj.weight")]
    for which in ("relative_residual_quantized", "relative_residual"):
        values = sorted(each[which] for each in own)
        middle = (values[199] + values[200]) / 2
        told = f"{middle:.3f} {values[0]:.3f}-{values[-1]:.3f}".replace("0.", ".")
        assert told in " ".join(row.split())


@pytest.mark.usefixtures("large")
def test_a_strip_has_a_character_for_each_of_80_blocks(monkeypatch):
    lines = on_terminal(monkeypatch, "inspect", 80)
    strip = lines[lines.index("experts.down_proj") + 1]
    assert len(strip) == 80
    assert set(strip) <= set("▁▂▃▄▅▆▇█")
    assert any("blocks 0 to 79, ▁ ." in line for line in lines)


@every_report
@pytest.mark.usefixtures("large")
def test_a_terminal_that_shows_ascii_only(report, monkeypatch):
    lines = on_terminal(monkeypatch, report, 80, "ascii")
    strip = lines[lines.index("q_proj") + 1]
    assert set(strip) <= set(".:-=+*#@")
    monkeypatch.setenv("TERM", "dumb")
    assert "█" not in "".join(on_terminal(monkeypatch, report, 80))


@every_report
@pytest.mark.usefixtures("large")
def test_a_terminal_of_20_columns(report, monkeypatch):
    lines = on_terminal(monkeypatch, report, 20)
    words = {word for line in lines for word in line.split()}
    assert {"experts.down_proj", "8192x28672,", "400,"} <= words
    # Only what has no spaces is longer: names of tensors, and code.
    for line in lines[: lines.index("The worst 10 of 1520")]:
        assert len(line) <= 20 or len(line.split()) == 1, line


@pytest.mark.usefixtures("large")
def test_the_worst_ten_in_order(monkeypatch):
    lines = on_terminal(monkeypatch, "error-report", 80)
    start = lines.index("The worst 10 of 1520") + 1
    report = loftq_cli.error_report("large")
    by_residual = sorted(report["layers"], key=lambda each: -each["relative_residual"])
    assert [line.split()[-1] for line in lines[start : start + 10]] == [
        each["name"] for each in by_residual[:10]
    ]


@pytest.mark.usefixtures("large")
def test_what_refining_gained_is_a_strip(monkeypatch):
    blocks = [
        {"name": f"layers.{n}", "before": 2.0, "after": 1.0, "held_before": 2.0, "steps": 4}
        | {"held_after": 2.0 * gain, "kept": 4, "finite": True}
        for n, gain in enumerate((0.5, 0.66, 0.9))
    ]
    told = {"tokens": 1000, "blocks": blocks}
    lines = on_terminal(monkeypatch, "error-report", 80, refined=told)
    (title,) = [line for line in lines if line.startswith("Refined: what is left of each block")]
    assert title.endswith("blocks 0 to 2, ▁ .500 to █ .900")
    assert lines[lines.index(title) + 1] == "gain  ▁▄█"
    assert any("times 0.667" in line for line in lines)  # the geometric mean


def test_names_that_drive_a_terminal_are_escaped(place, monkeypatch, loftq: Command):
    manifest = manifests.large(layers=2)
    for record in manifest["matrices"]:
        record["name"] = record["name"].replace("q_proj", "q\x1b[2Jproj")
    manifests.write(place / "hostile", manifest)
    for report in REPORTS:
        for words in ([], ["--all"]):
            result = loftq(report, "hostile", *words)
            assert result.exit_code == 0
            assert "\x1b" not in result.stdout
            assert r"q\x1b[2Jproj" in result.stdout


@every_report
def test_an_export_that_was_merged_has_one_residual(report, place, loftq: Command):
    manifest = manifests.large(layers=2)
    for record in manifest["matrices"]:
        record["rank"] = 0
    manifest["outputs"] = manifest["outputs"][1:]
    manifests.write(place / "merged", manifest)
    shown = loftq(report, "merged").stdout
    assert "no adapter" not in shown
    assert "without" not in shown
    assert "rank" not in shown


@every_report
def test_what_is_unfinished_or_damaged_is_said_in_a_line(report, place, loftq: Command):
    (place / ".half.loftq-partial").mkdir()
    manifest = manifests.large(layers=1)
    manifest["matrices"][0]["frobenius"]["final"] = -1
    manifests.write(place / "damaged", manifest)
    for name, said in (("half", "not finished"), ("damaged", "matrices[0].frobenius.final")):
        result = loftq(report, name)
        assert (result.exit_code, result.stdout) == (3, "")
        assert said in result.stderr
        assert len(result.stderr.splitlines()) == 1
