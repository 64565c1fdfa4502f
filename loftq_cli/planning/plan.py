"""A conversion, settled from the headers before anything is computed; make.py makes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from loftq_cli.checkpoint.header import TensorSpec
from loftq_cli.checkpoint.source import Shard, Source, file_hashes
from loftq_cli.checkpoint.writer import place
from loftq_cli.families.anatomy import Anatomy
from loftq_cli.layouts import adapter
from loftq_cli.layouts.base import Layout, Matrix, Surroundings
from loftq_cli.layouts.fused import FusedAdapter, Member, fused_adapters, is_fused
from loftq_cli.planning.given import Given
from loftq_cli.planning.selection import Selection
from loftq_cli.settings.recipe import Recipe, fingerprint
from loftq_cli.statistics.statistics import Statistics


@dataclass(frozen=True)
class PlannedMatrix:
    """A matrix with its adapter: ``rank`` as clamped, ``scaling`` as PEFT will apply it."""

    matrix: Matrix
    rank: int
    scaling: float
    adapter_dtype: str
    specs: tuple[TensorSpec, ...]

    @property
    def adapter_specs(self) -> list[TensorSpec]:
        return adapter.specs(self.matrix, self.rank, self.adapter_dtype)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the backbone per weight: codes, scales, zero points and tables."""
        return sum(spec.nbytes for spec in self.specs) * 8 / self.matrix.elements


@dataclass(frozen=True)
class PlannedShard:
    """An output shard and the source shard whose tensors it takes."""

    source: Shard
    name: str
    specs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Plan:
    """A conversion, before it starts. ``auto_layout``: the layout may still be changed to
    ``loftq`` if a scale turns out not to fit float16. ``unsettled``: matrices that have the
    narrowest width until the recipe's target has settled theirs (see target.py)."""

    source: Source
    anatomy: Anatomy
    recipe: Recipe
    layout: Layout
    auto_layout: bool
    layout_note: str | None
    matrices: Mapping[str, PlannedMatrix]
    selection: Selection
    shards: Sequence[PlannedShard]
    surroundings: Surroundings
    devices: tuple[torch.device, ...]
    unsettled: frozenset[str]
    statistics: Statistics | None
    given: Given | None = None
    """The backbone, if it exists: only adapters are written, and its files if they are to be."""
    pairs: Mapping[str, TensorSpec] = field(default_factory=dict)
    """Its tensors, by the names that they have in the source."""
    remarks: tuple[str, ...] = ()
    """What the user is to hear before it starts."""

    @property
    def adapter_folder(self) -> str:
        """Where in the output the adapter is: an adapter alone is the output."""
        return "" if self.given is not None and not self.given.kept else adapter.DIRECTORY

    @property
    def sources(self) -> list[tuple[str, int, str]]:
        """(name, size, sha256) of the files that it is made of: of a backbone that is given all
        of each file, of the source's weights the header."""
        files = [] if self.given is None else self.given.files
        beside = [(f"backbone/{file.name}", file.size, file.sha256) for file in files]
        return [*file_hashes(self.source), *beside]

    @property
    def device(self) -> torch.device:
        """The first of the devices, which does what one of them does for all."""
        return self.devices[0]

    @property
    def unmeasured(self) -> list[str]:
        """The matrices that the statistics hold nothing for, which are converted without."""
        if self.statistics is None:
            return []
        return [name for name in self.matrices if name not in self.statistics.matrices]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.recipe.as_dict(), self.sources)

    @property
    def source_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.source.tensors)

    @property
    def parameters(self) -> int:
        return sum(tensor.elements for tensor in self.source.tensors)

    @property
    def backbone_bytes(self) -> int:
        if self.given is not None:
            return self.given.nbytes
        return sum(spec.nbytes for shard in self.shards for spec in shard.specs)

    @property
    def pair_specs(self) -> list[TensorSpec]:
        """A and B of every matrix by itself."""
        return [spec for item in self.matrices.values() for spec in item.adapter_specs]

    @cached_property
    def fused(self) -> list[FusedAdapter]:
        """The adapters that PEFT has for all experts of a layer together."""
        return fused_adapters(
            Member(item.matrix, item.rank, item.adapter_dtype)
            for item in self.matrices.values()
            if is_fused(item.matrix)
        )

    @property
    def adapter_specs(self) -> list[TensorSpec]:
        """What the adapter file holds."""
        alone = (item for item in self.matrices.values() if not is_fused(item.matrix))
        specs = [spec for item in alone for spec in item.adapter_specs]
        return specs + [spec for each in self.fused for spec in each.specs()]

    @property
    def adapter_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.adapter_specs)

    @property
    def bits_per_weight(self) -> float:
        stored = sum(spec.nbytes for item in self.matrices.values() for spec in item.specs)
        return stored * 8 / sum(item.matrix.elements for item in self.matrices.values())

    @property
    def disk_bytes(self) -> int:
        """Bytes of all tensor files, headers included."""
        files = [list(shard.specs) for shard in self.shards] + [self.adapter_specs]
        files += [self.pair_specs] if self.fused else []  # until they are fused
        held = sum(len(place(specs)[0]) + sum(spec.nbytes for spec in specs) for specs in files)
        return held + (0 if self.given is None else self.given.disk_bytes)
