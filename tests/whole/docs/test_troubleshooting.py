"""docs/troubleshooting.md: every error and warning of ours is there, and looks as it shows it."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli import errors
from loftq_cli.cli.commands import main
from loftq_cli.errors import LoftqError
from tests.support import models

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
SECTIONS = dict(re.findall(r"^### (.*)\n((?:(?!^##).*\n)*)", PAGE, flags=re.MULTILINE))
CODES = {"InterruptedConversion": "130, 143", "LoftqError": None, "DownloadAbandoned": None}
EXAMPLES = re.findall(r"^\$ (loftq .*)\n(.*)$", PAGE, flags=re.MULTILINE)
QUERY = "model.layers.0.self_attn.q_proj.weight"

ERRORS = [
    error
    for error in vars(errors).values()
    if isinstance(error, type) and issubclass(error, LoftqError)
]


def sources(*packages: str) -> str:
    """All Python of these packages."""
    found = []
    for package in packages:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        found += [path.read_text("utf-8") for path in Path(spec.origin).parent.rglob("*.py")]
    return "".join(found)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_every_error_has_a_section_with_its_code_and_an_example(error: type[LoftqError]) -> None:
    name = error.__name__
    code = CODES.get(name, str(error.exit_code))
    text = SECTIONS[f"`{name}`" if code is None else f"`{name}` ({code})"]
    if code is not None and name != "MissingStatisticsError":
        assert "loftq: error: " in text
    depth = len(error.__mro__) - len(LoftqError.__mro__)
    assert re.search(rf"^ {{{4 + 2 * depth}}}{name}\b", PAGE, flags=re.MULTILINE)


def test_every_warning_of_ours_has_a_section_with_an_example() -> None:
    named = re.findall(r"^class (\w+)\(\w*Warning\)", sources("loftq_cli"), flags=re.MULTILINE)
    assert len(named) >= 2
    for name in named:
        assert f"\n{name}: " in SECTIONS[f"`{name}`"]


def test_the_texts_of_warnings_are_ours() -> None:
    spoken = re.sub(r'"\s*f?"', "", re.sub(r"'\s*f?\"", "'", sources("loftq_cli")))
    spoken = spoken.replace("{adapter.DIRECTORY}", "loftq_init")
    for name in ("DetachedAdapter", "TrainedBeside"):
        for shown in re.findall(rf"^{name}: (.*)$", SECTIONS[f"`{name}`"], flags=re.MULTILINE):
            end = re.split("[:;…]", shown)[0].removeprefix("out ").strip()
            assert end in spoken, shown


def test_the_messages_of_peft_and_transformers_are_theirs() -> None:
    theirs = PAGE.split("## What PEFT and transformers say")[1].split("\n## ")[0]
    headings = re.findall(r"^### (.*)$", theirs, flags=re.MULTILINE)
    assert len(headings) >= 10
    code = sources("peft", "transformers.quantizers") + "".join(
        (Path(str(importlib.util.find_spec(name).origin))).read_text("utf-8")
        for name in ("transformers.trainer_utils", "transformers.utils.loading_report")
    )
    code = code.replace("`bitsandbytes` 4-bit", "4-bit")
    assert [heading for heading in headings if heading not in code] == []


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with all that the examples of the page take for granted."""
    place = tmp_path_factory.mktemp("troubleshooting")
    source = models.save_tokenizer(models.save(models.llama(), place / "my-model"))
    models.save_tokenizer(models.save(models.llama(intermediate=96), place / "other-model"))
    damaged(source, "nan-model", QUERY, lambda weight: weight[3, 5].fill_(torch.nan))
    damaged(source, "huge-weights", QUERY, lambda weight: weight.mul_(1e10))
    table = "model.embed_tokens.weight"
    damaged(source, "overflowing", table, lambda weight: weight.fill_(torch.inf))
    shutil.copytree(source, place / "cut-short")
    whole = (source / "model.safetensors").read_bytes()
    (place / "cut-short" / "model.safetensors").write_bytes(whole[:-1000])
    (place / "notes.txt").write_text("Nobody knew why the mill stood still. " * 20)
    (place / "empty.txt").write_text("\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        settings: dict[str, Any] = {"bits": 2, "rank": 4, "iters": 5}
        loftq_cli.convert("./my-model", output="out", **settings)
        arguments = (
            "calibrate ./other-model --text notes.txt --length 16 -o other-model.safetensors"
        )
        assert CliRunner().invoke(main, arguments.split()).exit_code == 0
    shutil.copytree(place / "out", place / "altered")
    with open(place / "altered" / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    return place


def damaged(source: Path, name: str, tensor: str, change: object) -> None:
    """A copy of ``source`` beside it, with one tensor changed in place."""
    copy = shutil.copytree(source, source.with_name(name))
    tensors = load_file(copy / "model.safetensors")
    change(tensors[tensor])  # type: ignore[operator]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("command", "shown"), EXAMPLES)
def test_the_examples_end_as_shown(
    command: str, shown: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    before = sorted(place.iterdir())
    result = CliRunner().invoke(main, shlex.split(command)[1:])
    section = next(name for name, text in SECTIONS.items() if f"$ {command}\n" in text)
    assert f"({result.exit_code})" in section
    said = result.stderr.strip().splitlines()[-1].replace(str(place), "/home/me")
    assert said == shown or (shown.endswith("…") and said.startswith(shown[:-1])), said
    assert sorted(place.iterdir()) == before


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 13
