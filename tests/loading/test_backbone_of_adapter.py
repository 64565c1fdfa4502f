"""PEFT finds the backbone of a ``loftq_init`` by the directory that the adapter lies in."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers

import loftq_cli
from tests.support import models

ROOT = Path(__file__).parents[2]
TOKENS = torch.arange(12).view(2, 6) + 3


@pytest.mark.parametrize("layout", ["loftq", "dense"])
def test_auto_peft_model_loads_backbone_and_adapter(converted, layout, tmp_path) -> None:
    moved = shutil.copytree(converted("llama", layout=layout), tmp_path / "moved")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(moved / "loftq_init").eval()
    expected = loftq_cli.load(moved).eval()
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)


@pytest.mark.parametrize("imports", ["import loftq_cli, peft", "import peft, loftq_cli"])
def test_the_order_of_imports_does_not_matter(converted, imports) -> None:
    program = f"""{imports}
import sys
from peft import PeftConfig
config = PeftConfig.from_pretrained(sys.argv[1], subfolder="loftq_init")
assert config.base_model_name_or_path == sys.argv[1]
"""
    command = [sys.executable, "-c", program, str(converted("llama"))]
    subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, check=True)


def test_other_adapters_say_what_their_files_say(converted, tmp_path) -> None:
    start = converted("llama") / "loftq_init"
    adapter = shutil.copytree(start, tmp_path / "loftq_init")  # no conversion around it
    assert peft.PeftConfig.from_pretrained(adapter).base_model_name_or_path is None
    config = peft.LoraConfig(base_model_name_or_path="me/base")
    config.save_pretrained(tmp_path / "other")
    found = peft.PeftConfig.from_pretrained(tmp_path / "other")
    assert found.base_model_name_or_path == "me/base"


def test_peft_notices_resized_embeddings_in_the_plain_way(converted, tmp_path) -> None:
    directory = converted("llama", layout="dense")
    backbone = transformers.AutoModelForCausalLM.from_pretrained(directory)
    backbone.resize_token_embeddings(100)
    model = peft.PeftModel.from_pretrained(backbone, directory, subfolder="loftq_init")
    with pytest.warns(UserWarning, match="embedding layer has been resized"):
        model.save_pretrained(tmp_path / "trained")


@pytest.mark.parametrize("stated", [True, False], ids=["architecture", "type of model"])
def test_auto_peft_model_finds_a_class_without_a_task(converted, stated, tmp_path) -> None:
    directory = Path(shutil.copytree(converted("classifier"), tmp_path / "out"))
    model = peft.AutoPeftModel.from_pretrained(directory / "loftq_init")
    assert type(model.get_base_model()) is transformers.BertForSequenceClassification
    source = models.save(models.bert(), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    if not stated:
        del config["architectures"]
    (source / "config.json").write_text(json.dumps(config))
    loftq_cli.convert(source, output=tmp_path / "bare", layout="loftq", rank=4, threads=1)
    start = tmp_path / "bare" / "loftq_init"
    model = peft.AutoPeftModelForFeatureExtraction.from_pretrained(start)
    assert type(model.get_base_model()) is transformers.BertModel
