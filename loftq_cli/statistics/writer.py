"""Writing activation statistics, entry by entry, in the format of :mod:`statistics`.

Which matrices share an input is known only when it has been measured, so the header is written
last, into room that was left for the largest that it can become.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch

from loftq_cli.checkpoint.header import TensorSpec
from loftq_cli.checkpoint.reader import pieces_of
from loftq_cli.checkpoint.writer import TensorWriter, place
from loftq_cli.errors import EnvironmentFailure, InputError, OutputConflictError
from loftq_cli.machine.durable import explained, make_directory, sync_directory, write_all
from loftq_cli.statistics.file import FORMAT, PARTS, SENSITIVITY, compact_json, open_statistics
from loftq_cli.statistics.statistics import DIAGONAL, FULL, MeasuredModel
from loftq_cli.statistics.triangle import DIRECTIONS, pack

_LARGEST = 1 << 62
_PACKED_FROM = 1024  # inputs: full moments of fewer are less than 4 MiB, and stay whole


class StatisticsWriter:
    """A file of statistics in the making, beside ``path`` until :meth:`publish` renames it.

    ``matrices`` are the names of all weight tensors that may be added; ``model``, ``text``
    (anything JSON) and ``sensitivity`` (of weight tensors) are recorded. ``overwrite``
    replaces an earlier file of statistics, and nothing else. A context manager: what was not
    published is removed.

    Raises OutputConflictError if ``path`` is taken, EnvironmentFailure from the disk.
    """

    def __init__(
        self,
        path: Path,
        matrices: Iterable[str],
        *,
        model: MeasuredModel | None = None,
        text: object = None,
        sensitivity: Mapping[str, float] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = path
        self._overwrite = overwrite
        self._fixed = {"format": FORMAT, "format_version": "1"}
        if model is not None:
            self._fixed["model"] = compact_json({"id": model.id, "sha256": model.sha256})
        if text is not None:
            self._fixed["text"] = compact_json(text)
        if sensitivity:
            self._fixed[SENSITIVITY] = compact_json(dict(sensitivity))
        self._specs: list[TensorSpec] = []
        self._matrices: dict[str, str] = {}
        self._tokens: dict[str, int] = {}
        self._room = self._largest_header(list(matrices))
        self._position = self._room
        refuse_taken(path, overwrite)
        self._partial = path.with_name(f".{path.name}.loftq-partial")
        self._published = False
        with explained(self._partial):
            make_directory(path.parent)
            self._file = os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if not self._locked():
                    raise OutputConflictError(
                        f"{path}: another process is writing it",
                        hint="wait for it, or choose another --output",
                    )
                os.ftruncate(self._file, 0)  # what a crash left
            except BaseException:
                os.close(self._file)
                raise

    def _locked(self) -> bool:
        """Whether the partial file is now ours, and was not published by another process between
        our opening and locking it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.fstat(self._file).st_ino == self._partial.stat().st_ino
        except (BlockingIOError, FileNotFoundError):
            return False

    def __enter__(self) -> StatisticsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if not self._published:
                with explained(self._partial):
                    self._partial.unlink(missing_ok=True)
        finally:
            os.close(self._file)

    def add(self, matrices: Sequence[str], moments: torch.Tensor, tokens: int) -> None:
        """Append an entry: ``moments``, float32 (in,) or (in, in) over ``tokens`` tokens, of the
        inputs that the layers of all ``matrices`` share."""
        entry = matrices[0].removesuffix(".weight")
        if moments.dim() == 2 and len(moments) >= _PACKED_FROM:
            self._fixed["format_version"] = "2"
            packed = pack(moments)
            for part, (dtype, _) in PARTS.items():
                self._append(f"{entry}.{part}", dtype, getattr(packed, part))
        else:
            self._append(f"{entry}.{DIAGONAL if moments.dim() == 1 else FULL}", "F32", moments)
        self._tokens[entry] = tokens
        self._matrices.update(dict.fromkeys(matrices, entry))

    def _append(self, name: str, dtype: str, values: torch.Tensor) -> None:
        spec = TensorSpec(name, dtype, tuple(values.shape))
        writer = TensorWriter(self._partial, self._file, self._position)
        for piece in pieces_of(values):
            writer.append(piece)
        self._specs.append(spec)
        self._position += spec.nbytes

    def publish(self) -> int:
        """Complete the file, make it durable and give it its name; its size in bytes."""
        metadata = self._metadata(self._matrices, self._tokens)
        header, _ = place(self._specs, metadata, self._room, as_given=True)
        assert len(header) == self._room
        with explained(self._partial):
            write_all(self._file, header, 0)
            os.fsync(self._file)
        refuse_taken(self.path, self._overwrite)
        with explained(self.path):
            os.replace(self._partial, self.path)
            self._published = True
            sync_directory(self.path.parent)
        return self._position

    def _metadata(self, matrices: Mapping[str, str], tokens: Mapping[str, int]) -> dict[str, str]:
        maps = {"matrices": compact_json(matrices), "tokens": compact_json(tokens)}
        return dict(sorted({**self._fixed, **maps}.items()))

    def _largest_header(self, names: list[str]) -> int:
        """Bytes of the longest header: an entry for every matrix, under the longest name."""
        longest = max(names, key=lambda name: len(compact_json(name)))
        specs = [
            TensorSpec(f"{name}.{part}", dtype, (DIRECTIONS, _LARGEST)[-sides:])
            for name in names
            for part, (dtype, sides) in PARTS.items()
        ]
        tokens = dict.fromkeys(names, _LARGEST)
        return len(place(specs, self._metadata(dict.fromkeys(names, longest), tokens))[0])


def entry_bytes(width: int, full: bool) -> int:
    """About what an entry of so many inputs takes in a file."""
    if not full:
        return 4 * width
    return width**2 + 4 * (DIRECTIONS + 1) * width if width >= _PACKED_FROM else 4 * width**2


def refuse_taken(path: Path, overwrite: bool) -> None:
    """Raise OutputConflictError if ``path`` exists and may not be replaced."""
    if not os.path.lexists(path):
        return
    try:
        open_statistics(path)
        ours = not path.is_symlink()
    except InputError:
        ours = False
    except EnvironmentFailure as error:
        if isinstance(error.__cause__, OSError):
            raise  # it could not be read, whatever it is
        ours = False
    if not ours:
        raise OutputConflictError(
            f"{path} exists and is not a file of statistics",
            hint="choose another --output; --overwrite replaces only loftq's own outputs",
        )
    if not overwrite:
        raise OutputConflictError(f"{path} exists")
