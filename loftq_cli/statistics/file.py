"""Activation statistics: second moments of the inputs of a model's linear layers, read from a file.

Our own format is a safetensors file with one tensor for every distinct input, described in
docs/statistics.md; llama.cpp's importance matrices are read as well (:mod:`imatrix`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
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
from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.checkpoint.source import Source, file_hashes
from loftq_cli.errors import (
    CorruptFileError,
    EnvironmentFailure,
    SourceNotFoundError,
    StatisticsError,
    UnsupportedInputError,
)
from loftq_cli.statistics import imatrix
from loftq_cli.statistics.statistics import DIAGONAL, FULL, Entry, Kind, MeasuredModel, Statistics

FORMAT = "loftq-statistics"
FORMAT_VERSION = 1


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
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise UnsupportedInputError(
            f"{path}: format version {shown(metadata.get('format_version'))}, this loftq reads "
            f"version {FORMAT_VERSION}",
            hint="update loftq",
        )
    tokens = _map(path, metadata, "tokens", int)
    matrices = _map(path, metadata, "matrices", str)
    entries = {}
    for tensor in header.tensors:
        name, kind = _checked(path, tensor)
        if name in entries:
            raise StatisticsError(f"{path}: entry {shown(name)} occurs twice")
        if tokens.get(name, 0) < 1:
            raise StatisticsError(f"{path}: entry {shown(name)} has no count of tokens")
        entries[name] = Entry(kind, tensor.shape[0], tokens[name], _reader(path, tensor))
    for matrix, name in matrices.items():
        if name not in entries:
            raise StatisticsError(f"{path}: no entry {shown(name)} for tensor {shown(matrix)}")
    return Statistics(path, matrices, entries, _model(path, metadata), _text(metadata))


def _checked(path: Path, tensor: StoredTensor) -> tuple[str, Kind]:
    """(entry, kind) of a stored tensor of the right dtype and shape."""
    name, _, suffix = tensor.name.rpartition(".")
    kind = next((known for known in (DIAGONAL, FULL) if known == suffix), None)
    if not name or kind is None:
        raise StatisticsError(f"{path}: tensor {shown(tensor.name)} is neither .diagonal nor .full")
    sides = 1 if kind == DIAGONAL else 2
    if tensor.dtype != "F32" or tensor.elements == 0 or tensor.shape != tensor.shape[:1] * sides:
        expected = "(in,)" if kind == DIAGONAL else "(in, in)"
        raise StatisticsError(
            f"{path}: tensor {shown(tensor.name)} is {tensor.dtype} {shown(tensor.shape)}, "
            f"not F32 {expected}"
        )
    return name, kind


def _reader(path: Path, tensor: StoredTensor) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        with TensorFile(path) as file:
            return file.read(tensor)

    return read


def _map(path: Path, metadata: Mapping[str, str], key: str, kind: type) -> dict[str, Any]:
    """The JSON object under ``key``, whose values are all of type ``kind``."""
    try:
        found = strict_json(metadata[key].encode())
    except (KeyError, ValueError):
        found = None
    if not isinstance(found, dict) or not all(type(value) is kind for value in found.values()):
        raise StatisticsError(f"{path}: the metadata {key!r} is missing or malformed")
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
