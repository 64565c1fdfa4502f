"""A report as JSON and, if it is asked for, as a page of HTML."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.locate import Place
from loftq_cli.checkpoint.output import open_output
from loftq_cli.reporting import summary
from loftq_cli.reporting.compare import compare, gather
from loftq_cli.reporting.inspect import inspect
from loftq_cli.reporting.page.comparison import comparison
from loftq_cli.reporting.page.document import document
from loftq_cli.reporting.page.file import refuse_target, write_page
from loftq_cli.reporting.residuals import error_report
from loftq_cli.reporting.spectra import MATRICES, spectra


def report(
    place: Place,
    source: str | None = None,
    stats: str | os.PathLike[str] | None = None,
    *,
    offline: bool = False,
    html: Path | None = None,
) -> dict[str, Any]:
    """What :func:`~loftq_cli.reporting.residuals.error_report` returns; a page in the file
    ``html`` as well. Raises what that and :func:`refuse_target` raise."""
    if html is not None:
        refuse_target(html)
    found = error_report(place, source, stats, offline=offline)
    if html is not None:
        output = open_output(place.directory)
        curves = None
        if source is not None:
            worst = summary.worst(found["layers"], MATRICES)
            curves = spectra(output, worst, source, offline=offline)
        write_page(html, document(output, inspect(place), found, curves))
    return found


def comparison_report(places: Sequence[Place], *, html: Path | None = None) -> dict[str, Any]:
    """What :func:`~loftq_cli.reporting.compare.compare` returns of the conversions in ``places``; a
    page in the file ``html`` as well. Raises what :func:`~loftq_cli.reporting.compare.gather` and
    :func:`refuse_target` raise."""
    if html is not None:
        refuse_target(html)
    conversions = gather(places)
    found = compare(conversions)
    if html is not None:
        write_page(html, comparison(conversions, found))
    return found
