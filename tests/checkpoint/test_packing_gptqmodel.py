"""Our bit stream, read as int32 words, is what gptqmodel itself packs."""

from __future__ import annotations

import warnings

import pytest
import torch

from loftq_cli.checkpoint.packing import pack

SIDE = 64


@pytest.fixture(scope="module")
def torch_linear():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, while importing
        module = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    return module.TorchLinear


@pytest.mark.gptq
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_columns_pack_as_gptqmodels_qweight(torch_linear, bits):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (SIDE, SIDE), generator=generator)
    source = torch.nn.Linear(SIDE, SIDE, bias=False)
    source.weight.data = (codes - 1).float()  # scale 1, zero point 1: what it packs is the codes
    packed = torch_linear(
        bits=bits,
        group_size=SIDE,
        sym=False,
        desc_act=False,
        in_features=SIDE,
        out_features=SIDE,
        bias=False,
        pack_dtype=torch.int32,
    )
    ones = torch.ones(SIDE, 1)
    packed.pack_original(source, ones, ones.clone(), g_idx=torch.zeros(SIDE, dtype=torch.int32))
    words = [pack(row.to(torch.uint8), bits).view(torch.int32) for row in codes]
    assert torch.equal(torch.stack(words, dim=1), packed.qweight)
