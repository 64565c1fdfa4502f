"""The first example of docs/python-api.md runs as it stands."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

import loftq_cli
from tests.support import models
from tests.support.pages import ROOT

PAGE = (ROOT / "docs/python-api.md").read_text("utf-8")


def test_the_functions_that_are_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "basicConfig", lambda level: None)
    models.save_tokenizer(models.save(models.llama(), tmp_path / "my-model"))
    (tmp_path / "notes.txt").write_text("Nobody knew why the mill stood still. " * 40)
    code = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    with caplog.at_level(logging.INFO, "loftq"):
        exec(compile(code, "python-api.md", "exec"), {"loftq_cli": loftq_cli})
    assert (tmp_path / "merged/model.safetensors").is_file()


@pytest.mark.parametrize("name", loftq_cli.__all__)
def test_every_public_name_is_on_the_page(name: str) -> None:
    assert re.search(rf"`(?:loftq_cli\.)?{name}\b|loftq_cli\.{name}\(", PAGE)
