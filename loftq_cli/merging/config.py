"""What a merged checkpoint says of itself: its config.json, where it comes from, how it loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.dtypes import name_of
from loftq_cli.families.architecture import TEXT_CONFIGS
from loftq_cli.families.classes import auto_class, brings_code
from loftq_cli.families.tasks import CLASSIFIERS, LABELS
from loftq_cli.machine.durable import explained, file_sha256
from loftq_cli.merging.plan import MergePlan
from loftq_cli.version import VERSION

FORMAT_VERSION = 1


def dtype_name(tag: str | None) -> str | None:
    """``float32`` for ``F32``; None stays None."""
    return tag and name_of(tag)


def merged_config(plan: MergePlan) -> dict[str, Any]:
    """The backbone's config.json without its quantization, with the dtype that the matrices have
    now; if tokens or a head were added, with their number and the class that was trained."""
    config = dict(plan.source.config.content)
    config.pop("quantization_config", None)
    name = dtype_name(plan.dtype)
    if name:
        config = _with_dtype(config, name)
        if "torch_dtype" not in config:
            config["dtype"] = name
    if plan.embeddings.resized:
        assert plan.embeddings.rows is not None
        config = _with_vocabulary(config, plan.embeddings.was, plan.embeddings.rows)
    if plan.embeddings.untied:
        config = _untied(config)
    if all(spec.name in plan.embeddings.added for spec in plan.added):
        return config
    trained = plan.adapter.config.get("auto_mapping")
    if isinstance(trained, dict) and str(trained.get("parent_library")).startswith("transformers."):
        config["architectures"] = [str(trained.get("base_model_class"))]
    for spec in plan.added:
        if LABELS.search(spec.name) and len(spec.shape) == 2:
            config |= _labels(config, spec.shape[0])
    return config


def _with_dtype(config: dict[str, Any], name: str) -> dict[str, Any]:
    """``config`` with its dtype replaced, and that of the configs in it (``text_config``)."""
    return {
        key: name
        if key in ("dtype", "torch_dtype")
        else _with_dtype(value, name)
        if key.endswith("_config") and isinstance(value, dict)
        else value
        for key, value in config.items()
    }


def _with_vocabulary(config: dict[str, Any], was: int | None, rows: int) -> dict[str, Any]:
    """``config`` for ``rows`` tokens: that of the text model, and whatever repeats it."""

    def repeated(part: dict[str, Any]) -> dict[str, Any]:
        return {
            key: rows
            if key == "vocab_size" and value == was
            else repeated(value)
            if isinstance(value, dict)
            else value
            for key, value in part.items()
        }

    text = next((key for key in TEXT_CONFIGS if isinstance(config.get(key), dict)), None)
    config = repeated(config)
    if text is None:
        return {**config, "vocab_size": rows}
    inner = config[text]
    if not any(isinstance(inner.get(key), dict) for key in TEXT_CONFIGS):
        return {**config, text: {**inner, "vocab_size": rows}}
    return {**config, text: _with_vocabulary(inner, was, rows)}


def _untied(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` of a model whose output embedding is a tensor of its own."""
    inner = {
        key: {**value, "tie_word_embeddings": False}
        for key, value in config.items()
        if key in TEXT_CONFIGS and isinstance(value, dict)
    }
    return {**config, **inner, "tie_word_embeddings": False}


def _labels(config: dict[str, Any], count: int) -> dict[str, Any]:
    """The entries that transformers writes for ``count`` labels, unless there are as many."""
    known = config.get("id2label")
    if (len(known) if isinstance(known, dict) else 2) == count:
        return {}
    labels = {str(number): f"LABEL_{number}" for number in range(count)}
    return {"id2label": labels, "label2id": {label: int(n) for n, label in labels.items()}}


def provenance(plan: MergePlan) -> dict[str, Any]:
    source = plan.output.manifest["source"]
    with explained(plan.adapter.file):
        digest = file_sha256(plan.adapter.file)
    return {
        "format_version": FORMAT_VERSION,
        "tool": {"name": "loftq-cli", "version": VERSION},
        "source": {key: value for key, value in source.items() if key != "files"},
        "fingerprint": plan.output.fingerprint,
        "adapter_sha256": digest,
        "dtype": dtype_name(plan.dtype),
    }


def snippet(plan: MergePlan, output: Path) -> str:
    """Python that loads the result."""
    task = plan.adapter.config.get("task_type")
    name = CLASSIFIERS.get(str(task)) if plan.added else None
    config = merged_config(plan)
    name = name or auto_class(config)
    runs = ", trust_remote_code=True" if brings_code(config) else ""
    return (
        f"from transformers import {name}\n\nmodel = {name}.from_pretrained({str(output)!r}{runs})"
    )
