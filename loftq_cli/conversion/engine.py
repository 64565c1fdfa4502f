"""The conversion itself: one tensor after the other, from source shard to durable output shard."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from loftq_cli.checkpoint.companions import copy_companions
from loftq_cli.checkpoint.deliveries import Deliveries
from loftq_cli.checkpoint.encoded import foreign
from loftq_cli.checkpoint.header import StoredTensor, read_header
from loftq_cli.checkpoint.journal import Journal, ReadShard, Subject, Unit
from loftq_cli.checkpoint.output import MANIFEST
from loftq_cli.checkpoint.reader import ShardReader, TensorFile
from loftq_cli.checkpoint.shard_output import ShardOutput
from loftq_cli.checkpoint.source import CONFIG, INDEX
from loftq_cli.checkpoint.writer import GrowingShard, index_of
from loftq_cli.conversion import record as manifests
from loftq_cli.conversion.beside import compare, surround
from loftq_cli.conversion.devices import converted, environment
from loftq_cli.conversion.items import Item, copied
from loftq_cli.conversion.overlap import ReadAhead, WriteBehind
from loftq_cli.conversion.reread import check_contents, is_as_old, pass_over
from loftq_cli.conversion.workspace import ConversionWorkspace
from loftq_cli.errors import InputError, ScaleRangeError
from loftq_cli.families.kinds import turned
from loftq_cli.families.tasks import task_type
from loftq_cli.layouts import adapter
from loftq_cli.layouts.base import Matrix
from loftq_cli.layouts.fused import is_fused
from loftq_cli.layouts.rescaled import Rescaling
from loftq_cli.machine.durable import explained, pretty_json, write_file
from loftq_cli.machine.observer import Observer
from loftq_cli.machine.resources import memory_explained
from loftq_cli.machine.threads import side_by_side
from loftq_cli.numerics.decomposition import Adapted, Decomposition
from loftq_cli.numerics.finite import computable
from loftq_cli.planning.decomposer import Decomposer
from loftq_cli.planning.plan import Plan, PlannedShard
from loftq_cli.planning.work import work


@dataclass
class Conversion:
    """One conversion of ``plan`` into ``workspace``, resuming what its journal holds."""

    plan: Plan
    workspace: ConversionWorkspace
    observer: Observer
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    source_hashes: dict[str, str] = field(default_factory=dict)
    rescaling: Rescaling = field(default_factory=Rescaling)
    squared_left: float = 0.0
    squared_weight: float = 0.0
    began: float = field(default_factory=time.monotonic)

    @cached_property
    def decomposers(self) -> dict[torch.device, Decomposer]:
        """One for each device."""
        plan = self.plan
        given = plan.statistics, self.rescaling
        return {
            device: Decomposer(plan.recipe, plan.layout, device, *given) for device in plan.devices
        }

    def run(self, identity: Subject) -> dict[str, Any]:
        """Convert every shard, write the rest of the output, and return the manifest."""
        plan, output = self.plan, self.workspace.output
        with explained(output):
            (output / plan.adapter_folder).mkdir(parents=True, exist_ok=True)
        shards = [] if plan.given else [shard.name for shard in plan.shards]
        self.workspace.keep_only({*shards, self.adapter_file})
        if plan.given is not None:
            folder = output / plan.adapter_folder
            self.rescaling = compare(plan, folder, self.observer)
        self.observer.begin(sum(work(plan, tensor) for tensor in plan.source.tensors))
        self.observer.count(len(plan.matrices), "matrices")
        with (
            Journal(self.workspace.journal, identity, self.workspace.others()) as journal,
            GrowingShard(self.pairs, plan.pair_specs) as adapters,
            Deliveries(plan.source, self._unread(journal), self.observer) as deliveries,
        ):
            if journal.damaged:
                lines = "1 line" if journal.damaged == 1 else f"{journal.damaged} lines"
                self.observer.detail(f"{lines} of the journal damaged: done again")
            sources = [shard.source for shard in plan.shards]
            for number, shard in enumerate(plan.shards, 1):
                self._convert_shard(shard, journal, adapters, deliveries)
                needed = {name for source in sources[number:] for name in foreign(source)}
                for source in sources[:number]:
                    if source.name not in needed:
                        deliveries.done(source.name)
        if plan.fused:
            self._fuse(output / self.adapter_file)
        if plan.given is None:
            self._surround(output)
        else:
            surround(plan.given, plan.source, [*self.records.values()], output)
        config = pretty_json(self._adapter_config())
        write_file(output / plan.adapter_folder / adapter.CONFIG, config)
        with explained(output):
            value = manifests.build(
                plan,
                [self.records[name] for name in plan.matrices],
                self.source_hashes,
                output,
                environment(plan.devices, time.monotonic() - self.began),
            )
        write_file(output / MANIFEST, pretty_json(value))
        return value

    def _surround(self, output: Path) -> None:
        """Write what belongs to a backbone beside its tensors."""
        plan = self.plan
        copy_companions(plan.source.directory, output)
        write_file(output / CONFIG, pretty_json(self._config(), in_order=True))
        if len(plan.shards) > 1:
            index = index_of((shard.name, shard.specs) for shard in plan.shards)
            write_file(output / INDEX, pretty_json(index))

    @property
    def adapter_file(self) -> str:
        """The name in the output of the file of A and B."""
        return str(PurePosixPath(self.plan.adapter_folder) / adapter.WEIGHTS)

    def _record(self, name: str, record: dict[str, Any]) -> None:
        """Keep the ``record`` of a finished matrix, and tell of the residual so far."""
        self.records[name] = record
        norms = record["frobenius"]
        self.squared_left += norms["final"] ** 2
        self.squared_weight += norms["weight"] ** 2
        share = math.sqrt(self.squared_left / (self.squared_weight or 1.0))
        self.observer.finished(f"residual {share:.4f}")

    @property
    def pairs(self) -> Path:
        """The file of every pair: the adapter, or what it is made of in the end."""
        fused = bool(self.plan.fused)
        return self.workspace.pairs if fused else self.workspace.output / self.adapter_file

    def _fuse(self, path: Path) -> None:
        """Write the adapter with the pairs of experts as PEFT has them, one parameter at a time."""
        plan = self.plan
        tensors = {tensor.name: tensor for tensor in read_header(self.pairs).tensors}
        with (
            TensorFile(self.pairs) as pairs,
            GrowingShard(path, plan.adapter_specs) as adapter_file,
        ):
            for spec in plan.adapter_specs:
                if spec.name in tensors:
                    adapter_file.write_pieces(spec.name, pairs.pieces(tensors[spec.name]))
            for each in plan.fused:
                made = each.tensors(lambda name: pairs.read(tensors[name]))
                for name, tensor in made.items():
                    adapter_file.write(name, tensor)
            adapter_file.sync()

    def _unread(self, journal: Journal) -> list[str]:
        """The source's shards that were not read to their end before."""
        names = [shard.source.name for shard in self.plan.shards]
        return [name for name in names if name not in journal.shards]

    def _convert_shard(
        self, shard: PlannedShard, journal: Journal, adapters: GrowingShard, deliveries: Deliveries
    ) -> None:
        path = self.workspace.output / shard.name
        with ExitStack() as stack:
            files = {self.adapter_file: adapters}
            if self.plan.given is None:
                files[shard.name] = stack.enter_context(GrowingShard(path, shard.specs))
            output = ShardOutput(journal, files, shard.name)
            tensors = shard.source.header.tensors
            names = [tensor.name for tensor in tensors]
            found = side_by_side(output.finished, names, self.plan.recipe.threads)
            finished = {
                name: unit
                for name, unit in zip(names, found, strict=True)
                if unit is not None and is_as_old(shard.source, unit)
            }
            for name, unit in finished.items():
                self.observer.detail(f"{name}: kept, it was finished before")
                if unit.record:
                    self._record(name, unit.record)
            known = self._known(shard, journal, finished, deliveries)
            if known is not None and len(finished) == len(tensors):
                self.source_hashes[shard.source.name] = known.sha256
                self.observer.skip(sum(work(self.plan, tensor) for tensor in tensors))
                return
            for name in sorted(foreign(shard.source)):
                deliveries.take(name)
            deliveries.take(shard.source.name)
            with ShardReader(shard.source) as reader:
                items = self._read(shard, reader, finished)
                with WriteBehind() as behind, ReadAhead(items) as ahead:
                    self.convert_items(shard, ahead, output, behind)
                reader.finish()
                reader.check_unchanged()
                output.settle()
                self.source_hashes[shard.source.name] = reader.sha256
                journal.add_shard(ReadShard(shard.source.name, reader.sha256, reader.mtime_ns))

    def _known(
        self,
        shard: PlannedShard,
        journal: Journal,
        finished: Mapping[str, Unit],
        deliveries: Deliveries,
    ) -> ReadShard | None:
        """What is known of the whole shard, read again if it may have changed. If finished
        tensors lie behind such as must be done again, it is read first, too."""
        tensors, known = shard.source.header.tensors, journal.shards.get(shard.source.name)
        done = [tensor.name in finished for tensor in tensors]
        supply, name = self.plan.source.supply, shard.source.name
        touched = known and not (
            supply.is_unchanged(name, known.sha256, known.mtime_ns)
            and all(
                each.apart is None or each.apart.mtime_ns == known.mtime_ns
                for each in finished.values()
            )
        )
        if touched or (False in done and (known or True in done[done.index(False) :])):
            deliveries.take(name)
            self.observer.detail(f"{name}: read again, to see whether it changed")
            found = check_contents(shard.source, finished, known)
            if known is not None:
                journal.add_shard(found)
                return found
        return known

    def _read(
        self, shard: PlannedShard, reader: ShardReader, finished: Mapping[str, Unit]
    ) -> Iterator[Item]:
        """The shard's tensors in file order: matrices whole, the others in pieces."""
        for tensor in shard.source.header.tensors:
            if tensor.name in finished:
                pass_over(reader, tensor, finished[tensor.name])
                yield Item(tensor, reader.sha256, finished=True)
            elif tensor.name in self.plan.matrices:
                weight = self.weight(reader, tensor)
                with self._memory_for(tensor):
                    given = self._given and self._given(self.plan.matrices[tensor.name].matrix)
                yield Item(tensor, reader.sha256, weight=weight, given=given)
            elif self.plan.given is not None:
                reader.pass_over(tensor)
                yield Item(tensor, reader.sha256)
            else:
                yield from copied(reader, tensor)

    @cached_property
    def _given(self) -> Callable[[Matrix], torch.Tensor] | None:
        """Reads what is given of a matrix, if the backbone is."""
        return None if self.plan.given is None else self.plan.given.reader()

    def convert_items(
        self,
        shard: PlannedShard,
        items: Iterator[Item],
        output: ShardOutput,
        behind: WriteBehind,
    ) -> None:
        """Do to the ``items`` of ``shard`` what the plan says, and have them written."""
        for item, result in self._converted(shard, items):
            self._finish_item(shard, item, result, output, behind)
            del result

    def _converted(
        self, shard: PlannedShard, items: Iterator[Item]
    ) -> Iterator[tuple[Item, Adapted | None]]:
        """The items of ``shard``, and what the devices make of those that are matrices."""
        decomposers = self.decomposers  # made here, not by the threads

        def convert(item: Item, device: torch.device) -> Adapted:
            with self._memory_for(item.tensor, device):
                return self._convert_matrix(shard, item, device, decomposers[device])

        announce = self.observer.working_on
        return converted(items, self.plan.devices, announce, convert, self.plan.recipe.threads)

    def _finish_item(
        self,
        shard: PlannedShard,
        item: Item,
        result: Adapted | None,
        output: ShardOutput,
        behind: WriteBehind,
    ) -> None:
        """Have written what became of an item: the ``result`` if it was a matrix."""
        tensor, prefix = item.tensor, item.prefix_sha256
        if result is not None:
            planned = self.plan.matrices[tensor.name]
            decomposer = self.decomposers[self.plan.device]
            kind = None if result.weighted is None else decomposer.kind(planned.matrix)
            record = manifests.matrix_record(planned, self.plan.layout.name, result, kind)
            record |= self.rescaling.record(tensor.name)
            self.observer.detail(manifests.described(record))
            self._record(tensor.name, record)

            def write() -> None:
                matrix = planned.matrix
                with self._memory_for(tensor):
                    pair = adapter.tensors(matrix, result.lora_A, result.lora_B)
                    groups = {self.adapter_file: pair}
                    if isinstance(result, Decomposition):
                        groups[shard.name] = self.plan.layout.encode(matrix, result.quantized)
                output.write(tensor.name, prefix, groups, record, item.apart)

            behind.submit(write)
        elif item.piece is not None:
            piece = item.piece
            behind.submit(lambda: output.copy(tensor.name, piece))
            if prefix is not None:
                behind.submit(lambda: output.end_copy(tensor, prefix))
        elif prefix is not None and not item.finished:
            behind.submit(lambda: output.leave(tensor, prefix))
        if prefix is not None or item.apart is not None:
            done = self.observer.skip if item.finished else self.observer.advance
            done(work(self.plan, tensor))

    def weight(self, file: TensorFile, tensor: StoredTensor) -> torch.Tensor:
        """A matrix of ``file`` as it is stored, ready to be sent to the device."""
        with self._memory_for(tensor):
            weight = file.read(tensor)
            return weight.pin_memory() if self.plan.device.type == "cuda" else weight

    def _memory_for(
        self, tensor: StoredTensor, device: torch.device | None = None
    ) -> AbstractContextManager[None]:
        needed, device = "--dry-run says how much is needed", device or self.plan.device
        return memory_explained(f"tensor {tensor.name!r}", hint=needed, device=device)

    def _convert_matrix(
        self, shard: PlannedShard, item: Item, device: torch.device, decomposer: Decomposer
    ) -> Adapted:
        assert item.weight is not None
        tensor, planned = item.tensor, self.plan.matrices[item.tensor.name]
        weight = item.weight.to(device, non_blocking=True)
        given, item.given = item.given, None
        item.weight = None  # on the host it is not needed any more
        weight = computable(weight, f"{shard.source.path}: tensor {tensor.name!r}")
        weight = turned(weight, planned.matrix.kind).contiguous()
        weight = self.rescaling.applied(tensor.name, weight)
        try:
            if given is not None:
                return decomposer.adapt(weight, planned, given.to(device))
            return decomposer.decompose(weight, planned)
        except ScaleRangeError as error:
            raise ScaleRangeError(f"tensor {tensor.name!r}: {error.message}") from error
        except InputError as error:
            message = f"{shard.source.path}: tensor {tensor.name!r}: {error.message}"
            raise type(error)(message, hint=error.hint) from error

    def _config(self) -> dict[str, Any]:
        plan = self.plan
        matrices = [item.matrix for item in plan.matrices.values()]
        entry = plan.layout.quantization_config(matrices, plan.surroundings)
        added = {} if entry is None else {"quantization_config": entry}
        return {**plan.surroundings.config, **added}

    def _adapter_config(self) -> dict[str, Any]:
        plan = self.plan
        names = plan.source.config.content.get("architectures") or [plan.anatomy.architecture]
        architecture = names[0] if names[0] and str(names[0]).isidentifier() else None
        task = task_type([architecture or ""], takes_text=plan.anatomy.takes_text)
        modules = [item for item in plan.matrices.values() if not is_fused(item.matrix)]
        return adapter.config(
            {item.matrix.adapted: item.rank for item in modules},
            plan.recipe.rank,
            plan.recipe.lora_alpha,
            task,
            architecture=architecture,
            base_model=plan.recipe.base_model or (plan.given.address if plan.given else None),
            # Other layouts load transposed matrices as ordinary linear layers.
            transposed=plan.layout.keeps_conv1d
            and any(item.matrix.kind == "conv1d" for item in plan.matrices.values()),
            parameters={each.target: each.rank for each in plan.fused},
        )
