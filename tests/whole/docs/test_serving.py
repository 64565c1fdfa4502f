"""docs/serving.md: what it types is typed, and what it has servers read is there."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from loftq_cli.cli.commands import main
from tests.support import gguf_files, models

PAGE = (Path(__file__).parents[3] / "docs/serving.md").read_text("utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^#+ ", PAGE, flags=re.MULTILINE)}
WITH_COMMANDS = [
    name for name, text in SECTIONS.items() if re.search("^    loftq ", text, re.MULTILINE)
]
READ = re.compile(r"(?:^|[ =])(?:\./)?((?:served|out|trained)(?:/[\w./]+)?)")


def blocks(name: str) -> list[str]:
    """The lines of a section that are code, those that go on in the next put together."""
    found = re.findall(r"^    (.*)$", SECTIONS[name].replace("\\\n", ""), flags=re.MULTILINE)
    return [re.sub(" +", " ", line) for line in found]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a model, its GGUF file, and text."""
    models.save_tokenizer(models.save(models.llama(), tmp_path / "MODEL"))
    gguf_files.skeleton(tmp_path / "MODEL", tmp_path / "f16.gguf", (4, 2))
    (tmp_path / "text.txt").write_text("Nobody knew why the mill stood still. " * 20)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(line: str) -> None:
    """Run a line of loftq's; training is taken to have saved what it began with."""
    result = CliRunner().invoke(main, shlex.split(line)[1:])
    assert result.exit_code == 0, f"{line}: {result.output}"
    words = set(shlex.split(line))
    start = "out/loftq_init" if "convert" in words else None
    start = "served/adapters" if {"export", "mlx"} <= words else start
    if start is not None:
        shutil.rmtree("trained", ignore_errors=True)
        shutil.copytree(start, "trained")


@pytest.mark.parametrize("name", WITH_COMMANDS)
def test_the_commands_of_a_section_work_and_leave_what_servers_are_given(name, place) -> None:
    lines = blocks(name)
    if not any("loftq convert" in line for line in lines):
        typed("loftq convert MODEL --bits 4 --layout compressed -o out")
    for line in lines:
        if line.startswith("loftq "):
            typed(line)
    others = [line for line in lines if not line.startswith(("loftq ", "python "))]
    for path in {path for line in others for path in READ.findall(line)}:
        assert (place / path).exists(), path


def test_the_modelfile_names_the_model_and_the_adapter() -> None:
    """Ollama's docs/modelfile: FROM and ADAPTER take paths that are relative to the file."""
    lines = [line for name in WITH_COMMANDS for line in blocks(name)]
    assert [line for line in lines if line.split()[0].isupper()] == [
        "FROM ./served/model.gguf",
        "ADAPTER ./served/adapter.gguf",
    ]
