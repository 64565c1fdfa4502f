"""The manual and the help texts say what there is, and their examples work."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import click
import pytest

from loftq_cli import errors
from loftq_cli.checkpoint.hub import repository as hub
from loftq_cli.checkpoint.hub import upload as hub_upload
from loftq_cli.checkpoint.hub.repository import HubSnapshot
from loftq_cli.checkpoint.hub.upload import Pushed
from loftq_cli.checkpoint.request import Request
from loftq_cli.cli.commands import main
from loftq_cli.version import VERSION
from tests.support import models
from tests.support.commands import Command, snapshot_of

HERE = Path(__file__).parent
MANUAL = (HERE.parents[1] / "docs/cli.md").read_text("utf-8")
TESTS = "".join(path.read_text("utf-8") for path in sorted(HERE.glob("test_*.py")))
OPTIONS = [
    pytest.param(name, option, id=f"{name} {option}")
    for name, command in main.commands.items()
    for parameter in command.params
    if isinstance(parameter, click.Option)
    for option in (*parameter.opts, *parameter.secondary_opts)
]

every_command = pytest.mark.parametrize("name", main.commands)


def section(command: str) -> str:
    """The manual's chapter on a command."""
    found = re.search(rf"^## loftq {command}$(.*?)(?=^## |\Z)", MANUAL, re.MULTILINE | re.DOTALL)
    assert found is not None, f"docs/cli.md has no chapter `## loftq {command}`"
    return found.group(1)


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_every_option_is_in_the_manual_and_in_a_test(command: str, option: str) -> None:
    assert re.search(rf"`[^`]*(?<![\w-]){option}(?![\w-])", section(command))
    assert f'"{option}"' in TESTS


def test_the_manual_names_no_option_that_does_not_exist() -> None:
    known = {
        option
        for command in [main, *main.commands.values()]
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", MANUAL)) <= known | {"--help"}


@pytest.mark.parametrize("command", ["convert"])
def test_the_manual_lists_every_choice_of_an_option(command: str) -> None:
    for parameter in main.commands[command].params:
        if isinstance(parameter.type, click.Choice):
            rows = [line for line in section(command).splitlines() if parameter.opts[-1] in line]
            for choice in parameter.type.choices:
                assert any(f"`{choice}`" in row for row in rows), f"{parameter.opts[-1]} {choice}"


def test_the_manual_lists_every_exit_code() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", MANUAL, re.MULTILINE)}
    raised = {
        error.exit_code
        for error in vars(errors).values()
        if isinstance(error, type) and issubclass(error, errors.LoftqError)
    }
    assert listed == raised | {0, 130, 143}


def test_no_cell_of_the_manual_is_longer_than_200_characters() -> None:
    rows = [line for line in MANUAL.splitlines() if line.startswith("|")]
    cells = [cell.strip() for row in rows for cell in row.strip("|").split("|")]
    assert len(cells) > 100
    assert [cell for cell in cells if len(cell) > 200] == []


def test_the_rows_of_a_table_have_as_many_cells_as_its_header() -> None:
    for table in re.findall(r"(?:^\|.*\n)+", MANUAL, flags=re.MULTILINE):
        counts = {len(re.split(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(counts) == 1, table


def test_the_manual_says_what_is_below_a_table_that_says_so() -> None:
    for part in re.split(r"^#+ ", MANUAL, flags=re.MULTILINE):
        if "see below" in part or "are below" in part:
            table, _, text = part.rpartition("\n|")
            assert table
            assert len(text.split("\n\n", 1)[1]) > 100, part.splitlines()[0]


def test_the_examples_of_the_manual_work(
    place: Path, loftq: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(request: Request, say: object) -> HubSnapshot:
        return snapshot_of(place / "model", request.model, "0" * 40)

    def push_folder(folder: Path, names: set[str], repo_id: str, **options: Any) -> Pushed:
        assert all((folder / name).is_file() for name in names)
        return Pushed(repo_id, "main", "0" * 40, "https://hub", True)

    monkeypatch.setattr(hub, "fetch", fetch)
    monkeypatch.setattr(hub_upload, "push_folder", push_folder)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    shutil.rmtree(place / "model")
    models.save_tokenizer(models.save(models.llama(), place / "my-model"))
    (place / "model").symlink_to("my-model")
    (place / "notes.txt").write_text("Nobody knew why the mill stood still. " * 20)
    examples = re.findall(r"^\$ loftq (.*)$", MANUAL, re.MULTILINE)
    assert len(examples) >= len(main.commands)
    for example in examples:
        result = loftq(*shlex.split(example, comments=True))
        assert result.exit_code == 0, f"loftq {example}: {result.stderr}"


@every_command
def test_every_help_text_has_an_example(name: str, loftq: Command) -> None:
    for flag in ("--help", "-h"):
        result = loftq(name, flag)
        assert result.exit_code == 0
        assert re.search(rf"^ +loftq {name}\b", result.stdout, re.MULTILINE)


def test_the_general_help_lists_the_commands(loftq: Command) -> None:
    text = loftq("--help").stdout
    for name in main.commands:
        assert f"  {name}" in text
    assert "loftq convert" in text


def test_the_version(loftq: Command) -> None:
    assert loftq("--version").stdout == f"loftq, version {VERSION}\n"
    assert importlib.metadata.version("loftq-cli") == VERSION


def test_the_command_is_installed_under_its_name() -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="loftq")
    assert entry.load() is main
