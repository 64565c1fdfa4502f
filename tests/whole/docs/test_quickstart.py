"""docs/quickstart.md: what it types is typed, and the screens are as it shows them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner

from loftq_cli.cli.commands import main

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "quickstart.md").read_text("utf-8")
PIECES = re.findall(r"```(console|python)\n(.*?)```", PAGE, flags=re.DOTALL)
LEFT_OUT = "…"
# Of another machine, or of another run on the same one. Codes at 2 bits are not the same on all
# processors, and two sentences show it.
VARIES = re.compile(
    r"(?<=the step )[\d.]+(?=,)|(?<=after it )[\d.]+|(?<=time )[\d.]+ s on \w+"
    r"|(?<=time )[\d.]+ s|(?<=peak memory )[\d.]+ \w+|(?<=memory )[\d.]+ \w+(?= above)"
    r"|[\d.]+ \w+(?= free)|(?<=output )\S+"
)
NUMBER = re.compile(r"\d*\.\d+")


def screens() -> list[tuple[str, str]]:
    """Every command that the page types, with what is shown below it."""
    found = []
    for kind, text in PIECES:
        if kind == "console":
            for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                command, _, shown = part.partition("\n")
                found.append((command, shown))
    return found


def scripts() -> dict[str, str]:
    """The files that the page asks to be saved, by their names."""
    names = re.findall(r"Save this as `([\w.]+)`", PAGE)
    return dict(zip(names, [text for kind, text in PIECES if kind == "python"], strict=True))


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What each command of the page printed, one after the other in one directory."""
    place = tmp_path_factory.mktemp("quickstart")
    printed: dict[str, list[str]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
        for name, text in scripts().items():
            Path(name).write_text(text, "utf-8")
        for command, _ in screens():
            printed.setdefault(command, []).append(run(command))
    return printed


def run(command: str) -> str:
    """What ``command`` prints: its remarks, which come first, then its result."""
    program, *words = shlex.split(command)
    if program == "loftq":
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.output
        return f"{result.stderr}{result.stdout}"
    if program == "python":
        written = io.StringIO()
        with contextlib.redirect_stdout(written):
            exec(compile(Path(words[0]).read_text("utf-8"), words[0], "exec"), {})
        return written.getvalue()
    if program == "pip":  # is installed where the tests run
        return ""
    assert program == "cp", command
    python = f"{shlex.quote(sys.executable)} -c"
    subprocess.run(command.replace("python -c", python), shell=True, check=True)
    return ""


def lines(text: str) -> list[str]:
    """The lines of a screen, without the spaces that align them and without what varies."""
    plain = [" ".join(line.split()) for line in text.splitlines()]
    return [VARIES.sub("*", line) for line in plain if line]


def agree(shown: str, printed: str) -> bool:
    """Whether two lines are the same but for the last digits of their figures; a line that is shown
    may end in what is left out."""
    if shown.endswith(LEFT_OUT):
        shown = shown.removesuffix(LEFT_OUT)
        printed = printed[: len(shown)]
    figures = zip(NUMBER.findall(shown), NUMBER.findall(printed))
    return NUMBER.sub("#", shown) == NUMBER.sub("#", printed) and all(
        float(one) == pytest.approx(float(other), rel=0.02, abs=0.001) for one, other in figures
    )


def missing(shown: str, printed: str) -> str | None:
    """The first line shown that was not printed in its place: right behind the one before it, or,
    below `…`, anywhere behind that."""
    there = lines(printed)
    position = 0
    for before, line in pairwise(["", *lines(shown)]):
        if line == LEFT_OUT:
            continue
        places = range(position, len(there)) if before == LEFT_OUT else [position]
        place = next((n for n in places if n < len(there) and agree(line, there[n])), None)
        if place is None:
            return line
        position = place + 1
    ends = not lines(shown) or lines(shown)[-1] == LEFT_OUT or position == len(there)
    return None if ends else f"(not shown) {there[position]}"


def test_every_screen_is_as_shown(typed: dict[str, list[str]]) -> None:
    turns = {command: iter(printed) for command, printed in typed.items()}
    for command, shown in screens():
        printed = next(turns[command])
        if command.startswith("python"):  # the libraries speak first
            printed = "\n".join(printed.splitlines()[-len(shown.splitlines()) :])
        fault = missing(shown, printed)
        assert fault is None, f"$ {command}\n{fault}\nwas not printed:\n{printed}"


def test_the_page_goes_from_installing_to_merging() -> None:
    commands = [" ".join(command.split()[:2]) for command, _ in screens()]
    expected = ["pip install", "loftq convert", "loftq inspect", "python train.py", "loftq merge"]
    assert [c for c in dict.fromkeys(commands) if c in expected] == expected
    assert list(scripts()) == ["train.py", "use.py"]


def test_training_changed_the_adapter_for_the_better(typed: dict[str, list[str]]) -> None:
    before, after = NUMBER.findall(typed["python train.py"][0].splitlines()[-1])
    assert float(after) < float(before)


def test_what_it_installs_is_what_the_project_declares() -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    installed = [command for command, _ in screens() if command.startswith("pip install")]
    assert 'pip install ".[train]"' in installed
    assert "\ntrain = [" in project
    model = next(word for command in installed for word in command.split() if "==" in word)
    assert f'"{model}"' in project
    python = re.search(r'^requires-python = ">=([\d.]+)"', project, flags=re.MULTILINE)
    assert python is not None
    assert f"Python {python[1]} or later" in PAGE


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("one\n", "one\ntwo\n"),
        ("one\nthree\n", "one\ntwo\nthree\n"),
        ("residual 0.30\n", "residual 0.40\n"),
        ("one\n…\nfour\n", "one\ntwo\n"),
    ],
)
def test_a_screen_that_differs_is_seen(shown: str, printed: str) -> None:
    assert missing(shown, printed)
    assert missing(printed, printed) is None
    assert missing("one\n…\n", "one\ntwo\n") is None
