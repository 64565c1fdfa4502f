"""The only module that prints: results on stdout, everything else on stderr.

Bars are narrator.py's, which sends its lines through here. rich is imported where it is used, so
that ``loftq --help`` stays quick.
"""

from __future__ import annotations

import csv
import io
import json
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loftq_cli.errors import printable
from loftq_cli.machine import streams

if TYPE_CHECKING:
    from rich.table import Table

_PIPE_WIDTH = 200  # columns where stdout is not a terminal: names are not to be cut


def complain(text: str) -> None:
    """One line on stderr. Where nobody reads it any more, work goes on all the same."""
    try:
        print(f"loftq: {printable(text)}", file=sys.stderr)
    except OSError:
        streams.drop(sys.stderr)


def _json(value: Mapping[str, Any]) -> None:
    """A JSON object on stdout, keys sorted."""
    print(json.dumps(value, indent=2, sort_keys=True))


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """CSV on stdout."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    print(text.getvalue(), end="")


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; the first column is left-aligned, the others are numbers."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table: Table = Table(title=title, title_justify="left", title_style="bold", box=None)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(streams.showable(printable(cell), sys.stdout)) for cell in row))
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    console = Console(width=width, highlight=False)
    with console.capture() as text:  # rich would exit with 1 where the reader has gone
        console.print(table)
    print(text.get(), end="")


def _pairs(title: str, pairs: Sequence[tuple[str, str]]) -> None:
    """Labelled values on stdout, one a line."""
    width = max(len(label) for label, _ in pairs)
    print(printable(title))
    for label, value in pairs:
        print(f"  {label.ljust(width)}  {printable(value)}")


def _size(nbytes: float) -> str:
    """Bytes in decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    raise AssertionError


def show_plan(plan: Mapping[str, Any], *, as_json: bool) -> None:
    """What ``--dry-run`` found."""
    if as_json:
        _json(plan)
        return
    totals, recipe = plan["totals"], plan["recipe"]
    _table(
        f"selected: {len(plan['selected'])} matrices",
        ("tensor", "shape", "dtype", "bits", "rank", "before", "after", "why"),
        [
            (
                entry["name"],
                _shape(entry["shape"]),
                entry["dtype"],
                "?" if entry["bits"] is None else str(entry["bits"]),
                str(entry["rank"]),
                _size(entry["source_bytes"]),
                "?" if entry["bits"] is None else _size(entry["backbone_bytes"]),
                entry["reason"],
            )
            for entry in plan["selected"]
        ],
    )
    _table(
        f"passed through: {len(plan['passed_through'])} tensors",
        ("tensor", "shape", "dtype", "bytes", "why"),
        [
            (
                entry["name"],
                _shape(entry["shape"]),
                entry["dtype"],
                _size(entry["bytes"]),
                entry["reason"],
            )
            for entry in plan["passed_through"]
        ],
    )
    _pairs(
        "plan",
        [
            ("source", plan["source"]["id"]),
            ("output", plan["output"]),
            ("method", f"{_kinds(plan['selected'])}, blocks of {recipe['block_size']}"),
            ("layout", recipe["layout"]),
            ("backbone", f"{_size(totals['source_bytes'])} -> {_size(totals['backbone_bytes'])}"),
            ("adapter", _size(totals["adapter_bytes"])),
            ("bits per weight", f"{totals['bits_per_weight']:.3f}"),
            ("memory", f"{_size(plan['memory_bytes'])} above importing torch"),
            ("disk", f"{_size(plan['disk_bytes'])} of {_size(plan['free_disk_bytes'])} free"),
            *_download(plan["download"]),
            ("needs", _needs(plan["needs"])),
        ],
    )
    print("nothing was written (dry run)")


def _download(download: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not download["files"]:
        return []
    files = "1 file" if download["files"] == 1 else f"{download['files']} files"
    amount = f"{_size(download['bytes'])} in {files}"
    at_once = f"at most {_size(download['disk_bytes'])} at a time"
    return [("download", f"{amount} to {download['directory']}, {at_once}")]


def show_outcome(
    manifest: Mapping[str, Any],
    output: str,
    needs: Mapping[str, Any],
    *,
    nothing_to_do: bool,
    as_json: bool,
) -> None:
    """The summary at the end of a conversion, and what to type next."""
    if as_json:
        _json(manifest)
        return
    totals, environment = manifest["totals"], manifest["environment"]
    plain, final = totals["relative_residual_quantized"], totals["relative_residual"]
    _pairs(
        f"{output}, as it was" if nothing_to_do else f"wrote {output}",
        [
            ("matrices", f"{len(manifest['matrices'])}, {_kinds(manifest['matrices'])}"),
            ("layout", manifest["matrices"][0]["layout"]),
            ("backbone", f"{_size(totals['source_bytes'])} -> {_size(totals['backbone_bytes'])}"),
            ("adapter", _size(totals["adapter_bytes"])),
            ("bits per weight", f"{totals['bits_per_weight']:.3f}"),
            ("residual", f"{final:.4f} with the adapter, {plain:.4f} without (of the weights)"),
            ("time", f"{environment['seconds']:.1f} s on {environment['device']}"),
            ("peak memory", _size(environment["peak_host_bytes"])),
            ("needs", _needs(needs)),
        ],
    )
    print(f"next: loftq inspect {printable(shlex.quote(output))}")


def show_inspection(found: Mapping[str, Any], *, as_json: bool) -> None:
    """``loftq inspect``."""
    if as_json:
        _json(found)
        return
    _table(
        f"{len(found['layers'])} quantized matrices",
        ("tensor", "shape", "bits", "method", "rank", "layout", "bits/weight", "with adapter"),
        [
            (
                layer["name"],
                _shape(layer["shape"]),
                str(layer["bits"]),
                layer["method"],
                str(layer["rank"]),
                layer["layout"],
                f"{layer['bits_per_weight']:.3f}",
                f"{layer['bits_per_weight_with_adapter']:.3f}",
            )
            for layer in found["layers"]
        ],
    )
    totals, source = found["totals"], found["source"]
    revision = f" at {source['revision']}" if source["revision"] else ""
    pairs = [
        ("source", f"{source['id']}{revision}"),
        ("made by", f"{found['tool']['name']} {found['tool']['version']}"),
        ("widths", _kinds(found["layers"])),
        ("parameters", f"{totals['parameters']:,}"),
        ("passed through", f"{found['passed_through']} tensors"),
        ("backbone", f"{_size(totals['source_bytes'])} -> {_size(totals['backbone_bytes'])}"),
        ("adapter", _size(totals["adapter_bytes"])),
        (
            "bits per weight",
            f"{totals['bits_per_weight']:.3f}, "
            f"{totals['bits_per_weight_with_adapter']:.3f} with the adapter",
        ),
        ("residual", f"{totals['relative_residual']:.4f} of the weights"),
    ]
    if "trained_adapter" in found:
        taken = "not the conversion's own: load(DIR, adapter=…) and merge --adapter take it"
        pairs.append(("trained adapter", f"{found['trained_adapter']}, {taken}"))
    if found["verified_files"] is not None:
        pairs.append(("verified", f"{found['verified_files']} files match the manifest"))
    pairs.append(("needs", _needs(found["needs"])))
    _pairs(_titled(found), pairs)
    _show_loading(found["loading"])


def _titled(report: Mapping[str, Any]) -> str:
    """What a report is on: a directory, or a commit of a repository."""
    repository = report["repository"]
    if repository is None:
        return str(report["directory"])
    return f"{repository['repo_id']} at {repository['revision']}"


def _needs(needs: Mapping[str, Any]) -> str:
    """What the output needs where it is loaded and trained."""
    text = f"{', '.join(needs['imports'])}: {needs['install']}"
    missing = needs["missing"]
    return f"{text} ({', '.join(missing)} not installed here)" if missing else text


def show_merge(result: Mapping[str, Any], *, as_json: bool) -> None:
    """The summary at the end of ``loftq merge``, and how to load the result."""
    if as_json:
        _json(result)
        return
    pairs = [
        ("matrices", f"{result['matrices']}, {result['dtype'] or 'of several dtypes'}"),
        ("adapter", result["adapter"]),
        ("whole tensors", f"{len(result['replaced'])} replaced, {len(result['added'])} added"),
        ("size", _size(result["bytes"])),
        ("time", f"{result['seconds']:.1f} s"),
    ]
    _pairs(f"wrote {result['output']}", pairs)
    _show_loading(result["loading"])


def show_calibration(result: Mapping[str, Any], *, as_json: bool) -> None:
    """The summary at the end of ``loftq calibrate``, and what to type next."""
    if as_json:
        _json(result)
        return
    text = f"{result['samples']} windows of {result['length']} tokens, {result['tokens']:,} in all"
    pairs = [
        ("model", result["model"]),
        ("moments", f"{result['moments']}, {result['entries']} distinct inputs"),
        ("matrices", f"{result['matrices']}, {len(result['missing'])} without"),
        ("text", text),
        ("size", _size(result["bytes"])),
        ("time", f"{result['seconds']:.1f} s on {result['device']} in {result['dtype']}"),
    ]
    _pairs(f"wrote {result['output']}", pairs)
    model, output = (shlex.quote(result[key]) for key in ("model", "output"))
    print(f"next: loftq convert {printable(model)} --stats {printable(output)}")


def show_push(result: Mapping[str, Any], *, as_json: bool) -> None:
    """The summary at the end of ``loftq push``."""
    if as_json:
        _json(result)
        return
    pairs = [
        ("repository", f"{result['repo_id']}, {'private' if result['private'] else 'public'}"),
        ("revision", f"{result['revision']} at {result['commit']}"),
        ("files", f"{result['files']}, {_size(result['bytes'])}"),
    ]
    _pairs(f"sent to {result['url']}", pairs)


def _show_loading(snippet: str) -> None:
    print("load it with:\n")
    print("\n".join(f"    {line}".rstrip() for line in snippet.splitlines()))


def show_residuals(report: Mapping[str, Any], *, as_json: bool, as_csv: bool) -> None:
    """``loftq error-report``."""
    layers = report["layers"]
    if as_json:
        _json(report)
        return
    steps = max((len(layer["steps"]) for layer in layers), default=0)
    if as_csv:
        fields = ("name", "bits", "rank", "step", "weight", "quantized", "final")
        relative = ("relative_residual_quantized", "relative_residual")
        weighted = ("kind", "weight", "quantized", "final")
        header = [*fields, *relative, *(f"weighted_{name}" for name in weighted)]
        rows = [
            [
                *(layer[name] for name in fields + relative),
                *((layer["weighted"] or {}).get(name, "") for name in weighted),
                *layer["steps"],
            ]
            for layer in layers
        ]
        _csv([*header, *(f"step_{number}" for number in range(1, steps + 1))], rows)
        return
    title = "Frobenius residuals" + (", recomputed from the source" if report["recomputed"] else "")
    columns = [f"step {number}" for number in range(1, steps + 1)]
    _table(
        f"{title} (relative to the weights, but for the absolute one)",
        ("tensor", "absolute", "no adapter", *columns, "final", "final/no adapter"),
        [
            (
                layer["name"],
                f"{layer['final']:.4f}",
                f"{layer['relative_residual_quantized']:.4f}",
                *(f"{value / (layer['weight'] or 1):.4f}" for value in layer["steps"]),
                f"{layer['relative_residual']:.4f}",
                f"{layer['ratio']:.3f}",
            )
            for layer in layers
        ],
    )
    totals = report["totals"]
    _pairs(
        _titled(report),
        [
            ("without adapter", f"{totals['relative_residual_quantized']:.4f}"),
            ("with adapter", f"{totals['relative_residual']:.4f}"),
            ("worst layers", ", ".join(report["worst"])),
        ],
    )
    if "weighted_residual" in totals:
        _show_weighted(report)


def _show_weighted(report: Mapping[str, Any]) -> None:
    layers, totals = report["layers"], report["totals"]
    _table(
        "\nWeighted residuals, of the layers' outputs (relative)",
        ("tensor", "statistics", "no adapter", "final"),
        [
            (
                layer["name"],
                layer["weighted"]["kind"],
                f"{layer['weighted']['quantized'] / (layer['weighted']['weight'] or 1):.4f}",
                f"{layer['weighted']['final'] / (layer['weighted']['weight'] or 1):.4f}",
            )
            for layer in layers
            if layer["weighted"] is not None
        ],
    )
    _pairs(
        "weighted",
        [
            ("without adapter", f"{totals['weighted_residual_quantized']:.4f}"),
            ("with adapter", f"{totals['weighted_residual']:.4f}"),
        ],
    )
    print(
        "The plain residual says how near the weights are; the weighted one how near the outputs "
        "are on text like that measured. Neither is the model's score."
    )


def _kinds(matrices: Sequence[Mapping[str, Any]]) -> str:
    """Widths and methods of ``matrices``, with their counts where there are several."""
    counts = Counter(
        (matrix["bits"], matrix["method"]) for matrix in matrices if matrix["bits"] is not None
    )
    named = [(f"{bits}-bit {method}", count) for (bits, method), count in sorted(counts.items())]
    unsettled = len(matrices) - counts.total()
    if unsettled:
        named.append(("widths that a pass over the weights will settle", unsettled))
    if len(named) == 1 and not unsettled:
        return named[0][0]
    return ", ".join(f"{count} in {kind}" for kind, count in named)


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(str(side) for side in shape) or "scalar"
