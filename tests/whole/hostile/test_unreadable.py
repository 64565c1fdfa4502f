"""A file that a failing disk or missing permissions keep from being read may be whole: exit code 5,
and nobody is told to download or convert again."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

import loftq_cli
from loftq_cli.checkpoint import header, supply
from loftq_cli.checkpoint import output as outputs
from loftq_cli.cli.commands import main
from tests.support import checkpoints

# The kernel answers a read of its beginning with EIO, also to root.
FAILING = Path("/proc/self/mem")
CONVERT = ("--bits", "4", "--rank", "4", "--iters", "1", "-t", "1")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoints.write(tmp_path / "source", checkpoints.llama(), cuts=(5,))


@pytest.fixture
def output(source: Path) -> Path:
    out = source.parent / "out"
    loftq_cli.convert(source, out, bits=4, rank=4, iters=1, threads=1)
    return out


def fail(path: Path) -> None:
    """Have every read of ``path`` fail."""
    path.unlink(missing_ok=True)
    path.symlink_to(FAILING)
    with pytest.raises(OSError) as caught:
        path.read_bytes()
    assert caught.value.errno == errno.EIO


def refused(path: Path, *words: object) -> None:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 5, result.output
    assert f"{path}: Input/output error" in " ".join(result.stderr.split())
    assert "its disk" in result.stderr
    assert not any(advice in result.stderr for advice in ("again", "altered", "--overwrite"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "modules.json"])
def test_of_a_source(source: Path, name: str) -> None:
    fail(source / name)
    refused(source / name, "convert", source, "-o", source.parent / "new", *CONVERT)
    assert not (source.parent / "new").exists()


def test_the_header_of_a_shard(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = source / "model-00002-of-00002.safetensors"
    read: Callable[[Path], object] = header.read_header

    def failing(path: Path) -> object:
        if path == shard:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    monkeypatch.setattr(supply, "read_header", failing)
    refused(shard, "convert", source, "-o", source.parent / "new", *CONVERT)


@pytest.mark.parametrize("command", [("inspect",), ("error-report",), ("merge", "-o", "new")])
def test_the_manifest(output: Path, command: tuple[str, ...]) -> None:
    fail(output / "loftq_manifest.json")
    refused(output / "loftq_manifest.json", *command, output)


def test_the_weights_when_they_are_verified(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(outputs, "file_sha256", failing)
    (first, *_) = sorted(output.glob("*.json"))
    refused(first, "inspect", "--verify", output)


@pytest.mark.parametrize("name", ["recipe.json", "recipe.toml"])
def test_a_recipe(source: Path, name: str) -> None:
    recipe = source.parent / name
    fail(recipe)
    refused(recipe, "convert", source, "-o", source.parent / "new", "--recipe", recipe)


def test_a_text(source: Path) -> None:
    text = source.parent / "text.txt"
    fail(text)
    refused(text, "calibrate", source, "--text", text, "-o", source.parent / "stats.safetensors")
