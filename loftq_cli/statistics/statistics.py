"""What a file of activation statistics holds, whichever format it is in: second moments of the
inputs of a model's linear layers. One entry is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from loftq_cli.checkpoint.header import shown
from loftq_cli.errors import MissingStatisticsError, SourceChangedError, StatisticsError, listed
from loftq_cli.machine.durable import explained, file_sha256, utc

Kind = Literal["diagonal", "full"]
DIAGONAL: Kind = "diagonal"
FULL: Kind = "full"

_ROWS = 128  # compared at once, in the cache
_ASYMMETRY = 1e-4  # of the largest value: what float32 products of a few million tokens may show


@dataclass(frozen=True)
class Entry:
    """One distinct input: ``tokens`` that were measured, and ``read``, which returns its moments,
    float32 (in_features,) or (in_features, in_features), unchecked."""

    kind: Kind
    in_features: int
    tokens: int
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class MeasuredModel:
    """The model that was measured: ``id`` as it was typed, ``sha256`` as
    ``loftq_cli.statistics.file.model_sha256`` computes it."""

    id: str
    sha256: str


@dataclass(frozen=True)
class Statistics:
    """An opened file. ``matrices``: names of weight tensors to names in ``entries``; ``model`` is
    None if the file does not say; ``text`` is what it says of the text, if anything;
    ``sensitivity`` of weight tensors, as docs/statistics.md defines it, empty if none was
    measured."""

    path: Path
    matrices: Mapping[str, str]
    entries: Mapping[str, Entry]
    model: MeasuredModel | None = None
    text: Mapping[str, Any] = field(default_factory=dict)
    sensitivity: Mapping[str, float] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Of the whole file. Raises EnvironmentFailure if it cannot be read."""
        return self._hashed[0]

    @cached_property
    def _hashed(self) -> tuple[str, str]:
        """(sha256, what the file looked like when it was computed)"""
        with explained(self.path):
            looks = _looks(self.path)
            return file_sha256(self.path), looks

    def check_unchanged(self) -> None:
        """Raise SourceChangedError if the file is not the one any more that ``sha256`` is of."""
        with explained(self.path):
            now = _looks(self.path)
        if now != self._hashed[1]:
            raise SourceChangedError(
                f"{self.path}: the statistics changed: {self._hashed[1]} at first, {now} now"
            )

    def entry(self, name: str) -> Entry:
        """The entry of the weight tensor ``name``. Raises MissingStatisticsError."""
        if name not in self.matrices:
            raise MissingStatisticsError(f"{self.path}: nothing for tensor {shown(name)}")
        return self.entries[self.matrices[name]]

    def kind(self, name: str) -> Kind:
        """What there is for ``name``: "diagonal" or "full". Raises MissingStatisticsError."""
        return self.entry(name).kind

    def tokens(self, name: str) -> int:
        """How many tokens were measured for ``name`` (of a legacy importance matrix, which does
        not say: how many chunks of them). Raises MissingStatisticsError."""
        return self.entry(name).tokens

    def require(self, widths: Mapping[str, int]) -> None:
        """Check that there is an entry for every matrix of ``widths``, which maps names of weight
        tensors to their in_features, and that it is that wide. Reads nothing.

        Raises MissingStatisticsError or StatisticsError, naming the matrices.
        """
        missing = [name for name in widths if name not in self.matrices]
        if missing:
            named = listed([shown(name) for name in missing])
            raise MissingStatisticsError(f"{self.path}: nothing for tensor {named}")
        for name, width in widths.items():
            measured = self.entry(name).in_features
            if measured != width:
                raise StatisticsError(
                    f"{self.path}: tensor {shown(name)} has {width} inputs, {measured} were "
                    "measured",
                    hint="calibrate with this model",
                )

    def moments(self, name: str, in_features: int | None = None) -> torch.Tensor:
        """The second moments of the inputs of the weight tensor ``name``, on the CPU.

        float32, (in,): E[x_j^2], or (in, in): E[x x^T], as :meth:`kind` says. Read and checked
        anew at every call. ``in_features``, if given, is what the matrix has.

        Raises MissingStatisticsError if there is no entry; StatisticsError for another width,
        values that are not finite, negative squares, an asymmetric matrix, or nothing but zeros;
        CorruptFileError and EnvironmentFailure if the file cannot be read.
        """
        entry = self.entry(name)
        if in_features is not None:
            self.require({name: in_features})
        values = entry.read()
        fault = fault_of(values)
        if fault:
            raise StatisticsError(f"{self.path}: entry {shown(self.matrices[name])} {fault}")
        return values


def _looks(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} bytes, mtime {utc(status.st_mtime_ns)}"


def fault_of(values: torch.Tensor) -> str | None:
    """What keeps ``values`` from being second moments."""
    low, high = (float(value) for value in values.aminmax())
    largest = max(-low, high)
    if not largest < float("inf"):  # NaN compares false
        return "holds NaN or Inf"
    if largest == 0:
        return "is all zeros: the layer's inputs were never anything else"
    diagonal = values if values.dim() == 1 else values.diagonal()
    if not diagonal.any():
        return "holds no squares: its diagonal is all zeros"
    if float(diagonal.min()) < 0:
        return f"holds a negative square, {float(diagonal.min()):.6g}"
    if values.dim() == 2:
        asymmetry = max(
            _largest(
                values[start : start + _ROWS, start:] - values[start:, start : start + _ROWS].T
            )
            for start in range(0, len(values), _ROWS)
        )
        if asymmetry > _ASYMMETRY * largest:
            return f"is not symmetric: two values differ by {asymmetry:.3g} of {largest:.3g}"
    return None


def _largest(values: torch.Tensor) -> float:
    low, high = values.aminmax()
    return max(-float(low), float(high))
