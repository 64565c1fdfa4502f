"""Tensors that hold a matrix of each expert, cut by their headers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loftq_cli.checkpoint.reader import ShardReader
from loftq_cli.checkpoint.source import open_source
from loftq_cli.checkpoint.stacks import Stack, cut
from loftq_cli.machine.durable import file_sha256
from tests.support import checkpoints

PATH = "model.layers.0.mlp.experts"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_matrix_is_read_in_file_order_and_the_file_is_hashed(
    dtype, transposed, tmp_path
) -> None:
    values = torch.arange(3 * 4 * 8).reshape(3, 4, 8).to(dtype)
    tensors = {**checkpoints.llama(), f"{PATH}.gate_up_proj": values}
    directory: Path = checkpoints.write(tmp_path / "source", tensors)
    stack = Stack(f"{PATH}.gate_up_proj", PATH, "gate_up_proj", 3, transposed)
    source = cut(open_source(directory), {stack.tensor: stack})
    (shard,) = source.shards
    with ShardReader(shard) as reader:
        found = {tensor.name: (tensor, reader.read(tensor)) for tensor in shard.header.tensors}
        reader.finish()
        assert reader.sha256 == file_sha256(directory / "model.safetensors")
    assert stack.tensor not in found
    for index in range(3):
        spec, value = found[f"{PATH}.{index}.gate_up_proj.weight"]
        expected = values[index].T if transposed else values[index]
        assert torch.equal(value, expected)
        assert spec.shape == tuple(expected.shape)
        assert spec.nbytes == expected.nbytes
    assert all(
        torch.equal(found[name][1], tensor) for name, tensor in tensors.items() if name in found
    )
    assert sum(tensor.nbytes for tensor, _ in found.values()) == sum(
        t.nbytes for t in tensors.values()
    )
