"""The model card of a conversion that is sent to the hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loftq_cli.checkpoint.locate import Place
from loftq_cli.checkpoint.output import MANIFEST, Output
from loftq_cli.errors import printable
from loftq_cli.layouts import adapter
from loftq_cli.reporting import evaluations, summary
from loftq_cli.reporting.inspect import inspect, snippet
from loftq_cli.reporting.rows import EVALUATED
from loftq_cli.reporting.summary import Kind

WORST = 5
"""How many matrices are listed."""

_LONGEST = 200  # characters of a setting's value: some list hundreds of names

_CARD = """
# {name}

{about}

```python
{loading}
```

{facts}

The residual is the norm of {residual} over all quantized matrices, relative to that of W: how near
the weights are, not how good the model is.

{evaluated}## Residuals

{picture}A character a block, from the first to the last, by the median residual of its matrices:
{scale}.

```
{strips}
```

## Recipe

{settings}

## Matrices furthest from their originals

{worst}

`{manifest}` has the residuals of every matrix and step, and the sha256 of every file.
"""


_START = """{base}, quantized, with a LoRA adapter that makes up for the quantization
([LoftQ](https://arxiv.org/abs/2310.08659)): Q + B·A ≈ W, matrix by matrix. Fine-tuning starts from
the adapter in `{adapter}/` instead of from zero."""

_ADAPTER = """A LoRA adapter that makes up for the quantization of {backbone}
([LoftQ](https://arxiv.org/abs/2310.08659)): Q + B·A ≈ W, matrix by matrix, W those of {base}.
The backbone stays as it is. Fine-tuning starts from this adapter instead of from zero."""

_MERGED = """{base}, fine-tuned from a quantized start
([LoftQ](https://arxiv.org/abs/2310.08659)), merged with what was trained and
quantized once more."""


def metadata(output: Output) -> dict[str, Any]:
    """The fields by which the hub lists the model as a quantization of its base, and as an adapter
    of it. Without a base if the source was a directory, which says nothing to others."""
    if output.is_adapted:
        return _of_adapter(output)
    source = output.manifest["source"]
    base = source["id"] if source["revision"] else None
    tags = [
        "loftq",
        *(["lora", "peft"] if output.has_adapter else []),
        *sorted({f"{record['bits']}-bit" for record in output.records}),
    ]
    if base is not None and output.has_adapter:
        tags.append(f"base_model:adapter:{base}")  # as PEFT itself tags an adapter
    return {
        "base_model": base,
        "base_model_relation": "quantized" if base else None,
        "library_name": "transformers",
        "tags": tags,
    }


def _of_adapter(output: Output) -> dict[str, Any]:
    """The fields of an adapter for a backbone that is somewhere else on the hub."""
    base = named_backbone(output)
    return {
        "base_model": base,
        "base_model_relation": "adapter" if base else None,
        "library_name": "peft",
        "tags": ["loftq", "lora", *([f"base_model:adapter:{base}"] if base else [])],
    }


def named_backbone(output: Output) -> str | None:
    """The hub id of the backbone that an adapter is for; None if it is a path."""
    backbone, named = output.manifest["backbone"], output.manifest["recipe"]["base_model"]
    return named or (backbone["id"] if backbone["revision"] else None)


def body(output: Output, repo_id: str, picture: str | None = None) -> str:
    """The card below its metadata, in Markdown. ``picture`` is a file beside it."""
    found = inspect(Place(output.directory))
    kinds = summary.kinds(found["layers"])
    scale, strips = _strips(kinds)
    evaluated = evaluations.of_start(evaluations.saved(output))
    source, totals = found["source"], found["totals"]
    base = f"`{source['id']}` at `{source['revision']}`" if source["revision"] else "A checkpoint"
    about = _START if output.has_adapter else _MERGED
    backbone = ""
    if output.is_adapted:
        about, backbone = _ADAPTER, f"`{named_backbone(output) or 'a checkpoint'}`"
    settings = [
        (f"`{name}`", f"`{value}`")
        for name, value in found["recipe"].items()
        if value not in (None, [], ()) and len(str(value)) <= _LONGEST
    ]
    worst = sorted(output.records, key=lambda record: -_relative(record, "final"))[:WORST]
    return _CARD.format(
        name=repo_id.rpartition("/")[2],
        about=about.format(base=base, adapter=adapter.DIRECTORY, backbone=backbone),
        residual="W - Q - B·A" if output.has_adapter else "W - Q, W the trained weights,",
        loading=snippet(output, repo_id),
        facts=_table(("", ""), _facts(found, totals)),
        evaluated=_evaluated(evaluated),
        picture="" if picture is None else f"![{_alt(found)}]({picture})\n\n",
        scale=scale,
        strips=strips,
        settings=_table(("setting", "value"), settings),
        worst=_table(
            ("tensor", "bits", "rank", "residual", "of the quantization alone"),
            [
                (
                    f"`{record['name']}`",
                    str(record["bits"]),
                    str(record["rank"]),
                    f"{_relative(record, 'final'):.4f}",
                    f"{_relative(record, 'quantized'):.4f}",
                )
                for record in worst
            ],
        ),
        manifest=MANIFEST,
    )


def _facts(found: Mapping[str, Any], totals: Mapping[str, Any]) -> list[tuple[str, str]]:
    before, after, beside = (
        f"{totals[name] / 1e9:.3f} GB"
        for name in ("source_bytes", "backbone_bytes", "adapter_bytes")
    )
    plain, final = totals["relative_residual_quantized"], totals["relative_residual"]
    return [
        (
            "quantized",
            f"{len(found['layers'])} matrices; {found['passed_through']} tensors are as they were",
        ),
        (
            "bits per weight",
            f"{totals['bits_per_weight']:.3f} stored, scales included; "
            f"{totals['bits_per_weight_with_adapter']:.3f} with the adapter",
        ),
        ("size", f"{before} before; {after}, and {beside} of adapter, after"),
        ("relative residual", f"{final:.4f} with the adapter, {plain:.4f} without"),
        ("made by", f"{found['tool']['name']} {found['tool']['version']}"),
    ]


def _strips(kinds: Sequence[Kind]) -> tuple[str, str]:
    """What the characters stand for, and a line of them for each kind of layer."""
    between = summary.bounds(kinds)
    deep = [kind for kind in kinds if kind.depth]
    if between is None:
        return "no matrix is in a block", "\n".join(printable(kind.name) for kind in kinds)
    width = max(len(printable(kind.name)) for kind in deep)
    marks = summary.MARKS
    lines = [
        f"{printable(kind.name).ljust(width)}  {summary.strip(kind.depth, between)}"
        for kind in deep
    ]
    return f"{marks[0]} is {between[0]:.4f}, {marks[-1]} is {between[1]:.4f}", "\n".join(lines)


def _evaluated(entries: Sequence[Mapping[str, Any]]) -> str:
    """What `loftq evaluate --save` found, a row for each text."""
    shown = [each for each in EVALUATED if any(entry[each[1]] is not None for entry in entries)]
    if not shown:
        return ""
    rows = [
        (
            f"{entry['samples']} windows of {entry['length']} tokens",
            *("" if entry[key] is None else form.format(entry[key]) for _, key, form in shown),
        )
        for entry in entries
    ]
    columns = ("text", *(title for title, _, _ in shown))
    return f"## Evaluation\n\nOf the start, before any training.\n\n{_table(columns, rows)}\n\n"


def _alt(found: Mapping[str, Any]) -> str:
    """What the picture shows, for who does not see it."""
    return (
        f"Residuals by kind of layer and block, {found['totals']['relative_residual']:.4f} over all"
    )


def _relative(record: Mapping[str, Any], which: str) -> float:
    norms = record["frobenius"]
    return float(norms[which] / (norms["weight"] or 1.0))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in cells)


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")
