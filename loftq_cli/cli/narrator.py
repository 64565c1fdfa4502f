"""What a command says while it runs: progress bars and remarks, on stderr.

tqdm is imported where it is used, so that ``loftq --help`` stays quick.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

from loftq_cli.cli.console import complain
from loftq_cli.errors import printable
from loftq_cli.machine.observer import Observer

if TYPE_CHECKING:
    from tqdm import tqdm


class Narrator(Observer):
    """The observer for a terminal: one progress bar over what there is to do, another over bytes
    that are downloaded, remarks as lines.

    Bars are shown only if stderr is a terminal; ``quiet`` silences remarks as well.
    """

    def __init__(self, *, quiet: bool, verbose: bool) -> None:
        self._quiet = quiet
        self._verbose = verbose
        self._bar: tqdm[Any] | None = None
        self._download: tqdm[Any] | None = None

    def begin(self, total: int, doing: str = "converting", unit: str = "B") -> None:
        self._bar = self._new_bar(total, doing, unit)

    def begin_download(self, total_bytes: int) -> None:
        if self._download is not None:
            self._download.close()
        self._download = self._new_bar(total_bytes, "downloading", "B") if total_bytes else None
        if total_bytes:  # the client is loaded, and has a handler of its own
            logging.getLogger("huggingface_hub").handlers = [_Remarks(self)]

    def working_on(self, name: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(printable(name), refresh=True)

    def advance(self, amount: int) -> None:
        if self._bar is not None:
            self._bar.update(amount)

    def downloaded(self, nbytes: int) -> None:
        if self._download is not None:
            self._download.update(nbytes)

    def note(self, text: str) -> None:
        if not self._quiet:
            self._line(text)

    def detail(self, text: str) -> None:
        if self._verbose:
            self._line(text)

    def end(self) -> None:
        for bar in (self._download, self._bar):
            if bar is not None:
                bar.close()
        self._bar = self._download = None

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
        complain(text)


class _Remarks(logging.Handler):
    """What the hub's client warns of, such as a connection that broke, as remarks like ours."""

    def __init__(self, narrator: Narrator) -> None:
        super().__init__()
        self._narrator = narrator

    def emit(self, record: logging.LogRecord) -> None:
        self._narrator.note(" ".join(record.getMessage().split()))
