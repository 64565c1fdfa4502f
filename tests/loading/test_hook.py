"""The quantizer is registered, and PEFT taught, in any order of imports; nothing is imported too
early."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from loftq_cli.errors import EnvironmentFailure
from loftq_cli.loading import hook

ROOT = Path(__file__).parents[2]

AFTERWARDS = """
import sys
from transformers.quantizers import auto
assert auto.AUTO_QUANTIZER_MAPPING["loftq"].__name__ == "LoftqQuantizer"
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["loftq"].__name__ == "LoftqConfig"
assert not any(getattr(f, "name", None) == auto.__name__ for f in sys.meta_path)
assert "def register_quantizer" in auto.__loader__.get_source(auto.__name__)
assert auto.__spec__.loader is auto.__loader__
"""


def run(code: str, *path: Path) -> None:
    """Run ``code`` in a fresh interpreter that finds modules in ``path`` first."""
    subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(str(entry) for entry in (*path, ROOT))},
        check=True,
    )


@pytest.mark.parametrize(
    "imports",
    [
        "import loftq_cli, transformers, transformers.quantizers.auto",
        "import transformers.quantizers.auto, loftq_cli",
        "import loftq_cli; loftq_cli._hook.install(); import transformers.quantizers.auto; "
        "loftq_cli._hook.install()",
    ],
)
def test_registers_in_either_order(imports) -> None:
    run(imports + AFTERWARDS)


def test_importing_us_imports_neither_torch_nor_transformers() -> None:
    run(
        "import sys, loftq_cli\n"
        "loaded = {'torch', 'transformers', 'peft', 'safetensors'} & sys.modules.keys()\n"
        "assert not loaded, loaded"
    )


@pytest.fixture
def other_transformers(tmp_path) -> Path:
    """A folder with a package named transformers whose registry takes no quantizers."""
    package = tmp_path / "transformers" / "quantizers"
    package.mkdir(parents=True)
    (tmp_path / "transformers" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "auto.py").write_text("AUTO_QUANTIZATION_CONFIG_MAPPING = {}")
    return tmp_path


def test_another_transformers_is_an_error_only_where_a_checkpoint_is_loaded(
    other_transformers,
) -> None:
    run(
        "import loftq_cli\n"
        "from transformers.quantizers import auto\n"
        "from loftq_cli.errors import EnvironmentFailure\n"
        "try:\n"
        "    auto.AUTO_QUANTIZATION_CONFIG_MAPPING['loftq'].from_dict({'quant_method': 'loftq'})\n"
        "except EnvironmentFailure as error:\n"
        "    assert 'loftq-cli[train]' in str(error)\n"
        "else:\n"
        "    raise AssertionError\n",
        other_transformers,
    )


def test_an_import_of_transformers_that_fails_can_be_repeated(other_transformers) -> None:
    auto = other_transformers / "transformers" / "quantizers" / "auto.py"
    run(
        "import pathlib, loftq_cli\n"
        f"auto = pathlib.Path({str(auto)!r})\n"
        "good = auto.read_text()\n"
        "auto.write_text('import nonexistent_module')\n"
        "try:\n"
        "    import transformers.quantizers.auto\n"
        "except ModuleNotFoundError:\n"
        "    auto.write_text(good)\n"
        "import importlib; importlib.invalidate_caches()\n"
        "from transformers.quantizers import auto\n"
        "assert 'loftq' in auto.AUTO_QUANTIZATION_CONFIG_MAPPING",
        other_transformers,
    )


def test_a_registry_without_the_functions_gets_a_stand_in() -> None:
    registry = SimpleNamespace(AUTO_QUANTIZATION_CONFIG_MAPPING={})
    hook._register(registry)
    with pytest.raises(EnvironmentFailure, match="register_quantization_config"):
        registry.AUTO_QUANTIZATION_CONFIG_MAPPING["loftq"].from_dict({})
