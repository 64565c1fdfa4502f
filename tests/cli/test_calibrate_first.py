"""``loftq convert --calibrate-text``: both steps in one command."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import loftq_cli
from loftq_cli.calibration import calibrate as calibrating
from loftq_cli.calibration import first as calibrate_first
from loftq_cli.checkpoint.source import Source
from loftq_cli.cli.commands import main
from loftq_cli.conversion import engine
from loftq_cli.errors import UsageError
from loftq_cli.statistics.file import open_statistics
from tests.support import models
from tests.support.commands import QUICK, Command

STATS = Path("out.stats.safetensors")
CONVERT = ("convert", "real", *QUICK, "--bits", "2", "--device", "cpu")
TEXT = ("--calibrate-text", "notes.txt")


@pytest.fixture(autouse=True)
def real(place: Path) -> None:
    """``real``, a Llama with a tokenizer, ``notes.txt`` and ``more.txt``."""
    models.save_tokenizer(models.save(models.llama(), place / "real"))
    (place / "notes.txt").write_text("Nobody knew why the mill stood still. " * 40)
    (place / "more.txt").write_text("When the wind blew from the east, " * 40)


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What was measured, in turn."""
    made: list[Path] = []
    real = calibrating.measure

    def counting(source: Source, output: Path, *rest: Any, **settings: Any) -> dict[str, Any]:
        made.append(output)
        return real(source, output, *rest, **settings)

    monkeypatch.setattr(calibrate_first, "measure", counting)
    return made


@pytest.mark.parametrize(
    ("moments", "kind"), [((), "full"), (("--moments", "diagonal"), "diagonal")]
)
def test_it_writes_what_the_two_commands_write(
    moments: tuple[str, ...], kind: str, loftq: Command
) -> None:
    texts = ("--text", "notes.txt", "--text", "more.txt")
    loftq("calibrate", "real", *texts, "--moments", kind)
    apart = loftq(*CONVERT, "--stats", "stats.safetensors", "-o", "apart")
    result = loftq(*CONVERT, *TEXT, "--calibrate-text", "more.txt", *moments)
    assert (apart.exit_code, result.exit_code) == (0, 0), result.stderr
    assert f"tokens ({kind} moments): {STATS.resolve()}" in result.stderr
    assert STATS.read_bytes() == Path("stats.safetensors").read_bytes()
    first, second = (
        json.loads(Path(name, "loftq_manifest.json").read_text()) for name in ("apart", "out")
    )
    assert first["matrices"] == second["matrices"]
    assert first["recipe"] == second["recipe"]
    assert first["outputs"] == second["outputs"]
    assert "without activation statistics" not in result.stderr


def test_full_moments_are_for_narrow_codes_and_no_larger_than_the_model(
    loftq: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kind(*words: str) -> str:
        result = loftq(*CONVERT, *TEXT, *words, "--overwrite")
        assert result.exit_code == 0, result.stderr
        STATS.rename("measured")
        return open_statistics(Path("measured")).kind("model.layers.0.mlp.up_proj.weight")

    assert kind("--bits", "4") == "diagonal"
    assert kind("--bits", "4", "--bits-map", "*.down_proj.*=3") == "full"
    # 64 inputs twice and 128 once in each of two blocks, in float32.
    taken = 2 * 4 * (2 * 64**2 + 128**2)
    held = sum(path.stat().st_size for path in Path("real").glob("*.safetensors"))
    assert taken < held
    monkeypatch.setattr(
        calibrate_first, "entry_bytes", lambda width, full: 4 * width**2 * (held // taken + 1)
    )
    assert kind() == "diagonal"
    assert kind("--moments", "full") == "full"


def test_statistics_of_either_kind_are_taken_if_nobody_asks(
    loftq: Command, measurements: list[Path]
) -> None:
    assert loftq("calibrate", "real", "--text", "notes.txt", "-o", str(STATS)).exit_code == 0
    assert loftq(*CONVERT, *TEXT).exit_code == 0
    assert measurements == []
    assert open_statistics(STATS).kind("model.layers.0.mlp.up_proj.weight") == "diagonal"


def test_feedback_is_the_default_with_full_statistics_and_can_be_switched_off(
    loftq: Command,
) -> None:
    found: dict[str, Any] = {}
    for name, words in (
        ("default", ()),
        ("with", ("--feedback",)),
        ("without", ("--no-feedback",)),
        ("absmax", ("--scale", "absmax")),
        ("again", ("--feedback-passes", "2")),
    ):
        result = loftq(*CONVERT, *TEXT, "--moments", "full", *words, "--overwrite")
        assert result.exit_code == 0, result.stderr
        found[name] = json.loads(Path("out/loftq_manifest.json").read_text())
    recipes = {name: manifest["recipe"]["feedback"] for name, manifest in found.items()}
    fed = {"default": True, "with": True, "again": True}
    assert recipes == {**fed, "without": False, "absmax": False}
    assert found["default"]["outputs"] == found["with"]["outputs"]
    for fed, plain in zip(found["with"]["matrices"], found["without"]["matrices"], strict=True):
        assert fed["weighted"]["final"] < 0.97 * plain["weighted"]["final"]
        assert fed["weighted"]["steps"][:-1] == plain["weighted"]["steps"][:-1]
    again, once = (
        [matrix["weighted"]["final"] for matrix in found[name]["matrices"]]
        for name in ("again", "with")
    )
    assert all(more <= one for more, one in zip(again, once, strict=True))
    assert sum(again) < sum(once)


def test_what_was_measured_is_taken_again(loftq: Command, measurements: list[Path]) -> None:
    assert loftq(*CONVERT, *TEXT).exit_code == 0
    again = loftq(*CONVERT, *TEXT)
    assert again.exit_code == 0
    assert "nothing to do" in again.stdout + again.stderr
    other = loftq(*CONVERT, *TEXT, "--rank", "8", "--overwrite")
    assert other.exit_code == 0
    assert measurements == [Path("out.stats.safetensors").resolve()]


def test_a_target_has_sensitivities_measured(loftq: Command, measurements: list[Path]) -> None:
    wanted = ("--target-bpw", "4", "--moments", "diagonal", "--device", "cpu")
    target = ("convert", "real", *QUICK, *wanted, *TEXT)
    assert loftq(*target).exit_code == 0
    held = open_statistics(STATS)
    assert set(held.sensitivity) == set(held.matrices)
    apart = loftq("calibrate", "real", "--text", "notes.txt", "--sensitivity")
    assert apart.exit_code == 0, apart.stderr
    assert f"of {len(held.matrices)} matrices" in apart.stdout
    assert STATS.read_bytes() == Path("stats.safetensors").read_bytes()
    # What is more than a conversion needs is taken; what is less, is not.
    assert loftq(*CONVERT, *TEXT, "--overwrite").exit_code == 0
    assert len(measurements) == 1
    STATS.unlink()
    assert loftq(*CONVERT, *TEXT, *wanted[2:4], "--overwrite").exit_code == 0
    assert open_statistics(STATS).sensitivity == {}
    refused = loftq(*target)
    assert refused.exit_code == 4
    assert "without sensitivities, by which a target is settled" in refused.stderr
    assert loftq(*target, "--overwrite").exit_code == 0
    assert len(measurements) == 3


def test_an_interrupted_conversion_goes_on(
    loftq: Command, measurements: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine, "write_file", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert loftq(*CONVERT, *TEXT).exit_code == 143
    result = loftq(*CONVERT, *TEXT)
    assert result.exit_code == 0
    assert "resuming" in result.stderr
    assert len(measurements) == 1


def test_an_interrupted_measurement_leaves_nothing(
    loftq: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(os.listdir())
    monkeypatch.setattr(calibrating, "write_entry", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert loftq(*CONVERT, *TEXT).exit_code == 143
    assert sorted(os.listdir()) == before


def changed_text() -> None:
    Path("notes.txt").write_text("Something else altogether. " * 40)


def changed_weights() -> None:
    """Other values under the same header, and older than the statistics."""
    path = Path("real/model.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))


def changed_tokenizer() -> None:
    path = Path("real/tokenizer_config.json")
    path.write_text(path.read_text().rstrip() + "\n ")


def samples() -> None:
    command = ["--text", "notes.txt", "--samples", "2", "-o", str(STATS), "--overwrite"]
    assert CliRunner().invoke(main, ["calibrate", "real", *command]).exit_code == 0


def imported() -> None:
    moments = loftq_cli.Moments(64)
    moments.add(torch.ones(3, 64))
    name = "model.layers.0.mlp.up_proj.weight"
    loftq_cli.save_statistics(STATS, {name: moments}, overwrite=True)


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        (changed_text, (), "of other text"),
        (samples, (), "of other windows"),
        (changed_weights, (), "of a model with other values"),
        (changed_tokenizer, (), "or another tokenizer, than real has now"),
        (imported, (), "of another model"),
        (None, ("--moments", "full"), "with diagonal moments, not full"),
    ],
)
def test_other_statistics_are_kept_unless_they_may_be_replaced(
    change: Any, words: tuple[str, ...], said: str, loftq: Command, measurements: list[Path]
) -> None:
    assert loftq("calibrate", "real", "--text", "notes.txt", "-o", str(STATS)).exit_code == 0
    if change is not None:
        change()
    before = STATS.read_bytes()
    result = loftq(*CONVERT, *TEXT, *words)
    assert (result.exit_code, result.stdout) == (4, "")
    assert said in result.stderr
    assert "--overwrite measures again" in result.stderr
    assert STATS.read_bytes() == before
    assert not Path("out").exists()
    assert loftq(*CONVERT, *TEXT, *words, "--overwrite").exit_code == 0
    assert len(measurements) == 1
    assert open_statistics(STATS).kind("model.layers.0.mlp.up_proj.weight") == "full"


def test_a_file_of_something_else_is_never_replaced(loftq: Command) -> None:
    STATS.write_text("mine")
    result = loftq(*CONVERT, *TEXT, "--overwrite")
    assert result.exit_code == 4
    assert "is not a file of statistics" in result.stderr
    assert STATS.read_text() == "mine"


@pytest.mark.parametrize("words", [(), ("--rank", "8")])
def test_an_output_of_other_settings_is_noticed_before_anything_is_measured(
    words: tuple[str, ...], loftq: Command, measurements: list[Path]
) -> None:
    assert loftq(*CONVERT, *words).exit_code == 0
    result = loftq(*CONVERT, *TEXT)
    assert result.exit_code == 4
    assert "stats None there, 'to be measured' now" in result.stderr
    assert ("rank 8 there, 4 now" in result.stderr) == bool(words)
    assert not measurements
    assert not STATS.exists()


def test_a_touched_model_is_the_same(loftq: Command, measurements: list[Path]) -> None:
    assert loftq(*CONVERT, *TEXT).exit_code == 0
    os.utime("real/config.json")
    os.utime("real/model.safetensors")
    assert loftq(*CONVERT, *TEXT).exit_code == 0
    assert len(measurements) == 1


def test_a_recipe_that_was_saved_is_taken_again(loftq: Command, measurements: list[Path]) -> None:
    assert loftq(*CONVERT, *TEXT, "--save-recipe", "r.toml").exit_code == 0
    for recipe in ("r.toml", "out/loftq_manifest.json"):
        result = loftq("convert", "real", "--recipe", recipe, *TEXT)
        assert result.exit_code == 0, result.stderr
        assert "nothing to do" in result.stderr
    assert len(measurements) == 1


def test_where_ranks_differ_too_the_statistics_are_no_matter(loftq: Command) -> None:
    assert loftq(*CONVERT, *TEXT).exit_code == 0
    STATS.unlink()
    result = loftq(*CONVERT, *TEXT, "--rank", "8")
    assert result.exit_code == 4
    assert "rank 4 there, 8 now" in result.stderr
    assert "stats" not in result.stderr


def test_a_directory_that_is_not_ours_is_noticed_before_anything_is_measured(
    loftq: Command, measurements: list[Path]
) -> None:
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("mine")
    result = loftq(*CONVERT, *TEXT)
    assert result.exit_code == 4
    assert "is not the output of a conversion" in result.stderr
    assert not measurements


def test_a_dry_run_measures_nothing(loftq: Command, measurements: list[Path]) -> None:
    result = loftq(*CONVERT, *TEXT, "--dry-run")
    assert result.exit_code == 0
    assert "the statistics are measured first" in result.stderr
    assert not measurements
    assert not STATS.exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((*TEXT, "--stats", "x"), 2, "--stats and --calibrate-text exclude each other"),
        ((*TEXT, "--allow-pickle"), 2, "--allow-pickle and --calibrate-text"),
        ((*TEXT, "--discard-shards"), 2, "--discard-shards and --calibrate-text"),
        (("--moments", "full"), 2, "--moments full needs text"),
        (("--calibrate-text", "none.txt"), 3, "--calibrate-text none.txt: no such file"),
        (("--calibrate-text", "short.txt"), 3, "too short: 62 tokens are needed"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], code: int, said: str, loftq: Command) -> None:
    Path("short.txt").write_text("Too short.")
    before = sorted(os.listdir())
    result = loftq(*CONVERT, *words)
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr
    assert sorted(os.listdir()) == before


def test_from_python(measurements: list[Path]) -> None:
    settings: dict[str, Any] = {"rank": 4, "bits": 2, "iters": 1, "device": "cpu", "threads": 1}
    made = loftq_cli.convert("real", calibrate_text="notes.txt", moments="full", **settings)
    assert {record["weighted"]["kind"] for record in made["matrices"]} == {"full"}
    texts = [Path("notes.txt")]
    assert loftq_cli.convert("real", calibrate_text=texts, moments="full", **settings) == made
    assert len(measurements) == 1
    with pytest.raises(UsageError, match="--moments half"):
        loftq_cli.convert("real", "new", calibrate_text=texts, moments="half")
