"""An output directory: its manifest, checked, and its files, verified."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.header import shown, strict_json
from loftq_cli.checkpoint.lfs import refuse_pointer, refuse_pointers
from loftq_cli.checkpoint.names import ADAPTER_CONFIG, ADAPTER_FOLDER, is_plain_name
from loftq_cli.checkpoint.schema import faults, manifest_schema
from loftq_cli.errors import InputError, SourceNotFoundError, UsageError, VerificationError
from loftq_cli.machine.durable import file_sha256, readable
from loftq_cli.machine.threads import side_by_side

MANIFEST = "loftq_manifest.json"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 256 << 20
_MOST_FAULTS = 5  # are listed


@dataclass(frozen=True)
class Output:
    """A finished conversion."""

    directory: Path
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def origin(self) -> str:
        """The fingerprint of the conversion that this one's codes are of: an export's are another
        one's, unless a trained adapter was merged into them."""
        exported = self.manifest.get("exported", {})
        if "merged" in exported:
            return self.fingerprint
        return str(exported.get("fingerprint", self.fingerprint))

    @property
    def has_adapter(self) -> bool:
        """Whether there is a start: codes that a trained adapter was merged into have none."""
        return any(name.endswith(ADAPTER_CONFIG) for name in self._names)

    @property
    def has_backbone(self) -> bool:
        """Whether the backbone is here, too; an adapter for one that exists may be alone."""
        return bool(self.manifest["recipe"].get("backbone") != "named")

    @property
    def is_adapted(self) -> bool:
        """Whether it is an adapter for a backbone that existed before."""
        return "backbone" in self.manifest

    @property
    def is_foreign(self) -> bool:
        """Whether somebody else quantized the backbone."""
        return any("held" in record for record in self.manifest["matrices"])

    @property
    def adapter_folder(self) -> str:
        """Where the adapter is, with a slash behind it; empty if it is all that there is."""
        return f"{ADAPTER_FOLDER}/" if self.has_backbone else ""

    @property
    def _names(self) -> list[str]:
        start = self.adapter_folder
        names = [entry["name"] for entry in self.manifest["outputs"]]
        return [name for name in names if name.rpartition("/")[0] == start.removesuffix("/")]

    @property
    def records(self) -> list[dict[str, Any]]:
        """The manifest's entries of the quantized matrices."""
        return list(self.manifest["matrices"])


def open_output(directory: Path) -> Output:
    """Read the manifest of ``directory``.

    Raises SourceNotFoundError if there is none (an unfinished conversion is named), and what
    :func:`read_manifest` raises.
    """
    path = directory / MANIFEST
    if not os.path.isfile(path):  # Path.is_file raises if a name is too long
        partial = directory.absolute().parent / f".{directory.absolute().name}.loftq-partial"
        if os.path.exists(partial):
            raise SourceNotFoundError(
                f"{directory}: the conversion is not finished",
                hint="run the same `loftq convert` command again, it resumes",
            )
        if not os.path.exists(directory):
            raise SourceNotFoundError(
                f"{directory}: no such directory",
                hint="give the directory that `loftq convert` wrote",
            )
        raise SourceNotFoundError(
            f"{directory}: no {MANIFEST}, this is not the output of a conversion",
            hint="give the directory that `loftq convert` wrote",
        )
    return Output(directory, read_manifest(path))


def require_backbone(output: Output) -> None:
    """Raise UsageError if ``output`` is an adapter alone."""
    if not output.has_backbone:
        raise UsageError(
            f"{output.directory} is an adapter without its backbone, "
            f"{output.manifest['backbone']['id']}",
            hint="`loftq adapt --with-backbone` writes both to one directory",
        )


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest at ``path``. Raises VerificationError if it is broken, CorruptFileError if
    it is a pointer of git-lfs, InputError if it is of a newer format, EnvironmentFailure if it
    cannot be read."""
    refuse_pointer(path)
    try:
        with readable(path):
            if path.stat().st_size > MAX_MANIFEST_BYTES:
                raise VerificationError(f"{path}: larger than 256 MiB")
            raw = path.read_bytes()
        manifest = strict_json(raw)
    except OSError as error:
        raise VerificationError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise VerificationError(f"{path}: not valid JSON: {error}") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if type(version) is not int or version < 1:
        raise VerificationError(f"{path}: no format_version")
    if version > FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {version}, this loftq reads up to {FORMAT_VERSION}",
            hint="pip install --upgrade loftq-cli",
        )
    found: dict[str, Any] = manifest
    _check(path, found)
    return found


def relative(records: Sequence[Mapping[str, Any]], which: str) -> float:
    """sqrt(sum of squared residuals / sum of squared weights); 0 if all weights are zero."""
    residual = math.fsum(record["frobenius"][which] ** 2 for record in records)
    weight = math.fsum(record["frobenius"]["weight"] ** 2 for record in records)
    return math.sqrt(residual / weight) if weight else 0.0


def file_entries(directory: Path, threads: int = 1) -> list[dict[str, Any]]:
    """``outputs`` of a manifest: every file below ``directory``, by name; hashed in so many
    ``threads``."""

    def entry(path: Path) -> dict[str, Any]:
        return {
            "name": path.relative_to(directory).as_posix(),
            "size": path.stat().st_size,
            "sha256": file_sha256(path),
        }

    paths = [Path(folder) / name for folder, _, names in os.walk(directory) for name in names]
    return sorted(side_by_side(entry, paths, threads), key=lambda found: str(found["name"]))


def verify(output: Output) -> int:
    """Re-hash every file of ``output``; the number of files. Raises VerificationError with every
    file that is missing or altered, CorruptFileError if there are pointers of git-lfs,
    EnvironmentFailure if a file cannot be read."""
    faults = []
    entries = output.manifest["outputs"]
    refuse_pointers(output.directory, (entry["name"] for entry in entries))
    for entry in entries:
        path = output.directory / entry["name"]
        try:
            with readable(path):
                size = path.stat().st_size
                altered = size == entry["size"] and file_sha256(path) != entry["sha256"]
        except OSError as error:
            faults.append(f"{entry['name']}: {error.strerror or error}")
            continue
        if size != entry["size"]:
            faults.append(f"{entry['name']}: {size} bytes, the manifest says {entry['size']}")
        elif altered:
            faults.append(f"{entry['name']}: the contents were altered")
    if faults:
        raise VerificationError(f"{output.directory}: " + "; ".join(faults))
    return len(entries)


def _check(path: Path, manifest: dict[str, Any]) -> None:
    """Every field is what the format says, so that no reader meets another."""
    wrong = list(islice(faults(manifest, manifest_schema()), _MOST_FAULTS))
    wrong += [
        f"outputs: {shown(entry['name'])} is not a file in the output"
        for entry in (manifest["outputs"] if not wrong else ())
        if not all(is_plain_name(part) for part in entry["name"].split("/"))
    ]
    if wrong:
        raise VerificationError(f"{path}: the manifest is damaged: " + "; ".join(wrong))
