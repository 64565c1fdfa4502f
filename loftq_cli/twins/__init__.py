"""A function for each command: the same arguments, the same defaults, and what ``--json`` prints.

A test holds each beside its command. Everything is imported when it is called.
"""

from loftq_cli.twins.finished import (
    compare,
    error_report,
    evaluate,
    export,
    import_adapter,
    inspect,
    merge,
    push,
)
from loftq_cli.twins.making import adapt, calibrate, convert, plan, refine, what_fits
from loftq_cli.twins.places import located

__all__ = [
    "adapt",
    "calibrate",
    "compare",
    "convert",
    "error_report",
    "evaluate",
    "export",
    "import_adapter",
    "inspect",
    "located",
    "merge",
    "plan",
    "push",
    "refine",
    "what_fits",
]
