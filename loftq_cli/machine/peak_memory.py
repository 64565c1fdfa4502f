"""How much memory this process has taken at most."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path


def peak_host_bytes() -> int:
    """The largest resident set of this process so far, in bytes.

    From Linux's VmHWM if there is one: getrusage passes the peak of the process that started
    this one on to it.
    """
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        found = None
    if found:
        return int(found.group(1)) * 1024
    # macOS counts ru_maxrss in bytes, others in KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
