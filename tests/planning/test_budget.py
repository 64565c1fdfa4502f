"""``--target-size`` and ``--fit``: what is asked for is what is taken, and no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import loftq_cli
from loftq_cli.errors import UnsupportedInputError, UsageError
from tests.support import checkpoints

QUICK: dict[str, Any] = {"iters": 0, "rank": 2, "threads": 1}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoints.write(tmp_path / "model", checkpoints.llama(layers=2))


def files(out: Path) -> int:
    found = [*out.glob("*.safetensors"), *(out / "loftq_init").glob("*.safetensors")]
    assert len(found) == 2
    return sum(path.stat().st_size for path in found)


@pytest.mark.parametrize("size", ["66kB", "80kB", "0.09MB"])
def test_the_files_are_of_the_size_and_use_it(model: Path, tmp_path: Path, size: str) -> None:
    out = tmp_path / "out"
    manifest = loftq_cli.convert(model, out, target_size=size, **QUICK)
    asked = round(float(size[:-2]) * {"k": 10**3, "M": 10**6}[size[-2]])
    assert files(out) <= asked
    widths = {each["bits"] for each in manifest["matrices"]}
    assert len(widths) > 1
    smallest = min(
        each["shape"][0] * each["shape"][1] for each in manifest["matrices"] if each["bits"] < 8
    )
    assert asked - files(out) < smallest  # a byte for each weight is more than any step


def test_it_is_the_target_that_it_comes_to(model: Path, tmp_path: Path) -> None:
    first = loftq_cli.convert(model, tmp_path / "first", target_size="70kB", **QUICK)
    target = first["recipe"]["target_bpw"]
    second = loftq_cli.convert(model, tmp_path / "second", target_bpw=target, **QUICK)
    assert first["fingerprint"] == second["fingerprint"]
    again = loftq_cli.convert(model, tmp_path / "first", target_size="70kB", **QUICK)
    assert again["environment"] == first["environment"]  # nothing was to do


def test_a_size_below_the_smallest_says_what_that_is(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="files take at least") as error:
        loftq_cli.plan(model, tmp_path / "out", target_size="1kB", **QUICK)
    least = error.value.message.partition("at least ")[2].partition(" in layout")[0]
    value, unit = least.split()
    above = f"{float(value) + 0.01}{unit}"
    loftq_cli.convert(model, tmp_path / "out", target_size=above, **QUICK)
    with pytest.raises(UsageError):
        loftq_cli.plan(model, tmp_path / "out", target_size=f"{float(value) - 0.01}{unit}", **QUICK)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_size": "1GB", "fit": "1GB"}, "only one can decide"),
        ({"target_size": "1GB", "bits": 2}, "--target-size 1GB and --bits 2"),
        ({"fit": "1GB", "target_bpw": 3.0}, "--fit 1GB and --target-bpw 3"),
        ({"fit_length": 5}, "--fit-length 5 is for --fit"),
        ({"fit_batch": 5, "target_size": "1GB"}, "--fit-batch 5 is for --fit"),
        ({"target_size": "much"}, "--target-size 'much'"),
        ({"fit": "1GB", "fit_batch": 0}, "--fit-batch 0: must be"),
        ({"fit": "1GB", "fit_length": -1}, "--fit-length -1: must be"),
    ],
)
def test_what_cannot_be_asked_for(
    options: dict[str, Any], said: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        loftq_cli.plan(model, tmp_path / "out", **options)


def test_a_model_whose_step_cannot_be_counted_is_not_fitted(model: Path, tmp_path: Path) -> None:
    """Its config.json says nothing of its sizes."""
    with pytest.raises(UnsupportedInputError, match="describes another model") as error:
        loftq_cli.plan(model, tmp_path / "out", fit="1GB")
    assert "--target-size" in error.value.hint
