"""A finished conversion as what is trained: each matrix with its adapter, and back to tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loftq_cli.checkpoint.dtypes import torch_dtype
from loftq_cli.checkpoint.header import StoredTensor, TensorSpec
from loftq_cli.checkpoint.output import Output
from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.checkpoint.source import Source
from loftq_cli.checkpoint.stored import Stored, find, read
from loftq_cli.errors import (
    InputError,
    NonFiniteWeightError,
    UnsupportedInputError,
    VerificationError,
)
from loftq_cli.families.experts import is_expert
from loftq_cli.layouts.adapter import DIRECTORY, sides
from loftq_cli.layouts.base import Layout, Matrix, matrix_of
from loftq_cli.layouts.registry import layout_of
from loftq_cli.layouts.trained import TrainedAdapter, open_adapter
from loftq_cli.layouts.trained_parts import Pair as StoredPair
from loftq_cli.loading.trained_beside import refuse_other_conversion
from loftq_cli.numerics.latent import Fixed, Latent, Pair, Scaled
from loftq_cli.numerics.metrics import first_non_finite
from loftq_cli.numerics.quantizers.methods import stored_in
from loftq_cli.numerics.quantizers.scale_storage import Stored as StoredScales
from loftq_cli.reporting.original import Original

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Held:
    """A matrix of a conversion, in its layout, and its pair in the conversion's own adapter."""

    matrix: Matrix
    layout: Layout
    pair: StoredPair

    @property
    def rounding(self) -> StoredScales:
        """What its scales are rounded to."""
        return stored_in(self.matrix.method, self.layout.scale_dtype)

    @property
    def sides(self) -> tuple[StoredTensor, StoredTensor]:
        """A and B as the adapter's file has them."""
        return self.pair.lora_A, self.pair.lora_B

    def read(self, directory: Path, stored: Stored) -> Tensors:
        """The tensors of ``specs``, which are ``stored``."""
        return {spec.name: read(directory, stored, spec) for spec in self.specs}

    @property
    def specs(self) -> list[TensorSpec]:
        """The tensors of the matrix, and of its pair."""
        own = [TensorSpec(side.name, side.dtype, side.shape) for side in self.sides]
        return [*self.layout.specs(self.matrix), *own]

    def encoded(self, trained: Fixed, stored: Mapping[str, torch.Tensor]) -> Tensors:
        """The tensors of ``specs`` for the matrix as it is now; Q's are the ``stored`` ones if
        only its pair is trained."""
        tensors = dict(stored)
        if isinstance(trained, Scaled):
            quantized = trained.quantized().to(torch.device("cpu"))
            tensors = self.layout.encode(self.matrix, quantized)
        pair = trained.pair
        values = (pair.lora_A, pair.lora_B)
        if self.pair.embedding:
            values = (pair.lora_B.T, pair.lora_A.T)
        for side, value in zip(self.sides, values, strict=True):
            tensors[side.name] = value.cpu().to(torch_dtype(side.dtype)).contiguous()
        return tensors

    def decoded(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Q + B A as whoever loads ``tensors`` has it, float32 (out, in)."""
        pair = self.pair_in(tensors)
        value = self.layout.decode(self.matrix, tensors).contiguous()
        return value.addmm_(pair.lora_B, pair.lora_A, alpha=pair.scaling)

    def pair_in(self, tensors: Mapping[str, torch.Tensor]) -> Pair:
        """A and B in ``tensors``."""
        first, second = (tensors[side.name].float() for side in self.sides)
        lora_A, lora_B = sides(self.matrix, first, second)
        return Pair(lora_A.contiguous(), lora_B.contiguous(), self.pair.scaling)


class Conversion:
    """The conversion ``output``, whose backbone's files are ``files``, of the model ``original``;
    ``trained``: what training made of its adapter, None for the start itself.

    Raises VerificationError if a tensor is missing, UnsupportedInputError for what cannot be
    refined, InputError for a trained adapter of something else.
    """

    def __init__(
        self, output: Output, files: Source, original: Source, trained: TrainedAdapter | None
    ) -> None:
        self.output, self.original, self._trained = output, original, trained
        if not output.has_adapter:
            raise UnsupportedInputError(
                f"{output.directory}: a trained adapter was merged into its codes, it has no start",
                hint="refine the conversion that was trained",
            )
        self.files = files
        self.start = open_adapter(output.directory / DIRECTORY)
        self._stored: Stored = {
            tensor.name: (shard.path, tensor)
            for shard in files.shards
            for tensor in shard.header.tensors
        }
        self.held = {record["name"]: self._held(record) for record in output.records}
        self._weights = Original(output, original)
        self._weights.check(held.matrix for held in self.held.values())
        if trained is not None:
            self._refuse_strangers(trained)
            _refuse_non_finite(trained)

    @property
    def directory(self) -> Path:
        return self.output.directory

    def _held(self, record: Mapping[str, Any]) -> Held:
        directory, matrix = self.output.directory, matrix_of(record)
        refuse_expert(directory, matrix.name)
        layout = layout_of(record, self.output.manifest["recipe"])
        for spec in layout.specs(matrix):
            find(directory, self._stored, spec)
        pair = self.start.pairs.get(matrix.adapted)
        if pair is None or pair.shape != matrix.shape:
            raise VerificationError(f"{self.start.file}: no pair for {matrix.name}")
        return Held(matrix, layout, pair)

    def _refuse_strangers(self, trained: TrainedAdapter) -> None:
        file = trained.file
        refuse_other_conversion(self.output, file, trained.config)
        others = [*trained.whole, *trained.tokens, *trained.fused]
        if others:
            raise UnsupportedInputError(
                f"{file}: {others[0]!r} was trained too, and only pairs A, B are refined",
                hint="refine the start, then train",
            )
        for held in self.held.values():
            pair = trained.pairs.get(held.matrix.adapted)
            rank = held.pair.lora_A.shape[0]
            if pair is None or pair.shape != held.pair.shape or pair.lora_A.shape[0] != rank:
                raise InputError(
                    f"{file}: no pair of rank {rank} for {held.matrix.name}",
                    hint=f"give an adapter that was trained on {self.output.directory}",
                )

    def begin(
        self,
        name: str,
        device: torch.device,
        tensors: Mapping[str, torch.Tensor] | None = None,
        *,
        codes: bool = True,
    ) -> Fixed:
        """The trainable form of a matrix, as it is held, or as :meth:`Held.encoded` gave
        ``tensors``, on ``device``. Without ``codes`` those stay."""
        held = self.held[name]
        pair = self._pair(held) if tensors is None else held.pair_in(tensors)
        tensors = self.stored(name) if tensors is None else tensors
        pair = Pair(pair.lora_A.to(device), pair.lora_B.to(device), pair.scaling)
        adapted = self.output.is_adapted  # the codes are somebody else's
        quantized = None if adapted else held.layout.quantized(held.matrix, tensors)
        if quantized is None:
            return Fixed(held.layout.decode(held.matrix, tensors).to(device), pair)
        # Of the trellis one code for another would be another level for five weights.
        if quantized.is_trellis or not codes:
            return Scaled(quantized.to(device), pair, held.rounding)
        return Latent(quantized.to(device), pair, self.weight(name).to(device), held.rounding)

    def stored(self, name: str) -> Tensors:
        """The tensors of Q, as they are held."""
        held = self.held[name]
        specs = held.layout.specs(held.matrix)
        return {spec.name: read(self.output.directory, self._stored, spec) for spec in specs}

    def weight(self, name: str) -> torch.Tensor:
        """W, float32 (out, in), of the original."""
        return self._weights.read(self.held[name].matrix)

    def _pair(self, held: Held) -> Pair:
        """The pair's values to begin with, scaled as the conversion's adapter is."""
        adapter = self.start if self._trained is None else self._trained
        pair = adapter.pairs[held.matrix.adapted]
        with TensorFile(adapter.file) as file:
            lora_A, lora_B = sides(held.matrix, *pair.read(file))
        factor = pair.scaling / held.pair.scaling
        return Pair(lora_A.contiguous(), lora_B.contiguous() * factor, held.pair.scaling)


def _refuse_non_finite(trained: TrainedAdapter) -> None:
    """Raise NonFiniteWeightError if a pair of ``trained`` holds NaN or Inf."""
    with TensorFile(trained.file) as file:
        for pair in trained.pairs.values():
            for side in (pair.lora_A, pair.lora_B):
                bad = first_non_finite(file.read(side))
                if bad is not None:
                    raise NonFiniteWeightError(
                        f"{trained.file}: tensor {side.name!r} holds {bad[1]} at {list(bad[0])}",
                        hint="its training diverged, or the file is damaged",
                    )


def refuse_expert(directory: Path, name: str) -> None:
    """Raise UnsupportedInputError if the matrix ``name`` of the model or conversion in
    ``directory`` is an expert's."""
    if is_expert(name):
        raise UnsupportedInputError(
            f"{directory}: {name} is an expert's, and mixtures of experts are not refined",
            hint="train the start as it is",
        )
