"""``python -m tests.support.tree``: writes the tree in docs/design.md anew, each file
with the first sentence of its docstring."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import loftq_cli

ROOT = Path(loftq_cli.__file__).parent
PAGE = ROOT.parent / "docs/design.md"
_TREE = re.compile(r"(?<=<!-- tree -->\n)```\n.*?```\n", re.DOTALL)
_WIDTH = 26
_LONGEST = 90


def tree() -> str:
    """The tree, from the top of the house to its cellar, as it stands in the page."""
    from tests.whole.test_architecture import FOLDERS

    beside = sorted(path for path in ROOT.glob("*.py") if path.name != "__main__.py")
    lines = ["loftq_cli/", *_files(beside, 1)]
    for name in FOLDERS:
        lines += _folder(ROOT / name, 1)
    return "```\n" + "\n".join(lines) + "\n```\n"


def rewritten(page: str) -> str:
    return _TREE.sub(lambda _: tree(), page)


def _folder(folder: Path, depth: int) -> Iterator[str]:
    yield _line(f"{folder.name}/", folder / "__init__.py", depth)
    yield from _files(sorted([*folder.glob("*.py"), *folder.glob("*.c")]), depth + 1)
    for inner in sorted(path.parent for path in folder.glob("*/__init__.py")):
        yield from _folder(inner, depth + 1)


def _files(paths: list[Path], depth: int) -> Iterator[str]:
    for path in paths:
        if path.name != "__init__.py" or path.parent == ROOT:
            yield _line(path.name, path, depth)


def _line(name: str, path: Path, depth: int) -> str:
    source = path.read_text("utf-8")
    if path.suffix == ".c":
        text = re.sub(r"^/\* *|\s\*(?= )", "", source.partition("*/")[0])
    else:
        text = ast.get_docstring(ast.parse(source)) or ""
    sentence = " ".join(text.split("\n\n")[0].split()).replace("`", "")
    first = re.split(r"(?<=[^.])\. |; (?=[a-z]+\.py)", sentence)[0].rstrip(".")
    if len(first) > _LONGEST:  # up to where a part of the sentence ends
        first = re.match(rf".{{30,{_LONGEST}}}(?=[,;:]|\Z)|.{{{_LONGEST}}}", first)[0]
    return f"{'  ' * depth}{name.ljust(_WIDTH - 2 * depth)} {first}".rstrip()


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text("utf-8")), "utf-8")
