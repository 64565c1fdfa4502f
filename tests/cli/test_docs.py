"""The manual and the help texts say what there is, and their examples work."""

from __future__ import annotations

import ast
import importlib.metadata
import json
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
from loftq_cli.checkpoint.hub.listing import HubSnapshot
from loftq_cli.checkpoint.hub.upload import Pushed
from loftq_cli.checkpoint.request import Request
from loftq_cli.cli.commands import main
from loftq_cli.settings.kinds import flag
from loftq_cli.settings.table import entries
from loftq_cli.version import VERSION
from tests.support import gguf_files, models
from tests.support.commands import Command, snapshot_of

HERE = Path(__file__).parent
MANUAL = (HERE.parents[1] / "docs/cli.md").read_text("utf-8")
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


# A value that is not the default, and what the recipe of a plan then has.
SET: dict[str, tuple[list[str], Any]] = {
    "bits": (["3"], 3),
    "bits_map": (["*.q_proj.*=8"], ["*.q_proj.*=8"]),
    "target_bpw": (["4.5"], 4.5),
    "method": (["fitted"], "fitted"),
    "rank": (["8"], 8),
    "rank_map": (["*.q_proj.*=2"], ["*.q_proj.*=2"]),
    "iters": (["1"], 1),
    "block_size": (["32"], 32),
    "layout": (["dense"], "dense"),
    "scale": (["absmax"], "absmax"),
    "scale_dtype": (["int8"], "int8"),
    "order": (["svd-first"], "svd-first"),
    "svd": (["exact"], "exact"),
    "embeddings": ([], True),
    "include": (["lm_head.weight"], ["lm_head.weight"]),
    "exclude": (["*.q_proj.*"], ["*.q_proj.*"]),
    "feedback": ([], True),
    "feedback_passes": (["2"], 2),
    "lora_alpha": (["2.5"], 2.5),
    "base_model": (["me/mine"], "me/mine"),
    "adapter_dtype": (["float16"], "float16"),
    "dense_dtype": (["float16"], "float16"),
    "device": (["cpu"], "cpu"),
    "threads": (["1"], 1),
    "seed": (["7"], 7),
}
OPTIONS_OF_SETTINGS = {name: entry for name, entry in entries().items() if entry.group is not None}


@pytest.mark.parametrize("name", [name for name in OPTIONS_OF_SETTINGS if name != "stats"])
def test_every_option_of_a_setting_sets_it(name: str, loftq: Command) -> None:
    """Run, and seen in the recipe."""
    values, expected = SET[name]
    result = loftq("convert", "model", "--dry-run", "--json", flag(name), *values)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["recipe"][name] == expected


def test_options_that_switch_off_or_are_short(loftq: Command) -> None:
    result = loftq("convert", "model", "--dry-run", "--json", "--no-feedback", "-t", "1")
    recipe = json.loads(result.stdout)["recipe"]
    assert (recipe["feedback"], recipe["threads"]) == (False, 1)


def test_statistics_that_are_named_are_looked_for(loftq: Command) -> None:
    result = loftq("convert", "model", "--dry-run", "--stats", "nowhere")
    assert (result.exit_code, "nowhere: no such file" in result.stderr) == (3, True)


def words_of_runs() -> set[tuple[str, str]]:
    """(command, option) that some test here hands to the command: both are words of one function,
    of its parameters, or of a list of words."""
    found = set()
    for path in HERE.glob("test_*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            texts = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
            names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            words = {text for text in texts if isinstance(text, str)}
            for name in main.commands:
                meant = name in words or name.upper() in names or f"test_{name}.py" == path.name
                if meant:
                    found |= {(name, word) for word in words if word.startswith("-")}
    return found


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_every_option_is_in_the_manual_and_run_by_a_test(command: str, option: str) -> None:
    assert re.search(rf"`[^`]*(?<![\w-]){option}(?![\w-])", section(command))
    name = option.lstrip("-").removeprefix("no-").replace("-", "_")
    assert name in SET or option == "-t" or (command, option) in words_of_runs()


def test_the_manual_names_no_option_that_does_not_exist() -> None:
    known = {
        option
        for command in [main, *main.commands.values()]
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    others = {"--help", "--nproc-per-node"}  # click's, torchrun's
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", MANUAL)) <= known | others


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
    gguf_files.skeleton(place / "my-model", place / "my-model-f16.gguf", (4, 2))
    (place / "notes.txt").write_text("Nobody knew why the mill stood still. " * 20)
    examples = re.findall(r"^\$ loftq (.*)$", MANUAL, re.MULTILINE)
    assert len(examples) >= len(main.commands)
    for example in examples:
        result = loftq(*shlex.split(example, comments=True))
        assert result.exit_code == 0, f"loftq {example}: {result.stderr}"


@every_command
def test_every_help_text_has_an_example(name: str, loftq: Command) -> None:
    for word in ("--help", "-h"):
        result = loftq(name, word)
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
