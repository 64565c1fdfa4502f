"""``make gpu``: a CUDA device, tested and measured, in eight minutes at most, without network and
without pytest: what is imported is torch, triton, transformers, peft and loftq's own few packages.

Parts run one after the other (checks.py, measure.py). One that fails is reported and the next one
runs; one for which no time is left is said not to be measured. What was found is printed, and kept
as Markdown for docs/results/gpu.md.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.whole.gpu import checks, measure
from tests.whole.gpu.scale import FULL, Scale

Part = Callable[[torch.device, Scale, Path], list[str]]
"""Lines of Markdown; raises AssertionError, or whatever else went wrong."""

PARTS: tuple[tuple[str, Part], ...] = (
    ("Every method gives what the CPU gives", checks.methods),
    ("Kernels in Triton give what tensor operations give", checks.kernels),
    ("A model's whole way", checks.whole_way),
    ("All devices give the bytes of one", checks.several),
    ("Roofs", measure.roofs),
    ("Seconds a matrix", measure.matrices),
    ("Decoding", measure.decoding),
    ("A checkpoint from disk to output", measure.checkpoint),
    ("A training step", measure.training),
)


@dataclass
class _Report:
    file: Path
    failed: int = 0

    def say(self, *lines: str) -> None:
        print(*lines, sep="\n", flush=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


def run(
    device: torch.device, scale: Scale, place: Path, parts: tuple[tuple[str, Part], ...]
) -> int:
    """How many of the ``parts`` failed; what they found is in ``place``/gpu.md."""
    place.mkdir(parents=True, exist_ok=True)
    report = _Report(place / "gpu.md")
    report.file.unlink(missing_ok=True)
    name = torch.cuda.get_device_name(device)
    report.say(f"# {name}", "", f"torch {torch.__version__}", "")
    until = time.monotonic() + scale.seconds
    for title, part in parts:
        began = time.monotonic()
        if began > until:
            report.say(f"## {title}", "", "Not measured: no time was left.", "")
            continue
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            lines = part(device, scale, place)
        except Exception:
            report.failed += 1
            lines = ["**Failed.**", "", "```", traceback.format_exc().strip(), "```"]
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        took = f"{time.monotonic() - began:.1f} s, {peak:.2f} GiB of the device at most."
        report.say(f"## {title}", "", *lines, "", took, "")
    report.say(f"{report.failed} of {len(parts)} parts failed.")
    return report.failed


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("place", type=Path, help="a folder for the report and what is written")
    arguments.add_argument("--device", default="cuda:0")
    given = arguments.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was tested, nothing measured")
        return 0
    return min(run(torch.device(given.device), FULL, given.place, PARTS), 1)


if __name__ == "__main__":
    raise SystemExit(main())
