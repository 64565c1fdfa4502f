"""``make gpu`` on a stand-in for a CUDA device, with tiny shapes: it runs through, says what failed
and what it left out, and does nothing where there is no device."""

from __future__ import annotations

import sys
from pathlib import Path

import peft  # what is imported with it must see no device
import pytest
import torch

from loftq_cli.numerics import fused_panel
from tests.support.stand_in.runtime import stand_in_devices
from tests.whole.gpu import check, checks, measure
from tests.whole.gpu.scale import FULL, TINY

DEVICE = torch.device("cuda", 0)


def ran(place: Path, *titles: str) -> tuple[int, str]:
    """How many parts failed, and the report."""
    parts = tuple((title, part) for title, part in check.PARTS if title in titles)
    assert len(parts) == len(titles)
    failed = check.run(DEVICE, TINY, place, parts)
    return failed, (place / "gpu.md").read_text("utf-8")


def test_every_part_runs_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert peft.__version__
    monkeypatch.setattr(measure, "_has_bitsandbytes", lambda: False)  # its kernels are CUDA's own
    few = measure._METHODS[:1], [("nf", 2)]
    monkeypatch.setattr(measure, "_METHODS", few[0])
    monkeypatch.setattr(checks, "methods_of", lambda: few[1])
    titles = [title for title, _ in check.PARTS if title != "A model's whole way"]
    with stand_in_devices(2, bfloat16=True):
        failed, report = ran(tmp_path, *titles)
    assert failed == 0, report
    assert all(f"## {title}\n" in report for title in titles)
    assert "2 devices: the same bytes." in report
    assert "triton is not installed: not tested." in report
    assert "| 5 full SVDs, as PEFT |" in report
    assert "0 of 8 parts failed." in report
    assert not (tmp_path / "checkpoint").exists()


def test_a_part_that_fails_is_told_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_panel, "_kernels", lambda: None)

    def fails(*_: object) -> list[str]:
        raise AssertionError("0.5 instead of 0.1")

    with stand_in_devices(bfloat16=True):
        parts = (("One", fails), ("Roofs", measure.roofs))
        assert check.run(DEVICE, TINY, tmp_path, parts) == 1
    report = (tmp_path / "gpu.md").read_text("utf-8")
    assert "AssertionError: 0.5 instead of 0.1" in report
    assert "GB/s, read and written" in report


def test_what_there_is_no_time_for_is_said(tmp_path: Path) -> None:
    from dataclasses import replace

    with stand_in_devices():
        assert check.run(DEVICE, replace(TINY, seconds=-1.0), tmp_path, check.PARTS) == 0
    report = (tmp_path / "gpu.md").read_text("utf-8")
    assert report.count("Not measured: no time was left.") == len(check.PARTS)


def test_without_a_device_nothing_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["check", str(tmp_path / "gpu")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main() == 0
    assert capsys.readouterr().out == "no CUDA device: nothing was tested, nothing measured\n"
    assert not (tmp_path / "gpu").exists()


def test_it_is_done_within_eight_minutes() -> None:
    assert FULL.seconds <= 8 * 60 - 60  # when the last part may begin
