"""The processes that measure or train one model together, each on its share of the text.

Sums, and what one of them has settled, go through torch.distributed: gloo on CPUs, nccl between
GPUs where every process has one of its own. Whoever waits for the others looks meanwhile whether
they are still there.
"""

from __future__ import annotations

import ctypes
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch

from loftq_cli.machine import introduction
from loftq_cli.machine.group import Group
from loftq_cli.machine.meeting import JOINING

_T = TypeVar("_T")
_GLANCE = 2e-4  # seconds between two looks whether something has arrived
_LOOK = 0.5  # and whether everybody is still there
_MEETING = timedelta(seconds=60)
_HEAD, _LENGTH = 512, 8  # bytes: of a message's beginning, and in it of what says how long it is
_SMALL = 1 << 22  # bytes: smaller tensors are sent together, up to so many
_WORKING = timedelta(days=30)  # whether somebody is gone is not for torch to guess


class World:
    """This process alone: rank 0 of 1. :class:`Ranks` are several."""

    rank, size = 0, 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes."""
        return self.rank == 0

    def share(self, items: Sequence[_T]) -> list[_T]:
        """Those of ``items`` that this process works on."""
        return list(items[self.rank :: self.size])

    @contextmanager
    def in_turn(self, doing: str) -> Iterator[None]:
        """One process of each host is in here before the others: what it brings from the hub is
        there then. ``doing``: another name for each time."""
        yield

    def agree(
        self, settings: Mapping[str, Any], sources: Sequence[Sequence[Any]], device: torch.device
    ) -> None:
        """Begin to work together on ``device``. Raises EnvironmentFailure, on rank 0, if ranks
        differ in software, kind of device, ``settings`` or ``sources`` ([name, …] of each file),
        naming both; and if one of them does not come."""

    def told(self, find: Callable[[], Any]) -> Any:
        """What ``find`` gives on rank 0, where alone it is called; JSON."""
        return find()

    def gathered(self, value: Any) -> list[Any]:
        """The ``value`` of every process in turn; JSON."""
        return [value]

    def add_up(self, tensor: torch.Tensor) -> None:
        """Replace ``tensor``, of one shape everywhere, by the sum of everybody's."""

    def add_halves(self, tensors: Sequence[torch.Tensor]) -> None:
        """As :meth:`add_up` of each, of 2^k processes: neighbours first, then pairs of them, and so
        on, so that a sum has the bits that one process gets in that order."""

    def spread(self, tensor: torch.Tensor) -> None:
        """Replace ``tensor``, of one shape everywhere, by that of rank 0."""


ALONE = World()


class Ranks(World):
    """The processes of ``group``. Every method, but ``share``, is called by all of them, in the
    same order; it raises what another has failed with, or EnvironmentFailure if one is gone."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self.rank, self.size = group.place.rank, group.place.size
        self._through_host = True
        self._halves: list[Any] = []  # the groups of two that add_halves goes through

    @contextmanager
    def in_turn(self, doing: str) -> Iterator[None]:
        key = f"{doing}/{self._group.host}"
        if self._group.place.local_rank:
            self._group.wait_for(key)
        yield
        if self._group.place.local_rank == 0:
            self._group.say(key, {})

    def agree(
        self, settings: Mapping[str, Any], sources: Sequence[Sequence[Any]], device: torch.device
    ) -> None:
        own = introduction.about({**settings, "device": device.type}, sources)
        own["number"] = device.index
        if self.first:
            others = self._group.gather("about", patience=JOINING)
            self._group.refuse_differing(own, others)
            places = [(each["host"], each["number"]) for each in (own, *others.values())]
            apart = len(set(places)) == self.size
            self._group.say("agreed", {"apart": apart})
        else:
            self._group.introduce(own)
        agreed = self._group.wait_for("agreed")
        assert agreed is not None, "rank 0 has ended well"
        self._meet(device, own_device=device.type == "cuda" and agreed["apart"])

    def _meet(self, device: torch.device, *, own_device: bool) -> None:
        import torch.distributed as dist
        from torch.distributed import distributed_c10d

        self._through_host = not own_device  # nccl takes no two processes on one GPU
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if own_device else "gloo",
                store=self._group.store("world"),
                rank=self.rank,
                world_size=self.size,
                timeout=_MEETING,
            )
            distributed_c10d._set_pg_timeout(_WORKING)
            groups = [distributed_c10d._get_default_group(), *self._pair_up()]
        except (RuntimeError, ValueError) as error:
            raise self._group.failure(str(error).partition("\n")[0]) from error
        # For ever: what it is waiting for may never come, and Python would wait for it at its end.
        for each in groups:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))

    def _pair_up(self) -> list[Any]:
        """The groups of two that this process is in, if there are 2^k: of neighbours first."""
        import torch.distributed as dist

        distance = 1
        while self.size & (self.size - 1) == 0 and distance < self.size:
            for low in range(self.size):
                if not low & distance:
                    group = dist.new_group([low, low | distance], timeout=_WORKING)
                    if self.rank in (low, low | distance):
                        self._halves.append(group)
            distance *= 2
        return self._halves

    def part(self) -> None:
        """Nothing more will be shared."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()

    def told(self, find: Callable[[], Any]) -> Any:
        head = torch.zeros(_HEAD, dtype=torch.uint8)
        body = b""
        if self.first:
            body = json.dumps(find()).encode()
            head = _head(body)
        self._spread(head)
        length, found = _begun(head)
        if len(found) < length:
            whole = torch.zeros(length, dtype=torch.uint8)
            if self.first:
                whole.copy_(_bytes(body))
            self._spread(whole)
            found = bytes(whole.tolist())
        return json.loads(found)

    def gathered(self, value: Any) -> list[Any]:
        body = json.dumps(value).encode()
        found = [_begun(each) for each in self._gathered(_head(body))]
        longest = max(length for length, _ in found)
        texts = [text for _, text in found]
        if longest > _HEAD - _LENGTH:
            texts = [bytes(each.tolist()) for each in self._gathered(_bytes(body.ljust(longest)))]
        return [json.loads(text) for text in texts]

    def _gathered(self, content: torch.Tensor) -> list[torch.Tensor]:
        import torch.distributed as dist

        found = [torch.zeros_like(content) for _ in range(self.size)]
        self._wait(dist.all_gather(found, content, async_op=True))
        return found

    def add_up(self, tensor: torch.Tensor) -> None:
        self._carried(tensor, self._add_up)

    def add_halves(self, tensors: Sequence[torch.Tensor]) -> None:
        for some in _together(tensors):
            flat = some[0] if len(some) == 1 else torch.cat([tensor.reshape(-1) for tensor in some])
            for group in self._halves:  # two values have one sum, whoever computes it
                self._carried(flat, functools.partial(self._add_up, group=group))
            if len(some) > 1:
                parts = torch.split(flat, [tensor.numel() for tensor in some])
                for tensor, part in zip(some, parts, strict=True):
                    tensor.copy_(part.view(tensor.shape))

    def spread(self, tensor: torch.Tensor) -> None:
        if tensor.numel():
            content = tensor.cpu().contiguous()
            self._spread(content.view(-1).view(torch.uint8))
            if not self.first:
                tensor.copy_(content)

    def _carried(self, tensor: torch.Tensor, through: Callable[[torch.Tensor], None]) -> None:
        """``through`` with a tensor that torch.distributed takes, in place of ``tensor``."""
        if tensor.numel() == 0:
            return
        carried = tensor.contiguous()
        carried = carried.cpu() if self._through_host else carried
        through(carried)
        if carried is not tensor:
            tensor.copy_(carried)

    def _add_up(self, tensor: torch.Tensor, group: Any = None) -> None:
        import torch.distributed as dist

        self._wait(dist.all_reduce(tensor, group=group, async_op=True))

    def _spread(self, tensor: torch.Tensor) -> None:
        import torch.distributed as dist

        self._wait(dist.broadcast(tensor, 0, async_op=True))

    def _wait(self, work: Any) -> None:
        look = time.monotonic() + _LOOK
        while not work.is_completed():
            time.sleep(_GLANCE)
            if time.monotonic() > look:
                self._group.check()
                look = time.monotonic() + _LOOK
        try:
            work.wait()
        except RuntimeError as error:  # torch's errors of a connection are
            raise self._group.failure(str(error).partition("\n")[0]) from error


def _bytes(body: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(body), dtype=torch.uint8)


def _head(body: bytes) -> torch.Tensor:
    """The beginning of a message: how long it is, and as much of it as there is room for."""
    return _bytes((len(body).to_bytes(_LENGTH, "little") + body)[:_HEAD].ljust(_HEAD))


def _begun(head: torch.Tensor) -> tuple[int, bytes]:
    """How long a message is, and its beginning."""
    content = bytes(head.tolist())
    length = int.from_bytes(content[:_LENGTH], "little")
    return length, content[_LENGTH : _LENGTH + length]


def _together(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """``tensors`` in the same order, small ones of one dtype that follow each other together."""
    some: list[torch.Tensor] = []
    for tensor in tensors:
        nbytes = sum(each.nbytes for each in some) + tensor.nbytes
        if some and (nbytes > _SMALL or some[0].dtype != tensor.dtype):
            yield some
            some = []
        some.append(tensor)
    if some:
        yield some


@contextmanager
def several(group: Group) -> Iterator[World]:
    """The processes of ``group``, until rank 0 has ended well. Raises EnvironmentFailure if it has
    ended otherwise."""
    world = Ranks(group)
    yield world
    world.part()
    if not world.first:
        group.wait_for("nothing more")
