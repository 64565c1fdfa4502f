"""From a recipe to the numerics: the one way in which a matrix is quantized and decomposed.

A conversion, an estimate, a report and ``loftq_cli.decompose`` all build quantizer, variant and
weighting here, so that they mean the same by the same settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from loftq_cli.checkpoint.dtypes import torch_dtype
from loftq_cli.kernels import native
from loftq_cli.layouts.base import Layout, Matrix
from loftq_cli.layouts.rescaled import Rescaling
from loftq_cli.numerics.alone import quantize
from loftq_cli.numerics.alternation import decompose, make_sweep
from loftq_cli.numerics.decomposition import Adapted, Decomposition, Procedure
from loftq_cli.numerics.given import adapt
from loftq_cli.numerics.quantizers.base import Quantizer
from loftq_cli.numerics.quantizers.methods import make_quantizer, stored_in
from loftq_cli.numerics.quantizers.scale_storage import Stored
from loftq_cli.numerics.sweep import Sweep
from loftq_cli.numerics.variant import Variant
from loftq_cli.numerics.weighting import Weighting, make_weighting
from loftq_cli.planning.plan import PlannedMatrix
from loftq_cli.settings.recipe import Recipe
from loftq_cli.statistics.statistics import Kind, Statistics


@contextmanager
def threads(count: int) -> Iterator[None]:
    """The thread count of the recipe: it changes the last bits of matrix products."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Decomposer:
    """Decomposes matrices as ``recipe`` says and ``layout`` stores, on ``device``, with the second
    moments that ``statistics`` hold, divided as ``rescaling`` divided the inputs. One entry of
    these is in memory at a time: matrices that share their inputs should follow one another."""

    def __init__(
        self,
        recipe: Recipe,
        layout: Layout,
        device: torch.device,
        statistics: Statistics | None = None,
        rescaling: Rescaling | None = None,
    ) -> None:
        self._recipe = recipe
        self._layout = layout
        self._device = device
        self._statistics = statistics
        self._variant = Variant.parse(recipe.kernels)
        self._rescaling = rescaling or Rescaling()
        self._last: tuple[tuple[str, str | None], Weighting] | None = None

    def decompose(
        self, weight: torch.Tensor, item: PlannedMatrix, moments: torch.Tensor | None = None
    ) -> Decomposition:
        """Q, A and B of ``weight`` (out, in), finite, on the device. ``moments``: float32 (in,) or
        (in, in), in the place of the statistics', and taken over.

        Raises ScaleRangeError and InputError as :func:`loftq_cli.numerics.alternation.decompose`,
        and what :meth:`weighting` raises.
        """
        matrix = item.matrix
        if moments is None:
            weighting = self.weighting(matrix)
        else:
            weighting = make_weighting(moments.to(self._device), self._variant.products)
        return decompose(weight, self._quantizer(matrix), self._procedure(item), weighting)

    def adapt(self, weight: torch.Tensor, item: PlannedMatrix, backbone: torch.Tensor) -> Adapted:
        """A and B of ``weight`` as above for its quantization ``backbone``, float32 (out, in),
        which is taken over. Raises as :func:`loftq_cli.numerics.given.adapt` and
        :meth:`weighting`."""
        return adapt(weight, backbone, self._procedure(item), self.weighting(item.matrix))

    def quantize(
        self, weight: torch.Tensor, matrix: Matrix, *, feedback: bool = False
    ) -> Decomposition:
        """As :meth:`decompose`, quantization alone (:mod:`loftq_cli.numerics.alone`)."""
        procedure = replace(self._alone(matrix), feedback=feedback)
        return quantize(weight, self._quantizer(matrix), procedure, self.weighting(matrix))

    def sweep(self, rows: torch.Tensor, matrix: Matrix) -> Sweep:
        """For quantizing some float32 ``rows`` (some, in) of ``matrix`` alone."""
        return make_sweep(rows, self._quantizer(matrix), self._alone(matrix))

    def weighting(self, matrix: Matrix) -> Weighting | None:
        """What the statistics make of errors of ``matrix``, None if they hold nothing for it.
        Raises StatisticsError for another width than the matrix has or for bad values,
        SourceChangedError, CorruptFileError, EnvironmentFailure."""
        statistics, name = self._statistics, matrix.name
        if statistics is None or name not in statistics.matrices:
            return None
        rescaled = self._rescaling.matrices.get(name)
        entry = statistics.matrices[name], None if rescaled is None else rescaled.columns
        if self._last is None or self._last[0] != entry:
            self._last = None  # before the next one is read
            moments = statistics.moments(name, matrix.shape[1])
            statistics.check_unchanged()
            moments = self._rescaling.moments(name, moments).to(self._device)
            self._last = entry, make_weighting(moments, self._variant.products)
        return self._last[1]

    def kind(self, matrix: Matrix) -> Kind | None:
        """Which moments there are for ``matrix``: "diagonal" or "full"."""
        statistics = self._statistics
        if statistics is None or matrix.name not in statistics.matrices:
            return None
        return statistics.kind(matrix.name)

    def _quantizer(self, matrix: Matrix) -> Quantizer:
        return make_quantizer(
            matrix.method,
            matrix.bits,
            matrix.block_size,
            self._recipe.scale,
            self._layout.portable,
            native=self._variant.native and native.available(),
        )

    def _procedure(self, item: PlannedMatrix) -> Procedure:
        recipe, matrix = self._recipe, item.matrix
        return Procedure(
            rank=item.rank,
            iters=recipe.iters,
            order=recipe.order,
            svd=recipe.svd,
            keep=recipe.keep,
            momentum=recipe.momentum,
            feedback=recipe.feedback,
            feedback_passes=recipe.feedback_passes,
            scaling=item.scaling,
            products=self._variant.products,
            adapter_dtype=torch_dtype(item.adapter_dtype),
            backbone_dtype=self._layout.rounding(matrix),
            scale_dtype=self._stored(matrix),
            seed=recipe.seed,
            name=matrix.name,
        )

    def _stored(self, matrix: Matrix) -> Stored:
        """What its scales are rounded to."""
        if matrix.held is not None:  # no method of ours has scales there
            return self._recipe.scale_dtype
        return stored_in(matrix.method, self._recipe.scale_dtype)

    def _alone(self, matrix: Matrix) -> Procedure:
        return Procedure(
            rank=0,
            iters=0,
            backbone_dtype=self._layout.rounding(matrix),
            scale_dtype=self._stored(matrix),
        )
