"""The tokenizer of a merged model: the one that training saved beside the adapter, if there is one,
else the backbone's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.companions import companions, is_of_tokenizer
from loftq_cli.checkpoint.output import Output
from loftq_cli.checkpoint.small_file import read_json
from loftq_cli.errors import InputError
from loftq_cli.layouts.trained import SAVE_BOTH, TrainedAdapter
from loftq_cli.machine.durable import file_sha256
from loftq_cli.merging.embeddings import Embeddings

_TOKENIZERS = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    "spiece.model",
)
"""Of these a tokenizer has at least one."""


def merged_companions(
    output: Output, adapter: TrainedAdapter, embeddings: Embeddings
) -> dict[str, Path]:
    """The files to copy beside the merged weights, by relative name: those of the backbone of
    ``output``, and the tokenizer beside the adapter in the place of its own.

    Raises InputError if that tokenizer has more tokens than the merged embedding has rows.
    """
    ours = {name: output.directory / name for name in companions(output.directory)}
    home = adapter.directory
    beside = {name: home / name for name in companions(home) if is_of_tokenizer(name)}
    if home.samefile(output.directory):
        beside = {name: path for name, path in beside.items() if not _is_listed(output, name)}
    if not any(name in beside for name in _TOKENIZERS):
        return ours
    if home.samefile(output.directory):  # training wrote over it
        ours = {name: path for name, path in ours.items() if name not in beside}
    before, after = _vocabulary(ours), _vocabulary(beside)
    if after is not None and embeddings.rows is not None:
        _check(adapter, _size(before or {}), _size(after), embeddings.rows)
    if before != after:  # files that only the backbone has would speak of other tokens
        ours = {name: path for name, path in ours.items() if not _speaks_of_tokens(name)}
    return {**ours, **beside}


def _speaks_of_tokens(name: str) -> bool:
    return is_of_tokenizer(name) and "processor" not in name and "template" not in name


def _is_listed(output: Output, name: str) -> bool:
    """Whether a file of ``output`` is the one that its manifest lists."""
    entries = {entry["name"]: entry["sha256"] for entry in output.manifest["outputs"]}
    return name in entries and file_sha256(output.directory / name) == entries[name]


def _check(adapter: TrainedAdapter, before: int, after: int, rows: int) -> None:
    if after > rows and after > before:
        raise InputError(
            f"{adapter.directory}: the tokenizer has {after} tokens, the merged embedding has "
            f"{rows} rows, and the adapter holds no larger one",
            hint=f"if the embeddings were resized for training, {SAVE_BOTH}; if they were not, "
            "move the tokenizer's files elsewhere",
        )


def _size(vocabulary: Mapping[str, int]) -> int:
    """The rows that an embedding needs for these tokens."""
    return max(vocabulary.values(), default=-1) + 1


def _vocabulary(files: Mapping[str, Path]) -> dict[str, int] | None:
    """Every token and its number, None if that cannot be told from JSON."""
    try:
        if "tokenizer.json" in files:
            content = read_json(files["tokenizer.json"]).content
            vocab = content["model"]["vocab"]
            tokens = vocab if isinstance(vocab, dict) else _numbered(vocab)
            more = {entry["content"]: entry["id"] for entry in content.get("added_tokens") or []}
        elif "vocab.json" in files:
            tokens = read_json(files["vocab.json"]).content
            added = files.get("added_tokens.json")
            more = read_json(added).content if added else {}
        else:
            return None
    except (InputError, LookupError, TypeError, AttributeError):
        return None
    found = {**tokens, **more}
    return found if all(type(number) is int for number in found.values()) else None


def _numbered(entries: Iterable[Any]) -> dict[str, int]:
    """Of a list of (token, score)."""
    return {str(token): number for number, (token, *_) in enumerate(entries)}
