"""Whether a checkpoint is quantized already: what config.json says, and tensors that give it away.

A tensor that makes a packed weight whole (scales, zero points) lies beside that weight, under its
name or its module's. So ``logit_scale`` and ``layer_scale`` are no signs, and neither is a tensor
of scales whose weight is not there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loftq_cli.checkpoint.dtypes import FLOATS
from loftq_cli.checkpoint.header import shown
from loftq_cli.checkpoint.source import Source
from loftq_cli.errors import UnsupportedInputError

KEYS = ("quantization_config", "compression_config")
_MLX = "quantization"
_NARROW = ("F8_", "F4", "F6_")
_NOT_PACKED = (*FLOATS, "C64", "BOOL")
_HINT = "convert the full-precision checkpoint it was made from"


@dataclass(frozen=True)
class _Sign:
    """A tensor whose name matches ``pattern`` belongs to the weight ``weight`` (an expansion of the
    match), which is ``packed``, in codes, or may be of any dtype, of two or more dimensions."""

    pattern: re.Pattern[str]
    weight: str
    method: str
    packed: bool = True


_SIGNS = (
    _Sign(re.compile(r"(.+\.qweight)"), r"\1", "GPTQ, AWQ or a kin of theirs"),
    _Sign(re.compile(r"(.+\.qzeros)"), r"\1", "GPTQ, AWQ or a kin of theirs"),
    _Sign(re.compile(r"(.+\.weight_packed)"), r"\1", "compressed-tensors"),
    _Sign(
        re.compile(r"(.+\.weight)\.(?:absmax|quant_map|quant_state\..+)"),
        r"\1",
        "bitsandbytes, 4 bit",
        packed=False,
    ),
    _Sign(re.compile(r"(.+)\.SCB"), r"\1.weight", "bitsandbytes, 8 bit", packed=False),
    _Sign(re.compile(r"(.+\.weight)_scale_inv"), r"\1", "FP8 with scales of blocks", packed=False),
    _Sign(re.compile(r"(.+\.weight)_scale"), r"\1", "compressed-tensors or ModelOpt", packed=False),
    _Sign(re.compile(r"(.+)_scales"), r"\1_blocks", "MXFP4"),
    _Sign(re.compile(r"(.+)_scales?(?:_inv|_2)?"), r"\1", "scales beside its codes"),
    _Sign(re.compile(r"(.+)\.(?:scales?|weight_scales?)"), r"\1.weight", "scales beside its codes"),
    _Sign(re.compile(r"(.+\.W_q)"), r"\1", "HQQ"),
    _Sign(re.compile(r"(.+\.weight)\._scale"), r"\1._data", "quanto"),
    _Sign(re.compile(r"(.+)\._weight_scale"), r"\1._weight_qdata", "torchao", packed=False),
    _Sign(re.compile(r"(.+)\.codebooks"), r"\1.codes", "AQLM"),
    _Sign(re.compile(r"(.+\.Qidxs(?:_\d+)?)"), r"\1", "QuIP"),
    _Sign(re.compile(r"(.+\.q_weight)"), r"\1", "EXL2"),
    _Sign(re.compile(r"(.+\.trellis)"), r"\1", "EXL3"),
)
# Whatever it is, if nothing else gives it away: one tensor of integers may be a table of a model's
# own, which is passed through, but several layers of blocks do not take integers for their weights.
_ANY = _Sign(re.compile(r"(.+\.\d+\..+\.weight)"), r"\1", "codes in the place of a weight")


def refuse_quantized(source: Source) -> None:
    """Raise UnsupportedInputError, which names the key or the tensor and the method as far as it is
    known, if ``source`` is quantized already."""
    for key, value in stated(source.config.content):
        method = value.get("quant_method") if isinstance(value, Mapping) else value
        named = f" ({method})" if isinstance(method, str) else ""
        raise UnsupportedInputError(
            f"{source.directory / source.config.name}: {key}: the checkpoint is quantized already"
            f"{named}",
            hint=_HINT,
        )
    for shard in source.shards:
        for tensor in shard.header.tensors:
            if tensor.dtype.startswith(_NARROW):
                raise UnsupportedInputError(
                    f"{shard.path}: tensor {shown(tensor.name)} is {tensor.dtype}: the checkpoint "
                    "is quantized already",
                    hint=_HINT,
                )
    _refuse_signs(source, _SIGNS)
    codes = [
        tensor
        for tensor in source.tensors
        if _ANY.pattern.fullmatch(tensor.name) and tensor.dtype not in _NOT_PACKED
    ]
    if len(codes) > 1:
        _refuse_signs(source, (_ANY,))


def _refuse_signs(source: Source, signs: Sequence[_Sign]) -> None:
    specs = {tensor.name: tensor for tensor in source.tensors}
    for shard in source.shards:
        for tensor in shard.header.tensors:
            for sign in signs:
                match = sign.pattern.fullmatch(tensor.name)
                weight = match and specs.get(match.expand(sign.weight))
                if not weight:
                    continue
                packed = weight.dtype not in _NOT_PACKED
                if packed or (not sign.packed and len(weight.shape) > 1):
                    beside = f" beside {shown(weight.name)}" if weight != tensor else ""
                    raise UnsupportedInputError(
                        f"{shard.path}: tensor {shown(tensor.name)}{beside}: the checkpoint is "
                        f"quantized already ({sign.method}), though config.json does not say so",
                        hint=_HINT,
                    )


def stated(value: object, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key, at any depth, under which a config says how it is quantized, with what it says."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            here = f"{path}.{key}" if path else str(key)
            if item and (key in KEYS or (key == _MLX and isinstance(item, Mapping))):
                yield here, item
            else:
                yield from stated(item, here)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from stated(item, f"{path}[{number}]")
