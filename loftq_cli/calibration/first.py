"""``convert --calibrate-text``: statistics are measured first, and kept beside the output.

The file is taken again if it is what would be measured, so that a conversion that was
interrupted, or is repeated with other settings, does not measure twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loftq_cli.calibration import own_text
from loftq_cli.calibration.calibrate import Measuring, measure, provenance
from loftq_cli.calibration.own_text import OWN
from loftq_cli.calibration.text_file import Text, read_text
from loftq_cli.checkpoint.deliveries import deliver_all
from loftq_cli.checkpoint.source import Source
from loftq_cli.errors import OutputConflictError, UsageError
from loftq_cli.machine.observer import Observer
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.target import may_be_narrow
from loftq_cli.settings.table import BEST, DEFAULT
from loftq_cli.statistics.file import model_sha256, open_statistics, statistics_for
from loftq_cli.statistics.save import contents_sha256
from loftq_cli.statistics.statistics import Statistics
from loftq_cli.statistics.writer import entry_bytes, refuse_taken

OPTION = "--calibrate-text"


@dataclass(frozen=True)
class Texts:
    """What is done with texts around a conversion: ``paths`` of their files, OWN for what the model
    writes itself, the kind of ``moments`` that are measured on them before it (None: nobody said),
    and whether it is refined on them after it. ``dry_run``: nothing is written or measured."""

    paths: tuple[Path, ...]
    moments: str | None
    refine: bool
    dry_run: bool

    @property
    def own(self) -> bool:
        """Whether the model is to write text."""
        return Path(OWN) in self.paths

    def files(self, source: Source, output: Path) -> list[Path]:
        """The files of the texts, around a conversion of ``source`` to ``output``."""
        if not self.own:
            return list(self.paths)
        own = own_text.beside(output, source)
        return [own if path == Path(OWN) else path for path in self.paths]


def asked(
    paths: Sequence[Path],
    moments: str | None,
    *,
    refine: bool,
    preset: str = DEFAULT,
    dry_run: bool = False,
) -> Texts | None:
    """What the options ask for, and the preset where they do not; None if it is nothing. Raises
    UsageError."""
    best = preset == BEST
    if not paths:
        for wanted, option in (
            (best, f"--preset {BEST}"),
            (refine, "--refine"),
            (moments is not None, f"--moments {moments}"),
        ):
            if wanted:
                raise UsageError(f"{option} needs text", hint=f"name it with {OPTION}")
        return None
    if moments is not None:
        Measuring(moments=moments)  # refuses what is none
    return Texts(tuple(paths), moments or ("full" if best else None), refine or best, dry_run)


def moments_for(plan: Plan) -> str:
    """The kind of moments that pays, if nobody said: full ones if a matrix is narrow and they take
    no more of the disk than the model does."""
    if not may_be_narrow(plan):
        return "diagonal"
    # Of one module, layers with as many inputs mostly share them.
    inputs = {
        (name.removesuffix(".weight").rpartition(".")[0], item.matrix.shape[1])
        for name, item in plan.matrices.items()
    }
    taken = sum(entry_bytes(width, full=True) for _, width in inputs)
    return "full" if taken <= plan.source_bytes else "diagonal"


def beside(output: Path) -> Path:
    """Where the statistics of a conversion to ``output`` lie."""
    return output.with_name(f"{output.name}.stats.safetensors")


def read(
    source: Source, output: Path, texts: Texts, *, device: str, observer: Observer
) -> list[Text]:
    """The texts; what the model is to write itself is written now, unless it lies there already.
    Raises InputError, and what :func:`~loftq_cli.calibration.own_text.write` does."""
    if texts.own:
        deliver_all(source, observer)  # before its text has a name, by what is in them
    files = texts.files(source, output)
    for path, file in zip(texts.paths, files, strict=True):
        if path == Path(OWN) and not file.exists():
            own_text.write(source, file, device, observer)
            observer.note(f"wrote {own_text.PASSAGES} passages: {file}")
    return [read_text(OPTION, file) for file in files]


def found(
    source: Source,
    output: Path,
    texts: Sequence[Text],
    moments: str | None,
    *,
    sensitivity: bool,
    overwrite: bool,
) -> Statistics | None:
    """The statistics beside ``output``, if they are of this model and these ``texts``, and of the
    kind ``moments`` or, if that is None, of any, with ``sensitivity`` if that is wanted; None if
    they have to be measured.

    Raises OutputConflictError if there is something else and ``overwrite`` does not allow to
    replace it.
    """
    path = beside(output)
    refuse_taken(path, overwrite=True)  # what is not ours
    if not path.exists():
        return None
    differing = _differing(path, source, texts, moments, sensitivity)
    if differing is None:
        return statistics_for(source, str(path))
    if not overwrite:
        raise OutputConflictError(
            f"{path}: statistics {differing}",
            hint=f"--overwrite measures again; --stats {path} takes them as they are",
        )
    return None


def measured(
    source: Source,
    output: Path,
    texts: Sequence[Text],
    moments: str,
    *,
    sensitivity: bool,
    device: str,
    observer: Observer,
) -> Statistics:
    """Measure, ``sensitivity`` too if that is possible, and open what was written. Raises what
    :func:`measure` does."""
    path = beside(output)
    wanted = Measuring(
        moments=moments, device=device, sensitivity="possible" if sensitivity else "none"
    )
    result = measure(source, path, texts, wanted, overwrite=True, observer=observer)
    observer.note(f"measured {result['tokens']:,} tokens ({moments} moments): {path}")
    return statistics_for(source, str(path))


def _differing(
    path: Path, source: Source, read: Sequence[Text], moments: str | None, sensitivity: bool
) -> str | None:
    """What the statistics at ``path`` are, if they are not what would be measured now."""
    held = open_statistics(path)
    kinds = {entry.kind for entry in held.entries.values()}
    if held.model is None or held.model.sha256 != model_sha256(source):
        return "of another model"
    if moments is not None and kinds != {moments}:
        return f"with {' and '.join(sorted(kinds))} moments, not {moments}"
    contents = contents_sha256(source)
    if contents is None or held.text.get("contents") != contents:
        return f"of a model with other values, or another tokenizer, than {source.id} has now"
    wanted = provenance(read, Measuring(), contents)
    if {name: held.text.get(name) for name in wanted} != wanted:
        return "of other text, or of other windows of it"
    # What more was measured does no harm.
    if sensitivity and not held.text.get("sensitivity"):
        return "without sensitivities, by which a target is settled"
    return None
