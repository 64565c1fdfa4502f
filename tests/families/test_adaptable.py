"""What PEFT would lose or refuse is known before anything is computed, measured by PEFT itself."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import loftq_cli
from loftq_cli.errors import UnsupportedInputError
from loftq_cli.families.adaptable import LOST, lost, unadaptable
from loftq_cli.families.anatomy import anatomy
from tests.whole.zoo import small

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, about what it did not find

ROOT = Path(__file__).parents[2]
QUICK: dict[str, Any] = {"bits": 2, "rank": 2, "iters": 1, "threads": 1, "layout": "loftq"}


def linear_layers(model: nn.Module) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and any(part.isdecimal() for part in name.split("."))
    }


def come_back(model: nn.Module, modules: set[str], work: Path) -> set[str]:
    """Those of ``modules`` whose adapter is the same after PEFT saved and loaded it."""
    config = peft.LoraConfig(r=2, target_modules=sorted(modules), init_lora_weights=False)
    saved = peft.get_peft_model(copy.deepcopy(model), config)
    saved.save_pretrained(work)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), work)

    def weights(held: nn.Module, module: str) -> torch.Tensor:
        layer: Any = held.get_submodule(f"base_model.model.{module}")
        found: torch.Tensor = layer.lora_A["default"].weight
        return found

    return {m for m in modules if torch.equal(weights(saved, m), weights(loaded, m))}


@pytest.mark.parametrize(
    ("kind", "name", "some"),
    [
        ("mistral_large4", "MistralLarge4ForConditionalGeneration", True),
        ("unlimited_ocr", "UnlimitedOcrForConditionalGeneration", True),
        ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", False),
    ],
)
def test_adapters_that_peft_does_not_load_again_are_told(kind, name, some, tmp_path) -> None:
    model = small.build(kind, name)
    modules = linear_layers(model)
    found = lost(model, modules)
    assert found == modules - come_back(model, modules, tmp_path)
    assert bool(found) is some
    assert found != modules


def test_they_are_passed_through_and_a_line_says_so() -> None:
    model = small.build("mistral_large4", "MistralLarge4ForConditionalGeneration")
    config = {**json.loads(model.config.to_json_string()), "architectures": [type(model).__name__]}
    found = anatomy(config, {name: tuple(t.shape) for name, t in model.state_dict().items()})
    kept = {name for name, reason in found.reasons.items() if reason == LOST}
    assert {name.split(".shared_experts.")[1] for name in kept} == {
        f"{part}_proj.weight" for part in ("gate", "up", "down")
    }
    (line,) = [remark for remark in found.remarks if LOST in remark]
    assert line.endswith("and 5 more stay as they are: " + LOST)


def test_peft_is_not_imported_for_it(tmp_path) -> None:
    """It takes seconds, and has other libraries say what they lack."""
    small.build("mistral_large4", "MistralLarge4ForConditionalGeneration").save_pretrained(tmp_path)
    plan = "import sys, loftq_cli; loftq_cli.plan(sys.argv[1]); assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", plan, tmp_path], check=True, cwd=ROOT)


def test_a_model_that_peft_attaches_nothing_to_is_refused(tmp_path) -> None:
    model = small.build("pp_formulanet", "PPFormulaNetForConditionalGeneration")
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(NotImplementedError, match="get_input_embeddings"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedInputError, match="PEFT attaches no adapter to PPFormulaNet"):
        loftq_cli.convert(tmp_path / "source", output=tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


def test_it_is_attached_if_nothing_is_said_to_be_tied() -> None:
    model = small.build("pp_formulanet", "PPFormulaNetForConditionalGeneration")
    model.config.tie_word_embeddings = False
    assert unadaptable(model) is None
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
