"""What is said about settings: at the right moment, and about those that have no effect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.commands import QUICK, Command

NARROW = "without activation statistics"


def test_nothing_is_remarked_where_nothing_is_done(loftq: Command) -> None:
    words = ("convert", "model", "--bits", "2", "--dense-dtype", "float16", "--embeddings", *QUICK)
    first = loftq(*words)
    assert first.exit_code == 0, first.stderr
    assert NARROW in first.stderr
    again = loftq(*words)
    assert again.exit_code == 0, again.stderr
    assert again.stderr == "loftq: nothing to do: out is complete and verified\n"


def test_a_plan_comes_with_its_remarks(loftq: Command) -> None:
    assert NARROW in loftq("convert", "model", "--bits", "2", "--dry-run").stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target-bpw", "3"], True),
        (["--target-bpw", "20"], False),
        (["--target-bpw", "20", "--bits-map", "*.mlp.*=2"], True),
        (["--bits", "4"], False),
    ],
)
def test_statistics_are_recommended_if_codes_may_be_narrow(
    words: list[str], said: bool, loftq: Command
) -> None:
    result = loftq("convert", "model", "--dry-run", "--rank", "1", *words)
    assert result.exit_code == 0, result.stderr
    assert (NARROW in result.stderr) == said


@pytest.mark.parametrize(
    ("words", "remark"),
    [
        (["--dense-dtype", "float16"], "--dense-dtype float16 changes nothing: the layout is bnb"),
        (
            ["--method", "uniform-tensor", "--block-size", "32"],
            "--block-size 32 changes nothing: uniform-tensor has one scale for a whole matrix",
        ),
        (["--iters", "0", "--order", "svd-first"], "--order svd-first changes nothing: with"),
        (["--iters", "0", "--svd", "exact"], "--svd exact changes nothing: with --iters 0"),
        (["--layout", "dense", "--dense-dtype", "float16"], None),
        (["--dense-dtype", "source", "--svd", "exact"], None),
    ],
)
def test_a_setting_without_effect_is_named(
    words: list[str], remark: str | None, loftq: Command
) -> None:
    result = loftq("convert", "model", "--dry-run", *words)
    assert result.exit_code == 0, result.stderr
    assert ("changes nothing" in result.stderr) == (remark is not None)
    assert remark is None or remark in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "model", "--revision", "v1"],
        ["convert", "model", "--revision", "v1", "--dry-run"],
        ["calibrate", "model", "--text", "notes.txt", "--revision", "v1"],
        ["inspect", "out", "--revision", "v1"],
        ["error-report", "out", "--revision", "v1"],
        ["merge", "out", "-o", "merged", "--revision", "v1"],
    ],
)
@pytest.mark.usefixtures("out")
def test_a_directory_has_no_revisions(words: list[str], loftq: Command, place: Path) -> None:
    (place / "notes.txt").write_text("Nobody knew why.")
    before = sorted(path.name for path in place.iterdir())
    result = loftq(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert f"--revision v1 is for what lies on the hub, and {words[1]} is a path" in line
    assert sorted(path.name for path in place.iterdir()) == before


def test_a_directory_needs_no_connection(loftq: Command) -> None:
    """So --offline is no contradiction: scripts may always give it."""
    assert loftq("convert", "model", "--offline", *QUICK).exit_code == 0
    assert loftq("inspect", "out", "--offline").exit_code == 0


NEEDS = {
    "bnb": ["transformers", "peft", "accelerate", "bitsandbytes"],
    "gptq": ["transformers", "peft", "accelerate", "optimum", "gptqmodel"],
    "compressed": ["transformers", "peft", "loftq_cli"],
    "loftq": ["transformers", "peft", "loftq_cli"],
    "dense": ["transformers", "peft"],
}


@pytest.mark.parametrize("layout", NEEDS)
def test_what_the_output_needs_to_be_loaded_is_said(
    layout: str, loftq: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = NEEDS[layout][-1]
    monkeypatch.setattr(
        "loftq_cli.layouts.needs.find_spec", lambda name: None if name == missing else object()
    )
    method = ("--method", "uniform") if layout in ("gptq", "compressed") else ()
    words = ("convert", "model", "--layout", layout, *method, *QUICK)
    install = f'pip install "loftq-cli[{"gptq" if layout == "gptq" else "train"}]"'
    line = f"{', '.join(NEEDS[layout])}: {install} ({missing} not installed here)"
    assert line in loftq(*words, "--dry-run").stdout
    assert line in loftq(*words).stdout
    assert line in loftq("inspect").stdout
    expected = {"imports": NEEDS[layout], "missing": [missing], "install": install}
    for shown in (loftq(*words, "--dry-run", "--json"), loftq("inspect", "--json")):
        assert json.loads(shown.stdout)["needs"] == expected
