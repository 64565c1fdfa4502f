"""What a terminal shows while a model is downloaded and converted."""

from __future__ import annotations

import logging
import re
import sys
from io import StringIO
from pathlib import Path

import pytest

from loftq_cli.cli.course import duration
from loftq_cli.cli.narrator import Narrator
from loftq_cli.errors import EnvironmentFailure


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def watched(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal in the place of stderr. Not a fixture: pytest changes stderr between the two."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [])
    return terminal


def test_two_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watched(monkeypatch)
    narrator = Narrator(quiet=False, verbose=False)
    narrator.begin(1000)
    narrator.begin_download(2000)
    narrator.downloaded(500)
    narrator.advance(1000)
    narrator.end()
    shown = terminal.getvalue()
    assert re.search(r"converting: 100%.*1\.00k/1\.00k", shown)
    assert re.search(r"downloading: +25%.*500/2\.00k", shown)


def test_no_bar_where_nothing_is_to_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watched(monkeypatch)
    narrator = Narrator(quiet=False, verbose=False)
    narrator.begin(1000)
    narrator.begin_download(0)
    narrator.end()
    assert "downloading" not in terminal.getvalue()


@pytest.mark.parametrize("quiet", [False, True])
def test_what_the_client_warns_of_is_a_remark_like_others(
    monkeypatch: pytest.MonkeyPatch, quiet: bool
) -> None:
    terminal = watched(monkeypatch)
    narrator = Narrator(quiet=quiet, verbose=False)
    narrator.begin_download(2000)
    logging.getLogger("huggingface_hub.file_download").warning("it broke\nTrying again")
    narrator.end()
    lines = [line for line in re.split(r"[\r\n]+", terminal.getvalue()) if "it broke" in line]
    assert lines == ([] if quiet else ["loftq: it broke Trying again"])


class Clock:
    """Seconds, as they are set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def worked(narrator: Narrator, clock: Clock) -> None:
    """Four matrices, of which the first was there and each of the others takes a minute, the last
    three of them."""
    narrator.begin(600)
    narrator.count(4, "matrices")
    narrator.finished("residual 0.5000")
    narrator.skip(100)
    for number, amount in enumerate((100, 100, 300)):
        narrator.working_on(f"layer.{number}")
        clock.now += 60.0 * amount / 100
        narrator.finished(f"residual 0.{number}000")
        narrator.advance(amount)
    narrator.end()


def test_without_a_terminal_there_is_a_line_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    worked(Narrator(quiet=False, verbose=False, clock=clock), clock)
    assert capsys.readouterr().err.splitlines() == [
        "loftq: converting: 2 of 4 matrices, residual 0.0000, 4 min left",
        "loftq: converting: 3 of 4 matrices, residual 0.1000, 3 min left",
        "loftq: converting: 4 of 4 matrices, residual 0.2000",
    ]


def test_quiet_is_silent_and_a_log_gets_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, path = Clock(), tmp_path / "log.txt"
    narrator = Narrator(quiet=True, verbose=False, log_file=path, clock=clock)
    narrator.note("a remark")
    worked(narrator, clock)
    assert capsys.readouterr().err == ""
    lines = path.read_text("utf-8").splitlines()
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
    assert all(re.match(stamp, line) for line in lines)
    texts = [re.sub(stamp, "", line) for line in lines]
    assert texts[:2] == ["a remark", "converting: 4 matrices"]
    assert len(texts) == 5
    Narrator(quiet=True, verbose=False, log_file=path).note("later")  # appended
    assert len(path.read_text("utf-8").splitlines()) == 6
    Narrator(quiet=True, verbose=False)


def test_a_bar_of_matrices_says_how_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, terminal = Clock(), watched(monkeypatch)
    monkeypatch.setenv("COLUMNS", "120")
    worked(Narrator(quiet=False, verbose=False, clock=clock), clock)
    shown = terminal.getvalue()
    assert re.search(r"converting: +33%\|.*\| 2 of 4 matrices, residual 0\.0000", shown)
    assert re.search(r"converting: +50%\|.*3 of 4 matrices.*layer\.2", shown)
    assert "loftq: converting" not in shown  # no lines beside the bar


def test_a_terminal_of_20_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, terminal = Clock(), watched(monkeypatch)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda _: (20, 5))
    worked(Narrator(quiet=False, verbose=False, clock=clock), clock)
    drawn = re.split(r"[\r\n]", terminal.getvalue())
    assert max(len(line) for line in drawn) <= 20
    assert any(line.startswith("converting:") for line in drawn)


def test_downloads_are_told_of_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    narrator = Narrator(quiet=False, verbose=False, clock=clock)
    narrator.begin_download(1000)
    clock.now = 100
    narrator.downloaded(100)
    assert "loftq: downloading: 10%, 15 min left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "told"), [(40, "40 s"), (89, "89 s"), (720, "12 min"), (12000, "3 h 20 min")]
)
def test_how_long_something_takes(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def test_a_log_that_cannot_be_written_is_an_error_before_anything(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailure, match=r"--log-file .*: No such file or directory"):
        Narrator(quiet=True, verbose=False, log_file=tmp_path / "nowhere/log.txt")
