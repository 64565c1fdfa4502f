"""A backbone that exists: its files, its matrices, and what each of them means."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loftq_cli.checkpoint.decoding.find import decoded
from loftq_cli.checkpoint.dtypes import BITS
from loftq_cli.checkpoint.encoded import EncodedTensor
from loftq_cli.checkpoint.header import TensorSpec
from loftq_cli.checkpoint.locate import opened
from loftq_cli.checkpoint.output import MANIFEST, open_output
from loftq_cli.checkpoint.quantized import refuse_quantized
from loftq_cli.checkpoint.request import Request
from loftq_cli.checkpoint.source import Source
from loftq_cli.checkpoint.stored import Stored, read
from loftq_cli.errors import SourceChangedError, VerificationError
from loftq_cli.families.classes import auto_class
from loftq_cli.layouts import registry
from loftq_cli.layouts.base import Held, Layout, Matrix, matrix_of
from loftq_cli.layouts.given import DENSE
from loftq_cli.machine.durable import explained, file_sha256

METHOD = "given"
"""What the manifest has for a method that nobody here chose."""


@dataclass(frozen=True)
class File:
    """A file of the backbone, when it was as old as this."""

    name: str
    size: int
    sha256: str
    path: Path = field(compare=False)
    mtime_ns: int = field(compare=False)


@dataclass(frozen=True)
class Given:
    """``id``: what it was called; ``raw``: its files, with the tensors as they are stored;
    ``meaning``: with the matrices that they mean in the place of codes; ``files``: the weights,
    config.json and the index. ``layout`` and ``recipe`` are those of a conversion of ours, whose
    entries ``records`` are by name; else layout ``given``. ``kept``: the files are to be in the
    output."""

    id: str
    raw: Source
    meaning: Source
    files: tuple[File, ...]
    layout: Layout
    recipe: Mapping[str, Any]
    records: Mapping[str, Mapping[str, Any]]
    kept: bool

    @property
    def is_dense(self) -> bool:
        """Whether it holds values alone, no codes."""
        return not self.records and not self.meaning.encoded

    @property
    def address(self) -> str:
        """What an adapter's config calls it: the hub id, or the path."""
        return str(self.raw.directory.resolve()) if self.raw.revision is None else self.raw.id

    @property
    def stored(self) -> Stored:
        """Where its tensors lie."""
        return self.raw.stored

    @property
    def nbytes(self) -> int:
        """Of all its tensors."""
        return sum(tensor.nbytes for tensor in self.raw.tensors)

    @property
    def tensors(self) -> list[TensorSpec]:
        """What its tensors mean: matrices in the place of their codes."""
        matrices = [matrix_of(record) for record in self.records.values()]
        parts = {spec.name for matrix in matrices for spec in self.layout.specs(matrix)}
        held = [TensorSpec(each.name, each.dtype, each.stored_shape) for each in matrices]
        return [*held, *(each for each in self.meaning.tensors if each.name not in parts)]

    @property
    def disk_bytes(self) -> int:
        """Bytes that its files may take in the output."""
        return sum(file.size for file in self.files) if self.kept else 0

    def is_quantized(self, tensor: TensorSpec) -> bool:
        """Whether one of ``tensors`` is held in codes."""
        return tensor.name in self.records or isinstance(tensor, EncodedTensor)

    def matrix(self, wanted: Matrix, tensor: TensorSpec) -> Matrix:
        """The matrix ``wanted`` as one of ``tensors`` holds it."""
        if tensor.name in self.records:
            return matrix_of(self.records[tensor.name])
        if not isinstance(tensor, EncodedTensor):
            spec = TensorSpec(tensor.name, tensor.dtype, tensor.shape)
            return _with(wanted, BITS[tensor.dtype], Held(DENSE, tensor.dtype, (spec,), {}))
        known = self.stored
        specs = tuple(
            TensorSpec(name, known[name][1].dtype, known[name][1].shape) for name in tensor.names
        )
        bits = round(tensor.main.tensor.nbytes * 8 / tensor.elements)
        form = next(iter(self.meaning.encoded))
        return _with(wanted, bits, Held(form, tensor.dtype, specs, tensor.stated))

    def reader(self) -> Callable[[Matrix], torch.Tensor]:
        """Reads Q of a matrix, float32 (out, in). Raises CorruptFileError for values that make no
        sense."""
        stored, directory = self.stored, self.raw.directory

        def one(matrix: Matrix) -> torch.Tensor:
            tensors = {s.name: read(directory, stored, s) for s in self.layout.specs(matrix)}
            return self.layout.decode(matrix, tensors)

        return one

    def check_unchanged(self) -> None:
        """Raise SourceChangedError if a file was written to since it was hashed."""
        for file in self.files:
            with explained(file.path):
                now = file.path.stat()
            if (now.st_size, now.st_mtime_ns) != (file.size, file.mtime_ns):
                raise SourceChangedError(
                    f"{file.path}: the backbone changed while it was read",
                    hint="run the same command again",
                )

    def described(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "id": self.id,
            "revision": self.raw.revision,
            "class": auto_class(self.raw.config.content),
            "formats": list(self.meaning.encoded),
            "files": [
                {"name": file.name, "size": file.size, "sha256": file.sha256} for file in self.files
            ],
        }


def _with(matrix: Matrix, bits: int, held: Held) -> Matrix:
    return Matrix(
        matrix.name,
        matrix.shape,
        matrix.dtype,
        METHOD,
        bits,
        0,
        matrix.kind,
        matrix.in_memory,
        held=held,
    )


def open_given(request: Request, say: Callable[[str], None], *, kept: bool) -> Given:
    """The backbone that ``request`` names, every file of it on disk and hashed. Raises what
    :func:`~loftq_cli.checkpoint.locate.locate` does, and VerificationError if a conversion of ours
    was altered."""
    raw = opened(request, say, ours=True)
    for shard in raw.shards:
        raw.supply.ensure(shard.name)
    files = tuple(_files(raw))
    if os.path.exists(raw.directory / MANIFEST):
        output = open_output(raw.directory)
        stated = {entry["name"]: entry["sha256"] for entry in output.manifest["outputs"]}
        for file in files:
            if stated.get(file.name) != file.sha256:
                raise VerificationError(f"{file.path}: not the file that was converted")
        recipe = output.manifest["recipe"]
        layout = registry.layout_of(output.records[0], recipe)
        records = {record["name"]: record for record in output.records}
        return Given(request.model, raw, raw, files, layout, recipe, records, kept)
    meaning = decoded(raw)
    refuse_quantized(meaning)
    layout = registry.make_layout(registry.GIVEN, {})
    return Given(request.model, raw, meaning, files, layout, {}, {}, kept)


def _files(raw: Source) -> list[File]:
    small = [raw.config, *([raw.index] if raw.index else [])]
    paths = {shard.name: shard.path for shard in raw.shards}
    paths |= {each.name: raw.directory / each.name for each in small}
    found = []
    for name, path in paths.items():
        with explained(path):
            state = path.stat()
            digest = raw.supply.sha256(name) or file_sha256(path)
        found.append(File(name, state.st_size, digest, path, state.st_mtime_ns))
    return found
