"""The processes that do one piece of work together: they meet at a store of torch's and leave each
other messages there.

Whoever is alive counts up a number every second. Who has not done so for a while is taken for dead,
and so is a process of rank 0's own host that is not there any more.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from loftq_cli.errors import EnvironmentFailure, LoftqError
from loftq_cli.machine import introduction
from loftq_cli.machine.launched import Place
from loftq_cli.machine.meeting import PAUSE, met
from loftq_cli.machine.messages import INTERRUPTED, read, told

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

BEAT = 1.0
"""Seconds between two signs of life."""
PATIENCE = 30.0
"""Seconds without any, after which a process is taken for dead."""
_FAREWELL = 10.0
_ENDED = "ended"
_GONE = 5.0
"""Seconds in which it becomes known who is gone, once somebody has noticed that one is."""


class Group:
    """All processes of one run, as the one at ``place`` knows them. Raises EnvironmentFailure,
    as every method does, if rank 0 cannot be reached."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.host = socket.gethostname()
        self._store = met(place)
        self._over = False
        self._joined: dict[int, dict[str, Any]] = {}
        self._lost: dict[int, str] = {}
        self._faults: dict[int, LoftqError] = {}
        self._seen: dict[int, tuple[int, float]] = {}
        if place.rank:
            self.add(f"beat/{place.rank}", 1)
            threading.Thread(target=self._beat, name="loftq-beat", daemon=True).start()

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over = True
        with suppress(EnvironmentFailure):  # whoever asks finds that nobody answers
            if self.place.rank == 0:
                self.say(_ENDED, {"well": error is None})
                self._take_leave(_FAREWELL if error is None else BEAT)
            elif error is None:
                self.say(f"left/{self.place.rank}", {})
            else:
                known = error if isinstance(error, LoftqError) else INTERRUPTED
                self.say(f"gone/{self.place.rank}", told(known))

    def introduce(self, about: dict[str, Any]) -> None:
        """Say who this is. Of the others."""
        self.say(f"about/{self.place.rank}", about)

    def refuse_differing(
        self, own: Mapping[str, Any], others: Mapping[int, Mapping[str, Any]]
    ) -> None:
        """Raise EnvironmentFailure if one of the ``others``, by rank, has introduced itself with
        other software, settings or sources than this one, rank 0: naming both."""
        for rank, why in sorted(self.lost().items()):
            raise EnvironmentFailure(
                f"rank {rank} of {self.place.size}: {why}", hint="it says more"
            )
        for rank, other in sorted(others.items()):
            introduction.refuse(rank, other, own)

    def add(self, key: str, amount: int) -> int:
        """Add to a number that begins at 0, in one step; what it is then."""
        with self._answered():
            return self._store.add(key, amount)

    def say(self, key: str, message: dict[str, Any]) -> None:
        """Leave a message for whoever asks for it."""
        with self._answered():
            self._store.set(key, json.dumps(message))

    def heard(self, key: str) -> dict[str, Any] | None:
        """The message that was left, if there is one."""
        with self._answered():
            if not self._store.check([key]):
                return None
            found: dict[str, Any] = json.loads(self._store.get(key))
            return found

    def wait_for(self, key: str) -> dict[str, Any] | None:
        """The message that rank 0, or another process that may get lost, will leave; None if rank 0
        has ended well instead. Raises EnvironmentFailure if it has ended otherwise."""
        while (message := self.heard(key)) is None:
            ended = self.heard(_ENDED)
            if ended is not None and not ended["well"]:
                raise self._without_first()
            if ended is not None:
                return None
            time.sleep(PAUSE)
        return message

    def gather(
        self,
        key: str,
        meanwhile: Callable[[], None] = lambda: None,
        *,
        patience: float | None = None,
    ) -> dict[int, dict[str, Any]]:
        """What every other process leaves under ``key``, by rank, without those that get lost;
        ``meanwhile`` is called again and again. Of rank 0. Raises EnvironmentFailure if some have
        not come within ``patience`` seconds."""
        found: dict[int, dict[str, Any]] = {}
        began = time.monotonic()
        while True:
            lost = set(self.lost())  # first: they may have left a message before
            for rank in set(range(1, self.place.size)) - set(found):
                message = self.heard(f"{key}/{rank}")
                if message is not None:
                    found[rank] = message
            waiting = set(range(1, self.place.size)) - set(found) - lost
            if not waiting:
                return found
            if patience is not None and time.monotonic() - began > patience:
                named = ", ".join(map(str, sorted(waiting)[:12]))
                raise EnvironmentFailure(
                    f"rank {named} of {self.place.size}: not there after {patience:.0f} s",
                    hint="start all of them, or unset RANK and WORLD_SIZE for an ordinary run",
                )
            meanwhile()
            time.sleep(PAUSE)

    def lost(self) -> dict[int, str]:
        """The ranks that have ended before their time, and what is known of it. Of rank 0."""
        for rank in set(range(1, self.place.size)) - set(self._lost):
            gone = self.heard(f"gone/{rank}")
            if gone is not None:
                self._faults[rank] = read(rank, gone)
                self._lost[rank] = str(gone["message"])
            elif rank in self._joined:
                self._listen(rank)
            elif (about := self.heard(f"about/{rank}")) is not None:
                self._joined[rank] = about
        return self._lost

    def check(self) -> None:
        """Raise what another process has ended with, or EnvironmentFailure if one is gone: work
        that takes all of them cannot go on. As another than rank 0, EnvironmentFailure if rank 0
        has ended."""
        if self.place.rank:
            if self.heard(_ENDED) is not None:
                raise self._without_first()
            return
        for rank, why in sorted(self.lost().items()):
            raise self._faults.get(rank) or EnvironmentFailure(
                f"rank {rank} of {self.place.size} is gone: {why}",
                hint="run the same command again",
            )

    def failure(self, seen: str) -> LoftqError:
        """What to raise if a process does not answer; ``seen``: how that showed."""
        until = time.monotonic() + _GONE
        while time.monotonic() < until:
            try:
                self.check()
            except LoftqError as error:
                return error
            time.sleep(PAUSE)
        return EnvironmentFailure(
            f"{self.place}: another process does not answer: {seen}",
            hint="see what it says; then run the same command again",
        )

    def store(self, prefix: str) -> Store:
        """The store where all meet, with names of one's own."""
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        return PrefixStore(prefix, self._store)

    def _without_first(self) -> EnvironmentFailure:
        return EnvironmentFailure(
            f"{self.place}: rank 0 ended before all was done", hint="it says why"
        )

    def _listen(self, rank: int) -> None:
        if introduction.has_ended(self._joined[rank]):
            self._lost[rank] = "its process has ended"
            return
        now, beats = time.monotonic(), self.add(f"beat/{rank}", 0)
        before, when = self._seen.get(rank, (-1, now))
        if beats != before:
            self._seen[rank] = beats, now
        elif now - when > PATIENCE:
            self._lost[rank] = f"there has been no sign of it for {PATIENCE:.0f} s"

    def _beat(self) -> None:
        while not self._over:
            try:
                self.add(f"beat/{self.place.rank}", 1)
            except EnvironmentFailure:
                return  # the main thread will find out
            time.sleep(BEAT)

    def _take_leave(self, most: float) -> None:
        """Stay until everybody has heard of the end: the store ends with this process."""
        until = time.monotonic() + most
        left: set[int] = set()
        while time.monotonic() < until:
            here = set(range(1, self.place.size)) - left - set(self.lost())
            if not here:
                return
            left |= {rank for rank in here if self.heard(f"left/{rank}") is not None}
            time.sleep(PAUSE)

    @contextmanager
    def _answered(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch's errors of a store are
            place = self.place
            raise EnvironmentFailure(
                f"{place}: rank 0, at {place.address}:{place.port}, does not answer any more",
                hint="see what it says; then run the same command again",
            ) from error
