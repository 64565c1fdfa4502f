"""Tasks: what PEFT calls that of an architecture, and the class of transformers for a head."""

from __future__ import annotations

import re
from collections.abc import Sequence

CLASSIFIERS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
"""PEFT's task types of classifiers, with the auto class that loads one."""

LABELS = re.compile(r"(?:^|\.)(?:classifier|score)(?:\.out_proj)?\.weight")
"""The layer of a classification head that has an output per label."""

# PEFT's wrappers for a task hand the inputs of text models on, whatever the model takes.
_TEXT_TO_TEXT = re.compile(
    r"(?:M?Bart|PLBart|[MU]?T5|MT5|UMT5|LongT5|T5Gemma|SwitchTransformers|NllbMoe|M2M100|Marian|FSMT"
    r"|Mvp|LED|Pegasus|PegasusX|BigBirdPegasus|Blenderbot|BlenderbotSmall|ProphetNet)"
    r"(?:ForConditionalGeneration|MTModel)"
)
_NO_TEXT = re.compile(
    r"(?:\w*CLIP|Siglip|\w*ViT|Deit|DeiT|Beit|Swin|Dino|Wav2Vec2|Hubert|WavLM|Whisper|Speech|Blip"
    r"|Flava|Llava|Qwen\w*(?:VL|Audio|Omni))"
)


def task_type(architectures: Sequence[str], *, takes_text: bool | None = None) -> str | None:
    """PEFT's task type for the first of config.json's architectures, None if it has none.
    ``takes_text``: whether the class takes text and nothing else, None if nobody knows.

    None too for classification and question answering: PEFT's wrappers for these tasks look for
    the head's tensors in the adapter, and fail if it holds none. The head is in the backbone.
    And for models that take more than text: without a task PEFT hands on what it is given.
    """
    name = architectures[0] if architectures else ""
    if _TEXT_TO_TEXT.fullmatch(name):
        return "SEQ_2_SEQ_LM"
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    if name.endswith("Model") and is_of_text(name) and takes_text is not False:
        return "FEATURE_EXTRACTION"
    return None


def is_of_text(architecture: str) -> bool:
    """Whether models of this name take text alone, as far as the name tells."""
    return not _NO_TEXT.match(architecture)
