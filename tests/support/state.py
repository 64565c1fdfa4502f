"""What one test must not hand on to the next: state of the process that it, or a library, changes.

gptqmodel, which PEFT imports where it is installed, sets variables, torch's settings and the
garbage collector when it is imported; the commands install handlers of signals. In whatever order
tests run, each finds these as they were.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _python_dispatch as dispatch

# torch's flags for all threads: modes of two threads that overlap leave them set.
_MODES = ("_is_in_torch_dispatch_mode", "_is_in_non_infra_torch_dispatch_mode")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)


def seen() -> dict[str, Any]:
    """The state, by name."""
    return {
        "environment": {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"},
        "signals": {number: signal.getsignal(number) for number in _SIGNALS},
        "collector": (gc.isenabled(), gc.get_threshold()),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "modes": {name: getattr(dispatch, name) for name in _MODES if hasattr(dispatch, name)},
        "umask": _umask(),
    }


@contextmanager
def restored() -> Iterator[None]:
    """What :func:`seen` saw is so again at the end, and draws of torch begin anew."""
    before = seen()
    torch.manual_seed(0)
    try:
        yield
    finally:
        after = seen()
        for name, value in before.items():
            if after[name] != value:
                _PUT_BACK[name](value)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _environment(variables: dict[str, str]) -> None:
    for name in os.environ.keys() - variables.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update(variables)


def _modes(flags: dict[str, bool]) -> None:
    vars(dispatch).update(flags)


def _signals(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _collector(settings: tuple[bool, tuple[int, int, int]]) -> None:
    enabled, thresholds = settings
    (gc.enable if enabled else gc.disable)()
    gc.set_threshold(*thresholds)


_PUT_BACK: dict[str, Any] = {
    "environment": _environment,
    "signals": _signals,
    "collector": _collector,
    "threads": torch.set_num_threads,
    "dtype": torch.set_default_dtype,
    "gradients": torch.set_grad_enabled,
    "precision": torch.set_float32_matmul_precision,
    "modes": _modes,
    "umask": os.umask,
}
