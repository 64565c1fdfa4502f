"""What the last full sweep found: docs/results/zoo.json, a line for each class."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[3] / "docs/results/zoo.json"


@dataclass(frozen=True)
class Verdict:
    """What became of a class: ``kind`` "right", "refused" before anything was computed, "unbuilt",
    or what is wrong; ``share``: how much of the weights in blocks was quantized, in percent."""

    kind: str
    detail: str = ""
    share: int | None = None


@dataclass(frozen=True)
class Found:
    """A class with its ``verdict``."""

    mapping: str
    model_type: str
    architecture: str
    verdict: Verdict


@dataclass(frozen=True)
class Results:
    """``about``: the day and the versions."""

    about: dict[str, str]
    found: list[Found]

    def verdict(self, mapping: str, model_type: str) -> Verdict | None:
        """That of a class, None if there is none."""
        for each in self.found:
            if (each.mapping, each.model_type) == (mapping, model_type):
                return each.verdict
        return None


def write(results: Results) -> None:
    lines = ",\n".join(json.dumps(asdict(each)) for each in results.found)
    text = f'{{"about": {json.dumps(results.about)}, "found": [\n{lines}\n]}}\n'
    FILE.write_text(text, "utf-8")


def read() -> Results:
    held = json.loads(FILE.read_text("utf-8"))
    return Results(held["about"], [_found(each) for each in held["found"]])


def _found(held: dict[str, Any]) -> Found:
    return Found(**{**held, "verdict": Verdict(**held["verdict"])})
