"""What README.md shows works as shown, on the real model it speaks of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from loftq_cli.cli.commands import main
from tests.support.models import minilm
from tests.support.pages import LANGUAGE, WORTH, measured, page, table

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)

# peft asks transformers under a name that transformers is giving up.


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
    names: dict[str, Any] = {}
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
    block = README.split("## The output")[1].split("| layout |")[0]
    shown = set(re.findall(r"^      ([\w./]+\.\w+)", block, flags=re.MULTILINE))
    written = {p.relative_to(converted / "out").as_posix() for p in converted.glob("out/**/*")}
    assert len(shown) == 6
    assert shown <= written


def test_the_versions_are_those_that_the_tests_install_and_the_package_accepts():
    pinned = (ROOT / "tests" / "constraints.txt").read_text("utf-8").lower()
    declared = (ROOT / "pyproject.toml").read_text("utf-8")
    rows = table(README, "| | tested |")
    assert len(rows) == 9
    for name, tested, accepted in rows:
        assert f"\n{name}=={tested}\n" in pinned
        spec = f"{name}=={accepted.removesuffix(' only')}"
        wanted = spec if accepted.endswith(" only") else spec.replace("==", ">=")
        assert f'"{wanted}"' in declared


def test_the_python_is_the_one_that_the_package_asks_for():
    declared = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert f"with Python {declared[1]} or later" in README


def test_the_perplexities_are_those_of_the_measurement():
    figures = measured("results/language-model.md", LANGUAGE)
    shown = table(README, "| start | before training |")
    assert len(shown) == 10
    for start, *before_and_after in shown:
        assert before_and_after == [figures[start][0], figures[start][7]], start


def test_the_residuals_are_those_of_the_measurement():
    figures = {
        tuple(row[:2]): [f"{float(row[11]):.2f}", row[5], row[4], row[7], row[10]]
        for row in table(page("algorithm.md"), WORTH)
    }
    shown = table(README, "| bits | method |")
    assert len(shown) == len(figures)
    for bits, method, *row in shown:
        assert [cell.strip("*") for cell in row] == figures[bits, method]
