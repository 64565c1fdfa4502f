"""What README.md shows works as shown, on the real model it speaks of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from loftq_cli.cli import main
from tests.models import minilm

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)

# peft asks transformers under a name that transformers is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("readme")
    arguments = ["convert", str(minilm()), "-o", str(directory / "out"), "--bits", "2", "-t", "1"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return directory


def test_there_is_python_to_run():
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("code", BLOCKS)
def test_the_python_runs(code, converted, monkeypatch):
    monkeypatch.chdir(converted)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    if "model" in names:
        trainable = [n for n, p in names["model"].named_parameters() if p.requires_grad]
        assert trainable
        assert all("lora_" in name for name in trainable)


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    shown = re.findall(r"^ {4}make (\w+)", README, flags=re.MULTILINE)
    assert shown == ["demo", "test"]
    assert all(f"\n{target}: " in makefile for target in shown)


def test_the_documents_exist():
    linked = re.findall(r"\]\((docs/[\w-]+\.md)\)", README)
    assert len(linked) >= 6
    assert all((ROOT / name).is_file() for name in linked)


def test_the_output_directory_is_as_shown(converted):
    block = README.split("## What comes out")[1].split("| layout |")[0]
    shown = set(re.findall(r"^      ([\w./]+\.\w+)", block, flags=re.MULTILINE))
    written = {p.relative_to(converted / "out").as_posix() for p in converted.glob("out/**/*")}
    assert len(shown) == 6
    assert shown <= written
