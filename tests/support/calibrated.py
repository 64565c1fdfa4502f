"""Models with tokenizers to calibrate, and what calibrating them gives."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from loftq_cli.calibration.calibrate import Measuring, calibrate
from loftq_cli.checkpoint.request import Request
from loftq_cli.machine.observer import Observer
from loftq_cli.statistics.file import open_statistics
from loftq_cli.statistics.statistics import Statistics
from tests.support import models

TEXT = "When the wind blew from the east, the mill stood still; nobody knew why, or cared. " * 5
LENGTH = 20


def deberta() -> Any:
    """A DebertaV2Model with everything of it that lies outside a chain of blocks: relative
    positions, through the same projections as the inputs, and a convolution."""
    config = transformers.DebertaV2Config(
        vocab_size=models.VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        conv_kernel_size=3,
        initializer_range=0.1,
    )
    return models._randomised(transformers.DebertaV2Model, config)


def albert() -> Any:
    """An AlbertModel: one block, run three times."""
    config = transformers.AlbertConfig(
        vocab_size=models.VOCABULARY,
        embedding_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    return models._randomised(transformers.AlbertModel, config)


def gpt2() -> Any:
    """A GPT2Model, whose config calls its longest text ``n_positions``."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 24}
    config = transformers.GPT2Config(vocab_size=models.VOCABULARY, **sizes)
    return models._randomised(transformers.GPT2Model, config)


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": models.llama,
    "bert": models.bert,
    "classifier": functools.partial(models.bert, task="ForSequenceClassification"),
    "bart": models.bart,
    "t5": models.t5,
    "falcon": models.falcon,
    "deberta": deberta,
    "albert": albert,
}


def measured(model: Path, notes: Path, **settings: Any) -> Statistics:
    """The statistics of ``model`` over all windows of ``notes``."""
    output = notes.parent / f"{model.name}-{len(os.listdir(notes.parent))}.safetensors"
    options = Measuring(**{"length": LENGTH, "device": "cpu", **settings})
    calibrate(Request(str(model)), output, [notes], options, observer=Observer())
    return open_statistics(output)
