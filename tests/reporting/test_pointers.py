"""Pointers of git-lfs, as a clone of what was pushed holds them, are named by who reads them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import loftq_cli
from loftq_cli.calibration.text_file import read_text
from loftq_cli.errors import CorruptFileError
from loftq_cli.machine.observer import Observer
from loftq_cli.merging.merge import merge
from loftq_cli.reporting.push import push
from loftq_cli.settings import file as recipe_file
from loftq_cli.statistics.file import open_statistics
from tests.support.makers import POINTER

MANIFEST = "loftq_manifest.json"
WEIGHTS = "model.safetensors"
ADAPTER = "loftq_init/adapter_model.safetensors"
ADAPTER_CONFIG = "loftq_init/adapter_config.json"


def named(file: Path, action: Callable[[], Any]) -> None:
    """That ``action`` is refused for the pointer ``file``, with what to do."""
    with pytest.raises(CorruptFileError, match="is a pointer of git-lfs") as caught:
        action()
    assert file.name in caught.value.message
    assert "git lfs pull" in caught.value.hint
    assert "hf download" in caught.value.hint


def actions(output: Path, source: Path) -> dict[str, Callable[[], Any]]:
    return {
        "load": lambda: loftq_cli.load(output),
        "merge": lambda: merge(output, output.parent / "merged", observer=Observer()),
        "push": lambda: push(output, "org/model", say=lambda line: None),
        "verify": lambda: loftq_cli.inspect(output, verify=True),
        "recompute": lambda: loftq_cli.error_report(output, source),
        "inspect": lambda: loftq_cli.inspect(output),
        "report": lambda: loftq_cli.error_report(output),
    }


READERS = {
    MANIFEST: ("load", "merge", "push", "verify", "recompute", "inspect", "report"),
    WEIGHTS: ("load", "merge", "push", "verify", "recompute"),
    ADAPTER: ("load", "merge", "push", "verify", "recompute"),
    ADAPTER_CONFIG: ("load", "merge", "push", "verify"),
    "config.json": ("load", "merge", "push", "verify"),
}


@pytest.mark.parametrize("name", READERS)
def test_in_a_conversion(name: str, output: Path, source: Callable[[str], Path]) -> None:
    (output / name).write_bytes(POINTER)
    for doing, action in actions(output, source("bnb")).items():
        if doing in READERS[name]:
            named(output / name, action)
    assert not (output.parent / "merged").exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_in_a_trained_adapter(name: str, output: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(output / "loftq_init", tmp_path / "trained"))
    (adapter / name).write_bytes(POINTER)
    for place in (adapter, adapter / "adapter_model.safetensors"):
        run = partial(merge, output, tmp_path / "m", adapter=place, observer=Observer())
        named(adapter / name, run)


def test_of_the_tokenizer_beside_a_trained_adapter(output: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(output / "loftq_init", tmp_path / "trained"))
    (adapter / "tokenizer.model").write_bytes(POINTER)
    named(
        adapter / "tokenizer.model",
        lambda: merge(output, tmp_path / "merged", adapter=adapter, observer=Observer()),
    )
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("stats.safetensors", open_statistics),
        ("matrix.gguf", open_statistics),
        ("matrix.dat", open_statistics),
        ("recipe.toml", recipe_file.read),
        ("recipe.json", recipe_file.read),
        (MANIFEST, recipe_file.read),
        ("notes.txt", lambda path: read_text("--text", path)),
    ],
)
def test_in_the_place_of_a_file_that_an_option_names(
    name: str, read: Callable[[Path], Any], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(POINTER)
    named(tmp_path / name, lambda: read(tmp_path / name))
