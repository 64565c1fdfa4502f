"""The PEFT LoRA adapter: tensor names and adapter_config.json.

Written by hand because peft is not a core dependency; the fields are those that
``LoraConfig.save_pretrained`` writes and ``PeftModel.from_pretrained`` reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loftq_cli.checkpoint.header import TensorSpec

DIRECTORY = "loftq_init"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."


_DTYPE_TAGS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def stored_dtype(setting: str, source_dtype: str) -> str:
    """The dtype tag of A and B under the setting ``adapter_dtype``."""
    return source_dtype if setting == "source" else _DTYPE_TAGS[setting]


def names(module: str) -> tuple[str, str]:
    """(name of A, name of B) of ``module`` in the adapter file."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def module_of(name: str) -> str:
    """The module that a tensor of the adapter file belongs to; inverse of :func:`names`."""
    return name.removeprefix(PREFIX).rpartition(".lora_")[0]


def specs(module: str, shape: tuple[int, int], rank: int, dtype: str) -> list[TensorSpec]:
    """A (rank, in) and B (out, rank) of a matrix of ``shape`` (out, in)."""
    name_a, name_b = names(module)
    return [
        TensorSpec(name_a, dtype, (rank, shape[1])),
        TensorSpec(name_b, dtype, (shape[0], rank)),
    ]


def tensors(module: str, lora_A: torch.Tensor, lora_B: torch.Tensor) -> dict[str, torch.Tensor]:
    """The adapter file's tensors of one module."""
    return dict(zip(names(module), (lora_A, lora_B), strict=True))


def config(
    ranks: Mapping[str, int],
    rank: int,
    lora_alpha: float | None,
    task_type: str | None,
) -> dict[str, Any]:
    """adapter_config.json for modules with the given ranks.

    ``lora_alpha`` None means alpha = rank everywhere, so that the scaling is 1; modules whose rank
    was clamped below ``rank`` are listed in rank_pattern (and alpha_pattern).
    ``base_model_name_or_path`` stays empty: the adapter belongs to the backbone it lies in, not to
    the model it was made from, and PEFT fills in the path the backbone was loaded from.
    """
    clamped = {re.escape(name): value for name, value in ranks.items() if value != rank}
    return {
        "alpha_pattern": clamped if lora_alpha is None else {},
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank if lora_alpha is None else lora_alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": clamped,
        "target_modules": sorted(ranks),
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    }


def task_type(architectures: Sequence[str]) -> str | None:
    """PEFT's task type for the first of config.json's architectures, None where it has none.

    None too for classification and question answering: PEFT's wrappers for these tasks look for
    the head's tensors in the adapter, and fail where it holds none. The head is in the backbone.
    """
    kinds = (
        ("ForCausalLM", "CAUSAL_LM"),
        ("LMHeadModel", "CAUSAL_LM"),
        ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
        ("Model", "FEATURE_EXTRACTION"),
    )
    name = architectures[0] if architectures else ""
    return next((task for suffix, task in kinds if name.endswith(suffix)), None)
