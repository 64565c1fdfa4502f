"""Trained adapters in the directory of a conversion, where a trainer that writes to it leaves them.

``save_pretrained("out")`` puts one beside the backbone, ``save_pretrained("out/loftq_init")`` in
the place of the start; checkpoints of a trainer, and adapters that have a name, lie in folders of
``out``. Nothing of ours takes one of them unless it is asked for.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.output import Output, open_output
from loftq_cli.errors import InputError, LoftqError
from loftq_cli.layouts import adapter
from loftq_cli.machine.durable import file_sha256

NOWHERE = {"adapter_kwargs": {"subfolder": "no trained adapter"}}
"""What has from_pretrained leave alone an adapter that lies beside the backbone: transformers looks
for it in a folder that does not exist."""


class TrainedBeside(UserWarning):
    """A trained adapter lies beside the backbone that is loaded, and is not what is attached."""


def lies_beside(directory: str | os.PathLike[str]) -> bool:
    """Whether an adapter lies beside the backbone in ``directory``."""
    return os.path.isfile(os.path.join(directory, adapter.CONFIG))


def trained_beside(output: Output) -> Path | None:
    """The directory of the adapter that training left: beside the backbone of ``output``, in the
    place of its start, or in another folder; None if there is none."""
    if output.has_backbone and lies_beside(output.directory):
        return output.directory
    with contextlib.suppress(OSError):
        if start_is_replaced(output):
            return output.directory / output.adapter_folder
    return beside_the_start(output.directory) if output.has_backbone else None


def beside_the_start(directory: Path) -> Path | None:
    """The directory of the adapter beside the backbone in ``directory``, or of the newest one in a
    folder of it other than the start's; None if there is none."""
    if lies_beside(directory):
        return directory
    found = {}
    with contextlib.suppress(OSError):
        for folder in sorted(directory.iterdir()):
            if folder.name != adapter.DIRECTORY and lies_beside(folder):
                found[folder] = (folder / adapter.CONFIG).stat().st_mtime_ns
    return max(found, key=found.__getitem__, default=None)


def leave_beside(output: Output, wanted: object) -> dict[str, Any]:
    """What keeps transformers from attaching an adapter that lies beside the backbone of
    ``output``; with a warning of one that is there, unless one is ``wanted``."""
    left = beside_the_start(output.directory)
    if left is not None and wanted is None:
        warnings.warn(
            f"{left} holds a trained adapter, and the start in {adapter.DIRECTORY} is loaded; "
            f"load({str(output.directory)!r}, adapter={str(left)!r}) takes the trained one",
            TrainedBeside,
            stacklevel=4,
        )
    return dict(NOWHERE) if left == output.directory else {}


def warn_of_attached(directory: str) -> None:
    """Warn of the adapter that transformers attaches to the backbone in ``directory`` by itself."""
    if lies_beside(directory):
        warnings.warn(
            f"{directory} holds a trained adapter, which transformers attaches by itself: do not "
            "attach the one in loftq_init to it, or move the trained one elsewhere first",
            TrainedBeside,
            stacklevel=2,
        )


def start_of(output: Output) -> str:
    """The adapter that the conversion made, in its directory."""
    return f"{output.adapter_folder}{adapter.WEIGHTS}"


def start_is_replaced(output: Output) -> bool:
    """Whether ``loftq_init`` holds another adapter than the one that the conversion made. Raises
    OSError if it cannot be read."""
    start = start_of(output)
    file = output.directory / start
    entries = [entry for entry in output.manifest["outputs"] if entry["name"] == start]
    size, sha256 = (entries[0]["size"], entries[0]["sha256"]) if entries else (0, "")
    return file.stat().st_size != size or file_sha256(file) != sha256


def _is_backbone_of(other: Output, output: Output) -> bool:
    """Whether the weights of ``other`` are those that ``output`` is an adapter for."""
    held = {entry["sha256"] for entry in other.manifest["outputs"]}
    files = output.manifest.get("backbone", {}).get("files", ())
    return bool(files) and held >= {file["sha256"] for file in files}


def refuse_other_conversion(output: Output, file: Path, config: Mapping[str, Any]) -> None:
    """Raise InputError if the adapter in ``file`` was trained on another conversion, or is the
    start of one. PEFT records the path that the backbone was loaded from; for a start nothing is
    recorded, and it lies in its conversion."""
    base = config.get("base_model_name_or_path")
    if not base and file.absolute() == output.directory.absolute() / start_of(output):
        return  # its own, which is the usual case: no other manifest is read
    if isinstance(base, str) and base:
        other, what = _conversion_in(Path(base)), "trained on"
        hint = "take that one, or correct base_model_name_or_path in its config"
    else:
        other, what = _conversion_around(file), "the start of"
        hint = f"give one that was trained on {output.directory}"
    if other is None or other.origin == output.origin or _is_backbone_of(other, output):
        return
    raise InputError(
        f"{file}: {what} {other.directory}, another conversion than {output.directory}", hint=hint
    )


def _conversion_in(directory: Path) -> Output | None:
    """The conversion in ``directory``; None if it was moved, renamed, or never a path."""
    try:
        return open_output(directory)
    except (LoftqError, OSError, ValueError):
        return None


def _conversion_around(start: Path) -> Output | None:
    """The conversion whose start is the file ``start``; None if it is nobody's."""
    file = start.absolute()
    for directory in (file.parent, file.parent.parent):
        found = _conversion_in(directory)
        if found is not None and directory / start_of(found) == file:
            return found
    return None
