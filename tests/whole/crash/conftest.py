"""Where accidents happen, and what they happen to."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.whole.crash.conversions import Conversion, undisturbed
from tests.whole.crash.scenarios import Scenario, scenarios

_MEMORY = Path("/dev/shm")


@pytest.fixture(scope="session")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory in memory where there is one: what is synced there by the thousand costs
    nothing, and power losses are simulated anyway."""
    if os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > 1 << 28:
        with tempfile.TemporaryDirectory(prefix="loftq-crash-", dir=_MEMORY) as directory:
            yield Path(directory)
    else:
        yield tmp_path_factory.mktemp("memory")


@pytest.fixture
def scratch(memory: Path) -> Iterator[Path]:
    """An empty directory, as fast as can be."""
    directory = Path(tempfile.mkdtemp(dir=memory))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def learned(memory: Path) -> dict[str, Scenario]:
    """The scenarios, with what they leave when nothing happens."""
    home = memory / "scenarios"
    home.mkdir()
    return {name: each.learn(home / "undisturbed") for name, each in scenarios(home).items()}


@pytest.fixture(scope="session")
def conversion(memory: Path) -> Conversion:
    """Fourteen matrices, and what comes of them when nothing happens."""
    return undisturbed(memory / "random")
