"""docs/training: the scripts are run as they stand, but for the number of steps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import loftq_cli
from tests.support import models

pytest.importorskip("trl")
PAGE = Path(__file__).parents[3] / "docs" / "training" / "trl.md"
SCRIPTS = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a conversion, texts and pairs, as the page wants them."""
    source = models.save_tokenizer(models.save(models.llama(), tmp_path / "source"))
    settings: dict[str, Any] = {"bits": 2, "rank": 4, "iters": 1, "threads": 1, "layout": "loftq"}
    loftq_cli.convert(source, tmp_path / "out", **settings)
    texts = [{"text": "the mill stood still for years"}] * 8
    pairs = [{"prompt": "the mill", "chosen": " stood", "rejected": " ran"}] * 8
    for name, rows in (("texts", texts), ("pairs", pairs)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_scripts_train_one_after_the_other(place: Path) -> None:
    assert len(SCRIPTS) == 2
    for script in SCRIPTS:
        assert "max_steps=100" in script
        exec(script.replace("max_steps=100", "max_steps=2"), {})
    before, after = (
        loftq_cli.load(place / "out", adapter=place / name) for name in ("trained", "preferred")
    )
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        changed = (before.eval()(tokens).logits - after.eval()(tokens).logits).abs().max()
    assert changed > 0
