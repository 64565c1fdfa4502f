"""The processes that do one piece of work together: they meet at a store of torch's and leave each
other messages there.

Whoever is alive counts up a number every second. Who has not done so for a while is taken for dead,
and so is a process of rank 0's own host that is not there any more.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

from loftq_cli import errors
from loftq_cli.errors import EnvironmentFailure, LoftqError
from loftq_cli.machine.launched import Place
from loftq_cli.version import VERSION

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

BEAT = 1.0
"""Seconds between two signs of life."""
PATIENCE = 30.0
"""Seconds without any, after which a process is taken for dead."""
JOINING = 600.0
"""Seconds that processes may take to come, one after the other."""
PAUSE = 0.1
"""Seconds between two looks at what has been said."""
_FAREWELL = 10.0
_ENDED = "ended"
_GONE = 5.0
"""Seconds in which it becomes known who is gone, once somebody has noticed that one is."""
_LONGEST = 200  # characters of a setting's value in a message


class Group:
    """All processes of one run, as the one at ``place`` knows them. Raises EnvironmentFailure,
    as every method does, if rank 0 cannot be reached."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.host = socket.gethostname()
        self._store = _met(place)
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
                known = error if isinstance(error, LoftqError) else _INTERRUPTED
                self.say(f"gone/{self.place.rank}", told(known))

    def about(
        self, settings: Mapping[str, Any], sources: Sequence[Sequence[Any]]
    ) -> dict[str, Any]:
        """This process as :meth:`refuse_differing` compares it; ``sources``: [name, …] of files."""
        import torch

        return {
            "host": self.host,
            "software": {"loftq-cli": VERSION, "torch": torch.__version__},
            "settings": dict(settings),
            "sources": [list(each) for each in sources],
        }

    def introduce(self, about: dict[str, Any]) -> None:
        """Say who this is. Of the others."""
        whereabouts = {"process": os.getpid(), "space": _space()}
        self.say(f"about/{self.place.rank}", {**about, **whereabouts})

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
            found = _differences(other, own)
            if found:
                raise EnvironmentFailure(
                    f"rank {rank} (on {other['host']}) and rank 0 (on {own['host']}) would not "
                    f"make the same bytes: {'; '.join(found)}",
                    hint="have all of them use the same software, the same model and settings, and "
                    "one kind of device",
                )

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
        about = self._joined[rank]
        if about["space"] == _space() and not _is_there(about["process"]):
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


def told(error: LoftqError | None) -> dict[str, Any]:
    """``error`` as a message to other processes; nothing for none."""
    if error is None:
        return {}
    return {"kind": type(error).__name__, "message": error.message, "hint": error.hint}


def read(rank: int, message: Mapping[str, Any]) -> LoftqError:
    """The error that another process has :func:`told` of; of a machine, it says of whose."""
    kind = getattr(errors, message["kind"], EnvironmentFailure)
    text = message["message"]
    if issubclass(kind, EnvironmentFailure):
        text = f"rank {rank}: {text}"
    error: LoftqError = kind(text, hint=message["hint"])
    return error


_INTERRUPTED = EnvironmentFailure("it was interrupted", hint="run the same command again")


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    found = []
    for what in ("software", "settings"):
        first, second = there[what], here[what]
        names = sorted({*first, *second})
        found += [
            f"{name} {_short(first.get(name))} and {_short(second.get(name))}"
            for name in names
            if first.get(name) != second.get(name)
        ]
    sources = {name: rest for name, *rest in there["sources"]}
    found += [f"source file {name}" for name, *rest in here["sources"] if sources.get(name) != rest]
    return found


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def _space() -> str:
    """The host, and the name space in which the numbers of its processes are."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # another system than Linux
        return socket.gethostname()


def _is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _met(place: Place) -> Store:
    """The store where all meet: of rank 0's process, or torchrun's."""
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
