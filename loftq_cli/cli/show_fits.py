"""What ``loftq plan`` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loftq_cli.cli import console
from loftq_cli.settings.sizes import binary

if TYPE_CHECKING:
    from loftq_cli.cli.narrator import Narrator

_NARROW = 72  # columns that a row needs
_SHORT = {"with checkpointing": "checkpointed", None: ""}


def show(found: Mapping[str, Any], narrator: Narrator, *, as_json: bool) -> None:
    """A row for each setting, and what to type for the best that fits."""
    for each in found["refused"]:
        narrator.note(f"{each['bits']} bits in layout {each['layout']}: {each['reason']}")
    if found["unknown"]:
        narrator.note(
            f"what a training step takes cannot be counted: {found['unknown']}; what fits is "
            "judged by the rest, at three quarters of the memory"
        )
    if as_json:
        console.json_object(found)
        return
    marked = found["memory_bytes"] is not None
    columns = ["bits", "rank", "layout", "disk", "load", "train", "checkpointed"]
    columns += ["fits"] if marked else []
    title = (
        f"{found['source']['id']}: {found['parameters']:,} parameters, trained with "
        f"{found['batch']} x {found['length']} tokens in {found['dtype']}"
    )
    rows = [_cells(row, marked) for row in found["rows"]]
    if console.width() < _NARROW:
        console.line(title)  # a table would lose columns
        for row in rows:
            console.pairs("", list(zip(columns, row, strict=True)))
    else:
        console.table(title, columns, rows)
    console.line("load and train: bytes of tensors; checkpointed: with gradient checkpointing")
    if marked:
        _verdict(found)


def _cells(row: Mapping[str, Any], marked: bool) -> Sequence[str]:
    cells = [
        str(row["bits"]),
        str(row["rank"]),
        row["layout"],
        console.size(row["disk_bytes"]),
        *(_or_unknown(row[key]) for key in ("load_bytes", "train_bytes")),
        _or_unknown(row["checkpointed_train_bytes"]),
    ]
    return [*cells, _SHORT.get(row["fits"], row["fits"])] if marked else cells


def _or_unknown(nbytes: int | None) -> str:
    return "?" if nbytes is None else binary(nbytes)


def _verdict(found: Mapping[str, Any]) -> None:
    room, best = binary(found["memory_bytes"]), found["best"]
    if best is None:
        _nothing(found, room)
        return
    how = {"yes": "", "perhaps": ", perhaps"}.get(best["fits"], ", with gradient checkpointing")
    console.line(f"best that fits {room}: {best['bits']} bits, rank {best['rank']}{how}")
    console.line(f"next: {found['command']}")


def _nothing(found: Mapping[str, Any], room: str) -> None:
    keys = ("train_bytes", "checkpointed_train_bytes")
    known = [(row[key], row, key) for row in found["rows"] for key in keys if row[key] is not None]
    if not known:
        console.line(f"nothing fits {room}")
        return
    least, row, key = min(known, key=lambda item: item[0])
    part = row["activations_bytes" if key == keys[0] else "checkpointed_activations_bytes"]
    how = "" if key == keys[0] else ", with gradient checkpointing"
    console.line(
        f"nothing fits {room}: the least is {binary(least)}, at {row['bits']} bits and rank "
        f"{row['rank']}{how}"
    )
    console.line(
        f"of that, {binary(part)} are activations: try a smaller --length, --batch or --rank"
    )
