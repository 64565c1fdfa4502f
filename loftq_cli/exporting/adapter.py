"""The adapter of an export: copied, told its backbone, and padded to one rank if that is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loftq_cli.checkpoint.header import StoredTensor, TensorSpec, read_header
from loftq_cli.checkpoint.output import Output
from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.checkpoint.writer import GrowingShard
from loftq_cli.errors import InputError, UsageError
from loftq_cli.layouts import adapter as adapters
from loftq_cli.layouts.base import Matrix
from loftq_cli.layouts.trained import TrainedAdapter, open_adapter
from loftq_cli.loading.trained_beside import refuse_other_conversion
from loftq_cli.machine.durable import pretty_json, write_file


@dataclass(frozen=True)
class ExportedAdapter:
    """``adapter``, which goes to the folder ``folder`` of the export; ``rank``: what every pair is
    padded to, None to leave ranks as they are."""

    adapter: TrainedAdapter
    folder: str
    rank: int | None

    @property
    def nbytes(self) -> int:
        """Of its tensors, once they are padded."""
        return sum(spec.nbytes for spec, _ in self._tensors())

    def write(self, target: Path, base: str, *, transposed: bool) -> None:
        """Write it to ``target``; ``base`` is what its config calls the backbone, whose weights are
        stored (in, out) if ``transposed``."""
        folder = target / self.folder
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self._tensors()
        with (
            TensorFile(self.adapter.file) as file,
            GrowingShard(folder / adapters.WEIGHTS, [spec for spec, _ in tensors]) as shard,
        ):
            for spec, tensor in tensors:
                shard.write(spec.name, _padded(file.read(tensor), spec.shape))
            shard.sync()
        said = {"base_model_name_or_path": base, "fan_in_fan_out": transposed}
        config = {**self._config(), **said}
        write_file(folder / adapters.CONFIG, pretty_json(config))

    def _config(self) -> dict[str, Any]:
        config = dict(self.adapter.config)
        if self.rank is None:
            return config
        scaling = next(iter(self.adapter.pairs.values())).scaling
        alpha = scaling * self.rank
        return {
            **config,
            "r": self.rank,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "rank_pattern": {},
            "alpha_pattern": {},
            "use_rslora": False,
        }

    def _tensors(self) -> list[tuple[TensorSpec, StoredTensor]]:
        """The tensors as they become, and as they are."""
        sides = {}
        for pair in self.adapter.pairs.values():
            sides[pair.lora_A.name], sides[pair.lora_B.name] = 0, 1
        found = []
        for tensor in read_header(self.adapter.file).tensors:
            shape = list(tensor.shape)
            if self.rank is not None and tensor.name in sides:
                shape[sides[tensor.name]] = self.rank
            found.append((TensorSpec(tensor.name, tensor.dtype, tuple(shape)), tensor))
        return found


def exported(
    output: Output, file: Path, folder: str, matrices: Sequence[Matrix], *, pad: bool
) -> ExportedAdapter:
    """The adapter in ``file`` for the conversion ``output``. Raises InputError if it is of another
    conversion, UsageError if its ranks cannot be padded exactly, and what
    :func:`~loftq_cli.layouts.trained.open_adapter` raises."""
    adapter = open_adapter(file)
    refuse_other_conversion(output, adapter.file, adapter.config)
    _refuse_strangers(adapter, {matrix.adapted: matrix for matrix in matrices}, output)
    return ExportedAdapter(adapter, folder, _rank(adapter) if pad else None)


def _refuse_strangers(
    adapter: TrainedAdapter, matrices: Mapping[str, Matrix], output: Output
) -> None:
    for module, pair in adapter.pairs.items():
        matrix = matrices.get(module)
        if matrix is not None and pair.shape != matrix.shape:
            raise InputError(
                f"{adapter.file}: the pair of {module!r} is for {list(pair.shape)}, the matrix is "
                f"{list(matrix.shape)}",
                hint=f"give an adapter that was trained on {output.directory}",
            )
    if not matrices.keys() & adapter.pairs.keys():
        raise InputError(
            f"{adapter.file}: nothing in it is for a matrix of {output.directory}",
            hint=f"give an adapter that was trained on {output.directory}",
        )


def _rank(adapter: TrainedAdapter) -> int:
    """The largest rank. Raises UsageError if the products are scaled in different ways."""
    if adapter.fused:
        raise UsageError(
            f"--pad-ranks: {adapter.file} has experts in PEFT's fused form",
            hint="leave it out: experts have one rank",
        )
    factors = {pair.scaling for pair in adapter.pairs.values()}
    if len(factors) > 1:
        raise UsageError(
            f"--pad-ranks: the pairs of {adapter.file} are scaled by {len(factors)} factors, and "
            "one rank has one",
            hint="convert without --lora-alpha, which scales every pair by 1",
        )
    return max(pair.lora_A.shape[0] for pair in adapter.pairs.values())


def _padded(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """``tensor`` with zeros at its end, in every dimension, up to ``shape``."""
    if tuple(tensor.shape) == shape:
        return tensor
    result = tensor.new_zeros(shape)
    result[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return result
