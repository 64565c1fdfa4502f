"""What reads bytes that others wrote: header, index, journal, pickle, GGUF, manifest. One function
each, that feeds it a file and lets only errors through that are not meant to happen."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from loftq_cli.checkpoint.header import HeaderError, read_header
from loftq_cli.checkpoint.journal import Journal, Subject, _sealed, subject_in
from loftq_cli.checkpoint.output import read_manifest
from loftq_cli.checkpoint.pickles import reader as pickled
from loftq_cli.checkpoint.source import CONFIG, INDEX, open_source
from loftq_cli.errors import CorruptFileError, InputError
from loftq_cli.exporting.gguf.file import KINDS, Field, GgufTensor, header_of, read_gguf
from tests.support.makers import container, entry

SHARDS = ("one.safetensors", "two.safetensors")
IDENTITY = Subject("f" * 64, {"bits": 4}, [["model.safetensors", 8, "0" * 64]])
_FRAME = b"\x00"  # a journal's input may name lines that are to carry a right hash

HEADER = {
    "__metadata__": {"format": "pt"},
    "b.weight": entry("I32", [2, 1], 0, 8),
    "a.weight": entry("BF16", [3], 8, 14),
    "empty": entry("F16", [0, 4], 14, 14),
}
MANIFEST = {
    "format_version": 1,
    "tool": {"name": "loftq-cli", "version": "1"},
    "source": {"id": "a", "revision": None, "files": []},
    "recipe": {},
    "fingerprint": "0" * 64,
    "matrices": [],
    "passed_through": [],
    "totals": {},
    "outputs": [{"name": "loftq_init/a", "size": 1, "sha256": "0" * 64}],
    "environment": {},
}
UNIT = {
    "tensor": "a.weight",
    "prefix_sha256": "0" * 64,
    "outputs": {"model.safetensors": {"a.weight": "0" * 64}},
    "record": None,
}


def header(directory: Path, content: bytes) -> None:
    """``content`` as a safetensors file. An accepted one must lie within itself."""
    path = directory / "model.safetensors"
    path.write_bytes(content)
    try:
        found = read_header(path)
    except (HeaderError, CorruptFileError):  # the second for a pointer of git-lfs
        return
    end = found.data_start
    for tensor in found.tensors:
        assert tensor.start == end
        end += tensor.nbytes
    assert end == len(content)


def index(directory: Path, content: bytes) -> None:
    """``content`` as the index of two shards. An accepted one must name nothing else."""
    if not (directory / CONFIG).exists():
        (directory / CONFIG).write_text("{}")
        for number, name in enumerate(SHARDS):
            tensor = {f"t{number}": entry("U8", [1], 0, 1)}
            (directory / name).write_bytes(container(tensor, b"!"))
    (directory / INDEX).write_bytes(content)
    try:
        source = open_source(directory)
    except InputError:
        return
    assert {shard.name for shard in source.shards} <= set(SHARDS)


def journal(directory: Path, content: bytes) -> None:
    """``content`` as a journal; what begins with a NUL is lines that are given their hash first."""
    path = directory / "journal"
    path.write_bytes(_with_hashes(content[1:]) if content[:1] == _FRAME else content)
    found = subject_in(path)
    with Journal(path, found or IDENTITY) as opened:
        for unit in opened.units.values():
            for digests in unit.outputs.values():
                assert all(type(name) is str for name in digests)
        assert all(shard.mtime_ns is not None for shard in opened.shards.values())
    assert subject_in(path) is not None


def manifest(directory: Path, content: bytes) -> None:
    """``content`` as a manifest."""
    path = directory / "loftq_manifest.json"
    path.write_bytes(content)
    with suppress(InputError):
        read_manifest(path)


def pickle(directory: Path, content: bytes) -> None:
    """``content`` as the pickle of a checkpoint of four numbers."""
    path = directory / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", bytes(16))
        archive.writestr("archive/version", "3")
    with suppress(HeaderError):
        for tensor in pickled.read_header(path).tensors:
            assert tensor.start + tensor.nbytes <= path.stat().st_size


def gguf(directory: Path, content: bytes) -> None:
    """``content`` as a GGUF file. The tensors of an accepted one must lie within it, and what is
    written of its header must be read as it was."""
    path = directory / "model.gguf"
    path.write_bytes(content)
    try:
        found = read_gguf(path)
    except CorruptFileError:
        return
    assert all(0 < tensor.start <= len(content) - tensor.nbytes for tensor in found.tensors)
    written = header_of(found.fields, found.tensors)
    path.write_bytes(written.raw + bytes(written.nbytes - len(written.raw)))
    again = read_gguf(path)
    assert again.fields == found.fields
    assert [replace(each, start=0) for each in again.tensors] == [
        replace(each, start=0) for each in found.tensors
    ]


def _gguf_of(*tensors: GgufTensor) -> bytes:
    array = struct.pack("<IQ", 8, 2) + 2 * (struct.pack("<Q", 1) + b"a")
    fields = {
        "general.architecture": Field.text("llama"),
        "general.alignment": Field.number(4, 32),
        "tokenizer.ggml.tokens": Field(9, array),
        "x": Field.number(6, 0.5),
    }
    written = header_of(fields, tensors)
    return written.raw + bytes(written.nbytes - len(written.raw))


def _pickle_of(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    with zipfile.ZipFile(file) as archive:
        return archive.read("archive/data.pkl")


def _with_hashes(content: bytes) -> bytes:
    lines = []
    for line in content.split(b"\n"):
        with suppress(ValueError, RecursionError):
            value = json.loads(line)
            lines.append(_sealed(value))
    return b"".join(lines)


def _journal_of(*lines: object) -> bytes:
    return _FRAME + b"\n".join(json.dumps(line).encode() for line in lines)


FIRST = {"journal": 2, "fingerprint": "f", "recipe": {"bits": 4}, "sources": [["a", 1, "0"]]}
READ = {"shard": "model.safetensors", "sha256": "0" * 64, "mtime_ns": 5}
TARGETS: dict[str, tuple[Callable[[Path, bytes], None], list[bytes]]] = {
    "header": (header, [container(HEADER, bytes(14)), container({})]),
    "index": (
        index,
        [
            json.dumps({"metadata": {}, "weight_map": {"t0": SHARDS[0], "t1": SHARDS[1]}}).encode(),
            json.dumps({"weight_map": {"t0": "../x"}}).encode(),
        ],
    ),
    "journal": (
        journal,
        [
            _journal_of(FIRST, UNIT, READ),
            _sealed(FIRST) + _sealed(UNIT) + _sealed(READ),
        ],
    ),
    "pickle": (
        pickle,
        [
            _pickle_of({"a": torch.ones(4), "b": torch.nn.Parameter(torch.ones(4))}),
            _pickle_of(torch.nn.Linear(2, 2, bias=False).state_dict()),
        ],
    ),
    "gguf": (
        gguf,
        [
            _gguf_of(GgufTensor("a.weight", KINDS[2], (2, 32)), GgufTensor("b", KINDS[0], (3,))),
            _gguf_of(),
        ],
    ),
    "manifest": (manifest, [json.dumps(MANIFEST).encode(), b'{"format_version": 2}']),
}
"""name: (function, files to begin with)."""
