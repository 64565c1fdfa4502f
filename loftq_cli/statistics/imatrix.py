"""llama.cpp's importance matrices, as activation statistics.

``llama-imatrix`` sums the squares of every layer's inputs. It writes GGUF, with the tensors
``NAME.in_sum2`` (in, matrices) and ``NAME.counts`` (1, matrices), or, formerly, a file of its own:
int32 number of entries, then for each of them the name (int32 length, bytes), int32 calls, int32
number of values, and the values, float32, E[x_j^2] times the calls
(https://github.com/ggml-org/llama.cpp/blob/master/tools/imatrix/imatrix.cpp). NAME is that of the
weight in a GGUF model, ``blk.0.attn_q.weight``. The rows of some weights are in another order
there; only their columns matter here.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from loftq_cli.checkpoint.header import StoredTensor, TensorSpec, shown
from loftq_cli.checkpoint.reader import TensorFile, as_tensor
from loftq_cli.checkpoint.source import CONFIG, Source
from loftq_cli.errors import CorruptFileError, StatisticsError, UnsupportedInputError, UsageError
from loftq_cli.machine.packages import required
from loftq_cli.statistics.statistics import DIAGONAL, Entry, Statistics

_SUMS, _COUNTS = ".in_sum2", ".counts"
_LONGEST_NAME = 512
_FEWEST_CHARACTERS = 3

# Where a config's model_type, without its separators, is not the name of the GGUF architecture.
_ARCHITECTURES = {
    "camembert": "bert",
    "cohere": "commandr",
    "deepseekv2": "deepseek2",
    "deepseekv3": "deepseek2",
    "gemma3text": "gemma3",
    "gptbigcode": "starcoder",
    "ministral": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "mt5": "t5",
    "phi": "phi2",
    "roberta": "bert",
    "umt5": "t5",
    "xlmroberta": "bert",
}
# Where the conversion to GGUF moves columns, the inputs would be taken for others: of all weights
# of a model, or of its state space layers.
_REORDERED_MODELS = ("plamo",)
_MEASURED = re.compile(r"(?:(?:enc|dec)\.)?blk\.\d+\.(?!ssm_)|output\.")


def is_gguf(start: bytes) -> bool:
    """Whether a file that begins with these bytes is GGUF."""
    return start[:4] == b"GGUF"


def is_legacy(start: bytes) -> bool:
    """Whether a file that begins with these 8 bytes may be an importance matrix of the old format:
    a plausible number of entries, then a plausible length of a name."""
    if len(start) < 8:
        return False
    count, length = (int(number) for number in struct.unpack("<ii", start))
    return 0 < count < 1 << 20 and _FEWEST_CHARACTERS <= length <= _LONGEST_NAME


def open_gguf(path: Path, source: Source | None) -> Statistics:
    """An importance matrix in GGUF. Raises as ``open_statistics``."""
    matrices = _names(path, source)  # first: it needs nothing of the file
    gguf = required("gguf", "gguf", "reading an importance matrix")
    try:
        found = gguf.GGUFReader(path)
        field = found.fields.get("general.type")
        kind = field.contents() if field is not None else None
        tensors = {
            str(tensor.name): StoredTensor(
                str(tensor.name),
                "F32" if tensor.tensor_type == gguf.GGMLQuantizationType.F32 else "U8",
                tuple(int(side) for side in tensor.shape),
                int(tensor.data_offset),
            )
            for tensor in found.tensors
        }
    except Exception as error:  # of any kind: the package checks little
        raise CorruptFileError(f"{path}: not a readable GGUF file: {error}") from error
    if kind != "imatrix":
        raise UnsupportedInputError(
            f"{path}: a GGUF file of type {shown(kind)}, not an importance matrix",
            hint="give the file that llama-imatrix wrote",
        )
    entries = {}
    with TensorFile(path) as file:
        for name in _needed(matrices, tensors, _SUMS):
            sums, counts = tensors[name + _SUMS], tensors.get(name + _COUNTS)
            if counts is None or {sums.dtype, counts.dtype} != {"F32"}:
                raise StatisticsError(f"{path}: entry {shown(name)} lacks its counts, or is no F32")
            if counts.elements != 1:
                continue  # experts, each with a count of its own
            count = float(file.read(counts))
            if not 0 <= count < 1 << 62:  # nor NaN
                raise StatisticsError(f"{path}: entry {shown(name)} counts {count} tokens")
            if count >= 1:
                entries[name] = Entry(
                    DIAGONAL, sums.elements, round(count), _reader(path, sums, round(count))
                )
    return _statistics(path, matrices, entries)


def open_legacy(path: Path, source: Source | None) -> Statistics:
    """An importance matrix in llama.cpp's old format. Raises as ``open_statistics``."""
    matrices = _names(path, source)
    entries: dict[str, Entry] = {}
    needed = set(matrices.values())
    with TensorFile(path) as file:
        position = 4
        try:
            for _ in range(_integers(file, 0, 1)[0]):
                (length,) = _integers(file, position, 1)
                if not 0 < length <= _LONGEST_NAME:
                    raise CorruptFileError(f"{path}: a name of {length} characters")
                name = bytes(file.read_range(position + 4, length)).decode()
                calls, values = _integers(file, position + 4 + length, 2)
                position += 12 + length
                if calls < 0 or values < 1:
                    raise CorruptFileError(f"{path}: entry {shown(name)} has {values} values")
                sums = StoredTensor(name, "F32", (values,), position)
                position += sums.nbytes
                if name in needed and calls:
                    entries[name] = Entry(DIAGONAL, values, calls, _reader(path, sums, calls))
        except (CorruptFileError, UnicodeDecodeError) as error:
            raise CorruptFileError(
                f"{path}: neither statistics of loftq nor a whole importance matrix: {error}",
                hint="give a file that `loftq calibrate` or llama-imatrix wrote",
            ) from error
        if position > path.stat().st_size:
            raise CorruptFileError(f"{path}: cut short, {position} bytes expected")
    return _statistics(path, matrices, entries)


def _statistics(
    path: Path, matrices: Mapping[str, str], entries: Mapping[str, Entry]
) -> Statistics:
    found = {matrix: name for matrix, name in matrices.items() if name in entries}
    if not found:
        raise StatisticsError(
            f"{path}: an importance matrix without an entry for this model",
            hint="give the one of this model, in the same architecture",
        )
    return Statistics(path, found, entries)


def _needed(
    matrices: Mapping[str, str], tensors: Mapping[str, TensorSpec], suffix: str
) -> list[str]:
    return [name for name in dict.fromkeys(matrices.values()) if name + suffix in tensors]


def _reader(path: Path, sums: StoredTensor, count: int) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        with TensorFile(path) as file:
            flat = TensorSpec(sums.name, "F32", (sums.elements,))
            return as_tensor(flat, file.read_range(sums.start, sums.nbytes)) / count

    return read


def _integers(file: TensorFile, position: int, count: int) -> tuple[int, ...]:
    return struct.unpack(f"<{count}i", file.read_range(position, 4 * count))


def _names(path: Path, source: Source | None) -> dict[str, str]:
    """Names of the source's weight tensors to those that they have in a GGUF model."""
    if source is None:
        raise UsageError(f"{path}: an importance matrix is read for a model", hint="name the model")
    gguf = required("gguf", "gguf", "reading an importance matrix")
    weights = [
        tensor.name
        for tensor in source.tensors
        if tensor.name.endswith(".weight") and len(tensor.shape) == 2
    ]
    table = gguf.get_tensor_name_map(_architecture(gguf, source), 1 + _last_number(weights))
    found = {}
    for name in weights:
        mapped = _mapped(table, name)
        if mapped is not None and _MEASURED.match(mapped):
            found[name] = mapped
    return found


def _mapped(table: Any, name: str) -> str | None:
    """The name under which ``table`` knows a tensor, with or without a base model's prefix."""
    for candidate in (name, name.partition(".")[2], f"model.{name}"):
        mapped = table.get_name(candidate, try_suffixes=(".weight",))
        if mapped is not None:
            return str(mapped)
    return None


def _architecture(gguf: Any, source: Source) -> Any:
    """The GGUF architecture of a checkpoint. Raises UnsupportedInputError."""
    model_type = source.config.content.get("model_type")
    plain = _plain(model_type) if isinstance(model_type, str) else ""
    known = {_plain(name): arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    arch = known.get(_ARCHITECTURES.get(plain, plain))
    if arch is None or plain in _REORDERED_MODELS:
        raise UnsupportedInputError(
            f"{source.directory / CONFIG}: importance matrices cannot be matched with the "
            f"matrices of model_type {shown(model_type)}",
            hint="use `loftq calibrate`",
        )
    return arch


def _plain(name: str) -> str:
    return re.sub(r"[-_.]", "", name.lower())


def _last_number(names: Iterable[str]) -> int:
    numbers = (int(part) for name in names for part in name.split(".") if part.isdecimal())
    return max((number for number in numbers if number < 10_000), default=0)
