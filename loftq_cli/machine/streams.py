"""The standard streams, whatever the process was started with.

A stream that is closed is like a reader that has gone, and what an encoding cannot show is escaped.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import TextIO

_held: list[TextIO] = []


def prepare() -> None:
    """Make stdin, stdout and stderr usable. To be called before anything is printed or opened: the
    next file would get the number of a closed stream, and with it whatever a library prints."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def answering() -> Iterator[None]:
    """Keep stdout for what a command answers: what libraries print goes to stderr."""
    _held.append(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _held.pop()


def answers() -> TextIO:
    """The stream that a command's answers go to."""
    return _held[-1] if _held else sys.stdout


def drop(stream: TextIO) -> None:
    """Send what ``stream`` still holds, and what is still to come, nowhere: the interpreter would
    try again at its exit, and fail."""
    with suppress(OSError, ValueError):  # a stream that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def showable(text: str, stream: TextIO) -> str:
    """``text`` with what the encoding of ``stream`` cannot show escaped."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
