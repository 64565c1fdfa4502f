"""What a comparison says, row by row, for the terminal, for pages and for notebooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loftq_cli.settings.sizes import decimal


def rows_of(found: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """What a table shows of a comparison: a title, and a cell for each conversion."""
    conversions = found["conversions"]
    yield "layout", [each["layout"] for each in conversions]
    for name, values in found["settings"].items():
        if name != "layout":
            yield name, [_short(value) for value in values]
    if len({each["refined"] for each in conversions}) > 1:
        yield "refined", ["yes" if each["refined"] else "no" for each in conversions]
    if len({each["matrices"] for each in conversions}) > 1:
        yield "matrices", [str(each["matrices"]) for each in conversions]
    yield "backbone", [decimal(each["backbone_bytes"]) for each in conversions]
    yield "adapter", [decimal(each["adapter_bytes"]) for each in conversions]
    for title, key in (
        ("bits per weight", "bits_per_weight"),
        ("with the adapter", "bits_per_weight_with_adapter"),
    ):
        yield title, [f"{each[key]:.3f}" for each in conversions]
    for title, key in (
        ("residual", "relative_residual"),
        ("without adapter", "relative_residual_quantized"),
        ("of the outputs", "weighted_residual"),
    ):
        if any(each[key] is not None for each in conversions):
            yield title, [figure(each[key]) for each in conversions]
    for number, evaluation in enumerate(found["evaluations"], 1):
        which = f" (text {number})" if len(found["evaluations"]) > 1 else ""
        for title, key, form in EVALUATED:
            values = [each and each[key] for each in evaluation["conversions"]]
            if any(value is not None for value in values):
                cells = ["-" if value is None else form.format(value) for value in values]
                yield f"{title}{which}", cells


EVALUATED = (
    ("perplexity", "perplexity", "{:.4g}"),
    ("of the original", "source_perplexity", "{:.4g}"),
    ("KL divergence", "kl", "{:.4f}"),
    ("same likeliest token", "top1", "{:.1%}"),
    ("cosine of hidden states", "cosine", "{:.4f}"),
    ("their relative error", "relative_error", "{:.2%}"),
)
"""What an evaluation measures: title, key, format."""
FIGURES = tuple(key for _, key, _ in EVALUATED)


def figure(value: float | None) -> str:
    """A residual, or a dash for none."""
    return "-" if value is None else f"{value:.4f}"


_LONGEST = 20  # characters of a setting


def _short(value: Any) -> str:
    """A setting as a cell can hold it: some list hundreds of names, some are hashes."""
    if value in (None, [], ()):
        return "-"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
