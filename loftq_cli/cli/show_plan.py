"""What ``--dry-run`` of a conversion shows: matrices, what is passed through, and what it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loftq_cli.cli import console
from loftq_cli.cli.show import kinds, needs_line, shrinking


def plan(found: Mapping[str, Any], *, as_json: bool) -> None:
    """What ``--dry-run`` found."""
    if as_json:
        console.json_object(found)
        return
    _selected(found["selected"])
    _passed_through(found["passed_through"])
    totals, recipe = found["totals"], found["recipe"]
    needed, free = (console.size(found[name]) for name in ("disk_bytes", "free_disk_bytes"))
    console.pairs(
        "plan",
        [
            ("source", found["source"]["id"]),
            ("output", found["output"]),
            ("method", f"{kinds(found['selected'])}, blocks of {recipe['block_size']}"),
            ("layout", recipe["layout"]),
            ("backbone", shrinking(totals)),
            ("adapter", console.size(totals["adapter_bytes"])),
            ("bits per weight", f"{totals['bits_per_weight']:.3f}"),
            ("memory", f"{console.size(found['memory_bytes'])} above importing torch"),
            ("disk", f"{needed} of {free} free"),
            *_download(found["download"]),
            ("needs", needs_line(found["needs"])),
        ],
    )
    console.line("nothing was written (dry run)")


def _selected(entries: Sequence[Mapping[str, Any]]) -> None:
    console.table(
        f"selected: {len(entries)} matrices",
        ("tensor", "shape", "dtype", "bits", "rank", "before", "after", "why"),
        [
            (
                entry["name"],
                console.shape(entry["shape"]),
                entry["dtype"],
                "?" if entry["bits"] is None else str(entry["bits"]),
                str(entry["rank"]),
                console.size(entry["source_bytes"]),
                "?" if entry["bits"] is None else console.size(entry["backbone_bytes"]),
                entry["reason"],
            )
            for entry in entries
        ],
    )


def _passed_through(entries: Sequence[Mapping[str, Any]]) -> None:
    console.table(
        f"passed through: {len(entries)} tensors",
        ("tensor", "shape", "dtype", "bytes", "why"),
        [
            (
                entry["name"],
                console.shape(entry["shape"]),
                entry["dtype"],
                console.size(entry["bytes"]),
                entry["reason"],
            )
            for entry in entries
        ],
    )


def _download(download: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not download["files"]:
        return []
    files = "1 file" if download["files"] == 1 else f"{download['files']} files"
    amount = f"{console.size(download['bytes'])} in {files}"
    at_once = f"at most {console.size(download['disk_bytes'])} at a time"
    return [("download", f"{amount} to {download['directory']}, {at_once}")]
