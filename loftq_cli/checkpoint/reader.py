"""Reading tensors with pread, one at a time or in pieces, hashing a shard as it is read."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch

from loftq_cli.checkpoint.dtypes import torch_dtype
from loftq_cli.checkpoint.encoded import EncodedTensor, Part, length_in_file
from loftq_cli.checkpoint.header import StoredTensor, TensorSpec
from loftq_cli.checkpoint.source import Shard
from loftq_cli.errors import CorruptFileError, EnvironmentFailure, SourceChangedError
from loftq_cli.machine.durable import utc

PIECE = 16 << 20
"""Bytes read at a time if a tensor is only copied or hashed."""

_HINT = "check that the file is still there, may be read, and that its disk is well"

_File = TypeVar("_File", bound="TensorFile")


class TensorFile:
    """An open safetensors file. Never maps it: a file that shrinks raises instead of killing.
    ``mtime_ns`` is what it was when it was opened.

    Raises EnvironmentFailure if the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise EnvironmentFailure(f"{path}: {error.strerror or error}", hint=_HINT) from error
        self.mtime_ns = os.fstat(self._file).st_mtime_ns

    def __enter__(self: _File) -> _File:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._file)

    def check_unchanged(self) -> None:
        """Raise SourceChangedError if the file was written to since it was opened."""
        now = os.fstat(self._file).st_mtime_ns
        if now != self.mtime_ns:
            raise SourceChangedError(
                f"{self.path}: changed while it was read: mtime {utc(self.mtime_ns)} then, "
                f"{utc(now)} now"
            )

    def read_range(self, start: int, length: int) -> bytearray:
        """Exactly ``length`` bytes from ``start``. Raises CorruptFileError if the file ends
        early and EnvironmentFailure on an I/O error."""
        buffer = bytearray(length)
        view = memoryview(buffer)
        done = 0
        while done < length:
            try:
                got = os.preadv(self._file, [view[done:]], start + done)
            except OSError as error:
                raise EnvironmentFailure(
                    f"{self.path}: {error.strerror or error}", hint=_HINT
                ) from error
            if got == 0:
                raise CorruptFileError(
                    f"{self.path} ends at byte {start + done}, it was shortened while being read"
                )
            done += got
        return buffer

    def pieces(self, tensor: StoredTensor) -> Iterator[bytearray]:
        """The bytes of ``tensor``, in order, PIECE at a time."""
        if isinstance(tensor, EncodedTensor):
            yield from map(bytearray, pieces_of(self.read(tensor)))
            return
        for offset in range(0, tensor.nbytes, PIECE):
            yield self.read_range(tensor.start + offset, min(PIECE, tensor.nbytes - offset))

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """The whole tensor, on the CPU, in its own dtype; decoded, if it is held in codes."""
        if isinstance(tensor, EncodedTensor):
            return self._decoded(tensor)
        return as_tensor(tensor, self.read_range(tensor.start, tensor.nbytes))

    def _decoded(self, tensor: EncodedTensor) -> torch.Tensor:
        codes = self.read(tensor.main.tensor)
        others = {key: self._other(part) for key, part in tensor.others.items()}
        try:
            return tensor.decode(codes, others)
        except CorruptFileError as error:
            raise CorruptFileError(f"{self.path}: {error.message}", hint=error.hint) from error

    def _other(self, part: Part) -> torch.Tensor:
        """A part beside the codes, which may be in another file."""
        return read_tensor(part.path, part.tensor)


def read_tensor(path: Path, tensor: StoredTensor) -> torch.Tensor:
    """One tensor of the file ``path``, as :meth:`TensorFile.read` gives it. Raises
    EnvironmentFailure if the file cannot be opened."""
    with TensorFile(path) as file:
        return file.read(tensor)


class ShardReader(TensorFile):
    """A source shard, read in file order so that its sha256 comes for free."""

    def __init__(self, shard: Shard) -> None:
        super().__init__(shard.path)
        self._position = shard.header.data_start
        self._size = shard.header.size
        self._start = 0  # of the tensor read last
        try:
            self._digest = hashlib.sha256(self.read_range(0, shard.header.data_start))
            if self._digest.hexdigest() != shard.header.sha256:
                raise SourceChangedError(f"{shard.path}: the header changed since it was checked")
        except BaseException:
            os.close(self._file)
            raise

    def pieces(self, tensor: StoredTensor) -> Iterator[bytearray]:
        if isinstance(tensor, EncodedTensor):
            yield from map(bytearray, pieces_of(self.read(tensor)))
            return
        self._go_to(tensor)
        position = tensor.start
        for piece in super().pieces(tensor):
            self._hash(piece, position)
            position += len(piece)
            yield piece

    def pass_over(self, tensor: StoredTensor) -> None:
        """Hash the bytes of ``tensor``, and nothing else."""
        self._go_to(tensor)
        self._skip_to(tensor.start + length_in_file(tensor))

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        if isinstance(tensor, EncodedTensor):
            return self._decoded(tensor)
        self._go_to(tensor)
        buffer = self.read_range(tensor.start, tensor.nbytes)
        self._hash(buffer, tensor.start)
        return as_tensor(tensor, buffer)

    def _go_to(self, tensor: StoredTensor) -> None:
        assert tensor.start >= self._start, "a shard is read in file order"
        self._start = tensor.start
        self._skip_to(tensor.start)

    def finish(self) -> None:
        """Hash what lies behind the last tensor: nothing, but in a pickled file."""
        self._skip_to(self._size)

    def _skip_to(self, position: int) -> None:
        """Hash what lies between tensors: nothing, but in a pickled file."""
        while self._position < position:
            length = min(PIECE, position - self._position)
            self._hash(self.read_range(self._position, length), self._position)

    def _hash(self, piece: bytearray, start: int) -> None:
        """Hash ``piece``, which begins at ``start``, but for what was hashed before: in a pickled
        file tensors may lie over each other."""
        new = memoryview(piece)[self._position - start :]
        self._digest.update(new)
        self._position += len(new)

    @property
    def sha256(self) -> str:
        """Of all bytes up to the end of the last tensor that was read."""
        return self._digest.hexdigest()


def pieces_of(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of ``tensor``, in order, as they are stored."""
    host = tensor.detach().cpu().contiguous()
    # Through ctypes, not numpy: torch does not need numpy, and neither do we.
    view = memoryview((ctypes.c_ubyte * host.nbytes).from_address(host.data_ptr()))
    for start in range(0, host.nbytes, PIECE):
        yield view[start : start + PIECE]


def as_tensor(spec: TensorSpec, buffer: bytearray) -> torch.Tensor:
    """A tensor over ``buffer``, without a copy."""
    dtype = torch_dtype(spec.dtype)
    if not buffer:
        return torch.empty(spec.shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).view(spec.shape)
