"""Whether there is room for a conversion, before it writes anything."""

from __future__ import annotations

import torch

from loftq_cli.checkpoint.companions import companion_bytes
from loftq_cli.checkpoint.dtypes import BITS
from loftq_cli.conversion.devices import held
from loftq_cli.conversion.workspace import ConversionWorkspace
from loftq_cli.machine import launched
from loftq_cli.machine.resources import check_memory
from loftq_cli.planning import target
from loftq_cli.planning.download import check_disks
from loftq_cli.planning.memory import memory_bytes
from loftq_cli.planning.plan import Plan

_MARGIN = 4 << 20  # room for config, manifest and journal


def check_resources(plan: Plan, workspace: ConversionWorkspace) -> None:
    """Raise EnvironmentFailure if disk, memory or permissions are not enough; writes nothing."""
    copied = companion_bytes(plan.source.directory)
    needed = plan.disk_bytes + target.headroom(plan) + copied + _MARGIN
    check_disks(plan.source, workspace.final.parent, needed - workspace.written())
    workspace.check_permissions()
    check_memory_for(plan, launched.beside(plan.device.type))


def check_memory_for(plan: Plan, processes: int = 1) -> None:
    """Raise EnvironmentFailure if memory is not enough for so many processes of this one's kind."""
    largest = max(plan.matrices, key=lambda name: plan.matrices[name].matrix.elements)
    needed = memory_bytes(plan) * processes
    each = "" if processes == 1 else f", in each of {processes} processes"
    for device in plan.devices:
        check_memory(needed, f"tensor {largest!r}{each}", device)
    if len(plan.devices) > 1:
        waiting = f"{held(plan.devices)} matrices for {len(plan.devices)} devices"
        check_memory(_source_bytes(plan) * held(plan.devices), waiting, torch.device("cpu"))


def _source_bytes(plan: Plan) -> int:
    """Of the largest matrix."""
    matrices = (item.matrix for item in plan.matrices.values())
    return max(matrix.elements * BITS[matrix.dtype] // 8 for matrix in matrices)
