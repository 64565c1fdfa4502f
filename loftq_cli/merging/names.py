"""The names of a trained model's modules and those of the same modules in the backbone's files.

A trained adapter has the names that the modules have in memory. On disk they may have others: by
rules of the family, and by the prefix that tells the bare model from one with a task's head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from loftq_cli.checkpoint.output import Output
from loftq_cli.errors import InputError
from loftq_cli.layouts.adapter import PREFIX
from loftq_cli.layouts.trained import TrainedAdapter


@dataclass(frozen=True)
class Names:
    """Names of tensors: ``removed`` is taken off a trained name and ``added`` put on, which gives
    the one in memory; ``in_memory`` has those that are others there than on disk, by the one on
    disk."""

    removed: str = ""
    added: str = ""
    in_memory: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def _on_disk(self) -> dict[str, str]:
        return {name: disk for disk, name in self.in_memory.items()}

    def of_backbone(self, name: str) -> str:
        """The name on disk of the trained tensor ``name``."""
        name = self.added + name.removeprefix(self.removed)
        return self._on_disk.get(name, name)

    def find(self, name: str, known: Collection[str]) -> str:
        """:meth:`of_backbone`, or the first of the less likely names that is ``known``."""
        first = self.of_backbone(name)
        others = (self._on_disk.get(name, name), name)
        return next((found for found in (first, *others) if found in known), first)

    def of_trained(self, name: str) -> str | None:
        """The trained name of the tensor ``name`` on disk, None if it lies outside of what was
        trained."""
        name = self.in_memory.get(name, name)
        if not name.startswith(self.added):
            return None
        return self.removed + name.removeprefix(self.added)


def recorded(output: Output) -> dict[str, str]:
    """What the manifest says of tensors that have other names in memory: on disk to in memory."""
    found = {
        record["name"]: f"{record['in_memory']}.weight"
        for record in output.records
        if "in_memory" in record
    }
    entries = output.manifest["passed_through"]
    return found | {e["name"]: e["in_memory"] for e in entries if "in_memory" in e}


def match_names(
    adapter: TrainedAdapter, tensors: Collection[str], in_memory: Mapping[str, str]
) -> Names:
    """How most of the modules with a pair become those of ``tensors``, which are names on disk: as
    they are, or as they are ``in_memory``; either with one prefix taken off or put on, as between a
    bare model and one with a task's head. Raises InputError if two ways do equally well and
    disagree."""
    # What is in memory comes first: of equal ways, it knows the names outside of the pairs.
    candidates = _votes(adapter, tensors, Names(in_memory=in_memory)) if in_memory else []
    candidates += _votes(adapter, tensors, Names())
    most = max(count for _, count in candidates)
    equals = [names for names, count in candidates if count == most]
    # Names that need no prefix are right whatever a prefix would make of them.
    equals = [names for names in equals if not names.removed and not names.added] or equals
    ways = {tuple(_places(adapter, names)) for names in equals}
    if len(ways) > 1:
        raise InputError(
            f"{adapter.file}: tensor '{PREFIX}{next(iter(adapter.pairs))}.lora_A.weight' "
            "could belong to more than one module of the backbone"
        )
    return equals[0]


def places_all(adapter: TrainedAdapter, tensors: Collection[str], names: Names) -> bool:
    """Whether every part of ``adapter`` has a place among ``tensors``, which it need not have."""
    trained = [f"{module}.weight" for module in (*adapter.pairs, *adapter.tokens)]
    trained += [*adapter.whole, *adapter.frozen]
    return all(names.find(name, tensors) in tensors for name in trained)


def _places(adapter: TrainedAdapter, names: Names) -> list[str]:
    return [names.of_backbone(f"{module}.weight") for module in adapter.pairs]


def _votes(
    adapter: TrainedAdapter, tensors: Iterable[str], names: Names
) -> list[tuple[Names, int]]:
    """``names`` with every prefix that places some of the modules, and how many it places."""
    modules = {names.in_memory.get(name, name).removesuffix(".weight") for name in tensors}
    ends: dict[str, list[str]] = {}
    for module in modules:
        for end in _ends(module):
            ends.setdefault(end, []).append(module.removesuffix(end))
    votes = Counter({("", ""): sum(module in modules for module in adapter.pairs)})
    for module in adapter.pairs:
        votes.update(("", prefix) for prefix in ends.get(module, ()))
        votes.update((module.removesuffix(end), "") for end in _ends(module) if end in modules)
    return [
        (Names(removed, added, names.in_memory), count) for (removed, added), count in votes.items()
    ]


def _ends(module: str) -> list[str]:
    """``b.c`` and ``c`` of ``a.b.c``."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]
