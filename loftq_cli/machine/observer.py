"""How a conversion reports what it is doing, without knowing who listens."""

from __future__ import annotations

import logging


class Observer:
    """Receives progress; this base class ignores it."""

    def begin(self, total: int, doing: str = "converting", unit: str = "B") -> None:
        """What ``doing`` names starts; ``total`` bytes of source tensors, or what else ``unit``
        says, will be worked through."""

    def count(self, items: int, noun: str) -> None:
        """What has begun is so many ``items``, of which :meth:`finished` tells."""

    def finished(self, told: str = "") -> None:
        """One more item is finished; ``told``: how it stands now, in few words."""

    def skip(self, amount: int) -> None:
        """So much was done before, in no time. Unless that is of interest, as :meth:`advance`."""
        self.advance(amount)

    def working_on(self, name: str) -> None:
        """The tensor ``name`` is next."""

    def advance(self, amount: int) -> None:
        """So much more is done."""

    def begin_download(self, total_bytes: int) -> None:
        """So much of the source is not on disk yet, and will be downloaded meanwhile."""

    def downloaded(self, nbytes: int) -> None:
        """``nbytes`` more have arrived. Called from a thread of its own."""

    def note(self, text: str) -> None:
        """A one-line remark for the user."""

    def detail(self, text: str) -> None:
        """A one-line remark for who asked for more (``-v``)."""

    def end(self) -> None:
        """No more progress will come, whatever happened."""


class Logged(Observer):
    """Hands remarks to the logger ``loftq``: for whoever calls from Python. Progress is ignored."""

    _logger = logging.getLogger("loftq")

    def note(self, text: str) -> None:
        self._logger.info(text)

    def detail(self, text: str) -> None:
        self._logger.debug(text)
