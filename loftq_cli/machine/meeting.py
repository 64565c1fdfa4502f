"""The store of torch's where the processes of one run meet."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from loftq_cli.errors import EnvironmentFailure
from loftq_cli.machine.launched import Place

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

JOINING = 600.0
"""Seconds that processes may take to come, one after the other."""
PAUSE = 0.1
"""Seconds between two looks at what has been said."""


def met(place: Place) -> Store:
    """The store, in rank 0's process or torchrun's. Raises EnvironmentFailure if it cannot be
    reached."""
    import torch.distributed as dist

    if not dist.is_available():
        raise EnvironmentFailure(
            f"{place}: this build of torch has no torch.distributed",
            hint="install another, or unset RANK and WORLD_SIZE for an ordinary run",
        )
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    here = place.rank == 0 and not place.served
    if not here:
        _reach(place)
    try:
        store: Store = TCPStore(
            place.address,
            place.port,
            is_master=here,
            timeout=timedelta(seconds=60),
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise EnvironmentFailure(
            f"{place}: no meeting at {place.address}:{place.port}: {reason}",
            hint="choose another MASTER_PORT, or a MASTER_ADDR that is the host of rank 0",
        ) from error
    if place.served:  # by torchrun, for all of its attempts to start the processes
        store = PrefixStore(f"attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    return PrefixStore("loftq", store)


def _reach(place: Place) -> None:
    """Wait until somebody listens where all meet; torch would do so without hearing signals."""
    until = time.monotonic() + JOINING
    while True:
        try:
            socket.create_connection((place.address, place.port), timeout=5).close()
        except OSError as error:
            if time.monotonic() > until:
                raise EnvironmentFailure(
                    f"{place}: nobody at {place.address}:{place.port} for {JOINING:.0f} s: "
                    f"{error.strerror or error}",
                    hint="start rank 0 as well, or unset RANK and WORLD_SIZE for an ordinary run",
                ) from error
            time.sleep(PAUSE)
        else:
            return
