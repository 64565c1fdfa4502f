"""Names of files that come from other files."""

from __future__ import annotations

import os

ADAPTER_FOLDER = "loftq_init"
"""Where an output has its adapter."""

ADAPTER_CONFIG = "adapter_config.json"
"""By which PEFT knows an adapter."""


def is_plain_name(name: str) -> bool:
    """Whether ``name`` names a file in its own directory: no separators, no parents, no NUL, and
    nothing that a file system cannot spell."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}
