"""The plugins that make layout ``loftq`` known to training tools, loaded as these load them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import loftq_cli.loading.plugins

PLUGINS = Path(loftq_cli.loading.plugins.__file__).parent
KNOWN = """
from transformers.quantizers import auto
assert "loftq" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
assert "loftq" in auto.AUTO_QUANTIZER_MAPPING
"""


def run(program: str, *arguments: Path) -> None:
    subprocess.run([sys.executable, "-c", program, *map(str, arguments)], check=True)


def test_swift_imports_its_plugin_by_the_path_and_knows_the_layout() -> None:
    program = """
import importlib.util, os, sys
path = sys.argv[1]
sys.path.insert(0, os.path.dirname(path))
spec = importlib.util.spec_from_file_location("_swift_external", path)
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""
    run(program + KNOWN, PLUGINS / "for_swift.py")


def test_no_plugin_shadows_a_module_where_its_folder_comes_first() -> None:
    names = {path.stem for path in PLUGINS.glob("*.py")} - {"__init__"}
    assert names == {"for_axolotl", "for_swift"}
    assert not names & sys.stdlib_module_names
    assert [name for name in names if importlib.util.find_spec(name)] == []


def test_axolotl_makes_the_class_and_knows_the_layout(tmp_path: Path) -> None:
    base = tmp_path / "axolotl" / "integrations"
    base.mkdir(parents=True)
    (base / "base.py").write_text("class BasePlugin: pass\n")
    program = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
module = importlib.import_module("loftq_cli.loading.plugins.for_axolotl")
plugin = getattr(module, "LoftqPlugin")()
assert isinstance(plugin, sys.modules["axolotl.integrations.base"].BasePlugin)
config = {"lora_o_kernel": True}
plugin.register(config)
off = dict.fromkeys(["lora_mlp_kernel", "lora_qkv_kernel", "lora_embedding_kernel"], False)
assert config == {"lora_o_kernel": True, **off}, config
try:
    plugin.register({"rl": "dpo", "lora_model_dir": "out/loftq_init"})
except module.UsageError:
    plugin.register({"rl": "dpo"})
else:
    raise AssertionError("the start is lost")
assert not hasattr(module, "Another")
"""
    run(program + KNOWN, tmp_path)
