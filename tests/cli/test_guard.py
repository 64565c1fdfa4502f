"""Every way to fail: one line on stderr, the right exit code, nothing on stdout."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

import loftq_cli.checkpoint.locate
import loftq_cli.conversion.prepare
import loftq_cli.reporting.inspect
import loftq_cli.reporting.residuals
from tests.support import checkpoints
from tests.support.commands import QUICK, Command

ROOT = Path(loftq_cli.__file__).parents[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bits", "5"], "--bits 5: not one of 2, 3, 4, 8"),
        (["--bits", "0"], "--bits 0"),
        (["--rank", "0"], "--rank 0: must be a whole number from 1"),
        (["--rank", "-1"], "--rank -1"),
        (["--iters", "-1"], "--iters -1: must be a whole number from 0"),
        (["--block-size", "48"], "--block-size 48: not one of 32, 64, 128, 256"),
        (["--threads", "0"], "--threads 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--lora-alpha", "0"], "--lora-alpha 0"),
        (["--lora-alpha", "nan"], "--lora-alpha nan"),
        (["--device", "tpu"], "--device tpu: use auto, cpu, cuda or cuda:N"),
        (["--method", "uniform-block", "--scale", "mse"], "--scale does not apply"),
        (["--scale-dtype", "int8", "--layout", "gptq"], "only layout loftq can"),
        (["--scale-dtype", "int8", "--layout", "bnb"], "only layout loftq can"),
        (["--scale-dtype", "bfloat16", "--layout", "dense"], "only layout loftq can"),
        (["--scale-dtype", "int8", "--method", "uniform-tensor"], "does not apply"),
        (["--include", "*nothing*"], "--include '*nothing*' matches no tensor"),
        (["--exclude", "*nothing*"], "--exclude '*nothing*' matches no tensor"),
        (["--layout", "bnb", "--bits", "2"], "--layout bnb cannot hold"),
        (["--output", "model/out"], "inside the input"),
    ],
)
def test_bad_settings_are_usage_errors(words: list[str], said: str, loftq: Command) -> None:
    result = loftq("convert", "model", *words)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("loftq: error: ")
    assert said in line
    assert os.listdir() == ["model"]


@pytest.mark.parametrize(
    "words",
    [
        ["convert"],
        ["convert", "model", "--bits", "four"],
        ["convert", "model", "--method", "best"],
        ["convert", "model", "--nonsense"],
        ["convert", "model", "another"],
        ["inspect", "--nonsense"],
        ["error-report", "--json", "--csv"],
        ["nonsense"],
        ["--nonsense"],
    ],
)
def test_what_click_refuses_is_a_usage_error_too(words: list[str], loftq: Command) -> None:
    result = loftq(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error: " in result.stderr


def empty(path: Path) -> None:
    path.mkdir()


def only_pickles(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def lacks_a_shard(path: Path) -> None:
    checkpoints.write(path, checkpoints.llama(), cuts=(4,))
    (path / "model-00002-of-00002.safetensors").unlink()


def holds_nan(path: Path) -> None:
    tensors = checkpoints.llama()
    tensors["model.layers.0.mlp.up_proj.weight"][1, 2] = torch.nan
    checkpoints.write(path, tensors)


def quantized_already(path: Path) -> None:
    checkpoints.write(path, checkpoints.llama(), {"quantization_config": {"quant_method": "awq"}})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (None, "./bad: no such file or directory"),
        (Path.touch, "is a file, not a directory"),
        (empty, "no model.safetensors"),
        (only_pickles, "pytorch_model.bin"),
        (lacks_a_shard, "model-00002-of-00002.safetensors: missing"),
        (holds_nan, "tensor 'model.layers.0.mlp.up_proj.weight' holds nan at [1, 2]"),
        (quantized_already, "quantized already"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(make: Any, said: str, loftq: Command) -> None:
    if make:
        make(Path("bad"))
    before = sorted(os.listdir())
    result = loftq("convert", "./bad")
    assert result.exit_code == 3
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert said.removeprefix("./") in line
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("model", ["/no/such/place", "no/such/place", "what is this?"])
def test_what_is_neither_a_path_nor_a_hub_id_is_bad_input(model: str, loftq: Command) -> None:
    result = loftq("convert", model)
    assert result.exit_code == 3
    assert model in result.stderr


@pytest.mark.parametrize("command", ["inspect", "error-report"])
def test_reports_on_what_is_no_conversion_are_bad_input(command: str, loftq: Command) -> None:
    for words, said in (
        ([command], "out: no such directory"),
        ([command, "model"], "model: no loftq_manifest.json"),
    ):
        result = loftq(*words)
        assert result.exit_code == 3
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert said in line


def test_an_output_in_the_way_is_a_conflict(loftq: Command) -> None:
    Path("out").write_text("mine")
    result = loftq("convert", "model", *QUICK)
    assert result.exit_code == 4
    assert len(result.stderr.splitlines()) == 1
    assert Path("out").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_the_environments_fault(loftq: Command) -> None:
    result = loftq("convert", "model", "-o", "/proc/nowhere/out", *QUICK)
    assert result.exit_code == 5
    assert "/proc/nowhere" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_names_from_files_cannot_drive_the_terminal(loftq: Command) -> None:
    tensors = checkpoints.llama()
    tensors["model.layers.1.\x1b[31mred\n.weight"] = torch.full((4, 4), torch.nan)
    checkpoints.write(Path("hostile"), tensors)
    result = loftq("convert", "hostile")
    assert result.exit_code == 3
    assert "\x1b" not in result.stderr
    assert all(line.startswith("loftq: ") for line in result.stderr.splitlines())
    shown = loftq("convert", "hostile", "--dry-run").stdout
    assert "\x1b" not in shown
    assert r"\x1b[31mred\n.weight" in shown


@pytest.mark.parametrize("json", [False, True])
def test_a_path_that_is_not_unicode_can_be_printed(json: bool, loftq: Command) -> None:
    name = os.fsdecode(b"out-\xff")
    result = loftq("convert", "model", "-o", name, *QUICK)
    assert result.exit_code == 0, result.stderr
    result = loftq("inspect", name, *(["--json"] if json else []))
    assert result.exit_code == 0, result.stderr
    assert r"\udcff" in result.stdout


# Tracebacks and bugs


def test_there_is_a_traceback_only_when_asked_for(loftq: Command) -> None:
    assert "Traceback" not in loftq("convert", "./nowhere").stderr
    result = loftq("convert", "./nowhere", "-v")
    assert "Traceback" in result.stderr
    assert result.exit_code == 3
    assert result.stderr.splitlines()[-1].startswith("loftq: error: ")


@pytest.mark.parametrize("flags", [[], ["-v"]])
def test_an_unforeseen_error_says_that_it_is_a_bug(
    flags: list[str], loftq: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("by\nnothing")

    monkeypatch.setattr(loftq_cli.conversion.prepare, "prepare", prepare)
    result = loftq("convert", "model", *flags)
    assert result.exit_code == 1
    assert result.stdout == ""
    *_, what, bug = result.stderr.splitlines()
    assert what == r"loftq: internal error: ZeroDivisionError: by\nnothing"
    assert "this is a bug in loftq" in bug
    assert ("Traceback" in result.stderr) == bool(flags)


@pytest.mark.parametrize("command", ["inspect", "error-report"])
@pytest.mark.usefixtures("out")
def test_the_reports_too(command: str, loftq: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*arguments: Any) -> None:
        raise RuntimeError("boom")

    for module in ("inspect", "residuals"):
        monkeypatch.setattr(f"loftq_cli.reporting.{module}.open_output", explode)
    result = loftq(command)
    assert result.exit_code == 1
    assert "this is a bug in loftq" in result.stderr


@pytest.mark.parametrize("words", [["inspect", "--json"], ["inspect"], ["error-report", "--csv"]])
@pytest.mark.usefixtures("out")
def test_what_libraries_print_is_no_part_of_the_answer(
    words: list[str], loftq: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gptqmodel greets on stdout when transformers loads a model of layout gptq."""
    plain = loftq(*words)
    for module in ("inspect", "residuals"):
        place = f"loftq_cli.reporting.{module}.open_output"
        real = getattr(loftq_cli.reporting, module).open_output

        def greet(*arguments: Any, real: Any = real, **options: Any) -> Any:
            sys.stdout.write("a greeting\n")
            return real(*arguments, **options)

        monkeypatch.setattr(place, greet)
    result = loftq(*words)
    assert "a greeting\n" in result.stderr
    assert result.stdout == plain.stdout != ""


def test_ctrl_c_exits_with_130(loftq: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loftq_cli.conversion.prepare, "prepare", prepare)
    result = loftq("convert", "model")
    assert result.exit_code == 128 + signal.SIGINT
    (line,) = result.stderr.splitlines()
    assert "interrupted by SIGINT" in line


def test_an_interrupted_refinement_goes_on(loftq: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def locate(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loftq_cli.checkpoint.locate, "locate_output", locate)
    result = loftq("refine", "out", "--source", "model", "--text", "a.txt", "-o", "refined")
    assert result.exit_code == 128 + signal.SIGINT
    (line,) = result.stderr.splitlines()
    assert "interrupted by SIGINT (run the same command again to resume)" in line


@pytest.mark.parametrize(("set_to", "expected"), [(None, "ERROR"), ("INFO", "INFO")])
def test_torch_does_not_say_in_pages_what_is_said_in_a_line(
    set_to: str | None, expected: str, loftq: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", set_to or "")
    if set_to is None:
        monkeypatch.delenv("TORCH_CPP_LOG_LEVEL")
    loftq("inspect", "nowhere")
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == expected


def test_memory_that_runs_out_anywhere_is_no_bug(
    loftq: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        loftq_cli.conversion.prepare, "prepare", lambda *_, **__: bytearray(1 << 50)
    )
    result = loftq("convert", "model")
    assert result.exit_code == 5
    (line,) = result.stderr.splitlines()
    assert line == "loftq: error: out of memory (free memory)"


@pytest.mark.parametrize("words", [["convert", "model"], ["inspect", "model"]])
def test_sigterm_exits_with_143_whatever_handles_errors_on_its_way(
    words: list[str], loftq: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminated(*arguments: Any, **options: Any) -> None:
        with contextlib.suppress(Exception):
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(100):
                time.sleep(0.1)

    monkeypatch.setattr(loftq_cli.conversion.prepare, "prepare", terminated)
    monkeypatch.setattr(loftq_cli.reporting.inspect, "inspect", terminated)
    result = loftq(*words)
    assert result.exit_code == 128 + signal.SIGTERM
    (line,) = result.stderr.splitlines()
    assert "interrupted by SIGTERM" in line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_torch_is_imported_is_not_swallowed(
    number: signal.Signals, place: Path
) -> None:
    """A torch that handles whatever is raised in it, as parts of the real one do."""
    (place / "torch.py").write_text(
        "import os, time\n"
        "try:\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    time.sleep(60)\n"
        "except BaseException:\n"
        "    pass\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "loftq_cli", "convert", "model"],
        capture_output=True,
        text=True,
        cwd=place,
        env={**os.environ, "PYTHONPATH": f"{place}{os.pathsep}{ROOT}"},
        check=False,
    )
    assert result.returncode == 128 + number
    (line,) = result.stderr.splitlines()
    assert f"interrupted by {number.name}" in line


def inspect_into(stdout: BinaryIO, place: Path) -> tuple[int, str]:
    """(exit code, stderr) of ``loftq inspect`` with this stdout."""
    result = subprocess.run(
        [sys.executable, "-m", "loftq_cli", "inspect"],
        stdout=stdout,
        stderr=subprocess.PIPE,
        cwd=place,
        text=True,
        check=False,
    )
    return result.returncode, result.stderr


@pytest.mark.usefixtures("out")
def test_a_reader_that_goes_away_is_no_error(place: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        code, said = inspect_into(pipe, place)
    assert (code, said) == (0, "")


@pytest.mark.usefixtures("out")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_results_that_do_not_fit_on_the_disk_are_the_environments_fault(place: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        code, said = inspect_into(full, place)
    assert code == 5
    (line,) = said.splitlines()
    assert line == "loftq: error: standard output: No space left on device"


@pytest.mark.parametrize("flag", ["-v", "--verbose"])
@pytest.mark.parametrize(
    "words",
    [
        ("convert", "./nowhere"),
        ("inspect", "./nowhere"),
        ("error-report", "./nowhere"),
        ("merge", "./nowhere", "-o", "merged"),
        ("calibrate", "./nowhere", "--text", "./none"),
        ("push", "./nowhere", "me/it"),
    ],
    ids=lambda words: words[0],
)
def test_verbose_shows_where_a_mistake_was_noticed(
    words: tuple[str, ...], flag: str, loftq: Command
) -> None:
    plain, verbose = loftq(*words), loftq(*words, flag)
    assert plain.exit_code == verbose.exit_code == 3
    assert "Traceback" in verbose.stderr
    assert "Traceback" not in plain.stderr
    assert verbose.stderr.splitlines()[-1] == plain.stderr.splitlines()[-1]


def test_error_report_takes_nothing_from_the_hub_if_it_is_offline(loftq: Command) -> None:
    result = loftq("error-report", "owner/name", "--offline")
    assert result.exit_code == 5
    assert "owner/name" in result.stderr
