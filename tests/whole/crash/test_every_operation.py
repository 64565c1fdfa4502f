"""Commands that die, or meet an error of the disk, at one operation after the other."""

from __future__ import annotations

import errno
import itertools
import re
import shutil
from pathlib import Path

import pytest

from loftq_cli.errors import EnvironmentFailure, OutputConflictError
from tests.whole.crash.operations import Crash, DiesAt, FailsAt, Operation, watched
from tests.whole.crash.scenarios import Scenario
from tests.whole.crash.stress import tell

LEAST = {
    "convert": 100,
    "convert --overwrite": 110,
    "merge": 30,
    "merge --overwrite": 40,
    "export": 50,
    "export --overwrite": 60,
    "statistics": 8,
    "recipe": 5,
}
"""Operations that change files, at the least: so many moments there are to die at."""

every_command = pytest.mark.parametrize("name", LEAST)


def repeat(scenario: Scenario, work: Path) -> None:
    """Run the command again: it ends as ever, and nothing is left beside the result."""
    finished = scenario.state(work) == scenario.expected
    try:
        scenario.command(work)
    except OutputConflictError:  # of a merge, which was done before the accident
        assert finished
    assert scenario.state(work) == scenario.expected
    assert scenario.left(work) == []
    shutil.rmtree(work)


@every_command
def test_dying_at_any_operation_loses_nothing(
    name: str, learned: dict[str, Scenario], scratch: Path
) -> None:
    scenario = learned[name]
    for number in itertools.count(1):
        work = scratch / str(number)
        scenario.prepare(work)
        try:
            with watched(work, DiesAt(number)):
                scenario.command(work)
        except Crash:
            # Whatever is under the name of the result is whole; between two renames nothing is.
            aside = any((hidden / "replaced").exists() for hidden in work.glob(".out.*"))
            state = scenario.state(work)
            assert state in (scenario.before, scenario.expected) or (state == {} and aside)
            repeat(scenario, work)
        else:
            break
    tell(f"{name}: died at each of {number - 1} operations")
    assert number > LEAST[name]


def takes_space(operation: Operation) -> bool:
    return operation.changes and operation.name in ("open", "mkdir", "write", "pwrite", "fsync")


def anything(operation: Operation) -> bool:
    return True


@pytest.mark.parametrize(
    ("code", "which", "lasting"),
    [
        pytest.param(errno.ENOSPC, takes_space, True, id="full disk"),
        pytest.param(errno.EIO, anything, False, id="I/O error"),
    ],
)
@every_command
def test_an_error_at_any_operation_is_named_and_loses_nothing(
    name: str,
    code: int,
    which,
    lasting: bool,
    learned: dict[str, Scenario],
    scratch: Path,
) -> None:
    scenario = learned[name]
    for number in itertools.count(1):
        work = scratch / str(number)
        scenario.prepare(work)
        act = FailsAt(number, code, which, lasting=lasting)
        try:
            with watched(work, act):
                scenario.command(work)
        except EnvironmentFailure as failure:
            named = Path(failure.message.split(": ")[0])
            assert named.is_relative_to(work), failure.message  # noqa: PT017
        assert scenario.state(work) in (scenario.before, scenario.expected)
        repeat(scenario, work)
        if act.failed is None:
            break
    tell(f"{name}: {errno.errorcode[code]} at each of {number - 1} operations")
    assert number > LEAST[name] // 3


def test_an_error_at_any_reading_of_the_source_is_named_and_loses_nothing(
    learned: dict[str, Scenario], scratch: Path
) -> None:
    scenario = learned["convert"]
    assert scenario.model is not None
    for number in itertools.count(1):
        work = scratch / str(number)
        scenario.prepare(work)
        act = FailsAt(number, errno.EIO, lambda each: each.name == "preadv", lasting=True)
        try:
            with watched(scenario.model, act):
                scenario.command(work)
        except EnvironmentFailure as failure:
            named = re.match(r".*/model-0000\d-of-00002\.safetensors: ", failure.message)
            assert named, failure.message  # noqa: PT017
        finished = scenario.state(work)
        repeat(scenario, work)
        if act.failed is None:
            break
        assert finished == {}
    tell(f"convert: EIO at each of {number - 1} readings of the source")
    assert number > 6
