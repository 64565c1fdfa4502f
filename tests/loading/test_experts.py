"""Packed experts against a layer of dense ones, computed expert by expert."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

import loftq_cli
from loftq_cli.checkpoint.header import read_header
from loftq_cli.checkpoint.packing import pack
from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.errors import UnsupportedInputError
from loftq_cli.layouts.base import Matrix
from loftq_cli.loading.attach_start import _unfused
from loftq_cli.loading.experts import PackedExperts, take_over
from loftq_cli.loading.packed_weight import PackedWeight
from loftq_cli.loading.replacement import packed
from loftq_cli.numerics.quantizers.packed import Packed
from tests.support import models, moe
from tests.support.quantizing import gaussian
from tests.support.stored import drawn

EXPERTS, INNER, HIDDEN, RANK, TOKENS = 4, 32, 64, 3, 20
LEAVES = ("gate_proj", "up_proj", "down_proj")
ENTRY = {"bits": 2, "block_size": 32, "decoding": "affine"}


def fused() -> Any:
    """The experts of a layer, as transformers makes them; eight of their matrices are 32 x 64."""
    return moe.make("qwen3_moe").model.layers[0].mlp.experts


def packed_experts() -> tuple[Any, dict[str, torch.Tensor]]:
    """Packed experts with drawn codes, and their weights by the layers' names."""
    experts = fused()
    names = [
        f"{e}.{leaf}" for e in range(EXPERTS) for leaf in ("gate_proj", "up_proj", "down_proj")
    ]
    made = take_over(experts, {name: partial(packed, entry=ENTRY) for name in names})
    weights = {}
    for number, (name, layer) in enumerate(made.items()):
        assert isinstance(layer, PackedWeight)
        shape = (HIDDEN, INNER) if "down" in name else (INNER, HIDDEN)
        quantized = drawn(Matrix("m.weight", shape, "F32", "uniform", 2, 32), seed=number)
        assert quantized.zeros is not None
        codes, zeros = (pack(part.contiguous(), 2) for part in (quantized.codes, quantized.zeros))
        layer.take(Packed(shape, 2, 32, codes, quantized.scales / 20, zeros))
        weights[name] = layer.dequantize()
    experts.put_stand_ins()
    return experts, weights


def expected(
    weights: dict[str, torch.Tensor],
    inputs: torch.Tensor,
    chosen: torch.Tensor,
    gates: torch.Tensor,
) -> torch.Tensor:
    """Token by token."""
    result = torch.zeros_like(inputs)
    for token, (numbers, shares) in enumerate(zip(chosen.tolist(), gates, strict=True)):
        for number, share in zip(numbers, shares, strict=True):
            if number < EXPERTS:
                gate, up, down = (weights[f"{number}.{n}_proj"] for n in ("gate", "up", "down"))
                x = inputs[token]
                result[token] += share * (down @ (functional.silu(gate @ x) * (up @ x)))
    return result


def routed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, chosen experts (never the last one; once one that is masked out) and their shares."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.stack(
        [torch.randperm(EXPERTS - 1, generator=generator)[:2] for _ in range(TOKENS)]
    )
    chosen[3, 1] = EXPERTS
    return gaussian(TOKENS, HIDDEN, seed=1), chosen, torch.rand(TOKENS, 2, generator=generator)


def wrapped(experts: Any) -> Any:
    """A model around them with PEFT's adapters on both parameters, B not zero."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = experts

        def forward(self, *args: torch.Tensor) -> Any:
            return self.experts(*args)

    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    model = peft.get_peft_model(Model(), config)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            parameter.data = 0.1 * gaussian(*parameter.shape, seed=50 + number)
    return model


def test_every_token_gets_its_experts() -> None:
    experts, weights = packed_experts()
    inputs, chosen, gates = routed()
    torch.testing.assert_close(
        experts(inputs, chosen, gates), expected(weights, inputs, chosen, gates)
    )


def test_adapters_are_applied_as_peft_applies_them_to_dense_experts() -> None:
    experts, weights = packed_experts()
    dense = fused()
    with torch.no_grad():
        for e in range(EXPERTS):
            both = torch.cat([weights[f"{e}.gate_proj"], weights[f"{e}.up_proj"]])
            dense.gate_up_proj[e], dense.down_proj[e] = both, weights[f"{e}.down_proj"]
    ours, theirs = wrapped(experts), wrapped(dense)
    theirs.load_state_dict(
        {name: t for name, t in ours.state_dict().items() if "lora_" in name}, strict=False
    )
    inputs, chosen, gates = routed()
    chosen = chosen.clamp(max=EXPERTS - 2)
    found = [model(inputs, chosen, gates) for model in (ours, theirs)]
    torch.testing.assert_close(*found)
    assert (found[0] - experts(inputs, chosen, gates)).abs().max() > 1e-3
    for value in found:
        value.square().sum().backward()
    grads = [
        {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
        for model in (ours, theirs)
    ]
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name])
    with ours.disable_adapter():
        torch.testing.assert_close(
            ours(inputs, chosen, gates), expected(weights, inputs, chosen, gates)
        )


def test_only_experts_that_are_hit_get_gradients() -> None:
    model = wrapped(packed_experts()[0])
    model(*routed()).sum().backward()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            by_expert = parameter.grad.view(EXPERTS, -1)
        elif "lora_B" in name:
            by_expert = parameter.grad.view(len(parameter), -1, EXPERTS).permute(2, 0, 1)
        else:
            assert parameter.grad is None
            continue
        hit = [bool(grad.any()) for grad in by_expert]
        assert hit == [True] * (EXPERTS - 1) + [False]


def test_what_stands_in_takes_no_memory_wherever_it_is_moved() -> None:
    experts, _ = packed_experts()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        experts.to(dtype)
        for name, shape in (
            ("gate_up_proj", (EXPERTS, 2 * INNER, HIDDEN)),
            ("down_proj", (EXPERTS, HIDDEN, INNER)),
        ):
            parameter = getattr(experts, name)
            assert (parameter.shape, parameter.dtype) == (shape, dtype)
            assert parameter.untyped_storage().nbytes() == dtype.itemsize
    assert not {"gate_up_proj", "down_proj"} & experts.state_dict().keys()


def test_experts_of_qwen3_30b_take_at_most_26_tenths_of_a_bit() -> None:
    """The shapes of one expert; 128 in each of 48 layers are alike."""
    held = elements = 0
    for rows, columns in ((768, 2048), (768, 2048), (2048, 768)):
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        layer = packed(linear, {**ENTRY, "block_size": 64})
        held += sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))
        elements += rows * columns
    assert 8 * held / elements <= 2.6


def test_merging_is_refused() -> None:
    model = wrapped(packed_experts()[0])
    with pytest.raises(Exception, match="loftq merge"):
        model.merge_adapter()


def test_experts_that_are_missing_or_of_another_kind_are_refused() -> None:
    names = [f"{e}.{leaf}" for e in range(3) for leaf in LEAVES]
    with pytest.raises(UnsupportedInputError, match=r"has 4 experts, .* differs in 3\."):
        take_over(fused(), {name: partial(packed, entry=ENTRY) for name in names})
    odd = fused()
    odd.has_post_expert_norm = True
    with pytest.raises(UnsupportedInputError, match="does not hold its experts as they are"):
        take_over(odd, {name: partial(packed, entry=ENTRY) for name in names})
    assert not isinstance(odd, PackedExperts)


@pytest.mark.filterwarnings(r"ignore:The following (rank|alpha)_pattern keys.*gate_up_proj")
def test_an_adapter_that_begins_at_zero_is_loaded(tmp_path: Path) -> None:
    source = models.save(moe.make("qwen3_moe"), tmp_path / "source", torch.bfloat16)
    loftq_cli.convert(source, tmp_path / "out", bits=4, rank=4, iters=0, layout="loftq", threads=1)
    model = loftq_cli.load(tmp_path / "out")
    found = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    stored = load_file(tmp_path / "out/loftq_init/adapter_model.safetensors")
    held = {name: tensor for name, tensor in stored.items() if ".experts." in name}
    # Stacked, whatever their order: of two layers, four experts with a gate, an up and a down.
    assert len(held) == 2 * 2 * 4 * 3
    for kind in ("lora_A", "lora_B"):
        fused = [t.double().sum() for key, t in found.items() if ".experts." in key and kind in key]
        parts = [tensor.double().sum() for key, tensor in held.items() if kind in key]
        assert len(fused) == 4
        torch.testing.assert_close(sum(fused), sum(parts))
        assert any(parts) == (kind == "lora_A")


def test_what_peft_did_not_fuse_is_found(tmp_path: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    parts = {f"experts.{e}.up_proj.lora_{ab}.weight": gaussian(3, 5) for e in "01" for ab in "AB"}
    save_file(parts, file)
    stored = read_header(file).tensors
    A, B = torch.cat([parts[name] for name in parts if "lora_A" in name]), gaussian(3, 5)
    fused = {"experts.lora_A.weight": A, "experts.lora_B.weight": torch.cat([B, B], dim=1)}
    with TensorFile(file) as reader:
        assert _unfused(fused, stored, reader) == set()
        assert _unfused({name: t.bfloat16() for name, t in fused.items()}, stored, reader) == set()
        zero = {**fused, "experts.lora_B.weight": torch.zeros(3, 10)}
        assert _unfused(zero, stored, reader) == {"experts.lora_B.weight"}
        other = {**fused, "experts.lora_A.weight": A + 0.1}
        assert _unfused(other, stored, reader) == set(fused)
        assert _unfused({}, stored, reader) == parts.keys()
        assert _unfused({}, [], reader) == set()
