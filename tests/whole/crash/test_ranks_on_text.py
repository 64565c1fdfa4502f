"""Several processes that share the windows of a text, to measure or to refine a model: the bytes of
one, or one clear line and nothing half-written."""

from __future__ import annotations

import functools
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import loftq_cli
from loftq_cli.calibration.measure import Calibration
from loftq_cli.planning.choices import count_cpus
from loftq_cli.planning.decomposer import threads
from loftq_cli.refinement.training import Trainer
from tests.support import calibrated, checkpoints, models, moe
from tests.support.refined import SETTINGS
from tests.whole.crash import accidents, processes, several

WINDOWS = 23
KINDS: dict[str, Callable[[], Any]] = {
    "llama": models.llama,
    "albert": calibrated.albert,  # its one block runs three times, so not block by block
    "mixtral": functools.partial(moe.make, "mixtral"),
}


@dataclass(frozen=True)
class Place:
    """Models by kind, a text of WINDOWS windows, and a conversion of the first."""

    directory: Path

    def model(self, kind: str) -> Path:
        path = self.directory / kind
        if not path.exists():
            models.save_tokenizer(models.save(KINDS[kind](), path))
        return path

    @property
    def text(self) -> Path:
        return self.directory / "text.txt"

    @property
    def conversion(self) -> Path:
        path = self.directory / "conversion"
        if not path.exists():
            loftq_cli.convert(self.model("llama"), path, layout="loftq", **SETTINGS)
        return path

    def calibrate(self, output: Path, kind: str = "llama", *words: str) -> list[str | Path]:
        model, length = self.model(kind), str(calibrated.LENGTH)
        words = ("--length", length, "--device", "cpu", *words)
        return ["calibrate", model, "--text", self.text, "-o", output, *words]

    def refine(self, output: Path, *words: str) -> list[str | Path]:
        source: list[str | Path] = [
            "--source",
            self.model("llama"),
            "--text",
            self.text,
            "-o",
            output,
        ]
        length = str(calibrated.LENGTH)
        words = ("--length", length, "--device", "cpu", "--samples", "20", *words)
        return ["refine", self.conversion, *source, *words]


@pytest.fixture(scope="session")
def place(memory: Path) -> Place:
    directory = memory / "on-text"
    directory.mkdir()
    (directory / "text.txt").write_text(calibrated.TEXT)
    return Place(directory)


@pytest.fixture
def alone() -> Iterator[None]:
    """As many threads as each of two processes has."""
    with threads(max(1, count_cpus() // 2)):
        yield


def expected(place: Place, output: Path, kind: str = "llama", **settings: Any) -> bytes:
    """What one process measures."""
    loftq_cli.calibrate(
        place.model(kind),
        place.text,
        output,
        length=calibrated.LENGTH,
        device="cpu",
        **settings,
    )
    return output.read_bytes()


def left(directory: Path) -> list[str]:
    """What lies there, but for what processes said."""
    return sorted(path.name for path in directory.iterdir() if ".std" not in path.name)


@pytest.mark.parametrize(
    ("kind", "moments", "count"),
    [
        ("llama", "diagonal", 3),
        ("albert", "full", 2),
        ("mixtral", "diagonal", 2),
        ("mixtral", "full", 2),
    ],
)
def test_several_measure_what_one_measures(
    kind: str, moments: str, count: int, place: Place, scratch: Path, alone: None
) -> None:
    """To the last bit: what is summed is float32, in float64."""
    output = scratch / "stats.safetensors"
    first, *others = several.run(
        place.calibrate(output, kind, "--moments", moments), scratch, count
    )
    assert [each.code for each in (first, *others)] == [0] * count, first.stderr
    assert f"{count} processes share {WINDOWS} windows" in first.stderr
    assert "wrote" in first.stdout
    assert [(each.stdout, each.stderr) for each in others] == [("", "")] * (count - 1)
    assert left(scratch) == ["stats.safetensors"]
    one = expected(place, scratch / "one.safetensors", kind, moments=moments)
    assert output.read_bytes() == one


def test_more_processes_than_windows(place: Place, scratch: Path, alone: None) -> None:
    output = scratch / "stats.safetensors"
    ended = several.run(place.calibrate(output, "llama", "--samples", "1"), scratch)
    assert [each.code for each in ended] == [0, 0]
    assert output.read_bytes() == expected(place, scratch / "one.safetensors", samples=1)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (["--seed", "1"], "seed 1 and 0"),
        (["--moments", "full"], "moments full and diagonal"),
        (["--text", "more.txt"], "files ["),
    ],
)
def test_ranks_that_would_measure_something_else_are_refused(
    own: list[str], said: str, place: Place, scratch: Path
) -> None:
    (scratch / "more.txt").write_text("More. " * 40)
    words = [str(scratch / word) if word.endswith(".txt") else word for word in own]
    output = scratch / "stats.safetensors"
    first, second = several.run(place.calibrate(output), scratch, own={1: words})
    assert (first.code, second.code) == (5, 5)
    (line,) = [each for each in first.stderr.splitlines() if "error" in each]
    assert "rank 1 (on " in line
    assert "and rank 0 (on " in line
    assert f"would not make the same bytes: {said}" in line
    assert "loftq[1]: error: rank 1 of 2: rank 0 ended before all was done" in second.stderr
    assert left(scratch) == ["more.txt"]


def one_line(ended: processes.Ended, said: str) -> None:
    """It has ended with exit code 5, and one line that says why."""
    assert ended.code == 5, ended.stderr
    (line,) = [each for each in ended.stderr.splitlines() if "error" in each]
    assert said in line
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("which", [0, 1])
def test_if_one_is_killed_the_other_ends_and_nothing_is_half_written(
    which: int, place: Place, scratch: Path, alone: None
) -> None:
    output = scratch / "stats.safetensors"
    ended = several.run(
        place.calibrate(output), scratch, faults={which: accidents.at_call(Calibration, "run", 15)}
    )
    assert ended[which].code == -signal.SIGKILL
    said = "rank 1 of 2 is gone: its process has ended" if which else "rank 1 of 2: rank 0"
    one_line(ended[1 - which], said)
    assert not output.exists()
    if which:
        assert left(scratch) == []
    one = expected(place, output)  # and cleans up what rank 0 left when it was killed
    assert left(scratch) == ["stats.safetensors"]
    assert one == expected(place, scratch / "one.safetensors")


def test_if_one_does_not_answer_the_other_ends(place: Place, scratch: Path) -> None:
    stopped = accidents.at_call(Calibration, "run", 15, signal.SIGSTOP)
    running = several.start(
        place.calibrate(scratch / "stats.safetensors"),
        scratch,
        faults={0: accidents.impatient, 1: stopped},
    )
    one_line(running[0].end(), "rank 1 of 2 is gone: there has been no sign of it for 2 s")
    running[1].send(signal.SIGKILL)
    running[1].end()
    assert left(scratch) == []


def test_what_is_wrong_with_the_model_is_said_wherever_it_is_found(
    place: Place, scratch: Path
) -> None:
    first, second = several.run(
        place.calibrate(scratch / "stats.safetensors"), scratch, faults={1: accidents.overflow}
    )
    assert (first.code, second.code) == (3, 3)
    for each in (first, second):
        assert "model.layers.0.self_attn.q_proj.weight: the inputs hold NaN or Inf" in each.stderr
    assert left(scratch) == []


STAGES = ("--epochs", "2", "--end-to-end", "3")


def refine_alone(place: Place, output: Path) -> None:
    """In this process, with as many threads as each of two has."""
    with threads(max(1, count_cpus() // 2)):
        loftq_cli.refine(
            place.conversion,
            output,
            source=place.model("llama"),
            text=place.text,
            length=calibrated.LENGTH,
            samples=20,
            device="cpu",
            epochs=2,
            end_to_end=3,
        )


@pytest.fixture(scope="session")
def refined(place: Place) -> dict[str, Any]:
    """What one process makes of the conversion."""
    output = place.directory / "out"
    refine_alone(place, output)
    found = checkpoints.comparable(output)
    shutil.rmtree(output)
    return found


def test_four_refine_to_the_bytes_of_one(
    place: Place, scratch: Path, refined: dict[str, Any]
) -> None:
    """And two, which the next test starts."""
    count = 4
    if max(1, count_cpus() // count) != max(1, count_cpus() // 2):
        pytest.skip("four processes have fewer threads each, and so other bytes")
    output = place.directory / "out"
    first, *others = several.run(place.refine(output, *STAGES), scratch, count)
    assert [each.code for each in (first, *others)] == [0] * count, first.stderr
    assert f"{count} processes share the 4 windows of each step" in first.stderr
    assert [(each.stdout, each.stderr) for each in others] == [("", "")] * (count - 1)
    assert checkpoints.comparable(output) == refined
    assert not (output.parent / ".out.loftq-refine").exists()
    shutil.rmtree(output)


@pytest.mark.parametrize(("which", "again"), [(0, 1), (1, 2)])
def test_a_refinement_goes_on_after_one_was_killed(
    which: int, again: int, place: Place, scratch: Path, refined: dict[str, Any]
) -> None:
    """With the blocks that were finished: the second is being trained when it happens."""
    output = place.directory / "out"
    arguments = place.refine(output, *STAGES)
    ended = several.run(arguments, scratch, faults={which: accidents.at_call(Trainer, "step", 12)})
    assert ended[which].code == -signal.SIGKILL
    one_line(ended[1 - which], "rank 1 of 2 is gone" if which else "rank 1 of 2: rank 0")
    journal = output.parent / ".out.loftq-refine/journal"
    assert journal.read_text().count('"tensor"') == 1
    if again == 1:
        refine_alone(place, output)
    else:
        first, _ = several.run(arguments, scratch)
        assert first.code == 0
        assert "resuming" in first.stderr
    assert checkpoints.comparable(output) == refined
    assert not journal.parent.exists()
    shutil.rmtree(output)


def test_processes_that_cannot_halve_the_windows_of_a_step_are_refused(
    place: Place, scratch: Path
) -> None:
    for ended in several.run(place.refine(scratch / "out"), scratch, 3):
        assert ended.code == 2
        assert "refine takes 2 or 4 processes, or one, and there are 3" in ended.stderr
    for ended in several.run(place.refine(scratch / "out", "--samples", "4"), scratch, 4):
        assert ended.code == 3
        assert "3 windows to train on, for 4 processes" in ended.stderr
    assert left(scratch) == []
