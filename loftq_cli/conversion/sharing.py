"""Some jobs of a conversion, done beside other processes that do the rest of it.

Nothing is locked and no file is appended to by two: every tensor has its place in the output
before its value is known, and who shares the work has a journal of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from loftq_cli.checkpoint.journal import Apart, Journal, ReadShard, Subject, held_in
from loftq_cli.checkpoint.reader import ShardReader, TensorFile
from loftq_cli.checkpoint.shard_output import ShardOutput
from loftq_cli.checkpoint.source import Shard
from loftq_cli.checkpoint.writer import GrowingShard
from loftq_cli.conversion.engine import Conversion
from loftq_cli.conversion.items import Item, copied
from loftq_cli.conversion.jobs import Held, Job
from loftq_cli.conversion.overlap import ReadAhead, WriteBehind
from loftq_cli.conversion.reread import sha256_of
from loftq_cli.conversion.workspace import ConversionWorkspace
from loftq_cli.layouts import adapter
from loftq_cli.machine.durable import explained, make_directory


def make_room(workspace: ConversionWorkspace) -> None:
    """Make the directories of the output."""
    with explained(workspace.output):
        make_directory(workspace.output / adapter.DIRECTORY)


def held(workspace: ConversionWorkspace, identity: Subject) -> Held:
    """What all journals in ``workspace`` say is finished."""
    return Held(*held_in([*workspace.others(), workspace.journal], identity))


@dataclass
class Sharing:
    """Carries out jobs of ``conversion``, with a ``journal`` of its own.

    ``hashes``: the values of matrices are hashed as they were read, for sources that are not one
    file for all, but copies on several hosts. Otherwise the age of the file does.
    """

    conversion: Conversion
    journal: Journal
    hashes: bool
    _outputs: dict[str, ShardOutput] = field(default_factory=dict)

    def carry_out(self, jobs: Iterable[Job]) -> None:
        """Do ``jobs``, one after the other; each is asked for while the one before it is done.
        Raises what the conversion raises, and SourceChangedError."""
        with ExitStack() as files, WriteBehind() as behind, ReadAhead(self._read(jobs)) as ahead:
            plan = self.conversion.plan
            pairs = files.enter_context(GrowingShard(self.conversion.pairs, plan.pair_specs))
            for job, item in ahead:
                output = self._output(job, pairs, files)
                if isinstance(item, ReadShard):
                    behind.submit(partial(self._end, output, item))
                else:
                    self.conversion.convert_items(job.shard, iter([item]), output, behind)

    def _output(self, job: Job, pairs: GrowingShard, files: ExitStack) -> ShardOutput:
        name = job.shard.name
        if name not in self._outputs:
            path = self.conversion.workspace.output / name
            backbone = files.enter_context(GrowingShard(path, job.shard.specs))
            opened = {name: backbone, self.conversion.adapter_file: pairs}
            self._outputs[name] = ShardOutput(self.journal, opened, name)
        return self._outputs[name]

    def _end(self, output: ShardOutput, read: ReadShard) -> None:
        output.settle()
        self.journal.add_shard(read)

    def _read(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Item | ReadShard]]:
        for job in jobs:
            items = self._matrices(job) if job.matrices else self._rest(job.shard.source)
            for item in items:
                yield job, item

    def _matrices(self, job: Job) -> Iterator[Item]:
        with TensorFile(job.shard.source.path) as file:
            for tensor in job.matrices:
                weight = self.conversion.weight(file, tensor)
                own = sha256_of(weight) if self.hashes else None
                file.check_unchanged()
                yield Item(tensor, None, weight=weight, apart=Apart(file.mtime_ns, own))
                del weight

    def _rest(self, shard: Shard) -> Iterator[Item | ReadShard]:
        with ShardReader(shard) as reader:
            for tensor in shard.header.tensors:
                if tensor.name in self.conversion.plan.matrices:
                    reader.pass_over(tensor)
                else:
                    yield from copied(reader, tensor)
            reader.finish()
            reader.check_unchanged()
            yield ReadShard(shard.name, reader.sha256, reader.mtime_ns)
