"""Commands that several processes carry out together, as torchrun or srun starts them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from loftq_cli.cli import console

if TYPE_CHECKING:
    from loftq_cli.machine.world import World


@contextmanager
def together() -> Iterator[World]:
    """The processes of this run, each with its share of the CPUs. Lines of others than rank 0 begin
    with which they are. Raises UsageError if it is not clear which this is."""
    import torch

    from loftq_cli.machine import launched
    from loftq_cli.machine.group import Group
    from loftq_cli.machine.world import ALONE, several
    from loftq_cli.planning.choices import count_cpus

    place = launched.place()
    if place is None:
        yield ALONE
        return
    if place.rank:
        console.called(f"loftq[{place.rank}]")
    torch.set_num_threads(count_cpus())
    with Group(place) as group, several(group) as world:
        yield world
