"""The source's config.json as the backbone has it, before a layout adds what it needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loftq_cli.checkpoint.dtypes import computed

_DTYPE_KEYS = ("dtype", "torch_dtype")
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")


def backbone_config(config: Mapping[str, Any], matrix_dtypes: Iterable[str]) -> dict[str, Any]:
    """``config`` in its own key order, less what says in vain that nothing is quantized, and with
    float32 for float64, which no matrix is stored in: a model in float64 would compute in it.

    ``matrix_dtypes`` are the tags of the quantized matrices in the source. Where the config names
    no dtype and they are float64, it is said: transformers would take that of some other tensor.
    """
    result = _without_float64(config)
    unsaid = not any(key in result for key in _DTYPE_KEYS)
    if unsaid and any(computed(tag) != tag for tag in matrix_dtypes):
        result["dtype"] = "float32"
    return result


def _without_float64(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: "float32"
        if key in _DTYPE_KEYS and value in ("float64", "double", "torch.float64")
        else _without_float64(value)
        if isinstance(value, dict)
        else value
        for key, value in config.items()
        if value or key not in _QUANTIZATION_KEYS
    }
