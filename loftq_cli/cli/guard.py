"""What all commands share: errors become one line and an exit code, signals become errors."""

from __future__ import annotations

import errno
import functools
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from loftq_cli.cli import console
from loftq_cli.errors import EnvironmentFailure, InterruptedConversion, LoftqError, UsageError
from loftq_cli.machine import streams
from loftq_cli.machine.paths import expanded

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Commands(click.Group):
    """The group of all commands, for whatever streams there are."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """As click's, but that the exit code is right if what click says cannot be written."""
        streams.prepare()
        standalone = kwargs.get("standalone_mode", True)
        try:
            result = super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.ClickException as error:
            if not standalone:
                raise
            try:
                error.show()
            except OSError:
                streams.drop(sys.stderr)
            sys.exit(error.exit_code)
        except click.Abort:
            _fail(_interruption(signal.SIGINT), verbose=False)
        except OSError as error:  # of --help and --version
            _fail(_unwritten(error), verbose=False)
        if standalone:
            sys.exit(result)
        return result


class ExpandedPath(click.Path):
    """A path on the command line, as :func:`loftq_cli.machine.paths.expanded` reads it."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(expanded(value), param, ctx)
        except UsageError as error:
            self.fail(str(error), param, ctx)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``-v`` and map what it raises to one line and an exit code."""

    @click.option("-v", "--verbose", is_flag=True, help="Say more; show tracebacks.")
    @functools.wraps(command)
    def guarded(*args: Any, verbose: bool, **kwargs: Any) -> None:
        # torch says this if numpy is not installed; nothing here needs it.
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
        try:
            _import_torch()
            signal.signal(signal.SIGTERM, _on_sigterm)
            with streams.answering():
                command(*args, verbose=verbose, **kwargs)
            sys.stdout.flush()
        except Terminated:
            _fail(_interruption(signal.SIGTERM), verbose)
        except KeyboardInterrupt:
            _fail(_interruption(signal.SIGINT), verbose)
        except LoftqError as error:
            _fail(error, verbose)
        except BrokenPipeError:
            streams.drop(sys.stdout)  # the reader has gone; nothing is left to say
            sys.exit(0)
        except click.ClickException:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                _fail(_unwritten(error), verbose)
            if isinstance(error, MemoryError):
                _fail(EnvironmentFailure("out of memory", hint="free memory"), verbose)
            if verbose:
                traceback.print_exc()
            console.complain(f"internal error: {type(error).__name__}: {error}")
            console.complain("this is a bug in loftq; -v shows where it happened")
            sys.exit(1)

    return guarded


def _import_torch() -> None:
    """What every command needs first. A signal ends the process on the spot: nothing has begun,
    and torch, interrupted in its import, swallows what is raised in it or remains half imported."""

    def end(number: int, frame: FrameType | None) -> None:
        console.complain(f"error: {_interruption(signal.Signals(number))}")
        sys.stderr.flush()
        os._exit(128 + number)

    watched = [
        (number, before)
        for number in (signal.SIGINT, signal.SIGTERM)
        if (before := signal.getsignal(number)) not in (signal.SIG_IGN, None)
    ]
    # What torch's C++ says when another process is gone: pages, for what we say in a line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        for number, _ in watched:
            signal.signal(number, end)
        import torch  # noqa: F401
    finally:
        for number, before in watched:
            signal.signal(number, before)


def _unwritten(error: OSError) -> EnvironmentFailure:
    """What to raise for an ``error`` of writing a file or, if it names none, to stdout."""
    streams.drop(sys.stdout)
    return EnvironmentFailure(f"{error.filename or 'standard output'}: {error.strerror}")


def _fail(error: LoftqError, verbose: bool) -> NoReturn:
    if verbose:
        traceback.print_exc()
    console.complain(f"error: {error}")
    sys.exit(error.exit_code)


def _interruption(number: signal.Signals) -> InterruptedConversion:
    context = click.get_current_context(silent=True)
    resumes = context is not None and context.info_name in (
        "convert",
        "refine",
        "adapt",
        "export",
        "push",
    )
    hint = None if resumes else "nothing was written"
    message = f"interrupted by {number.name}"
    return InterruptedConversion(message, signal_number=number, hint=hint)


class Terminated(KeyboardInterrupt):
    """SIGTERM. Like Ctrl-C it is no Exception: nothing on its way that handles errors stops it."""


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    raise Terminated
