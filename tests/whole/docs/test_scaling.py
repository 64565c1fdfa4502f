"""docs/scaling.md: its commands run, in two processes each."""

from __future__ import annotations

import functools
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.support import calibrated, models
from tests.support.pages import page
from tests.whole.crash import accidents, several

STARTED = re.compile(
    r"^(?:torchrun (?P<options>.*) -m loftq_cli|accelerate launch .* -m loftq_cli|srun .* loftq) "
    r"(?P<words>.+)$",
    re.MULTILINE,
)
COMMANDS = [
    (found["options"] or "", found["words"]) for found in STARTED.finditer(page("scaling.md"))
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("scaling")
    models.save_tokenizer(models.save(models.llama(), directory / "my-model"))
    (directory / "text.txt").write_text(calibrated.TEXT)
    return directory


def test_the_commands_work_one_after_the_other(place: Path) -> None:
    """In two processes, whatever the page says; a command may write what one before it did."""
    names = [words.split()[0] for _, words in COMMANDS]
    assert names == ["convert"] * 4 + ["calibrate", "convert", "refine"]
    for _, line in COMMANDS:
        words = shlex.split(line)
        output = place / words[words.index("-o") + 1]
        shutil.rmtree(output, ignore_errors=True)
        there = functools.partial(accidents.hurried, place)
        ended = several.run(words, place, faults=dict.fromkeys(range(2), there))
        assert [each.code for each in ended] == [0, 0], [each.stderr for each in ended]
        assert output.exists()


def test_refining_is_started_in_as_many_as_it_takes() -> None:
    counts = {
        words.split()[0]: re.search(r"--nproc-per-node (\d+)", options)
        for options, words in COMMANDS
        if options
    }
    found = counts["refine"]
    assert found is not None
    assert int(found[1]) in (2, 4)
