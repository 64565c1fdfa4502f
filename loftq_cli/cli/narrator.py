"""What a command says while it runs: progress and remarks, on stderr and in a log.

tqdm is imported where it is used, so that ``loftq --help`` stays quick.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.cli import console
from loftq_cli.cli.course import Course
from loftq_cli.errors import printable
from loftq_cli.machine.observer import Observer

if TYPE_CHECKING:
    from tqdm import tqdm

_PAUSE = 60.0  # seconds between two lines about one course


class Narrator(Observer):
    """The observer for a terminal: one progress bar over what there is to do, another over bytes
    that are downloaded, remarks as lines.

    Bars are shown if stderr is a terminal, and else a line a minute; ``quiet`` silences both, and
    remarks. A ``log_file`` gets the lines, the remarks and errors, whatever is shown.
    """

    def __init__(
        self,
        *,
        quiet: bool,
        verbose: bool,
        log_file: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._quiet = quiet
        self._verbose = verbose
        self._clock = clock
        self._bar: tqdm[Any] | None = None
        self._download: tqdm[Any] | None = None
        self._course: Course | None = None
        self._downloads: Course | None = None
        self._told = clock()
        console.log_to(log_file)

    def begin(self, total: int, doing: str = "converting", unit: str = "B") -> None:
        self._course = Course(doing, total, unit, self._clock)
        self._told = self._clock()
        self._bar = self._new_bar(total, doing, unit)

    def count(self, items: int, noun: str) -> None:
        if self._course is not None:
            self._course.items, self._course.noun = items, noun
            console.log(f"{self._course.doing}: {items} {noun}")
        if self._bar is not None:
            # What the total is of says nothing to anybody: the items do.
            self._bar.bar_format = "{desc}: {percentage:3.0f}%|{bar}| {unit}"
            self._describe()
            self._bar.refresh()

    def begin_download(self, total_bytes: int) -> None:
        if self._download is not None:
            self._download.close()
        self._download = self._new_bar(total_bytes, "downloading", "B") if total_bytes else None
        self._downloads = None
        if total_bytes:  # the client is loaded, and has a handler of its own
            self._downloads = Course("downloading", total_bytes, "B", self._clock)
            logging.getLogger("huggingface_hub").handlers = [_Remarks(self)]

    def working_on(self, name: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(printable(name), refresh=False)
            self._describe()
            self._bar.refresh()
        self._tell()

    def advance(self, amount: int) -> None:
        if self._course is not None:
            self._course.amount += amount
        if self._bar is not None:
            self._describe()
            self._bar.update(amount)
        self._tell()

    def skip(self, amount: int) -> None:
        if self._course is not None:
            self._course.skipped += amount
        self.advance(amount)

    def finished(self, told: str = "") -> None:
        if self._course is not None:
            self._course.finished += 1
            self._course.told = told

    def downloaded(self, nbytes: int) -> None:
        if self._downloads is not None:
            self._downloads.amount += nbytes
        if self._download is not None:
            self._download.update(nbytes)
        self._tell()

    def note(self, text: str) -> None:
        if self._quiet:
            console.log(text)
        else:
            self._line(text)

    def detail(self, text: str) -> None:
        if self._verbose:
            self._line(text)

    def end(self) -> None:
        for bar in (self._download, self._bar):
            if bar is not None:
                bar.close()
        self._bar = self._download = self._course = self._downloads = None

    def _describe(self) -> None:
        """Put beside a bar of items how it stands."""
        if self._bar is not None and self._course is not None and self._course.items:
            name = self._bar.postfix
            self._bar.unit = self._course.status() + (f", {name}" if name else "")

    def _tell(self) -> None:
        """A line, if the last one is a minute ago."""
        now = self._clock()
        if now - self._told < _PAUSE:
            return
        self._told = now
        for course in (self._downloads, self._course):
            if course is not None:
                text = f"{course.doing}: {course.status()}"
                if self._quiet or sys.stderr.isatty():
                    console.log(text)
                else:
                    console.complain(text)

    def _new_bar(self, total: int, doing: str, unit: str) -> tqdm[Any] | None:
        if self._quiet or not sys.stderr.isatty():
            return None
        from tqdm import tqdm

        return tqdm(
            total=total,
            unit=unit,
            unit_scale=unit == "B",
            desc=doing,
            file=sys.stderr,
            dynamic_ncols=True,
            smoothing=0.1,
        )

    def _line(self, text: str) -> None:
        for bar in (self._download, self._bar):
            if bar is not None:
                bar.clear()
        console.complain(text)


class _Remarks(logging.Handler):
    """What the hub's client warns of, such as a connection that broke, as remarks like ours."""

    def __init__(self, narrator: Narrator) -> None:
        super().__init__()
        self._narrator = narrator

    def emit(self, record: logging.LogRecord) -> None:
        self._narrator.note(" ".join(record.getMessage().split()))
