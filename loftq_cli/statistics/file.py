"""Activation statistics: second moments of the inputs of a model's linear layers, read from a file.

Our own format is a safetensors file with one tensor for every distinct input, or three if its
moments are packed (:mod:`triangle`), described in docs/statistics.md; llama.cpp's importance
matrices are read as well (:mod:`imatrix`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from loftq_cli.checkpoint.header import (
    Header,
    HeaderError,
    StoredTensor,
    read_header,
    shown,
    strict_json,
)
from loftq_cli.checkpoint.reader import TensorFile, read_tensor
from loftq_cli.checkpoint.source import Source, file_hashes
from loftq_cli.errors import (
    CorruptFileError,
    EnvironmentFailure,
    SourceNotFoundError,
    StatisticsError,
    UnsupportedInputError,
)
from loftq_cli.statistics import imatrix
from loftq_cli.statistics.statistics import DIAGONAL, FULL, Entry, MeasuredModel, Statistics
from loftq_cli.statistics.triangle import Triangle, length, unpack

FORMAT = "loftq-statistics"
FORMAT_VERSIONS = ("1", "2")
"""Whole entries alone, and packed ones as well."""

SENSITIVITY = "sensitivity"
"""The key of the metadata that has those of matrices."""

PARTS = {"diagonal": ("F32", 1), "directions": ("F32", 2), "correlations": ("I16", 1)}
"""Tensors of a packed entry, ``ENTRY.`` before each: dtype and sides."""


def open_statistics(path: str | os.PathLike[str], source: Source | None = None) -> Statistics:
    """Open a file of activation statistics: ours, or an importance matrix of llama.cpp.

    ``source`` is the checkpoint that they are for; without it an importance matrix cannot be read,
    because its names are those of another format. Reads the header only.

    Raises SourceNotFoundError if there is no such file, CorruptFileError if it is broken,
    UnsupportedInputError if it is something else or of a newer version, StatisticsError if
    it is not well-formed, EnvironmentFailure if the extra [gguf] is needed and not installed.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise SourceNotFoundError(f"{path}: no such file", hint="`loftq calibrate` writes one")
    if not os.path.isfile(path):
        raise UnsupportedInputError(f"{path}: not a file of activation statistics")
    with TensorFile(path) as file:
        start = bytes(file.read_range(0, min(8, os.path.getsize(path))))
    if imatrix.is_gguf(start):
        return imatrix.open_gguf(path, source)
    try:
        header = read_header(path)
    except HeaderError as error:
        if imatrix.is_legacy(start):
            return imatrix.open_legacy(path, source)
        raise CorruptFileError(f"{path}: {error}", hint="calibrate again") from error
    except OSError as error:
        raise EnvironmentFailure(f"{path}: {error.strerror or error}") from error
    return _parse(path, header)


def model_sha256(source: Source) -> str:
    """What identifies a model: the sha256 of the compact JSON of the sorted [name, size, hash] of
    its weight files (hash of the header), config.json and index (of the whole file). Two models of
    one shape whose values differ have the same one."""
    text = json.dumps(sorted(file_hashes(source)), separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def statistics_for(source: Source, path: str) -> Statistics:
    """The file at ``path``, opened for ``source``. Raises StatisticsError if it says that it is
    of another model, and what :func:`open_statistics` raises."""
    statistics = open_statistics(path, source)
    if statistics.model is not None and statistics.model.sha256 != model_sha256(source):
        raise StatisticsError(
            f"{path}: the statistics are of {statistics.model.id}, not of {source.id}",
            hint="calibrate with this model",
        )
    return statistics


def _parse(path: Path, header: Header) -> Statistics:
    metadata = header.metadata
    if metadata.get("format") != FORMAT:
        raise UnsupportedInputError(
            f"{path}: a safetensors file, but none of activation statistics",
            hint="give a file that `loftq calibrate` wrote, or an importance matrix of llama.cpp",
        )
    version = metadata.get("format_version")
    if version not in FORMAT_VERSIONS:
        raise UnsupportedInputError(
            f"{path}: format version {shown(version)}, this loftq reads "
            f"{' and '.join(FORMAT_VERSIONS)}",
            hint="update loftq",
        )
    tokens = _map(path, metadata, "tokens", int)
    matrices = _map(path, metadata, "matrices", str)
    parts: dict[str, dict[str, StoredTensor]] = {}
    for tensor in header.tensors:
        name, _, suffix = tensor.name.rpartition(".")
        parts.setdefault(name, {})[suffix] = tensor
    entries = {}
    for name, found in parts.items():
        for tensor in found.values():
            _check(path, tensor, packed=version != "1")
        if {DIAGONAL, FULL} <= set(found):
            raise StatisticsError(f"{path}: entry {shown(name)} occurs twice")
        if set(found) not in ({DIAGONAL}, {FULL}, set(PARTS)):
            raise StatisticsError(f"{path}: entry {shown(name)} has {' and '.join(sorted(found))}")
        if tokens.get(name, 0) < 1:
            raise StatisticsError(f"{path}: entry {shown(name)} has no count of tokens")
        entries[name] = _entry(path, name, found, tokens[name])
    for matrix, name in matrices.items():
        if name not in entries:
            raise StatisticsError(f"{path}: no entry {shown(name)} for tensor {shown(matrix)}")
    told = _model(path, metadata), _text(metadata), _sensitivity(path, metadata)
    return Statistics(path, matrices, entries, *told)


def _check(path: Path, tensor: StoredTensor, packed: bool) -> None:
    """Of the right name, dtype and number of sides. ``packed``: parts of such entries may be."""
    name, _, suffix = tensor.name.rpartition(".")
    known = {DIAGONAL: ("F32", 1), FULL: ("F32", 2), **(PARTS if packed else {})}
    if not name or suffix not in known:
        raise StatisticsError(
            f"{path}: tensor {shown(tensor.name)} is neither "
            f"{' nor '.join('.' + part for part in known)}"
        )
    dtype, sides = known[suffix]
    square = suffix != FULL or tensor.shape == tensor.shape[:1] * 2
    if tensor.dtype != dtype or len(tensor.shape) != sides or not (tensor.elements and square):
        shapes: dict[str, str] = {DIAGONAL: "(in,)", FULL: "(in, in)"}
        expected = shapes.get(suffix, f"with {sides} sides")
        raise StatisticsError(
            f"{path}: tensor {shown(tensor.name)} is {tensor.dtype} {shown(tensor.shape)}, "
            f"not {dtype} {expected}"
        )


def _entry(path: Path, name: str, parts: Mapping[str, StoredTensor], tokens: int) -> Entry:
    """Of tensors that were checked, each by itself."""
    if len(parts) == 1:
        ((suffix, tensor),) = parts.items()
        kind = FULL if suffix == FULL else DIAGONAL
        return Entry(kind, tensor.shape[0], tokens, lambda: read_tensor(path, tensor))
    diagonal, directions, correlations = (parts[part] for part in PARTS)
    (width,) = diagonal.shape
    if directions.shape[1] != width or correlations.elements != length(width):
        raise StatisticsError(f"{path}: the parts of entry {shown(name)} do not fit each other")

    def read() -> torch.Tensor:
        held = (diagonal, directions, correlations)
        return unpack(Triangle(*(read_tensor(path, part) for part in held)))

    return Entry(FULL, width, tokens, read)


def _map(path: Path, metadata: Mapping[str, str], key: str, kind: type) -> dict[str, Any]:
    """The JSON object under ``key``, whose values are all of type ``kind``."""
    try:
        found = strict_json(metadata[key].encode())
    except (KeyError, ValueError):
        found = None
    if not isinstance(found, dict) or not all(type(value) is kind for value in found.values()):
        raise StatisticsError(f"{path}: the metadata {key!r} is missing or malformed")
    return found


def _sensitivity(path: Path, metadata: Mapping[str, str]) -> dict[str, float]:
    if SENSITIVITY not in metadata:
        return {}
    found = _map(path, metadata, SENSITIVITY, float)
    for matrix, value in found.items():
        if not 0 <= value < float("inf"):
            raise StatisticsError(f"{path}: the sensitivity of tensor {shown(matrix)} is {value}")
    return found


def _model(path: Path, metadata: Mapping[str, str]) -> MeasuredModel | None:
    if "model" not in metadata:
        return None
    found = _map(path, metadata, "model", str)
    if not {"id", "sha256"} <= set(found):
        raise StatisticsError(f"{path}: the metadata 'model' lacks id or sha256")
    return MeasuredModel(found["id"], found["sha256"])


def _text(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What is said of the text, if that is a JSON object: others may write anything."""
    try:
        found = strict_json(metadata.get("text", "{}").encode())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def compact_json(value: Any) -> str:
    """JSON as the metadata holds it: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
