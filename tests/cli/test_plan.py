"""``loftq plan``: what it shows, and what it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from loftq_cli.cli import show_fits
from loftq_cli.cli.narrator import Narrator
from tests.support import models
from tests.support.commands import Command


@pytest.fixture
def model(place: Path) -> Path:
    """A model in ``model`` whose config.json describes it."""
    shutil.rmtree(place / "model")
    return models.save(models.llama(max_position_embeddings=32), place / "model")


@pytest.mark.usefixtures("model")
def test_a_row_for_each_setting_and_the_best_that_fits(loftq: Command) -> None:
    shown = loftq("plan", "model", "--memory", "1GiB")
    assert shown.exit_code == 0, shown.stderr
    assert "1 x 32 tokens in bfloat16" in shown.stdout  # as many as it takes
    rows = [line.split() for line in shown.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert [tuple(row[:3]) for row in rows] == [
        (bits, rank, {"4": "bnb"}.get(bits, "gptq")) for bits in "2348" for rank in ("16", "64")
    ]
    assert all(row[-1] == "yes" for row in rows)
    assert "best that fits 1.00 GiB: 8 bits, rank 64\n" in shown.stdout
    assert "next: loftq convert model --bits 8 --rank 64\n" in shown.stdout
    assert all(len(line.rstrip()) <= 80 for line in shown.stdout.splitlines())
    following = shown.stdout.rpartition("next: loftq ")[2].split()
    assert loftq(*following, "--iters", "0", "-t", "1", "-q").exit_code == 0


@pytest.mark.usefixtures("model")
def test_json_and_every_option(loftq: Command) -> None:
    words = ("--json", "--length", "16", "--batch", "3", "--dtype", "float32", "--rank", "2")
    more = ("--bits", "3", "--bits", "4", "--layout", "loftq", "--offline", "--allow-pickle")
    shown = loftq(
        "plan", "model", *words, *more, "--memory", "1MB", "--quiet", "-q", "-v", "--verbose"
    )
    assert shown.exit_code == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert (found["length"], found["batch"], found["dtype"]) == (16, 3, "float32")
    assert (found["memory_bytes"], found["unknown"], found["refused"]) == (10**6, None, [])
    assert [(row["bits"], row["rank"], row["layout"]) for row in found["rows"]] == [
        (3, 2, "loftq"),
        (4, 2, "loftq"),
    ]
    for row in found["rows"]:
        held = row["weights_bytes"] + row["adapter_bytes"]
        assert row["load_bytes"] == held
        assert row["train_bytes"] == held + sum(
            row[f"{part}_bytes"] for part in ("gradients", "optimizer", "activations")
        )
    assert found["best"] is not None
    assert found["command"].endswith("--layout loftq --offline --allow-pickle")
    refused = loftq("plan", "model", "--revision", "main")
    assert (refused.exit_code, "--revision" in refused.stderr) == (2, True)


@pytest.mark.usefixtures("model")
def test_where_nothing_fits_it_says_what_the_least_is(loftq: Command) -> None:
    words = ("--memory", "20kB", "--bits", "2", "--bits", "3", "--rank", "2")
    shown = loftq("plan", "model", *words, "--layout", "loftq")
    assert shown.exit_code == 0
    assert "nothing fits 19.53 KiB: the least is" in shown.stdout
    assert "at 2 bits and rank 2" in shown.stdout
    assert "next:" not in shown.stdout


@pytest.mark.usefixtures("model")
def test_what_fits_is_the_same_for_convert(loftq: Command) -> None:
    """The narrowest codes just fit, and nothing less does."""
    words = ("--bits", "2", "--rank", "2", "--layout", "loftq")
    (row,) = json.loads(loftq("plan", "model", *words, "--json", "--length", "16").stdout)["rows"]
    least = min(row["train_bytes"], row["checkpointed_train_bytes"])
    asked = ("convert", "model", "--dry-run", "--rank", "2", "--fit-batch", "1")
    fits = loftq(*asked, "--fit", f"{least}B", "--fit-length", "16")
    assert fits.exit_code == 0, fits.stderr
    none = loftq(*asked, "--fit", f"{least - 1}B", "--fit-length", "16")
    assert none.exit_code == 2
    assert "fine-tuning takes at least" in none.stderr
    assert "1 x 16 tokens" in none.stderr


def test_a_log_has_the_matrices_the_remarks_and_the_error(place: Path, loftq: Command) -> None:
    words = ("convert", "model", "--rank", "2", "-t", "1", "--log-file", "log.txt")
    done = loftq(*words, "--target-size", "0.1MB", "-q")
    assert (done.exit_code, done.stderr) == (0, "")
    refused = loftq(*words, "--target-size", "0.01MB", "--overwrite")
    assert refused.exit_code == 2
    lines = [line[20:] for line in (place / "log.txt").read_text("utf-8").splitlines()]
    assert lines[0].startswith("--target-size 0.1MB: ")
    assert "converting: 7 matrices" in lines
    assert lines[-1].startswith("error: --target-size 0.01MB: the files take at least")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("model", "--memory", "24"), 2, "--memory '24'"),
        (("model", "--memory", "-1GB"), 2, "--memory '-1GB'"),
        (("model", "--length", "0"), 2, "--length 0"),
        (("model", "--length", "33"), 2, "at most 32 tokens"),
        (("model", "--batch", "-2"), 2, "--batch -2"),
        (("model", "--bits", "5"), 2, "--bits 5"),
        (("model", "--rank", "0"), 2, "--rank 0"),
        (("model", "--layout", "none"), 2, "--layout none"),
        (("model", "--layout", "bnb", "--bits", "2"), 2, "bnb holds 4-bit nf"),
        (("./nowhere",), 3, "nowhere"),
        ((), 2, "MODEL"),
    ],
)
@pytest.mark.usefixtures("model")
def test_what_cannot_be_planned(
    words: tuple[str, ...], code: int, said: str, loftq: Command
) -> None:
    found = loftq("plan", *words)
    assert (found.exit_code, said in found.stderr) == (code, True), found.stderr


@pytest.mark.usefixtures("model")
def test_settings_that_a_layout_cannot_hold_are_named_in_a_line(loftq: Command) -> None:
    words = ("--layout", "bnb", "--rank", "2", "--bits", "2", "--bits", "4")
    shown = loftq("plan", "model", *words)
    assert shown.exit_code == 0
    (line,) = shown.stderr.splitlines()
    assert line.startswith("loftq: 2 bits in layout bnb: ")
    assert "(and 13 more)" in line


def test_a_model_that_nobody_can_build_is_judged_by_the_rest(loftq: Command) -> None:
    """Its config.json says nothing of sizes."""
    words = ("plan", "model", "--rank", "2", "--bits", "4")
    shown = loftq(*words, "--memory", "1MB")
    assert shown.exit_code == 0
    assert "what a training step takes cannot be counted" in shown.stderr
    assert "perhaps" in shown.stdout
    assert " ? " in shown.stdout
    (row,) = json.loads(loftq(*words, "--json").stdout)["rows"]
    known = sum(row[f"{part}_bytes"] for part in ("load", "gradients", "optimizer"))
    for room, verdict in ((known * 4 // 3 + 2, "perhaps"), (known, "no")):
        found = json.loads(loftq(*words, "--json", "-q", "--memory", f"{room}B").stdout)
        assert found["rows"][0]["fits"] == verdict


def test_a_terminal_of_20_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row: dict[str, Any] = {
        "bits": 4,
        "rank": 16,
        "layout": "compressed",
        "disk_bytes": 10**10,
        "load_bytes": 10**10,
        "train_bytes": 10**10,
        "checkpointed_train_bytes": None,
        "fits": "yes",
    }
    found = {"refused": [], "unknown": None, "rows": [row], "memory_bytes": 10**10, "best": row}
    found |= {"source": {"id": "m"}, "parameters": 1, "batch": 1, "length": 2, "dtype": "float32"}
    found["command"] = "loftq convert m"
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    show_fits.show(found, Narrator(quiet=True, verbose=False), as_json=False)
    shown = capsys.readouterr().out
    for said in ("bits", "4", "compressed", "10.00 GB", "9.31 GiB", "?", "yes"):
        assert said in shown  # no column is lost
    assert max(len(line) for line in shown.splitlines()[1:9]) <= 26
    assert "\x1b" not in shown
    assert "loftq convert m" in shown
