"""The original model, loaded to be refined: its windows of text, its blocks and its matrices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loftq_cli.calibration.calibrate import dtype_to_run
from loftq_cli.calibration.course import Course as BlockOrder
from loftq_cli.calibration.course import course_of
from loftq_cli.calibration.measure import Calibration, class_to_run, prepare
from loftq_cli.calibration.text_input import runs_on_text
from loftq_cli.errors import InputError
from loftq_cli.families.kinds import turned
from loftq_cli.families.modules import kind_of
from loftq_cli.numerics.lowrank import fastest_products
from loftq_cli.refinement.conversion import Conversion, Tensors
from loftq_cli.refinement.settings import HELD, SAMPLES, Refining
from loftq_cli.refinement.training import Placed, Rates


@dataclass(frozen=True)
class Prepared:
    """The original of ``conversion`` on ``device``, and what ``calibration`` knows of it."""

    conversion: Conversion
    calibration: Calibration
    device: torch.device

    @property
    def model(self) -> Any:
        return self.calibration.model

    @property
    def windows(self) -> torch.Tensor:
        """Token ids, int64 (windows, length)."""
        return self.calibration.windows

    @property
    def held(self) -> list[int]:
        """The windows that are held out."""
        count = len(self.windows)
        return list(range(min(HELD // 2, count - 1), count, HELD))

    @property
    def trained(self) -> list[int]:
        """The others."""
        return sorted({*range(len(self.windows))} - {*self.held})

    def order(self) -> BlockOrder:
        """Its blocks that can be run in turn, each with its matrices, and the other matrices.
        Raises UnsupportedInputError if it does not run on text."""

        def run(window: int) -> None:
            with runs_on_text(self.model, self.calibration.directory, self.windows.shape[1]):
                self.calibration.run(window)

        return course_of(self.model, run, self.calibration.layers)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Products in bfloat16, where that is fast; nothing is kept of them, as weights change."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self._fast, cache_enabled=False
        )

    @property
    def _fast(self) -> bool:
        return fastest_products(self.device) == torch.bfloat16

    @contextlib.contextmanager
    def narrowed(self, names: Sequence[str]) -> Iterator[None]:
        """Within it the matrices ``names`` are in the dtype that products are computed in, and are
        not converted for every window; all but those that something else reads. Those that were
        converted are what they were after it."""
        read = {
            parameter
            for module in self.model.modules()
            if kind_of(module) not in ("linear", "conv1d")
            for parameter in module.parameters(recurse=False)
        }
        weights = {*map(self.weight, names)} - read
        wide = [
            (weight, weight.data)
            for weight in weights
            if self._fast and weight.dtype != torch.bfloat16 and not weight.is_meta  # offloaded
        ]
        for weight, values in wide:
            weight.data = values.bfloat16()
        try:
            yield
        finally:
            for weight, values in wide:
                weight.data = values

    def weight(self, name: str) -> nn.Parameter:
        """The parameter of the model that is the matrix ``name``."""
        module: Any = self.model.get_submodule(self.calibration.layers[name])
        found: nn.Parameter = module.weight
        return found

    @torch.no_grad()
    def put(self, name: str, value: torch.Tensor) -> None:
        """Give the model ``value``, (out, in), as the matrix ``name``."""
        self.weight(name).copy_(turned(value, self.conversion.held[name].matrix.kind))

    def placed(
        self,
        names: Sequence[str],
        rates: Rates,
        begun: Mapping[str, Tensors | None] | None = None,
    ) -> list[Placed]:
        """The matrices ``names`` to be trained at ``rates``, as their tensors in ``begun`` are, or
        as the conversion has them."""
        found = []
        for name in names:
            tensors = None if begun is None else begun[name]
            trained = self.conversion.begin(name, self.device, tensors, codes=rates.codes > 0)
            matrix = self.conversion.held[name].matrix
            found.append(Placed(matrix, trained, self.weight(name)))
        return found


def prepared(
    conversion: Conversion,
    texts: Sequence[str],
    wanted: Refining,
    device: torch.device,
    folder: Path,
) -> Prepared:
    """Load the original, in parts from ``folder`` if it does not fit in memory, and cut the texts
    into windows. Raises InputError for a model, a tokenizer or text that cannot be used."""
    original = conversion.original
    content = original.config.content
    widths = {name: held.matrix.shape[1] for name, held in conversion.held.items()}
    dtype = dtype_to_run(
        [tensor for tensor in original.tensors if tensor.name in conversion.held], device
    )
    if dtype == torch.float16:  # in which gradients vanish
        dtype = torch.float32
    elements = sum(tensor.elements for tensor in original.tensors)
    calibration = prepare(
        original.directory,
        class_to_run(original.directory, content),
        content,
        widths,
        texts,
        samples=wanted.samples,
        length=wanted.length,
        seed=wanted.seed,
        dtype=dtype,
        nbytes=elements * dtype.itemsize,
        device=device,
        offload_folder=folder,
        most=SAMPLES,
    )
    if len(calibration.windows) < 2:
        raise InputError(
            f"the text: 1 window of {calibration.windows.shape[1]} tokens, 2 are needed: one is "
            "held out",
            hint="give more text, or lower --length",
        )
    return Prepared(conversion, calibration, device)
