"""Layout compressed, kept packed by our modules, against stock transformers, which decodes it."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.errors import CorruptFileError, UnsupportedInputError
from loftq_cli.loading.container import CONTAINER
from loftq_cli.loading.packed_weight import PackedWeight
from loftq_cli.loading.quantizer import LoftqConfig

pytest.importorskip("compressed_tensors")

FORMS = [(method, bits) for method in ("uniform", "uniform-symmetric") for bits in (2, 3, 4, 8)]
IDS = torch.arange(12)[None]
COMPRESSED = {"layout": "compressed", "block_size": 32}


def stock(directory: Path, **options: Any) -> Any:
    """What somebody without this package loads: the decoded backbone, and its adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        config = transformers.CompressedTensorsConfig(dequantize=True)
        backbone = transformers.AutoModelForCausalLM.from_pretrained(
            directory, quantization_config=config, **options
        )
        return peft.PeftModel.from_pretrained(backbone, directory, subfolder="loftq_init")


def packed(model: Any) -> dict[str, PackedWeight]:
    found = model.get_base_model().named_modules()
    return {name.removesuffix(".base_layer"): m for name, m in found if isinstance(m, PackedWeight)}


@pytest.mark.parametrize(("method", "bits"), FORMS)
def test_stock_transformers_decodes_the_weights_that_we_keep_packed(
    converted, method, bits
) -> None:
    directory = converted("llama", method=method, bits=bits, **COMPRESSED)
    ours, theirs = loftq_cli.load(directory), stock(directory, dtype=torch.float32)
    assert len(packed(ours)) == 14
    for name, module in packed(ours).items():
        layer = theirs.get_base_model().get_submodule(name)
        assert torch.equal(module.dequantize(), layer.base_layer.weight), name
    with torch.no_grad():
        found, expected = ours.eval()(IDS).logits, theirs.eval()(IDS).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_what_is_kept_takes_the_bytes_of_layout_loftq(converted) -> None:
    directory = converted("llama", method="uniform", bits=3, **COMPRESSED)
    for module in packed(loftq_cli.load(directory)).values():
        rows, columns = module.dequantize().shape
        scales = rows * columns // 32
        held = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
        assert held == rows * columns * 3 // 8 + scales * 4 + -(-scales * 3 // 8)


def test_it_trains_saves_and_loads_again(converted, tmp_path) -> None:
    directory = converted("llama", method="uniform", bits=4, **COMPRESSED)
    model = loftq_cli.load(directory).train()
    before = {name: module.dequantize() for name, module in packed(model).items()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(torch.equal(m.dequantize(), before[name]) for name, m in packed(model).items())
    model.save_pretrained(tmp_path / "trained")
    again = loftq_cli.load(directory, adapter=tmp_path / "trained")
    with torch.no_grad():
        assert torch.equal(again.eval()(IDS).logits, model.eval()(IDS).logits)


@pytest.mark.filterwarnings("ignore::loftq_cli.loading.warned.DetachedAdapter")
def test_a_backbone_that_is_saved_is_one_of_layout_loftq(converted, tmp_path) -> None:
    directory = converted("llama", method="uniform", bits=4, **COMPRESSED)
    model = loftq_cli.load(directory).unload()
    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_tensor_that_is_missing_is_named(converted, tmp_path, monkeypatch) -> None:
    directory = tmp_path / "out"
    shutil.copytree(converted("llama", method="uniform", bits=4, **COMPRESSED), directory)
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight_zero_point"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr("loftq_cli.loading.load.check_files", lambda output, start: None)
    with pytest.raises(CorruptFileError, match=r"lacks model\.layers\.1\.mlp\.down_proj\.weight_z"):
        loftq_cli.load(directory)


def test_what_inspect_shows_loads_it(converted) -> None:
    directory = converted("llama", method="uniform", bits=4, **COMPRESSED)
    held: dict[str, Any] = {}
    exec(loftq_cli.inspect(directory)["loading"], held)
    assert len(packed(held["model"])) == 14


def test_no_file_can_ask_for_a_container() -> None:
    entry = {"bits": 4, "block_size": 32, "decoding": "affine", CONTAINER: ["compressed", {}]}
    config = {"quant_method": "loftq", "format_version": 1, "modules": {"a.b": entry}}
    with pytest.raises(UnsupportedInputError, match=CONTAINER):
        LoftqConfig.from_dict(config)
