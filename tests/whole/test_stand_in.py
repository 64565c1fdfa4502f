"""The stand-in for a CUDA device: what it refuses, what it counts, and that its values are real."""

from __future__ import annotations

import copy
import ctypes
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.stand_in.runtime import stand_in_devices
from tests.support.stand_in.tensor import Tally, start_anew

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def devices() -> Iterator[None]:
    with stand_in_devices(2):
        yield


def counted(work: Callable[[], object]) -> Tally:
    start_anew()
    work()
    return start_anew()


def test_a_tensor_is_where_it_was_made() -> None:
    made = {
        "cuda": torch.zeros(3, device="cuda"),
        "cuda:1": torch.ones(3).to("cuda:1"),
        "cpu": torch.zeros(3, device="cuda").cpu(),
    }
    assert [str(each.device) for each in made.values()] == ["cuda:0", "cuda:1", "cpu"]
    assert (made["cuda:1"] * 2 + 1).device == SECOND
    assert made["cuda:1"].is_cuda
    assert not made["cpu"].is_cuda
    with torch.cuda.device(1):
        assert torch.arange(3, device="cuda").device == SECOND


REFUSED: dict[str, Callable[[torch.Tensor], object]] = {
    "an operand of the CPU": lambda there: there + torch.ones(3),
    "a product with one": lambda there: there @ torch.ones(3),
    "one in a list": lambda there: torch.cat([there, torch.ones(3)]),
    "values of the CPU under an index": lambda there: there.index_put_(
        (torch.zeros(3, dtype=torch.long, device="cuda"),), torch.ones(3)
    ),
    "an operand of another device": lambda there: there + torch.ones(3, device="cuda:1"),
    "a generator of the CPU": lambda there: torch.randn(
        3, device="cuda", generator=torch.Generator()
    ),
    "a copy that nobody waits for": lambda there: torch.ones(3).to("cuda", non_blocking=True),
    "one to the host": lambda there: there.to("cpu", non_blocking=True),
    "an array": lambda there: there.numpy(),
    "a pointer for C": lambda there: ctypes.c_void_p(there.data_ptr()),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_refuses(what: str) -> None:
    there = torch.ones(3, device="cuda")
    with pytest.raises((RuntimeError, TypeError)):
        REFUSED[what](there)


def test_it_takes_what_cuda_takes() -> None:
    there = torch.ones(3, device="cuda")
    assert (there * torch.tensor(2.0)).device == FIRST  # a number
    there[1:] = torch.zeros(2)
    assert there[torch.tensor([0])].tolist() == [1.0]
    assert torch.ones(3).pin_memory().to("cuda", non_blocking=True).device == FIRST
    assert there.to("cuda:1").device == SECOND
    assert torch.zeros(3).copy_(there).tolist() == [1.0, 0.0, 0.0]


def test_launches_and_waits_are_counted() -> None:
    there, moved = torch.ones(4, 4, device="cuda"), torch.ones(4)
    tally = counted(lambda: (there.view(16)[2:], torch.empty(3, device="cuda")))
    assert not tally.launches
    assert not tally.waits
    tally = counted(lambda: torch.linalg.vecdot(there, there))
    assert dict(tally.launches) == {"mul": 1, "sum": 1}  # of what it consists
    tally = counted(lambda: (float(there.sum()), bool(there[0, 0]), there.tolist(), there.cpu()))
    assert sum(tally.waits.values()) == 4
    tally = counted(lambda: (moved.to("cuda"), torch.tensor([1], device="cuda")))
    assert (sum(tally.brought.values()), sum(tally.waits.values())) == (2, 0)
    tally = counted(lambda: moved.pin_memory().to("cuda", non_blocking=True))
    assert not tally.brought


def test_models_move_and_train() -> None:
    torch.manual_seed(0)
    here = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    there = copy.deepcopy(here)
    names = [id(each) for each in there.parameters()]
    there.to("cuda")
    assert [id(each) for each in there.parameters()] == names
    assert {each.device for each in (*there.parameters(), *there.buffers())} == {FIRST}
    inputs = torch.randn(5, 4)
    for model, given in ((here, inputs), (there, inputs.cuda())):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
        for _ in range(3):
            optimizer.zero_grad()
            model(given).square().mean().backward()
            optimizer.step()
    assert {each.grad.device for each in there.parameters() if each.grad is not None} == {FIRST}
    copied = copy.deepcopy(there).cpu()
    for found, expected in zip(copied.parameters(), here.parameters(), strict=True):
        assert type(found) is nn.Parameter
        assert torch.equal(found, expected)


def test_a_function_of_ones_own_is_on_the_device_in_the_backward_pass() -> None:
    seen: list[torch.device] = []

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            (x,) = ctx.saved_tensors
            seen.extend((grads[0].device, x.device, (grads[0] * x).device))
            return grads[0] * 2

    x = torch.ones(3, device="cuda:1", requires_grad=True)
    Twice.apply(x).sum().backward()
    assert seen == [SECOND] * 3
    assert x.grad is not None
    assert x.grad.tolist() == [2.0] * 3


def test_threads_have_a_current_device_of_their_own() -> None:
    found: list[int] = []

    def look() -> None:
        torch.cuda.set_device(1)
        found.append(torch.zeros(1, device="cuda").get_device())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert [*found, torch.cuda.current_device()] == [1, 0]


def test_afterwards_there_is_none() -> None:
    with stand_in_devices(0):
        assert not torch.cuda.is_available()
