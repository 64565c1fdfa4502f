"""MXFP4: experts of gpt-oss, E2M1 codes in blocks of 32 with a power of two for each.

``X_blocks`` uint8 (experts, out, blocks, 16), two codes a byte, the lower one first; ``X_scales``
uint8 (experts, out, blocks), biased by 127. ``X`` is (experts, in, out). (transformers
``integrations/mxfp4.py``.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch

from loftq_cli.checkpoint.decoding.parts import Model, broken, check_shape, nibbles
from loftq_cli.checkpoint.dtypes import torch_dtype
from loftq_cli.checkpoint.encoded import EncodedTensor

NAME = "MXFP4"
_CODES, _SCALES = "_blocks", "_scales"
_BIAS = 127
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NOT_A_NUMBER = 255


def find(model: Model) -> Iterator[tuple[EncodedTensor, set[str]]]:
    """Every MXFP4 tensor, and the names of the stored tensors that it takes up. Raises
    CorruptFileError for one that cannot be read."""
    for stored, part in model.parts.items():
        name = stored.removesuffix(_CODES)
        if name == stored or part.tensor.dtype != "U8":
            continue
        shape = part.tensor.shape
        if len(shape) != 4 or shape[3] != 16:
            raise broken(name, f"{stored} is {list(shape)}, not (experts, out, blocks, 16)")
        scale = model.parts.get(name + _SCALES)
        if scale is None or scale.tensor.dtype != "U8":
            raise broken(name, f"{name}{_SCALES} is missing, or not of bytes")
        check_shape(name, scale, shape[:3])
        experts, rows, blocks, _ = shape
        decode = partial(_decoded, name=name, dtype=torch_dtype(model.dtype))
        meant = experts, 32 * blocks, rows
        encoded = EncodedTensor.of(name, model.dtype, meant, part, {"s": scale}, decode)
        yield encoded, set(encoded.names)


def _decoded(
    codes: torch.Tensor, others: Mapping[str, torch.Tensor], *, name: str, dtype: torch.dtype
) -> torch.Tensor:
    scales = others["s"]
    if bool((scales == _NOT_A_NUMBER).any()):
        place = (scales == _NOT_A_NUMBER).nonzero()[0].tolist()
        raise broken(name, f"its scale at {place} is NaN")
    levels = torch.tensor((*_VALUES, *(-value for value in _VALUES)), dtype=dtype)
    experts, rows, blocks, _ = codes.shape
    result = torch.empty((experts, 32 * blocks, rows), dtype=dtype)
    for expert in range(experts):
        values = levels[nibbles(codes[expert]).int()]
        exponents = scales[expert].int()[..., None] - _BIAS
        result[expert] = torch.ldexp(values, exponents).reshape(rows, 32 * blocks).T
    return result
