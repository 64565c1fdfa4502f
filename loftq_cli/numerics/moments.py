"""Second moments of a layer's inputs: E[x_j^2] or E[x x^T] over tokens, not centred.

They weight the error of a quantized matrix: with H = E[x x^T], the expected squared error of the
layer's output is tr((W - Q - BA) H (W - Q - BA)^T).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from loftq_cli.errors import NonFiniteActivationError, UsageError

_ROWS = 2048  # tokens worked on at once


class Moments:
    """Accumulates the second moments of the inputs of one or several linear layers.

    ``in_features``: the width of the inputs. ``full`` False keeps the mean square of every
    feature, True the whole matrix of products (``in_features``^2 sums). ``tokens``: the inputs
    seen so far. Sums are float64, on the device of the first inputs, of what each call of ``add``
    comes to in float32: as long as no such part is 2^18 times as large as another, a thousand of
    them are summed without rounding, and so in any order.
    """

    def __init__(self, in_features: int, *, full: bool = False) -> None:
        if in_features < 1:
            raise UsageError(f"in_features {in_features}: must be positive", hint="")
        self.in_features = in_features
        self.full = full
        self.tokens = 0
        self._sum: torch.Tensor | None = None

    @torch.no_grad()
    def add(self, inputs: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add ``inputs`` (…, in_features), of any floating dtype, on any device.

        ``mask`` (…), the shape of ``inputs`` without its last side, is zero or False if a token
        is not to count, as padding. Raises UsageError for another shape or dtype and
        NonFiniteActivationError for NaN or Inf, before anything of ``inputs`` is counted.
        """
        if not inputs.is_floating_point() or inputs.shape[-1:] != (self.in_features,):
            raise UsageError(
                f"inputs of shape {tuple(inputs.shape)} and {inputs.dtype}: floating point "
                f"(..., {self.in_features}) is needed",
                hint="",
            )
        if mask is not None:
            if mask.shape != inputs.shape[:-1]:
                raise UsageError(
                    f"a mask of shape {tuple(mask.shape)} for inputs {tuple(inputs.shape)}", hint=""
                )
            inputs = inputs[mask.to(inputs.device).bool()]
        rows = inputs.detach().reshape(-1, self.in_features)
        if not rows.numel():
            return
        if not bool(torch.isfinite(torch.stack(rows.aminmax())).all()):
            raise NonFiniteActivationError("the inputs hold NaN or Inf")
        if self._sum is None:
            shape = (self.in_features,) * (2 if self.full else 1)
            self._sum = torch.zeros(shape, dtype=torch.float64, device=rows.device)
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS]
            self._sum += (_products(part) if self.full else _squares(part)).to(self._sum.device)
        self.tokens += len(rows)

    def value(self) -> torch.Tensor:
        """The moments on the CPU, float32 (in_features,) or (in_features, in_features), the latter
        exactly symmetric. Raises UsageError if nothing was added."""
        if self._sum is None:
            raise UsageError("no inputs were added", hint="")
        mean = torch.empty(self._sum.shape, dtype=torch.float32, device=self._sum.device)
        torch.div(self._sum, self.tokens, out=mean)
        if self.full:
            _mirror(mean)
        return mean.cpu()

    @torch.no_grad()
    def added_up(self, add_up: Callable[[torch.Tensor], None], device: torch.device) -> None:
        """Have the inputs of all processes: ``add_up`` replaces a tensor on ``device`` by the sum
        of everybody's. Of all of them, those without inputs too."""
        if self._sum is None:
            shape = (self.in_features,) * (2 if self.full else 1)
            self._sum = torch.zeros(shape, dtype=torch.float64, device=device)
        tokens = torch.tensor([self.tokens], device=device)
        add_up(self._sum)
        add_up(tokens)
        self.tokens = int(tokens)

    @staticmethod
    def together(parts: Sequence[Moments]) -> Moments:
        """The moments over all inputs of ``parts``, which have one width and kind."""
        total = Moments(parts[0].in_features, full=parts[0].full)
        sums = [part._sum for part in parts if part._sum is not None]
        total.tokens = sum(part.tokens for part in parts)
        total._sum = sum(sums[1:], start=sums[0]) if sums else None
        return total


def _products(rows: torch.Tensor) -> torch.Tensor:
    """rows^T rows: products in float32, or float64 if those overflow."""
    values = rows.float()
    product = values.T @ values
    if not bool(torch.isfinite(product.diagonal()).all()):
        values = rows.double()
        product = values.T @ values
    return product


def _squares(rows: torch.Tensor) -> torch.Tensor:
    """The sum of every feature's squares: a value of float32, or, if it overflows there, of
    float64."""
    exact = rows.double().square().sum(0)
    rounded = exact.float()
    return torch.where(torch.isfinite(rounded), rounded.double(), exact)


def _mirror(square: torch.Tensor) -> None:
    """Copy what is above the diagonal below it: a product of a matrix with its own transpose is
    not symmetric to the last bit on every device."""
    for start in range(0, len(square), _ROWS):
        stop = start + _ROWS
        square[stop:, start:stop] = square[start:stop, stop:].T
        corner = square[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
