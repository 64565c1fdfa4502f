"""Which modules of tests are slow: `make quick` leaves them out.

A rule, and no list of tests: what needs whole models or processes of its own takes seconds, and so
do the folders where everything is tried.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

TESTS = Path(__file__).parent
FOLDERS = {"benchmarks", "crash", "hostile", "integrations", "interop"}
# Wherever they are imported, also within a function.
_WHOLE_MODELS = r"(?:import|from) (?:transformers|peft|bitsandbytes|tests\.(?:models|interop))\b"
_PROCESSES = r"(?:import|from) subprocess\b"
_MODELS = r"from tests import (?:.*, )?models\b"
_IMPORTS = re.compile(rf"^ *(?:{_WHOLE_MODELS}|{_PROCESSES}|{_MODELS})", re.MULTILINE)


@functools.cache
def is_slow(path: Path) -> bool:
    """Whether the tests in this file or folder are."""
    if not path.is_relative_to(TESTS) or path == TESTS:
        return False
    if path.relative_to(TESTS).parts[0] in FOLDERS:
        return True
    return path.name.startswith("test_") and bool(_IMPORTS.search(path.read_text("utf-8")))
