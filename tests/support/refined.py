"""Refinements of small models, as tests ask for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loftq_cli
from tests.support.calibrated import LENGTH

SETTINGS: dict[str, Any] = {"bits": 2, "rank": 4, "iters": 1, "threads": 1, "block_size": 64}
ASKED: dict[str, Any] = {"length": LENGTH, "samples": 20, "epochs": 4, "device": "cpu"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "loftq": {"layout": "loftq", "method": "fitted"},
    "trellis": {"layout": "loftq", "method": "trellis", "scale_dtype": "bfloat16"},
    "gptq": {"layout": "gptq"},
    "bnb": {"layout": "bnb", "bits": 4},
    "compressed": {"layout": "compressed", "method": "uniform-symmetric"},
    "dense": {"layout": "dense"},
    "int8": {"layout": "loftq", "method": "uniform", "scale_dtype": "int8", "embeddings": True},
}


def refine(place: Path, name: str, to: str, kind: str = "llama", **options: Any) -> dict[str, Any]:
    return loftq_cli.refine(
        place / name, place / to, source=place / kind, text=place / "text.txt",
        **{**ASKED, **options},
    )  # fmt: skip
