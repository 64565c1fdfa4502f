"""Conversions of one small checkpoint to every layout, made once per session."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loftq_cli
from tests.support import checkpoints

CASES: dict[str, dict[str, Any]] = {
    "bnb": {"bits": 4, "layout": "bnb"},
    "gptq": {"bits": 3, "layout": "gptq", "block_size": 32},
    "gptq-8-bits": {"bits": 8, "layout": "gptq", "lora_alpha": 8.0},
    "loftq": {"bits": 2, "layout": "loftq", "method": "nf", "adapter_dtype": "float16"},
    "loftq-affine": {"bits": 3, "layout": "loftq", "method": "uniform", "order": "svd-first"},
    "loftq-tensor": {"bits": 3, "layout": "loftq", "method": "uniform-tensor"},
    "loftq-bfloat16": {"bits": 2, "layout": "loftq", "scale_dtype": "bfloat16"},
    "loftq-int8": {"bits": 2, "layout": "loftq", "method": "nf", "scale_dtype": "int8"},
    "loftq-affine-int8": {"bits": 3, "method": "uniform", "scale_dtype": "int8"},
    "loftq-trellis": {"bits": 2, "method": "trellis", "scale_dtype": "bfloat16"},
    "dense": {"bits": 2, "layout": "dense", "dense_dtype": "bfloat16"},
    "dense-plain": {"bits": 4, "layout": "dense", "iters": 0},
    "sharded": {"bits": 2, "preset": "paper", "exclude": "*.o_proj.weight"},
    "clamped": {"bits": 4, "method": "uniform-block", "rank": 80},
    "bfloat16": {"bits": 4},
}


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Callable[[str], Path]:
    """The checkpoint of a case."""

    @functools.cache
    def make(kind: str) -> Path:
        tensors = checkpoints.llama(dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
        cuts = (3, 7) if kind == "sharded" else ()
        return checkpoints.write(tmp_path_factory.mktemp("source") / "model", tensors, cuts=cuts)

    return lambda case: make(case if case in ("sharded", "bfloat16") else "")


@pytest.fixture(scope="session")
def converted(source, tmp_path_factory) -> Callable[[str], Path]:
    """The output of a case: shared, not to be written to."""

    @functools.cache
    def make(case: str) -> Path:
        output = tmp_path_factory.mktemp("converted") / "out"
        settings = {"rank": 4, "iters": 2, "threads": 1, **CASES[case]}
        loftq_cli.convert(source(case), output, **settings)
        return output

    return make


@pytest.fixture
def output(converted, tmp_path) -> Path:
    """A copy of a small output of layout bnb, to be spoiled."""
    return Path(shutil.copytree(converted("bnb"), tmp_path / "out"))
