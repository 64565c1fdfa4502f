"""What processes tell each other: here they are threads; tests/whole/crash has real ones."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from loftq_cli.machine.world import ALONE, Ranks, _together


class Threads(Ranks):
    """Ranks that hand each other tensors by way of ``said``."""

    def __init__(self, rank: int, said: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(said)
        self.said, self.barrier = said, barrier

    def _gathered(self, content: torch.Tensor) -> list[torch.Tensor]:
        self.said[self.rank] = content.clone()
        self.barrier.wait(60)
        found = list(self.said)
        self.barrier.wait(60)
        assert len({each.shape for each in found}) == 1
        return found

    def _spread(self, tensor: torch.Tensor) -> None:
        tensor.copy_(self._gathered(tensor)[0])


def run(count: int, work: Any) -> list[Any]:
    said, barrier, found = [None] * count, threading.Barrier(count), [None] * count

    def one(rank: int) -> None:
        found[rank] = work(Threads(rank, said, barrier))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


@pytest.mark.parametrize("length", [0, 1, 501, 502, 503, 504, 505, 5000])
def test_messages_of_every_length_arrive(length: int) -> None:
    def work(world: Threads) -> tuple[Any, list[Any]]:
        told = world.told(lambda: {"from": world.rank, "text": "x" * length})
        return told, world.gathered([world.rank, "\u00e9" * (length if world.rank == 1 else 2)])

    expected = [[0, "\u00e9" * 2], [1, "\u00e9" * length], [2, "\u00e9" * 2]]
    assert run(3, work) == [({"from": 0, "text": "x" * length}, expected)] * 3


def test_what_rank_0_has_is_spread_in_every_dtype() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.int32, torch.uint8, torch.float16)

    def work(world: Threads) -> list[torch.Tensor]:
        tensors = [(torch.arange(6) + 10 * world.rank).to(dtype).view(2, 3) for dtype in dtypes]
        tensors += [torch.tensor(1.5 + world.rank), torch.empty(0, 3)]
        for tensor in tensors:
            world.spread(tensor)
        return tensors

    first, second = run(2, work)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert first[0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_small_tensors_go_together_and_none_is_left_out() -> None:
    sizes = [(3, torch.float32), (4, torch.float32), (2, torch.bfloat16), (1 << 21, torch.float32)]
    tensors = [torch.zeros(size, dtype=dtype) for size, dtype in [*sizes, (5, torch.float32)]]
    found = list(_together(tensors))
    assert [[len(tensor) for tensor in some] for some in found] == [[3, 4], [2], [1 << 21], [5]]
    assert list(_together([])) == []


def test_one_process_does_everything() -> None:
    assert ALONE.share(range(5)) == [0, 1, 2, 3, 4]
    assert (ALONE.told(lambda: 3), ALONE.gathered(4), ALONE.first) == (3, [4], True)
    shares = run(3, lambda world: world.share(range(8)))
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]
