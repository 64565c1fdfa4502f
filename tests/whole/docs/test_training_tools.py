"""docs/training: the pages of the tools that ``make train-check`` runs, as far as that goes without
them."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from loftq_cli.loading.plugins import for_axolotl, for_swift
from tests.whole.training.check import ROOT, TOOLS, blocks

PAGES = ROOT / "docs" / "training"
# Where a configuration names the backbone, and where the start adapter.
KEYS = {
    "llama-factory": ("model_name_or_path", "adapter_name_or_path"),
    "axolotl": ("base_model", "lora_model_dir"),
    "ms-swift": ("model", "adapters"),
}
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


def test_every_page_is_run_or_says_that_it_was_not() -> None:
    others = {page.stem for page in PAGES.glob("*.md")} - TOOLS.keys()
    assert others == {"trl", "unsloth"}  # the first is run by test_training.py
    assert "**not run**" in (PAGES / "unsloth.md").read_text("utf-8")


@pytest.mark.parametrize("tool", TOOLS)
def test_the_configuration_names_the_backbone_and_its_start(tool: str) -> None:
    (text,) = blocks(tool, "yaml")
    config = yaml.safe_load(text)
    backbone, start = KEYS[tool]
    assert (config[backbone], config[start]) == ("out", "out/loftq_init")
    assert config["output_dir"] == "trained"
    assert f'adapter="{TOOLS[tool].trained}")' in (PAGES / f"{tool}.md").read_text("utf-8")
    (command,) = blocks(tool, "sh")
    assert "config.yaml" in command


def test_the_other_blocks_parse() -> None:
    (info,) = blocks("llama-factory", "json")
    config = yaml.safe_load(blocks("llama-factory", "yaml")[0])
    assert json.loads(info)[config["dataset"]]["file_name"] == "chats.jsonl"
    for page in ("llama-factory", "unsloth"):
        (script,) = blocks(page, "python")
        compile(script, page, "exec")
        first, second, *_ = re.findall(r"^(?:import|from) (\w+)", script, flags=re.MULTILINE)
        assert (first, second) == ("loftq_cli", page.replace("-", ""))
    assert '"out/loftq_init"' in blocks("unsloth", "python")[0]


@pytest.mark.parametrize("tool", TOOLS)
def test_the_versions_on_a_page_are_those_that_are_installed(tool: str) -> None:
    name = {"llama-factory": "llamafactory"}.get(tool, tool)
    (pins,) = re.findall(rf"TOOL = ({name}==.*)", MAKEFILE)
    (loaded,) = re.findall(r"LOADED := (.*)", MAKEFILE)
    torch = loaded.split()[0].partition("==")
    text = " ".join((PAGES / f"{tool}.md").read_text("utf-8").split())
    _, version, *others = re.split(r"==| \w+==", pins)
    names = ("transformers", "PEFT")
    said = ", ".join(f"{a} {b}" for a, b in zip(names, others, strict=True))
    assert f"{version}, {said}, torch {torch[2]}, on a CPU" in text
    assert text.count(version) >= 2


def test_the_plugin_on_the_page_is_ours() -> None:
    (plugin,) = yaml.safe_load(blocks("axolotl", "yaml")[0])["plugins"]
    assert plugin == f"{for_axolotl.__name__}.LoftqPlugin"
    assert for_swift.__name__ in blocks("ms-swift", "sh")[0]
