"""A stand-in for a CUDA device: tensors that say they are on one, and whose values are in memory.

It works at the level of ``__torch_function__``: below it torch sees ordinary tensors of the CPU, so
every operation gives what the CPU's gives, bit for bit. Above it, in the code that is tested, a
tensor has the device "cuda:0" (or another number), and what a CUDA device would refuse is refused:
operands on two devices, pointers and arrays of its memory, random numbers drawn from another
device's generator, and copies that nobody waits for from memory that is not pinned.

What is counted: ``launches``, the operations that reach the device, as the dispatcher sees them
(views and allocations are none); ``waits``, how often the host stands still until a value is there;
``brought``, how often something comes from the host and its program waits for that.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.stand_in import rules

_Arguments = tuple[Any, ...]


@dataclass
class Tally:
    """What was counted, by the names of the operations."""

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    brought: Counter[str] = field(default_factory=Counter)


class _Here(threading.local):
    """What a thread is about. ``current``: the number of its device; ``counting``: that operations
    are counted already; ``adopting``: the device of a backward pass, which hands out gradients as
    plain tensors."""

    current = 0
    counting = False
    adopting: int | None = None


here = _Here()
tally = Tally()


def start_anew() -> Tally:
    """Count from zero; what was counted before is given back."""
    global tally
    before, tally = tally, Tally()
    return before


class StandIn(torch.Tensor):
    """A tensor on the device of number ``_number``."""

    _number: int

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: _Arguments = (), kwargs: Any = None
    ) -> Any:
        return answer(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"StandIn(cuda:{self._number}, {tuple(self.shape)}, {self.dtype})"


class StandInMode(TorchFunctionMode):
    """Sees the calls that have no such tensor among their arguments: those that make one."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: _Arguments = (), kwargs: Any = None
    ) -> Any:
        return answer(func, args, kwargs or {})


class _Counting(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: _Arguments = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if rules.waits(name, args):
            tally.waits[name] += 1
        if rules.launches(func):
            tally.launches[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[None]:
    """Operations of this thread are counted, each once."""
    if here.counting:
        yield
        return
    here.counting = True
    try:
        with _Counting():
            yield
    finally:
        here.counting = False


def answer(func: Callable[..., Any], args: _Arguments, kwargs: dict[str, Any]) -> Any:
    """What ``func`` gives, on the device that its arguments are on or name."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        return _attribute(func, name, args)
    if here.adopting is not None:
        for each in rules.tensors(args, kwargs):
            put(each, here.adopting)
    numbers = {each._number for each in rules.tensors(args, kwargs) if isinstance(each, StandIn)}
    special = _SPECIAL.get(name)
    if special is not None and (numbers or name in ("pin_memory", "is_pinned", "to", "cuda")):
        return special(*args, **kwargs)
    named = "device" in kwargs and kwargs["device"] is not None
    target = rules.number(kwargs["device"], here.current) if named else None
    if not numbers and target is None:
        return _plain(func, args, kwargs)
    if len(numbers) > 1 and name != "copy_":
        raise RuntimeError(f"{name}: tensors on several devices, {sorted(numbers)}")
    if numbers:
        _check_operands(name, args, kwargs)
    _check_generator(name, kwargs, target if named else min(numbers))
    if named:
        kwargs = {**kwargs, "device": "cpu"}
        if target is not None and name in ("tensor", "as_tensor", "asarray"):
            tally.brought[name] += 1
    on = target if named else _owner(name, args, numbers)
    if on is None:
        if not named:
            tally.waits[name] += 1
        return _plain(func, args, kwargs)
    with torch._C.DisableTorchFunctionSubclass(), counted():
        found = func(*args, **kwargs)
    return put(found, on)


def _owner(name: str, args: _Arguments, numbers: set[int]) -> int | None:
    """The device of a result: that of the tensor that is changed, or of the only operand's."""
    if name in ("copy_", "__setitem__"):
        return args[0]._number if isinstance(args[0], StandIn) else None
    return min(numbers)


def put(found: Any, number: int) -> Any:
    """The tensors of ``found`` as those of a device, in place: leaves stay leaves."""
    if isinstance(found, torch.Tensor):
        if not isinstance(found, StandIn) and found.device.type == "cpu":
            with torch._C.DisableTorchFunctionSubclass():
                there: Any = found
                parameter = isinstance(found, torch.nn.Parameter)
                there.__class__, there._number = StandIn, number
                if parameter:
                    there._is_param = True
        return found
    if isinstance(found, tuple) and hasattr(found, "_fields"):
        return type(found)(*(put(each, number) for each in found))
    if isinstance(found, (tuple, list)):
        parts = [put(each, number) for each in found]
        return found if type(found) not in (tuple, list) else type(found)(parts)
    return found


def take_away(tensor: Any) -> Any:
    """``tensor`` as one of the CPU, in place."""
    if isinstance(tensor, StandIn):
        with torch._C.DisableTorchFunctionSubclass():
            parameter = isinstance(tensor, torch.nn.Parameter)
            del tensor._number
            there: Any = tensor
            there.__class__ = torch.nn.Parameter if parameter else torch.Tensor
    return tensor


def _plain(func: Callable[..., Any], args: _Arguments, kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _check_operands(name: str, args: _Arguments, kwargs: dict[str, Any]) -> None:
    """Raise RuntimeError for a tensor of the CPU among those of the device, as CUDA does."""
    if name == "_has_compatible_shallow_copy_type":  # nn.Module asks before it moves a parameter
        return
    for each in rules.tensors(args, kwargs):
        if isinstance(each, StandIn) or each.device.type == "meta":
            continue
        if name == "copy_" or (name == "__setitem__" and rules.is_copy(args)):
            tally.brought[name] += isinstance(args[0], StandIn)
        elif name == "__getitem__" and isinstance(args[0], StandIn):
            tally.brought[name] += 1  # an index: it is brought there
        elif not (each.dim() == 0 and name.strip("_") in rules.ELEMENTWISE):
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, but found at least two "
                "devices, cuda and cpu"
            )


def _check_generator(name: str, kwargs: dict[str, Any], number: int | None) -> None:
    generator = kwargs.get("generator")
    if generator is not None and number is not None and generator.device.type != "cuda":
        raise RuntimeError(f"{name}: expected a 'cuda' device type for generator but found 'cpu'")


def _attribute(func: Any, name: str, args: _Arguments) -> Any:
    tensor, attribute = args[0], func.__self__.__name__
    if here.adopting is not None:
        put(tensor, here.adopting)
    if name == "__set__" and attribute == "data":
        value = args[1]
        _plain(func, args, {})
        if isinstance(value, StandIn):
            take_away(tensor)
            return put(tensor, value._number)
        return take_away(tensor)
    if not isinstance(tensor, StandIn):
        return _plain(func, args, {})
    if attribute == "device":
        return torch.device("cuda", tensor._number)
    if attribute in ("is_cuda", "is_cpu"):
        return attribute == "is_cuda"
    found = _plain(func, args, {})
    return put(found, tensor._number) if isinstance(found, torch.Tensor) else found


def backward(engine: Callable[..., Any], outputs: Any, *args: Any, **kwargs: Any) -> Any:
    """A backward pass by torch's ``engine``, in which functions of the code that is tested run,
    too: what the engine hands to them is on the device of the ``outputs``."""
    numbers = (each._number for each in rules.tensors(outputs) if isinstance(each, StandIn))
    before, here.adopting = here.adopting, min(numbers, default=None)
    try:
        with torch._C._EnableTorchFunction(), StandInMode():
            return engine(outputs, *args, **kwargs)
    finally:
        here.adopting = before


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """``Tensor.to`` in all its forms."""
    device, dtype, non_blocking, copy = rules.parsed_to(args, kwargs, here.current)
    source = tensor._number if isinstance(tensor, StandIn) else None
    target = source if device is None else rules.number(device, here.current)
    if device is not None and torch.device(device).type == "meta":
        return _plain(torch.Tensor.to, (tensor, "meta"), {} if dtype is None else {"dtype": dtype})
    moved = target != source
    if moved and non_blocking and not (source is None and is_pinned(tensor)):
        raise RuntimeError("an asynchronous copy from or to memory that is not pinned")
    if moved and not non_blocking:
        (tally.brought if source is None else tally.waits)["to"] += 1
    wanted = {} if dtype is None else {"dtype": dtype}
    counting = counted() if target is not None else _nothing()
    with torch._C.DisableTorchFunctionSubclass(), counting:
        found: torch.Tensor = tensor.to("cpu", copy=copy or moved, **wanted)  # type: ignore[call-overload]
        if found is tensor:
            return tensor
    return found if target is None else put(found, target)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def is_pinned(tensor: torch.Tensor, *_: Any) -> bool:
    return bool(getattr(tensor, "_is_pinned_here", False))


def _pin_memory(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    if isinstance(tensor, StandIn):
        raise RuntimeError("cannot pin a tensor of a device: only dense CPU tensors can be pinned")
    pinned = _plain(torch.Tensor.clone, (tensor,), {})
    pinned._is_pinned_here = True
    return pinned


@dataclass(frozen=True)
class DevicePointer:
    """An address on a device: to be compared, and no number, so that ctypes refuses it."""

    number: int
    address: int


def _data_ptr(tensor: Any) -> DevicePointer:
    return DevicePointer(tensor._number, _plain(torch.Tensor.data_ptr, (tensor,), {}))


def _refused(what: str, error: type[Exception]) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise error(f"{what} of a tensor on a CUDA device: copy it to the host first")

    return refuse


def _deepcopy(tensor: Any, memo: dict[int, Any]) -> Any:
    if id(tensor) not in memo:
        with torch._C.DisableTorchFunctionSubclass():
            copy: torch.Tensor = tensor.detach().clone().requires_grad_(tensor.requires_grad)
            if isinstance(tensor, torch.nn.Parameter):
                copy = torch.nn.Parameter(copy, tensor.requires_grad)
        memo[id(tensor)] = put(copy, tensor._number)
    return memo[id(tensor)]


def _tolist(tensor: torch.Tensor) -> Any:
    tally.waits["tolist"] += 1
    return _plain(torch.Tensor.tolist, (tensor,), {})


_SPECIAL: dict[str, Callable[..., Any]] = {
    "to": _to,
    "cpu": lambda tensor, **kwargs: _to(tensor, "cpu"),
    "cuda": lambda tensor, device=None, non_blocking=False, **kwargs: _to(
        tensor, "cuda" if device is None else device, non_blocking=non_blocking
    ),
    "tolist": _tolist,
    "__deepcopy__": _deepcopy,
    "pin_memory": _pin_memory,
    "is_pinned": is_pinned,
    "type": lambda tensor, *args, **kwargs: (
        _to(tensor, *args) if args else f"torch.cuda.{str(tensor.dtype).removeprefix('torch.')}"
    ),
    "data_ptr": _data_ptr,
    "numpy": _refused("an array", TypeError),
    "__array__": _refused("an array", TypeError),
    "__dlpack__": _refused("an array", TypeError),
    "get_device": lambda tensor: tensor._number,
}
