"""``loftq export --layout gguf``: the codes of a conversion in a GGUF file, and its adapter.

The file of a model that llama.cpp's converter, or somebody else, made in floating point is the
skeleton: hyperparameters, tokenizer and names are its own. Tensors whose rows are those of a matrix
become blocks of its codes; all others are copied.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loftq_cli.checkpoint.output import Output, file_entries, open_output, require_backbone, verify
from loftq_cli.checkpoint.reader import PIECE, TensorFile, pieces_of
from loftq_cli.checkpoint.source import open_source
from loftq_cli.errors import LayoutError, UsageError
from loftq_cli.exporting.gguf import blocks
from loftq_cli.exporting.gguf.adapter import GgufAdapter
from loftq_cli.exporting.gguf.file import (
    UINT32,
    Field,
    Written,
    header_of,
    read_gguf,
)
from loftq_cli.exporting.gguf.plan import Entry, GgufPlan, make_plan
from loftq_cli.exporting.gguf.rows import DTYPES, runs
from loftq_cli.layouts import adapter as adapters
from loftq_cli.layouts.trained import open_adapter
from loftq_cli.machine.durable import explained, pretty_json, write_all, write_file
from loftq_cli.machine.observer import Observer
from loftq_cli.machine.paths import check_output_path
from loftq_cli.machine.resources import check_space, memory_explained
from loftq_cli.machine.workspace import Workspace
from loftq_cli.merging.plan import make_merge_plan
from loftq_cli.reporting.original import Original, converted_source
from loftq_cli.version import VERSION

LAYOUT = "gguf"
MODEL, ADAPTER, MARKER = "model.gguf", "adapter.gguf", "loftq_gguf.json"
_MARGIN = 4 << 20  # room for the marker
_FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "IQ4_NL": 25}  # llama.h, LLAMA_FTYPE_MOSTLY_…
_OTHERWISE = 1  # mostly F16
NEEDS = {
    "IQ4_NL": "llama.cpp of February 2024 or later (pull request 5590)",
    "Q2_0": "llama.cpp of June 2026 or later (pull request 24448)",
}


class GgufWorkspace(Workspace):
    """The life of the output; there is no journal, what is interrupted is begun anew."""

    suffix = "loftq-gguf"
    marker = MARKER
    kind = "an export to GGUF"
    doing = "exporting to"


@dataclass(frozen=True)
class WantedGguf:
    """``skeleton``: a GGUF file of the model in floating point; ``source``: the model that was
    converted, an id or a path, if the skeleton is of that; ``adapter``: a trained one, None for the
    start; ``strict``: tensors that would be in 16 bits are refused."""

    skeleton: Path
    source: str | None = None
    adapter: Path | None = None
    strict: bool = False
    offline: bool = False


def export_gguf(
    directory: Path,
    output: Path,
    wanted: WantedGguf,
    *,
    overwrite: bool = False,
    observer: Observer,
) -> dict[str, Any]:
    """Write the conversion in ``directory`` to ``output``: model.gguf, and adapter.gguf if there is
    an adapter.

    Returns what ``--json`` prints. Raises InputError and its kin for a skeleton, a source or an
    adapter of something else, LayoutError for a conversion without codes, or under ``strict`` with
    a matrix that has no exact home, UsageError, OutputConflictError, EnvironmentFailure.
    """
    started = time.monotonic()
    found = open_output(directory)
    require_backbone(found)
    verify(found)
    final = check_output_path(output, directory)
    if final == wanted.skeleton.resolve() or final in wanted.skeleton.resolve().parents:
        raise UsageError(f"--output {output} holds the skeleton", hint="choose another directory")
    plan, adapter = _settled(found, wanted, observer)
    _tell(plan, wanted, observer)
    files = _files(plan, adapter)
    workspace = GgufWorkspace(final)
    if overwrite or not workspace.is_taken():
        needed = sum(file.written.nbytes for file in files) + _MARGIN
        check_space(final.parent, needed - workspace.written())
    workspace.check_permissions()
    with workspace.locked():
        workspace.refuse_other_output(overwrite)
        workspace.discard_work()
        with explained(workspace.output):
            workspace.output.mkdir()
        observer.begin(sum(file.written.nbytes for file in files), "writing")
        try:
            for file in files:
                _write(workspace.output / file.name, file, observer)
        finally:
            observer.end()
        report = _report(found, plan, wanted)
        marker = {**report, "outputs": file_entries(workspace.output)}
        write_file(workspace.output / MARKER, pretty_json(marker))
        workspace.publish(overwrite)
    return {
        **report,
        "adapter": None if adapter is None else str(output / ADAPTER),
        "bytes": sum(file.written.nbytes for file in files),
        "directory": str(directory),
        "model": str(output / MODEL),
        "output": str(output),
        "seconds": round(time.monotonic() - started, 3),
    }


def _settled(
    found: Output, wanted: WantedGguf, observer: Observer
) -> tuple[GgufPlan, GgufAdapter | None]:
    skeleton = read_gguf(wanted.skeleton)
    if (kind := skeleton.fields.get("general.type")) and kind.as_text() not in (None, "model"):
        raise UsageError(
            f"--skeleton {wanted.skeleton}: it is of type {kind.as_text()}, no model",
            hint="give the model's file",
        )
    source = open_source(found.directory)
    plan = make_plan(found, source, skeleton, _original(found, wanted), observer)
    start = found.directory / adapters.DIRECTORY if found.has_adapter else None
    file = wanted.adapter or start
    if file is None:
        return plan, None
    return plan, GgufAdapter(plan, make_merge_plan(found, source, open_adapter(file), None))


def _original(found: Output, wanted: WantedGguf) -> Original | None:
    if wanted.source is None:
        return None
    original = Original(found, converted_source(found, wanted.source, offline=wanted.offline))
    original.bring()
    return original


def _tell(plan: GgufPlan, wanted: WantedGguf, observer: Observer) -> None:
    inexact = plan.inexact
    if inexact and wanted.strict:
        lines = "; ".join(f"{each.skeleton.name}: {each.reason}" for each in inexact[:5])
        more = f"; and {len(inexact) - 5} more" if len(inexact) > 5 else ""
        raise LayoutError(
            f"--strict: no type holds these codes: {lines}{more}",
            hint="convert with --method uniform-symmetric --block-size 32 (64 at 2 bits)",
        )
    if inexact:
        reasons = Counter(each.reason for each in inexact)
        for reason, count in reasons.most_common():
            observer.note(f"{count} tensors are in 16 bits: {reason}")
    wide = [each for each in plan.entries if _is_in_wider_codes(plan, each)]
    if wide:
        observer.note(f"{len(wide)} tensors with narrower codes are in {wide[0].kind.name}")
    for name, needed in NEEDS.items():
        if any(entry.kind.name == name and entry.found for entry in plan.entries):
            observer.note(f"type {name} needs {needed}")


def _is_in_wider_codes(plan: GgufPlan, entry: Entry) -> bool:
    if entry.found is None or entry.reason is not None:
        return False
    bits = max(plan.matrices.matrix(name).bits for name in entry.found.matrices)
    return bits < {blocks.Q2_0: 2, blocks.Q8_0: 8}.get(entry.kind, 4)


@dataclass(frozen=True)
class _File:
    """A file of the result: its header, and the bytes of its tensors in order."""

    name: str
    written: Written
    contents: Iterable[Iterable[bytes | bytearray | memoryview]]


def _files(plan: GgufPlan, adapter: GgufAdapter | None) -> list[_File]:
    fields = {**plan.skeleton.fields, "general.file_type": Field.number(UINT32, _file_type(plan))}
    header = header_of(fields, [entry.tensor for entry in plan.entries])
    files = [_File(MODEL, header, (_content(plan, entry) for entry in plan.entries))]
    if adapter is not None:
        entries = adapter.entries()
        tensors = [tensor for _, own in entries for tensor in own]
        contents = (pieces_of(tensor) for entry, _ in entries for tensor in adapter.tensors(entry))
        files.append(_File(ADAPTER, header_of(adapter.fields, tensors), contents))
    return files


def _file_type(plan: GgufPlan) -> int:
    """What most of the weights are in."""
    counts: Counter[str] = Counter()
    for entry in plan.entries:
        if entry.found is not None:
            counts[entry.kind.name] += entry.tensor.nbytes
    most = counts.most_common(1)[0][0]
    return _FILE_TYPES.get(most, _OTHERWISE)


def _content(plan: GgufPlan, entry: Entry) -> Iterator[bytes | bytearray | memoryview]:
    """The bytes of a tensor, in order."""
    tensor = entry.skeleton
    if entry.found is None:
        with TensorFile(plan.skeleton.path) as file:
            for start in range(0, tensor.nbytes, PIECE):
                yield file.read_range(tensor.start + start, min(PIECE, tensor.nbytes - start))
        return
    with memory_explained(f"tensor {tensor.name!r}", hint="free memory for copies of this tensor"):
        value = _gathered(plan, entry)
    yield from pieces_of(value)


def _gathered(plan: GgufPlan, entry: Entry) -> torch.Tensor:
    """The rows of a tensor, from those of its matrices."""
    assert entry.found is not None
    result = None
    for number, places, rows in runs(entry.found):
        name = entry.found.matrices[number]
        if entry.reason is not None:
            value = plan.matrices.values(name)[rows].to(DTYPES[entry.kind])
        else:
            own = blocks.Rows.of(plan.matrices.quantized(name), plan.matrices.matrix(name).shape)
            value = blocks.encode(entry.kind, own.taken(rows))
        if result is None:
            result = value.new_empty((len(entry.found.rows), value.shape[1]))
        result[places] = value
    assert result is not None
    return result


def _write(path: Path, file: _File, observer: Observer) -> None:
    with explained(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.ftruncate(descriptor, file.written.nbytes)
            write_all(descriptor, file.written.raw, 0)
            for tensor, content in zip(file.written.tensors, file.contents, strict=True):
                observer.working_on(tensor.name)
                position = tensor.start
                for piece in content:
                    write_all(descriptor, memoryview(piece), position)
                    position += memoryview(piece).nbytes
                    observer.advance(memoryview(piece).nbytes)
                assert position == tensor.start + tensor.nbytes, tensor.name
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _report(found: Output, plan: GgufPlan, wanted: WantedGguf) -> dict[str, Any]:
    def described(entry: Entry) -> dict[str, Any]:
        said: dict[str, Any] = {"name": entry.skeleton.name, "type": entry.kind.name}
        if entry.found is not None:
            said["matrices"] = list(entry.found.matrices)
        if entry.reason is not None:
            said["reason"] = entry.reason
        return said

    return {
        "tool": {"name": "loftq-cli", "version": VERSION},
        "fingerprint": found.fingerprint,
        "skeleton": str(wanted.skeleton),
        "tensors": [described(entry) for entry in plan.entries],
        "types": dict(
            Counter(entry.kind.name for entry in plan.entries if entry.found is not None)
        ),
    }
