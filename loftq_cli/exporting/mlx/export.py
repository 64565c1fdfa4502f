"""``loftq export --layout mlx``: a conversion as a directory that mlx-lm loads, and its adapter.

Names are those of the source, which mlx-lm maps to its own. Nothing is computed anew; what MLX's
dtype does not hold is refused, or rounded and measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loftq_cli.checkpoint.companions import copy_files
from loftq_cli.checkpoint.output import Output, file_entries, open_output, require_backbone, verify
from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.checkpoint.source import CONFIG, INDEX, open_source
from loftq_cli.checkpoint.writer import GrowingShard, index_of
from loftq_cli.errors import LayoutError
from loftq_cli.exporting.mlx.adapter import FOLDER, MlxAdapter
from loftq_cli.exporting.mlx.config import with_rotary_settings
from loftq_cli.exporting.mlx.layout import MlxLayout
from loftq_cli.exporting.plan import ExportPlan, Item, Moved, make_export_plan, name_of, specs_of
from loftq_cli.layouts import adapter as adapters
from loftq_cli.layouts.trained import open_adapter
from loftq_cli.machine.durable import explained, pretty_json, write_file
from loftq_cli.machine.observer import Observer
from loftq_cli.machine.paths import check_output_path
from loftq_cli.machine.resources import check_space, memory_explained
from loftq_cli.machine.workspace import Workspace
from loftq_cli.merging.plan import Copied, make_merge_plan
from loftq_cli.version import VERSION

LAYOUT = MlxLayout.name
MARKER = "loftq_mlx.json"
_MARGIN = 4 << 20  # room for config and the marker


class MlxWorkspace(Workspace):
    """The life of the output; there is no journal, what is interrupted is begun anew."""

    suffix = "loftq-mlx"
    marker = MARKER
    kind = "an export to MLX"
    doing = "exporting to"


@dataclass
class Rounding:
    """How far what is written is from what ``output`` holds: ``off``, the norm of the difference
    for each matrix that was rounded."""

    output: Output
    off: list[float] = field(default_factory=list)

    def told(self) -> dict[str, Any] | None:
        """Relative to the weights, as ``residual`` is, that of the conversion; None if nothing was
        rounded."""
        if not self.off:
            return None
        weight = math.hypot(*(each["frobenius"]["weight"] for each in self.output.records))
        return {
            "matrices": len(self.off),
            "off": math.hypot(*self.off) / (weight or 1.0),
            "residual": self.output.manifest["totals"]["relative_residual"],
        }


def export_mlx(
    directory: Path,
    output: Path,
    *,
    adapter: Path | None = None,
    rounded: bool = False,
    overwrite: bool = False,
    observer: Observer,
) -> dict[str, Any]:
    """Write the conversion in ``directory`` to ``output`` as mlx-lm has models, with ``adapter``
    (None: its own, if there is one) in the folder ``adapters``. ``rounded``: scales and offsets
    that the dtype of a matrix does not hold are rounded to it.

    Returns what ``--json`` prints. Raises VerificationError if ``directory`` was altered,
    LayoutError for what MLX cannot hold, or not exactly, InputError for an adapter of something
    else, UsageError, OutputConflictError, EnvironmentFailure.
    """
    started = time.monotonic()
    found = open_output(directory)
    require_backbone(found)
    verify(found)
    final = check_output_path(output, directory)
    source = open_source(found.directory)
    plan = make_export_plan(found, source, MlxLayout())
    start = found.directory / adapters.DIRECTORY if found.has_adapter else None
    pairs = None
    if (file := adapter or start) is not None:
        merging = make_merge_plan(found, source, open_adapter(file), None)
        kept = [spec.name for spec in plan.kept if len(spec.shape) == 2]
        names = [*kept, *(matrix.name for matrix in plan.matrices)]
        pairs = MlxAdapter.of(merging, [name.removesuffix(".weight") for name in names])
    workspace = MlxWorkspace(final)
    needed = plan.disk_bytes + (0 if pairs is None else pairs.nbytes) + _MARGIN
    if overwrite or not workspace.is_taken():
        check_space(final.parent, needed - workspace.written())
    workspace.check_permissions()
    with workspace.locked():
        workspace.refuse_other_output(overwrite)
        workspace.discard_work()
        told = _write(plan, pairs, workspace.output, rounded, observer).told()
        workspace.publish(overwrite)
    if told is not None:
        observer.note(
            f"{told['matrices']} matrices were rounded, to values that are off by "
            f"{told['off']:.3%} of the weights; the conversion is by {told['residual']:.2%}"
        )
    return {
        "adapter": None if pairs is None else str(output / FOLDER),
        "bytes": plan.tensor_bytes,
        "directory": str(directory),
        "layout": LAYOUT,
        "matrices": len(plan.matrices),
        "output": str(output),
        "rank": None if pairs is None else pairs.rank,
        "rounded": told,
        "seconds": round(time.monotonic() - started, 3),
    }


def _write(
    plan: ExportPlan, pairs: MlxAdapter | None, target: Path, rounded: bool, observer: Observer
) -> Rounding:
    """Write every file of the result to ``target``."""
    rounding = Rounding(plan.output)
    with explained(target):
        target.mkdir()
    names = file_names([name for name, _ in plan.shards])
    observer.begin(plan.tensor_bytes, "exporting")
    try:
        for name, (_, items) in zip(names, plan.shards, strict=True):
            with GrowingShard(target / name, specs_of(items)) as shard:
                for item in items:
                    observer.working_on(name_of(item))
                    _write_item(plan, item, shard, rounded, rounding)
                    observer.advance(sum(spec.nbytes for spec in specs_of([item])))
                shard.sync()
    finally:
        observer.end()
    if len(names) > 1:
        specs = (specs_of(items) for _, items in plan.shards)
        write_file(target / INDEX, pretty_json(index_of(zip(names, specs, strict=True))))
    copy_files(plan.companions, target)
    config = {**with_rotary_settings(plan.config), "quantization": plan.entry}
    write_file(target / CONFIG, pretty_json(config, in_order=True))
    with explained(target):
        if pairs is not None:
            pairs.write(target / FOLDER)
        marker = {
            "tool": {"name": "loftq-cli", "version": VERSION},
            "fingerprint": plan.output.fingerprint,
            "rounded": rounding.told(),
            "outputs": file_entries(target),
        }
    write_file(target / MARKER, pretty_json(marker))
    return rounding


def file_names(names: Sequence[str]) -> list[str]:
    """mlx-lm reads files whose names begin with "model" (``model*.safetensors``)."""
    if all(name.startswith("model") for name in names):
        return list(names)
    return [f"model-{n:05d}-of-{len(names):05d}.safetensors" for n in range(1, len(names) + 1)]


def _write_item(
    plan: ExportPlan, item: Item, shard: GrowingShard, rounded: bool, rounding: Rounding
) -> None:
    if isinstance(item, Copied):
        with TensorFile(item.file) as file:
            shard.write_pieces(item.spec.name, file.pieces(item.tensor))
        return
    assert isinstance(item, Moved)
    name = item.matrix.name
    with memory_explained(f"tensor {name!r}", hint="free memory for copies of this matrix"):
        tensors, meant, held = item.read(plan.output.directory, plan.stored)
    if not torch.equal(meant, held):
        if not rounded:
            raise LayoutError(
                f"--layout {LAYOUT} cannot hold {name} exactly: {item.matrix.dtype} has too few "
                "bits for its scales, or for these times zero points",
                hint="convert with --method uniform-symmetric --layout compressed, which always "
                "fits; or --rounded",
            )
        rounding.off.append(float(torch.linalg.vector_norm(meant - held, dtype=torch.float64)))
    for key, tensor in tensors.items():
        shard.write(key, tensor)
