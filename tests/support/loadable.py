"""Small conversions that the tests here load."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loftq_cli
from tests.support import models

SETTINGS: dict[str, Any] = {
    "bits": 3,
    "method": "nf",
    "rank": 4,
    "iters": 1,
    "threads": 1,
    "layout": "loftq",
}


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``converted(kind, **settings)``: the output of a conversion; not to be written to."""

    @functools.cache
    def convert(kind: str, **settings: Any) -> Path:
        task = functools.partial(models.bert, task="ForSequenceClassification")
        makers: dict[str, Any] = {"llama": models.llama, "bert": models.bert, "classifier": task}
        work = tmp_path_factory.mktemp(kind)
        source = models.save(makers[kind](), work / "source")
        loftq_cli.convert(source, output=work / "out", **SETTINGS | settings)
        return work / "out"

    return convert
