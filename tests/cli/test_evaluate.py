"""``loftq evaluate``: what it takes, prints and refuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import loftq_cli
from loftq_cli.cli.commands import main


def run(*words: str) -> Any:
    return CliRunner().invoke(main, ["evaluate", *words])


def test_what_it_finds_is_shown(converted: Path) -> None:
    shown = run("--text", "text.txt", "--source", "model", "--length", "20", "--device", "cpu")
    assert shown.exit_code == 0, shown.output
    for title in ("perplexity", "of the original", "KL divergence", "same likeliest token"):
        assert title in shown.stdout
    assert "windows of 20 tokens" in shown.stdout


def test_json_and_the_choice_of_windows(converted: Path) -> None:
    words = ("out", "--text", "text.txt", "--text", "text.txt", "--length", "20", "--json", "-q")
    told = run(*words, "--samples", "3", "--seed", "5", "--adapter", "out/loftq_init", "--offline")
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert (found["samples"], found["tokens"]) == (3, 57)
    assert (found["directory"], found["adapter"]) == ("out", "out/loftq_init")
    other = json.loads(run(*words, "--samples", "3", "--seed", "6").stdout)
    assert other["perplexity"] != found["perplexity"]


def test_what_is_kept_is_found_again(converted: Path) -> None:
    words = ("--text", "text.txt", "--source", "model", "--length", "20", "--samples", "2", "-q")
    told = run("out", *words, "--save", "--json")
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert found["texts"] == [hashlib.sha256(Path("text.txt").read_bytes()).hexdigest()]
    (kept,) = json.loads(Path("out/loftq_evaluations.json").read_text())["evaluations"]
    assert {**found, "fingerprint": kept["fingerprint"]} == kept
    assert loftq_cli.inspect("out", verify=True)["verified_files"] is not None
    refused = run("model", *words, "--save")
    assert (refused.exit_code, refused.stdout) == (3, "")
    assert "not the output of a conversion" in refused.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("out",), 2, "--text"),
        (
            ("out", "--text", "nowhere.txt", "--quiet", "--log-file", "log.txt"),
            3,
            "nowhere.txt: no such file",
        ),
        (("out", "--text", "text.txt", "--length", "900"), 2, "takes 64 tokens at most"),
        (("out", "--text", "text.txt", "--revision", "main"), 2, "--revision main is for what"),
        (("nowhere", "--text", "text.txt"), 3, "nowhere"),
        (("out", "--text", "text.txt", "--log-file", "no/log.txt"), 5, "--log-file no/log.txt"),
    ],
)
def test_what_is_refused(converted: Path, words: tuple[str, ...], code: int, said: str) -> None:
    refused = run(*words)
    assert (refused.exit_code, refused.stdout) == (code, "")
    assert said in " ".join(refused.stderr.split())
    assert "Traceback" not in refused.stderr


def test_verbose_shows_where_an_error_comes_from(converted: Path) -> None:
    assert "Traceback" in run("out", "--text", "nowhere.txt", "-v").stderr
    assert "Traceback" in run("out", "--text", "nowhere.txt", "--verbose").stderr
