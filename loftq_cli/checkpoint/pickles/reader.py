"""Pickled checkpoints (``pytorch_model.bin``), the one place where ``torch.load`` is called.

A file of torch.save is a zip archive whose tensors are stored as they are, next to a pickle that
says what they are. Only that pickle is unpickled, by torch's weights_only unpickler, which knows
tensors and runs nothing else, and with fake tensors, which read no data: what comes of it is a
header, after which the file is read as a safetensors file is, a range of bytes at a time. What
the pickle asks for is checked first (pickle_check).
"""

from __future__ import annotations

import hashlib
import os
import pickle
import stat
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from loftq_cli.checkpoint.header import Header, HeaderError, StoredTensor, is_text, shown
from loftq_cli.checkpoint.pickles.check import HINT, check

_MAX_PICKLE = 32_000_000  # bytes; a tensor takes about 200 in it
_TAGS = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


def read_header(path: Path) -> Header:
    """The tensors of a pickled state dict, in the order of their bytes; tensors that share memory
    may lie over each other. ``data_start`` is the first tensor's place, ``sha256`` of what is
    before it.

    Raises HeaderError if it is no zip file of torch.save, holds anything but contiguous
    tensors, or does not agree with itself; OSError.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise HeaderError("not a regular file")
    _check_archive(path)
    tensors = [
        _stored(name, value, status.st_size) for name, value in sorted(_unpickled(path).items())
    ]
    if not tensors:
        raise HeaderError("no tensors in it")
    tensors.sort(key=lambda tensor: tensor.start)
    start = tensors[0].start
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = start
        while left and (piece := file.read(min(left, 1 << 20))):
            digest.update(piece)
            left -= len(piece)
    return Header(tuple(tensors), status.st_size, start, digest.hexdigest())


def _check_archive(path: Path) -> None:
    """That everything is stored as it is, so that nothing grows when it is read, that data are
    little-endian, and that what torch reads whole is not too large."""
    if not zipfile.is_zipfile(path):
        raise HeaderError(f"not a zip file, as torch.save writes since 1.6 ({HINT})")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            for entry in entries:
                if (
                    entry.compress_type != zipfile.ZIP_STORED
                    or entry.file_size > entry.compress_size
                ):
                    raise HeaderError(f"{shown(entry.filename)} is compressed ({HINT})")
            described = [entry for entry in entries if "/data/" not in entry.filename]
            _check_size(entry.file_size for entry in described)
            for entry in described:
                name = entry.filename.partition("/")[2]
                if name == "byteorder" and archive.read(entry) != b"little":
                    raise HeaderError(f"its numbers are not little-endian ({HINT})")
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise HeaderError(f"a broken zip file: {error}") from error


def _check_size(described: Iterable[int]) -> None:
    if sum(described) > _MAX_PICKLE:
        raise HeaderError("what describes its tensors is larger than 32 MB")


def _unpickled(path: Path) -> dict[str, torch.Tensor]:
    from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import

    check(_pickle(path))
    try:
        with FakeTensorMode():
            held: Any = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:  # its text advises to unpickle without protection
        raise HeaderError(f"its pickle holds more than tensors ({HINT})") from error
    except Exception as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise HeaderError(f"cannot be unpickled: {type(error).__name__}: {shown(first)}") from error
    if not isinstance(held, dict):
        raise HeaderError(f"holds {type(held).__name__}, not a state dict ({HINT})")
    for name, value in held.items():
        if not is_text(name) or not isinstance(value, torch.Tensor):
            raise HeaderError(
                f"entry {shown(name)} is {type(value).__name__}, not a tensor ({HINT})"
            )
    return held


def _pickle(path: Path) -> bytes:
    """The pickle as torch will find it: two readers need not agree on a hostile zip file."""
    try:
        reader = torch._C.PyTorchFileReader(str(path))
        sizes = {name: reader.get_record_size(name) for name in reader.get_all_records()}
        _check_size(size for name, size in sizes.items() if not name.startswith("data/"))
        content: bytes = reader.get_record("data.pkl")
    except RuntimeError as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise HeaderError(f"a broken zip file: {shown(first)}") from error
    return content


def _stored(name: str, tensor: torch.Tensor, size: int) -> StoredTensor:
    where = f"tensor {shown(name)}"
    tag = _TAGS.get(tensor.dtype)
    if tag is None or tensor.layout != torch.strided:
        raise HeaderError(f"{where} is {tensor.dtype}, {tensor.layout}: not supported ({HINT})")
    if not tensor.is_contiguous():
        raise HeaderError(f"{where} is not contiguous ({HINT})")
    storage = tensor.untyped_storage()
    start: object = getattr(storage, "_checkpoint_offset", None)
    if not isinstance(start, int):
        raise HeaderError(f"{where}: this version of torch does not say where its data are")
    begin = int(tensor.storage_offset()) * tensor.element_size()
    stored = StoredTensor(name, tag, tuple(map(int, tensor.shape)), start + begin)
    if begin + stored.nbytes > int(storage.nbytes()) or stored.start + stored.nbytes > size:
        raise HeaderError(f"{where} ends behind its data")
    return stored
