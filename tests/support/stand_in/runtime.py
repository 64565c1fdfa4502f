"""What ``torch.cuda`` says while there are stand-in devices (see tensor.py)."""

from __future__ import annotations

import _thread
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import safetensors.torch
import torch

from loftq_cli.numerics import fused_panel
from tests.support.stand_in import rules, tensor
from tests.support.stand_in.tensor import StandInMode, here

MEMORY = 64 << 30  # bytes, of each device


@contextmanager
def stand_in_devices(
    count: int = 1, *, bfloat16: bool = False, memory: tuple[int, ...] = ()
) -> Iterator[Any]:
    """So many CUDA devices, for this thread and those that are started meanwhile. ``bfloat16``:
    they have instructions for it; ``memory``: what is free on each. Yields the counts."""
    _import_what_looks_for_devices()
    free = [*memory, *([MEMORY] * count)][:count]
    cuda = {
        "is_available": lambda: count > 0,
        "device_count": lambda: count,
        "current_device": lambda: here.current,
        "set_device": lambda device: setattr(here, "current", _number(device)),
        "device": _device,
        "device_of": lambda of: _device(of._number),
        "synchronize": _synchronize,
        "empty_cache": lambda: None,
        "get_device_name": lambda device=None: "a stand-in for a CUDA device",
        "get_device_properties": lambda device=None: SimpleNamespace(
            name="a stand-in for a CUDA device", total_memory=free[_number(device)]
        ),
        "get_device_capability": lambda device=None: (8, 0) if bfloat16 else (7, 5),
        "mem_get_info": lambda device=None: (free[_number(device)], MEMORY),
        **{
            name: lambda device=None: 0
            for name in (
                *("memory_reserved", "memory_allocated", "max_memory_allocated"),
                *("max_memory_reserved", "reset_peak_memory_stats"),
            )
        },
    }
    with ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, "autocast", _autocast))
        stack.enter_context(mock.patch.object(torch.amp, "autocast", _autocast))
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            stack.enter_context(mock.patch.object(torch, name, _of_the_cpu(getattr(torch, name))))
        stack.enter_context(
            mock.patch.object(_thread, "start_new_thread", _seeing(_thread.start_new_thread))
        )
        stack.enter_context(mock.patch.object(threading.Thread, "run", _run))
        stack.enter_context(_without_triton())
        stack.enter_context(mock.patch.object(safetensors.torch, "safe_open", _safe_open))
        engine = partial(tensor.backward, torch.autograd.graph._engine_run_backward)
        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", engine))
        stack.enter_context(StandInMode())
        tensor.start_anew()
        yield tensor.tally


def _import_what_looks_for_devices() -> None:
    """Libraries that keep what they find when they are imported: they are to find none."""
    for name in ("transformers", "bitsandbytes", "gptqmodel", "peft"):
        with suppress(ImportError):
            importlib.import_module(name)


def _number(device: Any) -> int:
    if device is None:
        return here.current
    found = rules.number(device, here.current)
    assert found is not None, f"{device} is no CUDA device"
    return found


@contextmanager
def _device(device: Any) -> Iterator[None]:
    """``torch.cuda.device``: the current one meanwhile."""
    before, here.current = here.current, _number(device)
    try:
        yield
    finally:
        here.current = before


def _synchronize(device: Any = None) -> None:
    tensor.tally.waits["synchronize"] += 1


_ABSENT = object()
_TRITON = ("loftq_cli.kernels.triton_feedback", "loftq_cli.kernels.triton_dequantize")


@contextmanager
def _without_triton() -> Iterator[None]:
    """Kernels in Triton need a device that is one: they are tested in its interpreter."""
    before: dict[str, Any] = {name: sys.modules.get(name, _ABSENT) for name in _TRITON}
    _forget_kernels()
    sys.modules.update(dict.fromkeys(_TRITON))
    try:
        yield
    finally:
        _forget_kernels()
        for name, module in before.items():
            del sys.modules[name]
            if module is not _ABSENT:
                sys.modules[name] = module


def _forget_kernels() -> None:
    loading: Any = sys.modules.get("loftq_cli.loading.packed_weight")
    for look in (fused_panel._kernels, getattr(loading, "_triton_decode", None)):
        if hasattr(look, "cache_clear"):  # else a test has put something in its place
            look.cache_clear()


class _Opened:
    """A file of safetensors whose tensors are read to a device."""

    def __init__(self, file: Any, number: int) -> None:
        self._file, self._number = file, number

    def __enter__(self) -> _Opened:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def get_tensors(self) -> dict[str, torch.Tensor]:
        found = {name: self._file.get_tensor(name) for name in self._file.keys()}  # noqa: SIM118
        return {name: tensor.put(value, self._number) for name, value in found.items()}


_OPEN = safetensors.safe_open


def _safe_open(path: Any, framework: str, device: Any = "cpu", **options: Any) -> Any:
    number = rules.number(device, here.current)
    opened = _OPEN(path, framework, "cpu", **options)
    return opened if number is None else _Opened(opened, number)


class _autocast(torch.amp.autocast_mode.autocast):
    """Of a CUDA device: that of the CPU, on which the operations run in fact."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _of_the_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    def ask(device_type: str | None = None) -> Any:
        return function("cpu") if device_type == "cuda" else function(device_type or "cpu")

    return ask


def _seeing(start: Callable[..., Any]) -> Callable[..., Any]:
    """Starting a thread that sees the devices, too."""

    def start_new_thread(function: Callable[..., Any], *args: Any) -> Any:
        def run(*given: Any, **named: Any) -> None:
            with StandInMode():
                function(*given, **named)

        return start(run, *args)

    return start_new_thread


_RUN = threading.Thread.run


def _run(thread: threading.Thread) -> None:
    with StandInMode():
        _RUN(thread)
