"""The inputs of linear layers while a model runs, with layers that share an input kept together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from loftq_cli.errors import NonFiniteActivationError, UnsupportedInputError
from loftq_cli.machine.world import World
from loftq_cli.numerics.moments import Moments

OWN_LOOP = "measure its inputs in a loop of your own: loftq_cli.Moments, see docs/statistics.md"


class LayerInputs:
    """The moments of the inputs of ``layers`` (names to in_features).

    The distinct inputs of a window are numbered in the order in which layers see them. Two layers
    share their moments if they see the same numbers; a layer that is called more than once sees
    several. ``full`` as in Moments.
    """

    def __init__(self, layers: Mapping[str, int], *, full: bool) -> None:
        self._widths = layers
        self._full = full
        self._moments: list[Moments] = []
        self._uses: dict[str, list[int]] | None = None  # as in the first window
        self._seen: dict[tuple[object, ...], tuple[int, torch.Tensor]] = {}
        self._now: dict[str, list[int]] = {}

    @contextmanager
    def watched(self, model: nn.Module, modules: Mapping[str, str]) -> Iterator[None]:
        """Count the layers' inputs; ``modules``: where each of them is in ``model``."""
        handles = []
        for name in self._widths:

            def see(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                self._see(name, first_of(args, kwargs))

            layer = model.get_submodule(modules[name])
            handles.append(layer.register_forward_pre_hook(see, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def end_window(self) -> None:
        """All inputs of a window have been seen. Raises UnsupportedInputError if the layers
        were called in another way than in the windows before."""
        self._seen.clear()
        if self._uses is None:
            self._uses = self._now
        elif self._uses != self._now:
            raise _used_differently(_differing(self._uses, self._now))
        self._now = {}

    def gather(self, world: World, device: torch.device) -> None:
        """Have the inputs of all processes, each of which has seen its own windows on ``device``.
        Raises UnsupportedInputError if the layers were called in another way elsewhere."""
        uses: dict[str, list[int]] | None = world.told(lambda: self._uses)
        differing = "" if self._uses in (None, uses) else _differing(self._uses or {}, uses or {})
        for name in filter(None, world.gathered(differing)):
            raise _used_differently(name)
        self._uses = uses
        widths = {
            number: self._widths[name] for name, used in (uses or {}).items() for number in used
        }
        for number in sorted(widths):
            if number == len(self._moments):
                self._moments.append(Moments(widths[number], full=self._full))
            self._moments[number].added_up(world.add_up, device)

    def groups(self) -> list[tuple[list[str], Moments]]:
        """Layers that share an input, and its moments; layers never called are left out."""
        shared: dict[tuple[int, ...], list[str]] = {}
        for name, numbers in (self._uses or {}).items():
            shared.setdefault(tuple(numbers), []).append(name)
        return [
            (names, Moments.together([self._moments[number] for number in numbers]))
            for numbers, names in shared.items()
        ]

    def _see(self, name: str, inputs: torch.Tensor) -> None:
        given, held = inputs.shape[-1], self._widths[name]
        if given != held:
            raise UnsupportedInputError(
                f"{name}: its inputs have {given} features, its weight {held}"
            )
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        # The version tells of writes in place. Nothing else can come to lie at the same address
        # before the end of the window: what was seen is held until then.
        key = (rows.data_ptr(), rows.shape, rows.stride(), rows.dtype, inputs._version)
        if key not in self._seen:
            number = len(self._seen)
            self._seen[key] = (number, rows)
            if number == len(self._moments):
                self._moments.append(Moments(rows.shape[1], full=self._full))
            if self._moments[number].in_features != rows.shape[1]:
                raise _used_differently(name)
            try:
                self._moments[number].add(rows)
            except NonFiniteActivationError as error:
                raise NonFiniteActivationError(f"{name}: {error.message}") from None
        self._now.setdefault(name, []).append(self._seen[key][0])


def first_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The input of a layer that is called with these."""
    return args[0] if args else next(iter(kwargs.values()))


def _differing(first: Mapping[str, list[int]], second: Mapping[str, list[int]]) -> str:
    """A layer that was called otherwise."""
    return min(name for name in {*first, *second} if first.get(name) != second.get(name))


def _used_differently(name: str) -> UnsupportedInputError:
    return UnsupportedInputError(
        f"{name} is used in different ways from text to text", hint=OWN_LOOP
    )
