"""Growing shards: what is written loads bit for bit, aligned, and the same bytes every time."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from loftq_cli.checkpoint.dtypes import BITS, torch_dtype
from loftq_cli.checkpoint.header import read_header
from loftq_cli.checkpoint.writer import GrowingShard, place, spec_of
from loftq_cli.errors import EnvironmentFailure
from tests.support.makers import PROPERTY

DTYPES = tuple(map(torch_dtype, ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "I8")))


def made(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def write(path, tensors: dict[str, torch.Tensor]) -> None:
    """Write ``tensors`` in an order of their own."""
    specs = [spec_of(name, tensor) for name, tensor in tensors.items()]
    with GrowingShard(path, specs) as shard:
        for name in random.Random(0).sample(list(tensors), len(tensors)):
            shard.write(name, tensors[name])
        shard.sync()


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert actual[name].shape == tensor.shape
        assert torch.equal(actual[name], tensor)


@PROPERTY
@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)),
        min_size=1,
        max_size=8,
    )
)
def test_any_mix_loads_bit_for_bit_and_is_aligned(tmp_path_factory, kinds):
    path = tmp_path_factory.getbasetemp() / "mix.safetensors"
    path.unlink(missing_ok=True)
    tensors = {f"t.{n}": made(dtype, *shape, seed=n) for n, (dtype, shape) in enumerate(kinds)}
    write(path, tensors)
    assert_same(load_file(path), tensors)
    header = read_header(path)
    assert header.data_start % 8 == 0
    for tensor in header.tensors:
        assert tensor.start % (BITS[tensor.dtype] // 8) == 0


def test_nan_and_infinity_keep_their_bits(tmp_path):
    odd = torch.tensor([0x7FC00001, -0x400000, 0x7F800000, -0x80000000], dtype=torch.int32)
    write(tmp_path / "f", {"odd": odd.view(torch.float32)})
    assert torch.equal(load_file(tmp_path / "f")["odd"].view(torch.int32), odd)


def test_a_transposed_tensor_is_written_row_by_row(tmp_path):
    tensor = made(torch.float32, 3, 4).T
    write(tmp_path / "f", {"t": tensor})
    assert torch.equal(load_file(tmp_path / "f")["t"], tensor)


def test_pieces_and_hashes(tmp_path):
    tensor = made(torch.int32, 100)
    content = tensor.numpy().tobytes()
    digest = hashlib.sha256(content).hexdigest()
    path = tmp_path / "f"
    with GrowingShard(path, [spec_of("whole", tensor), spec_of("pieces", tensor)]) as shard:
        assert shard.write("whole", tensor) == digest
        pieces: list[Any] = [content[:1], bytearray(content[1:17]), memoryview(content)[17:]]
        assert shard.write_pieces("pieces", pieces) == digest
        assert shard.sha256_of("whole") == shard.sha256_of("pieces") == digest
    assert_same(load_file(path), {"whole": tensor, "pieces": tensor})


def test_reopening_keeps_what_is_there(tmp_path):
    tensors = {"a": made(torch.float32, 3), "b": made(torch.uint8, 5), "c": made(torch.float16, 2)}
    specs = [spec_of(name, tensor) for name, tensor in tensors.items()]
    with GrowingShard(tmp_path / "f", specs) as shard:
        first = shard.write("b", tensors["b"])
    with GrowingShard(tmp_path / "f", specs) as shard:
        assert shard.sha256_of("b") == first
        shard.write("a", tensors["a"])
        shard.write("c", tensors["c"])
    assert_same(load_file(tmp_path / "f"), tensors)


def test_the_file_has_its_full_size_from_the_start(tmp_path):
    tensors = {"a": made(torch.float32, 300)}
    with GrowingShard(tmp_path / "f", [spec_of("a", tensors["a"])]):
        header = read_header(tmp_path / "f")
    assert [(t.name, t.nbytes) for t in header.tensors] == [("a", 1200)]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_follows_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write(tmp_path / "f", {"a": made(torch.uint8, 1)})
    finally:
        os.umask(before)
    assert (tmp_path / "f").stat().st_mode & 0o777 == mode


def test_fresh_processes_write_the_same_bytes(tmp_path):
    program = """
import sys
from pathlib import Path
import torch
from loftq_cli.checkpoint.writer import GrowingShard, spec_of
kinds = (torch.uint8, torch.float32, torch.int32, torch.bfloat16)
tensors = {f"{name}.weight": torch.arange(6).to(kind) for name in "xyabc" for kind in kinds[:1]}
tensors |= {f"{kind}": torch.arange(5).to(kind) for kind in kinds}
specs = [spec_of(name, tensor) for name, tensor in tensors.items()]
with GrowingShard(Path(sys.argv[1]), specs) as shard:
    for name, tensor in tensors.items():
        shard.write(name, tensor)
"""
    contents = set()
    for seed in ("0", "1"):
        path = tmp_path / seed
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", program, str(path)], check=True, env=environment)
        contents.add(path.read_bytes())
    assert len(contents) == 1


def test_a_header_may_hold_any_name():
    specs = [spec_of(name, made(torch.uint8, 1)) for name in ("", "ü.weight", '"\\', "a\n")]
    header, placed = place(specs)
    assert len(header) % 8 == 0
    assert sorted(tensor.start for tensor in placed.values()) == [
        len(header) + number for number in range(4)
    ]


def test_errors_name_the_file(tmp_path):
    with pytest.raises(EnvironmentFailure, match=r"none/f: No such file or directory") as caught:
        GrowingShard(tmp_path / "none" / "f", [])
    assert caught.value.exit_code == 5


def test_a_full_disk_is_an_environment_failure(tmp_path, monkeypatch):
    tensor = made(torch.float32, 4)
    with GrowingShard(tmp_path / "f", [spec_of("a", tensor)]) as shard:

        def full(*args: object) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(EnvironmentFailure, match="f: No space left on device"):
            shard.write("a", tensor)
