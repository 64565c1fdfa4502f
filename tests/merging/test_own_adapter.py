"""An adapter of the user's own beside the conversion's: rank-stabilized, with ranks and alphas by
pattern, trained, saved, and merged on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from click.testing import CliRunner

import loftq_cli
from loftq_cli.cli.commands import main
from tests.support import models
from tests.support.contents import FAST
from tests.support.training import begun, load, logits

pytestmark = [
    # Adapters of one's own leave quantized layers without theirs.
    pytest.mark.filterwarnings("ignore::loftq_cli.loading.warned.DetachedAdapter"),
]

CAUSAL = transformers.AutoModelForCausalLM
CONFIG: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 6,
    "use_rslora": True,
    "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj", "gate_proj"],
    "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 8, "^model.layers.0.mlp.*": 5},
    "alpha_pattern": {"down_proj": 3, r"layers\.0\.self_attn\.(q|v)_proj": 20},
}
# Module: rank, alpha.
EXPECTED = {
    "model.layers.0.self_attn.q_proj": (2, 20),
    "model.layers.0.self_attn.v_proj": (4, 20),
    "model.layers.0.self_attn.o_proj": (4, 6),
    "model.layers.0.mlp.down_proj": (5, 3),
    "model.layers.0.mlp.gate_proj": (5, 6),
    "model.layers.1.self_attn.q_proj": (2, 6),
    "model.layers.1.self_attn.v_proj": (8, 6),
    "model.layers.1.self_attn.o_proj": (4, 6),
    "model.layers.1.mlp.down_proj": (4, 3),
    "model.layers.1.mlp.gate_proj": (4, 6),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "loftq": {"bits": 2},
    "dense": {"bits": 2},
    "bnb": {"bits": 4},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_merged_model_computes_what_peft_computes(layout: str, tmp_path: Path) -> None:
    source = models.save(models.llama(), tmp_path / "source")
    output, adapter, merged = tmp_path / "out", tmp_path / "trained", tmp_path / "merged"
    loftq_cli.convert(source, output, layout=layout, **LAYOUTS[layout], **FAST)
    trained = begun(CAUSAL.from_pretrained(output), **CONFIG)
    found = {
        name.removeprefix("base_model.model."): module
        for name, module in trained.named_modules()
        if hasattr(module, "lora_A")
    }
    assert found.keys() == EXPECTED.keys()
    for name, (rank, alpha) in EXPECTED.items():
        assert found[name].r["default"] == rank
        assert found[name].scaling["default"] == alpha / rank**0.5
    trained.save_pretrained(adapter)
    expected = logits(trained)
    arguments = ["merge", str(output), "-o", str(merged), "--adapter", str(adapter)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    difference = (logits(load(CAUSAL, merged)) - expected).abs().max()
    assert difference < 5e-6 * expected.abs().max()
    assert (logits(CAUSAL.from_pretrained(output)) - expected).abs().max() > 1e-2
