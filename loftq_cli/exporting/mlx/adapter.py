"""The adapter of a conversion as mlx-lm stores one.

``adapters.safetensors`` holds ``X.lora_a`` (in, rank) and ``X.lora_b`` (rank, out), and a layer
adds ``scale * (x lora_a) lora_b`` (mlx_lm ``tuner/lora.py``), with one rank and one scale for all.
So pairs are padded with zeros, which training leaves as they are. float32: mlx-lm trains in the
dtype that it finds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loftq_cli.checkpoint.header import TensorSpec
from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.checkpoint.writer import GrowingShard
from loftq_cli.errors import LayoutError
from loftq_cli.exporting.pairs import pairs_of, rank_of
from loftq_cli.families.blocks import layers_by_stack
from loftq_cli.layouts.adapter import OF_MLX_LM
from loftq_cli.layouts.trained_parts import Pair
from loftq_cli.machine.durable import pretty_json, write_file
from loftq_cli.merging.plan import MergePlan

FOLDER = "adapters"
WEIGHTS, CONFIG = OF_MLX_LM, "adapter_config.json"
_ALL_LAYERS = -1


@dataclass(frozen=True)
class MlxAdapter:
    """``pairs`` by module, in the adapter ``file``; ``modules``: the linear layers that there
    are."""

    file: Path
    pairs: Mapping[str, Pair]
    modules: Collection[str]

    @staticmethod
    def of(merging: MergePlan, modules: Collection[str]) -> MlxAdapter:
        """The adapter of ``merging``. Raises InputError if it holds more than pairs, LayoutError
        for those of experts."""
        pairs = pairs_of(merging, "mlx-lm")
        for name, pair in pairs.items():
            if pair.slice is not None:
                raise LayoutError(
                    f"{merging.adapter.file}: {name} is an expert's, which mlx-lm names otherwise",
                    hint="convert with --exclude '*.experts.*'",
                )
        found = {name.removesuffix(".weight"): pair for name, pair in pairs.items()}
        return MlxAdapter(merging.adapter.file, found, modules)

    @property
    def rank(self) -> int:
        """What every pair is padded to."""
        return max(map(rank_of, self.pairs.values()))

    @property
    def scale(self) -> float:
        """That of every pair: if theirs differ 1, and B has it."""
        scales = {pair.scaling for pair in self.pairs.values()}
        return scales.pop() if len(scales) == 1 else 1.0

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return sum(spec.nbytes for specs in self._specs().values() for spec in specs)

    def config(self) -> dict[str, Any]:
        """adapter_config.json, which mlx_lm.lora takes as its ``--config``, too."""
        lora = {"rank": self.rank, "dropout": 0.0, "scale": self.scale, "keys": self.keys()}
        return {"fine_tune_type": "lora", "num_layers": _ALL_LAYERS, "lora_parameters": lora}

    def keys(self) -> list[str]:
        """Which layers have a pair: by their names within a block if those of all blocks have it,
        else by their whole names."""
        stacks = layers_by_stack(self.modules)
        if len(stacks) > 1:
            return sorted(self.pairs)
        found = set(self.pairs)
        for stack, blocks in stacks.items():
            within = [
                {name.removeprefix(f"{stack}.{number}.") for name in names if name in self.pairs}
                for number, names in blocks.items()
            ]
            if all(each == within[0] for each in within):
                found -= {name for names in blocks.values() for name in names}
                found |= within[0]
        return sorted(found)

    def write(self, folder: Path) -> None:
        """Write it to ``folder``, which is made."""
        folder.mkdir()
        specs, scale = self._specs(), self.scale
        every = [spec for pair in specs.values() for spec in pair]
        with TensorFile(self.file) as file, GrowingShard(folder / WEIGHTS, every) as shard:
            for module, pair in self.pairs.items():
                first, second = specs[module]
                lora_A, lora_B = pair.read(file)
                lora_a, lora_b = torch.zeros(first.shape), torch.zeros(second.shape)
                lora_a[:, : rank_of(pair)] = lora_A.T
                lora_b[: rank_of(pair)] = lora_B.T * (pair.scaling / scale)
                shard.write(first.name, lora_a)
                shard.write(second.name, lora_b)
            shard.sync()
        write_file(folder / CONFIG, pretty_json(self.config()))

    def _specs(self) -> dict[str, tuple[TensorSpec, TensorSpec]]:
        """Of lora_a and lora_b, by module."""
        rank = self.rank
        return {
            module: (
                TensorSpec(f"{module}.lora_a", "F32", (pair.lora_A.shape[1], rank)),
                TensorSpec(f"{module}.lora_b", "F32", (rank, pair.lora_B.shape[0])),
            )
            for module, pair in self.pairs.items()
        }
