"""Files of a source that lead elsewhere or nowhere, or are too large or too many to be copied."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from loftq_cli.errors import CorruptFileError

_MAX_COPIED_BYTES = 256_000_000  # the largest tokenizers take a tenth of it
_MOST_COPIED = 1000


def too_much(sizes: Iterable[tuple[str, int]]) -> list[str]:
    """What is wrong with copies of these (name, size in bytes), one line each."""
    sizes = sorted(sizes)
    found = [f"{name}: larger than 256 MB" for name, size in sizes if size > _MAX_COPIED_BYTES]
    if len(sizes) > _MOST_COPIED:
        found.append(f"{len(sizes)} files beside the weights to copy, more than {_MOST_COPIED}")
    return found


def leads_nowhere(path: str | os.PathLike[str]) -> bool:
    """Whether there is a link at ``path``, and nothing at its end."""
    return os.path.islink(path) and not os.path.exists(path)


def refuse_links_to_nothing(directory: Path, names: Iterable[str]) -> None:
    """Raise CorruptFileError, which lists them with their targets, if there are links of these
    ``names`` in ``directory`` with nothing at their end."""
    found = sorted({name for name in names if leads_nowhere(directory / name)})
    if found:
        listed = [f"{name}: a link to nothing, {os.readlink(directory / name)}" for name in found]
        raise CorruptFileError(
            f"{directory}: {'; '.join(listed)}",
            hint="put back what it leads to, or download the file again; or remove the link",
        )


def strays(
    directory: Path, names: Iterable[str], copied: Collection[str]
) -> tuple[list[str], str | None]:
    """What is wrong with the files of ``directory`` that are read by these ``names`` or
    ``copied``, one line each, and what to do about it, None for the usual.

    Wrong are links that lead out of it, to what somebody else's checkpoint has no business with,
    and copies that would be too large. A hub cache's links to its own blobs are no fault.
    """
    root = os.path.realpath(directory)
    roots = [root]
    if os.path.basename(os.path.dirname(root)) == "snapshots":
        roots.append(os.path.join(os.path.dirname(os.path.dirname(root)), "blobs"))
    found, sizes, outside = [], [], {}
    for name in sorted({*names, *copied}):
        target = os.path.realpath(os.path.join(root, name))
        if not any(target.startswith(place + os.sep) for place in roots):
            found.append(f"{name}: a link out of the directory, to {target}")
            outside[name] = target
        elif name in copied:
            sizes.append((name, os.path.getsize(target)))
    return found + too_much(sizes), _advice(directory, outside) if outside else None


def _advice(directory: Path, outside: dict[str, str]) -> str:
    """What to do if links of these names lead out of ``directory`` to these targets."""
    copy = f"copy what they lead to, if you trust it: cp -rL {directory} COPY, and give COPY"
    homes = {
        target[: -len(name) - 1] if target.endswith(os.sep + name) else None
        for name, target in outside.items()
    }
    home = homes.pop() if len(homes) == 1 else None
    return f"give {home}, where all of them lead; or {copy}" if home else copy
