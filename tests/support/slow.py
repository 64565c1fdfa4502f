"""Which modules of tests are slow: `make quick` leaves them out.

What needs whole models or processes of its own takes seconds, and so do the folders where
everything is tried, and a few modules that repeat whole conversions or decompositions.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
FOLDERS = {
    "benchmarks",
    "loading",
    "refinement",
    "whole/crash",
    "whole/hostile",
    "whole/interop",
    "whole/gpu",
    "whole/zoo",
}
MODULES = {
    *("cli/test_evaluate.py", "cli/test_refine.py"),
    *("conversion/test_from_hub.py", "conversion/test_from_hub_resumed.py"),
    *("conversion/test_from_hub_encoded.py", "conversion/test_variants.py"),
    *("exporting/mlx/test_export.py", "planning/test_adapted.py", "numerics/test_alternation.py"),
    *("numerics/test_alternation_textbook.py", "numerics/quantizers/test_fitted.py"),
    *("numerics/test_feedback.py", "numerics/test_on_a_device.py", "conversion/test_devices.py"),
    "whole/test_stand_in.py",
}
# Wherever they are imported, also within a function.
_OURS = r"tests\.(?:support\.models|whole\.interop)"
_WHOLE_MODELS = rf"(?:import|from) (?:transformers|peft|bitsandbytes|{_OURS})\b"
_PROCESSES = r"(?:import|from) subprocess\b"
_MODELS = r"from tests\.support import (?:.*, )?models\b"
_IMPORTS = re.compile(rf"^ *(?:{_WHOLE_MODELS}|{_PROCESSES}|{_MODELS})", re.MULTILINE)


@functools.cache
def is_slow(path: Path) -> bool:
    """Whether the tests in this file or folder are."""
    if not path.is_relative_to(TESTS) or path == TESTS:
        return False
    inside = path.relative_to(TESTS)
    folders = {folder.as_posix() for folder in (inside, *inside.parents)}
    if folders & FOLDERS or inside.as_posix() in MODULES:
        return True
    return path.name.startswith("test_") and bool(_IMPORTS.search(path.read_text("utf-8")))
