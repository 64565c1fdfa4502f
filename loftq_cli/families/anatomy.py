"""What transformers makes of the tensors of a checkpoint, known before anything is computed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from loftq_cli.checkpoint.stacks import Stack
from loftq_cli.errors import listed
from loftq_cli.families import adaptable
from loftq_cli.families.architecture import kind_of as kind_by_name
from loftq_cli.families.classes import takes_text
from loftq_cli.families.code import Use, weights_read
from loftq_cli.families.expert_homes import homes_of_experts
from loftq_cli.families.experts import is_expert
from loftq_cli.families.kinds import Kind
from loftq_cli.families.modules import kind_of
from loftq_cli.families.names import Naming, Place
from loftq_cli.families.skeleton import skeleton

_USES: dict[Use, str] = {
    "value": "the model's code reads this weight itself",
    "dtype": "the model's code casts to the dtype of this weight",
}

_GATED = r"self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj"
_BERT = r"attention\.self\.(?:query|key|value)|(?:attention\.output|intermediate|output)\.dense"
# Classes in which tensors have the names that they have on disk, and in whose blocks every matrix
# is a linear layer that code calls: (model_type, class, path of the blocks, modules in a block).
# Nothing has to be looked up for these; importing transformers takes longer than converting a small
# model.
PLAIN = (
    ("bert", "BertModel", "encoder.layer", _BERT),
    ("gemma", "GemmaForCausalLM", "model.layers", _GATED),
    ("gemma2", "Gemma2ForCausalLM", "model.layers", _GATED),
    ("llama", "LlamaForCausalLM", "model.layers", _GATED),
    ("mistral", "MistralForCausalLM", "model.layers", _GATED),
    (
        "phi3",
        "Phi3ForCausalLM",
        "model.layers",
        r"self_attn\.(?:qkv|o)_proj|mlp\.(?:gate_up|down)_proj",
    ),
    ("qwen2", "Qwen2ForCausalLM", "model.layers", _GATED),
    ("qwen3", "Qwen3ForCausalLM", "model.layers", _GATED),
)
_RENAMED = re.compile(r"\.(?:gamma|beta)$")  # of norms, in old files


@dataclass(frozen=True)
class Anatomy:
    """``names``: of tensors, on disk to in memory, if they differ. ``reasons``: why a matrix
    cannot be quantized, by name on disk. ``stacks``: tensors that hold a matrix of each expert, by
    name; ``experts``: where the experts' matrices, and those of stacks, are in memory, by name, if
    PEFT does not fuse their adapters itself. ``takes_text``: whether the class does, None if nobody
    knows. ``architecture``: the class, if config.json names none. ``remarks``: for whoever
    converts. ``refusal``: why no conversion of it would load, or None. ``unknown``: why there is
    nothing to say, or None."""

    names: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, Stack] = field(default_factory=dict)
    experts: Mapping[str, str] = field(default_factory=dict)
    takes_text: bool | None = None
    architecture: str | None = None
    remarks: tuple[str, ...] = ()
    refusal: str | None = None
    unknown: str | None = None

    @property
    def sha256(self) -> str | None:
        """Of all that names alone do not say, None if that is nothing."""
        plain = self.takes_text is not False and self.architecture is None
        if not (self.names or self.reasons or self.experts) and plain:
            return None
        held: list[object] = [self.names, self.reasons, self.takes_text, self.architecture]
        held += [self.experts] if self.experts else []
        text = json.dumps(held, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def anatomy(
    config: Mapping[str, Any], tensors: Mapping[str, Sequence[int]], *, shortcut: bool = True
) -> Anatomy:
    """The anatomy of a checkpoint: ``config`` is the content of its config.json, ``tensors`` its
    names and shapes. Experts are left to those who know them (conversion.experts). Without the
    ``shortcut`` transformers is asked about plain classes as well."""
    if shortcut and _is_plain(config, tensors):
        return Anatomy()
    model = skeleton(config)
    if isinstance(model, str):
        return _by_names(model)
    naming = Naming(model, model.state_dict().keys())
    places = {name: naming.place(name) for name in tensors}
    if all(places[name] is None for name in _numbered(tensors)):
        return _by_names(f"{type(model).__name__} loads none of the blocks in it")
    modules = dict(model.named_modules())
    reads, shared = weights_read(model), _shared(model)
    names, reasons = {}, {}
    stacks, experts = homes_of_experts(config, tensors, places, model)
    for name, shape in tensors.items():
        place = places[name]
        if place is not None and not place.computed and place.name != name:
            names[name] = place.name
        if len(shape) == 2 and name.endswith(".weight"):
            kind = kind_by_name(name, config)
            reason = _reason(place, kind, modules, reads, shared, type(model).__name__)
            if reason is not None:
                reasons[name] = reason
    lost = _lost_adapters(model, places, tensors, reasons)
    stated = bool(config.get("architectures"))
    lacking = _lacking(model, places, shared)
    homeless = [name for name in _matrices(tensors) if places[name] is None]
    return Anatomy(
        names,
        {**reasons, **dict.fromkeys(lost, adaptable.LOST)},
        stacks,
        experts,
        takes_text(model),
        None if stated else type(model).__name__,
        tuple(_remarks(model, places, lacking, lost, stated=stated)),
        _misnamed(model, homeless, lacking) or adaptable.unadaptable(model),
    )


def _by_names(why: str) -> Anatomy:
    remark = f"what is converted was decided by names alone, for {why}"
    return Anatomy(remarks=(remark,), unknown=why)


def _lacking(
    model: nn.Module, places: Mapping[str, Place | None], shared: Collection[str]
) -> list[str]:
    """The matrices of blocks that no tensor of the checkpoint goes to, in a model of which
    transformers computes none."""
    found = {place.name for place in places.values() if place is not None}
    if any(place is not None and place.computed for place in places.values()):
        return []
    linear = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if kind_of(module) == "linear" and _numbered([name]) and name not in shared
    ]
    return [name for name in linear if name not in found]


def _misnamed(model: nn.Module, homeless: Sequence[str], lacking: Sequence[str]) -> str | None:
    """What to say if the checkpoint has the matrices that the model lacks, under names that
    transformers takes no notice of: it would draw them at random."""
    if not lacking or len(homeless) < len(lacking):
        return None
    return (
        f"{type(model).__name__} would have random weights: it does not find {listed(lacking, 1)}, "
        f"and has no place for {listed(homeless, 1)}"
    )


def _remarks(
    model: nn.Module,
    places: Mapping[str, Place | None],
    lacking: Sequence[str],
    lost: Sequence[str],
    *,
    stated: bool,
) -> Iterator[str]:
    """What is odd about a checkpoint: matrices of blocks that it lacks, or that PEFT would lose the
    adapter of, and a head that the class has no place for if config.json names no class."""
    if lacking:
        yield (
            f"{type(model).__name__} has {listed(lacking, 1)}, which the checkpoint lacks: it will "
            "not load"
        )
    if lost:
        yield f"{listed(lost, 1)} stay as they are: {adaptable.LOST}"
    homeless = [name for name in places if places[name] is None and not _numbered([name])]
    if homeless and not stated:
        yield (
            f"config.json names no architecture: it will load as {type(model).__name__}, which has "
            f"no place for {listed(homeless, 1)}"
        )


def _reason(
    place: Place | None,
    kind: Kind,
    modules: Mapping[str, nn.Module],
    reads: Mapping[str, Use],
    shared: Mapping[str, str],
    model: str,
) -> str | None:
    """Why the matrix that goes to ``place``, ``kind`` by its name, cannot be quantized, None if it
    can."""
    if place is None:
        return f"{model} does not load it"
    if place.computed:
        return "transformers splits or fuses it while it loads"
    name, _, last = place.name.rpartition(".")
    if last != "weight" or kind_of(modules[name]) != kind:
        what = "embedding" if kind == "embedding" else "linear layer"
        return f"in memory a part of {type(modules[name]).__name__}, which is no {what}"
    if name in reads:
        return _USES[reads[name]]
    if name in shared:
        return f"shared with {shared[name]}"
    return None


def _lost_adapters(
    model: nn.Module,
    places: Mapping[str, Place | None],
    tensors: Mapping[str, Sequence[int]],
    ruled_out: Collection[str],
) -> list[str]:
    """The matrices in blocks, not ``ruled_out``, whose adapter PEFT would lose; those of experts
    have names of their own."""
    modules = {}
    for name in _matrices(tensors):
        place = places[name]
        if place is not None and name not in ruled_out and not is_expert(name):
            modules[name] = place.name.removesuffix(".weight")
    lost = adaptable.lost(model, set(modules.values()))
    return [name for name, module in modules.items() if module in lost]


def _shared(model: nn.Module) -> dict[str, str]:
    """Modules that have their weight in common with another, each with one of the others."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(name)
    return {
        name: next(other for other in names if other != name)
        for names in owners.values()
        if len(names) > 1
        for name in names
    }


def _is_plain(config: Mapping[str, Any], tensors: Mapping[str, Sequence[int]]) -> bool:
    """Whether the checkpoint is one of a PLAIN class and holds nothing else."""
    known = (config.get("model_type"), *(config.get("architectures") or [])[:1])
    count = config.get("num_hidden_layers")
    for kind, name, stack, modules in PLAIN:
        if (kind, name) == known:
            if not isinstance(count, int):
                return True  # it describes no model that could be asked
            matrix = re.compile(rf"{re.escape(stack)}\.(\d+)\.({modules})\.weight")
            matrices = [n for n in _numbered(tensors) if len(tensors[n]) > 1]
            found = [match for n in matrices if (match := matrix.fullmatch(n))]
            each = len({match[2] for match in found})
            return (
                len(found) == len(matrices) == count * each
                and all(int(match[1]) < count for match in found)
                and not any(map(_RENAMED.search, tensors))
            )
    return False


def _matrices(tensors: Mapping[str, Sequence[int]]) -> list[str]:
    """The weights in blocks that have two dimensions."""
    named = [name for name in _numbered(tensors) if name.endswith(".weight")]
    return [name for name in named if len(tensors[name]) == 2]


def _numbered(names: Iterable[str]) -> list[str]:
    return [name for name in names if any(part.isdecimal() for part in name.split("."))]
