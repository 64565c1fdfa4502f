"""Which files travel with a checkpoint's weights into the output.

An allowlist: configuration, tokenizer and licence. Never code, which a loader might run, and
never other weights, which would shadow the converted ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from loftq_cli.checkpoint.durable import explained, write_file

COPIED_FILES: tuple[str, ...] = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
)

_MAX_COPIED_BYTES = 256_000_000  # the largest tokenizers take a tenth of it

# A wildcard must not let through `LICENSE_model.py`, which a config's auto_map could name.
_SUFFIXES = frozenset(("", ".txt", ".md", ".json", ".jinja", ".model"))


def is_companion(name: str) -> bool:
    """Whether a file of this name, in the same directory as the weights, is copied."""
    path = PurePosixPath(name)
    return (
        path.name == name
        and path.suffix in _SUFFIXES
        and any(fnmatchcase(name, pattern) for pattern in COPIED_FILES)
    )


def strays(directory: Path, names: Iterable[str]) -> list[str]:
    """What is wrong with the files of ``directory`` that are read by these ``names`` or copied, one
    line each: links that lead out of it, to what somebody else's checkpoint has no business with,
    and copies that would be too large. A hub cache's links to its own blobs are no fault."""
    root = os.path.realpath(directory)
    roots = [root]
    if os.path.basename(os.path.dirname(root)) == "snapshots":
        roots.append(os.path.join(os.path.dirname(os.path.dirname(root)), "blobs"))
    found = []
    copied = {path.name for path in companions(directory)}
    for name in sorted({*names, *copied}):
        target = os.path.realpath(os.path.join(root, name))
        if not any(target.startswith(place + os.sep) for place in roots):
            found.append(f"{name}: a link out of the directory, to {target}")
        elif name in copied and os.path.getsize(target) > _MAX_COPIED_BYTES:
            found.append(f"{name}: larger than 256 MB")
    return found


def companions(source: Path) -> list[Path]:
    """The files in ``source`` that are copied as they are: not config.json. Raises
    EnvironmentFailure."""
    with explained(source):
        return [
            path
            for path in sorted(source.iterdir())
            if path.name != "config.json" and is_companion(path.name) and path.is_file()
        ]


def copy_companions(source: Path, target: Path) -> None:
    """Copy the companions in ``source`` to ``target``. Raises EnvironmentFailure."""
    for path in companions(source):
        with explained(path):
            content = path.read_bytes()
        write_file(target / path.name, content)
