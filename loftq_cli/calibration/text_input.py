"""How a model is called with a window of text, and how many tokens it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from loftq_cli.calibration.layer_inputs import OWN_LOOP
from loftq_cli.errors import InputError, LoftqError, UnsupportedInputError

Call = Callable[[torch.Tensor], object]
"""Calls the model with token ids, int64 (1, length), on its device."""

_PROBE = 7  # tokens that show which tables are of positions; odd, as texts are padded to even ones


def refuse_without_text(model_class: Any, directory: Path) -> None:
    """Raise UnsupportedInputError for a class of models that do not take token ids."""
    if "input_ids" not in inspect.signature(model_class.forward).parameters:
        takes = getattr(model_class, "main_input_name", "input_ids")
        because = f": it takes {takes}" if takes != "input_ids" else ""
        raise UnsupportedInputError(
            f"{directory}: {model_class.__name__} cannot be run on text alone{because}",
            hint=OWN_LOOP,
        )


@dataclass(frozen=True)
class Entry:
    """``call`` runs the text part of a model; ``limits``: how many tokens its tables of positions
    have rows for."""

    call: Call
    limits: Sequence[int]


def entry_of(model: Any, windows: torch.Tensor, device: torch.device, directory: Path) -> Entry:
    """How ``model`` is called, found out with a few of the tokens of ``windows``.

    The model is called without its head; if that does not take text alone, with it (Perceiver),
    or its ``get_text_features`` is (CLIP). Raises InputError for a token that the model has no
    embedding for, UnsupportedInputError if it cannot be run on text alone.
    """
    body = getattr(model, "base_model", model)
    middle = windows[0, windows.shape[1] // 2]
    probe = max(5, min(_PROBE, windows.shape[1]))
    ids = torch.stack([windows.max(), *[middle] * (probe - 1)])[None]
    runs = [(body, body.forward), *([(model, model.forward)] if model is not body else [])]
    if hasattr(body, "get_text_features"):
        runs.append((body.get_text_features, body.get_text_features))
    failures = []
    for run, forward in runs:
        call = _call(model, run, inspect.signature(forward).parameters, device)
        try:
            with runs_on_text(model, directory, probe) as tables:
                call(ids)
        except UnsupportedInputError as error:
            failures.append(error)
        else:
            return Entry(call, tables.limits)
    raise failures[0]


@contextmanager
def runs_on_text(model: nn.Module, directory: Path, length: int) -> Iterator[Tables]:
    """Watch the tables of a model that runs on ``length`` tokens, and say of an error of its own
    code that it does not run on text alone. Raises InputError if a table lacks a row."""
    try:
        with Tables(length) as tables:
            yield tables
    except (LoftqError, MemoryError, torch.OutOfMemoryError):
        raise
    except _OutsideError as error:
        raise InputError(f"{directory}: {error.what}", hint=error.hint) from error
    except Exception as error:  # of any kind
        if "can't allocate memory" in str(error):  # of torch's CPU allocator
            raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedInputError(
            f"{directory}: {type(model).__name__} cannot be run on text alone: {said}",
            hint=OWN_LOOP,
        ) from error


def _call(model: Any, run: Any, takes: Collection[str], device: torch.device) -> Call:
    start = decoder_start(model) if "decoder_input_ids" in takes else None

    def call(ids: torch.Tensor) -> None:
        inputs = {"input_ids": ids.to(device)}
        if start is not None:
            first = torch.full_like(ids[:, :1], start)
            inputs["decoder_input_ids"] = torch.cat([first, ids[:, :-1]], dim=1).to(device)
        with torch.no_grad():
            run(**inputs)

    return call


def decoder_start(model: Any) -> int:
    """The token that a decoder's input begins with."""
    parts = (model.config, getattr(model, "generation_config", None))
    inner = [getattr(model.config, name, None) for name in ("decoder", "text_config")]
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        for config in (*parts, *inner):
            token = getattr(config, name, None)
            if isinstance(token, int):
                return token
    return 0


class _OutsideError(Exception):
    """``what``: which row a table was asked for that it does not have; ``hint``: what to do."""

    def __init__(self, index: int, rows: int, *, token: bool) -> None:
        self.what = f"a table of the model has {rows} rows, and is asked for row {index}"
        self.hint = "give a smaller --length"
        if token:
            self.what = f"the tokenizer gives token {index}, the model has {rows}"
            self.hint = "use the model's own tokenizer"
        super().__init__(self.what)


_GATHERING = (torch.ops.aten.gather.default, torch.ops.aten.index_select.default)


class Tables(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches every lookup in a table while a model runs on ``length`` tokens. ``limits``: how many
    positions a table has rows for, for each that is asked for consecutive rows. Raises
    _OutsideError if a table is asked for more than it has, before a GPU is, which would not
    survive it."""

    def __init__(self, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limits: list[int] = []
        self._length = length

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.embedding.default:
            self._see(len(args[0]), args[1])
        elif func in _GATHERING and args[2].numel():
            rows, largest = args[0].shape[args[1]], int(args[2].max())
            if largest >= rows:
                raise _OutsideError(largest, rows, token=False)
        return func(*args, **(kwargs or {}))

    def _see(self, rows: int, indices: torch.Tensor) -> None:
        row = indices.reshape(-1).tolist()
        asked, known = len(row), self._length
        is_row = indices.shape[-1:] == (asked,) or indices.shape == (1, asked)
        consecutive = [first + offset for first in row[:1] for offset in range(asked)]
        position = is_row and asked >= known and row[:known] == consecutive[:known]
        if asked and max(row) >= rows:
            raise _OutsideError(max(row), rows, token=not position)
        if position:
            limit = rows - row[0]
            if asked > known and row == consecutive:  # padding has positions too (LED)
                limit -= limit % asked
            self.limits.append(limit)
