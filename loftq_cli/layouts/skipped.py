"""The list of modules that transformers is to leave as they are while it replaces linear layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from loftq_cli.families.architecture import ADDED_HEADS
from loftq_cli.layouts.base import Matrix, Surroundings


def skips(key: str, module: str) -> bool:
    """Whether transformers skips ``module`` for the entry ``key`` (``should_convert_module``)."""
    return module.endswith(key) or re.match(rf"{key}(?:(?<=\.)|(?=\.|$))", module) is not None


def skip_list(
    matrices: Sequence[Matrix],
    surroundings: Surroundings,
    skipped: Callable[[str, str], bool] = skips,
) -> list[str]:
    """Entries that leave the kept modules alone, also in a model that was loaded without its head,
    and heads that the checkpoint lacks; none of the latter is there if it would be ``skipped`` for
    a quantized matrix."""
    kept = [_as_pattern(name) for name in surroundings.kept_modules]
    bare = [name.partition(".")[2] for name in kept if "." in name]
    added = [
        key
        for key in (*bare, *ADDED_HEADS)
        if not any(skipped(key, matrix.adapted) for matrix in matrices)
    ]
    return sorted({*kept, *added})


def _as_pattern(name: str) -> str:
    """``name`` for the list, whose entries transformers takes for patterns."""
    try:
        re.compile(name)
    except re.error:
        return re.escape(name)
    return name
