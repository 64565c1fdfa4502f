"""PackedEmbedding: its rows are what docs/output-format.md says that the bytes mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from loftq_cli.layouts.base import Matrix
from loftq_cli.layouts.loftq import PackedLayout, stored_block_size
from loftq_cli.loading.embedding import PackedEmbedding
from loftq_cli.loading.packed_weight import PackedFormat
from loftq_cli.numerics.quantizers import methods
from loftq_cli.numerics.quantizers.scale_storage import ScaleDtype
from tests.support import plain_layouts as plain
from tests.support.stored import drawn

# (rows, columns), block size. Where rows begin with a byte and a block, those of the packed zero
# points may begin with a byte (256 columns) or within one.
ALIGNED = [((70, 64), 32), ((33, 256), 32), ((90, 32), 32)]
UNALIGNED = [((41, 45), 32), ((70, 40), 64), ((90, 31), 32)]
IDS: tuple[Any, ...] = ([[3, 0, 3], [7, 30, 1]], [29, 28, 27], 5, [])


def embedding(
    method: str,
    bits: int,
    shape: tuple[int, int],
    block_size: int,
    scales: ScaleDtype = "float32",
    dtype: torch.dtype = torch.float32,
    **settings,
) -> tuple[PackedEmbedding, torch.Tensor]:
    """(a module filled from stored tensors of drawn codes, the table that they mean)."""
    matrix = Matrix("m.weight", shape, "F32", method, bits, block_size, "embedding")
    packing = PackedFormat(bits, stored_block_size(matrix), methods.method(method).decoding, scales)
    stored = PackedLayout(scales).encode(matrix, drawn(matrix))
    module = PackedEmbedding(*shape, packing, dtype, **settings)
    state = {name.removeprefix("m."): tensor for name, tensor in stored.items()}
    module.load_state_dict(state, assign=True)
    return module, torch.tensor(plain.loftq(stored, "m.weight", shape, vars(packing)))


@pytest.mark.parametrize("scales", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("method", ["nf", "uniform", "uniform-tensor"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("shape", "block_size"), ALIGNED + UNALIGNED, ids=str)
def test_rows_are_those_of_the_decoded_table(method, bits, shape, block_size, scales) -> None:
    module, table = embedding(method, bits, shape, block_size, scales)
    assert torch.equal(module.dequantize(), table)
    for ids in map(torch.tensor, IDS):
        rows = module(ids.long())
        assert rows.shape == (*ids.shape, shape[1])
        assert torch.equal(rows, table[ids.long()])
    last = torch.tensor([shape[0] - 1], dtype=torch.int32)
    assert torch.equal(module(last), table[-1:])


@pytest.mark.parametrize("scales", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shape", [(20, 32), (40, 64), (300, 32), (257, 32), (512, 32), (40, 30)])
def test_rows_that_others_decode_with_are_those_of_the_table(shape, scales) -> None:
    module, table = embedding("trellis", 2, shape, 32, scales)
    assert torch.equal(module.dequantize(), table)
    rows = torch.randint(shape[0], (3, 50), generator=torch.Generator().manual_seed(0))
    for ids in (rows, torch.tensor([0, shape[0] - 1]), torch.tensor([], dtype=torch.int64)):
        assert torch.equal(module(ids), table[ids])


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is computed, views of others not counted."""

    elements = 0

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.held = {tensor.data_ptr() for tensor in module.state_dict().values()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.data_ptr() not in self.held:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("scales", ["float32", "int8"])
@pytest.mark.parametrize(("method", "bits"), [("nf", 4), ("uniform", 4), ("trellis", 2)])
def test_a_lookup_takes_what_its_rows_take(method, bits, scales) -> None:
    module, _ = embedding(method, bits, (600, 64), 32, scales)
    module(torch.tensor([0]))  # levels are computed once
    with Largest(module) as largest:
        module(torch.tensor([5, 1, 599]))
    assert largest.elements < 1000


@pytest.mark.parametrize("method", ["nf", "uniform"])
@pytest.mark.parametrize(("shape", "block_size"), [ALIGNED[0], UNALIGNED[0]], ids=str)
@pytest.mark.parametrize("ids", [[-1], [0, 70], [[2], [-70]], [10**6]], ids=str)
def test_ids_outside_the_table_are_refused(method, shape, block_size, ids) -> None:
    module, _ = embedding(method, 3, shape, block_size)
    with pytest.raises(IndexError, match=f"a table of {shape[0]} rows"):
        module(torch.tensor(ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "block_size"), [ALIGNED[0], UNALIGNED[0]], ids=str)
def test_it_follows_moves_to_a_dtype_and_keeps_its_bytes(dtype, shape, block_size) -> None:
    module, table = embedding("uniform", 3, shape, block_size, "int8")
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    ids = torch.arange(9).view(3, 3)
    assert torch.equal(module.to(dtype)(ids), table.to(dtype)[ids])
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    assert torch.equal(module.float()(ids), table[ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounds", [False, True])
def test_scaled_as_the_model_s_own_module_scales(dtype, rounds) -> None:
    factor = 7.3  # bfloat16 would have 7.3125
    given = {"embed_scale": factor, "rounds_scale": rounds}
    module, table = embedding("nf", 4, *ALIGNED[0], dtype=dtype, **given)
    ids = torch.arange(70)
    expected = table.to(dtype) * (torch.tensor(factor).to(dtype) if rounds else factor)
    assert torch.equal(module(ids), expected)
    assert torch.equal(expected, module.to(dtype)(ids))


def test_the_padding_row_is_looked_up_as_any_other() -> None:
    """As in nn.Embedding, which keeps it from being trained and nothing else."""
    module, table = embedding("nf", 4, *ALIGNED[0], padding_idx=-1)
    plain_table = nn.Embedding.from_pretrained(table, padding_idx=-1)
    assert module.padding_idx == plain_table.padding_idx == 69
    ids = torch.tensor([69, 0, 69])
    assert torch.equal(module(ids), plain_table(ids))


def test_no_gradient_reaches_the_table() -> None:
    module, _ = embedding("uniform", 2, *ALIGNED[0])
    assert not module(torch.tensor([1, 2])).requires_grad
    assert not any(parameter.requires_grad for parameter in module.parameters())
