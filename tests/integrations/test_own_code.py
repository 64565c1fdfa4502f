"""A model that brings its own code: it is run if the caller says so, and not otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch

import loftq_cli
from loftq_cli.errors import UnsupportedInputError
from tests import models

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKENS = torch.arange(12).view(2, 6) + 3


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The conversion of such a model, its code copied by hand."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "run"))
    source = models.save(models.llama(), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config |= {
        "model_type": "own_llama",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (source / "config.json").write_text(json.dumps(config))
    (source / "modeling_own.py").write_text(CODE)
    settings = {"bits": 2, "rank": 4, "iters": 1, "threads": 1, "layout": "loftq"}
    loftq_cli.convert(source, output=tmp_path / "out", **settings)
    assert not (tmp_path / "out" / "modeling_own.py").exists()
    shutil.copy(source / "modeling_own.py", tmp_path / "out")
    return tmp_path / "out"


def test_it_is_loaded_on_request(output) -> None:
    model = loftq_cli.load(output, trust_remote_code=True)
    assert isinstance(model, peft.PeftModel)
    assert type(model.get_base_model()).__name__ == "OwnForCausalLM"
    with torch.no_grad():
        assert model(TOKENS).logits.isfinite().all()
    assert all(p.any() for name, p in model.named_parameters() if ".lora_B." in name)


def test_without_a_word_of_the_caller_its_code_is_not_run(output) -> None:
    with pytest.raises(UnsupportedInputError, match="trust_remote_code=True runs the code"):
        loftq_cli.load(output)
