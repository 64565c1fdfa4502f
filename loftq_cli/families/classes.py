"""The transformers class that a config.json means."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from loftq_cli.families.tasks import is_of_text, task_type

AUTO_CLASSES = (
    ("ForCausalLM", "AutoModelForCausalLM"),
    ("LMHeadModel", "AutoModelForCausalLM"),
    ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    ("ForTokenClassification", "AutoModelForTokenClassification"),
    ("ForQuestionAnswering", "AutoModelForQuestionAnswering"),
    ("ForMaskedLM", "AutoModelForMaskedLM"),
)
"""(end of an architecture's name, the auto class that loads it)."""

_MORE = (
    ("ForImageTextToText", "AutoModelForImageTextToText"),
    ("ForSpeechSeq2Seq", "AutoModelForSpeechSeq2Seq"),
)
_GENERATING = (
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageTextToText",
    "AutoModelForSpeechSeq2Seq",
)


def takes_text(model: Any) -> bool:
    """Whether ``model``, or a class of models, takes what PEFT's wrapper for features hands on."""
    taken = inspect.signature(model.forward).parameters
    return {"input_ids", "attention_mask", "inputs_embeds"} <= taken.keys()


def model_class(config: Mapping[str, Any], transformers: Any, *, remote: bool = False) -> Any:
    """The class of the model that ``config``, the content of a config.json, describes: the first
    of its ``architectures`` that transformers has, else what its ``model_type`` stands for in the
    auto class that the architecture's name fits (AutoModel if there is none). None if transformers
    knows neither. ``remote``: the code that ``auto_map`` names may be run, so an auto class."""
    names = [str(name) for name in config.get("architectures") or [] if name]
    if remote and (own := own_class(config)):
        return getattr(transformers, own, None)
    for name in names:
        found = getattr(transformers, name, None)
        if hasattr(found, "from_pretrained"):
            return found
    return _by_type(config, transformers, _auto_classes(names[0] if names else ""))


def own_class(config: Mapping[str, Any]) -> str | None:
    """The auto class that runs the model's own code: the one under which ``auto_map`` has the
    architecture, else the likeliest of those in it; None if the model brings no code for one."""
    stated = config.get("auto_map")
    held = stated if isinstance(stated, Mapping) else {}
    classes = [str(name) for name in held if str(name).startswith("AutoModel")]
    architecture = str((config.get("architectures") or [""])[0])
    named = [name for name in classes if str(held[name]).endswith(f".{architecture}")]
    likely = [name for name in _auto_classes(architecture) if name in classes]
    return next(iter([*named, *likely, *classes]), None)


def _by_type(config: Mapping[str, Any], transformers: Any, candidates: list[str]) -> Any:
    try:
        config_class = transformers.CONFIG_MAPPING[config.get("model_type")]
    except (KeyError, TypeError):
        return None
    for name in candidates:
        mapping = getattr(transformers, name)._model_mapping
        if config_class in mapping.keys():  # noqa: SIM118  (a lazy mapping, not a dict)
            found = mapping[config_class]
            return found[0] if isinstance(found, tuple) else found
    return None


def _auto_classes(architecture: str) -> list[str]:
    """Names of auto classes, the likeliest first."""
    found = [name for end, name in (*AUTO_CLASSES, *_MORE) if architecture.endswith(end)]
    if architecture.endswith("ForConditionalGeneration"):
        found += _GENERATING
    return [*found, "AutoModel"]


def brings_code(config: Mapping[str, Any]) -> bool:
    """Whether ``config``, the content of a config.json, names code of the model's own for its
    architecture."""
    names, stated = config.get("architectures"), config.get("auto_map")
    return (
        isinstance(names, list)
        and isinstance(stated, dict)
        and any(str(value).endswith(f".{names[0]}") for value in stated.values() if names)
    )


def auto_class(config: Mapping[str, Any]) -> str:
    """The transformers auto class for the architecture that ``config`` names, or that class itself
    if an auto class may take it for another."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if brings_code(config):
        return own_class(config) or "AutoModel"
    if not isinstance(name, str) or not name.isidentifier():
        return "AutoModel"
    if task_type([name]) == "SEQ_2_SEQ_LM" and name.endswith("ForConditionalGeneration"):
        return "AutoModelForSeq2SeqLM"
    for end, result in AUTO_CLASSES:
        if name.endswith(end) and is_of_text(name):
            return result
    kind = "".join(filter(str.isalnum, str(config.get("model_type", "")).lower()))
    bare = name.lower() in (kind, f"{kind}model") if kind else name.endswith("Model")
    return "AutoModel" if bare else name
