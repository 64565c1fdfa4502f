"""A disk that is really full: a file system of 16 MB, in memory, mounted for the test."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from loftq_cli.checkpoint.output import open_output, verify
from loftq_cli.errors import EnvironmentFailure
from tests.support.bench import Recorder
from tests.whole.crash import processes
from tests.whole.crash.scenarios import Scenario, convert
from tests.whole.crash.stress import tell, times

_SIZE = 16 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """The small file system."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if mounted.returncode != 0:
        pytest.skip(f"nothing may be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path, free: int) -> Path:
    """Leave ``free`` bytes; the file that takes the rest."""
    filler = disk / "filler"
    size = shutil.disk_usage(disk).free - free
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    return filler


class Fills(Recorder):
    """Leaves so much of the disk when the conversion has begun, after all checks."""

    def __init__(self, disk: Path, free: int) -> None:
        super().__init__()
        self.disk, self.free = disk, free

    def working_on(self, name: str) -> None:
        if not (self.disk / "filler").exists():
            fill(self.disk, self.free)


def test_a_disk_that_is_full_is_found_out_before_anything_is_written(
    disk: Path, learned: dict[str, Scenario], tmp_path: Path
) -> None:
    filler = fill(disk, 1 << 20)
    scenario = learned["convert"]
    assert scenario.model is not None
    arguments: list[str | Path] = [
        "convert",
        scenario.model,
        "-o",
        disk / "a/out",
        "--layout",
        "loftq",
    ]
    ended = processes.loftq(arguments, tmp_path)
    assert ended.code == 5
    (line,) = ended.stderr.splitlines()
    assert re.search(rf"{disk}/a: 4\.\d\d MB needed, 1\.05 MB free", line)
    assert list(disk.iterdir()) == [filler]


def test_a_disk_that_fills_up_can_be_freed_and_the_command_repeated(
    disk: Path, learned: dict[str, Scenario]
) -> None:
    scenario = learned["convert"]
    chance = random.Random(0)
    failed = 0
    for _ in range(times(20)):
        work = disk / "work"
        work.mkdir()
        recorder = Fills(disk, chance.randrange(40 << 10))
        try:
            convert(scenario, work, recorder)
        except EnvironmentFailure as failure:
            failed += 1
            assert os.strerror(errno.ENOSPC) in failure.message  # noqa: PT017
            assert failure.message.startswith(f"{work}/.out.loftq-partial")  # noqa: PT017
            assert not (work / "out").exists()
        else:
            verify(open_output(work / "out"))
        (disk / "filler").unlink()
        convert(scenario, work)
        assert scenario.state(work) == scenario.expected
        assert scenario.left(work) == []
        shutil.rmtree(work)
    tell(f"{failed} conversions met the end of the disk")
    assert failed
