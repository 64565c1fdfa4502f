"""What a terminal shows while a model is downloaded and converted."""

from __future__ import annotations

import logging
import re
import sys
from io import StringIO

import pytest

from loftq_cli.cli.narrator import Narrator


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
