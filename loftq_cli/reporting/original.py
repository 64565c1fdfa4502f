"""The checkpoint that was converted: found again, and its matrices read."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from loftq_cli.checkpoint.dtypes import FLOATS
from loftq_cli.checkpoint.locate import is_path, locate
from loftq_cli.checkpoint.output import Output
from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.checkpoint.request import Request
from loftq_cli.checkpoint.source import Source
from loftq_cli.checkpoint.stacks import cut
from loftq_cli.errors import InputError
from loftq_cli.families.kinds import turned
from loftq_cli.layouts.base import Matrix
from loftq_cli.layouts.cuts import stacks_of
from loftq_cli.layouts.rescaled import Rescaling
from loftq_cli.numerics.finite import computable


def converted_source(
    output: Output,
    model: str,
    *,
    offline: bool,
    say: Callable[[str], None] = lambda text: None,
) -> Source:
    """The checkpoint ``model`` that was converted; of one on the hub the commit that was. Raises
    what :func:`~loftq_cli.checkpoint.locate.locate` does, which ``say`` is of."""
    stated = output.manifest["source"]
    converted = model in (stated["id"], stated.get("resolved_from")) and not is_path(model)
    return locate(Request(model, stated["revision"] if converted else None, offline), say)


class Original:
    """The matrices of ``source``, which ``output`` is a conversion of."""

    def __init__(self, output: Output, source: Source) -> None:
        self.source = source
        self.rescaling = Rescaling.of(output)
        self._stored = cut(source, stacks_of(output.records)).stored

    def bring(self) -> None:
        """Have every shard on disk."""
        for shard in self.source.shards:
            self.source.supply.ensure(shard.name)

    def check(self, matrices: Iterable[Matrix]) -> None:
        """Raise InputError unless all ``matrices`` are here, as they were converted."""
        for matrix in matrices:
            found = self._stored.get(matrix.name)
            said = f"{self.source.id}: tensor {matrix.name!r}"
            if found is None or found[1].shape != matrix.stored_shape:
                shape = list(found[1].shape) if found else "no such tensor"
                raise InputError(
                    f"{said}: {shape}, the conversion was of {list(matrix.stored_shape)}",
                    hint="give the checkpoint that was converted",
                )
            if found[1].dtype not in FLOATS:
                raise InputError(
                    f"{said} is {found[1].dtype}, not a floating-point matrix",
                    hint="give the checkpoint that was converted",
                )

    def read(self, matrix: Matrix) -> torch.Tensor:
        """W, float32 (out, in), as the backbone's was rescaled if it was. Raises InputError as
        :meth:`check`, or for a value that is not finite."""
        self.check([matrix])
        path, tensor = self._stored[matrix.name]
        with TensorFile(path) as file:
            weight = computable(file.read(tensor), f"{path}: tensor {matrix.name!r}").float()
        return self.rescaling.applied(matrix.name, turned(weight, matrix.kind).contiguous())
