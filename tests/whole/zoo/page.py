"""``python -m tests.whole.zoo.page``: writes the zoo's part of docs/models.md anew, from what the
last full sweep found."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from tests.whole.zoo.results import Found, Results, read

PAGE = Path(__file__).parents[3] / "docs/models.md"
TITLES = {
    "causal": "causal language models",
    "seq2seq": "sequence to sequence",
    "masked": "masked language models",
    "image-text": "image and text to text",
}
NOTES = dict.fromkeys(
    ("gemma4_assistant", "gemma4_unified_assistant"),
    "its config asks that all layers share keys and values, which its model refuses",
)
"""Of what is not made small, where the error does not say why."""
HALF = 50
_PART = re.compile(r"(?<=<!-- zoo -->\n).*?(?=<!-- /zoo -->)", re.DOTALL)
_WIDTH = 110


def rewritten(page: str, results: Results) -> str:
    return _PART.sub(lambda _: "\n".join(_lines(results)) + "\n", page)


def _lines(results: Results) -> Iterator[str]:
    told = ", ".join(f"{name} {version}" for name, version in results.about.items())
    yield f"Last swept: {told.replace('date ', '', 1)}."
    yield ""
    yield from _counts(results)
    for kind, title in (
        ("refused", "Refused before anything is computed"),
        ("unbuilt", "Not made small, so not looked at"),
    ):
        found = [each for each in results.found if each.verdict.kind == kind]
        yield from _table(title, found)
    yield from _table("Neither right nor refused", [e for e in results.found if _is_wrong(e)])
    for mapping, title in TITLES.items():
        right = [e for e in results.found if e.mapping == mapping and e.verdict.kind == "right"]
        text = ", ".join(_named(each) for each in right)
        yield ""
        yield f"Right, {title}:"
        yield ""
        yield from textwrap.wrap(f"{text}.", _WIDTH, break_on_hyphens=False)


def _counts(results: Results) -> Iterator[str]:
    yield "| mapping | right | refused | not made small | otherwise |"
    yield "| --- | --- | --- | --- | --- |"
    for mapping, title in TITLES.items():
        found = [each for each in results.found if each.mapping == mapping]
        kinds = [each.verdict.kind for each in found]
        numbers = [kinds.count(kind) for kind in ("right", "refused", "unbuilt")]
        counts = [*numbers, len(kinds) - sum(numbers)]
        yield f"| {title} | {' | '.join(str(count or '') for count in counts)} |".replace("  ", " ")


def _table(title: str, found: list[Found]) -> Iterator[str]:
    if not found:
        return
    yield ""
    yield f"{title}:"
    yield ""
    yield "| model type | class | why |"
    yield "| --- | --- | --- |"
    rows = [(e.model_type, e.architecture, _why(e)) for e in found]
    for kind, architecture, why in dict.fromkeys(rows):
        yield f"| `{kind}` | `{architecture}` | {why} |"


def _why(each: Found) -> str:
    if each.model_type in NOTES:
        return NOTES[each.model_type]
    told = " ".join(each.verdict.detail.split(". ")[0].split()).replace("|", "\\|")
    return f"{each.verdict.kind}: {told}" if _is_wrong(each) else told


def _is_wrong(each: Found) -> bool:
    return each.verdict.kind not in ("right", "refused", "unbuilt")


def _named(each: Found) -> str:
    """The model type, with the share that is quantized if that is less than half."""
    share = each.verdict.share
    few = share is not None and share < HALF
    return f"`{each.model_type}`" + (f" ({share} %)" if few else "")


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text("utf-8"), read()), "utf-8")
