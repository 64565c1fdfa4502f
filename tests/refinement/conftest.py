"""Models and conversions, each made once."""

from __future__ import annotations

from pathlib import Path

import pytest

import loftq_cli
from tests.support import models
from tests.support.calibrated import TEXT
from tests.support.refined import SETTINGS


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a text, a causal model, an encoder and an encoder-decoder."""
    place = tmp_path_factory.mktemp("refined")
    (place / "text.txt").write_text(TEXT)
    for kind in ("llama", "bert", "bart"):
        models.save_tokenizer(models.save(getattr(models, kind)(), place / kind))
        loftq_cli.convert(place / kind, place / f"{kind}-out", layout="loftq", **SETTINGS)
    return place
