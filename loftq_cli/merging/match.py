"""Which tensor of a backbone each tensor of a trained adapter belongs to; what belongs nowhere is
refused, with its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loftq_cli.checkpoint.dtypes import FLOATS
from loftq_cli.checkpoint.header import StoredTensor
from loftq_cli.errors import InputError, listed
from loftq_cli.families.experts import FUSED, part_of
from loftq_cli.families.kinds import turned_shape
from loftq_cli.layouts.adapter import PREFIX
from loftq_cli.layouts.trained import TrainedAdapter
from loftq_cli.layouts.trained_parts import FusedPair, Pair, TokenRows
from loftq_cli.merging.backbone import Backbone, InFile
from loftq_cli.merging.names import Names
from loftq_cli.merging.same import same_bytes
from loftq_cli.merging.vocabulary import Vocabulary

_MOST_SHOWN = 5
OTHER = "give the adapter that was trained on this conversion"


@dataclass(frozen=True)
class Parts:
    """What is merged: a backbone, an adapter, how that names what the backbone's files hold, and
    what of the backbone has an entry per token."""

    backbone: Backbone
    adapter: TrainedAdapter
    names: Names
    vocabulary: Vocabulary

    @property
    def file(self) -> Path:
        """The adapter's."""
        return self.adapter.file


@dataclass(frozen=True)
class Placed:
    """The adapter's parts by the name, on disk, of the tensor that they belong to."""

    pairs: Mapping[str, Pair]
    whole: Mapping[str, StoredTensor]
    frozen: Mapping[str, StoredTensor]
    tokens: Mapping[str, TokenRows]

    def touches(self, name: str) -> bool:
        """Whether the adapter has anything for the tensor ``name``."""
        return any(name in part for part in (self.pairs, self.whole, self.frozen, self.tokens))


def place(parts: Parts) -> Placed:
    """Every tensor of the adapter in its place.

    Raises InputError for one that has none, or that is of another shape: only what is as long as
    the vocabulary may have another length.
    """
    names, backbone, vocabulary = parts.names, parts.backbone, parts.vocabulary
    placed = Placed(
        _pairs(parts),
        _whole(parts),
        {names.find(name, backbone.stored): t for name, t in parts.adapter.frozen.items()},
        {
            names.find(f"{module}.weight", backbone.shapes): rows
            for module, rows in parts.adapter.tokens.items()
        },
    )
    homeless = [
        tensor.name
        for name, tensor in placed.frozen.items()
        if name not in backbone.stored and not vocabulary.has(name)
    ]
    homeless += [r.values.name for name, r in placed.tokens.items() if not vocabulary.has(name)]
    _refuse_homeless(parts.file, homeless)
    if both := sorted(set(placed.whole) & set(placed.pairs)):
        raise InputError(f"{parts.file}: {', '.join(both[:5])}: a whole tensor and a pair for it")
    return placed


def _pairs(parts: Parts) -> dict[str, Pair]:
    backbone, vocabulary = parts.backbone, parts.vocabulary
    placed, homeless = {}, []
    for module, pair in parts.adapter.pairs.items():
        name = parts.names.of_backbone(f"{module}.weight")
        if name not in backbone.shapes and not vocabulary.has(name):
            name = parts.names.find(f"{module}.weight", backbone.shapes)
        placed[name] = pair
        own = backbone.shapes.get(name)
        if vocabulary.may_have(name, pair.shape, own):
            continue
        if own is None:
            homeless += [pair.lora_A.name, pair.lora_B.name]
        elif own != turned_shape(pair.shape, backbone.kinds[name]):
            raise InputError(
                f"{parts.file}: tensor {pair.lora_A.name!r}: {name!r} is {list(own)}, the "
                f"product of the pair {list(pair.shape)}",
                hint=OTHER,
            )
        elif (dtype := backbone.base(name).dtype) not in FLOATS:
            raise InputError(
                f"{parts.file}: tensor {pair.lora_A.name!r} is for {name!r}, which is of dtype "
                f"{dtype}"
            )
    _refuse_homeless(parts.file, homeless)
    return placed | _of_experts(parts)


def _of_experts(parts: Parts) -> dict[str, Pair]:
    """The pairs of single experts, of those that PEFT saved fused. Raises InputError for experts
    that the backbone does not have."""
    by_layer: dict[str, list[str]] = {}
    by_home: dict[str, list[str]] = {}
    for name in parts.backbone.shapes:
        if part := part_of(name.removesuffix(".weight")):
            by_layer.setdefault(_layer(part[0]), []).append(name)
        held = parts.backbone.matrices.get(name)
        if held is not None and (home := part_of(held.matrix.in_memory or "")):
            by_home.setdefault(home[0], []).append(name)
    placed: dict[str, Pair] = {}
    for module, pairs in parts.adapter.fused.items():
        disk = parts.names.of_backbone(f"{module}.weight").removesuffix(".weight")
        names = by_home.get(module) or by_layer.get(_layer(disk), [])
        for parameter, pair in pairs.items():
            found = _slices(names, parameter, pair, parts.backbone)
            if not found:
                raise InputError(
                    f"{parts.file}: tensor {pair.lora_A.name!r} is for {pair.count} experts with "
                    f"products of {list(pair.shape)}, and the backbone has no such {parameter}",
                    hint=OTHER,
                )
            placed |= found
    return placed


def _slices(
    names: Sequence[str], parameter: str, pair: FusedPair, backbone: Backbone
) -> dict[str, Pair]:
    """What of ``pair`` is for each of the tensors ``names`` of a layer's experts, empty if they do
    not fit it."""
    for leaves in FUSED[parameter]:
        found: dict[str, Pair] = {}
        for name in names:
            _, part = part_of(name.removesuffix(".weight")) or ("", "")
            number, _, leaf = part.partition(".")
            if leaf in leaves:
                rows = pair.shape[0] // len(leaves)
                found[name] = pair.part(int(number), leaves.index(leaf) * rows, rows)
        whole = len(found) == pair.count * len(leaves)
        if whole and all(backbone.shapes[name] == each.shape for name, each in found.items()):
            return found
    return {}


def _layer(experts: str) -> str:
    """The path of the layer that a module of experts is in: what it is called there differs on
    disk and in memory."""
    return experts.rpartition(".experts")[0].rpartition(".")[0]


def _whole(parts: Parts) -> dict[str, StoredTensor]:
    backbone, vocabulary = parts.backbone, parts.vocabulary
    placed: dict[str, StoredTensor] = {}
    homeless = []
    for trained, tensor in parts.adapter.whole.items():
        name = parts.names.find(trained, backbone.shapes)
        if name not in backbone.shapes and vocabulary.is_bias(name) and len(vocabulary.biases) == 1:
            name = vocabulary.biases[0]  # tied: the same under another name
        if name in placed and not _is_same_bias(parts, name, tensor, placed[name]):
            raise InputError(f"{parts.file}: tensor {tensor.name!r}: {name!r} is there twice")
        placed[name] = tensor
        own = backbone.shapes.get(name)
        if vocabulary.may_have(name, tensor.shape, own):
            continue
        # A second output embedding would leave the one that the model uses as it was.
        second = bool(vocabulary.outputs) and vocabulary.is_output(name)
        if own is None and (second or not parts.adapter.saves(trained)):
            homeless.append(tensor.name)
        elif own is not None and own != tensor.shape:
            raise InputError(
                f"{parts.file}: tensor {tensor.name!r} is {list(tensor.shape)}, "
                f"{name!r} of the backbone {list(own)}",
                hint=OTHER,
            )
    _refuse_homeless(parts.file, homeless)
    return placed


def _is_same_bias(parts: Parts, name: str, first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two tensors of the adapter are the bias ``name`` of the output embedding, which some
    models have under two names."""
    file = parts.file
    return parts.vocabulary.is_bias(name) and same_bytes(InFile(file, first), InFile(file, second))


def _refuse_homeless(file: Path, names: Sequence[str]) -> None:
    if names:
        homeless = listed([repr(name) for name in names], _MOST_SHOWN)
        raise InputError(f"{file}: the backbone has no place for {homeless}", hint=OTHER)


def refuse_incomplete(parts: Parts, placed: Placed) -> None:
    """Raise InputError if a quantized matrix lacks the pair that the adapter's config names."""
    lacking: list[tuple[str, str]] = []
    for name in parts.backbone.matrices:
        if name in placed.pairs or name in placed.whole:
            continue
        trained = parts.names.of_trained(name)
        if trained is not None and parts.adapter.targets(trained.removesuffix(".weight")):
            tensor = f"{PREFIX}{trained.removesuffix('.weight')}.lora_A.weight"
            lacking.append((f"tensor {tensor!r}", "target_modules"))
        elif parameter := parts.adapter.targets_expert(name.removesuffix(".weight")):
            lacking.append((f"the pair of {parameter!r}", "target_parameters"))
    if lacking:
        (what, where), more = lacking[0], len({what for what, _ in lacking}) - 1
        raise InputError(
            f"{parts.file}: {what}{f' and {more} more' if more else ''} missing, the adapter's "
            f"{where} name it",
            hint="give the complete adapter of this conversion",
        )
