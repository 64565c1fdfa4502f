"""Hostile checkpoints: exit code 3, one clear line, nothing left behind, nothing executed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import loftq_cli
from loftq_cli.checkpoint.reader import ShardReader
from loftq_cli.cli.commands import main
from loftq_cli.errors import InputError
from tests.support import checkpoints
from tests.support.makers import container, entry
from tests.whole.hostile.corpus import CORPUS

SETTINGS: dict[str, Any] = {"bits": 4, "rank": 4, "iters": 1, "threads": 1}
OPTIONS = ["--bits", "4", "--rank", "4", "--iters", "1", "-t", "1"]


@pytest.fixture
def spoiled(request, tmp_path) -> Path:
    """A checkpoint of the corpus, alone in its parent directory."""
    directory = checkpoints.write(tmp_path / "source", checkpoints.llama())
    build, _ = CORPUS[request.param]
    build(directory)
    return directory


@pytest.fixture
def sigterm() -> Iterator[None]:
    """The command installs a handler of its own."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_the_checkpoint_that_is_spoiled_is_good(tmp_path):
    directory = checkpoints.write(tmp_path / "source", checkpoints.llama())
    loftq_cli.convert(directory, tmp_path / "out", **SETTINGS)
    assert loftq_cli.inspect(tmp_path / "out", verify=True)["verified_files"] > 0


@pytest.mark.parametrize(
    ("spoiled", "word"),
    [(name, word) for name, (_, word) in CORPUS.items()],
    indirect=["spoiled"],
    ids=CORPUS,
)
def test_an_input_error_that_says_what_is_wrong(spoiled, word, tmp_path):
    before = set(tmp_path.iterdir())
    with pytest.raises(InputError) as caught:
        loftq_cli.convert(spoiled, tmp_path / "out", **SETTINGS)
    error = caught.value
    assert error.exit_code == 3
    assert word in error.message
    assert str(error).isprintable()
    assert len(str(error)) < 2000
    assert set(tmp_path.iterdir()) == before  # no output, no partial directory, no explosion


@pytest.mark.usefixtures("sigterm")
@pytest.mark.parametrize("spoiled", CORPUS, indirect=True)
def test_the_command_line_fails_with_one_line(spoiled, tmp_path):
    result = CliRunner().invoke(
        main, ["convert", str(spoiled), "-o", str(tmp_path / "out"), *OPTIONS]
    )
    assert result.exit_code == 3
    assert result.stdout == ""
    assert result.stderr.startswith("loftq: error: ")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_odd_names_that_are_legal_are_converted(tmp_path):
    """Tensor names are names of nothing else: neither paths nor terminal input."""
    tensors = checkpoints.llama()
    odd = [
        "../../model.layers.0.a.weight",
        "model.layers.0.\x1b[2J.weight",
        "/model.layers.0./.weight",
    ]
    source = tensors["model.layers.0.self_attn.q_proj.weight"]
    directory = checkpoints.write(
        tmp_path / "source", tensors | {name: source.clone() for name in odd}
    )
    manifest = loftq_cli.convert(directory, tmp_path / "out", **SETTINGS)
    assert {record["name"] for record in manifest["matrices"]} >= set(odd)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
    report = CliRunner().invoke(main, ["error-report", str(tmp_path / "out")])
    assert report.exit_code == 0
    assert "\x1b" not in report.output


@pytest.mark.parametrize("left", [0, 10, 5_000])
def test_a_shard_shortened_while_it_is_read_is_an_error_not_a_crash(tmp_path, monkeypatch, left):
    directory = checkpoints.write(tmp_path / "source", checkpoints.llama())
    path = directory / "model.safetensors"
    whole = ShardReader.read

    def read(reader, tensor):
        value = whole(reader, tensor)
        os.truncate(path, left)
        return value

    monkeypatch.setattr(ShardReader, "read", read)
    with pytest.raises(InputError, match=r"model\.safetensors") as caught:
        loftq_cli.convert(directory, tmp_path / "out", **SETTINGS)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


MILLION = """
import resource, sys
from pathlib import Path
from loftq_cli.checkpoint.header import read_header
resource.setrlimit(resource.RLIMIT_AS, (1_500_000_000,) * 2)
print(len(read_header(Path(sys.argv[1])).tensors))
"""


def test_a_million_empty_tensors_take_bounded_memory(tmp_path):
    text = json.dumps(entry("U8", [0], 0, 0))
    entries = (f'"{number}":{text}' for number in range(1_000_000))
    path = tmp_path / "model.safetensors"
    path.write_bytes(container(b"{" + ",".join(entries).encode() + b"}"))
    run = subprocess.run([sys.executable, "-c", MILLION, str(path)], capture_output=True, text=True)
    assert run.stdout == "1000000\n", run.stderr
