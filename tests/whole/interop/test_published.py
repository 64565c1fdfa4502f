"""What people download is converted and loaded as it is named there, or passed through with the
reason: outputs are those of a dense model that carries Q + BA, whichever way it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loftq_cli
from tests.whole.interop.architectures import QUICK, dense, model_class, outputs, the_plain_way
from tests.whole.interop.published import CASES, save

# PEFT looks for its own entry of the fused parameter's rank among modules only.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:The following (rank|alpha)_pattern keys.*gate_up_proj"
)
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = save(CASES[name], tmp_path_factory.mktemp("published") / "source")
        return made[name]

    return get


def compared(name: str, source: Path, tmp_path: Path, **settings: Any) -> dict[str, Any]:
    """Convert, load both ways, compare; the manifest."""
    output, taken = tmp_path / "out", CASES[name].inputs
    manifest = loftq_cli.convert(source, output=output, **{**QUICK, "rank": 4, **settings})
    reference = dense(source, output, manifest, tmp_path / "dense")
    with torch.no_grad():
        wanted = outputs(reference, taken)
        original = outputs(model_class(source).from_pretrained(source).eval(), taken)
        for load in (loftq_cli.load, the_plain_way):
            found = outputs(load(output).eval(), taken)
            assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max(), load
    assert (original - wanted).abs().max() > 1e-3 * wanted.abs().max()
    return manifest


@pytest.mark.parametrize("layout", ["loftq", "dense"])
@every_case
def test_both_ways_to_load_give_the_same_outputs(name, layout, source, tmp_path) -> None:
    manifest = compared(name, source(name), tmp_path, layout=layout)
    names = [entry["name"] for entry in manifest["matrices"]]
    assert len([each for each in names if ".experts." not in each]) == CASES[name].converted
    assert any(".experts." in each for each in names) == (
        layout == "loftq" and CASES[name].kind in ("glm4_moe", "granitemoe", "qwen3_next")
    )
    kept = {entry["name"]: entry["reason"] for entry in manifest["passed_through"]}
    for end, reason in CASES[name].reasons.items():
        found = {kept.get(tensor) for tensor in kept if tensor.endswith(end)}
        assert found == {reason}, end


@pytest.mark.parametrize("name", ["Llava", "ViT with a head"])
def test_layout_bnb_knows_the_names_in_memory(name, source, tmp_path, monkeypatch) -> None:
    # Else bitsandbytes rounds weights and inputs to bfloat16 on processors that multiply them.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    compared(name, source(name), tmp_path, layout="bnb", bits=4)
