"""A backbone that gptqmodel's own AWQ rescaled and quantized, and decodes: with pairs of full rank
it computes what the original does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loftq_cli
from tests.support import awq, models

pytestmark = [pytest.mark.gptq, pytest.mark.filterwarnings("ignore")]  # theirs


def quantized(source: Path, target: Path) -> Path:
    gptqmodel: Any = pytest.importorskip("gptqmodel")
    from gptqmodel.quantization import FORMAT, METHOD

    config = gptqmodel.QuantizeConfig(
        bits=4, group_size=32, quant_method=METHOD.AWQ, format=FORMAT.GEMM
    )
    loaded = gptqmodel.GPTQModel.load(str(source), config, device="cpu")
    drawn = torch.randint(4, 90, (8, 64), generator=torch.Generator().manual_seed(0))
    windows = [{"input_ids": w[None], "attention_mask": torch.ones_like(w)[None]} for w in drawn]
    loaded.quantize(windows, batch_size=1, backend=gptqmodel.BACKEND.AWQ_TORCH)
    loaded.save(str(target))
    return target


def decoded(backbone: Path) -> awq.Tensors:
    """Every tensor as gptqmodel has it, float64."""
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    stored = load_file(backbone / "model.safetensors")
    found = {}
    for name, tensor in stored.items():
        module = name.removesuffix(".qweight")
        if module != name:
            parts = (stored[f"{module}.{key}"] for key in ("qweight", "qzeros", "scales"))
            found[f"{module}.weight"] = dequantize_gemm(*parts, 4, 32).T.double()
        elif not name.endswith((".qzeros", ".scales")):
            found[name] = tensor.double()
    return found


def test_with_full_rank_it_is_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")  # fewer than that it does not start with
    monkeypatch.chdir(tmp_path)  # where it leaves a log
    model = models.llama(hidden=128, intermediate=256, num_key_value_heads=4, num_hidden_layers=1)
    source = models.save(model, tmp_path / "source", torch.bfloat16)
    models.save_tokenizer(source)
    backbone = quantized(source, tmp_path / "theirs")
    settings: dict[str, Any] = {"threads": 1, "adapter_dtype": "float32"}
    manifest = loftq_cli.adapt(backbone, tmp_path / "out", source=source, rank=512, **settings)
    rows = {each["module"] for each in manifest["matrices"] if "rows" in each["rescaled"]}
    assert rows == {"model.layers.0.self_attn.v_proj", "model.layers.0.mlp.up_proj"}
    ids = torch.randint(4, 90, (2, 20), generator=torch.Generator().manual_seed(1))
    held = decoded(backbone)
    with torch.no_grad():
        expected = model.double()(ids).logits
        model.load_state_dict(awq.whole(tmp_path / "out", held))
        found = model(ids).logits
    assert (found - expected).norm() < 1e-5 * expected.norm()
