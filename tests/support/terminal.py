"""Commands as a user types them, in a directory of their own that holds ``model``."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import loftq_cli
from loftq_cli.cli.commands import main
from tests.support import checkpoints
from tests.support.commands import QUICK, Command


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with a small Llama in ``model``; signal handlers are put back."""
    checkpoints.write(tmp_path / "model", checkpoints.llama())
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def loftq() -> Command:
    """Run ``loftq WORDS…`` in this process."""

    def run(*words: str) -> Result:
        return CliRunner().invoke(main, words, prog_name="loftq")

    return run


@pytest.fixture(scope="session")
def converted_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("converted")
    model = checkpoints.write(directory / "model", checkpoints.llama())
    words = ["convert", str(model), "-o", str(directory / "out"), *QUICK]
    assert CliRunner().invoke(main, words).exit_code == 0
    return directory / "out"


@pytest.fixture
def out(place: Path, converted_once: Path) -> Path:
    """A conversion of ``model`` in ``out``."""
    shutil.copytree(converted_once, place / "out")
    return place / "out"


@pytest.fixture
def converted(place: Path) -> Path:
    """The working directory with a model that runs, its conversion ``out``, and a text."""
    from tests.support import models  # transformers takes seconds
    from tests.support.calibrated import TEXT

    shutil.rmtree(place / "model")
    source = models.save_tokenizer(models.save(models.llama(), place / "model"))
    settings: dict[str, Any] = {"bits": 2, "rank": 4, "iters": 1, "threads": 1}
    loftq_cli.convert(source, place / "out", layout="loftq", **settings)
    (place / "text.txt").write_text(TEXT)
    return place
