"""A model that brings its own code: it is run if the caller says so, and not otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import loftq_cli
from loftq_cli.errors import UnsupportedInputError
from tests.support import models

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

class OwnLM(OwnForCausalLM):
    pass
"""
TOKENS = torch.arange(12).view(2, 6) + 3


@pytest.fixture(
    params=["OwnForCausalLM", "OwnLM"]
)  # a name that says what it is, and one that does not
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """The conversion of such a model, its code copied by hand."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "run"))
    source = models.save(models.llama(), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config |= {
        "model_type": "own_llama",
        "architectures": [request.param],
        "auto_map": {
            "AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForCausalLM": f"modeling_own.{request.param}",
        },
    }
    (source / "config.json").write_text(json.dumps(config))
    (source / "modeling_own.py").write_text(CODE)
    settings: dict[str, Any] = {"bits": 2, "rank": 4, "iters": 1, "threads": 1, "layout": "loftq"}
    loftq_cli.convert(source, output=tmp_path / "out", **settings)
    assert not (tmp_path / "out" / "modeling_own.py").exists()
    shutil.copy(source / "modeling_own.py", tmp_path / "out")
    return tmp_path / "out"


def test_it_is_loaded_on_request(output) -> None:
    model = loftq_cli.load(output, trust_remote_code=True)
    assert isinstance(model, peft.PeftModel)
    (name,) = json.loads((output / "config.json").read_text())["architectures"]
    assert type(model.get_base_model()).__name__ == name
    with torch.no_grad():
        assert model(TOKENS).logits.isfinite().all()
    assert all(p.any() for name, p in model.named_parameters() if ".lora_B." in name)


def test_without_a_word_of_the_caller_its_code_is_not_run(output) -> None:
    with pytest.raises(UnsupportedInputError, match="trust_remote_code=True runs the code"):
        loftq_cli.load(output)


def test_the_snippet_runs_it(output) -> None:
    text = loftq_cli.inspect(output)["loading"]
    assert "AutoModelForCausalLM" in text
    assert "trust_remote_code=True" in text
    found: dict[str, object] = {}
    exec(text, found)
    assert isinstance(found["model"], peft.PeftModel)
