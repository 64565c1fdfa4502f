"""``loftq`` as one of several processes, which says what its work took.

``python -m tests.benchmarks.scaling.rank REPORT convert …`` writes seconds of CPU to REPORT: of its
share, and altogether.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from loftq_cli.cli.commands import main
from loftq_cli.conversion.jobs import Job
from loftq_cli.conversion.sharing import Sharing


def measured(report: Path, arguments: list[str]) -> None:
    """Run the command, and write the report."""
    found = {"share": 0.0}
    carry_out = Sharing.carry_out

    def measure(sharing: Sharing, jobs: Iterable[Job]) -> None:
        began = time.process_time()
        carry_out(sharing, jobs)
        found["share"] += time.process_time() - began

    setattr(Sharing, "carry_out", measure)  # noqa: B010
    imported = time.process_time()
    main(arguments, standalone_mode=False)
    found["cpu"] = time.process_time() - imported
    report.write_text(json.dumps(found))


if __name__ == "__main__":
    measured(Path(sys.argv[1]), sys.argv[2:])
