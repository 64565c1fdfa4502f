"""What a source is instead of a model: an adapter, a model with one, the output of a conversion."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.header import shown
from loftq_cli.checkpoint.lfs import refuse_pointers
from loftq_cli.checkpoint.names import ADAPTER_CONFIG, ADAPTER_FOLDER
from loftq_cli.checkpoint.output import MANIFEST, read_manifest
from loftq_cli.checkpoint.small_file import read_json
from loftq_cli.checkpoint.source import WEIGHTS, Source
from loftq_cli.errors import InputError, UnsupportedInputError

MARKERS = (ADAPTER_CONFIG, MANIFEST)
"""Files that say that a directory is no model."""
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

_OF_ADAPTER = re.compile(
    r".*\.(?:base_layer|lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save"
    r"|original_module)(?:\..*)?"
)
_MERGE = "merge it first: PEFT's merge_and_unload(), then save_pretrained(DIR), and convert DIR"


def refuse_marked(directory: Path, name: str, files: Collection[str] = ()) -> None:
    """Raise UnsupportedInputError if a file in ``directory``, that of the model ``name``, says
    that it is the output of a conversion, an adapter, or a model with an adapter attached.
    ``files`` are further ones of the model, which are not there yet. Raises CorruptFileError if
    such a file is a pointer of git-lfs."""
    refuse_pointers(directory, MARKERS)
    if os.path.exists(directory / MANIFEST):
        raise UnsupportedInputError(
            f"{name} is the output of a conversion{_of(directory / MANIFEST)}, quantized already",
            hint="convert what it was made from; `loftq merge` makes an ordinary checkpoint of it",
        )
    if os.path.exists(directory / ADAPTER_FOLDER / ADAPTER_CONFIG):
        raise UnsupportedInputError(
            f"{name} is the output of a conversion without its {MANIFEST}, quantized already: its "
            f"weights lack the adapter in {ADAPTER_FOLDER}",
            hint="convert the full-precision checkpoint it was made from",
        )
    if not os.path.exists(directory / ADAPTER_CONFIG):
        names = (*WEIGHTS, *_ADAPTER_WEIGHTS)
        refuse_bare_adapter(
            name, [n for n in names if n in files or os.path.lexists(directory / n)]
        )
        return
    kind, base = _adapter(directory / ADAPTER_CONFIG)
    if any(each in files or os.path.exists(directory / each) for each in WEIGHTS):
        raise UnsupportedInputError(
            f"{name}: {ADAPTER_CONFIG} lies beside the weights: transformers attaches that {kind} "
            f"adapter{base} whenever it loads the model",
            hint=f"{_MERGE}; or, to convert the weights without it, take the adapter's files away",
        )
    raise UnsupportedInputError(
        f"{name} is a {kind} adapter{base} ({ADAPTER_CONFIG}), not a model",
        hint=f"{_MERGE}; or convert its base model, without it",
    )


def refuse_bare_adapter(name: str, files: Collection[str]) -> None:
    """Raise UnsupportedInputError if of the ``files`` of the model ``name`` some are the weights
    of an adapter, and none those of a model."""
    found = [each for each in _ADAPTER_WEIGHTS if each in files]
    if found and not any(each in files for each in WEIGHTS):
        raise UnsupportedInputError(
            f"{name} is an adapter ({found[0]}) without its {ADAPTER_CONFIG}, not a model",
            hint=f"put its {ADAPTER_CONFIG} back and {_MERGE}; or convert its base model",
        )


def refuse_unmerged(source: Source) -> None:
    """Raise UnsupportedInputError, naming a tensor, if the weights hold an adapter apart."""
    for shard in source.shards:
        for tensor in shard.header.tensors:
            if _OF_ADAPTER.fullmatch(tensor.name):
                raise UnsupportedInputError(
                    f"{shard.path}: tensor {shown(tensor.name)} belongs to an adapter that is not "
                    "merged into the weights",
                    hint=_MERGE,
                )


def _adapter(path: Path) -> tuple[str, str]:
    """Its kind, and the words that name its base model, as far as they are known."""
    try:
        content = read_json(path).content
    except InputError:
        content = {}
    kind, base = content.get("peft_type"), content.get("base_model_name_or_path")
    of = f" of {base}" if isinstance(base, str) and base else ""
    return (kind if isinstance(kind, str) else "PEFT"), of


def _of(path: Path) -> str:
    """Of what, and how, as far as the manifest can be read."""
    try:
        manifest: dict[str, Any] = read_manifest(path)
    except InputError:
        return ""
    source, recipe = manifest["source"], manifest["recipe"]
    widths = sorted({record["bits"] for record in manifest["matrices"]})
    bits = " and ".join(map(str, widths))
    return (
        f" of {source['id']} ({bits} bits, layout {recipe['layout']}, "
        f"fingerprint {manifest['fingerprint'][:12]})"
    )
