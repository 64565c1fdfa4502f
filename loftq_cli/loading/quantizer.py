"""The transformers quantizer ``loftq``: loads checkpoints of layout ``loftq``.

Importing this module imports transformers, and registers both classes;
:mod:`loftq_cli.loading.hook` does so once transformers is there.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeGuard

from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from loftq_cli.errors import CorruptFileError, UnsupportedInputError, listed
from loftq_cli.families.experts import FUSED, part_of
from loftq_cli.families.modules import kind_of
from loftq_cli.families.names import key_mapping, places, places_of_experts, prefix_of, tied
from loftq_cli.families.parts import left_out
from loftq_cli.layouts.loftq import FORMAT_VERSION
from loftq_cli.loading import guard
from loftq_cli.loading.beside import adapter_targets, is_merged, lost_targets
from loftq_cli.loading.container import CONTAINER, take_over_all, wait, waiting
from loftq_cli.loading.experts import PackedExperts, take_over
from loftq_cli.loading.packed_weight import PackedWeight
from loftq_cli.loading.replacement import packed
from loftq_cli.loading.trained_beside import warn_of_attached
from loftq_cli.loading.warned import DetachedAdapter
from loftq_cli.numerics.quantizers import trellis_code
from loftq_cli.numerics.quantizers.methods import WIDTHS
from loftq_cli.settings.table import BLOCK_SIZES

QUANT_METHOD = "loftq"
_DECODINGS = ("affine", "codebook", "trellis")
_SCALES = ("bfloat16", "int8")  # if they are not float32
_KINDS = ("embedding", "conv1d")  # if it is not a linear layer
_UPGRADE = "pip install --upgrade loftq-cli"

guard.install()


class LoftqConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of layout ``loftq``: how each quantized module is packed.

    ``modules`` maps module names to ``{"bits", "block_size", "decoding"}`` and, if scales are
    not float32, ``"scales"``, and if it is no ordinary linear layer, ``"kind"``. Raises
    UnsupportedInputError for a version, key, decoding, scales or kind of a newer format,
    CorruptFileError for what no format has.
    """

    def __init__(
        self,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        format_version: int | None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if not _is_integer(format_version) or format_version < 1:
            raise CorruptFileError(f"quantization_config: format_version {format_version!r}")
        if format_version > FORMAT_VERSION:
            raise UnsupportedInputError(
                f"quantization_config: format_version {format_version}, "
                f"this loftq-cli reads up to {FORMAT_VERSION}",
                hint=_UPGRADE,
            )
        _refuse_unknown("quantization_config", unknown)
        if not isinstance(modules, Mapping) or not modules:
            raise CorruptFileError("quantization_config: no modules are listed")
        self.quant_method = quant_method
        self.format_version = format_version
        self.modules = {name: dict(_checked(name, entry)) for name, entry in modules.items()}

    def to_dict(self) -> dict[str, Any]:
        """The entry as it stands in config.json."""
        return {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "modules": copy.deepcopy(self.modules),
        }


class LoftqQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts a packed module in the place of every module that the config lists."""

    requires_calibration = True  # to transformers: refuse anything not quantized already

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config
        of_experts = {name: entry for name, entry in config.modules.items() if part_of(name)}
        others = {name: e for name, e in config.modules.items() if name not in of_experts}
        names = _names(others, model)
        self._adapter_names = key_mapping(names, prefix_of(model))
        present = {name for name, _ in model.named_modules()}
        targets = adapter_targets(model.config)
        targets = [n for n in targets if not part_of(n) and n not in others.keys() - names.keys()]
        lost = lost_targets(targets, self._adapter_names, present)
        names |= _take_over_experts(of_experts, model)
        config.modules = {
            names[name]: entry for name, entry in config.modules.items() if name in names
        }
        if lost:
            warnings.warn(
                f"PeftModel.from_pretrained cannot attach the adapter of {listed(lost)} to "
                f"{type(model).__name__}: use loftq_cli.load",
                DetachedAdapter,
                stacklevel=2,
            )
        for name, entry in config.modules.items():
            module = model.get_submodule(name)
            if not isinstance(module, PackedWeight):
                module = packed(module, entry)
            if CONTAINER in entry:
                wait(module, *entry[CONTAINER])
            # A module that is not in the file would be initialised, which packed codes cannot be;
            # after loading, what is missing is an error instead.
            module._is_hf_initialized = True  # type: ignore[assignment]
            model.set_submodule(name, module)
            _leave_undrawn(model.get_submodule(name.rpartition(".")[0]))

    def update_weight_conversions(self, weight_conversions: Any, model: nn.Module) -> Any:
        """Those that fuse experts would take the packed ones apart from their names."""
        held = [module for module in model.modules() if isinstance(module, PackedExperts)]
        kept = [each for each in weight_conversions if not (held and _fuses(each))]
        return super().update_weight_conversions(kept, model)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        missing = []  # transformers marks what it loaded; on meta is what was offloaded to disk
        for name, module in model.named_modules():
            if isinstance(module, PackedWeight):
                tensors = module.state_dict(keep_vars=True)
                missing += [
                    f"{name}.{key}"
                    for key, tensor in tensors.items()
                    if not (tensor.is_meta or getattr(tensor, "_is_hf_initialized", False))
                ]
        missing += waiting(model, self.quantization_config.modules)
        if missing:
            raise CorruptFileError(
                f"the checkpoint lacks {listed(missing)}", hint="convert the model again"
            )
        take_over_all(model, self.quantization_config.modules)
        _refuse_shared(model)
        for module in model.modules():
            if isinstance(module, PackedExperts):
                module.put_stand_ins()
        if not is_merged(model.config):
            guard.watch(model)
        guard.refuse_to_resize(model)
        guard.tell_of_resizing(model)
        warn_of_attached(str(model.config._name_or_path))  # type: ignore[union-attr]
        if self._adapter_names:
            # PeftModel.from_pretrained renames an adapter's tensors by this attribute.
            model._checkpoint_conversion_mapping = self._adapter_names  # type: ignore[assignment]

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _names(modules: Mapping[str, Mapping[str, Any]], model: nn.Module) -> dict[str, str]:
    """Name in the checkpoint to name in ``model``, for every quantized module; without those that
    a part of the model does not have."""
    found = places(model, modules)
    outside = left_out(model, modules, found)
    lost = [
        name
        for name, entry in modules.items()
        if name not in outside
        and (
            name not in found
            or kind_of(model.get_submodule(found[name])) != entry.get("kind", "linear")
        )
    ]
    if lost:
        what = modules[lost[0]].get("kind", "linear layer")
        raise UnsupportedInputError(
            f"{type(model).__name__} has no {what} {listed(lost)}, "
            "which the checkpoint holds quantized",
            hint="load it with the class that config.json names under architectures",
        )
    return found


def _leave_undrawn(parent: nn.Module) -> None:
    """Keep transformers from drawing, for ``parent``, the weights of what it is made of: it may ask
    packed ones for their shape. What is its own, and missing, has to be drawn."""
    own = [*parent.parameters(recurse=False), *parent.buffers(recurse=False)]
    if not own:
        parent._is_hf_initialized = True  # type: ignore[assignment]


def _take_over_experts(
    modules: Mapping[str, Mapping[str, Any]], model: nn.Module
) -> dict[str, str]:
    """Name in the checkpoint to name in ``model``, for every quantized matrix of an expert, whose
    packed layers are put there. Raises UnsupportedInputError if the model has no place for one."""
    by_place = places_of_experts(model, modules)
    placed = {name for parts in by_place.values() for name in parts.values()}
    if lost := sorted(modules.keys() - placed):
        raise UnsupportedInputError(
            f"{type(model).__name__} has no experts {listed(lost)}, which the checkpoint holds "
            "quantized",
            hint="load it with the class that config.json names under architectures",
        )
    names: dict[str, str] = {}
    for path, parts in by_place.items():
        formats = {part: partial(packed, entry=modules[name]) for part, name in parts.items()}
        take_over(model.get_submodule(path), formats)
        names |= {name: f"{path}.{part}" for part, name in parts.items()}
    return names


def _fuses(conversion: Any) -> bool:
    """Whether transformers makes fused experts of tensors by ``conversion``."""
    targets = getattr(conversion, "target_patterns", [])
    return any(target.rpartition(".")[2] in FUSED and "experts" in target for target in targets)


def _refuse_shared(model: nn.Module) -> None:
    """Raise UnsupportedInputError if a module has another's packed weight: transformers ties
    weights, and leaves scales and adapter behind."""
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedWeight)]
    if pair := tied(model, packed):
        raise UnsupportedInputError(
            f"{type(model).__name__} ties {pair[0]} to {pair[1]}, which the checkpoint holds "
            "quantized",
            hint="load a class without that head, or convert without --embeddings",
        )


def _checked(name: str, entry: Any) -> Mapping[str, Any]:
    where = f"quantization_config: module {name!r}"
    if not isinstance(entry, Mapping) or not {"bits", "block_size", "decoding"} <= set(entry):
        raise CorruptFileError(f"{where}: expected bits, block_size and decoding")
    known = {"bits", "block_size", "decoding", "scales", "kind"}
    if isinstance(entry.get(CONTAINER), tuple):  # no file's
        known.add(CONTAINER)
    _refuse_unknown(where, set(entry) - known)
    for key, names in (("decoding", _DECODINGS), ("scales", _SCALES), ("kind", _KINDS)):
        if key in entry and entry[key] not in names:
            raise UnsupportedInputError(
                f"{where}: {key} {entry[key]!r} is not one of {', '.join(names)}",
                hint=_UPGRADE,
            )
    whole = (0,) if entry["decoding"] == "codebook" else ()
    widths = (trellis_code.BITS,) if entry["decoding"] == "trellis" else WIDTHS
    for key, allowed in (("bits", widths), ("block_size", (*BLOCK_SIZES, *whole))):
        if not _is_integer(entry[key]) or entry[key] not in allowed:
            raise CorruptFileError(f"{where}: {key} {entry[key]!r} is not one of {allowed}")
    return entry


def _refuse_unknown(where: str, keys: Any) -> None:
    if keys:
        raise UnsupportedInputError(
            f"{where}: unknown keys {', '.join(sorted(keys))}", hint=_UPGRADE
        )


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def register(registry: Any) -> None:
    """Put both classes in ``registry``, the module transformers.quantizers.auto, unless they are
    there."""
    if QUANT_METHOD not in registry.AUTO_QUANTIZATION_CONFIG_MAPPING:
        registry.register_quantization_config(QUANT_METHOD)(LoftqConfig)
        registry.register_quantizer(QUANT_METHOD)(LoftqQuantizer)


register(auto)
