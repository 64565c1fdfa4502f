"""``make fuzz``: atheris over every target, its coverage guiding it, the minutes shared equally.

A finding is left in tests/whole/hostile/findings under the target's name; `make test` replays what
lies there, so that it stays found.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FINDINGS = Path(__file__).with_name("findings")
_LONGEST = 4096  # bytes of an input


def one(name: str, seconds: int) -> None:
    """Fuzz one target; does not return."""
    import atheris

    with atheris.instrument_imports(include=["loftq_cli"]):
        from tests.whole.hostile.targets import TARGETS

    run, seeds = TARGETS[name]
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as scratch:
        corpus, work = Path(scratch) / "corpus", Path(scratch) / "work"
        corpus.mkdir()
        work.mkdir()
        for number, seed in enumerate(seeds):
            (corpus / str(number)).write_bytes(seed)
        options = [
            f"-max_total_time={seconds}",
            f"-max_len={_LONGEST}",
            f"-artifact_prefix={FINDINGS}/{name}-",
            "-print_final_stats=1",
            "-verbosity=0",
        ]
        atheris.Setup(["fuzz", *options, str(corpus)], lambda data: run(work, data))
        atheris.Fuzz()


def main() -> int:
    """Fuzz every target in a process of its own; 1 where anything was found."""
    from tests.whole.hostile.targets import TARGETS

    seconds = int(60 * float(os.environ.get("MINUTES") or 30) / len(TARGETS))
    found = 0
    for name in TARGETS:
        command = [sys.executable, "-m", "tests.whole.hostile.fuzz", name, str(seconds)]
        run = subprocess.run(command, capture_output=True, text=True)
        said = run.stdout + run.stderr
        executed = re.search(r"number_of_executed_units: (\d+)", said)
        count = f"{int(executed.group(1)):,} inputs" if executed else "did not finish"
        print(f"{name}: {count} in {seconds} s, exit code {run.returncode}", flush=True)
        if run.returncode:
            print(said[-4000:], flush=True)
            found = 1
    return found


if __name__ == "__main__":
    if len(sys.argv) > 1:
        one(sys.argv[1], int(sys.argv[2]))
    else:
        sys.exit(main())
