"""Peak memory of a process is its own."""

from __future__ import annotations

import subprocess
import sys

from loftq_cli.machine.peak_memory import peak_host_bytes

CHILD = "from loftq_cli.machine.peak_memory import peak_host_bytes; print(peak_host_bytes())"


def test_the_peak_grows_with_what_is_touched_and_is_not_inherited():
    before = peak_host_bytes()
    ballast = bytearray(b"x") * (200 << 20)
    peak = peak_host_bytes()
    assert peak >= before
    assert peak >= len(ballast)
    child = subprocess.run([sys.executable, "-c", CHILD], check=True, capture_output=True)
    assert 1 << 20 < int(child.stdout) < 200 << 20
