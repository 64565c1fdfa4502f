"""Which tensor of a backbone each tensor of a trained adapter belongs to; what belongs nowhere is
refused, with its name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from loftq_cli.checkpoint.dtypes import FLOATS
from loftq_cli.checkpoint.header import StoredTensor
from loftq_cli.errors import InputError
from loftq_cli.families.kinds import turned_shape
from loftq_cli.layouts.adapter import PREFIX
from loftq_cli.layouts.trained import Pair, TokenRows, TrainedAdapter
from loftq_cli.merging.backbone import Backbone
from loftq_cli.merging.names import Names
from loftq_cli.merging.vocabulary import Vocabulary, same_bytes

_MOST_SHOWN = 5
OTHER = "give the adapter that was trained on this conversion"


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


def place(
    adapter: TrainedAdapter, names: Names, backbone: Backbone, vocabulary: Vocabulary
) -> Placed:
    """Every tensor of ``adapter`` in its place.

    Raises InputError for one that has none, or that is of another shape: only what is as long as
    the ``vocabulary`` may have another length.
    """
    placed = Placed(
        _pairs(adapter, names, backbone, vocabulary),
        _whole(adapter, names, backbone, vocabulary),
        {names.find(name, backbone.stored): t for name, t in adapter.frozen.items()},
        {
            names.find(f"{module}.weight", backbone.shapes): rows
            for module, rows in adapter.tokens.items()
        },
    )
    homeless = [
        tensor.name
        for name, tensor in placed.frozen.items()
        if name not in backbone.stored and not vocabulary.has(name)
    ]
    homeless += [r.values.name for name, r in placed.tokens.items() if not vocabulary.has(name)]
    _refuse_homeless(adapter, homeless)
    if both := sorted(set(placed.whole) & set(placed.pairs)):
        raise InputError(f"{adapter.file}: {', '.join(both[:5])}: a whole tensor and a pair for it")
    return placed


def _pairs(
    adapter: TrainedAdapter, names: Names, backbone: Backbone, vocabulary: Vocabulary
) -> dict[str, Pair]:
    placed, homeless = {}, []
    for module, pair in adapter.pairs.items():
        name = names.of_backbone(f"{module}.weight")
        if name not in backbone.shapes and not vocabulary.has(name):
            name = names.find(f"{module}.weight", backbone.shapes)
        placed[name] = pair
        own = backbone.shapes.get(name)
        if vocabulary.may_have(name, pair.shape, own):
            continue
        if own is None:
            homeless += [pair.lora_A.name, pair.lora_B.name]
        elif own != turned_shape(pair.shape, backbone.kinds[name]):
            raise InputError(
                f"{adapter.file}: tensor {pair.lora_A.name!r}: {name!r} is {list(own)}, the "
                f"product of the pair {list(pair.shape)}",
                hint=OTHER,
            )
        elif backbone.dtype(name) not in FLOATS:
            raise InputError(
                f"{adapter.file}: tensor {pair.lora_A.name!r} is for {name!r}, which is of dtype "
                f"{backbone.dtype(name)}"
            )
    _refuse_homeless(adapter, homeless)
    return placed


def _whole(
    adapter: TrainedAdapter, names: Names, backbone: Backbone, vocabulary: Vocabulary
) -> dict[str, StoredTensor]:
    placed: dict[str, StoredTensor] = {}
    homeless = []
    for trained, tensor in adapter.whole.items():
        name = names.find(trained, backbone.shapes)
        if name not in backbone.shapes and vocabulary.is_bias(name) and len(vocabulary.biases) == 1:
            name = vocabulary.biases[0]  # tied: the same under another name
        if name in placed and not _is_same_bias(adapter, name, (tensor, placed[name]), vocabulary):
            raise InputError(f"{adapter.file}: tensor {tensor.name!r}: {name!r} is there twice")
        placed[name] = tensor
        own = backbone.shapes.get(name)
        if vocabulary.may_have(name, tensor.shape, own):
            continue
        # A second output embedding would leave the one that the model uses as it was.
        second = bool(vocabulary.outputs) and vocabulary.is_output(name)
        if own is None and (second or not adapter.saves(trained)):
            homeless.append(tensor.name)
        elif own is not None and own != tensor.shape:
            raise InputError(
                f"{adapter.file}: tensor {tensor.name!r} is {list(tensor.shape)}, "
                f"{name!r} of the backbone {list(own)}",
                hint=OTHER,
            )
    _refuse_homeless(adapter, homeless)
    return placed


def _is_same_bias(
    adapter: TrainedAdapter,
    name: str,
    both: tuple[StoredTensor, StoredTensor],
    vocabulary: Vocabulary,
) -> bool:
    """Whether two tensors of ``adapter`` are the bias ``name`` of the output embedding, which some
    models have under two names."""
    first, second = ((adapter.file, tensor) for tensor in both)
    return vocabulary.is_bias(name) and same_bytes(first, second)


def _refuse_homeless(adapter: TrainedAdapter, names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
        listed = ", ".join(repr(name) for name in names[:_MOST_SHOWN])
        raise InputError(
            f"{adapter.file}: the backbone has no place for {listed}{more}", hint=OTHER
        )


def refuse_incomplete(
    adapter: TrainedAdapter, names: Names, matrices: Collection[str], placed: Placed
) -> None:
    """Raise InputError if a quantized matrix lacks the pair that the adapter's config names."""
    lacking = []
    for name in matrices:
        trained = names.of_trained(name)
        if trained is not None and name not in placed.pairs and name not in placed.whole:
            module = trained.removesuffix(".weight")
            lacking += [module] * adapter.targets(module)
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise InputError(
            f"{adapter.file}: tensor '{PREFIX}{lacking[0]}.lora_A.weight'{more} missing, "
            "the adapter's target_modules name it",
            hint="give the complete adapter of this conversion",
        )
