"""Layout ``bnb`` is what bitsandbytes serialises, and what it decodes."""

from __future__ import annotations

import json
import re

import pytest
import torch
from bitsandbytes import functional

from loftq_cli.layouts.base import Matrix, Surroundings
from loftq_cli.layouts.bnb import BnbLayout
from tests.support.stored import drawn
from tests.support.synthetic import llm_like

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHAPE = (24, 192)


def quant_state(tensors: dict[str, torch.Tensor]) -> functional.QuantState:
    """As transformers makes it from the tensors of a checkpoint."""
    state = {name: tensor for name, tensor in tensors.items() if name != "m.weight"}
    return functional.QuantState.from_dict(state, device=torch.device("cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitsandbytes_reads_and_decodes_it(dtype):
    matrix = Matrix("m.weight", SHAPE, dtype, "nf", 4, 64)
    tensors = BnbLayout().encode(matrix, drawn(matrix))
    state = quant_state(tensors)
    assert (state.quant_type, state.blocksize, state.nested) == ("nf4", 64, False)
    assert (tuple(state.shape), state.dtype) == (SHAPE, DTYPES[dtype])
    state.dtype = torch.float32
    decoded = functional.dequantize_4bit(tensors["m.weight"], state)
    assert torch.equal(decoded, BnbLayout().decode(matrix, tensors))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tensors_are_those_that_bitsandbytes_writes(dtype):
    weight = llm_like(*SHAPE).to(DTYPES[dtype])
    data, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    theirs = {"m.weight": data} | {
        f"m.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()
    }
    matrix = Matrix("m.weight", SHAPE, dtype, "nf", 4, 64)
    ours = BnbLayout().encode(matrix, drawn(matrix))
    described = "m.weight.quant_state.bitsandbytes__nf4"
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {described}:
        assert (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape)
    assert torch.equal(ours["m.weight.quant_map"], theirs["m.weight.quant_map"])
    meant = [json.loads(bytes(tensors[described].tolist())) for tensors in (ours, theirs)]
    assert meant[0] == meant[1]


def test_golden_bytes():
    """The first of two elements is in the high nibble."""
    matrix = Matrix("m.weight", (1, 64), "F32", "nf", 4, 64)
    quantized = drawn(matrix)
    quantized.codes.zero_()
    quantized.codes[0, :4] = torch.tensor([1, 2, 15, 8])
    tensors = BnbLayout().encode(matrix, quantized)
    assert tensors["m.weight"].shape == (32, 1)
    assert tensors["m.weight"].flatten().tolist() == [0x12, 0xF8] + [0] * 30


def test_the_stored_table_is_what_decodes():
    matrix = Matrix("m.weight", (1, 64), "F32", "nf", 4, 64)
    tensors = BnbLayout().encode(matrix, drawn(matrix))
    tensors["m.weight.quant_map"] = torch.zeros(16)
    assert not BnbLayout().decode(matrix, tensors).any()


@pytest.mark.parametrize(
    ("config", "compute"),
    [
        ({}, "float32"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "bfloat16"),
        ({"dtype": None, "torch_dtype": 16}, "float32"),
    ],
)
def test_the_config_computes_in_the_models_dtype(config, compute):
    matrix = Matrix("h.0.m.weight", SHAPE, "F32", "nf", 4, 64)
    entry = BnbLayout().quantization_config([matrix], Surroundings(config, [], ["h"]))
    assert entry["bnb_4bit_compute_dtype"] == compute


def test_the_config_skips_what_is_kept_and_the_heads_that_a_task_may_add():
    quantized = [Matrix("h.0.score.weight", SHAPE, "F32", "nf", 4, 64)]
    surroundings = Surroundings({}, ["lm_head", "h.0.gate"], ["h"])
    skipped = BnbLayout().quantization_config(quantized, surroundings)["llm_int8_skip_modules"]
    assert {"lm_head", "h.0.gate", "classifier"} <= set(skipped)
    assert "score" not in skipped  # it would skip the quantized module as well
    assert skipped == sorted(skipped)


def test_a_kept_module_whose_name_is_no_pattern_is_escaped() -> None:
    surroundings = Surroundings({}, ["a.[b", "a.c"], ["a"])
    config = BnbLayout().quantization_config(
        [Matrix("a.d.weight", SHAPE, "F32", "nf", 4, 64)], surroundings
    )
    skipped = config["llm_int8_skip_modules"]
    assert {re.escape("a.[b"), "a.c"} <= set(skipped)
    assert all(re.compile(name) for name in skipped)
