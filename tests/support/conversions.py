"""Sources, and conversions of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import loftq_cli
from tests.support import checkpoints
from tests.support.bench import Bench
from tests.support.checkpoints import LLAMA
from tests.support.contents import FAST, Converter
from tests.support.hub_conversions import commit, files

__all__ = ["bench", "checkpoint", "commit", "converted", "files", "notes"]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A bench with a small Llama in two shards as its source."""
    bench = Bench(tmp_path)
    bench.write(checkpoints.llama(), cuts=(5,))
    return bench


@pytest.fixture
def converted(tmp_path: Path) -> Converter:
    """The output of a conversion of these tensors; the source is beside it, in ``model``."""

    def convert(
        tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any] = LLAMA,
        cuts: tuple[int, ...] = (),
        **settings: Any,
    ) -> Path:
        source = checkpoints.write(tmp_path / "model", tensors, config, cuts)
        loftq_cli.convert(source, output=tmp_path / "out", **{**FAST, **settings})
        return tmp_path / "out"

    return convert


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a family, with a tokenizer."""
    from tests.support import models  # imports transformers
    from tests.support.calibrated import FAMILIES

    @functools.cache
    def make(family: str) -> Path:
        directory = tmp_path_factory.mktemp(family)
        models.save(FAMILIES[family](), directory)
        return models.save_tokenizer(directory)

    return make


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A text to calibrate with."""
    from tests.support.calibrated import TEXT

    path = tmp_path / "notes.txt"
    path.write_text(TEXT)
    return path
