"""``loftq calibrate`` as it is typed."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from loftq_cli.calibration import calibrate as calibrating
from loftq_cli.statistics.file import open_statistics
from tests.support import models
from tests.support.commands import Command

KEYS = {
    *("bytes", "device", "dtype", "entries", "length", "matrices", "missing", "model"),
    *("moments", "output", "samples", "seconds", "sensitivities", "tokens"),
}
QUICK = ("--text", "notes.txt", "--length", "16", "--device", "cpu")
MATRICES = 14  # seven in each of two blocks
NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def real(place: Path) -> None:
    """``real``, a Llama with a tokenizer, and ``notes.txt``."""
    models.save_tokenizer(models.save(models.llama(), place / "real"))
    (place / "notes.txt").write_text("Nobody knew why the mill stood still. " * 8)


def test_it_writes_a_file_and_says_what_to_type_next(loftq: Command) -> None:
    result = loftq("calibrate", "real", *QUICK)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "wrote stats.safetensors"
    assert "diagonal, 8 distinct inputs" in result.stdout
    assert "21 windows of 16 tokens, 336 in all" in result.stdout
    assert lines[-1] == "next: loftq convert real --stats stats.safetensors"
    found = open_statistics("stats.safetensors")
    assert (len(found.matrices), found.kind(NAME)) == (MATRICES, "diagonal")
    assert sorted(os.listdir()) == ["model", "notes.txt", "real", "stats.safetensors"]


def test_what_was_measured_is_what_convert_takes(loftq: Command) -> None:
    loftq("calibrate", "real", *QUICK)
    result = loftq("convert", "real", "--stats", "stats.safetensors", "--rank", "4", "--json")
    assert result.exit_code == 0, result.stderr
    records = json.loads(result.stdout)["matrices"]
    assert [record["weighted"]["kind"] for record in records] == ["diagonal"] * MATRICES
    assert all(r["weighted"]["final"] < r["weighted"]["quantized"] for r in records)
    rows = list(csv.DictReader(io.StringIO(loftq("error-report", "--csv").stdout)))
    assert [row["weighted_kind"] for row in rows] == ["diagonal"] * MATRICES
    assert [float(row["weighted_final"]) for row in rows] == [
        record["weighted"]["final"] for record in records
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--bits", "2"), True),
        (("--bits", "3"), True),
        (("--bits", "4"), False),
        (("--bits", "2", "--preset", "paper", "--layout", "loftq"), False),
        (("--bits", "2", "--iters", "0"), False),
        (("--bits", "2", "--stats", "stats.safetensors"), False),
    ],
)
def test_narrow_codes_without_statistics_are_remarked_on(
    words: tuple[str, ...], said: bool, loftq: Command
) -> None:
    loftq("calibrate", "real", *QUICK)
    result = loftq("convert", "real", "--dry-run", "--rank", "4", *words)
    assert result.exit_code == 0, result.stderr
    assert ("without activation statistics" in result.stderr) == said
    assert "statistics" not in loftq("convert", "real", "--dry-run", "-q", *words).stderr


@pytest.mark.parametrize("short", [False, True])
def test_the_options(short: bool, loftq: Command) -> None:
    Path("more.txt").write_text("Or cared.")
    words = ["-o" if short else "--output", "made/full.safetensors", "--moments", "full"]
    words += ["--samples", "3", "--seed", "7", "--text", "more.txt", "--json"]
    result = loftq("calibrate", "real", *QUICK, *words)
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    assert set(found) == KEYS
    assert found["output"] == "made/full.safetensors"
    assert found["bytes"] == Path("made/full.safetensors").stat().st_size
    assert (found["matrices"], found["entries"], found["missing"]) == (MATRICES, 8, [])
    assert (found["samples"], found["length"], found["tokens"]) == (3, 16, 48)
    assert (found["moments"], found["device"], found["dtype"]) == ("full", "cpu", "float32")
    assert open_statistics("made/full.safetensors").kind(NAME) == "full"
    assert found["sensitivities"] == 0


def test_an_earlier_file_is_replaced_on_demand(loftq: Command) -> None:
    assert loftq("calibrate", "real", *QUICK).exit_code == 0
    result = loftq("calibrate", "real", *QUICK, "-q")
    assert result.exit_code == 4
    assert "stats.safetensors exists" in result.stderr
    quiet = ("--quiet", "--log-file", "log.txt")
    result = loftq("calibrate", "real", *QUICK, "--overwrite", "--offline", *quiet)
    assert (result.exit_code, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["real"], 2, "Missing option '--text'"),
        (["real", "--text", "notes.txt", "--samples", "0"], 2, "--samples 0"),
        (["real", "--text", "notes.txt", "--moments", "half"], 2, "half"),
        (["real", *QUICK, "-o", "real/stats.safetensors"], 2, "is inside the input"),
        (["real", "--text", "none.txt"], 3, "--text none.txt: no such file"),
        (["./none", *QUICK], 3, "none: no such file or directory"),
        (["model", *QUICK], 3, "model: no tokenizer in it"),
        (["real", *QUICK, "-o", "notes.txt", "--overwrite"], 4, "is not a file of statistics"),
    ],
)
def test_what_is_refused(words: list[str], code: int, said: str, loftq: Command) -> None:
    result = loftq("calibrate", *words)
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr.splitlines()[-1]
    assert sorted(os.listdir()) == ["model", "notes.txt", "real"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interruption_leaves_nothing(
    name: str, loftq: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = getattr(signal, name)
    monkeypatch.setattr(calibrating, "write_entry", lambda *_: os.kill(os.getpid(), number))
    result = loftq("calibrate", "real", *QUICK)
    assert result.exit_code == 128 + number
    assert result.stderr == f"loftq: error: interrupted by {name} (nothing was written)\n"
    assert sorted(os.listdir()) == ["model", "notes.txt", "real"]
