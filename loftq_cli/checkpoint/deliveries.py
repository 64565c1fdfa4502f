"""A source's shards, handed out one after another; while one is worked on the next arrives.

One ahead and no more: if shards do not stay on disk, it needs room for two of them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType

from loftq_cli.checkpoint.source import Source
from loftq_cli.errors import DownloadAbandoned
from loftq_cli.machine.observer import Observer

_PATIENCE = 5.0
"""Seconds that a download which nobody waits for any more is given to notice."""


class Deliveries:
    """The shards ``names`` of ``source``, to be taken in this order.

    Whatever ends the block also ends the download that is under way.
    """

    def __init__(self, source: Source, names: Sequence[str], observer: Observer) -> None:
        self._supply = source.supply
        self._names = names
        self._observer = observer
        self._coming: dict[str, Future[None]] = {}
        self._last: threading.Thread | None = None
        self._abandoned = False

    def __enter__(self) -> Deliveries:
        missing = self._supply.missing
        self._observer.begin_download(sum(missing.get(name, 0) for name in self._names))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._abandoned = True
        if self._last is not None and self._last.is_alive():
            self._supply.give_up()
            self._last.join(_PATIENCE)

    def take(self, name: str) -> None:
        """Wait until the shard is there, and have the one behind it sent for. Raises what its
        supply raises."""
        coming = self._send_for(name)
        if name in self._supply.missing:
            self._observer.working_on(name)  # what is being waited for
        coming.result()
        if name in self._names:
            following = self._names[self._names.index(name) + 1 :]
            if following:
                self._send_for(following[0])

    def done(self, name: str) -> None:
        """The shard is not needed any more."""
        self._supply.release(name)

    def _send_for(self, name: str) -> Future[None]:
        if name not in self._coming:
            future = self._coming[name] = Future()
            # A daemon: an interrupted process does not wait for a stalled connection.
            self._last = threading.Thread(
                target=self._bring, args=(name, future), name="loftq-download", daemon=True
            )
            self._last.start()
        return self._coming[name]

    def _bring(self, name: str, future: Future[None]) -> None:
        try:
            self._supply.ensure(name, self._arrived)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    def _arrived(self, nbytes: int) -> None:
        if self._abandoned:
            raise DownloadAbandoned("nobody waits for this download any more")
        self._observer.downloaded(nbytes)


def deliver_all(source: Source, observer: Observer) -> None:
    """Have every shard of ``source`` on disk, verified. Raises what its supply raises."""
    names = [shard.name for shard in source.shards]
    try:
        with Deliveries(source, names, observer) as deliveries:
            for name in names:
                deliveries.take(name)
    finally:
        observer.end()
