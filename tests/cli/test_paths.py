"""``~`` in every path that is typed, on the command line and in Python."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
import pytest

import loftq_cli
from loftq_cli.cli.commands import main
from loftq_cli.cli.guard import ExpandedPath
from loftq_cli.errors import UsageError
from loftq_cli.machine.paths import expanded
from loftq_cli.settings import file as recipe_file
from tests.support import checkpoints
from tests.support.commands import QUICK, Command

# Expanded where they are read: a model or a conversion may be a hub id, statistics a hash.
TEXTS = {"model", "directory", "adapter", "source", "stats"}
SETTINGS: dict[str, Any] = {"rank": 4, "iters": 1, "threads": 1}


@pytest.fixture(autouse=True)
def home(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory that holds ``model``; the working directory is another one."""
    home = place / "home"
    checkpoints.write(home / "model", checkpoints.llama())
    monkeypatch.setenv("HOME", str(home))
    return home


def test_every_path_is_of_the_type_that_expands_it() -> None:
    for command in main.commands.values():
        for parameter in command.params:
            if isinstance(parameter.type, click.Path) and parameter.name not in TEXTS:
                assert isinstance(parameter.type, ExpandedPath), parameter.name


def test_the_commands_find_what_lies_at_home(home: Path, loftq: Command) -> None:
    for words in (
        ("convert", "~/model", "-o", "~/out", "--save-recipe", "~/recipe.toml", *QUICK),
        ("convert", "~/model", "-o", "~/again", "--recipe", "~/recipe.toml"),
        ("inspect", "~/out", "--verify"),
        ("error-report", "~/out", "--source", "~/model"),
        ("merge", "~/out", "-o", "~/merged", "--adapter", "~/out/loftq_init"),
    ):
        result = loftq(*words)
        assert result.exit_code == 0, f"{words}: {result.stderr}"
    assert {"out", "recipe.toml", "again", "merged"} < set(os.listdir(home))
    assert not Path("~").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "model", "--stats", "~/none"),
        ("convert", "model", "--calibrate-text", "~/none"),
        ("convert", "model", "--recipe", "~/none"),
        ("error-report", "out", "--source", "model", "--stats", "~/none"),
        ("calibrate", "model", "--text", "~/none"),
        ("push", "~/none", "me/x"),
    ],
)
@pytest.mark.usefixtures("out")
def test_what_is_not_at_home_is_named_by_its_path(
    words: tuple[str, ...], home: Path, loftq: Command
) -> None:
    result = loftq(*words)
    assert result.exit_code == 3, result.stderr
    assert f"{home}/none" in result.stderr


def test_python_expands_them_too(home: Path) -> None:
    loftq_cli.convert("~/model", "~/out", **SETTINGS)
    loftq_cli.convert(Path("~/model"), Path("~/again"), recipe="~/out/loftq_manifest.json")
    assert loftq_cli.inspect("~/out")["directory"] == str(home / "out")
    assert loftq_cli.error_report(Path("~/again"), "~/model")["recomputed"]
    moments = loftq_cli.Moments(2)
    moments.add(checkpoints.llama()["lm_head.weight"][:1, :2].float())
    loftq_cli.save_statistics("~/s.safetensors", {"a.weight": moments})
    assert (home / "s.safetensors").is_file()
    assert not Path("~").exists()


def test_a_recipe_may_name_statistics_at_home(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('stats = "~/s.safetensors"')
    assert recipe_file.options({}, path).resolve().stats == str(home / "s.safetensors")


def test_a_directory_that_is_named_so(loftq: Command) -> None:
    assert loftq("convert", "model", "-o", "./~", *QUICK).exit_code == 0
    assert Path("~").is_dir()
    assert loftq("inspect", "./~").exit_code == 0


def test_a_user_that_there_is_not(loftq: Command) -> None:
    result = loftq("convert", "model", "-o", "~nobody-here/x")
    assert result.exit_code == 2
    assert "there is no home directory ~nobody-here" in result.stderr
    assert "./~nobody-here/x" in result.stderr
    assert sorted(os.listdir()) == ["home", "model"]
    with pytest.raises(UsageError, match="no home directory"):
        loftq_cli.convert("model", "~nobody-here/x")
    Path("~$draft").touch()
    assert expanded("~$draft") == Path("~$draft")
