"""``python -m tests.benchmarks [NAME ...]``: print the tables that docs/algorithm.md keeps."""

from __future__ import annotations

import importlib
import sys
import time

NAMES = (
    "residual",
    "mixed",
    "embeddings",
    "propagate",
    "choices",
    "speed",
    "svd",
    "weighted",
    "calibration",
    "memory",
    "overlap",
    "dequantize",
    "launches",
)


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        sys.exit(f"unknown benchmark {unknown[0]!r}; there are: {', '.join(NAMES)}")
    for name in names or NAMES:
        started = time.monotonic()
        module = importlib.import_module(f"tests.benchmarks.{name}")
        print(f"\n## {name}: {module.__doc__.splitlines()[0]}\n", flush=True)
        module.main()
        print(f"\n({time.monotonic() - started:.0f} s)", flush=True)


main(sys.argv[1:])
