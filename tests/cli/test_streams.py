"""Terminals that cannot show every name, and standard streams that are closed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
import torch

import loftq_cli
from loftq_cli.cli.narrator import Narrator
from tests.support import checkpoints
from tests.support.commands import QUICK

ROOT = Path(loftq_cli.__file__).parents[1]
TENSOR = "model.layers.0.mlp.größe.weight"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
COMMANDS = [
    ("convert", "mödell", "-o", "öut", *QUICK),
    ("inspect", "öut"),
    ("inspect", "öut", "--json"),
    ("error-report", "öut"),
    ("error-report", "öut", "--csv"),
    ("convert", "mödell", "-o", "nöch eins", "--dry-run"),
    ("merge", "öut", "-o", "vereinigt-ü"),
]


@pytest.fixture
def model(place: Path) -> Path:
    """A model with a name, and a tensor, that ASCII cannot show."""
    tensors = checkpoints.llama()
    tensors[TENSOR] = torch.randn(64, 64)
    return checkpoints.write(place / "mödell", tensors)


def run(*words: str, redirections: str = "", **environment: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of ``loftq WORDS…`` as a shell starts it."""
    result = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirections}', "sh", sys.executable, "-m", "loftq_cli", *words],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        check=False,
    )
    return result.returncode, result.stdout.decode("ascii"), result.stderr.decode("ascii")


@pytest.mark.usefixtures("model")
def test_names_that_ascii_cannot_show_are_escaped() -> None:
    for words in COMMANDS:
        code, shown, said = run(*words, **ASCII)
        assert code == 0, f"{words}: {said}"
        if "--json" in words:
            assert TENSOR in [layer["name"] for layer in json.loads(shown)["layers"]]
        elif words[0] != "merge" and "-o" not in words:
            assert r"gr\xf6\xdfe" in shown
    code, shown, said = run("inspect", "nïrgends", **ASCII)
    assert (code, shown) == (3, "")
    assert "no such directory" in said


def test_a_progress_bar_that_ascii_cannot_show(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(TextIOWrapper):
        def isatty(self) -> bool:
            return True

    raw = BytesIO()
    terminal = Terminal(raw, encoding="ascii", errors="backslashreplace", write_through=True)
    monkeypatch.setattr(sys, "stderr", terminal)
    narrator = Narrator(quiet=False, verbose=False)
    narrator.begin(1000)
    narrator.working_on(TENSOR)
    narrator.advance(500)
    narrator.end()
    assert rb"gr\xf6\xdfe" in raw.getvalue()


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
@pytest.mark.usefixtures("out")
def test_a_stream_that_is_closed_is_no_error(place: Path, closed: str) -> None:
    assert run("convert", "model", "-o", "new", *QUICK, redirections=closed)[0] == 0
    assert run("inspect", "nowhere", redirections=closed)[0] == 3
    if closed == ">&- 2>&- <&-":
        assert run("inspect", "new", "--verify", redirections=closed)[0] == 0
        assert run("--help", redirections=closed)[0] == 0
        assert run("--nonsense", redirections=closed)[0] == 2


needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")


@needs_full
def test_work_goes_on_where_nobody_reads_the_remarks(place: Path) -> None:
    code, shown, _ = run("convert", "model", "--bits", "2", *QUICK, redirections="2>/dev/full")
    assert (code, "wrote out" in shown) == (0, True)
    assert (place / "out/loftq_manifest.json").is_file()


@needs_full
@pytest.mark.parametrize("words", [("--help",), ("--version",), ("inspect", "--help")])
def test_help_that_cannot_be_written_is_an_error_in_one_line(words: tuple[str, ...]) -> None:
    code, _, said = run(*words, redirections=">/dev/full")
    assert code == 5
    assert said == "loftq: error: standard output: No space left on device\n"


@needs_full
@pytest.mark.parametrize("words", [("nosuch",), ("inspect", "--nosuch"), ()])
def test_a_usage_error_that_cannot_be_written_is_one_all_the_same(words: tuple[str, ...]) -> None:
    assert run(*words, redirections="2>/dev/full") == (2, "", "")
