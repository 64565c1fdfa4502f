"""The exception tree: one class per way to fail, each with its exit code and a hint.

Every message names the file and the tensor if there is one, and the hint says what to do.
Exit codes: 2 usage, 3 bad input, 4 output conflict, 5 environment, 130/143 interrupted; a
Python exception that is none of these is a bug of ours and exits with 1.
"""

from __future__ import annotations

from collections.abc import Sequence


class LoftqError(Exception):
    """Base of every error that this package raises on purpose.

    ``message`` says what is wrong, ``hint`` what to do about it.
    """

    exit_code = 1
    default_hint = ""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(printable(message))
        self.message = printable(message)
        self.hint = self.default_hint if hint is None else printable(hint)

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(LoftqError):
    """A setting is out of range, contradicts another one, or cannot be met by the layout."""

    exit_code = 2
    default_hint = "see `loftq COMMAND --help`"


class PatternError(UsageError):
    """An ``--include`` or ``--exclude`` pattern matches no tensor."""

    default_hint = "patterns are globs over tensor names; --dry-run lists the names"


class LayoutError(UsageError):
    """The layout that was asked for cannot hold a selected matrix."""

    default_hint = "use --layout loftq, which holds everything, or --layout auto"


class InputError(LoftqError):
    """The input is missing, broken, hostile, or not what it says it is."""

    exit_code = 3


class SourceNotFoundError(InputError):
    """There is no such path, or no weights in it."""

    default_hint = "give a directory with model.safetensors (or its index), or a hub id"


class CorruptFileError(InputError):
    """A file disagrees with its own format; the message lists every fault that was found."""

    default_hint = "download or save the file again"


class UnsupportedInputError(InputError):
    """The checkpoint is readable, but of a kind that cannot be converted."""


class NonFiniteWeightError(InputError):
    """A selected matrix holds NaN or Inf."""

    default_hint = "the checkpoint is damaged; repair it, or pass the tensor through with --exclude"


class NonFiniteActivationError(InputError):
    """The inputs of a layer hold NaN or Inf."""

    default_hint = "the model overflows or is damaged; float32 weights and other text may help"


class StatisticsError(InputError):
    """Activation statistics are damaged, or are not those of a layer's inputs."""

    default_hint = "calibrate again"


class MissingStatisticsError(StatisticsError):
    """There are no activation statistics for a matrix."""

    default_hint = "calibrate with this model"


class SourceChangedError(InputError):
    """The source is not what it was when the conversion began."""

    default_hint = "restore the source, or start again with --overwrite"


class VerificationError(InputError):
    """An output directory does not match its own manifest."""

    default_hint = "convert again with --overwrite"


class OutputConflictError(LoftqError):
    """The output directory, or an unfinished conversion beside it, is of something else."""

    exit_code = 4
    default_hint = "choose another --output, or replace it with --overwrite"


class EnvironmentFailure(LoftqError):
    """Disk, memory, device, network, hub access or a missing extra."""

    exit_code = 5


class InterruptedConversion(LoftqError):
    """A signal stopped the conversion; what is finished was kept."""

    default_hint = "run the same command again to resume"

    def __init__(self, message: str, *, signal_number: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = 128 + signal_number


class DownloadAbandoned(LoftqError):
    """Ends a download that nobody waits for any more; not for a user to see."""


class ScaleRangeError(LoftqError):
    """A fitted scale does not fit float16.

    Raised by the ``gptq`` layout's encoder. Under ``--layout auto`` the conversion catches it and
    continues with layout ``loftq``; with ``--layout gptq`` it is a usage error.
    """

    exit_code = 2
    default_hint = "use --layout loftq, which stores scales in float32"


def listed(names: Sequence[str], most: int = 3) -> str:
    """``names`` for a message, of more than ``most`` the first ones: "a, b, c and 4 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def printable(text: str) -> str:
    """``text`` with control characters and lone surrogates escaped, so that names taken from
    files cannot drive a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
