"""``loftq refine``: what it takes, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import loftq_cli
from loftq_cli.cli.commands import main
from loftq_cli.statistics.file import open_statistics

WORDS = ("--source", "model", "--text", "text.txt", "--length", "20", "--device", "cpu")
FEW = (*WORDS, "--samples", "8", "--epochs", "1")


def run(*words: str) -> Any:
    return CliRunner().invoke(main, ["refine", *words])


def test_what_comes_of_it_is_shown_here_and_in_reports(converted: Path) -> None:
    shown = run(*FEW, "-o", "new", "--end-to-end", "2")
    assert shown.exit_code == 0, shown.output
    for said in (
        "8 windows of 20 tokens",
        "of 2 better on text held out",
        "end to end",
        "residual",
    ):
        assert said in shown.stdout
    seen = CliRunner().invoke(main, ["inspect", "new"])
    assert "on 160 tokens, errors of 2 blocks on text held out times 0." in seen.stdout
    report = CliRunner().invoke(main, ["error-report", "new"])
    for said in ("model.layers.1", "end to end", "it raises the plain residual"):
        assert said in report.stdout
    told = [
        json.loads(CliRunner().invoke(main, [command, "new", "--json"]).stdout)["refined"]
        for command in ("inspect", "error-report")
    ]
    assert told[0] == told[1]


def test_json_and_every_option(converted: Path) -> None:
    words = ("out", *FEW, "--output", "new", "--json", "--quiet", "--seed", "3", "--offline")
    log = ("--log-file", "log.txt")
    dry = run(*words, "--dry-run", "--adapter", "out/loftq_init")
    assert dry.exit_code == 0, dry.output
    assert json.loads(dry.stdout)["disk_bytes"] > 0
    assert not list(converted.glob("*new*"))
    assert "nothing was written" in run(*FEW, "-o", "new", "--dry-run").stdout
    told = run(*words, *log, "--adapter", "out/loftq_init")
    assert told.exit_code == 0, told.output
    assert "refining: 2 blocks" in (converted / "log.txt").read_text()
    found = json.loads(told.stdout)
    assert (found["samples"], found["length"], found["tokens"]) == (8, 20, 160)
    assert (found["adapter"], found["end_to_end"]) == ("out/loftq_init", None)
    assert [block["name"] for block in found["blocks"]] == ["model.layers.0", "model.layers.1"]
    other = run("out", *WORDS, "--samples", "9", "--epochs", "1", "-o", "new", "-q")
    assert (other.exit_code, "--overwrite" in other.stderr) == (4, True)
    again = run("out", *WORDS, "--samples", "9", "--epochs", "1", "-o", "new", "-q", "--overwrite")
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("out", "--text", "text.txt", "-o", "new"), 2, "--source"),
        (("out", "--source", "model", "-o", "new"), 2, "--text"),
        (("out", *WORDS), 2, "--output"),
        (("out", *WORDS, "-o", "new", "--epochs", "-1"), 2, "--epochs -1: must be a whole number"),
        (("out", *WORDS, "-o", "out/new"), 2, "inside the input"),
        (("out", *WORDS, "-o", "model/new"), 2, "inside the model"),
        (("out", *WORDS, "-o", "new", "--text", "nowhere.txt"), 3, "nowhere.txt: no such file"),
        (("out", *WORDS, "-o", "new", "--source", "out"), 3, "conversion"),
        (("out", *WORDS, "-o", "new", "--revision", "main"), 2, "--revision main is for what"),
        (("model", *WORDS, "-o", "new"), 3, "not the output of a conversion"),
    ],
)
def test_what_is_refused(converted: Path, words: tuple[str, ...], code: int, said: str) -> None:
    refused = run(*words)
    assert (refused.exit_code, refused.stdout) == (code, "")
    assert said in " ".join(refused.stderr.split())
    assert "Traceback" not in refused.stderr
    assert not list(converted.glob("*new*"))


def test_verbose_shows_where_an_error_comes_from(converted: Path) -> None:
    for word in ("-v", "--verbose"):
        assert "Traceback" in run("out", *WORDS, "-o", "new", "--text", "nowhere.txt", word).stderr


def test_convert_refines_at_once(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loftq_cli.refinement.settings.STEPS", 2)
    words = ["convert", "model", "-o", "both", "--bits", "2", "--rank", "4", "--refine"]
    words += ["--iters", "1", "--layout", "loftq", "-t", "1", "-q"]
    told = CliRunner().invoke(main, [*words, "--calibrate-text", "text.txt", "--json"])
    assert told.exit_code == 0, told.output
    manifest = json.loads(told.stdout)
    assert manifest["refined"]["end_to_end"]["steps"] == 2
    start = loftq_cli.inspect(converted / "both.start", verify=True)
    assert manifest["refined"]["fingerprint"] == start["fingerprint"]
    both = loftq_cli.inspect(converted / "both", verify=True)
    assert both["fingerprint"] == manifest["fingerprint"]
    settings: dict[str, Any] = {"bits": 2, "rank": 4, "iters": 1, "layout": "loftq", "threads": 1}
    text = converted / "text.txt"
    again = loftq_cli.convert(
        converted / "model", converted / "both", calibrate_text=text, refine=True, **settings
    )
    assert again == manifest
    refused = CliRunner().invoke(main, words)
    assert (refused.exit_code, "--refine needs text" in refused.stderr) == (2, True)


def test_the_best_preset_measures_full_moments_and_refines(
    converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loftq_cli.refinement.settings.STEPS", 1)
    words = ["convert", "model", "-o", "best", "--bits", "2", "--rank", "4", "--preset", "best"]
    text = ["--calibrate-text", "text.txt"]
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 2
    assert "--preset best needs text" in refused.stderr
    settings: dict[str, Any] = {"bits": 2, "rank": 4, "preset": "best"}
    dry = CliRunner().invoke(main, [*words, *text, "--dry-run"])
    assert "refining follows: at most" in dry.stderr
    assert not list(converted.glob("*best*"))
    told = CliRunner().invoke(main, [*words, *text, "--json"])
    assert told.exit_code == 0, told.output
    manifest = json.loads(told.stdout)
    assert manifest["refined"]["end_to_end"]["steps"] == 1
    statistics = open_statistics(converted / "best.start.stats.safetensors")
    assert {entry.kind for entry in statistics.entries.values()} == {"full"}
    again = loftq_cli.convert(
        converted / "model",
        converted / "best",
        calibrate_text=converted / "text.txt",
        **settings,
    )
    assert again == manifest
