"""The conversion itself: one tensor after the other, from source shard to durable output shard."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from loftq_cli.checkpoint.companions import is_companion
from loftq_cli.checkpoint.durable import explained, pretty_json, write_file
from loftq_cli.checkpoint.header import StoredTensor
from loftq_cli.checkpoint.output import MANIFEST
from loftq_cli.checkpoint.reader import TORCH_DTYPES, ShardReader
from loftq_cli.checkpoint.source import CONFIG, INDEX
from loftq_cli.checkpoint.writer import GrowingShard
from loftq_cli.conversion import manifest as manifests
from loftq_cli.conversion.journal import Identity, Journal, Unit
from loftq_cli.conversion.observer import Observer
from loftq_cli.conversion.plan import Plan, PlannedMatrix, PlannedShard
from loftq_cli.conversion.workspace import Workspace
from loftq_cli.errors import (
    EnvironmentFailure,
    InputError,
    NonFiniteWeightError,
    ScaleRangeError,
    SourceChangedError,
)
from loftq_cli.layouts import adapter
from loftq_cli.numerics.alternation import Decomposition, Settings, decompose
from loftq_cli.numerics.metrics import first_non_finite
from loftq_cli.numerics.quantizers import Scale, make_quantizer
from loftq_cli.numerics.variant import Variant

_ADAPTER_FILE = f"{adapter.DIRECTORY}/{adapter.WEIGHTS}"
_UNSYNCED_LIMIT = 64 << 20  # bytes of passed-through tensors between two journal entries


@dataclass
class Conversion:
    """One conversion of ``plan`` into ``workspace``, resuming what its journal holds."""

    plan: Plan
    workspace: Workspace
    observer: Observer
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    source_hashes: dict[str, str] = field(default_factory=dict)

    def run(self, identity: Identity) -> dict[str, Any]:
        """Convert every shard, write the rest of the output, and return the manifest."""
        started = time.monotonic()
        plan, output = self.plan, self.workspace.output
        with explained(output):
            (output / adapter.DIRECTORY).mkdir(parents=True, exist_ok=True)
        self.workspace.keep_only({*(shard.name for shard in plan.shards), _ADAPTER_FILE})
        self.observer.begin(plan.source_bytes)
        with (
            Journal(self.workspace.journal, identity) as journal,
            GrowingShard(output / _ADAPTER_FILE, plan.adapter_specs) as adapters,
        ):
            for shard in plan.shards:
                self._convert_shard(shard, journal, adapters)
        self._write_companions()
        write_file(output / CONFIG, _json(self._config()))
        write_file(output / adapter.DIRECTORY / adapter.CONFIG, pretty_json(self._adapter_config()))
        if len(plan.shards) > 1:
            index = output / INDEX
            write_file(index, pretty_json(self._index()))
        with explained(output):
            value = manifests.build(
                plan,
                [self.records[name] for name in plan.matrices],
                self.source_hashes,
                output,
                self._environment(time.monotonic() - started),
            )
        write_file(output / MANIFEST, pretty_json(value))
        return value

    def _convert_shard(self, shard: PlannedShard, journal: Journal, adapters: GrowingShard) -> None:
        path = self.workspace.output / shard.name
        with GrowingShard(path, shard.specs) as backbone:
            files = {shard.name: backbone, _ADAPTER_FILE: adapters}
            finished = _verified(shard, journal, files)
            for name in finished:
                self.observer.detail(f"{name}: kept, it was finished before")
            self.records.update(
                (unit.tensor, unit.record) for unit in finished.values() if unit.record
            )
            tensors = shard.source.header.tensors
            known = journal.shards.get(shard.source.name)
            if known is not None and len(finished) == len(tensors):
                self.source_hashes[shard.source.name] = known
                self.observer.advance(sum(tensor.nbytes for tensor in tensors))
                return
            with ShardReader(shard.source) as reader:
                self._convert_tensors(shard, reader, finished, journal, files)
                self.source_hashes[shard.source.name] = reader.sha256
                journal.add_shard(shard.source.name, reader.sha256)

    def _convert_tensors(
        self,
        shard: PlannedShard,
        reader: ShardReader,
        finished: Mapping[str, Unit],
        journal: Journal,
        files: Mapping[str, GrowingShard],
    ) -> None:
        pending: list[Unit] = []
        unsynced = 0

        def settle() -> None:
            for file in files.values():
                file.sync()
            journal.add(pending)
            pending.clear()

        for tensor in shard.source.header.tensors:
            self.observer.working_on(tensor.name)
            if tensor.name in finished:
                for _ in reader.pieces(tensor):
                    pass
                if reader.sha256 != finished[tensor.name].prefix_sha256:
                    raise SourceChangedError(
                        f"{shard.source.path}: the contents up to tensor {tensor.name!r} are not "
                        "those that the unfinished conversion read"
                    )
                self.observer.advance(tensor.nbytes)
                continue
            item = self.plan.matrices.get(tensor.name)
            if item is None:
                digest = files[shard.name].write_pieces(tensor.name, reader.pieces(tensor))
                outputs = {shard.name: {tensor.name: digest}}
                record = None
            else:
                with _memory_explained(tensor.name, self.plan.device):
                    record, outputs = self._convert_matrix(shard, reader, tensor, item, files)
                self.records[tensor.name] = record
                self.observer.detail(_described(record))
            pending.append(Unit(tensor.name, reader.sha256, outputs, record))
            unsynced += tensor.nbytes
            if item is not None or unsynced > _UNSYNCED_LIMIT:
                settle()
                unsynced = 0
            self.observer.advance(tensor.nbytes)
        settle()

    def _convert_matrix(
        self,
        shard: PlannedShard,
        reader: ShardReader,
        tensor: StoredTensor,
        item: PlannedMatrix,
        files: Mapping[str, GrowingShard],
    ) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
        weight = reader.read(tensor).to(self.plan.device, torch.float32)
        bad = first_non_finite(weight)
        if bad is not None:
            index, value = bad
            raise NonFiniteWeightError(
                f"{shard.source.path}: tensor {tensor.name!r} holds {value} at {list(index)}"
            )
        try:
            result = self._decompose(weight, item)
        except ScaleRangeError as error:
            raise ScaleRangeError(f"tensor {tensor.name!r}: {error.message}") from error
        except InputError as error:
            message = f"{shard.source.path}: tensor {tensor.name!r}: {error.message}"
            raise InputError(message, hint=error.hint) from error
        del weight
        groups = {
            shard.name: self.plan.layout.encode(item.matrix, result.quantized),
            _ADAPTER_FILE: adapter.tensors(item.matrix.module, result.lora_A, result.lora_B),
        }
        outputs = {
            file: {name: files[file].write(name, value) for name, value in group.items()}
            for file, group in groups.items()
        }
        return manifests.matrix_record(item, self.plan.layout.name, result), outputs

    def _decompose(self, weight: torch.Tensor, item: PlannedMatrix) -> Decomposition:
        recipe, layout, matrix = self.plan.recipe, self.plan.layout, item.matrix
        scale = cast(Scale, recipe.scale)
        variant = Variant.parse(recipe.kernels)
        quantizer = make_quantizer(
            matrix.method,
            matrix.bits,
            matrix.block_size,
            scale,
            layout.scale_dtype,
            native=variant.native,
        )
        settings = Settings(
            rank=item.rank,
            iters=recipe.iters,
            order=cast(Any, recipe.order),
            svd=cast(Any, recipe.svd),
            keep=cast(Any, recipe.keep),
            scaling=item.scaling,
            products=variant.products,
            adapter_dtype=TORCH_DTYPES[item.adapter_dtype],
            backbone_dtype=layout.rounding(matrix),
            seed=recipe.seed,
            name=matrix.name,
        )
        return decompose(weight, quantizer, settings)

    def _write_companions(self) -> None:
        directory = self.plan.source.directory
        with explained(directory):
            paths = sorted(directory.iterdir())
        for path in paths:
            if path.name != CONFIG and is_companion(path.name) and path.is_file():
                with explained(path):
                    content = path.read_bytes()
                write_file(self.workspace.output / path.name, content)

    def _config(self) -> dict[str, Any]:
        plan = self.plan
        matrices = [item.matrix for item in plan.matrices.values()]
        entry = plan.layout.quantization_config(matrices, plan.surroundings)
        added = {} if entry is None else {"quantization_config": entry}
        return {**plan.source.config.content, **added}

    def _adapter_config(self) -> dict[str, Any]:
        plan = self.plan
        return adapter.config(
            {item.matrix.module: item.rank for item in plan.matrices.values()},
            plan.recipe.rank,
            plan.recipe.lora_alpha,
            adapter.task_type(plan.source.config.content.get("architectures") or []),
        )

    def _index(self) -> dict[str, Any]:
        weight_map = {spec.name: shard.name for shard in self.plan.shards for spec in shard.specs}
        return {
            "metadata": {"total_size": self.plan.backbone_bytes},
            "weight_map": weight_map,
        }

    def _environment(self, seconds: float) -> dict[str, Any]:
        device = self.plan.device
        cuda = device.type == "cuda"
        # Linux counts ru_maxrss in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        return {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if cuda else "cpu",
            "seconds": round(seconds, 3),
            "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
            "peak_device_bytes": torch.cuda.max_memory_allocated(device) if cuda else 0,
        }


def _verified(
    shard: PlannedShard, journal: Journal, files: Mapping[str, GrowingShard]
) -> dict[str, Unit]:
    """The journal's units of this shard whose bytes on disk are still those it recorded."""
    finished = {}
    for tensor in shard.source.header.tensors:
        unit = journal.units.get(tensor.name)
        if unit is not None and all(
            files[file].sha256_of(name) == digest
            for file, digests in unit.outputs.items()
            for name, digest in digests.items()
        ):
            finished[tensor.name] = unit
    return finished


@contextmanager
def _memory_explained(name: str, device: torch.device) -> Iterator[None]:
    """Turn running out of memory into an EnvironmentFailure that names the tensor."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EnvironmentFailure(
            f"tensor {name!r}: {device} is out of memory",
            hint="use --device cpu, or free the device",
        ) from error
    except (MemoryError, RuntimeError) as error:
        # torch's CPU allocator raises a plain RuntimeError.
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        raise EnvironmentFailure(
            f"tensor {name!r}: out of memory", hint="--dry-run says how much is needed"
        ) from error


def _described(record: Mapping[str, Any]) -> str:
    norms = record["frobenius"]
    left = norms["final"] / (norms["weight"] or 1.0)
    return f"{record['name']}: converted, residual {left:.4f} of the weight, step {record['step']}"


def _json(value: dict[str, Any]) -> bytes:
    """The config in the source's own key order."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
