"""``loftq calibrate``: the original model, run on text, to a file of activation statistics."""

from __future__ import annotations

import collections
import shutil
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loftq_cli.calibration import sensitivity
from loftq_cli.calibration.layer_inputs import OWN_LOOP
from loftq_cli.calibration.measure import Calibration, class_to_run, prepare
from loftq_cli.calibration.sensitivity import Asked
from loftq_cli.calibration.text_file import Text, read_text
from loftq_cli.checkpoint.deliveries import deliver_all
from loftq_cli.checkpoint.dtypes import computed, torch_dtype
from loftq_cli.checkpoint.header import StoredTensor
from loftq_cli.checkpoint.locate import locate
from loftq_cli.checkpoint.request import Request
from loftq_cli.checkpoint.source import Source, file_hashes
from loftq_cli.checkpoint.stacks import cut
from loftq_cli.errors import UnsupportedInputError, UsageError, listed
from loftq_cli.families.experts import by_default
from loftq_cli.families.kinds import turned_shape
from loftq_cli.machine.durable import explained
from loftq_cli.machine.observer import Observer
from loftq_cli.machine.resources import check_space, memory_explained
from loftq_cli.machine.workspace import Workspace
from loftq_cli.machine.world import ALONE, World
from loftq_cli.numerics.moments import Moments
from loftq_cli.planning.choices import choose_device
from loftq_cli.planning.make import anatomy_of
from loftq_cli.planning.selection import select
from loftq_cli.statistics.save import contents_sha256, measured_model, write_entry
from loftq_cli.statistics.writer import StatisticsWriter, entry_bytes, refuse_taken

MOMENTS = ("diagonal", "full")
_LESS_MEMORY = "use --moments diagonal, a smaller --length or fewer --samples"


class _Workspace(Workspace):
    """Keeps two processes from measuring for the same file; ``output`` is where parts of a model
    lie that does not fit in memory."""

    suffix = "loftq-calibrate"
    doing = "writing"


@dataclass(frozen=True)
class Measuring:
    """What to measure. ``samples`` None: up to 128; ``length`` None: 512, or what the model takes;
    ``sensitivity``: also what errors are worth to the model, "possible": unless gradients do not go
    through it. Raises UsageError for a value out of range."""

    samples: int | None = None
    length: int | None = None
    moments: str = "diagonal"
    device: str = "auto"
    seed: int = 0
    sensitivity: Asked = "none"

    def __post_init__(self) -> None:
        for name, value, low in (
            ("samples", self.samples, 1),
            ("length", self.length, 2),
            ("seed", self.seed, 0),
        ):
            if value is not None and not low <= value < 1 << 31:
                raise UsageError(f"--{name} {value}: must be a whole number from {low}")
        if self.moments not in MOMENTS:
            raise UsageError(f"--moments {self.moments}: not one of {', '.join(MOMENTS)}")


def calibrate(
    request: Request,
    output: Path,
    texts: Sequence[Path],
    wanted: Measuring,
    *,
    overwrite: bool = False,
    observer: Observer,
    world: World = ALONE,
) -> dict[str, Any]:
    """Measure a model on ``texts``, which the processes of ``world`` share, and write ``output``;
    what ``--json`` prints.

    Raises UsageError, InputError for the model or the texts, OutputConflictError,
    EnvironmentFailure for a missing extra, memory, the disk or the device.
    """
    choose_device(wanted.device)
    read = [read_text("--text", path) for path in texts]
    with world.in_turn("found"):
        source = locate(request, observer.note)
    if source.directory.resolve() in output.resolve().parents:
        raise UsageError(
            f"--output {output} is inside the input {source.directory}", hint="write it elsewhere"
        )
    return measure(
        source, output, read, wanted, overwrite=overwrite, observer=observer, world=world
    )


def measure(
    source: Source,
    output: Path,
    texts: Sequence[Text],
    wanted: Measuring,
    *,
    overwrite: bool,
    observer: Observer,
    world: World = ALONE,
) -> dict[str, Any]:
    """As :func:`calibrate`, of a source and texts that were read; raises the same."""
    started = time.monotonic()
    device = choose_device(wanted.device)
    if world.first:
        refuse_taken(output, overwrite)
    job = _job(source, texts, wanted, device)
    with world.in_turn("delivered"):
        deliver_all(source, observer)
    about = provenance(texts, wanted, contents_sha256(source))
    full = wanted.moments == "full"
    if world.first:
        check_space(output.absolute().parent, entry_bytes(max(job.widths.values()), full))
    settings = {**about, "moments": wanted.moments, "threads": torch.get_num_threads()}
    world.agree(settings, file_hashes(source), device)
    with memory_explained("calibrating", hint=_LESS_MEMORY), _folder(output, world) as folder:
        calibration = job.prepare(folder)
        samples, length = calibration.windows.shape
        text = {**about, "samples": samples, "length": length, "dtype": job.dtype_name}
        if wanted.sensitivity != "none":
            text["sensitivity"] = True
        if world.size > 1:
            observer.note(f"{world.size} processes share {samples} windows")
        found = _found(calibration, world, full, observer)
        done: dict[str, Any] = {}
        if world.first:
            # Before the moments, as it may fail.
            worth = sensitivity.measured(calibration, wanted.sensitivity, device, observer)
            done = _written(found, job, output, text, worth, overwrite)
            _tell_of_missing(done["missing"], observer)
        else:
            collections.deque(found, maxlen=0)  # only for what the others get of it
    return {
        **job.described(),
        "output": str(output),
        "samples": samples,
        "length": length,
        "tokens": samples * length,
        **world.told(lambda: done),
        "seconds": round(time.monotonic() - started, 3),
    }


@contextmanager
def _folder(output: Path, world: World) -> Iterator[Path]:
    """Where parts of a model may lie until it is measured; rank 0 keeps others from measuring for
    the same file."""
    workspace = _Workspace(output)
    if world.first:
        with workspace.locked():
            workspace.discard_work()  # what a crash left
            with explained(workspace.output):
                workspace.output.mkdir()
            yield workspace.output
        return
    own = workspace.output / f"rank-{world.rank}"
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)


@dataclass(frozen=True)
class _Job:
    """What is measured of a source: ``widths``, the in_features of each matrix by name."""

    source: Source
    texts: Sequence[Text]
    wanted: Measuring
    device: torch.device
    widths: Mapping[str, int]
    dtype: torch.dtype
    loaded_as: Any

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def described(self) -> dict[str, Any]:
        """What ``--json`` says of it."""
        return {
            "model": self.source.id,
            "moments": self.wanted.moments,
            "dtype": self.dtype_name,
            "device": str(self.device),
        }

    def prepare(self, folder: Path) -> Calibration:
        """Load the model, in parts from ``folder`` if it does not fit in memory."""
        elements = sum(tensor.elements for tensor in self.source.tensors)
        return prepare(
            self.source.directory,
            self.loaded_as,
            self.source.config.content,
            self.widths,
            [text.content for text in self.texts],
            samples=self.wanted.samples,
            length=self.wanted.length,
            seed=self.wanted.seed,
            dtype=self.dtype,
            nbytes=elements * self.dtype.itemsize,
            device=self.device,
            offload_folder=folder,
        )


def _job(source: Source, texts: Sequence[Text], wanted: Measuring, device: torch.device) -> _Job:
    content = source.config.content
    anatomy = anatomy_of(source)
    apart = cut(source, anatomy.stacks)
    experts = by_default(apart.tensors, content, 1, anatomy.experts)
    tensors = (apart if experts else source).tensors
    selection = select(tensors, content, anatomy=anatomy, experts=experts)
    widths = {
        tensor.name: turned_shape((tensor.shape[0], tensor.shape[1]), selection.kinds[tensor.name])[
            1
        ]
        for tensor in selection.matrices
    }
    dtype = dtype_to_run(selection.matrices, device)
    loaded_as = class_to_run(source.directory, content)
    return _Job(source, texts, wanted, device, widths, dtype, loaded_as)


def _tell_of_missing(missing: Sequence[str], observer: Observer) -> None:
    if missing:
        observer.note(f"nothing was measured for {listed(missing)}")


def provenance(texts: Sequence[Text], wanted: Measuring, contents: str | None) -> dict[str, Any]:
    """What a file of statistics says of the text and the ``contents`` of the model, as far as it is
    known beforehand."""
    return {
        "contents": contents,
        "files": [text.sha256 for text in texts],
        "seed": wanted.seed,
        "asked": {"samples": wanted.samples, "length": wanted.length},
    }


_Found = Iterator[tuple[list[str], Moments]]


def _found(calibration: Calibration, world: World, full: bool, observer: Observer) -> _Found:
    """Every entry as soon as it is measured."""

    def begin(windows: int) -> None:
        observer.begin(windows, "calibrating", " windows")

    def advance(name: str) -> None:
        observer.working_on(name)
        observer.advance(1)

    try:
        yield from calibration.measure(world, full=full, begin=begin, advance=advance)
    finally:
        observer.end()


def _written(
    found: _Found,
    job: _Job,
    output: Path,
    text: Mapping[str, Any],
    worth: Mapping[str, float],
    overwrite: bool,
) -> dict[str, Any]:
    """Write what is ``found``, and publish it; what ``--json`` says of it."""
    written, entries = set[str](), 0
    with StatisticsWriter(
        output,
        job.widths,
        model=measured_model(job.source),
        text=text,
        sensitivity=worth,
        overwrite=overwrite,
    ) as writer:
        for names, moments in found:
            write_entry(writer, names, moments)
            written.update(names)
            entries += 1
        _refuse_nothing(written, job.source, len(job.widths))
        nbytes = writer.publish()
    missing = [name for name in job.widths if name not in written]
    return {
        "matrices": len(written),
        "entries": entries,
        "missing": missing,
        "sensitivities": len(worth),
        "bytes": nbytes,
    }


def _refuse_nothing(written: Collection[str], source: Source, matrices: int) -> None:
    if not written:
        raise UnsupportedInputError(
            f"{source.directory}: text goes through none of its {matrices} matrices", hint=OWN_LOOP
        )


def dtype_to_run(matrices: Sequence[StoredTensor], device: torch.device) -> torch.dtype:
    """What most of the matrices are stored in; float32 for float64, and for float16 on a CPU, where
    many models overflow in it and few processors compute in it."""
    tag, _ = Counter(tensor.dtype for tensor in matrices).most_common(1)[0]
    dtype = torch_dtype(computed(tag))
    return torch.float32 if dtype == torch.float16 and device.type == "cpu" else dtype
