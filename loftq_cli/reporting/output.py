"""An output directory: its manifest, checked, and its files, verified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.durable import file_sha256
from loftq_cli.checkpoint.header import strict_json
from loftq_cli.checkpoint.source import is_plain_name
from loftq_cli.errors import InputError, SourceNotFoundError, VerificationError
from loftq_cli.layouts.base import Matrix

MANIFEST = "loftq_manifest.json"
FORMAT_VERSION = 1
_MAX_MANIFEST_BYTES = 256 << 20


@dataclass(frozen=True)
class Output:
    """A finished conversion."""

    directory: Path
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def records(self) -> list[dict[str, Any]]:
        """The manifest's entries of the quantized matrices."""
        return list(self.manifest["matrices"])


def open_output(directory: Path) -> Output:
    """Read the manifest of ``directory``.

    Raises SourceNotFoundError where there is none (an unfinished conversion is named),
    VerificationError where it is broken, InputError where it is of a newer format.
    """
    path = directory / MANIFEST
    if not path.is_file():
        partial = directory.absolute().parent / f".{directory.absolute().name}.loftq-partial"
        if partial.exists():
            raise SourceNotFoundError(
                f"{directory}: the conversion is not finished",
                hint="run the same `loftq convert` command again, it resumes",
            )
        raise SourceNotFoundError(
            f"{directory}: no {MANIFEST}, this is not the output of a conversion",
            hint="give the directory that `loftq convert` wrote",
        )
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise VerificationError(f"{path}: larger than 256 MiB")
        manifest = strict_json(path.read_bytes())
    except OSError as error:
        raise VerificationError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise VerificationError(f"{path}: not valid JSON: {error}") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int):
        raise VerificationError(f"{path}: no format_version")
    if version > FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {version}, this loftq reads up to {FORMAT_VERSION}",
            hint="pip install --upgrade loftq-cli",
        )
    _check_fields(path, manifest)
    return Output(directory, manifest)


def verify(output: Output) -> int:
    """Re-hash every file of ``output``; the number of files. Raises VerificationError with every
    file that is missing or altered."""
    faults = []
    entries = output.manifest["outputs"]
    for entry in entries:
        path = output.directory / entry["name"]
        try:
            size = path.stat().st_size
            if size != entry["size"]:
                faults.append(f"{entry['name']}: {size} bytes, the manifest says {entry['size']}")
            elif file_sha256(path) != entry["sha256"]:
                faults.append(f"{entry['name']}: the contents were altered")
        except OSError as error:
            faults.append(f"{entry['name']}: {error.strerror or error}")
    if faults:
        raise VerificationError(f"{output.directory}: " + "; ".join(faults))
    return len(entries)


def matrix_of(record: Mapping[str, Any]) -> Matrix:
    """The matrix that a manifest entry describes."""
    rows, columns = record["shape"]
    return Matrix(
        record["name"],
        (rows, columns),
        record["dtype"],
        record["method"],
        record["bits"],
        record["block_size"],
    )


def _check_fields(path: Path, manifest: dict[str, Any]) -> None:
    """What the readers rely on; the whole schema is loftq_cli/manifest.schema.json."""
    kinds: dict[str, type] = {
        "fingerprint": str,
        "recipe": dict,
        "source": dict,
        "matrices": list,
        "passed_through": list,
        "totals": dict,
        "outputs": list,
        "environment": dict,
    }
    for field, kind in kinds.items():
        if not isinstance(manifest.get(field), kind):
            raise VerificationError(f"{path}: the field {field!r} is missing or damaged")
    for entry in manifest["outputs"]:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not all(is_plain_name(part) for part in name.split("/")):
            raise VerificationError(f"{path}: bad entry in outputs: {entry!r}")
