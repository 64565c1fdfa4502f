"""Reports that notebooks show as tables, and that are dictionaries for programs.

Only what is needed is imported when one is shown: the public functions return these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Shown(dict[str, Any]):
    """A report: what ``--json`` prints, with ``_repr_html_`` for notebooks. ``kind`` is one of
    "inspection", "residuals", "comparison", "evaluation"."""

    def __init__(self, report: Mapping[str, Any], kind: str) -> None:
        super().__init__(report)
        self._kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return Shown, (dict(self), self._kind)

    def _repr_html_(self) -> str:
        from loftq_cli.reporting.page import tables

        return tables.shown(self, self._kind)
