"""``make report-check``, first half: pages of manifests of all sizes, and what must be in them.

``python -m tests.whole.pages.case DIRECTORY [CONVERSION …]``: pages of real conversions as well.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import loftq_cli
from loftq_cli.reporting import summary
from tests.support import manifests

MOST_BYTES = 2_000_000
"""Of a report on a model of 70 billion parameters."""


def main(place: Path, conversions: list[Path]) -> None:
    place.mkdir(parents=True, exist_ok=True)
    made = {
        "llama-2-70b": manifests.write(place / "a" / "70b", manifests.large()),
        "experts": manifests.write(place / "a" / "experts", manifests.large(experts=5)),
        "plain": manifests.write(
            place / "a" / "plain", manifests.large(layers=12, weighted=False, bits=3, rank=16)
        ),
        **{path.name: path for path in conversions},
    }
    pages = {name: page(place / f"{name}.html", path) for name, path in made.items()}
    two = [manifests.write(place / "b" / str(bits), manifests.large(bits=bits)) for bits in (2, 4)]
    loftq_cli.compare(*two, html=place / "compared.html")
    pages["compared"] = {"labels": ["2", "4"]}
    (place / "expected.json").write_text(json.dumps(pages))


def page(file: Path, conversion: Path) -> dict[str, Any]:
    """Write the page on ``conversion``; what it has to show."""
    report = loftq_cli.error_report(conversion, html=file)
    size = file.stat().st_size
    print(f"{file.name}: {len(report['layers'])} matrices, {size / 1e6:.2f} MB")
    assert size < MOST_BYTES
    layers = {layer["name"]: layer for layer in report["layers"]}
    cells: dict[str, list[str]] = {}
    for name, spot in summary.places(report["layers"]).items():
        if spot.block is not None:
            cells.setdefault(f"{spot.kind}/{spot.block}", []).append(name)
    return {
        "matrices": {
            name: [f"{each['relative_residual_quantized']:.4f}", f"{each['relative_residual']:.4f}"]
            for name, each in layers.items()
        },
        "cells": {
            cell: round(median(layers[name]["relative_residual"] for name in names), 4)
            for cell, names in cells.items()
        },
        "weighted": "weighted_residual" in report["totals"],
        "residual": f"{report['totals']['relative_residual']:.4f}",
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("place", type=Path)
    parser.add_argument("conversions", type=Path, nargs="*")
    main(**vars(parser.parse_args()))
