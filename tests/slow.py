"""Which modules of tests are slow: `make quick` leaves them out.

What needs whole models or processes of its own takes seconds, and so do the folders where
everything is tried, and a few modules that repeat whole conversions or decompositions.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

TESTS = Path(__file__).parent
FOLDERS = {"benchmarks", "crash", "hostile", "integrations", "interop"}
MODULES = {
    *("conversion/test_from_hub.py", "conversion/test_from_hub_resumed.py"),
    *("numerics/test_alternation_textbook.py", "numerics/test_fitted.py"),
    "numerics/test_feedback.py",
}
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
    inside = path.relative_to(TESTS)
    if inside.parts[0] in FOLDERS or inside.as_posix() in MODULES:
        return True
    return path.name.startswith("test_") and bool(_IMPORTS.search(path.read_text("utf-8")))
