"""Which tensor of a backbone each tensor of a trained adapter belongs to; what belongs nowhere is
refused, with its name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from loftq_cli.checkpoint.dtypes import FLOATS
from loftq_cli.checkpoint.header import StoredTensor
from loftq_cli.checkpoint.output import Output, open_output
from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.checkpoint.source import Source
from loftq_cli.checkpoint.stored import Stored
from loftq_cli.conversion.architecture import is_embedding, ties_embeddings
from loftq_cli.errors import InputError, LoftqError, UnsupportedInputError
from loftq_cli.layouts.adapter import PREFIX
from loftq_cli.layouts.base import Kind, turned_shape
from loftq_cli.layouts.trained import Pair, TrainedAdapter

_MOST_SHOWN = 5


@dataclass(frozen=True)
class Names:
    """The trained model's names to the backbone's: ``removed`` is taken off, ``added`` put on."""

    removed: str = ""
    added: str = ""

    def of_backbone(self, name: str) -> str:
        return self.added + name.removeprefix(self.removed)

    def of_trained(self, name: str) -> str:
        return self.removed + name.removeprefix(self.added)


def refuse_other_conversion(output: Output, adapter: TrainedAdapter) -> None:
    """PEFT records the path that the backbone was loaded from."""
    base = adapter.config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        return
    try:
        other = open_output(Path(base))
    except (LoftqError, OSError, ValueError):
        return  # moved, renamed, or never a path: nothing can be said
    if other.fingerprint != output.fingerprint:
        raise InputError(
            f"{adapter.file}: trained on {base}, another conversion than {output.directory}",
            hint="merge it into that one, or correct base_model_name_or_path in its config",
        )


def match_names(adapter: TrainedAdapter, known: Iterable[str]) -> Names:
    """How most of the modules with a pair become ``known`` ones: as they are, or with one prefix
    taken off or put on, as between a bare model and one with a task's head.
    Raises InputError where two prefixes do equally well."""
    modules = set(known)
    ends: dict[str, list[str]] = {}
    for module in modules:
        for end in _ends(module):
            ends.setdefault(end, []).append(module.removesuffix(end))
    votes = Counter({Names(): sum(module in modules for module in adapter.pairs)})
    for module in adapter.pairs:
        votes.update(Names(added=prefix) for prefix in ends.get(module, ()))
        votes.update(
            Names(removed=module.removesuffix(end)) for end in _ends(module) if end in modules
        )
    best = max(votes, key=votes.__getitem__)  # the first of equals
    if best != Names() and sum(count == votes[best] for count in votes.values()) > 1:
        raise InputError(
            f"{adapter.file}: tensor '{PREFIX}{next(iter(adapter.pairs))}.lora_A.weight' "
            "could belong to more than one module of the backbone"
        )
    return best


def _ends(module: str) -> list[str]:
    """``b.c`` and ``c`` of ``a.b.c``."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]


def place_pairs(
    adapter: TrainedAdapter,
    names: Names,
    stored: Stored,
    matrices: Collection[str],
    shapes: Mapping[str, tuple[int, ...]],
    kinds: Mapping[str, Kind],
) -> dict[str, Pair]:
    """The pairs by the name of the tensor that they are added to."""
    placed, homeless = {}, []
    for module, pair in adapter.pairs.items():
        name = f"{names.of_backbone(module)}.weight"
        if name not in shapes:
            homeless += [pair.lora_A.name, pair.lora_B.name]
        elif name not in matrices and stored[name][1].dtype not in FLOATS:
            raise InputError(
                f"{adapter.file}: tensor {pair.lora_A.name!r} is for {name!r}, which is of dtype "
                f"{stored[name][1].dtype}"
            )
        elif shapes[name] != turned_shape(pair.shape, kinds[name]):
            what = f"is {list(shapes[name])}, the product of the pair {list(pair.shape)}"
            raise InputError(
                f"{adapter.file}: tensor {pair.lora_A.name!r}: {name!r} {what}",
                hint="give the adapter that was trained on this conversion",
            )
        placed[name] = pair
    _refuse_homeless(adapter, homeless)
    return placed


def place_whole(
    adapter: TrainedAdapter, names: Names, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, StoredTensor]:
    """The whole tensors by the name that they get."""
    placed: dict[str, StoredTensor] = {}
    homeless = []
    for trained, tensor in adapter.whole.items():
        name = names.of_backbone(trained)
        if name not in shapes and trained in shapes:
            name = trained
        if name in placed:
            raise InputError(f"{adapter.file}: tensor {tensor.name!r}: {name!r} is there twice")
        if name not in shapes and not adapter.saves(trained):
            homeless.append(tensor.name)
        elif name in shapes and shapes[name] != tensor.shape:
            raise InputError(
                f"{adapter.file}: tensor {tensor.name!r} is {list(tensor.shape)}, "
                f"{name!r} of the backbone {list(shapes[name])}",
                hint="give the adapter that was trained on this conversion",
            )
        placed[name] = tensor
    _refuse_homeless(adapter, homeless)
    return placed


def refuse_other_backbone(adapter: TrainedAdapter, names: Names, stored: Stored) -> None:
    """Raise InputError where a frozen tensor is not, in its dtype, the one of the backbone."""
    placed = {names.of_backbone(name): tensor for name, tensor in adapter.frozen.items()}
    _refuse_homeless(adapter, [t.name for name, t in placed.items() if name not in stored])
    for name, tensor in placed.items():
        path, ours = stored[name]
        with TensorFile(path) as backbone, TensorFile(adapter.file) as trained:
            theirs = trained.read(tensor)
            if not torch.equal(backbone.read(ours).to(theirs.dtype), theirs):
                raise InputError(
                    f"{adapter.file}: tensor {tensor.name!r} is not the one of {path}",
                    hint="give the adapter that was trained on this conversion",
                )


def _refuse_homeless(adapter: TrainedAdapter, names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
        listed = ", ".join(repr(name) for name in names[:_MOST_SHOWN])
        raise InputError(
            f"{adapter.file}: the backbone has no place for {listed}{more}",
            hint="give the adapter that was trained on this conversion",
        )


def refuse_incomplete(
    adapter: TrainedAdapter, names: Names, matrices: Collection[str], placed: Collection[str]
) -> None:
    """Raise InputError where a quantized matrix lacks the pair that the adapter's config names."""
    modules = [
        names.of_trained(name).removesuffix(".weight") for name in matrices if name not in placed
    ]
    lacking = [module for module in modules if adapter.targets(module)]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise InputError(
            f"{adapter.file}: tensor '{PREFIX}{lacking[0]}.lora_A.weight'{more} missing, "
            "the adapter's target_modules name it",
            hint="give the complete adapter of this conversion",
        )


def refuse_tied(
    backbone: Source,
    adapter: TrainedAdapter,
    whole: Mapping[str, StoredTensor],
    shapes: Collection[str],
) -> None:
    """One tensor stands for both embeddings of a tied model; trained apart they would be two."""
    if not ties_embeddings(backbone.config.content, shapes):
        return
    for name, tensor in whole.items():
        if is_embedding(name):
            raise UnsupportedInputError(
                f"{adapter.file}: tensor {tensor.name!r}: the model ties its input and output "
                "embeddings, one of them trained alone cannot be merged",
                hint="merge it with PEFT's merge_and_unload",
            )
