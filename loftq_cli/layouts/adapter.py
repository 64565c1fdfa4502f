"""The PEFT LoRA adapter: tensor names and adapter_config.json.

Written by hand because peft is not a core dependency; the fields are those that
``LoraConfig.save_pretrained`` writes and ``PeftModel.from_pretrained`` reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from loftq_cli.checkpoint.header import TensorSpec
from loftq_cli.checkpoint.names import ADAPTER_CONFIG, ADAPTER_FOLDER
from loftq_cli.layouts.base import Matrix

DIRECTORY = ADAPTER_FOLDER
WEIGHTS = "adapter_model.safetensors"
CONFIG = ADAPTER_CONFIG
OF_MLX_LM = "adapters.safetensors"
"""The weights of an adapter that mlx-lm saved, instead of WEIGHTS."""
PREFIX = "base_model.model."


def names(matrix: Matrix) -> tuple[str, str]:
    """The names of the module's two tensors in the adapter file, in the order of :func:`specs`."""
    pattern = "lora_embedding_{}" if matrix.kind == "embedding" else "lora_{}.weight"
    first, second = (f"{PREFIX}{matrix.adapted}.{pattern.format(side)}" for side in "AB")
    return first, second


def module_of(name: str) -> str:
    """The module that a tensor of the adapter file belongs to; inverse of :func:`names`."""
    return name.removeprefix(PREFIX).rpartition(".lora_")[0]


def specs(matrix: Matrix, rank: int, dtype: str) -> list[TensorSpec]:
    """A (rank, in) and B (out, rank) of a matrix (out, in).

    Of an embedding (num, dim): lora_embedding_A (rank, num) and lora_embedding_B (dim, rank), which
    PEFT adds as (B A)^T, that is B^T and A^T.
    """
    name_a, name_b = names(matrix)
    rows, columns = matrix.shape
    if matrix.kind == "embedding":
        rows, columns = columns, rows
    return [
        TensorSpec(name_a, dtype, (rank, columns)),
        TensorSpec(name_b, dtype, (rows, rank)),
    ]


def tensors(matrix: Matrix, lora_A: torch.Tensor, lora_B: torch.Tensor) -> dict[str, torch.Tensor]:
    """The adapter file's tensors of one matrix, from A (rank, in) and B (out, rank)."""
    pair = (lora_A, lora_B)
    if matrix.kind == "embedding":
        pair = (lora_B.T.contiguous(), lora_A.T.contiguous())
    return dict(zip(names(matrix), pair, strict=True))


def sides(
    matrix: Matrix, first: torch.Tensor, second: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, in) and B (out, rank) from the tensors of :func:`specs`, in its order."""
    return (second.T, first.T) if matrix.kind == "embedding" else (first, second)


def scaling(lora_alpha: float | None, rank: int) -> float:
    """What PEFT multiplies B A with. ``lora_alpha`` None: the rank."""
    return 1.0 if lora_alpha is None else lora_alpha / rank


def config(
    ranks: Mapping[str, int],
    rank: int,
    lora_alpha: float | None,
    task_type: str | None,
    *,
    architecture: str | None = None,
    base_model: str | None = None,
    transposed: bool = False,
    parameters: Mapping[str, int] = {},
) -> dict[str, Any]:
    """adapter_config.json for modules with the given ranks, and for ``parameters`` of fused experts
    with theirs. ``transposed``: the backbone's weights are stored (in, out). ``architecture``: the
    transformers class of the backbone, by which AutoPeftModel loads it if there is no task.

    ``lora_alpha`` None means alpha = rank everywhere, so that the scaling is 1; modules whose rank
    was clamped below ``rank`` are listed in rank_pattern (and alpha_pattern).
    Without ``base_model``, the backbone's id or path, ``base_model_name_or_path`` stays empty: the
    adapter belongs to the backbone it lies in, not to the model it was made from, and PEFT fills in
    the path the backbone was loaded from.
    """
    auto_mapping = None
    if task_type is None and architecture is not None:
        auto_mapping = {"base_model_class": architecture, "parent_library": "transformers"}
    clamped = {re.escape(name): value for name, value in ranks.items() if value != rank}
    # One for all layers: PEFT warns of each, as it looks for modules of that name.
    fused = {
        rf".*\.experts\.{name.rpartition('.')[2]}": value
        for name, value in parameters.items()
        if value != rank
    }
    scaled = {name: (lora_alpha or rank) * value // rank for name, value in fused.items()}
    return {
        "alpha_pattern": {**(clamped if lora_alpha is None else {}), **scaled},
        "auto_mapping": auto_mapping,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank if lora_alpha is None else lora_alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {**clamped, **fused},
        "target_modules": sorted(ranks),
        **({"target_parameters": sorted(parameters)} if parameters else {}),
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    }
